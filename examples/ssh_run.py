"""Run a command on another host by asyncssh, from one source; keys and known hosts are those of ~/.ssh.

python examples/ssh_run.py 'if!eth0' me@example.com 'uname -a'
"""

import sys

import asyncssh
from command_line import run

import aiobind


async def main(source: str, place: str, command: str) -> int | None:
    user, _, host = place.rpartition("@")
    async with aiobind.Connector(source) as connector:
        sock = await connector.connect(host, 22)
        async with asyncssh.connect(host, sock=sock, username=user or ()) as connection:
            done = await connection.run(command)
            print(done.stdout, end="")
            print(done.stderr, end="", file=sys.stderr)
            return done.exit_status


if __name__ == "__main__":
    run(main)
