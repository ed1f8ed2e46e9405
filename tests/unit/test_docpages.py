"""What makes a page of ``docs/`` a test (``tests/cluster/docpages.py``), and that no page with commands escapes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.docpages import NOT_RUN, Commands, File, PageError, chains, missing, pages, read

ON = "<!-- runs on: underlay-lab up --cluster --bare -->\n"
PAGE = f"""{ON}
# A page

```sh
export A=1
```

```yaml
# pools.yaml
kind: IPPool
```

```sh tor-1
birdc show route
```

```output
... via
```

```text
make tea
```
"""


def _tree(root: Path, **texts: str) -> Path:
    (root / "docs").mkdir()
    for name, text in texts.items():
        (root / "docs" / f"{name}.md").write_text(text)
    return root


def test_a_page_is_its_commands_and_files_in_order() -> None:
    page = read("docs/a.md", PAGE)
    assert page is not None
    assert (page.on, page.after) == ("--cluster --bare", "")
    assert page.steps == (
        Commands(member="", text="export A=1\n", line=6, shown=()),
        File(name="pools.yaml", text="# pools.yaml\nkind: IPPool\n"),
        Commands(member="tor-1", text="birdc show route\n", line=15, shown=("... via",)),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PAGE.removeprefix(ON), "its first line is to say"),
        (f"{ON}\n```output\nx\n```\n```sh\nx\n```\n", "below one of sh"),
        (f"{ON}\n# Nothing\n", "has no block sh"),
        (PAGE.replace("--cluster --bare", "--mesh"), "underlay-lab up --cluster ..."),
    ],
)
def test_a_page_that_does_not_keep_the_convention_is_named(text: str, said: str) -> None:
    with pytest.raises(PageError, match=said):
        read("docs/a.md", text)


def test_pages_run_after_each_other_on_one_cluster(tmp_path: Path) -> None:
    after = PAGE.replace(ON, "<!-- runs after: docs/{}.md -->\n")
    root = _tree(tmp_path, a=after.format("c"), b=PAGE, c=after.format("b"), d=PAGE, e="# No commands\n")
    ordered = pages(root)
    assert [page.name for page in ordered] == ["docs/b.md", "docs/c.md", "docs/a.md", "docs/d.md"]
    assert [[p.name for p in before] for _, before in chains(ordered)] == [
        [],
        ["docs/b.md"],
        ["docs/b.md", "docs/c.md"],
        [],
    ]


@pytest.mark.parametrize(
    ("places", "said"),
    [({"a": "b"}, "which is not run"), ({"a": "b", "b": "a"}, "after each other"), ({"b": "a", "c": "a"}, "both run")],
)
def test_pages_that_have_no_order_are_named(tmp_path: Path, places: dict[str, str], said: str) -> None:
    texts = {name: PAGE.replace(ON, f"<!-- runs after: docs/{after}.md -->\n") for name, after in places.items()}
    texts |= {"a": PAGE} if "a" not in texts else {}
    with pytest.raises(PageError, match=said):
        pages(_tree(tmp_path, **texts))


def test_what_a_page_shows_is_looked_for_in_order() -> None:
    printed = "NAME   READY\nweb-1  1/1\nweb-2  1/1\n"
    assert missing(("NAME READY", "...", "web-... 1/1", "web-2 ..."), printed) == ""
    assert missing(("web-2 1/1", "web-1 1/1"), printed) == "web-1 1/1"
    assert missing(("web-1",), printed) == "web-1"


def test_every_page_with_commands_is_run_or_says_why_not() -> None:
    """``pages`` refuses one that does neither."""
    ran = {page.name for page in pages()}
    assert "docs/install.md" in ran
    assert not ran & NOT_RUN.keys()
