"""The archive for help: what is in it, what is never in it, and what becomes of an item that cannot be had."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.bgp import conf
from agent.bgp.model import Session
from ctl.diags import node, redact
from ctl.diags.box import Box, pack
from ctl.diags.collect import Asked, diags
from ctl.main import main
from store.clock import SystemClock
from store.model import BGPPeer, BGPPeerSpec, Meta, Secret
from store.sqlite import SqliteStore

# -- what is left out --------------------------------------------------------------------------------------------------

MARK = "Hunter2Planted"


@pytest.mark.parametrize(
    "text",
    [
        f'md5-password "{MARK}";',
        f"password={MARK}",
        f"  passwd: '{MARK}'",
        f'{{"token": "{MARK}"}}',
        rf'"{{\"bgpPassword\":\"{MARK}\"}}"',
        f"--token-of-mine {MARK}",
        f"--password={MARK}",
        f"Authorization: {MARK}",
        f"authorization: Bearer {MARK}aaaa",
        f"https://user:{MARK}@10.0.0.1/",
        f"-----BEGIN EC PRIVATE KEY-----\n{MARK}\n-----END EC PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{MARK}",
        f"eyJhbGciOiJSUzI1NiJ9.{MARK}.sig-nature",
        f"API_KEY={MARK}",
        f"client-secret: {MARK}",
    ],
)
def test_what_stands_in_a_secrets_place_is_left_out(text: str) -> None:
    found: set[str] = set()
    said = redact.text(f"before\n{text}\nafter", found)
    assert MARK not in said
    assert redact.LEFT_OUT in said
    assert said.startswith("before\n")


@pytest.mark.parametrize(
    "text",
    [
        "md5-base64 true;",
        "neighbor 10.1.0.2 {",
        "NoSuchPassword is a word",
        "tokenExpirationSeconds: 3600",
        "ca-file=/var/run/secrets/ca.crt",
        "fd00:10:1::2 dev up1 proto 143",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact.text(text, set()) == text


def test_fields_of_objects_are_left_out_and_names_of_secrets_stay() -> None:
    found: set[str] = set()
    reference = {"secretKeyRef": {"name": "tor-passwords", "key": "tor-1"}}
    value = {
        "metadata": {
            "managedFields": [{"f:x": MARK}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": json.dumps({"x": MARK}), "a": "b"},
        },
        "spec": {
            "password": reference,
            "communities": [{"name": "a", "value": "65001:1"}],
            "tokens": {"one": MARK, "two": [MARK + "2"]},
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "env": [
                        {"name": "UNDERLAY_LOG", "value": "INFO"},
                        {"name": "WHATEVER", "value": MARK},
                        {"name": "UNDERLAY_PASSWORD", "value": MARK},
                        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    ],
                    "args": [f"--token={MARK}"],
                }
            ],
        },
    }
    said = redact.structured(value, found)
    assert MARK not in json.dumps(said)
    assert said["metadata"] == {"annotations": {"a": "b"}}
    assert said["spec"]["password"] == reference
    assert said["spec"]["communities"] == [{"name": "a", "value": "65001:1"}]
    assert said["spec"]["automountServiceAccountToken"] is False
    env = said["spec"]["containers"][0]["env"]
    assert (env[0]["value"], env[1]["value"], env[3]) == (
        "INFO",
        redact.LEFT_OUT,
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    )
    assert {MARK, MARK + "2"} <= found


def test_a_secret_that_one_item_shows_is_left_out_of_every_other() -> None:
    box = Box()
    coded = base64.b64encode(MARK.encode()).decode()
    box.put("log", "a log, before anything is known", f"peer said {MARK}, and {coded}, and tor")
    box.put("conf", "a configuration", f'md5-base64 true;\nmd5-password "{coded}";\npassword: "tor"')
    box.miss("gone", f"line 3: {MARK}")
    files = box.files()
    assert MARK not in "".join(files.values())
    assert coded not in "".join(files.values())
    assert files["log"] == f"peer said {redact.LEFT_OUT}, and {redact.LEFT_OUT}, and {redact.LEFT_OUT}"


def test_a_short_secret_tears_no_holes() -> None:
    assert redact.scrub("tor-1 monitor tor", ["tor"]) == f"{redact.LEFT_OUT}-1 monitor {redact.LEFT_OUT}"
    assert redact.scrub("yes, none is required", ["none", "required", "", "ab"]) == "yes, none is required"


SECRETS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=40)


@given(secret=SECRETS.filter(lambda s: s.lower() not in ("required",)), noise=st.text(max_size=60))
def test_no_form_of_a_known_secret_is_left(secret: str, noise: str) -> None:
    coded = base64.b64encode(secret.encode()).decode().rstrip("=")
    said = redact.scrub(f"{noise}{secret}{noise}{coded}", [secret])
    assert secret not in said.replace(redact.LEFT_OUT, "\0")
    assert coded not in said.replace(redact.LEFT_OUT, "\0")


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_an_item_and_all_together_are_bounded() -> None:
    box = Box(item=10, total=25)
    box.put("a", "the beginning", "0123456789abc")
    box.put("b", "the end", "0123456789abc", keep="tail")
    box.put("c", "what is left", "0123456789abc")
    box.put("d", "nothing is left", "x")
    files = box.files()
    assert (files["a"], files["b"], files["c"]) == ("0123456789", "3456789abc", "01234")
    assert "d" not in files
    assert files["errors.txt"] == "d: the archive is full\n"
    assert "cut: the last 10 of 13 letters" in files["index.txt"]


def test_the_same_files_are_the_same_archive() -> None:
    assert pack({"b": "1", "a": "2"}, "x") == pack({"a": "2", "b": "1"}, "x")


# -- a node ------------------------------------------------------------------------------------------------------------


class Home:
    """A node's folders, with a secret planted wherever one may be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.here = node.Here(
            run=folder / "run",
            state=folder / "state",
            conflists=(folder / "net.d",),
            logs=(folder / "log",),
            token=folder / "token",
            cni_pages=("metrics.sock",),
        )
        self.coded = base64.b64encode(self.secret("password").encode()).decode()
        session = Session(
            name="tor-1",
            address="10.0.0.1",
            local_address="10.0.0.2",
            local_as=65101,
            peer_as=65001,
            router_id="10.0.0.2",
            families=("ipv4 unicast",),
            secret="Secret underlay-system/tor, key tor-1",
            password=self.coded,
        )
        self.write("run/speaker/exabgp.conf", conf.render([session], ["relay"]))
        self.write("run/speaker/sessions.json", msgspec.json.encode([session]).decode())
        self.write("run/speaker/exabgp.log", f"could not use {self.secret('password')} for tor-1\n")
        self.write("run/speaker/table.json", "{}")
        self.write("run/journal-1", "10.0.0.1 x\n")
        self.write("run/credentials/token", self.secret("credentials"))
        self.write("state/snapshot.json", json.dumps({"x": 1}))
        self.write(
            "net.d/10-underlay.conflist", json.dumps({"plugins": [{"type": "x", "password": self.secret("cni")}]})
        )
        self.write("net.d/calico-kubeconfig", f"token: {self.secret('calico')}\n")
        self.write("net.d/broken.conf", "{")
        self.write("log/cni/0.log", f"Authorization: Bearer {self.secret('bearer')}\n{self.secret('token')}\n")
        self.write("token", self.secret("token"))

    #: Where each is, by what it is called.
    def secret(self, name: str) -> str:
        return f"Planted-{name}-4711"

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def collect(self, *, url: str = "", limit: float = 60) -> dict[str, str]:
        target = self.folder / "archive.tar.gz"
        asked = Asked(output=str(target), url=url, limit=limit)
        assert diags(asked, self.here, SystemClock(), "node-1") == 0
        assert target.stat().st_mode & 0o777 == 0o600
        return unpacked(target.read_bytes(), "underlay-diags-node-1")

    def planted(self) -> list[str]:
        names = ("password", "credentials", "cni", "calico", "bearer", "token", "environment", "argument", "object")
        return [self.coded, *map(self.secret, names)]


