"""A plan as one HTML page: which part of the graph lives in which basis, and what moves it there.

Every row is a node that takes part, in the order of the graph. A coloured rail is a rotation: it begins where weights
write rotated features and ends where the last weights read them. Blocks of rows that repeat are shown once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.prepare import prepare
from onnx_quarot.plan import Plan

_COLOURED = ("R1", "R2", "R3", "R4")
_PLACES = {"R1": "residual stream", "R2": "attention values", "R3": "queries and keys", "R4": "inputs of layers"}
_NAMES = re.compile(r" '[^']*'")  # of nodes, which would make every reason one of its own
_STEP, _HEIGHT = 14, 30  # of a rail and of a row, in pixels
_LONGEST_PERIOD = 400  # rows of a repeated block
_LONGEST = 34  # characters of an operator or of sizes that are shown whole


@dataclass
class _Row:
    """One line: a node, or an online transform in front of one."""

    op: str
    name: str
    detail: str = ""
    reads: list[tuple[str, bool]] = field(default_factory=list)  # rotation, online
    writes: list[str] = field(default_factory=list)
    selects: bool = False  # whole matrices, and what is written is their basis
    notes: list[str] = field(default_factory=list)
    online: str | None = None
    declined: str | None = None

    def rotations(self) -> set[str]:
        return {r for r, _ in self.reads} | set(self.writes) | ({self.online} if self.online else set())


def plan_page(model: ir.Model, plan: Plan, *, title: str) -> str:
    """A self-contained page (no scripts, nothing loaded) about ``plan``, which was made for ``model``."""
    rows = _rows(model, plan)
    spans = _spans(rows)
    columns = _columns(spans)
    width = _STEP * (max(columns.values(), default=0) + 1) + 6
    body = "\n".join(_draw(rows, spans, columns, plan, width))
    return _PAGE.format(
        title=escape(title),
        facts=_facts(plan),
        legend=_legend(plan),
        declined=_declined(plan),
        rows=body,
        width=width,
        height=_HEIGHT,
        op=_characters(row.op for row in rows),
        shape=_characters(row.detail for row in rows),
    )


def _characters(texts: Iterable[str]) -> int:
    return min(_LONGEST, max(map(len, texts), default=0) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows.


def _rows(model: ir.Model, plan: Plan) -> list[_Row]:
    prepare(model, keys=plan.keys)
    nodes = list(model.graph)
    sites = {s.node: s for s in plan.sites}
    found: dict[int, _Row] = {}

    def row(number: int) -> _Row:
        if number not in found:
            node = nodes[number]
            shape = f"{sites[number].inputs} → {sites[number].outputs}" if number in sites else ""
            found[number] = _Row(node.op_type, node.name or str(node.outputs[0].name), shape)
        return found[number]

    for site in plan.sites:
        if site.rotation is not None:
            row(site.node).reads.append((site.rotation, site.how == "online"))
        else:
            row(site.node).declined = site.reason
    for job in plan.rebases:
        node = nodes[job.node]
        row(job.node).selects = node.op_type in ("Gather", "GatherND") and len(_shape(node, job.input)) > 2
        known = {r for r, _ in row(job.node).reads}
        for change in job.changes:
            for rotation in dict.fromkeys(p.rotation for p in change.placements):
                reads = job.node in sites and job.input == 1 and change.axis == _contracted(node)
                if not reads and rotation not in row(job.node).writes:
                    row(job.node).writes.append(rotation)
                elif reads and rotation not in known:
                    row(job.node).reads.append((rotation, False))
        if job.adds and not job.changes:
            row(job.node).notes.append("takes in a norm's bias")
    for number, _ in plan.ones:
        row(number).notes.append("scale folded into its readers")
    before: dict[int, list[_Row]] = defaultdict(list)
    for online in plan.online:
        block = plan.rotations[online.rotation].block_size
        blocks = "" if block == online.width else f", blocks of {block}"
        verb = "undoes" if online.inverse else "applies"
        consumer = min((n if 0 <= n < len(nodes) else len(nodes)) for n, _ in online.consumers)
        before[consumer].append(
            _Row("Hadamard", online.value, f"{online.width}{blocks}", notes=[verb], online=online.rotation)
        )
    result = []
    for number in range(len(nodes) + 1):
        result += before[number]
        if number in found:
            result.append(found[number])
    return result


def _shape(node: ir.Node, index: int) -> tuple[int, ...]:
    view = constant(node.inputs[index])
    return () if view is None else view.shape


def _contracted(node: ir.Node) -> int:
    if node.op_type in ("Conv", "FusedConv"):
        return 1
    return 1 if node.attributes.get_int("transB", 0) else 0


def _spans(rows: Sequence[_Row]) -> dict[str, tuple[int, int]]:
    """First and last row of every rotation."""
    spans: dict[str, tuple[int, int]] = {}
    for number, row in enumerate(rows):
        for rotation in row.rotations():
            spans[rotation] = (spans.get(rotation, (number, 0))[0], number)
    return spans


def _columns(spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The rail of every rotation: the first that is free over its whole length; the longest rails come first."""
    taken: list[list[tuple[int, int]]] = []
    columns = {}
    for rotation, (first, last) in sorted(spans.items(), key=lambda item: (item[1][0] - item[1][1], item[1])):
        for column in range(len(taken) + 1):
            if column == len(taken):
                taken.append([])
            if all(last < a or b < first for a, b in taken[column]):
                taken[column].append((first, last))
                columns[rotation] = column
                break
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Drawing.


