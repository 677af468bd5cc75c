"""Compiled kernels. Use onnx_quarot.transform; these are its building blocks."""

from typing import Any

import numpy as np
import numpy.typing as npt

def hadamard(
    x: npt.NDArray[Any],
    out: npt.NDArray[Any] | None = None,
    block_size: int | None = None,
    signs: npt.ArrayLike | None = None,
    transpose: bool = False,
    scale: float | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> npt.NDArray[Any]: ...
def order_matrix(order: int) -> npt.NDArray[np.int8]: ...
def factorize(n: int) -> tuple[int, int]: ...
def has_order(n: int) -> bool: ...
def isa() -> str: ...
def isas() -> list[str]: ...
