from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnx_quarot as oq
import small_llama
from llama_runs import batches, error
from onnx_quarot import _core
from onnx_quarot.discovery import discover_model
from onnx_quarot.info import model_facts
from onnx_quarot.load import load
from onnx_quarot.scheme import parse_scheme
from onnx_quarot.sites import linear_sites
from onnx_quarot.tied_tables import tied_roots

# 128 features, so that blocks of 128 are full.
LLAMA = small_llama.Config(layers=2, vocab=160, heads=4, head_size=32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", LLAMA)


@pytest.mark.parametrize("rotations", [("R1", "R2", "R4"), ()], ids=["rotated", "plain"])
@pytest.mark.parametrize(
    "scheme", ["a8w8", "a8w8-dynamic", "a8w4-dynamic", "a8w8-dynamic-tensor", "a8w8-block", "a8w4-block", "a4w4"]
)
def test_one_matrix_serves_both(llama: Path, tmp_path: Path, scheme: str, rotations: tuple[str, ...]) -> None:
    oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA), scheme=scheme, rotations=rotations)
    model = ir.load(tmp_path / "q.onnx")
    floats = [
        t
        for v in model.graph.initializers.values()
        if (t := v.const_value) is not None and t.dtype == ir.DataType.FLOAT
    ]
    assert all(t.size < LLAMA.vocab * LLAMA.hidden for t in floats)
    large = [v for v in model.graph.initializers.values() if v.const_value.size == LLAMA.vocab * LLAMA.hidden]
    assert len(large) == 1
    readers = {use.node.op_type for use in large[0].uses()}
    assert len(readers & {"Gather", "GatherND"}) == 1
    assert len(readers) == 2
    assert error(LLAMA, llama, tmp_path / "q.onnx") < (0.08 if "w8" in scheme else 0.6)
    # The table itself: what the graph's first layer reads is the table's rows, to 8 bits.
    assert len(large[0].uses()) == 2


@pytest.mark.parametrize("scheme", ["a8w8", "a8w8-dynamic-tensor"])
def test_the_matrix_is_int8_and_loads_where_products_must_be_exact(llama: Path, tmp_path: Path, scheme: str) -> None:
    """uint8 would take ONNX Runtime's slower kernel on CPUs with VNNI; its exact mode makes it of int8 as it loads."""
    oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA, 1), scheme=scheme)
    results = []
    for exact in (True, False):
        options = ort.SessionOptions()
        # Sums that saturate, without VNNI, are no result to compare with.
        options.add_session_config_entry("session.x64quantprecision", "1" if exact or not _core.has_vnni() else "0")
        model = oq.session(tmp_path / "q.onnx", session_options=options, exact=False)
        results.append(model.run(["logits"], batches(LLAMA, 1)[0])[0])
    constants = [v.const_value for v in ir.load(tmp_path / "q.onnx").graph.initializers.values()]
    assert {t.dtype for t in constants if t.size == LLAMA.vocab * LLAMA.hidden} == {ir.DataType.INT8}
    np.testing.assert_allclose(*results, atol=0.05 * np.abs(results[0]).max())


