"""Saving is atomic: the new model whole, or the old one untouched, and nothing beside them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot import save as saving
from onnx_quarot.errors import ModelError, SaveError
from onnx_quarot.load import load
from onnx_quarot.save import check_output, stage, workspace


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """External data for models of any size."""
    monkeypatch.setattr(saving, "_SINGLE_FILE_BYTES", 0)


def store(source: Path, target: Path) -> None:
    with workspace(target) as folder:
        stage(load(source), target, folder).publish(source)


def weights(path: Path) -> dict[str, np.ndarray]:
    return {n: v.const_value.numpy().copy() for n, v in load(path).graph.initializers.items()}  # type: ignore[union-attr]


def test_small_models_are_one_file(tmp_path: Path) -> None:
    store(small_llama.save(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "b.onnx"]
    a, b = weights(tmp_path / "a.onnx"), weights(tmp_path / "b.onnx")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.usefixtures("large")
def test_large_models_have_one_data_file_also_after_saving_again(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx")
    names = []
    for _ in range(3):
        store(source, tmp_path / "b.onnx")
        (data,) = (n for n in os.listdir(tmp_path) if n.endswith(".data"))
        names.append(data)
        assert sorted(os.listdir(tmp_path)) == sorted(["a.onnx", "b.onnx", data])
        assert weights(tmp_path / "b.onnx").keys() == weights(source).keys()
    # The old model needs its data until the new one has taken its name.
    assert names == ["b.onnx.data", "b.onnx.1.data", "b.onnx.data"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = small_llama.save(tmp_path / "a.onnx")
    store(source, tmp_path / "b.onnx")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(SaveError, match="nothing was changed"):
        store(source, tmp_path / "b.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupt_cleans_up(tmp_path: Path) -> None:
    def interrupted() -> None:
        with workspace(tmp_path / "b.onnx") as folder:
            (folder / "half").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_impossible_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx")
    (tmp_path / "link.onnx").symlink_to(source)
    (tmp_path / "folder").mkdir()
    for target, rule in (
        (source, "is the input model"),
        (tmp_path / "link.onnx", "is the input model"),
        (tmp_path / "folder" / ".." / "a.onnx", "is the input model"),
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "nowhere" / "b.onnx", "does not exist"),
    ):
        with pytest.raises(SaveError, match=rule):
            check_output(source, target)
    data = tmp_path / "data.npz"
    data.touch()
    with pytest.raises(SaveError, match="is to be read as well"):
        check_output(source, tmp_path / "folder" / ".." / "data.npz", None, "a text", str(data))
    assert check_output(source, tmp_path / "b.onnx", data, "x" * 9999) == tmp_path / "b.onnx"


@pytest.mark.usefixtures("large")
def test_a_renamed_or_copied_source_keeps_its_weights(tmp_path: Path) -> None:
    store(small_llama.save(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    (tmp_path / "b.onnx").rename(tmp_path / "renamed.onnx")  # its data is b.onnx.data
    expected = weights(tmp_path / "renamed.onnx")
    for _ in range(2):
        store(tmp_path / "renamed.onnx", tmp_path / "b.onnx")
    assert len(list(tmp_path.glob("b.onnx*.data"))) == 2
    shutil.copy(tmp_path / "b.onnx", tmp_path / "copied.onnx")
    store(tmp_path / "copied.onnx", tmp_path / "b.onnx")
    for name in ("renamed.onnx", "copied.onnx", "b.onnx"):
        assert all(np.array_equal(array, expected[n]) for n, array in weights(tmp_path / name).items())


def test_weights_of_the_source_are_no_target(tmp_path: Path) -> None:
    config = small_llama.Config()
    source = small_llama.save(tmp_path / "a.onnx", config, external=True)
    before = (tmp_path / "a.onnx.data").read_bytes()
    data = [small_llama.decoder_feeds(config, np.random.default_rng(0))]
    with pytest.raises(SaveError, match="holds weights of the input model"):
        oq.rotate(source, tmp_path / "a.onnx.data")
    with pytest.raises(SaveError, match="holds weights of the input model"):
        oq.quantize(source, tmp_path / "a.onnx.data", data)
    assert (tmp_path / "a.onnx.data").read_bytes() == before


@pytest.mark.parametrize("inline", [True, False], ids=["one file", "external data"])
def test_the_error_of_a_lazy_tensor_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: bool
) -> None:
    if not inline:
        monkeypatch.setattr(saving, "_SINGLE_FILE_BYTES", 0)

    def fails() -> ir.Tensor:
        raise ModelError("weight 'w' holds a value that is not finite")

    model = load(small_llama.save(tmp_path / "a.onnx"))
    value = next(
        v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes > 2000
    )
    value.const_value = ir.LazyTensor(fails, dtype=value.dtype, shape=value.shape, name=value.name)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"^weight 'w' holds"), workspace(tmp_path / "b.onnx") as folder:
        stage(model, tmp_path / "b.onnx", folder)
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_large_tensors_begin_on_a_page(large: None, tmp_path: Path) -> None:
    """So that they can be read where the file is mapped, vectors at a time."""
    rng = np.random.default_rng(0)
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)
    arrays = {
        f"t{i}": rng.standard_normal(size).astype(np.float32) for i, size in enumerate((300, 150000, 1000, 170000))
    }
    for name, array in arrays.items():
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    saving.write(model, tmp_path / "m.onnx", "m.onnx.data")
    found = ir.load(tmp_path / "m.onnx").graph.initializers
    for name, array in arrays.items():
        tensor = found[name].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert array.nbytes < 2**19 or tensor.offset % 4096 == 0
        np.testing.assert_array_equal(tensor.numpy(), array)
