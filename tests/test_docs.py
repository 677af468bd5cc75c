"""Every code block of the documentation runs as it stands, on a small model in the place of the real one.

Commands of this package in `sh` blocks are run; other commands there (pip, cmake, pytest) are those that continuous
integration runs itself. C++ is built against an installed package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tiny_gguf
from onnx_quarot import demo
from onnx_quarot.cli import cli
from onnx_quarot.data import as_batches, input_specs

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OTHERS = ("pip", "pytest", "cmake", "python", "ONNX_QUAROT_", "nox", "mkdocs", "pre-commit")
WORDS = "Rotate the heap of letters, then the text tells 12 things about the shell. "


class Reader:
    """The smallest CalibrationDataReader."""

    def __init__(self, batches: list[Any]) -> None:
        self.rest = iter(batches)

    def get_next(self) -> Any:
        return next(self.rest, None)


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `onnx-quarot demo --output` leaves of the float model, but small."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_gguf, "CONTEXT", 1024)
        tiny = tiny_gguf.write(folder / "tiny.gguf")
    demo.build_model(tiny.path, folder / "smollm2" / "float")
    for name in ("calibration", "evaluation"):
        (folder / "smollm2" / f"{name}.txt").write_text(WORDS * 60)
    return folder / "smollm2"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page: Path, demo_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_output, "smollm2")
    specs = input_specs(Path("smollm2/float/model.onnx"))
    text = Path("smollm2/calibration.txt")
    batches = list(as_batches(text, specs, tokenizer=Path("smollm2/float/tokenizer.json"), window=64, limit=2))
    names: dict[str, Any] = {"np": np, "calibration": batches, "calib_data_reader": Reader(batches)}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "sh":
            run_commands(code)
        else:
            assert language in ("cmake", "cpp", "json", "text"), f"{page.name}: a block of {language!r} is not run"


def run_commands(code: str) -> None:
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0].startswith(OTHERS):
            continue
        assert words[0] == "onnx-quarot", line
        if words[1] == "demo":
            continue  # run by continuous integration, on the real model
        done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.skipif("ONNX_QUAROT_PREFIX" not in os.environ, reason="ONNX_QUAROT_PREFIX names no installed C++ package")
def test_the_cpp_example_builds_against_the_installed_package(tmp_path: Path) -> None:
    found = dict(b for b in blocks(ROOT / "docs" / "transform.md") if b[0] in ("cmake", "cpp"))
    (tmp_path / "CMakeLists.txt").write_text(found["cmake"])
    (tmp_path / "main.cc").write_text(found["cpp"])
    for command in (
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={os.environ['ONNX_QUAROT_PREFIX']}"],
        ["cmake", "--build", tmp_path / "build"],
        [tmp_path / "build" / "example"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        assert page.name in site, f"{page.name} is in no menu"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target} does not exist"
