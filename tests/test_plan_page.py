"""The page of a plan says what the plan says, and is well formed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import small_llama
from onnx_quarot.discovery import discover_model
from onnx_quarot.load import load
from onnx_quarot.plan_page import _columns, _repetition, plan_page
from small_llama import Config

VOID = {"meta", "line", "circle", "rect"}


class Balanced(HTMLParser):
    """Fails on tags that do not match; collects text and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attrs).get("class") or "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(tmp_path: Path, config: Config, title: str = "A model") -> tuple[Balanced, str]:
    model = load(small_llama.save(tmp_path / "m.onnx", config))
    html = plan_page(model, discover_model(model, rotations=("R1", "R2", "R4")), title=title)
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser, html


def test_every_layer_and_every_online_transform_has_a_row(tmp_path: Path) -> None:
    parser, html = page(tmp_path, Config(layers=2, tied=False))
    assert html.count("reads, folded into the weight") == 2 * 4 + 1  # qkv, o, gate, up; the head
    assert html.count("reads, turned online") == 2  # down
    assert html.count("online transform: applies it") == 2
    assert parser.classes.count("row") == html.count('class="row"')
    assert "src=" not in html  # self-contained
    assert "href=" not in html


def test_layers_that_are_alike_are_folded_away(tmp_path: Path) -> None:
    _, html = page(tmp_path, Config(layers=6))
    (more,) = re.findall(r"<summary>(\d+) more blocks of (\d+) rows", html)
    assert int(more[0]) in (4, 5)
    assert html.count("reads, turned online") == 6


def test_what_was_declined_is_said_and_names_are_escaped(tmp_path: Path) -> None:
    model = load(small_llama.save(tmp_path / "m.onnx"))
    plan = discover_model(model, rotations=("R2",))
    html = plan_page(model, plan, title="<script>")
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert plan.declined
    assert html.count("not rotated:") == len(plan.declined)


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [("abcabcabcz", (0, 3, 3)), ("xyabababab", (2, 2, 4)), ("abcdefg", (0, 1, 1)), ("", (0, 1, 1))],
)
def test_repetition(sequence: str, expected: tuple[int, int, int]) -> None:
    assert _repetition(list(sequence)) == expected


def test_rails_that_run_side_by_side_have_their_own_columns() -> None:
    columns = _columns({"long": (0, 9), "a": (1, 3), "b": (3, 5), "c": (6, 7)})
    assert columns["long"] == 0
    assert columns["a"] != columns["b"]  # both in row 3
    assert columns["c"] == 1


def test_what_is_longest_is_shown_whole_and_either_scheme_has_its_colours(tmp_path: Path) -> None:
    _, html = page(tmp_path, Config())
    assert f"{len('SkipSimplifiedLayerNormalization') + 1}ch" in html
    used = set(re.findall(r"var\((--\w+)\)", html))
    light, dark = re.findall(r":root {(.*?)}", html, re.DOTALL)
    for scheme in (light, dark):
        assert used <= set(re.findall(r"(--\w+):", scheme))
    assert not re.search(r'(fill|stroke|color)[=:]"?(white|black|#)', html.split("</style>")[1])


def test_matrices_that_are_selected_are_not_called_writers() -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"]),
        helper.make_node("ArgMax", ["h"], ["i"], axis=-1, keepdims=1),
        helper.make_node("GatherND", ["u", "i"], ["s"], "select"),
        helper.make_node("Unsqueeze", ["h", "two"], ["c"]),
        helper.make_node("MatMul", ["s", "c"], ["v"]),
        helper.make_node("Squeeze", ["v", "two"], ["k"]),
        helper.make_node("MatMul", ["k", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 32]) for n in "xy")
    arrays = {"a": rng.standard_normal((32, 32)), "u": rng.standard_normal((32, 32, 32)), "b": np.ones((32, 32))}
    weights = [numpy_helper.from_array(w.astype(np.float32), n) for n, w in arrays.items()]
    weights.append(numpy_helper.from_array(np.array([2]), "two"))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    html = plan_page(model, discover_model(model, rotations=("R1", "R2", "R4")), title="Experts")
    assert html.count("folded into the matrices it selects") == 1
