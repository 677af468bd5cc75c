"""A Llama in the layout onnxruntime-genai's builder writes, of any size, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

MS = "com.microsoft"


@dataclass(frozen=True)
class Config:
    """Sizes; hidden = heads * head_size."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    ffn: int = 96
    vocab: int = 120
    tied: bool = True
    uniform_final_norm: bool = False
    separate_qkv: bool = False
    symbolic_cache: bool = False  # the builder's newer versions write a symbol for the caches' head size

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


def build(config: Config = Config(), seed: int = 0) -> onnx.ModelProto:
    """The model; norm scales are far from uniform, and two channels of the stream are outliers."""
    return Builder(config, seed).model()


def save(path: Path, config: Config = Config(), seed: int = 0, *, external: bool = False) -> Path:
    model = build(config, seed)
    if external:
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data", size_threshold=256)
    else:
        onnx.save(model, path)
    return path


def decoder_feeds(config: Config, rng: np.random.Generator, length: int = 9, past: int = 0) -> dict[str, np.ndarray]:
    """A prompt behind a cache: an empty one, or one that holds a feature much larger than the others."""
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(0, config.vocab, (1, length)),
        "attention_mask": np.ones((1, past + length), np.int64),
    }
    for layer in range(config.layers):
        for kind in ("key", "value"):
            cache = rng.standard_normal((1, config.kv_heads, past, config.head_size)).astype(np.float32)
            cache[..., 3] *= 20 if kind == "value" else 1
            feeds[f"past_key_values.{layer}.{kind}"] = cache
    return feeds


class Reader:
    """The smallest CalibrationDataReader."""

    def __init__(self, batches: list[dict[str, np.ndarray]]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rest, None)


