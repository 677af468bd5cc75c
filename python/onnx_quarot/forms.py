"""A scheme for each linear layer, and each layer in its scheme's form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir

from .blocks import quantize_blocks
from .custom_op import DOMAIN
from .dynamic import quantize_dynamic
from .errors import ConfigError
from .expert_hessians import solve_experts
from .experts import ExpertSite, quantize_experts
from .fused_attention import fuse_attention
from .fused_linear import quantize_fused, takes_blocks
from .hessians import solve_weights
from .observers import Range
from .progress import Progress
from .qdq import SiteReport, check_rows, quantize_linears
from .ranges import static_ranges, with_wide_activations
from .replay import Replay
from .scheme import BLOCK_FORMS, Scheme, TensorSpec, parse_scheme
from .sites import LinearSite
from .tied_tables import SharedWeight, tied_roots
from .tokens import check_tokens, quantize_tokens

Site = TypeVar("Site", LinearSite, LinearSite | ExpertSite)

# What a head may be followed by: none of these mixes features.
_ELEMENTWISE = ("Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh")


@dataclass(frozen=True)
class Quantized:
    """What was done to the linear layers, what there is to remark, and the weights that tables can share."""

    reports: list[SiteReport]
    notes: list[str]
    shared: list[SharedWeight]


def quantize_sites(
    model: ir.Model,
    model_path: Path,
    sites: Sequence[LinearSite],
    scheme: Scheme,
    data: Replay,
    folder: Path,
    progress: Progress,
    *,
    experts: Sequence[ExpertSite] = (),
    mixed: bool | float = False,
    overrides: Mapping[str, Scheme] | None = None,
) -> Quantized:
    """Quantize `sites` and `experts` of `model` in place. model_path: the same model as a file, in float, to be run on
    `data`.

    overrides: another scheme for some of them, by node name. mixed: see :mod:`ranges`. folder: for what is kept until
    the model has been written. Errors as of the parts: nothing is changed before all is known.
    """
    wanted = overrides or {}
    given = {site.node_name: wanted[site.node_name] for site in sites if site.node_name in wanted}
    library = _uses_library(model, [scheme, *given.values()])
    heads = head_schemes(sites, scheme)
    schemes = {site.node_name: scheme for site in sites}
    schemes |= heads
    schemes |= given
    notes: list[str] = []
    calibrated = [site for site in sites if schemes[site.node_name].calibrates]
    ranges: dict[str, Range] = {}
    if calibrated or mixed is not False:
        others = {name: other for name, other in schemes.items() if other != scheme}
        ranges, wide, notes = static_ranges(model_path, calibrated, scheme, data, mixed, progress, others)
        schemes |= wide
    ranks = check_tokens(model, [site for site in sites if schemes[site.node_name].form == "token"], schemes)
    solved, remarks = solve_weights(model_path, sites, schemes, data, folder, progress)
    notes += (note for note in remarks if note not in notes)
    of_experts = {site.node_name: wanted.get(site.node_name, scheme) for site in experts}
    solved_experts, remarks = solve_experts(model_path, experts, of_experts, data, folder, progress)
    notes += remarks
    reports: list[SiteReport] = []
    shared: list[SharedWeight] = []
    tied = tied_roots(model, sites)
    # Where the library is used anyway, its operator does what those of ONNX Runtime do without it.
    forms = {name: "fused" if library and takes_blocks(other) else other.form for name, other in schemes.items()}
    if library and takes_blocks(scheme):
        forms |= {name: "fused" for name in heads if name not in given}
    for form in dict.fromkeys(forms.values()):
        part = [site for site in sites if forms[site.node_name] == form]
        if form == "qdq":
            done, weights = quantize_linears(model, part, ranges, scheme, overrides=schemes, solved=solved, tied=tied)
        elif form in BLOCK_FORMS:
            done, weights = quantize_blocks(model, part, schemes, solved, tied)
        elif form == "dynamic":
            done, weights = quantize_dynamic(model, part, schemes, solved, tied, ranges)
        elif form == "fused":
            done, weights = quantize_fused(model, part, schemes, solved, tied)
        else:
            done, weights = quantize_tokens(model, part, schemes, solved, ranks), []
        reports += done
        shared += weights
    done, remarks = quantize_experts(model, experts, of_experts, solved_experts)
    reports += done
    notes += remarks
    if library:
        fuse_attention(model)
    return Quantized(reports, notes, shared)


def _uses_library(model: ir.Model, schemes: Iterable[Scheme]) -> bool:
    """Whether the model holds operators of the library, or is going to."""
    return any(node.domain == DOMAIN for node in model.graph) or any(scheme.form == "fused" for scheme in schemes)


def layer_schemes(
    sites: Sequence[Site], layers: Mapping[str, str | Scheme | None]
) -> tuple[list[Site], dict[str, Scheme]]:
    """The sites that are quantized at all, and those with a scheme of their own; of linear layers and of experts.

    layers: schemes by node name, pattern of node names, or operator type; of several that fit a site, an exact name
    counts first, then the order given. None leaves a site in floating point. ConfigError for a key that fits no site.
    """
    left: list[Site] = []
    chosen: dict[str, Scheme] = {}
    fitting: set[str] = set()
    for site in sites:
        keys = [key for key in layers if key in (site.node_name, site.op_type) or fnmatchcase(site.node_name, key)]
        keys.sort(key=lambda key: key != site.node_name)
        fitting.update(keys)
        scheme = layers[keys[0]] if keys else ""
        if scheme is not None:
            left.append(site)
        if scheme:
            chosen[site.node_name] = parse_scheme(scheme)
    if unused := [key for key in layers if key not in fitting]:
        raise ConfigError(f"layers: {unused[0]!r} fits no linear layer of the model ({len(sites)} found)")
    return left, chosen


def needed_opset(scheme: Scheme, layers: Mapping[str, str | Scheme | None], mixed: bool | float = False) -> int:
    """The least opset that has the operators of all the schemes, of what `mixed` may choose too."""
    others = [parse_scheme(other) for other in layers.values() if other is not None]
    if mixed is not False and scheme.static_ranges:
        others.append(with_wide_activations(scheme))
    return max(used.min_opset for used in (scheme, *others))


def check_sites(sites: Iterable[LinearSite], scheme: Scheme, overrides: Mapping[str, Scheme]) -> None:
    """ModelError for a layer that its scheme does not take: found before any work is done."""
    for site in sites:
        used = overrides.get(site.node_name, scheme)
        if used.form != "qdq" or used.weights == "gptq":
            check_rows(site, used)


def head_schemes(sites: Sequence[LinearSite], scheme: Scheme) -> dict[str, Scheme]:
    """The schemes of the sites that make an output of the graph, where these keep more bits."""
    bits = scheme.head_bits
    if bits is None:
        return {}
    if scheme.form == "token":
        # ONNX Runtime's integer kernels mistake blocked 8-bit activations for ones with a single scale.
        head = parse_scheme("a8w8")
    elif scheme.form in BLOCK_FORMS and bits > scheme.weight.bits:
        # A scale a channel instead of one a block: the head is a large part of a small model.
        # What enters it comes from a norm, and is not worth a calibration.
        head = replace(parse_scheme("a8w8-dynamic-tensor"), normalize=False)
    else:
        # Symmetric, so that a table can share the integers whatever the form.
        weight = TensorSpec(bits=max(bits, scheme.weight.bits), per_channel=scheme.weight.per_channel, method="mse")
        head = replace(scheme, weight=weight, weights="rtn")
    return {site.node_name: head for site in sites if _makes_output(site.node.outputs[0])}


def _makes_output(value: ir.Value) -> bool:
    while not value.is_graph_output():
        uses = tuple(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in _ELEMENTWISE or uses[0].node.domain != "":
            return False
        value = uses[0].node.outputs[0]
    return True
