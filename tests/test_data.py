from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import small_llama
from onnx_quarot.data import InputSpec, as_batches, input_specs, load_tokenizer, token_batches
from onnx_quarot.errors import DataError, ModelError

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
SPECS = [InputSpec("x", ("batch", 4), F32), InputSpec("n", (None,), I64)]
DECODER = [
    InputSpec("input_ids", ("b", "s"), I64),
    InputSpec("attention_mask", ("b", "t"), I64),
    InputSpec("position_ids", ("b", "s"), I64),
    InputSpec("past_key_values.0.key", ("b", 3, "past", 8), F32),
    InputSpec("past_key_values.0.value", ("b", 3, "past", 8), F32),
]


def batch(seed: int = 0, rows: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, 4), dtype=np.float32), "n": np.arange(3)}


class Words:
    """A tokenizer: one id a word."""

    def encode(self, text: str) -> Any:
        class Encoding:
            def __init__(self) -> None:
                self.ids = [len(word) for word in text.split()]

        return Encoding()


def same(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_reader_list_and_generator_give_the_same_batches() -> None:
    want = [batch(i) for i in range(3)]
    same(list(as_batches(small_llama.Reader(want), SPECS)), want)
    same(list(as_batches(want, SPECS)), want)
    same(list(as_batches((b for b in want), SPECS)), want)
    same(list(as_batches(want, SPECS, limit=2)), want[:2])


def test_onnxruntime_reader_class() -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")

    class Mine(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.it = iter([batch(1), batch(2)])

        def get_next(self) -> Any:
            return next(self.it, None)

    same(list(as_batches(Mine(), SPECS)), [batch(1), batch(2)])


def test_batches_come_one_at_a_time() -> None:
    taken: list[int] = []

    def source() -> Iterator[dict[str, Any]]:
        for i in range(5):
            taken.append(i)
            yield batch(i)

    stream = as_batches(source(), SPECS)
    next(stream)
    assert taken == [0]


def test_npz_one_batch_and_several(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **batch(1))
    same(list(as_batches(str(tmp_path / "one.npz"), SPECS)), [batch(1)])
    stacked = {name: np.stack([batch(i)[name] for i in range(4)]) for name in batch()}
    np.savez(tmp_path / "four.npz", **stacked)
    same(list(as_batches(tmp_path / "four.npz", SPECS)), [batch(i) for i in range(4)])
    same(list(as_batches(tmp_path / "four.npz", SPECS, limit=1)), [batch(0)])


def test_npz_faults(tmp_path: Path) -> None:
    np.savez(tmp_path / "mixed.npz", x=np.zeros((3, 2, 4), np.float32), n=np.arange(3))
    with pytest.raises(DataError, match="differing numbers of batches"):
        list(as_batches(tmp_path / "mixed.npz", SPECS))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match=r"broken\.npz"):
        list(as_batches(tmp_path / "broken.npz", SPECS))
    (tmp_path / "text.npz").write_text("words")
    with pytest.raises(DataError, match=r"text\.npz is no \.npz file: it is no zip archive"):
        list(as_batches(tmp_path / "text.npz", SPECS))
    with pytest.raises(DataError, match=r"absent\.npz"):
        list(as_batches(tmp_path / "absent.npz", SPECS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, r"lacks input 'x'"),
        ({"y": np.zeros(1)}, r"'y', no input of the model"),
        ({"x": np.zeros((2, 5), np.float32)}, r"'x' has shape \[2, 5\]; the model takes \[batch, 4\]"),
        ({"x": np.zeros((4,), np.float32)}, r"'x' has shape \[4\]"),
        ({"x": np.zeros((2, 4))}, r"'x' has element type float64; the model takes float32"),
        ({"n": np.zeros((2, 2), np.int64)}, r"'n' has shape \[2, 2\]; the model takes \[\?\]"),
    ],
)
def test_a_batch_that_does_not_fit_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    bad = {k: v for k, v in {**batch(), **change}.items() if v is not None}
    with pytest.raises(DataError, match=message) as caught:
        list(as_batches([batch(), bad], SPECS))
    assert "batch 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dozens_of_inputs_are_not_listed_one_by_one() -> None:
    with pytest.raises(DataError, match=r"\(inputs: a0, a1, a2, a3, a4, \.\.\. 55 more\)$"):
        list(as_batches([{"x": np.zeros(1)}], [InputSpec(f"a{i}", (1,), F32) for i in range(60)]))


