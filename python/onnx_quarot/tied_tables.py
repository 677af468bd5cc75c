"""One quantized matrix for a table of embeddings and the linear layer that shares it.

Rows of the table are columns of the layer's integer weight: they are looked up there, in whatever form the layer
stores it, and scaled after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx_ir as ir

from .editing import GraphNames, take_over
from .save import Alias
from .sites import LinearSite, constant_root, drop_unused, looked_up

_APART_BYTES = 1 << 20  # smaller tables do not make two files of one


class Layout(Enum):
    """How integers of a weight [depth, channels] are stored; a table's rows are its channels."""

    COLUMNS = "[depth, channels], with scales [channels]"
    BLOCKS = "[channels, blocks, block], with scales [channels, blocks]"
    PANELS = "[channels / 16, depth / 4, 16, 4], filled up with zeros, with scales [channels]"


@dataclass(frozen=True)
class SharedWeight:
    """The integers of a linear layer's weight where a table can read them.

    zero: the code of zero, or such codes, [channels, blocks] stored like the weight's. bits: 8, or 4 in blocks: two
    codes a byte, lower half first.
    """

    site: LinearSite
    codes: ir.Value
    scales: ir.Value
    zero: int | ir.Value
    layout: Layout
    bits: int = 8

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """The scales' dimensions."""
        assert self.scales.shape is not None
        return tuple(self.scales.shape.numpy())


def tied_roots(model: ir.Model, sites: Sequence[LinearSite]) -> set[ir.Value]:
    """The constants of `sites` that tables look up in the same orientation, and that can hence be shared."""
    by_root = {site.root: site for site in sites if site.alpha == 1.0}
    found = set()
    for node in model.graph:
        root = _table_root(node)
        if root in by_root and root is not None and _transposed(node, by_root[root]):
            found.add(root)
    return found


def share_tables(model: ir.Model, shared: Iterable[SharedWeight]) -> list[tuple[str, SharedWeight]]:
    """Let tables read the integers of the layers they are tied to, in place; the tables' node names."""
    by_root = {weight.site.root: weight for weight in shared}
    done = []
    names = GraphNames(model.graph)
    for node in tuple(model.graph):
        root = _table_root(node)
        if root is None or root not in by_root or not _transposed(node, by_root[root].site):
            continue
        _replace(model.graph, names, node, by_root[root])
        done.append((node.name or "", by_root[root]))
    return done


def read_apart(model: ir.Model, shared: Iterable[SharedWeight]) -> None:
    """Let large tables read the columns of a product with 16-bit activations under a name of their own.

    ONNX Runtime has no such product: it makes MatMulNBits of one, if nothing else reads the constant of its weight, and
    otherwise dequantizes the whole weight in every run.
    """
    names = GraphNames(model.graph)
    for weight in shared:
        tensor = weight.codes.const_value
        if weight.layout is not Layout.COLUMNS or tensor is None or tensor.nbytes < _APART_BYTES:
            continue
        tables = [use for use in weight.codes.uses() if use.node.op_type == "Gather"]
        if tables and any(
            _is_wide(reader.node) for use in weight.codes.uses() for reader in use.node.outputs[0].uses()
        ):
            apart = names.initializer(Alias(tensor), f"{weight.codes.name}_rows")
            for use in tables:
                use.node.replace_input_with(use.idx, apart)


def _is_wide(product: ir.Node) -> bool:
    """Whether a node's first input was dequantized from 16 bits."""
    made = product.inputs[0].producer() if product.inputs and product.inputs[0] is not None else None
    if made is None or made.op_type != "DequantizeLinear" or made.inputs[0] is None:
        return False
    return made.inputs[0].dtype in (ir.DataType.UINT16, ir.DataType.INT16)


def _table_root(node: ir.Node) -> ir.Value | None:
    """The constant a Gather of rows looks up, where the rank of its indices is known."""
    found = looked_up(node)
    if found is None or node.inputs[1] is None or node.inputs[1].shape is None:
        return None
    return found[0]


def _transposed(node: ir.Node, site: LinearSite) -> bool:
    """Whether the table is the transpose of the site's matrix [depth, channels]."""
    found = constant_root(node.inputs[0])
    assert found is not None
    table, layer = _flipped(found[1]), _flipped(site.view)
    if table is None or layer is None:
        return False
    return table != (layer != (site.channel_axis == 0))


def _flipped(view: Sequence[ir.Node]) -> bool | None:
    """Whether a view of a matrix transposes it; None for one that also changes its values' type."""
    flipped = False
    for node in view:
        if node.op_type == "Cast":
            return None
        if node.op_type == "Transpose":
            flipped ^= list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]
    return flipped


def _replace(graph: ir.Graph, names: GraphNames, node: ir.Node, weight: SharedWeight) -> None:
    table, ids = node.inputs[0], node.inputs[1]
    assert table is not None
    assert ids is not None
    lookup = _Lookup(names, node.name or "Gather", ids, weight)
    rows = lookup.rows()
    graph.insert_before(node, lookup.nodes)
    take_over(node.outputs[0], rows)
    graph.remove(node, safe=True)
    drop_unused(graph, table)


