"""Where an API server is, and as whom: kubeconfig files, a pod's own credentials, and what can be wrong with them."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.kube.cluster import Cluster
from store.clock import SystemClock
from store.errors import Unavailable
from store.kube import KubeStore
from store.kubeaccess import Access, FixedToken, PluginToken, TokenFile, find_access, from_kubeconfig, in_cluster
from store.model import Node


def config(
    *, user: Mapping[str, Any] | None = None, cluster: Mapping[str, Any] | None = None, name: str = "one", **more: Any
) -> dict[str, Any]:
    return {
        "current-context": name,
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "x"}}],
        "clusters": [{"name": name, "cluster": {"server": f"https://{name}:6443/", **(cluster or {})}}],
        "users": [{"name": name, "user": {"token": f"token-{name}"} if user is None else dict(user)}],
        "preferences": {},
        **more,
    }


def write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
    return path


def token(access: Access) -> str:
    return asyncio.run(access.tokens.token())


# -- which --------------------------------------------------------------------------------------------------------


def test_a_path_a_variable_a_pod_and_a_home_in_that_order(tmp_path: Path) -> None:
    given = write(tmp_path / "given", config(name="given"))
    variable = write(tmp_path / "variable", config(name="variable"))
    home = write(tmp_path / ".kube" / "config", config(name="home"))
    env = {"HOME": str(tmp_path)}
    assert find_access("", env=env).server == "https://home:6443"
    pod = {**env, "KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    account = tmp_path / "account"
    write(account / "token", "pod-token\n")
    write(account / "ca.crt", "a CA")
    assert find_access("", env=pod, account=account).server == "https://10.96.0.1:443"
    assert token(find_access("", env=pod, account=account)) == "pod-token"
    assert find_access("", env={**pod, "KUBECONFIG": str(variable)}).server == "https://variable:6443"
    assert find_access(str(given), env={**pod, "KUBECONFIG": str(variable)}).server == "https://given:6443"
    home.unlink()
    with pytest.raises(Unavailable, match="no API server is known"):
        find_access("", env=env)


def test_a_pod_without_its_account_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="automountServiceAccountToken"):
        in_cluster(env={"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, folder=tmp_path)


def test_a_pod_reaches_an_ipv6_service(tmp_path: Path) -> None:
    write(tmp_path / "token", "t")
    write(tmp_path / "ca.crt", "")
    env = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}
    assert in_cluster(env=env, folder=tmp_path).server == "https://[fd00::1]:6443"


def test_a_context_is_chosen_by_name(tmp_path: Path) -> None:
    two = config(name="two")
    both = {key: [*value, *two[key]] if isinstance(value, list) else value for key, value in config().items()}
    path = write(tmp_path / "config", both)
    assert find_access(str(path), env={}).server == "https://one:6443"
    chosen = find_access(f"{path}?context=two", env={})
    assert (chosen.server, token(chosen)) == ("https://two:6443", "token-two")
    with pytest.raises(Unavailable, match="has no context 'three'"):
        find_access(f"{path}?context=three", env={})
    for query in ("context=", "kontext=two", "two"):
        with pytest.raises(Unavailable, match="context=NAME"):
            find_access(f"{path}?{query}", env={})


def test_files_are_merged_and_the_first_word_holds(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "first", {"current-context": "two", "clusters": None, "users": []})
    second = write(tmp_path / "b" / "second", config(name="two", user={"tokenFile": "token"}))
    third = write(tmp_path / "third", config(name="two", cluster={"server": "https://late"}))
    write(tmp_path / "b" / "token", "relative")
    access = from_kubeconfig([first, tmp_path / "missing", second, third], env={})
    assert (access.server, token(access)) == ("https://two:6443", "relative")
    with pytest.raises(Unavailable, match="does not exist"):
        from_kubeconfig([tmp_path / "missing"])


# -- what they say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("{", "config: "),
        ("[]", "Expected `object`"),
        ({}, "no current-context"),
        (config(clusters=[]), "no cluster 'one'"),
        (config(users=None), "no user 'one'"),
        (config(contexts=[{"name": "one"}]), "context"),
        (config(cluster={"server": "one:6443"}), "write https://HOST:PORT"),
        (config(cluster={"certificate-authority-data": "%%%"}), "-data is not the base64"),
        (config(user={"username": "a", "password": "b"}), "username, which is not served"),
        (config(user={"auth-provider": {"name": "gcp"}}), "auth-provider, which is not served"),
        (config(user={"token": "t", "as": "somebody"}), "as, which is not served"),
        (config(user={"exec": {"command": "login", "interactiveMode": "Always"}}), "needs a terminal"),
        (config(user={"token": 5}), "Expected `str`"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_field(tmp_path: Path, value: object, said: str) -> None:
    path = write(tmp_path / "config", value)
    with pytest.raises(Unavailable, match=said) as refused:
        from_kubeconfig([path], env={})
    assert str(tmp_path) in str(refused.value)


def test_a_user_may_be_nobody(tmp_path: Path) -> None:
    nobody = config()
    nobody["contexts"][0]["context"].pop("user")
    assert token(from_kubeconfig([write(tmp_path / "config", nobody)])) == ""


@pytest.mark.parametrize("part", ["ca", "certificate"])
def test_a_certificate_that_is_none_is_said_with_its_file(tmp_path: Path, part: str) -> None:
    file = write(tmp_path / "pem", "nonsense")
    access = Access(server="https://one", tokens=FixedToken(""), **{part: file})
    with pytest.raises(Unavailable, match=str(file)):
        access.tls()
    with pytest.raises(Unavailable, match="cannot be read"):
        Access(server="https://one", tokens=FixedToken(""), **{part: tmp_path / "missing"}).tls()


def test_a_token_file_that_goes_missing_is_an_outage(tmp_path: Path) -> None:
    tokens = TokenFile(write(tmp_path / "token", "t"))

    async def main() -> None:
        assert await tokens.token() == "t"
        (tmp_path / "token").unlink()
        with pytest.raises(Unavailable, match="cannot be read"):
            await tokens.token()
        write(tmp_path / "token", "back")
        assert await tokens.token() == "back"

    asyncio.run(main())


# -- credential plugins -------------------------------------------------------------------------------------------


def plugin(folder: Path, script: str, **more: Any) -> PluginToken:
    program = write(folder / "login", f"#!/bin/sh\necho x >>{folder}/calls\n{script}\n")
    program.chmod(0o755)
    path = write(folder / "config", config(user={"exec": {"command": "./login", "apiVersion": "v", **more}}))
    tokens = from_kubeconfig([path], env={"PATH": "/usr/bin:/bin"}).tokens
    assert isinstance(tokens, PluginToken)
    return tokens


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


def credential(**status: str) -> str:
    return f"echo '{json.dumps({'kind': 'ExecCredential', 'status': status})}'"


def test_a_plugin_is_asked_once_and_again_when_its_token_ran_out_or_was_refused(tmp_path: Path) -> None:
    async def main() -> None:
        lasting = plugin(tmp_path / "a", credential(token="t", expirationTimestamp="2999-01-01T00:00:00Z"))
        assert await asyncio.gather(*(lasting.token() for _ in range(5))) == ["t"] * 5
        assert calls(tmp_path / "a") == 1
        assert await lasting.token(fresh=True) == "t"
        assert calls(tmp_path / "a") == 2
        short = plugin(tmp_path / "b", credential(token="t", expirationTimestamp="2001-01-01T00:00:00Z"))
        assert [await short.token(), await short.token()] == ["t", "t"]
        assert calls(tmp_path / "b") == 2

    asyncio.run(main())


def test_a_plugin_gets_its_arguments_and_what_it_is_asked_for(tmp_path: Path) -> None:
    script = f'printf \'%s|%s|%s|%s\' "$1" "$2" "$A" "$KUBERNETES_EXEC_INFO" >{tmp_path}/got\n{credential(token="t")}'
    tokens = plugin(tmp_path, script, args=["one", "t w o"], env=[{"name": "A", "value": "b"}])
    assert asyncio.run(tokens.token()) == "t"
    one, two, a, info = (tmp_path / "got").read_text().split("|")
    assert (one, two, a) == ("one", "t w o", "b")
    assert json.loads(info) == {"apiVersion": "v", "kind": "ExecCredential", "spec": {"interactive": False}}


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo no ticket >&2; exit 3", "ended with 3: no ticket"),
        ("echo hello", "did not print an ExecCredential"),
        (credential(clientCertificateData="x"), "gave no token"),
        ("exec sleep 60", "did not answer within 0.3 s"),
    ],
)
def test_a_plugin_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    monkeypatch.setattr("store.kubeaccess.PLUGIN_LIMIT", 0.3)
    with pytest.raises(Unavailable, match=said):
        asyncio.run(plugin(tmp_path, script).token())


def test_a_plugin_that_is_not_installed_says_how_to(tmp_path: Path) -> None:
    tokens = plugin(tmp_path, "", command="./missing", installHint="brew install it")
    with pytest.raises(Unavailable, match="brew install it"):
        asyncio.run(tokens.token())


# -- on a real API server -----------------------------------------------------------------------------------------


def data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_every_way_in_works(cluster: Cluster, tmp_path: Path) -> None:
    certificate, key = cluster.client_certificate
    reached: dict[str, Any] = {"server": cluster.url, "certificate-authority-data": data(cluster.ca)}
    by_file: dict[str, Any] = {"server": cluster.url, "certificate-authority": str(cluster.ca)}
    users: dict[str, dict[str, Any]] = {
        "token": {"token": cluster.admin_token},
        "data": {"client-certificate-data": data(certificate), "client-key-data": data(key)},
        "files": {"client-certificate": str(certificate), "client-key": str(key)},
    }

    async def nodes(access: Access) -> int:
        store = KubeStore(access, SystemClock())
        try:
            return len((await store.list(Node)).items)
        finally:
            await store.close()

    for its in (reached, by_file):
        for user in users.values():
            path = write(tmp_path / "config", config(cluster=its, user=user))
            assert asyncio.run(nodes(from_kubeconfig([path]))) == 0
    account = tmp_path / "account"
    write(account / "token", cluster.admin_token)
    write(account / "ca.crt", cluster.ca.read_text())
    host, _, port = cluster.url.removeprefix("https://").partition(":")
    env = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
    assert asyncio.run(nodes(in_cluster(env=env, folder=account))) == 0
    anonymous = write(tmp_path / "config", config(cluster=reached, user={}))
    with pytest.raises(Unavailable, match=r"anonymous.* cannot list"):
        asyncio.run(nodes(from_kubeconfig([anonymous])))
    unknown = write(tmp_path / "config", config(cluster=reached, user={"token": "nonsense"}))
    with pytest.raises(Unavailable, match="401"):
        asyncio.run(nodes(from_kubeconfig([unknown])))
