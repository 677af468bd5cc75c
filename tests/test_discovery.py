"""What discovery decides about Llama graphs and about small graphs that must be refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.data import input_specs
from onnx_quarot.discovery import discover_model
from onnx_quarot.discovery.shapes import Shapes
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.load import load
from onnx_quarot.pipeline import quantize
from onnx_quarot.plan import Plan
from onnx_quarot.plan_options import recorded_options

ROTATIONS = ("R1", "R2", "R4")


def plan_of(tmp_path: Path, config: small_llama.Config | None = None, **options: object) -> Plan:
    model = load(small_llama.save(tmp_path / "m.onnx", config or small_llama.Config()))
    return discover_model(model, **{"rotations": ROTATIONS, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [small_llama.Config(), small_llama.Config(tied=False, separate_qkv=True)])
def test_llama_is_rotated_everywhere_for_one_online_op_a_layer(tmp_path: Path, config: small_llama.Config) -> None:
    plan = plan_of(tmp_path, config)
    linears = config.layers * (7 if config.separate_qkv else 5) + 1
    assert plan.summary() == {
        "linear_layers": linears,
        "rotated_offline": linears - config.layers,
        "rotated_online": config.layers,
        "declined": 0,
        "online_ops": config.layers,
        "online_flops_per_row": config.layers * config.ffn * 7,
        "rotations": {"R1": 1, "R2": config.layers, "R4": config.layers},
    }
    sizes = {kind: plan.rotations[name].size for name, kind in plan.kinds.items()}
    assert sizes == {"R1": config.hidden, "R2": config.head_size, "R4": config.ffn}
    assert {s.name.rsplit("/", 2)[-2] for s in plan.sites if s.how == "online"} == {"down_proj"}


@pytest.mark.parametrize(
    ("rotations", "counts"),
    [
        (("R1",), {"R1": 1}),
        (("R2",), {"R2": 2}),
        (("R4",), {"R4": 2}),
        (("R1", "R2"), {"R1": 1, "R2": 2}),
        ((), {}),
    ],
)
def test_only_what_was_asked_for(tmp_path: Path, rotations: tuple[str, ...], counts: dict[str, int]) -> None:
    plan = plan_of(tmp_path, rotations=rotations)
    assert plan.summary()["rotations"] == counts
    for site in plan.declined:
        assert site.reason is not None
        assert "was not asked for" in site.reason
    assert len(plan.online) == (2 if "R4" in rotations else 0)


def test_names_do_not_matter(tmp_path: Path) -> None:
    proto = small_llama.build()
    keep = {v.name for v in [*proto.graph.input, *proto.graph.output]}
    for i, node in enumerate(proto.graph.node):
        node.name = f"n{i}"
        for names in (node.input, node.output):
            for j, name in enumerate(names):
                if name and name not in keep:
                    names[j] = f"t_{hash(name) % 10**12}"
    for tensor in proto.graph.initializer:
        tensor.name = f"t_{hash(tensor.name) % 10**12}"
    onnx.save(proto, tmp_path / "anonymous.onnx")
    plan = discover_model(load(tmp_path / "anonymous.onnx"), rotations=ROTATIONS)
    assert plan.summary() == plan_of(tmp_path).summary()


def test_discovery_is_deterministic_and_its_plan_survives_json(tmp_path: Path) -> None:
    a, b = plan_of(tmp_path, seed=7), plan_of(tmp_path, seed=7)
    text = json.dumps(a.to_json())
    assert text == json.dumps(b.to_json())
    assert json.dumps(Plan.from_json(text).to_json()) == text
    assert json.dumps(plan_of(tmp_path, seed=8).to_json()) != text


def test_bad_plans_are_refused() -> None:
    for text in ("{", "[]", '{"version": 2}', '{"version": 1}'):
        with pytest.raises(ConfigError, match="plan"):
            Plan.from_json(text)


def test_unknown_rotation_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="R9"):
        plan_of(tmp_path, rotations=("R9",))


def test_block_size_by_hand_and_sizes_without_an_order(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, block_size=8)
    assert {r.block_size for r in plan.rotations.values()} == {8}
    odd = plan_of(tmp_path, small_llama.Config(ffn=236))  # 4 * 59: no known construction
    r4 = next(r for n, r in odd.rotations.items() if odd.kinds[n] == "R4")
    assert r4.size == 236
    assert 236 % r4.block_size == 0
    assert r4.block_size < 236
    assert any("236" in note and "blocks" in note for note in odd.notes)


def test_dynamic_dimensions_are_told_from_static_ones(tmp_path: Path) -> None:
    model = load(small_llama.save(tmp_path / "m.onnx"))
    shapes = Shapes(model)
    by_name = {v.name: v for v in shapes.static}
    assert shapes.static[by_name["embedded"]] == (False, False, True)
    assert shapes.shape[by_name["embedded"]][2] == small_llama.Config().hidden
    assert shapes.static[by_name["present.0.value"]] == (False, True, False, True)


@pytest.mark.parametrize("counted", [False, True], ids=["as many as there are", "a number the exporter saw"])
def test_rows_that_only_the_values_pick_keep_their_width(counted: bool) -> None:
    """The tokens of an expert."""
    pieces = [helper.make_node("Split", ["picked", "ones"], ["i", "j"])] if counted else []
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["highest"], keepdims=0, axes=[-1]),
        helper.make_node("Greater", ["highest", "zero"], ["active"]),
        helper.make_node("NonZero", ["active"], ["places"]),
        helper.make_node("Transpose", ["places"], ["picked"]),
        *pieces,
        helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
        helper.make_node("GatherND", ["h", "i" if counted else "picked"], ["rows"]),
        helper.make_node("MatMul", ["rows", "b"], ["y"], name="second"),
    ]
    model = graph(nodes, a=rand(16, 16), b=rand(16, 16), zero=np.zeros(1), ones=np.array([1, 1]), opset=17)
    assert [s.how for s in discover_model(model, rotations=ROTATIONS).sites] == ["online", "offline"]


# ---------------------------------------------------------------------------------------------------------------------
# Near misses.


def graph(nodes: list[onnx.NodeProto], width: int = 16, opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """x [B, width] -> nodes -> y, with the given initializers."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    arrays = {n: w.astype(np.float32) if w.dtype.kind == "f" else w for n, w in weights.items()}
    initializers = [numpy_helper.from_array(w, n) for n, w in arrays.items()]
    proto = helper.make_graph(nodes, "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("custom", 1)]
    return ir.from_proto(helper.make_model(proto, opset_imports=opsets))


def rand(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        discover_model(graph([helper.make_node("Relu", ["x"], ["y"])]))


def test_the_graphs_own_inputs_and_outputs_keep_their_basis() -> None:
    plan = discover_model(graph([helper.make_node("MatMul", ["x", "w"], ["y"])], w=rand(16, 16)), rotations=ROTATIONS)
    # The input may be rotated online in front of the layer; the output may not change.
    assert [o.inverse for o in plan.online] == [False]
    assert all(c.axis == 0 for r in plan.rebases for c in r.changes)


def test_a_reshape_of_nothing_keeps_its_basis() -> None:
    model = graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
            helper.make_node("Slice", ["h", "zero", "zero", "zero"], ["none"]),
            helper.make_node("Reshape", ["none", "turned"], ["r"], allowzero=1),
            helper.make_node("Transpose", ["r"], ["t"]),
            helper.make_node("MatMul", ["t", "v"], ["y"], name="second"),
        ],
        w=rand(16, 16),
        v=rand(16, 16),
        zero=np.array([0]),
        turned=np.array([16, 0]),
    )
    assert discover_model(model, rotations=ROTATIONS).summary()["rotated_offline"] == 0


