"""Documentation that cannot rot: commands, options, numbers, paths and links in it are compared with the program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from cni import marks
from ctl.kinds import names_of
from ctl.main import cli as underlayctl
from lab.cli import main as underlay_lab
from lab.drill import DRILLS
from store.model import GROUP, KINDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS: dict[str, tuple[click.Command, str]] = {
    "underlayctl": (underlayctl, "docs/underlayctl.md"),
    "underlay-lab": (underlay_lab, "docs/lab.md"),
}
_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def leaves(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that call it."""
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from leaves(below, (*path, name))
    else:
        yield path, command


LEAVES = [(path, command) for name, (top, _) in PROGRAMS.items() for path, command in leaves(top, (name,))]


def sections(text: str) -> dict[str, str]:
    """Heading (second level) to what stands below it."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def section_of(path: tuple[str, ...], text: str) -> str | None:
    """What stands under the heading that has every word of the command."""
    for heading, body in sections(text).items():
        words = re.split(r"[^\w-]+", heading)
        if heading.startswith(path[0] + " ") and all(word in words for word in path):
            return body
    return None


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language and contents of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def command_lines(page: Path) -> list[str]:
    """Lines of fenced blocks that call us or make, without their comments."""
    lines = [line for _, block in code_blocks(page.read_text()) for line in block.splitlines()]
    ours = [line.partition(" #")[0].strip() for line in lines]
    return [line for line in ours if re.match(r"(underlayctl|underlay-lab|make)( (?!.*: )|$)", line)]


def parse(line: str) -> None:
    """Parses a command line as the program would, without running it. Raises AssertionError, click.ClickException."""
    program, *words = shlex.split(re.split(r" [|>] ", line)[0])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words, "make without a goal"
        for word in words:
            assert word in targets or re.match(r"[A-Z]+=", word), f"no goal {word}"
        return
    command: click.Command = PROGRAMS[program][0]
    while isinstance(command, click.Group):
        assert words, f"{program}: a command is missing"
        name = words.pop(0)
        below = command.commands.get(name)
        assert below is not None, f"there is no {name}"
        command = below
    if words not in (["--help"], ["-h"]):
        command.make_context(command.name, words)


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_every_command_and_option_is_in_the_docs(path: tuple[str, ...], command: click.Command) -> None:
    page = PROGRAMS[path[0]][1]
    section = section_of(path, (ROOT / page).read_text())
    assert section is not None, f"{page} has no section for {' '.join(path)}"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in parameter.opts:
                assert f"`{option}`" in section, f"{page}, {' '.join(path)}: {option} is not said"


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_option_is_in_the_docs_that_is_not_there(name: str) -> None:
    page = PROGRAMS[name][1]
    for heading, body in sections((ROOT / page).read_text()).items():
        if not heading.startswith(name + " "):
            continue
        commands = [command for path, command in LEAVES if path[0] == name and _is_about(heading, path)]
        assert commands, f"{page}: {heading}: there is no such command"
        known = {o for c in commands for p in c.params if isinstance(p, click.Option) for o in p.opts}
        told = set(re.findall(r"^\| .*?`(-[-\w]+)`", body, flags=re.MULTILINE))
        assert told <= known, f"{page}: {heading}: {told - known}"


def _is_about(heading: str, path: tuple[str, ...]) -> bool:
    words = re.split(r"[^\w-]+", heading)
    return all(word in words for word in path)


def test_every_word_for_a_kind_is_in_the_docs() -> None:
    text = (ROOT / "docs/underlayctl.md").read_text()
    for kind in KINDS:
        for word in names_of(kind):
            assert f"`{word}`" in text, f"{kind.kind()}: {word}"


@_page
def test_every_command_line_in_a_code_block_parses(page: Path) -> None:
    for line in command_lines(page):
        try:
            parse(line)
        except (click.ClickException, AssertionError) as e:
            message = e.format_message() if isinstance(e, click.ClickException) else str(e)
            pytest.fail(f"{page.relative_to(ROOT)}: {line}: {message}")


def test_command_lines_are_found_and_wrong_ones_refused() -> None:
    """The check above is able to fail."""
    found = [line for page in PAGES for line in command_lines(page)]
    for program in ("underlayctl", "underlay-lab", "make"):
        assert sum(line.startswith(program) for line in found) >= 3
    for wrong in ("underlayctl got x", "underlayctl get x --colour", "underlay-lab kill node-1 init", "make tea"):
        with pytest.raises((click.ClickException, AssertionError)):
            parse(wrong)


def _number_rows() -> dict[str, str]:
    rows = re.findall(
        r"^\| [^|]* \| ([^|]*) \| `([A-Z0-9_]+)` \|", (ROOT / "docs/numbers.md").read_text(), re.MULTILINE
    )
    return {name: value.strip() for value, name in rows}


@pytest.mark.parametrize("name", [n for n in vars(marks) if n.isupper()])
def test_numbers_are_those_of_the_code(name: str) -> None:
    value = getattr(marks, name)
    said = _number_rows().get(name)
    assert said is not None, f"docs/numbers.md does not say {name}"
    assert (int(said, 0) if isinstance(value, int) else said) == value


def test_every_number_in_the_docs_is_in_the_code() -> None:
    assert set(_number_rows()) == {n for n in vars(marks) if n.isupper()}


@pytest.mark.parametrize("name", ["PROTO_PODS", "PROTO_BLOCKS", "PROTO_IMPORTS"])
def test_protocols_in_command_lines_of_the_docs_are_ours(name: str) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    said = {int(n) for n in re.findall(r"\bproto(?:col)? (\d+)", text)}
    assert getattr(marks, name) in said
    assert said <= {marks.PROTO_PODS, marks.PROTO_BLOCKS, marks.PROTO_IMPORTS}


@_page
def test_every_file_of_ours_that_is_named_exists(page: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])((?:agent|bench|cni|ctl|docs|ipam|lab|manifests|store|tests)/[\w./-]*\w/?)", page.read_text()
    )
    for name in named:
        assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name} does not exist"


@_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, f"{page.relative_to(ROOT)}: {target}: headings are {sorted(anchors)}"


def test_yaml_in_the_docs_is_taken_as_it_is() -> None:
    from store.files import load

    seen = 0
    for page in PAGES:
        for language, block in code_blocks(page.read_text()):
            # A file with a name is for a page that is run, where whatever reads it is what tests it.
            if language == "yaml" and not block.startswith("# "):
                assert load(block, source=str(page))
                seen += 1
    assert seen >= 3


def test_fields_of_the_kinds_are_in_the_docs() -> None:
    """Each field of a spec that people write is in its page's table, and no other."""
    import msgspec

    from store.model import BGPConfigurationSpec, BGPFilterSpec, BGPPeerSpec, FilterOperation, FilterRuleV4, IPPoolSpec

    bgp = (BGPConfigurationSpec, BGPPeerSpec, BGPFilterSpec, FilterRuleV4, FilterOperation)
    for spec, page in ((IPPoolSpec, "addresses"), *((spec, "bgp") for spec in bgp)):
        text = (ROOT / f"docs/{page}.md").read_text()
        for field in msgspec.structs.fields(spec):
            assert f"`{field.encode_name}" in text, (
                f"docs/{page}.md does not say {field.encode_name} of {spec.__name__}"
            )