class _Lookup:
    """The nodes that look rows of a table up in a layer's integers."""

    def __init__(self, names: GraphNames, base: str, ids: ir.Value, weight: SharedWeight) -> None:
        assert ids.shape is not None
        self._names, self._base, self._ids, self._weight = names, base, ids, weight
        self._rank = len(ids.shape)
        self.nodes: list[ir.Node] = []

    def rows(self) -> ir.Value:
        """float32 [*ids, depth]."""
        weight, real = self._weight, ir.DataType.FLOAT
        find = {Layout.COLUMNS: self._from_columns, Layout.BLOCKS: self._from_blocks, Layout.PANELS: self._from_panels}
        values = self._add("Cast", [find[weight.layout]()], real, to=int(real))
        if weight.zero != 0:
            values = self._add("Sub", [values, self._zero()], real)
        # With an axis more before they are looked up: of a constant, that is done once.
        scales = self._add("Unsqueeze", [weight.scales, self._integers([-1], "axis")], real)
        scales = self._add("Gather", [scales, self._ids], real, axis=0)
        rows = self._add("Mul", [values, scales], real)
        if weight.layout is Layout.BLOCKS:
            rows = self._add("Reshape", [rows, self._integers([0] * self._rank + [weight.site.depth], "shape")], real)
        return rows

    def _from_columns(self) -> ir.Value:
        columns = self._add("Gather", [self._weight.codes, self._ids], self._stored, axis=1)
        return self._add("Transpose", [columns], self._stored, perm=[*range(1, self._rank + 1), 0])

    def _from_blocks(self) -> ir.Value:
        weight = self._weight
        codes = self._add("Gather", [weight.codes, self._ids], self._stored, axis=0)
        return codes if weight.bits == 8 else self._halves(codes, [weight.scales_shape[1], -1])

    def _zero(self) -> ir.Value:
        weight, real = self._weight, ir.DataType.FLOAT
        if isinstance(weight.zero, int):
            return self._constant(np.float32(weight.zero), "zero")
        blocks = weight.scales_shape[1]
        found = self._add("Gather", [weight.zero, self._ids], self._stored, axis=0)
        if weight.bits == 4:
            found = self._halves(found, [-1])
            if blocks % 2:
                found = self._slice(found, blocks)
        zeros = self._add("Cast", [found], real, to=int(real))
        return self._add("Unsqueeze", [zeros, self._integers([-1], "axis")], real)

    def _halves(self, codes: ir.Value, shape: list[int]) -> ir.Value:
        """Both halves of every byte beside one another, in `shape` behind the ids' axes."""
        sixteen = self._constant(np.uint8(16), "half")
        high = self._add("Div", [codes, sixteen], self._stored)
        low = self._add("Sub", [codes, self._add("Mul", [high, sixteen], self._stored)], self._stored)
        last = self._integers([-1], "axis")
        pair = [self._add("Unsqueeze", [half, last], self._stored) for half in (low, high)]
        both = self._add("Concat", pair, self._stored, axis=-1)
        return self._add("Reshape", [both, self._integers([0] * self._rank + shape, "shape")], self._stored)

    def _slice(self, rows: ir.Value, length: int) -> ir.Value:
        ends = [self._integers([number], name) for number, name in ((0, "start"), (length, "end"), (-1, "axis"))]
        return self._add("Slice", [rows, *ends], self._stored)

    def _from_panels(self) -> ir.Value:
        """Channel c is every fourth of features at [c / 16, :, c mod 16]."""
        site, whole = self._weight.site, ir.DataType.INT64
        steps = -(-site.depth // 4)
        ids = self._add("Cast", [self._ids], whole, to=int(whole))
        # Counted from the end where negative, as Gather has it; the scales' own Gather refuses what is out of range.
        ids = self._add("Mod", [ids, self._integers(site.channels, "channels")], whole)
        column = self._add("Unsqueeze", [ids, self._integers([-2, -1], "axes")], whole)
        # [panel, 0, lane], for all ids at once: id / 16, id / channels, id / 1; then modulo channels, 1, 16.
        digits = self._add("Div", [column, self._integers([16, site.channels, 1], "units")], whole)
        digits = self._add("Mod", [digits, self._integers([site.channels, 1, 16], "sizes")], whole)
        places = self._integers(np.stack([np.zeros(steps), np.arange(steps), np.zeros(steps)], axis=1), "steps")
        places = self._add("Add", [digits, places], whole)
        fours = self._add("GatherND", [self._weight.codes, places], self._stored)
        shape = self._integers([0] * self._rank + [4 * steps], "shape")
        rows = self._add("Reshape", [fours, shape], self._stored)
        if site.depth == 4 * steps:
            return rows
        return self._slice(rows, site.depth)

    @property
    def _stored(self) -> ir.DataType:
        dtype = self._weight.codes.dtype
        assert dtype is not None
        return dtype

    def _add(
        self, op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: int | list[int]
    ) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, name=self._names.unique(f"{self._base}_{op_type}"))
        made.outputs[0].name = self._names.unique(f"{self._base}_{op_type}_output")
        made.outputs[0].type = ir.TensorType(dtype)
        self.nodes.append(made)
        return made.outputs[0]

    def _constant(self, array: object, name: str) -> ir.Value:
        return self._names.initializer(ir.Tensor(np.asarray(array)), f"{self._base}_{name}")

    def _integers(self, values: object, name: str) -> ir.Value:
        return self._constant(np.asarray(values).astype(np.int64), name)
