"""Trying several random rotations and keeping the best: quantized models differ by seed, mostly for no other reason.

The spread that is reported says how much of a single result was luck (SpinQuant, arXiv:2405.16406, saw differences of
several points between random rotations).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec

from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.errors import ConfigError, DataError
from onnx_quarot.evaluation import Metrics, evaluate
from onnx_quarot.kv_cache import past_names
from onnx_quarot.load import load
from onnx_quarot.progress import NullProgress
from onnx_quarot.report import Report
from onnx_quarot.save import check_output, workspace

P = ParamSpec("P")


@dataclass(frozen=True)
class SeedSearch:
    """The loss of every seed 0, 1, ... on calibration data; lower is better."""

    losses: tuple[float, ...]

    @property
    def best(self) -> int:
        """The seed with the least loss; the smallest of equal ones."""
        return min(range(len(self.losses)), key=self.losses.__getitem__)

    def note(self) -> str:
        """One line for the report."""
        return (
            f"seed {self.best} of 0 to {len(self.losses) - 1}: distance {min(self.losses):.4g} from the float model on "
            f"the calibration data (median of all {median(self.losses):.4g}, worst {max(self.losses):.4g})"
        )


def search_count(seed: int | str | None) -> int | None:
    """K of ``"search:K"``, None for a plain seed. Raises ConfigError for other text."""
    if not isinstance(seed, str):
        return None
    found = re.fullmatch(r"search:([1-9]\d{0,3})", seed)
    if found is None:
        raise ConfigError(f"seed: is {seed!r}; give a number, or 'search:K' to try K seeds")
    return int(found[1])


def plain_seed(seed: int | str | None) -> int | None:
    """The seed, where there is no data to search with. Raises ConfigError for ``"search:K"``."""
    if search_count(seed) is not None:
        raise ConfigError(f"seed: {seed!r} is judged on calibration data; only quantize has any")
    if seed is not None and int(seed) < 0:
        raise ConfigError(f"seed: is {seed}; give a number of at least 0")
    return int(seed) if seed is not None else None


def searches_seeds(quantize: Callable[P, Report]) -> Callable[P, Report]:
    """Let a function with the parameters of :func:`onnx_quarot.quantize` take ``seed="search:K"``.

    Seeds 0 to K - 1 are quantized and compared with the float model on the calibration data; then the best is quantized
    again, into its place. The loss is the KL divergence from the float model's predictions where it predicts tokens,
    else the mean distance 1 - cosine of its outputs.
    """
    signature = inspect.signature(quantize)

    @wraps(quantize)
    def with_search(*args: P.args, **kwargs: P.kwargs) -> Report:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        count = search_count(options["seed"])
        if count is None:
            return quantize(*args, **kwargs)
        source, target, show = Path(options["source"]), options["target"], options["progress"] or NullProgress()
        if options["rotations"] is not None and not tuple(options["rotations"]):
            raise ConfigError(f"seed: {options['seed']!r} needs rotations, there are none")
        path = check_output(source, target, *(options[name] for name in ("calibration", "tokenizer", "config")))
        model = load(source)
        batches = list(
            as_batches(
                options["calibration"],
                input_specs(model),
                tokenizer=options["tokenizer"],
                window=options["window"],
                limit=options["windows"],
            )
        )
        if options["kv_cache"] is not None:
            filled = next((n for n in past_names(model) if any(batch[n].any() for batch in batches)), None)
            if filled is not None:
                raise DataError(
                    f"seed: {options['seed']!r} compares models on the calibration data, which fills the cache "
                    f"{filled!r}; one of integers can only be compared from empty on"
                )
        options.update(calibration=batches, tokenizer=None, windows=None)

        def run(seed: int, place: str | Path, **changes: Any) -> Report:
            function: Callable[..., Report] = quantize
            return function(**{**options, "seed": seed, "target": place, **changes})

        losses = []
        with workspace(path) as folder, show.task("trying seeds", count) as task:
            for seed in range(count):
                place = folder / f"seed{seed}.onnx"
                run(seed, place, verify=False, progress=None)
                losses.append(_loss(evaluate(source, place, batches)))
                for made in folder.glob(f"{place.name}*"):
                    made.unlink()
                task.advance()
        found = SeedSearch(tuple(losses))
        report = run(found.best, target)
        return replace(report, notes=(*report.notes, found.note()))

    return with_search


def _loss(metrics: Metrics) -> float:
    if metrics.kl_divergence is not None:
        return metrics.kl_divergence
    return 1 - sum(metrics.cosine.values()) / max(1, len(metrics.cosine))
