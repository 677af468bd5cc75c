"""Rotating a model that does not fit in memory: a Llama in float16, random weights, external data.

    pytest benchmarks/bench_large_model.py --benchmark-json=large_model.json
    ONNX_QUAROT_LARGE_LAYERS=32 pytest benchmarks/bench_large_model.py -s        # all 32 layers of a 7B: 13.5 GB

Without the variable the model has two layers (1.3 GB). Rotation and verification run in a process of their own, whose
largest resident set is asserted; its time stands beside that of copying the model's file to the same disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from pytest_benchmark.fixture import BenchmarkFixture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import small_llama

LAYERS = int(os.environ.get("ONNX_QUAROT_LARGE_LAYERS", "2"))
PEAK_LIMIT = 2.5e9
CONFIG = small_llama.Config(
    layers=LAYERS, heads=32, kv_heads=32, head_size=128, ffn=11008, vocab=32000, tied=False, separate_qkv=False
)
ROTATE = """
import json, resource, sys
import onnx_quarot as oq
report = oq.rotate(sys.argv[1], sys.argv[2], verify=sys.argv[3] == "verify").to_json()
used = resource.getrusage(resource.RUSAGE_SELF)
report["cpu"] = used.ru_utime + used.ru_stime
print(json.dumps(report))
"""


class StreamedBuilder(small_llama.Builder):
    """Writes every matrix to the data file as it is made: pieces of one pool of random numbers."""

    dtype = np.dtype(np.float16)

    def __init__(self, config: small_llama.Config, data: Path) -> None:
        super().__init__(config, seed=0)
        self.data = data.open("wb")
        self.pool = self.rng.standard_normal((1 << 24) + 1).astype(np.float32)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        pool = (self.pool * np.float32(gain / rows**0.5)).astype(np.float16)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT16, dims=[rows, columns])
        tensor.data_location = TensorProto.EXTERNAL
        size, offset = rows * columns, self.data.tell()
        for start in range(0, size, pool.size):
            pool[: size - start].tofile(self.data)
        facts = {"location": Path(self.data.name).name, "offset": offset, "length": 2 * size}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in facts.items())
        self.weights.append(tensor)
        return name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("large")
    builder = StreamedBuilder(CONFIG, folder / "model.onnx.data")
    graph = builder.model()
    builder.data.close()
    onnx.save(graph, folder / "model.onnx")
    yield folder / "model.onnx"
    shutil.rmtree(folder)  # pytest would keep 14 GB for the next runs


def copy_seconds(data: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(data, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


@pytest.mark.parametrize("verify", ["rotate only", "verify"])
def test_rotating_in_little_memory(benchmark: BenchmarkFixture, model: Path, verify: str) -> None:
    data = Path(f"{model}.data")
    target = model.with_name("rotated.onnx")
    copying = copy_seconds(data, model.with_name("copy.data"))

    def rotate() -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-c", ROTATE, str(model), str(target), verify], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    report = benchmark.pedantic(rotate, rounds=1)
    gigabytes = data.stat().st_size / 1e9
    facts = {
        "gigabytes": gigabytes,
        "peak_memory_gb": report["peak_memory"] / 1e9,
        "copy_seconds": copying,
        "over_copying": benchmark.stats.stats.mean / copying,
        "cpu_seconds": report["cpu"],
        "seconds": report["seconds"],
    }
    benchmark.extra_info.update(facts)
    print(f"\n{verify}: {facts}")
    plan = report["plan"]
    assert plan["linear_layers"] == 5 * LAYERS + 1
    assert plan["rotated_offline"] + plan["rotated_online"] == plan["linear_layers"]
    assert report["peak_memory"] < PEAK_LIMIT
    assert data.stat().st_size <= report["bytes_out"] < 1.01 * data.stat().st_size
    if verify == "verify":
        assert report["verification"]["worst"] < report["verification"]["tolerance"]
