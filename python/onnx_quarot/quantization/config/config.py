"""The whole of what is asked for: `QConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ConfigError
from .algorithm import AlgoConfig
from .algorithm import from_dict as algorithm_from_dict
from .plain import a_dict, a_list
from .spec import Int8Spec, QLayerConfig, UInt8Spec


class QConfig:
    """Quantization of a whole model.

    Options beyond the named ones go in as keywords, or together as `extra_options={...}`; `ModelQuantizer` checks
    them. Errors: ConfigError for a value of the wrong kind.
    """

    def __init__(
        self,
        global_config: QLayerConfig,
        specific_layer_config: Mapping[Any, Sequence[str]] | None = None,
        layer_type_config: Mapping[Any, Sequence[str]] | None = None,
        exclude: Sequence[Any] | None = None,
        algo_config: Sequence[AlgoConfig] | None = None,
        use_external_data_format: bool = False,
        **extra_options: Any,
    ) -> None:
        if not isinstance(global_config, QLayerConfig):
            raise ConfigError(f"global_config is {global_config!r}; it must be a QLayerConfig")
        if isinstance(exclude, str):
            raise ConfigError(f"exclude is {exclude!r}; it must be a list of node names")
        nested = extra_options.pop("extra_options", None)
        if nested is not None and not isinstance(nested, Mapping):
            raise ConfigError(f"extra_options is {nested!r}; it must be a dict")
        if isinstance(algo_config, AlgoConfig):
            raise ConfigError("algo_config is one algorithm; it must be a list of them")
        self.global_config = global_config
        self.specific_layer_config = dict(specific_layer_config or {})
        self.layer_type_config = dict(layer_type_config or {})
        self.exclude = list(exclude or [])
        self.algo_config = list(algo_config or [])
        self.use_external_data_format = use_external_data_format
        self.extra_options: dict[str, Any] = {**extra_options, **(nested or {})}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QConfig) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"QConfig({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. Layer configs that are keys become [config, names] pairs."""

        def pairs(table: dict[Any, Sequence[str]]) -> list[list[Any]]:
            return [[k.to_dict() if isinstance(k, QLayerConfig) else k, list(v)] for k, v in table.items()]

        return {
            "global_config": self.global_config.to_dict(),
            "specific_layer_config": pairs(self.specific_layer_config),
            "layer_type_config": pairs(self.layer_type_config),
            "exclude": list(self.exclude),
            "algo_config": [algorithm.to_dict() for algorithm in self.algo_config],
            "use_external_data_format": self.use_external_data_format,
            "extra_options": dict(self.extra_options),
        }

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> QConfig:
        """The inverse of `to_dict`; errors: ConfigError for an unknown key, a value of the wrong form, or no
        'global_config'."""
        rest = a_dict(d, "config")
        if "global_config" not in rest:
            raise ConfigError("config has no 'global_config'; it must hold one")

        def table(key: str) -> dict[Any, Sequence[str]]:
            entries = [a_list(pair, f"an entry of {key}") for pair in a_list(rest.pop(key, None), key)]
            if any(len(pair) != 2 for pair in entries):
                raise ConfigError(f"an entry of {key} is not a pair; it must be [layer config, names]")
            return {QLayerConfig.from_dict(config): a_list(names, f"names in {key}") for config, names in entries}

        config = QConfig(
            QLayerConfig.from_dict(rest.pop("global_config")),
            table("specific_layer_config"),
            table("layer_type_config"),
            a_list(rest.pop("exclude", None), "exclude"),
            [algorithm_from_dict(x) for x in a_list(rest.pop("algo_config", None), "algo_config")],
            rest.pop("use_external_data_format", False),
            extra_options=rest.pop("extra_options", None),
        )
        if rest:
            raise ConfigError(f"config has the unknown key {next(iter(rest))!r}")
        return config

    @staticmethod
    def get_default_config(config_name: str) -> QConfig:
        """A ready configuration by name; see `get_default_config`."""
        return get_default_config(config_name)


def get_default_config(config_name: str) -> QConfig:
    """A ready configuration.

    A8W8 and S8S8_ASWS: int8 activations without a zero point; S8S8_AAWS: int8 with one; U8S8_AAWS: uint8 with one.
    Weights are int8, symmetric, in all. Errors: ConfigError for a name that is none of these.
    """
    activations = {
        "A8W8": Int8Spec(),
        "S8S8_ASWS": Int8Spec(),
        "S8S8_AAWS": Int8Spec(symmetric=False),
        "U8S8_AAWS": UInt8Spec(),
    }
    if config_name not in activations:
        raise ConfigError(f"config_name is {config_name!r}; supported are {', '.join(activations)}")
    return QConfig(QLayerConfig(activation=activations[config_name], weight=Int8Spec()))
