"""Quantized experts beside floating-point ones: QMoE and MoE of ONNX Runtime, in one session each, taking turns.

    python benchmarks/bench_experts.py                  # every figure, one thread
    pytest benchmarks/bench_experts.py --benchmark-json experts.json

Eight gated experts of 1024 x 1024, two for each token. A figure is the median of the time in floating point by that of
the quantized operator; outputs are compared.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot.experts import expert_sites, quantize_experts
from onnx_quarot.scheme import parse_scheme

EXPERTS, SIZE = 8, 1024
# The relative error that may be left, of normally distributed weights.
SCHEMES = {"a16w8": 0.02, "a8w8": 0.03, "a8w4-block": 0.2}
TOKENS = [1, 128]


@functools.cache
def float_model() -> bytes:
    random = np.random.default_rng(0)
    weights = {
        "up": random.standard_normal((EXPERTS, 2 * SIZE, SIZE)).astype(np.float32) / SIZE**0.5,
        "down": random.standard_normal((EXPERTS, SIZE, SIZE)).astype(np.float32) / SIZE**0.5,
    }
    settings: dict[str, Any] = {"k": 2, "normalize_routing_weights": 1, "activation_type": "swiglu"}
    settings |= {"swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0}
    node = helper.make_node("MoE", ["x", "p", "up", "", "down"], ["y"], "moe", domain="com.microsoft", **settings)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", d]) for n, d in (("x", SIZE), ("p", EXPERTS))]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", SIZE])
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", values, [result], tensors)
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


@functools.cache
def quantized_model(scheme: str) -> bytes:
    model = ir.from_proto(onnx.load_from_string(float_model()))
    quantize_experts(model, expert_sites(model), {"moe": parse_scheme(scheme)})
    return ir.to_proto(model).SerializeToString()


def prepared(model: bytes, feeds: dict[str, np.ndarray]) -> Callable[[], np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)[0]


def ratio(scheme: str, tokens: int, seconds: float) -> float:
    """Median of the time in floating point by that of integers."""
    random = np.random.default_rng(1)
    feeds = {n: random.standard_normal((tokens, d)).astype(np.float32) for n, d in (("x", SIZE), ("p", EXPERTS))}
    calls = [prepared(float_model(), feeds), prepared(quantized_model(scheme), feeds)]
    wanted, got = (call() for call in calls)
    assert np.linalg.norm(got - wanted) < SCHEMES[scheme] * np.linalg.norm(wanted)
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(ratios) < 3:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return median(ratios)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts(benchmark: Any, scheme: str, tokens: int, request: pytest.FixtureRequest) -> None:
    seconds = min(1.0, float(request.config.getoption("benchmark_max_time")))
    benchmark.extra_info["MoE's time by QMoE's"] = benchmark.pedantic(ratio, (scheme, tokens, seconds), rounds=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a comparison")
    options = parser.parse_args()
    for scheme in SCHEMES:
        for tokens in TOKENS:
            print(f"{scheme}, {tokens} tokens: {ratio(scheme, tokens, options.seconds):.2f}", flush=True)
