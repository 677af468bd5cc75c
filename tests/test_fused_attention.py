"""GroupQueryAttention in the compiled operator, beside ONNX Runtime's, and models rewritten to it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import onnx_quarot as oq
import small_llama
from onnx_quarot import _core
from onnx_quarot.custom_op import DOMAIN, register
from onnx_quarot.data import input_specs
from onnx_quarot.fused_attention import OP_TYPE, fuse_attention
from onnx_quarot.generate import Decoder

Array = np.ndarray[Any, Any]
MS = "com.microsoft"
POSITIONS = 400


@dataclass(frozen=True)
class Case:
    """One attention, and what comes in. past: keys in the cache, of `capacity`."""

    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    length: int = 9
    past: int = 0
    capacity: int = 0
    batch: int = 1
    packed: bool = True
    rotary: bool = True
    scale: float | None = None


def make_model(c: Case, **more: Any) -> onnx.ModelProto:
    """com.microsoft's operator; more: attributes."""
    f, i = TensorProto.FLOAT, TensorProto.INT32
    width = (c.heads + 2 * c.kv_heads if c.packed else c.heads) * c.size
    kv = ["b", "s", c.kv_heads * c.size]
    cache = ["b", c.kv_heads, "p", c.size]
    values = [("query", f, ["b", "s", width])]
    values += [] if c.packed else [("key", f, kv), ("value", f, kv)]
    values += [("past_key", f, cache), ("past_value", f, cache), ("lengths", i, ["b"]), ("total", i, [])]
    values += [(n, f, ["n", None]) for n in ("cos", "sin")] if c.rotary else []
    names = ["query", *(["", ""] if c.packed else ["key", "value"]), "past_key", "past_value", "lengths", "total"]
    attributes = {"num_heads": c.heads, "kv_num_heads": c.kv_heads, "do_rotary": int(c.rotary), **more}
    if c.scale is not None:
        attributes["scale"] = c.scale
    outputs = ["y", "present_key", "present_value"]
    inputs = names + (["cos", "sin"] if c.rotary else [])
    node = helper.make_node(OP_TYPE, inputs, outputs, "attention", domain=MS, **attributes)
    infos = [helper.make_tensor_value_info(*value) for value in values]
    shapes = [["b", "s", c.heads * c.size], *[["b", c.kv_heads, "t", c.size]] * 2]
    results = [helper.make_tensor_value_info(n, f, shape) for n, shape in zip(outputs, shapes, strict=True)]
    graph = helper.make_graph([node], "g", infos, results)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)], ir_version=10
    )


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    made = ir.from_proto(model)
    fuse_attention(made)
    return ir.to_proto(made)


