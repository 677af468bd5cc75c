"""Commands run in this process, as a shell would run them."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from onnx_quarot.cli import cli


def run(*arguments: str | Path) -> Result:
    # Before 8.2 click keeps the two streams apart only if asked to.
    apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
    return CliRunner(**apart).invoke(cli, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> Any:
    """What a command says to a machine."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)