def test_every_condition_is_in_the_docs() -> None:
    """Types are written where they are raised, in one of these ways."""
    code = "".join(path.read_text() for package in ("agent", "ipam") for path in (ROOT / package).rglob("*.py"))
    types = set(re.findall(r'(?:notes\.add\(|(?<!un)say\(|type=)\s*"([A-Z][A-Za-z]+)"', code))
    types |= set(re.findall(r'(?:\bkind = |return \(?)\s*"([A-Z][a-z]+[A-Z][A-Za-z]+)"', code))
    assert {"NextHopNotOnLink", "KernelRefused", "KernelUnavailable", "MaxPrefixesExceeded", "SweepStopped"} <= types
    assert _told_at_three_in_the_morning("Conditions") == types


def test_every_event_is_in_the_docs() -> None:
    """Those that are no conditions."""
    code = "".join(path.read_text() for package in ("ipam", "cni") for path in (ROOT / package).glob("*.py"))
    reasons = set(re.findall(r'News\(\s*"([A-Z][A-Za-z]+)"', code))
    assert {"NoAddress", "SourceCheckMissing"} <= reasons
    assert _told_at_three_in_the_morning("Events") == reasons


def _told_at_three_in_the_morning(section: str) -> set[str]:
    body = sections((ROOT / "docs/troubleshooting.md").read_text())[section]
    return set(re.findall(r"^\| `([A-Z][A-Za-z]+)` \|", body, re.MULTILINE))


