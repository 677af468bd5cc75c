"""The benchmark command: what it measures and shows, not how fast anything is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from command_line import answer
from onnx_quarot import bench_report
from onnx_quarot.bench_report import Bench, Row, draw, fastest, run_bench
from onnx_quarot.errors import OnnxQuarotError


def test_ratios() -> None:
    row = Row(64, 1, {"onnx-quarot": 2.0, "fht-cpu": 5.0, "memcpy": 1.0})
    assert row.ratio("fht-cpu") == 2.5
    assert row.ratio("numpy") is None
    table = Bench("a CPU", "avx2", [row], {"a figure": 1.25}).table()
    assert "2.50 x" in table
    assert "1.25  a figure" in table


def test_fastest_takes_turns() -> None:
    calls: list[str] = []
    best = fastest({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.001)
    assert set(best) == {"a", "b"}
    assert all(0 < value < 1 for value in best.values())
    assert {"a", "b"} == set(calls)


def test_a_call_that_takes_longer_alone_leaves_a_cost() -> None:
    assert bench_report._cost({"x": 3.0, "call": 1.0}, "x", "call") == 2.0
    assert 0 < bench_report._cost({"x": 1.0, "call": 1.5}, "x", "call") < 1e-9


def test_command() -> None:
    facts = answer("bench", "--largest", "1024", "--seconds", "0.001")
    assert {row["n"] for row in facts["rows"]} == {64, 128, 256, 512, 1024}
    for row in facts["rows"]:
        assert {"onnx-quarot", "memcpy", "numpy"} <= set(row["nanoseconds"])
        assert all(value > 0 for value in row["nanoseconds"].values())
    assert any(name.startswith("n = 576") for name in facts["figures"])
    assert "bfloat16 over float32, n = 256" in facts["figures"]
    assert "with int8 by a scale a row over the transform alone, n = 4096" in facts["figures"]
    assert all(np.isfinite(value) and value > 0 for value in facts["figures"].values())


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "bench.png"
    draw(run_bench(largest=128, seconds=0.001), target)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_wrong_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_report, "hadamard_matrix", lambda n: np.eye(n))
    with pytest.raises(OnnxQuarotError, match="size 64, against numpy: the answers differ"):
        run_bench(largest=64, seconds=0.001)
