"""GPTQ over a whole model: Hessians of the layers' inputs, gathered for a few layers at a time, and what is solved.

The Hessians are those of the float (rotated) model; where activations have 4 bits, of its activations so quantized,
and weights are first made ones that answer to those. Only as many are held at once as fit the memory budget; the model
is run on the calibration data once for each such group of layers, no further than the group needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .calibrate import observe
from .errors import DataError
from .gptq import inverse_factor, solve
from .products import gram, product
from .progress import Progress
from .qparams import SolvedWeight
from .replay import Replay
from .scheme import Scheme
from .sites import LinearSite, WeightSource
from .sufficiency import Seen, hessian_remarks, watch
from .tokens import block_of, coarse

Array = npt.NDArray[Any]

MEMORY = 768 << 20
_FAR_MORE = 4  # times as many rows: a layer with fewer reads a pool of them, not what happened to be too little data


class Gram:
    """Sums X^T X over rows, float32 [features, features]."""

    def __init__(self, features: int) -> None:
        self.sum = np.zeros((features, features), np.float32)
        self.rows = 0

    def update(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        self.sum += gram(rows)
        self.rows += len(rows)


class CoarseGram(Gram):
    """Gram of rows as a quantizer leaves them, Q, and what that took from them: sums Q^T Q and Q^T (X - Q)."""

    def __init__(self, features: int, quantizer: Callable[[Array], Array]) -> None:
        super().__init__(features)
        self.lost = np.zeros((features, features), np.float32)
        self._quantizer = quantizer

    def update(self, values: Array) -> None:
        rows = values.reshape(-1, values.shape[-1]).astype(np.float32, copy=False)
        left = self._quantizer(rows)
        super().update(left)
        self.lost += product(np.ascontiguousarray(left.T), rows - left)

    def answering(self, weight: Array, factor: Array) -> Array:
        """The weight V of least squared error Q V - X W, by the :func:`inverse_factor` of the sum; float32.

        Where quantization drowns a direction of the inputs, V listens less to it.
        """
        missing = product(factor, product(self.lost, weight))
        answer: Array = (weight + product(factor.T, missing)).astype(np.float32)
        return answer


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
) -> tuple[dict[str, SolvedWeight], list[str]]:
    """Solve the weights of all `sites` whose scheme (by node name) says gptq; codes go to files in `folder`.

    Returned with remarks on the data. memory: bytes of Hessians held at once (one layer's may exceed it). A weight
    shared by several layers is solved for the first one's input. Layers that saw fewer rows than a tenth of their
    input features are left to be rounded if others see far more (a head reads one row an image), as are those that saw
    zeros alone (the first layer of DETR's decoder). DataError otherwise, and for data that is not finite.
    """
    wanted = [site for site in sites if schemes[site.node_name].weights == "gptq"]
    by_input: dict[str, list[LinearSite]] = {}
    for site in wanted:
        by_input.setdefault(site.activation, []).append(site)
    solved: dict[str, SolvedWeight] = {}
    seen: dict[str, Seen] = {}
    few: list[str] = []
    nothing: list[str] = []
    groups = list(_groups(by_input, schemes, memory))
    for number, names in enumerate(groups):
        grams = {name: _gram(by_input[name][0], schemes) for name in names}
        part = "" if len(groups) == 1 else f" {number + 1} of {len(groups)}"
        blamed = {name: by_input[name][0].node_name for name in names}
        task_name = f"gathering Hessians{part}"
        watched = watch(grams)
        observe(model_path, watched, data, threads=threads, progress=progress, task=task_name, readers=blamed)
        seen |= {name: sink.seen() for name, sink in watched.items()}
        del watched  # it holds the Hessians
        with progress.task(f"solving weights{part}", sum(len(by_input[name]) for name in names)) as task:
            for name in names:
                inputs = grams.pop(name)
                too_few = inputs.rows * 10 < by_input[name][0].depth
                if too_few or not inputs.sum.any():
                    (few if too_few else nothing).append(name)
                    task.advance(len(by_input[name]))
                    continue
                factor = inverse_factor(inputs.sum, schemes[by_input[name][0].node_name].damping)
                for site in by_input[name]:
                    scheme = schemes[site.node_name]
                    source = WeightSource(site)
                    weight = source.read()
                    if isinstance(inputs, CoarseGram):
                        weight = inputs.answering(weight, factor)
                    codes, scale, zero = solve(weight, inputs.sum, factor, scheme.weight, scheme.block)
                    del weight  # mapped memory must not be referred to when it is let go
                    source.close()
                    path = folder / f"codes.{len(solved)}.npy"
                    np.save(path, codes)
                    solved[site.node_name] = SolvedWeight(path, scale, zero)
                    task.advance()
    most = max((found.rows for found in seen.values()), default=0)
    reasons = {name: _shortage(seen[name].rows, by_input[name][0]) for name in few}
    for name, reason in reasons.items():
        if seen[name].rows * _FAR_MORE > most:
            raise DataError(f"calibration: {reason}; weights='rtn' needs none")
    reasons |= {name: f"the inputs of {by_input[name][0].node_name!r} are zero throughout" for name in nothing}
    if nothing and not solved:
        raise DataError(f"calibration: {reasons[nothing[0]]}; gptq has nothing to go by")
    remarks = hessian_remarks(
        {name: found for name, found in seen.items() if name not in few},
        {name: readers[0].depth for name, readers in by_input.items()},
    )
    for names in filter(None, (few, nothing)):
        count = sum(len(by_input[name]) for name in names)
        remarks.append(f"weights of {count} of {len(wanted)} layers were rounded without gptq: {reasons[names[0]]}")
    return solved, remarks


def _gram(site: LinearSite, schemes: Mapping[str, Scheme]) -> Gram:
    scheme = schemes[site.node_name]
    if scheme.form != "token":  # 8 and 16 bits take too little to make up for
        return Gram(site.depth)
    block = block_of(site, scheme)
    return CoarseGram(site.depth, lambda rows: coarse(rows, scheme.activation, block))


def _groups(
    by_input: Mapping[str, Sequence[LinearSite]], schemes: Mapping[str, Scheme], memory: int
) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, sites in by_input.items():
        matrices = 2 if schemes[sites[0].node_name].form == "token" else 1
        need = matrices * 4 * sites[0].depth ** 2
        if group and size + need > memory:
            yield group
            group, size = [], 0
        group.append(name)
        size += need
    if group:
        yield group


def _shortage(rows: int, site: LinearSite) -> str:
    return (
        f"{rows} rows reach {site.node_name!r}, which has {site.depth} input features; "
        f"gptq needs at least {-(-site.depth // 10)}, and gets better up to several times the features"
    )
