"""Write a Llama-architecture GGUF model as a float32 ONNX model folder that onnxruntime-genai loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_quarot.demo.gguf_model import GgufLlama
from onnx_quarot.demo.llama_graph import llama_graph
from onnx_quarot.demo.tokenizer import tokenizer_config_json, tokenizer_json
from onnx_quarot.errors import SaveError
from onnx_quarot.partial import disposable
from onnx_quarot.progress import NullProgress, Progress


def build_model(gguf_path: str | Path, folder: str | Path, *, progress: Progress | None = None) -> Path:
    """Write `model.onnx` with its data file, `genai_config.json`, `tokenizer.json`, `tokenizer_config.json`.

    Weights are dequantized one at a time while they are written, so memory holds one tensor, not the model.
    The folder appears complete or not at all; an existing one raises SaveError. A GGUF file that cannot be
    converted raises ModelError (see GgufLlama). Returns `folder`.
    """
    folder = Path(folder)
    if folder.exists():
        raise SaveError(f"{folder} exists already: remove it, or choose another folder")
    source = GgufLlama(gguf_path)
    texts = {
        "tokenizer.json": tokenizer_json(source),
        "tokenizer_config.json": tokenizer_config_json(source),
        "genai_config.json": _genai_config(source),
    }
    model = llama_graph(source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise SaveError(f"{folder} cannot be written: {error}") from error
    try:
        with disposable(scratch):
            for name, content in texts.items():
                (scratch / name).write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
            with (progress or NullProgress()).task("write float32 ONNX model", len(model.graph.initializers)) as task:
                ir.save(
                    model,
                    scratch / "model.onnx",
                    external_data="model.onnx.data",
                    callback=lambda _tensor, _info: task.advance(),
                    max_workers=1,
                )
            scratch.chmod(0o755)
            os.replace(scratch, folder)
    except OSError as error:
        raise SaveError(f"{folder} cannot be written: {error}") from error
    return folder


def _genai_config(source: GgufLlama) -> dict[str, Any]:
    c = source.config
    special = {role: source.metadata(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "padding")}
    eos = special["eos"]
    model = {
        "type": "llama",
        "bos_token_id": special["bos"],
        "eos_token_id": eos,
        "pad_token_id": eos if special["padding"] is None else special["padding"],
        "context_length": c.context,
        "vocab_size": c.vocabulary,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": c.head_size,
            "hidden_size": c.hidden,
            "num_attention_heads": c.heads,
            "num_hidden_layers": c.layers,
            "num_key_value_heads": c.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": c.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": {key: value for key, value in model.items() if value is not None}, "search": search}
