"""The operators' target: nodes with random shapes, types and attributes, through ONNX Runtime."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

import onnx_quarot as oq
from onnx_quarot.qlinear import pack, pack_scales

Array = np.ndarray[Any, Any]
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 127, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63)]
TYPES = [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
         TensorProto.INT64, TensorProto.STRING, TensorProto.BOOL, TensorProto.UINT8]  # fmt: skip
SIZES = [0, 1, 2, 3, 6, 12, 20, 28, 36, 64, 92, 96, 140, 576, 668, 1000, 1024, 1536, 4097, 8192]
OPERATORS = ["Hadamard", "Hadamard", "HadamardQuantizeLinear", "HadamardDynamicQuantizeLinear"]


def array(kind: int, shape: list[int], rng: random.Random) -> np.ndarray[Any, Any]:
    values = np.random.default_rng(rng.randrange(2**32)).standard_normal(shape) * rng.choice([1, 0, 1e30, 1e-40])
    if values.size and rng.random() < 0.2:
        values.flat[rng.randrange(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == TensorProto.STRING:
        return values.astype(str).astype(object)
    with np.errstate(all="ignore"):
        return values.astype(helper.tensor_dtype_to_np_dtype(kind))


def fuzz_transform(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    operator = rng.choice(OPERATORS)
    n = rng.choice(SIZES) if rng.random() < 0.9 else rng.randrange(1, 5000)
    shape = [rng.choice([0, 1, 2, 3, 17]) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 5]))]
    # A million elements at most: beyond, the time would go into making them.
    while np.prod(shape) * n > 2**20:
        shape.pop()
    shape = [*shape, n] if rng.random() < 0.95 else []
    kind = rng.choice(TYPES[:4]) if rng.random() < 0.8 else rng.choice(TYPES)
    attributes: dict[str, Any] = {}
    for name in ("block_size", "transpose", "scale", "axis", "unknown"):
        if rng.random() < (0.3 if name in ("block_size", "transpose", "scale") else 0.03):
            odd: list[Any] = [*NUMBERS, 1e38, float("nan"), "text", [1, 2], [0.5], b"\xff"]
            good = {"block_size": [n, n // 2, n // 4], "transpose": [0, 1], "scale": [0.5, 1.0, 1e30]}
            attributes[name] = rng.choice(good.get(name, odd) if rng.random() < 0.8 else odd)
    declared: list[Any] | None = [rng.choice([d, f"d{i}"]) for i, d in enumerate(shape)]
    if rng.random() < 0.1:
        declared = rng.choice([None, [-1], [5, 5], [2**40, n]])
    if operator != "Hadamard" and rng.random() < 0.9:
        kind = TensorProto.FLOAT
    inputs, feeds, extra = [helper.make_tensor_value_info("x", kind, declared)], {"x": array(kind, shape, rng)}, []
    # What each operator takes: signs; scale, zero point, signs; signs.
    usual = {
        "Hadamard": [(TensorProto.INT8, [n])],
        "HadamardQuantizeLinear": [(TensorProto.FLOAT, []), (rng.choice([TensorProto.INT8, TensorProto.UINT8]), []),
                                   (TensorProto.INT8, [n])],
        "HadamardDynamicQuantizeLinear": [(TensorProto.INT8, [n])],
    }[operator]  # fmt: skip
    least = {"HadamardQuantizeLinear": 2}.get(operator, 0)
    count = rng.randint(least, len(usual)) if rng.random() < 0.9 else rng.randrange(4)
    for index in range(count):
        if rng.random() < 0.05:
            extra.append("")
            continue
        name = f"i{index}"
        other, dims = usual[index] if index < len(usual) else (kind, [n])
        if rng.random() < 0.1:
            other = rng.choice([TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT, kind])
        if rng.random() < 0.1:
            dims = rng.choice([[], [n], [1], [0], [2, n], [n // 2]])
        value = np.where(array(TensorProto.FLOAT, dims, rng) > 0, 1, -1)
        extra.append(name)
        inputs.append(helper.make_tensor_value_info(name, other, None))
        feeds[name] = value.astype(helper.tensor_dtype_to_np_dtype(other)) if other != TensorProto.STRING else value
    outputs = ["y", "s"][: 2 if (operator == "HadamardDynamicQuantizeLinear") != (rng.random() < 0.05) else 1]
    try:
        node = helper.make_node(operator, ["x", *extra], outputs, domain="onnx_quarot", **attributes)
    except (TypeError, ValueError, OverflowError):
        return "not a node"
    return run(node, inputs, feeds, rng)


def run(node: NodeProto, inputs: list[ValueInfoProto], feeds: dict[str, Array], rng: random.Random) -> str:
    """Whatever ONNX Runtime or the operator has against it is an answer; what must not happen ends the process."""
    graph = helper.make_graph([node], "g", inputs, [helper.make_empty_tensor_value_info(v) for v in node.output if v])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("onnx_quarot", 1)]
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = rng.choice([1, 2])
    oq.register(options)
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:
        return "refused when loading"
    used = {i.name for i in session.get_inputs()}
    try:
        session.run(None, {name: value for name, value in feeds.items() if name in used})
    except Exception:
        return "refused when running"
    return "ran"


def fuzz_qlinear(seed: int, folder: Path) -> str:
    """A layer that is right, then up to three things that are not."""
    rng = random.Random(seed)
    values = np.random.default_rng(seed)
    k, n, block = (
        rng.choice([1, 3, 4, 32, 64, 96, 128, 576]),
        rng.choice([1, 15, 16, 40, 64, 130]),
        rng.choice([None, 32, 128]),
    )
    kind = rng.choice([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
    limit = 127 if block is None else 7
    weight = values.integers(-limit, limit + 1, (k, n)).astype(np.int8)
    scales = values.uniform(0, 1, n if block is None else (-(-k // block), n)).astype(np.float32)
    feeds: dict[str, Array] = {
        "x": array(kind, [rng.choice([0, 1, 2, 7, 300]), k], rng),
        "w": pack(weight, block),
        "s": scales if block is None else pack_scales(scales),
    }
    if rng.random() < 0.5:
        feeds["b"] = array(TensorProto.FLOAT, [n], rng)
        if rng.random() < 0.5:
            feeds["r"] = values.choice(np.array([-1, 1], np.int8), k)
    if block is not None and rng.random() < 0.5:
        feeds["z"] = values.integers(0, 256, (*feeds["s"].shape[:2], 8)).astype(np.uint8)
    attributes: dict[str, Any] = {"K": k, "N": n, "layout_version": 1, "rotate": rng.choice([0, 1])}
    if block is not None:
        attributes |= {"bits": 4, "block": block}
    outputs = ["y"]
    if n > 32 and rng.random() < 0.5:
        attributes["splits"] = [16, n - 16] if rng.random() < 0.5 else [16, 16, n - 32]
        outputs = ["y", "y1", "y2"][: len(attributes["splits"])]
    elif n == 64:
        attributes["gated"] = 1
    if rng.random() < 0.3:
        attributes["epsilon"] = 1e-5
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        match rng.randrange(5):
            case 0:
                names = [*attributes, "block_size", "transpose", "scale", "bits", "block", "splits", "gated", "epsilon"]
                numbers = [*NUMBERS, k, k // 2, 0.5, float("nan"), "text", [n], [16, n], [16, n - 16], [-1, n + 1]]
                attributes[rng.choice(names)] = rng.choice(numbers)
            case 1:
                attributes.pop(rng.choice([*attributes]), None)
            case 2:
                name = rng.choice([*feeds])
                shape = [rng.choice([d, 0, 1, d + 1, d // 2]) for d in feeds[name].shape]
                feeds[name] = np.resize(feeds[name], shape)
            case 3:
                name = rng.choice([*feeds])
                with np.errstate(all="ignore"):
                    feeds[name] = feeds[name].astype(rng.choice([np.float32, np.uint8, np.int8, np.float64]))
            case 4:
                outputs = rng.choice([outputs[:-1], [*outputs, "more"], ["", *outputs[1:]], [*outputs[:-1], ""]])
    # Inputs that are left out have no name, up to the last one that is there.
    order = ["x", "w", "s", "b", "r", "z"]
    last = max(order.index(name) for name in feeds)
    names = [name if name in feeds else "" for name in order[: last + 1]]
    try:
        node = helper.make_node("QLinear", names, outputs, domain="onnx_quarot", **attributes)
    except (TypeError, ValueError, OverflowError):
        return "not a node"
    inputs = [
        helper.make_tensor_value_info(v, helper.np_dtype_to_tensor_dtype(x.dtype), None) for v, x in feeds.items()
    ]
    return run(node, inputs, feeds, rng)


def fuzz_attention(seed: int, folder: Path) -> str:
    """An attention that is right, then up to three things that are not."""
    rng = random.Random(seed)
    size, kv_heads, group = rng.choice([16, 32, 80]), rng.choice([1, 2]), rng.choice([1, 3])
    heads, batch, length = kv_heads * group, rng.choice([1, 2]), rng.choice([1, 2, 70])
    past = rng.choice([0, 1, 65])
    packed, kind = rng.random() < 0.5, TensorProto.FLOAT
    feeds: dict[str, Array] = {
        "query": array(kind, [batch, length, (heads + 2 * kv_heads if packed else heads) * size], rng)
    }
    if not packed:
        feeds |= {name: array(kind, [batch, length, kv_heads * size], rng) for name in ("key", "value")}
    for name in ("past_key", "past_value"):
        feeds[name] = array(kind, [batch, kv_heads, past + rng.choice([0, 5]), size], rng)
    feeds |= {"lengths": np.full(batch, past + length - 1, np.int32), "total": np.array(past + length, np.int32)}
    if rng.random() < 0.5:
        feeds |= {name: array(kind, [past + length, size // 2], rng) for name in ("cos", "sin")}
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "head_size": size}
    outputs = ["y", "present_key", "present_value"]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        name = rng.choice([*feeds])
        match rng.randrange(5):
            case 0:
                numbers = [*NUMBERS, size // 2, 2 * size, 0.5, float("nan"), "text", [1]]
                attributes[rng.choice([*attributes, "scale"])] = rng.choice(numbers)
            case 1:
                attributes.pop(rng.choice([*attributes]), None)
            case 2:
                shape = [rng.choice([d, 0, 1, d + 1, d // 2]) for d in feeds[name].shape]
                feeds[name] = np.resize(feeds[name], shape)
            case 3:
                which = rng.choice(["lengths", "total"])
                feeds[which] = np.resize(
                    np.array(rng.choice([-1, 0, 1, 64, 70, 2**31 - 1, -(2**31)]), np.int32), feeds[which].shape
                )
            case 4:
                outputs = rng.choice([outputs[:-1], [*outputs, "more"], ["", *outputs[1:]], [*outputs[:-1], ""]])
    names = [
        "query",
        *(["", ""] if packed else ["key", "value"]),
        *[name for name in feeds if name not in ("query", "key", "value")],
    ]
    try:
        node = helper.make_node("GroupQueryAttention", names, outputs, domain="onnx_quarot", **attributes)
    except (TypeError, ValueError, OverflowError):
        return "not a node"
    inputs = [
        helper.make_tensor_value_info(v, helper.np_dtype_to_tensor_dtype(x.dtype), None) for v, x in feeds.items()
    ]
    return run(node, inputs, feeds, rng)


def fuzz_operator(seed: int, folder: Path) -> str:
    return (fuzz_qlinear, fuzz_transform, fuzz_attention, fuzz_transform)[seed % 4](seed, folder)
