"""AMD Quark's rotation_config.json, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.load import load
from onnx_quarot.rotation_config import write_rotation_config
from small_llama import Config


def pairs(layers: int = 2) -> list[dict[str, Any]]:
    """What a person writes by hand for the builder's names."""
    result, before = [], "/model/embed_tokens/Gather"
    for i in range(layers):
        p = f"/model/layers.{i}"
        norm = f"{p}/input_layernorm/" + ("LayerNorm" if i == 0 else "SkipLayerNorm")
        result.append({"prev_nodes": [before], "norm_node": norm, "next_nodes": [f"{p}/attn/qkv_proj/MatMul"]})
        mlp = [f"{p}/mlp/{n}_proj/MatMul" for n in ("gate", "up")]
        post = f"{p}/post_attention_layernorm/SkipLayerNorm"
        result.append({"prev_nodes": [f"{p}/attn/o_proj/MatMul"], "norm_node": post, "next_nodes": mlp})
        before = f"{p}/mlp/down_proj/MatMul"
    final = f"/model/layers.{layers}/final_norm_layernorm/SkipLayerNorm"
    result.append({"prev_nodes": [before], "norm_node": final, "next_nodes": ["/lm_head/MatMul"]})
    return result


def config_file(folder: Path, content: Any) -> Path:
    path = folder / "rotation_config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("config", [Config(), Config(tied=False), Config(heads=3, kv_heads=1, head_size=48, ffn=88)])
@pytest.mark.parametrize("rotations", [("R1",), ("R1", "R2", "R4")])
def test_a_config_written_by_hand_is_honoured_exactly(
    tmp_path: Path, config: Config, rotations: tuple[str, ...]
) -> None:
    source = small_llama.save(tmp_path / "m.onnx", config)
    path = config_file(tmp_path, {"R1_pairs": pairs()})
    report = oq.rotate(source, tmp_path / "r.onnx", config=path, rotations=rotations, seed=1)
    assert report.verification is not None
    assert report.verification.worst < 2e-5
    assert report.plan is not None
    assert report.plan.summary() == oq.discover(source, rotations=rotations).summary()


def test_a_config_of_one_pair_less_is_not_exact_and_says_where(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx")
    path = config_file(tmp_path, {"R1_pairs": pairs()[:-1]})
    with pytest.raises(oq.VerificationError, match="first difference"):
        oq.rotate(source, tmp_path / "r.onnx", config=path)
    assert not (tmp_path / "r.onnx").exists()


def test_discovery_writes_the_config_a_person_would(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "m.onnx")
    written = write_rotation_config(load(source), oq.discover(source))
    assert written == {"R1_pairs": pairs()}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not JSON"),
        ([], "R1_pairs"),
        ({"R1_pairs": {}}, "R1_pairs"),
        ({"R1_pairs": [], "R2_pairs": []}, "R1_pairs"),
        ({"R1_pairs": [3]}, r"R1_pairs\[0\]"),
        ({"R1_pairs": [{"previous": []}]}, "previous"),
        ({"R1_pairs": [{"prev_nodes": "a"}]}, "prev_nodes"),
        ({"R1_pairs": [{"norm_node": 3}]}, "norm_node"),
        ({"R1_pairs": [{"prev_nodes": ["nobody"]}]}, "nobody"),
        ({"R1_pairs": [{"norm_node": "/lm_head/MatMul"}]}, "RMS norm"),
        ({"R1_pairs": [{"next_nodes": ["/model/layers.0/mlp/Mul"]}]}, "constant matrix"),
    ],
)
def test_bad_configs(tmp_path: Path, content: Any, named: str) -> None:
    source = small_llama.save(tmp_path / "m.onnx")
    with pytest.raises(oq.ConfigError, match=named):
        oq.rotate(source, tmp_path / "r.onnx", config=config_file(tmp_path, content))
