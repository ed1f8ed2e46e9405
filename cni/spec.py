"""What the CNI specification says of words: environment, configuration, results, errors, versions. Pure.

"Section" means a section of https://github.com/containernetworking/cni/blob/spec-v1.1.0/SPEC.md. The rules, in order:

1. A call is named by ``CNI_COMMAND``; ``parse`` turns its environment and standard input into a ``Call``, or refuses it
   with one of the well-known codes: 1 version, 4 environment, 6 not JSON, 7 configuration.
2. Unknown keys of the configuration are not ours to judge; a wrong value of a key that we read is 7 and names the key.
3. DEL is read leniently: a runtime repeats a DEL that fails for ever, so only what is needed to find the attachment can
   make it fail.
4. Results are written in the version that the configuration asks for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from cni.errors import CNIError
from cni.marks import LINK_MAC

#: The versions that we speak. CHECK came with 0.4.0, STATUS and GC with 1.1.0.
VERSIONS: Final = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
LATEST: Final = VERSIONS[-1]
_SINCE: Final = {"ADD": "0.3.1", "DEL": "0.3.1", "CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
COMMANDS: Final = (*_SINCE, "VERSION")

# Section 5, "Error": 0-99 are reserved, 100 and above are ours.
INCOMPATIBLE_VERSION: Final = 1
INVALID_ENVIRONMENT: Final = 4
IO_FAILURE: Final = 5
UNDECODABLE: Final = 6
INVALID_CONFIG: Final = 7
TRY_AGAIN: Final = 11
NOT_AVAILABLE: Final = 50
LIMITED: Final = 51
#: The kernel refused to wire the pod.
WIRING_FAILED: Final = 100
#: CHECK found the pod's network changed.
CHECK_FAILED: Final = 101
#: An interface of this name is in the pod already, and is not ours.
INTERFACE_EXISTS: Final = 102
#: A defect of ours; the server's log has the rest.
INTERNAL: Final = 103
#: The attachment's DEL has overtaken this ADD (R7).
DELETED: Final = 104

# Section 2, "Parameters", and Section 1 for the network's name: one rule for both.
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*", re.ASCII)
_NAME_LIMIT: Final = 255
#: IFNAMSIZ is 16 with the closing zero (include/uapi/linux/if.h).
_INTERFACE_LIMIT: Final = 15
_TRUE: Final = frozenset({"1", "true"})
_ARGS_WE_KNOW: Final = frozenset(
    {"K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID", "IgnoreUnknown", "IP", "MAC"}
)
_MAC: Final = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)


class Refusal(CNIError):
    """A call that gets an error for an answer. ``code`` is the specification's or one of ours (100 and above),
    ``text`` is short and constant for the kind of failure, ``details`` says what, where, and what to do."""

    def __init__(self, code: int, text: str, details: str = "") -> None:
        self.code = code
        self.text = text
        self.details = details
        super().__init__(f"{text}: {details}" if details else text)


# -- the call ------------------------------------------------------------------------------------------------------


class Attached(msgspec.Struct, frozen=True):
    """One entry of ``cni.dev/valid-attachments``."""

    container: str = field(name="containerID")
    interface: str = field(name="ifname")


class Runtime(msgspec.Struct, frozen=True):
    """What the runtime adds for a capability (CONVENTIONS.md, "Dynamic Plugin specific fields"); ``annotations`` are
    the pod's. None where it does not say."""

    annotations: dict[str, str] | None = field(default=None, name="io.kubernetes.cri.pod-annotations")
    ips: tuple[str, ...] | None = None
    mac: str | None = None


class Config(msgspec.Struct, frozen=True):
    """The request configuration (Section 3, "Deriving request configuration"), as far as we read it.

    ``mtu`` 0 means the uplinks'. ``valid`` is UNSET when the key is absent and None when it is null: neither is an
    empty list. An empty list says that no attachment is valid; libcni writes null when it knows of none, and leaves the
    key out when it was not told (cnitool).
    """

    version: str = field(default="0.1.0", name="cniVersion")
    name: str = ""
    type: str = ""
    # 68 is IPv4's least (RFC 791); 65535 the most that a veth takes.
    mtu: Annotated[int, Meta(ge=0, le=65535)] = 0
    dns: dict[str, Any] = {}
    previous: dict[str, Any] | None = field(default=None, name="prevResult")
    valid: tuple[Attached, ...] | UnsetType | None = field(default=UNSET, name="cni.dev/valid-attachments")
    runtime: Runtime = field(default=Runtime(), name="runtimeConfig")


