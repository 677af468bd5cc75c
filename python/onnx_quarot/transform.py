"""Walsh-Hadamard transforms of numpy arrays, and the rotations made from them.

Row vectors throughout: a rotation R acts as ``x @ R``. A block of n = K 2**m values is multiplied by
H_n = H_K (x) H_2**m: Sylvester's matrix for the power of two, and for an odd part the smallest order K that has it
(Paley 1933, Williamson 1944, Goethals and Seidel 1967, Turyn 1974). H_n depends on n alone, not on the type or the
CPU; H_K is not symmetric in general, so R and its inverse R.T are told apart everywhere.
Rotating before quantizing: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_quarot import _core
from onnx_quarot.errors import ConfigError, OrderError

__all__ = [
    "Rotation",
    "hadamard",
    "hadamard_dynamic_quantize",
    "hadamard_matrix",
    "hadamard_quantize",
    "has_order",
    "largest_block",
]

Array = npt.NDArray[Any]


def hadamard(
    x: Array,
    *,
    block_size: int | None = None,
    signs: npt.ArrayLike | None = None,
    transpose: bool = False,
    scale: float | None = None,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """Transform the last axis of ``x``: ``(x * signs) @ H * scale``.

    Args:
        x: ``[..., n]``, float32, float64, float16 or bfloat16 (ml_dtypes). The two short types are computed in
            float32 and rounded once. Not changed, unless it is also ``out``.
        block_size: cut the axis in pieces of this length, each transformed alone. Default: n.
        signs: +1 or -1 for each element of a block, or of the whole axis. Default: none.
        transpose: ``(x @ H.T * scale) * signs`` instead, which undoes the transform when ``scale`` is the default.
        scale: default ``1 / sqrt(block_size)``, with which the transform is orthonormal. 1.0 gives raw sums.
        out: where to write, of the shape and type of ``x``; ``x`` itself transforms in place.
        threads: rows are shared between so many threads when there is enough work for them; the others are kept for
            the next call, which they await for half a millisecond before they sleep. The interpreter lock is
            released meanwhile.

    Returns:
        ``out``, or a new array of the shape and type of ``x``.

    Raises:
        OrderError: no Hadamard matrix of this size is available (see :func:`largest_block`).
        TypeError: ``x`` or ``out`` is not a numpy array of one of these types.
        ValueError: an argument does not fit ``x``, or ``out`` overlaps it in part.

    >>> hadamard(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    >>> hadamard(np.array([3.0, 1.0]), scale=1.0)
    array([4., 2.])
    """
    return _core.hadamard(x, out, block_size, signs, transpose, scale, threads)


def hadamard_quantize(
    x: Array,
    y_scale: float,
    zero_point: int = 0,
    *,
    dtype: npt.DTypeLike = np.int8,
    block_size: int | None = None,
    signs: npt.ArrayLike | None = None,
    transpose: bool = False,
    scale: float | None = None,
) -> Array:
    """Transform the last axis and quantize it at once: ``saturate(round(hadamard(x, ...) / y_scale) + zero_point)``.

    Args:
        x: float32 ``[..., n]``.
        y_scale: what a step of the result stands for; positive.
        zero_point: the result that stands for 0.
        dtype: int8 or uint8, of the result.
        block_size, signs, transpose, scale: as in :func:`hadamard`.

    Returns:
        Integers of the shape of ``x``, rounded to nearest even. A NaN becomes the largest or the smallest one.

    Raises:
        OrderError, TypeError, ValueError: as :func:`hadamard`; ``y_scale``, ``zero_point`` or ``dtype`` does not fit.

    >>> hadamard_quantize(np.array([1.0, 0.0, 0.0, 2.0], np.float32), 0.1)
    array([15, -5, -5, 15], dtype=int8)
    """
    kind = np.dtype(dtype)
    if kind not in (np.int8, np.uint8):
        raise TypeError(f"dtype is {kind}: it must be int8 or uint8")
    info = np.iinfo(kind)
    if not info.min <= zero_point <= info.max:
        raise ValueError(f"zero_point is {zero_point}: it must be a number of {kind}")
    values = _rows(x)
    out = np.empty(values.shape, kind)
    _core.hadamard_quantize(values, out, y_scale, zero_point, block_size, _signs(signs), transpose, scale)
    return out


def hadamard_dynamic_quantize(
    x: Array,
    *,
    block_size: int | None = None,
    signs: npt.ArrayLike | None = None,
    transpose: bool = False,
    scale: float | None = None,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Transform the last axis and quantize each row by its own largest magnitude, symmetrically.

    Args:
        x: float32 ``[..., n]``.
        block_size, signs, transpose, scale: as in :func:`hadamard`.

    Returns:
        int8 of the shape of ``x`` from -127 to 127, and float32 scales ``[..., 1]`` whose product with it is nearly
        ``hadamard(x, ...)``. A row without a magnitude of 2**-100 or more, before or after ``scale``, has scale 1 and
        zeros; an infinity or a NaN shows in the scale.

    Raises:
        OrderError, TypeError, ValueError: as :func:`hadamard`.

    >>> y, y_scale = hadamard_dynamic_quantize(np.array([1.0, 0.0, 0.0, 2.0], np.float32))
    >>> y, y_scale * 127
    (array([127, -42, -42, 127], dtype=int8), array([1.5], dtype=float32))
    """
    values = _rows(x)
    out, scales = np.empty(values.shape, np.int8), np.empty((*values.shape[:-1], 1), np.float32)
    _core.hadamard_dynamic_quantize(values, out, scales, block_size, _signs(signs), transpose, scale)
    return out, scales


def _rows(x: Array) -> npt.NDArray[np.float32]:
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        kind = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"x is {kind}: it must be a numpy array of float32")
    if x.ndim == 0:
        raise ValueError("x has no axis: the transform works along the last one")
    return np.ascontiguousarray(x)


