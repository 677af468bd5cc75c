"""Who reads a value through a constant matrix, and can therefore absorb a scale or a bias in front of it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnx_quarot.discovery.constants import constant, uniform
from onnx_quarot.discovery.rules.einsum import einsum_slot
from onnx_quarot.discovery.rules.registry import MICROSOFT
from onnx_quarot.discovery.rules.selecting import slice_bounds
from onnx_quarot.discovery.typing import Slot, Typing, Use

_KEEPS = frozenset(
    ("Identity", "Cast", "Dropout", "Expand", "Flatten", "Reshape", "Slice", "Squeeze", "Tile", "Unsqueeze")
)
_LINEAR = {("", "MatMul"), ("", "Gemm"), (MICROSOFT, "FusedMatMul"), (MICROSOFT, "FusedGemm")}
_CONVOLUTIONS = {("", "Conv"), (MICROSOFT, "FusedConv")}


def linear_slot(node: ir.Node, index: int = 0) -> Slot | None:
    """The constant matrix that input ``index`` of ``node`` is multiplied by from the right; None if there is none."""
    kind = (node.domain, node.op_type)
    if kind in _LINEAR and index == 0:
        weight = constant(node.inputs[1])
        if weight is None or len(weight.shape) < 2:
            return None
        if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
            return None
        rank = len(weight.shape)
        return Slot(node, 0, 1, rank - 1 if node.attributes.get_int("transB", 0) else rank - 2)
    if kind == ("", "Einsum"):
        return einsum_slot(node, index)
    if kind == (MICROSOFT, "Attention") and index == 0:
        weight = constant(node.inputs[1])
        return None if weight is None or len(weight.shape) != 2 else Slot(node, 0, 1, 0)
    if kind == (MICROSOFT, "MoE") and index == 0:
        weight = constant(node.inputs[2])
        return None if weight is None or len(weight.shape) != 3 else Slot(node, 0, 2, 2)
    return None


def is_matmul(node: ir.Node) -> bool:
    """One matrix product and nothing else inside, at least in front of it."""
    return (node.domain, node.op_type) in _LINEAR


def is_convolution(node: ir.Node) -> bool:
    """A convolution, with or without an activation behind it."""
    return (node.domain, node.op_type) in _CONVOLUTIONS


def is_linear(node: ir.Node) -> bool:
    """A MatMul or Gemm with a constant matrix."""
    weight = constant(node.inputs[1]) if node.op_type in ("MatMul", "Gemm") and node.domain == "" else None
    return weight is not None and len(weight.shape) == 2 and linear_slot(node) is not None


def slots(node: ir.Node, index: int) -> tuple[Slot, ...]:
    """Every constant matrix that input ``index`` of ``node`` meets; a mixture of experts may have two."""
    first = linear_slot(node, index)
    if first is None:
        return ()
    if node.op_type == "MoE" and len(node.inputs) > 6 and node.inputs[6] is not None:
        third = constant(node.inputs[6])
        return (first, Slot(node, 0, 6, 2)) if third is not None else ()
    return (first,)


def selected_slot(t: Typing, node: ir.Node, index: int) -> Slot | None:
    """The constant that the other operand of a product is selected from: the matrices of the experts a token goes to.

    The slot names the selecting node; only for a selection that nothing else reads.
    """
    if node.op_type != "MatMul" or node.domain != "":
        return None
    value = node.inputs[1 - index]
    if value is None or not t.shapes.known(value):
        return None
    axis = len(t.shapes.shape[value]) - (1 if index == 1 else 2)
    while axis >= 0 and value is not None:
        maker = value.producer()
        if maker is None or maker.domain != "" or len(value.uses()) != 1 or not t.shapes.known(value):
            return None
        source = maker.inputs[0]
        if source is None or not t.shapes.known(source):
            return None
        rank, before = len(t.shapes.shape[value]), len(t.shapes.shape[source])
        if maker.op_type == "Transpose":
            axis = maker.attributes.get_ints("perm", list(range(rank))[::-1])[axis]
        elif maker.op_type in ("Gather", "GatherND"):
            # What is selected along comes first; the axes behind it are kept.
            along = maker.attributes.get_int("axis", 0) % before if maker.op_type == "Gather" else _selecting(t, maker)
            behind = before - 1 - along if maker.op_type == "Gather" else before - along
            if rank - axis > behind:
                return None
            axis = before - (rank - axis)
            view = constant(source)
            if view is not None:
                return Slot(maker, 1, 0, axis)
        elif maker.op_type not in ("Identity", "Cast"):
            return None
        value = source
    return None


def _selecting(t: Typing, node: ir.Node) -> int:
    """The number of leading axes that a GatherND selects along."""
    indices = node.inputs[1]
    width = t.shapes.shape[indices][-1] if indices in t.shapes.shape else len(t.shapes.shape[node.inputs[0]])  # type: ignore[index]
    return node.attributes.get_int("batch_dims", 0) + width


def absorbing_readers(
    t: Typing, value: ir.Value, place: int = 1, whole: ir.Value | None = None, biased: bool = False
) -> tuple[Slot, ...]:
    """The matrices that read ``value`` if every reader is one (through operators that keep the last axis), else
    none. The features are the last axis but ``place - 1``. ``value`` holds rows of ``whole``. ``biased``: a bias is to
    be moved behind the matrices, which a factor of a row in front of them would have to scale.
    """
    found: list[Slot] = []
    whole = whole or value
    if value.is_graph_output() or not value.uses():
        return ()
    for use in value.uses():
        node = use.node
        if node.op_type in ("Shape", "Size") and node.domain == "":
            continue
        if node.graph is not t.graph:
            return ()
        further = slots(node, use.idx) if place == 1 else ()
        if not further and place == use.idx + 1 and (slot := selected_slot(t, node, use.idx)) is not None:
            further = (slot,)
        if not further and use.idx == 0 and place == 1 and _keeps_last_axis(t, node):
            further = absorbing_readers(t, node.outputs[0], whole=whole, biased=biased)
        if not further and place == 1 and _joins_rows(t, node) and _rows_of(t, node.outputs[0], whole):
            further = absorbing_readers(t, node.outputs[0], biased=biased)
        if not further and use.idx == 0 and place == 1 and _makes_columns(t, node):
            further = absorbing_readers(t, node.outputs[0], 2)
        if not further and place == 1 and not biased and _data_of_factor(t, node) == use.idx:
            further = absorbing_readers(t, node.outputs[0])
        if not further:
            return ()
        found += further
    return tuple(dict.fromkeys(found))


def _makes_columns(t: Typing, node: ir.Node) -> bool:
    """Vectors become matrices of one column."""
    x, y = node.inputs[0], node.outputs[0]
    if node.op_type not in ("Unsqueeze", "Reshape") or x is None or not (t.shapes.known(x) and t.shapes.known(y)):
        return False
    return node.domain == "" and t.shapes.shape[y] == (*t.shapes.shape[x], 1)


def _joins_rows(t: Typing, node: ir.Node) -> bool:
    """A Concat along another axis than the last."""
    y = node.outputs[0]
    if node.op_type != "Concat" or node.domain != "" or not t.shapes.known(y):
        return False
    rank = len(t.shapes.shape[y])
    return node.attributes.get_int("axis", 0) % rank != rank - 1


def _rows_of(t: Typing, value: ir.Value, whole: ir.Value) -> bool:
    """Whether ``value`` consists of rows of ``whole``, in whatever order: torch.roll is two slices, put together."""
    seen, pending = {whole}, [value]
    while pending:
        node = (value := pending.pop()).producer()
        seen.add(value)
        if node is None or not (_joins_rows(t, node) or _keeps_last_axis(t, node)):
            return False
        sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        pending += [v for v in dict.fromkeys(sources) if v is not None and v not in seen]
    return True


def _keeps_last_axis(t: Typing, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or node.domain != "" or not (t.shapes.known(x) and t.shapes.known(y)):
        return False
    before, after = t.shapes.shape[x], t.shapes.shape[y]
    if not before or not after or before[-1] != after[-1]:
        return False
    if node.op_type == "Gather":
        return node.attributes.get_int("axis", 0) % len(before) != len(before) - 1
    if node.op_type == "GatherND":
        return _selecting(t, node) < len(before)
    if node.op_type == "Transpose":
        return node.attributes.get_ints("perm", [0])[-1] == len(before) - 1
    if node.op_type == "Pad":
        return _pads_nothing(t, node)
    if node.op_type == "Slice":  # which may take them in another order
        taken = slice_bounds(t, node, len(before)).get(len(before) - 1, (0, before[-1], 1))
        return taken is not None and slice(*taken).indices(before[-1]) == (0, before[-1], 1)
    if node.op_type == "Cast":  # which rounds to integers
        return t.shapes.is_float(y)
    if node.op_type == "Dropout":
        return not drops(node)
    return node.op_type in _KEEPS


def drops(node: ir.Node) -> bool:
    """Whether a Dropout may do what it does in training: leave features out by chance."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return False
    view = constant(training)
    return view is None or bool(view.numpy().any())


