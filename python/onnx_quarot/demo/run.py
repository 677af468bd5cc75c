"""The demo: one float model, quantized without and with rotations, measured beside each other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnx_quarot.custom_op import session
from onnx_quarot.data import load_tokenizer
from onnx_quarot.demo.fetch import SYSTEM_PROMPT, fetch_smollm2
from onnx_quarot.demo.job import Done, quantize_apart
from onnx_quarot.demo.text import calibration_text, evaluation_text
from onnx_quarot.errors import DataError, ModelError, SaveError
from onnx_quarot.evaluation import ModelFigures, evaluate_many
from onnx_quarot.generate import generate
from onnx_quarot.partial import disposable
from onnx_quarot.progress import NullProgress, Progress

WINDOW = 512
CALIBRATION_WINDOWS = 4
QUESTION = "What is the capital of France, and what is it known for?"
NEW_TOKENS = 48
VARIANTS = (("a8w8", "a8w8", ()), ("a8w8 + QuaRot", "a8w8-quarot", ("R1", "R2", "R4")))
"""Name in the table, name of the folder, rotations."""


@dataclass(frozen=True)
class Row:
    """One model of the table. perplexity_ratio, prefill and decode (tokens a second) were measured beside float.

    seconds and peak_memory (bytes) are what quantizing took, in a process of its own; None for the float model.
    """

    name: str
    bytes: int
    perplexity: float
    perplexity_ratio: float
    prefill: float
    prefill_ratio: float
    decode: float
    decode_ratio: float
    sentence: str
    seconds: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True)
class DemoResult:
    """The rows of the table, and what they were measured on."""

    model: str
    windows: int
    window: int
    threads: int
    question: str
    rows: tuple[Row, ...]
    output: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def table(self) -> Any:
        """For a terminal: the table in 80 columns, and below it what each model said."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("model", no_wrap=True)
        titles = (
            "size\nMB",
            "perplexity\n",
            "x float\n",
            "prefill\ntok/s",
            "decode\ntok/s",
            "time to\nquantize",
            "peak\nMB",
        )
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                f"{row.bytes / 1e6:.0f}",
                _figure(row.perplexity, 2),
                _figure(row.perplexity_ratio, 3),
                f"{row.prefill:.0f}",
                f"{row.decode:.0f}",
                "" if row.seconds is None else f"{row.seconds:.0f} s",
                "" if row.peak_memory is None else f"{row.peak_memory / 1e6:.0f}",
            )
        tokens = f"{self.windows * self.window:,} tokens of text in windows of {self.window}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        lines: list[Any] = [
            table,
            Text(f"{self.model}; {tokens}; {threads}."),
            Text(f"\nAsked: {self.question}"),
        ]
        lines += [Text(f"{row.name}: {' '.join(row.sentence.split())}") for row in self.rows]
        if self.output is not None:
            lines.append(Text(f"\nModels and texts are in {self.output}."))
        return Group(*lines)


def _figure(value: float, digits: int) -> str:
    """Fixed point while that stays narrow: a broken model's perplexity has no bound."""
    return f"{value:.{digits}f}" if value < 10_000 else f"{value:.1e}"


def run_demo(
    *,
    model: str | Path | None = None,
    text: str | Path | None = None,
    windows: int = 8,
    threads: int = 1,
    output: str | Path | None = None,
    picture: str | Path | None = None,
    progress: Progress | None = None,
) -> DemoResult:
    """Quantize a language model without and with rotations, and measure all three.

    model: an .onnx file with a tokenizer.json beside it, or its folder; None for SmolLM2-135M-Instruct, fetched once.
    text: a file, the first half of which calibrates and the second judges; None for Python's own language reference.
    windows: windows of 512 tokens to judge by. threads: of the runtime. output: a new folder that keeps float/, a8w8/,
    a8w8-quarot/ and both texts; it appears complete or not at all. picture: a PNG of one layer's activations.
    Errors: ModelError, DataError, SaveError, VerificationError.
    """
    show = progress or NullProgress()
    source = _source(model, show)
    parts = _texts(text)
    with _folder(output) as folder:
        for name, content in zip(("calibration.txt", "evaluation.txt"), parts, strict=True):
            (folder / name).write_text(content, encoding="utf-8")
        made = {}
        for name, place, rotations in VARIANTS:
            (folder / place).mkdir()
            made[name] = quantize_apart(
                quiet=progress is None,
                source=str(source),
                target=str(folder / place / "model.onnx"),
                calibration=str(folder / "calibration.txt"),
                tokenizer=str(source.parent / "tokenizer.json"),
                windows=CALIBRATION_WINDOWS,
                window=WINDOW,
                rotations=list(rotations),
            )
        rows = _measure(source, folder, made, windows, threads, show)
        if picture is not None:
            from onnx_quarot.demo.picture import draw

            draw(source, folder / "calibration.txt", Path(picture), progress=show)
        if output is not None:
            _complete(source, folder)
    return DemoResult(
        model=source.parent.name if source.name == "model.onnx" else source.stem,
        windows=windows,
        window=WINDOW,
        threads=threads,
        question=QUESTION,
        rows=rows,
        output=None if output is None else str(output),
    )


