"""English prose that every Python has: the language reference inside `pydoc_data.topics`, split in two parts.

The text differs between Python versions (the reference is edited), so figures are comparable only within one
version. What is kept stable: a topic's part depends on its name alone, and topics follow each other in
alphabetical order.
"""

from __future__ import annotations

import functools
import zlib


def calibration_text() -> str:
    """Prose to calibrate on: about half of the topics. It depends on the Python version, on nothing else."""
    return _parts()[0]


def evaluation_text() -> str:
    """Prose to evaluate on: the other topics, without any paragraph of `calibration_text()`; it depends
    on the Python version alone."""
    return _parts()[1]


@functools.lru_cache(maxsize=1)
def _parts() -> tuple[str, str]:
    from pydoc_data.topics import topics

    # Topics repeat each other's chapters, so what one part has seen is left out of the other.
    seen: set[str] = set()
    parts: list[str] = []
    for wanted in (0, 1):
        paragraphs: list[str] = []
        for name in sorted(topics):
            if zlib.crc32(name.encode()) % 2 != wanted:
                continue
            for block in topics[name].split("\n\n"):
                paragraph = block.strip("\n")
                if paragraph.strip() and paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        parts.append("\n\n".join(paragraphs))
    return parts[0], parts[1]
