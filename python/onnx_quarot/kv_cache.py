"""Quantized key/value caches: GroupQueryAttention's own, with static scales found on calibration data.

Scales are symmetric, one a channel of each key/value head or one a tensor. They are measured on the rotated model: R2
rotates what the cache holds of values, R3 what it holds of keys. In four bits both get bases that fit what they hold
(see :mod:`kv_basis`): values in the weights around them, keys in the graph. They are centred as well, and scales weigh
errors as attention does (see :mod:`kv_fit`). All that needs queries and keys behind their RoPE.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .calibrate import observe
from .clipping import fit_rows
from .editing import GraphNames, take_over
from .errors import ConfigError, ModelError
from .kv_basis import balanced, balanced_together, value_path
from .kv_fit import CacheFit, Scores, WeightedSample, row_weights
from .observers import Sink
from .progress import Progress
from .provenance import record_fitted
from .replay import Replay
from .scheme import TensorSpec

Array = npt.NDArray[Any]

CACHES = ("int8", "int4", "int8-tensor", "int4-tensor")

_PAST, _SCALES = (3, 4), (12, 13)  # inputs of GroupQueryAttention: past key and value, their scales
_KEPT_ROWS = 1024


@dataclass(frozen=True)
class CacheReport:
    """One layer's cache. Bytes a token are of keys and values together."""

    node_name: str
    form: str
    float_bytes: int
    quantized_bytes: int


@dataclass(frozen=True)
class _Cache:
    """One GroupQueryAttention node with past and present in the graph's inputs and outputs."""

    node: ir.Node
    past: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    heads: int

    @property
    def opened(self) -> bool:
        """Queries and keys come in as they are compared."""
        return not self.node.attributes.get_int("do_rotary", 0) and self._input(1) is not None and not self._norms()

    @property
    def shifts_cancel(self) -> bool:
        """Nothing but the scores of keys enters the softmax."""
        return self._input(11) is None and not self.node.attributes.get_int("smooth_softmax", 0)

    def _norms(self) -> bool:
        return self._input(14) is not None or self._input(15) is not None

    def _input(self, index: int) -> ir.Value | None:
        return self.node.inputs[index] if index < len(self.node.inputs) else None


def check_cache(kv_cache: str | None) -> None:
    """ConfigError for a name that is none of CACHES."""
    if kv_cache is not None and kv_cache not in CACHES:
        raise ConfigError(f"kv_cache: {kv_cache!r} is not supported; use one of {', '.join(CACHES)}")


@dataclass(frozen=True)
class CachePlan:
    """What was found on the data for every attention of a model: fits of keys and of values, and their head size."""

    kv_cache: str
    fits: tuple[tuple[_Cache, tuple[CacheFit, CacheFit], int], ...]

    def fold_values(self, model: ir.Model) -> bool:
        """Put the bases of values into the weights around them, in `model`; whether there were any."""
        layers: list[str] = []
        for cache, (_, values), size in self.fits:
            if values.basis is not None:
                path = value_path(cache.node, size)
                assert path is not None
                path.fold(values.basis)
                layers += path.layers()
        if layers:
            record_fitted(model, layers)
        return bool(layers)


