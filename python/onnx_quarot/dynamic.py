"""Activations in 8 bits with ranges found while the model runs: DynamicQuantizeMatMul, one fused operator.

It finds one range a tensor; weights are int8 with a scale a channel. Where calibration says that rows differ too much
for one range, they are divided by their lengths first (see normalize).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from .editing import GraphNames
from .errors import ConfigError
from .normalize import NOTE, UnitRows
from .observers import Range
from .qdq import SiteReport, check_replaceable
from .qparams import QuantizedWeight, SolvedWeight
from .scheme import Scheme
from .sites import LinearSite, WeightSource
from .stand_in import stand_in
from .tied_tables import Layout, SharedWeight

_MS = "com.microsoft"


def quantize_dynamic(
    model: ir.Model,
    sites: Sequence[LinearSite],
    schemes: Mapping[str, Scheme],
    solved: Mapping[str, SolvedWeight],
    tied: Collection[ir.Value] = (),
    ranges: Mapping[str, Range] | None = None,
) -> tuple[list[SiteReport], list[SharedWeight]]:
    """Replace `sites` in place by DynamicQuantizeMatMul; a report for each, and the weights of roots in `tied`.

    schemes: by node name, of the form dynamic. ranges: of activations, by node name, which say whether their rows are
    divided by their lengths. A Gemm's bias is added after the product. Everything is checked first: ModelError for a
    weight that is not float32, a Gemm that transposes its activations, or too old an opset, ConfigError for weights
    that are not 8 bits, signed and symmetric.
    """
    for site in sites:
        scheme = schemes[site.node_name]
        check_replaceable(model, site, scheme)
        if scheme.weight.bits != 8 or not (scheme.weight.signed and scheme.weight.symmetric):
            raise ConfigError(f"weight: {scheme.name} takes signed symmetric weights of 8 bits")
    names = GraphNames(model.graph)
    unit_rows = UnitRows(names)
    normalized = {name for name, found in (ranges or {}).items() if found.normalized}
    readers = Counter(site.weight_key() for site in sites)
    stored: dict[tuple[object, ...], list[ir.Value]] = {}
    model.opset_imports.setdefault(_MS, 1)
    reports: list[SiteReport] = []
    shared: list[SharedWeight] = []
    for site in sites:
        scheme = schemes[site.node_name]
        key = site.weight_key()
        if key not in stored:
            source = WeightSource(site)
            shape, found = (site.depth, site.channels), solved.get(site.node_name)
            axis = 1 if scheme.weight.per_channel else None
            weight = QuantizedWeight(
                site.weight,
                shape,
                scheme.weight,
                axis,
                source.read,
                source.close,
                unsigned=readers[key] > 1,  # see qdq: ONNX Runtime's exact mode fails on the second reader
                solved=found,
            )
            zeros = np.full(weight.scale_shape, weight.zero_point, weight.dtype.numpy())
            stored[key] = [
                names.initializer(weight.tensor(""), f"{site.weight}_quantized"),
                names.initializer(weight.scale_tensor(""), f"{site.weight}_scale"),
                names.initializer(ir.Tensor(zeros), f"{site.weight}_zero_point"),
            ]
            if site.root in tied and axis == 1:
                codes, scales, _ = stored[key]
                shared.append(SharedWeight(site, codes, scales, zero=weight.zero_point, layout=Layout.COLUMNS))
        node, value, length, note = site.node, site.input, None, ""
        if site.node_name in normalized:
            value, length = unit_rows.of(value)
            note = NOTE
        product = ir.node("DynamicQuantizeMatMul", [value, *stored[key]], domain=_MS, name=node.name)
        stand_in(names, site, product, length)
        count = site.depth * site.channels
        sizes = {"float_bytes": 4 * count, "quantized_bytes": count}
        reports.append(
            SiteReport(site.node_name, product.op_type, site.activation, site.weight, 0.0, 0, **sizes, note=note)
        )
    return reports, shared
