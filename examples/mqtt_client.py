"""Print what comes on a topic of MQTT, by aiomqtt, from one source.

python examples/mqtt_client.py 'if!eth0' broker.example.com 'sensors/#'
"""

import asyncio
from typing import Any, Self

import aiomqtt
from command_line import run

import aiobind


class BoundClient(aiomqtt.Client):
    """aiomqtt's own, on a socket of a connector, whenever it is entered. There is no public hook: see ``_client``."""

    def __init__(self, connector: aiobind.Connector, host: str, port: int = 1883, **options: Any) -> None:
        super().__init__(host, port, **options)
        self.connector, self.place = connector, (host, port)

    async def __aenter__(self) -> Self:
        try:
            sock = await asyncio.wait_for(self.connector.connect(*self.place), self.timeout)
        except OSError as error:
            raise aiomqtt.MqttError(str(error)) from error
        self._client._create_socket_connection = lambda: sock  # type: ignore[method-assign] # noqa: SLF001
        return await super().__aenter__()


async def main(source: str, host: str, topic: str) -> None:
    async with aiobind.Connector(source) as connector, BoundClient(connector, host) as client:
        await client.subscribe(topic)
        async for message in client.messages:
            print(message.topic, message.payload, flush=True)


if __name__ == "__main__":
    run(main)
