"""Old models in a newer opset, so that the operators of a scheme exist in it."""

from __future__ import annotations

import onnx_ir as ir
from onnx import defs, version_converter
from onnx.helper import find_min_ir_version_for, make_opsetid
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from onnx_quarot.errors import ModelError, first_line

_APART = "onnx_quarot.as_it_is"  # the domain of nodes that the converter is to leave alone
_SMALL = 1 << 12  # bytes of a constant that a conversion may have to know, such as axes that become an input


def at_opset(model: ir.Model, version: int) -> ir.Model:
    """The model in opset ``version``, as ONNX's converter makes it; the model itself if it is not older.

    Names of nodes and tensors stay, and so do the weights: they are not part of what is converted, and are neither read
    nor copied. Else the model is used up. Raises ModelError if the converter refuses it.
    """
    opset = model.opset_imports.get("", 0)
    if opset >= version:
        return model
    held = {
        name: tensor
        for name, value in model.graph.initializers.items()
        if (tensor := value.const_value) is not None
        and not value.is_graph_input()
        and (tensor.nbytes > _SMALL or isinstance(tensor, ir.ExternalTensor))
    }
    for name, tensor in held.items():
        value = model.graph.initializers.pop(name)
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        model.graph.inputs.append(value)
    for node in [n for n in model.graph.all_nodes() if n.domain == "" and _is_of_the_runtime(n.op_type, opset)]:
        node.domain = _APART
        model.opset_imports[_APART] = 1
    try:
        converted = ir.from_proto(version_converter.convert_version(ir.to_proto(model), version))
    except Exception as error:  # the converter's exceptions share no base class
        # What older converters say of an operator that they do not know does not name it.
        unknown = sorted({n.op_type for n in model.graph.all_nodes() if n.domain == "" and not defs.has(n.op_type)})
        why = f"it knows no {', '.join(unknown)}" if unknown else first_line(error)
        raise ModelError(
            f"model: opset {opset} is too old, opset {version} is needed, and onnx.version_converter does not convert "
            f"the model ({why}); export it with opset {version} or later"
        ) from error
    for node in converted.graph.all_nodes():
        node.domain = "" if node.domain == _APART else node.domain
    converted.opset_imports.pop(_APART, None)
    for value in [v for v in converted.graph.inputs if v.name in held]:
        converted.graph.inputs.remove(value)
        value.const_value = held[str(value.name)]
        converted.graph.register_initializer(value)
    for key, function in model.functions.items():
        converted.functions.setdefault(key, function)
    converted.ir_version = max(converted.ir_version, find_min_ir_version_for([make_opsetid("", version)]))
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(converted)
    return converted


def _is_of_the_runtime(op_type: str, opset: int) -> bool:
    """Whether an operator in ONNX's domain is ONNX Runtime's, the same in every opset: its optimizer and its model
    builder write them into models of any. The converter knows LayerNormalization from 17 on.
    """
    return op_type == "SimplifiedLayerNormalization" or (op_type == "LayerNormalization" and opset < 17)
