"""The steps in order: load -> discover -> rotate -> verify -> calibrate -> quantize -> save. Reading starts here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from onnx_quarot.buffers import reused_memory
from onnx_quarot.data import Batch, as_batches, input_specs
from onnx_quarot.differences import into_basis
from onnx_quarot.discovery.prepare import simplify
from onnx_quarot.errors import ConfigError, ModelError
from onnx_quarot.experts import ExpertSite, expert_sites
from onnx_quarot.forms import check_sites, layer_schemes, needed_opset, quantize_sites
from onnx_quarot.genai_folder import complete_folder
from onnx_quarot.kv_cache import CacheReport, check_cache, plan_cache, quantize_cache
from onnx_quarot.load import blamed_on, load, model_size
from onnx_quarot.opset import at_opset
from onnx_quarot.plan import DEFAULT_ROTATIONS, Plan
from onnx_quarot.plan_options import PlanOptions
from onnx_quarot.products import reproducible
from onnx_quarot.progress import NullProgress, Progress
from onnx_quarot.provenance import record
from onnx_quarot.replay import Replay
from onnx_quarot.report import Report, Stopwatch
from onnx_quarot.rewrite import rotate_model
from onnx_quarot.routers import routers
from onnx_quarot.save import Staged, check_apart, check_output, stage, workspace
from onnx_quarot.scheme import Scheme, parse_scheme
from onnx_quarot.seed_search import plain_seed, searches_seeds
from onnx_quarot.segments import runs_wide
from onnx_quarot.sites import LinearSite, linear_sites, matching, why_no_layers
from onnx_quarot.tables import TableReport, quantize_tables
from onnx_quarot.tied_tables import read_apart, share_tables
from onnx_quarot.verify import Verification
from onnx_quarot.verify import verify as verify_model
from onnx_quarot.widen import widen_layers, widened


def discover(
    model: str | Path,
    *,
    rotations: Iterable[str] = DEFAULT_ROTATIONS,
    block_size: int | None = None,
    seed: int | str | None = None,
    config: str | Path | None = None,
    matrix_dim: int | None = None,
) -> Plan:
    """Find out what can be rotated in the model at path ``model``; nothing is written.

    rotations: the kinds that may be used, any of R1, R2, R3, R4 (QuaRot, arXiv:2404.00456). block_size: rotate in
    blocks of that many features. seed: random signs, reproducible. config: a ``rotation_config.json`` with R1 pairs,
    honoured instead of what would be found for R1. matrix_dim: the size R1 is expected to have, checked.

    Raises ModelError for a file that is no model or has no linear layer, ConfigError for options that contradict it.
    """
    with blamed_on(model):
        return _plan(load(model), PlanOptions.of(rotations, block_size, plain_seed(seed), config), matrix_dim)


@reproducible
def rotate(
    source: str | Path,
    target: str | Path,
    *,
    plan: Plan | None = None,
    rotations: Iterable[str] = DEFAULT_ROTATIONS,
    block_size: int | None = None,
    seed: int | str | None = None,
    config: str | Path | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Write the model at ``source`` to ``target`` in rotated bases: the same function, without activation outliers.

    In a folder of its own the target gets what onnxruntime-genai needs, if the source's folder has it.

    plan: from :func:`discover`, instead of making one from the other options. verify: run both models and compare all
    outputs before the target is written; False is noted in the report.

    Raises ModelError, ConfigError, VerificationError (nothing is written) or SaveError.
    """
    path, clock = check_output(source, target, config), Stopwatch()
    with clock.step("discover"), blamed_on(source):
        model, options = load(source), None
        check_apart(model, path)
        if plan is None:
            options = PlanOptions.of(rotations, block_size, plain_seed(seed), config)
            plan = _plan(model, options)
    with workspace(path) as folder:
        show = progress or NullProgress()
        staged, proof = _rotated(model, Path(source), path, folder, plan, options, clock, verify, show)
        with clock.step("save"):
            staged.publish(Path(source))
            companions = complete_folder(Path(source), path)
    return _report(source, path, None, plan, proof, clock, notes=_folder_note(companions))


