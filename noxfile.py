"""The few commands a developer needs: ``nox -l`` lists them, ``nox -s lint`` runs one, ``nox`` the first four."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True

CPP = ("cmake>=3.23", "ninja")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and spelling."""
    session.install("ruff>=0.6", "codespell>=2.2", "clang-format==23.1.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    tracked = str(session.run("git", "ls-files", external=True, silent=True)).split()
    session.run("codespell", *(f for f in tracked if f.endswith((".py", ".md", ".cc", ".h", ".toml", ".yml"))))
    session.run("clang-format", "--dry-run", "-Werror", *(f for f in tracked if f.endswith((".cc", ".h"))))


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install(".[test,demo,dev,picture]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The tests; arguments go to pytest: ``nox -s tests -- -k rope``."""
    session.install(".[test,demo,picture]")
    session.run("pytest", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """The tests, and which lines they reach."""
    session.install(".[test,demo,dev,picture]")
    session.run("pytest", "--cov", "--cov-report=term-missing", *session.posargs)


@nox.session
@nox.parametrize("preset", ["release", "asan-ubsan", "tsan"])
def cpp(session: nox.Session, preset: str) -> None:
    """The compiled code and its tests: as released, and under the sanitizers."""
    session.install(*CPP)
    session.run("cmake", "--preset", preset, "-G", "Ninja")
    session.run("cmake", "--build", "--preset", preset)
    session.run("ctest", "--preset", preset)


@nox.session
def tidy(session: nox.Session) -> None:
    """clang-tidy over what this compiler's flags fit."""
    session.install(*CPP, "clang-tidy==23.1.4")
    session.run("cmake", "--preset", "dev", "-G", "Ninja")
    tracked = str(session.run("git", "ls-files", "csrc/*.cc", external=True, silent=True)).split()
    apart = ("csrc/python", "csrc/isa/avx512", "csrc/isa/neon", "csrc/qlinear/isa_", "csrc/ort/abi_check")
    session.run("clang-tidy", "-quiet", "-p", "build/dev", *(f for f in tracked if not f.startswith(apart)))


@nox.session
def coverage_cpp(session: nox.Session) -> None:
    """The lines of csrc that the C++ tests reach, and the Python tests of what is compiled."""
    session.install(".[test,demo]", *CPP, "pybind11>=2.12", "gcovr>=8")
    places = str(session.run("python", "-m", "pybind11", "--cmakedir", silent=True)).strip()
    options = ("-DONNX_QUAROT_PYTHON=ON", f"-Dpybind11_DIR={places}")
    session.run("cmake", "--preset", "coverage", "-G", "Ninja", *options)
    session.run("cmake", "--build", "--preset", "coverage")
    session.run("ctest", "--preset", "coverage")
    made = Path("build/coverage/csrc")
    package = Path("build/coverage/package/onnx_quarot")
    shutil.copytree("python/onnx_quarot", package, dirs_exist_ok=True)
    for library in (*made.glob("_core*"), *made.glob("ort/libonnx_quarot_ops.*")):
        shutil.copy(library, package)
    files = ("ort_hadamard", "qlinear", "fused_op", "fused_linear", "transform", "convert", "custom_op", "faults")
    tests = [f"tests/test_{name}.py" for name in files]
    session.run("pytest", "-q", *tests, env={"PYTHONPATH": str(package.parent.resolve())})
    # Functions of -inl headers are compiled once an instruction set, some at two lines of the same file.
    merge = ("--merge-lines", "--merge-mode-functions=separate")
    session.run("gcovr", "--filter", "csrc/", *merge, "--fail-under-line", "90", "build/coverage")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, in build/site."""
    session.install("mkdocs-material>=9")
    session.run("mkdocs", "build", "--strict", "--site-dir", "build/site")


@nox.session
def bench(session: nox.Session) -> None:
    """The kernel on this machine."""
    session.install(".", "fht-cpu")
    session.run("onnx-quarot", "bench", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """A minute of hostile input a target, or of one: ``nox -s fuzz -- model``."""
    session.install(".[test,demo]")
    for target in session.posargs or ("model", "operator", "gguf", "config"):
        session.run("python", "fuzz/fuzz.py", target, "60")


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel, from the source archive, in build/dist."""
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "build/dist")
