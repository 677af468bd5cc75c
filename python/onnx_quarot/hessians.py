"""GPTQ over a whole model: Hessians of the layers' inputs, gathered for a few layers at a time, and what is solved.

The Hessians are those of the float (rotated) model. Only as many are held at once as fit the memory budget; the model
is run on the calibration data once for each such group of layers, no further than the group needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .calibrate import observe
from .errors import DataError
from .gptq import inverse_factor, solve
from .products import gram
from .progress import Progress
from .qparams import SolvedWeight
from .replay import Replay
from .scheme import Scheme
from .sites import LinearSite, WeightSource

Array = npt.NDArray[Any]

MEMORY = 768 << 20


class Gram:
    """Sums X^T X over rows, float32 [features, features]."""

    def __init__(self, features: int) -> None:
        self.sum = np.zeros((features, features), np.float32)
        self.rows = 0

    def update(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        self.sum += gram(rows)
        self.rows += len(rows)


def solve_weights(
    model_path: Path,
    sites: Sequence[LinearSite],
    schemes: Mapping[str, Scheme],
    data: Replay,
    folder: Path,
    progress: Progress,
    *,
    memory: int = MEMORY,
    threads: int | None = None,
) -> dict[str, SolvedWeight]:
    """Solve the weights of all `sites` whose scheme (by node name) says gptq; codes go to files in `folder`.

    memory: bytes of Hessians held at once (one layer's may exceed it). A weight shared by several layers is solved for
    the first one's input. Raises DataError for data that is not finite, or with fewer rows than a tenth of a layer's
    input features.
    """
    wanted = [site for site in sites if schemes[site.node_name].weights == "gptq"]
    by_input: dict[str, list[LinearSite]] = {}
    for site in wanted:
        by_input.setdefault(site.activation, []).append(site)
    solved: dict[str, SolvedWeight] = {}
    groups = list(_groups(by_input, memory))
    for number, names in enumerate(groups):
        grams = {name: Gram(by_input[name][0].depth) for name in names}
        part = "" if len(groups) == 1 else f" {number + 1} of {len(groups)}"
        readers = {name: by_input[name][0].node_name for name in names}
        task_name = f"gathering Hessians{part}"
        observe(model_path, grams, data, threads=threads, progress=progress, task=task_name, readers=readers)
        with progress.task(f"solving weights{part}", sum(len(by_input[name]) for name in names)) as task:
            for name in names:
                inputs = grams.pop(name)
                _enough(inputs, by_input[name][0])
                factor = inverse_factor(inputs.sum, schemes[by_input[name][0].node_name].damping)
                for site in by_input[name]:
                    scheme = schemes[site.node_name]
                    source = WeightSource(site)
                    codes, scale, zero = solve(source.read(), inputs.sum, factor, scheme.weight, scheme.block)
                    source.close()
                    path = folder / f"codes.{len(solved)}.npy"
                    np.save(path, codes)
                    solved[site.node_name] = SolvedWeight(path, scale, zero)
                    task.advance()
    return solved


def _groups(by_input: Mapping[str, Sequence[LinearSite]], memory: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, sites in by_input.items():
        need = 4 * sites[0].depth ** 2
        if group and size + need > memory:
            yield group
            group, size = [], 0
        group.append(name)
        size += need
    if group:
        yield group


def _enough(inputs: Gram, site: LinearSite) -> None:
    if inputs.rows * 10 < site.depth:
        raise DataError(
            f"calibration: {inputs.rows} rows reach {site.node_name!r}, which has {site.depth} input features; "
            f"gptq needs at least {-(-site.depth // 10)}, and gets better up to several times the features"
        )
