"""One positive case and one near miss for every entry of the legality table, and inputs that no model should have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.discovery import discover_model
from onnx_quarot.errors import ModelError
from onnx_quarot.load import load
from onnx_quarot.plan import Plan

ROTATIONS = ("R1", "R2", "R4")
MS = "com.microsoft"
RNG = np.random.default_rng(0)
Nodes = list[onnx.NodeProto]


def rand(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, output: str, domain: str = "", name: str = "", **attributes: Any) -> onnx.NodeProto:
    names = ["" if n == "_" else n for n in inputs.split()]
    outputs = ["" if n == "_" else n for n in output.split()]
    return helper.make_node(op, names, outputs, name=name or outputs[0], domain=domain, **attributes)


def save(path: Path, nodes: Nodes, x: list[Any], outputs: str = "y", opset: int = 21, **weights: np.ndarray) -> Path:
    """x -> nodes -> outputs; every other name without a producer is a weight."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs.split()]
    constants = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, results, constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def decide(path: Path) -> Plan:
    """The plan, after checking that it is exact."""
    report = oq.rotate(path, path.with_suffix(".rotated.onnx"), rotations=ROTATIONS)
    assert report.plan is not None
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    return report.plan


def how(plan: Plan, name: str) -> str:
    return next(s.how for s in plan.sites if s.name == name)


# Between a first layer h = x a [.., 32] and a last one y = m b, "middle" makes m from h. Each case: nodes, weights, and
# whether the last layer is rotated offline (the middle preserves the basis) or online (it does not).
W32 = RNG.uniform(0.5, 2, 32).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def attention(*select: onnx.NodeProto) -> Nodes:
    """Heads that ``select`` takes out of "p" as "q", which see an activation, and "v", which they weigh."""
    return [
        node("MatMul", "h c", "k"), node("Reshape", "k s", "p"), *select, node("Tanh", "q", "t"),
        node("Transpose", "t", "t1", perm=[0, 2, 1, 3]), node("Transpose", "t", "t2", perm=[0, 2, 3, 1]),
        node("MatMul", "t1 t2", "d"), node("Softmax", "d", "e"), node("Transpose", "v", "v1", perm=[0, 2, 1, 3]),
        node("MatMul", "e v1", "u"), node("Transpose", "u", "u1", perm=[0, 2, 1, 3]), node("Reshape", "u1 s2", "m"),
    ]  # fmt: skip


