"""Saved folders load where people run them: onnxruntime-genai, and onnxruntime with and without the library."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_quarot as oq
import tiny_gguf
from onnx_quarot import demo
from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.errors import ConfigError
from onnx_quarot.genai_folder import complete_folder

TEXT = "the shell tells 12 things; tell the tale then. " * 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float model's folder and a quantized one's."""
    root = tmp_path_factory.mktemp("genai")
    source = demo.build_model(tiny_gguf.write(root / "tiny.gguf").path, root / "float")
    (root / "text.txt").write_text(TEXT)
    (root / "quantized").mkdir()
    report = oq.quantize(
        source / "model.onnx",
        root / "quantized" / "model.onnx",
        root / "text.txt",
        tokenizer=source / "tokenizer.json",
        window=32,
        windows=2,
    )
    assert any("genai_config.json" in note for note in report.notes)
    return source, root / "quantized"


def test_the_folder_is_complete(folders: tuple[Path, Path]) -> None:
    source, quantized = folders
    library = Path(oq.custom_op_library()).name
    assert {p.name for p in quantized.iterdir()} == {p.name for p in source.iterdir() if p.suffix != ".data"} | {
        library
    }
    settings = json.loads((quantized / "genai_config.json").read_text())
    original = json.loads((source / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["session_options"].pop("custom_ops_library") == library
    original["model"]["decoder"].setdefault("session_options", {})
    assert settings == original


def test_with_and_without_the_library_the_same_numbers(folders: tuple[Path, Path]) -> None:
    source, quantized = folders
    specs = input_specs(quantized / "model.onnx")
    tokenizer = source / "tokenizer.json"
    (batch,) = as_batches(quantized.parent / "text.txt", specs, tokenizer=tokenizer, window=32, limit=1)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.register_custom_ops_library(str(quantized / Path(oq.custom_op_library()).name))
    with_library = ort.InferenceSession(quantized / "model.onnx", options)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    without = ort.InferenceSession(quantized / "model.onnx", options)
    (a,), (b,) = (s.run(["logits"], batch) for s in (with_library, without))
    # A sum that rounds the other way moves a value by one step; nothing else differs.
    assert np.square(a - b).sum() < 1e-3 * np.square(a).sum()


def test_onnxruntime_genai_generates(folders: tuple[Path, Path]) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    for folder in folders:
        model = genai.Model(str(folder))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=24, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(genai.Tokenizer(model).encode("the tale tells"), np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert len(generator.get_sequence(0)) == 24 or generator.is_done()


def test_what_is_there_is_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    (tmp_path / "tokenizer.json").write_text("mine")
    oq.rotate(source / "model.onnx", tmp_path / "model.onnx", rotations=("R1",))
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    # R1 alone needs no operator: none is named, and no library copied.
    settings = json.loads((tmp_path / "genai_config.json").read_text())
    assert "custom_ops_library" not in settings["model"]["decoder"].get("session_options", {})
    assert not list(tmp_path.glob("*.so"))


def test_another_name_or_the_same_folder_gets_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = folders
    onnx.save(onnx.ModelProto(), tmp_path / "other.onnx")
    assert complete_folder(source / "model.onnx", tmp_path / "other.onnx") == ()
    assert complete_folder(source / "model.onnx", source / "model.onnx") == ()
    (tmp_path / "sub").mkdir()
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(ConfigError, match="genai config"):
        complete_folder(tmp_path / "model.onnx", tmp_path / "sub" / "model.onnx")
