"""How good and how fast a model is beside the one it was made from.

`evaluate` compares one candidate with its reference, `evaluate_many` several without running the reference
again, `measure` looks at one model alone. Language models are judged on their next-token distributions,
others on the distance between their outputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_quarot.comparison import Comparison, real_tokens, summed_loss
from onnx_quarot.custom_op import session as open_session
from onnx_quarot.data import Batch, InputSpec, as_batches, input_specs
from onnx_quarot.errors import ConfigError, DataError, ModelError, first_line
from onnx_quarot.generate import Decoder, extends_in_place
from onnx_quarot.load import load, model_size
from onnx_quarot.progress import NullProgress, Progress
from onnx_quarot.provenance import recorded

Array = npt.NDArray[Any]
ModelPath = str | os.PathLike[str]

_DECODE_STEPS = 16
_FLOATS = ("tensor(float)", "tensor(float16)", "tensor(double)")
# A reference whose earlier logits move by more than this (relative) when the last token changes looks ahead.
_CAUSAL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class ModelFigures:
    """One model by itself. Speeds are medians in tokens a second; None where a model has no such thing."""

    path: str
    size_bytes: int
    """The model file and its external data."""
    perplexity: float | None
    prefill_tokens_per_second: float | None
    """Tokens of a whole window or batch, at once."""
    decode_tokens_per_second: float | None
    """One token at a time, after a window of the data, for models that `generate.Decoder` can run."""


@dataclass(frozen=True)
class Metrics:
    """A candidate beside its reference.

    windows, tokens: what was run; tokens is the number of predictions compared (0 without token logits).
    perplexity_ratio: candidate / reference; 1 is no loss. kl_divergence: mean of KL(reference || candidate)
    over predictions, in nats. top1_agreement: share of predictions whose most likely token is the same.
    cosine, relative_error: per output, for models without token logits: the mean cosine of vectors along the
    last axis, and ||candidate - reference|| / ||reference|| over everything. logits: the output that predicts the next
    token.
    """

    reference: ModelFigures
    candidate: ModelFigures
    windows: int
    tokens: int
    perplexity_ratio: float | None
    kl_divergence: float | None
    top1_agreement: float | None
    cosine: dict[str, float]
    relative_error: dict[str, float]
    logits: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain Python values."""
        return asdict(self)


