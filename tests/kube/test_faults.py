"""KubeStore against an API server that has its bad days: each fault of kubernetes.md, and what must not follow."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lab.kube.plane import make_keys
from store import kube
from store.base import Event
from store.clock import SystemClock
from store.errors import Conflict, Expired, Invalid, NotFound, StoreError, Unavailable
from store.kube import KubeStore
from store.kubeaccess import Access, FixedToken, TokenFile, Tokens
from store.kubehttp import Limits
from store.model import IPAMBlock, IPPool, IPPoolSpec, Meta, Node
from tests.kube.fake_api import FakeApi, bookmark, error, hangs, line, page, pool, refuses, says, streams

LIMITS = Limits(connect=30, request=30, silence=30, watch=60, patience=1.5)
MINE = IPPool(metadata=Meta(name="a"), spec=IPPoolSpec(cidr="10.0.0.0/16"))


class Slept(SystemClock):
    """Time passes by what is slept, and in no time: a busy machine makes no pause longer."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)


def run(
    api: FakeApi,
    test: Callable[[KubeStore], Awaitable[None]],
    *,
    tokens: Tokens | None = None,
    limits: Limits = LIMITS,
    **access: Any,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), api:
            reached = Access(server=api.url, tokens=tokens or FixedToken("t"), **access)
            store = KubeStore(reached, SystemClock(), rng=random.Random(1), limits=limits)
            try:
                await test(store)
            finally:
                await store.close()
        assert api.left == 0, f"never asked for; asked: {api.asked}"

    asyncio.run(main())


async def take(events: AsyncGenerator[Event[IPPool], None], count: int) -> list[str]:
    found = [await anext(events) for _ in range(count)]
    return [f"{e.type} {e.object.name if e.object else ''}@{e.version}" for e in found]


def versions(api: FakeApi) -> list[str]:
    """Where each watch began."""
    return [m[1] for m in (re.search(r"watch=true.*resourceVersion=(\d+)", asked) for asked in api.asked) if m]


# -- watches --------------------------------------------------------------------------------------------------------


def test_a_watch_resumes_where_its_last_event_or_bookmark_left_it() -> None:
    api = FakeApi(
        page(5, pool("a", 3)),
        streams(line("MODIFIED", pool("a", 7)), bookmark(9)),
        page(9),
        streams(line("ADDED", pool("b", 12))),
        page(12),
        streams(line("DELETED", pool("a", 14)), hold=5),
    )

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 5) == ["added a@", "synced @5", "modified a@7", "added b@12", "deleted a@14"]
        assert versions(api) == ["5", "9", "12"]
        assert all("allowWatchBookmarks=true" in asked for asked in api.asked if "watch=true" in asked)

    run(api, test)


def test_a_cut_connection_is_no_event_and_no_loss() -> None:
    api = FakeApi(
        page(5),
        streams(line("ADDED", pool("a", 7)), b'{"type":"MODIFIED","obj', cut=True),
        page(8),
        streams(line("MODIFIED", pool("a", 8)), hold=5),
    )

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 3) == ["synced @5", "added a@7", "modified a@8"]
        assert versions(api) == ["5", "7"]

    run(api, test)


def test_faults_that_do_not_come_in_a_row_never_add_up() -> None:
    api = FakeApi(page(5))
    for version in range(6, 16):
        api.then(streams(bookmark(version), cut=True), page(version))
    api.then(streams(line("ADDED", pool("a", 20)), hold=5))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 2) == ["synced @5", "added a@20"]

    run(api, test)


def test_lines_come_whole_however_they_are_cut() -> None:
    text = b'{"type":"ADDED","object":{"metadata":{"name":"a","resourceVersion":"7"},"spec":{"cidr":"10.0.0.0/16"}}}\n'
    api = FakeApi(page(5), streams(*(text[i : i + 1] for i in range(len(text))), text + text[:20], text[20:], hold=5))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 4) == ["synced @5", "added a@7", "added a@7", "added a@7"]

    run(api, test)


@pytest.mark.parametrize("answer", [refuses(410, "Expired", "too old"), streams(error(410, "Expired"))])
def test_a_version_that_is_too_old_is_expired_as_answer_and_in_the_stream(answer: Any) -> None:
    api = FakeApi(page(9), answer)

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool, since="5")) as events:
            with pytest.raises(Expired, match="list again"):
                await anext(events)

    run(api, test)


