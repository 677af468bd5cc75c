"""Executing plans: exact, in the weights' types, and every step needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import small_llama
from onnx_quarot.discovery import discover_model
from onnx_quarot.errors import ConfigError, VerificationError
from onnx_quarot.load import load
from onnx_quarot.plan import AxisChange, Placement, Plan
from onnx_quarot.rewrite import change_basis, rotate_model
from onnx_quarot.save import write
from onnx_quarot.transform import Rotation
from onnx_quarot.verify import Verification, verify
from small_llama import Config

ALL = ("R1", "R2", "R4")


def rotated(
    tmp_path: Path, config: Config, change: Callable[[Plan], Plan] = lambda p: p, **options: object
) -> Verification:
    source, target = small_llama.save(tmp_path / "a.onnx", config), tmp_path / "b.onnx"
    model = load(source)
    plan = change(discover_model(model, **{"rotations": ALL, **options}))  # type: ignore[arg-type]
    rotate_model(model, plan)
    write(model, target, "b.data")
    return verify(source, target, plan)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("rotations", [("R1",), ("R2",), ("R4",), ALL])
@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(tied=False, separate_qkv=True),
        Config(uniform_final_norm=True),
        Config(symbolic_cache=True),
        Config(heads=3, kv_heads=1, head_size=48, ffn=88),  # orders 36, 12 and 44: R is not symmetric
        Config(heads=5, kv_heads=5, head_size=16, ffn=236),  # order 20; 236 only in blocks
    ],
)
def test_the_rotated_model_is_the_same_function(
    tmp_path: Path, config: Config, rotations: tuple[str, ...], seed: int | None
) -> None:
    proof = rotated(tmp_path, config, rotations=rotations, seed=seed)
    assert proof.outputs == 1 + 2 * config.layers
    assert proof.worst < 2e-5


def without_scales(plan: Plan) -> Plan:
    return replace(plan, rebases=tuple(replace(r, scales=()) for r in plan.rebases))


def without_ones(plan: Plan) -> Plan:
    return replace(plan, ones=())


def without_one_reader(plan: Plan) -> Plan:
    return replace(plan, rebases=plan.rebases[:-1])


def without_online(plan: Plan) -> Plan:
    return replace(plan, online=())


def inverse_online(plan: Plan) -> Plan:
    return replace(plan, online=tuple(replace(o, inverse=True) for o in plan.online))


def r1_without_signs_in_writers(plan: Plan) -> Plan:
    """Another rotation than the readers' in what writes the stream (axis 1 of the weights)."""
    r1 = plan.rotations["R1.0"]

    def rename(p: Placement) -> Placement:
        return replace(p, rotation="R1.x") if p.rotation == "R1.0" else p

    def change(c: AxisChange) -> AxisChange:
        return replace(c, placements=tuple(map(rename, c.placements))) if c.axis == 1 else c

    rebases = tuple(replace(r, changes=tuple(map(change, r.changes))) for r in plan.rebases)
    unsigned = Rotation(r1.size, r1.block_size, None)
    return replace(plan, rebases=rebases, rotations={**plan.rotations, "R1.x": unsigned})


@pytest.mark.parametrize(
    "mistake",
    [
        without_scales,
        without_ones,
        without_one_reader,
        without_online,
        inverse_online,
        r1_without_signs_in_writers,
    ],
)
def test_every_mistake_shows(tmp_path: Path, mistake: Callable[[Plan], Plan]) -> None:
    config = Config(heads=3, kv_heads=1, head_size=48, ffn=88)
    with pytest.raises(VerificationError, match="first difference at"):
        rotated(tmp_path, config, mistake, seed=2)


def test_the_error_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    def break_layer_1(plan: Plan) -> Plan:
        broken = [r for r in plan.rebases if r.node == plan.sites[5].node]
        assert len(broken) == 1
        return replace(plan, rebases=tuple(r for r in plan.rebases if r not in broken))

    with pytest.raises(VerificationError, match=r"first difference at '/model/layers.1/attn/qkv_proj/MatMul/output_0'"):
        rotated(tmp_path, Config(), break_layer_1)


