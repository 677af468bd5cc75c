"""The command line: what each command prints, writes and returns."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from click.testing import Result

import small_llama
from command_line import answer, run
from onnx_quarot import __version__, pipeline, scheme
from onnx_quarot.cli import METHODS, cli
from onnx_quarot.progress import NullProgress, PlainProgress, RichProgress, terminal_progress

CONFIG = small_llama.Config()
COMMANDS = ("demo", "discover", "evaluate", "info", "quantize", "rotate")


def hear_interrupts() -> None:
    """Shells start what runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prompt a row: an .npz holds batches along the first axis."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    rng = np.random.default_rng(3)
    feeds = [small_llama.decoder_feeds(CONFIG, rng) for _ in range(3)]
    np.savez(path, **{name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]})
    return path


def assert_fails(result: Result, code: int, pattern: str) -> None:
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.match(rf"error: .*{pattern}", result.stderr), result.stderr


# --- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_that_parses(command: str) -> None:
    result = run(command, "-h")
    assert result.exit_code == 0
    assert result.stdout == run(command, "--help").stdout
    example = re.search(r"Example.*:\n((?:.*\\\n)*.*)", result.stdout)
    assert example is not None
    words = example[1].replace("\\\n", " ").split()
    assert words[:2] == ["onnx-quarot", command]
    cli.commands[command].make_context(command, words[2:])  # raises for an option or argument that is not there


def test_help_of_the_whole() -> None:
    bare, asked = run(), run("-h")
    assert bare.exit_code == asked.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", bare.stdout, re.MULTILINE)
    assert run("--version").stdout.strip() == f"onnx-quarot, version {__version__}"


# --- what commands do ------------------------------------------------------------------------------------------


def test_info(model: Path) -> None:
    facts = answer("info")["installation"]
    assert facts["onnx_quarot"] == __version__
    assert facts["isa"] in facts["isas"]
    assert Path(facts["custom_op_library"]).is_file()
    assert facts["packages"]["onnx"] == onnx.__version__
    found = answer("info", model)["model"]
    assert found["bytes"] == model.stat().st_size
    assert found["linear_layers"] == 1 + 5 * CONFIG.layers
    assert found["quantization"] == {}
    assert found["online_rotations"] == 0
    assert "custom op library" in run("info").stdout


