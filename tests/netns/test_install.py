"""The installer: files that appear whole or not at all, beside what others have put there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni import install, installer, netns
from cni.install import InstallError
from lab.net import Net
from tests.netns.plugin import NODE, ROOT, Plugin, stopped

MEANT = install.conflist(mtu=1400)
OTHER = '{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge"}]}'


@pytest.fixture
def plugin(net: Net, tmp_path: Path, shim_c: Path) -> Plugin:
    return Plugin(net, tmp_path, shim_c)


class Host:
    """A runtime's two folders, with an older version of ours, and others' files."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.conf, self.shim = folder / "bin", folder / "net.d", folder / "shim"
        self.shim.write_bytes(b"new" * 1000)
        old = folder / "old"
        old.write_bytes(b"old" * 1000)
        install.install(old, self.bin, self.conf)
        self.old = self.now()
        for name in ("00-a.conf", "99-z.conflist", "05-note.txt"):
            (self.conf / name).write_text(OTHER)
        (self.bin / "bridge").write_text("theirs")

    def now(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for folder in (self.bin, self.conf) for p in folder.iterdir()}

    def ours(self) -> tuple[bytes | None, bytes | None]:
        found = self.now()
        return found.get("underlay"), found.get(install.CONFLIST)

    def theirs(self) -> dict[str, bytes]:
        return {name: data for name, data in self.now().items() if "underlay" not in name}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("step", install.STEPS)
