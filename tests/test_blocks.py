from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import forms_model
from onnx_quarot.blocks import BlockWeight, pack, quantize_blocks
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.qparams import SolvedWeight
from onnx_quarot.scheme import TensorSpec, parse_scheme
from onnx_quarot.sites import WeightSource

ASYMMETRIC = TensorSpec(bits=4, signed=False, symmetric=False)
SPECS = {"4 bits": ASYMMETRIC, "4 bits symmetric": TensorSpec(bits=4), "8 bits": TensorSpec()}


def scheme(spec: TensorSpec, block: int):
    return replace(parse_scheme("a8w4-block"), weight=spec, block=block, weights="rtn")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_the_kernel_computes_what_the_stored_weights_say(tmp_path: Path, spec: TensorSpec, block: int) -> None:
    """Blocks of 64 do not divide the first layer's 96 features, blocks of 128 are longer than it."""
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    exact, simulated = forms_model.load(path)
    for site in simulated:
        codes, scale, zero = (t.numpy() for t in BlockWeight(WeightSource(site), spec, block, None).plain_tensors())
        s, z = (np.repeat(a.astype(np.float32), block, 0)[: site.depth] for a in (scale, zero))
        value = ((codes.astype(np.float32) - z) * s) / site.alpha
        array = value.T if site.channel_axis == 0 else value
        array = array.T if site.view else array
        site.root.const_value = ir.tensor(np.ascontiguousarray(array), name=site.root.name)
    reports, shared = quantize_blocks(model, sites, {s.node_name: scheme(spec, block) for s in sites}, {})
    assert [n.op_type for n in model.graph if n.op_type in ("MatMul", "Gemm")] == []
    assert [r.weight_bits for r in reports] == [spec.bits] * 3
    assert shared == []
    assert not set(model.graph.initializers) & {"w1", "w2", "w3"}
    got = forms_model.run(model)
    # What is left is the rounding of activations to 8 bits.
    assert forms_model.relative(forms_model.run(exact), got) < 0.015
    assert forms_model.relative(forms_model.run(path), got) < (0.02 if spec.bits == 8 else 0.25)


def test_saved_and_read_back(tmp_path: Path) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    quantize_blocks(model, sites, {s.node_name: scheme(ASYMMETRIC, 32) for s in sites}, {})
    before = forms_model.run(model)
    ir.save(model, tmp_path / "q.onnx", external_data="q.data")
    np.testing.assert_array_equal(forms_model.run(tmp_path / "q.onnx"), before)
    assert (tmp_path / "q.data").stat().st_size < 0.2 * path.stat().st_size


def test_solved_codes_are_stored_as_they_are(tmp_path: Path) -> None:
    _, sites = forms_model.load(forms_model.save(tmp_path / "m.onnx"))
    site = sites[0]
    rng = np.random.default_rng(0)
    for spec, kind in ((ASYMMETRIC, np.uint8), (TensorSpec(bits=4), np.int8)):
        first, last = spec.bounds
        codes = rng.integers(first, last + 1, (96, 128)).astype(kind)
        np.save(tmp_path / "codes.npy", codes)
        zero = rng.integers(0, 16, (2, 128)) if first == 0 else np.zeros((2, 128), int)
        weight = BlockWeight(
            WeightSource(site), spec, 64, SolvedWeight(tmp_path / "codes.npy", rng.random((2, 128)), zero)
        )
        np.testing.assert_array_equal(weight.plain_tensors()[0].numpy().astype(kind), codes)
        packed = weight.codes_tensor().numpy()
        unpacked = np.stack([packed & 15, packed >> 4], -1).reshape(128, 128)
        np.testing.assert_array_equal(unpacked[:, :96].T, codes + (8 if first else 0))
        # The features that fill the last block mean zero.
        filling = unpacked[:, 96:]
        np.testing.assert_array_equal(filling, np.broadcast_to((zero[1] + (8 if first else 0))[:, None], filling.shape))


def test_weights_are_read_without_alpha_lost(tmp_path: Path) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    w2 = model.graph.initializers["w2"].const_value.numpy()
    np.testing.assert_array_equal(WeightSource(sites[1]).read(), w2.T * np.float32(0.5))


@pytest.mark.parametrize(("bits", "codes", "packed"), [(4, [1, 2, 15], [0x21, 0x0F]), (8, [1, 200], [1, 200])])
def test_packing(bits: int, codes: list[int], packed: list[int]) -> None:
    np.testing.assert_array_equal(pack(np.array([codes]), bits), [packed])


def test_refusals(tmp_path: Path) -> None:
    model, sites = forms_model.load(forms_model.save(tmp_path / "t.onnx", trans_a=1))
    with pytest.raises(ModelError, match=r"'second'.*transA"):
        quantize_blocks(model, sites, {s.node_name: scheme(ASYMMETRIC, 32) for s in sites}, {})
    assert "w1" in model.graph.initializers
    with pytest.raises(ConfigError, match="block: 48"):
        scheme(ASYMMETRIC, 48)
    with pytest.raises(ConfigError, match="block: a8w8 has one scale a channel"):
        parse_scheme("a8w8").with_options(block=32)
    with pytest.raises(ConfigError, match="weights: 'awq'"):
        parse_scheme("a8w8").with_options(weights="awq")