class _Bare(msgspec.Struct, frozen=True):
    """What a DEL needs of its configuration."""

    version: str = field(default="0.1.0", name="cniVersion")
    name: str = ""
    type: str = ""


class Call(msgspec.Struct, frozen=True):
    """A well-formed call. ``netns`` is the path as given, "" if none; ``pod`` is ``namespace/name`` where the runtime
    said so, ``pod_uid`` the Pod's uid likewise. ``addresses`` and ``mac`` are those that the runtime wants the pod to
    have, if any: in canonical text, one address of a family at most. ``asked`` is when the shim was started (seconds,
    monotonic), if it says so."""

    command: str
    config: Config
    container: str = ""
    interface: str = ""
    netns: str = ""
    pod: str = ""
    pod_uid: str = ""
    addresses: tuple[str, ...] = ()
    mac: str = ""
    asked: float | None = None


def parse(environment: Mapping[str, str], text: bytes) -> Call:
    """Reads a call. Raises Refusal, whose answer should be written in ``version_of(text)``."""
    command = environment.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise _environment("CNI_COMMAND", command, f"must be one of {', '.join(COMMANDS)}")
    if command == "VERSION":
        return Call(command, Config(version=version_of(text)))

    config = _config(command, text)
    if command in ("STATUS", "GC"):
        return Call(command, config)

    container = environment.get("CNI_CONTAINERID", "")
    if not _NAME.fullmatch(container) or len(container) > _NAME_LIMIT:
        rule = f"must begin with a letter or digit and hold only letters, digits, '_', '.', '-' ({_NAME_LIMIT} at most)"
        raise _environment("CNI_CONTAINERID", container, rule)
    interface = environment.get("CNI_IFNAME", "")
    if problem := _wrong_interface(interface):
        raise _environment("CNI_IFNAME", interface, problem)
    # DEL comes without a namespace when the sandbox is gone already.
    netns = environment.get("CNI_NETNS", "")
    if not netns and command != "DEL":
        raise _environment("CNI_NETNS", netns, "must be the path of the pod's network namespace")

    arguments = _arguments(environment.get("CNI_ARGS", ""), lenient=command == "DEL")
    pod = "/".join(filter(None, (arguments.get("K8S_POD_NAMESPACE"), arguments.get("K8S_POD_NAME"))))
    addresses, mac = _wanted(config.runtime, arguments) if command == "ADD" else ((), "")
    uid, asked = arguments.get("K8S_POD_UID", ""), _asked(environment.get("UNDERLAY_ASKED", ""))
    return Call(command, config, container, interface, netns, pod, uid, addresses, mac, asked)


def version_of(text: bytes) -> str:
    """The version to answer in: the configuration's if it can be read and we speak it, else our latest."""
    try:
        version = msgspec.json.decode(text, type=_Bare).version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return LATEST
    return version if version in VERSIONS else LATEST


def _config(command: str, text: bytes) -> Config:
    try:
        if command == "DEL":
            bare = msgspec.json.decode(text, type=_Bare)
            config = Config(version=bare.version, name=bare.name, type=bare.type)
        else:
            config = msgspec.json.decode(text, type=Config)
    except msgspec.ValidationError as e:
        if problem := _malformed(text):
            raise problem from e
        what, _, where = str(e).partition(" - at ")
        key = where.strip("`").removeprefix("$").removeprefix(".") or "the whole"
        raise Refusal(INVALID_CONFIG, "invalid network configuration", f"{key}: {what}; correct it") from e
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise _undecodable(text, e) from e

    if config.version not in VERSIONS:
        details = f"cniVersion {config.version!r} is asked for; this plugin speaks {', '.join(VERSIONS)}"
        raise Refusal(INCOMPATIBLE_VERSION, "incompatible CNI version", details)
    if VERSIONS.index(config.version) < VERSIONS.index(_SINCE[command]):
        details = f"{command} needs cniVersion {_SINCE[command]} or newer; the configuration has {config.version!r}"
        raise Refusal(INCOMPATIBLE_VERSION, "incompatible CNI version", details)
    if not _NAME.fullmatch(config.name) or len(config.name) > _NAME_LIMIT:
        rule = "must begin with a letter or digit and hold only letters, digits, '_', '.', '-'"
        raise Refusal(INVALID_CONFIG, "invalid network configuration", f"name: {config.name!r}: {rule}")
    if 0 < config.mtu < 68:
        details = f"mtu: {config.mtu}: IPv4 needs 68, IPv6 1280; leave it out to have the uplinks'"
        raise Refusal(INVALID_CONFIG, "invalid network configuration", details)
    return config


