"""Reading models: what is broken is found before any work is done, and said in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot import segments
from onnx_quarot.errors import ModelError
from onnx_quarot.load import external_files, load, total_bytes, unmap


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_external_data_is_not_read_until_needed(tmp_path: Path) -> None:
    path = small_llama.save(tmp_path / "m.onnx", external=True)
    model = load(path)
    assert external_files(model) == {tmp_path / "m.onnx.data"}
    assert total_bytes(model) > 10_000


def test_constant_nodes_become_initializers(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "value")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", 4]) for n in "xy")
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), tmp_path / "m.onnx")
    assert list(load(tmp_path / "m.onnx").graph.initializers) == ["w"]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist") as error:
        load(tmp_path / "nothing.onnx")
    assert "nothing.onnx" in one_line(error)
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text\n" * 9, b"\x08\x0a\x12", bytes(range(256)) * 20])
def test_a_file_that_is_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"not (a readable|an) ONNX|is empty") as error:
        load(tmp_path / "m.onnx")
    one_line(error)


def test_a_truncated_model_file(tmp_path: Path) -> None:
    path = small_llama.save(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError) as error:
        load(path)
    one_line(error)


def test_missing_and_truncated_external_data(tmp_path: Path) -> None:
    path = small_llama.save(tmp_path / "m.onnx", external=True)
    data = tmp_path / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"'m\.onnx\.data' is truncated") as error:
        load(path)
    assert "the file has 1000" in one_line(error)
    data.unlink()
    with pytest.raises(ModelError, match=r"'m\.onnx\.data' .* cannot be read"):
        load(path)


def hub_cache(folder: Path) -> Path:
    """A model as a Hugging Face cache holds it: links into a store of blobs."""
    repository = folder / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc" / "onnx"
    blobs = repository / "blobs"
    for made in (snapshot, blobs):
        made.mkdir(parents=True)
    small_llama.save(folder / "model.onnx", external=True)
    for name, blob in (("model.onnx", "aa11"), ("model.onnx.data", "bb22")):
        (folder / name).rename(blobs / blob)
        (snapshot / name).symlink_to(Path("../../../blobs") / blob)
    return snapshot / "model.onnx"


def test_a_linked_cache_is_read_and_rotated(tmp_path: Path) -> None:
    path = hub_cache(tmp_path)
    assert [p.name for p in external_files(load(path))] == ["bb22"]
    report = oq.rotate(path, tmp_path / "rotated.onnx")
    assert report.verification is not None
    assert report.verification.worst < 1e-5
    feeds = small_llama.decoder_feeds(small_llama.Config(), np.random.default_rng(0))
    (a,), (b,) = (
        segments.run_in_segments(p, feeds, ["logits"], segment_bytes=1) for p in (path, tmp_path / "rotated.onnx")
    )
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_hard_links_and_several_files(tmp_path: Path) -> None:
    model = small_llama.build()
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=256)
    files = external_files(load(tmp_path / "m.onnx"))
    assert len(files) > 10
    for number, file in enumerate(sorted(files)):
        (tmp_path / f"link{number}").hardlink_to(file)
    report = oq.rotate(tmp_path / "m.onnx", tmp_path / "r.onnx")
    assert report.verification is not None


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "/secret"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(1 << 20))
    (tmp_path / "model" / "sub").mkdir(parents=True)
    if location.startswith("/"):
        location = str(tmp_path / "secret")
    path = small_llama.save(tmp_path / "model" / "m.onnx", external=True)
    rename_data(path, location)
    with pytest.raises(ModelError, match="lies outside the model's folder") as error:
        load(path)
    one_line(error)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = small_llama.save(tmp_path / "model" / "m.onnx", external=True)
    (tmp_path / "model" / "m.onnx.data").rename(tmp_path / "secret")
    (tmp_path / "model" / "m.onnx.data").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="link to a file outside"):
        load(path)
    # A loop of links has no end at all.
    (tmp_path / "model" / "m.onnx.data").unlink()
    (tmp_path / "model" / "m.onnx.data").symlink_to("m.onnx.data")
    with pytest.raises(ModelError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize(("key", "value"), [("offset", "-8"), ("offset", "99999999"), ("length", "12")])
def test_places_that_do_not_fit_are_refused(tmp_path: Path, key: str, value: str) -> None:
    path = small_llama.save(tmp_path / "m.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    for entry in next(t for t in model.graph.initializer if t.external_data).external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"is truncated|shape and type need|not a readable ONNX model"):
        load(path)


def rename_data(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def test_a_mapped_file_is_let_go_also_by_an_error_that_holds_a_view_of_it(tmp_path: Path) -> None:
    model = load(small_llama.save(tmp_path / "a.onnx", external=True))
    tensor = next(t for v in model.graph.initializers.values() if isinstance(t := v.const_value, ir.ExternalTensor))
    view = tensor.numpy()
    before = view.copy()
    unmap(tensor)
    assert np.array_equal(view, before)
    assert np.array_equal(tensor.numpy(), before)


def test_lengths_below_zero_are_not_fixed(tmp_path: Path) -> None:
    """PaddlePaddle writes -1 for what others name."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "a"], ["h"]), helper.make_node("MatMul", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [-1, 8])],
        [numpy_helper.from_array(np.ones(shape, np.float32), n) for n, shape in (("a", (32, 64)), ("b", (64, 8)))],
    )
    source, target = tmp_path / "m.onnx", tmp_path / "r.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    report = oq.rotate(source, target)
    assert report.plan is not None
    assert len(report.plan.rotations) > 0
    x = np.ones((3, 32), np.float32)
    np.testing.assert_allclose(*(oq.session(p).run(None, {"x": x})[0] for p in (source, target)), rtol=1e-4)