def test_a_version_that_is_yet_to_come_is_expired_before_it_is_watched() -> None:
    api = FakeApi(page(9))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool, since="10")) as events:
            with pytest.raises(Expired, match="yet to come"):
                await anext(events)
        assert versions(api) == []

    run(api, test)


def test_an_etcd_that_went_back_in_time_is_found_when_the_watch_resumes() -> None:
    api = FakeApi(page(50), streams(line("ADDED", pool("a", 60)), cut=True), page(20))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 2) == ["synced @50", "added a@60"]
            with pytest.raises(Expired, match="yet to come"):
                await anext(events)

    run(api, test)


def test_a_watch_that_was_served_for_all_its_time_goes_on_without_a_question() -> None:
    """Or a node at rest would ask twice as much. One that ends before its time may be followed by another server's."""
    limits = Limits(watch=3, silence=30)  # 3 or 4 s, as the dice fall
    api = FakeApi(
        page(5),
        streams(bookmark(6), hold=4.6),
        streams(bookmark(7), hold=0.1),
        page(7),
        streams(line("ADDED", pool("a", 8)), hold=5),
    )

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 2) == ["synced @5", "added a@8"]
        assert versions(api) == ["5", "6", "7"]
        assert all(re.search(r"timeoutSeconds=[34]\b", asked) for asked in api.asked if "watch=true" in asked)

    run(api, test, limits=limits)


def test_a_version_is_looked_at_without_searching_for_what_is_selected() -> None:
    """But by name: a right to that one object may be all that there is."""
    api = FakeApi(page(5), streams(bookmark(6), cut=True), page(6), streams(hold=5), page(9), page(9))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPAMBlock, where={"spec.node": "n"})) as events:
            await anext(events)
            waiting = asyncio.create_task(anext(events))
            await api.came(4)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert ["spec.node" in asked for asked in api.asked] == [True, True, False, True]
        async with aclosing(store.watch(Node, since="10", where={"metadata.name": "n"})) as named:
            with pytest.raises(Expired):
                await anext(named)
        assert "metadata.name%3Dn" in api.asked[-1]
        with pytest.raises(Expired):
            await anext(store.watch(IPAMBlock, since="10", where={"spec.node": "n"}))
        assert api.asked[-1].endswith("/ipamblocks?limit=1")

    run(api, test)


def test_a_watch_that_falls_silent_is_taken_up_anew() -> None:
    api = FakeApi(page(5), streams(bookmark(6), hold=60), page(6), streams(line("ADDED", pool("a", 7)), hold=5))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 2) == ["synced @5", "added a@7"]
        assert versions(api) == ["5", "6"]
        assert api.times[-1] - api.times[1] >= 2

    run(api, test, limits=replace(LIMITS, silence=2))


def test_an_api_server_that_puts_off_is_waited_for_as_long_as_it_asks() -> None:
    api = FakeApi(
        page(5),
        refuses(429, "TooManyRequests", "storage is (re)initializing", after=1),
        page(5),
        streams(line("ADDED", pool("a", 7)), hold=5),
    )

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            assert await take(events, 2) == ["synced @5", "added a@7"]
        assert api.times[2] - api.times[1] >= 1

    run(api, test, limits=Limits(patience=5))


def test_watches_that_end_at_once_are_no_busy_loop() -> None:
    api = FakeApi(page(5))
    for _ in range(50):
        api.then(streams(), page(5))

    async def main() -> None:
        async with asyncio.timeout(60), api:
            store = KubeStore(Access(server=api.url, tokens=FixedToken("")), Slept(), limits=LIMITS)
            async with aclosing(store.watch(IPPool)) as events:
                assert await take(events, 1) == ["synced @5"]
                with pytest.raises(Unavailable, match="end as soon as they begin"):
                    await anext(events)
            await store.close()

    asyncio.run(main())
    assert 3 <= len(versions(api)) <= 6


def test_an_api_server_that_is_gone_is_told_after_a_few_tries_with_growing_pauses() -> None:
    api = FakeApi(page(5), *(refuses(500, "InternalError", "etcd is away") for _ in range(20)))
    clock = Slept()

    async def main() -> None:
        async with asyncio.timeout(60), api:
            store = KubeStore(Access(server=api.url, tokens=FixedToken("")), clock, limits=LIMITS)
            async with aclosing(store.watch(IPPool)) as events:
                assert await take(events, 1) == ["synced @5"]
                with pytest.raises(Unavailable, match="etcd is away"):
                    await anext(events)
            await store.close()

    asyncio.run(main())
    assert 2 <= len(clock.pauses) <= 5
    assert all(later > earlier for earlier, later in itertools.pairwise(clock.pauses))
    assert sum(clock.pauses) <= LIMITS.patience + 0.5


