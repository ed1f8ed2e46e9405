"""The kernel's tables as the archive for help has them, without any program: routes, rules, nexthops, chains."""

from __future__ import annotations

import pytest

from ctl.diags import kernel
from lab.net import Net

IP = """
link add up1 type veth peer name far1
link add up2 type veth peer name far2
link set far1 up
link set far2 up
link set lo up
link set up1 up
link set up2 up
address add 10.0.1.1/31 dev up1
address add 10.0.2.1/31 dev up2
address add fd00:1::1/64 dev up1 nodad
neighbour add 10.0.1.0 lladdr 02:00:00:00:00:01 dev up1
nexthop add id 1 via 10.0.1.0 dev up1 proto 143
nexthop add id 2 via 10.0.2.0 dev up2 proto 143
nexthop add id 3 group 1/2,3 proto 143
nexthop add id 4 blackhole
nexthop add id 5 via fd00:1::2 dev up1
route add 10.9.0.0/24 nhid 3 proto 143 metric 2048
route add blackhole 10.8.0.0/26 proto 142 metric 512
route add 10.7.0.0/24 table 77 nexthop via 10.0.1.0 weight 2 nexthop via 10.0.2.0
route add fd00:9::/64 via fd00:1::2 dev up1 proto 143
route add default via 10.0.2.0
rule add from 10.9.0.1 lookup 77 priority 100
"""
NFT = "add table inet underlay; add chain inet underlay c { type filter hook prerouting priority -300; policy drop; };"
NFT += " add rule inet underlay c meta iifgroup 21836 counter drop; add table ip foreign"
WANTED = {
    "links": ["ifname=up1", "ifname=lo"],
    "addresses": ["address=10.0.1.1", "address=fd00:1::1", "prefixlen=31"],
    "neighbours": ["dst=10.0.1.0 lladdr=02:00:00:00:00:01", "ifindex=up1"],
    "nexthops": ["id=1 proto=143", "gateway=10.0.1.0", "group=1*1,2*3", "blackhole=yes", "gateway=fd00:1::2"],
    "routes": [
        "dst=10.9.0.0/24 table=254 priority=2048",
        "dst=10.8.0.0/26",
        "proto=142 scope=0 type=blackhole",
        "dst=10.7.0.0/24 table=77",
        "dst=fd00:9::/64",
        "dst=default table=254 gateway=10.0.2.0 oif=up2",
    ],
    "rules": ["src=10.9.0.1", "table=77", "priority=100"],
    "nftables": [
        "table inet underlay\n",
        "table ip foreign\n",
        "chain inet underlay c hook=0 priority=-300 policy=drop",
        "rule inet underlay c meta cmp counter immediate packets=0",
    ],
}


@pytest.mark.parametrize("what", WANTED)
def test_what_the_kernel_has_is_said_in_lines(net: Net, what: str) -> None:
    net.add("node-1")
    net.ip("node-1", IP.strip().splitlines())
    net.run("node-1", ["nft", NFT])
    with net.inside("node-1"):
        said = kernel.tables()[what]()
    assert [words for words in WANTED[what] if words not in said] == [], said
