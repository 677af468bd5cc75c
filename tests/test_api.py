"""The public interface: names, signatures and documentation stay what they are until a version says otherwise."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import onnx_quarot as oq
from onnx_quarot.quantization import config
from onnx_quarot.quantization.config import algorithm, spec

NAMES = """
    ConfigError DataError ModelError ModelQuantizer OnnxQuarotError OrderError Plan Report Rotation SaveError
    VerificationError custom_op_library discover evaluate hadamard hadamard_dynamic_quantize hadamard_matrix
    hadamard_quantize quantize register rotate session
"""
# The first parameters are positional; the others are keywords, so that more can be added.
SIGNATURES = {
    "hadamard": "(x, *, block_size, signs, transpose, scale, out, threads)",
    "hadamard_matrix": "(n, *, block_size, signs, transpose, scale)",
    "hadamard_quantize": "(x, y_scale, zero_point, *, dtype, block_size, signs, transpose, scale)",
    "hadamard_dynamic_quantize": "(x, *, block_size, signs, transpose, scale)",
    "discover": "(model, *, rotations, block_size, seed, config",
    "rotate": "(source, target, *, plan, rotations, block_size, seed, config, verify, progress",
    "quantize": "(source, target, calibration, *, scheme",
    "evaluate": "(reference, candidate, data, *, tokenizer, window, windows, threads, progress)",
    "session": "(path, *, session_options, providers, use_library, exact, threads)",
    "register": "(session_options)",
    "custom_op_library": "()",
}
COMPILED = ("_core", "libonnx_quarot_ops")
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(oq.__path__, "onnx_quarot.")
    if not m.name.rpartition(".")[2].startswith(COMPILED)
)


def test_names() -> None:
    assert sorted(oq.__all__) == sorted(NAMES.split())
    for name in oq.__all__:
        assert getattr(oq, name) is not None
        assert name in dir(oq)
    assert {"QConfig"} <= set(dir(config))
    assert {"QLayerConfig", "UInt8Spec", "Int8Spec"} <= set(dir(spec))
    assert {"QuarotConfig"} <= set(dir(algorithm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        oq.nothing  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    parts: list[str] = []
    keywords = False
    for parameter in inspect.signature(getattr(oq, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
            keywords = True
        parts.append(parameter.name)
    assert f"({', '.join(parts)})".startswith(SIGNATURES[name])


@pytest.mark.parametrize("name", sorted(NAMES.split()))
def test_everything_public_is_documented(name: str) -> None:
    text = inspect.getdoc(getattr(oq, name))
    assert text
    if inspect.isfunction(getattr(oq, name)) and name not in ("custom_op_library", "hadamard_matrix"):
        assert "rais" in text.lower(), f"{name} does not say what it raises"


def test_every_module_says_what_it_is() -> None:
    for name in MODULES:
        assert importlib.import_module(name).__doc__, name


def test_examples_in_docstrings() -> None:
    attempted = 0
    for name in MODULES:
        result = doctest.testmod(importlib.import_module(name))
        assert result.failed == 0, name
        attempted += result.attempted
    assert attempted >= 3


def test_types_are_shipped() -> None:
    package = Path(oq.__file__).parent
    assert (package / "py.typed").is_file()
    stubs = (package / "_core.pyi").read_text()
    core = importlib.import_module("onnx_quarot._core")
    public = {n for n in dir(core) if not n.startswith("_")}
    assert public == set(re.findall(r"^(?:def|class) (\w+)", stubs, re.MULTILINE))


def test_the_version_is_one() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', text, re.MULTILINE)
    assert oq.__version__ == version
    assert f"## {version}" in (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
