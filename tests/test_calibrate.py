from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.errors import ConfigError, DataError, ModelError
from onnx_quarot.observers import Entropy, MinMax, Percentile, Range, TokenMSE
from ranges import calibrate

K, N = 16, 24


def save_model(path: Path, *, external: bool = False) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """x -> MatMul(w1) = h -> Relu = r -> MatMul(w2) = y -> Div by zero input d = bad."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((K, N), dtype=np.float32)
    w2 = rng.standard_normal((N, K), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
        helper.make_node("Div", ["y", "d"], ["bad"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K]),
            helper.make_tensor_value_info("d", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("bad", TensorProto.FLOAT, ["m", K])],
        [numpy_helper.from_array(w1, "w1"), numpy_helper.from_array(w2, "w2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(
        model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=0
    ) if external else onnx.save(model, path)
    return w1, w2


def batches(count: int = 3, scale: float = 1.0) -> list[dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(1)
    return [
        {"x": scale * rng.standard_normal((5, K), dtype=np.float32), "d": np.ones(1, np.float32)} for _ in range(count)
    ]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("threads", [None, 1])
def test_minmax_is_the_extremes_over_all_batches(
    tmp_path: Path, external: bool, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w1, _ = save_model(tmp_path / "m.onnx", external=external)
    monkeypatch.chdir(tmp_path.parent)
    before = sorted(p.name for p in tmp_path.iterdir())
    data = batches()
    ranges = calibrate(tmp_path / "m.onnx", ["r", "x", "h", "r"], iter(data), threads=threads)
    x = np.concatenate([b["x"] for b in data])
    assert list(ranges) == ["r", "x", "h"]
    assert (ranges["x"].low, ranges["x"].high) == (x.min(), x.max())
    np.testing.assert_allclose((ranges["h"].low, ranges["h"].high), ((x @ w1).min(), (x @ w1).max()), rtol=1e-5)
    assert ranges["r"].low == 0.0
    assert ranges["r"].high == ranges["h"].high
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_weights_inside_a_large_file_are_moved_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "m.onnx")
    plain = calibrate(tmp_path / "m.onnx", ["h"], batches())
    monkeypatch.setattr("onnx_quarot.calibrate._INLINE_LIMIT", 0)
    assert calibrate(tmp_path / "m.onnx", ["h"], batches()) == plain


def test_only_what_the_tensors_need_is_run(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.node[3].op_type, model.graph.node[3].domain = "NoSuchOperator", "nowhere"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    onnx.save(model, tmp_path / "m.onnx")
    assert calibrate(tmp_path / "m.onnx", ["h"], batches())["h"].high > 0
    with pytest.raises(ModelError, match="cannot be run"):
        calibrate(tmp_path / "m.onnx", ["bad"], batches())


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    data = batches(2)
    data[1]["d"][:] = 0
    with pytest.raises(DataError, match=r"'bad' .*not finite, in batch 1"):
        calibrate(tmp_path / "m.onnx", ["r", "bad"], data)
    data[0]["x"][2, 3] = np.nan
    with pytest.raises(DataError, match=r"'x' .*not finite, in batch 0"):
        calibrate(tmp_path / "m.onnx", ["x"], data, method="percentile")


def test_huge_but_finite_values_pass(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    assert calibrate(tmp_path / "m.onnx", ["x"], batches(1, scale=1e30))["x"].high > 1e29


def test_bad_calls(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="no file"):
        calibrate(tmp_path / "absent.onnx", ["h"], batches())
    with pytest.raises(ModelError, match="'q' is not in"):
        calibrate(tmp_path / "m.onnx", ["q"], batches())
    with pytest.raises(DataError, match="no batch"):
        calibrate(tmp_path / "m.onnx", ["h"], [])
    with pytest.raises(ConfigError, match="'median'"):
        calibrate(tmp_path / "m.onnx", ["h"], batches(), method="median")
    with pytest.raises(ConfigError, match="percentile: 20"):
        calibrate(tmp_path / "m.onnx", ["h"], batches(), method="percentile", percentile=20)
    with pytest.raises(ModelError, match="does not run"):
        calibrate(tmp_path / "m.onnx", ["h"], [{"x": np.zeros((2, 3), np.float32), "d": np.ones(1, np.float32)}])
    assert calibrate(tmp_path / "m.onnx", [], []) == {}


def test_progress_advances_once_a_batch(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    log: list[Any] = []

    class Progress:
        def task(self, description: str, total: int | None) -> Progress:
            log.append((description, total))
            return self

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            log.append("end")

        def advance(self, n: int = 1) -> None:
            log.append(n)

    calibrate(tmp_path / "m.onnx", ["h"], batches(2), progress=Progress())
    assert log == [("calibrating", 2), 1, 1, "end"]


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 99.999])
@pytest.mark.parametrize("shape", ["normal", "heavy", "positive", "skewed"])
def test_percentile_against_numpy(percentile: float, shape: str) -> None:
    rng = np.random.default_rng(3)
    values = {
        "normal": rng.standard_normal(200_000),
        "heavy": rng.standard_t(2, 200_000),
        "positive": rng.gamma(2.0, 1.0, 200_000) + 1,
        "skewed": np.maximum(rng.standard_normal(200_000), -0.17) * 3,
    }[shape].astype(np.float32)
    observer = Percentile(percentile)
    for part in np.array_split(values, 7):
        observer.update(part)
    got = observer.range()
    cut = (100 - percentile) / 2
    low, high = np.percentile(values.astype(np.float64), [cut, 100 - cut])
    assert got.low == pytest.approx(min(low, 0), rel=1 / 128)
    assert got.high == pytest.approx(max(high, 0), rel=1 / 128)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=60), st.floats(50.5, 100))
@settings(max_examples=200, deadline=None)
def test_percentile_stays_within_the_bins_of_the_order_statistics(values: list[float], percentile: float) -> None:
    array = np.array(values, np.float32)
    observer = Percentile(percentile)
    observer.update(array)
    got = observer.range()
    cut = (100 - percentile) / 2
    for bound, q, clamp in ((got.low, cut, min), (got.high, 100 - cut, max)):
        # Rounding may put a rank on either side of a whole number, between values that are far apart.
        below = float(np.percentile(array, max(q - 1e-9, 0), method="lower"))
        above = float(np.percentile(array, min(q + 1e-9, 100), method="higher"))
        slack = max(abs(below), abs(above)) / 128 + 1e-38
        assert clamp(below, 0) - slack <= bound <= clamp(above, 0) + slack
    assert float(array.min(initial=0)) <= got.low <= 0 <= got.high <= float(array.max(initial=0))


def test_percentile_does_not_depend_on_the_order_and_100_is_exact() -> None:
    values = np.random.default_rng(5).standard_normal(10_000, dtype=np.float32)
    forward, backward, extremes = Percentile(99.5), Percentile(99.5), MinMax()
    forward.update(values)
    for part in np.array_split(values[::-1], 13):
        backward.update(part)
    assert forward.range() == backward.range()
    whole = Percentile(100.0)
    whole.update(values)
    extremes.update(values)
    assert whole.range() == extremes.range() == Range(float(values.min()), float(values.max()))


def test_percentile_cuts_an_outlier_that_minmax_keeps(tmp_path: Path) -> None:
    save_model(tmp_path / "m.onnx")
    data = batches(40)
    data[0]["x"][0, 0] = 1000
    exact = calibrate(tmp_path / "m.onnx", ["x"], data)["x"]
    cut = calibrate(tmp_path / "m.onnx", ["x"], data, method="percentile", percentile=99.9)["x"]
    assert exact.high == 1000
    assert 2 < cut.high < 5


def test_range_always_holds_zero() -> None:
    for low, high in ((1.0, 2.0), (-2.0, -1.0), (0.0, float("nan")), (float("-inf"), 0.0)):
        with pytest.raises(DataError, match="contain zero"):
            Range(low, high)
    positive = MinMax()
    positive.update(np.array([3, 4], np.float32))
    assert positive.range() == Range(0.0, 4.0)
    assert Percentile().range() == Range(0.0, 0.0)


def quantized(x: np.ndarray, r: Range, levels: int = 255) -> np.ndarray:
    step = (r.high - r.low) / levels
    result: np.ndarray = np.clip(np.round(x / step), round(r.low / step), round(r.high / step)) * step
    return result


def token_loss(x: np.ndarray, r: Range) -> float:
    return float((np.square(quantized(x, r) - x).sum(1) / np.linalg.norm(x, axis=1)).sum())


@pytest.mark.parametrize("skew", [0.0, 2.0])
def test_mse_is_near_the_best_of_all_ranges(skew: float) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_t(3, (400, 64)) + skew * np.abs(rng.standard_normal((400, 64)))).astype(np.float32)
    observer = TokenMSE()
    for part in np.array_split(x, 7):
        observer.update(part)
    found = observer.range()
    grid = [Range(x.min() * a, x.max() * b) for a in np.linspace(0.05, 1, 40) for b in np.linspace(0.05, 1, 40)]
    assert token_loss(x, found) < 1.03 * min(token_loss(x, r) for r in grid)
    assert token_loss(x, found) < 0.95 * token_loss(x, Range(float(x.min()), float(x.max())))


def test_mse_neither_obeys_nor_gives_up_one_massive_token() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((512, 256)).astype(np.float32)
    x[0] = 100 * np.sign(x[0])
    observer = TokenMSE()
    observer.update(x)
    assert 3.5 < observer.range().high < 90


def test_mse_of_symmetric_types_is_symmetric_and_degenerate_data_is_fine() -> None:
    observer = TokenMSE(symmetric=True)
    observer.update(np.linspace(-1, 3, 50, dtype=np.float32)[None])
    assert observer.range().low == -observer.range().high
    assert 2.5 < observer.range().high <= 3.0
    assert TokenMSE().range() == Range(0.0, 0.0)
    zeros = TokenMSE()
    zeros.update(np.zeros((4, 8), np.float32))
    assert zeros.range() == Range(0.0, 0.0)


def test_entropy_keeps_a_gaussian_and_cuts_rare_outliers() -> None:
    rng = np.random.default_rng(0)
    observer = Entropy()
    for _ in range(4):
        observer.update(rng.standard_normal((500, 100)).astype(np.float32))
    plain = observer.range()
    assert 3.0 < plain.high < 5.2
    assert -5.2 < plain.low < -3.0
    observer.update(np.array([[100.0]], np.float32))
    cut = observer.range()
    assert cut.high < 20.0
    assert observer.extremes.high == 100.0


def test_entropy_of_one_sided_and_constant_data() -> None:
    relu = Entropy()
    relu.update(np.maximum(np.random.default_rng(0).standard_normal((300, 64)), 0).astype(np.float32))
    assert relu.range().low == 0.0
    assert relu.range().high > 2.5
    zeros, ones = Entropy(), Entropy()
    zeros.update(np.zeros((3, 4), np.float32))
    ones.update(np.full((3, 4), -2.0, np.float32))
    assert zeros.range() == Range(0.0, 0.0)
    assert ones.range() == Range(-2.0, 0.0)


def test_entropy_does_not_depend_on_the_order_of_batches() -> None:
    parts = np.random.default_rng(0).standard_t(3, (6, 1000)).astype(np.float32)
    forth, back = Entropy(), Entropy()
    for part in parts:
        forth.update(part)
    for part in parts[::-1]:
        back.update(part)
    assert forth.range() == back.range()
