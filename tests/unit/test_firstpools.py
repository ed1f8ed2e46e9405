"""Which pools a cluster begins with: each source, their order, sizes, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.firstpools import (
    NAMES,
    Decision,
    Member,
    PoolsNotUsable,
    Ranges,
    Sources,
    Wish,
    block_size,
    decide,
    k0s_ranges,
    kubeadm_ranges,
    parse,
)
from store.validate import validate

KUBEADM = Ranges(("10.244.0.0/16", "fd00:10:244::/56"), ("10.96.0.0/12", "fd00:10:96::/112"))
K0S = Ranges(("10.243.0.0/16",), ("10.96.0.0/12",))
NODE = Member("node-1", ("10.42.0.0/24", "fd00:42::/64"), ("192.0.2.1", "2001:db8::1"))
OTHER = Member("node-2", ("10.42.7.0/24", "fd00:42:0:7::/64"), ("192.0.2.2",))


def sources(**changes: object) -> Sources:
    return Sources(**{"node": "node-1", "nodes": (NODE, OTHER), **changes})  # type: ignore[arg-type]


def pools(decision: Decision) -> dict[str, tuple[str, int, bool]]:
    assert not decision.reason
    return {p.name: (p.spec.cidr, p.spec.block_size, p.spec.use_pod_cidrs) for p in decision.pools}


def test_the_first_source_that_says_anything_decides() -> None:
    setting = (Wish("10.9.0.0/16"),)
    found = [
        decide(sources(setting=setting, kubeadm=KUBEADM, k0s=K0S)),
        decide(sources(kubeadm=KUBEADM, k0s=K0S)),
        decide(sources(kubeadm=Ranges(), k0s=K0S)),
        decide(sources(k0s=Ranges())),
    ]
    assert [pools(decision) for decision in found] == [
        {"default-ipv4": ("10.9.0.0/16", 26, False)},
        {"default-ipv4": ("10.244.0.0/16", 26, False), "default-ipv6": ("fd00:10:244::/56", 122, False)},
        {"default-ipv4": ("10.243.0.0/16", 26, False)},
        {"default-ipv4": ("10.42.0.0/16", 0, True), "default-ipv6": ("fd00:42::/56", 0, True)},
    ]
    assert [d.source for d in found] == ["UNDERLAY_POOLS", "kubeadm's podSubnet", "k0s' podCIDR", "the Nodes' podCIDRs"]


def test_where_nothing_is_said_nothing_is_guessed_and_it_is_said_what_to_do() -> None:
    bare = Member("node-1", (), ("192.0.2.1",))
    # What another Node has does not make this one's pool.
    decision = decide(sources(nodes=(bare, OTHER)))
    assert decision.pools == ()
    for part in ("kubeadm has left nothing", "Node node-1 has no podCIDR", "create an IPPool", "UNDERLAY_POOLS"):
        assert part in decision.reason
    assert "kubeadm-config has no podSubnet" in decide(sources(nodes=(bare,), kubeadm=Ranges())).reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kubeadm": Ranges(("10.96.0.0/16",), ("10.96.0.0/12",))}, "overlaps the services' 10.96.0.0/12"),
        ({"kubeadm": KUBEADM, "services": ("10.244.0.1",)}, "overlaps the service at 10.244.0.1"),
        ({"setting": (Wish("192.0.2.0/24"),)}, "overlaps 192.0.2.1 of Node node-1"),
        ({"kubeadm": KUBEADM, "subnets": (("10.244.1.0/24", "cni0"),)}, "10.244.1.0/24 on interface cni0"),
        ({"kubeadm": Ranges(("10.1.0.0/16", "10.2.0.0/16"))}, "10.1.0.0/16 and 10.2.0.0/16 are of one family"),
        ({"kubeadm": Ranges(("10.244.0.0/31",))}, "has 2 addresses"),
        ({"kubeadm": Ranges(("127.0.0.0/16",))}, "loopback"),
        ({"kubeadm": Ranges(("10.244.0.0/33",))}, "10.244.0.0/33"),
        ({"kubeadm": Ranges(("pods",))}, "'pods'"),
    ],
)
def test_what_pods_cannot_have_is_refused_whole(changes: dict[str, object], said: str) -> None:
    decision = decide(sources(**changes))
    assert decision.pools == ()
    assert said in decision.reason
    assert "create an IPPool" in decision.reason


def test_bits_outside_the_mask_are_no_part_of_it_as_for_controller_manager() -> None:
    assert pools(decide(sources(kubeadm=Ranges(("10.244.3.7/16",))))) == {"default-ipv4": ("10.244.0.0/16", 26, False)}


def test_the_room_of_podcidrs_ends_where_something_else_is() -> None:
    """All Nodes' are inside whatever else there is, and what cannot be left out is said."""
    near = decide(sources(subnets=(("10.42.128.0/24", "eth1"),), services=("fd00:42:0:80::1",)))
    assert pools(near) == {"default-ipv4": ("10.42.0.0/17", 0, True), "default-ipv6": ("fd00:42::/57", 0, True)}
    inside = decide(sources(subnets=(("10.42.3.0/24", "eth1"),)))
    assert "10.42.0.0/21 overlaps 10.42.3.0/24 on interface eth1" in inside.reason
    alone = decide(sources(nodes=(Member("node-1", ("10.42.9.0/24",)), Member("node-2"))))
    assert pools(alone) == {"default-ipv4": ("10.42.0.0/16", 0, True)}