def _malformed(text: bytes) -> Refusal | None:
    """A wrong key in a text that ends too early, or is no JSON further on, is the lesser of its problems."""
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        return _undecodable(text, e)
    return None


def _undecodable(text: bytes, e: Exception) -> Refusal:
    return Refusal(UNDECODABLE, "the network configuration is not JSON", f"standard input, {len(text)} B: {e}")


def _wrong_interface(name: str) -> str:
    """Section 2, "Parameters"; the kernel's own rule is dev_valid_name (net/core/dev.c)."""
    if not name or len(name.encode(errors="surrogateescape")) > _INTERFACE_LIMIT:
        return f"must have 1 to {_INTERFACE_LIMIT} bytes"
    if name in (".", "..") or any(c in "/:" or c.isspace() or not c.isprintable() for c in name):
        return "must not be '.' or '..' nor hold '/', ':', blanks or control characters"
    return ""


def _arguments(text: str, *, lenient: bool) -> dict[str, str]:
    """``CNI_ARGS``: pairs ``KEY=VALUE`` between semicolons, in any order. An unknown key is refused unless
    ``IgnoreUnknown`` is 1 or true, wherever that stands (CONVENTIONS.md, "CNI_ARGS")."""
    found: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if equals and key:
            found[key] = value
        elif not lenient:
            raise _environment("CNI_ARGS", text, f"{pair!r} must be KEY=VALUE")
    unknown = sorted(found.keys() - _ARGS_WE_KNOW)
    if unknown and not lenient and found.get("IgnoreUnknown", "").lower() not in _TRUE:
        raise _environment(
            "CNI_ARGS", text, f"{', '.join(unknown)}: not known; pass IgnoreUnknown=1 to have it ignored"
        )
    return found


