"""Quantized key/value caches: GroupQueryAttention's own, with static scales found on calibration data.

Scales are symmetric, one a channel of each key/value head or one a tensor. They are measured on the rotated model: R2
rotates what the cache holds of values, R3 what it holds of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .calibrate import observe
from .clipping import fit_rows
from .editing import GraphNames
from .errors import ConfigError, ModelError
from .progress import Progress
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


def check_cache(kv_cache: str | None) -> None:
    """ConfigError for a name that is none of CACHES."""
    if kv_cache is not None and kv_cache not in CACHES:
        raise ConfigError(f"kv_cache: {kv_cache!r} is not supported; use one of {', '.join(CACHES)}")


def quantize_cache(
    model: ir.Model, model_path: Path, kv_cache: str, data: Replay, progress: Progress
) -> list[CacheReport]:
    """Make the caches of `model` integers, in place; a report for each attention layer.

    model_path: the same model as a file, in float, to be run on `data`. The past inputs and present outputs become
    int8 [batch, heads, tokens, size], or uint8 [.., size / 2] with two 4-bit values a byte. Raises ConfigError for a
    model without GroupQueryAttention whose caches are inputs and outputs, or one with an odd head size at 4 bits,
    DataError for values that are not finite.
    """
    check_cache(kv_cache)
    bits, per_channel = (8 if kv_cache.startswith("int8") else 4), not kv_cache.endswith("-tensor")
    caches = _caches(model)
    sampled = {str(value.name): _Sample() for cache in caches for value in cache.present}
    readers = {str(value.name): str(cache.node.name) for cache in caches for value in cache.present}
    observe(model_path, sampled, data, progress=progress, task="calibrating the cache", readers=readers)
    sizes = {cache.node: sampled[str(cache.present[0].name)].size for cache in caches}
    if bits == 4 and (odd := next((node for node, size in sizes.items() if size % 2), None)) is not None:
        raise ConfigError(f"kv_cache: {odd.name!r} has heads of {sizes[odd]} features; 4 bits need an even number")
    names = GraphNames(model.graph)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.UINT8
    reports = []
    for cache in caches:
        node = cache.node
        node.resize_inputs(max(len(node.inputs), max(_SCALES) + 1))
        for index, value in zip(_SCALES, cache.present, strict=True):
            scale = sampled[str(value.name)].scale(TensorSpec(bits=bits, method="mse"), per_channel)
            node.replace_input_with(index, names.initializer(ir.Tensor(scale), f"{value.name}.scale"))
        width = sizes[node] * bits // 8
        for value in (*cache.past, *cache.present):
            value.type = ir.TensorType(dtype)
            if value.shape is not None:
                value.shape = ir.Shape([*list(value.shape)[:-1], width])
        kind = "PER_CHANNEL" if per_channel else "PER_TENSOR"
        for attribute in ("k_quant_type", "v_quant_type"):
            node.attributes[attribute] = ir.AttrString(attribute, kind)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
        count = 2 * cache.heads * sizes[node]
        reports.append(CacheReport(str(node.name), kv_cache, 4 * count, count * bits // 8))
    return reports


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
