"""Writes tests/data/*.onnx: small models of many architectures, exported the ways people export.

Needs torch, transformers, onnxscript and onnxruntime-genai, none of which the tests need. Weights are random (seeded);
norm scales and biases are far from trivial, so that a rewrite that forgets one shows.

    python tests/export_models.py [--out FOLDER] [--scale 1] [NAME ...]

``--scale`` multiplies the sizes, for trying the same architectures at others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers as hf

VOCAB = 72  # unlike every width: the builder of onnxruntime-genai knows the head by its size


def sizes(scale: int, heads: int = 4, kv_heads: int = 2, ffn: int = 3, hidden: int = 32) -> dict[str, Any]:
    """What most configurations have in common: four heads, two layers."""
    hidden *= scale
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * ffn // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of unit gain, scales around one, biases and means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5 * (3.0 if "embed" in name else 1.0))
            elif "bias" in name:
                p.copy_(noise * 0.3)
            else:
                p.copy_(0.5 + torch.rand(p.shape, generator=generator) * 1.5)
        for name, b in model.named_buffers():
            if "running_mean" in name:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.3)
            elif "running_var" in name:
                b.copy_(0.5 + torch.rand(b.shape, generator=generator))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# onnxruntime-genai


def genai(make: Callable[[int], Any], *options: str, precision: str = "fp32") -> Callable[[Path, int], None]:
    def export(target: Path, scale: int) -> None:
        config = make(scale)
        model = randomize(hf.AutoModelForCausalLM.from_config(config))
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "hf"), Path(folder, "onnx")
            model.save_pretrained(source)
            tokenizer().save_pretrained(source)
            # The builder of Gemma 3 reads names that newer configurations lost.
            code = "import runpy; from transformers import Gemma3TextConfig as c; c.rope_local_base_freq = 1e4;"
            code += "c.rope_theta = 1e6;"
            code += "runpy.run_module('onnxruntime_genai.models.builder', run_name='__main__', alter_sys=True)"
            command = [sys.executable, "-c", code, "-m", str(source), "-i", str(source)]
            command += ["-o", str(out), "-p", precision, "-e", "cpu", "--cache_dir", folder]
            subprocess.run([*command, "--extra_options", "hf_token=false", *options], check=True, capture_output=True)
            onnx.save(onnx.load(out / "model.onnx"), target)

    return export


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(VOCAB)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w1", eos_token="w2", pad_token="w0")


def llama(scale: int, hidden: int = 64, **more: Any) -> Any:
    return hf.LlamaConfig(**sizes(scale, hidden=hidden), **{"tie_word_embeddings": False, **more})


def gemma2(scale: int) -> Any:
    return hf.Gemma2Config(**sizes(scale), head_dim=16, query_pre_attn_scalar=16, sliding_window=4)


def gemma3(scale: int) -> Any:
    return hf.Gemma3TextConfig(**sizes(scale), head_dim=16, query_pre_attn_scalar=16, sliding_window=4)


def gpt_oss(scale: int) -> Any:
    return hf.GptOssConfig(
        **sizes(scale, ffn=2),
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        tie_word_embeddings=False,
    )


def phi3(scale: int) -> Any:
    return hf.Phi3Config(**sizes(scale, hidden=64), original_max_position_embeddings=64, tie_word_embeddings=False)


# ---------------------------------------------------------------------------------------------------------------------
# torch.onnx


class Wrapped(torch.nn.Module):
    """A Hugging Face model as a function from tensors to one tensor."""

    def __init__(self, model: torch.nn.Module, argument: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.argument, self.fixed = model, argument, fixed

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        names = self.argument.split(",")
        result = self.model(**dict(zip(names, inputs, strict=True)), **self.fixed)
        return result.logits if hasattr(result, "logits") else result[0]


def exported(
    make: Callable[[int], tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[str]]],
    dynamo: bool,
    dynamic: bool = True,
    opset: int | None = None,
) -> Callable[[Path, int], None]:
    def export(target: Path, scale: int) -> None:
        module, inputs, names = make(scale)
        options: dict[str, Any] = {"input_names": names, "output_names": ["output"], "dynamo": dynamo}
        if dynamic:
            axes = [{0: "batch", 1: "length"} if x.dtype == torch.int64 else {0: "batch"} for x in inputs]
            if dynamo:
                shapes = tuple(dict.fromkeys(a, torch.export.Dim.DYNAMIC) for a in axes)
                # Wrapped.forward takes *inputs: one entry, a tuple of them.
                options["dynamic_shapes"] = (shapes,) if isinstance(module, Wrapped) else shapes
            else:
                options["dynamic_axes"] = dict(zip(names, axes, strict=True))
        options["opset_version"] = opset or (18 if dynamo else 17)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            torch.onnx.export(module, inputs, str(Path(folder, "m.onnx")), **options)
            proto = onnx.load(Path(folder, "m.onnx"))
        for node in proto.graph.node:
            del node.metadata_props[:]  # stack traces of the machine it was exported on
            node.doc_string = ""
        for value in [*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
            del value.metadata_props[:]
        del proto.graph.metadata_props[:], proto.metadata_props[:]
        onnx.save(proto, target)

    return export


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.arange(batch * length).reshape(batch, length) % (VOCAB - 4) + 3


def decoder(config: Callable[[int], Any]) -> Callable[[int], Any]:
    def make(scale: int) -> Any:
        c = config(scale)
        c._attn_implementation = "eager"
        model = randomize(hf.AutoModelForCausalLM.from_config(c, attn_implementation="eager"))
        inputs = (ids(), torch.ones_like(ids()))
        return Wrapped(model, "input_ids,attention_mask", use_cache=False), inputs, ["input_ids", "attention_mask"]

    return make


def plain(config: Callable[[int], Any]) -> Callable[[int], Any]:
    def make(scale: int) -> Any:
        c = config(scale)
        model = randomize(hf.AutoModel.from_config(c, attn_implementation="eager"))
        return Wrapped(model, "input_ids"), (ids(),), ["input_ids"]

    return make


def gpt2(scale: int) -> Any:
    return hf.GPT2Config(n_embd=32 * scale, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB,
                         bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def opt(scale: int) -> Any:
    return hf.OPTConfig(hidden_size=32 * scale, ffn_dim=48 * scale, num_hidden_layers=2, num_attention_heads=4,
                        vocab_size=VOCAB, max_position_embeddings=64, word_embed_proj_dim=32 * scale, pad_token_id=0,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip


def phi2(scale: int) -> Any:
    return hf.PhiConfig(**sizes(scale, kv_heads=4), partial_rotary_factor=0.5, hidden_act="gelu_new")


def olmo2(scale: int) -> Any:
    return hf.Olmo2Config(**sizes(scale), tie_word_embeddings=False)


def bert(scale: int) -> Any:
    c = sizes(scale)
    return hf.BertConfig(**{k: v for k, v in c.items() if k != "num_key_value_heads"})


def vit(scale: int) -> Any:
    config = hf.ViTConfig(hidden_size=32 * scale, intermediate_size=48 * scale, num_hidden_layers=2,
                          num_attention_heads=4, image_size=16, patch_size=4)  # fmt: skip
    model = randomize(hf.ViTForImageClassification._from_config(config, attn_implementation="eager"))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Wrapped(model, "pixel_values"), (pixels,), ["pixel_values"]


def dinov2(scale: int) -> Any:
    config = hf.Dinov2Config(hidden_size=32 * scale, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
                             image_size=16, patch_size=4)  # fmt: skip
    model = randomize(hf.AutoModel.from_config(config, attn_implementation="eager"))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Wrapped(model, "pixel_values"), (pixels,), ["pixel_values"]


def swin(scale: int) -> Any:
    config = hf.SwinConfig(image_size=16, patch_size=2, embed_dim=16 * scale, depths=[1, 2], num_heads=[2, 4],
                           window_size=2, mlp_ratio=2)  # fmt: skip
    model = randomize(hf.SwinForImageClassification._from_config(config, attn_implementation="eager"))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Wrapped(model, "pixel_values"), (pixels,), ["pixel_values"]


def falcon(scale: int) -> Any:
    return hf.FalconConfig(hidden_size=32 * scale, ffn_hidden_size=48 * scale, num_hidden_layers=2,
                           num_attention_heads=4, multi_query=True, parallel_attn=True, bias=False, vocab_size=VOCAB,
                           bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip


def whisper(scale: int) -> Any:
    config = hf.WhisperConfig(d_model=32 * scale, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                              decoder_attention_heads=4, encoder_ffn_dim=48 * scale, decoder_ffn_dim=48 * scale,
                              vocab_size=VOCAB, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
                              pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                              suppress_tokens=[], begin_suppress_tokens=[])  # fmt: skip
    return randomize(hf.WhisperForConditionalGeneration._from_config(config, attn_implementation="eager"))


def whisper_encoder(scale: int) -> Any:
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    return Wrapped(whisper(scale).get_encoder(), "input_features"), (features,), ["input_features"]


class WhisperDecoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.proj_out

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        out = self.decoder(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            encoder_hidden_states=encoder_hidden_states,
            use_cache=False,
        )
        return self.head(out[0])


def whisper_decoder(scale: int) -> Any:
    states = torch.randn(2, 16, 32 * scale, generator=torch.Generator().manual_seed(1))
    return WhisperDecoder(whisper(scale)), (ids(), states), ["input_ids", "encoder_hidden_states"]


def modernbert(scale: int) -> Any:
    c = sizes(scale)
    return hf.ModernBertConfig(**{k: v for k, v in c.items() if k != "num_key_value_heads"}, cls_token_id=1,
                               sep_token_id=2, global_attn_every_n_layers=2, local_attention=8)  # fmt: skip


def deepseek(scale: int) -> Any:
    """Attention with latent keys and values; no experts."""
    return hf.DeepseekV3Config(**sizes(scale, kv_heads=4), q_lora_rank=12 * scale, kv_lora_rank=16 * scale,
                               qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=2,
                               n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)  # fmt: skip


def lfm2(scale: int) -> Any:
    """A layer of short convolutions, which masks the norm in front of it, and one of attention."""
    return hf.Lfm2Config(**sizes(scale), block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])


class T5Decoder(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        states = hf.modeling_outputs.BaseModelOutput(last_hidden_state=encoder_hidden_states)
        return self.model(encoder_outputs=states, decoder_input_ids=input_ids, use_cache=False).logits


def t5_decoder(scale: int) -> Any:
    """The head is tied to the embeddings, and its input scaled."""
    config = hf.T5Config(d_model=32 * scale, d_kv=8 * scale, d_ff=48 * scale, num_layers=2, num_heads=4,
                         vocab_size=VOCAB, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    states = torch.randn(2, 7, 32 * scale, generator=torch.Generator().manual_seed(1))
    model = randomize(hf.T5ForConditionalGeneration._from_config(config, attn_implementation="eager"))
    return T5Decoder(model), (ids(), states), ["input_ids", "encoder_hidden_states"]


class ConvNet(torch.nn.Module):
    """1x1 convolutions around a 3x3 one and a depthwise one, with a residual stream and a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.reduce = torch.nn.Conv2d(width, width // 2, 1)
        self.mix = torch.nn.Conv2d(width // 2, width // 2, 3, padding=1)
        self.depthwise = torch.nn.Conv2d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        self.expand = torch.nn.Conv2d(width // 2, width, 1)
        self.straight = torch.nn.Conv2d(width, width, 1)
        self.head = torch.nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(self.mix(self.reduce(x)))
        x = x + self.expand(torch.relu(self.depthwise(y)))
        x = x + self.straight(x)
        return self.head(torch.relu(x.mean((2, 3))))


def convnet(scale: int) -> Any:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return randomize(ConvNet(32 * scale)), (pixels,), ["pixels"]


MODELS: dict[str, Callable[[Path, int], None]] = {
    "genai_llama": genai(llama),
    "genai_llama_tied": genai(lambda s: llama(s, tie_word_embeddings=True)),
    "genai_llama_fp16": genai(llama, precision="fp16"),
    "genai_qwen2": genai(lambda s: hf.Qwen2Config(**sizes(s, hidden=64), tie_word_embeddings=True)),
    "genai_qwen3": genai(lambda s: hf.Qwen3Config(**sizes(s, hidden=64), head_dim=16, tie_word_embeddings=True)),
    "genai_mistral": genai(lambda s: hf.MistralConfig(**sizes(s, hidden=64), tie_word_embeddings=False)),
    "genai_phi3": genai(phi3),
    "genai_gemma2": genai(gemma2),
    "genai_gemma3": genai(gemma3),
    "genai_gptoss": genai(gpt_oss, "use_qmoe=false"),
}
for dynamo in (False, True):
    suffix = "dynamo" if dynamo else "script"
    MODELS |= {
        f"llama_{suffix}": exported(decoder(lambda s: llama(s, hidden=32)), dynamo),
        f"gpt2_{suffix}": exported(decoder(gpt2), dynamo),
        f"opt_{suffix}": exported(decoder(opt), dynamo),
        f"phi2_{suffix}": exported(decoder(phi2), dynamo),
        f"olmo2_{suffix}": exported(decoder(olmo2), dynamo),
        f"bert_{suffix}": exported(plain(bert), dynamo),
        f"vit_{suffix}": exported(vit, dynamo),
        f"whisper_encoder_{suffix}": exported(whisper_encoder, dynamo),
        f"whisper_decoder_{suffix}": exported(whisper_decoder, dynamo),
        f"convnet_{suffix}": exported(convnet, dynamo),
        f"modernbert_{suffix}": exported(plain(modernbert), dynamo),
    }
MODELS |= {
    "dinov2_dynamo": exported(dinov2, dynamo=True),
    "t5_decoder_dynamo": exported(t5_decoder, dynamo=True),
    "deepseek_dynamo": exported(decoder(deepseek), dynamo=True),
    "swin_dynamo": exported(swin, dynamo=True),
    "lfm2_dynamo": exported(decoder(lfm2), dynamo=True),
    "falcon_dynamo": exported(decoder(falcon), dynamo=True),  # the other exporter does not take it
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--scale", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.names or MODELS:
        target = args.out / f"{name}.onnx"
        try:
            MODELS[name](target, args.scale)
            print(f"{name}: {target.stat().st_size / 1e3:.0f} kB", flush=True)
        except Exception as error:
            failed.append(name)
            text = error.stderr.decode()[-1500:] if isinstance(error, subprocess.CalledProcessError) else repr(error)
            print(f"{name}: FAILED {text[:3000]}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