@pytest.mark.parametrize("block", [32, 128])  # zero points of an even and of an odd number of blocks
def test_tables_of_four_bits(llama: Path, tmp_path: Path, block: int) -> None:
    """With zero points, two codes a byte: the first rows the graph looks up are what MatMulNBits multiplies by."""
    scheme = replace(parse_scheme("a8w4-block"), head_bits=None, block=block, weights="rtn")
    oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA, 1), scheme=scheme, rotations=())
    model = ir.load(tmp_path / "q.onnx")
    head = next(node for node in model.graph if node.outputs[0].name == "logits")
    assert head.op_type == "MatMulNBits"
    codes, scales, zeros = (value.const_value.numpy() for value in head.inputs[1:4])
    assert {use.node.op_type for use in head.inputs[1].uses()} == {"MatMulNBits", "Gather"}

    def halves(packed: np.ndarray) -> np.ndarray:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1).astype(np.float32)

    blocks = LLAMA.hidden // block
    table = (halves(codes) - halves(zeros)[:, :blocks, None]) * scales.reshape(LLAMA.vocab, blocks, 1)
    embedded = next(
        node.outputs[0]
        for node in model.graph
        if node.op_type == "Reshape" and node.inputs[0].producer().op_type == "Mul"
    )
    model.graph.outputs.append(embedded)
    ir.save(model, tmp_path / "probe.onnx")
    feeds = batches(LLAMA, 1)[0]
    found = oq.session(tmp_path / "probe.onnx").run([embedded.name], feeds)[0]
    rows = table.reshape(LLAMA.vocab, LLAMA.hidden)[feeds["input_ids"]]
    np.testing.assert_allclose(found.reshape(rows.shape), rows, atol=1e-6)


def test_untied_on_request(llama: Path, tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        report = oq.quantize(llama, tmp_path / "q.onnx", batches(LLAMA, 1), tied=tied)
        sizes[tied] = report.bytes_out
        assert any("stays tied" in note for note in report.notes) == tied
    assert sizes[True] < sizes[False] - LLAMA.vocab * LLAMA.hidden * 0.9


def test_the_plan_rotates_both_ends_alike_and_is_exact(llama: Path, tmp_path: Path) -> None:
    plan = discover_model(load(llama), rotations=("R1", "R2", "R4"), tied=True)
    assert [(s.name, s.how) for s in plan.sites if s.how != "offline" and "down" not in s.name] == [
        ("/lm_head/MatMul", "online")
    ]
    assert "keep one matrix, rotated" in " ".join(plan.notes)
    report = oq.rotate(llama, tmp_path / "r.onnx", plan=plan)
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    before, after = (ir.load(path).graph.initializers for path in (llama, tmp_path / "r.onnx"))
    size = LLAMA.vocab * LLAMA.hidden
    (old,), (new,) = ([v for v in i.values() if v.const_value.size == size] for i in (before, after))
    assert np.abs(old.const_value.numpy() - new.const_value.numpy()).max() > 0.01


def test_a_table_whose_mean_is_taken_keeps_its_basis(tmp_path: Path) -> None:
    """LayerNorm: the stream loses its mean, which the table would and the head must not."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (int64[a, b] ids) => (float[a, b, 40] y) {
            x = Gather(table, ids)
            n = LayerNormalization(x, s0, b0)
            h = MatMul(n, up)
            r = Relu(h)
            d = MatMul(r, down)
            stream = Add(x, d)
            m = LayerNormalization(stream, s1, b1)
            turned = Transpose<perm=[1, 0]>(table)
            y = MatMul(m, turned)
        }"""
    )
    shapes = {"table": (40, 32), "up": (32, 64), "down": (64, 32), "s0": 32, "b0": 32, "s1": 32, "b1": 32}
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) + 0.5).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "m.onnx")
    plan = discover_model(load(tmp_path / "m.onnx"), tied=True)
    assert "keep one matrix, in its own basis" in " ".join(plan.notes)
    assert [s.how for s in plan.sites] == ["online", "online", "none"]
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx", plan=plan)
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    assert "table" in ir.load(tmp_path / "r.onnx").graph.initializers
    # Two matrices on request: all norms become RMS norms, of a model whose nodes have no names.
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.verification is not None
    assert report.verification.worst < 1e-4
    assert not [node for node in ir.load(tmp_path / "r.onnx").graph if node.op_type == "LayerNormalization"]