def _pads_nothing(t: Typing, node: ir.Node) -> bool:
    """Padding to a multiple of something, where it is one already. What is padded takes a scale, but no bias."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return not any(node.attributes.get_ints("pads", [1]))
    pads = t.shapes.constants.get(node.inputs[1])
    return pads is not None and not pads.any()


def _data_of_factor(t: Typing, node: ir.Node) -> int | None:
    """Which input a node multiplies (or divides) by the same number for all features of a row; None if it does not."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    for data in (0, 1) if node.op_type == "Mul" else (0,):
        x, factor = node.inputs[data], node.inputs[1 - data]
        if x is None or constant(x) is not None or not t.shapes.known(x):
            continue
        if is_uniform(factor) or (factor is not None and _one_a_row(t, factor)):
            return data if t.shapes.shape.get(node.outputs[0]) == t.shapes.shape[x] else None
    return None


def _one_a_row(t: Typing, value: ir.Value) -> bool:
    """Whether a tensor is broadcast over the last axis, as a mask of positions is."""
    shape = t.shapes.shape.get(value)
    return (
        shape is not None and t.shapes.known(value) and (not shape or (shape[-1] == 1 and t.shapes.static[value][-1]))
    )


@dataclass(frozen=True)
class Absorbed:
    """Readers that take over a factor a feature of ``out``, and a bias that is added to it on the way."""

    out: ir.Value
    readers: tuple[Slot, ...]
    bias: Use | None = None


