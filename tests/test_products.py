"""Products in pieces: right, and not dependent on how many threads there are."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from onnx_quarot import products


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_products_are_right(size: int, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_cores", lambda: cores)
    rng = np.random.default_rng(size)
    a, b = rng.standard_normal((37, size)), rng.standard_normal((size, 300))
    np.testing.assert_allclose(products.product(a, b), a @ b, atol=1e-11)
    c = rng.standard_normal((37, 300))
    np.testing.assert_allclose(products.product(a[::-1].T, c), a[::-1].T @ c, atol=1e-11)
    np.testing.assert_allclose(products.gram(a), a.T @ a, atol=1e-11)


def test_more_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((333, 1000)).astype(np.float32)

    @products.reproducible
    def results() -> tuple[np.ndarray, np.ndarray]:
        return products.product(x[:, :200].T, x), products.gram(x)

    found = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(products, "_cores", lambda cores=cores: cores)
        found.append(results())
    for one, other in zip(found[0], found[1], strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(found[0], found[2], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_limit_is_lifted_again() -> None:
    def threads() -> list[int]:
        return [int(x["num_threads"]) for x in threadpool_info() if x["user_api"] == "blas"]

    @products.reproducible
    def inside() -> list[int]:
        return threads()

    before = threads()
    assert set(inside()) <= {1}
    assert threads() == before
    with pytest.raises(ZeroDivisionError):
        products.reproducible(lambda: 1 / 0)()
    assert threads() == before
