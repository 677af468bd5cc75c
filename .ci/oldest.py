"""The oldest supported version of every dependency, as constraints for pip: `python .ci/oldest.py > FILE`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def floors(text: str) -> list[str]:
    """`name==version` for each line of `dependencies` that applies to this Python (3.10 has no TOML reader)."""
    found = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    if found is None:
        sys.exit("error: pyproject.toml has no list of dependencies")
    lines = re.findall(r'^\s*"([^"]+)"', found[1], re.MULTILINE)
    pins = []
    for requirement in map(Requirement, lines):
        (version,) = (s.version for s in requirement.specifier if s.operator == ">=")
        if requirement.marker is None or requirement.marker.evaluate():
            pins.append(f"{requirement.name}=={version}")
    return pins


if __name__ == "__main__":
    print("\n".join(floors(PYPROJECT.read_text())))
