"""What is fuzzed: functions of a seed and a folder that say how the case ended, or raise for what must not happen."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import Message
from onnx import TensorProto, helper

import onnx_quarot as oq
import small_llama
import tiny_gguf
from onnx_quarot.demo.gguf_model import GgufLlama
from onnx_quarot.demo.tokenizer import tokenizer_json
from onnx_quarot.quantization.config import QConfig
from onnx_quarot.rotation_config import read_rotation_config

DATA = Path(__file__).parent.parent / "tests" / "data"
NUMBERS = [0, 1, -1, 2, 3, 7, 64, 127, 255, 4096, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63)]


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "out":
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
    for path in (folder / "out").iterdir():
        path.unlink() if not path.is_dir() else shutil.rmtree(path)


# --- models ---


@functools.cache
def exports() -> list[bytes]:
    found = [p.read_bytes() for p in sorted(DATA.glob("*.onnx")) if p.stat().st_size < 1_500_000]
    configs = [small_llama.Config(), small_llama.Config(tied=False, separate_qkv=True)]
    return [*found, *(small_llama.build(c).SerializeToString() for c in configs)]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few edits: flipped bits, numbers in place of others, pieces removed, repeated or taken from elsewhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not out:
            break
        at, size = rng.randrange(len(out)), rng.choice([1, 1, 2, 4, 8, 64, 1024])
        match rng.randrange(6):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.randbytes(size)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size] * rng.choice([1, 2, 50])
            case 4:
                width = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) & (2 ** (8 * width) - 1)
                out[at : at + width] = number.to_bytes(width, "little")
            case 5:
                other = rng.randrange(len(out))
                out[at : at + size] = out[other : other + size]
    return bytes(out[: rng.randrange(len(out))] if out and rng.random() < 0.05 else out)


def mutate_message(message: Message, rng: random.Random) -> None:
    """Change one field somewhere in the tree: the file stays a valid protobuf, so the damage gets far."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = rng.choice(fields)
    repeated = not isinstance(value, Message | str | bytes | int | float)
    if repeated and len(value) == 0:
        return
    if field.message_type is not None:
        if not repeated:
            return mutate_message(value, rng)
        index = rng.randrange(len(value))
        match rng.choice(["in", "in", "in", "in", "drop", "copy"]):
            case "drop":
                del value[index]
            case "copy":
                value.add().CopyFrom(value[rng.randrange(len(value))])
            case _:
                mutate_message(value[index], rng)
        return
    old = value[rng.randrange(len(value))] if repeated else value
    if isinstance(old, str):
        new: Any = rng.choice(["", old + "x", "../../etc/passwd", "\0", old[:-1], "é" * 300, rng.choice(WORDS)])
    elif isinstance(old, bytes):
        new = mutate_bytes(old, rng)
    elif isinstance(old, float):
        new = rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), old * 2])
    else:
        new = rng.choice([*NUMBERS, old + 1, old - 1, old * 2])
    try:
        if repeated:
            value[rng.randrange(len(value))] = new
        else:
            setattr(message, field.name, new)
    except (ValueError, TypeError, OverflowError):
        pass  # the field's type cannot hold it


WORDS = ["MatMul", "Gemm", "Loop", "If", "Constant", "Reshape", "Transpose", "Concat", "Slice", "Split", "onnx_quarot"]


def fuzz_model(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    data = rng.choice(exports())
    if rng.random() < 0.3:
        data = mutate_bytes(data, rng)
    else:
        model = onnx.ModelProto.FromString(data)
        if rng.random() < 0.3:
            move_outside(model, rng, folder)
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate_message(model, rng)
        data = model.SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data)
    try:
        oq.discover(path)
    except oq.OnnxQuarotError as error:
        return refusal(error)
    try:
        oq.rotate(path, folder / "out" / "rotated.onnx", verify=rng.random() < 0.3)
    except oq.OnnxQuarotError as error:
        assert not list((folder / "out").iterdir()), "an error, but an output"
        return refusal(error)
    return "rotated"


