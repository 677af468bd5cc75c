"""What all commands share: one-line errors, options, and where they print."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from .cut_files import refuse_cut_files, survive_cut_files
from .errors import ConfigError, OnnxQuarotError, SaveError
from .interrupt import EXIT_CODE, prompt_interrupts
from .progress import Progress, terminal_progress

KINDS = ("R1", "R2", "R3", "R4")
F = TypeVar("F", bound=Callable[..., Any])


class Interrupted(click.ClickException):
    """Ctrl-C. Click's own handling prints an empty line first."""

    exit_code = EXIT_CODE


class OneLineErrors(click.Group):
    """A group whose failures are one line, `error: ...`, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with prompt_interrupts(), survive_cut_files():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except Exception as error:
            # An interrupt may come up as the failure of what it interrupted.
            if any(isinstance(cause, KeyboardInterrupt) for cause in _chain(error)):
                raise Interrupted("interrupted") from None
            raise

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; as `click.Group.main`, but for how failures are told."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.UsageError as error:
            command = f" (see {error.ctx.command_path} -h)" if error.ctx is not None else ""
            _fail(error.format_message() + command, 2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _fail("interrupted", Interrupted.exit_code)
        except BrokenPipeError:
            # The reader of our output has gone; nothing is wrong, and Python must not say so again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            _fail(_describe(error), 1)
        sys.exit(code if isinstance(code, int) else 0)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def _describe(error: Exception) -> str:
    if isinstance(error, OnnxQuarotError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _fail(message: str, code: int) -> NoReturn:
    if _debugging():
        traceback.print_exc()
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _debugging() -> bool:
    return os.environ.get("ONNX_QUAROT_DEBUG", "") not in ("", "0")


def _set_debug(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        os.environ["ONNX_QUAROT_DEBUG"] = "1"


def common(function: F) -> F:
    """Options every command has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print facts for machines on stdout.")(function)
    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show tracebacks of errors."
    )(function)


def parse_rotations(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """`R1,R2` -> ("R1", "R2"); `none` -> (); None where the option is not given."""
    if value is None:
        return None
    if value.strip().lower() == "none":
        return ()
    kinds = tuple(part.strip().upper() for part in value.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise click.BadParameter(f"{kind!r} is no rotation; give some of {', '.join(KINDS)}, or none")
    return kinds


def parse_seed(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | str | None:
    """A number, or search:K (which the pipeline checks)."""
    if value is None or value.startswith("search:"):
        return value
    try:
        return int(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number, and not search:K") from None


def new_file(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """A file that is written at the end: what is wrong with its place is said at the beginning."""
    if value is not None and value.is_dir():
        raise click.BadParameter(f"{str(value)!r} is a folder; give the path of a file")
    if value is not None and not os.access(value.parent, os.W_OK):
        raise click.BadParameter(f"the folder {str(value.parent)!r} does not exist, or is not writable")
    return value


def rotation_options(function: F) -> F:
    """Options that choose rotations."""
    function = click.option(
        "--seed",
        metavar="N",
        callback=parse_seed,
        help="Random signs, the same for the same seed; quantize also takes search:K, and tries K. "
        "[default: none but R4's own]",
    )(function)
    function = click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="A rotation_config.json, in place of discovery for R1.",
    )(function)
    function = click.option("--block-size", type=click.IntRange(min=2), help="Rotate in blocks of that many features.")(
        function
    )
    return click.option(
        "--rotations",
        callback=parse_rotations,
        help="Which kinds may be used: some of R1,R2,R3,R4, or none. [default: R1,R2,R4, and R3 with a 4-bit cache]",
    )(function)


def apart(written: Path | None, *read: Path | None) -> None:
    """ConfigError if a file to be written is one that is read."""
    for path in read:
        if written is not None and path is not None and written.exists() and path.exists() and written.samefile(path):
            raise ConfigError(f"output: {str(written)!r} is to be read as well; give another path")


def text_options(function: F) -> F:
    """Options that say how data is read."""
    function = click.option("--windows", type=click.IntRange(min=1), help="Use at most that many batches.")(function)
    function = click.option(
        "--window-length",
        type=click.IntRange(min=2),
        default=512,
        show_default=True,
        help="Tokens a batch, for text.",
    )(function)
    return click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="tokenizer.json, or its folder, for text. [default: beside the model]",
    )(function)


def tokenizer_for(data: Path, model: Path, tokenizer: Path | None) -> Path | None:
    """The tokenizer to read `data` with: the one given, else one beside the model if `data` is text."""
    if tokenizer is not None or data.suffix.lower() == ".npz":
        return tokenizer
    beside = model.parent / "tokenizer.json"
    return beside if beside.is_file() else None


def show(as_json: bool, facts: Callable[[], Any], table: Callable[[], Any]) -> None:
    """Print `facts` as JSON, or `table`, a Rich renderable, on stdout."""
    refuse_cut_files()
    if as_json:
        click.echo(json.dumps(facts(), indent=1))
        return
    from rich.console import Console

    # What goes to a file or a log does not depend on the terminal it was started from.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80)
    console.print(table())


def progress() -> Progress:
    """Where commands show what they do."""
    return terminal_progress(sys.stderr)


def write_text(path: Path, text: str) -> None:
    """Write a file that was asked for. Raises SaveError in one line."""
    refuse_cut_files()
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SaveError(f"output: {str(path)!r} cannot be written ({error.strerror})") from error