def evaluate(
    reference: ModelPath,
    candidate: ModelPath,
    data: object,
    *,
    tokenizer: object = None,
    window: int = 512,
    windows: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Metrics:
    """Compare `candidate` with `reference`, two ONNX files with the same inputs, on the same data.

    data, tokenizer, window: as for calibration (see `onnx_quarot.data.as_batches`). Text is cut into windows
    of `window` tokens that do not overlap; each window starts afresh, and its first token is not predicted.
    windows: the most windows or batches to run; all by default. threads: threads of each session, 1 by
    default so that speeds can be compared between machines and models. Both models run in one process, window
    by window in turn, so what disturbs one disturbs the other. Memory: both sessions, and the logits of one
    window of each. Raises ModelError for a file that is no model, DataError for data or a candidate that does
    not fit.
    """
    return evaluate_many(
        reference,
        [candidate],
        data,
        tokenizer=tokenizer,
        window=window,
        windows=windows,
        threads=threads,
        progress=progress,
    )[0]


def evaluate_many(
    reference: ModelPath,
    candidates: Sequence[ModelPath],
    data: object,
    *,
    tokenizer: object = None,
    window: int = 512,
    windows: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Metrics]:
    """`evaluate` for several candidates, in their order, running the reference once. All stay open."""
    if not candidates:
        raise ConfigError("candidates: is empty; give at least one model, or use measure() for one alone")
    runs, comparisons, count, logits = _run(
        [reference, *candidates],
        data,
        tokenizer,
        window,
        windows,
        1 if threads is None else threads,
        progress or NullProgress(),
    )
    figures = [run.figures() for run in runs]
    return [
        _metrics(figures[0], candidate, comparison, count, logits)
        for candidate, comparison in zip(figures[1:], comparisons, strict=True)
    ]


def measure(
    model: ModelPath,
    data: object,
    *,
    tokenizer: object = None,
    window: int = 512,
    windows: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelFigures:
    """Perplexity, speed and size of one model; arguments and errors as for `evaluate`."""
    runs, _, _, _ = _run(
        [model],
        data,
        tokenizer,
        window,
        windows,
        1 if threads is None else threads,
        progress or NullProgress(),
    )
    return runs[0].figures()


def fitted(model: ModelPath, specs: Sequence[InputSpec], batch: Batch) -> dict[str, Array]:
    """What `model`, whose inputs are `specs`, takes of a batch made for its reference. DataError if it does not fit."""
    feeds: dict[str, Array] = {}
    for spec in specs:
        if spec.name not in batch:
            raise DataError(f"{os.fspath(model)} has an input {spec.name!r} which the reference lacks")
        array = batch[spec.name]
        if array.dtype != spec.dtype:
            if array.any() or spec.shape is None or len(spec.shape) != array.ndim:
                raise DataError(
                    f"{os.fspath(model)}: input {spec.name!r} takes {spec.dtype}, the data has {array.dtype}"
                )
            # an empty cache: the candidate's may hold quantized numbers, several to an element
            dims = [dim if isinstance(dim, int) else array.shape[i] for i, dim in enumerate(spec.shape)]
            array = np.zeros(dims, spec.dtype)
        feeds[spec.name] = array
    return feeds


class _Run:
    """One open model and what was seen of it so far."""

    def __init__(self, path: ModelPath, threads: int, reference: _Run | None = None) -> None:
        """``reference``: the model that batches are made for; None for this one."""
        self.path = path
        model = load(path)
        self.specs: list[InputSpec] = input_specs(model)
        self.bases = recorded(model)
        self.in_place = extends_in_place(model)
        self.given = self.bases if reference is None else reference.bases
        self.session = open_session(path, threads=threads)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.loss = 0.0
        self.predictions = 0
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def run(self, batch: Batch, outputs: Sequence[str]) -> list[Array]:
        feeds = fitted(self.path, self.specs, self.given.carried(batch, self.bases))
        start = time.perf_counter()
        try:
            results: list[Array] = self.session.run(list(outputs), feeds)
        except Exception as error:  # onnxruntime raises its own kinds, without a common base
            raise DataError(f"{os.fspath(self.path)} cannot be run on this data: {first_line(error)}") from error
        seconds = time.perf_counter() - start
        ids = batch.get("input_ids")
        if ids is not None:
            self.prefill.append(ids.size / seconds)
        return results

    def figures(self) -> ModelFigures:
        return ModelFigures(
            path=os.fspath(self.path),
            size_bytes=model_size(self.path),
            perplexity=float(np.exp(self.loss / self.predictions)) if self.predictions else None,
            # the first run also pays for memory that later ones reuse
            prefill_tokens_per_second=median(self.prefill[1:] or self.prefill) if self.prefill else None,
            decode_tokens_per_second=1 / median(self.decode) if self.decode else None,
        )


def _metrics(
    reference: ModelFigures, candidate: ModelFigures, sums: Comparison, windows: int, logits: str | None
) -> Metrics:
    n = sums.predictions
    ratio = None
    if reference.perplexity is not None and candidate.perplexity is not None:
        ratio = candidate.perplexity / reference.perplexity
    return Metrics(
        reference=reference,
        candidate=candidate,
        windows=windows,
        tokens=n,
        perplexity_ratio=ratio,
        kl_divergence=sums.divergence / n if n else None,
        top1_agreement=sums.agreeing / n if n else None,
        cosine=sums.cosine(),
        relative_error=sums.relative_error(),
        logits=logits,
    )


def _run(
    paths: Sequence[ModelPath],
    data: object,
    tokenizer: object,
    window: int,
    windows: int | None,
    threads: int,
    progress: Progress,
) -> tuple[list[_Run], list[Comparison], int, str | None]:
    runs = [_Run(paths[0], threads)]
    runs += [_Run(path, threads, runs[0]) for path in paths[1:]]
    comparisons = [Comparison() for _ in paths[1:]]
    batches = as_batches(data, runs[0].specs, tokenizer=tokenizer, window=window, limit=windows)
    logits: str | None = None
    first: Batch | None = None
    count = 0
    with progress.task("evaluate", windows) as task:
        for batch in batches:
            if first is None:
                first = batch
                logits = _logits_output(runs[0], batch)
                names = _shared_outputs(runs, logits)
            if logits is not None:
                _add_logits(runs, comparisons, batch, logits)
            else:
                _add_outputs(runs, comparisons, batch, names)
            count += 1
            task.advance()
    if logits is not None and first is not None:
        _time_decoding(runs, first["input_ids"][:1])
    return runs, comparisons, count, logits


def _logits_output(run: _Run, batch: Batch) -> str | None:
    """The output that predicts the next token: [batch, tokens, wider than the largest id], not looking ahead.

    Whether a model looks ahead is tried: each row's last real token is changed, and nothing before it may move.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2:
        return None
    real = real_tokens(batch)
    last = ids.shape[1] - 1 - real[:, ::-1].argmax(-1)
    earlier = real & (np.arange(ids.shape[1]) < last[:, None])
    if not earlier.any():
        return None
    rows = np.arange(ids.shape[0])
    changed = {**batch, "input_ids": ids.copy()}
    changed["input_ids"][rows, last] = np.where(ids[rows, last] > 0, ids[rows, last] - 1, 1)
    found: str | None = None
    for name in (o.name for o in run.session.get_outputs() if o.type in _FLOATS and len(o.shape) == 3):
        before, after = run.run(batch, [name])[0], run.run(changed, [name])[0]
        if before.shape[:2] != ids.shape or before.shape[2] <= int(ids.max()):
            continue
        before = before[earlier].astype(np.float32)
        if np.linalg.norm(after[earlier] - before) <= _CAUSAL_TOLERANCE * np.linalg.norm(before):
            found = name
            break
    run.prefill.clear()
    return found


def _shared_outputs(runs: Sequence[_Run], logits: str | None) -> list[str]:
    """The outputs to compare; DataError when a candidate lacks one."""
    names = [o.name for o in runs[0].session.get_outputs() if o.type in _FLOATS] if logits is None else [logits]
    if not names:
        raise ModelError(f"{os.fspath(runs[0].path)} has no floating-point output to compare")
    for run in runs[1:]:
        for name in names:
            if name not in run.outputs:
                raise DataError(f"{os.fspath(run.path)} has no output {name!r}, which the reference has")
    return names


def _add_outputs(runs: Sequence[_Run], comparisons: Sequence[Comparison], batch: Batch, names: Sequence[str]) -> None:
    expected = runs[0].run(batch, names)
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        for name, a, b in zip(names, expected, run.run(batch, names), strict=True):
            comparison.add_outputs(name, runs[0].bases.undo(name, a), run.bases.undo(name, b))


def _add_logits(runs: Sequence[_Run], comparisons: Sequence[Comparison], batch: Batch, logits: str) -> None:
    ids = batch["input_ids"]
    real = real_tokens(batch)
    counted = real[:, 1:] & real[:, :-1]
    targets = ids[:, 1:][counted]
    # numbers of the counted positions when batch and tokens are one axis; the last token predicts nothing known
    rows = np.flatnonzero(np.pad(counted, ((0, 0), (0, 1))))
    expected = _flat(runs[0].run(batch, [logits])[0])
    runs[0].loss += summed_loss(expected, rows, targets)
    runs[0].predictions += len(targets)
    for run, comparison in zip(runs[1:], comparisons, strict=True):
        run.loss += comparison.add_logits(expected, _flat(run.run(batch, [logits])[0]), rows, targets)
        run.predictions += len(targets)


def _flat(logits: Array) -> Array:
    return logits.reshape(-1, logits.shape[-1])


def _time_decoding(runs: Sequence[_Run], ids: Array) -> None:
    """Feed most of the window, then the rest token by token to each model in turn; models that are no decoders are
    left out. No position is behind the window's: there may be none.
    """
    steps = min(_DECODE_STEPS, ids.shape[1] - 2)
    if steps < 1:
        return
    prompt = ids.shape[1] - steps - 1
    decoders: list[tuple[_Run, Decoder]] = []
    for run in runs:
        try:
            decoders.append((run, Decoder(run.session, run.specs, capacity=ids.shape[1] if run.in_place else None)))
        except ModelError:
            continue  # documented: its decode speed is None
    for _, decoder in decoders:
        decoder.feed(ids[:, :prompt])
    for step in range(steps + 1):
        token = ids[:, prompt + step][:, None]
        for run, decoder in decoders:
            start = time.perf_counter()
            decoder.feed(token)
            # the first step still grows buffers
            if step > 0:
                run.decode.append(time.perf_counter() - start)
