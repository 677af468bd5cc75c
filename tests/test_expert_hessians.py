from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.errors import DataError
from onnx_quarot.expert_hessians import _heard, _Inside, _routing, solve_experts
from onnx_quarot.experts import expert_sites
from onnx_quarot.load import load
from onnx_quarot.progress import NullProgress
from onnx_quarot.replay import Replay
from onnx_quarot.scheme import parse_scheme

MS = "com.microsoft"
EXPERTS, HIDDEN, INNER = 4, 64, 96
GATED: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.7,
    "activation_beta": 1.0,
}
SCHEME = parse_scheme("a8w4-block")


def rows(count: int, seed: int = 0) -> np.ndarray:
    """Correlated features, as layers have them, whose mean is what the router goes by."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(7).standard_normal((HIDDEN // 4, HIDDEN))
    x = rng.standard_normal((count, HIDDEN // 4)) @ mix + 0.3 * rng.standard_normal((count, HIDDEN))
    return (x / 4).astype(np.float32)


def save(path: Path, settings: dict[str, Any], router: np.ndarray | None = None, computed: bool = False) -> Path:
    """Rows, a router, and experts: the graph's input is what enters MoE."""
    rng = np.random.default_rng(3)
    gated = settings["activation_type"] == "swiglu"
    weights = {
        "r": rng.standard_normal((HIDDEN, EXPERTS)) if router is None else router,
        "up": rng.standard_normal((EXPERTS, INNER * (1 + gated), HIDDEN)) / 8,
        "up_bias": rng.standard_normal((EXPERTS, INNER * (1 + gated))) / 8,
        "down": rng.standard_normal((EXPERTS, HIDDEN, INNER)) / 8,
    }
    bias = "doubled" if computed else "up_bias"
    nodes = [
        helper.make_node("MatMul", ["x", "r"], ["p"], name="router"),
        helper.make_node("Add", ["up_bias", "up_bias"], ["doubled"]),
        helper.make_node("MoE", ["x", "p", "up", bias, "down"], ["y"], "experts", domain=MS, k=2, **settings),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", HIDDEN]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes if computed else [nodes[0], nodes[2]], "g", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def error(path: Path, other: Path) -> float:
    """Of rows that neither was calibrated with."""
    feeds = {"x": rows(500, seed=1)}
    wanted, got = (oq.session(p).run(None, feeds)[0].astype(np.float64) for p in (path, other))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("settings", [GATED, {"activation_type": "relu", "normalize_routing_weights": 1}])
@pytest.mark.parametrize("scheme", ["a8w4-block", "a16w8"])
def test_experts_are_much_closer_than_by_rounding(tmp_path: Path, settings: dict[str, Any], scheme: str) -> None:
    path = save(tmp_path / "m.onnx", settings)
    options: dict[str, Any] = {"scheme": scheme, "layers": {"router": None}, "rotations": ()}
    errors = []
    for weights in ("rtn", "gptq"):
        report = oq.quantize(path, tmp_path / f"{weights}.onnx", [{"x": rows(2000)}], weights=weights, **options)
        (experts,) = (part for part in report.quantized if part.op_type == "QMoE")
        assert experts.note.endswith("gptq" if weights == "gptq" else "rounded to the nearest")
        errors.append(error(path, tmp_path / f"{weights}.onnx"))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("inner", [INNER, 32])
@pytest.mark.parametrize("kind", ["swiglu", "relu", "silu", "identity"])
def test_what_enters_the_last_matrix(tmp_path: Path, kind: str, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "INNER", inner)
    model = load(save(tmp_path / "m.onnx", GATED if kind == "swiglu" else {"activation_type": kind}))
    (site,) = expert_sites(model)
    x, found = rows(30), model.graph.initializers
    up, bias = (found[name].const_value.numpy()[2] for name in ("up", "up_bias"))
    h = x @ up.T + bias
    wanted = {
        "swiglu": lambda: h[:, ::2] / (1 + np.exp(-1.7 * h[:, ::2])) * (h[:, 1::2] + 1),
        "relu": lambda: np.maximum(h, 0),
        "silu": lambda: h / (1 + np.exp(-h)),
        "identity": lambda: h,
    }[kind]()
    np.testing.assert_allclose(_Inside(site, None).values(x, 2), wanted, rtol=1e-4, atol=1e-5)


def test_weights_of_rows_are_those_of_the_operator(tmp_path: Path) -> None:
    # With experts that all return ones, the operator returns the sum of the weights of those a row is sent to.
    logits = np.random.default_rng(0).standard_normal((50, EXPERTS)).astype(np.float32)
    for normalized in (0, 1):
        node = helper.make_node(
            "MoE", ["x", "p", "up", "b", "down"], ["y"], domain=MS, k=2, activation_type="identity",
            normalize_routing_weights=normalized,
        )  # fmt: skip
        shapes = {"x": ["n", 8], "p": ["n", EXPERTS], "up": [EXPERTS, 8, 8], "b": [EXPERTS, 8], "down": [EXPERTS, 8, 8]}
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        graph = helper.make_graph([node], "g", values, [result])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        shares, sent = _routing(ir.from_proto(model).graph[0], logits)
        assert (sent.sum(axis=1) == 2).all()
        for expert in range(EXPERTS):
            feeds = {"x": np.zeros((50, 8)), "p": logits, "up": np.zeros((EXPERTS, 8, 8)), "b": np.zeros((EXPERTS, 8))}
            feeds["b"][expert] = 1.0
            feeds["down"] = np.broadcast_to(np.eye(8), (EXPERTS, 8, 8))
            made = session.run(None, {name: array.astype(np.float32) for name, array in feeds.items()})[0][:, 0]
            np.testing.assert_allclose(made, shares[:, expert] * sent[:, expert], atol=1e-6)


def test_an_expert_hears_what_it_is_sent_and_what_came_closest() -> None:
    shares = np.array([0.1, 0.5, 0.3, 0.4, 0.2])
    sent = np.array([False, True, False, False, True])
    assert _heard(shares, sent, 1).tolist() == [1, 4]
    assert _heard(shares, sent, 3).tolist() == [1, 3, 4]
    assert _heard(shares, sent, 9).tolist() == [0, 1, 2, 3, 4]


def test_an_expert_that_is_sent_nothing_goes_by_what_came_closest(tmp_path: Path) -> None:
    router = np.zeros((HIDDEN, EXPERTS))
    router[:, 3] = -1.0  # of rows whose features are all positive
    path = save(tmp_path / "m.onnx", GATED, router)
    report = oq.quantize(path, tmp_path / "q.onnx", [{"x": abs(rows(600))}], scheme=SCHEME, layers={"router": None})
    assert any(note.startswith("2 of 4 experts were sent fewer rows") for note in report.notes)  # ties go to the first
    assert error(path, tmp_path / "q.onnx") < 0.3


def test_too_few_rows_are_rounded_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", GATED)
    options: dict[str, Any] = {"scheme": "a8w4-block", "layers": {"router": "a8w8-block"}}
    report = oq.quantize(path, tmp_path / "q.onnx", [{"x": rows(6)}], **options)
    assert "weights of 1 mixtures of experts were rounded without gptq: 6 rows reach 'experts', " in " ".join(
        report.notes
    )
    assert report.quantized[-1].note.endswith("rounded to the nearest")


def test_computed_biases_are_rounded_and_said(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", GATED, computed=True)
    model = load(path)
    data = Replay([{"x": rows(300)}], tmp_path)
    schemes = {"experts": SCHEME}
    solved, remarks = solve_experts(path, expert_sites(model), schemes, data, tmp_path, NullProgress())
    assert not solved
    assert remarks == ["weights of 1 mixtures of experts were rounded without gptq: biases of 'experts' are computed"]


def test_memory_bounds_rows_and_what_is_solved_does_not_depend_on_threads(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", GATED)
    sites = expert_sites(load(path))
    results = []
    for index, (count, memory) in enumerate([(2000, 150 * HIDDEN * 4), (150, 2**30), (2000, 2**30)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        data = Replay([{"x": part} for part in np.split(rows(2000)[:count], 2)], folder)
        options = {"memory": memory, "threads": 1 + index}
        solved, _ = solve_experts(path, sites, {"experts": SCHEME}, data, folder, NullProgress(), **options)
        results.append([part.read() for part in solved["experts"]])
    for limited, first, all_of_them in zip(*results, strict=True):
        np.testing.assert_array_equal(limited, first)
        assert (first != all_of_them).any()


def test_data_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "m.onnx", GATED)
    bad = rows(300)
    bad[5, 5] = np.nan
    with pytest.raises(DataError, match=r"the input of 'experts', holds NaN"):
        solve_experts(
            path,
            expert_sites(load(path)),
            {"experts": SCHEME},
            Replay([{"x": bad}], tmp_path),
            tmp_path,
            NullProgress(),
        )
