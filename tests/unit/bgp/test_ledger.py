"""The ledger against a model of ExaBGP with its faults: whatever happens in whatever order, peers get the table."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.bgp.ledger import BARRIER_TIME, BATCH, Command, Ledger
from agent.bgp.wire import family_of

PEERS = ("10.0.1.2", "fd00:1::2")
FAMILIES = ("ipv4 unicast", "ipv6 unicast")
PREFIXES = ("10.244.0.0/26", "10.244.0.64/26", "10.244.0.128/26", "fd00:10:244::/122", "fd00:10:244::40/122")
ATTRIBUTES = ("next-hop 10.0.1.1", "next-hop 10.0.1.1 med 1", "next-hop 10.0.1.1 med 2")


@dataclass
class Router:
    """A peer with graceful restart: keeps what it knew as stale until the End-of-RIB."""

    table: dict[str, str] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)


@dataclass
class Neighbor:
    """ExaBGP's side of one session: its cache, and queues by attribute set, flushed set by set (fault 1)."""

    up: bool = False
    cache: dict[str, str] = field(default_factory=dict)
    queues: dict[str, dict[str, str]] = field(default_factory=dict)
    sending: deque[tuple[str, str, str]] = field(default_factory=deque)
    withdraws: bool = True
    ends: deque[str] = field(default_factory=deque)

    def take(self, line: str) -> bool:
        words = line.split()
        action, what = words[2], words[3]
        if what == "eor":
            if self.up:
                self.ends.append(" ".join(words[4:]))
            return self.up
        nlri = words.index("nlri")
        attributes, prefixes = " ".join(words[4:nlri]), words[nlri + 1 :]
        for prefix in prefixes:
            if action == "announce":
                if self.cache.get(prefix) == attributes:
                    continue
                self.cache[prefix] = attributes
            else:
                self.cache.pop(prefix, None)
            self.queues.setdefault(attributes, {})[prefix] = action
        return True

    def connect(self) -> None:
        self.up, self.withdraws = True, False
        for prefix, attributes in self.cache.items():
            self.queues.setdefault(attributes, {})[prefix] = "announce"

    def drop(self) -> None:
        self.up = False
        self.queues, self.sending = {}, deque()


