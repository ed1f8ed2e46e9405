"""BGPFilters on the wire: what a rule adds reaches the router, what it rejects goes, and imports meet their rules."""

from __future__ import annotations

from agent.bgp.model import Announcement
from agent.filters import Candidate, compiled
from agent.plan.exports import announcement
from agent.prefix import parse
from agent.rib import Peer, Policy, Refusal, Rib, Selection
from store.model import (
    AddCommunity,
    BGPFilter,
    BGPFilterSpec,
    FilterOperation,
    FilterRuleV4,
    Meta,
    PrependASPath,
)
from tests.bgp.conftest import BOTH, SESSIONS, Node, announce, run, session, until
from tests.bgp.routers import NODE_AS, TOR4, TOR_AS, Router

BLOCK, OTHER = "10.244.0.0/26", "10.244.0.64/26"
DECORATION = (
    FilterOperation(add_community=AddCommunity(value="65100:7")),
    FilterOperation(add_community=AddCommunity(value="65100:7:8")),
    FilterOperation(prepend_as_path=PrependASPath(prefix=(65009, 4200000000))),
)


def exported(*rules: FilterRuleV4) -> frozenset[Announcement]:
    """Both blocks as these rules leave them."""
    made = BGPFilter(metadata=Meta(name="f"), spec=BGPFilterSpec(export_v4=rules))
    exports = compiled([made], "export", external=True)
    met = {cidr: exports.decide(Candidate(parse(cidr))) for cidr in (BLOCK, OTHER)}
    given = {BLOCK: ("65100:9",), OTHER: ()}  # as prefixAdvertisements do
    return frozenset(announcement(cidr, session("4"), rule, given[cidr]) for cidr, rule in met.items() if rule.accept)


def test_what_export_rules_say_is_what_the_router_gets(router: Router, node: Node) -> None:
    async def main() -> None:
        router.start([])
        node.start()
        decorate = FilterRuleV4(action="Accept", match_operator="Equal", cidr=BLOCK, operations=DECORATION)
        async with node.driver() as (driver, _):
            driver.set_sessions(SESSIONS)
            driver.set_announcements(exported())
            await until(lambda: router.paths() == {BLOCK: (NODE_AS,), OTHER: (NODE_AS,)})
            driver.set_announcements(exported(decorate))
            await until(lambda: router.paths() == {BLOCK: (NODE_AS, 65009, 4200000000), OTHER: (NODE_AS,)})
            assert router.communities(BLOCK) == {"65100:7", "65100:7:8", "65100:9"}
            assert router.communities(OTHER) == set()
            driver.set_announcements(exported(decorate, FilterRuleV4(action="Reject")))
            await until(lambda: router.paths().keys() == {BLOCK})
            await until(
                lambda: (
                    driver.state().confirmed == {(a.peer, a.prefix) for a in exported(decorate) if a.prefix == BLOCK}
                )
            )
            # The withdrawal of what was decorated is seen, too.
            driver.set_announcements(frozenset({announce(OTHER)}))
            await until(lambda: router.paths() == {OTHER: (NODE_AS,)})

    run(main())


def test_import_rules_meet_what_a_router_really_sends(router: Router, node: Node) -> None:
    told = ["10.245.0.0/26", "10.245.1.0/26", "10.245.2.0/26"]
    rules = (
        FilterRuleV4(action="Reject", match_operator="Equal", cidr=told[0], interface="up*", as_path_prefix=(TOR_AS,)),
        FilterRuleV4(action="Reject", match_operator="Equal", cidr=told[1], as_path_prefix=(TOR_AS, TOR_AS)),
        FilterRuleV4(action="Reject", match_operator="Equal", cidr=told[2], interface="eth*"),
    )
    made = BGPFilter(metadata=Meta(name="f"), spec=BGPFilterSpec(import_v4=rules))
    peer = Peer(
        address=TOR4,
        name="tor",
        peer_as=TOR_AS,
        local_as=NODE_AS,
        families=BOTH,
        imports=compiled([made], "import", external=True),
    )
    policy = Policy(
        peers=(peer,),
        allowed=frozenset({"10.245.0.0/16"}),
        on_link=frozenset({("10.0.1.0/24", 2)}),
        interfaces=frozenset({(2, "up0")}),
    )

    async def main() -> None:
        router.start(told)
        node.start()
        async with node.driver() as (driver, events):
            driver.set_sessions(SESSIONS)

            def seen() -> Selection:
                rib = Rib()
                rib.configure((peer,), 0.0)
                for event in events:
                    rib.apply(event, 0.0)
                return rib.select(policy)

            await until(lambda: seen().best.keys() == {told[1], told[2]} and TOR4 in seen().refused)
            await until(lambda: seen().refused[TOR4] == {told[0]: Refusal.RejectedByFilter})

    run(main())
