"""What a web server says first, from one source, on trio; the same lines do it on asyncio, by ``anyio.run(main, ...)``.

    python examples/trio_stream.py 'if!eth0' example.com 443

Port 443 means TLS. With an interface that is not there it says:

    trio_stream: connect from if!eth9 to example.com:443: no interface named 'eth9' (have: eth0, lo)
"""

import sys

import trio

import aiobind
from aiobind.anyio import connect_tcp


async def main(source: str, host: str, port: int) -> None:
    with trio.fail_after(10):
        stream = await connect_tcp(host, port, source=source, tls=port == 443, tls_standard_compatible=False)
        async with stream:
            await stream.send(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            print((await stream.receive()).decode("latin-1").partition("\r\n")[0])
            bound = aiobind.bound_source(stream)
            print(f"from {bound.source}: {bound.address}, pinned to {bound.interface or 'no interface'}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: trio_stream.py SOURCE HOST PORT")
    try:
        trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except trio.TooSlowError:
        sys.exit("trio_stream: no answer within 10 seconds")
    except (OSError, ValueError) as error:  # aiobind.BindError, for example, or aiobind.InvalidSource
        sys.exit(f"trio_stream: {getattr(error, 'strerror', None) or error}")
    except KeyboardInterrupt:
        sys.exit(130)
