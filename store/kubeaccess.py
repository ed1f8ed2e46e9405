"""How to reach an API server, and as whom: from a kubeconfig, or from what a pod finds in its own file system.

Sources: Kubernetes, "Organizing Cluster Access Using kubeconfig Files", "kubeconfig (v1)", "Accessing the Kubernetes
API from a Pod", "client-go credential plugins". What stands in files may change there at any time (kubelet renews a
pod's token and CA): tokens are read again when their file changed, the rest when the API server refuses us.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import ssl
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import msgspec
from msgspec import field

from store.errors import Unavailable

#: Where kubelet puts a pod's credentials.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
#: Seconds for a credential plugin to answer; a person may have to type something somewhere.
PLUGIN_LIMIT = 60


class Tokens(Protocol):
    async def token(self, *, fresh: bool = False) -> str:
        """The bearer token of now, "" for none. ``fresh``: the last one was refused. ``Unavailable``."""
        ...


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """``ca``, ``certificate`` and ``key`` are PEM texts, or files that have one; ``server_name`` is what the server's
    certificate is checked for where that is not the host in ``server``."""

    server: str
    tokens: Tokens
    ca: str | Path = ""
    certificate: str | Path = ""
    key: str | Path = ""
    server_name: str = ""
    insecure: bool = False
    proxy: str = ""

    def stamp(self) -> tuple[object, ...]:
        """Changes when a file that ``tls`` reads has changed."""
        return tuple(_stamp(p) for p in (self.ca, self.certificate, self.key) if isinstance(p, Path))

    def tls(self) -> ssl.SSLContext:
        """A context for connections, of the files as they are now. ``Unavailable`` names the one that is wrong."""
        try:
            context = ssl.create_default_context(cadata=_text(self.ca) or None)
        except (ssl.SSLError, ValueError) as e:
            raise Unavailable(f"the CA of {self.server}{_file(self.ca)} is no certificate: {e}") from e
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            self._present(context)
        return context

    def _present(self, context: ssl.SSLContext) -> None:
        # OpenSSL reads a chain with its key from files alone. This one is ours alone, and gone after the call.
        with tempfile.NamedTemporaryFile("w", prefix="underlay-", suffix=".pem") as pem:
            pem.write(f"{_text(self.certificate)}\n{_text(self.key)}\n")
            pem.flush()
            try:
                context.load_cert_chain(pem.name)
            except (ssl.SSLError, OSError) as e:
                raise Unavailable(f"the client certificate for {self.server}{_file(self.certificate)}: {e}") from e


class FixedToken:
    def __init__(self, token: str) -> None:
        self._token = token

    async def token(self, *, fresh: bool = False) -> str:
        return self._token


class TokenFile:
    """Read again when it changed: kubelet renews it long before it runs out."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: object = None
        self._token = ""

    async def token(self, *, fresh: bool = False) -> str:
        stamp = _stamp(self._path)
        if fresh or stamp != self._seen:
            self._token = _text(self._path).strip()
            self._seen = stamp
        return self._token