def move_outside(model: onnx.ModelProto, rng: random.Random, folder: Path) -> None:
    """Some weights as external data with absurd places."""
    (folder / "w.data").write_bytes(bytes(5000))
    for tensor in rng.sample(list(model.graph.initializer), min(3, len(model.graph.initializer))):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        places = ["w.data", "../w.data", "/etc/passwd", "out/../../x", "", ".", "w.data/", "\0"]
        for key, value in (
            ("location", rng.choice(places)),
            ("offset", str(rng.choice(NUMBERS))),
            ("length", str(rng.choice(NUMBERS))),
        ):
            if rng.random() < 0.7:
                entry = tensor.external_data.add()
                entry.key, entry.value = key, value


def refusal(error: oq.OnnxQuarotError) -> str:
    assert "\n" not in str(error), f"more than one line: {error}"
    return f"refused {type(error).__name__}"


# --- the operators ---

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


def fuzz_operator(seed: int, folder: Path) -> str:
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
        out = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([node], "g", inputs, out)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("onnx_quarot", 1)]
        content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    except (TypeError, ValueError, OverflowError):
        return "not a model"
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


# --- the GGUF reader ---


@functools.cache
def gguf_files() -> list[bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tiny.gguf"
        found = []
        for tied in (True, False):
            tiny_gguf.write(path, tied=tied)
            found.append(path.read_bytes())
    return found


def fuzz_gguf(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    data = rng.choice(gguf_files())
    if rng.random() < 0.8:  # the header is the part that steers
        cut = rng.choice([200, 2000, 8000])
        data = mutate_bytes(data[:cut], rng) + data[cut:]
    else:
        data = mutate_bytes(data, rng)
    path = folder / "m.gguf"
    path.write_bytes(data)
    try:
        model = GgufLlama(path)
        tokenizer_json(model)
        model.weight("blk.0.attn_q")
        model.weight("token_embd")
    except oq.OnnxQuarotError as error:
        return refusal(error)
    return "read"


# --- configurations ---

CONFIG = {
    "R1_pairs": [
        {
            "prev_nodes": ["/model/embed_tokens/Gather"],
            "norm_node": "/model/layers.0/input_layernorm/LayerNorm",
            "next_nodes": ["/model/layers.0/attn/qkv_proj/MatMul"],
        }
    ]
}


def mutate_json(value: Any, rng: random.Random) -> Any:
    odd: list[Any] = [None, True, -1, 1e308, "", "x" * 1000, [], {}, [[]], 10**30, "\ud800"]
    if rng.random() < 0.15:
        return rng.choice(odd)
    if isinstance(value, dict):
        changed = {k if rng.random() < 0.95 else rng.choice(["", "R2_pairs", k + "s"]): mutate_json(v, rng)
                   for k, v in value.items()}  # fmt: skip
        if rng.random() < 0.1:
            changed["extra"] = rng.choice(odd)
        return changed
    if isinstance(value, list | tuple):
        items = [mutate_json(v, rng) for v in value]
        return items * rng.choice([1, 1, 1, 2, 0]) if items else items
    return value


def fuzz_config(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    if rng.random() < 0.4:
        try:
            QConfig.from_dict(mutate_json(QConfig.get_default_config("A8W8").to_dict(), rng))
        except oq.OnnxQuarotError as error:
            return refusal(error)
        return "read"
    text = json.dumps(mutate_json(CONFIG, rng))
    data = text.encode()
    match rng.randrange(4):
        case 0:
            data = mutate_bytes(data, rng)
        case 1:
            data = rng.choice([b"[" * 100_000, b'{"R1_pairs":' * 20_000, b"\xff\xfe" + data, b"9" * 10_000, b"NaN"])
    path, model = folder / "config.json", folder / "m.onnx"
    path.write_bytes(data)
    try:
        read_rotation_config(path)
        model.write_bytes(exports()[-2])
        oq.discover(model, config=path)
    except oq.OnnxQuarotError as error:
        return refusal(error)
    return "honoured"


TARGETS: dict[str, Callable[[int, Path], str]] = {
    "model": fuzz_model,
    "operator": fuzz_operator,
    "gguf": fuzz_gguf,
    "config": fuzz_config,
}
