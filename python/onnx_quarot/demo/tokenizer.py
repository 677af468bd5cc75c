"""Write `tokenizer.json` and `tokenizer_config.json` from the tokenizer metadata of a GGUF file."""

from __future__ import annotations

from typing import Any, TypeVar

from onnx_quarot.demo.gguf_model import GgufLlama
from onnx_quarot.errors import ModelError

T = TypeVar("T")

# Token types of the GGUF specification that are matched in text before anything else.
_CONTROL, _USER_DEFINED = 3, 4

_BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
}


def tokenizer_json(model: GgufLlama) -> dict[str, Any]:
    """The content of `tokenizer.json`: a byte-level BPE tokenizer as the `tokenizers` library reads it.

    Raises ModelError for tokenizers that are not byte-level BPE, or that split text by rules not known here.
    """
    kind = model.metadata("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"{model.path} has the tokenizer {kind!r}, only byte-level BPE ('gpt2') can be written")
    splitter = model.metadata("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(splitter, str) or splitter not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelError(f"{model.path} splits text by the rules {splitter!r}; known are {known}")
    tokens = _tokens(model)
    types = _list(model, "token_type", int, [1] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(f"{model.path} has {len(types)} types of tokens for {len(tokens)} tokens")
    merges = _list(model, "merges", str, [])
    if not all(" " in merge for merge in merges):
        raise ModelError(f"{model.path} has a merge that is not two pieces with a space between them")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind_of_token == _CONTROL,
            }
            for i, (token, kind_of_token) in enumerate(zip(tokens, types, strict=True))
            if kind_of_token in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[splitter],
        "post_processor": _post_processor(model, tokens),
        # a plain ByteLevel decoder: with the chain some tools write, onnxruntime-genai loses spaces
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _special(model, "unknown", tokens),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def tokenizer_config_json(model: GgufLlama) -> dict[str, Any]:
    """The content of `tokenizer_config.json`: special tokens by role and the chat template."""
    tokens = _tokens(model)
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "add_bos_token": bool(model.metadata("tokenizer.ggml.add_bos_token", False)),
        "bos_token": _special(model, "bos", tokens),
        "eos_token": _special(model, "eos", tokens),
        "unk_token": _special(model, "unknown", tokens),
        "pad_token": _special(model, "padding", tokens),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.context,
        "chat_template": model.metadata("tokenizer.chat_template"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _tokens(model: GgufLlama) -> list[str]:
    tokens = _list(model, "tokens", str)
    if not tokens:
        raise ModelError(f"{model.path} has no tokenizer.ggml.tokens")
    return tokens


def _list(model: GgufLlama, key: str, kind: type[T], default: list[T] | None = None) -> list[T]:
    values = model.metadata(f"tokenizer.ggml.{key}", default or [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ModelError(f"{model.path} has tokenizer.ggml.{key} that is no list of {kind.__name__}")
    return values


def _special(model: GgufLlama, role: str, tokens: list[str]) -> str | None:
    index = model.metadata(f"tokenizer.ggml.{role}_token_id")
    if index is None:
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelError(f"{model.path} has {role}_token_id = {index!r}; it must be below {len(tokens)}")
    return tokens[index]


def _post_processor(model: GgufLlama, tokens: list[str]) -> dict[str, Any]:
    if not model.metadata("tokenizer.ggml.add_bos_token", False):
        return _BYTE_LEVEL
    bos = _special(model, "bos", tokens)
    if bos is None:
        raise ModelError(f"{model.path} asks for a leading BOS token but has no tokenizer.ggml.bos_token_id")
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
    }