@pytest.mark.parametrize(
    "said",
    [
        b"nonsense\n",
        b'{"type":"ADDED"}\n',
        b'{"type":"ADDED","object":{"metadata":{}}}\n',
        b'{"type":"?","object":{}}\n',
    ],
)
def test_a_line_that_is_no_event_is_not_passed_over(said: bytes) -> None:
    """What it said may have been a change: after a few tries the watch ends, and who follows lists again."""
    api = FakeApi(page(5))

    async def main() -> None:
        async with asyncio.timeout(60), api:
            for _ in range(20):
                api.then(streams(said, hold=0.01), page(5))
            store = KubeStore(Access(server=api.url, tokens=FixedToken("")), Slept(), limits=LIMITS)
            async with aclosing(store.watch(IPPool)) as events:
                assert await take(events, 1) == ["synced @5"]
                with pytest.raises(Unavailable):
                    await anext(events)
            await store.close()

    asyncio.run(main())
    assert set(versions(api)) == {"5"}


# -- lists ----------------------------------------------------------------------------------------------------------


def test_a_list_comes_in_pages_of_one_state() -> None:
    api = FakeApi(page(5, pool("b", 1), more="next/+ ="), page(5, pool("c", 2), more="last"), page(5, pool("a", 3)))

    async def test(store: KubeStore) -> None:
        listing = await store.list(IPPool)
        assert [p.name for p in listing.items] == ["a", "b", "c"]
        assert listing.version == "5"
        assert [re.findall(r"limit=\d+|continue=.*", asked) for asked in api.asked] == [
            [f"limit={kube.PAGE}"],
            [f"limit={kube.PAGE}", "continue=next%2F%2B+%3D"],
            [f"limit={kube.PAGE}", "continue=last"],
        ]

    run(api, test)


def test_pages_whose_state_was_forgotten_are_asked_for_again_in_one_piece() -> None:
    api = FakeApi(page(5, pool("a", 1), more="next"), refuses(410, "Expired", "continue"), page(9, pool("b", 7)))

    async def test(store: KubeStore) -> None:
        listing = await store.list(IPPool)
        assert ([p.name for p in listing.items], listing.version) == (["b"], "9")
        assert "limit" not in api.asked[-1]

    run(api, test)


def test_what_is_selected_comes_in_one_piece() -> None:
    """Kubernetes 1.31 reads a list with a limit from etcd, and all of the kind to find what is selected."""
    api = FakeApi(page(5))

    async def test(store: KubeStore) -> None:
        await store.list(IPAMBlock, where={"spec.node": "n"})
        assert "limit" not in api.asked[0]

    run(api, test)


def test_selections_are_escaped() -> None:
    api = FakeApi(page(5))

    async def test(store: KubeStore) -> None:
        await store.list(IPPool, where={"metadata.name": "a,b=c\\d"})
        assert "fieldSelector=metadata.name%3Da%5C%2Cb%5C%3Dc%5C%5Cd" in api.asked[0]

    run(api, test)


# -- writes ---------------------------------------------------------------------------------------------------------


def test_a_patch_is_pinned_to_what_it_was_made_from() -> None:
    """Between its reading and its writing somebody else may write: then it must be refused."""
    node = {"metadata": {"name": "n", "uid": "u", "resourceVersion": "5", "labels": {"a": "1", "b": "1"}}, "spec": {}}
    api = FakeApi(says(node), refuses(409, "Conflict", "the object has been modified"))

    async def test(store: KubeStore) -> None:
        wanted = Node(metadata=Meta(name="n", uid="u", resource_version="5", labels={"b": "2"}))
        with pytest.raises(Conflict):
            await store.update(wanted)
        assert api.asked[1] == "PATCH /api/v1/nodes/n"
        pinned = {"uid": "u", "resourceVersion": "5"}
        assert json.loads(api.bodies[1]) == {"metadata": {"labels": {"a": None, "b": "2"}, **pinned}}

    run(api, test)


