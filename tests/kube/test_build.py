"""Where the programs are looked for; nothing is built here."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_without_go_it_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "GO_HOME", tmp_path)
    env = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    for look in (build.find, build.ensure):
        with pytest.raises(build.NotHere, match="set KUBEBUILDER_ASSETS"):
            look(env)


def test_a_go_that_is_too_old_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "GO_HOME", tmp_path)
    programs_in(tmp_path, "go")
    (tmp_path / "go").write_text("#!/bin/sh\necho 'go.mod requires go >= 1.26.0' >&2; exit 1\n")
    with pytest.raises(build.NotHere, match="no Go"):
        build.find({"HOME": str(tmp_path), "PATH": ""})


def test_a_build_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "GO_HOME", tmp_path)
    go = programs_in(tmp_path, "go") / "go"
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    folder = build.cache(env)
    # It leaves one program behind and fails, as a full disk would have it.
    go.write_text('#!/bin/sh\n[ "$1" = version ] || { touch "$7/etcd"; echo no space >&2; exit 1; }\n')
    with pytest.raises(build.BuildFailed, match="no space"):
        build.ensure(env)
    assert not folder.exists()
    made = " ".join(f'"$7/{name}"' for name in build.PROGRAMS)
    go.write_text(f'#!/bin/sh\n[ "$1" = version ] || {{ [ -z "$(ls "$7")" ] && touch {made} && chmod +x {made}; }}\n')
    assert build.ensure(env).folder == folder
    go.write_text("#!/bin/sh\nexit 1\n")
    assert build.ensure(env) == build.find(env)


def test_the_cache_changes_with_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HOME": str(tmp_path)}
    first = build.cache(env)
    assert first.parent == tmp_path / ".cache" / "underlay"
    assert build.version() in first.name
    assert build.cache({**env, "XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/underlay") / first.name
    monkeypatch.setattr(build, "BUILD", ("build", "-race"))
    assert build.cache(env) != first


def test_ci_fails_where_others_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build, "GO_HOME", tmp_path)
    monkeypatch.delenv("CI", raising=False)
    assert build.main() == 0
    monkeypatch.setenv("CI", "true")
    assert build.main() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("no API server on this machine") == 2
