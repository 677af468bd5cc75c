"""What was done to a model, as plain values: printed as a table for people, as JSON for machines."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from onnx_quarot.plan import Plan
from onnx_quarot.resources import peak_memory
from onnx_quarot.verify import Verification


@dataclass
class Stopwatch:
    """Wall seconds of every step, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Report:
    """The result of :func:`onnx_quarot.rotate` or :func:`onnx_quarot.quantize`.

    ``bytes_in`` and ``bytes_out`` count the files of the model; ``peak_memory`` is the process's highest resident set
    so far, in bytes.
    """

    source: str
    output: str
    scheme: str | None
    rotations: tuple[str, ...]
    plan: Plan | None
    verification: Verification | None
    quantized: tuple[Any, ...] = ()
    tables: tuple[Any, ...] = ()
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    notes: tuple[str, ...] = ()

    def finished(self, **changes: Any) -> Report:
        return replace(self, peak_memory=peak_memory(), **changes)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary (the plan as its summary and what it declined)."""
        plan = self.plan
        return {
            "source": self.source,
            "output": self.output,
            "scheme": self.scheme,
            "rotations": list(self.rotations),
            "plan": None
            if plan is None
            else {
                **plan.summary(),
                "declined_sites": [{"node": s.name, "reason": s.reason} for s in plan.declined],
            },
            "verification": None if self.verification is None else asdict(self.verification),
            "quantized": [asdict(q) for q in self.quantized],
            "tables": [asdict(t) for t in self.tables],
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "peak_memory": self.peak_memory,
            "notes": list(self.notes),
        }

    def table(self) -> RenderableType:
        """For a terminal: one line a fact."""
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for key, value in self._facts():
            table.add_row(key, value)
        return Group(table)

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "model", self.source
        yield "written", self.output
        if self.scheme is not None:
            mixtures = sum(part.op_type == "QMoE" for part in self.quantized)
            experts = f"{mixtures} mixtures of experts, " if mixtures else ""
            layers = f"{len(self.quantized) - mixtures} linear layers"
            yield "scheme", f"{self.scheme}: {layers}, {experts}{len(self.tables)} tables"
        if self.plan is None:
            yield "rotations", "none"
        else:
            s = self.plan.summary()
            kinds = ", ".join(f"{k} ({n})" for k, n in s["rotations"].items()) or "none possible"
            yield "rotations", kinds
            yield (
                "linear inputs",
                (f"{s['rotated_offline']} rotated offline, {s['rotated_online']} online, {s['declined']} left alone"),
            )
            yield "online transforms", f"{s['online_ops']}"
        if self.verification is not None:
            v = self.verification
            text = f"largest difference {v.worst:.1e} (allowed {v.tolerance:.0e}), over {v.outputs} outputs"
            if v.unrounded is not None:
                text += f"; {v.unrounded:.1e} before weights are rounded"
            yield "exactness", text
        elif self.plan is not None:
            yield "exactness", "not verified, as asked"
        ratio = self.bytes_out / max(1, self.bytes_in)
        yield (
            "size",
            f"{_megabytes(self.bytes_in)} -> {_megabytes(self.bytes_out)} ({ratio:.3f}x)",
        )
        yield "time", ", ".join(f"{k} {v:.1f} s" for k, v in self.seconds.items())
        yield "peak memory", _megabytes(self.peak_memory)
        for note in self.notes:
            yield "note", note


def plan_table(plan: Plan) -> RenderableType:
    """The sites of a plan for a terminal: alike ones are counted, not repeated."""
    groups: dict[tuple[str, int, int, str, str], list[str]] = {}
    for s in plan.sites:
        what = s.reason or (plan.kinds[s.rotation] if s.rotation else "")
        groups.setdefault((s.op_type, s.inputs, s.outputs, s.how, what), []).append(s.name)
    table = Table(title=None, box=None, pad_edge=False)
    for column, justify in (
        ("layers", "right"),
        ("shape", "right"),
        ("input rotated", "left"),
        ("by / because", "left"),
        ("first of them", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (op, rows, columns, how, what), names in groups.items():
        table.add_row(f"{len(names)} {op}", f"{rows}x{columns}", how, what, names[0])
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for name, rotation in plan.rotations.items():
        blocks = "" if rotation.block_size == rotation.size else f" in blocks of {rotation.block_size}"
        sizes[plan.kinds[name]][f"{rotation.size}{blocks}"] += 1
    for kind, found in sizes.items():
        facts.add_row(kind, ", ".join(f"{n} x {size}" if n > 1 else size for size, n in found.items()))
    facts.add_row("online", f"{len(plan.online)} transforms, {plan.online_cost():,} additions a token")
    for note in plan.notes:
        facts.add_row("note", note)
    return Group(table, "", facts)


def _megabytes(n: int) -> str:
    return f"{n / 1e6:,.1f} MB"
