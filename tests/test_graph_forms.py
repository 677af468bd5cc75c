"""Forms of graphs that are rare but valid: the same layers, written otherwise, are rotated and quantized as ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.errors import DataError, ModelError
from onnx_quarot.load import load

Array = np.ndarray[Any, Any]
Nodes = list[onnx.NodeProto]
RNG = np.random.default_rng(0)
SCHEMES = ("a8w8", "a8w8-dynamic", "a8w4-block")
OWN = "of.its.own"


def rand(*shape: int) -> Array:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS = {
    "a": rand(16, 32), "g": 1 + rand(32), "c": rand(32), "u": rand(32, 48), "d": rand(48, 32), "b": rand(32, 8),
}  # fmt: skip


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if n == "_" else n for n in inputs.split()]
    return helper.make_node(op, names, [output], name=f"{output}/{op}", **attributes)


def mlp() -> Nodes:
    return [
        node("LayerNormalization", "h g c", "n"),
        node("MatMul", "n u", "p"),
        node("Relu", "p", "r"),
        node("MatMul", "r d", "s"),
        node("Add", "h s", "t"),
    ]


def layers() -> Nodes:
    return [node("MatMul", "x a", "h"), *mlp(), node("MatMul", "t b", "y")]


def build(
    nodes: Nodes, weights: dict[str, Array], outputs: str = "y", functions: Any = (), dtype: Any = np.float32
) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", 9, 16])],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs.split()],
        [numpy_helper.from_array(w.astype(dtype) if w.dtype == np.float32 else w, n) for n, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), *([helper.make_opsetid(OWN, 1)] if functions else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)


def computed(*ops: tuple[str, str, dict[str, Any]]) -> Callable[[], onnx.ModelProto]:
    """Every matrix comes out of nodes instead of being a constant itself."""

    def make() -> onnx.ModelProto:
        nodes, weights = [], {"half": np.array(0.5, np.float32)}
        for name, w in WEIGHTS.items():
            if w.ndim < 2:
                weights[name] = w
                continue
            weights |= {f"{name}0": w, f"{name}1": w[:, :4], f"{name}2": w[:, 4:], f"{name}3": w.reshape(-1)}
            weights[f"{name}4"] = np.array(w.shape)
            nodes += [node(op, inputs.replace("w", name), name, **attributes) for op, inputs, attributes in ops]
        read = {n for made in nodes for n in made.input}
        return build(nodes + layers(), {n: w for n, w in weights.items() if n in read or n in WEIGHTS})

    return make


def in_functions() -> onnx.ModelProto:
    inputs = ["h", "g", "c", "u", "d"]
    block = helper.make_function(OWN, "Block", inputs, ["t"], mlp(), [helper.make_opsetid("", 17)])
    linear = helper.make_function(
        OWN, "Linear", ["x", "w"], ["y"], [node("MatMul", "x w", "y")], [helper.make_opsetid("", 17)]
    )
    calls = [
        node("Linear", "x a", "h", domain=OWN),
        node("Block", "h g c u d", "t", domain=OWN),
        node("Linear", "t b", "y", domain=OWN),
    ]
    return build(calls, WEIGHTS, functions=[block, linear])


def of_a_loop() -> onnx.ModelProto:
    """The condition of a Loop may be left out, though an input that may not be left out follows."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Tanh", "h_in", "h_out"), node("Identity", "go", "on")],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("h_in", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("h_out", TensorProto.FLOAT, None)],
    )
    loop = node("Loop", "trips _ y0", "y", body=body)
    nodes = [*layers()[:-1], node("MatMul", "t b", "y0"), loop]
    return build(nodes, {**WEIGHTS, "trips": np.array(2)})


def of_old() -> onnx.ModelProto:
    """Of an IR version at which every initializer had to be an input of the graph, too."""
    model = build(layers(), WEIGHTS)
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    )
    return model


