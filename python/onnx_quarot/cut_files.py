"""Weights are mapped from files. A command survives that another process cuts one off meanwhile, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_quarot import _core
from onnx_quarot.errors import ModelError


@contextmanager
def survive_cut_files() -> Iterator[None]:
    """Within, bytes missing from mapped files read as zeros, in ONNX Runtime too, where they would end the process.

    Whatever came of them, ModelError is raised at the end, or before by :func:`refuse_cut_files`. It takes the signal
    SIGBUS of the whole process, so it is for commands, not for a library's calls.
    """
    _core.watch_bus_errors(True)
    try:
        yield
    except Exception:
        refuse_cut_files()  # what was computed from zeros may have failed in any way
        raise
    else:
        refuse_cut_files()
    finally:
        _core.watch_bus_errors(False)


def refuse_cut_files() -> None:
    """Before anything is published: raises ModelError if bytes were missing."""
    if _core.bus_errors():
        raise ModelError("model: external data was cut off, or could not be read, while it was in use")