class Builder:
    dtype = np.dtype(np.float32)

    def __init__(self, c: Config, seed: int) -> None:
        self.c, self.rng = c, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def const(self, name: str, array: np.ndarray) -> str:
        self.weights.append(ir.to_proto(ir.tensor(np.ascontiguousarray(array), name=name)))
        return name

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        return self.const(name, (gain * self.rng.standard_normal((rows, columns)) / rows**0.5).astype(self.dtype))

    def scale(self, name: str, uniform: bool = False) -> str:
        n = self.c.hidden
        values = np.full(n, 1.3) if uniform else self.rng.uniform(0.3, 2.0, n)
        return self.const(name, values.astype(self.dtype))

    def node(self, op: str, inputs: list[str], outputs: list[str], name: str, domain: str = "", **attrs: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attrs))
        return outputs[0]

    def linear(self, x: str, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        weight = self.matrix(name.strip("/").replace("/", ".") + ".weight", rows, columns, gain)
        return self.node("MatMul", [x, weight], [f"{name}/output_0"], name)

    def model(self) -> onnx.ModelProto:
        c = self.c
        f, i64 = ir.DataType.from_numpy(self.dtype).value, TensorProto.INT64
        inputs = [
            helper.make_tensor_value_info("input_ids", i64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info("attention_mask", i64, ["batch_size", "total_sequence_length"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", f, ["batch_size", "sequence_length", c.vocab])]
        size = "kv_cache_dim" if c.symbolic_cache else c.head_size
        for layer in range(c.layers):
            for kind in ("key", "value"):
                shape = ["batch_size", c.kv_heads, "past_sequence_length", size]
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{kind}", f, shape))
                shape = ["batch_size", c.kv_heads, "total_sequence_length", size]
                outputs.append(helper.make_tensor_value_info(f"present.{layer}.{kind}", f, shape))
        head = self.matrix("lm_head.MatMul.weight", c.hidden, c.vocab) if c.tied else ""
        if c.tied:
            table = self.node("Transpose", [head], ["embed_table"], "/model/embed_tokens/Transpose", perm=[1, 0])
        else:
            table = self.matrix("model.embed_tokens.weight", c.vocab, c.hidden)
        stream = self.node("Gather", [table, "input_ids"], ["embedded"], "/model/embed_tokens/Gather")
        self._mask()
        normed = self.node(
            "SimplifiedLayerNormalization", [stream, self.scale("model.layers.0.input_layernorm.weight")],
            ["normed_0"], "/model/layers.0/input_layernorm/LayerNorm", epsilon=1e-5, axis=-1, stash_type=1,
        )  # fmt: skip
        for layer in range(c.layers):
            p = f"/model/layers.{layer}"
            delta = self.linear(self._attention(normed, layer, p), f"{p}/attn/o_proj/MatMul", c.hidden, c.hidden)
            normed, stream = self._skip_norm(stream, delta, f"{p}/post_attention_layernorm")
            gate = self.linear(normed, f"{p}/mlp/gate_proj/MatMul", c.hidden, c.ffn)
            up = self.linear(normed, f"{p}/mlp/up_proj/MatMul", c.hidden, c.ffn)
            sigmoid = self.node("Sigmoid", [gate], [f"{p}/sigmoid"], f"{p}/mlp/act_fn/Sigmoid")
            act = self.node("Mul", [gate, sigmoid], [f"{p}/act"], f"{p}/mlp/act_fn/Mul")
            product = self.node("Mul", [act, up], [f"{p}/product"], f"{p}/mlp/Mul")
            down = self.linear(product, f"{p}/mlp/down_proj/MatMul", c.ffn, c.hidden, gain=2.0)
            last = layer == c.layers - 1
            name = (
                f"/model/layers.{c.layers}/final_norm_layernorm"
                if last
                else f"/model/layers.{layer + 1}/input_layernorm"
            )
            normed, stream = self._skip_norm(stream, down, name, last)
        weight = head or self.matrix("lm_head.MatMul.weight", c.hidden, c.vocab)
        self.node("MatMul", [normed, weight], ["logits"], "/lm_head/MatMul")
        graph = helper.make_graph(self.nodes, "main_graph", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return model

    def _mask(self) -> None:
        """seqlens_k and total_sequence_length from the attention mask, as the builder writes them."""
        one, minus = self.const("one", np.array([1], np.int64)), self.const("minus", np.array([1], np.int64))
        total = self.node("ReduceSum", ["attention_mask", one], ["sum"], "/model/attn_mask/ReduceSum", keepdims=0)
        less = self.node("Sub", [total, minus], ["less"], "/model/attn_mask/Sub")
        self.node("Cast", [less], ["seqlens_k"], "/model/attn_mask/Cast", to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], ["mask_shape"], "/model/attn_mask/Shape")
        index = self.const("index_1", np.array(1, np.int64))
        size = self.node("Gather", [shape, index], ["mask_size"], "/model/attn_mask/Gather", axis=0)
        self.node("Cast", [size], ["total_length"], "/model/attn_mask/Cast_1", to=TensorProto.INT32)

    def _attention(self, x: str, layer: int, p: str) -> str:
        c = self.c
        if not any(w.name == "cos_cache" for w in self.weights):
            angles = np.outer(np.arange(64), 1e4 ** (-np.arange(0, c.head_size, 2) / c.head_size))
            self.const("cos_cache", np.cos(angles).astype(self.dtype))
            self.const("sin_cache", np.sin(angles).astype(self.dtype))
        kv = c.kv_heads * c.head_size
        if c.separate_qkv:
            qkv = [
                self.linear(x, f"{p}/attn/{n}_proj/MatMul", c.hidden, w)
                for n, w in (("q", c.hidden), ("k", kv), ("v", kv))
            ]
        else:
            qkv = [self.linear(x, f"{p}/attn/qkv_proj/MatMul", c.hidden, c.hidden + 2 * kv), "", ""]
        past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        return self.node(
            "GroupQueryAttention",
            [*qkv, *past, "seqlens_k", "total_length", "cos_cache", "sin_cache"],
            [f"{p}/attn/output_0", f"present.{layer}.key", f"present.{layer}.value"],
            f"{p}/attn/GroupQueryAttention", domain=MS, num_heads=c.heads, kv_num_heads=c.kv_heads, do_rotary=1,
            scale=c.head_size**-0.5, rotary_interleaved=0,
        )  # fmt: skip

    def _skip_norm(self, stream: str, delta: str, name: str, last: bool = False) -> tuple[str, str]:
        outputs = [f"{name}/output_0"] if last else [f"{name}/output_0", "", "", f"{name}/output_3"]
        weight = self.scale(name.strip("/").replace("/", ".") + ".weight", last and self.c.uniform_final_norm)
        self.node(
            "SkipSimplifiedLayerNormalization",
            [stream, delta, weight],
            outputs,
            f"{name}/SkipLayerNorm",
            domain=MS,
            epsilon=1e-5,
        )
        return outputs[0], outputs[-1]
