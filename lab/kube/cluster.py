"""A real API server for bench and tests: etcd, kube-apiserver and kube-controller-manager on loopback ports of
this process's network namespace.

One cluster serves many tests: ``reset`` puts etcd back, key by key, to what it held at the start, whatever a test did,
and starts again what a test killed. Everything dies with this process.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cni import netns
from lab.kube.audit import AuditLog
from lab.kube.build import Programs
from lab.kube.plane import CONTROLLERS, GO, ClusterError, Plane, Ports, write_kubeconfig

#: Seconds for a process to answer, on a machine that does something else too.
START_LIMIT = 120
#: Keys that come and go by themselves, and that no test of ours can be disturbed by.
_RESTLESS = ("/registry/leases/", "/registry/masterleases/", "/registry/peerserverleases/")
_EVERYTHING = "/registry/"
#: Seconds in which a controller answers to a deletion that it was told of.
_SETTLE = 0.05
_ROUNDS = 40
_ORPHAN = "/api/v1/namespaces/default/configmaps/orphan"
#: Below the range of ephemeral ports, so nothing else in the namespace takes one.
_ports = itertools.count(16000, 4)


class Refused(Exception):
    """The API server's answer was not a success. ``code`` is HTTP's, ``status`` the body."""

    def __init__(self, code: int, status: Mapping[str, Any]) -> None:
        self.code = code
        self.status = status
        super().__init__(f"{code} {status.get('reason', '')}: {status.get('message', '')}")


class Cluster:
    """``folder`` takes data, keys and logs. Nothing runs before ``start``. ``audit``: the API server writes down what
    it is asked, for ``audit_log`` to read."""

    def __init__(
        self, folder: Path, programs: Programs, *, controllers: Sequence[str] = CONTROLLERS, audit: bool = False
    ) -> None:
        self.folder = folder
        self._controllers = controllers
        first = next(_ports)
        ports = Ports(etcd=first, peer=first + 1, api=first + 2, controllers=first + 3)
        # Larger than any run makes it: a log that is begun anew is one that is not counted.
        size = 4096 if audit else 0
        self._plane = Plane(programs=programs, folder=folder, admin_token="admin-token", ports=ports, audit=size)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._connection: http.client.HTTPSConnection | None = None
        self._baseline: dict[str, tuple[str, str]] = {}

    @property
    def url(self) -> str:
        return self._plane.url

    @property
    def admin_token(self) -> str:
        return self._plane.admin_token

    @property
    def ca(self) -> Path:
        """What a client checks the API server's certificate against."""
        return self._plane.ca

    @property
    def client_certificate(self) -> tuple[Path, Path]:
        """Certificate and key of an administrator."""
        return self._plane.pki / "admin.crt", self._plane.pki / "admin.key"

    @property
    def audit_log(self) -> AuditLog:
        """Of a cluster that was made with ``audit``."""
        return self._plane.audit_log

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self, documents: Iterable[Mapping[str, Any]] = ()) -> None:
        """Brings it up with ``documents`` (CRDs first) applied; what is there then is what ``reset`` goes back to."""
        self._plane.prepare()
        self.start_etcd()
        self.start_apiserver()
        self.apply(documents)
        # Its garbage collector looks for new kinds every 30 s only, so it comes after ours are there.
        self.start_controller_manager()
        self.remember()

    def start_etcd(self) -> None:
        self._spawn("etcd", *self._plane.etcd())
        self.wait_for("etcd", lambda: self._etcd("/v3/maintenance/status", {}))

    def start_apiserver(self, *, wait: bool = True) -> None:
        """``wait``: until it is ready. Not to be called in a thread that ends: the process would end with it."""
        # What etcd held at the start can be asked for as long as the tests run.
        self._spawn("kube-apiserver", *self._plane.apiserver(), "--etcd-compaction-interval=0")
        if wait:
            self.wait_for("kube-apiserver", lambda: self.request("GET", "/readyz"))

    def start_controller_manager(self) -> None:
        self._spawn("kube-controller-manager", *self._plane.controller_manager(self._controllers))
        # It works once it has read every kind, and collected what has no owner.
        owner = {"apiVersion": "v1", "kind": "Node", "name": "nobody", "uid": "nobody"}
        space, _, name = _ORPHAN.rpartition("/")
        self.request("POST", space, {"metadata": {"name": name, "ownerReferences": [owner]}})
        self.wait_for("kube-controller-manager", self._controllers_are_at_work)

    @contextmanager
    def more_controllers(self, controllers: Sequence[str], *flags: str) -> Iterator[None]:
        """A second controller-manager beside the first, which runs these."""
        ports = msgspec.structs.replace(self._plane.ports, controllers=next(_ports))
        plane = msgspec.structs.replace(self._plane, ports=ports)
        name = "more-controllers"
        self._spawn(name, *plane.controller_manager(controllers), *flags)
        try:
            yield
        finally:
            self.kill(name)

    def kill(self, name: str) -> None:
        """SIGKILL to ``etcd``, ``kube-apiserver`` or ``kube-controller-manager``: on SIGTERM an API server with an open
        watch lingers for a minute."""
        process = self._processes.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def is_ready(self) -> bool:
        """Whether the API server answers, and says that it is ready."""
        try:
            self.request("GET", "/readyz")
        except (OSError, http.client.HTTPException, Refused):
            return False
        return True

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def close(self) -> None:
        self._disconnect()
        for name in [*self._processes]:
            self.kill(name)

    # -- one cluster, many tests ----------------------------------------------------------------------------------

    def remember(self) -> None:
        """Takes what etcd holds now for what ``reset`` goes back to."""
        self._baseline = {key: (kv["mod_revision"], kv["value"]) for key, kv in self.keys(values=True).items()}

    @contextmanager
    def remembered(self) -> Iterator[None]:
        """Within it ``reset`` goes back to what etcd holds now; at its end all is as ``reset`` had it before."""
        before = self._baseline
        self.remember()
        try:
            yield
        finally:
            self._baseline = before
            self.reset()

    def reset(self) -> None:
        """Back to the start, in etcd itself: no finalizer, policy or controller has a say, and watches are told."""
        for name, start in (
            ("etcd", self.start_etcd),
            ("kube-apiserver", self.start_apiserver),
            ("kube-controller-manager", self.start_controller_manager),
        ):
            process = self._processes.get(name)
            if process is None or process.poll() is not None:
                self._processes.pop(name, None)
                start()
        # A controller may be about to answer to what a test did last, so it is looked at until nothing moves.
        for _ in range(_ROUNDS):
            undone = self._undo()
            if not undone:
                return
            time.sleep(_SETTLE)
        raise ClusterError(f"something writes these again and again: {', '.join(undone)}")

    def keys(self, *, values: bool) -> dict[str, dict[str, str]]:
        """All keys that stay by themselves: mod_revision and, if asked for, value (both as etcd's JSON has them)."""
        asked = {"key": _b64(_EVERYTHING), "range_end": _b64(_EVERYTHING[:-1] + "0"), "keys_only": not values}
        found = {}
        for kv in self._etcd("/v3/kv/range", asked).get("kvs", []):
            key = base64.b64decode(kv["key"]).decode()
            if not key.startswith(_RESTLESS):
                found[key] = kv
        return found

    # -- the API, without the client that is being tested ---------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        """One request, as administrator unless ``token`` says otherwise. Refused; OSError while it is down."""
        bearer = f"Bearer {token or self.admin_token}"
        headers = {"Authorization": bearer, "Content-Type": content_type, "Accept": accept}
        data = None if body is None else json.dumps(body)
        for last in (self._connection is None, True):
            connection = self._connect()
            try:
                connection.request(method, path, body=data, headers=headers)
                answer = connection.getresponse()
                text = answer.read()
                break
            except (OSError, http.client.HTTPException) as e:
                self._disconnect()
                # A kept connection that the server has closed meanwhile is no news of the server.
                if last or not isinstance(e, ConnectionError | ssl.SSLEOFError):
                    raise
        value = json.loads(text) if text[:1] == b"{" else {"message": text.decode(errors="replace")}
        if answer.status >= 400:
            raise Refused(answer.status, value)
        return dict(value)

    def apply(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Server-side apply. CRDs are waited for until they are served."""
        for document in documents:
            path = f"{self._path(document)}?fieldManager=cluster&force=true"
            self.request("PATCH", path, document, content_type="application/apply-patch+yaml")
            if document["kind"] == "CustomResourceDefinition":
                self._await_crd(document["metadata"]["name"])

    def token(self, account: str, *, namespace: str, node: str = "") -> str:
        """A token of a ServiceAccount, as the kubelet of ``node`` would put it into a pod."""
        spec: dict[str, Any] = {"expirationSeconds": 3600}
        if node:
            uid = self.request("GET", f"/api/v1/nodes/{node}")["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
        answer = self.request(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec},
        )
        return str(answer["status"]["token"])

    def kubeconfig(self, token: str | None = None, *, path: Path | None = None) -> Path:
        """A kubeconfig file for a token (default: the administrator's)."""
        token = token or self.admin_token
        path = path or self.folder / f"{token[:40]}.kubeconfig"
        write_kubeconfig(path, self.url, self.ca, token=token)
        return path

    # -- parts ----------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, *argv: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | GO,
                start_new_session=True,
                preexec_fn=lambda: netns.die_with_parent(signal.SIGKILL),
            )

    def wait_for(self, name: str, probe: Callable[[], object]) -> None:
        """Asks until ``probe`` raises nothing; ``name`` is the process waited for. ClusterError when it ended, or after
        START_LIMIT seconds."""
        end = time.monotonic() + START_LIMIT
        while True:
            why: object
            try:
                probe()
            except (OSError, http.client.HTTPException, Refused, ClusterError) as e:
                why = e
            else:
                return
            ended = self._processes[name].poll()
            if ended is not None or time.monotonic() > end:
                said = "is not ready" if ended is None else f"ended with {ended}"
                tail = (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]
                raise ClusterError(f"{name} {said}: {why}\n{tail}")
            time.sleep(0.05)

    def _controllers_are_at_work(self) -> None:
        for namespace in ("default", "kube-node-lease", "kube-public", "kube-system"):
            self.request("GET", f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
        try:
            self.request("GET", _ORPHAN)
        except Refused as e:
            if e.code != 404:
                raise
        else:
            raise ClusterError("an object whose owner is gone is still there")

    def _await_crd(self, name: str) -> None:
        def established() -> None:
            crd = self.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
            conditions = {c["type"]: c for c in crd.get("status", {}).get("conditions") or []}
            if conditions.get("Established", {}).get("status") != "True":
                raise ClusterError(f"{name} is not served: {conditions}")
            spec = crd["spec"]
            self.request("GET", f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}")

        self.wait_for("kube-apiserver", established)

    def _path(self, document: Mapping[str, Any]) -> str:
        """Where the API server has the object, by what it says of its kinds."""
        version, kind, meta = document["apiVersion"], document["kind"], document["metadata"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        resources = self.request("GET", root)["resources"]
        found = next(r for r in resources if r["kind"] == kind and "/" not in r["name"])
        space = f"/namespaces/{meta.get('namespace', 'default')}" if found["namespaced"] else ""
        return f"{root}{space}/{found['name']}/{meta['name']}"

    def _connect(self) -> http.client.HTTPSConnection:
        if self._connection is None:
            context = ssl.create_default_context(cafile=str(self.ca))
            self._connection = http.client.HTTPSConnection(
                "127.0.0.1", self._plane.ports.api, timeout=30, context=context
            )
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _undo(self) -> list[str]:
        """Deletes and writes back in etcd what differs from the start, and says what did."""
        present = self.keys(values=False)
        added = present.keys() - self._baseline.keys()
        changed = [
            key
            for key, (revision, _) in self._baseline.items()
            if key not in present or present[key]["mod_revision"] != revision
        ]
        for key in added:
            self._etcd("/v3/kv/deleterange", {"key": _b64(key)})
        for key in changed:
            value = self._baseline[key][1]
            written = self._etcd("/v3/kv/put", {"key": _b64(key), "value": value})
            self._baseline[key] = (written["header"]["revision"], value)
        return [*added, *changed]

    def _etcd(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._plane.ports.etcd, timeout=30)
        try:
            connection.request("POST", path, body=json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ClusterError(f"etcd {path}: {answer.status} {text.decode(errors='replace')}")
        return dict(json.loads(text))


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
