"""Greedy text generation with a key/value cache, through plain onnxruntime."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from onnx_quarot.custom_op import DOMAIN
from onnx_quarot.data import InputSpec, load_tokenizer
from onnx_quarot.errors import ConfigError, DataError, ModelError, first_line

Array = npt.NDArray[Any]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
_PAST, _PRESENT = "past_key_values", "present"


def generate(
    session: ort.InferenceSession,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    chat: bool = False,
    system: str | None = None,
    stop_ids: Collection[int] | None = None,
    specs: Sequence[InputSpec] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt` by the most likely token, again and again; return the new text.

    tokenizer: a `tokenizers.Tokenizer`, or the path of a tokenizer.json or of the folder that holds it. chat:
    wrap the prompt as a ChatML conversation, after `system` if given. stop_ids: tokens that end the text (not
    part of it); by default what genai_config.json beside a tokenizer that was given by path calls
    eos_token_id, else none. specs: the model's inputs where they are known better than the session knows them
    (see `Decoder`). on_text: called with each new piece of text, at once. Raises ModelError for a model that
    is no decoder with a cache, DataError for an empty prompt or an unusable tokenizer, ConfigError for a chat
    with a tokenizer without ChatML's tokens.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if isinstance(tokenizer, str | os.PathLike):
        if stop_ids is None:
            stop_ids = _eos_ids(Path(tokenizer))
        tokenizer = load_tokenizer(tokenizer)
    if chat:
        prompt = chat_prompt(tokenizer, prompt, system)
    ids = list(tokenizer.encode(prompt).ids)
    if not ids:
        raise DataError("prompt: holds no token; at least one is needed")
    decoder = Decoder(session, specs)
    step = np.array([ids], np.int64)
    new: list[int] = []
    text = ""
    while len(new) < max_new_tokens:
        token = int(np.argmax(decoder.feed(step)[0]))
        if stop_ids is not None and token in stop_ids:
            break
        new.append(token)
        step = np.array([[token]], np.int64)
        longer = tokenizer.decode(new)
        # a character may be spread over several tokens; until it is whole it decodes as U+FFFD
        if not longer.endswith("\ufffd") or len(new) == max_new_tokens:
            if on_text is not None and len(longer) > len(text):
                on_text(longer[len(text) :])
            text = longer
    return str(tokenizer.decode(new))


def chat_prompt(tokenizer: Any, message: str, system: str | None = None) -> str:
    """`message` as a user's turn in ChatML, after a system turn if given, open for the assistant's answer."""
    for token in ("<|im_start|>", "<|im_end|>"):
        if tokenizer.token_to_id(token) is None:
            raise ConfigError(f"chat: the tokenizer has no {token}, so the model does not speak ChatML")
    turns = [] if system is None else [("system", system)]
    turns.append(("user", message))
    written = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return written + "<|im_start|>assistant\n"


class Decoder:
    """A decoder session with its key/value cache: feed tokens, get logits, feed the next ones.

    Cache inputs are those called past_key_values.*, each with an output called present.* (the convention of
    ONNX exporters and of onnxruntime-genai). The cache stays inside ONNX Runtime; only logits are copied out.
    specs: use these input shapes instead of the session's own, which may leave the head size open. capacity: keep the
    cache in buffers for that many tokens, which the model writes new ones into, as onnxruntime-genai does, instead of
    copying all of it at every token; for models of which :func:`extends_in_place` is true. Raises ModelError naming
    the input that keeps the session from being such a decoder.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        specs: Sequence[InputSpec] | None = None,
        *,
        capacity: int | None = None,
    ) -> None:
        self._session, self._capacity = session, capacity
        self._specs = {spec.name: spec for spec in (session_specs(session) if specs is None else specs)}
        outputs = [output.name for output in session.get_outputs()]
        self._present: dict[str, str] = {}
        for name, spec in self._specs.items():
            if name.startswith(_PAST):
                present = _PRESENT + name.removeprefix(_PAST)
                if present not in outputs:
                    raise ModelError(f"cache input {name} has no output {present} to go with it")
                if spec.shape is None or not isinstance(spec.shape[-1], int):
                    raise ModelError(f"cache input {name} has the shape {spec.shape}: its last dimension must be known")
                self._present[name] = present
            elif name not in ("input_ids", "attention_mask", "position_ids"):
                raise ModelError(f"input {name} is none that a decoder of text with a cache has")
        if "input_ids" not in self._specs or not self._present:
            raise ModelError("the model has no input_ids or no past_key_values inputs: it is no decoder with a cache")
        rest = [name for name in outputs if name not in self._present.values()]
        if len(rest) != 1:
            raise ModelError(f"the model has the outputs {rest} beside its cache: a decoder has one, the logits")
        self._logits = rest[0]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0
        self._binding = self._session.io_binding()
        self._binding.bind_output(self._logits, "cpu")  # the first of the outputs, whichever is bound again
        # What is bound lives in memory of numpy's, which bindings of ONNX Runtime 1.27 do not keep alive.
        self._bound: dict[str, ort.OrtValue] = {}

    def feed(self, ids: Array) -> Array:
        """Append tokens [batch, n] to those before; return the logits [batch, vocabulary] after the last."""
        batch, count = ids.shape
        total = self.length + count
        if self._capacity is not None and total > self._capacity:
            raise ConfigError(f"capacity: is {self._capacity} tokens, too few for {total}")
        binding = self._binding
        if not self.length:
            self._bind_cache({name: self._empty(self._specs[name], batch) for name in self._present})
        plain = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total)),
            "position_ids": np.broadcast_to(np.arange(self.length, total), (batch, count)),
        }
        for name, array in plain.items():
            if name in self._specs:
                fitting = np.ascontiguousarray(array, self._specs[name].dtype)
                self._bind_input(name, ort.OrtValue.ortvalue_from_numpy(fitting))
        binding.bind_output(self._logits, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise ModelError(
                f"the model does not run on {count} tokens behind {self.length} in its cache: {first_line(error)}"
            ) from None
        logits = binding.get_outputs_as_ortvaluevector()[0].numpy()
        if self._capacity is None:
            self._bind_cache(dict(zip(self._present, binding.get_outputs()[1:], strict=True)))
        self.length = total
        last: Array = logits[:, -1].astype(np.float32, copy=False)
        return last

    def _bind_cache(self, values: Mapping[str, ort.OrtValue]) -> None:
        for past, value in values.items():
            self._bind_input(past, value)
            if self._capacity is None:
                self._binding.bind_output(self._present[past], "cpu")
            else:
                self._binding.bind_ortvalue_output(self._present[past], value)

    def _bind_input(self, name: str, value: ort.OrtValue) -> None:
        self._bound[name] = value
        self._binding.bind_ortvalue_input(name, value)

    def _empty(self, spec: InputSpec, batch: int) -> ort.OrtValue:
        _, *rest = spec.cache_shape(batch, self._capacity or 0)
        return ort.OrtValue.ortvalue_from_numpy(np.zeros([batch, *rest], spec.dtype))


def extends_in_place(model: ir.Model) -> bool:
    """Whether every cache input goes to GroupQueryAttention alone, which can write its output into the same buffer."""
    caches = [value for value in model.graph.inputs if (value.name or "").startswith(_PAST)]
    return bool(caches) and all(
        len(uses := tuple(value.uses())) == 1
        and uses[0].node.op_type == "GroupQueryAttention"
        and uses[0].node.domain in ("com.microsoft", DOMAIN)
        for value in caches
    )


def session_specs(session: ort.InferenceSession) -> list[InputSpec]:
    """The inputs of a session. Raises ModelError for an element type that numpy does not have."""
    specs = []
    for value in session.get_inputs():
        if value.type not in _DTYPES:
            raise ModelError(f"input {value.name} has the type {value.type}, which cannot be fed from numpy")
        specs.append(InputSpec(value.name, tuple(value.shape), np.dtype(_DTYPES[value.type])))
    return specs


def _eos_ids(tokenizer: Path) -> list[int]:
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    config = folder / "genai_config.json"
    if not config.is_file():
        return []
    eos = json.loads(config.read_text(encoding="utf-8")).get("model", {}).get("eos_token_id", [])
    return [eos] if isinstance(eos, int) else list(eos)
