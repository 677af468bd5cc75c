"""The demo's comparison from a model to the table, on a random model that is small enough to run whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

import tiny_gguf
from onnx_quarot.demo import build_model, job, run
from onnx_quarot.errors import ConfigError, DataError, ModelError, OnnxQuarotError, SaveError

TEXT = "the hell of 12 eggs, they tell, is the shell\n\n" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    return build_model(tiny_gguf.write(place / "tiny.gguf").path, place / "model")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Text for a model that has read 64 tokens at once and no more."""
    monkeypatch.setattr(run, "WINDOW", 32)
    monkeypatch.setattr(run, "NEW_TOKENS", 4)
    monkeypatch.setattr(run, "QUESTION", "tell")
    monkeypatch.setattr(run, "SYSTEM_PROMPT", "12")
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def result() -> run.DemoResult:
    row = run.Row("float32", 540_000_000, 28.7, 1.0, 324.0, 1.0, 28.0, 1.0, "A long\nsentence. " * 20)
    other = replace(
        row, name="a8w8 + QuaRot", perplexity=1e9, perplexity_ratio=3e7, seconds=31.4, peak_memory=971 * 10**6
    )
    return run.DemoResult("model", 8, 512, 1, "What?", (row, other), None)


def test_runs_from_a_model_to_a_table(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "kept"
    found = run.run_demo(model=model, text=text, windows=2, output=output)
    assert [row.name for row in found.rows] == ["float32", "a8w8", "a8w8 + QuaRot"]
    for row in found.rows:
        assert np.isfinite([row.perplexity, row.prefill, row.decode]).all()
        assert row.perplexity_ratio == pytest.approx(row.perplexity / found.rows[0].perplexity)
    assert all(row.seconds and row.peak_memory for row in found.rows[1:])
    assert json.loads(json.dumps(found.to_json()))["rows"][1]["name"] == "a8w8"

    places = {path.name for path in output.iterdir()}
    assert places == {"float", "a8w8", "a8w8-quarot", "calibration.txt", "evaluation.txt"}
    calibration, evaluation = ((output / name).read_text() for name in ("calibration.txt", "evaluation.txt"))
    assert calibration + evaluation == TEXT
    for place in ("float", "a8w8", "a8w8-quarot"):
        assert (output / place / "tokenizer.json").is_file()
    settings = json.loads((output / "a8w8-quarot" / "genai_config.json").read_text())
    library = settings["model"]["decoder"]["session_options"]["custom_ops_library"]
    assert (output / "a8w8-quarot" / library).is_file()
    online = [
        sum(node.op_type == "Hadamard" for node in onnx.load(output / place / "model.onnx").graph.node)
        for place in ("float", "a8w8", "a8w8-quarot")
    ]
    # One a layer, and two in front of the head, around the last norm's scale.
    assert online == [0, 0, tiny_gguf.LAYERS + 2]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_what_cannot_be_run_is_said_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such"):
        run.run_demo(model=tmp_path / "no such", text=text)
    with pytest.raises(DataError, match="no such"):
        run.run_demo(model=model, text=tmp_path / "no such")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        run.run_demo(model=model, text=tmp_path / "latin.txt")
    (tmp_path / "alone.onnx").write_bytes((model / "model.onnx").read_bytes())
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        run.run_demo(model=tmp_path / "alone.onnx", text=text)
    with pytest.raises(SaveError, match="exists already"):
        run.run_demo(model=model, text=text, output=tmp_path)


def test_a_failure_leaves_no_output(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> job.Done:
        raise OnnxQuarotError("broken")

    monkeypatch.setattr(run, "quantize_apart", broken)
    with pytest.raises(OnnxQuarotError, match="broken"):
        run.run_demo(model=model, text=text, output=tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_errors_cross_the_process_as_what_they_are(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a3w3"):
        job.quantize_apart(
            quiet=True,
            source=str(model / "model.onnx"),
            target=str(tmp_path / "out.onnx"),
            calibration=TEXT,
            tokenizer=str(model),
            scheme="a3w3",
        )


def test_errors_of_the_system_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("onnx_quarot.pipeline.quantize", full)
    monkeypatch.setattr("sys.argv", ["job", json.dumps({"quiet": True, "keywords": {}})])
    job.main()
    assert json.loads(capsys.readouterr().out)["error"][1].endswith("Cannot allocate memory")


def lines(result: run.DemoResult, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result.table())
    return console.export_text().splitlines()


def test_table_fits_80_columns(result: run.DemoResult) -> None:
    printed = lines(result, 80)
    assert max(map(len, printed)) <= 80
    row = next(line for line in printed if "a8w8 + QuaRot" in line)
    assert row.split()[3:] == ["540", "1.0e+09", "3.0e+07", "324", "28", "31", "s", "971"]
    assert "…" not in "".join(printed)


def test_picture_is_drawn(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from onnx_quarot.demo import picture

    draw: Callable[..., None] = picture.draw
    target = tmp_path / "picture.png"
    draw(model / "model.onnx", text, target, tokens=32)
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ModelError, match="nowhere"):
        draw(model / "model.onnx", text, target, layer="nowhere", tokens=32)
    with pytest.raises(SaveError, match="missing"):
        draw(model / "model.onnx", text, tmp_path / "missing" / "p.png", tokens=32)