CASES: dict[str, tuple[Nodes, dict[str, np.ndarray], bool]] = {
    "add a vector": ([node("Add", "h c", "m")], {"c": W32}, True),
    "add a scalar": ([node("Add", "h c", "m")], {"c": np.float32(0.7).reshape(1)}, True),
    "subtract from a vector": ([node("Sub", "c h", "m")], {"c": W32}, True),
    "add two streams": ([node("MatMul", "x d", "k"), node("Add", "h k", "m")], {"d": rand(16, 32)}, True),
    "add a sum over features": (
        [node("ReduceSum", "h ax", "k"), node("Add", "h k", "m")],
        {"ax": i64(-1)},
        False,
    ),
    "scalar factor": ([node("Mul", "h c", "m")], {"c": np.float32(3).reshape(1)}, True),
    "divide by a scalar": ([node("Div", "h c", "m")], {"c": np.float32(3).reshape(1)}, True),
    "divide a scalar by it": ([node("Exp", "h", "e"), node("Div", "c e", "m")], {"c": np.float32(3).reshape(1)}, False),
    "factor a feature, absorbed": ([node("Mul", "h c", "m")], {"c": W32}, True),
    "factor a feature, then uniform ones": (
        [node("Mul", "h c", "k"), node("Mul", "s k", "q"), node("Div", "q u", "m")],
        {"c": W32, "s": np.float32(0.2), "u": np.full(32, 3, np.float32)},
        True,
    ),
    "uniform factor, then a factor a feature behind a layer": (
        [node("MatMul", "x d", "k"), node("Add", "k e", "q"), node("Mul", "s q", "p"), node("Mul", "p c", "r"),
         node("Add", "h r", "m")],
        {"d": rand(16, 32), "e": W32 - 1, "s": np.float32(0.2), "c": W32},
        True,
    ),
    "factor a feature, then a nonlinearity": ([node("Mul", "h c", "k"), node("Tanh", "k", "m")], {"c": W32}, False),
    "factor and bias a feature": ([node("Mul", "h c", "k"), node("Add", "k d", "m")], {"c": W32, "d": W32 - 1}, True),
    "factor a feature behind a layer": (
        [node("MatMul", "x d", "k"), node("Add", "k e", "q"), node("Mul", "q c", "r"), node("Add", "h r", "m")],
        {"d": rand(16, 32), "e": W32 - 1, "c": W32},
        True,
    ),
    "factor a feature behind a layer that takes a bias in": (
        [node("Mul", "h c", "k"), node("Add", "k d", "q"), node("MatMul", "q e", "r"), node("Mul", "r f", "s"),
         node("MatMul", "x i", "j"), node("Add", "j s", "m")],
        {"c": W32, "d": W32 - 1, "e": rand(32, 32), "f": W32[::-1].copy(), "i": rand(16, 32)},
        True,
    ),
    "factor a feature behind a layer that is also read elsewhere": (
        [node("MatMul", "x d", "k"), node("Mul", "k c", "r"), node("Tanh", "k", "u"), node("Add", "r u", "m")],
        {"d": rand(16, 32), "c": W32},
        False,
    ),
    "product of two streams": ([node("MatMul", "x d", "k"), node("Mul", "h k", "m")], {"d": rand(16, 32)}, False),
    "negate": ([node("Neg", "h", "m")], {}, True),
    "einsum that moves axes": ([node("Einsum", "h", "k", equation="abc->cab"),
                                node("Transpose", "k", "m", perm=[1, 2, 0])], {}, True),
    "einsum with a matrix": ([node("Einsum", "h c", "m", equation="bld,dk->blk")], {"c": rand(32, 32)}, True),
    "einsum with a matrix of heads": (
        [node("Einsum", "h c", "k", equation="bld,dhk->bhlk"), node("Einsum", "k e", "m", equation="bhlk,hkd->bld")],
        {"c": rand(32, 4, 8), "e": rand(4, 8, 32)},
        True,
    ),
    "einsum behind a factor a feature": (
        [node("Mul", "h f", "k"), node("Einsum", "k c", "m", equation="bld,kd->blk")],
        {"c": rand(32, 32), "f": W32},
        True,
    ),
    "einsum of scores and weighted values": (
        [node("MatMul", "x d", "v"), node("Einsum", "h h", "s", equation="bld,bmd->blm"), node("Softmax", "s", "p"),
         node("Einsum", "p v", "m", equation="blm,bmd->bld")],
        {"d": rand(16, 32)},
        True,
    ),
    "einsum that takes features one by one": (
        [node("Einsum", "h c", "m", equation="bld,d->bld")], {"c": W32}, False,
    ),
    "einsum over an ellipsis": (
        [node("Einsum", "h c", "m", equation="...d,...->...d")], {"c": np.float32([[2], [3]]).reshape(2, 1)}, True,
    ),
    "einsum without an arrow": ([node("Einsum", "h c", "m", equation="abc,cz")], {"c": rand(32, 32)}, True),
    "einsum that repeats a letter": (
        [node("Einsum", "h c", "k", equation="bld,dk->blk"), node("Reshape", "k s", "q"),
         node("Einsum", "q", "m", equation="bldd->bld")],
        {"c": rand(32, 1024), "s": i64(-1, 3, 32, 32)},
        False,
    ),
    "einsum with an ellipsis": ([node("Einsum", "h c", "m", equation="...d,dk->...k")], {"c": rand(32, 32)}, True),
    "clip": ([node("Clip", "h lo", "m")], {"lo": np.float32(-0.1)}, False),
    "cast there and back": (
        [node("Cast", "h", "k", to=TensorProto.DOUBLE), node("Cast", "k", "m", to=TensorProto.FLOAT)],
        {},
        True,
    ),
    "softmax": ([node("Softmax", "h", "m")], {}, False),
    "reshape that keeps the features": ([node("Reshape", "h s", "m")], {"s": i64(-1, 1, 32)}, True),
    "reshape that does not nest": (
        [node("Reshape", "h s", "k"), node("Tanh", "k", "q"), node("Reshape", "q s2", "m")],
        {"s": i64(-1, 24), "s2": i64(-1, 3, 32)},
        False,
    ),
    "split into heads and merge": (
        [node("Reshape", "h s", "k"), node("Transpose", "k", "q", perm=[0, 2, 1, 3]),
         node("Transpose", "q", "r", perm=[0, 2, 1, 3]), node("Reshape", "r s2", "m")],
        {"s": i64(0, 3, 4, 8), "s2": i64(0, 3, 32)},
        True,
    ),
    "slice whole blocks and join": (
        [node("Slice", "h z e ax", "k"), node("Slice", "h e f ax", "q"), node("Concat", "q k", "m", axis=-1)],
        {"z": i64(0), "e": i64(16), "f": i64(32), "ax": i64(-1)},
        True,
    ),
    "slice with a stride": (
        [node("Slice", "h z f ax st", "k"), node("Concat", "k k", "m", axis=-1)],
        {"z": i64(0), "f": i64(32), "ax": i64(-1), "st": i64(2)},
        False,
    ),
    "split and join": (
        [node("Split", "h", "k q", axis=-1, num_outputs=2), node("Concat", "q k", "m", axis=-1)],
        {},
        True,
    ),
    "pad positions": ([node("Pad", "h p", "m")], {"p": i64(0, 1, 0, 0, 2, 0)}, True),
    "pad positions with a number": (
        [node("Pad", "h p one", "m")],
        {"p": i64(0, 1, 0, 0, 2, 0), "one": np.float32(1)},
        False,
    ),
    "heads that share a basis with what is blocked": (
        [node("Reshape", "h s", "k"), node("Slice", "k z e ax", "q"), node("Slice", "k e f ax", "v"),
         node("Split", "q", "q1 q2", axis=-1, num_outputs=2), node("Concat", "q2 q1", "r", axis=-1),
         node("Tanh", "r", "t"), node("Concat", "t v", "c", axis=2), node("Reshape", "c s2", "m")],
        {"s": i64(0, 3, 4, 8), "s2": i64(0, 3, 32), "z": i64(0), "e": i64(2), "f": i64(4), "ax": i64(2)},
        False,
    ),
    "heads beside heads that see an activation": (
        attention(node("Gather", "p zero", "q", axis=2), node("Gather", "p one", "v", axis=2)),
        {"c": rand(32, 64), "s": i64(0, 3, 2, 4, 8), "zero": np.int64(0), "one": np.int64(-1), "s2": i64(0, 3, 32)},
        True,
    ),
    "the same, head by head": (
        attention(node("Transpose", "p", "w", perm=[3, 0, 1, 2, 4]), node("Split", "w", "q5 v5", axis=0, num_outputs=2),
                  node("Squeeze", "q5 ax", "q"), node("Squeeze", "v5 ax", "v")),
        {"c": rand(32, 64), "s": i64(0, 3, 4, 2, 8), "ax": i64(0), "s2": i64(0, 3, 32)},
        True,
    ),
    "the same, in groups of two and one, taken by GatherND": (
        [*attention(node("Slice", "p z end ax", "q"), node("Transpose", "p", "pt", perm=[2, 0, 1, 3]),
                    node("GatherND", "pt last", "v4"), node("Transpose", "v4", "v", perm=[1, 2, 0, 3]))[:-1],
         node("Concat", "u1 u1", "w", axis=2), node("Reshape", "w s2", "m")],
        {"c": rand(32, 24), "s": i64(0, 3, 3, 8), "z": i64(0), "end": i64(2), "ax": i64(2),
         "last": i64(2).reshape(1, 1), "s2": i64(0, 3, 32)},
        True,
    ),
    "the same, but all heads see a sum": (
        [*attention(node("Gather", "p zero", "q", axis=2), node("Gather", "p one", "v", axis=2))[:-1],
         node("ReduceSum", "p ax", "w", keepdims=0), node("Add", "u1 w", "w1"), node("Reshape", "w1 s2", "m")],
        {"c": rand(32, 64), "s": i64(0, 3, 2, 4, 8), "zero": np.int64(0), "one": np.int64(1), "s2": i64(0, 3, 32),
         "ax": i64(2)},
        False,
    ),
    "the same, and half of every head sees another": (
        [*attention(node("Gather", "p zero", "q", axis=2), node("Gather", "p one", "v", axis=2))[:-1],
         node("ReduceSum", "p ax", "w", keepdims=0), node("Split", "w", "w2 w3", axis=-1, num_outputs=2),
         node("Sigmoid", "w2", "w4"), node("Concat", "w4 w3", "w5", axis=-1), node("Add", "u1 w5", "w1"),
         node("Reshape", "w1 s2", "m")],
        {"c": rand(32, 64), "s": i64(0, 3, 2, 4, 8), "zero": np.int64(0), "one": np.int64(1), "s2": i64(0, 3, 32),
         "ax": i64(2)},
        False,
    ),
    "gather positions": ([node("Gather", "h p", "m", axis=1)], {"p": i64(2, 0)}, True),
    "gather features": ([node("Gather", "h p", "m", axis=2)], {"p": np.arange(31, -1, -1, dtype=np.int64)}, False),
    "tile positions": ([node("Tile", "h r", "m")], {"r": i64(1, 2, 1)}, True),
    "tile features, and half of them": (
        [node("Tile", "h r", "k"), node("Slice", "k z e ax", "m")],
        {"r": i64(1, 1, 2), "z": i64(32), "e": i64(64), "ax": i64(2)},
        True,
    ),
    "tile a sum over features": (
        [node("ReduceSum", "h ax", "k"), node("Tile", "k r", "l"), node("Add", "h l", "m")],
        {"ax": i64(-1), "r": i64(1, 1, 32)},
        False,
    ),
    "write positions": (
        [node("MatMul", "x d", "k"), node("Gather", "k p", "u", axis=0), node("ScatterND", "h i u", "m")],
        {"d": rand(16, 32), "p": i64(1), "i": i64(0).reshape(1, 1)},
        True,
    ),
    "add positions to zeros": (
        [node("Shape", "h", "s"), node("ConstantOfShape", "s", "k"),
         node("ScatterND", "k i h", "m", reduction="add")],
        {"i": i64(1, 0).reshape(2, 1)},
        True,
    ),
    "the larger of two positions": (
        [node("MatMul", "x d", "k"), node("Gather", "k p", "u", axis=0),
         node("ScatterND", "h i u", "m", reduction="max")],
        {"d": rand(16, 32), "p": i64(1), "i": i64(0).reshape(1, 1)},
        False,
    ),
    "write over numbers": (
        [node("Shape", "h", "s"),
         node("ConstantOfShape", "s", "k", value=numpy_helper.from_array(np.ones(1, np.float32))),
         node("Gather", "h p", "u", axis=0), node("ScatterND", "k i u", "m")],
        {"p": i64(1), "i": i64(0).reshape(1, 1)},
        False,
    ),
    "add whole rows to zeros": (
        [node("Shape", "h", "s"), node("ConstantOfShape", "s", "k"), node("Expand", "i s", "j"),
         node("ScatterElements", "k j h", "m", axis=0, reduction="add")],
        {"i": i64(1, 0).reshape(2, 1, 1)},
        True,
    ),
    "write features one by one": (
        [node("ScatterElements", "h i u", "m", axis=2)],
        {"i": i64(0).reshape(1, 1, 1), "u": rand(1, 1, 1)},
        False,
    ),
    "mean over positions": ([node("ReduceMean", "h ax", "m", keepdims=1)], {"ax": i64(1)}, True),
    "pad with a constant position": (
        [node("Expand", "c s", "k"), node("Concat", "k h", "m", axis=1)],
        {"c": rand(1, 1, 32), "s": i64(2, 1, 1)},
        True,
    ),
    "rms norm": ([node("SimplifiedLayerNormalization", "h g", "m", axis=-1, epsilon=1e-5)], {"g": W32}, True),
    "rms norm over two axes": (
        [node("RMSNormalization", "h g", "m", axis=-2)],
        {"g": RNG.uniform(0.5, 2, (3, 32)).astype(np.float32)},
        False,
    ),
    "rms norm also read elsewhere": (
        [node("SimplifiedLayerNormalization", "h g", "n", axis=-1), node("Tanh", "n", "t"), node("Add", "n t", "m")],
        {"g": W32},
        False,
    ),
    "decomposed rms norm": (
        [node("Pow", "h two", "p"), node("ReduceMean", "p ax", "v"), node("Add", "v eps", "ve"),
         node("Sqrt", "ve", "sd"),
         node("Div", "h sd", "n"), node("Mul", "n g", "m")],
        {"two": np.float32(2), "ax": i64(-1), "eps": np.float32(1e-5), "g": W32},
        True,
    ),
    "cubes are no lengths": (
        [node("Pow", "h two", "p"), node("ReduceMean", "p ax", "v"), node("Sigmoid", "v", "sd"),
         node("Mul", "h sd", "m")],
        {"two": np.float32(3), "ax": i64(-1)},
        False,
    ),
    "rms norm, then a uniform factor": (
        [node("SimplifiedLayerNormalization", "h g", "n", axis=-1), node("Mul", "n s", "m")],
        {"g": W32, "s": np.float32(0.2)},
        True,
    ),
    "rms norm, then a factor a row": (
        [node("ReduceMax", "x ax", "r", keepdims=1), node("SimplifiedLayerNormalization", "h g", "n", axis=-1),
         node("Mul", "n r", "m")],
        {"g": W32, "ax": i64(-1)},
        True,
    ),
    "layer norm, then a factor a row": (
        [node("ReduceMax", "x ax", "r", keepdims=1), node("LayerNormalization", "h g c", "n"), node("Div", "n r", "m")],
        {"g": W32, "c": W32 - 1, "ax": i64(-1)},
        False,
    ),
    "factor a row, then a factor a feature behind a layer": (
        [node("ReduceMax", "x ax", "q", keepdims=1), node("MatMul", "x d", "k"), node("Mul", "k q", "p"),
         node("Mul", "p c", "r"), node("Add", "h r", "m")],
        {"d": rand(16, 32), "c": W32, "ax": i64(-1)},
        True,
    ),
    "layer norm, then a uniform factor, which its bias would have to take": (
        [node("LayerNormalization", "h g c", "n"), node("Mul", "n s", "m")],
        {"g": W32, "c": W32 - 1, "s": np.float32(0.2)},
        False,
    ),
    "layer norm on a free stream": ([node("LayerNormalization", "h g c", "m")], {"g": W32, "c": W32 - 1}, True),
    "layer norm whose stream is read as it is": (
        [node("LayerNormalization", "h g c", "n"), node("Add", "n h", "m")],
        {"g": W32, "c": W32 - 1},
        False,
    ),
    "decomposed layer norm": (
        [node("ReduceMean", "h ax", "mu"), node("Sub", "h mu", "d"), node("Pow", "d two", "p"),
         node("ReduceMean", "p ax", "v"), node("Add", "v eps", "ve"), node("Sqrt", "ve", "sd"),
         node("Div", "d sd", "n"),
         node("Mul", "n g", "q"), node("Add", "q c", "m")],
        {"two": np.float32(2), "ax": i64(-1), "eps": np.float32(1e-5), "g": W32, "c": W32 - 1},
        True,
    ),
    "decomposed layer norm of a mean of rows": (
        [node("ReduceMean", "h rows", "r"),
         node("ReduceMean", "r ax", "mu"), node("Sub", "r mu", "d"), node("Pow", "d two", "p"),
         node("ReduceMean", "p ax", "v"), node("Add", "v eps", "ve"), node("Sqrt", "ve", "sd"),
         node("Div", "d sd", "n"),
         node("Mul", "n g", "q"), node("Add", "q c", "m")],
        {"rows": i64(1), "two": np.float32(2), "ax": i64(-1), "eps": np.float32(1e-5), "g": W32, "c": W32 - 1},
        True,
    ),
    "a mean that is used": (
        [node("ReduceMean", "h ax", "mu"), node("Sub", "h mu", "d"), node("Tanh", "mu", "t"), node("Add", "d t", "m")],
        {"ax": i64(-1)},
        False,
    ),
    "skip norm": (
        [node("MatMul", "x d", "k"), node("SkipSimplifiedLayerNormalization", "h k g", "m", domain=MS, epsilon=1e-5)],
        {"d": rand(16, 32), "g": W32},
        True,
    ),
    "skip layer norm with bias": (
        [node("MatMul", "x d", "k"), node("SkipLayerNormalization", "h k g c o", "m", domain=MS, epsilon=1e-5)],
        {"d": rand(16, 32), "g": W32, "c": W32 - 1, "o": W32 + 1},
        True,
    ),
    "resize along the rows": ([node("Resize", "h _ s", "m", mode="linear")], {"s": np.float32([1, 2, 1])}, True),
    "resize along the features": ([node("Resize", "h _ s", "m0", mode="linear"), node("MatMul", "m0 e", "m")],
                                  {"s": np.float32([1, 1, 2]), "e": rand(64, 32)}, False),
    "layer norm, then a roll (windows of Swin)": (
        [
            node("LayerNormalization", "h g c", "n"),
            *(node("Slice", f"n {a} {b} one", p) for a, b, p in (("one", "end", "p"), ("zero", "one", "q"))),
            node("Concat", "p q", "m", axis=1),
        ],
        {"g": W32, "c": W32 - 1, "zero": np.array([0]), "one": np.array([1]), "end": np.array([9])},
        True,
    ),
    "layer norm, then rows of something else": (
        [
            node("LayerNormalization", "h g c", "n"),
            node("Slice", "h zero one one", "q"),
            node("Concat", "n q", "m", axis=1),
        ],
        {"g": W32, "c": W32 - 1, "zero": np.array([0]), "one": np.array([1])},
        False,
    ),
    "layer norm, then a pad that adds nothing": (
        [node("LayerNormalization", "h g c", "n"), node("Pad", "n pads", "m")],
        {"g": W32, "c": W32 - 1, "pads": np.zeros(6, np.int64)},
        True,
    ),
    "layer norm, then a pad": (
        [node("LayerNormalization", "h g c", "n"), node("Pad", "n pads", "m")],
        {"g": W32, "c": W32 - 1, "pads": np.array([0, 1, 0, 0, 0, 0])},
        False,
    ),
    "fused product with the transposed weight": (
        [node("FusedMatMul", "h d", "m", domain=MS, transB=1, alpha=0.5)],
        {"d": rand(32, 32)},
        True,
    ),
    "an operator nobody knows": ([node("Selu", "h", "m")], {}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_between_two_layers(case: str, tmp_path: Path) -> None:
    middle, weights, offline = CASES[case]
    nodes = [node("MatMul", "x a", "h"), *middle, node("MatMul", "m b", "y")]
    opset = 23 if any(n.op_type == "RMSNormalization" for n in middle) else 21
    if onnx.defs.onnx_opset_version() < opset:
        pytest.skip(f"onnx {onnx.__version__} does not know opset {opset}")
    path = save(tmp_path / "m.onnx", nodes, [2, 3, 16], opset=opset, a=rand(16, 32), b=rand(32, 8), **weights)
    plan = decide(path)
    assert how(plan, "y") != "none"
    # The input of the graph is rotated online in front of the first layer; whatever does not preserve costs one more.
    assert len(plan.online) == (1 if offline else 2)


@pytest.mark.parametrize("transpose", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_gemm_honours_its_attributes(transpose: int, alpha: float, beta: float, tmp_path: Path) -> None:
    b = rand(8, 32) if transpose else rand(32, 8)
    nodes = [node("Gemm", "x a c", "h"), node("LayerNormalization", "h g o", "n"),
             node("Gemm", "n b d", "y", transB=transpose, alpha=alpha, beta=beta)]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, [5, 16], a=rand(16, 32), c=rand(32), g=W32, o=rand(32), b=b, d=rand(8))
    assert how(decide(path), "y") == "offline"


def test_gemm_with_a_transposed_activation_is_no_linear_layer(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("Gemm", "h b", "k", transA=1), node("MatMul", "k d", "y")]
    path = save(tmp_path / "m.onnx", nodes, [16, 16], a=rand(16, 32), b=rand(16, 24), d=rand(24, 8))
    assert {s.name for s in decide(path).sites} == {"h", "y"}


def test_convolutions_read_and_write_channels(tmp_path: Path) -> None:
    nodes = [node("Conv", "x a c", "h"), node("Conv", "h b", "k", pads=[1, 1, 1, 1]), node("Conv", "k d", "y", group=4)]
    weights = {"a": rand(16, 8, 1, 1), "c": rand(16), "b": rand(16, 16, 3, 3), "d": rand(16, 4, 1, 1)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [2, 8, 6, 6], **weights))
    assert how(plan, "k") == "offline"
    assert {s.name for s in plan.sites} == {"h", "k"}  # grouped channels are refused
    assert "input of the graph" in str(next(s.reason for s in plan.sites if s.name == "h"))


def attention(keys: Nodes) -> Nodes:
    heads = [n for v in "qkv" for n in (node("MatMul", f"x w{v}", f"{v}1"), node("Reshape", f"{v}1 s", f"{v}2"))]
    return [
        *heads,
        node("Transpose", "q2", "q", perm=[0, 2, 1, 3]),
        node("Transpose", "k2", "k", perm=[0, 2, 3, 1]),
        node("Transpose", "v2", "v", perm=[0, 2, 1, 3]),
        *keys,
        node("Softmax", "z", "p"),
        node("MatMul", "p v", "o1"),
        node("Transpose", "o1", "o2", perm=[0, 2, 1, 3]),
        node("Reshape", "o2 s2", "o3"),
        node("MatMul", "o3 wo", "y"),
    ]


def test_values_are_rotated_a_head(tmp_path: Path) -> None:
    weights = {f"w{v}": rand(16, 32) for v in "qkv"}
    shapes = {"s": i64(0, 0, 4, 8), "s2": i64(0, 0, 32)}
    path = save(
        tmp_path / "m.onnx", attention([node("MatMul", "q k", "z")]), [2, 3, 16], wo=rand(32, 16), **weights, **shapes
    )
    plan = decide(path)
    assert how(plan, "y") == "offline"
    assert {r.size for n, r in plan.rotations.items() if plan.kinds[n] == "R2"} == {8}


def test_experts_read_and_write(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x a", "h"), node("SimplifiedLayerNormalization", "h g", "n", axis=-1),
        node("MatMul", "n r", "p"), node("MoE", "n p u _ d e", "k", domain=MS, k=2, activation_type="silu"),
        node("Add", "h k", "t"), node("MatMul", "t b", "y"),
    ]  # fmt: skip
    weights = {
        "a": rand(16, 32),
        "g": W32,
        "r": rand(32, 4),
        "u": rand(4, 24, 32),
        "d": rand(4, 32, 24),
        "e": rand(4, 32),
    }
    plan = decide(save(tmp_path / "m.onnx", nodes, [6, 16], b=rand(32, 8), **weights))
    assert {n: how(plan, n) for n in ("p", "k", "y")} == dict.fromkeys(("p", "k", "y"), "offline")


def test_a_stream_is_centred_for_its_layer_norms_and_read_as_it_is_elsewhere(tmp_path: Path) -> None:
    """ModernBERT: what a norm made is read by a layer and begins a stream, from which the mean is subtracted there."""
    nodes = [
        node("MatMul", "x a", "h"), node("LayerNormalization", "h g c", "n"),
        node("MatMul", "n w", "k"), node("Add", "n k", "s"),
        node("LayerNormalization", "s g c", "q"), node("MatMul", "q u", "r"), node("Add", "s r", "t"),
        node("LayerNormalization", "t g c", "z"), node("MatMul", "z b", "y"),
    ]  # fmt: skip
    weights = {"a": rand(16, 32), "w": rand(32, 32), "u": rand(32, 32), "b": rand(32, 8), "g": W32, "c": W32 - 1}
    plan = decide(save(tmp_path / "m.onnx", nodes, [2, 3, 16], **weights))
    assert {n: how(plan, n) for n in "kry"} == {"k": "online", "r": "offline", "y": "offline"}
    assert sorted(o.centre for o in plan.online if o.value == "n") == [False, True]
    assert {o.value for o in plan.online} <= {"n", "x"}


@pytest.mark.parametrize("layout", ["columns", "rows", "rows, turned", "read twice"])
def test_experts_that_are_selected_take_a_scale_over(layout: str, tmp_path: Path) -> None:
    """The matrices of each token's expert, multiplied one token at a time."""
    rows = layout.startswith("rows")
    experts = [
        node("ArgMax", "p", "i", axis=-1, keepdims=0 if rows else 1),
        *([node("Gather", "u i", "s", axis=0)] if rows else [node("GatherND", "u i", "s")]),
        *([node("Transpose", "s", "w", perm=[0, 2, 1])] if layout == "rows, turned" else []),
        node("Unsqueeze", "n ax", "c"),
    ]
    if rows:
        experts += [node("MatMul", f"c {'w' if 'turned' in layout else 's'}", "v")]
    else:
        experts += [node("MatMul", "s c", "v")]
    if layout == "read twice":
        experts += [node("ReduceMax", "s", "z", axes=[1, 2], keepdims=0), node("Tanh", "z", "y2")]
    nodes = [
        node("MatMul", "x a", "h"), node("SimplifiedLayerNormalization", "h g", "n", axis=-1),
        node("MatMul", "n r", "p"), *experts, node("Squeeze", "v ax", "k"),
        node("Add", "h k", "t"), node("MatMul", "t b", "y"),
    ]  # fmt: skip
    weights = {"a": rand(16, 32), "g": W32, "r": rand(32, 4), "u": rand(4, 32, 32), "b": rand(32, 8)}
    weights["ax"] = i64(1) if rows else i64(2)
    outputs = "y y2" if layout == "read twice" else "y"
    path = save(tmp_path / "m.onnx", nodes, [6, 16], outputs, opset=17, **weights)
    plan = decide(path)
    assert {how(plan, n) for n in ("p", "y")} == {"online" if layout == "read twice" else "offline"}


# ---------------------------------------------------------------------------------------------------------------------
# What graphs may hold besides.


def test_subgraphs_are_left_alone_and_said_so(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{op}.o", TensorProto.FLOAT, None)
        return helper.make_graph([node(op, "h", f"{op}.o")], op, [], [out])

    nodes = [
        node("MatMul", "x a", "h"),
        node("ReduceMax", "x", "highest", keepdims=0),
        node("Cast", "highest", "c", to=TensorProto.BOOL),
        node("If", "c", "i", then_branch=branch("Relu"), else_branch=branch("Tanh")),
        node("MatMul", "h b", "k"),
        node("MatMul", "i d", "l"),
        node("Add", "k l", "y"),
    ]
    weights = {"a": rand(16, 32), "b": rand(32, 8), "d": rand(32, 8)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [3, 16], **weights))
    assert any("subgraphs" in note for note in plan.notes)
    assert how(plan, "l") == "online"
    assert how(plan, "k") == "online"  # h is captured, so it keeps its basis


def test_quantized_models_are_recognized(tmp_path: Path) -> None:
    quantized = {"w": RNG.integers(-9, 9, (16, 32)).astype(np.int8), "s": np.float32(0.1)}
    nodes = [node("DequantizeLinear", "w s", "a"), node("MatMul", "x a", "y")]
    with pytest.raises(ModelError, match="already quantized"):
        discover_model(load(save(tmp_path / "m.onnx", nodes, [3, 16], **quantized)))
    nodes = [node("DequantizeLinear", "w s", "a"), node("MatMul", "x a", "h"), node("MatMul", "h b", "y")]
    plan = discover_model(load(save(tmp_path / "m.onnx", nodes, [3, 16], b=rand(32, 8), **quantized)))
    assert any("already quantized" in note for note in plan.notes)


def test_an_unknown_domain_blocks_but_does_not_fail(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("Mystery", "h", "m", domain="nobody"), node("MatMul", "m b", "y")]
    path = save(tmp_path / "m.onnx", nodes, [3, 16], a=rand(16, 32), b=rand(32, 8))
    plan = discover_model(load(path), rotations=ROTATIONS)
    assert how(plan, "h") == "online"
    assert how(plan, "y") == "none"
    assert "unknown" in str(next(s.reason for s in plan.sites if s.name == "y"))


def test_cycles_and_missing_tensors_are_named(tmp_path: Path) -> None:
    cycle = [node("Add", "x q", "p"), node("MatMul", "p a", "q"), node("MatMul", "q a", "y")]
    with pytest.raises(ModelError, match="cycle"):
        load(save(tmp_path / "c.onnx", cycle, [3, 16], a=rand(16, 16)))
    missing = [node("MatMul", "x nothing", "y")]
    with pytest.raises(ModelError, match="'nothing'"):
        load(save(tmp_path / "n.onnx", missing, [3, 16]))


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [node("MatMul", "h b", "y"), node("MatMul", "x a", "h")]
    model = load(save(tmp_path / "m.onnx", nodes, [3, 16], a=rand(16, 32), b=rand(32, 8)))
    assert [n.name for n in model.graph] == ["h", "y"]
    assert isinstance(model, ir.Model)


@pytest.mark.parametrize(
    ("width", "expected", "reason"),
    [(16, "online", None), (4, "none", "4 features are too few"), (18, "none", "18 features have no Hadamard matrix")],
)
def test_layers_of_few_features_are_not_worth_a_transform(
    width: int, expected: str, reason: str | None, tmp_path: Path
) -> None:
    """Such as those that mix the heads of attention: as many rows as scores, a feature a head."""
    nodes = [node("MatMul", "x a", "h"), node("Tanh", "h", "t"), node("MatMul", "t b", "y")]
    plan = decide(save(tmp_path / "m.onnx", nodes, [3, 32], a=rand(32, width), b=rand(width, 8)))
    site = next(s for s in plan.sites if s.name == "y")
    assert site.how == expected
    assert site.reason is None if reason is None else site.reason is not None and site.reason.startswith(reason)


def test_layers_of_few_features_are_rotated_where_it_is_free(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("MatMul", "h b", "y")]
    plan = decide(save(tmp_path / "m.onnx", nodes, [3, 32], a=rand(32, 8), b=rand(8, 8)))
    assert how(plan, "y") == "offline"


@pytest.mark.parametrize("features", [8, 18])
def test_heads_that_are_not_rotated_one_by_one_are_rotated_together(features: int, tmp_path: Path) -> None:
    width = 4 * features
    nodes = [
        *[node("MatMul", "x a", "h"), node("Reshape", "h s", "p"), node("Tanh", "p", "t"), node("MatMul", "t c", "k")],
        *[node("Tanh", "k", "u"), node("Reshape", "u f", "m"), node("MatMul", "m b", "y")],
    ]
    weights = {"a": rand(16, width), "c": rand(features, features), "b": rand(width, 8)}
    weights |= {"s": i64(3, 4, features), "f": i64(3, width)}
    plan = decide(save(tmp_path / "m.onnx", nodes, [3, 16], **weights))
    assert [how(plan, name) for name in ("k", "y")] == ["none", "online"]
    site = next(s for s in plan.sites if s.name == "y")
    assert plan.rotations[str(site.rotation)].size == width


@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_norms_that_scale_few_features_are_remarked_on(factor: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)  # of its own: what the note says is counted
    scale = (1 + 0.1 * rng.standard_normal(64)).astype(np.float32)
    scale[5] = factor
    nodes = [
        node("MatMul", "x a", "h"), node("SimplifiedLayerNormalization", "h g", "n", name="norm", axis=-1),
        node("MatMul", "n b", "y"),
    ]  # fmt: skip
    # The feature is as much smaller in front of the norm, as trained models have it.
    write, read = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 64), (64, 64)))
    write[:, 5] /= factor
    path = save(tmp_path / "m.onnx", nodes, [300, 16], a=write, b=read, g=scale)
    notes = [note for note in decide(path).notes if "norms scale" in note]
    assert len(notes) == (factor > 1.0)
    assert all("behind 'norm' have about 5 times the errors" in note for note in notes)
    x = rng.standard_normal((300, 16)).astype(np.float32)
    wanted, errors = oq.session(path).run(None, {"x": x})[0], []
    for rotations in (("R1",), ()):
        oq.quantize(path, tmp_path / "q.onnx", [{"x": x}], scheme="a16w8", rotations=rotations, layers={"h": None})
        errors.append(np.linalg.norm(oq.session(tmp_path / "q.onnx").run(None, {"x": x})[0] - wanted))
    assert (errors[0] > 2 * errors[1]) == (factor > 1.0)
