"""Folders of half-done work beside a target: ``.<target>.<random>.partial``, locked while their process lives.

A killed process cannot clean up. Its lock goes with it, though, and that is how the next one knows what is abandoned.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = "lock"
_ANNOUNCED = "publishing"  # says which file comes beside the target, and which go

_live: set[Path] = set()


def claim(target: Path) -> tuple[Path, int]:
    """A new folder for work on ``target``, and the descriptor that keeps it locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        _live.add(folder)
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process took the folder, not yet locked, for an abandoned one
            _live.discard(folder)
            continue
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            _live.discard(folder)
            raise
        if _try_lock(lock) is not False and (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)
        _live.discard(folder)


def release(folder: Path, lock: int) -> None:
    """Remove the folder and all in it."""
    os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
    _live.discard(folder)


@contextmanager
def disposable(folder: Path) -> Iterator[Path]:
    """Remove ``folder`` at the end, also of a process that :func:`remove_live` says is ending."""
    _live.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _live.discard(folder)


def announce(folder: Path, data_name: str | None, replaced: Iterable[Path] = ()) -> None:
    """Note what is about to happen beside the target: ``data_name`` appears, if any, then the model that needs it; the
    files ``replaced``, which the old model needed, go after that.
    """
    note = {"data": data_name, "replaced": {p.name: _identity(p) for p in replaced}}
    (folder / _ANNOUNCED).write_text(json.dumps(note), encoding="utf-8")


def _identity(path: Path) -> list[int] | None:
    """Tells a file from another that came under its name; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_ino, found.st_mtime_ns]


def remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of their work on ``target``; the work of living ones stays."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.partial")
    for folder in [p for p in target.parent.iterdir() if pattern.fullmatch(p.name) and p.is_dir()]:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            lock = None  # killed before it could lock: nothing is in there
        except OSError:
            continue
        if lock is not None:
            abandoned = _try_lock(lock) is True
            if abandoned:
                settle(folder, target)
            os.close(lock)
            if not abandoned:
                continue
        shutil.rmtree(folder, ignore_errors=True)


def remove_live() -> None:
    """Remove the folders of this process, which is about to end in the middle of its work."""
    for folder in list(_live):
        target = folder.parent / folder.name[1:].rsplit(".", 2)[0]
        settle(folder, target)
        shutil.rmtree(folder, ignore_errors=True)


def settle(folder: Path, target: Path) -> None:
    """Leave one model beside the target, with its own data alone: the new one's where the model was moved, else the old
    one's.
    """
    try:
        note = json.loads((folder / _ANNOUNCED).read_text(encoding="utf-8"))
        name, replaced = note["data"], note["replaced"]
    except (OSError, ValueError):  # not yet written, or not whole: nothing was moved
        return
    if (folder / target.name).exists():
        if name is not None and _is_data_of(target, name) and not (folder / name).exists():
            (target.parent / name).unlink(missing_ok=True)
        return
    for name, identity in replaced.items():
        path = target.parent / name
        if _is_data_of(target, name) and _identity(path) == identity:
            path.unlink(missing_ok=True)


def _is_data_of(target: Path, name: str) -> bool:
    return re.fullmatch(re.escape(target.name) + r"(\.\d+)?\.data", name) is not None


if sys.platform == "win32":

    def _try_lock(descriptor: int) -> bool | None:
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _try_lock(descriptor: int) -> bool | None:
        """Whether the lock is now ours; None where the file system has no locks: then every folder looks alive."""
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True
