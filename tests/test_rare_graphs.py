"""What models may hold that few do: rotated and quantized they stay the same function, or are refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.discovery.basis import Segment
from onnx_quarot.errors import ModelError, OnnxQuarotError, VerificationError

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)
STATIC, SCHEMES = ("a8w8",), ("a8w8", "a4w4", "a8w8-dynamic", "a8w4-block")
X: dict[str, Any] = {"x": (TensorProto.FLOAT, ["batch", 9, 32])}


def rand(*shape: int, dtype: Any = np.float32) -> Array:
    return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)


WEIGHTS = {
    "a": rand(32, 64), "g": 1 + rand(64), "c": rand(64), "u": rand(64, 64), "d": rand(64, 64), "b": rand(64, 16),
}  # fmt: skip


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    read, made = (["" if n == "_" else n for n in names.split()] for names in (inputs, outputs))
    return helper.make_node(op, read, made, name=f"{made[0]}/{op}", **attributes)


def norm(x: str, y: str, scale: str = "g") -> onnx.NodeProto:
    return node("SimplifiedLayerNormalization", f"{x} {scale}", y, axis=-1)


def block(x: str, number: int) -> list[onnx.NodeProto]:
    n, p, q, s = (f"{letter}{number}" for letter in "npqs")
    return [norm(x, n), node("MatMul", f"{n} u", p), node("Relu", p, q), node("MatMul", f"{q} d", s),
            node("Add", f"{x} {s}", f"t{number}")]  # fmt: skip


def build(
    nodes: list[onnx.NodeProto],
    weights: dict[str, Array] | None = None,
    inputs: dict[str, Any] | None = None,
    outputs: dict[str, Any] | None = None,
    *,
    opset: int = 21,
    domains: tuple[tuple[str, int], ...] = (),
) -> onnx.ModelProto:
    def info(name: str, kind: Any) -> onnx.ValueInfoProto:
        return kind if isinstance(kind, onnx.ValueInfoProto) else helper.make_tensor_value_info(name, *kind)

    read = {name for one in nodes for name in one.input}
    for one in nodes:
        read |= {
            name for a in one.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node for name in n.input
        }
    results = outputs or {"y": (TensorProto.FLOAT, None)}
    graph = helper.make_graph(
        nodes,
        "g",
        [info(*item) for item in (inputs or X).items()],
        [info(*item) for item in results.items()],
        [
            numpy_helper.from_array(np.asarray(w), n)
            for n, w in (WEIGHTS | (weights or {})).items()
            if n in read or n in results
        ],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(model: onnx.ModelProto, count: int = 4) -> list[dict[str, Array]]:
    rng, given = np.random.default_rng(1), {tensor.name for tensor in model.graph.initializer}
    batches = []
    for _ in range(count):
        batch: dict[str, Array] = {}
        for value in model.graph.input:
            kind = value.type.tensor_type
            shape = [d.dim_value or 3 for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if value.name in given:
                continue
            if kind.elem_type == TensorProto.STRING:
                batch[value.name] = rng.choice(np.array(["one", "two", "three"]), shape)
            elif kind.elem_type == TensorProto.BOOL:
                batch[value.name] = np.ones(shape, np.bool_)
            else:
                batch[value.name] = rng.standard_normal(shape).astype(dtype)
        batches.append(batch)
    return batches


def flat(outputs: list[Any]) -> list[Array]:
    return [part for value in outputs for part in (value if isinstance(value, list) else [value])]


def check(model: onnx.ModelProto, tmp_path: Path, schemes: tuple[str, ...] = SCHEMES) -> oq.Plan:
    """The plan, if rotating changes nothing but rounding and quantizing little."""
    onnx.save(model, tmp_path / "m.onnx")
    data = feeds(model)
    expected = flat(oq.session(tmp_path / "m.onnx").run(None, data[-1]))
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    made = {"r": 1e-3 if any(a.dtype == np.float16 for a in expected) else 1e-5}
    for scheme in schemes:
        oq.quantize(tmp_path / "m.onnx", tmp_path / f"{scheme}.onnx", data, scheme=scheme)
        made[scheme] = 0.3 if "w4" in scheme else 0.06
    for name, allowed in made.items():
        found = flat(oq.session(tmp_path / f"{name}.onnx").run(None, data[-1]))
        for a, b in zip(expected, found, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if a.dtype.kind == "f":
                assert np.linalg.norm((a - b).astype(np.float64)) <= allowed * np.linalg.norm(a.astype(np.float64)), (
                    name
                )
            else:
                assert np.array_equal(a, b)
    assert report.plan is not None
    return report.plan


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and outputs.


@pytest.mark.parametrize("axis", [1, 2])
def test_an_image_that_comes_out_beside_its_features_is_no_cache(axis: int, tmp_path: Path) -> None:
    nodes = [node("MatMul", "x u", "y0"), node("Concat", "x y0", "y", axis=axis)]
    plan = check(build(nodes, inputs={"x": (TensorProto.FLOAT, ["batch", 1, 7, 64])}), tmp_path)
    assert plan.states == ()
    assert [site.how for site in plan.sites] == ["online"]


def test_text_goes_in(tmp_path: Path) -> None:
    codes = {"keys_strings": ["one", "two", "three"], "values_int64s": [0, 1, 2]}
    nodes = [
        node("LabelEncoder", "label", "i", domain="ai.onnx.ml", **codes),
        node("Gather", "table i", "e"),
        node("Add", "e x", "h"),
        node("MatMul", "h a", "k"),
        node("Relu", "k", "q"),
        node("MatMul", "q u", "y"),
    ]
    inputs = {"label": (TensorProto.STRING, ["batch"]), "x": (TensorProto.FLOAT, ["batch", 32])}
    check(build(nodes, {"table": rand(3, 32)}, inputs, domains=(("ai.onnx.ml", 2),)), tmp_path)


def test_text_and_sequences_come_out(tmp_path: Path) -> None:
    labels = {"keys_int64s": [0, 1], "values_strings": ["no", "yes"], "default_string": "perhaps"}
    nodes = [
        node("MatMul", "x a", "h"),
        node("Relu", "h", "q"),
        node("MatMul", "q u", "y"),
        node("SequenceConstruct", "y h", "pieces"),
        node("ReduceMax", "x", "highest", keepdims=0),
        node("Cast", "highest", "number", to=TensorProto.INT64),
        node("LabelEncoder", "number", "label", domain="ai.onnx.ml", **labels),
    ]
    outputs = {
        "y": (TensorProto.FLOAT, None),
        "pieces": helper.make_tensor_sequence_value_info("pieces", TensorProto.FLOAT, None),
        "label": (TensorProto.STRING, None),
    }
    check(build(nodes, outputs=outputs, domains=(("ai.onnx.ml", 2),)), tmp_path)


def test_a_constant_comes_out_of_a_model_of_half_precision(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "q"), node("MatMul", "q u", "y")]
    kind = TensorProto.FLOAT16
    weights = {name: WEIGHTS[name].astype(np.float16) for name in ("a", "u", "c")}
    outputs = {"y": (kind, None), "c": (kind, [64])}
    check(build(nodes, weights, {"x": (kind, ["batch", 9, 32])}, outputs), tmp_path, STATIC)


@pytest.mark.parametrize("shape", [["batch", "tokens", "features"], ["batch", None], ["a", "a", "a"]])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_says_how_many_features_there_are(shape: list[Any], transposed: bool, tmp_path: Path) -> None:
    first = node("Gemm", "x a", "h", transB=1) if transposed else node("MatMul", "x a", "h")
    if transposed and len(shape) > 2:
        pytest.skip("a Gemm multiplies matrices")
    nodes = [first, norm("h", "n"), node("MatMul", "n u", "y")]
    weights = {"a": rand(64, 32)} if transposed else {}
    onnx.save(build(nodes, weights, {"x": (TensorProto.FLOAT, shape)}), tmp_path / "m.onnx")
    assert [site.how for site in oq.discover(tmp_path / "m.onnx").sites] == ["online", "offline"]
    oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [{"x": rand(*[3] * (len(shape) - 1), 32)}] * 3)


@pytest.mark.parametrize("inside", [False, True])
def test_what_comes_out_in_double_precision_may_be_no_more_exact_than_what_it_is_made_of(
    inside: bool, tmp_path: Path
) -> None:
    double = TensorProto.DOUBLE
    weights = {name: w.astype(np.float64) for name, w in WEIGHTS.items()} if inside else {}
    nodes = [node("MatMul", "x a", "h"), node("Cast", "h", "k", to=TensorProto.FLOAT), node("Relu", "k", "q")]
    nodes += [node("Cast", "q", "w", to=double), node("MatMul", "w u", "y")] if inside else []
    nodes += [] if inside else [node("MatMul", "q u", "w"), node("Cast", "w", "y", to=double)]
    inputs = {"x": (double if inside else TensorProto.FLOAT, ["batch", 9, 32])}
    check(build(nodes, weights, inputs, {"y": (double, None)}), tmp_path, STATIC)


def test_a_bias_that_may_be_given_need_not_be(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x a", "h"),
        node("MatMul", "h u", "p"),
        node("Add", "p c", "q"),
        node("MatMul", "q d", "y"),
    ]
    check(build(nodes, inputs=X | {"c": (TensorProto.FLOAT, [64])}), tmp_path)


def test_a_list_of_tensors_goes_in_nowhere(tmp_path: Path) -> None:
    nodes = [node("SequenceAt", "pieces first", "x"), node("MatMul", "x a", "y")]
    pieces = helper.make_tensor_sequence_value_info("pieces", TensorProto.FLOAT, ["batch", 9, 32])
    onnx.save(build(nodes, {"first": np.array(0)}, {"pieces": pieces}), tmp_path / "m.onnx")
    for run in (oq.rotate, lambda source, target: oq.quantize(source, target, [{"pieces": [rand(2, 9, 32)]}])):
        with pytest.raises(ModelError, match="input 'pieces': it is a list of tensors"):
            run(tmp_path / "m.onnx", tmp_path / "q.onnx")


def test_rows_that_are_sent_somewhere_may_be_none(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x a", "h"),
        node("ReduceMax", "h columns", "most", keepdims=0),
        node("Greater", "most large", "chosen"),
        node("NonZero", "chosen", "places"),
        node("Squeeze", "places first", "rows"),
        node("Gather", "h rows", "e"),
        node("MatMul", "e u", "z"),
        node("MatMul", "h b", "y"),
    ]
    weights = {"columns": np.array([1]), "first": np.array([0]), "large": np.float32(1e9)}
    outputs = {"y": (TensorProto.FLOAT, None), "z": (TensorProto.FLOAT, None)}
    check(build(nodes, weights, {"x": (TensorProto.FLOAT, ["batch", 32])}, outputs), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Subgraphs.


@pytest.mark.parametrize("captured", ["t0", "n1", "p1", "u"])
def test_what_a_subgraph_captures_is_in_its_own_basis_there(captured: str, tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(op, TensorProto.FLOAT, None)
        return helper.make_graph([node(op, captured, op)], op, [], [value])

    nodes = [
        node("MatMul", "x a", "h"),
        *block("h", 0),
        *block("t0", 1),
        *block("t1", 2),
        norm("t2", "n"),
        node("MatMul", "n b", "y"),
        node("If", "which", "z", then_branch=branch("Exp"), else_branch=branch("Neg")),
    ]
    outputs = {"y": (TensorProto.FLOAT, None), "z": (TensorProto.FLOAT, None)}
    model = build(nodes, inputs=X | {"which": (TensorProto.BOOL, [])}, outputs=outputs, opset=17)
    plan = check(model, tmp_path)
    assert sum(site.how == "offline" for site in plan.sites) >= 3
    again = oq.Plan.from_json(plan.to_json())
    oq.rotate(tmp_path / "m.onnx", tmp_path / "again.onnx", plan=again)


# ---------------------------------------------------------------------------------------------------------------------
# Constants.


def test_sparse_tensors_are_refused_by_name(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(3, np.float32), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 70, 140]), "i"), [64, 64])
    layers = [node("MatMul", "x a", "h"), node("MatMul", "h s", "y")]
    held = build(layers)
    held.graph.sparse_initializer.append(sparse)
    made = build([node("Constant", "", "s", sparse_value=sparse), *layers])
    for model in (held, made):
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(ModelError, match="'s' is a sparse tensor"):
            oq.discover(tmp_path / "m.onnx")


def test_integers_behind_a_cast_are_a_matrix(tmp_path: Path) -> None:
    whole = RNG.integers(-127, 127, (64, 64)).astype(np.int8)
    nodes = [node("Cast", "i", "w", to=TensorProto.FLOAT), node("MatMul", "x a", "h"), node("Relu", "h", "q"),
             node("MatMul", "q w", "p"), node("Mul", "p step", "y")]  # fmt: skip
    plan = check(build(nodes, {"i": whole, "step": np.float32(0.01)}), tmp_path)
    assert all(site.how == "online" for site in plan.sites)


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 1, 1, 1, 64), (1, 1, 1), (1, 64)])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_bias_may_have_more_axes_than_what_it_is_added_to(
    rank: int, stated: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    nodes = [node("MatMul", "x a", "h"), node("Add", "h e", "k"), node("Relu", "k", "q"), node("MatMul", "q u", "y")]
    rows = ["batch", 9][: rank - 1]
    model = build(nodes, {"e": rand(*shape)}, {"x": (TensorProto.FLOAT, [*rows, 32])})
    if stated:
        model.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [*rows, 64]))
    check(model, tmp_path, STATIC)


def test_a_layer_norm_may_add_a_row_a_position(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("LayerNormalization", "h g rows", "n"), node("MatMul", "n u", "y")]
    plan = check(build(nodes, {"rows": rand(9, 64)}), tmp_path, STATIC)
    assert [site.how for site in plan.sites] == ["online", "online"]


# ---------------------------------------------------------------------------------------------------------------------
# Operators in front of a layer that do not take a factor a feature over.


def beside(path: list[onnx.NodeProto], weights: dict[str, Array]) -> onnx.ModelProto:
    """A norm of a rotated stream that a layer reads as it is, and another one through ``path``, from n to m."""
    nodes = [
        node("MatMul", "x a", "h"),
        norm("h", "n"),
        node("MatMul", "n u", "p"),
        *path,
        node("MatMul", "m d", "o"),
        node("Add", "p o", "q"),
        node("MatMul", "q d", "s"),
        node("Add", "h s", "t"),
        norm("t", "k"),
        node("MatMul", "k b", "y"),
    ]
    return build(nodes, {"g": 3 + 3 * np.abs(rand(64)), **weights})


def test_features_in_another_order_are_others(tmp_path: Path) -> None:
    ends = {"from": np.array([-1]), "to": np.array([-(2**62)]), "axis": np.array([-1]), "step": np.array([-1])}
    check(beside([node("Slice", "n from to axis step", "m")], ends), tmp_path, STATIC)


@pytest.mark.parametrize("kind", [TensorProto.INT32, TensorProto.FLOAT8E4M3FN])
def test_a_cast_that_rounds_is_no_view(kind: int, tmp_path: Path) -> None:
    path = [node("Cast", "n", "rounded", to=kind), node("Cast", "rounded", "m", to=TensorProto.FLOAT)]
    onnx.save(beside(path, {}), tmp_path / "m.onnx")
    oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")


@pytest.mark.parametrize("training", [True, False])
def test_a_dropout_in_training_draws(training: bool, tmp_path: Path) -> None:
    held = {"ratio": np.float32(0.5), "training": np.array(training)}
    nodes = [node("MatMul", "x a", "h"), node("Dropout", "h ratio training", "k"), node("MatMul", "k u", "y")]
    onnx.save(build(nodes, held), tmp_path / "m.onnx")
    hows = [site.how for site in oq.discover(tmp_path / "m.onnx").sites]
    assert hows == ["online", "online" if training else "offline"]


def test_numbers_by_chance_prove_nothing(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("RandomNormalLike", "h", "e"), node("Add", "h e", "k"),
             node("MatMul", "k u", "y")]  # fmt: skip
    onnx.save(build(nodes), tmp_path / "m.onnx")
    with pytest.raises(VerificationError, match="RandomNormalLike 'e/RandomNormalLike' draws other numbers"):
        oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert not (tmp_path / "r.onnx").exists()
    nodes[1].attribute.append(helper.make_attribute("seed", 1.0))
    check(build(nodes), tmp_path, STATIC)


# ---------------------------------------------------------------------------------------------------------------------
# Names, vectors, many pieces.


def test_names_that_are_taken(tmp_path: Path) -> None:
    """Those that a rewrite would give to what it adds."""
    nodes = [
        node("Relu", "x", "x.mean"),
        node("Add", "x x.mean", "h"),
        node("LayerNormalization", "h g c", "n"),
        node("MatMul", "n u", "p"),
        node("Relu", "p", "p.product"),
        node("Neg", "p.product", "h.centred"),
        node("MatMul", "h.centred d", "t.rotated"),
        node("Add", "h t.rotated", "t"),
        node("LayerNormalization", "t g c", "t/Hadamard_0_output"),
        node("MatMul", "t/Hadamard_0_output d", "p.bias"),
        node("Add", "t p.bias", "v"),
        node("LayerNormalization", "v g c", "w"),
        node("MatMul", "w b", "y"),
    ]
    outputs = {"y": (TensorProto.FLOAT, None), "t": (TensorProto.FLOAT, None)}
    check(build(nodes, inputs={"x": (TensorProto.FLOAT, ["batch", 9, 64])}, outputs=outputs), tmp_path, STATIC)


def test_a_vector_has_no_rows_for_scales_of_their_own(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x a", "h"), node("Relu", "h", "q"), node("MatMul", "q u", "y")]
    model = build(nodes, inputs={"x": (TensorProto.FLOAT, [32])})
    check(model, tmp_path, ("a8w8", "a8w8-dynamic", "a8w4-block"))
    with pytest.raises(ModelError, match="'h/MatMul': its input 'x' is a vector"):
        oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", feeds(model), scheme="a4w4")


def test_features_may_be_taken_apart_one_by_one(tmp_path: Path) -> None:
    count = 1200
    names = [f"column{number}" for number in range(count)]
    nodes = [
        helper.make_node("Split", ["x", "ones"], names, name="split", axis=1),
        helper.make_node("Concat", names[::-1], ["k"], name="join", axis=1),
        node("MatMul", "k wide", "y"),
    ]
    weights = {"ones": np.ones(count, np.int64), "wide": rand(count, 16)}
    model = build(nodes, weights, {"x": (TensorProto.FLOAT, ["batch", count])})
    assert len(check(model, tmp_path, STATIC).sites) == 1


def test_cuts_one_behind_the_other_do_not_nest() -> None:
    whole, parts = Segment(6000), []
    for start in range(0, 6000, 2):
        parts.append(whole.piece(start, start + 2))
    assert whole.leaves() == parts
    parts[0].unify(parts[1])
    assert whole.leaves()[0] is whole.leaves()[1]


def test_operators_of_the_runtime_survive_another_opset(tmp_path: Path) -> None:
    """Of 14, as ONNX Runtime's model builder writes it, with norms of its own in ONNX's domain."""
    nodes = [node("MatMul", "x a", "h"), *block("h", 0), norm("t0", "n"), node("MatMul", "n b", "y")]
    check(build(nodes, opset=14), tmp_path, ("a16w8", "a4w4"))


def test_a_fault_of_this_package_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("inner")

    onnx.save(build([node("MatMul", "x a", "y")]), tmp_path / "m.onnx")
    monkeypatch.setattr("onnx_quarot.plan_options.discover_model", fails)
    for run in (oq.rotate, lambda source, target: oq.quantize(source, target, [])):
        with pytest.raises(OnnxQuarotError, match="KeyError"):
            run(tmp_path / "m.onnx", tmp_path / "q.onnx")


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_a_skip_norm_that_is_taken_apart_keeps_the_epsilon_it_does_not_state(op: str, tmp_path: Path) -> None:
    nodes = [
        node("Mul", "x small", "z"),
        node("MatMul", "z a", "h"),
        node(op, "h skip g", "n", domain="com.microsoft"),
        node("MatMul", "n u", "p"),
        node("Add", "p n", "y"),
    ]
    weights = {"small": np.float32(1e-3), "skip": 1e-3 * rand(3, 9, 64)}
    model = build(nodes, weights, {"x": (TensorProto.FLOAT, [3, 9, 32])}, domains=(("com.microsoft", 1),))
    check(model, tmp_path)