def feeds(c: Case, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    found: dict[str, Array] = {}
    if c.packed:
        found["query"] = normal(c.batch, c.length, (c.heads + 2 * c.kv_heads) * c.size)
    else:
        found["query"] = normal(c.batch, c.length, c.heads * c.size)
        found |= {name: normal(c.batch, c.length, c.kv_heads * c.size) for name in ("key", "value")}
    for name in ("past_key", "past_value"):
        found[name] = normal(c.batch, c.kv_heads, max(c.capacity, c.past), c.size)
    found["lengths"] = np.full(c.batch, c.past + c.length - 1, np.int32)
    found["total"] = np.array(c.past + c.length, np.int32)
    if c.rotary:
        angles = np.arange(POSITIONS)[:, None] * 0.7 ** np.arange(c.size // 2)
        found |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return found


def run(model: onnx.ModelProto, values: dict[str, Array], library: bool = True, threads: int = 1) -> list[Array]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library:
        register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, values)
    return results


CASES = [
    Case(),
    Case(length=1, past=5),
    Case(length=200, size=64, heads=9, kv_heads=3),
    Case(length=1, past=130, size=64, heads=9, kv_heads=3, capacity=200),
    Case(length=70, past=100, size=80, packed=False),
    Case(length=65, size=128, heads=2, kv_heads=1, scale=0.2),
    Case(length=1, past=64, size=32, batch=2, capacity=80),
    Case(length=33, size=256, heads=1, kv_heads=1, rotary=False),
    Case(length=20, size=48, heads=7, kv_heads=1, packed=False, rotary=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_same_attention(case: Case) -> None:
    model, values = make_model(case), feeds(case)
    ours = fused(model)
    onnx.checker.check_model(ours)
    assert [(node.domain, node.op_type) for node in ours.graph.node] == [(DOMAIN, OP_TYPE)]
    wanted = run(model, values)
    count = case.past + case.length
    for threads in (1, 2):
        found = run(ours, values, threads=threads)
        assert [y.shape for y in found] == [y.shape for y in wanted]
        np.testing.assert_allclose(found[0], wanted[0], rtol=2e-4, atol=2e-6)
        for mine, theirs in zip(found[1:], wanted[1:], strict=True):
            np.testing.assert_allclose(mine[:, :, :count], theirs[:, :, :count], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(run(ours, values, library=False), wanted, strict=True):
        np.testing.assert_array_equal(mine[:, :, :count], theirs[:, :, :count])


def test_rotary_of_some_features() -> None:
    case = Case(length=12, past=3, size=32)
    values = feeds(case)
    values |= {name: np.ascontiguousarray(values[name][:, :5]) for name in ("cos", "sin")}
    packed = values["query"].reshape(1, 12, 8, 32)
    ours = run(fused(make_model(case)), values)
    angles = values["cos"][3:15, None], values["sin"][3:15, None]
    a, b, rest = np.split(packed[0].astype(np.float64), [5, 10], axis=-1)
    turned = np.concatenate([a * angles[0] - b * angles[1], b * angles[0] + a * angles[1], rest], axis=-1)
    np.testing.assert_allclose(ours[1][0, :, 3:], turned[:, 4:6].swapaxes(0, 1), rtol=1e-5, atol=1e-6)
    keys = np.repeat(ours[1][0].astype(np.float64), 2, axis=0)
    scores = np.einsum("shk,htk->hst", turned[:, :4], keys) / 32**0.5
    scores[:, np.arange(15) > np.arange(3, 15)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    wanted = np.einsum("hst,htk->shk", weights, np.repeat(ours[2][0].astype(np.float64), 2, axis=0))
    np.testing.assert_allclose(ours[0][0], wanted.reshape(12, -1), rtol=1e-4, atol=1e-5)


def test_prompts_of_several_lengths() -> None:
    """What stands behind the end of a shorter one is not looked at."""
    case = Case(length=70, batch=2)
    values = feeds(case)
    values["lengths"] = np.array([69, 39], np.int32)
    model = make_model(case)
    found, wanted = run(fused(model), values)[0], run(model, values)[0]
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-4, atol=2e-6)
    np.testing.assert_allclose(found[1, :40], wanted[1, :40], rtol=2e-4, atol=2e-6)
    assert np.isfinite(found).all()


def test_tokens_behind_prompts_of_several_lengths() -> None:
    case = Case(length=1, past=70, batch=2, capacity=90)
    values = feeds(case)
    values["lengths"] = np.array([70, 39], np.int32)
    model = make_model(case)
    found, wanted = run(fused(model), values), run(model, values)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-4, atol=2e-6)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(mine[1, :, :40], theirs[1, :, :40], rtol=1e-5, atol=1e-6)


def test_caches_grow_in_place() -> None:
    case = Case(length=5, past=60, capacity=96, size=32)
    values = feeds(case)
    ours = fused(make_model(case))
    wanted = run(ours, values)
    options = ort.SessionOptions()
    register(options)
    session = ort.InferenceSession(ours.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in values.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", held[f"past_{name}"])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.get_outputs()[2].numpy(), wanted[0])
    for index, name in ((1, "past_key"), (2, "past_value")):
        found = held[name].numpy()
        np.testing.assert_array_equal(found[:, :, :65], wanted[index][:, :, :65])
        np.testing.assert_array_equal(found[:, :, 65:], values[name][:, :, 65:])


def test_a_bad_query_leaves_the_others_alone() -> None:
    case = Case(length=80)
    values = feeds(case)
    clean = run(fused(make_model(case)), values)[0]
    values["query"][0, 3, 2] = np.nan
    found = run(fused(make_model(case)), values)[0]
    assert np.isnan(found[0, 3, :16]).all()
    kept = [i for i in range(80) if i != 3]
    np.testing.assert_array_equal(found[0, kept], clean[0, kept])


@pytest.mark.parametrize("isa", _core.isas())
def test_every_isa_gives_the_same_bits(isa: str, tmp_path: Path) -> None:
    """But for the baseline, which has no fused multiply-adds where it is compiled for old CPUs."""
    case = Case(length=90, past=40, size=80, heads=6)
    values = feeds(case)
    onnx.save(fused(make_model(case)), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", **values)
    code = (
        "import numpy as np, sys, onnx_quarot as oq\n"
        "f = sys.argv[1]\n"
        "np.save(f + '/y.npy', oq.session(f + '/m.onnx').run(None, dict(np.load(f + '/x.npz')))[0])\n"
    )
    environment = {**os.environ, "ONNX_QUAROT_ISA": isa}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    found, wanted = np.load(tmp_path / "y.npy"), run(fused(make_model(case)), values)[0]
    if isa == "baseline":
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": np.zeros((1, 9, 120), np.float32)}, r"query has shape \[1, 9, 120\]: it must be \[1, 9, 128\]"),
        ({"past_key": np.zeros((1, 2, 3, 8), np.float32)}, r"past_key has shape \[1, 2, 3, 8\]"),
        ({"total": np.array(8, np.int32)}, "total_sequence_length is 8: it must be 9, the length of query, to 9"),
        (
            {"total": np.array(10, np.int32)},
            "total_sequence_length is 10: it must be 9, .* to 9, with all of the cache",
        ),
        ({"lengths": np.array([9], np.int32)}, r"seqlens_k\[0\] is 9: it does not fit"),
        ({"lengths": np.array([-1], np.int32)}, r"seqlens_k\[0\] is -1: it does not fit"),
        (
            {"past_key": np.zeros((1, 2, 4, 16), np.float32), "past_value": np.zeros((1, 2, 4, 16), np.float32)}
            | {"lengths": np.array([7], np.int32), "total": np.array(12, np.int32)},
            r"seqlens_k\[0\] is 7: it does not fit .* of 12, a length of 9 and a cache of 4",
        ),
        ({"lengths": np.array([1, 2], np.int32)}, r"seqlens_k has shape \[2\]: it must have an element for each"),
        ({"cos": np.zeros((400, 9), np.float32)}, r"cos_cache has shape \[400, 9\]: .* at most half of head_size"),
        ({"sin": np.zeros((400, 7), np.float32)}, r"sin_cache has shape \[400, 7\]: it must be \[400, 8\]"),
        ({n: np.zeros((8, 8), np.float32) for n in ("cos", "sin")}, "cos_cache has 8 positions: 9 are needed"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Array], message: str) -> None:
    model = fused(make_model(Case()))
    for info in model.graph.input:
        info.type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=message):
        run(model, feeds(Case()) | changed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_num_heads", 3, "num_heads is 4: it must be a multiple of 3, kv_num_heads"),
        ("head_size", 24, "head_size is 24: it must be a multiple of 16, at most 256"),
        ("num_heads", 0, "num_heads is 0: it must be 1 to 65536"),
    ],
)
def test_attributes_are_checked(name: str, value: int, message: str) -> None:
    model = fused(make_model(Case()))
    next(a for a in model.graph.node[0].attribute if a.name == name).i = value
    with pytest.raises(Exception, match=f"GroupQueryAttention node 'attention': {message}"):
        run(model, feeds(Case()))


@pytest.mark.parametrize(
    "more",
    [
        {"local_window_size": 4},
        {"softcap": 10.0},
        {"rotary_interleaved": 1},
        {"smooth_softmax": 1},
        {"something_new": 1},
    ],
)
def test_other_attention_stays_as_it_is(more: dict[str, Any]) -> None:
    assert fused(make_model(Case(), **more)).graph.node[0].domain == MS


@pytest.mark.parametrize("case", [Case(size=24), Case(size=272), Case(size=8)], ids=str)
def test_heads_of_other_sizes_stay_as_they_are(case: Case) -> None:
    assert fused(make_model(case)).graph.node[0].domain == MS


@pytest.mark.parametrize("separate", [False, True])
def test_a_model_decodes_as_before(tmp_path: Path, separate: bool) -> None:
    config = replace(small_llama.Config(layers=2, vocab=160), separate_qkv=separate)
    path = small_llama.save(tmp_path / "model.onnx", config)
    data = [small_llama.decoder_feeds(config, np.random.default_rng(seed), 48) for seed in range(2)]
    oq.quantize(path, tmp_path / "q.onnx", data, scheme="a8w8-dynamic")
    model = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(model)
    attentions = [node for node in model.graph.node if node.op_type == OP_TYPE]
    assert [node.domain for node in attentions] == [DOMAIN] * 2
    tokens = data[1]["input_ids"]
    whole = oq.session(tmp_path / "q.onnx").run(["logits"], data[1])[0]
    specs = input_specs(tmp_path / "q.onnx")
    for capacity in (None, 64):  # growing caches, and such as are extended in place
        decoder = Decoder(oq.session(tmp_path / "q.onnx"), specs, capacity=capacity)
        decoder.feed(tokens[:, :40])
        for i in range(40, 47):
            decoder.feed(tokens[:, i : i + 1])
        last = decoder.feed(tokens[:, 47:])
        np.testing.assert_allclose(last.reshape(-1), whole[0, -1], rtol=1e-3, atol=1e-3 * np.abs(whole).max())


def test_a_quantized_cache_stays_with_onnxruntime(tmp_path: Path) -> None:
    config = small_llama.Config(layers=1, vocab=160)
    path = small_llama.save(tmp_path / "model.onnx", config)
    data = [small_llama.decoder_feeds(config, np.random.default_rng(0), 48)]
    oq.quantize(path, tmp_path / "q.onnx", data, scheme="a8w8-dynamic", kv_cache="int8")
    found = [node.domain for node in onnx.load(tmp_path / "q.onnx").graph.node if node.op_type == OP_TYPE]
    assert found == [MS]
