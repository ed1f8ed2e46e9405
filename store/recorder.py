"""Says things as Kubernetes' Events on a Node or a Pod, where ``kubectl describe`` shows them.

One thing said about one object is one Event: said again, it is counted in its ``series``. As on the API server an
Event's text never changes, another text is another Event. An Event is for people: it never makes anybody wait, and what
cannot be said in the end is counted, not raised.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import Final

import msgspec

from store.base import Store
from store.clock import Clock
from store.errors import AlreadyExists, Conflict, Invalid, NotFound, StoreError
from store.model import EventSeries, KubeEvent, Meta, ObjectReference
from store.waiting import until

log = logging.getLogger(__name__)

#: The longest note that the API server takes (events.k8s.io/v1), in bytes.
_NOTE: Final = 1024
#: The longest ``reportingInstance``.
_INSTANCE: Final = 128
#: Letters of the object's name that an Event's name begins with, for people; a part between dots has 63 at most.
_NAME: Final = 60


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds of the recorder's ``Clock``."""

    again: float = 300.0  # between two writes of the same words about the same object
    other: float = 60.0  # between two writes for the same reason about the same object, when the words change
    topics: int = 256  # object and reason, remembered
    write_limit: float = 10.0  # one write, in real time
    backoff: tuple[float, float] = (1.0, 60.0)  # while the store is away
    keep: float = 600.0  # how long something waits for a store that is away


class _Words(msgspec.Struct, frozen=True):
    type: str
    action: str
    note: str


class _Saying(msgspec.Struct):
    """What is said for one reason about one object."""

    regarding: ObjectReference
    reason: str
    words: _Words | None = None
    first: str = ""  # when these words were said first, and last
    last: str = ""
    count: int = 0  # how often they were said, and how often as the store has it
    told: int = 0
    event: KubeEvent | None = None  # as it is in the store, with these words
    waits: float | None = None  # since when (monotonic) something is to be written; None: nothing is
    tried: float | None = None  # when something was written last, or refused


def node_reference(name: str) -> ObjectReference:
    """A Node as kubelet refers to it in Events: by its name in the place of its uid, which ``kubectl describe`` looks
    for too. So it can be said of a Node that is not there (yet)."""
    return ObjectReference(api_version="v1", kind="Node", name=name, uid=name)


def pod_reference(pod: str, uid: str) -> ObjectReference:
    """A Pod given as ``namespace/name``. ``kubectl describe`` shows what has its uid."""
    namespace, _, name = pod.partition("/")
    return ObjectReference(api_version="v1", kind="Pod", namespace=namespace, name=name, uid=uid)


