"""Many routes of one peer, each with attributes of its own: nothing is shared, in ExaBGP or in ours."""

from __future__ import annotations

import os
import time
from pathlib import Path

from agent.bgp.model import EndOfRib, Update
from tests.bgp.conftest import Node, run, session, until
from tests.bgp.routers import TOR_AS, Bird

COUNT = int(os.environ.get("UNDERLAY_ATTRIBUTES", "4000"))


def test_many_distinct_attribute_sets(bird: Bird, node: Node) -> None:
    """UNDERLAY_ATTRIBUTES says how many; printed are the seconds and ExaBGP's and the relay's memory."""

    def prefix(i: int) -> str:
        return f"10.{100 + i // 65536}.{i // 256 % 256}.{i % 256}/32"

    def resident(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

    async def main() -> None:
        marks = {prefix(i): f"bgp_large_community.add(({TOR_AS}, {i}, 1));" for i in range(COUNT)}
        bird.start(marks, marks=marks)
        node.start()
        async with node.driver() as (driver, events):
            began = time.monotonic()
            driver.set_sessions(frozenset({session("4", families=("ipv4 unicast",))}))
            await until(lambda: any(isinstance(e, EndOfRib) for e in events), every=0.01)
            seconds = time.monotonic() - began
            got = {r.prefix: r.attributes for e in events if isinstance(e, Update) for r in e.announced}
            assert got.keys() == {prefix(i) for i in range(COUNT)}
            assert all(got[prefix(i)].large_communities == (f"{TOR_AS}:{i}:1",) for i in range(COUNT))
            sizes = [resident(pid) for pid in (node.process.pid, node.relay())]
            print(f"{COUNT} attribute sets in {seconds:.1f} s; ExaBGP {sizes[0]} MiB, relay {sizes[1]} MiB")

    run(main())