def _wanted(runtime: Runtime, arguments: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    """Addresses and MAC that the pod is to have, empty if the runtime leaves it to us. ``runtimeConfig`` goes before
    ``CNI_ARGS``."""
    try:
        if runtime.ips:
            addresses = _addresses(runtime.ips, "runtimeConfig.ips")
        else:
            addresses = _addresses(filter(None, arguments.get("IP", "").split(",")), "CNI_ARGS: IP")
        if runtime.mac:
            mac = _unicast(runtime.mac, "runtimeConfig.mac")
        else:
            mac = _unicast(arguments.get("MAC", ""), "CNI_ARGS: MAC")
    except ValueError as e:
        if str(e).startswith("CNI_ARGS"):
            raise Refusal(INVALID_ENVIRONMENT, "invalid CNI_ARGS", str(e)) from e
        raise Refusal(INVALID_CONFIG, "invalid network configuration", str(e)) from e
    return addresses, mac


def _addresses(texts: Iterable[str], where: str) -> tuple[str, ...]:
    """A prefix length may follow, as for plugins that have a subnet; ours are a /32 and a /128. ValueError."""
    found: dict[int, str] = {}
    for text in texts:
        try:
            # A zone is Python's to take, and no part of a pod's address.
            ip = ipaddress.ip_interface(text.replace("%", "/%")).ip
        except ValueError:
            raise ValueError(f"{where}: {_shown(text)} is no IP address: write one, as 10.244.0.7 or fd00::7") from None
        if ip.version in found:
            raise ValueError(f"{where}: {_shown(text)} is a second IPv{ip.version} address: one of a family at most")
        found[ip.version] = str(ip)
    return tuple(found.values())


def _unicast(text: str, where: str) -> str:
    """The MAC in small letters. ValueError unless an interface can have it (is_valid_ether_addr of the kernel)."""
    mac = text.lower()
    if not mac:
        return ""
    if not _MAC.fullmatch(mac):
        raise ValueError(f"{where}: {_shown(text)} is no MAC address: write six bytes, as 02:00:00:00:00:07")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise ValueError(f"{where}: {mac} is no unicast address: its first byte must be even, and not all may be 0")
    if mac == LINK_MAC:
        raise ValueError(f"{where}: {mac} is the MAC of every pod's gateway: take another")
    return mac


def _asked(text: str) -> float | None:
    """Nanoseconds as the shim writes them; None for a shim that does not."""
    return int(text) / 1e9 if text.isascii() and text.isdigit() and len(text) < 20 else None


def _environment(name: str, value: str, rule: str) -> Refusal:
    return Refusal(INVALID_ENVIRONMENT, f"invalid {name}", f"{name}: {_shown(value)}: {rule}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")


# -- the answer ----------------------------------------------------------------------------------------------------


class Interface(msgspec.Struct, frozen=True):
    """An interface that ADD made; ``sandbox`` is CNI_NETNS for the pod's end and "" for the node's."""

    name: str
    mac: str
    mtu: int
    sandbox: str = ""


class Address(msgspec.Struct, frozen=True):
    """``address`` with prefix length; ``gateway`` of its family's default route."""

    address: str
    gateway: str


def result(config: Config, node_end: Interface, pod_end: Interface, addresses: tuple[Address, ...]) -> bytes:
    """Section 5, "ADD Success": what ADD prints, in the configuration's version.

    The node's end comes first, so the addresses belong to interface 1. Where a plugin ran before us its result is kept
    in front of ours ("must output it as their result, with any possible modifications").
    """
    old = config.version in ("0.3.1", "0.4.0")
    newest = config.version == "1.1.0"
    before = config.previous or {}
    earlier = _objects(before, "interfaces")

    interfaces: list[dict[str, Any]] = []
    for end in (node_end, pod_end):
        entry: dict[str, Any] = {"name": end.name, "mac": end.mac}
        if newest:
            entry["mtu"] = end.mtu
        if end.sandbox:
            entry["sandbox"] = end.sandbox
        interfaces.append(entry)

    ips: list[dict[str, Any]] = []
    routes: list[dict[str, str]] = []
    for a in addresses:
        six = ":" in a.address
        # Until 0.4.0 an address carries its family; 1.0.0 took that out.
        family = {"version": "6" if six else "4"} if old else {}
        ips.append({**family, "address": a.address, "gateway": a.gateway, "interface": len(earlier) + 1})
        routes.append({"dst": "::/0" if six else "0.0.0.0/0", "gw": a.gateway})

    return msgspec.json.encode(
        {
            "cniVersion": config.version,
            "interfaces": earlier + interfaces,
            "ips": _objects(before, "ips") + ips,
            "routes": _objects(before, "routes") + routes,
            "dns": config.dns or before.get("dns") or {},
        }
    )


class Expected(msgspec.Struct, frozen=True):
    """What a prevResult says of our part: name of the node's end, MAC and addresses (with prefix length) of the pod's
    end, and the gateways of those of our default routes that no later plugin took out."""

    node_end: str
    mac: str
    addresses: tuple[str, ...]
    gateways: tuple[str, ...]


def expected(config: Config, interface: str) -> Expected:
    """Reads our part out of the prevResult of a CHECK (Section 2, "CHECK": "must consult the prevResult").

    Later plugins of the chain may have added interfaces, addresses and routes, and changed routes: only addresses of
    ``interface`` in a sandbox count, and the node's end is the entry right before it. Raises Refusal, code 7.
    """
    previous = config.previous
    if previous is None:
        raise _previous("is missing; CHECK needs the result of ADD")
    interfaces = _objects(previous, "interfaces")
    ours = [i for i, e in enumerate(interfaces) if e.get("name") == interface and e.get("sandbox")]
    if not ours or ours[0] == 0:
        raise _previous(f"interfaces: has no {interface!r} with a sandbox behind its node end; pass ADD's result")
    ips = [e for e in _objects(previous, "ips") if e.get("interface") == ours[0]]
    addresses = tuple(a for e in ips if isinstance(a := e.get("address"), str))
    if not addresses:
        raise _previous(f"ips: has no address of interface {ours[0]}; pass ADD's result")
    routed = [e.get("gw") for e in _objects(previous, "routes") if e.get("dst") in ("0.0.0.0/0", "::/0")]
    return Expected(
        node_end=str(interfaces[ours[0] - 1].get("name", "")),
        mac=str(interfaces[ours[0]].get("mac", "")),
        addresses=addresses,
        gateways=tuple(g for e in ips if isinstance(g := e.get("gateway"), str) and g in routed),
    )


def error(version: str, refusal: Refusal) -> bytes:
    """Section 5, "Error"."""
    body: dict[str, Any] = {"cniVersion": version, "code": refusal.code, "msg": refusal.text}
    if refusal.details:
        body["details"] = refusal.details
    return msgspec.json.encode(body)


def versions(version: str) -> bytes:
    """Section 5, "VERSION Success"."""
    return msgspec.json.encode({"cniVersion": version, "supportedVersions": VERSIONS})


def _objects(body: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = body.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(e, dict) for e in value):
        raise _previous(f"{key}: must be a list of objects")
    return value


def _previous(problem: str) -> Refusal:
    return Refusal(INVALID_CONFIG, "invalid network configuration", f"prevResult: {problem}")