def test_a_killed_install_leaves_whole_files_and_the_next_one_ends_it(host: Host, step: str) -> None:
    def die(passed: str) -> None:
        if passed == step:
            os.kill(os.getpid(), signal.SIGKILL)

    theirs = host.theirs()
    child = os.fork()
    if child == 0:
        try:
            install.install(host.shim, host.bin, host.conf, configuration=MEANT, step=die)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    done = install.STEPS.index(step)
    binary, conflist = host.ours()
    assert binary == (host.shim.read_bytes() if done >= 1 else host.old["underlay"])
    assert json.loads(conflist or b"") == (MEANT if done >= 3 else install.conflist())
    assert host.theirs() == theirs
    install.install(host.shim, host.bin, host.conf, configuration=MEANT)
    assert host.now().keys() == {*theirs, "underlay", install.CONFLIST}
    assert host.ours()[0] == host.shim.read_bytes()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for the old version only."""
    folder = tmp_path / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k,nr_inodes=20", "none", folder], check=True)
    yield folder
    netns.unmount(folder)


@pytest.mark.parametrize("what", ["binary", "conflist"])
def test_a_full_disk_leaves_the_old_ones(full: Path, tmp_path: Path, what: str) -> None:
    host = Host(full)
    before = host.now()
    shim = tmp_path / "shim"
    shim.write_bytes(b"new" * (20_000 if what == "binary" else 1000))
    plugins = tuple({"type": f"plugin-{i}", "words": "x" * 100} for i in range(400 if what == "conflist" else 0))
    with pytest.raises(InstallError, match="No space left"):
        install.install(shim, host.bin, host.conf, configuration=install.conflist(chain=plugins))
    after = host.now()
    if what == "conflist":
        assert after.pop("underlay") == shim.read_bytes()
        before.pop("underlay")
    assert after == before


def test_others_are_told_and_never_touched(host: Host) -> None:
    theirs = host.theirs()
    done = install.install(host.shim, host.bin, host.conf)
    assert (done.before, done.behind) == (("00-a.conf",), ("99-z.conflist",))
    assert install.uninstall(host.bin, host.conf, pods=0).next == "00-a.conf"
    assert host.ours() == (None, None)
    assert host.theirs() == theirs
    assert install.uninstall(host.bin, host.conf, pods=0).gone == ()


@pytest.mark.parametrize("text", [OTHER, "rubbish", "[]", '{"plugins": 7}', '{"plugins": ["underlay"]}', "[" * 100_000])
def test_a_file_in_our_place_that_is_not_ours_stays(host: Host, text: str) -> None:
    (host.conf / install.CONFLIST).write_text(text)
    with pytest.raises(InstallError, match="is not ours"):
        install.install(host.shim, host.bin, host.conf)
    install.uninstall(host.bin, host.conf, pods=0)
    assert (host.conf / install.CONFLIST).read_text() == text


def test_all_stays_while_pods_need_it(host: Host) -> None:
    install.install(host.shim, host.bin, host.conf)
    before = host.ours()
    assert None not in before
    with pytest.raises(InstallError, match="3 pods need it for their DEL; drain the node"):
        install.uninstall(host.bin, host.conf, pods=3)
    assert host.ours() == before
    assert install.uninstall(host.bin, host.conf, pods=0).gone == (
        host.conf / install.CONFLIST,
        host.bin / "underlay",
    )


def test_uninstall_where_nothing_ever_was(tmp_path: Path) -> None:
    done = install.uninstall(tmp_path / "bin", tmp_path / "net.d", pods=0)
    assert (done.gone, done.next) == ((), "")
    assert list(tmp_path.iterdir()) == []


def test_installers_at_once_never_show_half_a_file(host: Host) -> None:
    """Two versions, each whole; a reader looks all the time."""
    versions = [install.conflist(mtu=1400), install.conflist(mtu=1500)]
    problems: list[BaseException] = []
    ended = threading.Event()

    def work(number: int) -> None:
        try:
            for _ in range(20):
                install.install(host.shim, host.bin, host.conf, configuration=versions[number % 2])
        except BaseException as e:
            problems.append(e)

    def look() -> None:
        while not ended.is_set():
            try:
                assert json.loads((host.conf / install.CONFLIST).read_text()) in [*versions, install.conflist()]
            except BaseException as e:
                problems.append(e)
                return

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    reader = threading.Thread(target=look)
    for thread in (*workers, reader):
        thread.start()
    for thread in workers:
        thread.join(60)
    ended.set()
    reader.join(10)
    assert problems == []


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=12)
PLUGINS = st.fixed_dictionaries(
    {"type": NAMES.filter(lambda name: name != install.PLUGIN)},
    optional={"capabilities": st.dictionaries(NAMES, st.booleans()), "x": st.integers() | st.text() | st.none()},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=st.lists(PLUGINS, max_size=4), mtu=st.sampled_from([0, 1400]), choose=st.booleans())
def test_any_chain_is_written_as_it_was_meant_and_known_as_ours(
    host: Host, chain: list[dict[str, object]], mtu: int, choose: bool
) -> None:
    parsed = tuple(install.chained(json.dumps(each)) for each in chain)
    meant = install.conflist(mtu=mtu, pods_may_choose=choose, chain=parsed)
    done = install.install_conflist(host.bin / "underlay", host.conf, meant)
    assert json.loads(done.conflist.read_text()) == meant
    assert [p["type"] for p in meant["plugins"]] == ["underlay", *(each["type"] for each in chain)]
    assert ("capabilities" in meant["plugins"][0]) == choose
    install.install_conflist(host.bin / "underlay", host.conf, MEANT)  # ours: it may be written again


@given(st.text() | st.binary().map(str) | st.sampled_from(["{}", "[]", '{"type": 7}', '{"type": "a/b"}', "[" * 9999]))
def test_garbage_for_a_plugin_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(InstallError, match="portmap, bandwidth"):
        install.chained(text)


# -- the command line ----------------------------------------------------------------------------------------------


def test_a_cluster_names_the_chain_in_its_settings() -> None:
    def chain(words: list[str], value: str) -> list[str]:
        plugins = installer.parse(words, {"UNDERLAY_CNI_CHAIN": value}).configuration["plugins"]
        return [plugin["type"] for plugin in plugins[1:]]

    assert chain([], "") == []
    assert chain([], "portmap, bandwidth") == ["portmap", "bandwidth"]
    assert chain(["--chain", "bandwidth"], "portmap") == ["bandwidth"]
    with pytest.raises(InstallError, match="portmap, bandwidth"):
        chain([], "portmop")


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    code = 0
    try:
        installer.main([str(word) for word in words])
    except SystemExit as e:
        code = int(e.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_a_node_from_install_to_uninstall(plugin: Plugin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--bin", tmp_path / "bin", "--conf", tmp_path / "net.d", "--run", plugin.run]
    code, said = run(capsys, *folders, "--shim", plugin.shim, "--only", "binary")
    assert (code, said) == (0, f"{tmp_path}/bin/underlay: installed\n")
    code, said = run(capsys, *folders, "--only", "conflist", "--wait", "0.2")
    assert (code, "start underlay-cni" in said) == (1, True)
    assert not (tmp_path / "net.d").exists()
    plugin.start()
    code, said = run(capsys, *folders, "--only", "conflist", "--chain", "portmap")
    assert (code, "has no portmap: install it there" in said) == (1, True)
    (tmp_path / "bin" / "portmap").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "portmap").chmod(0o755)
    (tmp_path / "net.d").mkdir(exist_ok=True)
    for name in ("00-a.conf", "99-z.conflist"):
        (tmp_path / "net.d" / name).write_text(OTHER)
    code, said = run(capsys, *folders, "--shim", plugin.shim, "--chain", "portmap", "--pods-may-choose", "yes")
    assert code == 0
    assert f"not in use: 00-a.conf in {tmp_path}/net.d sorts before it" in said
    assert "instead of 99-z.conflist" in said
    written = json.loads((tmp_path / "net.d" / install.CONFLIST).read_text())
    assert written["plugins"] == [
        {"type": "underlay", "capabilities": {"io.kubernetes.cri.pod-annotations": True}},
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    ]

    plugin.shim = tmp_path / "bin" / "underlay"
    plugin.net.add("pod-1")
    assert plugin.call("ADD", "c1", "pod-1").code == 0
    with plugin.net.inside(NODE):
        code, said = run(capsys, *folders, "--uninstall")
    assert (code, "1 pods need it" in said) == (1, True)
    assert plugin.call("DEL", "c1", "pod-1").code == 0
    with plugin.net.inside(NODE):
        code, said = run(capsys, *folders, "--uninstall")
    assert (code, "in use now: 00-a.conf" in said) == (0, True)
    assert not plugin.shim.exists()


@pytest.mark.parametrize("text", ["\x7fELF for another machine", "#!/bin/sh\necho hello\n"])
def test_a_shim_that_does_not_run_here_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    shim = tmp_path / "shim"
    shim.write_text(text)
    shim.chmod(0o755)
    code, said = run(capsys, "--bin", tmp_path / "bin", "--shim", shim, "--only", "binary")
    assert (code, "does not run on this machine" in said, "make shim" in said) == (1, True, True)
    assert not (tmp_path / "bin").exists()


def test_an_executed_binary_may_be_taken_away(plugin: Plugin, tmp_path: Path) -> None:
    plugin.net.add("pod-1")
    built, plugin.shim = plugin.shim, install.install_binary(plugin.shim, tmp_path / "bin")
    waiting = plugin.popen("ADD", "c1", "pod-1")
    assert install.uninstall(tmp_path / "bin", tmp_path / "net.d", pods=0).gone == (plugin.shim,)
    plugin.shim = built
    with stopped(waiting.pid):
        plugin.start()
    assert "ips" in json.loads(waiting.communicate(timeout=60)[0])


def test_every_option_is_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "--help")
    options = set(re.findall(r"--[a-z-]+", said)) - {"--help"}
    assert code == 0
    assert len(options) > 10
    page = (ROOT / "docs/cni.md").read_text().partition("## Installation")[2].partition("\n## ")[0]
    assert {option for option in options if f"`{option}`" not in page} == set()
