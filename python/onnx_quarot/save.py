"""Writing a model: everything beside the target first, then one rename. Until then the old output is untouched."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnx_quarot.cut_files import refuse_cut_files
from onnx_quarot.errors import ModelError, OnnxQuarotError, SaveError
from onnx_quarot.load import external_files
from onnx_quarot.partial import announce, claim, release, remove_abandoned, settle

_INLINE_BYTES = 1024  # constants up to this size stay in the .onnx file
_SINGLE_FILE_BYTES = 64 << 20  # models below this size are one file
# Large tensors begin on a page of memory: they are mapped, and kernels read them where they are.
_PAGE_BYTES = 4096
_ALIGNED_BYTES = 1 << 19
_IN_FLIGHT_BYTES = 256 << 20  # of tensors that are computed or written; a larger one goes alone


def check_output(source: str | Path, target: str | Path, *others: object) -> Path:
    """The target's path if it can be written: not the source, nor one of the paths among ``others``, which are read as
    well; its folder there, not a folder itself.
    """
    target = Path(target)
    if target.is_dir():
        raise SaveError(f"output: {str(target)!r} is a folder; give the path of an .onnx file")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise SaveError(f"output: {str(target)!r} is the input model; give another path")
    if any(isinstance(other, str | os.PathLike) and _same(target, other) for other in others):
        raise SaveError(f"output: {str(target)!r} is to be read as well; give another path")
    if not target.parent.is_dir():
        raise SaveError(f"output: the folder {str(target.parent)!r} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise SaveError(f"output: the folder {str(target.parent)!r} is not writable")
    return target


def check_apart(model: ir.Model, target: Path) -> None:
    """SaveError if the target is a file that holds weights of the model that is read."""
    if any(_same(target, file) for file in external_files(model)):
        raise SaveError(f"output: {str(target)!r} holds weights of the input model; give another path")


def _same(path: Path, other: str | os.PathLike[str]) -> bool:
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A folder beside the target for what is half done; gone afterwards, whatever happened.

    What a killed process left behind goes with the next workspace of the same target.
    """
    try:
        remove_abandoned(target)
        folder, lock = claim(target)
    except OSError as error:
        raise SaveError(f"output: cannot write beside {str(target)!r} ({error.strerror})") from error
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise SaveError(
                f"output: writing {str(target)!r} failed ({error.strerror}); nothing was changed"
            ) from error
        raise
    finally:
        release(folder, lock)


class Alias(ir.LazyTensor):
    """Another constant's tensor again. A model with one gets a file for constants; both are the same bytes of it."""

    def __init__(self, original: ir.TensorProtocol) -> None:
        super().__init__(
            lambda: ir.Tensor(original.numpy(), dtype=original.dtype), original.dtype, ir.Shape(original.shape.numpy())
        )
        self.original = original


def write(
    model: ir.Model, path: Path, data_name: str, on_tensor: Callable[[], None] | None = None, *, workers: int = 1
) -> None:
    """Write ``model`` to ``path``: as one file if it is small, else with its large tensors in ``data_name`` beside it.

    Lazy tensors are evaluated as they are written: one by one, or by ``workers`` threads, so that one is computed while
    another is written; those in memory at a time are bounded all the same. An error that one of them raises reaches the
    caller as it is, not as the serializer's.
    """
    try:
        _write(model, path, data_name, on_tensor, workers)
    except ir.serde.SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OnnxQuarotError | OSError | MemoryError):
            cause = cause.__cause__
        raise cause or error from None
    except OnnxQuarotError:
        raise
    except ValueError as error:  # a file of weights that was checked when loading is not what it was
        raise ModelError(f"model: external data changed while it was read ({error})") from error


def _write(model: ir.Model, path: Path, data_name: str, on_tensor: Callable[[], None] | None, workers: int) -> None:
    values = [v for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    before = [tensor for value in values if (tensor := value.const_value) is not None]
    if sum(t.nbytes for t in before) < _SINGLE_FILE_BYTES and not any(isinstance(t, Alias) for t in before):
        ir.save(ir.external_data.load_to_model(model), path)
        return
    first = {id(tensor): value for value, tensor in zip(values, before, strict=True)}
    aliases = {v: first[id(t.original)] for v, t in zip(values, before, strict=True)
               if isinstance(t, Alias) and t.nbytes > _INLINE_BYTES}  # fmt: skip
    try:
        for value in aliases:
            value.const_value = None  # is not written
        ir.external_data.unload_from_model(
            model,
            path.parent,
            data_name,
            size_threshold_bytes=_INLINE_BYTES,
            alignment=_PAGE_BYTES,
            align_threshold=_ALIGNED_BYTES,
            callback=None if on_tensor is None else lambda tensor, info: on_tensor(),
            max_workers=workers,
            max_in_flight_bytes=_IN_FLIGHT_BYTES,
        )
        for value, original in aliases.items():
            stored = original.const_value
            assert isinstance(stored, ir.ExternalTensor)
            value.const_value = ir.ExternalTensor(
                stored.location, stored.offset, stored.length, stored.dtype,
                shape=stored.shape, name=value.name or "", base_dir=stored.base_dir,
            )  # fmt: skip
        ir.save(model, path)
    finally:
        for value, tensor in zip(values, before, strict=True):
            value.const_value = tensor


@dataclass(frozen=True)
class Staged:
    """A model written whole in a workspace, under the names it will have beside its target."""

    path: Path
    target: Path
    data_name: str

    def publish(self, source: Path) -> None:
        """Move it over the target. The rename of the .onnx file is the moment of change.

        External data of the model that was there goes, unless ``source`` reads it too.
        """
        refuse_cut_files()
        folder, place = self.path.parent, self.target.parent
        stale = _data_files(self.target, source)
        _sync(folder)
        data = folder / self.data_name
        announce(folder, self.data_name if data.exists() else None, stale)
        try:
            if data.exists():
                os.replace(data, place / self.data_name)
            os.replace(self.path, self.target)
        finally:
            settle(folder, self.target)  # also after an interrupt


def stage(
    model: ir.Model, target: Path, folder: Path, on_tensor: Callable[[], None] | None = None, *, workers: int = 1
) -> Staged:
    """Write ``model`` into ``folder``, a :func:`workspace` of ``target``.

    Small models become one file; larger ones get ``<target>.data`` beside them (or ``<target>.1.data``, ... while an
    older model of the same name still needs its own).
    """
    data_name = next(n for n in _candidate_names(target) if not (target.parent / n).exists())
    staged = Staged(folder / target.name, target, data_name)
    write(model, staged.path, data_name, on_tensor, workers=workers)
    return staged


def _candidate_names(target: Path) -> Iterator[str]:
    yield f"{target.name}.data"
    number = 1
    while True:
        yield f"{target.name}.{number}.data"
        number += 1


def _data_files(target: Path, source: Path) -> list[Path]:
    """External data of the model that is about to be replaced: only files named after it, which it reads and the source
    does not. A model that was renamed still reads data of its old name.
    """
    pattern = re.compile(re.escape(target.name) + r"(\.\d+)?\.data")
    named = [p for p in target.parent.iterdir() if pattern.fullmatch(p.name)] if target.exists() else []
    if not named:
        return []
    read, kept = _files_of(target), _files_of(source)
    return [p for p in named if p.resolve() in read - kept]


def _files_of(path: Path) -> set[Path]:
    """The files of external data that a model names; none for what is no model."""
    try:
        return {file.resolve() for file in external_files(ir.load(path))}
    except Exception:  # protobuf and onnx_ir raise many kinds
        return set()


def _sync(folder: Path) -> None:
    """The bytes are on the disk before the name points at them."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
