"""GroupQueryAttention of float32 in a compiled operator of its own.

ONNX Runtime's operator of that name spends as long on a prompt of 512 tokens as quantized linear layers do, and many
times as long as it needs on a single token. Where the library is not registered, the model's function is that operator.
"""

from __future__ import annotations

import onnx_ir as ir

from .custom_op import DOMAIN, OPSET_VERSION
from .editing import take_over

OP_TYPE = "GroupQueryAttention"
_MS = "com.microsoft"
_MAX_SIZE, _STEP = 256, 16
_NAMES = (
    *("query", "key", "value", "past_key", "past_value", "seqlens_k", "total_sequence_length"),
    *("cos_cache", "sin_cache"),
)
_FLOATS = frozenset(range(9)) - {5, 6}
# What an attribute may be, and still change nothing.
_IDLE: dict[str, tuple[object, ...]] = {
    "local_window_size": (-1,),
    "softcap": (0.0,),
    "smooth_softmax": (0, -1),
    "rotary_interleaved": (0,),
    "qk_output": (0,),
    "k_quant_type": ("NONE",),
    "v_quant_type": ("NONE",),
    "kv_cache_bit_width": (0,),
}
_READ = frozenset({"num_heads", "kv_num_heads", "scale", "do_rotary"})


def fuse_attention(model: ir.Model) -> None:
    """Replace what the operator can do: float32, causal over all keys, with caches, heads of 16, 32, ... 256 features,
    and position encodings of halves or none. Anything else stays as it is."""
    for node in tuple(model.graph):
        if (node.domain, node.op_type) == (_MS, OP_TYPE):
            _replace(model, node)


def _replace(model: ir.Model, node: ir.Node) -> None:
    size = _head_size(node)
    given = list(node.inputs[:9])
    while given and given[-1] is None:
        given.pop()
    if size is None or size % _STEP or size > _MAX_SIZE or not _is_plain(node, given):
        return
    heads, kv_heads = node.attributes.get_int("num_heads"), node.attributes.get_int("kv_num_heads")
    scale = node.attributes.get_float("scale", 0.0) or size**-0.5
    attributes: dict[str, int | float] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "head_size": size,
        "scale": scale,
    }
    overload = _function(model, attributes, tuple(value is not None for value in given))
    made = ir.node(OP_TYPE, given, attributes, domain=DOMAIN, overload=overload, num_outputs=3, name=node.name)
    model.opset_imports[DOMAIN] = OPSET_VERSION
    model.graph.insert_before(node, made)
    for old, new in zip(node.outputs, made.outputs, strict=False):
        take_over(old, new)
        # ONNX's own shape inference does not know what is in the function, but goes into those of the readers.
        new.dtype = new.dtype or ir.DataType.FLOAT
    model.graph.remove(node, safe=True)


def _is_plain(node: ir.Node, given: list[ir.Value | None]) -> bool:
    if any(value is not None for value in node.inputs[9:]) or len(node.outputs) != 3:
        return False
    if any(index < len(given) and given[index] is None for index in (0, 3, 4, 5, 6)) or len(given) < 7:
        return False
    for name, attribute in node.attributes.items():
        if name not in _READ and attribute.value not in _IDLE.get(name, ()):
            return False
    rotary = node.attributes.get_int("do_rotary", 0) == 1
    if rotary != (len(given) == 9):
        return False
    # A cache that is not quantized has the type of queries, which not all models state.
    kinds = {value.dtype for index, value in enumerate(given) if value is not None and index in _FLOATS}
    cache = given[3]
    return cache is not None and cache.dtype == ir.DataType.FLOAT and kinds <= {ir.DataType.FLOAT, None}


def _head_size(node: ir.Node) -> int | None:
    past = node.inputs[3] if len(node.inputs) > 3 else None
    if past is not None and past.shape is not None and past.shape.rank() == 4 and isinstance(past.shape[3], int):
        return past.shape[3]
    return None


def _function(model: ir.Model, attributes: dict[str, int | float], given: tuple[bool, ...]) -> str:
    rotary = len(given) == 9
    parts = [f"h{attributes['num_heads']}_{attributes['kv_num_heads']}x{attributes['head_size']}"]
    parts += [f"s{attributes['scale']:g}", "apart" if given[1] else "packed"] + (["rotary"] if rotary else [])
    overload = "_".join(parts)
    key = (DOMAIN, OP_TYPE, overload)
    if key not in model.functions:
        kinds = [ir.DataType.FLOAT if i in _FLOATS else ir.DataType.INT32 for i in range(len(given))]
        inputs = [ir.Value(name=n, type=ir.TensorType(k)) for n, k in zip(_NAMES, kinds, strict=False)]
        known = {name: attributes[name] for name in ("num_heads", "kv_num_heads", "scale")}
        body = ir.node(
            OP_TYPE,
            [value if is_given else None for value, is_given in zip(inputs, given, strict=True)],
            {**known, "do_rotary": int(rotary)},
            domain=_MS,
            num_outputs=3,
        )
        for output, name in zip(body.outputs, ("output", "present_key", "present_value"), strict=True):
            output.name = name
        imports = {"": model.opset_imports[""], _MS: 1}
        graph = ir.Graph(inputs, body.outputs, nodes=[body], opset_imports=imports, name=overload)
        # Declared for the nodes that carry them; their values are in the body already.
        declared = [ir.AttrInt64(name, int(value)) for name, value in attributes.items() if name != "scale"]
        declared.append(ir.AttrFloat32("scale", attributes["scale"]))
        model.functions[key] = ir.Function(DOMAIN, OP_TYPE, overload, graph=graph, attributes=declared)
    return overload
