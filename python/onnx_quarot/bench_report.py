"""Speed of the transform on this machine, beside what it competes with: the command ``onnx-quarot bench``.

All contenders of a case run turn by turn in one process, and the shortest time of each counts: what else the machine
does can only add to a time. A turn begins with a call that is not timed, after which the caches hold what they can of
the contender's arrays and not of the others'. Times are per call without the call itself, which is measured on arrays
of a few values and subtracted from everybody's alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from . import _core
from .errors import ConfigError, OnnxQuarotError, SaveError
from .progress import NullProgress, Progress
from .resources import cpu_name
from .transform import hadamard_dynamic_quantize, hadamard_matrix, hadamard_quantize

Array = npt.NDArray[Any]
Calls = dict[str, Callable[[], object]]

BATCH_BYTES = 16384  # rows that are transformed in one call: in first-level cache
STEP = 0.04  # of normal values in 8 bits
LARGEST_DENSE = 1024  # beyond, numpy's x @ H takes too long to wait for
ORDERS = (12, 20, 28, 36, 44, 76, 100, 140, 172)
MODEL_SIZES = (576, 1536, 8960, 11008, 13824, 14336, 18944, 25600, 29568)


@dataclass(frozen=True)
class Row:
    """One size of float32: nanoseconds for one vector, by contender; `rows` vectors a call."""

    n: int
    rows: int
    nanoseconds: dict[str, float]

    def ratio(self, other: str) -> float | None:
        """How many times longer `other` takes than the transform."""
        theirs = self.nanoseconds.get(other)
        return None if theirs is None else theirs / self.nanoseconds["onnx-quarot"]


@dataclass
class Bench:
    """What was measured; `figures` are ratios by name, and microseconds where the name says so."""

    cpu: str
    isa: str
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        rows = [{"n": row.n, "rows": row.rows, "nanoseconds": row.nanoseconds} for row in self.rows]
        known = {"cpu": self.cpu, "isa": self.isa}
        return {**known, "rows": rows, "figures": self.figures}

    def table(self) -> str:
        """Both tables as text, ratios first."""
        lines = [f"{self.cpu}, kernel {self.isa}, one thread, float32 in place", ""]
        lines.append(f"{'n':>9} {'rows':>5} {'fht-cpu':>9} {'numpy':>9} {'of memcpy':>10} {'ns a vector':>12}")
        for row in self.rows:
            ratios = [row.ratio(name) for name in ("fht-cpu", "numpy")]
            shown = ["-" if ratio is None else f"{ratio:.2f} x" for ratio in ratios]
            memcpy = f"{row.nanoseconds['onnx-quarot'] / row.nanoseconds['memcpy']:.2f} x"
            time_text = f"{row.nanoseconds['onnx-quarot']:.1f}"
            lines.append(f"{row.n:>9} {row.rows:>5} {shown[0]:>9} {shown[1]:>9} {memcpy:>10} {time_text:>12}")
        lines += ["", *(f"{value:8.2f}  {name}" for name, value in self.figures.items())]
        return "\n".join(lines)


def run_bench(*, largest: int = 2**20, seconds: float = 0.05, progress: Progress | None = None) -> Bench:
    """Measure all there is.

    largest: the longest power of two. seconds: for each contender of each case.
    Errors: OnnxQuarotError if a contender's answer is wrong.
    """
    show = progress or NullProgress()
    bench = Bench(cpu_name(), _core.isa())
    sizes = [2**power for power in range(6, 23) if 2**power <= largest]
    with show.task("measuring", None), threadpool_limits(1):
        for n in sizes:
            bench.rows.append(_power_of_two(n, max(1, BATCH_BYTES // 4 // n), seconds))
        for n in (64, 128, 1024, 4096):
            if n <= largest:
                bench.rows.append(_power_of_two(n, 512, seconds))
        bench.figures |= _mixed(largest, seconds) | _types(seconds) | _quantized(seconds) | _calls(seconds)
    return bench


def fastest(calls: Calls, seconds: float) -> dict[str, float]:
    """The shortest time of each call in seconds, taken turn by turn for about `seconds` each."""
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(20e-6 / max(time.perf_counter() - start, 1e-7)))
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            count = repeats[name]
            call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / count)
        rounds += 1
    return best


def _cost(best: dict[str, float], name: str, call: str) -> float:
    """Seconds of `name` without the call: something where a busy machine let the call alone take longer."""
    return max(best[name] - best[call], 1e-10)


def _in_place(x: Array) -> Callable[[], object]:
    return lambda: _core.hadamard(x, x)


def _fht_cpu() -> Callable[[Array, int], object] | None:
    try:
        import fht_cpu
    except ImportError:
        return None
    function: Callable[[Array, int], object] = fht_cpu.fht_2d_f32_rows
    return function


def _zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32, offset: int = 0) -> Array:
    """Zeros that begin `offset` bytes behind a cache line; numpy's own begin where they may.

    Written, because pages that nobody has written are one page, which is read from first-level cache.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    store = np.full(size + 128, 0, np.uint8)
    start = (offset - store.ctypes.data) % 64
    return store[start : start + size].view(dtype).reshape(shape)