def plan_cache(
    model: ir.Model,
    model_path: Path,
    kv_cache: str,
    data: Replay,
    progress: Progress,
    fitted: Collection[str] = ("R2", "R3"),
) -> CachePlan:
    """Find out how the caches of `model` become integers.

    model_path: the same model as a file, in float, to be run on `data`. fitted: which of values (R2) and keys (R3) may
    change basis. Raises ConfigError for a model without GroupQueryAttention whose caches are inputs and outputs, or one
    with a head size that 4 bits do not take, DataError for values that are not finite.
    """
    check_cache(kv_cache)
    bits, per_channel = (8 if kv_cache.startswith("int8") else 4), not kv_cache.endswith("-tensor")
    caches = _caches(model)
    measured = {cache.node: _measure(cache, bits, per_channel, fitted) for cache in caches}
    sinks: dict[str, Sink] = {}
    readers: dict[str, str] = {}
    for cache in caches:
        found = measured[cache.node].sinks()
        sinks |= found
        readers |= dict.fromkeys(found, str(cache.node.name))
    observe(model_path, sinks, data, progress=progress, task="calibrating the cache", readers=readers)
    sizes = {node: m.size for node, m in measured.items()}
    for node, size in sizes.items() if bits == 4 else ():
        of_window = node.attributes.get_int("sliding_window_cache", 0) != 0
        if size % (32 if of_window else 2):
            rule = "in a cache of a window 4 bits need a multiple of 32" if of_window else "4 bits need an even number"
            raise ConfigError(f"kv_cache: {node.name!r} has heads of {size} features; {rule}")
    return CachePlan(kv_cache, tuple((c, measured[c.node].fits(), sizes[c.node]) for c in caches))


