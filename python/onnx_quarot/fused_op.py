"""The operators that transform and quantize at once, and the functions that run them anywhere.

``HadamardQuantizeLinear`` quantizes by a scale and a zero point that are known, ``HadamardDynamicQuantizeLinear`` each
row by its own largest magnitude. As for ``Hadamard`` (see :mod:`onnx_quarot.custom_op`), a model carries their function
bodies, and a session with the library registered runs the compiled operators instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_quarot.errors import ModelError
from onnx_quarot.portable import DOMAIN, Body, Transform, check_input

__all__ = ["add_hadamard_dynamic_quantize_linear", "add_hadamard_quantize_linear"]

_ZERO_POINTS = {ir.DataType.INT8: "_int8", ir.DataType.UINT8: "_uint8"}
# Rows without a magnitude of this size have no scale of their own; the compiled operator draws the same line.
_SMALLEST = 2.0**-100


def add_hadamard_quantize_linear(
    model: ir.Model,
    x: ir.Value,
    y_scale: ir.Value,
    y_zero_point: ir.Value,
    *,
    size: int,
    block_size: int | None = None,
    signs: npt.NDArray[Any] | None = None,
    transpose: bool = False,
    scale: float | None = None,
    name: str,
) -> ir.Node:
    """Make a node for ``QuantizeLinear(Hadamard(x), y_scale, y_zero_point)`` and what the model needs to hold for it.

    The caller places the node in a graph.

    Args:
        model, size, block_size, signs, transpose, scale, name: as in :func:`onnx_quarot.custom_op.add_hadamard`.
        x: float32, ``[..., size]``.
        y_scale: float32, one element, positive.
        y_zero_point: int8 or uint8, one element; its type is that of the output.

    The compiled operator multiplies where the function divides, so that a quotient half way between two integers may
    round either way.

    Raises:
        OrderError: the block size does not divide ``size``, or has no Hadamard matrix.
        ModelError: the type or shape of an input does not fit.
    """
    check_input(x, size, name, (ir.DataType.FLOAT,))
    if y_zero_point.dtype not in _ZERO_POINTS:
        kind = "unknown" if y_zero_point.dtype is None else y_zero_point.dtype.name
        raise ModelError(
            f"{name}: the type of y_zero_point ({y_zero_point.name!r}) is {kind}: it must be INT8 or UINT8"
        )
    transform = Transform.make(size, block_size, signs, transpose, scale, ir.DataType.FLOAT)
    held = transform.prepare(model, signs)
    op_type, overload = "HadamardQuantizeLinear", transform.overload() + _ZERO_POINTS[y_zero_point.dtype]
    if (DOMAIN, op_type, overload) not in model.functions:
        body = Body(model.opset_imports[""])
        inputs = [
            ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT)),
            ir.Value(name="y_scale", type=ir.TensorType(ir.DataType.FLOAT)),
            ir.Value(name="y_zero_point", type=ir.TensorType(y_zero_point.dtype)),
        ]
        signs_input = transform.signs_input()
        y = body.node("QuantizeLinear", [transform.apply(body, inputs[0], signs_input), *inputs[1:]])
        y.name = "Y"
        if signs_input is not None:
            inputs.append(signs_input)
        model.functions[DOMAIN, op_type, overload] = transform.wrap(body, op_type, overload, inputs, [y])
    output = ir.Value(name=f"{name}_output", type=ir.TensorType(y_zero_point.dtype), shape=x.shape)
    return ir.node(
        op_type,
        [x, y_scale, y_zero_point, *held],
        transform.attributes(size),
        domain=DOMAIN,
        overload=overload,
        outputs=[output],
        name=name,
    )


def add_hadamard_dynamic_quantize_linear(
    model: ir.Model,
    x: ir.Value,
    *,
    size: int,
    block_size: int | None = None,
    signs: npt.NDArray[Any] | None = None,
    transpose: bool = False,
    scale: float | None = None,
    name: str,
) -> ir.Node:
    """Make a node that transforms ``x`` and quantizes each row by its own scale.

    Its outputs are int8 of the shape of ``x``, and the scales, float32 ``[..., 1]``: a row's largest magnitude / 127,
    or 1 for a row of zeros. Arguments and errors as in :func:`add_hadamard_quantize_linear`.
    """
    check_input(x, size, name, (ir.DataType.FLOAT,))
    transform = Transform.make(size, block_size, signs, transpose, scale, ir.DataType.FLOAT)
    held = transform.prepare(model, signs)
    op_type, overload = "HadamardDynamicQuantizeLinear", transform.overload()
    if (DOMAIN, op_type, overload) not in model.functions:
        body = Body(model.opset_imports[""])
        inputs = [ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT))]
        signs_input = transform.signs_input()
        outputs = _quantize_rows(body, transform.apply(body, inputs[0], signs_input))
        if signs_input is not None:
            inputs.append(signs_input)
        model.functions[DOMAIN, op_type, overload] = transform.wrap(body, op_type, overload, inputs, outputs)
    shape = None if x.shape is None else ir.Shape([*x.shape[:-1], 1])
    y = ir.Value(name=f"{name}_output", type=ir.TensorType(ir.DataType.INT8), shape=x.shape)
    y_scale = ir.Value(name=f"{name}_scale", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    return ir.node(
        op_type,
        [x, *held],
        transform.attributes(size),
        domain=DOMAIN,
        overload=overload,
        outputs=[y, y_scale],
        name=name,
    )


def _quantize_rows(body: Body, x: ir.Value) -> list[ir.Value]:
    most = body.reduce("ReduceMax", body.node("Abs", [x]))
    none = body.node("Less", [most, body.constant(np.array(_SMALLEST, np.float32))])
    own = body.node("Div", [most, body.constant(np.array(127, np.float32))])
    y_scale = body.node("Where", [none, body.constant(np.array(1, np.float32)), own])
    y = body.cast(body.node("Round", [body.node("Div", [x, y_scale])]), ir.DataType.INT8)
    y.name, y_scale.name = "Y", "y_scale"
    return [y, y_scale]