def _signs(signs: npt.ArrayLike | None) -> npt.NDArray[np.float32] | None:
    if signs is None:
        return None
    values = np.ascontiguousarray(signs, dtype=np.float32)
    if values.ndim != 1 or values.size == 0 or not np.all(np.abs(values) == 1):
        raise ValueError("signs must be one-dimensional, values of +1 or -1")
    return values


def hadamard_matrix(
    n: int,
    *,
    block_size: int | None = None,
    signs: npt.ArrayLike | None = None,
    transpose: bool = False,
    scale: float | None = None,
) -> npt.NDArray[np.float64]:
    """The matrix of :func:`hadamard`, float64 ``[n, n]``: ``hadamard(x, ...) == x @ hadamard_matrix(n, ...)``.

    Built from its definition, without the kernel, which is tested against it.
    """
    if n < 1:
        raise OrderError(f"n is {n}: it must be at least 1")
    block = n if block_size is None else block_size
    if block < 1 or n % block != 0:
        raise OrderError(f"block_size is {block}: it must divide n, which is {n}")
    order, power = _core.factorize(block)
    matrix = _core.order_matrix(order).astype(np.float64)
    for _ in range(power):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]))
    matrix *= block**-0.5 if scale is None else scale
    full = np.kron(np.eye(n // block), matrix).astype(np.float64, copy=False)
    if signs is not None:
        full *= _whole_axis(np.asarray(signs, dtype=np.float64), n, block)[:, None]
    # Scaling the rows of H and transposing is H.T with its columns scaled: the signs come last.
    return np.ascontiguousarray(full.T) if transpose else full


def _whole_axis(signs: npt.NDArray[np.float64], n: int, block: int) -> npt.NDArray[np.float64]:
    if signs.shape not in ((block,), (n,)):
        raise ConfigError(f"signs has shape {signs.shape}: it must be ({block},) or ({n},)")
    if not np.all(np.abs(signs) == 1.0):
        raise ConfigError("signs holds values other than +1 and -1")
    return np.tile(signs, n // len(signs))


def has_order(n: int) -> bool:
    """Whether ``n`` can be transformed in one block."""
    return n > 0 and _core.has_order(n)


def largest_block(n: int) -> int:
    """The largest block size that divides ``n`` and has a Hadamard matrix; ``n`` itself where it has one.

    >>> largest_block(4096), largest_block(576), largest_block(68 * 7)
    (4096, 576, 68)
    """
    if n < 1:
        raise OrderError(f"n is {n}: it must be at least 1")
    return next(n // parts for parts in range(1, n + 1) if n % parts == 0 and has_order(n // parts))


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal matrix R of ``size`` rows: ``D @ blockdiag(H, ..., H) / sqrt(block_size)``.

    Attributes:
        size: length of the rotated axis.
        block_size: length of each block, a divisor of ``size`` that has a Hadamard matrix.
        signs: the diagonal of D, int8 ``[size]`` of +1 and -1, or None for the identity.
    """

    size: int
    block_size: int
    signs: npt.NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OrderError(f"size is {self.size}: it must be at least 1")
        if self.block_size < 1 or self.size % self.block_size != 0:
            raise OrderError(f"block_size is {self.block_size}: it must divide size, which is {self.size}")
        _core.factorize(self.block_size)
        if self.signs is not None:
            given = np.asarray(self.signs)
            if given.shape != (self.size,) or not np.all(np.abs(given) == 1):
                raise ConfigError(f"signs must be {self.size} values of +1 or -1, got shape {given.shape}")
            signs = given.astype(np.int8)
            signs.flags.writeable = False
            object.__setattr__(self, "signs", signs)

    @classmethod
    def make(cls, size: int, *, block_size: int | None = None, rng: np.random.Generator | None = None) -> Rotation:
        """A rotation of ``size``, in one block unless told otherwise; with random signs if ``rng`` is given.

        Raises:
            OrderError: the block has no Hadamard matrix, or does not divide ``size``.
        """
        signs = None if rng is None else rng.choice(np.array([-1, 1], dtype=np.int8), size)
        return cls(size, size if block_size is None else block_size, signs)

    def apply(self, x: Array, axis: int = -1, inverse: bool = False) -> Array:
        """``x @ R`` along ``axis``, or ``x @ R.T`` if ``inverse``: a new array of the type of ``x``.

        ``x`` has ``size`` elements along ``axis`` and is float32, float64, float16 or bfloat16. To rotate the rows of
        a weight W that reads a rotated input (R.T @ W), apply the rotation along axis 0.

        Raises:
            OrderError: the axis has another length.
            TypeError: another type.
        """
        if x.ndim == 0 or not -x.ndim <= axis < x.ndim:
            raise OrderError(f"axis is {axis}: it must be an axis of x, which has {x.ndim}")
        if x.shape[axis] != self.size:
            raise OrderError(f"x has length {x.shape[axis]} along axis {axis}: the rotation has size {self.size}")
        moved = np.moveaxis(x, axis, -1)
        turned = hadamard(moved, block_size=self.block_size, signs=self.signs, transpose=inverse)
        return np.ascontiguousarray(np.moveaxis(turned, -1, axis))

    def matrix(self) -> npt.NDArray[np.float64]:
        """R, float64 ``[size, size]``."""
        return hadamard_matrix(self.size, block_size=self.block_size, signs=self.signs)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; the signs are the bits of a hexadecimal text, first sign first, 1 for -1."""
        packed = None if self.signs is None else np.packbits(self.signs < 0).tobytes().hex()
        return {"size": self.size, "block_size": self.block_size, "signs": packed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Rotation:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: a key is missing, or the signs do not have the right length.
        """
        missing = [key for key in ("size", "block_size", "signs") if key not in value]
        if missing:
            raise ConfigError(f"rotation lacks {', '.join(missing)}")
        size, block_size, text = int(value["size"]), int(value["block_size"]), value["signs"]
        if text is None:
            return cls(size, block_size)
        try:
            bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"rotation signs are not hexadecimal text: {text!r}") from error
        if len(bits) != -(-size // 8) * 8:
            raise ConfigError(f"rotation signs hold {len(bits)} bits: size {size} needs {-(-size // 8) * 8}")
        return cls(size, block_size, (1 - 2 * bits[:size].astype(np.int8)).astype(np.int8))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rotation):
            return NotImplemented
        return (self.size, self.block_size) == (other.size, other.block_size) and (
            (self.signs is None and other.signs is None)
            or (self.signs is not None and other.signs is not None and np.array_equal(self.signs, other.signs))
        )

    def __hash__(self) -> int:
        return hash((self.size, self.block_size, None if self.signs is None else self.signs.tobytes()))
