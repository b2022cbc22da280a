"""Send a mail, with its header, from one source by aiosmtplib; with STARTTLS where the server has it.

python examples/smtp_send.py 'if!eth0' mail.example.com <mail.eml
"""

import asyncio
import email
import sys
from socket import gethostname
from typing import Any

import aiosmtplib
from command_line import run

import aiobind


class BoundSMTP(aiosmtplib.SMTP):
    """aiosmtplib's own, on a socket of a connector, whenever it connects."""

    def __init__(self, connector: aiobind.Connector, host: str, port: int = 25, **options: Any) -> None:
        super().__init__(hostname=host, **{"local_hostname": gethostname(), **options})  # else it asks the resolver
        self.place, self.connector = (host, port), connector

    async def connect(self, **options: Any) -> aiosmtplib.SMTPResponse:
        try:
            sock = await asyncio.wait_for(self.connector.connect(*self.place), self.timeout)
        except OSError as error:
            raise aiosmtplib.SMTPConnectError(str(error)) from error
        return await super().connect(sock=sock, **options)


async def main(source: str, host: str) -> None:
    async with aiobind.Connector(source) as connector, BoundSMTP(connector, host) as server:
        print((await server.send_message(email.message_from_binary_file(sys.stdin.buffer)))[1])


if __name__ == "__main__":
    run(main)
