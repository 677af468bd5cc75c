"""Shapes of operators that ONNX itself does not know, or infers nothing of: a function of a few lines each, from shapes
to shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

Shape = tuple[int, ...]
MICROSOFT = "com.microsoft"
CLASSIC = "ai.onnx.ml"

ContribRule = Callable[[ir.Node, dict[ir.Value, Shape]], "list[Shape | None]"]


def _input(node: ir.Node, shapes: dict[ir.Value, Shape], index: int) -> Shape | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else shapes.get(value)


def _set_head_size(node: ir.Node, shapes: dict[ir.Value, Shape], index: int, size: int) -> None:
    """Caches are exported with a symbol for the head size."""
    cache = node.inputs[index] if index < len(node.inputs) else None
    if cache is not None and cache in shapes:
        shapes[cache] = (*shapes[cache][:3], size)


def _same_as_first(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    return [_input(node, shapes, 0)]


def _skip_norm(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    x = _input(node, shapes, 0)
    return [] if x is None else [x, (*x[:-1], 1), (*x[:-1], 1), x]


def _fused_matmul(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    a, b = _input(node, shapes, 0), _input(node, shapes, 1)
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return []
    rows = a[-1] if node.attributes.get_int("transA", 0) else a[-2]
    columns = b[-2] if node.attributes.get_int("transB", 0) else b[-1]
    return [(*(a if len(a) >= len(b) else b)[:-2], rows, columns)]


def _matmul_n_bits(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    x = _input(node, shapes, 0)
    return [] if x is None else [(*x[:-1], node.attributes.get_int("N"))]


def _multi_head_attention(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    q, k, v = (_input(node, shapes, i) for i in range(3))
    if q is None or len(q) != 3 or k is None or v is None:
        return []
    heads = node.attributes.get_int("num_heads")
    width = v[2] if len(v) == 3 else v[3] * heads
    length = k[1] if len(k) == 3 else k[2]
    past = _input(node, shapes, 6)
    total = length + (past[2] if past is not None else 0)
    for index, size in ((6, q[2] // heads), (7, width // heads)):
        _set_head_size(node, shapes, index, size)
    return [(q[0], q[1], width), (q[0], heads, total, q[2] // heads), (q[0], heads, total, width // heads)]


def _attention_with_weights(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    x, weights = _input(node, shapes, 0), _input(node, shapes, 1)
    if x is None or weights is None or len(x) != 3:
        return []
    width = node.attributes.get_ints("qkv_hidden_sizes", [weights[1] // 3] * 3)[2]
    return [(x[0], x[1], width)]


def _embed_layer_norm(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    ids, table = _input(node, shapes, 0), _input(node, shapes, 2)
    if ids is None or table is None:
        return []
    y = (*ids, table[1])
    return [y, ids[:1], y]


def _group_query_attention(node: ir.Node, shapes: dict[ir.Value, Shape]) -> list[Shape | None]:
    query = shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
    past = node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or len(query) != 3:
        return []
    heads, kv_heads = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    batch, length, width = query
    size = width // (heads + 2 * kv_heads) if node.inputs[1] is None else width // heads
    total = length
    if past is not None and past in shapes:
        total += shapes[past][2]
        for index in (3, 4):
            _set_head_size(node, shapes, index, size)
    present = (batch, kv_heads, total, size)
    return [(batch, length, heads * size), present, present]


_LIKE_FIRST = (
    *("SimplifiedLayerNormalization", "RotaryEmbedding", "GroupNorm", "MoE", "QMoE"),
    *("FastGelu", "Gelu", "BiasGelu", "QuickGelu", "BiasSoftmax", "BiasAdd"),
)
# What stands in front of a network in a pipeline of scikit-learn; the results are float32, whatever enters.
_SCALERS = ("Normalizer", "Scaler")
CONTRIB: dict[tuple[str, str], ContribRule] = {
    ("", "SimplifiedLayerNormalization"): _same_as_first,
    ("onnx_quarot", "Hadamard"): _same_as_first,
    **{(MICROSOFT, name): _same_as_first for name in _LIKE_FIRST},
    **{(CLASSIC, name): _same_as_first for name in _SCALERS},
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
    (MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (MICROSOFT, "GroupQueryAttention"): _group_query_attention,
    ("onnx_quarot", "GroupQueryAttention"): _group_query_attention,
    (MICROSOFT, "FusedMatMul"): _fused_matmul,
    (MICROSOFT, "FusedGemm"): _fused_matmul,
    (MICROSOFT, "MatMulNBits"): _matmul_n_bits,
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (MICROSOFT, "Attention"): _attention_with_weights,
    (MICROSOFT, "EmbedLayerNormalization"): _embed_layer_norm,
}
