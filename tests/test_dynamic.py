from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import forms_model
from onnx_quarot.dynamic import quantize_dynamic
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.scheme import TensorSpec, parse_scheme

DYNAMIC = parse_scheme("a8w8-dynamic-tensor")


def test_close_to_float_and_fused(tmp_path: Path) -> None:
    path = forms_model.save(tmp_path / "m.onnx")
    model, sites = forms_model.load(path)
    reports, _ = quantize_dynamic(model, sites, {s.node_name: DYNAMIC for s in sites}, {})
    assert [n.op_type for n in model.graph].count("DynamicQuantizeMatMul") == len(reports) == 3
    assert {r.quantized_bytes * 4 for r in reports} == {r.float_bytes for r in reports} | set()
    before = forms_model.run(model)
    assert forms_model.relative(forms_model.run(path), before) < 0.03
    ir.save(model, tmp_path / "q.onnx")
    np.testing.assert_array_equal(forms_model.run(tmp_path / "q.onnx"), before)


def test_refusals(tmp_path: Path) -> None:
    model, sites = forms_model.load(forms_model.save(tmp_path / "t.onnx", trans_a=1))
    with pytest.raises(ModelError, match=r"'second'.*transA"):
        quantize_dynamic(model, sites, {s.node_name: DYNAMIC for s in sites}, {})
    narrow = replace(DYNAMIC, weight=TensorSpec(bits=4, per_channel=True))
    model, sites = forms_model.load(forms_model.save(tmp_path / "m.onnx"))
    with pytest.raises(ConfigError, match="8 bits"):
        quantize_dynamic(model, sites, {s.node_name: narrow for s in sites}, {})
    with pytest.raises(ConfigError, match="finds activation ranges while the model runs"):
        DYNAMIC.with_method("mse")