@pytest.mark.parametrize(
    ("cidr", "size"),
    [
        *(("10.0.0.0/8", 26), ("10.0.0.0/22", 26), ("10.0.0.0/24", 28), ("10.0.0.0/28", 30), ("10.0.0.0/30", 30)),
        *(("fd00::/48", 122), ("fd00::/112", 122), ("fd00::/120", 124), ("fd00::/126", 126)),
    ],
)
def test_a_small_range_has_small_blocks(cidr: str, size: int) -> None:
    assert block_size(ip_network(cidr)) == size


_FOUR = st.builds(
    lambda number, length: str(IPv4Network((number >> (32 - length) << (32 - length), length))),
    st.integers(0, 2**32 - 1),
    st.integers(4, 32),
)
_SIX = st.builds(
    lambda number, length: str(ip_network((0xFD << 120 | number, length), strict=False)),
    st.integers(0, 2**120 - 1),
    st.integers(8, 128),
)
_CIDRS = st.lists(st.one_of(_FOUR, _SIX), max_size=3).map(tuple)


@given(_CIDRS, _CIDRS, _CIDRS, _CIDRS, _CIDRS)
def test_every_decision_can_be_stored_and_shares_no_address_with_anything(
    pods: tuple[str, ...], services: tuple[str, ...], own: tuple[str, ...], others: tuple[str, ...], at: tuple[str, ...]
) -> None:
    nodes = (Member("node-1", own), Member("node-2", others, tuple(a.partition("/")[0] for a in at)))
    subnets = tuple((cidr, "eth0") for cidr in at)
    decision = decide(Sources(node="node-1", kubeadm=Ranges(pods, services), nodes=nodes, subnets=subnets))
    assert bool(decision.pools) != bool(decision.reason)
    made = [ip_network(pool.spec.cidr) for pool in decision.pools]
    assert [pool.name for pool in decision.pools] == [NAMES[network.version] for network in made]
    for pool, network in zip(decision.pools, made, strict=True):
        assert validate(pool) == ()
        taken = [n for n in map(ip_network, (*services, *at)) if n.version == network.version]
        assert not any(network.overlaps(n) for n in taken)
        if pool.spec.use_pod_cidrs:
            same = [n for n in map(ip_network, (*own, *others)) if n.version == network.version]
            assert all(n.subnet_of(network) for n in same)  # type: ignore[type-var]


def test_the_setting() -> None:
    assert parse("auto") is None
    assert parse("none") == ()
    assert parse(" 10.1.0.0/16 blockSize=28, fd00:1::/56 usePodCIDRs ") == (
        Wish("10.1.0.0/16", 28),
        Wish("fd00:1::/56", use_pod_cidrs=True),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write auto, none, or CIDRs"),
        ("10.1.0.0/16 26", "blockSize=26"),
        ("10.1.0.0/16 blockSize=", "blockSize=26"),
        ("10.1.0.1/16", "host bits"),
        ("10.1.0.0/16 blockSize=8", "write 20..32"),
        ("10.1.0.0/16, 10.2.0.0/16", "of one family"),
        ("ten", "'ten'"),
    ],
)
def test_a_setting_that_cannot_be_meant_says_what_to_write(text: str, said: str) -> None:
    with pytest.raises(PoolsNotUsable, match="(?s)" + said.replace(".", r"\.")):
        parse(text)


def test_what_the_installers_leave() -> None:
    networking = {
        "podSubnet": "10.244.0.0/16, fd00::/56",
        "serviceSubnet": "10.96.0.0/12",
        "dnsDomain": "cluster.local",
    }
    assert kubeadm_ranges({"networking": networking}) == Ranges(("10.244.0.0/16", "fd00::/56"), ("10.96.0.0/12",))
    assert kubeadm_ranges({"networking": {}}) == kubeadm_ranges({}) == kubeadm_ranges(None) == Ranges()
    dual = {"enabled": True, "IPv6podCIDR": "fd00::/108", "IPv6serviceCIDR": "fd01::/108"}
    network = {"provider": "custom", "podCIDR": "10.244.0.0/16", "serviceCIDR": "10.96.0.0/12", "dualStack": dual}
    assert k0s_ranges({"network": network}) == Ranges(("10.244.0.0/16", "fd00::/108"), ("10.96.0.0/12", "fd01::/108"))
    assert k0s_ranges({"network": network | {"dualStack": dual | {"enabled": False}}}).pods == ("10.244.0.0/16",)
    for wrong in ("text", {"networking": "text"}):
        with pytest.raises(PoolsNotUsable, match="cannot be read"):
            kubeadm_ranges(wrong)
