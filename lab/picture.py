"""The lab as a picture for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lab.wire import NodeState, RouterState, State

_GAP = "  "


def picture(state: State, *, width: int) -> str:
    """Spines above, each rack a box, as many boxes side by side as ``width`` columns hold."""
    spines = [r for r in state.routers if not r.rack]
    tors = [r for r in state.routers if r.rack]
    boxes = [_box(tor, [n for n in state.nodes if n.rack == tor.rack], state) for tor in tors]
    across = max(len(box[0]) for box in boxes)
    each = max(1, (width + len(_GAP)) // (across + len(_GAP)))
    lines = [*_spines(spines, [across] * min(each, len(boxes)))]
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


def _box(tor: RouterState, nodes: Sequence[NodeState], state: State) -> list[str]:
    cut = {frozenset((link.a, link.b)) for link in state.links if not link.up}
    body = [line for node in nodes for line in _node(node, frozenset((tor.name, node.name)) in cut)]
    uplink_cut = any(tor.name in pair and not pair & {n.name for n in nodes} for pair in cut)
    title = f" {tor.rack}: {tor.name} (AS {tor.asn}) " + ("✂ " if uplink_cut else "")
    inner = max([len(title) + 2, *(len(line) + 2 for line in body)])
    return [
        f"┌─{title}{'─' * (inner - len(title) - 1)}┐",
        *(f"│ {line:<{inner - 2}} │" for line in body),
        f"└{'─' * inner}┘",
    ]


def _node(node: NodeState, cut: bool) -> Iterator[str]:
    yield f"{'╳' if cut else '├'}─ {node.name} (AS {node.asn})  {'  '.join(node.addresses)}"
    for block in node.blocks:
        yield f"│    block {block}"
    down = [name for name, process in node.processes.items() if process.state != "running"]
    if down:
        yield f"│    down: {', '.join(down)}"
    margin = max((len(pod.name) for pod in node.pods), default=0)
    for pod in node.pods:
        yield f"│      {pod.name:<{margin}}  {'  '.join(pod.addresses)}"


def _grow(box: list[str], across: int, tall: int) -> list[str]:
    more = across - len(box[0])
    top, body, bottom = box[0], box[1:-1], box[-1]
    top = top[:-1] + "─" * more + top[-1]
    bottom = bottom[:-1] + "─" * more + bottom[-1]
    body = [line[:-1] + " " * more + line[-1] for line in body]
    empty = "│" + " " * (across - 2) + "│"
    return [top, *body, *([empty] * (tall - len(box))), bottom]