def unpacked(data: bytes, name: str) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {}
        for entry in archive:
            file = archive.extractfile(entry)
            assert file is not None
            files[entry.name.removeprefix(f"{name}/")] = file.read().decode()
        return files


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_no_secret_of_a_node_is_in_the_archive(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in ExaBGP's files and its log, a token's file, foreign CNI files, pods' logs, processes' environments and
    arguments, a Secret and an annotation in the store."""
    url = f"sqlite:{home.folder / 'store.db'}"
    monkeypatch.setenv("SOME_PASSWORD", home.secret("environment"))

    async def fill() -> None:
        store = SqliteStore(home.folder / "store.db", SystemClock())
        meta = Meta(namespace="underlay-system", name="tor")
        await store.create(Secret(metadata=meta, data={"tor-1": home.secret("object").encode()}))
        applied = {"kubectl.kubernetes.io/last-applied-configuration": home.secret("object")}
        spec = BGPPeerSpec(peer_ip="10.0.0.1", as_number=65001)
        await store.create(BGPPeer(metadata=Meta(name="tor-1", annotations=applied), spec=spec))
        await store.close()

    asyncio.run(fill())
    argv = [sys.executable, "-c", "input()", "underlay-agent", f"--token={home.secret('argument')}"]
    with Popen(argv, stdin=-1, env={**os.environ, "TOKEN": home.secret("environment")}) as process:
        files = home.collect(url=url)
        assert process.stdin is not None
        process.stdin.close()
    for secret in home.planted():
        assert [path for path, text in files.items() if secret in text] == [], secret
    # And yet it says what there is.
    assert "neighbor 10.0.0.1" in files["node/speaker/exabgp.conf"]
    assert f'md5-password "{redact.LEFT_OUT}"' in files["node/speaker/exabgp.conf"]
    assert "Secret underlay-system/tor, key tor-1" in files["node/speaker/sessions.json"]
    assert "calico-kubeconfig" in files["node/conflists.txt"]
    assert "underlay-agent" in files["node/processes.txt"]
    assert "10.0.0.1" in files["cluster/bgppeers.json"]
    assert "cluster/secrets.json" not in files


def test_a_dead_agent_and_no_store_cost_what_they_alone_say(home: Home) -> None:
    files = home.collect()
    missing = dict(line.split(": ", 1) for line in files["errors.txt"].splitlines())
    assert "agent.sock" in missing["node/agent/metrics.txt"] or "No such file" in missing["node/agent/metrics.txt"]
    assert "metrics.sock" in missing["node/cni/healthz.txt"]
    assert missing["cluster"].startswith("no store is named")
    assert "node/conflists/broken.conf" in missing
    assert set(files) >= {f"node/kernel/{name}.txt" for name in ("routes", "rules", "links", "nexthops", "neighbours")}
    assert not set(files) & set(missing)


def test_every_file_is_in_the_index(home: Home) -> None:
    files = home.collect()
    said = {line.split("  ")[0] for line in files["index.txt"].splitlines()[3:]}
    assert said == set(files) - {"index.txt", "errors.txt"}
    assert {path: text for path, text in home.collect().items() if path.startswith("node/speaker")} == {
        path: text for path, text in files.items() if path.startswith("node/speaker")
    }


def test_a_fifo_is_not_waited_for(home: Home) -> None:
    path = home.folder / "run/speaker/table.json"
    path.unlink()
    os.mkfifo(path)
    assert "node/speaker/table.json: OSError: " in home.collect()["errors.txt"]


@contextmanager
def answering(path: Path, *parts: bytes, then_silent: bool = False) -> Iterator[None]:
    """A server that says this to whoever asks."""
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            one.recv(4096)
            for part in parts:
                one.sendall(part)
            if then_silent:
                held.append(one)
            else:
                one.close()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for one in held:
                one.close()
            thread.join(5)


def test_a_page_is_taken_whatever_its_code(home: Home) -> None:
    body = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\ntor-1 is waited for\n"
    with answering(home.here.run / "agent.sock", body):
        files = home.collect()
    assert files["node/agent/readyz.txt"] == "503 Service Unavailable: tor-1 is waited for\n"


def test_an_agent_that_hangs_is_not_waited_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "LIMIT", 0.05)
    monkeypatch.setattr(node.get, "__kwdefaults__", {"limit": 0.05})
    with answering(home.here.run / "agent.sock", b"HTTP/1.1 200 OK\r\n\r\nbegins", then_silent=True):
        files = home.collect()
    assert "node/agent/metrics.txt: TimeoutError: timed out" in files["errors.txt"]


def test_no_time_means_little_and_says_so(home: Home) -> None:
    files = home.collect(limit=0)
    assert "no time was left" in files["errors.txt"]
    assert set(files) == {"index.txt", "errors.txt"}


def test_elsewhere_it_has_what_the_store_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNDERLAY_NODE", "desk")
    url = f"sqlite:{tmp_path / 'store.db'}"

    async def fill() -> None:
        store = SqliteStore(tmp_path / "store.db", SystemClock())
        await store.create(BGPPeer(metadata=Meta(name="tor-1"), spec=BGPPeerSpec(peer_ip="10.0.0.1", as_number=65001)))
        await store.close()

    asyncio.run(fill())
    assert main(["diags", "--store", url, "--run", str(tmp_path / "none")]) == 0
    files = unpacked((tmp_path / "underlay-diags-desk.tar.gz").read_bytes(), "underlay-diags-desk")
    assert "this machine is no node" in files["errors.txt"]
    assert not any(path.startswith("node/") for path in files)
    assert "exit code 0" in files["cluster/ipam-check.txt"]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "no" / "such"
    assert main(["diags", "-o", str(target), "--run", str(tmp_path / "none"), "--store", "memory:"]) == 1
    assert "name another file with --output" in capsys.readouterr().err
