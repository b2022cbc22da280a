"""Law: Scrapy's own aiohttp handler, with our connector in its session; all else is Scrapy's.

    from_crawler     one handler for ``http`` and ``https``
    _make_request    the source of the request; where it left from; our error as the cause of Scrapy's

Scrapy's limits, TLS, timeouts, sizes, signals and proxies are what they are in ``AiohttpDownloadHandler``. That module,
``_ClientResponse``, ``_session``, ``_bind_address`` and ``_make_request`` are Scrapy's private names; nothing else of
aiobind touches one, and a test holds them against the oldest and the newest supported Scrapy. Needs the extra:
``pip install "aiobind[scrapy]"``.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar, cast
from weakref import WeakValueDictionary

try:
    from scrapy.core.downloader.handlers._aiohttp import AiohttpDownloadHandler, _ClientResponse
    from scrapy.exceptions import CannotResolveHostError, DownloadConnectionRefusedError, DownloadFailedError
    from scrapy.http import Response
except ImportError as error:
    raise ImportError('aiobind.scrapy needs Scrapy 2.19 or later: pip install "aiobind[scrapy]"') from error

from ._errors import AiobindError, BindError
from ._sockets import BoundSource, bound_source, finders
from ._sources import Address
from .aiohttp import BoundTCPConnector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from scrapy import Request
    from scrapy.crawler import Crawler

__all__ = ["DownloadHandler"]

#: By class and crawler. A handler holds its crawler, so that the id is nobody else's meanwhile.
_handlers: WeakValueDictionary[tuple[type, int], DownloadHandler] = WeakValueDictionary()


class DownloadHandler(AiohttpDownloadHandler):
    """Scrapy's aiohttp download handler (HTTP/1.1), whose connections leave from the sources that you name.

    ::

        DOWNLOAD_HANDLERS = {"http": "aiobind.scrapy.DownloadHandler", "https": "aiobind.scrapy.DownloadHandler"}
        AIOBIND_SOURCES = ["if!eth0", "if!wwan0"]         # or: scrapy crawl -s 'AIOBIND_SOURCES=if!eth0,if!wwan0'
        AIOBIND_OPTIONS = {"limit_per_source": 8}         # any keyword of `aiobind.aiohttp.BoundTCPConnector`

    The policy chooses the source of each request. One with ``meta={"source": "if!eth0"}`` leaves from that one, which
    need not be in the list, or fails; so do its retries and redirects. Where ``source`` or ``AIOBIND_SOURCES`` is
    missing, Scrapy's own ``bindaddress`` or ``DOWNLOAD_BIND_ADDRESS`` names a source address: a text, or a host and the
    port 0. Scrapy asks for ``robots.txt`` by the policy.

    Where a response left from is ``aiobind.bound_source(response)``, which is ``response.meta["bound_source"]``; a
    response of Scrapy's cache has none (LookupError). The stats have ``aiobind/response_count/SOURCE``.

    Args:
        crawler: the crawler whose settings are read. An instance of a policy serves one crawl at a time.

    Raises:
        InvalidSource, TypeError, ValueError, ImportError: as ``BoundTCPConnector`` does; or a bind address has a port.
            Scrapy logs it, and refuses the requests (``NotSupported``) with the same words.

    Errors of a request are Scrapy's own, which its middleware retries, with ours as the ``__cause__``: a
    ``DownloadFailedError`` by a ``BindError``, a ``DownloadConnectionRefusedError`` by a ``ConnectError``, a
    ``CannotResolveHostError`` by a ``ResolveError``. An ``InvalidSource`` in a request's meta is not retried.
    """

    #: ``CrawlerProcess`` makes what is not lazy before its loop runs, and aiohttp needs a running one.
    lazy = True
    supports_per_request_bindaddress: ClassVar[bool] = True
    #: Ours, for ``stats()``, ``report()``, ``add()`` and ``remove()``.
    connector: BoundTCPConnector

    def __init__(self, crawler: Crawler) -> None:
        super().__init__(crawler)
        theirs, plain = self._session, self._session.connector
        theirs.detach()  # before anything was connected, so there is nothing to close
        assert plain is not None
        settings = crawler.settings
        sources = settings.getlist("AIOBIND_SOURCES") or [_address(self._bind_address)]
        options = {
            "limit": plain.limit,
            "limit_per_host": plain.limit_per_host,
            **settings.getdict("AIOBIND_OPTIONS"),
        }
        self.connector = BoundTCPConnector(*filter(None, sources), **options)
        self._session = type(theirs)(
            connector=self.connector,
            cookie_jar=theirs.cookie_jar,
            auto_decompress=theirs.auto_decompress,
            response_class=_ClientResponse,
            skip_auto_headers=theirs.skip_auto_headers,
        )

    @classmethod
    def from_crawler(cls, crawler: Crawler) -> Self:
        """Return the handler of *crawler*: one for both schemes, so that they share the policy and the limits."""
        key = cls, id(crawler)
        handler = _handlers[key] = _handlers.get(key) or super().from_crawler(crawler)
        return cast("Self", handler)

    @asynccontextmanager
    async def _make_request(self, request: Request, timeout: float) -> AsyncIterator[_ClientResponse]:
        meta = request.meta
        meta.pop("bound_source", None)  # that of the try before
        source = meta.get("source") or _address(meta.get("bindaddress"))
        async with AsyncExitStack() as stack:
            # The pin ends before Scrapy's signals are sent: requests that their handlers make are not to inherit it.
            with self.connector.use_source(source) if source else nullcontext():
                try:
                    response = await stack.enter_async_context(super()._make_request(request, timeout))
                except (DownloadConnectionRefusedError, CannotResolveHostError) as error:
                    cause = getattr(error.__cause__, "os_error", None)
                    if not isinstance(cause, AiobindError):
                        raise
                    kind = DownloadFailedError if isinstance(cause, BindError) else type(error)
                    raise kind(cause.strerror) from cause
            meta["bound_source"] = bound_source(response)
            self.crawler.stats.inc_value(f"aiobind/response_count/{meta['bound_source'].source}")
            yield response


def _address(bind_address: str | tuple[str, int] | None) -> Address | None:
    host, port = (bind_address, 0) if isinstance(bind_address, str) or bind_address is None else bind_address
    if port:
        raise ValueError(
            "a bind address names no port here: AIOBIND_OPTIONS takes local_ports, as in range(40000, 40100)"
        )
    return Address(host) if host else None


def _bound_response(thing: object) -> BoundSource | None:
    found = thing.request.meta.get("bound_source") if isinstance(thing, Response) and thing.request else None
    return found if isinstance(found, BoundSource) else None


finders.append(_bound_response)