def metrics_of(package: str) -> set[str]:
    """Their names, with those that both processes have."""
    files = (ROOT / package / "metrics.py", ROOT / "cni/prometheus.py")
    return {name for file in files for name in re.findall(r'"((?:underlay|process)_[a-z_]+)"', file.read_text())}


def test_every_metric_and_option_of_the_cni_server_is_in_the_docs() -> None:
    text = (ROOT / "docs/cni.md").read_text()
    names = metrics_of("cni")
    assert "underlay_ipam_condition" in names
    assert set(re.findall(r"`((?:underlay|process)_[a-z_]+)`", text)) == names
    options = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (ROOT / "cni/daemon.py").read_text()))
    assert "--metrics" in options
    for option in options:
        assert f"| `{option}` |" in text


def test_every_metric_and_option_of_the_agent_is_in_the_docs() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    names = metrics_of("agent")
    names |= {f"underlay_agent_kernel_{name}_total" for name in ("operations", "failures")}
    assert "underlay_bgp_session_up" in names
    table = sections(text)["The agent's metrics"]
    assert set(re.findall(r"`((?:underlay|process)_[a-z_]+)`", table)) == names
    numbers = (ROOT / "docs/numbers.md").read_text()
    flags = set(re.findall(r'^        \("([a-z]+)", ', (ROOT / "agent/config.py").read_text(), re.MULTILINE))
    assert "metrics" in flags
    for flag in flags:
        assert f"| `UNDERLAY_{flag.upper()}` |" in numbers, f"docs/numbers.md does not say --{flag}"


def test_alerts_in_the_docs_are_rules_about_metrics_that_there_are() -> None:
    told = {
        n
        for page in ("cni", "metrics")
        for n in re.findall(r"`(underlay_[a-z_]+)`", (ROOT / f"docs/{page}.md").read_text())
    }
    ((_, block),) = [b for b in code_blocks((ROOT / "docs/metrics.md").read_text()) if "alert:" in b[1]]
    rules = yaml.safe_load(block)["groups"][0]["rules"]
    assert len(rules) >= 3
    for rule in rules:
        asked = set(re.findall(r"underlay_[a-z_]+", rule["expr"]))
        assert asked
        assert asked <= told, rule["alert"]
        assert rule["annotations"]["summary"]


