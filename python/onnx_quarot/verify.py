"""Proof that a rewrite is exact: both models run on the same inputs, and every output agrees to rounding.

Caches that changed basis are fed and read through their rotation. If an output differs, both models are run again with
their inner tensors exposed, and the message names the one where the error begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from onnx_quarot.custom_op import session
from onnx_quarot.data import Dim, InputSpec, input_specs
from onnx_quarot.differences import first_difference, into_basis, out_of_basis, relative_error
from onnx_quarot.discovery.rope import has_fused_norms
from onnx_quarot.discovery.rules.readers import drops
from onnx_quarot.errors import ModelError, VerificationError, first_line
from onnx_quarot.load import load, total_bytes
from onnx_quarot.plan import Plan
from onnx_quarot.segments import run_in_segments, runs_wide
from onnx_quarot.wide_products import HALVES
from onnx_quarot.widen import widened

Array = np.ndarray[Any, Any]
_TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1.5e-1}
_ROUNDED = 0.15  # what rounding of weights may make of any output, once the rest is proven
_WHOLE_BYTES = 1 << 30  # models with more weights than this run piece by piece
_MOST_ELEMENTS = 1 << 28  # of an input: random values of it take 2 GiB
_DRAWN = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
_LENGTHS = {"batch": 1, "sequence": 8, "past": 4}
_LONG = 256  # for images that are halved up to eight times, and sounds that are cut into overlapping pieces


@dataclass(frozen=True)
class Verification:
    """What was compared: the largest relative error of any output, and of which.

    unrounded: the same of the weights before they were rounded to half precision, where that had to be looked at.
    """

    worst: float
    output: str
    tolerance: float
    outputs: int
    unrounded: float | None = None


def verify(
    original: Path,
    candidate: Path,
    plan: Plan,
    *,
    tolerance: float | None = None,
    unrounded: Callable[[], Path] | None = None,
    example: Mapping[str, Array] | None = None,
) -> Verification:
    """Compare two models output by output; the error is relative to the output's largest magnitude.

    Raises VerificationError naming the first tensor that differs by more than ``tolerance`` (default: 1e-4 for float32,
    2e-2 for float16, 0.15 for bfloat16; of the output or of the matrices, whichever is coarser).

    unrounded: makes the candidate with its weights of half precision in float32. Some models make much of the last bits
    of their weights: they are off by more than that, but by 0.15 at most, and are accepted if weights that were not
    rounded differ by no more than is allowed in float32. example: inputs the model is known to take, for one that takes
    no random ones (a trace whose lengths are in the graph though its inputs name none, or inputs without a shape).
    """
    model = load(original)
    names = [str(v.name) for v in model.graph.outputs]
    feeds, reference = _reference(original, input_specs(model), names, example)
    if runs_wide(model):  # caches in a new basis are not rounded either
        halves = [half.numpy() for half in HALVES]
        feeds = {name: a.astype(np.float32) if a.dtype in halves else a for name, a in feeds.items()}
    stored = _weight_tolerance(model)
    least = _TOLERANCE["float32"] if widened(load(candidate)) or _holds_float32(model) else 0.0
    given = tolerance
    limits = [given if given is not None else max(stored, least, _TOLERANCE.get(str(a.dtype), 0)) for a in reference]

    turned = into_basis(feeds, plan)
    run: Callable[[Path, dict[str, Array], list[str]], list[Array]] = _run

    def errors(path: Path) -> list[float]:
        result = map(_plain, run(path, turned, names))
        return [relative_error(a, out_of_basis(n, b, plan)) for n, a, b in zip(names, reference, result, strict=True)]

    found = errors(candidate)
    off = [i for i, error in enumerate(found) if not error <= limits[i]]
    own = ""
    if off and not _runs_in_pieces(original):
        # ONNX Runtime's optimizations round in other places in either model, and deep models make much of that: the
        # graphs as they are written decide.
        run, optimized = run_in_segments, reference
        reference = [_plain(a) for a in run(original, feeds, names)]
        found = errors(candidate)
        off = [i for i, error in enumerate(found) if not error <= limits[i]]
        noise = max(map(relative_error, optimized, reference))
        own = f" (and the model as given by {noise:.1e} from itself, optimized)" if noise > 1e-6 else ""
    exact: float | None = None
    if off and stored and unrounded is not None and max(found) <= _ROUNDED:
        candidate, limits = unrounded(), [_TOLERANCE["float32"]] * len(names)
        proof = errors(candidate)
        off = [i for i, error in enumerate(proof) if not error <= limits[i]]
        if off:
            found = proof
        else:
            exact, limits = max(proof), [_ROUNDED] * len(names)
    if off and (drawn := _drawn(model)) is not None:
        raise VerificationError(
            f"model: {drawn.op_type} {drawn.name!r} draws other numbers in every run, so that nothing can be proven; "
            "give it a seed in the file (or verify=False); nothing was written"
        )
    if off:
        name, error, limit = names[off[0]], found[off[0]], limits[off[0]]
        if reference[off[0]].dtype.kind == "f" and np.isnan(reference[off[0]]).any():
            raise VerificationError(
                f"model: output {name!r} of the model as given is not a number on random inputs; "
                "is there a weight that is not finite?"
            )
        raise VerificationError(
            f"rotated model: output {name!r} differs by {error:.1e} of its largest value (allowed {limit:.0e}){own}; "
            f"first difference at {first_difference(original, candidate, feeds, plan, name, limit)}; "
            "nothing was written"
        )
    last = max(range(len(names)), key=lambda i: (found[i], i))
    return Verification(found[last], names[last], limits[last], len(names), exact)


def _drawn(model: ir.Model) -> ir.Node | None:
    """The first node whose results are left to chance, and not the same by chance: it has no seed."""
    for node in model.graph.all_nodes():
        chance = node.op_type in _DRAWN or (node.op_type == "Dropout" and drops(node))
        if chance and node.domain == "" and "seed" not in node.attributes:
            return node
    return None


def _weight_tolerance(model: ir.Model) -> float:
    """What rounding matrices in their own type allows, whatever type the outputs have."""
    matrices = (v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) > 1)
    types = {v.dtype.name.lower() for v in matrices if v.dtype is not None}
    return max(_TOLERANCE[name] if name in ("float16", "bfloat16") else 0.0 for name in {*types, ""})


def _holds_float32(model: ir.Model) -> bool:
    """Whether anything is computed in float32, whatever type the outputs have."""
    graph = model.graph
    held = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    casts = (node.attributes.get_int("to", 0) for node in graph if node.op_type == "Cast")
    return any(value.dtype == ir.DataType.FLOAT for value in held) or ir.DataType.FLOAT in casts


def _reference(
    original: Path, specs: list[InputSpec], names: list[str], example: Mapping[str, Array] | None
) -> tuple[dict[str, Array], list[Array]]:
    """Inputs that the original accepts, and what it makes of them: with lengths by the names of dimensions, behind a
    cache or behind an empty one (not every model takes a prompt behind a cache), or by their places; or the example,
    which is also what inputs of unknown rank are fed; or longer ones.
    """
    attempts: list[Callable[[], dict[str, Array]]] = [lambda: random_feeds(specs)]
    if any("past" in str(d).lower() for spec in specs for d in spec.shape or ()):
        attempts.append(lambda: random_feeds(specs, past=0))
    if any(not isinstance(d, int) for spec in specs for d in spec.shape or ()):
        attempts.append(lambda: random_feeds(_by_place(specs)))
    if example is not None:
        attempts.append(lambda: dict(example))
    elif any(not isinstance(d, int) for spec in specs for d in (spec.shape or ())[1:]):
        attempts.append(lambda: random_feeds(map(_one_at_a_time, specs), sequence=_LONG))
    refused: VerificationError | ModelError | None = None
    for make in attempts:
        try:
            feeds = make()
            found = [_plain(a) for a in _run(original, feeds, names)]
            _refuse_nothing(names, found)
            return feeds, found
        except (VerificationError, ModelError) as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _plain(value: Array | list[Array]) -> Array:
    """An output as an array: of a sequence, its tensors' numbers one after the other."""
    if isinstance(value, np.ndarray):
        return value
    parts = [np.asarray(part).reshape(-1) for part in value or ()]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _refuse_nothing(names: Sequence[str], found: Sequence[Array]) -> None:
    """Outputs without a single number, as masks of random numbers may make them, are equal whatever was done."""
    for name, array in zip(names, found, strict=True):
        if array.dtype.kind == "f" and array.size and np.isnan(array).all():
            raise VerificationError(
                f"model: output {name!r} of the model as given is not a number on random inputs, so that they "
                "prove nothing; is there a weight that is not finite? If not, quantize with calibration data, which "
                "is fed instead (or verify=False); nothing was written"
            )


