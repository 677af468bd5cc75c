"""Plain JSON values, checked on their way into configurations: what a key holds, or a ConfigError that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError


def a_dict(value: object, what: str) -> dict[str, Any]:
    """A copy of ``value`` if it is a dict whose keys are strings."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what} is {_short(value)}; it must be a dict")
    return dict(value)


def a_list(value: object, what: str) -> list[Any]:
    """A copy of ``value`` if it is a list; None counts as an empty one."""
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{what} is {_short(value)}; it must be a list")
    return list(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
