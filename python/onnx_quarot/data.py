"""Calibration and evaluation data: four forms in, checked batches out.

A batch is a dict from input name to array, ready for an ONNX Runtime session. `as_batches` takes

* an onnxruntime `CalibrationDataReader` (anything with `get_next()`, which returns a dict, then None);
* an iterable of dicts;
* the path of an `.npz` file with one array an input: either of the input's own rank (one batch), or of one
  rank more, whose first axis then counts the batches (the same number in every array);
* text (a file, or the text itself) with the path of a `tokenizer.json`: consecutive windows of tokens.
"""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .errors import DataError, ModelError, first_line
from .load import load
from .sites import constant_root, view_shape

Array = npt.NDArray[Any]
Batch = dict[str, Array]
Dim = int | str | None

_NAMED = 5
_VIEWS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_EMBEDDED = {0: 2, 1: 4, 8: 3}  # inputs of ONNX Runtime's EmbedLayerNormalization: what selects rows of which table


@dataclass(frozen=True)
class InputSpec:
    """What a model's input accepts.

    A dimension is a number, a symbol, or None (unknown); shape None is any rank. rows: of the smallest table that its
    integers choose from, for token ids the vocabulary; None if there is none. window: of a cache that holds the last
    tokens alone, in a buffer whose length is the caller's to choose, the least that length may be; None for others.
    """

    name: str
    shape: tuple[Dim, ...] | None
    dtype: np.dtype[Any]
    rows: int | None = None
    window: int | None = None

    def fixed(self, axis: int) -> int | None:
        """The size of an axis if the model fixes it."""
        dim = self.shape[axis] if self.shape is not None else None
        return dim if isinstance(dim, int) else None

    def cache_shape(self, batch: int, length: int = 0) -> list[int]:
        """A shape of this input where it is a cache, with room for `length` tokens, and a window in any case.

        A cache is [batch, heads, past length, head size] or a reordering of it: the first axis, if it is open, is the
        batch, the other open ones are lengths.
        """
        assert self.shape is not None
        room = max(length, self.window or 0)
        return [dim if isinstance(dim, int) else room if axis else batch for axis, dim in enumerate(self.shape)]


def input_specs(model: ir.Model | str | os.PathLike[str]) -> list[InputSpec]:
    """The inputs a caller has to feed, in graph order; one with an initializer is optional and left out.

    A symbolic dimension that the graph pins down all the same (the head size of a cache) comes out as its number.
    """
    if not isinstance(model, ir.Model):
        model = load(model)
    fixed = _implied_sizes(model)
    specs = []
    for value in model.graph.inputs:
        name = value.name or ""
        if name in model.graph.initializers:
            continue
        if isinstance(value.type, ir.SequenceType):
            raise ModelError(f"input {name!r}: it is a list of tensors, and data is only understood as one an input")
        if value.dtype in (None, ir.DataType.UNDEFINED):
            raise ModelError(f"input {name}: the model does not say its element type")
        shape = (
            None
            if value.shape is None
            else tuple(fixed.get((value, axis), _dim(d)) for axis, d in enumerate(value.shape))
        )
        specs.append(InputSpec(name, shape, np.dtype(value.dtype.numpy()), _table_rows(value), _window(value)))
    return specs


def _table_rows(value: ir.Value) -> int | None:
    """The rows of the smallest table that an input selects from, directly or through views of it."""
    rows, pending, seen = [], [value], {value}
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type == "Gather" and node.domain == "" and index == 1:
                table = constant_root(node.inputs[0])
                if table is not None:
                    rows.append(view_shape(*table)[node.attributes.get_int("axis", 0)])
            elif node.op_type == "EmbedLayerNormalization" and index in _EMBEDDED:
                table = constant_root(node.inputs[_EMBEDDED[index]])
                if table is not None:
                    rows.append(view_shape(*table)[0])
            elif node.op_type in _VIEWS and node.domain == "" and index == 0:
                pending += [v for v in node.outputs if v not in seen]
                seen.update(node.outputs)
    return min(rows, default=None)


def _window(value: ir.Value) -> int | None:
    """The window of an attention that keeps no more of its cache (ONNX Runtime's sliding_window_cache)."""
    for node, _ in value.uses():
        if node.op_type == "GroupQueryAttention" and node.attributes.get_int("sliding_window_cache", 0) != 0:
            return node.attributes.get_int("local_window_size", -1)
    return None