class Speaker(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger()
        self.now = 0.0
        self.generation = 0
        self.neighbors = {peer: Neighbor() for peer in PEERS}
        self.routers = {peer: Router() for peer in PEERS}
        self.pipe: deque[Command] = deque()
        self.wanted: dict[str, dict[str, str]] | None = None
        self.held: dict[str, set[str]] = {peer: set() for peer in PEERS}

    # -- the world ------------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def want(self, data: st.DataObject) -> None:
        routes = st.dictionaries(st.sampled_from(PREFIXES), st.sampled_from(ATTRIBUTES))
        self.wanted = {peer: data.draw(routes) for peer in PEERS}
        self.ledger.want(self.wanted)
        self.told()

    @rule(peer=st.sampled_from(PEERS), slow=st.booleans())
    def session_up(self, peer: str, slow: bool) -> None:
        neighbor = self.neighbors[peer]
        if neighbor.up:
            return
        for command in self.ledger.connected(peer):
            self.pipe.append(command)
        if not slow:  # the handshake takes two round trips: ExaBGP has read what was said at ``connected``
            self.process(100)
        neighbor.connect()
        self.generation += 1
        self.ledger.up(peer, self.generation, FAMILIES)
        self.told()

    @rule(peer=st.sampled_from(PEERS), forget=st.booleans())
    def session_down(self, peer: str, forget: bool) -> None:
        neighbor, router = self.neighbors[peer], self.routers[peer]
        if not neighbor.up:
            return
        neighbor.drop()
        router.stale = set(router.table)
        self.ledger.down(peer)
        self.told()
        if forget:  # fault 8
            self.neighbors[peer] = Neighbor()

    @rule(many=st.integers(1, 5))
    def process(self, many: int) -> None:
        """ExaBGP reads commands and answers them."""
        for _ in range(min(many, len(self.pipe))):
            command = self.pipe.popleft()
            ok = self.neighbors[command.peer].take(command.line)
            self.ledger.answered(command, ok, self.now)
            self.told()

    @rule(peer=st.sampled_from(PEERS), many=st.integers(1, 4))
    def send(self, peer: str, many: int) -> None:
        """A peer's turn in ExaBGP's loop."""
        for _ in range(many):
            self.send_one(peer)

    def send_one(self, peer: str) -> bool:
        neighbor, router = self.neighbors[peer], self.routers[peer]
        if not neighbor.up:
            return False
        if not neighbor.sending and neighbor.queues:
            for attributes, changes in neighbor.queues.items():
                for prefix, action in changes.items():
                    if action == "announce" or neighbor.withdraws:
                        neighbor.sending.append((action, prefix, attributes))
            neighbor.queues, neighbor.withdraws = {}, True
            return True
        if neighbor.sending:
            action, prefix, attributes = neighbor.sending.popleft()
            router.stale.discard(prefix)
            if action == "announce":
                router.table[prefix] = attributes
                self.ledger.reported(peer, [prefix], [])
            else:
                router.table.pop(prefix, None)
                self.ledger.reported(peer, [], [prefix])
        elif neighbor.ends:
            family = neighbor.ends.popleft()
            for prefix in [p for p in router.stale if family_of(p) == family]:
                del router.table[prefix]
            router.stale = {p for p in router.stale if family_of(p) != family}
            self.ledger.reported_end(peer, family)
        else:
            return False
        self.told()
        return True

    @rule(seconds=st.sampled_from([0.01, 0.4, 2.5]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def speak(self) -> None:
        self.pipe.extend(self.ledger.commands(self.now))
        self.told()

    @rule()
    def repeat(self) -> None:
        self.ledger.assert_all()

    # -- the agent's view -----------------------------------------------------------------------------------------

    def told(self) -> None:
        for change in self.ledger.changes():
            for prefix, state in change.states.items():
                (self.held[change.peer].discard if state == "gone" else self.held[change.peer].add)(prefix)
        for peer, neighbor in self.neighbors.items():
            if not neighbor.up:
                self.held[peer].clear()

    @invariant()
    def what_a_peer_holds_is_known(self) -> None:
        """R9: the agent never believes gone what a peer that is up holds because this session told it."""
        if not hasattr(self, "routers"):
            return
        for peer, router in self.routers.items():
            if self.neighbors[peer].up:
                fresh = router.table.keys() - router.stale
                assert fresh <= self.held[peer]
        assert set(self.ledger.held()) == {
            (peer, p) for peer in PEERS if self.neighbors[peer].up for p in self.held[peer]
        }

    @invariant()
    def one_unanswered_command_for_a_prefix(self) -> None:
        if not hasattr(self, "pipe"):
            return
        seen: set[tuple[str, str]] = set()
        for command in self.pipe:
            for prefix in command.steps:
                if command.generation == self.generation_of(command.peer):
                    assert (command.peer, prefix) not in seen
                    seen.add((command.peer, prefix))

    def generation_of(self, peer: str) -> int:
        return self.ledger._peers[peer].generation if peer in self.ledger._peers else -1

    # -- in the end -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.wanted is not None)
    @rule()
    def settle(self) -> None:
        """Left alone, every peer that is up has the table, nothing else, and all of it is known to have been sent."""
        for _ in range(200):
            self.speak()
            self.process(100)
            moved = [self.send_one(peer) for peer in PEERS]
            if self.ledger.idle() and not self.pipe and not any(moved):
                break
            if not any(moved) and not self.pipe:
                self.now += BARRIER_TIME + 0.1
        assert self.ledger.idle()
        assert self.wanted is not None
        for peer in PEERS:
            if self.neighbors[peer].up:
                router = self.routers[peer]
                assert router.stale == set()
                assert router.table == self.wanted[peer]
                assert self.held[peer] == set(self.wanted[peer])
                assert {p for a, p in self.ledger.confirmed() if a == peer} == set(self.wanted[peer])


TestSpeaker = Speaker.TestCase
TestSpeaker.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck))


def answered(ledger: Ledger, ok: bool = True) -> list[str]:
    commands = list(ledger.commands(0))
    for command in commands:
        ledger.answered(command, ok, 0)
    return [str(command.line) for command in commands]


def test_no_end_of_rib_before_the_first_table() -> None:
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    assert answered(ledger) == []
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    assert answered(ledger) == [
        f"neighbor {PEERS[0]} announce attributes {ATTRIBUTES[0]} nlri {PREFIXES[0]}",
        f"neighbor {PEERS[0]} announce eor ipv4 unicast",
        f"neighbor {PEERS[0]} announce eor ipv6 unicast",
    ]


def test_table_goes_in_batches_of_one_attribute_set_and_family() -> None:
    many = {f"10.{i // 250}.{i % 250}.0/24": ATTRIBUTES[i % 2] for i in range(BATCH * 4)}
    ledger = Ledger()
    ledger.want({PEERS[0]: {**many, PREFIXES[3]: ATTRIBUTES[0]}})
    ledger.up(PEERS[0], 1, FAMILIES)
    lines = [line for line in answered(ledger) if "eor" not in line]
    assert len(lines) == 5
    assert max(len(line.split(" nlri ")[1].split()) for line in lines) == BATCH


def test_what_changes_right_after_up_waits_for_what_the_cache_repeats() -> None:
    """Or the old attributes go out behind the new ones (fault 1): hypothesis found it, and the peer kept them."""
    ledger = Ledger()
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0], PREFIXES[1]: ATTRIBUTES[1]}})
    ledger.up(PEERS[0], 1, FAMILIES)
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:2], [])
    ledger.down(PEERS[0])
    ledger.up(PEERS[0], 2, FAMILIES)
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0], PREFIXES[1]: ATTRIBUTES[0]}})
    old = f"neighbor {PEERS[0]} announce attributes {ATTRIBUTES[1]} nlri {PREFIXES[1]}"
    new = f"neighbor {PEERS[0]} announce attributes {ATTRIBUTES[0]} nlri {PREFIXES[1]}"
    said = answered(ledger)
    assert old in said
    assert new not in said
    ledger.reported(PEERS[0], PREFIXES[:2], [])
    assert new in answered(ledger)


