"""Static quantization of linear layers: QuantizeLinear and DequantizeLinear around integer weights.

ONNX Runtime fuses DequantizeLinear(activation), DequantizeLinear(weight) and a MatMul or Gemm into one
integer kernel. Three forms miss that and run as a float Gemm that dequantizes the weight at every call, up to
ten times slower than the float model; they are rewritten here so that they are not met:

* a Gemm with a float bias: the bias becomes int32 behind a DequantizeLinear (QGemm takes it so);
* a MatMul followed by the addition of a bias, which ONNX Runtime turns into that same Gemm where it knows the
  input to be of rank 2 or of a wholly static shape: the bias becomes int32, or, at a known higher rank, gets
  leading axes of 1, which the rewrite does not accept;
* a MatMul of rank 2 followed by the addition of anything else: it becomes a Gemm without bias.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .discovery.shapes import Shapes
from .editing import GraphNames, insert_behind, take_over
from .errors import ConfigError, ModelError
from .normalize import NOTE, UnitRows
from .observers import Range
from .qparams import (
    Array,
    QuantizedWeight,
    SolvedWeight,
    activation_parameters,
    bias_floor,
    bias_scale,
    lazy,
    quantized_bias,
)
from .scheme import Scheme, TensorSpec
from .sites import (
    LinearSite,
    WeightSource,
    constant_array,
    drop_unused,
    readers,
)
from .stand_in import behind_product
from .tied_tables import Layout, SharedWeight


@dataclass(frozen=True)
class SiteReport:
    """What became of one linear layer. Bytes are of its weight; `note` is a remark, or empty."""

    node_name: str
    op_type: str
    activation: str
    weight: str
    activation_scale: float
    activation_zero_point: int
    float_bytes: int
    quantized_bytes: int
    activation_bits: int = 8
    weight_bits: int = 8
    note: str = ""


def quantize_linears(
    model: ir.Model,
    sites: Sequence[LinearSite],
    ranges: Mapping[str, Range],
    scheme: Scheme,
    *,
    overrides: Mapping[str, Scheme] | None = None,
    solved: Mapping[str, SolvedWeight] | None = None,
    tied: Collection[ir.Value] = (),
) -> tuple[list[SiteReport], list[SharedWeight]]:
    """Quantize `sites` (`linear_sites` of this model) in place; a report for each, in graph order, and tied weights.

    ranges: of every site's activation, by node name. overrides: another scheme for some sites, by node name. solved:
    integer weights that are known already (see gptq), by node name. tied: root constants whose integers tables will
    read too, returned where their scales are one a channel. Each activation tensor is quantized once in each range and
    type, whoever reads it; readers that are no site keep the float tensor. Each weight is quantized once, evaluated
    when the model is saved; a weight that something else reads as well keeps its float copy for that reader, which the
    report notes. Gemm's alpha is folded into the weight's values, beta into the bias. Everything is checked before the
    first change: ConfigError for a missing range, ModelError for a model that is not float32 or too old an opset.
    """
    schemes = {site.node_name: (overrides or {}).get(site.node_name, scheme) for site in sites}
    _check(model, sites, ranges, schemes)
    editor = _Editor(model.graph, ranges, schemes, solved or {}, tied, _ranks(model, sites))
    order = {node: index for index, node in enumerate(model.graph)}
    ordered = sorted(sites, key=lambda site: order[site.node])
    editor.readers.update(editor.weight_key(site) for site in ordered)
    done = [(site, editor.quantize(site)) for site in ordered]
    editor.finish()
    return [editor.report(site, op_type) for site, op_type in done], list(editor.shared.values())


def _check(
    model: ir.Model, sites: Sequence[LinearSite], ranges: Mapping[str, Range], schemes: Mapping[str, Scheme]
) -> None:
    for scheme in dict.fromkeys(schemes.values()):
        if scheme.activation.per_channel:
            raise ConfigError(f"scheme: {scheme.name} asks for activations per channel; they can only be per tensor")
        if not scheme.weight.symmetric or not scheme.weight.signed:
            raise ConfigError(f"scheme: {scheme.name} asks for weights that are not signed and symmetric")
        check_opset(model, scheme)
    for site in sites:
        check_float(site)
        if site.node_name not in ranges:
            raise ConfigError(f"ranges: none for {site.activation!r}, which node {site.node_name!r} reads")


def check_opset(model: ir.Model, scheme: Scheme) -> None:
    """ModelError if the model's opset has no operators for the scheme."""
    opset = model.opset_imports.get("", 0)
    if opset < scheme.min_opset:
        raise ModelError(
            f"model: opset {opset} is too old for {scheme.name}, which needs opset {scheme.min_opset}; "
            f"export the model with opset {scheme.min_opset} or later, or convert it (onnx.version_converter)"
        )


