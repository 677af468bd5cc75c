"""Every linear layer of a model beside the same layer of its reference: what enters it, how far its result is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.calibrate import inner_values
from onnx_quarot.errors import ModelError
from onnx_quarot.load import load
from onnx_quarot.progress import NullProgress, Progress
from onnx_quarot.provenance import Bases, fitted, recorded
from onnx_quarot.qlinear import OP_TYPE, entering_rows
from onnx_quarot.sites import LinearSite, linear_sites

Array = np.ndarray[Any, Any]
_AT_ONCE = 24  # layers whose tensors are asked of one run


@dataclass(frozen=True)
class LayerFigures:
    """One linear layer.

    peaks: largest magnitude of every channel of its input, of the reference and of the candidate. kurtosis: of all
    values of the input, 3 for a normal distribution; channel_kurtosis: of every channel's values over the tokens.
    input_sqnr: signal over quantization noise of the candidate's input, in dB; None where the input is not quantized
    by QuantizeLinear. output_sqnr: the reference's output over the difference, in dB; None for results of
    another shape, or in the bases of a cache.
    """

    name: str
    peaks: tuple[Array, Array]
    kurtosis: tuple[float, float]
    input_sqnr: float | None
    output_sqnr: float | None
    channel_kurtosis: tuple[Array, Array]

    def outlier_ratios(self) -> tuple[float, float]:
        """Loudest channel over median channel, of the reference and of the candidate."""
        before, after = (float(p.max() / max(float(np.median(p)), 1e-30)) for p in self.peaks)
        return before, after

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the channels, only the ratio."""
        before, after = self.outlier_ratios()
        return {
            "name": self.name,
            "outlier_ratio": [before, after],
            "kurtosis": list(self.kurtosis),
            "input_sqnr_db": self.input_sqnr,
            "output_sqnr_db": self.output_sqnr,
        }


@dataclass(frozen=True)
class _Pair:
    """A layer in both models: the names of what enters and leaves it, and of the candidate's dequantized input.

    same: whether what leaves them means the same. node: of the candidate.
    """

    name: str
    reference: tuple[str, str]
    candidate: tuple[str, str]
    dequantized: str | None
    same: bool
    node: ir.Node

    def entering(self, known: dict[str, Array], found: dict[str, Array]) -> list[Array]:
        """What is multiplied, of the reference and of the candidate, in rows."""
        theirs = found[self.candidate[0]]
        if self.node.op_type == OP_TYPE:
            theirs = entering_rows(self.node, theirs)
        return [_rows(known[self.reference[0]]), _rows(theirs)]


def compare_layers(
    reference: Path,
    candidate: Path,
    feeds: tuple[Mapping[str, Array], Mapping[str, Array]],
    *,
    progress: Progress | None = None,
) -> list[LayerFigures]:
    """Run both models on one batch, as each takes it, and compare their linear layers.

    These are matched by node name, or by the name of what they make where one operator does several. Layers that only
    one of the two has are left out. Memory: the inputs and outputs of 24 layers. Raises ModelError if none is left, or
    a model cannot be run.
    """
    first, second = load(reference), load(candidate)
    bases = recorded(first), recorded(second)
    pairs = list(_pairs(linear_sites(first), second))
    if not pairs:
        raise ModelError(f"{candidate} has no linear layer in common with {reference}, by name")
    result = []
    with (progress or NullProgress()).task("layers", len(pairs)) as task:
        rest = iter(pairs)
        while group := list(islice(rest, _AT_ONCE)):
            known = inner_values(reference, [n for p in group for n in p.reference], feeds[0])
            found = inner_values(
                candidate, [n for p in group for n in (*p.candidate, p.dequantized) if n is not None], feeds[1]
            )
            for pair in group:
                result.append(_figures(pair, known, found, bases))
                task.advance()
    return result


def _pairs(sites: Sequence[LinearSite], candidate: ir.Model) -> Any:
    nodes, apart = {str(node.name): node for node in candidate.graph}, fitted(candidate)
    made = {value.name: value for node in candidate.graph for value in node.outputs}
    for site in sites:
        # Behind a product may come what belongs to the layer, rows' lengths and a bias: the last takes over its name.
        leaving = made.get(site.node.outputs[0].name)
        part = leaving.producer() if leaving is not None else None
        node = part if part is not None and part.op_type == OP_TYPE else nodes.get(site.node_name)
        if node is None or node.inputs[0] is None:
            continue
        leaving = node.outputs[0] if leaving is None else leaving
        entering, dequantized = node.inputs[0], None
        dequantize = entering.producer()
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
            if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
                entering, dequantized = quantize.inputs[0], str(entering.name)
        yield _Pair(
            site.node_name,
            (site.activation, str(site.node.outputs[0].name)),
            (str(entering.name), str(leaving.name)),
            dequantized,
            _is_product(node) and str(site.node.outputs[0].name) not in apart,
            node,
        )


def _is_product(node: ir.Node) -> bool:
    """Whether a node's output is a product and nothing more: QLinear can hold a gate or a sum too."""
    if node.op_type != OP_TYPE:
        return True
    bias = node.inputs[3] if len(node.inputs) > 3 else None
    return "gated" not in node.attributes and (bias is None or bias.is_initializer())


def _figures(pair: _Pair, known: dict[str, Array], found: dict[str, Array], bases: tuple[Bases, Bases]) -> LayerFigures:
    entering = pair.entering(known, found)
    leaving = [
        basis.undo(names[1], values[names[1]]).astype(np.float64)
        for basis, values, names in ((bases[0], known, pair.reference), (bases[1], found, pair.candidate))
    ]
    noise = None
    if pair.dequantized is not None:
        noise = _decibels(entering[1], _rows(found[pair.dequantized]))
    same = pair.same and leaving[0].shape == leaving[1].shape
    return LayerFigures(
        pair.name,
        peaks=(np.abs(entering[0]).max(axis=0), np.abs(entering[1]).max(axis=0)),
        kurtosis=(_kurtosis(entering[0]), _kurtosis(entering[1])),
        input_sqnr=noise,
        output_sqnr=_decibels(leaving[0], leaving[1]) if same else None,
        channel_kurtosis=(_channel_kurtosis(entering[0]), _channel_kurtosis(entering[1])),
    )


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1]).astype(np.float64)


def _decibels(signal: Array, approximation: Array) -> float:
    noise = float(np.square(signal - approximation).sum())
    return float(10 * np.log10(max(float(np.square(signal).sum()), 1e-300) / max(noise, 1e-300)))


def _kurtosis(x: Array) -> float:
    return float(_channel_kurtosis(x.reshape(-1, 1))[0])


def _channel_kurtosis(x: Array) -> Array:
    centred = np.square(x - x.mean(axis=0))
    variance = centred.mean(axis=0)
    result: Array = np.square(centred).mean(axis=0) / np.maximum(variance, 1e-150) ** 2
    return result