FORMS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": lambda: build(layers(), WEIGHTS),
    "float64": lambda: build(layers(), WEIGHTS, dtype=np.float64),
    "products": computed(("Mul", "w0 half", {})),
    "pieces": computed(("Concat", "w1 w2", {"axis": 1})),
    "reshaped": computed(("Reshape", "w3 w4", {})),
    "functions": in_functions,
    "loop": of_a_loop,
    "IR version 3": of_old,
    "a weight is an output": lambda: build([*layers(), node("Identity", "b", "z")], WEIGHTS, "y z"),
    "a layer without outputs": lambda: build(
        [*layers(), node("MatMul", "t e", "z")], {**WEIGHTS, "e": np.zeros((32, 0), np.float32)}, "y z"
    ),
}


def feeds(dtype: Any, count: int = 4) -> list[dict[str, Array]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((2, 9, 16)).astype(dtype)} for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_is_rotated_and_quantized(form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx.save(FORMS[form](), tmp_path / "m.onnx")
    data = feeds(np.float64 if form == "float64" else np.float32)
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.plan is not None
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    assert {s.how for s in report.plan.sites} <= {"offline", "online"}
    assert len(report.plan.sites) >= 4
    expected = oq.session(tmp_path / "m.onnx").run(None, data[-1])
    for scheme in SCHEMES:
        for rotations in (None, ()):
            report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, scheme=scheme, rotations=rotations)
            assert len(report.quantized) == 4
            found = oq.session(tmp_path / "q.onnx").run(None, data[-1])
            for a, b in zip(expected, found, strict=True):
                assert a.dtype == b.dtype
                assert np.linalg.norm(a - b) <= (0.2 if "w4" in scheme else 0.03) * np.linalg.norm(a)
    assert capfd.readouterr().err == ""  # no warnings of libraries about what was made


def test_functions_that_stand_for_operators_stay(tmp_path: Path) -> None:
    onnx.save(FORMS["plain"](), tmp_path / "m.onnx")
    oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    model = load(tmp_path / "r.onnx")
    assert {key[0] for key in model.functions} == {"onnx_quarot"}
    assert any(n.domain == "onnx_quarot" for n in model.graph)


def test_functions_of_another_opset_stay(tmp_path: Path) -> None:
    model = in_functions()
    for function in model.functions:
        function.opset_import[0].version = 18
    onnx.save(model, tmp_path / "m.onnx")
    assert [n.op_type for n in load(tmp_path / "m.onnx").graph] == ["Linear", "Block", "Linear"]


def test_layers_in_subgraphs_are_spoken_of(tmp_path: Path) -> None:
    """A decoder that was merged from two is one If."""

    def branch(name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("MatMul", "x a", name)], name, [], [value])

    nodes = [
        node("ReduceMax", "x", "m", keepdims=0),
        node("Cast", "m", "which", to=TensorProto.BOOL),
        node("If", "which", "y", then_branch=branch("one"), else_branch=branch("two")),
    ]
    onnx.save(build(nodes, {"a": WEIGHTS["a"]}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="2 are inside subgraphs"):
        oq.discover(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"2 are inside subgraphs \(If\), which are left alone: of a decoder"):
        oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32), rotations=())


def test_weights_that_may_be_given_are_spoken_of(tmp_path: Path) -> None:
    model = of_old()
    model.ir_version = 8
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="4 have a matrix that is an input of the graph"):
        oq.discover(tmp_path / "m.onnx")


def test_a_head_that_reads_one_row_an_image_is_rounded_where_the_rest_is_solved(tmp_path: Path) -> None:
    nodes = [
        *layers()[:-1],
        node("ReduceMean", "t", "pool", axes=[1], keepdims=0),
        node("MatMul", "pool e", "q"),
        node("Relu", "q", "v"),
        node("MatMul", "v f", "y"),
    ]
    weights = {n: w for n, w in WEIGHTS.items() if n != "b"} | {"e": rand(32, 48), "f": rand(48, 8)}
    onnx.save(build(nodes, weights), tmp_path / "m.onnx")
    report = oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32, 1), scheme="a8w4-block")
    assert any("1 of 4 layers were rounded without gptq: 2 rows reach 'q/MatMul'" in note for note in report.notes)
    assert len(report.quantized) == 5