def _implied_sizes(model: ir.Model) -> dict[tuple[ir.Value, int], int]:
    """Sizes of the symbolic last dimensions of inputs, where the graph's own weights determine them."""
    from .discovery.shapes import FLOATS, Shapes  # two walks over the graph: only where they are needed

    open_ends = [
        (value, len(value.shape) - 1)
        for value in model.graph.inputs
        if value.shape is not None
        and len(value.shape) > (1 if value.dtype in FLOATS else 2)
        and not isinstance(value.shape[-1], int)
    ]
    if not open_ends:
        return {}
    shapes = Shapes(model)
    return {
        (value, axis): shapes.shape[value][axis]
        for value, axis in open_ends
        if shapes.known(value) and shapes.static[value][axis]
    }


def as_batches(
    data: object,
    inputs: Sequence[InputSpec],
    *,
    tokenizer: object = None,
    window: int = 512,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Yield checked batches from any of the four forms (see the module's text).

    tokenizer: path of a tokenizer.json, or an object whose `encode(text).ids` is a list; only for text.
    window: tokens a batch, only for text. limit: the most batches to yield. Nothing is kept in memory beyond
    one batch (an `.npz` is held one array at a time by numpy). Raises DataError, in one line, for data that
    is empty, or that does not fit the inputs: a missing or unknown name, a rank, a fixed dimension, an
    element type.
    """
    if limit is not None and limit < 1:
        raise DataError(f"windows: {limit} batches asked for; use at least 1, or leave it out for all")
    batches = _open(data, inputs, tokenizer, window)
    empty = True
    for index, batch in enumerate(itertools.islice(batches, limit)):
        empty = False
        yield check_batch(batch, inputs, where=f"batch {index}")
    if empty:
        raise DataError("data: holds no batch; at least one is needed")


def check_batch(batch: object, inputs: Sequence[InputSpec], *, where: str = "batch") -> Batch:
    """The batch as a dict of arrays in the order of `inputs`; DataError if it does not fit them."""
    if not isinstance(batch, Mapping):
        raise DataError(f"data: {where} is a {type(batch).__name__}; each batch must be a dict of input name to array")
    known = [spec.name for spec in inputs]
    for name in batch:
        if name not in known:
            raise DataError(f"data: {where} has {name!r}, no input of the model ({_listed(known)})")
    checked: Batch = {}
    for spec in inputs:
        if spec.name not in batch:
            raise DataError(f"data: {where} lacks input {spec.name!r}")
        checked[spec.name] = _check_array(np.asarray(batch[spec.name]), spec, where)
    if checked and all(array.size == 0 for array in checked.values()):
        name, array = next(iter(checked.items()))
        raise DataError(f"data: {where} holds nothing: input {name!r} has shape {list(array.shape)}")
    return checked


def token_batches(ids: Sequence[int], inputs: Sequence[InputSpec], window: int = 512) -> Iterator[Batch]:
    """Cut token ids into consecutive, non-overlapping windows and fill a language model's inputs for each.

    The tail that does not fill a window is dropped, unless it is all there is. A sequence length or a batch
    size that the model fixes is honoured. Understood inputs are the usual ones of encoders and decoders:
    input_ids, attention_mask, position_ids, token_type_ids, cache_position; any other input of rank 3 or more
    is taken for a cache of past keys or values and fed empty (one of a window alone as long as that). DataError names
    an input that cannot be filled from text.
    """
    by_name = {spec.name: spec for spec in inputs}
    ids_spec = by_name.get("input_ids")
    if ids_spec is None or ids_spec.shape is None or len(ids_spec.shape) != 2:
        raise DataError(f"data: text needs a model with an input_ids input of rank 2 ({_listed(list(by_name))})")
    if window < 1:
        raise DataError(f"window: {window} tokens; use at least 1")
    rows, length = ids_spec.fixed(0) or 1, ids_spec.fixed(1) or window
    tokens = np.asarray(ids)
    if ids_spec.fixed(1) is None and rows == 1:
        length = min(length, tokens.size)
    size = rows * length
    if size == 0 or tokens.size < size:
        raise DataError(f"data: the text has {tokens.size} tokens; one batch needs {max(size, 1)}")
    for start in range(0, tokens.size - size + 1, size):
        window_ids = tokens[start : start + size].reshape(rows, length)
        yield {spec.name: _text_input(spec, window_ids) for spec in inputs}


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json, or of the folder that holds one. Raises DataError."""
    file = Path(path)
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise DataError(f"tokenizer: no file at {file}")
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "tokenizer: text needs the tokenizers package, not installed: pip install 'onnx-quarot[demo]'"
        ) from None
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer: {file} cannot be read: {first_line(error)}") from None


def _open(data: object, inputs: Sequence[InputSpec], tokenizer: object, window: int) -> Iterable[object]:
    get_next = getattr(data, "get_next", None)
    if callable(get_next):
        return iter(cast(Callable[[], object], get_next), None)
    if isinstance(data, os.PathLike | str):
        return _open_path_or_text(os.fspath(data), isinstance(data, str), inputs, tokenizer, window)
    if isinstance(data, Mapping):
        raise DataError("data: is one dict; give a list of dicts, one a batch")
    if isinstance(data, Iterable):
        return data
    raise DataError(
        f"data: a {type(data).__name__} is not understood; give a CalibrationDataReader, an iterable of "
        "dicts, an .npz file, or text with a tokenizer"
    )


def _open_path_or_text(
    data: str, may_be_text: bool, inputs: Sequence[InputSpec], tokenizer: object, window: int
) -> Iterable[object]:
    if data.lower().endswith(".npz"):
        return _npz_batches(data, inputs)
    # Real text is longer than any file system allows a name to be, or has a line break in it; one that is
    # neither and names no file is far more often a mistyped path.
    literal = may_be_text and ("\n" in data or len(data) > 255)
    if not literal:
        try:
            text = Path(data).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"data: {data} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"data: {data} is neither an .npz file nor UTF-8 text") from None
    else:
        text = data
    if tokenizer is None:
        raise DataError("tokenizer: text needs the path of a tokenizer.json")
    if isinstance(tokenizer, str | os.PathLike):
        ids = list(load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids)
    else:
        ids = list(cast(Any, tokenizer).encode(text).ids)
    return token_batches(ids, inputs, window)


def _npz_batches(path: str, inputs: Sequence[InputSpec]) -> Iterator[Batch]:
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        raise DataError(f"data: {path} is no .npz file: it is no zip archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise DataError(f"data: {path} cannot be read: {error.strerror or first_line(error)}") from None
    except Exception as error:  # a broken archive raises zipfile, zlib and value errors
        raise DataError(f"data: {path} is no valid .npz file: {first_line(error)}") from None
    counts: dict[str, int | None] = {}
    for spec in inputs:
        if spec.name in arrays and spec.shape is not None:
            array = arrays[spec.name]
            counts[spec.name] = len(array) if array.ndim == len(spec.shape) + 1 else None
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {'one batch' if n is None else n}" for name, n in counts.items())
        raise DataError(f"data: {path} holds differing numbers of batches ({listed})")
    count = next(iter(counts.values()), None)
    if count is None:
        yield arrays
        return
    for index in range(count):
        yield {name: array[index] if name in counts else array for name, array in arrays.items()}


def _check_array(array: Array, spec: InputSpec, where: str) -> Array:
    if spec.dtype.kind == "O" and array.dtype.kind in "SU":
        array = array.astype(object)  # text, however numpy stores it
    if array.dtype != spec.dtype:
        raise DataError(
            f"data: {where}, input {spec.name!r} has element type {array.dtype}; the model takes {spec.dtype}"
        )
    if spec.rows is not None and array.size and not (-spec.rows <= array.min() and array.max() < spec.rows):
        found = array.max() if array.max() >= spec.rows else array.min()
        hint = ": do tokenizer and model belong together?" if spec.name == "input_ids" else ""
        raise DataError(
            f"data: {where}, input {spec.name!r} holds {found}; the model's table has rows 0 to {spec.rows - 1}{hint}"
        )
    if spec.shape is None:
        return array
    wanted = "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"
    fits = array.ndim == len(spec.shape) and all(
        not isinstance(want, int) or want == got for want, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise DataError(f"data: {where}, input {spec.name!r} has shape {list(array.shape)}; the model takes {wanted}")
    return array


def _text_input(spec: InputSpec, ids: Array) -> Array:
    if spec.name == "input_ids":
        return ids.astype(spec.dtype)
    rank = None if spec.shape is None else len(spec.shape)
    positions = np.arange(ids.shape[1])
    if spec.name == "attention_mask" and rank == 2:
        return np.ones(ids.shape, spec.dtype)
    if spec.name == "position_ids" and rank == 2:
        return np.broadcast_to(positions, ids.shape).astype(spec.dtype)
    if spec.name == "token_type_ids" and rank == 2:
        return np.zeros(ids.shape, spec.dtype)
    if spec.name == "cache_position" and rank == 1:
        return positions.astype(spec.dtype)
    if spec.shape is not None and len(spec.shape) >= 3:
        return np.zeros(spec.cache_shape(len(ids)), spec.dtype)
    raise DataError(f"data: input {spec.name!r} cannot be filled from text; give batches as dicts or as an .npz file")


def _listed(names: Sequence[str]) -> str:
    """The names of inputs, of which a decoder has dozens, in a few words."""
    rest = f", ... {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"inputs: {', '.join(names[:_NAMED])}{rest}"


def _dim(dim: int | ir.SymbolicDim) -> Dim:
    return dim if isinstance(dim, int) else dim.value
