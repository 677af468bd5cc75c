"""Read a Llama-architecture GGUF file: configuration, weights (one at a time, float32), tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_quarot.errors import ModelError, first_line

Array = npt.NDArray[np.float32]

_LAYER_TENSORS = frozenset(
    f"{name}.weight"
    for name in (
        "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output",
        "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
    )
)  # fmt: skip
_MODEL_TENSORS = frozenset({"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"})


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama decoder. `tied`: the output head is the embedding table."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int
    norm_epsilon: float
    rope_theta: float
    tied: bool


class GgufLlama:
    """A Llama model in a GGUF file.

    The file is memory mapped; `weight` dequantizes one tensor each time it is asked and keeps nothing. Raises
    ModelError when the file is missing or is not a GGUF, when its architecture is not Llama, or when it has
    something this reader would have to ignore (biases, experts, an unknown RoPE scaling): the message names
    it.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ModelError("the package gguf is not installed: pip install 'onnx-quarot[demo]'") from error
        self.path = Path(path)
        try:
            self._reader = _bounded(gguf.GGUFReader)(self.path)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            architecture = self.metadata("general.architecture")
            if architecture != "llama":
                raise ModelError(f"{self.path} has the architecture {architecture!r}, only 'llama' can be converted")
            self.config = self._read_config()
            self._check_tensors()
        except ModelError as error:
            if str(self.path) in str(error):
                raise
            raise ModelError(f"{self.path} cannot be read as a GGUF file: {error}") from error
        except Exception as error:  # whatever the reader stumbled over in this file
            raise ModelError(f"{self.path} cannot be read as a GGUF file: {first_line(error)[:160]}") from error

    def metadata(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as Python values, or `default` when the file has no such key."""
        field = self._reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except (UnicodeDecodeError, IndexError) as error:
            raise ModelError(f"{self.path} cannot be read as a GGUF file: {key}: {first_line(error)[:160]}") from error

    def weight(self, name: str) -> Array:
        """The tensor `name` (without ".weight") as float32 [out, in] or [n]; Q, K in half-split RoPE order.

        llama.cpp stores the rows of Q and K interleaved (pairs 2i, 2i+1 rotate together); everything else,
        and the graph built here, rotates i with i + head_size/2. The rows are put back in that order.
        """
        import gguf

        full_name = f"{name}.weight"
        if full_name not in self._tensors:
            raise ModelError(f"{self.path} has no tensor {full_name}")
        tensor = self._tensors[full_name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"{self.path}: tensor {full_name} cannot be read ({first_line(error)[:160]})") from error
        if name.endswith("attn_q"):
            return _deinterleave(values, self.config.heads)
        if name.endswith("attn_k"):
            return _deinterleave(values, self.config.kv_heads)
        return values

    def has_weight(self, name: str) -> bool:
        """Whether the file has a tensor of this name (without ".weight")."""
        return f"{name}.weight" in self._tensors

    def _require(self, key: str, default: Any = None) -> Any:
        value = self.metadata(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no metadata {key}, which a Llama GGUF must have")
        return value

    def _count(self, key: str, default: int | None = None) -> int:
        value = self._require(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path} has {key} = {value!r}; it must be a whole number from 1 on")
        return value

    def _real(self, key: str, default: float | None = None) -> float:
        value = self._require(key, default)
        if not isinstance(value, int | float):
            raise ModelError(f"{self.path} has {key} = {value!r}; it must be a number")
        return float(value)

    def _read_config(self) -> LlamaConfig:
        if "token_embd.weight" not in self._tensors:
            raise ModelError(f"{self.path} has no tensor token_embd.weight")
        hidden = self._count("llama.embedding_length")
        heads = self._count("llama.attention.head_count")
        head_size = self._count("llama.attention.key_length", hidden // heads)
        kv_heads = self._count("llama.attention.head_count_kv", heads)
        for key, expected in (
            ("llama.attention.value_length", head_size),
            ("llama.rope.dimension_count", head_size),
            ("llama.rope.scaling.type", "none"),
        ):
            found = self.metadata(key, expected)
            if found != expected:
                raise ModelError(f"{self.path} has {key} = {found!r}, only {expected!r} can be converted")
        if heads % kv_heads:
            raise ModelError(f"{self.path} has {heads} heads, which is no multiple of its {kv_heads} key/value heads")
        return LlamaConfig(
            layers=self._count("llama.block_count"),
            hidden=hidden,
            intermediate=self._count("llama.feed_forward_length"),
            heads=heads,
            kv_heads=kv_heads,
            head_size=head_size,
            vocabulary=int(self._tensors["token_embd.weight"].shape[1]),
            context=self._count("llama.context_length"),
            norm_epsilon=self._real("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=self._real("llama.rope.freq_base", 10000.0),
            tied="output.weight" not in self._tensors,
        )

    def _check_tensors(self) -> None:
        c = self.config
        attention, kv = c.heads * c.head_size, c.kv_heads * c.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (c.vocabulary, c.hidden),
            "output.weight": (c.vocabulary, c.hidden),
            "output_norm.weight": (c.hidden,),
            "rope_freqs.weight": (c.head_size // 2,),
            "attn_norm.weight": (c.hidden,),
            "ffn_norm.weight": (c.hidden,),
            "attn_q.weight": (attention, c.hidden),
            "attn_k.weight": (kv, c.hidden),
            "attn_v.weight": (kv, c.hidden),
            "attn_output.weight": (c.hidden, attention),
            "ffn_gate.weight": (c.intermediate, c.hidden),
            "ffn_up.weight": (c.intermediate, c.hidden),
            "ffn_down.weight": (c.hidden, c.intermediate),
        }
        for name, tensor in self._tensors.items():
            layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
            known = layer.group(2) in _LAYER_TENSORS if layer else name in _MODEL_TENSORS
            if not known or (layer and int(layer.group(1)) >= c.layers):
                raise ModelError(f"{self.path} has a tensor {name}, which the Llama converter has no place for")
            expected = shapes[layer.group(2) if layer else name]
            # GGUF lists the fastest axis first
            found = tuple(int(n) for n in reversed(tensor.shape))
            if found != expected:
                raise ModelError(f"{self.path}: tensor {name} has shape {list(found)}, expected {list(expected)}")
        # Before a set of that many names: a damaged file may claim billions of layers.
        if c.layers > len(self._tensors):
            raise ModelError(f"{self.path} says llama.block_count = {c.layers} but has {len(self._tensors)} tensors")
        wanted = {f"blk.{i}.{name}" for i in range(c.layers) for name in _LAYER_TENSORS} | {"output_norm.weight"}
        missing = sorted(wanted - self._tensors.keys())
        if missing:
            raise ModelError(f"{self.path} has no tensor {missing[0]} ({len(missing)} are missing)")


def _bounded(reader: type[Any]) -> type[Any]:
    """The reader, refusing to read behind the end of the file: there it finds empty arrays, and would go on for as many
    of them as a damaged header claims.
    """

    class Bounded(reader):  # type: ignore[misc]
        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ModelError(f"the file ends at byte {len(self.data)}, within what its header announces")
            return super()._get(offset, dtype, count, *order, **orders)

    return Bounded


def _deinterleave(weight: Array, heads: int) -> Array:
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)