@pytest.mark.parametrize("depth", [10, 12])
def test_rows_are_found_in_packed_panels(tmp_path: Path, depth: int) -> None:
    """Sizes that fill neither panels nor steps; ids in any shape, counted from the end too."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((21, depth)).astype(np.float32)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (int64[a, b] ids, float[n, {depth}] x) => (float[a, b, {depth}] found, float[n, 21] y)
        {{ found = Gather(table, ids) turned = Transpose<perm=[1, 0]>(table) y = MatMul(x, turned) }}"""
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(rows, "table"))
    onnx.save(model, tmp_path / "m.onnx")
    ids = np.array([[0, 20, 16], [-1, -21, 7]])
    feeds = {"ids": ids, "x": rng.standard_normal((5, depth)).astype(np.float32)}
    oq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", [feeds], scheme="a8w8-dynamic", rotations=())
    assert [v.name for v in ir.load(tmp_path / "q.onnx").graph.initializers.values() if v.const_value.size >= rows.size]
    for library in (True, False):
        session = oq.session(tmp_path / "q.onnx", use_library=library)
        found, product = session.run(None, feeds)
        step = np.abs(rows).max(axis=1)[ids][:, :, None] / 127
        assert (np.abs(found - rows[ids]) <= 0.51 * step).all()
        np.testing.assert_allclose(product, feeds["x"] @ rows.T, atol=0.1)
        with pytest.raises(Exception, match=r"(?i)out of|bounds|range"):
            session.run(None, feeds | {"ids": ids + 21})


def test_a_table_in_the_other_orientation_is_not_shared(tmp_path: Path) -> None:
    """Rows of the constant are read by the table, and multiplied by as they are: not the same matrix."""
    model = ir.load(small_llama.save(tmp_path / "m.onnx", LLAMA))
    assert [root.name for root in tied_roots(model, linear_sites(model))] == ["lm_head.MatMul.weight"]
    transpose = next(n for n in model.graph if n.op_type == "Transpose")
    transpose.attributes["perm"] = ir.AttrInt64s("perm", [0, 1])
    assert tied_roots(model, linear_sites(model)) == set()
    untied = ir.load(small_llama.save(tmp_path / "u.onnx", small_llama.Config(tied=False)))
    assert tied_roots(untied, linear_sites(untied)) == set()


def test_a_table_reads_the_bytes_of_a_dequantized_head_under_a_name_of_its_own(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime makes MatMulNBits of a dequantized weight only if no other node reads its constant."""
    size = LLAMA.vocab * LLAMA.hidden
    oq.quantize(llama, tmp_path / "one.onnx", batches(LLAMA), scheme="a16w8")
    monkeypatch.setattr("onnx_quarot.tied_tables._APART_BYTES", size)
    oq.quantize(llama, tmp_path / "two.onnx", batches(LLAMA), scheme="a16w8")
    oq.quantize(llama, tmp_path / "a8.onnx", batches(LLAMA), scheme="a8w8")

    stored = onnx.load(tmp_path / "two.onnx", load_external_data=False).graph.initializer
    head, table = (t for t in stored if np.prod(t.dims) == size)
    assert head.name != table.name
    assert head.external_data == table.external_data
    one, two = (tmp_path / name for name in ("one.onnx", "two.onnx"))
    assert (tmp_path / "two.onnx.data").stat().st_size < one.stat().st_size  # once, if aligned
    assert model_facts(one)["parameters"] == model_facts(two)["parameters"]
    assert not (tmp_path / "a8.onnx.data").exists()

    constants = [v for v in ir.load(two).graph.initializers.values() if v.const_value.size == size]
    assert [{use.node.op_type for use in v.uses()} for v in constants] == [{"DequantizeLinear"}, {"Gather"}]
    left = []
    for path in (one, two):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        model = oq.session(path, session_options=options, exact=False)
        optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
        left.append([node.op_type for node in optimized.node if node.output[0] == "logits"])
        fuses = any(node.op_type == "MatMulNBits" for node in optimized.node)  # earlier ones do so with blocks alone
        np.testing.assert_allclose(
            model.run(["logits"], batches(LLAMA, 1)[0])[0],
            oq.session(llama).run(["logits"], batches(LLAMA, 1)[0])[0],
            atol=0.5,
        )
    assert left == [["MatMul"], ["MatMulNBits" if fuses else "MatMul"]]