def test_a_trace_of_one_length_says_what_would_help() -> None:
    nodes = [helper.make_node("Reshape", ["x", "traced"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    model = graph(nodes, w=rand(16, 16), traced=np.array([2, 9, -1]))
    model.graph.inputs[0].shape = ir.Shape(["batch", "length", 16])
    (site,) = discover_model(model, rotations=ROTATIONS).sites
    assert site.reason is not None
    assert "fixed shapes of the graph's inputs" in site.reason
    model.graph.inputs[0].shape = ir.Shape([2, 9, 16])
    (site,) = discover_model(model, rotations=ROTATIONS).sites
    assert site.how == "online"


def test_two_layers_in_a_row_share_a_free_rotation() -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])]
    plan = discover_model(graph(nodes, a=rand(16, 32), b=rand(32, 8)), rotations=ROTATIONS)
    assert [s.how for s in plan.sites] == ["online", "offline"]


@pytest.mark.parametrize(
    ("middle", "weights", "online"),
    [
        ([("Relu", ["h"])], {}, True),  # not in the table: a transform behind it
        ([("Foo", ["h"])], {}, False),  # unknown domain, unknown shape: nothing can be placed
        ([("Softmax", ["h"])], {}, True),
        ([("Mul", ["h", "h"])], {}, True),
        ([("Mul", ["h", "s"])], {"s": np.full(1, 2.0)}, False),  # a scalar factor preserves
        ([("Add", ["h", "s"])], {"s": np.full(1, 2.0)}, False),  # a scalar bias is written out in full
    ],
)
def test_what_stands_between_two_layers(
    middle: list[tuple[str, list[str]]], weights: dict[str, np.ndarray], online: bool
) -> None:
    ((op, inputs),) = middle
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node(op, inputs, ["m"], name="middle", domain="custom" if op == "Foo" else ""),
        helper.make_node("MatMul", ["m", "b"], ["y"], name="last"),
    ]
    plan = discover_model(graph(nodes, a=rand(16, 32), b=rand(32, 8), **weights), rotations=ROTATIONS)
    last = next((s for s in plan.sites if s.name == "last"), None)
    if op == "Foo":
        assert last is None or last.how == "none"
    else:
        assert last is not None
        assert last.how == ("online" if online else "offline")
    if op == "Add":
        (job,) = [r for r in plan.rebases if r.expand is not None]
        assert job.expand == (-1, 32)


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 23, reason="this onnx does not know RMSNormalization")
def test_a_norm_scale_is_folded_only_if_every_reader_absorbs_it() -> None:
    norm = helper.make_node("RMSNormalization", ["h", "g"], ["n"], axis=-1)
    first, last = (
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("MatMul", ["n", "b"], ["y"], name="last"),
    )
    weights = {"a": rand(16, 32), "b": rand(32, 8), "g": np.linspace(1, 2, 32)}

    def decide(*more: onnx.NodeProto, **changed: np.ndarray) -> tuple[str, int]:
        model = graph([first, norm, *more, last], **{**weights, **changed})
        model.graph.opset_imports[""] = 23
        plan = discover_model(model, rotations=ROTATIONS)
        return next(s.how for s in plan.sites if s.name == "last"), len(plan.ones)

    assert decide() == ("offline", 1)
    assert decide(helper.make_node("Relu", ["n"], ["other"])) == ("online", 0)
    # A uniform scale commutes: nothing to fold, and readers may be anything as long as they get their basis back.
    assert decide(g=np.full(32, 1.5)) == ("offline", 0)


