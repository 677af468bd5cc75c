"""One quantized matrix for a table of embeddings and the linear layer that shares it.

Rows of the table are columns of the layer's integer weight: they are looked up there, in whatever form the layer
stores it, and scaled after.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .editing import GraphNames, take_over
from .sites import LinearSite, constant_root, drop_unused


@dataclass(frozen=True)
class SharedWeight:
    """The integers of a linear layer's weight where a table can read them.

    codes: [depth, channels] with scales [channels], or, in blocks, [channels, blocks, block] of 8 bits with scales
    [channels, blocks]. zero: the code of zero.
    """

    site: LinearSite
    codes: ir.Value
    scales: ir.Value
    zero: int
    in_blocks: bool


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


def _table_root(node: ir.Node) -> ir.Value | None:
    """The constant a Gather of rows looks up, where the rank of its indices is known."""
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return None
    ids = node.inputs[1]
    found = constant_root(node.inputs[0])
    if found is None or ids is None or ids.shape is None or constant_root(ids) is not None:
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
    assert ids.shape is not None
    rank = len(ids.shape)
    base = node.name or "Gather"
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: Sequence[ir.Value], dtype: ir.DataType, **attributes: int | list[int]) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, name=names.unique(f"{base}_{op_type}"))
        made.outputs[0].name = names.unique(f"{base}_{op_type}_output")
        made.outputs[0].type = ir.TensorType(dtype)
        nodes.append(made)
        return made.outputs[0]

    def constant(array: object, name: str) -> ir.Value:
        return names.initializer(ir.Tensor(np.asarray(array)), f"{base}_{name}")

    stored = weight.codes.dtype
    assert stored is not None
    if weight.in_blocks:
        codes = add("Gather", [weight.codes, ids], stored, axis=0)
    else:
        columns = add("Gather", [weight.codes, ids], stored, axis=1)
        codes = add("Transpose", [columns], stored, perm=[*range(1, rank + 1), 0])
    values = add("Cast", [codes], ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
    if weight.zero:
        values = add("Sub", [values, constant(np.float32(weight.zero), "zero")], ir.DataType.FLOAT)
    scales = add("Gather", [weight.scales, ids], ir.DataType.FLOAT, axis=0)
    scales = add("Unsqueeze", [scales, constant(np.array([-1], np.int64), "axis")], ir.DataType.FLOAT)
    rows = add("Mul", [values, scales], ir.DataType.FLOAT)
    if weight.in_blocks:
        shape = constant(np.array([0] * rank + [weight.site.depth], np.int64), "shape")
        rows = add("Reshape", [rows, shape], ir.DataType.FLOAT)
    graph.insert_before(node, nodes)
    take_over(node.outputs[0], rows)
    graph.remove(node, safe=True)
    drop_unused(graph, table)
