"""GPTQ for mixtures of experts: what enters each expert's matrices, gathered over the calibration data, and solved.

The rows that enter MoE are kept, with what its router says of them. An expert's first matrices see the rows sent to
it, its last matrix what these make of them: ONNX Runtime's own operator is asked for that, one expert at a time, with
slices of an identity in the last matrix's place. Rows count by the weight the router gives them. An expert that is sent
fewer rows than it has features also hears those that came closest to being sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from .calibrate import observe
from .errors import DataError
from .experts import LAST, ROUTER, ExpertMatrix, ExpertSite, StoredForm
from .gptq import inverse_factor, solve
from .hessians import MEMORY
from .load import unmap
from .products import gram
from .progress import Progress
from .qparams import SolvedWeight
from .replay import Replay
from .scheme import Scheme
from .sites import constant_tensor

Array = npt.NDArray[Any]

_MS = "com.microsoft"
_LEAST = 0.1  # of the largest weight of a row an expert hears: directions that few of its rows have are not forgotten
_SETTINGS = ("activation_type", "activation_alpha", "activation_beta", "swiglu_fusion", "swiglu_limit")


class _Kept:
    """The rows of one tensor, the first ones up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._left, self._parts = limit, list[Array]()

    def update(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1])
        part = rows[: max(self._left // max(rows[:1].nbytes, 1), 0)].astype(np.float32)
        self._left -= part.nbytes
        self._parts.append(part)

    def rows(self) -> Array:
        """float32 [rows, features]."""
        return np.concatenate(self._parts)


def solve_experts(
    model_path: Path,
    sites: Sequence[ExpertSite],
    schemes: Mapping[str, Scheme],
    data: Replay,
    folder: Path,
    progress: Progress,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
) -> tuple[dict[str, list[SolvedWeight]], list[str]]:
    """Solve the matrices of all `sites` whose scheme (by node name) says gptq; codes go to files in `folder`.

    Returned by node name, one for each of a site's matrices, with all experts' channels side by side, and with remarks
    on the data. memory: bytes of rows held at once; of a mixture's rows that fill more, the first are used. Mixtures
    that saw fewer rows than a tenth of their input features are left out, to be rounded to the nearest, and so are
    those with biases that are no constants. DataError for data that is not finite.
    """
    forms = {site.node_name: StoredForm.of(site, schemes[site.node_name]) for site in sites}
    wanted = [s for s in sites if schemes[s.node_name].weights == "gptq" and forms[s.node_name] is not None]
    left = [f"biases of {site.node_name!r} are computed" for site in wanted if not _biases_are_known(site)]
    wanted = [site for site in wanted if _biases_are_known(site)]
    solved: dict[str, list[SolvedWeight]] = {}
    short = 0
    for site, rows, logits in _gathered(model_path, wanted, data, memory, threads, progress):
        scheme, form = schemes[site.node_name], forms[site.node_name]
        assert form is not None
        if len(rows) * 10 < site.depth:
            left.append(f"{len(rows)} rows reach {site.node_name!r}, which has {site.depth} input features")
            continue
        shares, sent = _routing(site.node, logits)
        stores = [_Store(folder / f"experts.{len(solved)}.{i}.npy", m, form) for i, m in enumerate(site.matrices)]
        inside = _Inside(site, threads)
        with progress.task(f"solving experts {len(solved) + 1} of {len(wanted)}", site.experts) as task:
            for expert in range(site.experts):
                heard = _heard(shares[:, expert], sent[:, expert], max(m.depth for m in site.matrices))
                short += int(sent[:, expert].sum()) * 10 < site.depth
                weight = shares[heard, expert][:, None]
                weight = np.maximum(weight, _LEAST * weight.max())
                before = _Hessian(rows[heard] * weight, scheme.damping)
                for store in stores:
                    entering = before
                    if store.matrix.slots[0] == LAST:
                        entering = _Hessian(inside.values(rows[heard], expert) * weight, scheme.damping)
                    store.put(expert, entering)
                task.advance()
        solved[site.node_name] = [store.solved() for store in stores]
    remarks = [f"weights of {len(left)} mixtures of experts were rounded without gptq: {left[0]}"] if left else []
    if short:
        total = sum(site.experts for site in wanted if site.node_name in solved)
        remarks.append(
            f"{short} of {total} experts were sent fewer rows than a tenth of their input features: gptq went by the "
            "rows that came closest to being sent; give more, or more varied, data"
        )
    return solved, remarks


def _bias(site: ExpertSite, matrix: ExpertMatrix) -> ir.Value | None:
    slot = matrix.slots[0] + 1
    return site.node.inputs[slot] if slot < len(site.node.inputs) else None


def _biases_are_known(site: ExpertSite) -> bool:
    biases = [_bias(site, matrix) for matrix in site.matrices if matrix.slots[0] != LAST]
    return all(bias is None or constant_tensor(bias) is not None for bias in biases)


def _gathered(
    model_path: Path, sites: Sequence[ExpertSite], data: Replay, memory: int, threads: int | None, progress: Progress
) -> Iterator[tuple[ExpertSite, Array, Array]]:
    """The rows that enter each site, and the router's logits for them: as many sites at a time as fit the memory."""
    left, together = list(sites), 1
    while left:
        part, left = left[:together], left[together:]
        sinks: dict[str, _Kept] = {}
        for site in part:
            for name in site.read:
                sinks.setdefault(name, _Kept(memory // len(part)))
        blamed = {name: site.node_name for site in part for name in site.read}
        done = len(sites) - len(left)
        observe(
            model_path, sinks, data, threads=threads, progress=progress, readers=blamed,
            task=f"gathering what experts read {done} of {len(sites)}",
        )  # fmt: skip
        for site in part:
            values, logits = (sinks[name].rows() for name in site.read)
            yield site, values[: len(logits)], logits[: len(values)]
        together = max(1, memory // max(sum(kept.rows().nbytes for kept in sinks.values()) // len(part), 1))


def _routing(node: ir.Node, logits: Array) -> tuple[Array, Array]:
    """Each row's weight for each expert, as the operator has it for those chosen, and whether it is sent there."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = min(node.attributes.get_int("k", 1), shares.shape[1])
    sent = np.zeros(shares.shape, bool)
    np.put_along_axis(sent, np.argsort(-shares, axis=1, kind="stable")[:, :chosen], True, axis=1)
    if node.attributes.get_int("normalize_routing_weights", 0) != 0:
        shares /= (shares * sent).sum(axis=1, keepdims=True)
    return shares, sent


def _heard(shares: Array, sent: Array, enough: int) -> Array:
    """The rows an expert is solved by: all that are sent to it, and up to `enough` of those that come closest."""
    order = np.lexsort((-shares, ~sent))
    heard: Array = np.sort(order[: max(int(sent.sum()), min(enough, len(order)))])
    return heard


class _Hessian:
    """X^T X of rows, and its factor; of rows that are zero throughout those of independent features."""

    def __init__(self, rows: Array, damping: float) -> None:
        self.sum = gram(np.ascontiguousarray(rows))
        if not self.sum.any():
            self.sum = np.eye(len(self.sum), dtype=np.float32)
        self.factor = inverse_factor(self.sum, damping)


class _Store:
    """The codes of one matrix of a mixture, expert by expert into a file."""

    def __init__(self, path: Path, matrix: ExpertMatrix, form: StoredForm) -> None:
        self.matrix, self._path, self._spec, self._block = matrix, path, form.spec, form.block
        channels = matrix.experts * matrix.channels
        groups = 1 if form.block is None else matrix.depth // form.block
        dtype = np.uint8 if form.spec.bounds[0] >= 0 else np.int8
        self._codes = np.lib.format.open_memmap(path, "w+", dtype, (matrix.depth, channels), fortran_order=True)
        self._scale = np.empty((groups, channels), np.float32)
        self._zero = np.empty((groups, channels), np.int32)

    def put(self, expert: int, entering: _Hessian) -> None:
        weight = expert_weight(self.matrix, expert).T
        codes, scale, zero = solve(weight, entering.sum, entering.factor, self._spec, self._block)
        part = slice(expert * self.matrix.channels, (expert + 1) * self.matrix.channels)
        self._codes[:, part], self._scale[:, part], self._zero[:, part] = codes, scale, zero

    def solved(self) -> SolvedWeight:
        self._codes.flush()
        return SolvedWeight(self._path, self._scale, self._zero)


def expert_weight(matrix: ExpertMatrix, expert: int) -> Array:
    """One expert's matrix, float32 [channels, depth]."""
    tensor = constant_tensor(matrix.root)
    assert tensor is not None
    try:
        weight: Array = tensor.numpy()[expert].astype(np.float32)
        return weight
    finally:
        unmap(tensor)


class _Inside:
    """What enters the last matrix of an expert, as ONNX Runtime's operator computes it."""

    def __init__(self, site: ExpertSite, threads: int | None) -> None:
        self._site = site
        (last,) = (matrix for matrix in site.matrices if matrix.slots[0] == LAST)
        self._width, self._inner = last.channels, last.depth
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if threads is not None:
            options.intra_op_num_threads = threads
        model = ir.to_proto(self._model()).SerializeToString()
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _model(self) -> ir.Model:
        node = self._site.node
        used = [i for i, value in enumerate(node.inputs) if value is not None and i != LAST + 1]
        inputs = {i: ir.Value(name=f"i{i}", type=ir.TensorType(ir.DataType.FLOAT)) for i in used}
        settings = [node.attributes[name] for name in _SETTINGS if name in node.attributes]
        operands = [inputs.get(i) for i in range(max(used) + 1)]
        one = ir.Node(_MS, "MoE", operands, [*settings, ir.AttrInt64("k", 1)])
        one.outputs[0].name, one.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
        imports = {"": 21, _MS: 1}
        graph = ir.Graph(list(inputs.values()), one.outputs, nodes=[one], opset_imports=imports, name="expert")
        return ir.Model(graph, ir_version=10)

    def values(self, rows: Array, expert: int) -> Array:
        """float32 [rows, features of the last matrix]."""
        feeds = {"i0": rows, f"i{ROUTER}": np.zeros((len(rows), 1), np.float32)}
        for matrix in self._site.matrices:
            own = matrix.slots[0]
            if own == LAST:
                continue
            feeds[f"i{own}"] = expert_weight(matrix, expert)[None]
            bias = _bias(self._site, matrix)
            if bias is not None:
                tensor = constant_tensor(bias)
                assert tensor is not None
                feeds[f"i{own + 1}"] = tensor.numpy()[expert].astype(np.float32)[None]
        made = np.empty((len(rows), self._inner), np.float32)
        for start in range(0, self._inner, self._width):
            part = made[:, start : start + self._width]
            slices = np.zeros((1, self._width, self._inner), np.float32)
            at = np.arange(part.shape[1])
            slices[0, at, start + at] = 1.0
            part[:] = self._session.run(None, feeds | {f"i{LAST}": slices})[0][:, : part.shape[1]]
        if not np.isfinite(made).all():
            raise DataError(f"data: expert {expert} of {self._site.node_name!r} makes a value that is not finite")
        return made
