from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
from llama_runs import batches, error
from onnx_quarot.errors import ConfigError, DataError
from onnx_quarot.forms import head_schemes
from onnx_quarot.hessians import MEMORY, Gram, solve_weights
from onnx_quarot.progress import NullProgress
from onnx_quarot.replay import Replay
from onnx_quarot.scheme import SCHEMES, parse_scheme
from onnx_quarot.sites import linear_sites

LLAMA = small_llama.Config(layers=2, vocab=160)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", LLAMA)


@pytest.mark.parametrize(
    ("scheme", "most"),
    [("a16w8", 0.08), ("a8w8", 0.1), ("a8w8-dynamic", 0.06), ("a8w4-dynamic", 0.6),
     ("a8w8-dynamic-tensor", 0.1), ("a8w8-block", 0.07), ("a8w4-block", 0.5),
     ("a8w4-matmulnbits", 0.5), ("a8w4", 0.8),
     ("a4w4", 0.8)],
)  # fmt: skip
def test_every_scheme_end_to_end(llama: Path, tmp_path: Path, scheme: str, most: float) -> None:
    report = oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA), scheme=scheme)
    assert report.scheme == scheme
    assert len(report.quantized) == 11
    assert error(LLAMA, llama, tmp_path / "q.onnx") < most
    assert report.bytes_out < 0.72 * report.bytes_in
    head = report.quantized[-1]
    assert head.weight_bits == 8
    narrow = SCHEMES[scheme].weight.bits
    assert {q.weight_bits for q in report.quantized[:-1]} == {narrow}


def test_gptq_is_better_than_rounding(llama: Path, tmp_path: Path) -> None:
    for weights in ("rtn", "gptq"):
        oq.quantize(
            llama, tmp_path / f"{weights}.onnx", batches(LLAMA, 16), scheme="a8w4-block", weights=weights, block=32
        )
    assert error(LLAMA, llama, tmp_path / "gptq.onnx") < 0.9 * error(LLAMA, llama, tmp_path / "rtn.onnx")


def test_hessians_in_groups_give_the_same_weights(llama: Path, tmp_path: Path) -> None:
    model = ir.load(llama)
    sites = linear_sites(model)
    schemes = {site.node_name: parse_scheme("a8w4-block") for site in sites}
    results = []
    for name, memory in (("whole", MEMORY), ("single", 1)):
        folder = tmp_path / name
        folder.mkdir()
        data = Replay(batches(LLAMA), folder)
        results.append(solve_weights(llama, sites, schemes, data, folder, NullProgress(), memory=memory, threads=1)[0])
    assert set(results[0]) == set(results[1]) == {site.node_name for site in sites}
    for a, b in zip(results[0].values(), results[1].values(), strict=True):
        np.testing.assert_array_equal(a.read(), b.read())
        np.testing.assert_allclose(a.scale, b.scale)


def test_gram_is_the_sum_over_rows() -> None:
    parts = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).astype(np.float32)
    gram = Gram(8)
    for part in parts:
        gram.update(part)
    rows = parts.reshape(-1, 8)
    np.testing.assert_allclose(gram.sum, rows.T @ rows, rtol=1e-5)
    assert gram.rows == 30


def test_the_head_keeps_its_bits(llama: Path) -> None:
    sites = linear_sites(ir.load(llama))
    assert list(head_schemes(sites, parse_scheme("a8w4-block"))) == ["/lm_head/MatMul"]
    assert head_schemes(sites, parse_scheme("a8w8")) == {}


def test_too_little_data_for_gptq(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 rows reach .*64 input features; gptq needs at least 7"):
        oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA, 1, 2), scheme="a8w4-block", rotations=())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "a8w4-block", "mixed": True}, "a8w4-block has no static activations"),
        ({"scheme": "a8w8-dynamic", "method": "mse"}, "finds activation ranges while the model runs"),
        ({"scheme": "a8w8", "block": 32}, "block: a8w8 has one scale a channel"),
        ({"scheme": "a8w3-block"}, "a8w3-block.*a8w4-block"),
    ],
)
def test_options_that_contradict_each_other(llama: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA, 1), **options)


@pytest.mark.parametrize("rotations", [None, ()], ids=["rotated", "not rotated"])
@pytest.mark.parametrize("scheme", ["a8w8", "a8w4-block"])
def test_attention_is_compiled_where_the_library_is_used_anyway(
    llama: Path, tmp_path: Path, scheme: str, rotations: tuple[str, ...] | None
) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA), scheme=scheme, rotations=rotations)
    domains = [node.domain for node in ir.load(tmp_path / "q.onnx").graph if node.op_type == "GroupQueryAttention"]
    assert domains == ["com.microsoft" if rotations == () else "onnx_quarot"] * LLAMA.layers
    feeds = batches(LLAMA)[0]
    with_library, without = (
        oq.session(tmp_path / "q.onnx", use_library=use).run(["logits"], feeds)[0] for use in (True, False)
    )
    assert np.linalg.norm(with_library - without) < 0.05 * np.linalg.norm(without)


@pytest.mark.parametrize(
    ("scheme", "options", "compiled"),
    [
        ("a8w4-block", {}, True),
        ("a8w4-block", {"block": 16}, False),  # which the operator does not know
        ("a8w4-block", {"rotations": ()}, False),  # nothing else of the model needs the library
        ("a8w4-block", {"rotations": (), "layers": {"*lm_head*": "a8w8-dynamic"}}, True),
        ("a8w4-matmulnbits", {}, False),
        ("a8w8-block", {}, False),
    ],
)
def test_blocks_are_compiled_where_the_library_is_used_anyway(
    llama: Path, tmp_path: Path, scheme: str, options: dict, compiled: bool
) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA), scheme=scheme, **options)
    model = ir.load(tmp_path / "q.onnx")
    names = [node.op_type for node in model.graph]
    assert ("QLinear" in names, "MatMulNBits" in names) == (compiled, not compiled)
    assert not compiled or {"MatMul", "DynamicQuantizeMatMul"}.isdisjoint(names)
    feeds = batches(LLAMA)[0]
    # Without the library the operators are those of ONNX Runtime, which quantize activations in other groups.
    overloads = [node.overload for node in model.graph if node.op_type == "QLinear" and "lm_head" not in node.name]
    assert all(overload.endswith("_matmulnbits") for overload in overloads)
    with_library, without = (
        oq.session(tmp_path / "q.onnx", use_library=use).run(["logits"], feeds)[0] for use in (True, False)
    )
    assert np.linalg.norm(with_library - without) < 0.05 * np.linalg.norm(without)
