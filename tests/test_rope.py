"""R3: position encodings taken out of attention, queries and keys rotated behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from exports import DATA, runnable
from onnx_quarot.data import input_specs
from onnx_quarot.discovery import discover_model
from onnx_quarot.discovery.rope import fused_keys, unfuse_rope
from onnx_quarot.load import load
from onnx_quarot.plan import ROTATIONS
from onnx_quarot.segments import run_in_segments
from onnx_quarot.verify import random_feeds

LLAMA = small_llama.Config(layers=2, vocab=160)
CACHED = [*(f"genai_{n}" for n in ("llama", "llama_fp16", "qwen2", "qwen3", "mistral", "phi3")), "genai_gptoss"]
WITHOUT_ROPE = ["gpt2", "opt", "bert", "vit", "whisper_encoder"]


def kinds(plan: oq.Plan) -> dict[str, int]:
    return {kind: list(plan.kinds.values()).count(kind) for kind in ROTATIONS}


@pytest.mark.parametrize("name", CACHED)
def test_keys_behind_rope_cost_two_transforms_a_layer(name: str, tmp_path: Path) -> None:
    path = DATA / f"{name}.onnx"
    usual, plan = discover_model(load(path)), discover_model(load(path), rotations=ROTATIONS)
    assert kinds(plan) == {**kinds(usual), "R3": 2}
    assert len(plan.online) == len(usual.online) + 4
    assert len(plan.states) == 4  # two layers' keys and values
    report = oq.rotate(runnable(name), tmp_path / "a.onnx", plan=oq.Plan.from_json(plan.to_json()))
    assert report.verification is not None
    assert report.verification.worst < (2e-2 if "fp16" in name else 1e-4)


@pytest.mark.parametrize("export", ["script", "dynamo"])
@pytest.mark.parametrize("name", WITHOUT_ROPE)
def test_without_rope_it_folds_into_weights(name: str, export: str, tmp_path: Path) -> None:
    path = DATA / f"{name}_{export}.onnx"
    usual, plan = discover_model(load(path)), discover_model(load(path), rotations=ROTATIONS)
    assert kinds(plan)["R3"] == 2
    assert len(plan.online) == len(usual.online)
    report = oq.rotate(path, tmp_path / "a.onnx", plan=plan)
    assert report.verification is not None
    assert report.verification.worst < 1e-4


def test_left_out_where_rope_is_spelled_out_and_nothing_is_cached() -> None:
    plan = discover_model(load(DATA / "llama_script.onnx"), rotations=ROTATIONS)
    assert kinds(plan)["R3"] == 0
    assert any(note.startswith("R3 was left out") for note in plan.notes)


# ---------------------------------------------------------------------------------------------------------------------
# The operator's own counting of positions.


def build(tmp_path: Path, **changes: object) -> Path:
    """A small Llama, its attention changed: partial or interleaved RoPE, position ids, separate q, k, v."""
    size = 32 if "rotary" in changes else 16
    config = small_llama.Config(layers=2, vocab=160, head_size=size, separate_qkv=bool(changes.pop("separate", False)))
    model = small_llama.build(config)
    width = int(changes.pop("rotary", config.head_size))  # type: ignore[call-overload]
    for tensor in model.graph.initializer:
        if tensor.name in ("cos_cache", "sin_cache"):
            kept = numpy_helper.to_array(tensor)[:, : width // 2]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(kept), tensor.name))
    given = changes.pop("position_ids", False)
    if given:
        shape = ["batch_size", "sequence_length"]
        model.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, shape))
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            kept_attributes = [a for a in node.attribute if a.name not in changes]
            del node.attribute[:]
            node.attribute.extend([*kept_attributes, *(helper.make_attribute(k, v) for k, v in changes.items())])
            if given:
                node.input.append("position_ids")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def unfused(path: Path) -> Path:
    model = load(path)
    unfuse_rope(model)
    assert [n.op_type for n in model.graph].count("RotaryEmbedding") == 4
    assert all(not n.attributes.get_int("do_rotary", 0) for n in model.graph)
    out = path.with_name("unfused.onnx")
    ir.save(model, out)
    return out


def steps(path: Path, lengths: list[int], batch: int = 1, padded: int = 0) -> np.ndarray:
    """Logits of prompts in pieces of the given lengths. ``padded``: the first prompt is that much shorter."""
    session, rng = oq.session(path), np.random.default_rng(3)
    cache = {
        i.name: np.zeros((batch, LLAMA.kv_heads, 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    names, logits, done = [o.name for o in session.get_outputs()], [], 0
    for length in lengths:
        mask = np.ones((batch, done + length), np.int64)
        if padded:
            mask[0, -padded:] = 0
        feeds = {"input_ids": rng.integers(0, LLAMA.vocab, (batch, length)), "attention_mask": mask, **cache}
        results = dict(zip(names, session.run(None, feeds), strict=True))
        done += length
        logits.append(results["logits"])
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"separate": True}, {"rotary": 16}, {"rotary_interleaved": 1}, {"local_window_size": 4}, {"softcap": 5.0}],
    ids=str,
)
def test_prompt_chunks_and_single_tokens(tmp_path: Path, changes: dict[str, object]) -> None:
    path = build(tmp_path, **changes)
    np.testing.assert_allclose(steps(unfused(path), [9, 1, 1, 6, 1]), steps(path, [9, 1, 1, 6, 1]), atol=2e-4)


def test_a_padded_batch(tmp_path: Path) -> None:
    path = build(tmp_path)
    a, b = steps(unfused(path), [9], batch=2, padded=3), steps(path, [9], batch=2, padded=3)
    np.testing.assert_allclose(a[0, :6], b[0, :6], atol=2e-4)
    np.testing.assert_allclose(a[1], b[1], atol=2e-4)


def test_positions_are_counted_once(tmp_path: Path) -> None:
    model = load(unfused(build(tmp_path)))
    assert [n.op_type for n in model.graph].count("Range") == 1


@pytest.mark.parametrize("why", ["quantized", "not cached", "no RoPE", "positions given"])
def test_what_stays_fused(tmp_path: Path, why: str) -> None:
    model = load(build(tmp_path, position_ids=why == "positions given"))
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            if why == "quantized":
                node.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
            elif why == "no RoPE":
                node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
    if why == "not cached":
        for _ in range(2 * LLAMA.layers):
            model.graph.outputs.pop()
    before = [n.op_type for n in model.graph]
    unfuse_rope(model)
    assert [n.op_type for n in model.graph] == before
    reasons = {
        "quantized": "its cache is quantized already",
        "not cached": "its cache is not an input and output of the model",
        "positions given": "given positions mean different things",
    }
    assert (fused_keys(model) is None) if why == "no RoPE" else (reasons[why] in str(fused_keys(model)))


def test_whoever_asks_for_keys_is_told_why_they_stay_fused(tmp_path: Path) -> None:
    plan = oq.discover(build(tmp_path, position_ids=True), rotations=ROTATIONS)
    assert any("keeps its keys' encoding inside: given positions" in note for note in plan.notes)
    assert not any("encoding" in note for note in oq.discover(build(tmp_path, position_ids=True)).notes)


def test_tables_of_angles_that_a_branch_chooses(tmp_path: Path) -> None:
    """Long contexts (LongRoPE, arXiv:2402.13753) have tables of their own, of more positions."""
    path = build(tmp_path)
    proto = onnx.load(path)
    tables = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name in ("cos_cache", "sin_cache")}
    branches = {}
    for name, keep in (("then_branch", 32), ("else_branch", 64)):
        made = [numpy_helper.from_array(t[:keep], f"{name}/{k}") for k, t in tables.items()]
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in made]
        outputs = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.dims) for t in made]
        branches[name] = helper.make_graph(nodes, name, [], outputs)
    for tensor in [t for t in proto.graph.initializer if t.name in tables]:
        proto.graph.initializer.remove(tensor)
    limit = numpy_helper.from_array(np.array(20, np.int64))
    choice = [
        helper.make_node("Shape", ["attention_mask"], ["how_long"], start=1, end=2),
        helper.make_node("Squeeze", ["how_long"], ["length_in_all"]),
        helper.make_node("Constant", [], ["limit"], value=limit),
        helper.make_node("Less", ["length_in_all", "limit"], ["short"]),
        helper.make_node("If", ["short"], list(tables), **branches),
    ]
    for node in reversed(choice):
        proto.graph.node.insert(0, node)
    onnx.save(proto, path)
    np.testing.assert_allclose(steps(unfused(path), [9, 1, 15, 1]), steps(path, [9, 1, 15, 1]), atol=2e-4)
    plan = oq.rotate(path, tmp_path / "r.onnx", rotations=ROTATIONS).plan
    assert plan is not None
    assert kinds(plan)["R3"] == 2


# ---------------------------------------------------------------------------------------------------------------------
# Norms of queries and keys inside the operator, which ONNX Runtime's CPU provider does not compute.


def normed_inside(source: Path, target: Path) -> Path:
    """The norms in front of every attention become inputs of it."""
    proto = onnx.load(source)
    makers = {o: n for n in proto.graph.node for o in n.output}
    for node in [n for n in proto.graph.node if n.op_type == "GroupQueryAttention"]:
        inputs = [*node.input, *[""] * (16 - len(node.input))]
        for index, scale in ((0, 14), (1, 15)):
            rows = makers[inputs[index]]
            norm = makers[rows.input[0]]
            heads = makers[norm.input[0]]
            assert norm.op_type == "SimplifiedLayerNormalization"
            inputs[index], inputs[scale] = heads.input[0], norm.input[1]
            for old in (rows, norm, heads):
                proto.graph.node.remove(old)
        del node.input[:]
        node.input.extend(inputs)
        node.attribute.append(helper.make_attribute("qk_norm_epsilon", 0.25))
        node.attribute.append(helper.make_attribute("k_norm_epsilon", 1e-6))
    onnx.save(proto, target)
    return target


def with_epsilon(source: Path, target: Path) -> Path:
    """The same model as :func:`normed_inside`, with its norms outside."""
    proto = onnx.load(source)
    makers = {o: n for n in proto.graph.node for o in n.output}
    for node in [n for n in proto.graph.node if n.op_type == "GroupQueryAttention"]:
        for index, epsilon in ((0, 0.25), (1, 1e-6)):
            norm = makers[makers[node.input[index]].input[0]]
            kept = [a for a in norm.attribute if a.name != "epsilon"]
            del norm.attribute[:]
            norm.attribute.extend([*kept, helper.make_attribute("epsilon", epsilon)])
    onnx.save(proto, target)
    return target


def test_norms_inside_attention_are_computed_in_front_of_it(tmp_path: Path) -> None:
    inside = normed_inside(DATA / "genai_qwen3.onnx", tmp_path / "inside.onnx")
    outside = with_epsilon(DATA / "genai_qwen3.onnx", tmp_path / "outside.onnx")
    feeds = random_feeds(input_specs(inside))
    for a, b in zip(
        run_in_segments(inside, feeds, ["logits", "present.1.key"]),
        run_in_segments(outside, feeds, ["logits", "present.1.key"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotations", [("R1", "R2", "R4"), ROTATIONS], ids=len)
def test_norms_inside_attention(rotations: tuple[str, ...], tmp_path: Path) -> None:
    """They stay there unless keys are to be rotated; then norm, encoding and rotation follow one another."""
    report = oq.rotate(normed_inside(DATA / "genai_qwen3.onnx", tmp_path / "m.onnx"), tmp_path / "r.onnx",
                       rotations=rotations)  # fmt: skip
    assert report.plan is not None
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    plain = discover_model(load(DATA / "genai_qwen3.onnx"), rotations=rotations)
    assert len(report.plan.online) == len(plain.online)
    assert kinds(report.plan) == kinds(plain)
    inside = [len(n.inputs) == 16 for n in load(tmp_path / "r.onnx").graph if n.op_type == "GroupQueryAttention"]
    assert inside == [rotations != ROTATIONS] * 2


@pytest.mark.parametrize("kv_cache", ["int4", "int4-tensor"])
def test_a_quantized_cache_takes_norms_out_of_attention(kv_cache: str, tmp_path: Path) -> None:
    source = normed_inside(DATA / "genai_qwen3.onnx", tmp_path / "m.onnx")
    data = [random_feeds(input_specs(source), seed=seed, past=0) for seed in range(2)]
    report = oq.quantize(source, tmp_path / "q.onnx", data, scheme="a8w8-block", kv_cache=kv_cache)
    assert any("key/value cache: 2 layers" in note for note in report.notes)
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    assert oq.session(tmp_path / "q.onnx").get_inputs()[-1].type == "tensor(uint8)"


def test_quantize_leaves_keys_alone_without_a_quantized_cache(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "model.onnx", LLAMA)
    data = [small_llama.decoder_feeds(LLAMA, np.random.default_rng(0), 16)]
    report = oq.quantize(source, tmp_path / "q.onnx", data, rotations=ROTATIONS)
    assert report.rotations == ("R1", "R2", "R4")
    assert any("R3 was left out" in note for note in report.notes)