def test_images_that_are_halved_and_joined_again_have_divisible_sides(tmp_path: Path) -> None:
    """With sides of 3 and 7 the pyramid of a detector joins maps of unequal sizes: that says nothing of the model."""
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["c1"], kernel_shape=[3, 3], strides=[4, 4], pads=[1] * 4),
        helper.make_node("Conv", ["c1", "b"], ["c2"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node("Resize", ["c2", "", "scales"], ["up"], mode="nearest"),
        helper.make_node("Concat", ["up", "c1"], ["joined"], axis=1),
        helper.make_node("Shape", ["joined"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"]),
        helper.make_node("Concat", ["batch", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["joined", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["rows"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    floats = {"a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "w": (32, 8)}
    constants = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in floats.items()
    ]
    constants.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    constants += [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in (("zero", [0]), ("rest", [32, -1]))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    shapes = Shapes(model)
    value = next(v for n in model.graph for v in n.outputs if v.name == "joined")
    assert shapes.static[value] == (False, True, False, False)
    assert input_specs(model)[0].shape == ("batch", 3, "height", "width")
    assert {s.name: s.how for s in discover_model(model, rotations=ROTATIONS).sites}["y"] == "offline"


def test_a_convolutional_network_is_told_that_it_has_no_linear_layers(tmp_path: Path) -> None:
    """Before it is rotated and verified, which takes long; the weights are named that are there."""
    weight = numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["h"]), helper.make_node("Conv", ["h", "v"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, numpy_helper.from_array(np.ones((4, 8, 3, 3), np.float32), "v")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    data = [{"x": np.ones((1, 3, 16, 16), np.float32)}]
    for rotations in (None, ()):
        with pytest.raises(ModelError, match="its weights are those of 2 Conv, which stay in floating point"):
            quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", data, rotations=rotations)


def test_no_transforms_are_made_for_convolutions_that_stay_in_floating_point(tmp_path: Path) -> None:
    """Discovery finds them a basis; where only products are quantized they would run slower for nothing."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("Transpose", ["t"], ["c"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["c", "w"], ["d"], name="conv"),
        helper.make_node("Transpose", ["d"], ["r"], perm=[0, 2, 1]),
        helper.make_node("Tanh", ["r"], ["s"]),
        helper.make_node("MatMul", ["s", "b"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 32), "w": (32, 32, 1), "b": (32, 8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 6, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in shapes.items()],
    )
    source = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    assert discover_model(load(source), rotations=ROTATIONS).summary()["online_ops"] == 3
    data = [{"x": rng.standard_normal((2, 6, 16)).astype(np.float32)}]
    plan = quantize(source, tmp_path / "q.onnx", data).plan
    assert plan is not None
    assert plan.summary()["online_ops"] == 2
    assert [(s.name, s.reason) for s in plan.declined] == [("conv", "a convolution stays in floating point")]


@pytest.mark.parametrize(
    "kept",
    [{"exclude": ["last"]}, {"layers": {"last": None}}, {"op_types": ["Gemm"]}],
    ids=["exclude", "layers", "op_types"],
)
def test_no_transforms_are_made_for_layers_that_stay_in_floating_point(kept: dict[str, Any], tmp_path: Path) -> None:
    """A layer beside it that is quantized and reads the same has one."""
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], name="first"),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "b"], ["y"], name="last"),
        helper.make_node("Sigmoid", ["h"], ["u"]),
        helper.make_node("Gemm", ["u", "c"], ["v"], name="one"),
        helper.make_node("Gemm", ["u", "d"], ["w"], name="other"),
    ]
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 32), "b": (32, 8), "c": (32, 8), "d": (32, 8)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yvw"],
        [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), n) for n, shape in shapes.items()],
    )
    source = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    data = [{"x": rng.standard_normal((64, 16)).astype(np.float32)}]
    plan = quantize(source, tmp_path / "q.onnx", data, **kept).plan
    assert plan is not None
    assert {s.name: s.how for s in plan.sites} == {
        "first": "online", "last": "none", "one": "online", "other": "online",
    }  # fmt: skip
    assert [s.reason for s in plan.declined] == ["it stays in floating point"]
    assert plan.summary()["online_ops"] == 2
    options = recorded_options(load(tmp_path / "q.onnx"))
    assert options is not None
    again = options.plan(load(source))
    assert (again.sites, again.online) == (plan.sites, plan.online)


@pytest.mark.parametrize(
    ("op_type", "attributes", "shape"),
    [("Gemm", {"transA": 1}, [32, 8]), ("MatMul", {}, [32])],
    ids=["transA", "rank 1"],
)
def test_layers_that_multiply_no_rows_are_quantized_as_they_are(
    tmp_path: Path, op_type: str, attributes: dict[str, int], shape: list[int]
) -> None:
    random = np.random.default_rng(0)
    weight = numpy_helper.from_array(random.standard_normal((32, 16)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", "w"], ["y"], "layer", **attributes)],
        "one layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape[1:], 16])],
        [weight],
    )
    path, opsets = tmp_path / "m.onnx", [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    data = [{"x": random.standard_normal(shape).astype(np.float32)}]
    report = quantize(path, tmp_path / "q.onnx", data)
    assert [site.node_name for site in report.quantized] == ["layer"]
    assert any("nothing is rotated" in note for note in report.notes)
    float_model, quantized = (oq.session(p).run(None, data[0])[0] for p in (path, tmp_path / "q.onnx"))
    assert 0.0 < np.linalg.norm(quantized - float_model) < 0.02 * np.linalg.norm(float_model)
