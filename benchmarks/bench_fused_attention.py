"""The compiled attention beside ONNX Runtime's GroupQueryAttention, in one session each, taking turns.

    python benchmarks/bench_fused_attention.py                  # every figure, one thread
    pytest benchmarks/bench_fused_attention.py --benchmark-json attention.json

Heads as in SmolLM2-135M (9 of 64 features, 3 of keys) and Llama 3 8B (32 of 128, 8 of keys). The caches have room for
all keys and are extended in place, as when decoding; outputs are compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnx_quarot.custom_op import register
from onnx_quarot.fused_attention import OP_TYPE, fuse_attention

HEADS = {"9 heads of 64": (9, 3, 64), "32 heads of 128": (32, 8, 128)}
CALLS = [(512, 0), (1, 128), (1, 1024)]  # new tokens, keys before them


def make_model(heads: int, kv_heads: int, size: int) -> onnx.ModelProto:
    f, i = TensorProto.FLOAT, TensorProto.INT32
    names = ["qkv", "", "", "past_key", "past_value", "lengths", "total", "cos", "sin"]
    outputs = ["y", "present_key", "present_value"]
    settings = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1}
    node = helper.make_node(OP_TYPE, names, outputs, "attention", domain="com.microsoft", **settings)
    cache = ["b", kv_heads, "p", size]
    values = [("qkv", f, ["b", "s", (heads + 2 * kv_heads) * size]), ("past_key", f, cache), ("past_value", f, cache)]
    values += [("lengths", i, ["b"]), ("total", i, []), ("cos", f, ["n", size // 2]), ("sin", f, ["n", size // 2])]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(*value) for value in values],
        [helper.make_tensor_value_info(name, f, None) for name in outputs],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def prepared(model: onnx.ModelProto, feeds: dict[str, Any], threads: int) -> tuple[Callable[[], object], np.ndarray]:
    """A call whose caches are written in place, and its answer."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in feeds.items()}
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    for name in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{name}", held[f"past_{name}"])
    y = np.zeros((1, feeds["qkv"].shape[1], session_width(feeds)), np.float32)
    result = ort.OrtValue.ortvalue_from_numpy(y)
    binding.bind_ortvalue_output("y", result)

    def call() -> object:
        return session.run_with_iobinding(binding)

    call()
    return call, result.numpy()


def session_width(feeds: dict[str, Any]) -> int:
    """Of the output: of all heads but those of keys and values."""
    _, kv_heads, _, size = feeds["past_key"].shape
    return int(feeds["qkv"].shape[2]) - 2 * kv_heads * size


def ratio(name: str, length: int, past: int, threads: int, seconds: float) -> float:
    """Median over rounds of ONNX Runtime's time by ours."""
    heads, kv_heads, size = HEADS[name]
    random = np.random.default_rng(0)
    angles = np.arange(length + past)[:, None] * 0.9 ** np.arange(size // 2)
    feeds: dict[str, Any] = {
        "qkv": random.standard_normal((1, length, (heads + 2 * kv_heads) * size)).astype(np.float32),
        "lengths": np.array([length + past - 1], np.int32),
        "total": np.array(length + past, np.int32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    for kind in ("key", "value"):
        feeds[f"past_{kind}"] = random.standard_normal((1, kv_heads, length + past, size)).astype(np.float32)
    model = make_model(heads, kv_heads, size)
    fused = ir.from_proto(model)
    fuse_attention(fused)
    (theirs, wanted), (ours, found) = (prepared(m, feeds, threads) for m in (model, ir.to_proto(fused)))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        row = []
        for call in (theirs, ours):
            call()
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
        times.append((row[0], row[1]))
    return median(a / b for a, b in times)


@pytest.mark.parametrize(("length", "past"), CALLS)
@pytest.mark.parametrize("name", HEADS)
def test_attention(benchmark: Any, name: str, length: int, past: int, request: pytest.FixtureRequest) -> None:
    seconds = min(1.0, float(request.config.getoption("benchmark_max_time")))
    benchmark.extra_info["ONNX Runtime's time by ours"] = benchmark.pedantic(
        ratio, (name, length, past, 1, seconds), rounds=1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each comparison")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for name in HEADS:
        for length, past in CALLS:
            found = ratio(name, length, past, arguments.threads, arguments.seconds)
            print(f"{name}, {length} new behind {past}: {found:.2f}", flush=True)


if __name__ == "__main__":
    main()
