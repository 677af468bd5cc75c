"""What leaves a rotated stream: scales and biases go into the readers, means and LayerNorms' centring just go."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.labels import Labels
from onnx_quarot.discovery.rules.readers import is_uniform, is_zero
from onnx_quarot.discovery.typing import Scale, Slot, Typing, Use
from onnx_quarot.plan import Addition

Key = tuple[int, int]  # node, input

_UNEVEN = 3.0  # root mean square of a scale by its median: trained models have up to 2


class Folds:
    """Only where the stream ends up rotated: everything else stays as it is, and a tied table can stay tied.

    ``scales``: factors along an axis of a weight; ``adds``: what is added to a bias there is, ``new_biases`` to one
    there is not; ``ones``: scales that become ones; ``norms``: LayerNorms that become RMS norms; ``bypassed``: nodes
    whose output is one of their inputs from now on. ``uneven``: the nodes whose scales are far from even, and by how
    much the errors of integer weights grow that they are folded into, as a rotation spreads the largest features'.
    """

    def __init__(self, t: Typing, labels: Labels, index: dict[ir.Node, int]) -> None:
        self._t, self._index = t, index
        self.scales: dict[Key, list[tuple[int, Key]]] = defaultdict(list)
        self.adds: dict[Key, list[Addition]] = defaultdict(list)
        self.new_biases: dict[ir.Node, list[Addition]] = defaultdict(list)
        self.behind: dict[ir.Node, list[Key]] = defaultdict(list)  # factors a new bias takes over with its layer
        self.ones: list[Key] = []
        self.norms: list[int] = []
        self.bypassed: list[Key] = []
        self.uneven: dict[str, float] = {}
        for scale in t.scales:
            if labels.any_rotated(scale.out, t.rank(scale.out) - 1):
                self._scale(scale)
        for written in t.written:
            if labels.any_rotated(written.out, t.rank(written.out) - 1):
                self.bypassed.append(self._key(written.data))
                self.behind[written.node].append(self._key(written.factor))
                for use, axis in written.constants:
                    self.scales[self._key(use)].append((axis, self._key(written.factor)))
        for use in t.centres:
            if not labels.any_rotated(use, t.rank(use) - 1):
                continue
            if use.node in t.converted:
                self.norms.append(index[use.node])
            elif use.node.op_type == "Sub":
                self.bypassed.append(self._key(use))

    def _key(self, use: Use) -> Key:
        return self._index[use.node], use.index

    def _scale(self, scale: Scale) -> None:
        uniform = is_uniform(scale.factor.value)
        if scale.data is not None:
            self.bypassed.append(self._key(scale.data))
            if scale.bias is not None:
                self.bypassed.append((self._index[scale.bias.node], 1 - scale.bias.index))
        elif not uniform:
            self.ones.append(self._key(scale.factor))
        if scale.data is not None or not uniform:
            for slot in scale.readers:
                self.scales[self._index[slot.node], slot.weight].append((slot.axis, self._key(scale.factor)))
            self._measure(scale.factor)
        if scale.bias is not None and not is_zero(scale.bias.value):
            for slot in scale.readers:
                self._bias(scale.bias, slot)

    def _measure(self, factor: Use) -> None:
        view = constant(factor.value)
        values = None if view is None else view.small()
        if values is None or not values.any():
            return
        typical = float(np.median(np.abs(values))) or float(np.abs(values).mean())
        growth = float(np.sqrt(np.mean(values**2))) / typical
        if growth >= _UNEVEN:
            self.uneven[factor.node.name or factor.node.outputs[0].name or ""] = growth

    def _bias(self, bias: Use, slot: Slot) -> None:
        """bias @ W with the original W, behind the linear layer: in the bias it has, or in a new one."""
        node = slot.node
        alpha = node.attributes.get_float("alpha", 1.0) if node.op_type != "Attention" else 1.0
        target, factor = self._existing_bias(slot), alpha
        if target is not None and node.op_type in ("Gemm", "FusedGemm"):
            factor = alpha / node.attributes.get_float("beta", 1.0)
        addition = Addition(self._key(bias), (self._index[node], slot.weight), slot.axis, factor)
        if target is None:
            self.new_biases[node].append(addition)
        else:
            self.adds[self._key(target)].append(addition)

    def _existing_bias(self, slot: Slot) -> Use | None:
        """The constant vector that is added to the layer's output, if nothing else reads that output."""
        node, t = slot.node, self._t
        weight = constant(node.inputs[slot.weight])
        assert weight is not None
        width = weight.shape[1 - slot.axis]
        if node.op_type in ("Gemm", "FusedGemm", "Attention"):
            use = Use(node, 2)
            if len(node.inputs) < 3 or node.attributes.get_float("beta", 1.0) == 0.0:
                return None
        else:
            readers = [u for u in node.outputs[0].uses() if u.node.op_type != "Shape"]
            if len(readers) != 1 or node.outputs[0].is_graph_output():
                return None
            following = readers[0].node
            if following.op_type != "Add" or following.domain != "" or following in t.folded_biases:
                return None
            if following.graph is not t.graph:
                return None
            use = Use(following, 1 - readers[0].idx)
        value = use.node.inputs[use.index]
        view = constant(value)
        fits = view is not None and view.shape[-1:] == (width,) and view.size == width
        return use if fits else None