def corrected(*, read: bool) -> Ledger:
    """A session that comes back while what it is to be told differs; ``read``: ExaBGP knows before it is up."""
    ledger = Ledger()
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[1]}})
    ledger.up(PEERS[0], 1, FAMILIES)
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    for family in FAMILIES:
        ledger.reported_end(PEERS[0], family)
    ledger.down(PEERS[0])
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    (correction,) = ledger.connected(PEERS[0])
    if read:
        ledger.answered(correction, True, 0)
    ledger.up(PEERS[0], 2, FAMILIES)
    if not read:
        ledger.answered(correction, True, 0)
    return ledger


def announced(ledger: Ledger) -> list[list[str]]:
    return [line.split()[4:-2] for line in answered(ledger) if "eor" not in line]


def test_a_correction_that_exabgp_read_before_up_is_all_there_is_to_say() -> None:
    ledger = corrected(read=True)
    assert announced(ledger) == [ATTRIBUTES[0].split()]
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    assert announced(ledger) == []


def test_a_correction_that_exabgp_reads_after_up_is_made_sure_of() -> None:
    """It may have sent the old behind the new, and would not send the new again: it believes that it did."""
    ledger = corrected(read=False)
    assert announced(ledger) == []
    ledger.reported_end(PEERS[0], FAMILIES[0])
    assert announced(ledger) == [ATTRIBUTES[1].split()]
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    assert announced(ledger) == [ATTRIBUTES[0].split()]


@pytest.mark.parametrize("later", ["nothing", "changed", "changed back"])
def test_what_exabgp_had_not_read_when_the_session_went_is_made_sure_of(later: str) -> None:
    """It reads it in the next session, behind or before the old that it repeats, and would not send the new again."""
    old, new, newest = ATTRIBUTES
    last = {"nothing": new, "changed": newest, "changed back": old}[later]
    ledger = Ledger()
    ledger.want({PEERS[0]: {PREFIXES[0]: old}})
    ledger.up(PEERS[0], 1, FAMILIES)
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    for family in FAMILIES:
        ledger.reported_end(PEERS[0], family)
    ledger.want({PEERS[0]: {PREFIXES[0]: new}})
    unread = list(ledger.commands(0))
    assert len(unread) == 1
    ledger.down(PEERS[0])
    ledger.want({PEERS[0]: {PREFIXES[0]: last}})
    unread += ledger.connected(PEERS[0])
    ledger.up(PEERS[0], 2, FAMILIES)
    for command in unread:
        ledger.answered(command, True, 0)
    assert announced(ledger) == []
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    ledger.reported_end(PEERS[0], FAMILIES[0])
    said = []
    while lines := announced(ledger):
        said += lines
        ledger.reported(PEERS[0], PREFIXES[:1], [])
    assert [" ".join(words) for words in said] == [old if later == "nothing" else new, last]


def test_a_withdrawal_that_exabgp_had_not_read_when_the_session_went_takes_nothing_new() -> None:
    """Queued with what it withdraws, it may be sent behind what is announced after it."""
    ledger = Ledger()
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    ledger.up(PEERS[0], 1, FAMILIES)
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    ledger.want({PEERS[0]: {}})
    assert [c.steps[PREFIXES[0]].action for c in ledger.commands(0)] == ["withdraw"]
    ledger.down(PEERS[0])
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[1]}})
    assert list(ledger.connected(PEERS[0])) == []
    ledger.up(PEERS[0], 2, FAMILIES)
    assert announced(ledger) == []
    ledger.reported_end(PEERS[0], FAMILIES[0])
    assert announced(ledger) == []
    ledger.reported_end(PEERS[0], FAMILIES[0])
    assert announced(ledger) == [ATTRIBUTES[1].split()]


