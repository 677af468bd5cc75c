"""Embedding tables that are also the weights of a linear layer, usually a language model's head.

Rotating offline makes two matrices of the one: the head takes in the last norm's scale, the table does not. They stay
one matrix if the scale stays where it is. The stream then goes back to its basis in front of that norm, and is rotated
again behind it, for the head: one or two transforms of a row a token. Where table and head cannot have the same basis
(the table also loses its mean, for LayerNorms), both keep their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.labels import Labels
from onnx_quarot.discovery.rules.readers import is_uniform, is_zero
from onnx_quarot.discovery.typing import Kind, Read, Scale, Typing, Use

APART = "left in its basis to stay tied to the embedding table"
AHEAD = "its scale would become part of a layer that is tied to the embedding table"


@dataclass(frozen=True)
class TiedHead:
    """A linear layer and the tables it shares its constant with."""

    name: str
    read: Read
    tables: tuple[Use, ...]

    @property
    def weight(self) -> Use:
        return Use(self.read.slot.node, self.read.slot.weight)


def tied_heads(typing: Typing) -> list[TiedHead]:
    """Every linear layer of the graph whose weight is also looked up."""
    tables: dict[object, list[Use]] = {}
    for node in typing.graph:
        found = constant(node.inputs[0]) if node.op_type == "Gather" and node.domain == "" else None
        if found is not None and len(found.shape) == 2 and node.attributes.get_int("axis", 0) == 0:
            tables.setdefault(found.root, []).append(Use(node, 0))
    heads = []
    for read in typing.reads:
        weight = constant(read.slot.node.inputs[read.slot.weight])
        if weight is not None and weight.root in tables:
            heads.append(TiedHead(str(weight.root.name), read, tuple(tables[weight.root])))
    return heads


def share_basis(typing: Typing, heads: list[TiedHead]) -> None:
    """Give both ends of every tie the same basis, and leave the scales in front of the heads alone."""
    for head in heads:
        if not all(_same_features(head, table) for table in head.tables):
            keep_basis(typing, [head])
            continue
        for table in head.tables:
            typing.tie(head.weight, head.read.slot.axis, table, 1, Kind.SHARED)
        for scale in typing.scales:
            if head.read.slot in scale.readers and _folds(scale):
                typing.block(scale.out, -1, AHEAD)


def keep_basis(typing: Typing, heads: list[TiedHead]) -> None:
    """Block both ends of every tie."""
    for head in heads:
        for port in (head.weight, *head.tables):
            typing.block_port(port, APART)


def agree(typing: Typing, labels: Labels, heads: list[TiedHead]) -> bool:
    """Whether what is decided leaves each tie one matrix."""
    return not any(labels.any_rotated(table, 1) and labels.centred(table, 1) for head in heads for table in head.tables)


def _same_features(head: TiedHead, table: Use) -> bool:
    weight, rows = constant(head.weight.value), constant(table.value)
    assert weight is not None
    assert rows is not None
    same = weight.permutation[head.read.slot.axis] == rows.permutation[1]
    return same and weight.dtype == rows.dtype


def _folds(scale: Scale) -> bool:
    biased = scale.bias is not None and not is_zero(scale.bias.value)
    return scale.data is not None or biased or not is_uniform(scale.factor.value)
