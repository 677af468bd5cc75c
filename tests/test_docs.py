"""Every code block of the documentation runs as it stands, on a small model in the place of the real one.

Commands of this package in `sh` blocks are run; `NOT_RUN` says why others are not. C++ is built against an installed
package.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import small_llama
import tiny_gguf
from onnx_quarot import demo
from onnx_quarot.cli import cli
from onnx_quarot.data import as_batches, input_specs

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CI = "continuous integration does"
NOT_RUN = {
    "onnx-quarot demo": f"{CI}, on the real model",
    "pip": f"{CI}, from the wheel",
    "pytest": f"{CI}, benchmarks too",
    "ctest": CI,
    "cmake": f"{CI}, with the same options",
    ".ci/run": "is what runs this",
    "python benchmarks/": "takes minutes to measure",
    "python -m onnxruntime_genai.models.builder": "needs torch and a model of one's own",
    "ONNX_QUAROT_LARGE_LAYERS": "needs 30 GB of disk",
    "python -m venv": "makes the environment that this runs in",
    ".": "the same",
    "pre-commit": "asks for its tools over the network",
    "nox": "makes environments of its own",
}
WORDS = "Rotate the heap of letters, then the text tells 12 things about the shell. "


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every fenced block, also of those within lists."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, textwrap.dedent(code)) for _, language, code in found]


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
    names: dict[str, Any] = {"np": np, "calibration": batches, "calib_data_reader": small_llama.Reader(batches)}
    for language, code in blocks(page):
        if language == "python":
            if "onnxruntime_genai" in code and find_spec("onnxruntime_genai") is None:
                continue  # an extra of its own, which continuous integration installs
            exec(compile(code, str(page), "exec"), names)
        elif language == "sh":
            run_commands(code)
        else:
            assert language in ("cmake", "cpp", "json", "text"), f"{page.name}: a block of {language!r} is not run"


def commands(code: str) -> Iterator[list[str]]:
    for line in re.sub(r"\\\n\s*", "", code).splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def run_commands(code: str) -> None:
    for words in commands(code):
        line = " ".join(words)
        for script in (word for word in words if word.endswith(".py")):
            assert (ROOT / script).is_file(), line
        if any(line.startswith(other) for other in NOT_RUN):
            continue
        if words[0] == "mkdir":
            Path(words[1]).mkdir()
            continue
        assert words[0] == "onnx-quarot", line
        done = CliRunner().invoke(cli, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_commands_run(page: Path, demo_output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the README is run in `test_readme.py`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_output, "smollm2")
    found = [code for language, code in blocks(page) if language == "sh"]
    assert found
    for code in found:
        run_commands(code)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.stem)
def test_code_is_fenced(page: Path) -> None:
    """Indented blocks say no language, and nobody would run them."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"\n\n(    \S.*)", text) == []


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
