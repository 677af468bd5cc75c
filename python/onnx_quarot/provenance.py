"""What a rotated model says about itself, in its metadata: which inner values are in another basis, and in which.

Evaluation reads it to compare inner values with the original's; people can read it to see what was done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.plan import Placement, Plan
from onnx_quarot.rewrite import change_basis
from onnx_quarot.transform import Rotation

Array = np.ndarray[Any, Any]
KEY = "onnx_quarot.bases"
_FITTED = "onnx_quarot.fitted"


@dataclass(frozen=True)
class Bases:
    """The recorded bases: values by name, rotations by id."""

    values: dict[str, tuple[Placement, ...]]
    rotations: dict[str, Rotation]

    def undo(self, name: str, x: Array) -> Array:
        """``x``, the value ``name`` of the rotated model, [..., features], in the original basis; float32."""
        return self._turned(name, x, inverse=True)

    def carried(self, batch: Mapping[str, Array], to: Bases) -> dict[str, Array]:
        """What a model whose bases are ``to`` is to be fed where this one is fed ``batch``: other caches."""
        fed = dict(batch)
        if self.values != to.values or self.rotations != to.rotations:
            for name, x in batch.items():
                if (name in self.values or name in to.values) and x.size:
                    fed[name] = to._turned(name, self.undo(name, x), inverse=False).astype(x.dtype)
        return fed

    def _turned(self, name: str, x: Array, *, inverse: bool) -> Array:
        if not (placements := self.values.get(name, ())):
            return x
        turned = change_basis(x.astype(np.float64), x.ndim - 1, placements, self.rotations, inverse=inverse)
        return turned.astype(np.float32)


def record(model: ir.Model, plan: Plan) -> None:
    """Write the bases of ``plan`` into the metadata of the model it was applied to."""
    values = {name: [[p.offset, p.length, p.rotation] for p in placements] for name, placements in plan.bases.items()}
    rotations = {name: rotation.to_json() for name, rotation in plan.rotations.items()}
    text = json.dumps({"version": 1, "values": values, "rotations": rotations}, separators=(",", ":"))
    model.metadata_props[KEY] = text


def recorded(model: ir.Model) -> Bases:
    """What :func:`record` wrote; empty for a model without. Raises ModelError for a record that cannot be read."""
    text = model.metadata_props.get(KEY)
    if text is None:
        return Bases({}, {})
    try:
        data = json.loads(text)
        if data["version"] != 1:
            raise ConfigError(f"version {data['version']!r}")
        return Bases(
            {name: tuple(Placement(o, n, r) for o, n, r in ps) for name, ps in data["values"].items()},
            {name: Rotation.from_json(r) for name, r in data["rotations"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"model: its metadata entry {KEY!r} cannot be read ({error})") from error


def record_fitted(model: ir.Model, names: Iterable[str]) -> None:
    """Note that the layers with these results hold bases that no record describes: those of a cache."""
    model.metadata_props[_FITTED] = json.dumps(sorted(names), separators=(",", ":"))


def fitted(model: ir.Model) -> frozenset[str]:
    """What :func:`record_fitted` wrote; empty for a model without. Raises ModelError for what cannot be read."""
    try:
        names = json.loads(model.metadata_props.get(_FITTED, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"model: its metadata entry {_FITTED!r} cannot be read")
    return frozenset(names)
