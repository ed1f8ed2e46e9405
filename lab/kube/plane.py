"""A control plane on one machine: where its programs listen, what they are told, whom they know. It starts nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml

from lab.kube.audit import POLICY, AuditLog
from lab.kube.build import NodePrograms, NotHere, Programs

#: The garbage collector frees the blocks of a deleted Node; the others make a namespace behave as one.
CONTROLLERS = ("garbage-collector-controller", "namespace-controller", "serviceaccount-controller")
#: Where Services have their addresses.
SERVICES = "10.96.0.0/16,fd00:10:97::/112"
#: What the API server calls itself in its certificate, wherever it listens.
NAMES = "IP:127.0.0.1,DNS:localhost,DNS:kubernetes.default.svc"

#: How programs of Kubernetes are to use memory, of which there is plenty: a tenth of what an API server takes to start
#: and to be filled is the collection of its garbage.
GO = {"GOGC": "400"}


class ClusterError(Exception):
    """A process of the cluster did not start or answer; the message has the end of its log."""


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """All on loopback but ``api``, which is where ``Plane.address`` says."""

    etcd: int = 2379
    peer: int = 2380
    api: int = 6443
    controllers: int = 10257


class Nodes(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a whole cluster of a control plane: the programs, a scheduler's token, and one of each kubelet by the
    name of its node."""

    programs: NodePrograms
    scheduler_token: str
    tokens: dict[str, str]


class Plane(msgspec.Struct, frozen=True, kw_only=True):
    """``folder`` takes data and keys. ``admin_token`` is an administrator's, ``manager_token`` controller-manager's.
    ``nodes``: kubelets are to join. ``audit``: megabytes of a log of all that the API server is asked, after which it
    is begun anew (one older is kept); 0 for none."""

    programs: Programs
    folder: Path
    admin_token: str
    manager_token: str = "manager-token"
    address: str = "127.0.0.1"
    #: Where Services have their addresses, as the API server is told.
    services: str = SERVICES
    #: Where Endpoints of the service ``kubernetes`` lead, if that is elsewhere; it listens there, too.
    endpoint: str = ""
    ports: Ports = Ports()
    nodes: Nodes | None = None
    audit: int = 0

    @property
    def url(self) -> str:
        return f"https://{f'[{self.address}]' if ':' in self.address else self.address}:{self.ports.api}"

    @property
    def ca(self) -> Path:
        """What a client checks the API server's certificate against."""
        return self.pki / "ca.crt"

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def audit_log(self) -> AuditLog:
        """Where there is ``audit``."""
        return AuditLog(self.folder / "audit.log")

    def prepare(self, *, names: str = NAMES) -> None:
        """Makes keys, certificates and the list of tokens. NotHere, ClusterError."""
        self.pki.mkdir(parents=True, mode=0o700)
        if self.audit:
            self._audit_policy.write_text(json.dumps(POLICY))
        make_keys(self.pki, names=names)
        who = [f"{self.admin_token},admin,1,system:masters", f"{self.manager_token},system:kube-controller-manager,2"]
        write_kubeconfig(self._manager, self.url, self.ca, token=self.manager_token)
        if self.nodes:
            make_client_key(self.pki, "kubelet-client", "/O=system:masters/CN=kube-apiserver-kubelet-client")
            who.append(f"{self.nodes.scheduler_token},system:kube-scheduler,3")
            write_kubeconfig(self._scheduler, self.url, self.ca, token=self.nodes.scheduler_token)
            for number, (name, token) in enumerate(self.nodes.tokens.items(), 4):
                who.append(f"{token},system:node:{name},{number},system:nodes")
                write_kubeconfig(self.kubelet(name), self.url, self.ca, token=token)
        write_secret(self.pki / "tokens.csv", "".join(f"{line}\n" for line in who))

    def kubelet(self, node: str) -> Path:
        """The kubeconfig of a node's kubelet."""
        return self.pki / f"{node}.kubeconfig"

    def admit(self, node: str) -> None:
        """Makes the kubeconfig of a kubelet that nobody thought of in ``prepare``; there may be one already.
        Raises ClusterError."""
        if not self.kubelet(node).exists():
            key = make_client_key(self.pki, f"kubelet-of-{node}", f"/O=system:nodes/CN=system:node:{node}")
            write_kubeconfig(self.kubelet(node), self.url, self.ca, key=key)

    def etcd(self) -> list[str]:
        client, peer = f"http://127.0.0.1:{self.ports.etcd}", f"http://127.0.0.1:{self.ports.peer}"
        return [
            str(self.programs.etcd),
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]

    def apiserver(self) -> list[str]:
        return [
            str(self.programs.apiserver),
            f"--etcd-servers=http://127.0.0.1:{self.ports.etcd}",
            f"--bind-address={self._bind}",
            f"--secure-port={self.ports.api}",
            f"--tls-cert-file={self.pki / 'server.crt'}",
            f"--tls-private-key-file={self.pki / 'server.key'}",
            f"--client-ca-file={self.ca}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={self.pki / 'server.key'}",
            f"--service-account-key-file={self.pki / 'server.crt'}",
            f"--token-auth-file={self.pki / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            f"--service-cluster-ip-range={self.services}",
            "--profiling=false",
            *self._of_kubelets(),
            *self._auditing(),
        ]

    @property
    def _bind(self) -> str:
        if not self.endpoint:
            return self.address
        return "::" if ":" in self.endpoint else "0.0.0.0"

    def _of_kubelets(self) -> list[str]:
        if not self.nodes:
            # Asked for where there is no default route; nobody uses it, as there is no reconciler of endpoints.
            return ["--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none"]
        return [
            f"--advertise-address={self.endpoint or self.address}",
            "--allow-privileged=true",
            f"--kubelet-client-certificate={self.pki / 'kubelet-client.crt'}",
            f"--kubelet-client-key={self.pki / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
        ]

    def _auditing(self) -> list[str]:
        if not self.audit:
            return []
        return [
            f"--audit-policy-file={self._audit_policy}",
            f"--audit-log-path={self.folder / 'audit.log'}",
            f"--audit-log-maxsize={self.audit}",
            "--audit-log-maxbackup=1",
        ]

    def scheduler(self) -> list[str]:
        """Only where there are nodes."""
        assert self.nodes is not None
        return [
            str(self.nodes.programs.scheduler),
            f"--kubeconfig={self._scheduler}",
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
        ]

    def controller_manager(self, controllers: Sequence[str] = CONTROLLERS) -> list[str]:
        return [
            str(self.programs.controller_manager),
            f"--kubeconfig={self._manager}",
            f"--controllers={','.join(controllers)}",
            f"--root-ca-file={self.ca}",
            f"--tls-cert-file={self.pki / 'server.crt'}",
            f"--tls-private-key-file={self.pki / 'server.key'}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.ports.controllers}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            # Which it makes, if need be.
            f"--flex-volume-plugin-dir={self.folder / 'volume-plugins'}",
            # How soon a node's taint goes once it is ready.
            *(["--node-monitor-period=500ms"] if self.nodes else []),
        ]

    @property
    def _audit_policy(self) -> Path:
        return self.folder / "audit-policy.json"

    @property
    def _manager(self) -> Path:
        return self.pki / "manager.kubeconfig"

    @property
    def _scheduler(self) -> Path:
        return self.pki / "scheduler.kubeconfig"


