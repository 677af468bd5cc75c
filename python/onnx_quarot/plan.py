"""What will be done to a model: plain values that can be printed, saved as JSON and executed by :mod:`rewrite`.

A plan refers to nodes by their position in the loaded graph and to tensors by name. It is made by :mod:`discovery` and
belongs to one model: :attr:`Plan.fingerprint` says which.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from onnx_quarot.errors import ConfigError
from onnx_quarot.transform import Rotation

ROTATIONS = ("R1", "R2", "R3", "R4")
DEFAULT_ROTATIONS = ("R1", "R2", "R4")  # R3 costs two transforms a layer and pays with a cache of few bits only


@dataclass(frozen=True)
class Placement:
    """``rotation`` (an id) applied to ``length`` features from ``offset`` on; several tiles if it is shorter."""

    offset: int
    length: int
    rotation: str


@dataclass(frozen=True)
class AxisChange:
    """New basis along one axis of a constant, as the node sees it; ``centre``: each tile loses its mean first."""

    axis: int
    placements: tuple[Placement, ...]
    centre: bool = False


@dataclass(frozen=True)
class Addition:
    """``factor`` x vector @ matrix, both constants (node, input) as they were: a bias moved behind a linear layer.

    ``axis`` is the axis of the matrix that is summed over.
    """

    vector: tuple[int, int]
    matrix: tuple[int, int]
    axis: int
    factor: float = 1.0


@dataclass(frozen=True)
class Rebase:
    """One constant operand in its new basis: scales along axes and additions first, then broadcast, then rotations.

    ``scales`` holds pairs (axis, (node, input)) of the folded factors, ``expand`` an optional pair (axis from the end,
    length) along which the constant is written out in full.
    """

    node: int
    input: int
    changes: tuple[AxisChange, ...] = ()
    scales: tuple[tuple[int, tuple[int, int]], ...] = ()
    expand: tuple[int, int] | None = None
    adds: tuple[Addition, ...] = ()


@dataclass(frozen=True)
class NewBias:
    """A bias behind output 0 of ``node``, which had none, in the basis of that output; ``scales`` as in Rebase."""

    node: int
    adds: tuple[Addition, ...]
    placements: tuple[Placement, ...]
    centre: bool = False
    scales: tuple[tuple[int, tuple[int, int]], ...] = ()


@dataclass(frozen=True)
class Online:
    """One transform at run time on the last axis of ``value``, in front of ``consumers`` (node, input).

    A consumer (-1, i) is output i of the graph; nodes of subgraphs are numbered behind all others. ``dtype`` names the
    ONNX type, ``width`` the length of the axis. ``centre``: the mean over the axis is subtracted first.
    """

    value: str
    rotation: str
    inverse: bool
    consumers: tuple[tuple[int, int], ...]
    width: int
    dtype: str
    centre: bool = False


@dataclass(frozen=True)
class State:
    """A cache whose last axis changes basis: input ``past``, output ``present``."""

    past: str
    present: str
    rotation: str


@dataclass(frozen=True)
class Site:
    """A linear layer: how its input is rotated ("offline", "online") or, with ``how`` "none", why not."""

    node: int
    name: str
    op_type: str
    inputs: int
    outputs: int
    how: str
    rotation: str | None
    reason: str | None


@dataclass(frozen=True)
class Plan:
    """The outcome of discovery. ``rotations`` maps ids to matrices; everything else refers to them."""

    fingerprint: str
    rotations: dict[str, Rotation]
    kinds: dict[str, str]
    sites: tuple[Site, ...]
    rebases: tuple[Rebase, ...] = ()
    ones: tuple[tuple[int, int], ...] = ()  # (node, input) of scales that were folded away
    norms: tuple[int, ...] = ()  # LayerNorms on a centred stream, which become RMS norms
    bypassed: tuple[tuple[int, int], ...] = ()  # (node, input): the node's output is that input from now on
    biases: tuple[NewBias, ...] = ()
    online: tuple[Online, ...] = ()
    states: tuple[State, ...] = ()
    bases: dict[str, tuple[Placement, ...]] = field(default_factory=dict)  # produced values in a new basis (last axis)
    keys: bool = False  # position encodings were taken out of attention before anything was numbered
    notes: tuple[str, ...] = ()

    @property
    def declined(self) -> tuple[Site, ...]:
        """The linear layers whose input stays in its basis, each with its reason."""
        return tuple(s for s in self.sites if s.how == "none")

    def summary(self) -> dict[str, Any]:
        """Counts a person wants first."""
        return {
            "linear_layers": len(self.sites),
            "rotated_offline": sum(s.how == "offline" for s in self.sites),
            "rotated_online": sum(s.how == "online" for s in self.sites),
            "declined": len(self.declined),
            "online_ops": len(self.online),
            "online_flops_per_row": self.online_cost(),
            "rotations": dict(sorted(Counter(self.kinds[r] for r in self.rotations).items())),
        }

    def online_cost(self) -> int:
        """Additions a token that the online transforms cost: width x log2(block) each (orders K count as a power of
        2).
        """
        return sum(o.width * (self.rotations[o.rotation].block_size - 1).bit_length() for o in self.online)

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; :meth:`from_json` reads it back."""
        out = asdict(self)
        out["rotations"] = {key: r.to_json() for key, r in self.rotations.items()}
        return {"version": 1, **out, "summary": self.summary()}

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> Plan:
        """Read what :meth:`to_json` wrote (a dictionary or its text). Raises ConfigError for anything else."""
        try:
            d = json.loads(data) if isinstance(data, str) else data
            if d["version"] != 1:
                raise ConfigError(f"plan: version is {d['version']!r}; this release reads version 1")
            return cls(
                fingerprint=d["fingerprint"],
                rotations={key: Rotation.from_json(r) for key, r in d["rotations"].items()},
                kinds=dict(d["kinds"]),
                sites=tuple(Site(**s) for s in d["sites"]),
                rebases=tuple(_rebase(r) for r in d["rebases"]),
                ones=tuple((a, b) for a, b in d["ones"]),
                norms=tuple(d["norms"]),
                bypassed=tuple((a, b) for a, b in d["bypassed"]),
                biases=tuple(
                    NewBias(
                        b["node"],
                        _additions(b["adds"]),
                        _placements(b["placements"]),
                        b["centre"],
                        _scales(b.get("scales", [])),
                    )
                    for b in d["biases"]
                ),
                online=tuple(
                    Online(**{**o, "consumers": tuple((a, b) for a, b in o["consumers"])}) for o in d["online"]
                ),
                states=tuple(State(**s) for s in d["states"]),
                bases={name: _placements(ps) for name, ps in d["bases"].items()},
                keys=bool(d["keys"]),
                notes=tuple(d["notes"]),
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ConfigError(f"plan: not a plan written by this package ({error!r})") from error


def _rebase(d: dict[str, Any]) -> Rebase:
    return Rebase(
        node=d["node"],
        input=d["input"],
        changes=tuple(AxisChange(c["axis"], _placements(c["placements"]), c["centre"]) for c in d["changes"]),
        scales=_scales(d["scales"]),
        expand=None if d["expand"] is None else (d["expand"][0], d["expand"][1]),
        adds=_additions(d["adds"]),
    )


def _scales(items: list[Any]) -> tuple[tuple[int, tuple[int, int]], ...]:
    return tuple((axis, (source[0], source[1])) for axis, source in items)


def _placements(items: list[dict[str, Any]]) -> tuple[Placement, ...]:
    return tuple(Placement(**p) for p in items)


def _additions(items: list[dict[str, Any]]) -> tuple[Addition, ...]:
    return tuple(Addition(tuple(a["vector"]), tuple(a["matrix"]), a["axis"], a["factor"]) for a in items)
