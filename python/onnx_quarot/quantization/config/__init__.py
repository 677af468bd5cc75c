"""`QConfig` and what it is made of. `config.spec` and `config.algorithm` hold the parts, as in AMD Quark.

An option or class of Quark's that is not supported raises `ConfigError` and is named in it; none is ignored.
"""

from __future__ import annotations

from .config import QConfig, get_default_config

__all__ = ["QConfig", "get_default_config"]
