"""A Scrapy spider whose requests leave from the sources that you name; results as JSON lines.

    scrapy runspider examples/scrapy_spider.py -o -:jsonl -s 'AIOBIND_SOURCES=if!eth0,if!wwan0' -a url=http://example.com

With `-a pin='if!wwan0'` the page itself is got from that source alone, and only what it links to from each in its turn.
It needs `pip install "aiobind[scrapy]"`.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import scrapy
from scrapy.http import Response, TextResponse

import aiobind


class Pages(scrapy.Spider):
    """Gets a page and those that it links to."""

    name = "pages"
    custom_settings = {  # noqa: RUF012 - Scrapy's own way
        "DOWNLOAD_HANDLERS": {"http": "aiobind.scrapy.DownloadHandler", "https": "aiobind.scrapy.DownloadHandler"},
        "AIOBIND_OPTIONS": {"limit_per_source": 4, "abort_on_link_down": True},
        "DEPTH_LIMIT": 1,
    }
    url: str
    pin: str | None = None

    async def start(self) -> AsyncIterator[scrapy.Request]:
        """Ask for the page."""
        yield scrapy.Request(self.url, meta={"source": self.pin})

    def parse(self, response: Response) -> Iterator[dict[str, Any] | scrapy.Request]:
        """Say where it left from, and follow its links."""
        bound = aiobind.bound_source(response)
        yield {"url": response.url, "status": response.status, "source": str(bound.source), "local": bound.address}
        if isinstance(response, TextResponse):
            yield from response.follow_all(css="a")
