"""Tokens a second beside llama.cpp: SmolLM2-135M, one thread, prompts of 512 tokens and single tokens behind 128.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python    # compiled for this machine
    onnx-quarot demo                                            # fetches the model, once
    pytest benchmarks/bench_llama_cpp.py --benchmark-json=llama_cpp.json

llama.cpp runs the Q4_1 file that the float32 model was made from; all take turns in one process. Skipped without
llama-cpp-python. The ratios are in `extra_info`; what is asserted is that all agree on the text, never a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from onnx_quarot import pipeline, session
from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.demo import cached_smollm2, calibration_text, evaluation_text
from onnx_quarot.demo.fetch import fetch_smollm2_gguf
from onnx_quarot.generate import Decoder, extends_in_place

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

PROMPT, CONTEXT, STEPS, ROUNDS = 512, 128, 24, 7
# How integers are chosen makes no difference to speed.
SCHEMES: dict[str, dict[str, Any]] = {
    "a8w8": {},
    "a8w8-dynamic": {},
    "a8w4-block": {"weights": "rtn"},
    "a8w4-dynamic": {"weights": "rtn"},
}

Feed = Callable[[np.ndarray], np.ndarray]  # tokens [n] -> logits [vocabulary] of the last


class Llama:
    """llama.cpp, fed like a Decoder."""

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=1, n_threads_batch=1, verbose=False
        )

    def start(self) -> Feed:
        self._llama.reset()
        return self._feed

    def _feed(self, tokens: np.ndarray) -> np.ndarray:
        self._llama.eval(tokens.tolist())
        count = self._llama.n_vocab()
        pointer = llama_cpp.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(count,)).copy()


class Onnx:
    """A model in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        self._session, self._specs = session(path, threads=1), input_specs(path)
        assert extends_in_place(ir.load(path))

    def start(self) -> Feed:
        decoder = Decoder(self._session, self._specs, capacity=1024)  # the same room as llama.cpp's
        return lambda tokens: decoder.feed(tokens[None])[0]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Llama | Onnx]:
    folder = cached_smollm2()
    if folder is None:
        pytest.skip("SmolLM2 is not in the cache: run onnx-quarot demo once")
    made: dict[str, Llama | Onnx] = {
        "llama.cpp Q4_1": Llama(fetch_smollm2_gguf()),
        "float32": Onnx(folder / "model.onnx"),
    }
    output = tmp_path_factory.mktemp("smollm2")
    for scheme, options in SCHEMES.items():
        target = output / f"{scheme}.onnx"
        pipeline.quantize(
            folder / "model.onnx",
            target,
            calibration_text(),
            scheme=scheme,
            tokenizer=folder / "tokenizer.json",
            windows=2,
            **options,
        )
        made[scheme] = Onnx(target)
    return made


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    folder = cached_smollm2()
    if folder is None:
        pytest.skip("SmolLM2 is not in the cache: run onnx-quarot demo once")
    specs = input_specs(folder / "model.onnx")
    batches: Iterator[Any] = iter(
        as_batches(evaluation_text(), specs, tokenizer=folder / "tokenizer.json", window=PROMPT)
    )
    ids: np.ndarray = next(batches)["input_ids"][0]
    return ids


def test_tokens_per_second(benchmark: BenchmarkFixture, engines: dict[str, Llama | Onnx], tokens: np.ndarray) -> None:
    prefill: dict[str, list[float]] = defaultdict(list)
    decode: dict[str, list[float]] = defaultdict(list)
    last: dict[str, np.ndarray] = {}

    def everybody_once() -> None:
        for name, engine in engines.items():
            feed = engine.start()
            start = time.perf_counter()
            last[name] = feed(tokens)
            prefill[name].append(len(tokens) / (time.perf_counter() - start))
        feeds = {name: engine.start() for name, engine in engines.items()}
        for feed in feeds.values():
            feed(tokens[:CONTEXT])
        for step in range(STEPS):
            for name, feed in feeds.items():
                start = time.perf_counter()
                feed(tokens[CONTEXT + step : CONTEXT + step + 1])
                decode[name].append(1 / (time.perf_counter() - start))

    benchmark.pedantic(everybody_once, rounds=ROUNDS, warmup_rounds=1)
    best = set(np.argsort(last["float32"])[-5:])
    for name, logits in last.items():
        assert int(np.argmax(logits)) in best, name
    rates = {name: (median(prefill[name]), median(decode[name])) for name in engines}
    for name, (fast, slow) in rates.items():
        benchmark.extra_info[name] = {
            "prefill_tokens_per_second": round(fast, 1),
            "decode_tokens_per_second": round(slow, 1),
            "prefill_over_llama_cpp": round(fast / rates["llama.cpp Q4_1"][0], 2),
            "decode_over_llama_cpp": round(slow / rates["llama.cpp Q4_1"][1], 2),
            "prefill_over_float32": round(fast / rates["float32"][0], 2),
            "decode_over_float32": round(slow / rates["float32"][1], 2),
        }
        print(f"\n{name}: {benchmark.extra_info[name]}", end="")
