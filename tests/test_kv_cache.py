from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.clipping import fit_rows
from onnx_quarot.errors import ConfigError
from onnx_quarot.kv_cache import CACHES, _Sample
from onnx_quarot.scheme import TensorSpec

LLAMA = small_llama.Config(layers=2, vocab=160)
CHUNK = 8


@pytest.fixture(scope="module", params=[False, True], ids=["head size", "symbolic head size"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_llama.Config(layers=2, vocab=160, symbolic_cache=request.param)
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", config)


def batches(count: int = 4, length: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [small_llama.decoder_feeds(LLAMA, rng, length) for _ in range(count)]


def logits_through_the_cache(path: Path) -> np.ndarray:
    """A prompt in chunks, so that later tokens see earlier ones only through the cache."""
    session = oq.session(path)
    width = {i.name: i.shape[-1] for i in session.get_inputs()}
    kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8, "tensor(uint8)": np.uint8}
    feeds = batches(5)[-1]
    ids = feeds["input_ids"]
    cache = {
        i.name: np.zeros((1, LLAMA.kv_heads, 0, w if isinstance(w := width[i.name], int) else 16), kinds[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    outputs = [o.name for o in session.get_outputs()]
    logits = []
    for start in range(0, ids.shape[1], CHUNK):
        mask = np.ones((1, start + CHUNK), np.int64)
        step = {"input_ids": ids[:, start : start + CHUNK], "attention_mask": mask, **cache}
        results = dict(zip(outputs, session.run(None, step), strict=True))
        logits.append(results["logits"])
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("kv_cache", CACHES)
def test_close_to_the_float_cache(llama: Path, tmp_path: Path, kv_cache: str) -> None:
    """Beside the same scheme with a float cache."""
    oq.quantize(llama, tmp_path / "float.onnx", batches(), scheme="a8w8-block")
    report = oq.quantize(llama, tmp_path / "q.onnx", batches(), scheme="a8w8-block", kv_cache=kv_cache)
    a, b = logits_through_the_cache(tmp_path / "float.onnx"), logits_through_the_cache(tmp_path / "q.onnx")
    error = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    assert 0 < error < (0.06 if kv_cache.startswith("int8") else 0.35)
    bits = 8 if kv_cache.startswith("int8") else 4
    count = 2 * 2 * LLAMA.kv_heads * LLAMA.head_size
    assert f"2 layers, {4 * count} -> {count * bits // 8} bytes a token" in report.notes[-1]
    assert report.scheme == f"a8w8-block, {kv_cache} cache"
    model = onnx.load(tmp_path / "q.onnx")
    past = next(i for i in model.graph.input if i.name == "past_key_values.0.key").type.tensor_type
    assert past.elem_type == (TensorProto.INT8 if bits == 8 else TensorProto.UINT8)
    assert past.shape.dim[3].dim_value == LLAMA.head_size * bits // 8


def test_it_goes_with_static_schemes_too(llama: Path, tmp_path: Path) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(), scheme="a8w8", kv_cache="int8")
    a, b = logits_through_the_cache(llama), logits_through_the_cache(tmp_path / "q.onnx")
    assert float(np.linalg.norm(a - b) / np.linalg.norm(a)) < 0.12


def test_samples_keep_extremes_and_bounded_rows() -> None:
    sample = _Sample()
    rng = np.random.default_rng(0)
    for _ in range(40):
        sample.update(rng.standard_normal((1, 2, 100, 8)).astype(np.float32))
    spike = np.zeros((1, 2, 1, 8), np.float32)
    spike[0, 1, 0, 3] = 50
    sample.update(spike)
    assert sum(map(len, sample._rows)) <= 1024
    scale = sample.scale(TensorSpec(bits=8), per_channel=True)
    assert scale.shape == (16,)
    assert scale[8 + 3] > 4 * np.delete(scale, 8 + 3).max()
    assert sample.scale(TensorSpec(bits=8), per_channel=False).shape == (1,)


def test_few_rows_are_all_used() -> None:
    sample = _Sample()
    values = np.random.default_rng(0).standard_normal((1, 1, 50, 4)).astype(np.float32)
    sample.update(values)
    rows = np.concatenate([values[0, 0], np.abs(values[0, 0]).max(0)[None]])
    spec = TensorSpec(bits=4)
    np.testing.assert_allclose(sample.scale(spec, per_channel=True), fit_rows(rows.T, spec)[0])


def test_refusals(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache: 'int2' is not supported"):
        oq.quantize(llama, tmp_path / "q.onnx", batches(1), kv_cache="int2")
    weight = numpy_helper.from_array(np.eye(32, dtype=np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 32]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="kv_cache: the model has no GroupQueryAttention"):
        oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"x": np.ones((4, 32), np.float32)}], kv_cache="int8")
    oq.quantize(llama, tmp_path / "q.onnx", batches(1), scheme="a8w8-dynamic", kv_cache="int8")
    assert any(v.dtype == ir.DataType.INT8 for v in ir.load(tmp_path / "q.onnx").graph.inputs)