def test_a_layer_that_reads_zeros_is_rounded_where_the_rest_is_solved(tmp_path: Path) -> None:
    """The queries of DETR's decoder start as zeros."""
    nodes = [node("Mul", "x zero", "z"), node("MatMul", "z e", "q"), *layers()[:-1], node("Add", "t q", "v")]
    weights = WEIGHTS | {"zero": np.array(0, np.float32), "e": rand(16, 32)}
    onnx.save(build([*nodes, node("MatMul", "v b", "y")], weights), tmp_path / "m.onnx")
    for rotations in (None, ()):
        report = oq.quantize(
            tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32), scheme="a8w4-block", rotations=rotations
        )
        assert any("1 of 4 layers were rounded without gptq: the inputs of 'q/MatMul'" in note for note in report.notes)
        assert len(report.quantized) == 5
    nodes = [node("Mul", "x zero", "z"), node("MatMul", "z e", "q"), node("Relu", "q", "r"), node("MatMul", "r b", "y")]
    onnx.save(build(nodes, {n: weights[n] for n in ("zero", "e", "b")}), tmp_path / "m.onnx")
    with pytest.raises(DataError, match="gptq has nothing to go by"):
        oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32), scheme="a8w4-block")


def test_our_own_integers_are_recognized(tmp_path: Path) -> None:
    onnx.save(FORMS["plain"](), tmp_path / "m.onnx")
    oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32), scheme="a8w8-dynamic")
    with pytest.raises(ModelError, match=r"already quantized.*QLinear"):
        oq.discover(tmp_path / "q.onnx")


def test_a_gemm_that_transposes_its_rows_is_refused_before_any_work(tmp_path: Path) -> None:
    nodes = [node("Reshape", "x shape", "z"), node("Gemm", "z a", "h", transA=1), node("MatMul", "h b", "y")]
    weights = {"shape": np.array([16, -1]), "a": rand(18, 32), "b": WEIGHTS["b"]}
    onnx.save(build(nodes, weights), tmp_path / "m.onnx")
    for scheme in ("a8w4-block", "a8w8-dynamic"):
        with pytest.raises(ModelError, match=r"'h/Gemm'.*transA"):
            oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(np.float32), scheme=scheme)


def test_a_decoder_inside_a_search_is_spoken_of(tmp_path: Path) -> None:
    """ONNX Runtime's BeamSearch, GreedySearch and Sampling hold the model whose tokens they search."""
    value = helper.make_tensor_value_info("one", TensorProto.FLOAT, None)
    held = helper.make_graph([node("MatMul", "x a", "one")], "decoder", [], [value])
    search = helper.make_node("GreedySearch", ["x", "n"], ["y"], domain="com.microsoft", decoder=held)
    onnx.save(build([search], {"a": WEIGHTS["a"], "n": np.int32([4])}), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"subgraphs \(GreedySearch\), which are left alone: take the model that was"):
        oq.discover(tmp_path / "m.onnx")


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64])
def test_a_pipeline_of_scikit_learn_is_rotated_behind_its_scaler(kind: int, tmp_path: Path) -> None:
    scaler = helper.make_node(
        "Scaler", ["x"], ["n"], domain="ai.onnx.ml", name="scaler", offset=[0.5] * 32, scale=[2.0] * 32
    )
    graph = helper.make_graph(
        [scaler, node("MatMul", "n a", "h"), node("Relu", "h", "r"), node("MatMul", "r b", "y")],
        "pipeline",
        [helper.make_tensor_value_info("x", kind, [None, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.random.default_rng(0).standard_normal(shape).astype(np.float32), name)
            for name, shape in (("a", (32, 64)), ("b", (64, 4)))
        ],
    )
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.plan is not None
    assert [site.how for site in report.plan.sites] == ["online", "online"]


def test_maps_are_refused_by_name(tmp_path: Path) -> None:
    """Classifiers of scikit-learn give a map of labels to numbers, unless they are told not to."""
    number = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, number))
    zipped = helper.make_node("ZipMap", ["h"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    graph = helper.make_graph(
        [node("MatMul", "x a", "h"), zipped],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 32])],
        [onnx.ValueInfoProto(name="y", type=maps)],
        [numpy_helper.from_array(np.ones((32, 2), np.float32), "a")],
    )
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("ai.onnx.ml", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"its value 'y' is a map .* 'zipmap': False"):
        oq.discover(tmp_path / "m.onnx")