def _by_place(specs: list[InputSpec]) -> list[InputSpec]:
    """Symbols that say nothing ("s43") get names by where they stand: the batch comes first, a cache is a float tensor
    of rank 4 that grows along axis 2, and a mask is as long as the cache and the tokens, which are the first input.
    """
    tokens = next((s.shape[1] for s in specs if s.shape is not None and len(s.shape) == 2), None)
    cached = any(s.shape is not None and len(s.shape) == 4 and not isinstance(s.shape[2], int) for s in specs)

    def named(spec: InputSpec, axis: int, dim: Dim) -> Dim:
        rank = len(spec.shape or ())
        if isinstance(dim, int):
            return dim
        if axis == 0:
            return "batch"
        if rank == 4 and axis == 2 and spec.dtype.kind not in "iu":
            return "past"
        if rank == 2 and axis == 1 and cached and dim != tokens:
            return "total"
        return "length"

    return [replace(s, shape=s.shape and tuple(named(s, axis, d) for axis, d in enumerate(s.shape))) for s in specs]


def _one_at_a_time(spec: InputSpec) -> InputSpec:
    """With a batch, whatever its name, of one: long inputs are large."""
    first = (spec.shape or ())[:1]
    return spec if all(isinstance(d, int) for d in first) else replace(spec, shape=("batch", *(spec.shape or ())[1:]))


