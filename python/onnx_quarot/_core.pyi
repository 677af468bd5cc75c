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
def hadamard_quantize(
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.int8] | npt.NDArray[np.uint8],
    y_scale: float,
    zero_point: int = 0,
    block_size: int | None = None,
    signs: npt.NDArray[np.float32] | None = None,
    transpose: bool = False,
    scale: float | None = None,
    isa: str | None = None,
) -> None: ...
def hadamard_dynamic_quantize(
    x: npt.NDArray[np.float32],
    out: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    block_size: int | None = None,
    signs: npt.NDArray[np.float32] | None = None,
    transpose: bool = False,
    scale: float | None = None,
    isa: str | None = None,
) -> None: ...
def convert(source: npt.NDArray[Any], target: npt.NDArray[Any], isa: str = "") -> None: ...
def order_matrix(order: int) -> npt.NDArray[np.int8]: ...
def order_factors(order: int) -> list[int]: ...
def factorize(n: int) -> tuple[int, int]: ...
def has_order(n: int) -> bool: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def has_vnni() -> bool: ...
def watch_bus_errors(on: bool) -> None: ...
def bus_errors() -> int: ...
