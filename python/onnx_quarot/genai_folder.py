"""A folder that onnxruntime-genai loads as it is: configuration, tokenizer and operator library beside the model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_quarot.custom_op import DOMAIN, custom_op_library
from onnx_quarot.errors import ConfigError, SaveError

CONFIG = "genai_config.json"
_COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model")  # what tokenizers and chat templates come as


def complete_folder(source: Path, target: Path) -> tuple[str, ...]:
    """Put beside the model ``target`` what onnxruntime-genai needs and the folder of ``source`` has.

    Nothing is done unless that folder has a ``genai_config.json`` for models of the target's name, and the target lies
    in another folder. Files that are there already are kept; the configuration's ``custom_ops_library`` is made to fit
    the model. The runtime looks for the library in the model's folder and nowhere else, so it is copied. Returns the
    names of the files written. Raises ConfigError for a configuration that cannot be read, SaveError for a full disk.
    """
    origin, folder = source.parent, target.parent
    if not (origin / CONFIG).is_file() or folder.resolve() == origin.resolve():
        return ()
    settings = _read(origin / CONFIG)
    decoder = _decoder(settings)
    if decoder is None or decoder.get("filename") != target.name:
        return ()
    written = []
    try:
        for pattern in _COMPANIONS:
            for file in sorted(origin.glob(pattern)):
                if file.name != CONFIG and not (folder / file.name).exists():
                    _replace(folder / file.name, file.read_bytes())
                    written.append(file.name)
        if (folder / CONFIG).is_file():
            settings = _read(folder / CONFIG)
        options = (_decoder(settings) or decoder).setdefault("session_options", {})
        library = Path(custom_op_library())
        if any(node.domain == DOMAIN for node in ir.load(target).graph.all_nodes()):
            _replace(folder / library.name, library.read_bytes())
            written.append(library.name)
            options["custom_ops_library"] = library.name
        elif options.get("custom_ops_library") == library.name:
            del options["custom_ops_library"]
        _replace(folder / CONFIG, json.dumps(settings, indent=4).encode())
        written.append(CONFIG)
    except OSError as error:
        raise SaveError(f"output: {str(folder)!r} cannot be completed ({error.strerror})") from error
    return tuple(written)


def _decoder(settings: Any) -> dict[str, Any] | None:
    model = settings.get("model") if isinstance(settings, dict) else None
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder if isinstance(decoder, dict) else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"genai config: {str(path)!r} cannot be read ({error})") from error


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
