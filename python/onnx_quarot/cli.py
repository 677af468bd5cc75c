"""The command `onnx-quarot`. Answers go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 it could not be done, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from . import __version__
from .console import (
    OneLineErrors,
    apart,
    common,
    new_file,
    progress,
    rotation_options,
    show,
    text_options,
    tokenizer_for,
    write_text,
)
from .errors import ConfigError
from .interrupt import EXIT_CODE

# As in `scheme`, which takes half a second to import: too long for -h.
METHODS = ("minmax", "percentile", "mse", "entropy")


@click.group(
    cls=OneLineErrors,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="onnx-quarot")
@click.pass_context
def cli(context: click.Context) -> None:
    """Quantize ONNX models without losing their accuracy: Hadamard rotations first.

    \b
    Example, a real language model from nothing:
      onnx-quarot demo --output smollm2
    It leaves its models in smollm2/; the other commands' examples use them.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(short_help="Show what can be rotated, and at what cost.")
@click.argument("model", type=click.Path(path_type=Path))
@rotation_options
@click.option(
    "--write-config",
    type=click.Path(path_type=Path),
    callback=new_file,
    help="Write what was found for R1 to this file.",
)
@click.option("--html", type=click.Path(path_type=Path), callback=new_file, help="Draw the rotations into this page.")
@common
def discover(
    model: Path,
    rotations: tuple[str, ...] | None,
    block_size: int | None,
    config: Path | None,
    seed: int | str | None,
    write_config: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show what can be rotated in MODEL, at what cost, and what was declined and why.

    \b
    Example (models of onnx-quarot demo --output smollm2):
      onnx-quarot discover smollm2/float/model.onnx --write-config rotation_config.json
      onnx-quarot discover smollm2/float/model.onnx --html rotations.html
    """
    from . import pipeline
    from .plan import DEFAULT_ROTATIONS
    from .report import plan_table

    for written in (write_config, html):
        apart(written, model, config)
    wanted = DEFAULT_ROTATIONS if rotations is None else rotations
    plan = pipeline.discover(model, rotations=wanted, block_size=block_size, seed=seed, config=config)
    if write_config is not None:
        from .load import load
        from .rotation_config import write_rotation_config

        write_text(write_config, json.dumps(write_rotation_config(load(model), plan), indent=1) + "\n")
    if html is not None:
        from .load import load
        from .plan_page import plan_page

        write_text(html, plan_page(load(model), plan, title=f"Rotations of {model.name}"))
    show(as_json, plan.to_json, lambda: plan_table(plan))


@cli.command(short_help="Write a model in rotated bases.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@rotation_options
@click.option("--no-verify", is_flag=True, help="Do not compare outputs before writing.")
@common
def rotate(
    model: Path,
    output: Path,
    rotations: tuple[str, ...] | None,
    block_size: int | None,
    config: Path | None,
    seed: int | str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Write MODEL to OUTPUT in rotated bases: the same function, without activation outliers.

    \b
    Example (models of onnx-quarot demo --output smollm2):
      onnx-quarot rotate smollm2/float/model.onnx rotated.onnx
    """
    from . import pipeline
    from .plan import DEFAULT_ROTATIONS

    if rotations == ():
        raise ConfigError("--rotations is none; rotate needs at least one of R1, R2, R3, R4")
    report = pipeline.rotate(
        model,
        output,
        rotations=DEFAULT_ROTATIONS if rotations is None else rotations,
        block_size=block_size,
        seed=seed,
        config=config,
        verify=not no_verify,
        progress=progress(),
    )
    show(as_json, report.to_json, report.table)


@cli.command(short_help="Rotate and quantize a model.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--calibration",
    required=True,
    type=click.Path(path_type=Path),
    help="An .npz with one array for each input, or a text file.",
)
@text_options
@click.option(
    "--scheme",
    default="a8w8",
    show_default=True,
    help="Bits of activations and weights: a8w8, a16w8, a8w4, a4w4, a8w8-dynamic, a8w4-dynamic, "
    "a8w8-dynamic-tensor, a8w8-block, a8w4-block, a8w4-matmulnbits.",
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Find the few layers that need 16-bit activations, at most 5 % of them (see --budget).",
)
@click.option("--budget", type=click.FloatRange(0, 1, min_open=True), help="With --mixed: the share of layers.")
@click.option("--method", type=click.Choice(METHODS), help="How activation ranges are found.")
@click.option("--weights", type=click.Choice(["rtn", "gptq"]), help="How integer weights are chosen.")
@click.option("--block", type=int, help="Input features that share a scale, for a8w8-block, a4w4, a8w4-*.")
@click.option("--no-normalize", is_flag=True, help="Never divide activations by the lengths of their rows.")
@click.option(
    "--kv-cache",
    type=click.Choice(["int8", "int4", "int8-tensor", "int4-tensor"]),
    help="Integers in the key/value cache, with a scale a channel (or a tensor).",
)
@click.option(
    "--untie", is_flag=True, help="Rotate a head that shares its matrix with the embedding table: two matrices."
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    help="Leave this layer, or those a pattern fits, in floating point. Repeatable.",
)
@rotation_options
@click.option("--no-verify", is_flag=True, help="Do not compare outputs of the rotated model before quantizing.")
@common
def quantize(
    model: Path,
    output: Path,
    calibration: Path,
    tokenizer: Path | None,
    window_length: int,
    windows: int | None,
    scheme: str,
    mixed: bool,
    budget: float | None,
    method: str | None,
    weights: str | None,
    block: int | None,
    no_normalize: bool,
    kv_cache: str | None,
    untie: bool,
    exclude: Sequence[str],
    rotations: tuple[str, ...] | None,
    block_size: int | None,
    config: Path | None,
    seed: int | str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Rotate MODEL, quantize its linear layers, and write it to OUTPUT.

    \b
    Example (models of onnx-quarot demo --output smollm2):
      onnx-quarot quantize smollm2/float/model.onnx a8w8.onnx \\
        --calibration smollm2/calibration.txt --windows 4
    """
    from . import pipeline

    if budget is not None and not mixed:
        raise ConfigError("--budget is given without --mixed; it is the share of layers --mixed may choose")
    report = pipeline.quantize(
        model,
        output,
        calibration,
        scheme=scheme,
        mixed=mixed if budget is None else budget,
        rotations=rotations,
        block_size=block_size,
        seed=seed,
        method=method,
        weights=weights,
        block=block,
        normalize=False if no_normalize else None,
        kv_cache=kv_cache,
        tied=not untie,
        tokenizer=tokenizer_for(calibration, model, tokenizer),
        window=window_length,
        windows=windows,
        exclude=tuple(exclude),
        config=config,
        verify=not no_verify,
        progress=progress(),
    )
    show(as_json, report.to_json, report.table)


@cli.command(short_help="Compare two models: accuracy, size, speed.")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="An .npz with one array for each input, or text.",
)
@text_options
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime.")
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    callback=new_file,
    help="Write a page: figures, outliers, noise by layer, times.",
)
@click.option(
    "--sensitivity",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="With --html: time to run the model once with each layer alone quantized; 0 leaves it out.",
)
@common
def evaluate(
    reference: Path,
    candidate: Path,
    data: Path,
    tokenizer: Path | None,
    window_length: int,
    windows: int | None,
    threads: int,
    html: Path | None,
    sensitivity: float,
    as_json: bool,
) -> None:
    """Compare CANDIDATE with REFERENCE on the same data: accuracy, size and speed.

    \b
    Example (models of onnx-quarot demo --output smollm2):
      onnx-quarot evaluate smollm2/float/model.onnx smollm2/a8w8-quarot/model.onnx \\
        --data smollm2/evaluation.txt --windows 4 --html evaluation.html
    """
    from .evaluation import evaluate as run
    from .info import metrics_table

    apart(html, reference, candidate, data)
    metrics = run(
        reference,
        candidate,
        data,
        tokenizer=tokenizer_for(data, reference, tokenizer),
        window=window_length,
        windows=windows,
        threads=threads,
        progress=progress(),
    )
    if html is not None:
        from .evaluation_page import evaluation_page

        page = evaluation_page(
            reference,
            candidate,
            metrics,
            data,
            tokenizer=tokenizer_for(data, reference, tokenizer),
            window=window_length,
            threads=threads,
            sensitivity=sensitivity,
            progress=progress(),
        )
        write_text(html, page)
    show(as_json, metrics.to_json, lambda: metrics_table(metrics))


@cli.command(short_help="Show versions, the kernel in use, a model's facts.")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@common
def info(model: Path | None, as_json: bool) -> None:
    """Show versions, the kernel in use and where the operator library is; with MODEL, what is in it.

    \b
    Example:
      onnx-quarot info
    """
    from .info import facts_table, installation, model_facts

    facts = {"installation": installation()}
    if model is not None:
        facts["model"] = model_facts(model)
    show(as_json, lambda: facts, lambda: facts_table(facts))


@cli.command(short_help="Quantize a real language model, and compare.")
@click.option("--model", type=click.Path(path_type=Path), help="Your own model: an .onnx file, or its folder.")
@click.option("--text", type=click.Path(path_type=Path), help="Your own text: one half calibrates, the other judges.")
@click.option("--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of 512 to judge by.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime.")
@click.option("--output", type=click.Path(path_type=Path), help="Keep models and texts in this new folder.")
@click.option(
    "--picture", type=click.Path(path_type=Path), callback=new_file, help="Draw one layer's activations into this PNG."
)
@common
def demo(
    model: Path | None,
    text: Path | None,
    windows: int,
    threads: int,
    output: Path | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Quantize a real language model with and without rotations, and compare.

    \b
    Example:
      onnx-quarot demo --output smollm2
    """
    from .demo.run import run_demo

    result = run_demo(
        model=model,
        text=text,
        windows=windows,
        threads=threads,
        output=output,
        picture=picture,
        progress=progress(),
    )
    show(as_json, result.to_json, result.table)


@cli.command(short_help="Measure the Hadamard kernel on this machine.")
@click.option("--largest", type=click.IntRange(min=64), default=2**20, show_default=True, help="Longest vector.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, 60, min_open=True),
    default=0.05,
    show_default=True,
    help="For each contender of each case.",
)
@click.option(
    "--picture", type=click.Path(path_type=Path), callback=new_file, help="Draw ns per element against n into this PNG."
)
@common
def bench(largest: int, seconds: float, picture: Path | None, as_json: bool) -> None:
    """Measure the Hadamard kernel on this machine, beside fht-cpu (if installed), numpy and memcpy.

    \b
    Example:
      onnx-quarot bench
    """
    from .bench_report import draw, run_bench

    result = run_bench(largest=largest, seconds=seconds, progress=progress())
    if picture is not None:
        draw(result, picture)
    show(as_json, result.to_json, result.table)


def main() -> None:
    """The console script."""
    try:
        cli()
    except SystemExit as done:
        if done.code == EXIT_CODE:
            # At once: Python would wait for threads to do what is still in their queues.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        raise


if __name__ == "__main__":
    main()
