"""Embedding tables that are also the weights of a linear layer, usually a language model's head.

Rotating offline makes two matrices of the one: the head takes in the last norm's scale, the table does not. Left alone,
it stays one matrix, at the price of two or three transforms of one row of the stream a token.
"""

from __future__ import annotations

from onnx_quarot.discovery.constants import constant
from onnx_quarot.discovery.typing import Typing, Use

REASON = "left in its basis to stay tied to the embedding table"


def keep_tied(typing: Typing) -> list[str]:
    """Block both ends of every tied table; the names of their constants."""
    tables: dict[object, list[Use]] = {}
    for node in typing.graph:
        found = constant(node.inputs[0]) if node.op_type == "Gather" and node.domain == "" else None
        if found is not None and len(found.shape) == 2 and node.attributes.get_int("axis", 0) == 0:
            tables.setdefault(found.root, []).append(Use(node, 0))
    kept = []
    for read in typing.reads:
        weight = constant(read.port.node.inputs[1])
        if weight is None or weight.root not in tables:
            continue
        for port in (Use(read.port.node, 1), *tables[weight.root]):
            typing.block_port(port, REASON)
        kept.append(str(weight.root.name))
    return list(dict.fromkeys(kept))
