"""Activations with a scale for each token and block of features, in standard operators (opset 21).

    x [.., features] -> scales of (rows, blocks) from their extremes -> QuantizeLinear -> DequantizeLinear -> MatMul

Both linear operators are ONNX's blocked ones: scales and zero points are tensors the graph computes from x. Weights are
integers in the same blocks of input features behind a DequantizeLinear. Runtimes without a kernel for the narrow types
compute in float what an integer kernel would: what is saved is what is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from .blocks import BlockWeight
from .discovery.shapes import Shapes
from .editing import GraphNames, insert_behind
from .errors import ConfigError, ModelError
from .qdq import SiteReport, check_replaceable
from .qparams import Array, SolvedWeight
from .scheme import Scheme, TensorSpec
from .sites import LinearSite, WeightSource
from .stand_in import stand_in

_TINY = np.finfo(np.float32).tiny


def check_tokens(model: ir.Model, sites: Sequence[LinearSite], schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """Refuse what cannot be quantized so, before time is spent on it; else each activation's rank, by node name.

    ModelError for a weight that is not float32, a Gemm that transposes its activations, or an opset before 21;
    ConfigError for input features that the block does not divide.
    """
    ranks: dict[str, int] = {}
    if not sites:
        return ranks
    shapes = Shapes(model)
    for site in sites:
        scheme = schemes[site.node_name]
        check_replaceable(model, site, scheme)
        block = block_of(site, scheme)
        if not shapes.known(site.input):
            raise ModelError(f"node {site.node_name!r}: the rank of its input {site.activation!r} is not known")
        if len(shapes.shape[site.input]) < 2:
            raise ModelError(
                f"node {site.node_name!r}: its input {site.activation!r} is a vector, and {scheme.name} has a scale "
                "for each row and block; exclude the layer"
            )
        if site.depth % block:
            fitting = [size for size in (64, 32, 16) if site.depth % size == 0]
            remedy = f"use block={fitting[0]}" if fitting else "no block does: exclude the layer"
            raise ConfigError(
                f"block: {block} does not divide the {site.depth} input features of {site.node_name!r}; {remedy}"
            )
        ranks[site.node_name] = len(shapes.shape[site.input])
    return ranks


def quantize_tokens(
    model: ir.Model,
    sites: Sequence[LinearSite],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, SolvedWeight],
    ranks: Mapping[str, int],
) -> list[SiteReport]:
    """Quantize `sites`, which :func:`check_tokens` lets pass and gives `ranks` for, in place; a report for each.

    schemes: by node name, of the form token. Each activation is quantized once for each scheme that reads it.
    """
    names = GraphNames(model.graph)
    activations: dict[tuple[ir.Value, TensorSpec, int], ir.Value] = {}
    weights: dict[tuple[object, ...], ir.Value] = {}
    reports = []
    for site in sites:
        scheme = schemes[site.node_name]
        node, block = site.node, block_of(site, scheme)
        x = node.inputs[0]
        assert x is not None
        if (x, scheme.activation, block) not in activations:
            activations[x, scheme.activation, block] = _activation(
                model.graph, names, ranks[site.node_name], x, site.depth, block, scheme.activation
            )
        key = (*site.weight_key(), scheme.weight, block)
        if key not in weights:
            weights[key] = _weight(model.graph, names, site, scheme, block, solved.get(site.node_name))
        product = ir.node("MatMul", [activations[x, scheme.activation, block], weights[key]], name=node.name)
        stand_in(names, site, product)
        count = site.depth * site.channels
        reports.append(
            SiteReport(
                site.node_name,
                site.op_type,
                site.activation,
                site.weight,
                activation_scale=0.0,
                activation_zero_point=0,
                float_bytes=4 * count,
                quantized_bytes=count * scheme.weight.bits // 8,
                activation_bits=scheme.activation.bits,
                weight_bits=scheme.weight.bits,
                note=f"a scale for each token and {block} features",
            )
        )
    return reports


def coarse(rows: Array, spec: TensorSpec, block: int) -> Array:
    """What the graph's quantizer and dequantizer leave of `rows` [rows, features], float32."""
    first, last = spec.bounds
    blocks = rows.reshape(len(rows), rows.shape[1] // block, block).astype(np.float32, copy=False)
    if spec.symmetric:
        scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32((last - first) / 2)
        offset: Array = np.full_like(scale, (first + last + 1) // 2)
    else:
        high = np.maximum(blocks.max(axis=2, keepdims=True), 0)
        low = np.minimum(blocks.min(axis=2, keepdims=True), 0)
        scale = (high - low) / np.float32(last - first)
        offset = first - np.rint(low / np.maximum(scale, _TINY))
    scale = np.maximum(scale, _TINY)
    codes = np.clip(np.rint(blocks / scale) + offset, first, last)
    result: Array = ((codes - offset) * scale).reshape(rows.shape)
    return result


def block_of(site: LinearSite, scheme: Scheme) -> int:
    return site.depth if scheme.block is None else scheme.block


def _activation(
    graph: ir.Graph,
    names: GraphNames,
    rank: int,
    x: ir.Value,
    depth: int,
    block: int,
    spec: TensorSpec,
) -> ir.Value:
    """`x` after quantization and dequantization, in its own shape."""
    base = x.name or "x"
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=names.unique(f"{base}_{name}_{op_type}"))
        node.outputs[0].name = names.unique(f"{base}_{name}")
        nodes.append(node)
        return node.outputs[0]

    def constant(array: object, name: str) -> ir.Value:
        return names.initializer(ir.Tensor(np.asarray(array)), f"{base}_{name}")

    first, last = spec.bounds
    shape = constant(np.array([0] * (rank - 1) + [depth // block, block], np.int64), "blocks_shape")
    blocks = add("Reshape", [x, shape], "blocks")
    axes, zero = constant(np.array([-1], np.int64), "axis"), constant(np.float32(0), "zero")
    tiny = constant(_TINY, "tiny")
    if spec.symmetric:
        peak = add("ReduceMax", [add("Abs", [blocks], "magnitudes"), axes], "peak", keepdims=0)
        width = add("Div", [peak, constant(np.float32((last - first) / 2), "levels")], "width")
        scale = add("Max", [width, tiny], "scale")
        middle = add("Mul", [scale, zero], "nothing")
        offset = add("Add", [middle, constant(np.float32((first + last + 1) // 2), "middle")], "offset")
    else:
        high = add("Max", [add("ReduceMax", [blocks, axes], "highest", keepdims=0), zero], "high")
        low = add("Min", [add("ReduceMin", [blocks, axes], "lowest", keepdims=0), zero], "low")
        span = add("Sub", [high, low], "span")
        width = add("Div", [span, constant(np.float32(last - first), "levels")], "width")
        scale = add("Max", [width, tiny], "scale")
        steps = add("Round", [add("Div", [low, scale], "low_steps")], "low_rounded")
        offset = add("Sub", [constant(np.float32(first), "first"), steps], "offset")
    points = add("Cast", [offset], "zero_point", to=int(spec.dtype))
    grid = {"axis": rank - 1, "block_size": block}
    quantized = add("QuantizeLinear", [x, scale, points], "quantized", **grid)
    quantized.type = ir.TensorType(spec.dtype)
    result = add("DequantizeLinear", [quantized, scale, points], "dequantized", **grid)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    insert_behind(graph, x, nodes)
    return result


def _weight(
    graph: ir.Graph,
    names: GraphNames,
    site: LinearSite,
    scheme: Scheme,
    block: int,
    solved: SolvedWeight | None,
) -> ir.Value:
    tensors = BlockWeight(WeightSource(site), scheme.weight, block, solved).plain_tensors()
    parts = ("quantized", "scale", "zero_point")
    inputs = [names.initializer(t, f"{site.weight}_{part}") for t, part in zip(tensors, parts, strict=True)]
    name = names.unique(f"{site.weight}_DequantizeLinear")
    node = ir.node("DequantizeLinear", inputs, {"axis": 0, "block_size": block}, name=name)
    node.outputs[0].name = names.unique(f"{site.weight}_dequantized")
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([site.depth, site.channels])
    graph.insert_before(site.node, node)
    return node.outputs[0]
