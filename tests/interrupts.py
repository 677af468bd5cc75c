"""Ctrl-C in commands on a real model: `python tests/interrupts.py FOLDER [TRIALS]`.

FOLDER is what `onnx-quarot demo --output FOLDER` left. Every command is interrupted at random moments of its work; how
long it still lived is printed, and what it left behind is an error.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = {"discover": 1.5, "rotate": 3.0, "bench": 5.0}  # within which each is interrupted; the others take longer


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    """By name, in the order of a pipeline's steps."""
    model, text = str(folder / "float" / "model.onnx"), str(folder / "calibration.txt")
    data = ["--calibration", text, "--windows", "4"]
    return {
        "discover": ["discover", model],
        "rotate": ["rotate", model, str(out / "m.onnx")],
        "quantize a8w8": ["quantize", model, str(out / "m.onnx"), *data],
        "quantize a8w4-block (GPTQ)": ["quantize", model, str(out / "m.onnx"), *data, "--scheme", "a8w4-block"],
        "quantize --mixed": ["quantize", model, str(out / "m.onnx"), *data, "--mixed"],
        "quantize --kv-cache int8": ["quantize", model, str(out / "m.onnx"), *data, "--kv-cache", "int8"],
        "quantize --seed search:4": ["quantize", model, str(out / "m.onnx"), *data, "--seed", "search:4"],
        "evaluate --html": ["evaluate", model, model, "--data", text, "--html", str(out / "page.html")],
        "demo": ["demo", "--model", model, "--text", text, "--output", str(out / "kept")],
        "bench": ["bench", "--seconds", "1"],
    }


def interrupt(arguments: list[str], after: float, scratch: Path) -> tuple[float, int, str]:
    """How long a command lived on, its exit code and its last line; it may have been done before."""
    command = [sys.executable, "-m", "onnx_quarot.cli", *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    time.sleep(after)
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its children hear it too
    _, stderr = process.communicate(timeout=60)
    return time.monotonic() - start, process.returncode, (stderr.strip().splitlines() or [""])[-1]


def main() -> None:
    folder, trials = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10
    rng = random.Random(0)
    for name in commands(folder, Path()):
        lived = []
        for _ in range(trials):
            with tempfile.TemporaryDirectory() as place:
                out, scratch = Path(place, "out"), Path(place, "scratch")
                out.mkdir()
                scratch.mkdir()
                moment = rng.uniform(0.5, SECONDS.get(name, 20.0))
                seconds, code, line = interrupt(commands(folder, out)[name], moment, scratch)
                if code == 130:
                    lived.append(seconds)
                    assert line == "error: interrupted", (name, line)
                    left = [*out.iterdir(), *scratch.glob("onnx*")]  # ONNX Runtime keeps notes of its own there
                    assert left == [], (name, left)
                else:
                    assert code == 0, (name, code, line)
        print(f"{name:28} {len(lived):3} interrupted, at most {max(lived, default=0):.2f} s", flush=True)


if __name__ == "__main__":
    main()
