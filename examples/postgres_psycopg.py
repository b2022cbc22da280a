"""Ask PostgreSQL for its version by psycopg 3, from one source, also by a pool: libpq takes no socket, but a relay.

Run: python examples/postgres_psycopg.py 'if!eth0' db.example.com 5432 'user=me dbname=app sslmode=verify-full'

Have libpq 17 (psycopg[binary] 3.2.3), and cancel queries by ``cancel_safe()`` or by cancelling the task: ``cancel()``,
and what psycopg does in compiled code with an older libpq, would hold up the loop, and the relay with it.
"""

import psycopg
from command_line import run
from relay import relay

import aiobind


async def main(source: str, host: str, port: str, conninfo: str) -> None:
    async with (
        aiobind.Connector(source) as connector,
        relay(connector, host, int(port)) as near,
        # *host* is whose certificate it has to be, and who is looked for in ~/.pgpass (with the port of the relay).
        await psycopg.AsyncConnection.connect(conninfo, host=host, hostaddr="127.0.0.1", port=near) as connection,
    ):
        cursor = await connection.execute("SELECT inet_client_addr() || ': ' || version()")
        print(*await cursor.fetchone() or ())


if __name__ == "__main__":
    run(main)