def test_a_tied_table_stays_tied_when_the_final_scale_is_uniform(tmp_path: Path) -> None:
    for uniform, clones in ((True, 0), (False, 1)):
        config = Config(uniform_final_norm=uniform)
        source = small_llama.save(tmp_path / "a.onnx", config)
        model, before = load(source), load(source)
        rotate_model(model, discover_model(model, rotations=ALL))
        big = [n for n, v in model.graph.initializers.items() if v.shape is not None and config.vocab in list(v.shape)]
        assert len(big) == 1 + clones
        assert any(n.op_type == "Transpose" for n in model.graph) == uniform
        assert "lm_head.MatMul.weight" in before.graph.initializers


def test_a_clone_gets_a_name_that_no_value_has(tmp_path: Path) -> None:
    path = small_llama.save(tmp_path / "a.onnx", Config(tied=True))
    model = load(path)
    rotate_model(model, discover_model(model, rotations=ALL))
    added = model.graph.initializers.keys() - load(path).graph.initializers.keys()
    (clone,) = (name for name in added if name.endswith(".1"))  # the tied table became two
    taken = load(path)
    next(iter(taken.graph)).outputs[0].name = clone
    ir.save(taken, path)
    model = load(path)
    plan = discover_model(model, rotations=ALL)
    rotate_model(model, plan)
    assert f"{clone}_2" in model.graph.initializers
    write(model, tmp_path / "b.onnx", "b.data")
    verify(path, tmp_path / "b.onnx", plan)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = discover_model(load(small_llama.save(tmp_path / "a.onnx")), rotations=ALL)
    other = load(small_llama.save(tmp_path / "b.onnx", Config(layers=1)))
    with pytest.raises(ConfigError, match="another model"):
        rotate_model(other, plan)


def test_float16_weights_are_rotated_in_float64_and_rounded_once(tmp_path: Path) -> None:
    proto = small_llama.build()
    model = ir.from_proto(proto)
    path = tmp_path / "a.onnx"
    onnx.save(proto, path)
    plan = discover_model(load(path), rotations=ALL)
    name = "model.layers.0.mlp.gate_proj.MatMul.weight"
    half = model.graph.initializers[name].const_value.numpy().astype(np.float16)  # type: ignore[union-attr]
    (job,) = [
        r for r in plan.rebases if r.node == next(s.node for s in plan.sites if s.inputs == 64 and s.outputs == 96)
    ]
    scale = next(iter(job.scales))[1]
    factor = list(load(path).graph)[scale[0]].inputs[scale[1]].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    matrix = plan.rotations["R1.0"].matrix()
    expected = (matrix.T @ (factor[:, None] * half.astype(np.float64))).astype(np.float16)
    halved = load(path)
    tensor = ir.tensor(half, name=name)
    halved.graph.initializers[name].const_value = tensor
    halved.graph.initializers[name].dtype = ir.DataType.FLOAT16
    from onnx_quarot.discovery import fingerprint

    rotate_model(halved, replace(plan, fingerprint=fingerprint(halved)))
    result = halved.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
    assert result.dtype == np.float16
    assert (result == expected).mean() > 0.999  # sums in another order may round the other way once in a while
    np.testing.assert_allclose(result.astype(np.float64), expected.astype(np.float64), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_change_basis_is_a_matrix_product(axis: int) -> None:
    rng = np.random.default_rng(0)
    rotation = Rotation.make(12, rng=rng)
    x = rng.standard_normal((36, 36, 36))
    y = change_basis(x, axis, [Placement(12, 24, "r")], {"r": rotation})
    full = np.eye(36)
    full[12:24, 12:24] = full[24:, 24:] = rotation.matrix()
    np.testing.assert_allclose(y, np.moveaxis(np.moveaxis(x, axis, -1) @ full, -1, axis), atol=1e-12)
    back = change_basis(y, axis, [Placement(12, 24, "r")], {"r": rotation}, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-12)


def test_large_weights_go_through_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnx_quarot.rewrite._SLICE_ELEMENTS", 100)
    assert rotated(tmp_path, Config(), seed=1).worst < 2e-5


def test_constants_are_let_go_of(tmp_path: Path) -> None:
    """Each maps the whole file: hundreds of norms and biases would take the address space of as many models."""
    model = load(small_llama.save(tmp_path / "m.onnx", small_llama.Config(layers=4), external=True))
    tensors = [t for v in model.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor)]
    rotate_model(model, discover_model(model, rotations=("R1", "R2", "R4")))
    assert len(tensors) > 20
    assert [t.name for t in tensors if t.raw is not None] == []
