"""Reading a model: lazily, checked, with every constant as an initializer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass

from onnx_quarot.errors import ModelError, OnnxQuarotError, first_line

_SEPARATE_INITIALIZERS = 4  # the IR version that no longer lists them among the inputs
# Domains of operators that ONNX Runtime or this package's library runs.
_OPERATORS = frozenset(("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "onnx_quarot"))


def load(path: str | os.PathLike[str]) -> ir.Model:
    """The model at ``path`` with its external data memory-mapped on demand.

    Constant nodes become initializers, so that weights look alike wherever an exporter put them. Raises ModelError, in
    one line, for a missing file, a file that is not an ONNX model, and external data that is missing or too short.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"model: {str(path)!r} {what}; give the path of an .onnx file")
    try:
        model = ir.load(path)
    except Exception as error:  # whatever the parser stumbled over in this file
        if (held := _maps(path)) is not None:
            raise ModelError(
                f"model: its value {held!r} is a map or a list of maps, and only tensors are understood; "
                "of a classifier made by skl2onnx, convert it with the option 'zipmap': False"
            ) from error
        if (found := _sparse(path)) is not None:
            raise _sparse_error(found) from error
        raise ModelError(f"model: {str(path)!r} is not a readable ONNX model ({_told(_root(error))})") from error
    if not path.stat().st_size:
        raise ModelError(f"model: {str(path)!r} is empty")
    if not model.graph.outputs:
        raise ModelError(f"model: {str(path)!r} is not an ONNX model, or its graph has no outputs")
    with blamed_on(path):
        _check_versions(model)
        _check_inputs(model)
        _check_order(model, path)
        _open_dimensions(model)
        to_plain_form(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _resolve_external_data(model, path.parent)
        _check_sizes(model)
    return model


@contextmanager
def blamed_on(path: str | os.PathLike[str]) -> Iterator[None]:
    """Work on the model at ``path``: an exception that nobody expected becomes a ModelError of one line.

    It says what ONNX's checker has against the model, which is what most such exceptions come from; where the checker
    finds nothing, the fault may be this package's. The exception itself is the error's ``__cause__``.
    """
    try:
        yield
    except (OnnxQuarotError, OSError, MemoryError):
        raise
    except Exception as error:
        complaint = _complaint(path)
        if complaint is not None:
            raise ModelError(f"model: {str(path)!r} is not a valid ONNX model ({complaint})") from error
        told = _told(_root(error))
        raise ModelError(
            f"model: {str(path)!r} is not understood ({told}); if onnxruntime runs it, please report this"
        ) from error


def _complaint(path: str | os.PathLike[str]) -> str | None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        # ONNX Runtime has operators of its own in ONNX's domain, and needs no shapes: no faults of the model's.
        alright = ("No Op registered for", "Field 'shape' of 'type' is required")
        return None if any(words in str(error) for words in alright) else _told(error)
    return None


def _check_versions(model: ir.Model) -> None:
    """Versions as ONNX Runtime and onnx hold them: positive numbers of 31 bits."""
    opsets = {f"opset {domain!r}": version for domain, version in model.opset_imports.items()}
    for what, version in {"IR": model.ir_version, **opsets}.items():
        if version is None or not 0 < version < 1 << 31:
            raise ModelError(f"model: the {what} version is {version}; it must be a positive number")


def _check_inputs(model: ir.Model) -> None:
    """Every node of ONNX's own has the inputs it needs."""
    for node in model.graph:
        try:
            schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get(node.domain, 1), node.domain)
        except onnx.defs.SchemaError:
            continue  # ONNX Runtime's, or nobody's
        except TypeError:  # a name that is no text: the bytes of the file were no UTF-8
            names = f"{node.domain!a}::{node.op_type!a}"
            raise ModelError(
                f"model: node {node.name!a} is of operator type {names}, which is not valid text"
            ) from None
        for index in range(schema.min_input):
            if schema.inputs[index].option == onnx.defs.OpSchema.FormalParameterOption.Optional:
                continue  # before one that is not, as in Loop
            if index >= len(node.inputs) or node.inputs[index] is None:
                raise ModelError(f"model: {node.op_type} {node.name!r} lacks its input {index}")


