"""Print what a websocket says; when it is lost, websockets opens the next one, from the same source.

python examples/websocket_client.py 'if!eth0' wss://example.com/feed
"""

import asyncio
from contextlib import suppress
from typing import Any

from command_line import run
from websockets import ConnectionClosed, connect
from websockets.uri import parse_uri

import aiobind


class BoundConnect(connect):
    """``websockets.connect`` by a connector: awaited, in ``async with``, and each time anew in ``async for``."""

    def __init__(self, connector: aiobind.Connector, uri: str, **options: Any) -> None:
        super().__init__(uri, **options)
        self.connector, self.place, self.given = connector, parse_uri(uri), (uri, options)

    def __await__(self) -> Any:
        opening = self.connector.connect(self.place.host, self.place.port)
        sock = yield from asyncio.wait_for(opening, self.open_timeout).__await__()
        super().__init__(self.given[0], **self.given[1], sock=sock)
        return (yield from super().__await__())


async def main(source: str, uri: str) -> None:
    async for websocket in BoundConnect(aiobind.Connector(source), uri):
        with suppress(ConnectionClosed):
            async for message in websocket:
                print(message, flush=True)


if __name__ == "__main__":
    run(main, log="INFO")