class PluginToken:
    """A program that says the token (client.authentication.k8s.io); asked again when that runs out or was refused."""

    def __init__(self, plugin: Plugin, folder: Path, env: Mapping[str, str]) -> None:
        self._plugin = plugin
        self._folder = folder
        self._env = env
        self._token = ""
        self._until: datetime | None = None
        self._asking = asyncio.Lock()

    async def token(self, *, fresh: bool = False) -> str:
        refused = self._token if fresh else ""
        async with self._asking:
            late = self._until is not None and datetime.now(UTC) >= self._until
            if late or self._token == refused:
                credential = await self._ask()
                self._token = credential.status.token
                stamp = credential.status.expiration_timestamp
                self._until = datetime.fromisoformat(stamp) - timedelta(seconds=10) if stamp else None
        return self._token

    async def _ask(self) -> _Credential:
        plugin = self._plugin
        info = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
        env = {**self._env, **{e.name: e.value for e in plugin.env}, "KUBERNETES_EXEC_INFO": json.dumps(info)}
        command = str(self._folder / plugin.command) if "/" in plugin.command else plugin.command
        try:
            process = await asyncio.create_subprocess_exec(
                command,
                *plugin.args,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
        except OSError as e:
            raise Unavailable(f"credential plugin {command}: {e.strerror}. {plugin.install_hint}".strip()) from e
        try:
            async with asyncio.timeout(PLUGIN_LIMIT):
                said, complained = await process.communicate()
        except TimeoutError:
            raise Unavailable(f"credential plugin {command} did not answer within {PLUGIN_LIMIT} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            why = complained.decode(errors="replace").strip()[-500:]
            raise Unavailable(f"credential plugin {command} ended with {process.returncode}: {why}")
        try:
            credential = msgspec.json.decode(said, type=_Credential)
        except msgspec.DecodeError as e:
            raise Unavailable(f"credential plugin {command} did not print an ExecCredential: {e}") from e
        if not credential.status.token:
            raise Unavailable(f"credential plugin {command} gave no token: use one that does, or a client certificate")
        return credential


def find_access(text: str = "", *, env: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> Access:
    """What ``kube:TEXT`` means: ``/path/to/kubeconfig``, ``?context=NAME``, or both. Without a path: the files of
    ``KUBECONFIG``, else this pod's ServiceAccount, else ``~/.kube/config``. ``Unavailable``."""
    path, _, query = text.partition("?")
    word, _, context = query.partition("=")
    if query and (word != "context" or not context):
        raise Unavailable(f"store kube:{text}: after ? stands context=NAME, nothing else")
    files = [Path(p) for p in (path or env.get("KUBECONFIG", "")).split(os.pathsep) if p]
    if files:
        return from_kubeconfig(files, context, env=env)
    if "KUBERNETES_SERVICE_HOST" in env and not context:
        return in_cluster(env=env, folder=account)
    home = Path(env.get("HOME") or "/root") / ".kube" / "config"
    if not home.exists():
        raise Unavailable("no API server is known: this is no pod, KUBECONFIG is not set, there is no ~/.kube/config")
    return from_kubeconfig([home], context, env=env)


def in_cluster(*, env: Mapping[str, str] = os.environ, folder: Path = SERVICE_ACCOUNT) -> Access:
    """As the pod that this process is in. ``Unavailable`` if its ServiceAccount is not mounted."""
    host, port = env.get("KUBERNETES_SERVICE_HOST", ""), env.get("KUBERNETES_SERVICE_PORT", "443")
    for name in ("token", "ca.crt"):
        if not (folder / name).exists():
            raise Unavailable(f"{folder / name} is not there: set automountServiceAccountToken in the pod's manifest")
    return Access(
        server=f"https://{f'[{host}]' if ':' in host else host}:{port}",
        ca=folder / "ca.crt",
        tokens=TokenFile(folder / "token"),
    )


def from_kubeconfig(files: list[Path], context: str = "", *, env: Mapping[str, str] = os.environ) -> Access:
    """By a context of these files, merged as kubectl does: what a file says first, holds. Files that are not there are
    passed over, as long as one is. ``Unavailable`` names file and field."""
    read = [(path, _read(path)) for path in files if path.exists()]
    if not read:
        raise Unavailable(f"kubeconfig {os.pathsep.join(map(str, files))} does not exist")
    name = context or next((c.current for _, c in read if c.current), "")
    where = os.pathsep.join(str(path) for path, _ in read)
    if not name:
        raise Unavailable(f"kubeconfig {where} has no current-context: name one with kube:?context=NAME")
    _, chosen = _pick(where, "context", name, [(path, c.contexts) for path, c in read])
    folder, cluster = _pick(where, "cluster", chosen.context.cluster, [(path, c.clusters) for path, c in read])
    its = cluster.cluster
    if not its.server.startswith(("https://", "http://")):
        raise Unavailable(
            f"kubeconfig {where}: cluster {cluster.name} has server {its.server!r}: write https://HOST:PORT"
        )
    access = Access(
        server=its.server.rstrip("/"),
        tokens=FixedToken(""),
        ca=_data_or_file(folder, its.ca_data, its.ca_file),
        server_name=its.server_name,
        insecure=its.insecure,
        proxy=its.proxy,
    )
    if not chosen.context.user:
        return access
    folder, user = _pick(where, "user", chosen.context.user, [(path, c.users) for path, c in read])
    return _as_user(access, where, folder, user, env)


# -- kubeconfig ---------------------------------------------------------------------------------------------------


class _Cluster(msgspec.Struct, rename="kebab"):
    server: str = ""
    ca_file: str = field(default="", name="certificate-authority")
    ca_data: str = field(default="", name="certificate-authority-data")
    server_name: str = field(default="", name="tls-server-name")
    insecure: bool = field(default=False, name="insecure-skip-tls-verify")
    proxy: str = field(default="", name="proxy-url")


class _Variable(msgspec.Struct):
    name: str
    value: str


class Plugin(msgspec.Struct, rename="camel"):
    """A user's ``exec``."""

    command: str
    api_version: str = "client.authentication.k8s.io/v1"
    args: list[str] = field(default_factory=list)
    env: list[_Variable] = field(default_factory=list)
    install_hint: str = ""
    interactive_mode: str = "IfAvailable"


class _User(msgspec.Struct):
    token: str = ""
    token_file: str = field(default="", name="tokenFile")
    certificate_file: str = field(default="", name="client-certificate")
    certificate_data: str = field(default="", name="client-certificate-data")
    key_file: str = field(default="", name="client-key")
    key_data: str = field(default="", name="client-key-data")
    plugin: Plugin | None = field(default=None, name="exec")
    # Not served, and not to be passed over in silence either.
    username: str = ""
    impersonate: str = field(default="", name="as")
    auth_provider: Any = field(default=None, name="auth-provider")


class _Context(msgspec.Struct):
    cluster: str
    user: str = ""


class _NamedCluster(msgspec.Struct):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct):
    name: str
    user: _User


class _NamedContext(msgspec.Struct):
    name: str
    context: _Context


class _Config(msgspec.Struct):
    current: str = field(default="", name="current-context")
    clusters: list[_NamedCluster] | None = None
    users: list[_NamedUser] | None = None
    contexts: list[_NamedContext] | None = None


class _CredentialStatus(msgspec.Struct, rename="camel"):
    token: str = ""
    expiration_timestamp: str = ""


class _Credential(msgspec.Struct):
    status: _CredentialStatus


def _read(path: Path) -> _Config:
    import yaml  # a pod has no kubeconfig

    try:
        said = yaml.safe_load(path.read_text())
        return msgspec.convert({} if said is None else said, _Config)
    except OSError as e:
        raise Unavailable(f"kubeconfig {path}: {e.strerror}") from e
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as e:
        raise Unavailable(f"kubeconfig {path}: {e}") from e


def _pick(where: str, what: str, name: str, found: list[tuple[Path, list[Any] | None]]) -> tuple[Path, Any]:
    """The first of that name, and the folder that its relative paths start from."""
    for path, entries in found:
        for entry in entries or ():
            if entry.name == name:
                return path.parent, entry
    raise Unavailable(f"kubeconfig {where} has no {what} {name!r}")


def _as_user(access: Access, where: str, folder: Path, user: _NamedUser, env: Mapping[str, str]) -> Access:
    its = user.user
    for value, what in ((its.username, "username"), (its.auth_provider, "auth-provider"), (its.impersonate, "as")):
        if value:
            raise Unavailable(
                f"kubeconfig {where}: user {user.name} has {what}, which is not served: use a token, a client "
                f"certificate or exec"
            )
    tokens: Tokens = access.tokens
    if its.token:
        tokens = FixedToken(its.token)
    elif its.token_file:
        tokens = TokenFile(folder / its.token_file)
    elif its.plugin is not None:
        if its.plugin.interactive_mode == "Always":
            raise Unavailable(
                f"kubeconfig {where}: the exec of user {user.name} needs a terminal, which it has not here"
            )
        tokens = PluginToken(its.plugin, folder, env)
    return msgspec.structs.replace(
        access,
        tokens=tokens,
        certificate=_data_or_file(folder, its.certificate_data, its.certificate_file),
        key=_data_or_file(folder, its.key_data, its.key_file),
    )


def _data_or_file(folder: Path, data: str, file: str) -> str | Path:
    if not data:
        return folder / file if file else ""
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError) as e:
        raise Unavailable(f"kubeconfig in {folder}: a field that ends in -data is not the base64 of a PEM: {e}") from e


# -- files --------------------------------------------------------------------------------------------------------


def _text(source: str | Path) -> str:
    if not isinstance(source, Path):
        return source
    try:
        return source.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise Unavailable(f"credentials: {source} cannot be read: {e}") from e


def _file(source: str | Path) -> str:
    return f" ({source})" if isinstance(source, Path) else ""


def _stamp(path: Path) -> object:
    """kubelet swaps a symlink, so the file behind it is another one then."""
    try:
        found = path.stat()
    except OSError as e:
        return e.errno
    return found.st_ino, found.st_mtime_ns, found.st_size
