"""Where a graph has linear layers: a MatMul or Gemm whose second operand is a constant matrix."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .editing import has_subgraphs
from .errors import ConfigError
from .load import unmap

Array = npt.NDArray[Any]

LINEAR_OPS = ("MatMul", "Gemm")
_VIEW_OPS = ("Transpose", "Cast", "Identity")
_OTHER_LAYERS = ("Conv", "ConvTranspose", "GRU", "LSTM", "RNN")


@dataclass(frozen=True)
class LinearSite:
    """One linear layer.

    node_name: the node's name, or its output's where it has none. activation: the value it reads. weight: the
    constant at the root of its second operand (an initializer, or a Constant node's output), reached through
    the nodes `view` (Transpose, Cast, Identity), root first. channels, depth: output and input features.
    """

    node_name: str
    op_type: str
    activation: str
    weight: str
    channels: int
    depth: int
    node: ir.Node = field(repr=False, compare=False)
    root: ir.Value = field(repr=False, compare=False)
    view: tuple[ir.Node, ...] = field(repr=False, compare=False, default=())

    @property
    def input(self) -> ir.Value:
        """The value the node reads its activations from."""
        return _input(self.node, 0)

    @property
    def operand(self) -> ir.Value:
        """The value the node reads its weight from."""
        return _input(self.node, 1)

    @property
    def channel_axis(self) -> int:
        """The axis of the operand that counts output channels."""
        return 0 if self.op_type == "Gemm" and self.node.attributes.get_int("transB", 0) != 0 else 1

    @property
    def dtype(self) -> ir.DataType:
        """Element type of the operand."""
        return constant_dtype(self.root, self.view)

    @property
    def alpha(self) -> float:
        """Gemm's factor of the product, 1 for a MatMul."""
        return self.node.attributes.get_float("alpha", 1.0) if self.op_type == "Gemm" else 1.0

    @property
    def beta(self) -> float:
        """Gemm's factor of the bias, 1 for a MatMul."""
        return self.node.attributes.get_float("beta", 1.0) if self.op_type == "Gemm" else 1.0

    @property
    def transposes_input(self) -> bool:
        """Whether a Gemm reads its activations transposed."""
        return self.op_type == "Gemm" and bool(self.node.attributes.get_int("transA", 0))

    def weight_key(self) -> tuple[object, ...]:
        """Equal for sites whose products use the same matrix."""
        return self.root, self.view_signature(), self.channel_axis, self.alpha

    def view_signature(self) -> tuple[object, ...]:
        """Equal for two sites that see the same matrix in the same root."""
        return tuple(
            (node.op_type, *_permutation(node, 2))
            if node.op_type == "Transpose"
            else (node.op_type, node.attributes.get_int("to", 0))
            for node in self.view
            if node.op_type != "Identity"
        )


def linear_sites(
    model: ir.Model, op_types: Sequence[str] = LINEAR_OPS, exclude: Sequence[str] = (), others: Sequence[str] = ()
) -> list[LinearSite]:
    """All linear layers of the main graph in graph order.

    A site is recognised by structure: the second operand is a constant of rank 2, directly or through
    Transpose, Cast or Identity, and the first is not constant. op_types: which operators to take, of MatMul
    and Gemm. exclude: node names to leave out, exact, as fnmatch patterns, or as regular expressions, which
    begin with ^; each must match some site, or one of the names `others`, else ConfigError. Layers inside If, Loop and
    Scan are not looked at.
    """
    for op_type in op_types:
        if op_type not in LINEAR_OPS:
            raise ConfigError(f"op_types: {op_type!r} is not supported; use some of {', '.join(LINEAR_OPS)}")
    sites = [site for node in model.graph if node.op_type in op_types and (site := _site(node)) is not None]
    dropped: set[str] = set()
    names = [*(site.node_name for site in sites), *others]
    for pattern in exclude:
        matched = matching(names, pattern)
        if not matched:
            raise ConfigError(f"exclude: {pattern!r} matches no linear layer of the model ({len(sites)} found)")
        dropped |= matched
    return [site for site in sites if site.node_name not in dropped]


def why_no_layers(model: ir.Model) -> str:
    """A clause for an error about a model without linear layers: where they are, if there are any."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type in LINEAR_OPS and node.domain == ""]
    inner = sum(node.graph is not model.graph and _site(node) is not None for node in nodes)
    if inner:
        holders = sorted({node.op_type for node in model.graph if has_subgraphs(node)})
        advice = (
            "of a decoder that was merged from one for the first token and one for further ones, take these two"
            if holders == ["If"]
            else "take the model that was put into it, and put the result in its place"
        )
        return f"; {inner} are inside subgraphs ({', '.join(holders)}), which are left alone: {advice}"
    weights = [node.inputs[1] for node in nodes if len(node.inputs) > 1]
    given = sum(v is not None and v.is_initializer() and v.is_graph_input() for v in weights)
    if given:
        return (
            f"; {given} have a matrix that is an input of the graph too, and may be given any value: export the model "
            "with keep_initializers_as_inputs=False"
        )
    others = Counter(node.op_type for node in model.graph.all_nodes() if node.domain == "")
    found = [f"{others[op_type]} {op_type}" for op_type in _OTHER_LAYERS if others[op_type]]
    return f"; its weights are those of {' and '.join(found)}, which stay in floating point" if found else ""


def matching(names: Sequence[str], pattern: str) -> set[str]:
    """The names that an entry of `exclude` means: itself if it is one of them, else those that fit it."""
    if pattern in names:
        return {pattern}
    if not pattern.startswith("^"):
        return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    try:
        return {name for name in names if re.search(pattern, name)}
    except re.error as error:
        raise ConfigError(f"exclude: {pattern!r} is no regular expression ({error})") from None


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or of a Constant node; else None."""
    if value is None:
        return None
    if value.is_initializer() and not value.is_graph_input():
        return value.const_value
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.domain == "":
        attribute = producer.attributes.get("value")
        return attribute.as_tensor() if attribute is not None else None
    return None


def constant_root(value: ir.Value | None) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """The constant a value is a view of, and the view's nodes from the root on; None for no constant."""
    view: list[ir.Node] = []
    while value is not None and constant_tensor(value) is None:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _VIEW_OPS:
            return None
        view.append(node)
        value = node.inputs[0]
    return None if value is None else (value, tuple(reversed(view)))


def looked_up(node: ir.Node) -> tuple[ir.Value, tuple[ir.Node, ...]] | None:
    """The constant a Gather looks rows up in, and its view as of :func:`constant_root`; None for any other node.

    Rows that are themselves chosen by a constant are part of the model, not looked up.
    """
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return None
    return None if constant_root(node.inputs[1]) is not None else constant_root(node.inputs[0])


def constant_array(value: ir.Value | None) -> Array | None:
    """The values of a constant or of a view of one; None if it is not constant."""
    found = constant_root(value)
    if found is None:
        return None
    root, view = found
    tensor = constant_tensor(root)
    assert tensor is not None
    return apply_view(tensor.numpy(), view)


def apply_view(array: Array, view: Sequence[ir.Node]) -> Array:
    """What a view makes of its root's values."""
    for step in (_step(node) for node in view):
        array = array if step is None else step(array)
    return array


class WeightSource:
    """The matrix a site multiplies by, whatever becomes of its constant in the graph meanwhile."""

    def __init__(self, site: LinearSite) -> None:
        tensor = constant_tensor(site.root)
        assert tensor is not None
        self.name, self.depth, self.channels = site.weight, site.depth, site.channels
        self._tensor, self._view = tensor, site.view
        self._transposed, self._alpha = site.channel_axis == 0, site.alpha

    def read(self) -> Array:
        """[depth, channels], float32, Gemm's alpha included; it may be mapped memory."""
        return self.operand().T if self._transposed else self.operand()

    def operand(self) -> Array:
        """The same as the node has it: [channels, depth] for a Gemm that transposes it."""
        array = apply_view(self._tensor.numpy(), self._view)
        return array if self._alpha == 1.0 else array * np.float32(self._alpha)

    def close(self) -> None:
        """Unmap what was mapped; reading again maps it again."""
        unmap(self._tensor)


def constant_dtype(root: ir.Value, view: Sequence[ir.Node]) -> ir.DataType:
    """Element type at the end of a view."""
    tensor = constant_tensor(root)
    assert tensor is not None
    dtype = tensor.dtype
    for node in view:
        if node.op_type == "Cast":
            dtype = ir.DataType(node.attributes.get_int("to", int(dtype)))
    return dtype


def _site(node: ir.Node) -> LinearSite | None:
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    found = constant_root(node.inputs[1])
    if found is None or constant_root(node.inputs[0]) is not None:
        return None
    root, view = found
    shape = view_shape(root, view)
    if len(shape) != 2:
        return None
    depth, channels = shape
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        depth, channels = channels, depth
    if depth == 0 or channels == 0:
        return None
    return LinearSite(
        node_name=node.name or node.outputs[0].name or "",
        op_type=node.op_type,
        activation=node.inputs[0].name or "",
        weight=root.name or "",
        channels=channels,
        depth=depth,
        node=node,
        root=root,
        view=view,
    )


def view_shape(root: ir.Value, view: Sequence[ir.Node]) -> list[int]:
    """Shape at the end of a view."""
    tensor = constant_tensor(root)
    assert tensor is not None
    shape = list(tensor.shape.numpy())
    for node in view:
        if node.op_type == "Transpose":
            shape = [shape[axis] for axis in _permutation(node, len(shape))]
    return shape


def _step(node: ir.Node) -> Callable[[Array], Array] | None:
    if node.op_type == "Transpose":
        return lambda array: array.transpose(_permutation(node, array.ndim))
    if node.op_type == "Cast":
        dtype = np.dtype(ir.DataType(node.attributes.get_int("to", int(ir.DataType.FLOAT))).numpy())
        return lambda array: array.astype(dtype, copy=False)
    return None


def _permutation(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", range(rank)[::-1]))


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def readers(value: ir.Value) -> Iterator[ir.Node]:
    """Each node that reads a value, once."""
    return iter(dict.fromkeys(node for node, _ in value.uses()))


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    """Remove a constant, or a view of one, that nothing reads any more, and what only it read."""
    if value.uses() or value.is_graph_output():
        return
    if value.name is not None and value.name in graph.initializers:
        del graph.initializers[value.name]
        return
    node = value.producer()
    if node is None:
        return
    sources = list(dict.fromkeys(source for source in node.inputs if source is not None))
    graph.remove(node, safe=True)
    for source in sources:
        drop_unused(graph, source)