def test_refused_batch_is_said_one_by_one_and_the_bad_one_is_named() -> None:
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    bad, good = PREFIXES[0], PREFIXES[1]
    ledger.want({PEERS[0]: {bad: ATTRIBUTES[0], good: ATTRIBUTES[0]}})
    for command in list(ledger.commands(0)):
        ledger.answered(command, "eor" in command.line, 0)
    for command in list(ledger.commands(0)):
        ledger.answered(command, bad not in command.line, 0)
    ledger.reported(PEERS[0], [good], [])
    changes = ledger.changes()
    assert [c.refused for c in changes] == [[bad]]
    assert ledger.confirmed() == [(PEERS[0], good)]
    assert ledger.held() == [(PEERS[0], good)]


def test_withdrawal_repeats_the_attributes_of_the_announcement() -> None:
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[2]}})
    answered(ledger)
    ledger.want({})
    assert answered(ledger) == [], "the announcement was not reported yet"
    ledger.reported(PEERS[0], [PREFIXES[0]], [])
    assert answered(ledger) == [f"neighbor {PEERS[0]} withdraw attributes {ATTRIBUTES[2]} nlri {PREFIXES[0]}"]


def test_repetition_says_withdrawals_again() -> None:
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0], PREFIXES[1]: ATTRIBUTES[0]}})
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:2], [])
    ledger.want({PEERS[0]: {PREFIXES[1]: ATTRIBUTES[0]}})
    answered(ledger)
    ledger.reported(PEERS[0], [], [PREFIXES[0]])
    ledger.assert_all()
    assert sorted(line for line in answered(ledger) if "eor" not in line) == [
        f"neighbor {PEERS[0]} announce attributes {ATTRIBUTES[0]} nlri {PREFIXES[1]}",
        f"neighbor {PEERS[0]} withdraw attributes {ATTRIBUTES[0]} nlri {PREFIXES[0]}",
    ]


def test_what_is_wanted_again_waits_for_a_repeated_withdrawal() -> None:
    """With other attributes it could be sent before it (fault 1)."""
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    answered(ledger)
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    ledger.want({PEERS[0]: {}})
    answered(ledger)
    ledger.reported(PEERS[0], [], PREFIXES[:1])
    ledger.assert_all()
    assert [line.split()[2] for line in answered(ledger)] == ["withdraw"]
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[1]}})
    assert announced(ledger) == []
    ledger.reported(PEERS[0], [], PREFIXES[:1])
    assert announced(ledger) == [ATTRIBUTES[1].split()]


def test_peer_that_is_down_is_told_nothing() -> None:
    """What is queued for it would make ExaBGP lose every reload (fault 2)."""
    ledger = Ledger()
    ledger.up(PEERS[0], 1, FAMILIES)
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    answered(ledger)
    ledger.down(PEERS[0])
    ledger.want({PEERS[0]: {PREFIXES[1]: ATTRIBUTES[0]}})
    assert answered(ledger) == []
    assert ledger.idle()
    assert [str(c.line) for c in ledger.connected(PEERS[0])] == [
        f"neighbor {PEERS[0]} withdraw attributes {ATTRIBUTES[0]} nlri {PREFIXES[0]}"
    ]
    assert ledger.lingering() == [(PEERS[0], PREFIXES[0])], "it may hold it still, in graceful restart"
    ledger.forget([PEERS[0]])
    assert ledger.lingering() == [(PEERS[0], PREFIXES[0])]
    ledger.want({})
    ledger.forget([])
    assert ledger.lingering() == []


def test_what_exabgp_queued_twice_while_a_session_was_down_is_made_sure_of() -> None:
    """A change that it read only after the session went, and the correction of that: it sends them in any order."""
    ledger = Ledger()
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[1]}})
    ledger.up(PEERS[0], 1, FAMILIES)
    unread = list(ledger.commands(0))
    ledger.down(PEERS[0])
    ledger.want({PEERS[0]: {PREFIXES[0]: ATTRIBUTES[0]}})
    unread += ledger.connected(PEERS[0])
    for command in unread:
        ledger.answered(command, "eor" not in command.line, 0)
    ledger.up(PEERS[0], 2, FAMILIES)
    assert announced(ledger) == []
    for _ in range(2):  # the first was lost with its session
        ledger.reported_end(PEERS[0], FAMILIES[0])
    assert announced(ledger) == [ATTRIBUTES[1].split()]
    ledger.reported(PEERS[0], PREFIXES[:1], [])
    assert announced(ledger) == [ATTRIBUTES[0].split()]
