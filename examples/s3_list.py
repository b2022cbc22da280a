"""List the buckets of S3 by aiobotocore, from one source; the credentials are in the environment or in ~/.aws.

python examples/s3_list.py 'if!eth0' https://s3.eu-central-1.amazonaws.com
"""

from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from command_line import run

import aiobind


async def main(source: str, endpoint: str) -> None:
    config = AioConfig(connector_args={"socket_factory": aiobind.socket_factory(source)})
    session: Any = get_session()
    async with session.create_client("s3", endpoint_url=endpoint, config=config) as s3:
        for bucket in (await s3.list_buckets())["Buckets"]:
            print(bucket["Name"])


if __name__ == "__main__":
    run(main)
