"""What cni/spec.py says of the specification's words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from cni import spec
from cni.spec import Address, Call, Config, Interface, Refusal, parse, version_of

ENV = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/run/netns/a",
    "CNI_IFNAME": "eth0",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_UID=u1;Other=1",
    "CNI_PATH": "/opt/cni/bin",
}
CONF = {"cniVersion": "1.1.0", "name": "underlay", "type": "underlay"}


def conf(**more: Any) -> bytes:
    return json.dumps({**CONF, **more}).encode()


def refusal(environment: dict[str, str], text: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse(environment, text)
    return caught.value


def test_a_call_as_a_runtime_makes_it() -> None:
    text = conf(mtu=1400, unknown={"a": [1]}, capabilities={"x": True}, prevResult={"ips": []})
    call = parse(ENV, text)
    assert call == Call(
        "ADD",
        Config(version="1.1.0", name="underlay", type="underlay", mtu=1400, previous={"ips": []}),
        "c1",
        "eth0",
        "/run/netns/a",
        "ns/pod",
        "u1",
    )


@pytest.mark.parametrize(
    ("text", "asked"),
    [("12500000000", 12.5), ("0", 0.0), ("", None), ("-1", None), ("1e9", None), ("\u0661", None), ("9" * 20, None)],
)
def test_when_it_was_asked_is_what_the_shim_says_or_unknown(text: str, asked: float | None) -> None:
    assert parse({**ENV, "UNDERLAY_ASKED": text}, conf()).asked == asked
    assert parse(ENV, conf()).asked is None


def wanted(arguments: str = "", **runtime: Any) -> tuple[tuple[str, ...], str]:
    call = parse({**ENV, "CNI_ARGS": arguments}, conf(runtimeConfig=runtime))
    return call.addresses, call.mac


def test_addresses_and_mac_come_from_the_arguments_or_the_runtimes_capabilities_which_win() -> None:
    ips, mac = ["10.244.0.7/24", "FD00::07"], "02:AA:00:00:00:07"
    assert wanted() == ((), "")
    assert wanted("IP=;MAC=", ips=[], mac="") == ((), "")
    assert wanted("IP=;MAC=", ips=None, mac=None) == ((), "")
    assert wanted(f"MAC={mac};IP={','.join(ips)}") == (("10.244.0.7", "fd00::7"), mac.lower())
    assert wanted("MAC=02:00:00:00:00:08;IP=10.0.0.1", ips=ips, mac=mac) == (("10.244.0.7", "fd00::7"), mac.lower())
    assert wanted("MAC=02:00:00:00:00:08", ips=ips) == (("10.244.0.7", "fd00::7"), "02:00:00:00:00:08")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("mac", "01:00:5e:00:00:01", "unicast"),
        ("mac", "ff:ff:ff:ff:ff:ff", "unicast"),
        ("mac", "00:00:00:00:00:00", "unicast"),
        ("mac", "ee:ee:ee:ee:ee:ee", "gateway"),
        ("mac", "02:00:00:00:00", "six bytes"),
        ("mac", "02:00:00:00:00:0g", "six bytes"),
        ("mac", "02:00:00:00:00:07\n", "six bytes"),
        ("mac", "020000000007", "six bytes"),
        ("ips", "10.244.0.300", "no IP address"),
        ("ips", "fe80::1%eth0", "no IP address"),
        ("ips", "10.244.0.7,10.244.0.8", "second IPv4"),
        ("ips", "fd00::1,fd00::2", "second IPv6"),
    ],
)
def test_a_wrong_address_or_mac_is_refused_where_it_stands(key: str, value: str, word: str) -> None:
    given: Any = value.split(",") if key == "ips" else value
    found = refusal(ENV, conf(runtimeConfig={key: given}))
    assert found.code == 7
    assert f"runtimeConfig.{key}" in found.details
    assert word in found.details
    name = {"ips": "IP", "mac": "MAC"}[key]
    arguments = {"CNI_ARGS": f"{name}={value};IgnoreUnknown=1"}
    found = refusal({**ENV, **arguments}, conf())
    assert found.code == 4
    assert f"CNI_ARGS: {name}: " in found.details
    assert word in found.details
    assert parse({**ENV, **arguments, "CNI_COMMAND": "DEL"}, conf(runtimeConfig={key: 7})).command == "DEL"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b'{"name": "\xff"}', b"[" * 200_000, b'{"name": 7', b"[1", b'{"a":' * 200_000]
)
def test_what_is_not_json_is_code_6(text: bytes) -> None:
    assert refusal(ENV, text).code == 6


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"mtu": "big"}, "mtu"),
        ({"mtu": -1}, "mtu"),
        ({"mtu": 67}, "mtu"),
        ({"mtu": 65536}, "mtu"),
        ({"mtu": 1.5}, "mtu"),
        ({"mtu": None}, "mtu"),
        ({"name": 7}, "name"),
        ({"name": ""}, "name"),
        ({"name": "-a"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"dns": []}, "dns"),
        ({"prevResult": "x"}, "prevResult"),
        ({"runtimeConfig": {"ips": "10.244.0.7"}}, "runtimeConfig.ips"),
        ({"runtimeConfig": {"mac": 7}}, "runtimeConfig.mac"),
        ({"cniVersion": 1}, "cniVersion"),
        ({"cni.dev/valid-attachments": [{"containerID": 1}]}, "cni.dev/valid-attachments[0].containerID"),
    ],
)
def test_a_wrong_key_is_code_7_and_named(change: dict[str, Any], key: str) -> None:
    found = refusal(ENV, conf(**change))
    assert found.code == 7
    assert found.details.startswith(key)


@pytest.mark.parametrize("text", [b"[]", b"null", b"7", b'"x"'])
def test_json_that_is_no_object_is_code_7(text: bytes) -> None:
    assert refusal(ENV, text).code == 7


@pytest.mark.parametrize("version", ["", "0.1.0", "0.2.0", "0.3.0", "1.2.0", "latest"])
def test_a_version_that_we_do_not_speak_is_code_1(version: str) -> None:
    found = refusal(ENV, conf(cniVersion=version))
    assert found.code == 1
    assert "1.1.0" in found.details


def test_without_a_version_it_is_the_first_one() -> None:
    assert "'0.1.0'" in refusal(ENV, b'{"name": "underlay", "type": "underlay"}').details


@pytest.mark.parametrize(
    ("verb", "first"), [("ADD", "0.3.1"), ("DEL", "0.3.1"), ("CHECK", "0.4.0"), ("STATUS", "1.1.0"), ("GC", "1.1.0")]
)
def test_a_verb_came_with_a_version(verb: str, first: str) -> None:
    for version in spec.VERSIONS:
        text = conf(cniVersion=version, **{"cni.dev/valid-attachments": []})
        if version >= first:
            assert parse({**ENV, "CNI_COMMAND": verb}, text).command == verb
        else:
            assert refusal({**ENV, "CNI_COMMAND": verb}, text).code == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CNI_COMMAND", ""),
        ("CNI_COMMAND", "add"),
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "-a"),
        ("CNI_CONTAINERID", "a/../b"),
        ("CNI_CONTAINERID", "a\n"),
        ("CNI_CONTAINERID", "é"),
        ("CNI_CONTAINERID", "x" * 256),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "."),
        ("CNI_IFNAME", ".."),
        ("CNI_IFNAME", "x" * 16),
        ("CNI_IFNAME", "é" * 8),
        ("CNI_IFNAME", "a:b"),
        ("CNI_IFNAME", "a b"),
        ("CNI_IFNAME", "a\x00"),
        ("CNI_NETNS", ""),
        ("CNI_ARGS", "K8S_POD_NAME"),
        ("CNI_ARGS", "=x"),
        ("CNI_ARGS", "Other=1"),
        ("CNI_ARGS", "Other=1;IgnoreUnknown=0"),
    ],
)
def test_a_wrong_variable_is_code_4_and_named(variable: str, value: str) -> None:
    found = refusal({**ENV, variable: value}, conf())
    assert found.code == 4
    assert variable in found.text
    assert variable in found.details


@pytest.mark.parametrize("interface", ["eth0", "x" * 15, "net1@a", "é" * 7])
def test_names_that_the_kernel_takes(interface: str) -> None:
    assert parse({**ENV, "CNI_IFNAME": interface}, conf()).interface == interface


@given(st.permutations(["IgnoreUnknown=true", "K8S_POD_NAME=p", "K8S_POD_NAMESPACE=n", "IP=1.2.3.4", "", "A=b=c"]))
def test_arguments_in_any_order(pairs: list[str]) -> None:
    assert parse({**ENV, "CNI_ARGS": ";".join(pairs)}, conf()).pod == "n/p"


def test_del_is_read_leniently() -> None:
    environment = {**ENV, "CNI_COMMAND": "DEL", "CNI_ARGS": "garbage", "CNI_NETNS": ""}
    call = parse(environment, conf(mtu="big", prevResult=7, dns=[]))
    assert (call.container, call.interface, call.netns) == ("c1", "eth0", "")


def test_absent_null_and_empty_lists_of_valid_attachments_differ() -> None:
    gc = {"CNI_COMMAND": "GC"}
    assert parse(gc, conf()).config.valid is UNSET
    assert parse(gc, conf(**{"cni.dev/valid-attachments": None})).config.valid is None
    assert parse(gc, conf(**{"cni.dev/valid-attachments": []})).config.valid == ()
    entry = {"containerID": "c1", "ifname": "eth0", "extra": 1}
    (found,) = parse(gc, conf(**{"cni.dev/valid-attachments": [entry]})).config.valid or ()  # type: ignore[misc]
    assert (found.container, found.interface) == ("c1", "eth0")


# -- results -------------------------------------------------------------------------------------------------------

ENDS = Interface("ul1", "ee:ee:ee:ee:ee:ee", 1500), Interface("eth0", "02:00:00:00:00:01", 1500, "/run/netns/a")
ADDRESSES = Address("10.0.0.1/32", "169.254.1.1"), Address("fd00::1/128", "fe80::1")


def result(version: str, **more: Any) -> dict[str, Any]:
    call = parse(ENV, conf(cniVersion=version, **more))
    found: dict[str, Any] = json.loads(spec.result(call.config, *ENDS, ADDRESSES))
    return found


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_results_by_version(version: str) -> None:
    old, newest = version < "1", version == "1.1.0"
    mtu = {"mtu": 1500} if newest else {}
    family4, family6 = ({"version": "4"}, {"version": "6"}) if old else ({}, {})
    assert result(version, dns={"nameservers": ["10.0.0.53"]}) == {
        "cniVersion": version,
        "interfaces": [
            {"name": "ul1", "mac": "ee:ee:ee:ee:ee:ee", **mtu},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/a", **mtu},
        ],
        "ips": [
            {"address": "10.0.0.1/32", "gateway": "169.254.1.1", "interface": 1, **family4},
            {"address": "fd00::1/128", "gateway": "fe80::1", "interface": 1, **family6},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
        "dns": {"nameservers": ["10.0.0.53"]},
    }


def test_the_result_of_a_plugin_before_us_is_kept() -> None:
    before = {
        "interfaces": [{"name": "a"}, {"name": "b", "sandbox": "/x"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 1}],
        "dns": {"domain": "x"},
    }
    found = result("1.0.0", prevResult=before)
    assert [i["name"] for i in found["interfaces"]] == ["a", "b", "ul1", "eth0"]
    assert [ip["interface"] for ip in found["ips"]] == [1, 3, 3]
    assert found["dns"] == {"domain": "x"}


@pytest.mark.parametrize("version", spec.VERSIONS[1:])
def test_check_finds_its_part_of_the_result(version: str) -> None:
    previous = result(version)
    previous["interfaces"].append({"name": "later", "sandbox": "/x"})
    previous["ips"].append({"address": "192.0.2.1/32", "interface": 2})
    previous["routes"] = [{"dst": "::/0", "gw": "fe80::1"}]
    call = parse({**ENV, "CNI_COMMAND": "CHECK"}, conf(cniVersion=version, prevResult=previous))
    found = spec.expected(call.config, "eth0")
    assert found.node_end == "ul1"
    assert found.mac == "02:00:00:00:00:01"
    assert found.addresses == ("10.0.0.1/32", "fd00::1/128")
    assert found.gateways == ("fe80::1",)


@pytest.mark.parametrize(
    "previous",
    [None, {}, {"interfaces": 7}, {"interfaces": [7]}, {"interfaces": [{"name": "eth0", "sandbox": "/x"}]}]
    + [{"interfaces": [{"name": "a"}, {"name": "eth0", "sandbox": "/x"}], "ips": ips} for ips in ([], {}, [1], [{}])],
)
def test_check_with_a_wrong_result_is_code_7(previous: Any) -> None:
    call = parse({**ENV, "CNI_COMMAND": "CHECK"}, conf(prevResult=previous))
    with pytest.raises(Refusal) as caught:
        spec.expected(call.config, "eth0")
    assert caught.value.code == 7
    assert "prevResult" in caught.value.details


def test_an_error_has_version_code_and_words() -> None:
    assert json.loads(spec.error("0.4.0", Refusal(11, "try again", "a 'b' \ud800"[:-1]))) == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "try again",
        "details": "a 'b' ",
    }
    assert "details" not in json.loads(spec.error("1.1.0", Refusal(11, "try again")))


@pytest.mark.parametrize(
    ("text", "version"),
    [(b"", "1.1.0"), (b"{", "1.1.0"), (conf(cniVersion="0.4.0"), "0.4.0"), (conf(cniVersion="7"), "1.1.0")],
)
def test_the_version_of_an_error(text: bytes, version: str) -> None:
    assert version_of(text) == version


# -- garbage -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = ["cniVersion", "name", "type", "mtu", "dns", "prevResult", "cni.dev/valid-attachments"]
TEXTS = st.binary() | JSON.map(json.dumps).map(str.encode)
CONFS = st.dictionaries(st.sampled_from(KEYS), JSON).map(lambda more: conf(**more)) | TEXTS
ENVS = st.dictionaries(st.sampled_from(list(ENV)), st.text()).map(lambda more: {**ENV, **more})


@given(st.sampled_from(spec.COMMANDS), ENVS, CONFS)
def test_garbage_gives_a_call_or_a_refusal_that_can_be_written(verb: str, env: dict[str, str], text: bytes) -> None:
    try:
        call = parse({**env, "CNI_COMMAND": verb}, text)
        spec.expected(call.config, call.interface)
    except Refusal as e:
        body = json.loads(spec.error(version_of(text), e))
        assert body["code"] in (1, 4, 6, 7)
        assert body["msg"]
    else:
        assert call.config.version in spec.VERSIONS


@given(st.dictionaries(st.sampled_from(["interfaces", "ips", "routes", "dns"]), JSON))
def test_garbage_in_prevresult(previous: dict[str, Any]) -> None:
    call = parse(ENV, conf(prevResult=previous))
    for read in (lambda: spec.expected(call.config, "eth0"), lambda: spec.result(call.config, *ENDS, ADDRESSES)):
        try:
            read()
        except Refusal as e:
            assert e.code == 7