def test_discover(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "rotation_config.json"
    plan = answer("discover", model, "--write-config", config)
    assert plan["summary"]["linear_layers"] == 1 + 5 * CONFIG.layers
    assert plan["summary"]["declined"] == 0
    assert json.loads(config.read_text())["R1_pairs"]
    again = answer("discover", model, "--config", config)
    assert again["summary"]["rotations"]["R1"] == plan["summary"]["rotations"]["R1"]
    assert answer("discover", model, "--rotations", "r2")["summary"]["rotations"].keys() == {"R2"}
    table = run("discover", model).stdout
    assert "MatMul" in table
    assert max(map(len, table.splitlines())) <= 80


def test_methods_are_those_of_the_schemes() -> None:
    assert METHODS == scheme.METHODS


def test_rotate(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "rotated.onnx"
    report = answer("rotate", model, output, "--seed", "3")
    assert report["output"] == str(output)
    assert report["verification"]["worst"] <= report["verification"]["tolerance"]
    assert answer("info", output)["model"]["online_rotations"] == CONFIG.layers
    unverified = answer("rotate", model, tmp_path / "other.onnx", "--rotations", "R1,R2", "--no-verify")
    assert unverified["verification"] is None
    assert unverified["rotations"] == ["R1", "R2"]


def test_quantize_and_evaluate(model: Path, data: Path, tmp_path: Path) -> None:
    rotated, plain = tmp_path / "quarot.onnx", tmp_path / "plain.onnx"
    report = answer("quantize", model, rotated, "--calibration", data, "--method", "percentile", "--windows", "2")
    assert report["scheme"] == "a8w8"
    assert len(report["quantized"]) == 1 + 5 * CONFIG.layers
    less = answer(
        "quantize", model, plain, "--calibration", data, "--rotations", "none", "--exclude", "/lm_head/MatMul"
    )
    assert less["plan"] is None
    assert len(less["quantized"]) == len(report["quantized"]) - 1
    assert answer("info", rotated)["model"]["quantization"]["DequantizeLinear"] > 0

    metrics = answer("evaluate", model, rotated, "--data", data)
    assert metrics["reference"]["path"] == str(model)
    assert metrics["candidate"]["size_bytes"] < metrics["reference"]["size_bytes"]
    table = run("evaluate", model, rotated, "--data", data)
    assert table.exit_code == 0
    assert "size, MB" in table.stdout


def test_tokenizer_beside_the_model_reads_text(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Fake:
        table = None

        def to_json(self) -> dict[str, Any]:
            return {}

    def fake(*arguments: Any, **keywords: Any) -> Fake:
        seen.update(keywords, arguments=arguments)
        return Fake()

    monkeypatch.setattr(pipeline, "quantize", fake)
    source = tmp_path / "model.onnx"
    (tmp_path / "tokenizer.json").write_text("{}")
    answer("quantize", source, "out.onnx", "--calibration", "text.txt", "--window-length", "64", "--windows", "3")
    assert seen["tokenizer"] == tmp_path / "tokenizer.json"
    assert (seen["window"], seen["windows"]) == (64, 3)
    assert seen["arguments"] == (source, Path("out.onnx"), Path("text.txt"))
    answer("quantize", source, "out.onnx", "--calibration", "data.npz")
    assert seen["tokenizer"] is None
    answer("quantize", source, "out.onnx", "--calibration", "text.txt", "--tokenizer", "other.json")
    assert seen["tokenizer"] == Path("other.json")


# --- failures --------------------------------------------------------------------------------------------------


def test_wrong_usage_is_one_line_and_code_2(model: Path) -> None:
    assert_fails(run("quantize", model), 2, "OUTPUT")
    assert_fails(run("quantize", model, "out.onnx"), 2, "--calibration")
    assert_fails(run("rotate", model, "out.onnx", "--rotations", "R1,R9"), 2, "'R9' is no rotation")
    assert_fails(run("rotate", model, "out.onnx", "--seed", "x"), 2, "--seed")
    assert_fails(run("discover", model, "--html", model.parent), 2, "is a folder; give the path of a file")
    assert_fails(run("bench", "--picture", "absent/bench.png"), 2, "the folder 'absent' does not exist")
    assert_fails(run("bench", "--seconds", "-1"), 2, "--seconds")
    assert_fails(run("polish"), 2, "No such command 'polish'")
    assert_fails(run("info", "--jsno"), 2, "--jsno")


def test_failures_are_one_line_and_code_1(model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    text = tmp_path / "not.onnx"
    text.write_text("not a model")
    other = tmp_path / "other.npz"
    np.savez(other, pixels=np.zeros((2, 3), np.float32))
    assert_fails(run("discover", tmp_path / "no.onnx"), 1, r"no\.onnx")
    assert_fails(run("discover", text), 1, r"not\.onnx")
    assert_fails(run("rotate", model, model), 1, "input")
    for option in ("--html", "--write-config"):
        assert_fails(run("discover", model, option, model), 1, "is to be read as well")
    assert_fails(run("evaluate", model, model, "--data", data, "--html", data), 1, "is to be read as well")
    assert_fails(run("rotate", model, out, "--rotations", "none"), 1, "at least one")
    assert_fails(run("quantize", model, out, "--calibration", other), 1, "pixels|input_ids")
    assert_fails(run("quantize", model, out, "--calibration", data, "--scheme", "a3w3"), 1, "a3w3")
    assert_fails(run("quantize", model, out, "--calibration", tmp_path / "no.npz"), 1, r"no\.npz")
    assert_fails(run("evaluate", model, tmp_path / "no.onnx", "--data", data), 1, r"no\.onnx' does not exist")
    assert_fails(run("evaluate", model, text, "--data", data), 1, r"not\.onnx' is not a readable ONNX model")
    assert_fails(run("demo", "--model", tmp_path / "no.onnx"), 1, r"no\.onnx")
    assert_fails(run("demo", "--model", model), 1, r"tokenizer\.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not.onnx", "other.npz"]


def test_unexpected_failures_name_their_class(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(pipeline, "discover", broken)
    assert_fails(run("discover", model), 1, "unexpected ZeroDivisionError: two lines")
    monkeypatch.setenv("ONNX_QUAROT_DEBUG", "1")
    result = run("discover", model)
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_command_can_be_called_from_python(model: Path) -> None:
    with pytest.raises(click.UsageError):
        cli.main(["quantize", str(model)], standalone_mode=False)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "onnx_quarot.cli", *map(str, arguments)]


def test_exit_codes_of_the_process(model: Path, tmp_path: Path) -> None:
    good = subprocess.run(command("rotate", model, tmp_path / "out.onnx", "--json"), capture_output=True, text=True)
    assert good.returncode == 0
    assert json.loads(good.stdout)["output"] == str(tmp_path / "out.onnx")
    assert "rotating" in good.stderr
    bad = subprocess.run(command("discover", tmp_path / "no.onnx"), capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 1)
    debug = subprocess.run(command("discover", "--debug", tmp_path / "no.onnx"), capture_output=True, text=True)
    assert "Traceback" in debug.stderr
    assert subprocess.run(command("polish"), capture_output=True).returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupt_is_one_line_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "slow.txt"
    os.mkfifo(fifo)  # a text that never comes
    arguments = command("quantize", model, tmp_path / "out.onnx", "--calibration", fifo, "--tokenizer", fifo)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    writer = None
    try:
        deadline = time.monotonic() + 60
        # Opening the pipe's other end succeeds once the command waits for it. It stays open, or the text would end.
        while time.monotonic() < deadline:
            try:
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        if writer is not None:
            os.close(writer)
    assert process.returncode == 130
    assert errors == "error: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["slow.txt"]


def test_interrupt_has_its_own_code(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "discover", interrupted)
    assert_fails(run("discover", model), 130, "interrupted")

    def interrupted_and_more(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("what cleaning up met")

    monkeypatch.setattr(pipeline, "discover", interrupted_and_more)
    assert_fails(run("discover", model), 130, "interrupted")


# --- progress --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_fits_the_stream() -> None:
    assert isinstance(terminal_progress(Terminal()), RichProgress)
    assert isinstance(terminal_progress(io.StringIO()), PlainProgress)


@pytest.mark.parametrize("total", [None, 4])
@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_progress_tasks_nest_and_end(stream: io.StringIO, total: int | None) -> None:
    progress = terminal_progress(stream)
    for _ in range(2):
        with progress.task("outer", total) as outer, progress.task("inner") as inner:
            outer.advance()
            inner.advance(3)
    written = stream.getvalue()
    assert "outer" in written
    assert "inner" in written


def test_plain_progress_says_how_far_it_is_and_not_too_often() -> None:
    often, rarely = io.StringIO(), io.StringIO()
    for stream, interval in ((often, 0.0), (rarely, 1000.0)):
        with PlainProgress(stream, interval).task("work", 4) as task:
            for _ in range(4):
                task.advance()
    assert often.getvalue().splitlines()[:3] == ["work: 25%", "work: 50%", "work: 75%"]
    assert re.fullmatch(r"work: done in \d+\.\d s\n", rarely.getvalue())


def test_plain_progress_leaves_a_failure_to_the_error() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), PlainProgress(stream).task("work"):
        raise ZeroDivisionError
    assert stream.getvalue() == ""


def test_null_progress_takes_everything() -> None:
    with NullProgress().task("work", 3) as task:
        task.advance()
        task.advance(2)
