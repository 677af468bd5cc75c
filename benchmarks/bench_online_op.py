"""What the online rotations cost in a real model, and what quantization gains: SmolLM2-135M, prefill of 512 tokens.

    pytest benchmarks/bench_online_op.py --benchmark-json=online_op.json

The quantized model runs beside the same model with its online rotations taken out, and beside the float model, turn by
turn in one process with one thread, so that the ratios do not depend on what else the machine does. The ratios are in
`extra_info`; what is asserted is that the three models are what they are said to be, never a time. With
``--benchmark-max-time`` below 0.3 that is all: two rounds, whose figures mean little.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from onnx_quarot import pipeline, session
from onnx_quarot.custom_op import DOMAIN, OP_TYPE
from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.demo import cached_smollm2, calibration_text, evaluation_text

TOKENS = 512
ROUNDS = 16


@dataclass(frozen=True)
class Models:
    """Paths of the three models, and one batch for all of them."""

    float32: Path
    quantized: Path
    bypassed: Path
    batch: dict[str, np.ndarray]


def online_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]


def bypass(source: Path, target: Path) -> int:
    """Write `source` without its online rotations (their input passes through); return how many there were."""
    model = ir.load(source)
    nodes = online_nodes(model)
    for node in nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        model.graph.remove(node, safe=True)
    ir.save(model, target, external_data=f"{target.name}.data")
    return len(nodes)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = cached_smollm2()
    if folder is None:
        pytest.skip("SmolLM2 is not in the cache: run onnx-quarot demo once")
    float32 = folder / "model.onnx"
    place = tmp_path_factory.mktemp("online_op")
    quantized, bypassed = place / "quantized.onnx", place / "bypassed.onnx"
    pipeline.quantize(float32, quantized, calibration_text(), tokenizer=folder, windows=2, verify=False)
    removed = bypass(quantized, bypassed)
    assert removed == len(online_nodes(ir.load(quantized))) > 0
    assert online_nodes(ir.load(bypassed)) == []
    batch = next(as_batches(evaluation_text(), input_specs(float32), tokenizer=folder, window=TOKENS, limit=1))
    return Models(float32, quantized, bypassed, dict(batch))


@pytest.mark.model
def test_share_of_the_online_op(models: Models, benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> None:
    rounds = ROUNDS if float(request.config.getoption("benchmark_max_time")) >= 0.3 else 2
    benchmark.group = "prefill of 512 tokens"
    sessions = {name: session(getattr(models, name), threads=1) for name in ("float32", "quantized", "bypassed")}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}

    def run(opened: ort.InferenceSession) -> np.ndarray:
        logits: np.ndarray = opened.run(["logits"], models.batch)[0]
        return logits

    def timed(name: str) -> np.ndarray:
        start = time.perf_counter()
        logits = run(sessions[name])
        seconds[name].append(time.perf_counter() - start)
        return logits

    answers = {name: timed(name) for name in sessions}
    for times in seconds.values():
        times.clear()

    turn = iter(range(rounds))

    def others() -> None:
        # Whoever runs first after the float model finds other caches than who runs second, so they take turns at it.
        if next(turn) % 2:
            timed("float32")
            timed("bypassed")
        else:
            timed("bypassed")
            timed("float32")

    benchmark.pedantic(lambda: timed("quantized"), setup=others, rounds=rounds, iterations=1)
    medians = {name: median(times) for name, times in seconds.items()}
    share = 1 - medians["bypassed"] / medians["quantized"]
    # How far a difference of two such medians strays by chance alone: bootstrap over rounds.
    rng = np.random.default_rng(0)
    picks = rng.integers(0, rounds, (2000, 2, rounds))
    drawn = [np.median(np.take(seconds[name], picks[:, i]), axis=1) for i, name in enumerate(("bypassed", "quantized"))]
    low, high = np.quantile(1 - drawn[0] / drawn[1], (0.05, 0.95))
    gain = medians["float32"] / medians["quantized"]
    benchmark.extra_info |= {
        "online_op_share": share,
        "online_op_share_90_percent": [float(low), float(high)],
        "prefill_speed_over_float": gain,
        **{f"{name}_seconds": value for name, value in medians.items()},
    }
    print(
        f"\nonline op: {100 * share:.1f} % of run time (90 % within {100 * low:.1f} to {100 * high:.1f}); "
        f"prefill {gain:.2f} x float"
    )

    assert all(np.isfinite(logits).all() for logits in answers.values())
    agreement = np.mean(answers["quantized"].argmax(-1) == answers["float32"].argmax(-1))
    assert agreement > 0.75
    # Without its rotations the model is not the same function: they were really in it, and really taken out.
    assert np.mean(answers["bypassed"].argmax(-1) == answers["float32"].argmax(-1)) < agreement