def write_kubeconfig(
    path: Path, server: str, ca: Path, *, token: str = "", token_file: Path | None = None, key: Path | None = None
) -> None:
    """A kubeconfig, its owner's alone, for a token, for a file that has one and may change, or for a key and its
    certificate (without their endings)."""
    user = {"tokenFile": str(token_file)} if token_file else {"token": token}
    user = {"client-key": f"{key}.key", "client-certificate": f"{key}.crt"} if key else user
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        "clusters": [{"name": "lab", "cluster": {"server": server, "certificate-authority": str(ca)}}],
        "users": [{"name": "lab", "user": user}],
    }
    write_secret(path, yaml.safe_dump(config))


def write_secret(path: Path, text: str) -> None:
    """Writes a file that its owner alone can read; who reads it meanwhile reads the old one or the new one, whole."""
    part = path.with_name(f".{path.name}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
    part.rename(path)


def make_keys(folder: Path, *, names: str = NAMES) -> None:
    """A CA (``ca.crt``), a server's certificate for ``names`` (``server``), and an administrator's (``admin``)."""
    if shutil.which("openssl") is None:
        raise NotHere("openssl is not installed: apt-get install openssl")
    # Python 3.13 asks for keyUsage and key identifiers, as RFC 5280 does.
    _openssl(folder, "ca", "/CN=test-ca", "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    server = (f"subjectAltName={names}", "extendedKeyUsage=serverAuth")
    signed = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature")
    _openssl(folder, "server", "/CN=kube-apiserver", *signed, *server, ca=True)
    make_client_key(folder, "admin", "/O=system:masters/CN=admin")


def make_client_key(folder: Path, name: str, subject: str) -> Path:
    """A client's certificate of the CA in the folder, and its key; the way to them, without their endings."""
    signed = ("basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature")
    _openssl(folder, name, subject, *signed, "extendedKeyUsage=clientAuth", ca=True)
    return folder / name


def _openssl(folder: Path, name: str, subject: str, *extensions: str, ca: bool = False) -> None:
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "90"]
    argv += ["-config", os.devnull, "-subj", subject, "-keyout", f"{name}.key", "-out", f"{name}.crt"]
    argv += ["-CA", "ca.crt", "-CAkey", "ca.key"] if ca else []
    for extension in (*extensions, "subjectKeyIdentifier=hash"):
        argv += ["-addext", extension]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(argv)}: {done.stderr}")