def quantize_cache(model: ir.Model, plan: CachePlan) -> list[CacheReport]:
    """Make the caches of `model` integers, in place, once values are in their bases; a report for each attention.

    The past inputs and present outputs become int8 [batch, heads, tokens, size], or uint8 [.., size / 2] with two
    4-bit values a byte.
    """
    kv_cache = plan.kv_cache
    bits, per_channel = (8 if kv_cache.startswith("int8") else 4), not kv_cache.endswith("-tensor")
    names = GraphNames(model.graph)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
    reports = []
    for cache, fits, size in plan.fits:
        node = cache.node
        node.resize_inputs(max(len(node.inputs), max(_SCALES) + 1))
        for index, value, fit in zip(_SCALES, cache.present, fits, strict=True):
            node.replace_input_with(index, names.initializer(ir.Tensor(fit.scale), f"{value.name}.scale"))
        if fits[0].basis is not None:
            _turn_keys(model.graph, names, cache, fits[0].basis[0])
        _centre(model.graph, names, cache, fits)
        width = size * bits // 8
        for value in (*cache.past, *cache.present):
            value.type = ir.TensorType(dtype)
            if value.shape is not None:
                value.shape = ir.Shape([*list(value.shape)[:-1], width])
        kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
        for attribute in ("k_quant_type", "v_quant_type"):
            node.attributes[attribute] = ir.AttrString(attribute, kind)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
        count = 2 * cache.heads * size
        reports.append(CacheReport(str(node.name), kv_cache, 4 * count, count * bits // 8))
    return reports


def _measure(cache: _Cache, bits: int, per_channel: bool, fitted: Collection[str]) -> _Plain | _Attended:
    if bits == 4 and cache.opened:
        return _Attended(cache, bits, per_channel, fitted)
    return _Plain(cache, bits, per_channel)


class _Plain:
    """Scales of least squared error, every token alike."""

    def __init__(self, cache: _Cache, bits: int, per_channel: bool) -> None:
        self._spec, self._per_channel = TensorSpec(bits=bits, method="mse"), per_channel
        self._samples = {str(value.name): _Sample() for value in cache.present}

    def sinks(self) -> dict[str, Sink]:
        return dict(self._samples)

    @property
    def size(self) -> int:
        return next(iter(self._samples.values())).size

    def fits(self) -> tuple[CacheFit, CacheFit]:
        scales = (sample.scale(self._spec, self._per_channel) for sample in self._samples.values())
        keys, values = (CacheFit(np.zeros(1, np.float32), scale) for scale in scales)
        return keys, values


class _Attended:
    """Bases, offsets and scales, every token weighed by the attention it gets: queries, keys and values of a batch in
    turn.
    """

    def __init__(self, cache: _Cache, bits: int, per_channel: bool, fitted: Collection[str]) -> None:
        self._cache, self._bits, self._per_channel, self._fitted = cache, bits, per_channel, fitted
        attributes = cache.node.attributes
        self._scores = Scores(
            heads=attributes.get_int("num_heads", 0),
            kv_heads=cache.heads,
            factor=attributes.get_float("scale", 0.0) or None,
            softcap=attributes.get_float("softcap", 0.0),
            window=attributes.get_int("local_window_size", -1),
        )
        self._waiting: list[Array] = []
        self._samples: list[WeightedSample] = []
        self._queries: Array | float = 0.0
        self.size = 0

    def sinks(self) -> dict[str, Sink]:
        query = self._cache.node.inputs[0]
        assert query is not None
        return dict.fromkeys((str(query.name), *(str(v.name) for v in self._cache.present)), self)

    def update(self, values: Array) -> None:
        """[batch, tokens, width] of queries, then [batch, heads, tokens, size] of keys and of values."""
        self._waiting.append(values)
        if len(self._waiting) < 3:
            return
        queries, keys, values = self._waiting
        self._waiting = []
        heads, self.size = keys.shape[1], keys.shape[3]
        self._samples = self._samples or [WeightedSample(heads, self.size) for _ in range(2)]
        for q, k, v in zip(queries, keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3), strict=True):
            *weights, moments = row_weights(q, k, v, self._scores)
            self._queries = self._queries + moments
            for sample, rows, weight in zip(self._samples, (k, v), weights, strict=True):
                sample.update(rows.reshape(len(rows), -1), weight)

    def fits(self) -> tuple[CacheFit, CacheFit]:
        exact = self._cache.shifts_cancel
        keys, values = self._samples
        of_keys, of_values = self._bases()
        even = exact and not self._scores.softcap
        return (
            keys.fit(self._bits, per_channel=self._per_channel, centred=even, basis=of_keys),
            values.fit(self._bits, per_channel=self._per_channel, centred=exact, basis=of_values),
        )

    def _bases(self) -> tuple[Array | None, Array | None]:
        keys, values = self._samples
        of_keys = of_values = None
        if "R3" in self._fitted:
            # The graph multiplies all heads by one matrix.
            one = balanced_together(keys.covariance(), np.asarray(self._queries))
            of_keys = np.broadcast_to(one, (keys.heads, *one.shape))
        path = value_path(self._cache.node, self.size) if "R2" in self._fitted else None
        if path is not None:
            pairs = zip(values.covariance(), path.readers(self.size), strict=True)
            of_values = np.stack([balanced(*pair) for pair in pairs])
        return of_keys, of_values


def _turn_keys(graph: ir.Graph, names: GraphNames, cache: _Cache, basis: Array) -> None:
    """Multiply every head's keys by `basis` [size, size] in front of the attention, and its queries by what undoes it.

    One product of all heads: MatMul of [batch, tokens * heads, size].
    """
    node, size = cache.node, len(basis)
    for index, matrix in ((0, np.linalg.inv(basis).T), (1, basis)):
        x = node.inputs[index]
        assert x is not None
        assert cache.present[0].dtype is not None
        dtype = cache.present[0].dtype
        count = cache.heads if index else node.attributes.get_int("num_heads", 0)
        steps = (
            ("Reshape", "heads", ir.tensor(np.array([0, -1, size], np.int64))),
            ("MatMul", "turned", ir.tensor(matrix.astype(dtype.numpy()))),
            ("Reshape", "rows", ir.tensor(np.array([0, -1, count * size], np.int64))),
        )
        for op_type, what, constant in steps:
            out = names.value(f"{node.inputs[index].name}.{what}", dtype)  # type: ignore[union-attr]
            operand = names.initializer(constant, f"{out.name}.{'shape' if op_type == 'Reshape' else 'basis'}")
            graph.insert_before(node, ir.node(op_type, [x, operand], outputs=[out], name=str(out.name)))
            x = out
        node.replace_input_with(index, x)


def _centre(graph: ir.Graph, names: GraphNames, cache: _Cache, fits: Sequence[CacheFit]) -> None:
    """Take the offsets from keys and values in front of the attention, and give the values' back behind it."""
    node = cache.node

    def constant(array: Array, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return names.initializer(ir.tensor(array.astype(dtype.numpy())), f"{value.name}.offset")

    for index, value, fit in zip((1, 2), cache.present, fits, strict=True):
        if not fit.offset.any():
            continue
        old, dtype = node.inputs[index], value.dtype
        assert old is not None
        assert dtype is not None
        new = names.value(f"{old.name}.centred", dtype, old.shape)
        shift = constant(fit.offset, value, dtype)
        graph.insert_before(node, ir.node("Sub", [old, shift], outputs=[new], name=str(new.name)))
        node.replace_input_with(index, new)
        if index == 2:
            heads = fit.offset.reshape(cache.heads, 1, -1)
            group = node.attributes.get_int("num_heads", 0) // cache.heads
            back = constant(np.repeat(heads, group, axis=1).ravel(), node.outputs[0], dtype)
            out = names.value(f"{node.outputs[0].name}.whole", dtype, node.outputs[0].shape)
            inner = node.outputs[0]
            take_over(inner, out)
            inner.name = names.unique(f"{out.name}.centred")
            inner.type, inner.shape = out.type or ir.TensorType(dtype), out.shape
            graph.insert_after(node, ir.node("Add", [inner, back], outputs=[out], name=f"{node.name}/offset"))


class _Sample:
    """The extremes of every channel, and some rows evenly spread over the data, in bounded memory."""

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._peak: Array | None = None
        self._every = 1
        self.size = 0

    def update(self, values: Array) -> None:
        """[batch, heads, tokens, size]"""
        heads, self.size = values.shape[1], values.shape[3]
        rows = values.transpose(0, 2, 1, 3).reshape(-1, heads * self.size).astype(np.float32, copy=False)
        peak = np.maximum(rows.max(axis=0, initial=0.0), -rows.min(axis=0, initial=0.0))
        self._peak = peak if self._peak is None else np.maximum(self._peak, peak)
        self._rows.append(rows[:: self._every].copy())
        while sum(map(len, self._rows)) > _KEPT_ROWS:
            self._rows = [part[::2] for part in self._rows]
            self._every *= 2

    def scale(self, spec: TensorSpec, per_channel: bool) -> Array:
        """Scales of least squared error on the kept rows, [heads * size] or [1]; float32."""
        assert self._peak is not None
        rows = np.concatenate([*self._rows, self._peak[None, :]])
        # The extremes stand in as one more row, so that they weigh no more than any other.
        columns = rows.T if per_channel else rows.reshape(1, -1)
        return fit_rows(columns, spec)[0]


def past_names(model: ir.Model) -> list[str]:
    """The inputs of the graph that are caches, in float; ConfigError as :func:`plan_cache`."""
    return [str(value.name) for cache in _caches(model) for value in cache.past]


def _caches(model: ir.Model) -> list[_Cache]:
    found = []
    for node in model.graph:
        if node.op_type != "GroupQueryAttention" or node.domain != "com.microsoft" or len(node.inputs) <= max(_PAST):
            continue
        past, present = [node.inputs[i] for i in _PAST], list(node.outputs[1:3])
        if len(present) < 2 or any(v is None or not v.is_graph_input() for v in past):
            continue
        if node.attributes.get_int("kv_cache_bit_width", 0):
            raise ConfigError(f"kv_cache: the cache of {node.name!r} is quantized already")
        if not all(value.is_graph_output() for value in present):
            raise ModelError(f"node {node.name!r}: reads a cache from the graph's inputs but does not hand it on")
        pair = tuple(v for v in past if v is not None)
        heads = node.attributes.get_int("kv_num_heads", 0)
        found.append(_Cache(node, (pair[0], pair[1]), (present[0], present[1]), heads))
    if not found:
        raise ConfigError("kv_cache: the model has no GroupQueryAttention with its caches in its inputs and outputs")
    return found
