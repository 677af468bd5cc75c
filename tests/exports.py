"""The exports in tests/data, and whether the installed ONNX Runtime is new enough for one of them."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from onnx_quarot import runtime_faults

DATA = Path(__file__).parent / "data"
RUNTIME = runtime_faults.version()


@functools.cache
def known_attributes() -> dict[tuple[str, str], set[str]]:
    """Every operator of ONNX Runtime, with the attributes any version of it takes."""
    known: dict[tuple[str, str], set[str]] = {}
    for schema in get_all_operator_schema():
        known.setdefault((schema.domain, schema.name), set()).update(schema.attributes)
    return known


def runnable(name: str) -> Path:
    """The export's path; the test is skipped where ONNX Runtime lacks an attribute that the exporter writes."""
    path = DATA / f"{name}.onnx"
    for node in ir.load(path).graph:
        missing = set(node.attributes) - known_attributes().get((node.domain, node.op_type), set(node.attributes))
        if missing:
            pytest.skip(f"onnxruntime {ort.__version__} knows no {sorted(missing)} of {node.op_type} ({name})")
    return path
