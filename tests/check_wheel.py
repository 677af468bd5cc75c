"""Checks of an installed wheel, from any folder: `python tests/check_wheel.py`. Needs nothing but the package.

The libraries export their entry point and nothing else, ask for no executable stack, and hold no path of the machine
that built them; and the package rotates, with the operator library and without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

import onnx_quarot as oq
from onnx_quarot import _core

ENTRIES = {"_core": "PyInit__core", "libonnx_quarot_ops": "RegisterCustomOps"}


def check_library(path: Path) -> None:
    data = path.read_bytes()
    found = re.search(rb"/(home|root|tmp|work|project|build|Users)/[\w./-]{3,}", data)
    assert found is None, f"{path.name} holds the path {found.group()!r}"
    if sys.platform != "linux" or shutil.which("readelf") is None:
        return
    (stack,) = (x for x in tool("readelf", "-lW", path) if "GNU_STACK" in x)
    assert "RWE" not in stack, f"{path.name} wants an executable stack"
    names = [x.split()[-1] for x in tool("nm", "-D", "--defined-only", path)]
    assert names == [ENTRIES[path.name.split(".")[0]]], f"{path.name} exports {names}"


def tool(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def check_use(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in (("a", (96, 96)), ("b", (96, 96)))}
    weights = [helper.make_tensor(n, TensorProto.FLOAT, v.shape, v.tobytes(), raw=True) for n, v in arrays.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 96]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "m.onnx")
    oq.rotate(folder / "m.onnx", folder / "r.onnx")
    data = rng.standard_normal((5, 96)).astype(np.float32)
    expected = np.maximum(data @ arrays["a"], 0) @ arrays["b"]
    for use_library in (True, False):
        got = oq.session(folder / "r.onnx", use_library=use_library).run(None, {"x": data})[0]
        assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(oq.hadamard(data), data @ oq.hadamard_matrix(96), rtol=1e-4, atol=1e-4)


def main() -> None:
    package = Path(oq.__file__).parent
    assert package != Path(__file__).parent.parent / "python" / "onnx_quarot", "this is the source, not a wheel"
    assert (package / "py.typed").exists()
    for library in (Path(_core.__file__), Path(oq.custom_op_library())):
        check_library(library)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        check_use(Path(place))
    import onnxruntime

    print(f"onnx_quarot {oq.__version__}: good, on onnxruntime {onnxruntime.__version__} and onnx {onnx.__version__}")


if __name__ == "__main__":
    main()
