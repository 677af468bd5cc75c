"""Whatever discovery decides about graphs put together at random from the table's operators is exact."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import onnx_quarot as oq
from onnx_quarot.data import input_specs
from onnx_quarot.errors import VerificationError
from onnx_quarot.load import load
from onnx_quarot.segments import run_in_segments
from onnx_quarot.verify import random_feeds
from test_legality import CASES, node, save

# Parts that map [2, 3, 32] to [2, 3, 32], in any order; the others change lengths or types on the way.
_LENGTHS = (
    "decomposed layer norm of a mean of rows",
    "gather positions",
    "layer norm, then a pad",
    "layer norm, then rows of something else",
    "mean over positions",
    "pad positions",
    "pad positions with a number",
    "pad with a constant position",
    "reshape that keeps the features",
    "resize along the rows",
    "tile positions",
)
_NEW_OPSET = ("rms norm over two axes",)
PARTS = sorted(set(CASES) - set(_LENGTHS) - set(_NEW_OPSET))
INNER = st.lists(st.sampled_from(PARTS), max_size=3)


def renamed(part: str, number: int, source: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]:
    """A part reading ``source``, with names of its own, and the name of its output."""
    nodes, weights, _ = CASES[part]

    def name(old: str) -> str:
        return {"h": source, "x": "x", "": ""}.get(old, f"{old}_{number}")

    result = []
    for original in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(original)
        copy.input[:] = [name(i) for i in original.input]
        copy.output[:] = [name(o) for o in original.output]
        copy.name = f"{original.name}_{number}"
        result.append(copy)
    return result, {name(k): w for k, w in weights.items()}, name("m")


def overflows(path: Path) -> bool:
    """Whether a number inside the model as given is beyond float32: exponentials of exponentials. What comes of it,
    infinite or not a number, depends on the order of additions, and no rewrite can be compared.
    """
    model = load(path)
    names = [str(v.name) for n in model.graph for v in n.outputs if v.name]
    values = run_in_segments(path, random_feeds(input_specs(model)), names)
    return any(v.dtype.kind == "f" and not np.isfinite(v).all() for v in values)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(first=INNER, branch=INNER, residual=st.booleans(), last=INNER, seed=st.sampled_from([None, 1]))
def test_random_graphs_stay_exact(
    first: list[str], branch: list[str], residual: bool, last: list[str], seed: int | None
) -> None:
    nodes = [node("MatMul", "x a", "start")]
    rng = np.random.default_rng(0)
    a, w, b = (rng.standard_normal(shape).astype(np.float32) / 6 for shape in ((16, 32), (32, 32), (32, 8)))
    weights = {"a": a, "w": w, "b": b}
    number, current = 0, "start"
    for group in (first, branch, last):
        trunk = current
        for part in group:
            more, constants, current = renamed(part, number, current)
            nodes += more
            weights |= constants
            number += 1
        if group is branch:
            nodes.append(node("MatMul", f"{current} w", "delta"))
            current = "delta"
            if residual:
                nodes.append(node("Add", f"{trunk} delta", "sum"))
                current = "sum"
    nodes.append(node("MatMul", f"{current} b", "y"))
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder, "m.onnx"), nodes, [2, 3, 16], **weights)
        try:
            report = oq.rotate(path, Path(folder, "rotated.onnx"), rotations=("R1", "R2", "R4"), seed=seed)
        except VerificationError:
            assume(not overflows(path))
            raise
    assert report.plan is not None
    assert all(site.reason for site in report.plan.declined)
    assert report.verification is not None
    assert report.verification.worst < 1e-4


def test_only_what_overflows_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 32)).astype(np.float32), rng.standard_normal((32, 8)).astype(np.float32)
    for times, beyond in ((1, False), (3, True)):
        exponentials = [node("Exp", f"e{i}", f"e{i + 1}") for i in range(times)]
        nodes = [node("MatMul", "x a", "e0"), *exponentials, node("MatMul", f"e{times} b", "y")]
        assert overflows(save(tmp_path / "m.onnx", nodes, [2, 3, 16], a=a, b=b)) == beyond
