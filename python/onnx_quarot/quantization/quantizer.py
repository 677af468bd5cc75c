"""`ModelQuantizer`: the call an AMD Quark user has already written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from .. import pipeline
from ..errors import ConfigError, ModelError
from ..load import external_files
from ..partial import announce
from ..save import workspace
from .config.algorithm import AlgoConfig
from .config.config import QConfig
from .translate import translate

# The protobuf format cannot hold more in one message.
PROTO_LIMIT = 2**31 - 1


class ModelQuantizer:
    """Quantizes models as a `QConfig` says.

    Errors: ConfigError, here and not later, for anything in `config` that is not supported.
    """

    def __init__(self, config: QConfig) -> None:
        if not isinstance(config, QConfig):
            raise ConfigError(f"config is of type {type(config).__name__}; it must be a QConfig")
        translate(config)
        self.config = config

    def quantize_model(
        self,
        model_input: str | PathLike[str] | onnx.ModelProto,
        model_output: str | PathLike[str] | None = None,
        calibration_data_reader: Any = None,
        calibration_data_path: str | PathLike[str] | None = None,
        algorithms: Sequence[AlgoConfig] | None = None,
    ) -> onnx.ModelProto | None:
        """Quantize `model_input` into the file `model_output`, or return the model if that is None.

        model_input: a file, or a model that is in memory (left as it is).
        calibration_data_reader: ONNX Runtime's CalibrationDataReader, or any iterable of dicts of arrays.
        calibration_data_path: an .npz file with one array for each model input, in place of the reader.
        algorithms: in place of the `algo_config` of the configuration.
        A returned model has its weights inside; one of 2 GiB cannot be returned (ModelError: give `model_output`).
        `use_external_data_format` True always puts weights into a file beside the model; False leaves that to their
        size, for a file over 2 GiB could not be read back.
        Errors: ConfigError, DataError, ModelError, SaveError, VerificationError; nothing is left half written.
        """
        keywords = translate(self.config, algorithms)
        calibration = _calibration(calibration_data_reader, calibration_data_path)
        with tempfile.TemporaryDirectory(prefix="onnx_quarot_") as scratch:
            source: str | Path
            if isinstance(model_input, onnx.ModelProto):
                source = Path(scratch) / "input.onnx"
                # onnx.save with external data would empty the caller's tensors.
                ir.save(ir.serde.deserialize_model(model_input), source, external_data="input.onnx.data")
            else:
                source = Path(model_input)
            if model_output is not None:
                pipeline.quantize(source, Path(model_output), calibration, **keywords)
                if self.config.use_external_data_format:
                    _move_weights_out(Path(model_output))
                return None
            target = Path(scratch) / "quantized" / "model.onnx"
            target.parent.mkdir()
            pipeline.quantize(source, target, calibration, **keywords)
            return _whole(target)


def _calibration(reader: Any, path: str | PathLike[str] | None) -> Any:
    if (reader is None) == (path is None):
        found = "neither is" if reader is None else "both are"
        raise ConfigError(f"calibration_data_reader, calibration_data_path: {found} given; exactly one must be")
    return path if reader is None else reader


def _move_weights_out(path: Path) -> None:
    """Give a model that is one file a data file beside it."""
    if external_files(ir.load(path)):
        return
    with workspace(path) as folder:
        data_name = f"{path.name}.data"
        ir.save(ir.load(path), folder / path.name, external_data=data_name, size_threshold_bytes=1024)
        # The old file needs no data file, so this order leaves a whole model behind at every moment.
        announce(folder, data_name)
        os.replace(folder / data_name, path.parent / data_name)
        os.replace(folder / path.name, path)


def _whole(path: Path) -> onnx.ModelProto:
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    if size > PROTO_LIMIT:
        raise ModelError(
            f"model_output is None and the quantized model has {size} bytes; a model held in memory must be below "
            f"{PROTO_LIMIT}, so give a path"
        )
    return onnx.load(str(path))