# -- what is no answer ------------------------------------------------------------------------------------------------


def test_nobody_at_home_is_unavailable_at_once() -> None:
    async def main() -> None:
        async with FakeApi() as api:
            url = api.url
        store = KubeStore(Access(server=url, tokens=FixedToken("")), SystemClock(), limits=LIMITS)
        for call in (store.get(IPPool, "a"), store.list(IPPool), store.create(MINE), store.delete(IPPool, "a")):
            with pytest.raises(Unavailable, match=re.escape(url)):
                await call
        with pytest.raises(Unavailable):
            await anext(store.watch(IPPool))
        await store.close()

    asyncio.run(main())


def test_an_answer_that_does_not_come_has_a_limit() -> None:
    api = FakeApi(hangs())

    async def test(store: KubeStore) -> None:
        with pytest.raises(Unavailable, match=r"no answer to GET .* within 0\.6 s"):
            await store.get(IPPool, "a")

    run(api, test, limits=replace(LIMITS, request=0.6))


def test_a_write_whose_answer_was_lost_is_not_sent_twice() -> None:
    api = FakeApi(page(5), streams(cut=True))

    async def test(store: KubeStore) -> None:
        with pytest.raises(Unavailable):
            await store.create(MINE)
        assert [asked.split()[0] for asked in api.asked] == ["GET", "POST"]

    run(api, test)


def test_a_call_that_is_put_off_is_made_again() -> None:
    later = (refuses(429, "TooManyRequests", "later"), refuses(503, "ServiceUnavailable", "later", after=1))
    api = FakeApi(*later, says(pool("a", 3)))

    async def test(store: KubeStore) -> None:
        assert (await store.get(IPPool, "a")).name == "a"
        assert api.times[2] - api.times[1] >= 1

    run(api, test, limits=Limits(patience=5))


def test_but_not_for_ever() -> None:
    api = FakeApi(*(refuses(429, "TooManyRequests", "much later", after=1) for _ in range(2)))

    async def test(store: KubeStore) -> None:
        with pytest.raises(Unavailable, match="much later"):
            await store.get(IPPool, "a")

    run(api, test, limits=Limits(patience=1.9))


def test_a_closed_store_wakes_who_waits_for_an_answer() -> None:
    api = FakeApi(page(5), streams(hold=10))

    async def test(store: KubeStore) -> None:
        events = store.watch(IPPool)
        await take(events, 1)
        waiting = asyncio.create_task(take(events, 1))
        await api.came(2)
        await store.close()
        with pytest.raises(Unavailable, match="closed"):
            async with asyncio.timeout(60):
                await waiting

    run(api, test)


# -- refusals ---------------------------------------------------------------------------------------------------------

_UID = 'Operation cannot be fulfilled on ippools "a": Precondition failed: UID in precondition: x, UID in object meta: '


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (refuses(404, "NotFound", "not found", name="a"), NotFound, "IPPool a does not exist"),
        (says("404 page not found", code=404), Unavailable, "apply manifests/crds"),
        (refuses(409, "Conflict", "the object has been modified"), Conflict, "IPPool a"),
        (refuses(409, "Conflict", f"{_UID}y"), Conflict, "uid"),
        (refuses(409, "Conflict", _UID), NotFound, "IPPool a does not exist"),
        (refuses(403, "Forbidden", 'User "x" cannot get resource "ippools"'), Unavailable, "rbac.yaml"),
        (refuses(403, "Forbidden", "denied the request: not yours"), Invalid, "not yours"),
        (refuses(403, "Forbidden", "it is forbidden: not yet ready to handle request"), Unavailable, "not yet ready"),
        (refuses(422, "Invalid", "denied request: failed to configure binding: not synced"), Unavailable, "not synced"),
        (refuses(422, "Invalid", "bad", causes=[{"field": "spec.cidr", "message": "no"}]), Invalid, "spec.cidr: .* no"),
        (refuses(400, "BadRequest", "strict decoding error"), Invalid, "strict decoding"),
        (refuses(500, "InternalError", "etcd leader changed"), Unavailable, "etcd leader changed"),
        (refuses(504, "Timeout", "request did not complete"), Unavailable, "did not complete"),
        (says("<html>proxy</html>", code=502), Unavailable, "502 <html>proxy"),
        (says("<html>proxy</html>"), Unavailable, "cannot be read"),
        (says({"kind": "IPPool", "metadata": {"name": "a"}, "spec": {"cidr": 1}}), Unavailable, "apply manifests/crds"),
        (says("", code=302, Location="https://elsewhere"), Unavailable, "cannot be read"),
    ],
)
def test_each_refusal_is_told_as_what_it_means(answer: Any, error: type[StoreError], said: str) -> None:
    api = FakeApi(answer)

    async def test(store: KubeStore) -> None:
        with pytest.raises(error, match=said):
            await store.get(IPPool, "a")

    run(api, test)