@pytest.mark.parametrize("data", [[], iter(()), small_llama.Reader([])])
def test_empty_data(data: object) -> None:
    with pytest.raises(DataError, match="holds no batch"):
        list(as_batches(data, SPECS))


@pytest.mark.parametrize("data", [7, None, {"x": np.zeros(1)}, [np.zeros(3)]])
def test_what_is_no_data_is_refused(data: object) -> None:
    with pytest.raises(DataError):
        list(as_batches(data, SPECS))


def test_text_fills_a_decoder() -> None:
    text = "\n".join("x" * n for n in range(1, 11))
    batches = list(as_batches(text, DECODER, tokenizer=Words(), window=4))
    assert [b["input_ids"].tolist() for b in batches] == [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    first = batches[0]
    assert list(first) == [s.name for s in DECODER]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert first["past_key_values.0.key"].shape == (1, 3, 0, 8)
    assert all(b[s.name].dtype == s.dtype for b in batches for s in DECODER)


def test_text_shorter_than_a_window_is_one_short_batch() -> None:
    (only,) = token_batches([5, 6, 7], DECODER, window=8)
    assert only["input_ids"].tolist() == [[5, 6, 7]]


def test_fixed_sequence_and_batch_are_honoured() -> None:
    specs = [InputSpec("input_ids", (2, 3), np.dtype(np.int32)), InputSpec("token_type_ids", (2, 3), I64)]
    batches = list(token_batches(list(range(13)), specs, window=512))
    assert [b["input_ids"].tolist() for b in batches] == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
    ]
    assert batches[0]["input_ids"].dtype == np.int32
    assert not batches[0]["token_type_ids"].any()
    with pytest.raises(DataError, match="5 tokens; one batch needs 6"):
        list(token_batches(list(range(5)), specs))


def test_text_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no_such\.txt cannot be read"):
        list(as_batches("no_such.txt", DECODER, tokenizer=Words()))
    (tmp_path / "text.txt").write_text("some words here")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        list(as_batches(tmp_path / "text.txt", DECODER))
    with pytest.raises(DataError, match="input_ids"):
        list(as_batches(tmp_path / "text.txt", SPECS, tokenizer=Words()))
    extra = [*DECODER, InputSpec("pixels", ("b", "c"), F32)]
    with pytest.raises(DataError, match="'pixels' cannot be filled"):
        list(as_batches(tmp_path / "text.txt", extra, tokenizer=Words()))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="0 tokens"):
        list(as_batches(tmp_path / "empty.txt", DECODER, tokenizer=Words()))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="UTF-8"):
        list(as_batches(tmp_path / "binary.txt", DECODER, tokenizer=Words()))


def test_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b c").ids == [0, 1, 2]
    (tmp_path / "text.txt").write_text("b a b a")
    (only,) = as_batches(tmp_path / "text.txt", DECODER, tokenizer=tmp_path / "tokenizer.json")
    assert only["input_ids"].tolist() == [[1, 0, 1, 0]]
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json cannot be read"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no file at"):
        load_tokenizer(tmp_path / "absent.json")


def test_missing_tokenizers_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'onnx-quarot\[demo\]'"):
        load_tokenizer(tmp_path)


def test_input_specs_of_a_model(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 4, None]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT16, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [helper.make_tensor("w", TensorProto.FLOAT16, [1], [0.0])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert input_specs(tmp_path / "m.onnx") == [InputSpec("x", ("batch", 4, None), np.dtype(np.float16))]
    with pytest.raises(ModelError, match="does not exist"):
        input_specs(tmp_path / "absent.onnx")
    graph.input[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="input x: the model does not say its element type"):
        input_specs(tmp_path / "m.onnx")


@pytest.mark.parametrize("symbolic", [False, True])
def test_the_head_size_of_a_cache_is_known_even_where_it_is_a_symbol(tmp_path: Path, symbolic: bool) -> None:
    config = small_llama.Config(symbolic_cache=symbolic)
    specs = input_specs(small_llama.save(tmp_path / "m.onnx", config))
    caches = [s.shape for s in specs if s.name.startswith("past")]
    assert caches == [("batch_size", 2, "past_sequence_length", 16)] * 4
