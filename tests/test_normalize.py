from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import command_line
import onnx_quarot as oq
from onnx_quarot.errors import ConfigError
from onnx_quarot.layers import compare_layers
from onnx_quarot.normalize import EitherWay
from onnx_quarot.observers import Range, TokenMSE
from onnx_quarot.sensitivity import measure_sensitivity

DEPTH, WIDTH, TOKENS, MASSIVE = 48, 32, 40, 500.0


def rows(massive: float = MASSIVE, seed: int = 0) -> np.ndarray:
    """[1, TOKENS, DEPTH]: the first token is `massive` times as large as the others."""
    found = np.random.default_rng(seed).standard_normal((1, TOKENS, DEPTH)).astype(np.float32)
    found[:, 0] *= massive
    return found


def loss(values: np.ndarray, found: Range, levels: int = 255) -> float:
    """Squared errors over lengths of rows, by the definition."""
    x = values.reshape(-1, values.shape[-1]).astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled = x / length if found.normalized else x
    step = (found.high - found.low) / levels
    grid = np.clip(np.round(scaled / step), round(found.low / step), round(found.high / step)) * step
    error = (grid - scaled) * (length if found.normalized else 1.0)
    return float((error**2 / length).sum())


@pytest.mark.parametrize(("massive", "gains"), [(1.0, False), (2.0, False), (30.0, True), (MASSIVE, True)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_length_one_are_chosen_where_they_lose_far_less(massive: float, gains: bool, symmetric: bool) -> None:
    observer, plain = EitherWay(symmetric=symmetric), TokenMSE(symmetric=symmetric)
    for seed in range(3):
        for one in (observer, plain):
            one.update(rows(massive, seed))
    found, data = observer.range(), np.concatenate([rows(massive, seed) for seed in range(3)])
    assert found.normalized == gains
    assert observer.extremes.high == plain.extremes.high == data.max()
    if gains:
        assert found.high <= 1.0
        assert loss(data, found) < 0.3 * loss(data, plain.range())
    else:
        assert found == plain.range()


def test_rows_without_length_count_for_nothing() -> None:
    observer, with_zeros, nothing = EitherWay(), EitherWay(), EitherWay()
    observer.update(rows())
    padded = np.concatenate([rows(), np.zeros((1, 9, DEPTH), np.float32)], axis=1)
    with_zeros.update(padded)
    with_zeros.update(np.zeros((0, DEPTH), np.float32))
    assert observer.range() == with_zeros.range()
    assert observer.range().normalized
    nothing.update(np.zeros((3, DEPTH), np.float32))
    assert nothing.range() == EitherWay().range() == Range(0.0, 0.0)


# ---------------------------------------------------------------------------------------------------------------------


def weight(*shape: int, seed: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) / DEPTH**0.5).astype(np.float32)


KINDS = ("MatMul", "MatMul and Add", "two layers", "behind a node", "Gemm", "Gemm, transposed", "Gemm, computed bias")


def save(path: Path, kind: str, opset: int = 21) -> Path:
    """Linear layers that read x, of rank 2 for a Gemm; c is a vector that is computed."""
    node, bias = helper.make_node, weight(WIDTH, seed=2)
    constants = {"w": weight(DEPTH, WIDTH), "b": bias, "v": weight(DEPTH, WIDTH, seed=3), "t": weight(WIDTH, DEPTH)}
    nodes = {
        "MatMul": [node("MatMul", ["x", "w"], ["y"], "first")],
        "MatMul and Add": [node("MatMul", ["x", "w"], ["p"], "first"), node("Add", ["b", "p"], ["y"])],
        "two layers": [
            node("MatMul", ["x", "w"], ["p"], "first"),
            node("MatMul", ["x", "v"], ["q"], "second"),
            node("Add", ["p", "q"], ["y"]),
        ],
        "behind a node": [node("Abs", ["x"], ["a"]), node("MatMul", ["a", "w"], ["y"], "first")],
        "Gemm": [node("Gemm", ["x", "w", "b"], ["y"], "first", alpha=0.5, beta=3.0)],
        "Gemm, transposed": [node("Gemm", ["x", "t"], ["y"], "first", transB=1)],
        "Gemm, computed bias": [node("Abs", ["b"], ["c"]), node("Gemm", ["x", "w", "c"], ["y"], "first", beta=2.0)],
    }[kind]
    used = {name for n in nodes for name in n.input}
    lead: list[Any] = ["n"] if "Gemm" in kind else ["n", TOKENS]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*lead, DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*lead, WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def fed(kind: str, values: np.ndarray) -> np.ndarray:
    return values[0] if "Gemm" in kind else values


def run(path: Path, values: np.ndarray) -> np.ndarray:
    result: np.ndarray = oq.session(path).run(None, {"x": values})[0].astype(np.float64)
    return result


def errors(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each row, relative."""
    got, wanted = got.reshape(-1, WIDTH), wanted.reshape(-1, WIDTH)
    found: np.ndarray = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    return found


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic-tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_keeps_its_precision(tmp_path: Path, kind: str, scheme: str, opset: int) -> None:
    source = save(tmp_path / "m.onnx", kind, opset)
    data = [{"x": fed(kind, rows(seed=seed))} for seed in range(3)]
    report = oq.quantize(source, tmp_path / "q.onnx", data, scheme=scheme, rotations=())
    oq.quantize(source, tmp_path / "plain.onnx", data, scheme=scheme, rotations=(), normalize=False)
    given = rows(seed=7)
    given[:, 5] = 0.0
    x = fed(kind, given)
    wanted = run(source, x)
    if kind in ("MatMul", "two layers", "behind a node", "Gemm, transposed"):
        assert not wanted.reshape(-1, WIDTH)[5].any()
    zero = run(tmp_path / "q.onnx", x).reshape(-1, WIDTH)[5]
    np.testing.assert_allclose(zero, wanted.reshape(-1, WIDTH)[5], atol=1e-6)  # a row of zeros is exact
    others = np.arange(TOKENS) != 5
    with np.errstate(invalid="ignore"):
        got = errors(run(tmp_path / "q.onnx", x), wanted)[others]
        plain = errors(run(tmp_path / "plain.onnx", x), wanted)[others]
    assert got.max() < 0.03
    assert np.median(plain) > 0.05
    assert all("rows divided by their lengths" in site.note for site in report.quantized)
    (note,) = (note for note in report.notes if "divided" in note)
    layers = len(report.quantized)
    assert f"at {layers} of {layers} linear layers: first" in note
    nodes = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert (nodes.count("Div"), nodes.count("ReduceL2")) == (1, 1)
    assert nodes.count("QuantizeLinear") == (scheme == "a8w8")
    assert "ReduceL2" not in {n.op_type for n in onnx.load(tmp_path / "plain.onnx").graph.node}


def test_activations_of_one_length_stay_as_they_are(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", "MatMul")
    report = oq.quantize(source, tmp_path / "q.onnx", [{"x": rows(1.0)}], rotations=())
    assert "ReduceL2" not in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert not any("divided" in note for note in report.notes)


@pytest.mark.parametrize("options", [{"method": "minmax"}, {"scheme": "a16w8"}, {"scheme": "a8w8-dynamic"}])
def test_it_takes_levels_to_lack_and_a_method_that_tells(tmp_path: Path, options: dict[str, Any]) -> None:
    source = save(tmp_path / "m.onnx", "MatMul")
    oq.quantize(source, tmp_path / "q.onnx", [{"x": rows()}], rotations=(), **options)
    assert "ReduceL2" not in {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    with pytest.raises(ConfigError, match=r"normalize: .* has no activations of 4 or 8 bits with one range"):
        oq.quantize(source, tmp_path / "q.onnx", [{"x": rows()}], normalize=True, **options)


def test_columns_are_not_rows(tmp_path: Path) -> None:
    """A Gemm that transposes its activations reads them in columns."""
    node = helper.make_node("Gemm", ["x", "w"], ["y"], "first", transA=1)
    graph = helper.make_graph(
        [node],
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [TOKENS, DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [DEPTH, WIDTH])],
        [numpy_helper.from_array(weight(TOKENS, WIDTH), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"x": rows()[0]}], rotations=())
    nodes = {n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node}
    assert "QuantizeLinear" in nodes
    assert "ReduceL2" not in nodes


def test_columns_of_one_layer_are_rows_of_another(tmp_path: Path) -> None:
    node, info = helper.make_node, helper.make_tensor_value_info
    graph = helper.make_graph(
        [node("Gemm", ["x", "c"], ["z"], "columns", transA=1), node("Gemm", ["x", "w"], ["y"], "rows")],
        "layers",
        [info("x", TensorProto.FLOAT, [TOKENS, DEPTH])],
        [info("y", TensorProto.FLOAT, [TOKENS, WIDTH]), info("z", TensorProto.FLOAT, [DEPTH, WIDTH])],
        [numpy_helper.from_array(weight(TOKENS, WIDTH), "c"), numpy_helper.from_array(weight(DEPTH, WIDTH), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"x": rows()[0]}], rotations=())
    assert [site.node_name for site in report.quantized if "divided" in site.note] == ["rows"]
    x = rows(seed=7)[0]
    assert errors(run(tmp_path / "q.onnx", x), run(tmp_path / "m.onnx", x)).max() < 0.03


def test_other_schemes_and_rotations_go_with_it(tmp_path: Path) -> None:
    """GPTQ's weights, candidates for 16-bit activations, a rotation in front."""
    source = save(tmp_path / "m.onnx", "two layers")
    data, x = [{"x": rows(seed=seed)} for seed in range(3)], rows(seed=7)
    for options, bound in (
        ({"scheme": "a8w4"}, 0.2),
        ({"mixed": True}, 0.03),
        ({"rotations": ("R4",)}, 0.03),
    ):
        report = oq.quantize(source, tmp_path / "q.onnx", data, **{"rotations": (), **options})  # type: ignore[dict-item]
        assert errors(run(tmp_path / "q.onnx", x), run(source, x)).max() < bound
        assert all("rows divided by their lengths" in site.note for site in report.quantized)
        if "mixed" in options:
            assert "no layer needs 16-bit activations" in report.notes
            assert {site.activation_bits for site in report.quantized} == {8}


def names_of(path: Path) -> list[str]:
    """Of all nodes."""
    return [node.name for node in onnx.load(path).graph.node if node.name]


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic-tensor"])
@pytest.mark.parametrize("other", ["a8w8", "a8w8-dynamic-tensor", "a16w8", "a8w8-dynamic"])
@pytest.mark.parametrize("changed", ["first", "second"])
def test_layers_of_two_schemes_read_one_activation(tmp_path: Path, scheme: str, other: str, changed: str) -> None:
    """Whichever comes first, each has what its scheme asks for."""
    source = save(tmp_path / "m.onnx", "two layers")
    data, x = [{"x": rows(seed=seed)} for seed in range(3)], rows(seed=7)
    target = tmp_path / "q.onnx"
    report = oq.quantize(source, target, data, scheme=scheme, rotations=(), layers={changed: other})
    assert errors(run(target, x), run(source, x)).max() < 0.03
    assert len(set(names_of(target))) == len(names_of(target))
    plain = {changed} if other in ("a16w8", "a8w8-dynamic") else set()
    assert {site.node_name for site in report.quantized if "divided" not in site.note} == plain
    if other == "a16w8":
        (wide,) = (site for site in report.quantized if site.node_name == changed)
        peak = max(abs(batch["x"]).max() for batch in data)
        assert wide.activation_scale * 65535 > peak  # nothing is clipped, whatever 8 bits need


def test_names_of_nodes_are_taken_too(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", "two layers")
    model = onnx.load(source)
    made = ("x_ReduceL2", "x_Max", "x_Div", "x_QuantizeLinear", "w_DequantizeLinear", "first_times_length")
    result = model.graph.output[0].name
    for index, name in enumerate(made):
        model.graph.node.append(helper.make_node("Identity", [result], [f"copy_{index}"], name))
        result = f"copy_{index}"
    model.graph.output[0].name = result
    onnx.save(model, source)
    target = tmp_path / "q.onnx"
    for scheme in ("a8w8", "a8w8-dynamic-tensor"):
        oq.quantize(source, target, [{"x": rows()}], scheme=scheme, rotations=())
        assert len(set(names_of(target))) == len(names_of(target))
        assert errors(run(target, rows(seed=7)), run(source, rows(seed=7))).max() < 0.03


def test_layers_are_measured_with_what_is_around_them(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", "two layers")
    oq.quantize(source, tmp_path / "q.onnx", [{"x": rows()}], rotations=())
    found = measure_sensitivity(source, tmp_path / "q.onnx", {"x": rows(seed=7)})
    assert {layer.name for layer in found.layers} == {"first", "second"}
    assert 0.0 < max(layer.error for layer in found.layers) < 1e-3


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic-tensor"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_layers_are_compared_with_what_is_behind_them(tmp_path: Path, scheme: str, kind: str) -> None:
    source, data = save(tmp_path / "m.onnx", kind), {"x": fed(kind, rows())}
    oq.quantize(source, tmp_path / "q.onnx", [data], scheme=scheme, rotations=())
    assert any("times_length" in name for name in names_of(tmp_path / "q.onnx"))
    (layer,) = compare_layers(source, tmp_path / "q.onnx", (data, data))
    assert layer.output_sqnr is not None
    assert layer.output_sqnr > 35


def test_the_command_line_can_do_without(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", "MatMul")
    np.savez(tmp_path / "data.npz", x=rows())
    for flag, found in (([], True), (["--no-normalize"], False)):
        target = tmp_path / "q.onnx"
        command_line.answer("quantize", source, target, "--calibration", tmp_path / "data.npz", *flag)
        assert ("ReduceL2" in {n.op_type for n in onnx.load(target).graph.node}) == found
