"""What a custom resource may not say, in CEL: the rules of ``store.validate`` for the API server. Pure.

Source of the language: Kubernetes, "Common Expression Language in Kubernetes" and "Validation rules" of
CustomResourceDefinitions; everything here is in Kubernetes 1.31. What CEL cannot say is in ``store.validate`` alone:
the grammar of a selector inside parentheses. What an object is beside others is in ``manifests/policies.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from store.kubewire import LINE_PATTERN
from store.model import (
    BLOCK_LIMIT,
    AddCommunity,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPFilterSpec,
    BGPNodeStatusStatus,
    BGPPeerSpec,
    Community,
    CommunityMatch,
    FilterOperation,
    FilterRule,
    FilterRuleV4,
    FilterRuleV6,
    IPAMBlock,
    IPAMBlockSpec,
    IPAMBlockStatus,
    IPAMConfiguration,
    IPAMConfigurationSpec,
    IPPoolSpec,
    IPReservationSpec,
    PrefixAdvertisement,
    PrefixLength,
    PrependASPath,
    Resource,
    SecretKeyRef,
)
from store.validate import (
    COMMUNITY_PATTERN,
    INTERFACE_PATTERN,
    MAX_ADVERTISEMENTS,
    MAX_AS_NUMBERS,
    MAX_BLOCKS,
    MAX_COMMUNITIES,
    MAX_COMMUNITY_NAME,
    MAX_FILTERS,
    MAX_INTERFACES,
    MAX_OPERATIONS,
    MAX_RULES,
    NAMED_COMMUNITY_PATTERN,
)

Schema = dict[str, Any]

#: Prefixes that a list of CIDRs can have: bounds what the API server may spend on checking it.
MAX_CIDRS = 1024
# What an IPv6 prefix needs at most, a selector (store.selector.MAX_LENGTH), a name.
_CIDR_LENGTH = 43
_SELECTOR_LENGTH = 4096
_NAME_LENGTH = 253


def _rule(rule: str, message: str, *, says: str = "", at: str = "") -> dict[str, str]:
    """``says`` is a CEL expression that makes a better message; ``at`` the path of the field below that is to blame."""
    made = {"rule": rule, "message": message}
    if says:
        made["messageExpression"] = says
    if at:
        made["fieldPath"] = at
    return made


def _check(*rules: dict[str, str], **schema: Any) -> Schema:
    return {**schema, "x-kubernetes-validations": list(rules)}


def _either(*cases: str) -> str:
    return " || ".join(f"({case})" for case in cases)


# isCIDR and masked() take four spellings of one IPv6 prefix; only the text of the masked one is canonical. (A message
# with that text would be better, but the API server reckons with any length of it, and refuses the whole rule.)
_CANONICAL = "isCIDR(self) && string(cidr(self).masked()) == self"
_CIDR = _rule(
    _CANONICAL,
    "write an IPv4 or IPv6 prefix, as 10.244.0.0/16 or fd00:10:244::/48: one prefix has one spelling, without bits "
    "beyond its length",
)
_CIDR_OR_ADDRESS = _rule(
    _either("isIP(self) && ip.isCanonical(self)", _CANONICAL),
    "write an IPv4 or IPv6 address or prefix in its one spelling, without bits beyond its length",
)
_NOT_ROUTED = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/8", "fe80::/10", "ff00::/8")
# Two prefixes overlap if one has the other's first address. (containsCIDR is wrong in Kubernetes 1.31.)
_ROUTED = _rule(
    f"!isCIDR(self) || !{list(_NOT_ROUTED)}"
    ".exists(s, cidr(s).containsIP(cidr(self).ip()) || cidr(self).containsIP(cidr(s).ip()))",
    "it contains loopback, link-local, multicast or reserved addresses, which cannot be routed to a pod",
)

_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_NAME_PATTERN = rf"{_LABEL}(\.{_LABEL})*"
_NAME = _rule(
    f"self.matches(r'^{_NAME_PATTERN}$')",
    "write lower-case letters, digits, '-' and '.', beginning and ending with a letter or digit (RFC 1123)",
)
_NAME_OR_NOTHING = {**_NAME, "rule": _either("self == ''", _NAME["rule"])}
#: For every kind: the API server's own rule for names does not bound what stands between two dots.
METADATA: Schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": _NAME_LENGTH, "pattern": f"^{_NAME_PATTERN}$"}},
}

_AS_NUMBER = (
    _rule(
        "self != 23456",
        "23456 stands for AS numbers that do not fit into 16 bits (RFC 6793); private ones are 64512..65534",
    ),
    _rule("self != 65535", "65535 is reserved (RFC 7300); private ones are 64512..65534"),
)

_NO_OVERLAY = _rule(
    "self == 'Never'",
    "write Never or leave it out: Underlay has no overlay, the routers learn every block by BGP and carry pod "
    "addresses as they are; peer with them (BGPPeer) instead of tunnelling past them",
)


def _selector_pattern() -> str:
    """Calico's grammar (``store.selector``) as far as a regular expression goes: what stands in parentheses is let
    through."""
    word, text = "[A-Za-z0-9_./-]+", "(\"[^\"]*\"|'[^']*')"
    values = rf"\{{\s*({text}(\s*,\s*{text})*)?\s*\}}"
    atom = "|".join(
        (
            r"all\s*\(\s*\)",
            rf"has\s*\(\s*{word}\s*\)",
            rf"{word}\s*(==|!=)\s*{text}",
            rf"{word}\s+(not\s+)?in\s*{values}",
            rf"{word}\s+(contains|starts\s+with|ends\s+with)\s*{text}",
            r"\(.*\)",
        )
    )
    term = rf"(!\s*)*({atom})"
    return rf"(?s)^\s*({term}(\s*(&&|\|\|)\s*{term})*)?\s*$"


_SELECTOR = _rule(
    # A raw string in CEL, whose end no pattern of ours contains.
    f"self.matches(r'''{_selector_pattern()}''')",
    "it is no selector: write all(), has(label), label == 'value', label in {'a', 'b'}, joined by && and ||",
)


def _immutable(what: str) -> dict[str, str]:
    stays = f"as long as the {what} lives; make another {what} instead"
    return _rule("self == oldSelf", f"it stays {stays}", says=f"'it stays ' + oldSelf + ' {stays}'")


# An absent blockSize and a 0 are the same wish.
_SIZE, _OLD_SIZE = ((f"(has({it}.blockSize) ? {it}.blockSize : 0)") for it in ("self", "oldSelf"))
_LONGEST = "(cidr(self.cidr).ip().family() == 4 ? 32 : 128)"
_SHORTEST = "(cidr(self.cidr).ip().family() == 4 ? 20 : 116)"
_DEFAULT_SIZE = "(cidr(self.cidr).ip().family() == 4 ? 26 : 122)"
_POD_CIDRS = "(has(self.usePodCIDRs) && self.usePodCIDRs)"
_POOL = (
    _rule(
        f"!{_POD_CIDRS} || {_SIZE} == 0",
        "leave it out: with usePodCIDRs a block is a Node's podCIDR, of the size that kube-controller-manager gives it "
        "(--node-cidr-mask-size)",
        at=".blockSize",
    ),
    _rule(
        f"!isCIDR(self.cidr) || {_SIZE} == 0 || "
        f"({_SIZE} >= cidr(self.cidr).prefixLength() && {_SIZE} >= {_SHORTEST} && {_SIZE} <= {_LONGEST})",
        "blockSize is the prefix length of a block, which lies inside the pool and has at most "
        f"{BLOCK_LIMIT} addresses: not below the pool's own nor 20, at most 32 (116 and 128 for IPv6)",
        at=".blockSize",
    ),
    _rule(
        f"!isCIDR(self.cidr) || {_POD_CIDRS} || {_SIZE} != 0 || cidr(self.cidr).prefixLength() <= {_DEFAULT_SIZE}",
        "the pool is smaller than a block of the default size (26, 122): write a blockSize",
        at=".blockSize",
    ),
    _rule(
        f"{_SIZE} == {_OLD_SIZE}",
        "blockSize stays as it is as long as the pool lives; make another pool instead",
        at=".blockSize",
    ),
)

# What stands in model.block_name: "::" at either end has a 0 beside it, as a name begins and ends with a digit.
_BLOCK_NAME = (
    "(self.spec.cidr.startsWith('::') ? '0' : '') + "
    "self.spec.cidr.replace('::/', '::0/').replace('.', '-').replace(':', '-').replace('/', '-')"
)
# What model.within_of gives, said without building text, which would cost too much.
_CUT = "(cidr(self.spec.cidr).ip().family() == 4 ? 20 : 116)"
_WITHIN = (
    f"(cidr(self.spec.within).prefixLength() == {_CUT} && cidr(self.spec.within).containsIP(cidr(self.spec.cidr).ip()))"
)
_BLOCK = (
    _rule(
        f"!has(self.spec.within) || !isCIDR(self.spec.within) || !isCIDR(self.spec.cidr) || {_WITHIN}",
        "it follows from cidr: leave it out, or write the /20 or /116 that the block's first address is in",
        at=".spec.within",
    ),
    _rule(
        f"!isCIDR(self.spec.cidr) || self.metadata.name == {_BLOCK_NAME}",
        "a block is named by its CIDR, as 10-244-3-64-26, so that each has one name",
        says=f"'write ' + {_BLOCK_NAME} + ': a block is named by its CIDR, so that each has one name'",
        at=".metadata.name",
    ),
    _rule(
        "!has(self.status) || !has(self.status.allocations) || !isCIDR(self.spec.cidr) || "
        "self.status.allocations.all(a, !isIP(a) || cidr(self.spec.cidr).containsIP(a))",
        "an address is outside the block",
        at=".status.allocations",
    ),
)

_PEER_HOST = (
    "(self.startsWith('[') && self.contains(']') ? self.substring(1, self.indexOf(']')) : "
    "self.split(':').size() == 2 ? self.split(':')[0] : self)"
)
_PEER_PORT = (
    "(self.startsWith('[') && self.contains(']') ? self.substring(self.indexOf(']') + 1) : "
    "self.split(':').size() == 2 ? ':' + self.split(':')[1] : '')"
)
_PEER_FORM = "write an IPv4 or IPv6 address in its one spelling, with a port as 10.0.0.1:1179 or [fd00::1]:1179"
_PEER = (
    _rule(f"self == '' || [{_PEER_HOST}].all(h, isIP(h) && ip.isCanonical(h))", _PEER_FORM),
    _rule(
        f"[{_PEER_PORT}].all(p, p == '' || (p.matches('^:[0-9]{{1,5}}$') && "
        "int(p.substring(1)) >= 1 && int(p.substring(1)) <= 65535))",
        "the port is in 1..65535",
    ),
    _rule(f"!self.startsWith('[') || {_PEER_HOST}.contains(':')", "only an IPv6 address stands in brackets"),
    _rule(
        f"[{_PEER_HOST}].all(h, !isIP(h) || !(ip(h).isUnspecified() || cidr('224.0.0.0/4').containsIP(h) || "
        "cidr('ff00::/8').containsIP(h)))",
        "no peer can have that address",
    ),
)
_DURATION_PATTERN = r"r'^([0-9]{1,9}(\.[0-9]{1,9})?(h|ms|m|s))+$'"
_DURATION = (
    _rule(
        f"self.matches({_DURATION_PATTERN})",
        "write a duration with its unit, as 120s, 2m or 1h30m",
    ),
    _rule(
        f"!self.matches({_DURATION_PATTERN}) || duration(self) <= duration('4095s')",
        "write 0s..4095s (RFC 4724 has 12 bits for it)",
    ),
)
_ONE_WAY = _rule(
    "!has(self.node) || self.node == '' || !has(self.nodeSelector) || self.nodeSelector == ''",
    "a peer says its nodes in one way: leave out node or nodeSelector",
    at=".nodeSelector",
)

_IS_COMMUNITY = f"self.matches(r'^({COMMUNITY_PATTERN})$')"
_COMMUNITY_OR_NAME = "write communities as 65001:100 or 65001:1:100, or a name that stands in communities"
_COMMUNITY = _check(
    _rule(
        f"self.matches(r'^({NAMED_COMMUNITY_PATTERN})$')",
        "write a community as 65001:100 (two numbers to 65535), as 65001:1:100 (three to 4294967295), "
        "or a well-known one by its name, as no-export",
    ),
    maxLength=32,
)
_AS_NUMBERS = {
    "maxItems": MAX_AS_NUMBERS,
    "items": _check(*_AS_NUMBER, minimum=1, maximum=4294967294),
}
_HAS_CIDR = "(has(self.cidr) && self.cidr != '')"
_OPERATOR = "(has(self.matchOperator) ? self.matchOperator : '')"
# An absent min is the cidr's own length.
_MIN = "(has(self.prefixLength.min) ? self.prefixLength.min : cidr(self.cidr).prefixLength())"


def _filter_rule(version: int) -> Schema:
    longest = 32 if version == 4 else 128
    measured = f"!has(self.prefixLength) || !{_HAS_CIDR} || !isCIDR(self.cidr) || "
    return _check(
        _rule(f"{_HAS_CIDR} == ({_OPERATOR} != '')", "write cidr and matchOperator, or neither", at=".matchOperator"),
        _rule(
            f"!has(self.prefixLength) || {_OPERATOR} in ['In', 'NotIn']",
            "leave it out: it goes with In and NotIn and a cidr; with Equal the length is the cidr's own",
            at=".prefixLength",
        ),
        _rule(
            f"{measured}({_MIN} >= cidr(self.cidr).prefixLength() && {_MIN} <= {longest})",
            f"lengths inside the cidr: not below its own, at most {longest}",
            at=".prefixLength",
        ),
        _rule(
            f"{measured}!has(self.prefixLength.max) || "
            f"(self.prefixLength.max >= {_MIN} && self.prefixLength.max <= {longest})",
            f"not below min, nor the cidr's own length, and at most {longest}",
            at=".prefixLength",
        ),
        _rule(
            "!has(self.operations) || self.operations.size() == 0 || self.action == 'Accept'",
            "leave them out, or write action Accept: what is rejected is not changed",
            at=".operations",
        ),
    )


def _filter_fields(struct: type[FilterRule], version: int) -> dict[tuple[type, str], Schema]:
    return {
        (struct, "action"): {"enum": ["Accept", "Reject"]},
        (struct, "matchOperator"): {"enum": ["", "Equal", "NotEqual", "In", "NotIn"]},
        (struct, "cidr"): _check(
            {**_CIDR, "rule": _either("self == ''", _CANONICAL)},
            _rule(
                f"!isCIDR(self) || cidr(self).ip().family() == {version}",
                f"write an IPv{version} prefix: the list is of IPv{version} rules",
            ),
            maxLength=_CIDR_LENGTH,
        ),
        (struct, "source"): {"enum": ["", "RemotePeers"]},
        (struct, "interface"): {"pattern": f"^({INTERFACE_PATTERN})?$", "maxLength": 15},
        (struct, "peerType"): {"enum": ["", "eBGP", "iBGP"]},
        (struct, "asPathPrefix"): _AS_NUMBERS,
        (struct, "operations"): {"maxItems": MAX_OPERATIONS},
    }


_BY_SELECTOR = "(has(self.peerSelector) && self.peerSelector != '')"
_WHO = (
    _rule(
        f"{_BY_SELECTOR} || (has(self.peerIP) && self.peerIP != '')",
        "say who the peer is: its address, or a peerSelector for nodes",
        at=".peerIP",
    ),
    _rule(
        f"{_BY_SELECTOR} || (has(self.asNumber) && self.asNumber != 0)",
        "an AS number is in 1..4294967294",
        at=".asNumber",
    ),
    *(
        _rule(
            f"!{_BY_SELECTOR} || !has(self.{name}) || self.{name} == {nothing}",
            "leave it out, or peerSelector: nodes say where and who they are",
            at=f".{name}",
        )
        for name, nothing in (("peerIP", "''"), ("asNumber", "0"), ("passive", "false"))
    ),
)
_GATEWAY = (
    _rule(
        f"!{_BY_SELECTOR} || !has(self.reachableBy) || self.reachableBy == ''",
        "leave it out, or peerSelector: it goes with one peer's address",
        at=".reachableBy",
    ),
    _rule(
        "!has(self.reachableBy) || !isIP(self.reachableBy) || !has(self.peerIP) || "
        f"[{_PEER_HOST.replace('self', 'self.peerIP')}].all(h, !isIP(h) || "
        "(ip(h).family() == ip(self.reachableBy).family() && h != self.reachableBy))",
        "write the address of another machine than the peer, of the same family",
        at=".reachableBy",
    ),
)
_PASSIVE = (
    _rule(
        "!has(self.passive) || !self.passive || !has(self.ttlSecurity) || self.ttlSecurity == 0",
        "leave it out, or passive: peers that are waited for share one socket, and its TTL would hold for all",
        at=".ttlSecurity",
    ),
    _rule(
        "!has(self.passive) || !self.passive || !has(self.peerIP) || !self.peerIP.matches(r'\\]:|^[^:]*:[^:]*$')",
        "leave it out, or the port of peerIP: the peer connects to us, and its own port says nothing then",
        at=".passive",
    ),
)

#: Beside what the model's types say: the schema of a field, by the struct and its name on the wire.
FIELDS: Mapping[tuple[type, str], Schema] = {
    (IPPoolSpec, "cidr"): _check(_CIDR, _ROUTED, _immutable("pool"), maxLength=_CIDR_LENGTH),
    (IPPoolSpec, "blockSize"): {
        "minimum": 0,
        "maximum": 128,
        "description": "Prefix length of a block; 0 or nothing is the family's default, 26 or 122. It never changes.",
    },
    (IPPoolSpec, "usePodCIDRs"): _check(
        _rule("self == oldSelf", "it stays as it is as long as the pool lives; make another pool instead"),
        description="The blocks are the Nodes' podCIDRs inside cidr (kube-controller-manager --allocate-node-cidrs). "
        "It never changes.",
    ),
    (IPPoolSpec, "nodeSelector"): _check(_SELECTOR, maxLength=_SELECTOR_LENGTH),
    (IPPoolSpec, "natOutgoing"): _check(
        _rule(
            "!self",
            "it is not served: pods keep their own address on the whole way; translate at the border of your network "
            "where private addresses must not leave",
        )
    ),
    (IPPoolSpec, "ipipMode"): _check(_NO_OVERLAY, maxLength=64),
    (IPPoolSpec, "vxlanMode"): _check(_NO_OVERLAY, maxLength=64),
    (IPPoolSpec, "assignmentMode"): {"enum": ["Automatic", "Manual"]},
    # Calico writes [Workload, Tunnel] into every pool by itself.
    (IPPoolSpec, "allowedUses"): _check(
        _rule("self.all(use, use in ['Workload', 'Tunnel'])", "addresses for other uses are not served"),
        _rule("'Workload' in self", "write [Workload]: pods are what pools are for"),
        maxItems=16,
        items={"maxLength": 64},
    ),
    (IPReservationSpec, "reservedCIDRs"): {
        "maxItems": MAX_CIDRS,
        "x-kubernetes-list-type": "set",
        "items": _check(_CIDR_OR_ADDRESS, maxLength=_CIDR_LENGTH),
    },
    (IPAMConfigurationSpec, "maxBlocksPerHost"): {
        "minimum": 0,
        "maximum": MAX_BLOCKS,
        "description": "Blocks that each node may have at most, those of single addresses left out; 0 is no limit.",
    },
    (IPAMConfigurationSpec, "strictAffinity"): _check(
        _rule(
            "self",
            "write true or leave it out: a node hands out addresses of its own blocks only, and never borrows from "
            "another's; where addresses are short, make the pool's blocks smaller (blockSize)",
        )
    ),
    (IPAMBlockSpec, "cidr"): _check(_CIDR, _immutable("block"), maxLength=_CIDR_LENGTH),
    (IPAMBlockSpec, "pool"): _check(_NAME, _immutable("block"), maxLength=_NAME_LENGTH),
    (IPAMBlockSpec, "node"): _check(_NAME, _immutable("block"), maxLength=_NAME_LENGTH),
    (IPAMBlockSpec, "within"): _check(
        {**_CIDR, "rule": _either("self == ''", _CANONICAL)},
        maxLength=_CIDR_LENGTH,
        description="The /20 or /116 that the block's first address is in: what may overlap it is listed by this.",
    ),
    # As store.kubewire writes them.
    (IPAMBlockStatus, "allocations"): _check(
        _rule(
            "self.all(a, isIP(a) && ip.isCanonical(a))",
            "each key is an address: write an IPv4 or IPv6 address in its one spelling",
        ),
        type="object",
        maxProperties=BLOCK_LIMIT,
        additionalProperties={"type": "string", "maxLength": 1024, "pattern": LINE_PATTERN},
        description="Who has which address: network, container, interface, pod (or -), since when (or -).",
        **{"x-kubernetes-map-type": "atomic"},
    ),
    (IPAMBlockStatus, "used"): {"minimum": 0},
    (IPAMBlockStatus, "free"): {"minimum": 0},
    (BGPConfigurationSpec, "asNumber"): _check(*_AS_NUMBER, minimum=1, maximum=4294967294),
    (BGPConfigurationSpec, "importCIDRs"): {
        "maxItems": MAX_CIDRS,
        "x-kubernetes-list-type": "set",
        "items": _check(_CIDR, maxLength=_CIDR_LENGTH),
    },
    (BGPConfigurationSpec, "nodeMeshMaxRestartTime"): _check(*_DURATION, maxLength=64),
    (BGPConfigurationSpec, "ignoredInterfaces"): {
        "maxItems": MAX_INTERFACES,
        "x-kubernetes-list-type": "set",
        "items": {"pattern": f"^({INTERFACE_PATTERN})$", "maxLength": 15},
        "description": "Interfaces whose subnets are not taken for connected; * stands for any characters.",
    },
    (BGPConfigurationSpec, "listenPort"): {
        "minimum": 0,
        "maximum": 65535,
        "description": "Where those find us who connect to us; 0 is 179.",
    },
    (BGPConfigurationSpec, "communities"): {
        "maxItems": MAX_ADVERTISEMENTS,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
    },
    (BGPConfigurationSpec, "prefixAdvertisements"): {
        "maxItems": MAX_ADVERTISEMENTS,
        "description": "What blocks inside a prefix are announced with.",
    },
    (Community, "name"): _check(_NAME, maxLength=MAX_COMMUNITY_NAME),
    (Community, "value"): _COMMUNITY,
    (PrefixAdvertisement, "cidr"): _check(_CIDR, maxLength=_CIDR_LENGTH),
    (PrefixAdvertisement, "communities"): {
        "maxItems": MAX_COMMUNITIES,
        "items": _check(_rule(f"!self.contains(':') || {_IS_COMMUNITY}", _COMMUNITY_OR_NAME), maxLength=_NAME_LENGTH),
    },
    (BGPPeerSpec, "peerIP"): _check(*_PEER, maxLength=64),
    (BGPPeerSpec, "asNumber"): _check(*_AS_NUMBER, minimum=0, maximum=4294967294),
    (BGPPeerSpec, "peerSelector"): _check(_SELECTOR, maxLength=_SELECTOR_LENGTH),
    (BGPPeerSpec, "node"): _check(_NAME_OR_NOTHING, maxLength=_NAME_LENGTH),
    (BGPPeerSpec, "nodeSelector"): _check(_SELECTOR, maxLength=_SELECTOR_LENGTH),
    (BGPPeerSpec, "numAllowedLocalASNumbers"): {"minimum": 0, "maximum": 10},
    (BGPPeerSpec, "maxRestartTime"): _check(*_DURATION, maxLength=64),
    (BGPPeerSpec, "holdTime"): {"minimum": 3, "maximum": 65535, "description": "Seconds."},
    (BGPPeerSpec, "maxPrefixes"): {
        "minimum": 1,
        "description": "Received prefixes, counted before filters, beyond which the peer is removed.",
    },
    (BGPPeerSpec, "importCIDRs"): {
        "maxItems": MAX_CIDRS,
        "x-kubernetes-list-type": "set",
        "items": _check(_CIDR, maxLength=_CIDR_LENGTH),
    },
    (BGPPeerSpec, "defaultRoute"): {"enum": ["Never", "Fallback"]},
    (BGPPeerSpec, "sourceAddress"): {"enum": ["", "UseNodeIP", "None"]},
    (BGPPeerSpec, "ttlSecurity"): {
        "minimum": 0,
        "maximum": 254,
        "description": "Hops to the peer at most (GTSM, RFC 5082); 0 is any number.",
    },
    (BGPPeerSpec, "reachableBy"): _check(
        _rule(
            "self == '' || (isIP(self) && ip.isCanonical(self))",
            "write the gateway's IPv4 or IPv6 address in its one spelling",
        ),
        _rule(
            "!isIP(self) || !(ip(self).isUnspecified() || ip(self).isLoopback() || "
            "['224.0.0.0/4', 'ff00::/8', 'fe80::/10'].exists(n, cidr(n).containsIP(self)))",
            "no gateway can have that address; for a link-local one write its global or private address",
        ),
        maxLength=64,
        description="The gateway on a link of ours through which peerIP is reached, where that is on none.",
    ),
    (BGPPeerSpec, "localASNumber"): _check(*_AS_NUMBER, minimum=1, maximum=4294967294),
    (SecretKeyRef, "name"): _check(_NAME, maxLength=_NAME_LENGTH),
    (SecretKeyRef, "key"): _check(
        _rule(
            "self.matches(r'^[A-Za-z0-9._-]+$') && self != '.' && self != '..'",
            "a key has letters, digits, '-', '_' and '.'",
        ),
        maxLength=253,
    ),
    (BGPPeerSpec, "filters"): {
        "maxItems": MAX_FILTERS,
        "x-kubernetes-list-type": "set",
        "items": _check(_NAME, maxLength=_NAME_LENGTH),
        "description": "BGPFilters by name: their rules hold one after the other, the first that matches decides.",
    },
    **{
        (BGPFilterSpec, name): {"maxItems": MAX_RULES, "description": text}
        for name, text in (
            ("exportV4", "For IPv4 prefixes that are announced to the peer."),
            ("importV4", "For IPv4 prefixes that the peer announces."),
            ("exportV6", "For IPv6 prefixes that are announced to the peer."),
            ("importV6", "For IPv6 prefixes that the peer announces."),
        )
    },
    **_filter_fields(FilterRuleV4, 4),
    **_filter_fields(FilterRuleV6, 6),
    (PrefixLength, "min"): {"minimum": 0, "maximum": 128},
    (PrefixLength, "max"): {"minimum": 0, "maximum": 128},
    (CommunityMatch, "values"): {"minItems": 1, "maxItems": 1, "items": _COMMUNITY},
    (AddCommunity, "value"): _COMMUNITY,
    (PrependASPath, "prefix"): {"minItems": 1, **_AS_NUMBERS},
}

#: Rules on a struct, where one field is measured by another.
STRUCTS: Mapping[type, Schema] = {
    IPPoolSpec: _check(*_POOL),
    BGPConfigurationSpec: _check(
        _rule(
            # No name has a colon.
            "!has(self.prefixAdvertisements) || self.prefixAdvertisements.all(p, !has(p.communities) || "
            "p.communities.all(c, c.contains(':') || "
            "(has(self.communities) && self.communities.exists(d, d.name == c))))",
            _COMMUNITY_OR_NAME,
            at=".prefixAdvertisements",
        )
    ),
    BGPPeerSpec: _check(*_WHO, _ONE_WAY, *_GATEWAY, *_PASSIVE),
    FilterRuleV4: _filter_rule(4),
    FilterRuleV6: _filter_rule(6),
    FilterOperation: _check(
        _rule(
            "has(self.addCommunity) != has(self.prependASPath)",
            "write one of addCommunity and prependASPath; for both, two operations",
        )
    ),
    IPAMBlockStatus: {"x-kubernetes-map-type": "atomic"},
    BGPNodeStatusStatus: {"x-kubernetes-map-type": "atomic"},
}

#: Rules on a whole object: those that look at its name, or at spec and status together.
OBJECTS: Mapping[type[Resource], Sequence[dict[str, str]]] = {
    IPAMBlock: _BLOCK,
    IPAMConfiguration: (
        _rule(
            "self.metadata.name == 'default'",
            "write default: one configuration holds for all nodes",
            at=".metadata.name",
        ),
    ),
    BGPConfiguration: (
        _rule(
            "self.metadata.name == 'default' || self.metadata.name.startsWith('node.')",
            "write default, for all nodes, or node.NAME for one of them; for the AS number of one node set "
            "the annotation underlay.network/as-number on it",
            at=".metadata.name",
        ),
        *(
            _rule(
                f"!self.metadata.name.startsWith('node.') || !has(self.spec) || !has(self.spec.{name}){asks}",
                "leave it out: it holds for all nodes and stands in default",
                at=f".spec.{name}",
            )
            for name, asks in (
                ("asNumber", " || self.spec.asNumber == 64512"),
                ("nodeToNodeMeshEnabled", " || self.spec.nodeToNodeMeshEnabled"),
                ("importCIDRs", " || self.spec.importCIDRs.size() == 0"),
                ("nodeMeshPassword", ""),
                ("ignoredInterfaces", " || self.spec.ignoredInterfaces.size() == 0"),
                ("nodeMeshMaxRestartTime", " || self.spec.nodeMeshMaxRestartTime == '120s'"),
            )
        ),
    ),
}
