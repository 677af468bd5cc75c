from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import forms_model
import onnx_quarot as oq
from onnx_quarot.blocks import BlockWeight
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.scheme import Scheme, TensorSpec, parse_scheme
from onnx_quarot.sites import WeightSource
from onnx_quarot.tokens import check_tokens, coarse, quantize_tokens

A4W4 = replace(parse_scheme("a4w4"), weights="rtn")
SIGNED = replace(A4W4, activation=TensorSpec(bits=4), block=16)
WHOLE = replace(A4W4, weight=TensorSpec(bits=4), block=None)


def simulated(path: Path, scheme: Scheme) -> np.ndarray:
    """The same in numpy: round activations per row and block, weights per block, multiply in float."""
    _, sites = forms_model.load(path)
    x = np.random.default_rng(1).standard_normal((33, forms_model.DEPTH)).astype(np.float32)
    bias = forms_model.load(path)[0].graph.initializers["c2"].const_value.numpy()
    steps = [lambda y: np.maximum(y, 0), lambda y: np.tanh(y + 2 * bias), lambda y: y]
    for site, after in zip(sites, steps, strict=True):
        block = scheme.block or site.depth
        codes, scale, zero = (
            t.numpy() for t in BlockWeight(WeightSource(site), scheme.weight, block, None).plain_tensors()
        )
        s, z = (np.repeat(a.astype(np.float32), block, 0) for a in (scale, zero))
        x = after(rounded(x, scheme.activation, block) @ ((codes.astype(np.float32) - z) * s))
    return x


def rounded(x: np.ndarray, spec: TensorSpec, block: int) -> np.ndarray:
    blocks = x.reshape(len(x), -1, block)
    first, last = spec.bounds
    if spec.symmetric:
        scale = np.abs(blocks).max(-1) / np.float32(last)
        zero = np.zeros_like(scale)
        first -= 1  # QuantizeLinear clips to the whole type
    else:
        high, low = np.maximum(blocks.max(-1), 0), np.minimum(blocks.min(-1), 0)
        scale = (high - low) / np.float32(last)
        scale[scale == 0] = 1
        zero = -np.rint(low / scale)
    s, z = scale[..., None], zero[..., None]
    s = np.where(s == 0, 1, s)
    return ((np.clip(np.rint(blocks / s) + z, first, last) - z) * s).reshape(x.shape)


@pytest.mark.parametrize("scheme", [A4W4, SIGNED, WHOLE], ids=["a4w4", "signed", "whole rows"])
def test_the_saved_graph_computes_the_simulation(tmp_path: Path, scheme: Scheme) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    schemes = {s.node_name: scheme for s in sites}
    reports = quantize_tokens(model, sites, schemes, {}, check_tokens(model, sites, schemes))
    assert {r.activation_bits for r in reports} == {scheme.activation.bits}
    got = forms_model.run(model)
    assert forms_model.relative(simulated(path, scheme), got) < 0.02
    assert forms_model.relative(forms_model.run(path), got) < 0.4


@pytest.mark.parametrize("spec", [A4W4.activation, SIGNED.activation], ids=["uint4", "int4"])
def test_coarse_rows_are_those_of_the_graph(spec: TensorSpec) -> None:
    x = np.random.default_rng(2).standard_normal((40, 96)).astype(np.float32)
    x[3], x[4], x[5] = 0, np.abs(x[4]), 1e-3 * x[5]
    np.testing.assert_allclose(coarse(x, spec, 32), rounded(x, spec, 32), rtol=1e-5, atol=1e-7)


def test_refusals(tmp_path: Path) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    with pytest.raises(ConfigError, match=r"block: 64 does not divide the 96 input features of 'first'"):
        check_tokens(model, sites, {s.node_name: replace(A4W4, block=64) for s in sites})
    model, sites = forms_model.load(forms_model.save(tmp_path / "old.onnx", opset=17))
    with pytest.raises(ModelError, match="opset 17 is too old for a4w4, which needs opset 21"):
        check_tokens(model, sites, {s.node_name: A4W4 for s in sites})
    model, sites = forms_model.load(forms_model.save(tmp_path / "t.onnx", trans_a=1))
    with pytest.raises(ModelError, match="transA"):
        check_tokens(model, sites, {s.node_name: A4W4 for s in sites})


def test_a_block_that_does_not_divide_is_refused_before_weights_are_solved(tmp_path: Path) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    data = [{"x": np.random.default_rng(0).standard_normal((200, 96)).astype(np.float32)}]
    with pytest.raises(ConfigError, match=r"block: 64 does not divide the 96 input features of 'first'"):
        oq.quantize(path, tmp_path / "q.onnx", data, scheme="a4w4", block=64, rotations=())
    assert not (tmp_path / "q.onnx").exists()
