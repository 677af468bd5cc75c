"""The ONNX graph of a Llama, in onnxruntime-genai's layout.

Operators, wiring and names are those onnxruntime-genai's own model builder gives a Llama: so the model runs
there, and what is tried on it is tried on the graphs people have. All activations are [batch, tokens, width].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_quarot.demo.gguf_model import Array, GgufLlama, LlamaConfig

FLOAT, INT32, INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64
_MASK = "/model/attn_mask_reformat/attn_mask_subgraph"

Output = tuple[str | None, ir.DataType, Sequence[int | str]]
"""An output to make: its name (None: "<node>/output_0"), element type and shape."""


def llama_graph(source: GgufLlama) -> ir.Model:
    """The ONNX model of `source`, its weights lazy: read from the GGUF file when they are serialized.

    With B rows, S new tokens, P past tokens, K key/value heads of size D and a vocabulary of V: inputs are
    input_ids int64 [B, S], attention_mask int64 [B, P+S], past_key_values.{i}.key/value [B, K, P, D]; outputs
    are logits [B, S, V], present.{i}.key/value [B, K, P+S, D].
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
            qkv_width = (c.heads + 2 * c.kv_heads) * c.head_size
            qkv = self._linear(f"{prefix}/attn/qkv_proj", normed, self._qkv(i), c.hidden, qkv_width)
            attended, present = self._attention(i, qkv, cache[i], lengths, caches)
            presents += present
            update = self._project(
                f"{prefix}/attn/o_proj", attended, f"blk.{i}.attn_output", c.heads * c.head_size, c.hidden
            )
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

    # -- parts of a Llama --

    def _sequence_lengths(self, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
        """What GroupQueryAttention asks of the mask: each row's last position, and the longest length."""
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
        """The embedded tokens and the head [hidden, vocabulary]; tied: the table is the head, transposed."""
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
        """RMSNorm of stream + update; returns the normed value and the new residual stream."""
        c, source = self.config, self.source
        scale = self._weight(f"{_dotted(name)}.weight", (c.hidden,), lambda: source.weight(weight))
        tokens = self._tokens(c.hidden)
        epsilon = c.norm_epsilon
        normed: Output = (f"{name}/output_0", FLOAT, tokens)
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
        outputs: list[Output | None] = [normed]
        if not is_last:
            outputs += [None, None, (f"{name}/output_3", FLOAT, tokens)]
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
        gate = self._project(f"{prefix}/gate_proj", x, f"blk.{layer}.ffn_gate", c.hidden, c.intermediate)
        up = self._project(f"{prefix}/up_proj", x, f"blk.{layer}.ffn_up", c.hidden, c.intermediate)
        wide: list[Output] = [(None, FLOAT, self._tokens(c.intermediate))]
        sigmoid = self._node("Sigmoid", f"{prefix}/act_fn/Sigmoid", [gate], wide)[0]
        silu = self._node("Mul", f"{prefix}/act_fn/Mul", [gate, sigmoid], wide)[0]
        product = self._node("Mul", f"{prefix}/Mul", [silu, up], wide)[0]
        return self._project(f"{prefix}/down_proj", product, f"blk.{layer}.ffn_down", c.intermediate, c.hidden)

    def _project(self, name: str, x: ir.Value, weight: str, inner: int, width: int) -> ir.Value:
        source = self.source
        return self._linear(name, x, lambda: _transposed(source.weight(weight)), inner, width)

    # -- graph plumbing --

    def _linear(self, name: str, x: ir.Value, read: Callable[[], Array], inner: int, width: int) -> ir.Value:
        weight = self._weight(f"{_dotted(name)}.MatMul.weight", (inner, width), read)
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
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[Output | None],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Append a node; an output of None is one the node has but nobody uses."""
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
