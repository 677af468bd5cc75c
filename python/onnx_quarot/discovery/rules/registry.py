"""The table itself: operator -> rule, and what rules have in common."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from onnx_quarot.discovery.constants import Constant
from onnx_quarot.discovery.typing import Typing

Rule = Callable[[Typing, ir.Node], None]
RULES: dict[tuple[str, str], Rule] = {}
MICROSOFT = "com.microsoft"


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Enter a function in the table under these operators."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, name): function for name in names})
        return function

    return register


def describe(node: ir.Node, why: str) -> str:
    """A reason, with the node it comes from."""
    return f"{node.op_type} {node.name!r}: {why}"


def along(view: Constant, rank: int, axis: int) -> bool:
    """Whether a constant, broadcast to ``rank`` dimensions, varies along ``axis`` alone."""
    own = axis - (rank - len(view.shape))
    return own >= 0 and view.size == view.shape[own]