def _check_order(model: ir.Model, path: Path) -> None:
    """Every tensor is made before it is read; nodes in another order are sorted."""
    made: set[ir.Value] = set()
    sorted_already = True
    for node in model.graph:
        for value in node.inputs:
            if value is None:
                continue
            if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
                if (found := _sparse(path)) is not None:  # they are left out in reading
                    raise _sparse_error(found)
                raise ModelError(f"model: {node.op_type} {node.name!r} reads {value.name!r}, which nothing produces")
            sorted_already &= value.producer() is None or value in made
        made.update(node.outputs)
    if not sorted_already:
        try:
            model.graph.sort()
        except ValueError as error:
            raise ModelError(f"model: the graph has a cycle ({_told(error)})") from error


def _open_dimensions(model: ir.Model) -> None:
    """A length below zero is PaddlePaddle's way to write one that is not fixed; ONNX Runtime takes it for that too."""
    for value in (*model.graph.inputs, *model.graph.outputs, *(v for node in model.graph for v in node.outputs)):
        if value.shape is not None and any(isinstance(dim, int) and dim < 0 for dim in value.shape):
            value.shape = ir.Shape([None if isinstance(dim, int) and dim < 0 else dim for dim in value.shape])


def to_plain_form(model: ir.Model) -> None:
    """Initializers are constants, each with one name, and the model's own functions are written out: whoever reads a
    model without :func:`load`, but is told names of tensors by those who do, has to do this too.
    """
    _fix_initializers(model)
    _inline_functions(model)
    _drop_copies(model)


def _fix_initializers(model: ir.Model) -> None:
    """Before IR version 4 every initializer was an input of the graph as well, though none could be given."""
    if model.ir_version < _SEPARATE_INITIALIZERS:
        for value in [v for v in model.graph.inputs if v.is_initializer()]:
            model.graph.inputs.remove(value)
        model.ir_version = _SEPARATE_INITIALIZERS


def _inline_functions(model: ir.Model) -> None:
    """Calls of the model's own functions become what is in them, so that what is in there can be rotated too.

    Functions that stand in for operators a runtime has, this library's among them, stay what they are.
    """
    opsets = model.opset_imports

    def written_out(function: ir.Function) -> bool:
        if function.domain in _OPERATORS:
            return False
        return all(opsets.get(domain, version) == version for domain, version in function.opset_imports.items())

    if any(written_out(function) for function in model.functions.values()):
        InlinePass(written_out)(model)


