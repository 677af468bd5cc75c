"""What a plan was made with, so that it can be made again: a rotated model carries it in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_quarot.discovery import discover_model
from onnx_quarot.errors import ModelError
from onnx_quarot.plan import Plan
from onnx_quarot.rotation_config import Pair, plan_from_config, read_rotation_config

KEY = "onnx_quarot.plan"


@dataclass(frozen=True)
class PlanOptions:
    """Options of discovery, as for :func:`onnx_quarot.quantize`; ``pairs`` are those of a rotation_config.json."""

    rotations: tuple[str, ...]
    block_size: int | None = None
    seed: int | None = None
    pairs: tuple[Pair, ...] | None = None
    tied: bool = False
    keys: bool = False
    convolutions: bool = True
    left: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rotations: Iterable[str],
        block_size: int | None,
        seed: int | None,
        config: str | Path | None,
        *,
        tied: bool = False,
        keys: bool = False,
        convolutions: bool = True,
        left: Iterable[str] = (),
    ) -> PlanOptions:
        """With ``config`` read. Raises ConfigError if it cannot be."""
        pairs = None if config is None else read_rotation_config(config)
        return cls(tuple(rotations), block_size, seed, pairs, tied, keys, convolutions, tuple(left))

    def plan(self, model: ir.Model) -> Plan:
        """The plan for ``model``; errors as :func:`onnx_quarot.discovery.discover_model`."""
        if self.pairs is not None:
            return plan_from_config(
                model,
                self.pairs,
                rotations=self.rotations,
                block_size=self.block_size,
                seed=self.seed,
                keys=self.keys,
                convolutions=self.convolutions,
                left=self.left,
            )
        return discover_model(
            model,
            rotations=self.rotations,
            block_size=self.block_size,
            seed=self.seed,
            tied=self.tied,
            keys=self.keys,
            convolutions=self.convolutions,
            left=self.left,
        )

    def record(self, model: ir.Model) -> None:
        """Write the options into the metadata of a model."""
        model.metadata_props[KEY] = json.dumps({"version": 1, **asdict(self)}, separators=(",", ":"))


def recorded_options(model: ir.Model) -> PlanOptions | None:
    """What :meth:`PlanOptions.record` wrote; None for a model without. ModelError for what cannot be read."""
    text = model.metadata_props.get(KEY)
    if text is None:
        return None
    try:
        data = json.loads(text)
        if data.pop("version") != 1:
            raise ValueError("another version")
        pairs = data.pop("pairs")
        if pairs is not None:
            pairs = tuple(Pair(tuple(p["prev_nodes"]), p["norm_node"], tuple(p["next_nodes"])) for p in pairs)
        left = tuple(data.pop("left", ()))
        return PlanOptions(tuple(data.pop("rotations")), pairs=pairs, left=left, **data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"model: its metadata entry {KEY!r} cannot be read ({error})") from error
