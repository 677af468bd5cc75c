"""The ranges of a scheme's static activations, and which of them get 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .calibrate import observe
from .errors import ConfigError, DataError
from .mixed import Sensitivity, find_sensitive
from .normalize import EitherWay
from .observers import Array, Observer, Range, make_observer
from .progress import Progress
from .replay import Replay
from .scheme import Scheme, TensorSpec
from .sites import LinearSite
from .sufficiency import range_remarks, watch

DEFAULT_BUDGET = 0.05
_NAMED = 3  # layers in a remark that may be about many; reports of layers say it of each
_WIDE = TensorSpec(bits=16, signed=False, symmetric=False)


def static_ranges(
    model_path: Path,
    sites: Sequence[LinearSite],
    scheme: Scheme,
    data: Replay,
    mixed: bool | float,
    progress: Progress,
    overrides: dict[str, Scheme] | None = None,
) -> tuple[dict[str, Range], dict[str, Scheme], list[str]]:
    """The range of what enters each of `sites`, by node name, the schemes of sites that take another one, and remarks.

    Layers of different schemes that read one activation have a range of it each. mixed: False, True for the default
    budget, or the share of linear layers that may have 16-bit activations. overrides: sites whose scheme is given; they
    are no candidates. Raises DataError for data that is not finite or says nothing about any activation, ConfigError
    for a scheme that mixed precision does not suit.
    """
    schemes = dict(overrides or {})
    budget = _budget(mixed, scheme)
    of_site: dict[str, Observer] = {}
    observers: dict[str, _Together] = {}
    for site in sites:
        kind = _Kind.of(schemes.get(site.node_name, scheme), site)
        of_site[site.node_name] = observers.setdefault(site.activation, _Together()).of(kind)
    watched = watch(observers)
    observe(model_path, watched, data, progress=progress, readers={s.activation: s.node_name for s in sites})
    found_by = {observer: observer.range() for observer in dict.fromkeys(of_site.values())}
    ranges = {name: found_by[observer] for name, observer in of_site.items()}
    silent = _silent({site.activation: ranges[site.node_name] for site in sites}, len(data))
    seen = {
        site.activation: watched[site.activation].seen()
        for site in sites
        if ranges[site.node_name].low < ranges[site.node_name].high
    }
    notes = [*silent, *range_remarks(seen, len(data)), *_normalized(ranges, sites)]
    if budget is None:
        return ranges, schemes, notes
    free = [site for site in sites if site.node_name not in schemes and not ranges[site.node_name].normalized]
    narrow = {site.activation: ranges[site.node_name] for site in free}
    found = find_sensitive(model_path, free, narrow, scheme.activation, data[0], budget=budget, progress=progress)
    for choice in found:
        if choice.chosen:
            extremes = of_site[choice.nodes[0]].extremes
            ranges |= {node: Range(extremes.low, extremes.high) for node in choice.nodes}
            schemes |= dict.fromkeys(choice.nodes, with_wide_activations(scheme))
    return ranges, schemes, [*notes, *_explain(found, len(sites))]


@dataclass(frozen=True)
class _Kind:
    """What tells the range that one layer needs of an activation from that of another."""

    spec: TensorSpec
    normalizes: bool

    @staticmethod
    def of(scheme: Scheme, site: LinearSite) -> _Kind:
        # Of what is read in columns, rows are no inputs of the layer.
        return _Kind(scheme.activation, scheme.normalizes and not site.transposes_input)

    def observer(self) -> Observer:
        spec = self.spec
        if self.normalizes:
            return EitherWay(spec.bits, spec.symmetric)
        return make_observer(spec.method, percentile=99.999, bits=spec.bits, symmetric=spec.symmetric)


class _Together:
    """The observers of one activation, one for each kind of range."""

    def __init__(self) -> None:
        self._observers: dict[_Kind, Observer] = {}

    def of(self, kind: _Kind) -> Observer:
        if kind not in self._observers:
            self._observers[kind] = kind.observer()
        return self._observers[kind]

    def update(self, values: Array) -> None:
        for observer in self._observers.values():
            observer.update(values)


def with_wide_activations(scheme: Scheme) -> Scheme:
    """What `mixed` makes of a static scheme where a layer needs it."""
    return replace(scheme, activation=_WIDE)


def _budget(mixed: bool | float, scheme: Scheme) -> float | None:
    if mixed is False:
        return None
    if scheme.form != "qdq" or scheme.activation.bits >= 16:
        raise ConfigError(f"mixed: {scheme.name} has no static activations of 4 or 8 bits to choose among")
    budget = DEFAULT_BUDGET if mixed is True else float(mixed)
    if not 0.0 < budget <= 1.0:
        raise ConfigError(f"mixed: a budget of {mixed} is out of range; use a share of layers above 0 and at most 1")
    return budget


def _silent(ranges: dict[str, Range], batches: int) -> list[str]:
    silent = [name for name, found in ranges.items() if found.low == found.high]
    if len(silent) == len(ranges):
        raise DataError(f"calibration: all {len(ranges)} activations are zero throughout the data; nothing to go by")
    if not silent:
        return []
    return [
        f"{len(silent)} of {len(ranges)} activations were zero throughout the {batches} calibration batches and have "
        f"no range ({silent[0]} is the first); more, or more varied, data is needed if they are not always"
    ]


def _normalized(ranges: dict[str, Range], sites: Sequence[LinearSite]) -> list[str]:
    nodes = [site.node_name for site in sites if ranges[site.node_name].normalized]
    if not nodes:
        return []
    return [
        f"rows of activations are divided by their lengths, which differ too much for one range, at {len(nodes)} of "
        f"{len(sites)} linear layers: {', '.join(nodes[:_NAMED])}{', ...' * (len(nodes) > _NAMED)}"
    ]


def _explain(found: Sequence[Sensitivity], sites: int) -> list[str]:
    chosen = [choice for choice in found if choice.chosen]
    if not chosen:
        return ["no layer needs 16-bit activations"]
    nodes = [node for choice in chosen for node in choice.nodes]
    total, left = sum(c.error for c in found), sum(c.error for c in found if not c.chosen)
    return [
        f"16-bit activations at {len(nodes)} of {sites} linear layers: {', '.join(nodes)}",
        f"they cause {1 - left / total:.0%} of the output error of the {len(found)} most sensitive activations "
        f"({total:.2g} -> {left:.2g}, relative squared)",
    ]
