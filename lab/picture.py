"""The lab as a picture for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from lab.wire import NodeState, RouterState, State

_GAP = "  "


def picture(state: State, *, width: int) -> str:
    """Spines above, each rack a box, as many boxes side by side as ``width`` columns hold; a mesh is one box. In a box
    a line runs down from each ToR, or from the switch, and every node hangs on each."""
    spines = [r for r in state.routers if not r.rack]
    cut = {frozenset((link.a, link.b)) for link in state.links if not link.up}
    boxes = [_rack(rack, state, cut) for rack in dict.fromkeys(r.rack for r in state.routers if r.rack)]
    boxes += [_box(name, [name], state.nodes, cut) for name in state.switches]
    across = max(len(box[0]) for box in boxes)
    each = max(1, (width + len(_GAP)) // (across + len(_GAP)))
    lines = [*_spines(spines, [across] * min(each, len(boxes)))] if spines else []
    for first in range(0, len(boxes), each):
        row = boxes[first : first + each]
        tall = max(len(box) for box in row)
        grown = [_grow(box, across, tall) for box in row]
        lines += [_GAP.join(parts).rstrip() for parts in zip(*grown, strict=True)]
    return "\n".join(lines)


def _spines(spines: Sequence[RouterState], widths: Sequence[int]) -> Iterator[str]:
    whole = sum(widths) + len(_GAP) * (len(widths) - 1)
    yield "   ".join(f"{s.name} (AS {s.asn})" for s in spines).center(whole).rstrip()
    middle = whole // 2
    drops, start = [], 0
    for w in widths:
        drops.append(start + w // 2)
        start += w + len(_GAP)
    low, high = min([*drops, middle]), max([*drops, middle])
    marks = []
    for column in range(high + 1):
        if column < low:
            marks.append(" ")
            continue
        left, right, up, down = column > low, column < high, column == middle, column in drops
        marks.append(_JOINTS[left, right, up, down])
    yield "".join(marks)


_JOINTS = {
    (left, right, up, down): mark
    for mark, (left, right, up, down) in {
        "─": (True, True, False, False),
        "┴": (True, True, True, False),
        "┬": (True, True, False, True),
        "┼": (True, True, True, True),
        "┌": (False, True, False, True),
        "┐": (True, False, False, True),
        "└": (False, True, True, False),
        "┘": (True, False, True, False),
        "├": (False, True, True, True),
        "┤": (True, False, True, True),
        "│": (False, False, True, True),
    }.items()
}


def _rack(rack: str, state: State, cut: AbstractSet[frozenset[str]]) -> list[str]:
    nodes = [node for node in state.nodes if node.rack == rack]
    tors = [router for router in state.routers if router.rack == rack]
    inside = {node.name for node in nodes}
    titles = []
    for tor in tors:
        lonely = any(tor.name in pair and not pair & inside for pair in cut)
        titles.append(f"{tor.name} (AS {tor.asn})" + (" ✂" if lonely else ""))
    return _box(f"{rack}: {'  '.join(titles)}", [tor.name for tor in tors], nodes, cut)


def _box(title: str, rails: Sequence[str], nodes: Sequence[NodeState], cut: AbstractSet[frozenset[str]]) -> list[str]:
    body = [line for node in nodes for line in _node(node, [frozenset((rail, node.name)) in cut for rail in rails])]
    inner = max([len(title) + 4, *(len(line) + 2 for line in body)])
    return [
        f"┌─ {title} {'─' * (inner - len(title) - 3)}┐",
        *(f"│ {line:<{inner - 2}} │" for line in body),
        f"└{'─' * inner}┘",
    ]


def _node(node: NodeState, cut: Sequence[bool]) -> Iterator[str]:
    yield f"{_branches(cut)} {node.name} (AS {node.asn})  {'  '.join(node.addresses)}"
    rails = " ".join("│" for _ in cut)
    for block in node.blocks:
        yield f"{rails}    block {block}"
    down = [name for name, process in node.processes.items() if process.state != "running"]
    if down:
        yield f"{rails}    down: {', '.join(down)}"
    margin = max((len(pod.name) for pod in node.pods), default=0)
    for pod in node.pods:
        yield f"{rails}      {pod.name:<{margin}}  {'  '.join(pod.addresses)}"


def _branches(cut: Sequence[bool]) -> str:
    """From each line a branch to the right, over the lines that stand there; none from one that is cut."""
    marks, joined = "", False
    for is_cut in cut:
        marks += ("─" if joined else " ") if marks else ""
        marks += "╳" if is_cut else "┼" if joined else "├"
        joined = joined or not is_cut
    return f"{marks}─"


def _grow(box: list[str], across: int, tall: int) -> list[str]:
    more = across - len(box[0])
    top, body, bottom = box[0], box[1:-1], box[-1]
    top = top[:-1] + "─" * more + top[-1]
    bottom = bottom[:-1] + "─" * more + bottom[-1]
    body = [line[:-1] + " " * more + line[-1] for line in body]
    empty = "│" + " " * (across - 2) + "│"
    return [top, *body, *([empty] * (tall - len(box))), bottom]
