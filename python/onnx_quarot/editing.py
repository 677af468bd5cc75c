"""Adding values to a graph under names that are free."""

from __future__ import annotations

import onnx_ir as ir


class GraphNames:
    """Makes values of one graph; remembers the names in use, of nodes as well as of values."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._taken = {value.name for value in graph.inputs} | set(graph.initializers)
        for node in graph.all_nodes():
            self._taken |= {node.name, *(value.name for value in node.outputs)}

    def unique(self, name: str) -> str:
        """`name`, or it with a number, whichever is free; taken from now on."""
        candidate, count = name, 1
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def value(self, name: str, dtype: ir.DataType, shape: ir.Shape | None = None) -> ir.Value:
        """A new value."""
        return ir.Value(name=self.unique(name), type=ir.TensorType(dtype), shape=shape)

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """A new initializer that holds `tensor`, which gets its name."""
        value = self.value(name, tensor.dtype, ir.Shape(list(tensor.shape.numpy())))
        tensor.name = value.name
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Put `nodes` behind what makes `value`; in front of all others where nothing does."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(graph[0], nodes)


def numbered(graph: ir.Graph) -> list[ir.Node]:
    """The nodes of a graph in their order, and behind them those of the graphs inside (If, Loop, Scan), which read what
    the graph makes: a plan's numbers of nodes.
    """
    return [*graph, *(node for node in graph.all_nodes() if node.graph is not graph)]


def has_subgraphs(node: ir.Node) -> bool:
    """Whether a node holds graphs of its own: If, Loop, Scan."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(isinstance(a, ir.Attr) and a.type in kinds for a in node.attributes.values())


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand wherever `old` stood, under its name, as an output of the graph too."""
    new.name, old.name = old.name, None
    new.type, new.shape = old.type or new.type, new.shape if old.shape is None else old.shape
    for reader, index in tuple(old.uses()):
        reader.replace_input_with(index, new)
    node = old.producer()
    graph = None if node is None else node.graph
    if isinstance(graph, ir.Graph):
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = new