def check_float(site: LinearSite) -> None:
    """ModelError for a weight that is not float32."""
    if site.dtype != ir.DataType.FLOAT:
        raise ModelError(
            f"node {site.node_name!r}: its weight is {site.dtype.name.lower()}; "
            "quantization starts from a float32 model"
        )


def check_replaceable(model: ir.Model, site: LinearSite, scheme: Scheme) -> None:
    """Before a product of integers takes the place of a site: ModelError also for a Gemm that transposes its
    activations, which none of them does.
    """
    check_opset(model, scheme)
    check_float(site)
    check_rows(site, scheme)


def check_rows(site: LinearSite, scheme: Scheme) -> None:
    """ModelError for a Gemm that transposes its activations: their rows are not a layer's inputs."""
    if site.transposes_input:
        raise ModelError(
            f"node {site.node_name!r}: a Gemm with transA=1 cannot be quantized as {scheme.name}; exclude it"
        )


class _Editor:
    """The edits on one graph, and what they have made so far."""

    def __init__(
        self,
        graph: ir.Graph,
        ranges: Mapping[str, Range],
        schemes: Mapping[str, Scheme],
        solved: Mapping[str, SolvedWeight],
        tied: Collection[ir.Value],
        ranks: Mapping[ir.Value, int],
    ) -> None:
        self.graph, self.ranges, self.schemes, self.solved = graph, ranges, schemes, solved
        self.ranks = ranks
        self.tied = tied
        self.shared: dict[ir.Value, SharedWeight] = {}
        self.activations: dict[tuple[str, TensorSpec, Range], tuple[np.float32, int, ir.Value]] = {}
        self.weights: dict[tuple[object, ...], tuple[QuantizedWeight, ir.Value]] = {}
        self.readers: Counter[tuple[object, ...]] = Counter()
        self.replaced: list[ir.Value] = []
        self.pending: list[tuple[ir.TensorProtocol, str]] = []
        self.names = GraphNames(graph)
        self.unit_rows = UnitRows(self.names)

    def quantize(self, site: LinearSite) -> str:
        node = site.node
        given = site.input
        scale, _, activation = self._activation(site)
        weight, operand = self._weight(site)
        self.replaced += [value for value in node.inputs[1:] if value is not None]
        node.replace_input_with(0, activation)
        node.replace_input_with(1, operand)
        if self.ranges[site.node_name].normalized:
            self._finish_outside(site, self.unit_rows.of(given)[1])
        elif node.op_type == "Gemm":
            self._gemm_bias(site, scale, weight)
        else:
            self._following_add(site, scale, weight)
        if node.op_type == "Gemm":
            node.attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)
            node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
        return node.op_type

    def finish(self) -> None:
        """Drop what nothing reads any more: float weights, biases, the views of them."""
        for value in dict.fromkeys(self.replaced):
            drop_unused(self.graph, value)

    def report(self, site: LinearSite, op_type: str) -> SiteReport:
        scheme = self.schemes[site.node_name]
        scale, zero, _ = self.activations[self._activation_key(site)]
        count = site.channels * site.depth
        kept = site.root.name in self.graph.initializers and site.root.uses()
        by = ", ".join(node.name or node.op_type for node in readers(site.root)) if kept else ""
        notes = [f"float copy of {site.weight} kept for {by}"] if kept else []
        if self.ranges[site.node_name].normalized:
            notes.append(NOTE)
        return SiteReport(
            site.node_name,
            op_type,
            site.activation,
            site.weight,
            float(scale),
            zero,
            float_bytes=4 * count,
            quantized_bytes=count * scheme.weight.bits // 8,
            activation_bits=scheme.activation.bits,
            weight_bits=scheme.weight.bits,
            note="; ".join(notes),
        )

    # Activations

    def _activation_key(self, site: LinearSite) -> tuple[str, TensorSpec, Range]:
        return site.activation, self.schemes[site.node_name].activation, self.ranges[site.node_name]

    def _activation(self, site: LinearSite) -> tuple[np.float32, int, ir.Value]:
        key = name, spec, found = self._activation_key(site)
        if key not in self.activations:
            value = site.input
            if found.normalized:
                value, _ = self.unit_rows.of(value)
            scale, zero = activation_parameters(found, spec)
            scale_value = self.names.initializer(ir.Tensor(np.array(scale)), f"{name}_scale")
            zero_value = self.names.initializer(
                ir.Tensor(np.array(zero, spec.numpy_dtype), dtype=spec.dtype), f"{name}_zero_point"
            )
            quantized = self.names.value(f"{name}_quantized", spec.dtype, value.shape)
            dequantized = self.names.value(f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
            parameters = [scale_value, zero_value]
            nodes = [
                ir.Node(
                    "",
                    "QuantizeLinear",
                    [value, *parameters],
                    outputs=[quantized],
                    name=self.names.unique(f"{name}_QuantizeLinear"),
                ),
                ir.Node(
                    "",
                    "DequantizeLinear",
                    [quantized, *parameters],
                    outputs=[dequantized],
                    name=self.names.unique(f"{name}_DequantizeLinear"),
                ),
            ]
            insert_behind(self.graph, value, nodes)
            self.activations[key] = (scale, zero, dequantized)
        return self.activations[key]

    # Weights

    def _weight(self, site: LinearSite) -> tuple[QuantizedWeight, ir.Value]:
        key = self.weight_key(site)
        if key not in self.weights:
            self.weights[key] = self._new_weight(site, unsigned=self.readers[key] > 1)
        return self.weights[key]

    def weight_key(self, site: LinearSite) -> tuple[object, ...]:
        """Equal for sites that can share one integer weight."""
        return *site.weight_key(), self.schemes[site.node_name].weight

    def _new_weight(self, site: LinearSite, *, unsigned: bool) -> tuple[QuantizedWeight, ir.Value]:
        source = WeightSource(site)
        spec = self.schemes[site.node_name].weight
        axis = site.channel_axis if spec.per_channel else None
        shape = (site.depth, site.channels) if site.channel_axis == 1 else (site.channels, site.depth)
        # ONNX Runtime's exact mode on CPUs without VNNI turns an int8 weight into uint8 at each of its
        # readers, and fails on the second: a weight with several readers is stored as it would make it.
        solved = self.solved.get(site.node_name)
        weight = QuantizedWeight(
            site.weight, shape, spec, axis, source.operand, source.close, unsigned=unsigned, solved=solved
        )
        base = site.weight
        # Integers before scales: written in this order, the weight is read once.
        quantized = self.names.initializer(weight.tensor(""), f"{base}_quantized")
        scale = self.names.initializer(weight.scale_tensor(""), f"{base}_scale")
        if site.root in self.tied and axis == 1 and spec.bits == 8:  # runtimes look no 4-bit rows up
            self.shared[site.root] = SharedWeight(site, quantized, scale, weight.zero_point, layout=Layout.COLUMNS)
        # Not shared between weights, for the same reason.
        zero = self._constant_of(weight.zero_point, weight.dtype, weight.scale_shape, f"{base}_zero_point")
        operand = self.names.value(f"{base}_dequantized", ir.DataType.FLOAT, ir.Shape(shape))
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        self._dequantize([quantized, scale, zero], attributes, operand, site.node)
        return weight, operand

    def _dequantize(
        self, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr], output: ir.Value, before: ir.Node
    ) -> None:
        name = self.names.unique((output.name or "").removesuffix("_dequantized") + "_DequantizeLinear")
        self.graph.insert_before(
            before, ir.Node("", "DequantizeLinear", inputs, attributes, outputs=[output], name=name)
        )

    # Biases

    def _gemm_bias(self, site: LinearSite, scale: np.float32, weight: QuantizedWeight) -> None:
        node = site.node
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            return
        array = constant_array(bias)
        if array is not None and _is_vector(array, site.channels):
            array = array * np.float32(site.beta)
            node.replace_input_with(2, self._int32_bias(array, bias.name or "", scale, weight, node))
            return
        self._finish_outside(site)  # QGemm takes no other bias

    def _finish_outside(self, site: LinearSite, length: ir.Value | None = None) -> None:
        """Leave the product alone to the site's node; what is done to it comes afterwards."""
        node, product = site.node, site.node.outputs[0]
        added = behind_product(self.names, site, product, length)
        first = next(one for one in added if product in one.inputs)
        node.resize_inputs(2)
        take_over(product, added[-1].outputs[0])
        first.replace_input_with(0, product)  # which was taken for another reader
        product.name = self.names.unique(f"{added[-1].outputs[0].name}_product")
        product.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.insert_after(node, added)

    def _following_add(self, site: LinearSite, scale: np.float32, weight: QuantizedWeight) -> None:
        node = site.node
        product = node.outputs[0]
        users = product.uses()
        if len(users) != 1 or product.is_graph_output():
            return
        (add, index), *_ = users
        if add.op_type != "Add" or add.domain != "":
            return
        bias = add.inputs[1 - index]
        array = constant_array(bias)
        rank = self.ranks.get(product)
        if array is not None and bias is not None and _is_vector(array, site.channels):
            if array.ndim > 1 and (rank is None or rank < array.ndim):
                return  # the sum has more axes than the product, so that nothing becomes a Gemm
            self.replaced.append(bias)
            if rank is not None and rank > 2:
                shape = [1] * (rank - 1) + [array.size]
                widened = ir.Tensor(np.ascontiguousarray(array, np.float32).reshape(shape))
                add.replace_input_with(1 - index, self.names.initializer(widened, f"{bias.name}_widened"))
            else:
                add.replace_input_with(1 - index, self._int32_bias(array, bias.name or "", scale, weight, node))
        elif rank == 2:
            node.op_type = "Gemm"

    def _int32_bias(
        self, bias: Array, name: str, scale: np.float32, weight: QuantizedWeight, node: ir.Node
    ) -> ir.Value:
        channels = weight.shape[1] if weight.axis is None else weight.shape[weight.axis]
        vector = np.broadcast_to(bias.reshape(-1), (channels,)).astype(np.float32)
        if weight.axis is not None:
            weight.raise_floor(bias_floor(vector, scale))
        steps = lazy(quantized_bias(vector, scale, weight), ir.DataType.INT32, [channels], "")
        unit = lazy(bias_scale(scale, weight), ir.DataType.FLOAT, [channels], "")
        inputs = [
            self.names.initializer(steps, f"{name}_quantized"),
            self.names.initializer(unit, f"{name}_scale"),
            self._constant_of(0, ir.DataType.INT32, (channels,), f"{name}_zero_point"),
        ]
        output = self.names.value(f"{name}_dequantized", ir.DataType.FLOAT, ir.Shape([channels]))
        self._dequantize(inputs, [ir.AttrInt64("axis", 0)], output, node)
        return output

    # Graph parts

    def _constant_of(self, number: int, dtype: ir.DataType, shape: Sequence[int], name: str) -> ir.Value:
        array = np.full(tuple(shape), number, dtype.numpy())
        return self.names.initializer(ir.Tensor(array, dtype=dtype), name)


def _is_vector(array: Array, channels: int) -> bool:
    """Whether a bias broadcasts along the last axis only: a scalar, or [.., 1, channels] with ones before."""
    return array.size == 1 or (array.shape[-1] == channels and array.size == channels)


def _ranks(model: ir.Model, sites: Sequence[LinearSite]) -> dict[ir.Value, int]:
    """The ranks of the sites' results. Those that the file does not state are looked for where a constant that has
    axes of its own is added.
    """
    made = [site.node.outputs[0] for site in sites]
    ranks = {value: len(value.shape) for value in made if value.shape is not None}
    added = (
        constant_array(other)
        for value in made
        for reader, _ in value.uses()
        if value not in ranks and reader.op_type == "Add"
        for other in reader.inputs
    )
    if any(array is not None and array.ndim > 1 for array in added):
        shapes = Shapes(model)
        ranks |= {value: len(shapes.shape[value]) for value in made if value not in ranks and shapes.known(value)}
    return ranks