def _power_of_two(n: int, rows: int, seconds: float) -> Row:
    # Transformed in place again and again, unscaled values would grow without bound: zeros stay, and cost the same.
    ours, theirs, source, target = (_zeros((rows, n)) for _ in range(4))
    small = [np.zeros((1, 2), np.float32) for _ in range(4)]
    calls: Calls = {
        "onnx-quarot": lambda: _core.hadamard(ours, ours),
        "memcpy": lambda: np.copyto(target, source),
        "call onnx-quarot": lambda: _core.hadamard(small[0], small[0]),
        "call memcpy": lambda: np.copyto(small[1], small[2]),
    }
    x = np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32)
    fht = _fht_cpu()
    if fht is not None:
        calls["fht-cpu"] = lambda: fht(theirs, 1)
        calls["call fht-cpu"] = lambda: fht(small[3], 1)
        expected = x.copy()
        fht(expected, 1)
        _check(_core.hadamard(x, scale=1.0), expected, f"{n}, against fht-cpu")
    if n <= LARGEST_DENSE:
        matrix = hadamard_matrix(n).astype(np.float32)
        tiny = np.eye(2, dtype=np.float32)
        calls["numpy"] = lambda: np.matmul(source, matrix, out=target)
        calls["call numpy"] = lambda: np.matmul(small[1], tiny, out=small[2])
        _check(_core.hadamard(x), x @ matrix, f"{n}, against numpy")
    best = fastest(calls, seconds)
    names = [name for name in best if not name.startswith("call ")]
    return Row(n, rows, {name: _cost(best, name, f"call {name}") * 1e9 / rows for name in names})


def _check(got: Array, expected: Array, what: str, tolerance: float = 1e-5) -> None:
    if np.abs(got - expected).max() > tolerance * np.abs(expected).max():
        raise OnnxQuarotError(f"the transform of size {what}: the answers differ")


def _size_of(order: int) -> int:
    """The largest size up to 6,000, but at least 16 times it, whose matrix takes the order as it is."""
    powers = [1 << m for m in range(4, 10) if m == 4 or order << m <= 6000]
    return order * max(p for p in powers if p == 16 or _core.factorize(order * p) == (order, p.bit_length() - 1))