def random_feeds(
    specs: Iterable[InputSpec],
    seed: int = 0,
    past: int | None = None,
    sequence: int = _LENGTHS["sequence"],
) -> dict[str, Array]:
    """Inputs that exercise the whole graph: a short prompt behind a cache that is not empty.

    Symbolic dimensions get a small size each; one that is named after the total or past length of a sequence gets a
    consistent one. Integer inputs that select rows of a table stay inside it. Caches of a window are full in the end,
    unless `past` says how long caches are: nothing defines what attention leaves behind their last token.
    """
    rng, specs = np.random.default_rng(seed), list(specs)
    if past is None:
        past = max([_LENGTHS["past"], *(spec.window - sequence for spec in specs if spec.window is not None)])
    return {spec.name: _feed(spec, rng, past, sequence) for spec in specs}


def _feed(spec: InputSpec, rng: np.random.Generator, past: int, sequence: int) -> Array:
    if spec.shape is None:
        raise VerificationError(
            f"model: input {spec.name!r} has no shape, so nothing random can be fed to verify the result; give it one "
            "in the file, or quantize with calibration data, which is fed instead (or verify=False)"
        )
    room = spec.window or 0
    shape = tuple(
        d if isinstance(d, int) else max(_length(str(d), past, sequence), room if axis else 0)
        for axis, d in enumerate(spec.shape)
    )
    if math.prod(shape) > _MOST_ELEMENTS:
        raise VerificationError(
            f"model: input {spec.name!r} has shape {list(shape)}, which is more than verification feeds: at most "
            f"{_MOST_ELEMENTS:,} elements (or verify=False)"
        )
    dtype = np.dtype(spec.dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        if spec.rows is not None:
            return rng.integers(0, spec.rows, shape).astype(dtype)
        return np.ones(shape, dtype)
    return rng.standard_normal(shape).astype(dtype)


def _length(symbol: str, past: int, sequence: int) -> int:
    low = symbol.lower()
    if "total" in low or ("past" in low and "+" in low):
        return past + sequence
    if "past" in low:
        return past
    if "batch" in low:
        return _LENGTHS["batch"]
    return sequence


# ---------------------------------------------------------------------------------------------------------------------


def _runs_in_pieces(path: Path) -> bool:
    model = load(path)
    return runs_wide(model) or total_bytes(model) > _WHOLE_BYTES or has_fused_norms(model)


def _run(path: Path, feeds: dict[str, Array], names: list[str]) -> list[Array]:
    if _runs_in_pieces(path):
        return run_in_segments(path, feeds, names)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, with the same words
    # Exactness is asked of the graph as written, and packing every weight would double the memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    runnable = session(path, session_options=options)
    try:
        result: list[Array] = runnable.run(names, feeds)
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise VerificationError(
            f"model: it cannot be run on random inputs ({first_line(error)}); if it takes certain sizes only, its "
            "inputs should say so (or verify=False); nothing was written"
        ) from error
    return result
