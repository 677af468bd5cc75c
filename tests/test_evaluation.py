"""Evaluation: figures worked out by hand on bigram models, speeds present, data that does not fit refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
import tiny_gguf
from onnx_quarot.comparison import Comparison, log_softmax
from onnx_quarot.demo import build_model
from onnx_quarot.errors import ConfigError, DataError, ModelError
from onnx_quarot.evaluation import Metrics, evaluate, evaluate_many, measure
from onnx_quarot.load import model_size

# The probability of each next token (columns) after each token (rows).
REFERENCE = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.125, 0.5, 0.25], [0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
CANDIDATE = np.array([[0.25, 0.5, 0.125, 0.125], [0.125, 0.125, 0.5, 0.25], [0.1, 0.2, 0.3, 0.4], [0.25] * 4])


def save_text(path: Path, text: str, tables: dict[str, np.ndarray[Any, Any]]) -> Path:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> {text}')
    for name, array in tables.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array.astype(np.float32), name=name)
        model.graph.register_initializer(value)
    ir.save(model, path)
    return path


def bigram(path: Path, probabilities: np.ndarray[Any, Any], *, shift: float = 3.0) -> Path:
    """A model whose logits are log-probabilities (plus a constant, which must not matter)."""
    return save_text(
        path,
        "bigram (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, v] scores) "
        "{ scores = Gather(table, input_ids) }",
        {"table": np.log(probabilities) + shift},
    )


def batch(ids: list[list[int]], mask: list[list[int]] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    array = np.array(ids, np.int64)
    return {
        "input_ids": array,
        "attention_mask": np.ones_like(array) if mask is None else np.array(mask, np.int64),
    }


BATCHES = [batch([[0, 1, 2, 3, 0]]), batch([[3, 3, 1, 2, 0]])]
STEPS = [(0, 1), (1, 2), (2, 3), (3, 0), (3, 3), (3, 1), (1, 2), (2, 0)]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    return bigram(tmp_path / "reference.onnx", REFERENCE), bigram(tmp_path / "candidate.onnx", CANDIDATE, shift=-1)


def test_perplexity_divergence_and_agreement_by_hand(models: tuple[Path, Path]) -> None:
    found = evaluate(*models, BATCHES)
    rows, columns = np.array(STEPS).T
    ours, theirs = (np.exp(-np.log(p[rows, columns]).mean()) for p in (REFERENCE, CANDIDATE))
    assert found.reference.perplexity == pytest.approx(ours, rel=1e-6)
    assert found.candidate.perplexity == pytest.approx(theirs, rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(theirs / ours, rel=1e-6)
    divergence = (REFERENCE * np.log(REFERENCE / CANDIDATE)).sum(-1)[rows].mean()
    assert found.kl_divergence == pytest.approx(divergence, rel=1e-5)
    # rows 0 (0 against 1), 2 (tie, first wins: 0 against 3) and 3 (3 against 0) differ, row 1 agrees
    assert found.top1_agreement == pytest.approx(np.mean(rows == 1))
    assert (found.windows, found.tokens) == (2, 8)
    assert found.cosine == {}


def test_same_model_is_no_loss(models: tuple[Path, Path]) -> None:
    found = evaluate(models[0], models[0], BATCHES)
    assert found.perplexity_ratio == 1
    assert found.kl_divergence == 0
    assert found.top1_agreement == 1


def test_masked_tokens_do_not_count(models: tuple[Path, Path]) -> None:
    padded = [batch([[2, 0, 1, 2, 3], [0, 1, 2, 3, 3]], [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])]
    rows, columns = np.array([(0, 1), (1, 2), (2, 3), (0, 1), (1, 2)]).T
    found = measure(models[0], padded)
    assert found.perplexity == pytest.approx(np.exp(-np.log(REFERENCE[rows, columns]).mean()), rel=1e-6)


def test_many_candidates_at_once_equal_one_by_one(models: tuple[Path, Path]) -> None:
    both = evaluate_many(models[0], [models[1], models[0]], BATCHES)
    single = evaluate(*models, BATCHES)
    assert both[0].kl_divergence == single.kl_divergence
    assert both[0].candidate.perplexity == single.candidate.perplexity
    assert both[1].kl_divergence == 0
    assert both[0].reference == both[1].reference


def test_windows_limits_what_is_run(models: tuple[Path, Path]) -> None:
    assert evaluate(*models, BATCHES, windows=1).tokens == 4


def test_metrics_are_plain_json(models: tuple[Path, Path]) -> None:
    found = evaluate(*models, BATCHES)
    again = json.loads(json.dumps(found.to_json()))
    assert again["candidate"]["perplexity"] == found.candidate.perplexity
    assert isinstance(found, Metrics)


def test_log_softmax_of_extreme_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], np.float32)
    rows = np.concatenate([part for _, part in log_softmax(logits, np.arange(2))])
    assert rows[0, 0] == 0
    assert np.all(np.isfinite(rows))
    assert rows[1] == pytest.approx(np.log(1 / 3))


def encoder(path: Path, table: np.ndarray[Any, Any]) -> Path:
    """Looks at all tokens at once, so its output predicts nothing, wide as it may be."""
    return save_text(
        path,
        "encoder (int64[b, s] input_ids) => (float[b, s, h] states, float[b, t, h] pooled) "
        "{ e = Gather(table, input_ids) pooled = ReduceMean(e, axes) states = Add(e, pooled) }".replace(
            "{ e", "<int64[1] axes = {1}> { e"
        ),
        {"table": table},
    )


def test_encoders_are_compared_by_their_outputs(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((4, 8))
    a, b = encoder(tmp_path / "a.onnx", table), encoder(tmp_path / "b.onnx", 2 * table)
    data = [{"input_ids": x["input_ids"]} for x in BATCHES]
    found = evaluate(a, b, data)
    assert found.perplexity_ratio is None
    assert found.tokens == 0
    assert found.cosine == pytest.approx({"states": 1.0, "pooled": 1.0})
    assert found.relative_error == pytest.approx({"states": 1.0, "pooled": 1.0})
    assert found.reference.decode_tokens_per_second is None
    assert evaluate(a, b, [{"input_ids": np.array([[0, 1, 0]])}]).tokens == 0
    same = evaluate(a, a, data)
    assert same.relative_error == {"states": 0.0, "pooled": 0.0}


def test_padding_does_not_make_an_encoder_causal(tmp_path: Path) -> None:
    model = save_text(
        tmp_path / "masked.onnx",
        "masked (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, h] states) "
        "<int64[1] axis = {1}, int64[1] last = {2}> { e = Gather(table, input_ids) "
        "m = Cast<to = 1>(attention_mask) m3 = Unsqueeze(m, last) kept = Mul(e, m3) "
        "pooled = ReduceMean(kept, axis) states = Add(e, pooled) }",
        {"table": np.random.default_rng(0).standard_normal((4, 8))},
    )
    found = evaluate(model, model, [batch([[0, 1, 2, 3, 3]], [[1, 1, 1, 0, 0]])])
    assert found.perplexity_ratio is None
    assert found.cosine == {"states": 1.0}


def test_cosine_and_error_by_hand() -> None:
    sums = Comparison()
    sums.add_outputs("y", np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]]))
    sums.add_outputs("y", np.zeros((2, 2)), np.array([[0.0, 0.0], [0.0, 1.0]]))
    assert sums.cosine() == {"y": pytest.approx((1 + 0 + 1 + 0) / 4)}
    assert sums.relative_error() == {"y": pytest.approx(np.sqrt((2 + 1) / 26))}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny_gguf.Tiny, Path]:
    folder = tmp_path_factory.mktemp("llama")
    tiny = tiny_gguf.write(folder / "tiny.gguf")
    return tiny, build_model(tiny.path, folder / "model")


def test_decoder_from_text(llama: tuple[tiny_gguf.Tiny, Path]) -> None:
    tiny, folder = llama
    text = "hello there, this is a text of some length, hello again. " * 6
    found = measure(folder / "model.onnx", text, tokenizer=folder, window=32)
    from tokenizers import Tokenizer

    ids = np.array(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    losses = []
    for start in range(0, len(ids) - 31, 32):
        part = ids[start : start + 32]
        logits = tiny.logits(part)[:-1]
        logits -= logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(31), part[1:]])
    assert found.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found.prefill_tokens_per_second
    assert found.decode_tokens_per_second


def test_a_window_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    """Decoding is timed within the window: there is nothing behind it."""
    config = small_llama.Config()
    path = small_llama.save(tmp_path / "m.onnx", config)
    for length, timed in ((64, True), (3, True), (2, False)):
        feeds = small_llama.decoder_feeds(config, np.random.default_rng(0), length=length)
        found = measure(path, [feeds])
        assert (found.decode_tokens_per_second is not None) == timed
        assert found.perplexity is not None


def test_size_counts_external_data(llama: tuple[tiny_gguf.Tiny, Path], models: tuple[Path, Path]) -> None:
    files = [llama[1] / name for name in ("model.onnx", "model.onnx.data")]
    assert model_size(files[0]) == sum(file.stat().st_size for file in files)
    assert model_size(models[0]) == models[0].stat().st_size


# -- what does not fit --


def test_errors_name_what_is_wrong(models: tuple[Path, Path], tmp_path: Path) -> None:
    reference, candidate = models
    with pytest.raises(DataError, match="input_idz"):
        evaluate(reference, candidate, [{"input_idz": BATCHES[0]["input_ids"]}])
    with pytest.raises(DataError, match="tokenizer"):
        evaluate(reference, candidate, "text\n" * 100)
    with pytest.raises(DataError, match="no batch"):
        evaluate(reference, candidate, [])
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        evaluate(reference, tmp_path / "nothing.onnx", BATCHES)
    with pytest.raises(ConfigError, match="candidates"):
        evaluate_many(reference, [], BATCHES)


def test_candidates_that_do_not_fit(models: tuple[Path, Path], tmp_path: Path) -> None:
    wider = bigram(tmp_path / "wider.onnx", np.full((4, 5), 0.2))
    with pytest.raises(DataError, match="vocabulary of the candidate is 5, 4 expected"):
        evaluate(models[0], wider, BATCHES)
    more = save_text(
        tmp_path / "more.onnx",
        "g (int64[b, s] input_ids, int64[b, s] extra) => (float[b, s, v] scores) { scores = Gather(table, input_ids) }",
        {"table": REFERENCE},
    )
    with pytest.raises(DataError, match="'extra'"):
        evaluate(models[0], more, BATCHES)
    renamed = save_text(
        tmp_path / "renamed.onnx",
        "g (int64[b, s] input_ids) => (float[b, s, v] other) { other = Gather(table, input_ids) }",
        {"table": REFERENCE},
    )
    with pytest.raises(DataError, match="no output 'scores'"):
        evaluate(models[0], renamed, BATCHES)


def test_candidate_may_hold_its_cache_in_another_type(llama: tuple[tiny_gguf.Tiny, Path], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(llama[1], folder)
    # cast at the border: the reference's empty cache has to be made anew for this one
    model = ir.load(folder / "model.onnx")
    graph = model.graph
    for value in graph.inputs:
        if value.name is not None and value.name.startswith("past"):
            value.dtype = ir.DataType.FLOAT16
            users = list(value.uses())
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(graph.outputs):
        if value.name is not None and value.name.startswith("present"):
            half = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            half.outputs[0].name, value.name = value.name, f"{value.name}_float"
            half.outputs[0].dtype, half.outputs[0].shape = ir.DataType.FLOAT16, value.shape
            graph.outputs[index] = half.outputs[0]
            graph.append(half)
    ir.save(model, folder / "half.onnx")
    data = "hello there, this is a text " * 3 + "\n"
    found = evaluate(llama[1] / "model.onnx", folder / "half.onnx", data, tokenizer=folder, window=16)
    assert found.kl_divergence == 0


def test_caches_that_are_given_are_brought_into_the_candidates_basis(tmp_path: Path) -> None:
    """And its outputs, where they are compared, into the reference's."""
    config = small_llama.Config()
    source = small_llama.save(tmp_path / "a.onnx", config)
    oq.rotate(source, tmp_path / "b.onnx", seed=3)
    oq.rotate(source, tmp_path / "c.onnx", seed=4)
    rng = np.random.default_rng(0)
    data = [small_llama.decoder_feeds(config, rng, past=5) for _ in range(2)]
    assert any("past" in state.past for state in oq.discover(source).states)
    for reference, candidate in (("a", "b"), ("b", "a"), ("b", "c")):
        found = evaluate(tmp_path / f"{reference}.onnx", tmp_path / f"{candidate}.onnx", data)
        assert found.kl_divergence is not None
        assert found.kl_divergence < 1e-6
        one_token = [small_llama.decoder_feeds(config, rng, length=1, past=5)]
        found = evaluate(tmp_path / f"{reference}.onnx", tmp_path / f"{candidate}.onnx", one_token)
        assert set(found.cosine) > {"present.0.value", "present.1.value"}
        assert min(found.cosine.values()) > 1 - 1e-6


def test_calibration_behind_caches_sees_them_in_the_new_basis(tmp_path: Path) -> None:
    """Else values of the cache, whose third feature is loud, would meet weights that expect them rotated."""
    config = small_llama.Config()
    source = small_llama.save(tmp_path / "a.onnx", config)
    rng = np.random.default_rng(0)
    data = [small_llama.decoder_feeds(config, rng, past=5) for _ in range(8)]
    losses = []
    for name, rotations in (("plain", ()), ("rotated", None)):
        options = {"rotations": rotations, "normalize": False}
        oq.quantize(source, tmp_path / f"{name}.onnx", data, scheme="a8w8", **options)
        found = evaluate(source, tmp_path / f"{name}.onnx", data)
        assert found.kl_divergence is not None
        losses.append(found.kl_divergence)
    assert losses[1] < losses[0] / 3
