"""QLinear beside ONNX Runtime's own linear layers: ``python benchmarks/bench_qlinear.py [--json FILE]``.

One thread, one process, calls interleaved; a ratio is the median over rounds of (their time / ours), so above 1 QLinear
is faster. DynamicQuantizeMatMul runs twice: as it comes, which on x86 CPUs without VNNI saturates sums in 16 bits, and
exact (session.x64quantprecision), which is what QLinear's integers are. "cold" reads 64 MB before each call, so that
weights come from memory, as when decoding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.custom_op import DOMAIN, register
from onnx_quarot.qlinear import pack, pack_scales

SIZES = [(2048, 2048), (2048, 8192), (8192, 2048), (576, 1536), (4096, 14336)]
_MS = "com.microsoft"
Array = np.ndarray[Any, Any]


def session(
    op: str, depth: int, columns: int, constants: list[Array], domain: str, exact: bool, **attributes: Any
) -> ort.InferenceSession:
    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", columns])],
        [numpy_helper.from_array(array, name) for name, array in zip(names, constants, strict=True)],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(_MS, 1), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    register(options)
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def sessions(depth: int, columns: int) -> tuple[dict[str, ort.InferenceSession], Array]:
    """One session a form, and the float weight."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (depth, columns)).astype(np.int8)
    scales = np.full(columns, 0.001, np.float32)
    matrix = weight.astype(np.float32) * scales
    dynamic = [weight, scales, np.zeros(columns, np.int8)]
    found = {
        "float32": session("MatMul", depth, columns, [matrix], "", False),
        "dynamic": session("DynamicQuantizeMatMul", depth, columns, dynamic, _MS, False),
        "dynamic exact": session("DynamicQuantizeMatMul", depth, columns, dynamic, _MS, True),
        "qlinear8": session(
            "QLinear", depth, columns, [pack(weight), scales], DOMAIN, False, K=depth, N=columns, layout_version=1
        ),
    }
    if depth & (depth - 1) == 0:
        found["qlinear8 rotated"] = session(
            "QLinear",
            depth,
            columns,
            [pack(weight), scales],
            DOMAIN,
            False,
            K=depth,
            N=columns,
            layout_version=1,
            rotate=1,
        )
    for block in (64, 128):
        blocks = -(-depth // block)
        codes = np.clip(np.rint(matrix / 0.018), -8, 7).astype(np.int8)
        factors = np.full((blocks, columns), 0.018, np.float32)
        padded = np.pad(codes + 8, ((0, blocks * block - depth), (0, 0)), constant_values=8).astype(np.uint8).T
        nibbles = padded.reshape(columns, blocks, block)
        theirs = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
        found[f"nbits{block}"] = session(
            "MatMulNBits",
            depth,
            columns,
            [np.ascontiguousarray(theirs), np.ascontiguousarray(factors.T)],
            _MS,
            False,
            K=depth,
            N=columns,
            bits=4,
            block_size=block,
            accuracy_level=4,
        )
        found[f"qlinear4 {block}"] = session(
            "QLinear",
            depth,
            columns,
            [pack(codes, block), pack_scales(factors)],
            DOMAIN,
            False,
            K=depth,
            N=columns,
            bits=4,
            block=block,
            layout_version=1,
        )
    return found, matrix


PAIRS = [
    ("float32", "qlinear8"),
    ("dynamic", "qlinear8"),
    ("dynamic exact", "qlinear8"),
    ("nbits64", "qlinear4 64"),
    ("nbits128", "qlinear4 128"),
    ("qlinear8", "qlinear8 rotated"),
]


def compare(
    found: dict[str, ort.InferenceSession], x: Array, rounds: int, evict: Callable[[], object] | None
) -> dict[str, float]:
    """Microseconds of each form, and ratios of the pairs."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds + 1):
        for name, item in found.items():
            if evict is not None:
                evict()
            start = time.perf_counter()
            item.run(None, {"x": x})
            times[name].append(time.perf_counter() - start)
    result = {name: median(values[1:]) * 1e6 for name, values in times.items()}
    for theirs, ours in PAIRS:
        if ours in found:
            ratios = [a / b for a, b in zip(times[theirs][1:], times[ours][1:], strict=True)]
            result[f"{theirs} / {ours}"] = median(ratios)
    return result


def test_answers() -> None:
    """What is timed is right: within the quantization error of what float32 gives."""
    found, matrix = sessions(576, 160)
    x = np.random.default_rng(1).standard_normal((4, 576)).astype(np.float32)
    wanted = x @ matrix
    for name, item in found.items():
        # Saturated sums are wrong on weights that use all of their range, as these do.
        if "rotated" in name or name == "dynamic":
            continue
        error = np.linalg.norm(item.run(None, {"x": x})[0] - wanted) / np.linalg.norm(wanted)
        assert error < (0.15 if "nbits" in name or "qlinear4" in name else 0.02), name


@pytest.mark.parametrize("form", ["float32", "dynamic exact", "qlinear8", "qlinear4 64"])
def test_time(benchmark: Any, form: str) -> None:
    found, _ = sessions(576, 1536)
    x = np.random.default_rng(1).standard_normal((16, 576)).astype(np.float32)
    benchmark(found[form].run, None, {"x": x})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    arguments = parser.parse_args()
    trash = np.ones(8 << 20, np.float64)
    rows = []
    for depth, columns in SIZES[: arguments.sizes]:
        found, _ = sessions(depth, columns)
        for m, cold in [(256, False), (16, False), (16, True), (1, False), (1, True)]:
            x = np.random.default_rng(1).standard_normal((m, depth)).astype(np.float32)
            rounds = arguments.rounds if cold or m > 16 else 4 * arguments.rounds
            result = compare(found, x, rounds, trash.sum if cold else None)
            rows.append({"K": depth, "N": columns, "M": m, "cold": cold, **result})
            shown = "  ".join(f"{name} {value:.2f}" for name, value in result.items() if "/" in name)
            print(f"{depth}x{columns} M={m} {'cold' if cold else 'hot'}: {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