def test_every_finding_is_in_the_docs() -> None:
    from ctl.finding import KINDS as FINDINGS

    body = sections((ROOT / "docs/addresses.md").read_text())["Findings"]
    told = [w for row in re.findall(r"^\| (`.*?) \|", body, re.MULTILINE) for w in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(FINDINGS)


def test_the_form_of_a_report_is_in_the_docs() -> None:
    import msgspec

    from ctl.finding import Finding
    from ctl.report import VERSION, Report

    text = sections((ROOT / "docs/underlayctl.md").read_text())["underlayctl ipam check"]
    for name in (*Report.__struct_fields__, *(f.encode_name for f in msgspec.structs.fields(Finding)), VERSION):
        assert f"`{name}`" in text


def test_every_figure_of_the_bench_is_in_the_docs() -> None:
    text = (ROOT / "docs/bench.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "bench").glob("*.py"))
    named = r"(?:cni|ctl|ipam|lab|memory|ptp|scale|spawn)\.(?:[a-z0-9_.]|\{name\}|\{size\})+"
    figures = {re.sub(r"\{name\}|nodes\{size\}", "nodesN", f) for f in re.findall(rf'f?"({named})"[:\]]', code)}
    assert {"cni.add.p50.vs_ptp", "scale.nodesN.seconds", "scale.nodesN.duplicates"} <= figures
    for figure in figures:
        assert f"`{figure}`" in text


KUBERNETES = ROOT / "docs/kubernetes.md"


def _manifest(name: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((ROOT / "manifests" / name).read_text()) if d]


def _rows(heading: str, text: str = "") -> list[list[str]]:
    """The cells of each row below a heading of the page, without the table's own heading."""
    body = sections(text or KUBERNETES.read_text())[heading]
    rows = [re.split(r" \| ", line.strip("| ")) for line in body.splitlines() if line.startswith("| ")]
    return rows[1:]


def _words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _manifests_unsaid(text: str) -> set[str]:
    """What the page's table leaves out of what an operator applies, or names and is not there."""
    named = set(re.findall(r"^\| `(manifests/[\w./-]+)` \|", text, re.MULTILINE))
    ours = {"manifests/crds", *(f"manifests/{path.name}" for path in (ROOT / "manifests").glob("*.yaml"))}
    return named ^ ours


def test_what_an_operator_applies_is_in_the_docs() -> None:
    text = KUBERNETES.read_text()
    assert _manifests_unsaid(text) == set()
    assert _manifests_unsaid(text.replace("| `manifests/rbac.yaml` |", "")) == {"manifests/rbac.yaml"}
    applied = yaml.safe_load((ROOT / "manifests/kustomization.yaml").read_text())["resources"]
    ours = {
        "manifests/kustomization.yaml",
        "manifests/underlay.yaml",
        "manifests/uninstall.yaml",
        "manifests/crds",
        *(f"manifests/{p.partition('/')[0]}" for p in applied),
    }
    assert _manifests_unsaid("".join(f"| `{file}` |\n" for file in ours)) == set()
    assert {p for p in applied if p.startswith("crds/")} == {
        f"crds/{kind.PLURAL}.yaml" for kind in KINDS if kind.API == GROUP
    }
    for kind in KINDS:
        crd = ROOT / f"manifests/crds/{kind.PLURAL}.yaml"
        assert crd.exists() == (kind.API == GROUP)


def _rights_said(text: str) -> set[tuple[str, str, str]]:
    return {
        (role, resource, verb)
        for roles, verbs, resources, _ in _rows("Rights", text)
        for role in _words(roles)
        for resource in _words(resources)
        for verb in verbs.split(", ")
    }


def test_every_right_is_in_the_docs() -> None:
    """Role, resource and verb, each with a reason, and none that is not given."""
    given = {
        (role["metadata"]["name"], resource, verb)
        for role in _manifest("rbac.yaml")
        if role["kind"] in ("ClusterRole", "Role")
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    text = KUBERNETES.read_text()
    assert _rights_said(text) == given
    assert given - _rights_said(text.replace(", delete | `ipamblocks`", " | `ipamblocks`")) == {
        ("underlay-cni", "ipamblocks", "delete")
    }


def test_every_policy_is_in_the_docs_with_what_it_says() -> None:
    policies = {
        document["metadata"]["name"]: yaml.safe_dump(document["spec"]["validations"], width=10_000)
        for document in _manifest("policies.yaml")
        if document["kind"] == "ValidatingAdmissionPolicy"
    }
    said = {_words(row[0])[0]: re.findall(r'"([^"]+)"', row[-1]) for row in _rows("What the policies refuse")}
    assert said.keys() == policies.keys()
    for name, sentences in said.items():
        # A sentence is put together of pieces in CEL: 'one ' + 'sentence'.
        whole = re.sub(r"'+ \+ '+", "", policies[name])
        assert sentences
        for sentence in sentences:
            assert sentence in whole, f"{name} does not say {sentence!r}"


def test_every_drill_is_in_the_docs() -> None:
    text = (ROOT / "docs/drills.md").read_text().partition("\n## ")[0]
    rows = re.findall(r"^\| `([-a-z]+)` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    told = {name: (sentence, loses == "nothing") for name, sentence, loses in rows}
    assert told == {drill.name: (drill.sentence, drill.planned) for drill in DRILLS}