def test_a_refused_value_is_told_with_its_field_and_remedy() -> None:
    cause = {"field": "spec.cidr", "message": 'Invalid value: "10.0.0.1/\\"16": write a prefix: one spelling'}
    api = FakeApi(page(5), refuses(422, "Invalid", "IPPool is invalid", causes=[cause]))

    async def test(store: KubeStore) -> None:
        with pytest.raises(Invalid) as refused:
            await store.create(MINE)
        (problem,) = refused.value.problems
        assert (problem.field, problem.remedy) == ("spec.cidr", "write a prefix: one spelling")
        assert problem.value == '10.0.0.1/\\"16'

    run(api, test)


# -- credentials ------------------------------------------------------------------------------------------------------


def test_a_token_file_is_read_again_when_it_changed(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    api = FakeApi(page(5), page(5), page(5))

    async def test(store: KubeStore) -> None:
        await store.list(IPPool)
        await store.list(IPPool)
        renewed = tmp_path / "renewed"
        renewed.write_text("two\n")
        renewed.rename(file)
        await store.list(IPPool)
        assert api.tokens == ["Bearer one", "Bearer one", "Bearer two"]

    run(api, test, tokens=TokenFile(file))


def test_401_reads_the_credentials_again_once_and_is_an_outage_then(tmp_path: Path) -> None:
    class Renewed:
        asked: list[bool]

        def __init__(self) -> None:
            self.asked = []

        async def token(self, *, fresh: bool = False) -> str:
            self.asked.append(fresh)
            return f"t{sum(self.asked)}"

    tokens = Renewed()
    api = FakeApi(refuses(401, "Unauthorized"), page(5), refuses(401, "Unauthorized"), refuses(401, "Unauthorized"))

    async def test(store: KubeStore) -> None:
        await store.list(IPPool)
        with pytest.raises(Unavailable, match="does not accept our credentials"):
            await store.list(IPPool)
        assert api.tokens == ["Bearer t0", "Bearer t1", "Bearer t1", "Bearer t2"]

    run(api, test, tokens=tokens)


def test_401_to_a_watch_is_an_outage_too() -> None:
    api = FakeApi(page(5), *(refuses(401, "Unauthorized") for _ in range(2)), page(5), streams(bookmark(6), hold=1))

    async def test(store: KubeStore) -> None:
        async with aclosing(store.watch(IPPool)) as events:
            await take(events, 1)
            waiting = asyncio.create_task(take(events, 1))
            await api.came(5)
            assert not waiting.done()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    run(api, test)


def test_a_ca_that_is_renewed_is_read_again_and_another_one_is_not_trusted(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        make_keys(folder)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(new / "server.crt", new / "server.key")
    ca = tmp_path / "ca.crt"
    ca.write_text((old / "ca.crt").read_text())
    api = FakeApi(page(5), tls=tls)

    async def test(store: KubeStore) -> None:
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await store.list(IPPool)
        renewed = tmp_path / "renewed"
        renewed.write_text((new / "ca.crt").read_text())
        renewed.rename(ca)
        assert (await store.list(IPPool)).version == "5"

    run(api, test, ca=ca)


def test_a_server_of_another_name_is_not_trusted_unless_that_name_is_asked_for(tmp_path: Path) -> None:
    make_keys(tmp_path, names="DNS:api.example.org")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")

    async def refused(store: KubeStore) -> None:
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await store.list(IPPool)

    async def accepted(store: KubeStore) -> None:
        assert (await store.list(IPPool)).version == "5"

    run(FakeApi(tls=tls), refused, ca=tmp_path / "ca.crt")
    run(FakeApi(page(5), tls=tls), accepted, ca=(tmp_path / "ca.crt").read_text(), server_name="api.example.org")
    run(FakeApi(page(5), tls=tls), accepted, insecure=True)