def absorb(t: Typing, value: ir.Value, biased: bool = False) -> Absorbed | None:
    """How a factor a feature on ``value`` can be folded: into its readers, perhaps with a bias that follows it.
    ``biased``: with one that comes before.
    """
    if readers := absorbing_readers(t, value, biased=biased):
        return Absorbed(value, readers)
    uses = [u for u in value.uses() if u.node.op_type not in ("Shape", "Size")]
    if len(uses) != 1 or value.is_graph_output() or not t.shapes.known(value):
        return None
    node = uses[0].node
    if node.op_type != "Add" or node.domain != "" or node.graph is not t.graph:
        return None
    bias = Use(node, 1 - uses[0].idx)
    view = constant(bias.value)
    width = t.shapes.shape[value][-1]
    if view is None or view.shape[-1:] != (width,) or view.size != width:
        return None
    readers = absorbing_readers(t, node.outputs[0], biased=True)
    return Absorbed(node.outputs[0], readers, bias) if readers and _take_biases(readers) else None


def _take_biases(readers: tuple[Slot, ...]) -> bool:
    return all(takes_bias(r) for r in readers)


def takes_bias(slot: Slot) -> bool:
    """Whether a constant in front of the matrix can be moved behind it."""
    node = slot.node
    weight = constant(node.inputs[slot.weight])
    if weight is None or len(weight.shape) != 2:
        return False
    if node.op_type in ("Attention", "FusedGemm"):  # what follows the product inside: only its own bias can take it
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        width = weight.shape[1 - slot.axis]
        return bias is not None and bias.size == width and node.attributes.get_float("beta", 1.0) != 0.0
    return (node.domain, node.op_type) in _LINEAR


@dataclass(frozen=True)
class Writer:
    """The linear layer that alone makes a value, and the constants (use, axis) that hold its output features."""

    node: ir.Node
    constants: tuple[tuple[Use, int], ...]


def writer(t: Typing, value: ir.Value) -> Writer | None:
    """The layer behind ``value``, seen through biases and operators that keep the last axis; None if there is none or
    somebody else reads what it makes.
    """
    node = value.producer()
    if node is None or value.is_graph_output() or not t.shapes.known(value):
        return None
    if sum(u.node.op_type not in ("Shape", "Size") for u in value.uses()) != 1:
        return None
    width = t.shapes.shape[value][-1]
    if (slot := linear_slot(node)) is not None and is_matmul(node) and node.op_type != "FusedGemm":
        rank = len(t.shapes.shape[node.inputs[1]])  # type: ignore[index]
        columns = rank - 2 if slot.axis == rank - 1 else rank - 1
        held = [(Use(node, 1), columns)]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            if (bias := _vector(Use(node, 2), width)) is None:
                return None
            held.append(bias)
        return Writer(node, tuple(held))
    if node.op_type == "Add" and node.domain == "" and node not in t.folded_biases:
        for index in (0, 1):
            bias, other = _vector(Use(node, index), width), node.inputs[1 - index]
            found = writer(t, other) if bias is not None and other is not None else None
            if bias is not None and found is not None:
                return Writer(found.node, (*found.constants, bias))
        return None
    data = 0 if _keeps_last_axis(t, node) else _data_of_factor(t, node)
    inner = None if data is None else node.inputs[data]
    return writer(t, inner) if inner is not None else None


def _vector(use: Use, width: int) -> tuple[Use, int] | None:
    """A constant with a number a feature, and its last axis."""
    view = constant(use.value)
    fits = view is not None and view.shape[-1:] == (width,) and view.size == width
    return (use, len(view.shape) - 1) if fits and view is not None else None


def is_uniform(value: ir.Value | None) -> bool:
    view = constant(value)
    return view is not None and uniform(view)


def has_bias(node: ir.Node, bias: int | None) -> bool:
    """Whether a norm has a bias, its input `bias`, that is not zero."""
    return bias is not None and len(node.inputs) > bias and not is_zero(node.inputs[bias])


def is_zero(value: ir.Value | None) -> bool:
    """A constant of zeros, or nothing at all."""
    if value is None:
        return True
    view = constant(value)
    array = None if view is None else view.small()
    return array is not None and not array.any()