def _draw(
    rows: Sequence[_Row],
    spans: dict[str, tuple[int, int]],
    columns: dict[str, int],
    plan: Plan,
    width: int,
) -> Iterable[str]:
    def lines(numbers: Iterable[int]) -> Iterable[str]:
        for number in numbers:
            rails = _rails(number, rows, spans, columns, plan, width)
            yield f'<div class="row">{rails}{_cells(rows[number], plan)}</div>'

    start, period, count = _repetition([_signature(r, plan) for r in rows])
    if count < 3:
        yield from lines(range(len(rows)))
        return
    end = start + period * count
    yield from lines(range(start + period))
    yield f"<details><summary>{count - 1} more blocks of {period} rows like the one above</summary>"
    yield from lines(range(start + period, end))
    yield "</details>"
    yield from lines(range(end, len(rows)))


def _signature(row: _Row, plan: Plan) -> tuple[object, ...]:
    kinds = plan.kinds
    return (
        row.op,
        row.detail,
        tuple((kinds[r], online) for r, online in row.reads),
        tuple(kinds[r] for r in row.writes),
        tuple(row.notes),
        row.declined,
    )


def _repetition(signatures: Sequence[object]) -> tuple[int, int, int]:
    """(start, period, count) of the run of equal blocks that covers most rows."""
    best = (0, 1, 1)
    total = len(signatures)
    for period in range(2, min(_LONGEST_PERIOD, total // 2) + 1):
        start = 0
        while start + 2 * period <= total:
            end = start
            while end + period < total and signatures[end] == signatures[end + period]:
                end += 1
            count = (end - start) // period + 1
            if count > 1 and (period * count > best[1] * best[2] or best[2] == 1):
                best = (start, period, count)
            start = max(end - period + 1, start + 1) if count > 1 else end + 1
    return best


def _rails(
    number: int,
    rows: Sequence[_Row],
    spans: dict[str, tuple[int, int]],
    columns: dict[str, int],
    plan: Plan,
    width: int,
) -> str:
    middle = _HEIGHT // 2
    parts = []
    touched = rows[number].rotations()
    for rotation, (first, last) in spans.items():
        if first <= number <= last:
            x, colour = columns[rotation] * _STEP + 10, _colour(plan.kinds[rotation])
            top, bottom = (0 if number > first else middle), (_HEIGHT if number < last else middle)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{top}" y2="{bottom}" style="stroke:{colour}"/>')
            if rotation == rows[number].online:
                parts.append(
                    f'<rect x="{x - 5}" y="{middle - 5}" width="10" height="10" style="fill:{colour}" '
                    f'transform="rotate(45 {x} {middle})"/>'
                )
            elif rotation in touched:
                parts.append(f'<circle cx="{x}" cy="{middle}" r="4.5" style="stroke:{colour}"/>')
    return f'<svg width="{width}" height="{_HEIGHT}" aria-hidden="true">{"".join(parts)}</svg>'


def _cells(row: _Row, plan: Plan) -> str:
    chips = []
    for rotation, online in row.reads:
        how = "reads, turned online" if online else "reads, folded into the weight"
        chips.append(_chip(plan.kinds[rotation], how))
    writes = "folded into the matrices it selects" if row.selects else "writes, folded into the weight"
    chips += [_chip(plan.kinds[rotation], writes) for rotation in row.writes]
    if row.online is not None:
        chips.append(_chip(plan.kinds[row.online], f"online transform: {' '.join(row.notes)} it", solid=True))
    else:
        chips += [f'<span class="note">{escape(note)}</span>' for note in row.notes]
    if row.declined is not None:
        why = escape(row.declined)
        chips.append(f'<span class="declined" title="{why}">not rotated: {why}</span>')
    kind = " online" if row.online is not None else ""
    name = escape(row.name)
    return (
        f'<span class="op{kind}">{escape(row.op)}</span><span class="shape">{escape(row.detail)}</span>'
        f'<span class="chips">{"".join(chips)}</span><span class="name" title="{name}"><bdi>{name}</bdi></span>'
    )


def _chip(kind: str, text: str, *, solid: bool = False) -> str:
    colour = _colour(kind)
    style = f"background:{colour};color:var(--page)" if solid else f"color:{colour}"
    return f'<span class="chip" style="border-color:{colour};{style}"><b>{escape(kind)}</b> {escape(text)}</span>'


def _colour(kind: str) -> str:
    return f"var(--{kind if kind in _COLOURED else 'other'})"


def _facts(plan: Plan) -> str:
    s = plan.summary()
    facts = [
        (s["linear_layers"], "linear layers"),
        (s["rotated_offline"], "rotated for free, in the weights"),
        (s["rotated_online"], "rotated by an online transform"),
        (s["declined"], "left alone"),
        (s["online_ops"], "online transforms"),
        (f"{s['online_flops_per_row']:,}", "additions a token for them"),
    ]
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in facts)


def _legend(plan: Plan) -> str:
    sizes: dict[str, set[str]] = defaultdict(set)
    for name, rotation in plan.rotations.items():
        blocks = "" if rotation.block_size == rotation.size else f" in blocks of {rotation.block_size}"
        sizes[plan.kinds[name]].add(f"{rotation.size}{blocks}")
    return "".join(
        _chip(kind, f"{_PLACES.get(kind, '')} {', '.join(sorted(found))}".strip())
        for kind, found in sorted(sizes.items())
    )


def _declined(plan: Plan) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for site in plan.declined:
        groups[_NAMES.sub("", site.reason or "")].append(site.name)
    lines = [
        f"<li><b>{len(names)}</b> linear layer{'s' * (len(names) > 1)} left alone: {escape(reason)} "
        f"<small>({escape(names[0])}{', ...' * (len(names) > 1)})</small></li>"
        for reason, names in groups.items()
    ]
    lines += [f"<li>{escape(note)}</li>" for note in plan.notes]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark; --page: #ffffff; --text: #0f172a; --soft: #475569; --hover: #f1f5f9;
         --line: #cbd5e1; --bad: #b91c1c;
         --R1: #2563eb; --R2: #047857; --R3: #7c3aed; --R4: #b45309; --other: #475569 }}
 @media (prefers-color-scheme: dark) {{
  :root {{ --page: #0f172a; --text: #e2e8f0; --soft: #94a3b8; --hover: #1e293b; --line: #475569; --bad: #fca5a5;
          --R1: #60a5fa; --R2: #34d399; --R3: #c4b5fd; --R4: #fbbf24; --other: #94a3b8 }}
 }}
 body {{ font: 14px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
        max-width: 78rem; padding: 0 1rem }}
 h1 {{ font-size: 1.35rem; overflow-wrap: anywhere }}
 .facts {{ display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 }}
 .facts div {{ display: flex; flex-direction: column }}
 .facts b {{ font-size: 1.3rem }} .facts span {{ color: var(--soft) }}
 .row {{ display: grid; grid-template-columns: {width}px calc(1.2 * {op}ch) {shape}ch 28rem minmax(16rem, 1fr);
        gap: 1rem; align-items: center; height: {height}px; white-space: nowrap }}
 .row:hover {{ background: var(--hover) }}
 line {{ stroke-width: 3 }} circle {{ stroke-width: 3; fill: var(--page) }}
 .op {{ font-weight: 600; overflow: hidden; text-overflow: ellipsis }} .op.online {{ font-style: italic }}
 .shape, .name {{ color: var(--soft); overflow: hidden; text-overflow: ellipsis }}
 .name {{ font-size: 12px; direction: rtl; text-align: left }}  /* the end of a long name says most */
 .name bdi {{ direction: ltr }}
 .chips {{ overflow: hidden; text-overflow: ellipsis }}
 .chip {{ display: inline-block; border: 1px solid; border-radius: 999px; padding: 0 8px; font-size: 12px;
         margin: 1px .4rem 1px 0 }}
 .note {{ color: var(--soft); font-size: 12px }}
 .declined {{ color: var(--bad); font-size: 12px }}
 li small {{ overflow-wrap: anywhere }}
 details {{ margin: .2rem 0 }}
 summary {{ cursor: pointer; color: var(--soft); padding: .3rem 0; border-block: 1px dashed var(--line) }}
 .graph {{ overflow-x: auto }}
</style></head><body>
<h1>{title}</h1>
<div class="facts">{facts}</div>
<p>{legend}</p>
<p>A rail is a rotation. A ring is a constant that was changed for it, at no cost at run time; a diamond is a transform
that runs for every token.</p>
{declined}
<div class="graph">
{rows}
</div>
</body></html>
"""
