"""What the quantization of each layer, alone, does to a model's outputs.

The float model, rotated as the candidate is, holds each quantized layer of the candidate beside its own and can be
switched between the two. It is run once with all layers in float, then once for each with that one quantized: its
weights and its activations, everything else in float. That tells which layer to give more bits, or to leave out; noise
measured in the candidate itself cannot, because there every layer also passes on that of the layers before it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from .calibrate import run_all
from .comparison import real_tokens
from .custom_op import session as open_session
from .data import Batch
from .discovery.prepare import unfuse_skip_norm
from .discovery.shapes import FLOATS
from .editing import GraphNames, has_subgraphs, take_over
from .errors import ModelError
from .judged import Divergence, keep_judged_outputs, squared_error
from .load import load
from .partial import disposable
from .plan_options import recorded_options
from .progress import NullProgress, Progress
from .provenance import fitted, recorded
from .rewrite import rotate_model
from .save import write
from .sites import LinearSite, linear_sites, readers
from .switches import FLAGS, Switches
from .widen import widen_alike

Array = npt.NDArray[Any]

_FUSED = ("Add", "Mul", "Sigmoid")  # what an operator that multiplies integers may do besides


@dataclass(frozen=True)
class LayerSensitivity:
    """A layer, or several that became one operator, and what their quantization alone does to the outputs."""

    name: str
    error: float


@dataclass(frozen=True)
class Sensitivities:
    """layers: in the order of the graph. all: all quantized layers at once, in the same measure.

    measure: "KL divergence, nats" of next-token distributions, else "relative squared error" of the outputs. quantized:
    how many quantized layers there are; more than were measured if there was not the time for all. rows: predictions,
    or 0.
    """

    layers: tuple[LayerSensitivity, ...]
    all: float
    measure: str
    quantized: int
    rows: int


def measure_sensitivity(
    reference: Path,
    candidate: Path,
    batch: Batch,
    *,
    logits: str | None = None,
    seconds: float = 60.0,
    first: Sequence[str] = (),
    progress: Progress | None = None,
) -> Sensitivities:
    """The sensitivity of every quantized layer of `candidate`, which was made from `reference`, on one batch.

    batch: as the reference takes it. logits: the output that predicts the next token, if there is one. seconds: if all
    layers would take longer than this, so many as do not are measured. first: which of them then, by name, the most
    important first. Both models' weights are written to a temporary folder once and held in memory by one session.
    ModelError if the two do not belong together.
    """
    show = progress or NullProgress()
    with disposable(Path(tempfile.mkdtemp(prefix="onnx-quarot-"))) as folder:
        path, names, outputs = _write_both(reference, candidate, folder, logits, show)
        fed = recorded(load(reference)).carried(batch, recorded(load(candidate)))
        options = ort.SessionOptions()
        # Its fusions take a weight to be in the graph of the branch; without them the same numbers are computed.
        options.add_session_config_entry("optimization.disable_specified_optimizers", "QDQSelectorActionTransformer")
        session = open_session(path, session_options=options)
        flags = np.zeros(len(names), np.bool_)

        def outcome(chosen: Sequence[int]) -> list[Array]:
            flags[:] = False
            flags[list(chosen)] = True
            return run_all(session, outputs, {**fed, FLAGS: flags})

        judge = _Judge(outcome([]), batch, logits)
        together = judge(outcome(range(len(names))))
        start = time.perf_counter()
        judge(outcome([]))
        count = int(seconds / (time.perf_counter() - start))
        rank = {name: position for position, name in enumerate(first)}
        order = sorted(range(len(names)), key=lambda number: rank.get(names[number], len(rank)))
        measured = sorted(order[: max(1, count)])
        layers = []
        with show.task("measuring sensitivity", len(measured)) as task:
            for number in measured:
                layers.append(LayerSensitivity(names[number], judge(outcome([number]))))
                task.advance()
    return Sensitivities(tuple(layers), together, judge.measure, len(names), judge.rows)


class _Judge:
    """The distance of outputs from the expected ones."""

    def __init__(self, expected: list[Array], batch: Batch, logits: str | None) -> None:
        self._expected = expected
        self._divergence: Divergence | None = None
        self.measure, self.rows = "relative squared error", 0
        if logits is not None:
            rows = np.flatnonzero(real_tokens(batch))
            self._divergence = Divergence(expected[0], rows)
            self.measure, self.rows = "KL divergence, nats", len(rows)

    def __call__(self, found: list[Array]) -> float:
        if self._divergence is not None:
            return self._divergence(found[0])
        return squared_error(self._expected, found)


def _write_both(
    reference: Path, candidate: Path, folder: Path, logits: str | None, progress: Progress
) -> tuple[Path, list[str], list[str]]:
    """The switchable model, the layers that its flags switch, and the outputs to judge by."""
    model, other = load(reference), load(candidate)
    _rotate_alike(model, other, candidate)
    outputs = keep_judged_outputs(model)
    if logits is not None:
        outputs = [logits]
    names = _join(model, other)
    if not names:
        raise ModelError(f"model: {candidate} has no quantized layer whose tensors are called as in {reference}")
    path = folder / "both.onnx"
    with progress.task("writing both models", len(model.graph.initializers)) as task:
        write(model, path, "both.onnx.data", on_tensor=task.advance)
    return path, names, outputs


def _rotate_alike(model: ir.Model, other: ir.Model, candidate: Path) -> None:
    """Bring the reference into the bases of the candidate."""
    widen_alike(model, other)
    options, bases = recorded_options(other), recorded(other)
    if options is None:
        if bases.values:
            raise ModelError(f"model: {candidate} does not say how it was rotated; quantize it again")
        return
    plan = options.plan(model)
    if plan.bases != bases.values or {n: r.to_json() for n, r in plan.rotations.items()} != {
        n: r.to_json() for n, r in bases.rotations.items()
    }:
        raise ModelError(f"model: {candidate} was made from another model than the reference, or by another version")
    rotate_model(model, plan)


def _join(model: ir.Model, other: ir.Model) -> list[str]:
    """Put each quantized layer of `other` beside the layer of `model` that has its result's name; their names.

    Layers that became one operator are switched together, those around a cache with bases of its own not at all.
    """
    opset = model.opset_imports.get("", 0)
    if opset != other.opset_imports.get("", 0):
        raise ModelError(f"model: the reference has opset {opset}, the candidate another")
    results = {str(value.name): value for node in other.graph for value in node.outputs}
    _take_sums_apart(model, results)
    known = {str(value.name): value for value in model.graph.inputs}
    known |= {str(value.name): value for node in model.graph for value in node.outputs}
    groups: dict[ir.Value, list[LinearSite]] = {}
    for site in linear_sites(model):
        if (end := _end(site, results)) is not None:
            groups.setdefault(end, []).append(site)
    apart = fitted(other)
    groups = {e: sites for e, sites in groups.items() if not any(str(s.node.outputs[0].name) in apart for s in sites)}
    parts = {end: part for end in groups if (part := _between(end, known)) is not None and _is_quantized(part)}
    names = GraphNames(model.graph)
    switches = Switches(names, len(parts))
    copied: dict[tuple[ir.Value, bool], ir.Value] = {}
    for number, (end, part) in enumerate(parts.items()):
        place = known[str(end.name)].producer()
        assert place is not None
        copy = _Copy(names, known, copied, part, end)
        known[str(end.name)] = _switch(model, switches, number, place, groups[end][0].dtype, copy)
    for key, function in other.functions.items():
        model.functions.setdefault(key, function)
    for domain, version in other.opset_imports.items():
        model.opset_imports.setdefault(domain, version)
    model.ir_version = max(model.ir_version, other.ir_version)
    return [", ".join(site.node_name for site in groups[end]) for end in parts]


def _take_sums_apart(model: ir.Model, results: Mapping[str, ir.Value]) -> None:
    """Norms that hold a sum which the candidate has elsewhere become a sum and a norm."""
    for node in [n for n in model.graph if n.op_type == "SkipSimplifiedLayerNormalization"]:
        total = node.outputs[3] if len(node.outputs) > 3 else None
        found = results.get(str(total.name) if total is not None else f"{node.outputs[0].name}/sum_0")
        maker = None if found is None else found.producer()
        if maker is not None and maker.op_type != node.op_type:
            unfuse_skip_norm(model, node)


def _end(site: LinearSite, results: Mapping[str, ir.Value]) -> ir.Value | None:
    """The candidate's value that a layer's result is, or went into: a fused operator may do what stands behind it."""
    open_values = [site.node.outputs[0]]
    for value in open_values:
        if (found := results.get(str(value.name))) is not None:
            return found
        for node in readers(value):
            if node.domain == "" and node.op_type in _FUSED:
                open_values += [v for v in node.outputs if v not in open_values]
    return None


def _between(end: ir.Value, known: Mapping[str, ir.Value]) -> list[ir.Node] | None:
    """The nodes that make `end` from constants and values whose names are `known`; None if other values are needed."""
    part: dict[ir.Node, None] = {}
    producer = end.producer()
    open_nodes = [] if producer is None else [producer]
    while open_nodes:
        node = open_nodes.pop()
        if node in part:
            continue
        if has_subgraphs(node):
            return None
        part[node] = None
        for value in node.inputs:
            if value is None or value.is_initializer() or str(value.name) in known:
                continue
            source = value.producer()
            if source is None:
                return None
            open_nodes.append(source)
    graph = end.producer().graph if part else None  # type: ignore[union-attr]
    return None if graph is None else [node for node in graph if node in part]


def _is_quantized(part: Sequence[ir.Node]) -> bool:
    """Whether the nodes read a matrix of integers."""
    tensors = (v.const_value for node in part for v in node.inputs if v is not None and v.is_initializer())
    return any(t is not None and len(t.shape) > 1 and t.dtype not in FLOATS for t in tensors)


class _Copy:
    """The nodes of a quantized layer as new nodes that read the values of the float model."""

    def __init__(
        self,
        names: GraphNames,
        known: Mapping[str, ir.Value],
        copied: dict[tuple[ir.Value, bool], ir.Value],
        part: Sequence[ir.Node],
        end: ir.Value,
    ) -> None:
        self._names, self._known, self._constants = names, known, copied
        self._made: dict[ir.Value, ir.Value] = {}
        self.nodes = [self._node(node) for node in part]
        self.end = self._made[end]

    def _node(self, old: ir.Node) -> ir.Node:
        unsigned = _signed_operands(old)
        inputs = [None if v is None else self._value(v, i in unsigned) for i, v in enumerate(old.inputs)]
        node = ir.Node(
            old.domain,
            old.op_type,
            inputs,
            list(old.attributes.values()),
            overload=old.overload,
            num_outputs=len(old.outputs),
        )
        for before, after in zip(old.outputs, node.outputs, strict=True):
            after.type = before.type
            self._made[before] = after
        return node

    def _value(self, old: ir.Value, unsigned: bool) -> ir.Value:
        if old in self._made:
            return self._made[old]
        if not old.is_initializer():
            return self._known[str(old.name)]
        key = (old, unsigned)
        if key not in self._constants:
            tensor = old.const_value
            assert tensor is not None
            if unsigned:
                codes = tensor.numpy()
                tensor = ir.tensor(codes.view(np.uint8) ^ np.uint8(128))
            self._constants[key] = self._names.initializer(tensor, f"onnx_quarot.candidate.{len(self._constants)}")
        return self._constants[key]


def _signed_operands(node: ir.Node) -> tuple[int, ...]:
    """Which inputs of a node, signed weights and their zero points, are made unsigned by adding 128 to them.

    Without VNNI ONNX Runtime adds pairs of products of signed weights in 16 bits, which saturate. Its exact mode makes
    them unsigned, but not where they are outside the branch that reads them, as here.
    """
    if (node.domain, node.op_type) != ("com.microsoft", "DynamicQuantizeMatMul") or len(node.inputs) < 4:
        return ()
    operands = [node.inputs[i] for i in (1, 3)]
    signed = all(v is not None and v.is_initializer() and v.dtype == ir.DataType.INT8 for v in operands)
    return (1, 3) if signed else ()


def _switch(
    model: ir.Model, switches: Switches, number: int, old: ir.Node, dtype: ir.DataType, copy: _Copy
) -> ir.Value:
    """Put a switch in the place of a node; its result."""
    plain = ir.Node(old.domain, old.op_type, list(old.inputs), list(old.attributes.values()))
    kind = ir.TensorType(dtype)
    copy.end.type = plain.outputs[0].type = kind
    nodes = switches.nodes(number, copy.nodes, [plain], (copy.end, plain.outputs[0]))
    model.graph.insert_before(old, nodes)
    take_over(old.outputs[0], nodes[1].outputs[0])
    nodes[1].outputs[0].type = kind
    model.graph.remove(old, safe=True)
    return nodes[1].outputs[0]