def _measure(
    source: Path,
    folder: Path,
    made: dict[str, Done],
    windows: int,
    threads: int,
    progress: Progress,
) -> tuple[Row, ...]:
    """All models side by side in one process, so that what disturbs one disturbs the others."""
    paths = {name: folder / place / "model.onnx" for name, place, _ in VARIANTS}
    found = evaluate_many(
        source,
        list(paths.values()),
        folder / "evaluation.txt",
        tokenizer=source.parent,
        window=WINDOW,
        windows=windows,
        threads=threads,
        progress=progress,
    )
    rows = [_row("float32", found[0].reference, _answer(source, source.parent, threads), None)]
    with progress.task("generating", len(paths)) as task:
        for (name, path), metrics in zip(paths.items(), found, strict=True):
            rows.append(_row(name, metrics.candidate, _answer(path, source.parent, threads), rows[0], made[name]))
            task.advance()
    return tuple(rows)


def _row(name: str, figures: ModelFigures, sentence: str, reference: Row | None, done: Done | None = None) -> Row:
    perplexity, prefill, decode = (
        figures.perplexity,
        figures.prefill_tokens_per_second,
        figures.decode_tokens_per_second,
    )
    if perplexity is None or prefill is None or decode is None:
        raise ModelError(f"model: {figures.path!r} is no language model with a cache; the demo needs one")
    return Row(
        name=name,
        bytes=figures.size_bytes,
        perplexity=perplexity,
        perplexity_ratio=perplexity / (reference.perplexity if reference else perplexity),
        prefill=prefill,
        prefill_ratio=prefill / (reference.prefill if reference else prefill),
        decode=decode,
        decode_ratio=decode / (reference.decode if reference else decode),
        sentence=sentence,
        seconds=None if done is None else done.seconds,
        peak_memory=None if done is None else done.peak_memory,
    )


def _answer(model: Path, tokenizer: Path, threads: int) -> str:
    """What the model says to the question: as a chat where its tokenizer knows ChatML, else as a continuation."""
    chat = load_tokenizer(tokenizer).token_to_id("<|im_start|>") is not None
    return generate(
        session(model, threads=threads),
        tokenizer,
        QUESTION,
        NEW_TOKENS,
        chat=chat,
        system=SYSTEM_PROMPT if chat else None,
    )


def _source(model: str | Path | None, progress: Progress) -> Path:
    if model is None:
        return fetch_smollm2(progress) / "model.onnx"
    path = Path(model)
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise ModelError(f"model: {str(path)!r} does not exist")
    if not (path.parent / "tokenizer.json").is_file():
        raise DataError(f"model: there is no tokenizer.json in {str(path.parent)!r}; the demo needs one")
    return path


def _texts(text: str | Path | None) -> tuple[str, str]:
    if text is None:
        return calibration_text(), evaluation_text()
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"text: {str(text)!r} cannot be read ({reason})") from None
    middle = len(content) // 2
    cut = content.find("\n", middle) + 1 or middle
    return content[:cut], content[cut:]


@contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    """A folder to work in: one that becomes `output` if all goes well, or one that is dropped."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="onnx_quarot_demo_") as scratch:
            yield Path(scratch)
        return
    target = Path(output)
    if target.exists():
        raise SaveError(f"output: {str(target)!r} exists already; give the name of a new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise SaveError(f"output: {str(target)!r} cannot be written ({error.strerror})") from error
    with disposable(Path(scratch)) as folder:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, target)


def _complete(source: Path, folder: Path) -> None:
    """The float model beside the others, and for all of them what their runtimes need."""
    shutil.copytree(source.parent, folder / "float")
    for _, place, _ in VARIANTS:
        for file in source.parent.glob("*.json"):
            if not (folder / place / file.name).exists():
                shutil.copy2(file, folder / place)
