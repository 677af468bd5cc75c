"""Quantize in a process of its own, so that its peak memory is its own: `python -m onnx_quarot.demo.job '{...}'`.

The argument holds the keywords of `pipeline.quantize` as JSON; the answer on stdout is one line of JSON, either
{"report", "seconds", "peak_memory"} or {"error": [class, message]}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from onnx_quarot import errors
from onnx_quarot.cut_files import survive_cut_files
from onnx_quarot.errors import OnnxQuarotError
from onnx_quarot.progress import NullProgress, terminal_progress
from onnx_quarot.resources import peak_memory


@dataclass(frozen=True)
class Done:
    """What quantizing took: wall seconds, start of Python left out, and the process's peak of resident bytes."""

    seconds: float
    peak_memory: int
    report: dict[str, Any]


def quantize_apart(*, quiet: bool = False, **keywords: Any) -> Done:
    """`pipeline.quantize(**keywords)` in a new process; its errors are raised here as what they were there.

    keywords must be JSON values (paths as strings). quiet: no progress on stderr.
    """
    argument = json.dumps({"quiet": quiet, "keywords": keywords})
    command = [sys.executable, "-m", "onnx_quarot.demo.job", argument]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        killed = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        raise OnnxQuarotError(f"the process that quantizes ended with {killed}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        kind, message = answer["error"]
        raise getattr(errors, kind, OnnxQuarotError)(message)
    return Done(answer["seconds"], answer["peak_memory"], answer["report"])


def main() -> None:
    """The child's side."""
    asked = json.loads(sys.argv[1])
    progress = NullProgress() if asked["quiet"] else terminal_progress()
    try:
        from onnx_quarot import pipeline

        start = time.perf_counter()
        with survive_cut_files():
            report = pipeline.quantize(**asked["keywords"], progress=progress)
    except OnnxQuarotError as error:
        print(json.dumps({"error": [type(error).__name__, str(error)]}))
    except (OSError, MemoryError) as error:
        print(json.dumps({"error": [OnnxQuarotError.__name__, errors.first_line(error)]}))
    except KeyboardInterrupt:
        sys.exit(130)
    else:
        seconds = time.perf_counter() - start
        print(json.dumps({"report": report.to_json(), "seconds": seconds, "peak_memory": peak_memory()}))


if __name__ == "__main__":
    main()