@searches_seeds
@reproducible
def quantize(
    source: str | Path,
    target: str | Path,
    calibration: Any,
    *,
    scheme: str | Scheme = "a8w8",
    mixed: bool | float = False,
    rotations: Iterable[str] | None = None,
    block_size: int | None = None,
    seed: int | str | None = None,
    method: str | None = None,
    weights: str | None = None,
    block: int | None = None,
    normalize: bool | None = None,
    kv_cache: str | None = None,
    tied: bool = True,
    tokenizer: str | Path | None = None,
    window: int = 512,
    windows: int | None = None,
    op_types: Sequence[str] = ("MatMul", "Gemm", "MoE", "Gather"),
    exclude: Sequence[str] = (),
    layers: Mapping[str, str | Scheme | None] | None = None,
    config: str | Path | None = None,
    matrix_dim: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Rotate the model at ``source``, quantize its linear layers, and write it to ``target``.

    In a folder of its own the target gets what onnxruntime-genai needs, if the source's folder has it.

    calibration: a CalibrationDataReader of onnxruntime, an iterable of dicts of arrays, the path of an ``.npz``, or
    text together with ``tokenizer`` (a ``tokenizer.json``), which is cut into windows of ``window`` tokens; at most
    ``windows`` batches are used. scheme: ``a<bits>w<bits>[-form]``, see :mod:`onnx_quarot.scheme`. mixed: give 16-bit
    activations to the few layers that need them, found by measuring; at most 5 % of the linear layers, or the share
    given. method: how activation ranges are found (``minmax``, ``percentile``, ``mse``, ``entropy``; None for the
    scheme's own). weights: how integer weights are chosen, ``rtn`` or ``gptq``; block: input features that share a
    scale, for schemes that have blocks; None for the scheme's own. normalize: 8-bit activations with one range a
    tensor whose rows (tokens) differ too much in length for that are divided by their lengths first, and products
    multiplied by these, with the method ``mse``; False never does. kv_cache: ``int8`` or ``int4`` (a scale a channel),
    or either with ``-tensor`` (a scale a tensor), for models whose attention is GroupQueryAttention. tied: an embedding
    table that is also the head's weight stays one matrix; False (or ``config``) makes it two, which saves one or two
    online transforms of a row a token. op_types: what is quantized; MoE stands for mixtures of experts, which become
    QMoE, Gather for tables of embeddings, and of experts' matrices that tokens pick, of which only the weights become
    integers.
    exclude: names of nodes (or patterns, or regular expressions that begin with ^) that stay in floating point. layers:
    other schemes, or None for floating point, by node name, pattern or operator type, the first that fits; routers of
    experts stay in floating point unless they have a scheme here. rotations:
    R1, R2 and R4 unless given, and R3 with a cache of 4 bits, for which R2 and R3 are made to measure; () means none,
    and R3 is left out where the cache stays in floating point. config and matrix_dim as in :func:`discover`. seed:
    random signs in the rotations; ``"search:K"`` tries the seeds 0 to K - 1 and keeps the one closest to the float
    model on the calibration data, at K + 1 times the cost.

    Raises ModelError, DataError, ConfigError, VerificationError or SaveError; then nothing is written.
    """
    path = check_output(source, target, calibration, tokenizer, config)
    clock, show = Stopwatch(), progress or NullProgress()
    chosen = parse_scheme(scheme).with_method(method).with_options(block=block, weights=weights, normalize=normalize)
    check_cache(kv_cache)
    wanted, fitted, unused = _wanted(rotations, kv_cache)
    with clock.step("discover"), blamed_on(source):
        model = load(source)
        check_apart(model, path)
        given, needed = model.opset_imports.get("", 0), needed_opset(chosen, layers or {}, mixed)
        older = given < needed
        model = at_opset(model, needed)
        simpler = simplify(model)
        specs = input_specs(model)
        sites, experts, others, left = _layers(model, op_types, exclude, layers or {})
        check_sites(sites, chosen, others)
        wide = widen_layers(model, sites, tables="Gather" in op_types)
        centred = kv_cache is not None and kv_cache.startswith("int4")  # which works behind RoPE
        options = PlanOptions.of(
            wanted,
            block_size,
            plain_seed(seed),
            config,
            tied=tied,
            keys=centred,
            convolutions=False,
            left=_left_in_floating_point(model, [*sites, *experts]),
        )
        plan = _plan(model, options, matrix_dim) if wanted or centred else None
        if not sites and not experts:
            raise ModelError(
                f"the model has no linear layer left to quantize (op types {', '.join(op_types)}){why_no_layers(model)}"
            )
    with clock.step("discover"):
        batches = as_batches(calibration, specs, tokenizer=tokenizer, window=window, limit=windows)
        first = next(batches)  # data that does not fit is found before any work is done
    with workspace(path) as folder:
        proof, float_path = None, Path(source)
        if plan is not None:
            inner = folder / "rotated.onnx"  # not the name of the result, which is staged in the same folder
            staged, proof = _rotated(model, Path(source), inner, folder, plan, options, clock, verify, show, first)
            float_path = staged.path
            model = load(float_path)
        elif wide or simpler or older:
            float_path = stage(model, folder / "float.onnx", folder).path
            model = load(float_path)
        sites, experts, others, left = _layers(model, op_types, exclude, layers or {})
        fed = chain([first], batches)
        data = Replay(fed if plan is None else (into_basis(batch, plan) for batch in fed), folder)
        with clock.step("quantize"):
            tables: list[TableReport] = []
            caches: list[CacheReport] = []
            if kv_cache is not None:
                found = plan_cache(model, float_path, kv_cache, data, show, fitted)
                if found.fold_values(model):  # which later calibration has to see
                    float_path = stage(model, folder / "values.onnx", folder).path
                caches = quantize_cache(model, found)
            done = quantize_sites(
                model, float_path, sites, chosen, data, folder, show, experts=experts, mixed=mixed, overrides=others
            )
            if "Gather" in op_types:
                share_tables(model, done.shared)
                tables = quantize_tables(model, skip=[weight.scales for weight in done.shared])
                read_apart(model, done.shared)
        with clock.step("save"), show.task("writing", None):
            stage(model, path, folder).publish(Path(source))
            companions = complete_folder(Path(source), path)
    name = chosen.name + (" mixed" if mixed else "")
    converted = (f"converted from opset {given} to {needed}, which {name} needs",) if older else ()
    notes = (*unused, *converted, *_router_notes(left), *done.notes, *_cache_notes(caches), *_folder_note(companions))
    name += "" if kv_cache is None else f", {kv_cache} cache"
    return _report(source, path, name, plan, proof, clock, tuple(done.reports), tuple(tables), notes)


def _layers(
    model: ir.Model, op_types: Sequence[str], exclude: Sequence[str], layers: Mapping[str, str | Scheme | None]
) -> tuple[list[LinearSite], list[ExpertSite], dict[str, Scheme], list[str]]:
    """The linear layers and the mixtures of experts to quantize, those with a scheme of their own, and routers left."""
    experts = expert_sites(model) if "MoE" in op_types else []
    names = [site.node_name for site in experts]
    kinds = tuple(kind for kind in op_types if kind not in ("MoE", "Gather"))
    sites = linear_sites(model, kinds, tuple(exclude), names)
    excluded = {name for pattern in exclude for name in matching(names, pattern)}
    experts = [site for site in experts if site.node_name not in excluded]
    every: list[LinearSite | ExpertSite] = [*sites, *experts]
    wanted, others = layer_schemes(every, layers)
    linear = [site for site in wanted if isinstance(site, LinearSite)]
    kept = routers(model, linear) - others.keys()
    return (
        [site for site in linear if site.node_name not in kept],
        [site for site in wanted if isinstance(site, ExpertSite)],
        others,
        [site.node_name for site in linear if site.node_name in kept],
    )


def _left_in_floating_point(model: ir.Model, quantized: Sequence[LinearSite | ExpertSite]) -> list[str]:
    """The layers that are not quantized, for which a transform would be made in vain."""
    kept = {site.node_name for site in quantized}
    every: list[LinearSite | ExpertSite] = [*linear_sites(model), *expert_sites(model)]
    return [site.node_name for site in every if site.node_name not in kept]


def _wanted(
    rotations: Iterable[str] | None, kv_cache: str | None
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The kinds of rotation to plan, those in place of which a cache finds bases of its own, and a note on R3."""
    wanted = (*DEFAULT_ROTATIONS, "R3") if rotations is None else tuple(rotations)
    without = tuple(r for r in wanted if r != "R3")
    if kv_cache is not None and kv_cache.startswith("int4"):
        return without, tuple(r for r in wanted if r in ("R2", "R3")), ()
    if "R3" not in wanted or (kv_cache is not None and rotations is not None):
        return wanted, (), ()
    unused = () if rotations is None else ("R3 was left out: it pays with a quantized key cache only",)
    return without, (), unused


def _folder_note(companions: tuple[str, ...]) -> tuple[str, ...]:
    return (f"beside the model, for onnxruntime-genai: {', '.join(companions)}",) if companions else ()


def _plan(model: ir.Model, options: PlanOptions, matrix_dim: int | None = None) -> Plan:
    plan = options.plan(model)
    sizes = {plan.rotations[name].size for name, kind in plan.kinds.items() if kind == "R1"}
    if matrix_dim is not None and sizes and sizes != {matrix_dim}:
        found = ", ".join(map(str, sorted(sizes)))
        raise ConfigError(f"r_matrix_dim: is {matrix_dim}, but the model's residual stream has {found} features")
    return plan


def _rotated(
    model: ir.Model,
    source: Path,
    target: Path,
    folder: Path,
    plan: Plan,
    options: PlanOptions | None,
    clock: Stopwatch,
    verify: bool,
    show: Progress,
    example: Batch | None = None,
) -> tuple[Staged, Verification | None]:
    """Stage the rotated model and prove that it is the same function, on the example if it takes no random inputs."""
    rotating = show.task("rotating weights", len(model.graph.initializers))
    with clock.step("rotate"), rotating as task, blamed_on(source), reused_memory():
        rotate_model(model, plan)
        record(model, plan)
        if options is not None:
            options.record(model)
        staged = stage(model, target, folder, on_tensor=task.advance, workers=2)
    if not verify:
        return staged, None

    def unrounded() -> Path:
        exact = at_opset(load(source), model.opset_imports.get("", 0))
        rotate_model(exact, plan, unrounded=True)
        return stage(exact, target.with_name(f"unrounded.{target.name}"), Path(scratch)).path

    narrow = runs_wide(load(source)) and not widened(model)  # else its weights are in float32, or it runs as it is
    with (
        clock.step("verify"),
        show.task("verifying", None),
        TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch,
    ):
        return staged, verify_model(source, staged.path, plan, unrounded=unrounded if narrow else None, example=example)


def _router_notes(left: Sequence[str]) -> list[str]:
    if not left:
        return []
    which = (
        f"the router of experts {left[0]!r}"
        if len(left) == 1
        else f"{len(left)} routers of experts, {left[0]!r} first,"
    )
    return [f"{which} stayed in floating point: errors there send rows elsewhere; a scheme in layers changes that"]


def _cache_notes(caches: Sequence[CacheReport]) -> list[str]:
    if not caches:
        return []
    before, after = sum(c.float_bytes for c in caches), sum(c.quantized_bytes for c in caches)
    return [f"key/value cache: {len(caches)} layers, {before:,} -> {after:,} bytes a token ({after / before:.3f}x)"]


def _report(
    source: str | Path,
    target: Path,
    scheme: str | None,
    plan: Plan | None,
    proof: Verification | None,
    clock: Stopwatch,
    quantized: tuple[Any, ...] = (),
    tables: tuple[Any, ...] = (),
    notes: tuple[str, ...] = (),
) -> Report:
    return Report(
        source=str(source),
        output=str(target),
        scheme=scheme,
        rotations=tuple(sorted(set(plan.kinds.values()))) if plan is not None else (),
        plan=plan,
        verification=proof,
        quantized=quantized,
        tables=tables,
        bytes_in=model_size(source),
        bytes_out=model_size(target),
        seconds=clock.seconds,
        notes=(*(plan.notes if plan is not None else ()), *notes),
    ).finished()
