"""Parts of a graph that can be switched between two forms from run to run, by an input of flags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

FLAGS = "onnx_quarot.flags"


class Switches:
    """`If(flags[i])` for i from 0 to `count` - 1; the flags, [count] booleans, are the graph's last input, `FLAGS`."""

    def __init__(self, model: ir.Model, count: int) -> None:
        self._model = model
        self._flags = ir.Value(name=FLAGS, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([count]))
        model.graph.inputs.append(self._flags)

    def nodes(
        self, number: int, on: Sequence[ir.Node], off: Sequence[ir.Node], ends: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Node, ir.Node]:
        """The nodes that read flag `number` and switch; the output of the second is what `ends` are in either form.

        on, off: nodes in no graph yet, which may read values of the graph; their outputs are renamed. ends: the result
        of each. The caller places the two nodes.
        """
        prefix = f"onnx_quarot.switch.{number}"
        branches = []
        for key, nodes, end in zip(("on", "off"), (on, off), ends, strict=True):
            for position, value in enumerate(v for node in nodes for v in node.outputs):
                value.name = f"{prefix}.{key}.{position}"
            branches.append(ir.Graph([], [end], nodes=nodes, name=f"{prefix}.{key}"))
        flag = ir.node("Gather", [self._flags, self._constant(f"{prefix}.index", number)], {"axis": 0})
        flag.outputs[0].name, flag.name = f"{prefix}.flag", f"{prefix}.Gather"
        switch = ir.node("If", [flag.outputs[0]], {"then_branch": branches[0], "else_branch": branches[1]})
        switch.outputs[0].name, switch.name = f"{prefix}.result", f"{prefix}.If"
        switch.outputs[0].type = ends[0].type
        return flag, switch

    def _constant(self, name: str, number: int) -> ir.Value:
        return constant(self._model.graph, name, ir.Tensor(np.array(number, np.int64)))


def constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer called `name`, which must be free."""
    tensor.name = name
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(list(tensor.shape.numpy())),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