def _mixed(largest: int, seconds: float) -> dict[str, float]:
    """Cost of an element over that in the powers of two on both sides, their geometric mean; measured beside them."""
    figures = {}
    sizes = {_size_of(order): f"K = {order}" for order in ORDERS}
    sizes |= dict.fromkeys(MODEL_SIZES, "a model's size")
    for n, kind in sizes.items():
        below = 2 ** int(np.log2(n))
        if 2 * below > largest:
            continue
        arrays = {str(size): _zeros((max(1, BATCH_BYTES // 4 // size), size)) for size in (n, below, 2 * below)}
        calls = {name: _in_place(x) for name, x in arrays.items()}
        best = fastest(calls | {"call": _in_place(np.zeros((1, 2), np.float32))}, seconds)
        cost, under, over = (_cost(best, name, "call") / x.size for name, x in arrays.items())
        order = _core.factorize(n)[0]
        factors = " x ".join(str(factor) for factor in _core.order_factors(order))
        name = f"n = {n} ({kind}: {factors} x {n // order}), an element's cost over powers of two"
        figures[name] = cost / float(np.sqrt(under * over))
    return figures


def _types(seconds: float) -> dict[str, float]:
    figures = {}
    for n in (256, 1024, 4096):
        rows = BATCH_BYTES // 4 // n
        arrays = {
            np.dtype(kind).name: _zeros((rows, n), kind)
            for kind in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
        }
        calls = {name: _in_place(x) for name, x in arrays.items()}
        calls |= {f"call {name}": _in_place(np.zeros((1, 2), x.dtype)) for name, x in arrays.items()}
        best = fastest(calls, seconds)
        cost = {name: _cost(best, name, f"call {name}") for name in arrays}
        for name in arrays:
            if name != "float32":
                figures[f"{name} over float32, n = {n}"] = cost[name] / cost["float32"]
    return figures


def _quantized(seconds: float) -> dict[str, float]:
    """Transforms that quantize over the transform alone, of rows in first-level cache."""
    figures = {}
    for n in (512, 1024, 2048, 4096):
        x, y = (_zeros((BATCH_BYTES // 4 // n, n)) for _ in range(2))
        x[:] = np.random.default_rng(0).standard_normal(x.shape)
        integers, scales = _zeros(x.shape, np.int8), _zeros((len(x), 1))
        calls: Calls = {}
        for prefix, rows in (("", len(x)), ("call ", 0)):
            calls[f"{prefix}alone"] = partial(_core.hadamard, x[:rows], y[:rows])
            calls[f"{prefix}static"] = partial(_core.hadamard_quantize, x[:rows], integers[:rows], STEP)
            calls[f"{prefix}dynamic"] = partial(
                _core.hadamard_dynamic_quantize, x[:rows], integers[:rows], scales[:rows]
            )
        expected = _core.hadamard(x)
        _check(hadamard_quantize(x, STEP) * np.float32(STEP), expected, f"{n}, quantized", STEP)
        by_rows = hadamard_dynamic_quantize(x)
        _check(by_rows[0] * by_rows[1], expected, f"{n}, quantized by rows", STEP)
        best = fastest(calls, max(seconds, 0.1))
        cost = {name: _cost(best, name, f"call {name}") for name in ("alone", "static", "dynamic")}
        figures[f"with int8 by a known scale over the transform alone, n = {n}"] = cost["static"] / cost["alone"]
        figures[f"with int8 by a scale a row over the transform alone, n = {n}"] = cost["dynamic"] / cost["alone"]
    return figures


def _calls(seconds: float) -> dict[str, float]:
    """Threads, alignment, and what a call costs."""
    large, one = _zeros((512, 4096)), _zeros((1, 64))
    threads: Calls = {str(count): partial(_core.hadamard, large, large, threads=count) for count in (1, 2)}
    calls: Calls = {"row": _in_place(one), "row, two": lambda: _core.hadamard(one, one, threads=2)}
    lengths = (1024, 4096, 2**14, 2**16)
    for n in lengths:
        calls |= {f"{offset} {n}": _in_place(_zeros((1, n), offset=offset)) for offset in (0, 16)}
    # Before the system has moved the second thread to another core, it gains nothing.
    best = fastest(threads, max(seconds, 0.5)) | fastest(calls, max(seconds, 0.1))
    shifted = {f"16 bytes off a cache line over aligned, n = {n}": best[f"16 {n}"] / best[f"0 {n}"] for n in lengths}
    return {
        "speed-up by a second thread, 512 x 4096": best["1"] / best["2"],
        **shifted,
        "microseconds for a call with out= on one row of 64": best["row"] * 1e6,
        "microseconds for the same with threads=2": best["row, two"] * 1e6,
    }


def draw(bench: Bench, target: Path) -> None:
    """Draw nanoseconds per element against n into the PNG `target`. Errors: ConfigError, SaveError."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("picture: needs the package matplotlib: pip install 'onnx-quarot[picture]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    rows = [row for row in bench.rows if row.rows != 512]
    for name, colour in (
        ("numpy", "#999999"),
        ("fht-cpu", "#d95f02"),
        ("onnx-quarot", "#1b5e9e"),
        ("memcpy", "#66a61e"),
    ):
        points = [(row.n, row.nanoseconds[name] / row.n) for row in rows if name in row.nanoseconds]
        if points:
            label = "numpy x @ H" if name == "numpy" else name
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=label, base=2)
    axes.set(xlabel="n", ylabel="ns per element", title=f"{bench.cpu}, {bench.isa}, float32, one thread")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise SaveError(f"picture: {target} cannot be written: {error}") from error
    finally:
        plt.close(figure)
