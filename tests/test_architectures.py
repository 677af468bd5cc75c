"""Real exports of many architectures (made by tests/export_models.py): exact, rotated everywhere, at the least cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import onnx_quarot as oq
from exports import DATA, runnable
from onnx_quarot.discovery import discover_model
from onnx_quarot.errors import VerificationError
from onnx_quarot.load import load
from onnx_quarot.plan import Plan, Rebase

ROTATIONS = ("R1", "R2", "R4")
LAYERS = 2

# Architecture -> (online transforms in all, linear layers that cannot be rotated). A pre-norm decoder pays one a layer
# (in front of the down projection); post-norms pay two more, one at each norm's output; BERT's LayerNorms stand in the
# stream, so attention, the first and the second matrix of the MLP each pay.
EXPECTED = {
    "genai_llama": (LAYERS, 0),
    "genai_llama_tied": (LAYERS, 0),
    "genai_llama_fp16": (LAYERS, 0),
    "genai_qwen2": (LAYERS, 0),
    "genai_qwen3": (LAYERS, 0),
    "genai_mistral": (LAYERS, 0),
    "genai_phi3": (LAYERS, 0),
    "genai_gemma2": (3 * LAYERS, 0),
    "genai_gemma3": (3 * LAYERS, 0),
    "genai_gptoss": (0, 0),  # the down projections are inside the operator that holds the experts
    "llama": (LAYERS, 0),
    "gpt2": (LAYERS, 0),
    "opt": (LAYERS, 0),
    "phi2": (LAYERS, 0),
    "olmo2": (3 * LAYERS, 0),
    "bert": (3 * LAYERS, 0),
    "vit": (LAYERS, 1),  # pixels have three channels
    "dinov2": (LAYERS + 1, 1),  # the stream is also the last LayerNorm's, whose output leaves the graph
    "falcon": (LAYERS, 0),
    "modernbert": (LAYERS + 3, 0),  # into the stream (its norm is also read by a layer), and out of it
    "t5_decoder": (LAYERS + 1, 0),  # the encoder's states
    "deepseek": (LAYERS, 0),
    # Patches are merged by a LayerNorm of four rows together: a stage in front of that is rotated at its norms (3), the
    # stage behind it for nothing, shifted windows or not. Then three MLPs, the end of the stream, and the head.
    "swin": (3 + (1 + LAYERS) + 2, 1),
    "lfm2": (LAYERS + 1, 0),  # behind the gated convolution
    "whisper_encoder": (LAYERS + 2, 2),  # into and out of the stream; the convolutions read audio and activations
    "whisper_decoder": (LAYERS + 1, 0),  # the encoder's states, shared by all cross-attentions
    "convnet": (2, 2),
}
FILES = sorted(path.stem for path in DATA.glob("*.onnx"))


def architecture(name: str) -> str:
    return name.removesuffix("_script").removesuffix("_dynamo")


def plan_of(name: str, **options: object) -> Plan:
    return discover_model(load(DATA / f"{name}.onnx"), **{"rotations": ROTATIONS, **options})  # type: ignore[arg-type]


def test_every_architecture_has_a_file() -> None:
    assert {architecture(f) for f in FILES} == set(EXPECTED)


@pytest.mark.parametrize("name", FILES)
def test_exact_and_rotated_everywhere_at_the_least_cost(name: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    online, declined = EXPECTED[architecture(name)]
    assert len(plan.online) == online
    assert len(plan.declined) == declined
    for site in plan.declined:
        assert site.reason
    report = oq.rotate(runnable(name), tmp_path / "rotated.onnx", plan=plan)
    assert report.verification is not None
    assert report.verification.worst < (2e-2 if "fp16" in name else 1e-4)


@pytest.mark.parametrize(
    "name", ["gpt2_script", "vit_dynamo", "genai_llama_tied", "olmo2_script", "whisper_decoder_dynamo"]
)
def test_signs_and_blocks_are_exact_too(name: str, tmp_path: Path) -> None:
    report = oq.rotate(DATA / f"{name}.onnx", tmp_path / "a.onnx", rotations=ROTATIONS, seed=3, block_size=4)
    assert report.verification is not None
    assert report.verification.worst < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# What must not be forgotten. Each mistake, made on purpose, has to show.


def without_scales(plan: Plan) -> Plan:
    return replace(plan, rebases=tuple(replace(r, scales=()) for r in plan.rebases))


def without_folded_biases(plan: Plan) -> Plan:
    return replace(plan, rebases=tuple(replace(r, adds=()) for r in plan.rebases), biases=())


def without_centring(plan: Plan) -> Plan:
    def flat(job: Rebase) -> Rebase:
        return replace(job, changes=tuple(replace(c, centre=False) for c in job.changes))

    return replace(plan, rebases=tuple(flat(r) for r in plan.rebases))


def without_rotated_biases(plan: Plan, name: str) -> Plan:
    nodes = list(load(DATA / f"{name}.onnx").graph)
    kept = tuple(
        r for r in plan.rebases if not (nodes[r.node].op_type in ("Add", "Gemm") and r.input != 1 and not r.adds)
        and not (nodes[r.node].op_type == "Add" and not r.adds)
    )  # fmt: skip
    assert len(kept) < len(plan.rebases)
    return replace(plan, rebases=kept)


def transposed(plan: Plan) -> Plan:
    return replace(plan, online=tuple(replace(o, inverse=not o.inverse) for o in plan.online))


MISTAKES = [
    *[(name, without_scales) for name in ("genai_llama", "llama_script", "gpt2_dynamo", "opt_script", "vit_dynamo")],
    *[(name, without_folded_biases) for name in ("gpt2_script", "opt_dynamo", "phi2_script", "vit_script")],
    *[(name, without_centring) for name in ("gpt2_script", "opt_dynamo", "vit_script", "whisper_encoder_dynamo")],
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_mistakes_show(name: str, mistake: object, tmp_path: Path) -> None:
    plan = mistake(plan_of(name))  # type: ignore[operator]
    with pytest.raises(VerificationError, match="differs by") as error:
        oq.rotate(DATA / f"{name}.onnx", tmp_path / "a.onnx", plan=plan)
    assert size_of(error.value) >= 5e-3


@pytest.mark.parametrize("name", ["gpt2_script", "opt_dynamo", "whisper_decoder_script"])
def test_a_bias_that_is_not_rotated_shows(name: str, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="differs by") as error:
        oq.rotate(DATA / f"{name}.onnx", tmp_path / "a.onnx", plan=without_rotated_biases(plan_of(name), name))
    assert size_of(error.value) >= 5e-3


def test_the_inverse_is_not_the_rotation(tmp_path: Path) -> None:
    """Where the Hadamard matrix is not symmetric (48 = 12 x 4)."""
    with pytest.raises(VerificationError, match="differs by") as error:
        oq.rotate(DATA / "llama_script.onnx", tmp_path / "a.onnx", plan=transposed(plan_of("llama_script", seed=1)))
    assert size_of(error.value) >= 5e-3


def size_of(error: VerificationError) -> float:
    return float(str(error).split("differs by ")[1].split()[0])
