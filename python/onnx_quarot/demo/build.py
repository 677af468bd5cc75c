"""Write a Llama-architecture GGUF model as a float32 ONNX model folder, in onnxruntime-genai's layout.

Operators, wiring and names are those onnxruntime-genai's own model builder gives a Llama: so the folder runs there, and
what is tried on it is tried on the graphs people have. Dimension letters: B batch, S new tokens, P past tokens,
H hidden size, A = heads * head size, K = kv heads * head size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.demo.gguf_model import Array, GgufLlama, LlamaConfig
from onnx_quarot.demo.tokenizer import tokenizer_config_json, tokenizer_json
from onnx_quarot.errors import SaveError
from onnx_quarot.progress import NullProgress, Progress

FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"


def build_model(gguf_path: str | Path, folder: str | Path, *, progress: Progress | None = None) -> Path:
    """Write `model.onnx` + `model.onnx.data`, `tokenizer.json`, `tokenizer_config.json`, `genai_config.json` to `folder`.

    Weights are dequantized one at a time while they are written, so memory holds one tensor, not the model. The folder
    appears complete or not at all; an existing one raises SaveError. Errors of the GGUF file: ModelError (see
    GgufLlama). Returns `folder`.
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
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def llama_graph(source: GgufLlama) -> ir.Model:
    """The ONNX model of `source`, its weights lazy: they are read from the GGUF file when they are serialized.

    Inputs: input_ids int64 [B, S], attention_mask int64 [B, P+S], past_key_values.{i}.key/value [B, kv heads, P, head
    size]. Outputs: logits [B, S, V], present.{i}.key/value [B, kv heads, P+S, head size].
    """
    return _Llama(source).model()


