"""Reading models: what is broken is found before any work is done, and said in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import small_llama
from onnx_quarot.errors import ModelError
from onnx_quarot.load import external_files, load, total_bytes


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
    with pytest.raises(ModelError, match=r"not (a readable|an) ONNX") as error:
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
