from __future__ import annotations

import numpy as np
import pytest

from onnx_quarot.clipping import fit_rows
from onnx_quarot.errors import DataError
from onnx_quarot.gptq import inverse_factor, solve
from onnx_quarot.hessians import CoarseGram
from onnx_quarot.scheme import TensorSpec
from onnx_quarot.tokens import coarse

SYMMETRIC = TensorSpec(bits=4, per_channel=True, method="mse")
ASYMMETRIC = TensorSpec(bits=4, signed=False, symmetric=False, method="mse")


def inputs(rows: int, features: int, seed: int = 0) -> np.ndarray:
    """Correlated features, as layers have them."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((features // 4, features))
    return (rng.standard_normal((rows, features // 4)) @ mix + 0.3 * rng.standard_normal((rows, features))).astype("f")


def back(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, block: int | None = None) -> np.ndarray:
    repeat = block or len(codes)
    s, z = (np.repeat(a, repeat, axis=0)[: len(codes)] for a in (scale, zero))
    return (codes.astype(np.float32) - z) * s


@pytest.mark.parametrize("spec", [SYMMETRIC, ASYMMETRIC])
@pytest.mark.parametrize("block", [None, 32, 256])
@pytest.mark.parametrize("depth", [256, 200])
def test_outputs_are_much_closer_than_by_rounding(spec: TensorSpec, block: int | None, depth: int) -> None:
    x = inputs(2000, depth)
    weight = np.random.default_rng(1).standard_normal((depth, 48)).astype(np.float32)
    gram = x.T @ x
    codes, scale, zero = solve(weight, gram, inverse_factor(gram), spec, block)
    first, last = spec.bounds
    assert codes.min() >= first
    assert codes.max() <= last
    assert scale.shape == zero.shape == (1 if block is None else -(-depth // block), 48)
    rounded = np.empty_like(weight)
    for start in range(0, depth, block or depth):
        part = slice(start, start + (block or depth))
        s, z = fit_rows(weight[part].T, spec)
        q = np.clip(np.rint(weight[part] / s) + z, first, last)
        rounded[part] = (q - z) * s
    error, plain = (np.linalg.norm(x @ (w - weight)) for w in (back(codes, scale, zero, block), rounded))
    assert error < 0.6 * plain


def test_independent_inputs_leave_nothing_to_make_up_for() -> None:
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    codes, scale, zero = solve(weight, np.eye(64, dtype=np.float32), inverse_factor(np.eye(64)), SYMMETRIC)
    s, z = fit_rows(weight.T, SYMMETRIC)
    np.testing.assert_allclose(scale[0], s, rtol=1e-6)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / s) + z, -7, 7))
    assert not zero.any()


def test_weights_on_the_grid_stay_there() -> None:
    x = inputs(500, 64)
    gram = x.T @ x
    codes = np.random.default_rng(0).integers(-7, 8, (64, 8))
    codes[0] = 7
    got, scale, zero = solve(codes.astype(np.float32) * 0.5, gram, inverse_factor(gram), SYMMETRIC)
    np.testing.assert_array_equal(back(got, scale, zero), codes * 0.5)


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = inputs(300, 40)
    gram = (x.T @ x).astype(np.float64)
    factor = inverse_factor(gram, damping=0.02)
    damped = gram + np.eye(40) * 0.02 * np.diag(gram).mean()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(40), atol=1e-6)
    assert np.allclose(np.tril(factor, -1), 0)


def test_dead_features_and_rank_deficient_data() -> None:
    x = inputs(20, 64)
    x[:, 5] = 0
    gram = x.T @ x
    weight = np.random.default_rng(1).standard_normal((64, 8)).astype(np.float32)
    codes, scale, zero = solve(weight, gram, inverse_factor(gram), SYMMETRIC)
    assert np.isfinite(back(codes, scale, zero)).all()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_hopeless_data(value: float) -> None:
    with pytest.raises(DataError, match="gptq has nothing to go by"):
        inverse_factor(np.full((8, 8), value))


def test_weights_answer_to_activations_of_four_bits() -> None:
    """Fitted on half of the rows, and then of less error on the other half, integers or not."""
    x = inputs(4000, 128)
    w = np.random.default_rng(1).standard_normal((128, 48)).astype("f")
    gram = CoarseGram(128, lambda rows: coarse(rows, ASYMMETRIC, 32))
    for part in np.array_split(x[:2000], 3):
        gram.update(part)
    factor = inverse_factor(gram.sum)
    seen, wanted = coarse(x[2000:], ASYMMETRIC, 32), x[2000:] @ w
    answer = gram.answering(w, factor)

    def error(v: np.ndarray) -> float:
        return float(np.square(seen @ v - wanted).sum())

    assert error(answer) < 0.7 * error(w)
    rounded = [back(*solve(v, gram.sum, factor, ASYMMETRIC, 32), block=32) for v in (answer, w)]
    assert error(rounded[0]) < 0.8 * error(rounded[1])
