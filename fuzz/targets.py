"""What is fuzzed: functions of a seed and a folder that say how the case ended, or raise for what must not happen."""

from __future__ import annotations

import functools
import json
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message
from onnx import TensorProto
from operators import NUMBERS, fuzz_operator

import onnx_quarot as oq
import small_llama
import tiny_gguf
from onnx_quarot.demo.gguf_model import GgufLlama
from onnx_quarot.demo.tokenizer import tokenizer_json
from onnx_quarot.quantization.config import QConfig
from onnx_quarot.rotation_config import read_rotation_config

DATA = Path(__file__).parent.parent / "tests" / "data"


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


PARSERS = ("google.protobuf", "onnx.", "onnx_ir", "onnxruntime", "gguf", "json")


def refusal(error: oq.OnnxQuarotError) -> str:
    """How the case ended. An error made of an exception that this package's own code raised is no refusal but a bug,
    however neatly it is worded; those of the parsers and of ONNX Runtime are excused.
    """
    assert "\n" not in str(error), f"more than one line: {error}"
    cause: BaseException | None = error.__cause__
    while cause is not None:
        if not (isinstance(cause, oq.OnnxQuarotError | OSError | MemoryError) or of_a_parser(cause)):
            raise AssertionError(f"{error}\nhides a bug") from cause
        cause = cause.__cause__
    return f"refused {type(error).__name__}"


def of_a_parser(error: BaseException) -> bool:
    """Whether a parser raised it, by its class or by where: at the parser's door, or inside."""
    if type(error).__module__.startswith(PARSERS):
        return True
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    innermost = [m for m in modules if m.startswith(("onnx_quarot", *PARSERS))][-1:]
    if innermost and not innermost[0].startswith("onnx_quarot"):
        return True
    # Raised by compiled code, which leaves no frame: bytes that are no UTF-8, numbers of 10,000 digits, many brackets.
    return isinstance(error, UnicodeDecodeError | RecursionError) or "integer string conversion" in str(error)


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
