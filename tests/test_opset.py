"""Models in an opset that has no operators for a scheme are converted; what cannot be is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
from onnx_quarot.errors import ModelError
from onnx_quarot.load import load
from onnx_quarot.opset import at_opset

RNG = np.random.default_rng(0)
WEIGHTS = {"a": (64, 96), "b": (96, 64), "c": (64, 8)}


def save(path: Path, *, opset: int = 11, odd: str = "Softmax", external: bool = False) -> Path:
    """Operators whose attributes became inputs (Squeeze) or changed their meaning (Softmax), on [batch, 9, 64]."""
    nodes = [
        helper.make_node("Squeeze", ["x"], ["s"], name="squeeze", axes=[1]),
        helper.make_node("MatMul", ["s", "a"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "b"], ["d"], name="down"),
        helper.make_node(odd, ["d"], ["w"], name="odd"),
        helper.make_node("Add", ["w", "s"], ["t"], name="add"),
        helper.make_node("MatMul", ["t", "c"], ["y"], name="head"),
    ]
    kind = TensorProto.FLOAT
    arrays = {n: (RNG.standard_normal(shape) / 8).astype(np.float32) for n, shape in WEIGHTS.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", 1, 9, 64])],
        [helper.make_tensor_value_info("y", kind, ["batch", 9, 8])],
        [numpy_helper.from_array(w, n) for n, w in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=6, producer_name="mine")
    helper.set_model_props(model, {"characters": "a b c"})
    onnx.save(model, path, save_as_external_data=external, size_threshold=0, location=f"{path.name}.data")
    return path


def data() -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.standard_normal((2, 1, 9, 64)).astype(np.float32)} for _ in range(12)]


@pytest.mark.parametrize("rotations", [None, ()])
@pytest.mark.parametrize("scheme", ["a8w8", "a16w8", "a8w8-dynamic", "a8w4-block", "a4w4"])
def test_it_is_the_same_function_with_what_it_carried(
    tmp_path: Path, scheme: str, rotations: tuple[str, ...] | None
) -> None:
    source, target = save(tmp_path / "m.onnx"), tmp_path / "q.onnx"
    batches = data()
    report = oq.quantize(source, target, batches, scheme=scheme, rotations=rotations)
    needed = 21 if scheme in ("a16w8", "a4w4") else 13
    assert f"converted from opset 11 to {needed}, which {scheme} needs" in report.notes
    written = onnx.load(target)
    assert {o.domain: o.version for o in written.opset_import}[""] == needed
    assert [p.value for p in written.metadata_props if p.key == "characters"] == ["a b c"]
    assert {"squeeze", "relu", "odd", "add"} <= {n.name for n in written.graph.node}
    expected, found = (oq.session(p).run(None, batches[0])[0] for p in (source, target))
    assert np.abs(found - expected).max() < (0.4 if scheme == "a4w4" else 0.1) * np.abs(expected).max()


def test_layers_that_mixed_widens_have_their_operators(tmp_path: Path) -> None:
    source, target = save(tmp_path / "m.onnx", opset=12), tmp_path / "q.onnx"
    report = oq.quantize(source, target, data(), mixed=0.4, method="minmax", rotations=())
    assert {site.activation_bits for site in report.quantized} == {8, 16}
    assert "converted from opset 12 to 21, which a8w8 mixed needs" in report.notes


def test_weights_are_not_read(tmp_path: Path) -> None:
    model = load(save(tmp_path / "m.onnx", external=True))
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    converted = at_opset(model, 13)
    assert converted.opset_imports[""] == 13
    assert [v.name for v in converted.graph.inputs] == ["x"]
    for name in WEIGHTS:
        assert converted.graph.initializers[name].const_value is tensors[name]
        assert isinstance(tensors[name], ir.ExternalTensor)
    assert at_opset(converted, 13) is converted


def test_what_the_converter_refuses_is_named(tmp_path: Path) -> None:
    source = save(tmp_path / "m.onnx", odd="Unheard")
    message = (
        "opset 11 is too old, opset 13 is needed, and onnx.version_converter does not convert .*Unheard.*; export it"
    )
    with pytest.raises(ModelError, match=message):
        at_opset(load(source), 13)


def test_layer_norms_that_onnx_runtime_wrote_into_an_old_model_are_known(tmp_path: Path) -> None:
    """Its optimizer fuses them in any opset; ONNX has the operator, which is the same, from 17 on."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="up"),
        helper.make_node("LayerNormalization", ["h", "g", "o"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "b"], ["y"], name="down"),
    ]
    weights = {"a": (64, 96), "b": (96, 8), "g": (96,), "o": (96,)}
    arrays = {n: RNG.standard_normal(shape).astype(np.float32) for n, shape in weights.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 9, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 9, 8])],
        [numpy_helper.from_array(w, n) for n, w in arrays.items()],
    )
    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8), source)
    feeds = [{"x": np.random.default_rng(i).standard_normal((3, 9, 64)).astype(np.float32)} for i in range(8)]
    report = oq.quantize(source, target, feeds, scheme="a16w8")
    assert report.plan is not None
    assert {s.name: s.how for s in report.plan.sites} == {"up": "online", "down": "offline"}
    expected, found = (oq.session(p).run(None, feeds[0])[0] for p in (source, target))
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
