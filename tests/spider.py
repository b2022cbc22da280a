"""The spider that test_scrapy.py runs: it asks for what it is told to, and says what came of each request.

By ``scrapy runspider``, or as a script of its own: Scrapy then makes its parts before the loop runs.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import scrapy
from scrapy.crawler import CrawlerProcess

import aiobind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from scrapy.http import Response
    from twisted.python.failure import Failure


class Planned(scrapy.Spider):
    """``-a plan='[{"url": "http://...", "meta": {"source": "if!n1"}}]'``."""

    name = "planned"
    custom_settings = {  # noqa: RUF012 - as Scrapy's users write it
        "DOWNLOAD_HANDLERS": dict.fromkeys(("http", "https"), "aiobind.scrapy.DownloadHandler"),
        "AIOBIND_OPTIONS": {"policy": aiobind.RoundRobin(), "abort_on_link_down": True},
        "TELNETCONSOLE_ENABLED": False,
    }

    def __init__(self, plan: str) -> None:
        super().__init__()
        self.plan = json.loads(plan)

    async def start(self) -> AsyncIterator[scrapy.Request]:
        for request in self.plan:
            yield scrapy.Request(errback=self.failed, dont_filter=True, cb_kwargs={"asked": request["url"]}, **request)

    def parse(self, response: Response, asked: str) -> Iterator[dict[str, Any]]:
        bound = aiobind.bound_source(response)
        assert bound is response.meta["bound_source"]
        local = {
            "source": str(bound.source),
            "interface": bound.interface,
            "address": bound.address,
            "port": bound.port,
        }
        yield {"url": asked, "status": response.status, "bytes": len(response.body), **local}

    def failed(self, failure: Failure) -> Iterator[dict[str, Any]]:
        error, request = failure.value, failure.request  # type: ignore[attr-defined]
        cause = error.__cause__
        names = {"error": type(error).__name__, "cause": type(cause).__name__, "errno": getattr(cause, "errno", None)}
        yield {"url": request.url, **names, "text": str(error), "tries": 1 + request.meta.get("retry_times", 0)}


if __name__ == "__main__":
    process = CrawlerProcess({"AIOBIND_SOURCES": sys.argv[2], "FEEDS": {"stdout:": {"format": "jsonlines"}}})
    process.crawl(Planned, plan=sys.argv[1])
    process.start()
