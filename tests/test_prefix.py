"""Connections from a prefix, judged from the far side: routed here or not, with fresh addresses and sticky ones."""

from __future__ import annotations

import asyncio
import errno
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from opened import connect, open_bound
from test_egress import far_server as answering

import aiobind
from aiobind._binding import Target
from aiobind._plan import Planner
from aiobind._resolve import SystemLookup, literal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from aiobind._sources import Source
    from aiobind.lab import Lab, Witness

pytestmark = pytest.mark.anyio

V4, V6 = "203.0.113.80", "2001:db8:ffff::80"
prefixes = pytest.mark.parametrize(
    ("prefix", "target"), [("198.51.100.0/24", V4), ("2001:db8:77::/64", V6)], ids=["IPv4", "IPv6"]
)
privileges = pytest.mark.parametrize("privilege", ["root", "no capabilities"])


@pytest.fixture
def privilege(request: pytest.FixtureRequest) -> str:
    if request.param == "no capabilities":
        request.getfixturevalue("no_capabilities")
    return request.param


@asynccontextmanager
async def far_server(lab: Lab, prefix: str) -> AsyncIterator[None]:
    """Answer each connection with the peer that the far side sees; *prefix* is routed to the near side's first NIC."""

    gateway = lab.nics[0].v6 if ":" in prefix else lab.nics[0].v4
    lab.far.ip(f"route add {prefix} via {gateway}")
    async with answering(lab):
        yield


async def ask(connector: aiobind.Connector, host: str) -> str:
    """Return the peer that the far side sees."""
    async with asyncio.timeout(10):
        reader, writer = await connector.open_connection(host, 80)
        seen = (await reader.read()).decode()
        bound = aiobind.bound_source(writer)
        writer.close()
        await writer.wait_closed()
    assert bound.address == seen
    return seen


async def planned(planner: Planner, source: Source, target: str, host: str) -> str:
    """Connect to *target*, which the caller calls *host*; return the peer that the far side sees."""
    address = literal(target)
    assert address is not None
    to = Target.of(address.ip, 80)
    (binding,) = await planner.plan(source, [to], host=host)
    assert isinstance(binding, aiobind._binding.Binding)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        with open_bound(binding, to) as sock:
            await connect(loop, sock, to)
            return (await loop.sock_recv(sock, 100)).decode()


@privileges
@prefixes
@pytest.mark.usefixtures("privilege")
async def test_each_connection_has_an_address_of_its_own(lab: Lab, witness: Witness, prefix: str, target: str) -> None:
    lab.near.ip(f"route add local {prefix} dev lo")
    async with far_server(lab, prefix), aiobind.Connector(f"net!{prefix}") as connector:
        seen = [await ask(connector, target) for _ in range(20)]
    network = aiobind.Prefix(prefix).network
    assert all(aiobind.Address(address).ip in network for address in seen)
    assert len(set(seen)) > 10
    assert {packet.source for packet in witness.packets() if packet.syn} == set(seen)


@prefixes
async def test_a_connector_keeps_the_address_of_a_host(
    lab: Lab, resolv_conf: Callable[..., None], prefix: str, target: str
) -> None:
    lab.near.ip(f"route add local {prefix} dev lo")
    hosts = [f"host{number}.test" for number in range(8)]
    resolv_conf("", hosts="".join(f"{target} {host}\n" for host in hosts))
    sticky = aiobind.Connector(f"net!{prefix}", sticky_prefix=True)
    async with far_server(lab, prefix), sticky as connector, aiobind.Connector(f"net!{prefix}") as other:
        seen = [{await ask(connector, host) for _ in range(4)} for host in hosts]
        fresh = {await ask(other, hosts[0]) for _ in range(8)}
    assert {len(addresses) for addresses in seen} == {1}
    assert len(set().union(*seen)) > 4
    assert len(fresh) > 4


@prefixes
async def test_a_host_sees_one_address_and_another_host_another(lab: Lab, prefix: str, target: str) -> None:
    lab.near.ip(f"route add local {prefix} dev lo")
    planner, source = Planner(lookup=SystemLookup(0), sticky_prefix=True), aiobind.Prefix(prefix)
    async with far_server(lab, prefix):
        seen = {
            host: {await planned(planner, source, target, spelling) for spelling in (host, host.upper(), host + ".")}
            for host in (f"host{number}.test" for number in range(8))
        }
    assert {len(addresses) for addresses in seen.values()} == {1}
    assert len(set().union(*seen.values())) > 4


@privileges
@prefixes
@pytest.mark.usefixtures("privilege")
async def test_a_prefix_that_is_not_routed_here_is_refused_before_any_packet(
    lab: Lab, witness: Witness, prefix: str, target: str
) -> None:
    """IPv6 would send SYNs whose answer nobody takes."""
    started = time.monotonic()
    async with far_server(lab, prefix), aiobind.Connector(f"net!{prefix}") as connector:
        with pytest.raises(aiobind.BindError) as caught:
            await asyncio.wait_for(connector.connect(target, 80), 10)
        assert caught.value.errno == errno.EADDRNOTAVAIL
        command = f"ip route add local {prefix} dev lo"
        said = f"{prefix} is not routed to this host, so no answer would arrive: {command}"
        assert said in str(caught.value)
        assert time.monotonic() - started < 5
        assert not [packet for packet in witness.packets() if packet.destination == target]
        lab.near.ip(command.removeprefix("ip "))
        await ask(connector, target)
        lab.near.ip(f"route del local {prefix} dev lo")
        with pytest.raises(aiobind.BindError, match="is not routed to this host"):
            await asyncio.wait_for(connector.connect(target, 80), 10)


@prefixes
async def test_another_source_is_tried_when_a_prefix_is_not_routed_here(lab: Lab, prefix: str, target: str) -> None:
    async with far_server(lab, prefix), aiobind.Connector(f"net!{prefix}", "if!n1") as connector:
        assert {await ask(connector, target) for _ in range(4)} == {lab.nic("n1").v6 if ":" in target else "198.18.1.2"}


@pytest.mark.parametrize(
    ("prefix", "target"),
    [("198.51.100.9/32", V4), ("198.51.100.8/31", V4), ("2001:db8:77::9/128", V6), ("2001:db8:77::8/127", V6)],
)
async def test_the_smallest_prefixes(lab: Lab, prefix: str, target: str) -> None:
    lab.near.ip(f"route add local {prefix} dev lo")
    async with far_server(lab, prefix), aiobind.Connector(f"net!{prefix}") as connector:
        seen = {await ask(connector, target) for _ in range(12)}
    assert seen == {str(ip) for ip in aiobind.Prefix(prefix).network}
