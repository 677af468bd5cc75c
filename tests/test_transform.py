"""The kernels, on every instruction set of this CPU, against matrices built here; and the numpy face around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_quarot import _core
from onnx_quarot.errors import ConfigError, OrderError
from onnx_quarot.transform import (
    Rotation,
    hadamard,
    hadamard_dynamic_quantize,
    hadamard_matrix,
    hadamard_quantize,
    has_order,
    largest_block,
)

# Relative to the largest output: rounding of the type, and for float32 and float64 of a dozen additions.
TOLERANCES = {np.float64: 1e-13, np.float32: 2e-6, np.float16: 1e-3, ml_dtypes.bfloat16: 8e-3}
ISAS = _core.isas()
# Orders with constructions of their own or used by published models; 236 is the first that is not available.
ORDERS = [*range(12, 256, 4), 284, 300, 924]
SUPPORTED = [k for k in ORDERS if k % 8 == 4 and k != 236]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 12, 24, 48, 96, 1536, 20, 80, 640, 28, 224, 448]
SIZES += [36, 144, 576, 44, 352, 60, 960, 140, 280, 172, 344, 300, 924]


@cache
def matrix(n: int) -> np.ndarray[Any, Any]:
    """H_n / sqrt(n): the order's matrix, checked in its own test, and Sylvester's by its formula."""
    order, power = _core.factorize(n)
    i = np.arange(2**power, dtype=np.uint32)
    parity = np.zeros((len(i), len(i)), dtype=np.uint32)
    for bit in range(power):
        parity ^= (i[:, None] & i[None, :]) >> bit & 1
    return np.kron(_core.order_matrix(order), 1.0 - 2.0 * parity) / n**0.5


def check(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], dtype: Any) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    error = np.abs(got.astype(np.float64) - expected).max(initial=0.0)
    assert error <= TOLERANCES[dtype] * np.abs(expected).max(initial=0.0)


@pytest.mark.parametrize("order", [1, 2, 4, 8, *(k for k in ORDERS if k != 236)])
def test_order_is_a_hadamard_matrix(order: int) -> None:
    h = _core.order_matrix(order).astype(np.int64)
    assert set(np.unique(h)) <= {-1, 1}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize(
    ("n", "factors", "power"),
    [
        (4096, [1], 4096),
        (1536, [12], 128),
        (576, [36], 16),  # 12 and 12 would leave a power of two that fills a quarter of some vectors
        (4480, [20, 28], 8),  # half of them, but a third of the sums
        (29568, [44, 84], 8),
        (8960, [20, 28], 16),
        (13824, [12, 36], 32),
        (27648, [12, 12, 12], 16),
        (11008, [172], 64),
        (235 * 4 * 512, [20, 188], 128),
    ],
)
def test_orders_are_products_of_small_ones_where_the_twos_allow_it(n: int, factors: list[int], power: int) -> None:
    order, log2_power = _core.factorize(n)
    assert (order * 2**log2_power, 2**log2_power) == (n, power)
    assert _core.order_factors(order) == factors
    expected = np.ones((1, 1), dtype=np.int8)
    for factor in factors:
        expected = np.kron(expected, _core.order_matrix(factor))
    if order <= 2048:
        np.testing.assert_array_equal(_core.order_matrix(order), expected)


def test_orders_tell_the_transpose_apart() -> None:
    h = _core.order_matrix(12)
    assert not np.array_equal(h, h.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_kernel_against_the_matrix(isa: str, n: int, dtype: Any) -> None:
    rng = np.random.default_rng(n)
    h = matrix(n)
    signs = rng.choice([-1.0, 1.0], n)
    x = rng.standard_normal((5, n)).astype(dtype)
    wide = x.astype(np.float64)
    check(_core.hadamard(x, isa=isa), wide @ h, dtype)
    check(_core.hadamard(x, isa=isa, transpose=True), wide @ h.T, dtype)
    check(_core.hadamard(x, isa=isa, signs=signs), (wide * signs) @ h, dtype)
    check(_core.hadamard(x, isa=isa, signs=signs, transpose=True), wide @ h.T * signs, dtype)
    check(_core.hadamard(x, isa=isa, scale=0.25), wide @ h * n**0.5 * 0.25, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", SUPPORTED)
def test_every_order(isa: str, order: int) -> None:
    x = np.random.default_rng(order).standard_normal((3, 8 * order))
    h = matrix(8 * order)
    for transpose in (False, True):
        expected = x @ (h.T if transpose else h)
        check(_core.hadamard(x, isa=isa, transpose=transpose), expected, np.float64)
        y = _core.hadamard(x.astype(np.float32), isa=isa, transpose=transpose)
        check(y, expected, np.float32)


LONG = [2**12, 2**13, 2**14, 2**16, 2**17, 2**20, 2**22, 12 * 2**14, 28 * 512, 172 * 64, 8960, 13824, 27648]


@pytest.mark.parametrize("n", LONG)
def test_long_rows_agree_between_kernels_and_are_their_own_check(n: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, n)).astype(np.float32)
    results = [_core.hadamard(x, isa=isa) for isa in ISAS]
    for result in results[1:]:
        np.testing.assert_array_equal(results[0], result)
    index = np.random.default_rng(1).integers(n, size=4)
    order, power = _core.factorize(n)
    block = 2**power
    for column in index:
        # One column of H: the parity of common bits, times the entries of H_K.
        common = np.arange(block, dtype=np.uint32) & np.uint32(column % block)
        for shift in (16, 8, 4, 2, 1):
            common ^= common >> np.uint32(shift)
        sylvester = 1.0 - 2.0 * (common & 1)
        expected = np.kron(_core.order_matrix(order)[:, column // block], sylvester) @ x[0].astype(np.float64)
        assert abs(results[0][0, column] - expected / n**0.5) < 1e-5
    back = hadamard(results[0], transpose=True)
    assert np.abs(back - x).max() < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", SIZES)
def test_kernels_agree_bit_for_bit(dtype: Any, n: int) -> None:
    x = np.random.default_rng(n).standard_normal((7, n)).astype(dtype)
    results = {isa: _core.hadamard(x, isa=isa).tobytes() for isa in ISAS}
    assert len(set(results.values())) == 1


def test_short_floats_round_once_to_nearest_even() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = patterns.view(dtype).reshape(-1, 1)
        for isa in ISAS:
            same = _core.hadamard(x, isa=isa)
            with np.errstate(invalid="ignore"):
                nan = np.isnan(x)
                np.testing.assert_array_equal(np.isnan(same), nan)
            np.testing.assert_array_equal(same.view(np.uint16)[~nan], x.view(np.uint16)[~nan])
            with np.errstate(over="ignore", invalid="ignore"):
                expected = (x.astype(np.float32) * np.float32(0.3)).astype(dtype)
            scaled = _core.hadamard(x, isa=isa, scale=0.3)
            np.testing.assert_array_equal(scaled[~nan].view(np.uint16), expected[~nan].view(np.uint16))


@pytest.mark.parametrize("n", [32, 256, 2048, 1536])
def test_bfloat16_may_lose_subnormal_numbers_and_no_others(n: int) -> None:
    smallest = 2.0**-126  # below it, some CPUs convert to zero and count inputs as zero
    rng = np.random.default_rng(n)
    normal = rng.standard_normal((3, n))
    x = np.concatenate([normal, normal * 2.0**-90, normal * 2.0**-124, np.zeros((1, n)), -np.zeros((1, n))])
    x[1, rng.random(n) < 0.5] = 0
    x = x.astype(ml_dtypes.bfloat16)
    exact = _core.hadamard(x, isa="baseline").astype(np.float64)
    for isa in ISAS:
        y = _core.hadamard(x, isa=isa).astype(np.float64)
        clear = np.delete(np.arange(len(x)), [6, 7, 8])
        np.testing.assert_array_equal(y[clear], exact[clear])
        np.testing.assert_array_equal(np.signbit(y[clear]), np.signbit(exact[clear]))
        assert np.abs(y - exact).max() <= (n**0.5 + 1) * smallest


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_and_infinity_stay_in_their_block(isa: str, dtype: Any) -> None:
    x = np.ones((2, 4 * 24)).astype(dtype)
    x[0, 30], x[1, 50] = np.nan, np.inf
    y = _core.hadamard(x, block_size=24, isa=isa).astype(np.float32)
    assert np.isnan(y[0, 24:48]).all()
    assert np.isfinite(np.delete(y[0], np.s_[24:48])).all()
    assert not np.isfinite(y[1, 48:72]).any()
    assert np.isfinite(np.delete(y[1], np.s_[48:72])).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("n", "block"), [(96, 12), (64, 16), (72, 36), (12, 4), (8, 1), (3 * 512, 512)])
def test_blocks_and_both_lengths_of_signs(dtype: Any, n: int, block: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, n)).astype(dtype)
    for signs in (None, rng.choice([-1, 1], block), rng.choice([-1, 1], n)):
        for transpose in (False, True):
            full = hadamard_matrix(n, block_size=block, signs=signs, transpose=transpose)
            y = hadamard(x, block_size=block, signs=signs, transpose=transpose)
            check(y, x.astype(np.float64) @ full, dtype)


@pytest.mark.parametrize("isa", _core.isas())
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_offsets_change_no_bit(isa: str, kind: type) -> None:
    """Rows that begin between the boundaries of vectors, in place: whatever they are cut into, and with signs."""
    for n in (512, 4096, 2**14, 2**15, 2**17):
        x = np.random.default_rng(n).standard_normal((2, n)).astype(kind)
        signs = np.where(np.arange(n) % 3 == 0, -1.0, 1.0)
        for arguments in ((None, None), (signs, False), (signs, True)):
            expected = _core.hadamard(x, None, None, *arguments, isa=isa)
            for offset in (1, 4, 15):
                room = np.full(2 * n + 64, 7.0, kind)
                start = (-room.ctypes.data % 64) // room.itemsize + offset
                rows = room[start : start + 2 * n].reshape(2, n)
                rows[:] = x
                _core.hadamard(rows, rows, None, *arguments, isa=isa)
                np.testing.assert_array_equal(rows, expected, err_msg=f"{n}, {offset}, transpose {arguments[1]}")
                assert (room[:start] == 7).all()
                assert (room[start + 2 * n :] == 7).all()


def test_in_place_out_and_threads() -> None:
    x = np.random.default_rng(0).standard_normal((64, 1536)).astype(np.float32)
    expected = hadamard(x)
    out = np.empty_like(x)
    assert hadamard(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(hadamard(x, threads=3), expected)
    same = x.copy()
    assert hadamard(same, out=same) is same
    np.testing.assert_array_equal(same, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_threads_in_a_forked_process() -> None:
    """The child has none of its parent's threads and starts its own; callers in several threads share them."""
    code = """
import os
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from onnx_quarot import hadamard

x = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
alone = hadamard(x)

def same(threads):
    return np.array_equal(hadamard(x, threads=threads), alone)

assert same(2)
child = os.fork()
if child == 0:
    with ThreadPoolExecutor(4) as callers:
        os._exit(0 if all(callers.map(same, [2, 3, 4] * 5)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same(3)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_strides() -> None:
    base = np.random.default_rng(0).standard_normal((6, 5, 128)).astype(np.float32)
    views = [base[::2], base[:, ::-1], base[..., 32:96], base[..., ::2], base.transpose(2, 0, 1)[..., :4]]
    views += [np.asfortranarray(base), np.broadcast_to(base[0, 0], (3, 128)), base[:, 0], base[:1], base[0, 0]]
    for view in views:
        expected = hadamard(np.ascontiguousarray(view))
        np.testing.assert_array_equal(hadamard(view), expected)
        store = np.zeros((*view.shape[:-1], 2 * view.shape[-1]), dtype=np.float32)
        for out in (store[..., : view.shape[-1]], store[..., ::2]):
            store[:] = 7.0
            hadamard(view, out=out)
            np.testing.assert_array_equal(out, expected)
            assert (store == 7.0).sum() >= expected.size - (expected == 7.0).sum()
    raw = np.zeros(4 * 64 + 1, dtype=np.uint8)
    unaligned = raw[1:].view(np.float32)
    unaligned[:] = base[0, 0, :64]
    np.testing.assert_array_equal(hadamard(unaligned), hadamard(base[0, 0, :64].copy()))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 2, 8), (0, 1)])
@pytest.mark.parametrize("step", [0, 3, -4])
def test_no_rows(shape: tuple[int, ...], step: int) -> None:
    """Whatever strides an array has that holds nothing."""
    nothing = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (step,) * len(shape))
    assert hadamard(nothing).shape == shape
    assert hadamard(nothing, out=nothing) is nothing
    assert hadamard(np.zeros(shape, np.float32), out=nothing) is nothing
    integers, scales = hadamard_dynamic_quantize(nothing)
    assert integers.shape == hadamard_quantize(nothing, 0.5).shape == shape
    assert scales.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("strides", [(0, 4), (4, 4), (28, 4), (32, 0), (0, 0)])
def test_out_must_hold_all_elements(strides: tuple[int, int]) -> None:
    places = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (4, 8), strides)
    np.testing.assert_allclose(hadamard(places + 1)[:, 0], 8**0.5, rtol=1e-6)
    for x in (places, np.ones((4, 8), np.float32)):
        with pytest.raises(ValueError, match="out has elements in one place"):
            hadamard(x, out=places)


X = np.zeros((2, 64), dtype=np.float32)


@pytest.mark.parametrize(
    ("kind", "message", "args"),
    [
        (TypeError, "x has dtype int64", {"x": np.zeros((2, 64), dtype=np.int64)}),
        (TypeError, "x has dtype complex64", {"x": np.zeros((2, 64), dtype=np.complex64)}),
        (TypeError, "x has dtype >f4", {"x": np.zeros((2, 64), dtype=">f4")}),
        (TypeError, "x is list", {"x": [1.0, 2.0]}),
        (ValueError, "x has no axis", {"x": np.array(1.0)}),
        (ValueError, "last axis has length 0", {"x": np.zeros((3, 0))}),
        (OrderError, "size 236 = 59", {"x": np.zeros((2, 236))}),
        (OrderError, "size 6 = 3", {"x": np.zeros((2, 6))}),
        (ValueError, "block_size is 48: it must divide", {"x": X, "block_size": 48}),
        (ValueError, "block_size is 0", {"x": X, "block_size": 0}),
        (ValueError, "block_size is -4", {"x": X, "block_size": -4}),
        (TypeError, "float", {"x": X, "block_size": 2.5}),
        (ValueError, "signs has length 3", {"x": X, "signs": [1, 1, -1]}),
        (ValueError, r"signs\[1\] is 0.5", {"x": X, "signs": [1.0, 0.5]}),
        (ValueError, "signs is empty", {"x": X, "signs": []}),
        (ValueError, "signs must be one-dimensional", {"x": X, "signs": np.ones((1, 64))}),
        (ValueError, "scale is inf", {"x": X, "scale": float("inf")}),
        (TypeError, "out is list", {"x": X, "out": [0.0]}),
        (TypeError, "out has dtype float64", {"x": X, "out": np.zeros((2, 64))}),
        (ValueError, "out has shape", {"x": X, "out": np.zeros((64, 2), dtype=np.float32)}),
        (ValueError, "threads is 0", {"x": X, "threads": 0}),
    ],
)
def test_errors(kind: type[Exception], message: str, args: dict[str, Any]) -> None:
    with pytest.raises(kind, match=message):
        hadamard(**args)


def test_out_that_cannot_be_written() -> None:
    frozen = np.zeros((2, 64), dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        hadamard(X, out=frozen)
    buffer = np.zeros((4, 64), dtype=np.float32)
    with pytest.raises(ValueError, match="out overlaps x"):
        hadamard(buffer[:3], out=buffer[1:])
    with pytest.raises(ValueError, match="out overlaps x"):
        hadamard(buffer[0:2], out=buffer[0:4:2])
    every_second = np.ones((2, 128), dtype=np.float32)[:, ::2]
    hadamard(every_second, out=every_second)
    np.testing.assert_allclose(every_second[:, 0], 8.0, rtol=1e-6)
    # Interleaved, but without a common element.
    wide = np.ones((4, 128), dtype=np.float32)
    hadamard(wide[:, :64], out=wide[:, 64:])
    np.testing.assert_allclose(wide[:, 64], 8.0, rtol=1e-6)


@pytest.mark.parametrize("name", ISAS)
def test_environment_chooses_the_kernel(name: str) -> None:
    assert isa_in_subprocess(name).stdout.strip() == name


def test_environment_that_cannot_be_obeyed_is_an_error() -> None:
    for name in ("sse9", *({"avx512", "neon"} - set(ISAS))):
        result = isa_in_subprocess(name)
        assert result.returncode != 0
        assert f"ONNX_QUAROT_ISA is '{name}'" in result.stderr


def isa_in_subprocess(name: str) -> subprocess.CompletedProcess[str]:
    code = "from onnx_quarot import _core; import numpy; _core.hadamard(numpy.ones((1, 8))); print(_core.isa())"
    environment = {**os.environ, "ONNX_QUAROT_ISA": name}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_kernel_by_name_must_exist() -> None:
    with pytest.raises(ValueError, match="isa is 'mmx'"):
        _core.hadamard(X, isa="mmx")


def test_largest_block() -> None:
    assert largest_block(576) == 576
    assert largest_block(236) == 4
    assert largest_block(7) == 1
    assert has_order(28)
    assert not has_order(0)
    with pytest.raises(OrderError):
        largest_block(0)


@settings(deadline=None, max_examples=40)
@given(
    blocks=st.integers(1, 4),
    block=st.sampled_from([1, 4, 12, 20, 28, 32, 36, 144]),
    seed=st.one_of(st.none(), st.integers(0, 99)),
)
def test_rotation(blocks: int, block: int, seed: int | None) -> None:
    size = blocks * block
    rng = None if seed is None else np.random.default_rng(seed)
    rotation = Rotation.make(size, block_size=block, rng=rng)
    r = rotation.matrix()
    np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-12)
    x = np.random.default_rng(0).standard_normal((3, size, 2))
    np.testing.assert_allclose(rotation.apply(x, axis=1), np.einsum("asb,st->atb", x, r), atol=1e-12)
    np.testing.assert_allclose(rotation.apply(x, axis=-2, inverse=True), np.einsum("asb,ts->atb", x, r), atol=1e-12)
    again = Rotation.from_json(json.loads(json.dumps(rotation.to_json())))
    assert again == rotation
    assert hash(again) == hash(rotation)


def test_rotation_refuses() -> None:
    with pytest.raises(OrderError, match="236"):
        Rotation.make(236)
    with pytest.raises(OrderError, match="block_size is 5"):
        Rotation.make(12, block_size=5)
    with pytest.raises(ConfigError, match="signs"):
        Rotation(4, 4, np.array([1, -1, 0, 1], dtype=np.int8))
    with pytest.raises(OrderError, match="length 8"):
        Rotation.make(4).apply(np.zeros((2, 8)))
    with pytest.raises(ConfigError, match="lacks signs"):
        Rotation.from_json({"size": 4, "block_size": 4})
    with pytest.raises(ConfigError, match="hexadecimal"):
        Rotation.from_json({"size": 4, "block_size": 4, "signs": "xy"})
    with pytest.raises(ConfigError, match="16 bits"):
        Rotation.from_json({"size": 4, "block_size": 4, "signs": "ffff"})
