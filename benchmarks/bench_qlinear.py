"""QLinear beside ONNX Runtime's own linear layers and beside what the CPU can do at most.

``python benchmarks/bench_qlinear.py`` prints every figure, ``--json FILE`` keeps them; with ``pytest
benchmarks/bench_qlinear.py --benchmark-json FILE`` they are in pytest-benchmark's JSON, as ``extra_info``.

One thread (two where a figure says so), one process, calls interleaved, outputs bound beforehand. A figure is the
median over rounds of (their time / ours): above 1, QLinear is faster. "hot" calls follow a call of the same session
that is not counted; before "cold" ones 96 MB of other memory are read, so that weights come from memory, as when
decoding. The time of a session that does nothing is taken off both sides: a model pays it once a run, not once a layer.
Limits of the CPU are measured in C++ (machine_limits.cc). Every answer is checked. DynamicQuantizeMatMul has one range
for all rows; on x86 CPUs without VNNI it saturates sums in 16 bits, from which weights of half the range keep it.

With ``--benchmark-max-time`` below 0.3 answers are checked as ever, in a few rounds whose figures mean little, and the
largest size is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_quarot import _core
from onnx_quarot.custom_op import DOMAIN, register
from onnx_quarot.qlinear import pack, pack_scales, pack_zero_points

SIZES = [(2048, 2048), (2048, 8192), (8192, 2048), (576, 1536), (4096, 14336)]
# (rows, cold), in the order of the floors below.
CALLS = [(256, False), (16, False), (16, True), (1, False), (1, True)]
# The least a figure should be: for the calls above, where there is one.
FLOORS: dict[str, list[float | None]] = {
    "int8": [1.05, 1.1, 1.3, 1.2, 1.4],
    "int4 block 64": [2.6, 2.5, None, 1.9, 1.2],
    "int4 block 128": [2.1, 2.0, None, 1.5, 1.15],
}
_MS = "com.microsoft"
_CACHES = 96 << 20
# Of a comparison in pytest; below it, answers count and figures do not.
_SECONDS = 0.3
_PAGE = 4096
Array = np.ndarray[Any, Any]


@functools.cache
def limits() -> ctypes.CDLL:
    """What the CPU can do at most, compiled for it."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("a C++ compiler is needed to measure what the CPU can do at most")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        source = Path(__file__).with_name("machine_limits.cc")
        flags = ["-O3", "-std=c++17", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        found = ctypes.CDLL(str(library))
    found.dot_rate.restype = found.read_seconds.restype = ctypes.c_double
    found.read_seconds.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return found


@functools.cache
def _other_memory() -> Array:
    return np.ones(_CACHES // 8)


def _save(model: onnx.ModelProto, constants: dict[str, Array], folder: Path) -> None:
    """As models are saved: weights in a file of their own, each from the beginning of a page on."""
    with (folder / "weights").open("wb") as file:
        for name, array in constants.items():
            file.seek(-(-file.tell() // _PAGE) * _PAGE)
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            place = {"location": "weights", "offset": str(file.tell()), "length": str(array.nbytes)}
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            file.write(array.tobytes())
    (folder / "model.onnx").write_bytes(model.SerializeToString())


class Layer:
    """A model of one node, and a call of it with bound input and output. constants: None is an input left out."""

    def __init__(
        self,
        op: str,
        depth: int,
        columns: int,
        constants: list[Array | None],
        domain: str = DOMAIN,
        threads: int = 1,
        **attributes: Any,
    ) -> None:
        names = ["" if array is None else f"c{i}" for i, array in enumerate(constants)]
        graph = helper.make_graph(
            [helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)],
            op,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", depth])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", columns])],
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(_MS, 1), helper.make_opsetid(DOMAIN, 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        register(options)
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        with tempfile.TemporaryDirectory() as folder:
            given = {name: array for name, array in zip(names, constants, strict=True) if array is not None}
            _save(model, given, Path(folder))
            path = f"{folder}/model.onnx"
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            # The same memory as the session's: both map the file.
            self.constants = np.memmap(f"{folder}/weights", np.uint8, "r") if constants else None
        self.columns = columns

    def call(self, x: Array) -> tuple[Callable[[], None], Array]:
        """What runs the layer on x, and where it writes."""
        y = np.empty((len(x), self.columns), np.float32)
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", x)
        binding.bind_output("y", "cpu", 0, np.float32, y.shape, y.ctypes.data)

        def run(_bound: object = (x, y)) -> None:  # which the binding does not keep alive
            self.session.run_with_iobinding(binding)

        return run, y


def nothing(depth: int) -> Layer:
    """A session that copies its input: what a call costs."""
    return Layer("Identity", depth, depth, [], "")


def int8_constants(depth: int, columns: int) -> tuple[Array, Array]:
    """Weights and their scales. Half of the range: with more, DynamicQuantizeMatMul saturates without VNNI."""
    weight = np.random.default_rng(0).integers(-63, 64, (depth, columns)).astype(np.int8)
    return weight, np.full(columns, 0.002, np.float32)


def int8_layers(depth: int, columns: int, threads: int = 1, **attributes: Any) -> tuple[Layer, Layer, Array]:
    """DynamicQuantizeMatMul, QLinear, and the float matrix both stand for."""
    weight, scales = int8_constants(depth, columns)
    zeros = np.zeros(columns, np.int8)
    theirs = Layer("DynamicQuantizeMatMul", depth, columns, [weight, scales, zeros], _MS, threads)
    return theirs, qlinear8(depth, columns, threads, **attributes), weight.astype(np.float32) * scales


def qlinear8(depth: int, columns: int, threads: int = 1, **attributes: Any) -> Layer:
    weight, scales = int8_constants(depth, columns)
    shape: dict[str, Any] = {"K": depth, "N": columns, "layout_version": 1}
    return Layer("QLinear", depth, columns, [pack(weight), scales], threads=threads, **shape, **attributes)


def int4_constants(depth: int, columns: int, block: int) -> tuple[Array, Array]:
    """Integers [K, N] from -8 to 7, and their scales [blocks, N]."""
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (depth, columns)).astype(np.int8)
    return codes, random.uniform(0.5, 1.5, (-(-depth // block), columns)).astype(np.float32) / 64


def qlinear4(depth: int, columns: int, block: int, zeros: Array | None = None) -> Layer:
    """zeros: zero points, [blocks, N]."""
    codes, factors = int4_constants(depth, columns, block)
    constants: list[Array | None] = [pack(codes, block), pack_scales(factors)]
    if zeros is not None:
        constants += [None, None, pack_zero_points(zeros)]
    shape: dict[str, Any] = {"K": depth, "N": columns, "bits": 4, "block": block, "layout_version": 1}
    return Layer("QLinear", depth, columns, constants, **shape)


def int4_layers(depth: int, columns: int, block: int) -> tuple[Layer, Layer, Array]:
    """MatMulNBits at accuracy level 4, QLinear, and the float matrix both stand for."""
    codes, factors = int4_constants(depth, columns, block)
    blocks = len(factors)
    padded = np.pad(codes + 8, ((0, blocks * block - depth), (0, 0)), constant_values=8).astype(np.uint8).T
    nibbles = padded.reshape(columns, blocks, block)
    packed = np.ascontiguousarray(nibbles[..., ::2] | (nibbles[..., 1::2] << 4))
    shape: dict[str, Any] = {"K": depth, "N": columns, "bits": 4, "block_size": block, "accuracy_level": 4}
    nbits: list[Array | None] = [packed, np.ascontiguousarray(factors.T)]
    theirs = Layer("MatMulNBits", depth, columns, nbits, _MS, **shape)
    return theirs, qlinear4(depth, columns, block), codes.astype(np.float32) * np.repeat(factors, block, axis=0)[:depth]


def activations(rows: int, depth: int) -> Array:
    return np.random.default_rng(1).standard_normal((rows, depth)).astype(np.float32)


def check(y: Array, x: Array, matrix: Array) -> None:
    """Within the error of quantizing activations to 8 bits, of the first rows."""
    wanted = x[:2] @ matrix
    error = np.linalg.norm(y[:2] - wanted) / np.linalg.norm(wanted)
    assert error < 0.02, f"relative error {error:.3f}"


def race(calls: list[Callable[[], object]], cold: bool, seconds: float) -> Array:
    """Seconds of each call, [rounds, calls]."""
    times: list[list[float]] = []
    end, least = time.perf_counter() + seconds, 7 if seconds >= _SECONDS else 1
    while time.perf_counter() < end or len(times) < least:
        row = []
        for call in calls:
            if cold:
                _other_memory().sum()
            else:
                call()
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
        times.append(row)
    return np.array(times)


def ratio(times: Array, theirs: int, ours: int) -> float:
    """Median over rounds."""
    return float(median(times[:, theirs] / times[:, ours]))


def net(times: Array, *columns: int) -> Array:
    """Some columns without the time of a session that does nothing, the last column of all: [rounds, columns]."""
    found: Array = times[:, columns] - np.median(times[:, -1])
    return found


def beside_onnxruntime(layers: tuple[Layer, Layer, Array], seconds: float) -> Iterator[tuple[str, float]]:
    """Ratios to ONNX Runtime's layer, for the calls above."""
    theirs, ours, matrix = layers
    idle = nothing(len(matrix))
    for rows, cold in CALLS:
        x = activations(rows, len(matrix))
        (first, y_first), (second, y_second), (rest, _) = theirs.call(x), ours.call(x), idle.call(x[:1])
        times = race([first, second, rest], cold, seconds)
        check(y_first, x, matrix)
        check(y_second, x, matrix)
        yield f"M={rows}{' cold' if cold else ''}", ratio(net(times, 0, 1), 0, 1)


def beside_limits(layers: tuple[Layer, Layer, Array], seconds: float) -> Iterator[tuple[str, float]]:
    """The share of the instructions' peak at 256 rows, and of a read of weights and scales at one."""
    _, layer, matrix = layers
    depth, columns = matrix.shape
    idle, constants = nothing(depth), layer.constants
    assert constants is not None
    for rows, cold in CALLS:
        if rows == 16:
            continue
        x = activations(rows, depth)
        call, y = layer.call(x)
        rest, _ = idle.call(x[:1])
        if rows == 1:
            read = functools.partial(limits().read_seconds, constants.ctypes.data, constants.nbytes)
            times = race([read, call, rest], cold, seconds)
            share = float(median(times[:, 0] / net(times, 1)[:, 0]))
            yield f"M=1{' cold' if cold else ''}: of a read", share
        else:
            times, peaks = race([call, rest], cold, seconds), [limits().dot_rate() for _ in range(50)]
            free = float(np.median(net(times, 0)))
            yield f"M={rows}: of the peak", 2.0 * rows * depth * columns / free / max(peaks)
        check(y, x, matrix)


def rotated(depth: int, columns: int, seconds: float) -> float:
    """Time of the operator with a rotation inside, by the time without, at 256 rows."""
    x = activations(256, depth)
    (plain, y), (turned, y_turned) = (qlinear8(depth, columns, rotate=r).call(x) for r in (0, 1))
    times = race([turned, plain], False, seconds)
    assert not np.array_equal(y, y_turned)
    np.testing.assert_allclose(np.linalg.norm(y_turned), np.linalg.norm(y), rtol=0.05)
    return ratio(times, 0, 1)


def with_zero_points(depth: int, columns: int, block: int, seconds: float) -> Iterator[tuple[str, float]]:
    """Time of the operator with zero points, by the time without, for the calls above."""
    codes, factors = int4_constants(depth, columns, block)
    zeros = np.random.default_rng(2).integers(0, 16, factors.shape)
    shift, scale = (np.repeat(grid, block, axis=0)[:depth] for grid in (8 - zeros, factors))
    layers = qlinear4(depth, columns, block, zeros), qlinear4(depth, columns, block)
    idle = nothing(depth)
    for rows, cold in CALLS:
        x = activations(rows, depth)
        (shifted, y), (plain, _), (rest, _) = layers[0].call(x), layers[1].call(x), idle.call(x[:1])
        times = race([shifted, plain, rest], cold, seconds)
        check(y, x, (codes + shift) * scale)
        yield f"M={rows}{' cold' if cold else ''}: time with zero points", ratio(net(times, 0, 1), 0, 1)


def two_threads(depth: int, columns: int, rows: int, seconds: float) -> float:
    """Speed-up by a second thread."""
    x = activations(rows, depth)
    (one, y_one), (two, y_two) = (qlinear8(depth, columns, threads).call(x) for threads in (1, 2))
    times = race([one, two], False, seconds)
    np.testing.assert_array_equal(y_one, y_two)
    return ratio(times, 0, 1)


_CHILD = """
import sys; sys.path.insert(0, {folder!r})
import bench_qlinear as b, numpy as np
for rows in (256, 1):
    call, y = b.qlinear8({depth}, {columns}).call(b.activations(rows, {depth}))
    times = b.race([call], False, {seconds})
    print(float(np.median(times)), y.tobytes().hex()[:4096])
"""


def without_vnni(depth: int, columns: int, seconds: float) -> dict[str, float]:
    """Speed of the AVX2 kernels by that of those with VNNI, as wide as the CPU has it and of AVX2's width: in processes
    of their own, which take turns."""
    code = _CHILD.format(folder=str(Path(__file__).parent), depth=depth, columns=columns, seconds=seconds)
    times: dict[str, list[list[float]]] = {"": [], "avxvnni": [], "avx2": []}
    answers = set()
    for _ in range(3 if seconds >= _SECONDS else 1):
        for isa, found in times.items():
            environment = {**os.environ, "ONNX_QUAROT_ISA": isa}
            run = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            lines = [line.split() for line in run.stdout.splitlines()]
            found.append([float(line[0]) for line in lines])
            answers.add(tuple(line[1] for line in lines))
    assert len(answers) == 1, "instruction sets differ"
    best = {isa: np.median(found, axis=0) for isa, found in times.items()}
    return {
        f"AVX2 by {name}, M={rows}": float(best[isa][i] / best["avx2"][i])
        for name, isa in (("the best", ""), ("AVX-VNNI", "avxvnni"))
        for i, rows in enumerate((256, 1))
    }


def figures(depth: int, columns: int, seconds: float) -> dict[str, float]:
    """All figures of one size, in one thread."""
    found = {}
    kinds = {"int8": int8_layers(depth, columns)}
    kinds |= {f"int4 block {block}": int4_layers(depth, columns, block) for block in (64, 128)}
    for kind, layers in kinds.items():
        for name, value in beside_onnxruntime(layers, seconds):
            found[f"{kind}, {name}"] = value
        for name, value in beside_limits(layers, seconds):
            found[f"{kind}, {name}"] = value
    for name, value in with_zero_points(depth, columns, 64, seconds):
        found[f"int4 block 64, {name}"] = value
    # Two processes a turn, which make weights anew.
    if _core.has_vnni() and (seconds >= _SECONDS or (depth, columns) == min(SIZES)):
        found |= without_vnni(depth, columns, seconds)
    if depth == 8192:
        found["with a rotation inside, time by the time without"] = rotated(depth, columns, 4 * seconds)
    return found


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Of a comparison."""
    return min(_SECONDS, float(request.config.getoption("benchmark_max_time")))


@pytest.mark.parametrize(("depth", "columns"), SIZES)
def test_figures(benchmark: Any, depth: int, columns: int, seconds: float) -> None:
    """The figures of a size, beside the time of 16 rows in 8 bits."""
    if seconds < _SECONDS and (depth, columns) == max(SIZES, key=lambda size: size[0] * size[1]):
        pytest.skip("--benchmark-max-time is below 0.3: the largest size takes longer")
    found = figures(depth, columns, seconds)
    call, _ = qlinear8(depth, columns).call(activations(16, depth))
    benchmark(call)
    benchmark.extra_info.update(found)
    print(f"\n{depth}x{columns}", *(f"  {name:55} {value:.2f}" for name, value in found.items()), sep="\n")


@pytest.mark.parametrize("rows", [256, 1])
def test_two_threads(benchmark: Any, rows: int, seconds: float) -> None:
    depth, columns = SIZES[1] if seconds >= _SECONDS else min(SIZES)
    found = two_threads(depth, columns, rows, 3 * seconds)
    call, _ = qlinear8(depth, columns, 2).call(activations(rows, depth))
    benchmark(call)
    benchmark.extra_info["speed-up"] = found


def floor_of(name: str) -> float | None:
    """The floor of a figure's name, if it has one."""
    kind, _, call = name.partition(", ")
    calls = [f"M={rows}{' cold' if cold else ''}" for rows, cold in CALLS]
    if kind in FLOORS and call in calls:
        return FLOORS[kind][calls.index(call)]
    if kind != "int8":
        return None
    return 0.88 if call.endswith("of the peak") else 0.9 if call.endswith("of a read") else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="keep the figures here too")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each comparison, at least 7 rounds")
    parser.add_argument("--sizes", type=int, nargs="*", default=range(len(SIZES)), help="which of the sizes, from 0 on")
    parser.add_argument("--threads", action="store_true", help="only what a second thread gives")
    arguments = parser.parse_args()
    rows = []
    for index in arguments.sizes:
        depth, columns = SIZES[index]
        if arguments.threads:
            found = {f"two threads, M={m}": two_threads(depth, columns, m, arguments.seconds) for m in (256, 16, 1)}
        else:
            found = figures(depth, columns, arguments.seconds)
        rows.append({"K": depth, "N": columns, **found})
        print(f"{depth}x{columns}")
        for name, value in found.items():
            floor = floor_of(name)
            print(f"  {name:55} {value:5.2f}" + ("" if floor is None else f"   floor {floor}"), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
