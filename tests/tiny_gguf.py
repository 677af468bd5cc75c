"""A random Llama of a few thousand weights in a GGUF file, and the same model in numpy to check against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, FFN, CONTEXT = 2, 64, 4, 2, 16, 96, 64
THETA, EPSILON = 10000.0, 1e-5
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ġ t", "1 2", "Ċ Ċ"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
VOCAB = len(TOKENS)


@dataclass
class Tiny:
    """`weights`: what the converted model must compute with, [out, in], Q and K in half-split RoPE order."""

    path: Path
    weights: dict[str, np.ndarray[Any, Any]]
    rope_factors: np.ndarray[Any, Any] = field(default_factory=lambda: np.ones(HEAD // 2))

    def logits(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A plain Llama in float64: token ids [n] to logits [n, vocabulary]."""
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        n = len(ids)
        frequency = THETA ** (-np.arange(0, HEAD, 2) / HEAD) / self.rope_factors
        angle = np.arange(n)[:, None] * frequency
        future = np.triu(np.full((n, n), -np.inf), 1)
        x = w["token_embd"][ids]
        for i in range(LAYERS):
            normed = _rms(x, w[f"blk.{i}.attn_norm"])
            q = _rope((normed @ w[f"blk.{i}.attn_q"].T).reshape(n, HEADS, HEAD), angle)
            k = _rope((normed @ w[f"blk.{i}.attn_k"].T).reshape(n, KV_HEADS, HEAD), angle)
            v = (normed @ w[f"blk.{i}.attn_v"].T).reshape(n, KV_HEADS, HEAD)
            mixed = []
            for head in range(HEADS):
                shared = head // (HEADS // KV_HEADS)
                scores = q[:, head] @ k[:, shared].T / np.sqrt(HEAD) + future
                weight = np.exp(scores - scores.max(-1, keepdims=True))
                mixed.append(weight / weight.sum(-1, keepdims=True) @ v[:, shared])
            x = x + np.concatenate(mixed, -1) @ w[f"blk.{i}.attn_output"].T
            normed = _rms(x, w[f"blk.{i}.ffn_norm"])
            gate = normed @ w[f"blk.{i}.ffn_gate"].T
            up = normed @ w[f"blk.{i}.ffn_up"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{i}.ffn_down"].T
        logits: np.ndarray[Any, Any] = _rms(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T
        return logits


def write(
    path: Path,
    *,
    tied: bool = True,
    rope_factors: bool = False,
    architecture: str = "llama",
    splitter: str = "smollm",
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    leave_out: str = "",
    metadata: dict[str, str] | None = None,
    seed: int = 0,
) -> Tiny:
    """Write the file; `extra` adds tensors, `leave_out` drops one, `metadata` adds strings."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)

    weights: dict[str, np.ndarray[Any, Any]] = {}

    def put(name: str, *shape: int, heads: int = 0, quantized: bool = False, scale: float = 1.0) -> None:
        value = rng.standard_normal(shape).astype(np.float32) * np.float32(scale)
        if len(shape) == 1:
            value = 1 + value * np.float32(0.5)
        stored, kind = value, gguf.GGMLQuantizationType.F32
        if quantized:
            kind = gguf.GGMLQuantizationType.Q4_1
            stored = gguf.quants.quantize(value, kind)
            value = gguf.quants.dequantize(stored, kind)
        if heads:
            # the order llama.cpp's converter gives Q and K: the halves of each head interleaved
            stored = value.reshape(heads, 2, HEAD // 2, -1).swapaxes(1, 2).reshape(value.shape).copy()
        weights[name] = value
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)

    put("token_embd", VOCAB, HIDDEN)
    for i in range(LAYERS):
        put(f"blk.{i}.attn_norm", HIDDEN)
        put(f"blk.{i}.attn_q", HEADS * HEAD, HIDDEN, heads=HEADS, scale=0.3)
        put(f"blk.{i}.attn_k", KV_HEADS * HEAD, HIDDEN, heads=KV_HEADS, scale=0.3)
        put(f"blk.{i}.attn_v", KV_HEADS * HEAD, HIDDEN, scale=0.2)
        put(f"blk.{i}.attn_output", HIDDEN, HEADS * HEAD, scale=0.2)
        put(f"blk.{i}.ffn_norm", HIDDEN)
        put(f"blk.{i}.ffn_gate", FFN, HIDDEN, quantized=True, scale=0.2)
        put(f"blk.{i}.ffn_up", FFN, HIDDEN, scale=0.2)
        put(f"blk.{i}.ffn_down", HIDDEN, FFN, scale=0.2)
    put("output_norm", HIDDEN)
    if not tied:
        put("output", VOCAB, HIDDEN)
    tiny = Tiny(path, weights)
    if rope_factors:
        tiny.rope_factors = np.linspace(1, 8, HEAD // 2)
        writer.add_tensor("rope_freqs.weight", tiny.rope_factors.astype(np.float32))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tiny


def _rms(x: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    normed: np.ndarray[Any, Any] = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPSILON) * scale
    return normed


def _rope(x: np.ndarray[Any, Any], angle: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rotate element i of each head [n, heads, size] with element i + size/2."""
    a, b = np.split(x, 2, -1)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
