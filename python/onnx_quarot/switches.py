"""Parts of a graph that can be switched between two forms from run to run, by an input of flags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .editing import GraphNames

FLAGS = "onnx_quarot.flags"


class Switches:
    """`If(flags[i])` for i from 0 to `count` - 1; the flags, [count] booleans, are the graph's last input, `FLAGS`."""

    def __init__(self, names: GraphNames, count: int) -> None:
        self._names = names
        self._flags = ir.Value(name=FLAGS, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([count]))
        names.graph.inputs.append(self._flags)

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
        index = self._names.initializer(ir.Tensor(np.array(number, np.int64)), f"{prefix}.index")
        flag = ir.node("Gather", [self._flags, index], {"axis": 0})
        flag.outputs[0].name, flag.name = f"{prefix}.flag", f"{prefix}.Gather"
        switch = ir.node("If", [flag.outputs[0]], {"then_branch": branches[0], "else_branch": branches[1]})
        switch.outputs[0].name, switch.name = f"{prefix}.result", f"{prefix}.If"
        switch.outputs[0].type = ends[0].type
        return flag, switch