def _drop_copies(model: ir.Model) -> None:
    """Copies of initializers are read as the initializers they are of.

    torch's exporter gives layers that share their weights a name each for the same matrix. With one name it is one
    matrix to everybody, which changes basis for all layers at once.
    """
    for node in list(model.graph):
        if node.op_type != "Identity" or node.domain != "" or node.outputs[0].is_graph_output():
            continue
        source = node.inputs[0]
        if source is not None and source.is_initializer() and not source.is_graph_input():
            node.outputs[0].replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def _check_sizes(model: ir.Model) -> None:
    """Every tensor in the file itself has as many bytes as its shape and type need."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.TensorProtoTensor):
            continue
        shape = tensor.shape.numpy()
        needed = math.ceil(math.prod(shape) * tensor.dtype.itemsize) if min(shape, default=0) >= 0 else -1
        if tensor.raw.HasField("raw_data"):
            found = len(tensor.raw.raw_data)
        elif tensor.dtype == ir.DataType.STRING:
            needed, found = math.prod(shape), len(tensor.raw.string_data)
        else:
            try:
                found = tensor.numpy().nbytes if tensor.dtype.itemsize >= 1 else len(tensor.tobytes())
            except ValueError:
                found = -1
        if found != needed:
            what = "another number of values" if found < 0 else f"{found} bytes"
            raise ModelError(f"model: {name!r} of shape {list(shape)} holds {what}; it needs {needed} bytes")


def _resolve_external_data(model: ir.Model, folder: Path) -> None:
    """Check every external tensor against its file, so that a broken file is found before any work is done.

    A file is read only if it lies in the model's folder, or in the store that a Hugging Face cache links to.
    """
    files: dict[str, tuple[Path, int]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise ModelError(f"model: initializer {name!r} has no data")
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        if location not in files:
            path = _allowed(folder, location, name)
            if path.exists() and not path.is_file():
                raise ModelError(f"model: external data {location!r} of {name!r} is not a file")
            try:
                files[location] = path, path.stat().st_size
            except OSError as error:
                raise ModelError(
                    f"model: external data {location!r} of {name!r} cannot be read ({error.strerror})"
                ) from error
        path, size = files[location]
        needed = math.prod(tensor.shape.numpy()) * tensor.dtype.itemsize
        if tensor.length is not None and tensor.length != math.ceil(needed):
            raise ModelError(
                f"model: external data of {name!r} is {tensor.length} bytes, its shape and type need {needed:.0f}"
            )
        offset = tensor.offset or 0
        if offset < 0 or size < offset + needed:
            raise ModelError(
                f"model: external data {location!r} is truncated: {name!r} needs bytes {offset} to "
                f"{offset + needed:.0f}, the file has {size}"
            )
        # By its real path and without a base folder: where it may lie was decided here, and onnx_ir would refuse the
        # links of caches.
        value.const_value = ir.ExternalTensor(
            path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
            doc_string=tensor.doc_string,
        )  # fmt: skip


def _allowed(folder: Path, location: str, name: str) -> Path:
    """The real path of an external file, if the model may read it."""
    if "\0" in location:
        raise ModelError(f"model: external data of {name!r} is in {location!r}, which is no name of a file")
    real_folder, real = (Path(os.path.realpath(p)) for p in (folder, folder / location))
    if Path(location).is_absolute() or not Path(os.path.abspath(folder / location)).is_relative_to(folder.absolute()):
        raise ModelError(f"model: external data {location!r} of {name!r} lies outside the model's folder")
    if real.is_relative_to(real_folder):
        return real
    # <cache>/models--org--name/snapshots/<revision>/... links to <cache>/models--org--name/blobs/<hash>.
    for snapshot in (real_folder, *real_folder.parents):
        if snapshot.parent.name == "snapshots" and real.parent == snapshot.parent.parent / "blobs":
            return real
    raise ModelError(f"model: external data {location!r} of {name!r} is a link to a file outside the model's folder")


def external_files(model: ir.Model) -> set[Path]:
    """The files that hold the model's weights, those of its subgraphs among them."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return {Path(t.path) for v in values if isinstance(t := v.const_value, ir.ExternalTensor)}


def model_size(path: str | os.PathLike[str]) -> int:
    """Bytes of an ONNX file together with the external data files it refers to."""
    return sum(file.stat().st_size for file in {Path(path), *external_files(ir.load(path))})


def unmap(tensor: ir.TensorProtocol) -> None:
    """Let go of the file that a tensor was read from, whose pages would pile up; reading it again maps it again.

    No view of it should be left. The frames of an error that is under way may hold one, with which the file then goes.
    """
    if isinstance(tensor, ir.ExternalTensor):
        with suppress(BufferError):
            tensor.release()


def total_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def _root(error: BaseException) -> BaseException:
    """What went wrong, below the serializer's account of where it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _maps(path: Path) -> str | None:
    """The first value of a model that is no tensor but a map; None without one, or if nothing can be read."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # the error that is told is the one from before
        return None
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.sequence_type.elem_type if value.type.HasField("sequence_type") else value.type
        if kind.HasField("map_type"):
            return str(value.name)
    return None


def _sparse(path: Path) -> str | None:
    """The first sparse tensor of a model; None without one, or if nothing can be read."""
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # the error that is told is the one from before
        return None
    for tensor in graph.sparse_initializer:
        return str(tensor.values.name)
    for node in graph.node:
        if any(attribute.type == onnx.AttributeProto.SPARSE_TENSOR for attribute in node.attribute):
            return str(node.output[0] if node.output else node.name)
    return None


def _sparse_error(name: str) -> ModelError:
    return ModelError(f"model: its constant {name!r} is a sparse tensor, which is not understood; store it dense")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:160]}" if str(error).strip() else type(error).__name__