class _Llama:
    """Builds the graph node by node; each method returns the value the next one needs."""

    def __init__(self, source: GgufLlama) -> None:
        self.source = source
        self.config: LlamaConfig = source.config
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="main_graph")

    def model(self) -> ir.Model:
        c = self.config
        input_ids = self._input("input_ids", INT64, ["batch_size", "sequence_length"])
        mask = self._input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
        cache = [
            tuple(self._cache_value(f"past_key_values.{i}.{part}", "past_sequence_length") for part in ("key", "value"))
            for i in range(c.layers)
        ]
        self.graph.inputs.extend(value for pair in cache for value in pair)
        lengths = self._sequence_lengths(mask)
        caches = self._rope_caches()
        hidden, head = self._embedding(input_ids)

        stream, update = hidden, None
        presents: list[ir.Value] = []
        for i in range(c.layers):
            prefix = f"/model/layers.{i}"
            normed, stream = self._norm(f"{prefix}/input_layernorm", f"blk.{i}.attn_norm", stream, update)
            qkv = self._linear(f"{prefix}/attn/qkv_proj", normed, self._qkv(i), c.heads + 2 * c.kv_heads, c.head_size)
            attended, present = self._attention(i, qkv, cache[i], lengths, caches)
            presents += present
            update = self._project(f"{prefix}/attn/o_proj", attended, f"blk.{i}.attn_output", c.hidden)
            normed, stream = self._norm(f"{prefix}/post_attention_layernorm", f"blk.{i}.ffn_norm", stream, update)
            update = self._mlp(i, normed)
        normed, _ = self._norm(
            f"/model/layers.{c.layers}/final_norm_layernorm", "output_norm", stream, update, is_last=True
        )
        logits = self._node(
            "MatMul", "/lm_head/MatMul", [normed, head], [("logits", FLOAT, self._tokens(c.vocabulary))]
        )[0]
        self.graph.outputs.extend([logits, *presents])
        return ir.Model(self.graph, ir_version=10, producer_name="onnx-quarot")

    # -- parts of a Llama --------------------------------------------------------------------------------------------

    def _sequence_lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention wants to know of the mask: last position of each row, and the longest length."""
        one = self._constant("/model/constants/INT64/[1]", np.array([1], np.int64))
        total = self._node("ReduceSum", f"{_MASK}/ReduceSum", [mask, one], [(None, INT64, ["batch_size"])], keepdims=0)
        last = self._node("Sub", f"{_MASK}/Sub", [*total, one], [(None, INT64, ["batch_size"])])
        to = int(INT32)
        seqlens_k = self._node("Cast", f"{_MASK}/Sub/Cast", last, [(None, INT32, ["batch_size"])], to=to)[0]
        shape = self._node("Shape", f"{_MASK}/Shape", [mask], [(None, INT64, [2])])
        axis = self._constant("/model/constants/INT64/1", np.array(1, np.int64))
        longest = self._node("Gather", f"{_MASK}/Gather", [*shape, axis], [(None, INT64, [])], axis=0)
        return seqlens_k, self._node("Cast", f"{_MASK}/Gather/Cast", longest, [(None, INT32, [])], to=to)[0]

    def _rope_caches(self) -> tuple[ir.Value, ir.Value]:
        c = self.config
        frequency = c.rope_theta ** (-np.arange(0, c.head_size, 2, dtype=np.float64) / c.head_size)
        if self.source.has_weight("rope_freqs"):
            frequency /= self.source.weight("rope_freqs")
        angle = np.arange(c.context, dtype=np.float64)[:, None] * frequency
        shape = (c.context, c.head_size // 2)
        cos = self._weight("cos_cache", shape, lambda: np.cos(angle).astype(np.float32))
        sin = self._weight("sin_cache", shape, lambda: np.sin(angle).astype(np.float32))
        return cos, sin

    def _embedding(self, input_ids: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The embedded tokens [B, S, H] and the output head [H, V]. Tied: the table is the head, transposed."""
        c, source = self.config, self.source
        name = "token_embd" if c.tied else "output"
        head = self._weight("lm_head.MatMul.weight", (c.hidden, c.vocabulary), lambda: _transposed(source.weight(name)))
        if c.tied:
            table = self._node(
                "Transpose",
                "/model/embed_tokens/Transpose",
                [head],
                [(None, FLOAT, [c.vocabulary, c.hidden])],
                perm=[1, 0],
            )[0]
        else:
            table = self._weight(
                "model.embed_tokens.weight", (c.vocabulary, c.hidden), lambda: source.weight("token_embd")
            )
        tokens = self._tokens(c.hidden)
        return self._node("Gather", "/model/embed_tokens/Gather", [table, input_ids], [(None, FLOAT, tokens)])[0], head

    def _norm(
        self, name: str, weight: str, stream: ir.Value, update: ir.Value | None, *, is_last: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """RMSNorm of stream + update; returns the normed value and the new residual stream, both [B, S, H]."""
        c, source = self.config, self.source
        scale = self._weight(f"{_dotted(name)}.weight", (c.hidden,), lambda: source.weight(weight))
        tokens = self._tokens(c.hidden)
        epsilon = c.norm_epsilon
        normed: tuple[str | None, ir.DataType, list[int | str]] = (f"{name}/output_0", FLOAT, tokens)
        if update is None:
            first = self._node(
                "SimplifiedLayerNormalization",
                f"{name}/LayerNorm",
                [stream, scale],
                [normed],
                axis=-1,
                epsilon=epsilon,
                stash_type=1,
            )
            return first[0], stream
        outputs = [normed] if is_last else [normed, None, None, (f"{name}/output_3", FLOAT, tokens)]
        values = self._node(
            "SkipSimplifiedLayerNormalization",
            f"{name}/SkipLayerNorm",
            [stream, update, scale],
            outputs,
            domain="com.microsoft",
            epsilon=epsilon,
        )
        return values[0], values[-1]

    def _qkv(self, layer: int) -> Callable[[], Array]:
        source = self.source

        def pack() -> Array:
            parts = [source.weight(f"blk.{layer}.attn_{part}") for part in "qkv"]
            return _transposed(np.concatenate(parts))

        return pack

    def _attention(
        self,
        layer: int,
        qkv: ir.Value,
        past: tuple[ir.Value, ...],
        lengths: tuple[ir.Value, ir.Value],
        rope: tuple[ir.Value, ir.Value],
    ) -> tuple[ir.Value, list[ir.Value]]:
        c = self.config
        present: list[int | str] = ["batch_size", c.kv_heads, "total_sequence_length", c.head_size]
        attended, key, value = self._node(
            "GroupQueryAttention",
            f"/model/layers.{layer}/attn/GroupQueryAttention",
            [qkv, None, None, *past, *lengths, *rope],
            [
                (None, FLOAT, self._tokens(c.heads * c.head_size)),
                (f"present.{layer}.key", FLOAT, present),
                (f"present.{layer}.value", FLOAT, present),
            ],
            domain="com.microsoft",
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            scale=float(c.head_size**-0.5),
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return attended, [key, value]

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        c, prefix = self.config, f"/model/layers.{layer}/mlp"
        gate = self._project(f"{prefix}/gate_proj", x, f"blk.{layer}.ffn_gate", c.intermediate)
        up = self._project(f"{prefix}/up_proj", x, f"blk.{layer}.ffn_up", c.intermediate)
        wide = [(None, FLOAT, self._tokens(c.intermediate))]
        sigmoid = self._node("Sigmoid", f"{prefix}/act_fn/Sigmoid", [gate], wide)[0]
        silu = self._node("Mul", f"{prefix}/act_fn/Mul", [gate, sigmoid], wide)[0]
        product = self._node("Mul", f"{prefix}/Mul", [silu, up], wide)[0]
        return self._project(f"{prefix}/down_proj", product, f"blk.{layer}.ffn_down", c.hidden)

    def _project(self, name: str, x: ir.Value, weight: str, width: int) -> ir.Value:
        source = self.source
        return self._linear(name, x, lambda: _transposed(source.weight(weight)), width)

    # -- graph plumbing ----------------------------------------------------------------------------------------------

    def _linear(self, name: str, x: ir.Value, read: Callable[[], Array], count: int, size: int = 1) -> ir.Value:
        assert x.shape is not None
        width = count * size
        weight = self._weight(f"{_dotted(name)}.MatMul.weight", (int(x.shape[-1]), width), read)
        return self._node("MatMul", f"{name}/MatMul", [x, weight], [(None, FLOAT, self._tokens(width))])[0]

    def _tokens(self, width: int) -> list[int | str]:
        return ["batch_size", "sequence_length", width]

    def _input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def _cache_value(self, name: str, length: str) -> ir.Value:
        shape = ir.Shape(["batch_size", self.config.kv_heads, length, self.config.head_size])
        return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=shape)

    def _constant(self, name: str, value: np.ndarray[Any, Any]) -> ir.Value:
        node_name = name.replace("/constants/", "/constant_nodes/")
        tensor = ir.tensor(value, name=name)
        return self._node("Constant", node_name, [], [(name, tensor.dtype, list(value.shape))], value=tensor)[0]

    def _weight(self, name: str, shape: tuple[int, ...], read: Callable[[], Array]) -> ir.Value:
        tensor = ir.LazyTensor(lambda: ir.Tensor(read(), name=name), dtype=FLOAT, shape=ir.Shape(shape), name=name)
        value = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        outputs: list[tuple[str | None, ir.DataType, list[int | str]] | None]
        | list[tuple[str | None, ir.DataType, list[int | str]]],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Append a node; an output is (name or None for "<node>/output_0", dtype, shape), or None when it is unused."""
        values = [
            ir.Value(name="")
            if output is None
            else ir.Value(
                name=output[0] or f"{name}/output_0", type=ir.TensorType(output[1]), shape=ir.Shape(output[2])
            )
            for output in outputs
        ]
        node = ir.node(op_type, inputs, attributes, domain=domain, outputs=values, name=name)
        self.graph.append(node)
        return values


def _dotted(name: str) -> str:
    return name.strip("/").replace("/", ".")


def _transposed(weight: Array) -> Array:
    return np.ascontiguousarray(weight.T)


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
