"""Weights in blocks: MatMulNBits, ONNX Runtime's operator for 4- and 8-bit weights, with accuracy level 4.

At that level the kernel makes its activations int8, per row and block, while it runs. Weights are stored as unsigned
codes [channels, blocks, bytes], four-bit ones two a byte with the lower half first, with a float32 scale a block and,
where ranges are not symmetric, a zero point of the codes' width.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from .clipping import fit_rows
from .editing import GraphNames
from .errors import ModelError
from .qdq import SiteReport, check_replaceable
from .qparams import Array, SolvedWeight, lazy
from .scheme import Scheme, TensorSpec
from .sites import LinearSite, WeightSource
from .stand_in import stand_in
from .tied_tables import Layout, SharedWeight

_MS = "com.microsoft"
_CHUNK_ELEMENTS = 2**20


@dataclass(frozen=True)
class StoredBlocks:
    """Where a weight ended up: the codes [channels, blocks, bytes] and scales [channels, blocks] in the graph."""

    weight: BlockWeight
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


class Rows(Protocol):
    """A matrix [depth, channels] by name, read when it is needed."""

    name: str
    depth: int
    channels: int

    def read(self) -> Array:
        """[depth, channels], floats; it may be mapped memory."""

    def close(self) -> None:
        """Unmap what was mapped; reading again maps it again."""


class BlockWeight:
    """A weight [depth, channels] in blocks of `block` input features, evaluated when it is written.

    Scales and zero points are kept once known, codes are not. A last block that is not full is filled with zeros.
    """

    def __init__(self, source: Rows, spec: TensorSpec, block: int, solved: SolvedWeight | None) -> None:
        self.source, self.spec, self.block, self._solved = source, spec, block, solved
        self.blocks = -(-source.depth // block)
        self.offset = 0 if spec.bounds[0] >= 0 else 2 ** (spec.bits - 1)
        self.default_zero = 2 ** (spec.bits - 1)
        self._lock = threading.Lock()
        self._fit: tuple[Array, Array] | None = None
        if solved is not None:
            self._fit = solved.scale.T.astype(np.float32), solved.zero.T + self.offset

    @property
    def has_zeros(self) -> bool:
        """Whether zero points are stored; symmetric codes have the operator's own."""
        return not self.spec.symmetric

    def codes_tensor(self) -> ir.LazyTensor:
        """uint8 [channels, blocks, block * bits / 8]."""
        shape = [self.source.channels, self.blocks, self.block * self.spec.bits // 8]
        return lazy(self._packed, ir.DataType.UINT8, shape, "")

    def scales_tensor(self) -> ir.LazyTensor:
        """float32 [channels, blocks]."""
        return lazy(lambda: self._fitted()[0], ir.DataType.FLOAT, [self.source.channels, self.blocks], "")

    def zeros_tensor(self) -> ir.LazyTensor:
        """uint8 [channels, ceil(blocks * bits / 8)]."""
        shape = [self.source.channels, -(-self.blocks * self.spec.bits // 8)]
        return lazy(lambda: pack(self._fitted()[1], self.spec.bits), ir.DataType.UINT8, shape, "")

    def plain_tensors(self) -> tuple[ir.LazyTensor, ir.LazyTensor, ir.LazyTensor]:
        """Codes [depth, channels], scales and zero points [blocks, channels], for DequantizeLinear along axis 0."""
        shape, grid = [self.source.depth, self.source.channels], [self.blocks, self.source.channels]
        dtype = self.spec.dtype

        def zeros() -> Array:
            codes: Array = (self._fitted()[1].T - self.offset).astype(self.spec.numpy_dtype)
            return codes

        return (
            lazy(self._plain, dtype, shape, ""),
            lazy(lambda: np.ascontiguousarray(self._fitted()[0].T), ir.DataType.FLOAT, grid, ""),
            lazy(zeros, dtype, grid, ""),
        )

    def _fitted(self) -> tuple[Array, Array]:
        with self._lock:
            if self._fit is None:
                try:
                    self._fit = self._search(self.source.read())
                finally:
                    self.source.close()
            return self._fit

    def _search(self, weight: Array) -> tuple[Array, Array]:
        if not np.isfinite(weight.max(initial=0.0) - weight.min(initial=0.0)):
            raise ModelError(f"weight {self.source.name!r} holds a value that is not finite")
        scales = np.empty((self.source.channels, self.blocks), np.float32)
        zeros = np.empty((self.source.channels, self.blocks), np.int32)
        for part in self._parts():
            rows = self._rows(weight, part)
            scale, zero = fit_rows(rows.reshape(-1, self.block), self.spec)
            scales[part], zeros[part] = scale.reshape(-1, self.blocks), zero.reshape(-1, self.blocks)
        return scales, zeros + self.offset

    def _packed(self) -> Array:
        packed = np.empty((self.source.channels, self.blocks, self.block * self.spec.bits // 8), np.uint8)
        scales, zeros = self._fitted()
        try:
            source = self.source.read() if self._solved is None else self._solved.read()
            for part in self._parts():
                codes = self._codes(source, part, scales[part][:, :, None], zeros[part][:, :, None])
                packed[part] = pack(codes.reshape(-1, self.block), self.spec.bits).reshape(len(codes), self.blocks, -1)
        finally:
            source = np.empty(0)  # mapped memory must not be referred to when it is let go
            self.source.close()
        return packed

    def _codes(self, source: Array, part: slice, scale: Array, zero: Array) -> Array:
        """Unsigned codes of some channels, [channels, blocks, block]."""
        rows = self._rows(source, part)
        if self._solved is None:
            first, last = self.spec.bounds
            codes: Array = np.clip(np.rint(rows / scale) + zero, first + self.offset, last + self.offset)
            return codes
        rows += self.offset
        filled = self.blocks * self.block - self.source.depth
        if filled:  # what fills the last block has to mean zero
            rows[:, -1, self.block - filled :] = zero[:, -1]
        return rows

    def _plain(self) -> Array:
        codes = np.empty((self.source.depth, self.source.channels), self.spec.numpy_dtype)
        scales, zeros = self._fitted()
        try:
            source = self.source.read() if self._solved is None else self._solved.read()
            for part in self._parts():
                rows = self._codes(source, part, scales[part][:, :, None], zeros[part][:, :, None]) - self.offset
                codes[:, part] = rows.reshape(len(rows), -1)[:, : self.source.depth].T
        finally:
            source = np.empty(0)
            self.source.close()
        return codes

    def _parts(self) -> Sequence[slice]:
        step = max(1, _CHUNK_ELEMENTS // (self.blocks * self.block))
        return [slice(start, start + step) for start in range(0, self.source.channels, step)]

    def _rows(self, weight: Array, part: slice) -> Array:
        rows = weight[:, part].T.astype(np.float32)
        filled = self.blocks * self.block - self.source.depth
        if filled:
            rows = np.pad(rows, ((0, 0), (0, filled)))
        blocks: Array = rows.reshape(len(rows), self.blocks, self.block)
        return blocks


def pack(codes: Array, bits: int) -> Array:
    """Codes in rows as bytes, uint8: four-bit ones two a byte, lower half first, an odd last one alone."""
    whole = codes.astype(np.uint8)
    if bits == 8:
        return whole
    if whole.shape[-1] % 2:
        whole = np.pad(whole, ((0, 0), (0, 1)))
    packed: Array = whole[:, ::2] | (whole[:, 1::2] << 4)
    return packed


def quantize_blocks(
    model: ir.Model,
    sites: Sequence[LinearSite],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, SolvedWeight],
    tied: Collection[ir.Value] = (),
) -> tuple[list[SiteReport], list[SharedWeight]]:
    """Replace `sites` in place by MatMulNBits; a report for each, and the weights of roots in `tied`.

    schemes: by node name, of the form block. solved: integers found in advance, by node name. tied:
    root constants whose integers tables will read too, returned where they fill their blocks. A bias is added after the
    product. Everything is checked first: ModelError for a weight that is not float32, a Gemm that transposes its
    activations, or too old an opset.
    """
    for site in sites:
        check_replaceable(model, site, schemes[site.node_name])
    names = GraphNames(model.graph)
    stored: dict[tuple[object, ...], StoredBlocks] = {}
    reports: list[SiteReport] = []
    shared: list[SharedWeight] = []
    for site in sites:
        scheme = schemes[site.node_name]
        assert scheme.block is not None
        key = (*site.weight_key(), scheme.weight, scheme.block)
        if key not in stored:
            weight = BlockWeight(WeightSource(site), scheme.weight, scheme.block, solved.get(site.node_name))
            stored[key] = StoredBlocks(
                weight,
                names.initializer(weight.codes_tensor(), f"{site.weight}_quantized"),
                names.initializer(weight.scales_tensor(), f"{site.weight}_scales"),
                names.initializer(weight.zeros_tensor(), f"{site.weight}_zero_points") if weight.has_zeros else None,
            )
            if site.root in tied and site.depth % scheme.block == 0:
                place = stored[key]
                zero = place.weight.default_zero if place.zeros is None else place.zeros
                shared.append(SharedWeight(site, place.codes, place.scales, zero, Layout.BLOCKS, scheme.weight.bits))
        place = stored[key]
        _replace(names, site, place)
        bits = scheme.weight.bits
        reports.append(
            SiteReport(
                site.node_name,
                "MatMulNBits",
                site.activation,
                site.weight,
                activation_scale=0.0,
                activation_zero_point=0,
                float_bytes=4 * site.depth * site.channels,
                quantized_bytes=site.channels * place.weight.blocks * scheme.block * bits // 8,
                weight_bits=bits,
                note=f"blocks of {scheme.block}",
            )
        )
    model.opset_imports.setdefault(_MS, 1)
    return reports, shared


def _replace(names: GraphNames, site: LinearSite, place: StoredBlocks) -> None:
    node = site.node
    attributes = {
        "K": site.depth,
        "N": site.channels,
        "bits": place.weight.spec.bits,
        "block_size": place.weight.block,
        "accuracy_level": 4,
    }
    inputs = [node.inputs[0], place.codes, place.scales, *([] if place.zeros is None else [place.zeros])]
    product = ir.node("MatMulNBits", inputs, attributes, domain=_MS, name=node.name)
    stand_in(names, site, product)