class Recorder:
    """``controller`` is the program, as domain/name; ``instance`` the node that it runs on. ``run`` must run beside."""

    def __init__(
        self, store: Store, clock: Clock, *, controller: str, instance: str, settings: Settings | None = None
    ) -> None:
        self._store = store
        self._clock = clock
        self._controller = controller
        self._instance = instance
        self._settings = settings or Settings()
        self._sayings: dict[tuple[ObjectReference, str], _Saying] = {}  # said last comes last
        self._news = asyncio.Event()
        #: Writes that came to an end, and things that were never written.
        self.written = 0
        self.dropped = 0

    def say(self, regarding: ObjectReference, reason: str, note: str, *, action: str, normal: bool = False) -> None:
        """Notes it down and returns. ``reason`` and ``action`` are CamelCase, ``note`` is for people."""
        key = (regarding, reason)
        saying = self._sayings.pop(key, None) or _Saying(regarding, reason)
        self._sayings[key] = saying
        words, now = _Words("Normal" if normal else "Warning", action, _cut(note)), _stamp(self._clock.now())
        if words != saying.words:
            saying.words, saying.first, saying.count, saying.told, saying.event = words, now, 0, 0, None
        saying.last, saying.count = now, saying.count + 1
        if saying.waits is None:
            saying.waits = self._clock.monotonic()
            self._news.set()
        if len(self._sayings) > self._settings.topics:
            self._forget_one()

    async def run(self) -> None:
        """Writes what was said. Until cancelled; the store's faults are waited out."""
        least, most = self._settings.backoff
        pause = least
        while True:
            self._news.clear()
            self._drop_old()
            saying = self._due()
            if saying is None:
                await self._wait()
                continue
            try:
                async with asyncio.timeout(self._settings.write_limit):
                    await self._write(saying)
                pause = least
            except (Invalid, NotFound) as e:  # NotFound: the namespace is gone
                log.warning("an Event is refused: %s", e)
                self._drop(saying)
            except (StoreError, TimeoutError) as e:
                log.info("Events are not written: %s", str(e) or "no answer from the store")
                await self._clock.sleep(pause)
                pause = min(2 * pause, most)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _forget_one(self) -> None:
        """The one said longest ago, rather one that is written."""
        key = next((k for k, s in self._sayings.items() if s.waits is None), next(iter(self._sayings)))
        self.dropped += self._sayings.pop(key).waits is not None

    def _drop_old(self) -> None:
        """What nobody could be told for so long is no news."""
        now = self._clock.monotonic()
        for saying in self._sayings.values():
            if (
                saying.waits is not None
                and now - max(saying.waits, _due_at(saying, self._settings)) > self._settings.keep
            ):
                self._drop(saying)

    def _drop(self, saying: _Saying) -> None:
        saying.waits, saying.tried = None, self._clock.monotonic()
        self.dropped += 1

    def _due(self) -> _Saying | None:
        now = self._clock.monotonic()
        waiting = (s for s in self._sayings.values() if s.waits is not None)
        return next((s for s in waiting if _due_at(s, self._settings) <= now), None)

    async def _wait(self) -> None:
        """Until something is said, or may be written."""
        due = [_due_at(s, self._settings) for s in self._sayings.values() if s.waits is not None]
        await until(self._clock, self._news, min(due) - self._clock.monotonic() if due else None)

    async def _write(self, saying: _Saying) -> None:
        words, count = saying.words, saying.count
        event = await self._put(saying, count - saying.told)
        self.written += 1
        saying.tried = self._clock.monotonic()
        if saying.words == words:
            saying.event, saying.told = event, count
        # More may have been said meanwhile.
        saying.waits = None if (saying.words, saying.count) == (words, count) else saying.tried

    async def _put(self, saying: _Saying, more: int) -> KubeEvent:
        """Writes that it was said ``more`` times. What the store has may have run out (the API server keeps an Event
        for an hour), or be of the time before this process."""
        new, last = self._new(saying, more), saying.last
        if saying.event is not None:
            try:
                return await self._store.update(_counted(saying.event, more, last))
            except (Conflict, NotFound):
                log.debug("Event %s is another by now", saying.event.key)
        try:
            return await self._store.create(new)
        except AlreadyExists:
            return await self._store.update(_counted(await self._store.get(KubeEvent, new.key), more, last))

    def _new(self, saying: _Saying, count: int) -> KubeEvent:
        regarding, words = saying.regarding, saying.words
        assert words is not None
        event = KubeEvent(
            metadata=Meta(name="new", namespace=regarding.namespace or "default"),
            event_time=saying.first,
            reporting_controller=self._controller,
            reporting_instance=self._instance[:_INSTANCE],
            action=words.action,
            reason=saying.reason,
            regarding=regarding,
            note=words.note,
            type=words.type,
            series=EventSeries(count=count, last_observed_time=saying.last) if count > 1 else None,
        )
        return msgspec.structs.replace(event, metadata=msgspec.structs.replace(event.metadata, name=_name(event)))


def _due_at(saying: _Saying, settings: Settings) -> float:
    """When it may be written, as far as the last write for its reason is concerned (monotonic)."""
    if saying.tried is None:
        return 0.0
    return saying.tried + (settings.other if saying.event is None else settings.again)


def _counted(event: KubeEvent, more: int, last: str) -> KubeEvent:
    count = (event.series.count if event.series else 1) + more
    return msgspec.structs.replace(event, series=EventSeries(count=count, last_observed_time=last))


def _name(event: KubeEvent) -> str:
    """The same for the same thing said about the same object by the same program, also after its restart."""
    assert event.regarding is not None
    said = (event.regarding, event.reporting_controller, event.reporting_instance, event.type, event.action)
    digest = hashlib.blake2b(msgspec.json.encode((*said, event.reason, event.note)), digest_size=8).hexdigest()
    return f"{event.regarding.name[:_NAME].rstrip('.-')}.{digest}"


def _stamp(now: str) -> str:
    """``Clock.now`` as events.k8s.io/v1 wants it (metav1.MicroTime)."""
    return now.replace("Z", ".000000Z")


def _cut(note: str) -> str:
    if len(note.encode()) <= _NOTE:
        return note
    return f"{note.encode()[: _NOTE - 3].decode(errors='ignore')}..."
