"""Progress of long work: a bar on a terminal, plain lines elsewhere, or nothing.

Anything that takes `progress` opens a task with `progress.task(description, total)` and calls `advance` on it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Task(Protocol):
    """One running piece of work."""

    def advance(self, n: int = 1) -> None:
        """`n` more of `total` are done."""


class Progress(Protocol):
    """Where progress is shown. Tasks may nest."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Show `description` until the context ends; `total` None means that the amount is not known."""


class _Silent:
    def advance(self, n: int = 1) -> None:
        pass


class NullProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Nothing."""
        yield _Silent()


class _PlainTask:
    def __init__(self, progress: PlainProgress, description: str, total: int | None) -> None:
        self.progress, self.description, self.total = progress, description, total
        self.done = 0
        self.said = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.said >= self.progress.interval and self.done != self.total:
            self.said = now
            share = f"{100 * self.done // self.total}%" if self.total else str(self.done)
            self.progress.line(f"{self.description}: {share}")


class PlainProgress:
    """One line when a task ends, with its seconds, and one every `interval` seconds while it runs."""

    def __init__(self, stream: TextIO | None = None, interval: float = 5.0) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.interval = interval

    def line(self, text: str) -> None:
        """Write one line at once."""
        print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """A task that speaks when it ends; one that fails leaves the last word to the error."""
        start = time.monotonic()
        yield _PlainTask(self, description, total)
        self.line(f"{description}: done in {time.monotonic() - start:.1f} s")


class RichProgress:
    """Bars on a terminal. The screen is taken while at least one task runs, and given back after."""

    def __init__(self, stream: TextIO | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), console=Console(file=stream, stderr=stream is None))
        self._running = 0

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """A bar; full when its task ends well."""
        if self._running == 0:
            self._bars.start()
        self._running += 1
        bar = self._bars.add_task(description, total=total)
        try:
            yield _RichTask(self._bars, bar)
            finished = self._bars.tasks[self._bars.task_ids.index(bar)]
            self._bars.update(bar, total=finished.total or 1, completed=finished.total or 1)
        finally:
            self._bars.stop_task(bar)
            self._running -= 1
            if self._running == 0:
                self._bars.stop()
                for done in list(self._bars.task_ids):
                    self._bars.remove_task(done)


class _RichTask:
    def __init__(self, bars: Bars, bar: TaskID) -> None:
        self._bars, self._bar = bars, bar

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._bar, n)


def terminal_progress(stream: TextIO | None = None) -> Progress:
    """Bars if `stream` (default stderr) is a terminal, else plain lines."""
    target = sys.stderr if stream is None else stream
    return RichProgress(stream) if target.isatty() else PlainProgress(stream)
