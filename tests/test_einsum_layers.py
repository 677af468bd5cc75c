"""An Einsum that is a linear layer is quantized like a MatMul; any other stays an Einsum."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_quarot as oq
from onnx_quarot.discovery.prepare import simplify
from onnx_quarot.load import load
from test_legality import node, rand, save

X = [2, 6, 32]
LAYERS = {
    "a product": ("btd,de->bte", (32, 24)),
    "a matrix of columns": ("btd,ed->bte", (24, 32)),
    "in another order": ("dz,bcd", (32, 24)),
    "any rows": ("...d,dk->...k", (32, 24)),
    "heads": ("btd,dhe->bthe", (32, 4, 6)),
    "heads in front": ("btd,hde->bhte", (4, 32, 6)),
    "rows come last": ("bdt,dhe->bhet", (6, 4, 8)),
    "heads joined": ("bhe,hed->bd", (6, 32, 16)),
    "heads joined across": ("hbe,ehd->bd", (32, 2, 16)),
}
OTHERS = {
    "a matrix a row": ("btd,tde->bte", (6, 32, 16)),
    "a factor": ("btd,d->btd", (32,)),
    "a sum beside": ("btd,de->be", (32, 8)),
    "no rows": ("btd,btdk->k", (2, 6, 32, 8)),
    "any rows, moved": ("...d,dk->k...", (32, 8)),
}


def model(path: Path, equation: str, shape: tuple[int, ...]) -> Path:
    operands = "w x" if equation.startswith("dz,") else "x w"
    return save(path, [node("Einsum", operands, "y", equation=equation)], X, opset=17, w=rand(*shape))


@pytest.mark.parametrize(("equation", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("rotations", [None, ()], ids=["rotated", "as it is"])
def test_a_linear_layer_is_quantized(
    tmp_path: Path, equation: str, shape: tuple[int, ...], rotations: tuple[str, ...] | None
) -> None:
    source, target = model(tmp_path / "m.onnx", equation, shape), tmp_path / "q.onnx"
    data = [{"x": np.random.default_rng(i).standard_normal(X).astype(np.float32)} for i in range(2)]
    report = oq.quantize(source, target, data, scheme="a8w8-dynamic", rotations=rotations)
    assert len(report.quantized) == 1
    expected, found = (oq.session(p).run(None, data[0])[0] for p in (source, target))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)
    assert "Einsum" not in {n.op_type for n in onnx.load(target).graph.node}


@pytest.mark.parametrize(("equation", "shape"), OTHERS.values(), ids=OTHERS)
def test_what_is_no_linear_layer_stays(tmp_path: Path, equation: str, shape: tuple[int, ...]) -> None:
    found = load(model(tmp_path / "m.onnx", equation, shape))
    assert not simplify(found)
    assert [n.op_type for n in found.graph] == ["Einsum"]


def test_a_matrix_that_two_layers_read_is_not_joined_at_every_run(tmp_path: Path) -> None:
    nodes = [
        node("Einsum", "x w", "p", equation="btd,dhe->bthe"),
        node("Einsum", "x w", "q", equation="btd,dhe->bthe"),
        node("Add", "p q", "y"),
    ]
    found = load(save(tmp_path / "m.onnx", nodes, X, w=rand(32, 4, 6)))
    assert not simplify(found)
