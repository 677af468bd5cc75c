"""From a `QConfig` to the keywords of `pipeline.quantize`: a table of what is supported, and a refusal for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..plan import DEFAULT_ROTATIONS
from ..scheme import Scheme, TensorSpec, parse_scheme
from ..sites import LINEAR_OPS
from .config.algorithm import AlgoConfig, GPTQConfig, QuarotConfig
from .config.config import QConfig
from .config.data_type import DataType
from .config.spec import CalibMethod, QLayerConfig, QTensorConfig, QuantGranularity, ScaleType

METHODS = {
    None: parse_scheme("a8w8").activation.method,
    CalibMethod.MinMax: "minmax",
    CalibMethod.MinMSE: "mse",
    CalibMethod.Percentile: "percentile",
    CalibMethod.Entropy: "entropy",
}


def translate(config: QConfig, algorithms: Sequence[AlgoConfig] | None = None) -> dict[str, Any]:
    """The pipeline's keywords for `config`. `algorithms`, if given, stand in for `config.algo_config`.

    Errors: ConfigError naming the first option, class or value that is not supported.
    """
    if config.use_external_data_format not in (True, False):
        raise ConfigError(f"use_external_data_format is {config.use_external_data_format!r}; it must be True or False")
    for node in config.exclude:
        if not isinstance(node, str):
            raise ConfigError(f"exclude holds {node!r}; only node names are supported, not subgraphs")
    gptq = _gptq(config.algo_config if algorithms is None else algorithms)
    scheme = _scheme(config.global_config, gptq)
    keywords: dict[str, Any] = {
        "scheme": scheme,
        "method": scheme.activation.method,
        "exclude": tuple(config.exclude),
        "layers": _layers(config, gptq),
    }
    keywords |= _rotation(config.algo_config if algorithms is None else algorithms)
    return keywords | _extra_options(config.extra_options)


def _layers(config: QConfig, gptq: GPTQConfig | None) -> dict[str, Scheme | None]:
    """Schemes of layers by name, then by operator type; None for layers left in floating point."""
    layers: dict[str, Scheme | None] = {}
    for option in ("specific_layer_config", "layer_type_config"):
        for layer, names in getattr(config, option).items():
            if layer is not None and not isinstance(layer, QLayerConfig):
                raise ConfigError(
                    f"{option} has the key {layer!r}; it must be a QLayerConfig, or None for floating point"
                )
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"{option} holds {names!r}; it must be a list of names")
            for name in names:
                if option == "layer_type_config" and name not in LINEAR_OPS:
                    raise ConfigError(f"layer_type_config holds {name!r}; supported are MatMul and Gemm")
                layers.setdefault(name, None if layer is None else _scheme(layer, gptq))
    return layers


def _gptq(algorithms: Sequence[AlgoConfig]) -> GPTQConfig | None:
    """The GPTQConfig among `algorithms`, if its options are ones that mean something here."""
    found = [algorithm for algorithm in algorithms if isinstance(algorithm, GPTQConfig)]
    if not found:
        return None
    if len(found) > 1:
        raise ConfigError(f"algo_config holds {len(found)} GPTQConfigs; it must hold at most one")
    (asked,) = found
    for name, only in (("group_size", -1), ("act_order", False), ("weight_symmetric", True)):
        value = getattr(asked, name)
        if value != only:
            raise ConfigError(f"GPTQConfig has {name} {value!r}; supported is {only}")
    if not 0.0 < asked.perc_damp <= 1.0:
        raise ConfigError(f"GPTQConfig has perc_damp {asked.perc_damp!r}; it must be above 0 and at most 1")
    return asked


def _scheme(layer: QLayerConfig, gptq: GPTQConfig | None = None) -> Scheme:
    for name in ("bias", "output_tensors"):
        if getattr(layer, name) is not None:
            raise ConfigError(f"{name} is not supported; biases and outputs stay in floating point")
    for name in ("activation", "weight"):
        if getattr(layer, name) is None:
            raise ConfigError(f"global_config has no {name}; it must give one, such as {_EXAMPLE[name]}")
    assert layer.activation is not None
    assert layer.weight is not None
    activation, weight = _activation(layer.activation), _weight(layer.weight)
    name = f"a{activation.bits}w{weight.bits}"
    if gptq is None:
        return Scheme(name, activation, weight)
    if gptq.bits != weight.bits:
        raise ConfigError(
            f"GPTQConfig has bits {gptq.bits}, but the weight has data_type Int{weight.bits}; make them equal"
        )
    if not weight.per_channel:
        raise ConfigError("GPTQConfig with weights of granularity Tensor is not supported; use Channel")
    if gptq.mse:
        weight = replace(weight, method="mse")
    return Scheme(name, activation, weight, weights="gptq", damping=gptq.perc_damp)


_EXAMPLE = {"activation": "UInt8Spec()", "weight": "Int8Spec()"}


def _activation(spec: QTensorConfig) -> TensorSpec:
    _require(spec, "activation", (DataType.Int8, DataType.UInt8, DataType.Int16, DataType.UInt16))
    if spec.calibration_method not in METHODS:
        raise ConfigError(
            f"activation has calibration_method {spec.calibration_method}; supported are MinMax, MinMSE, "
            "Percentile and Entropy"
        )
    if spec.quant_granularity not in (None, QuantGranularity.Tensor):
        raise ConfigError(f"activation has quant_granularity {spec.quant_granularity}; supported is Tensor")
    return TensorSpec(
        bits=spec.data_type.bits,
        signed=spec.data_type.signed,
        symmetric=spec.symmetric,
        per_channel=False,
        method=_wide(spec) or METHODS[spec.calibration_method],
    )


def _wide(spec: QTensorConfig) -> str | None:
    """The method of 16-bit activations, which have levels to spare, where none is asked for."""
    return "minmax" if spec.calibration_method is None and spec.data_type.bits == 16 else None


def _weight(spec: QTensorConfig) -> TensorSpec:
    _require(spec, "weight", (DataType.Int8, DataType.Int4))
    if not spec.symmetric:
        raise ConfigError("weight has symmetric False; supported is True")
    if spec.calibration_method not in (None, CalibMethod.MinMax, CalibMethod.MinMSE):
        raise ConfigError(f"weight has calibration_method {spec.calibration_method}; supported are MinMax and MinMSE")
    if spec.quant_granularity not in (None, QuantGranularity.Channel, QuantGranularity.Tensor):
        raise ConfigError(f"weight has quant_granularity {spec.quant_granularity}; supported are Channel and Tensor")
    # One scale a channel costs nothing at run time and is never less accurate, so it is what "not said" means.
    per_channel = spec.quant_granularity is not QuantGranularity.Tensor
    method = "minmax" if spec.calibration_method is CalibMethod.MinMax else "mse"
    return TensorSpec(spec.data_type.bits, signed=True, symmetric=True, per_channel=per_channel, method=method)


def _require(spec: QTensorConfig, role: str, data_types: tuple[DataType, ...]) -> None:
    if spec.data_type not in data_types:
        names = " and ".join(t.value for t in data_types)
        raise ConfigError(f"{role} has data_type {spec.data_type.value}; supported: {names}")
    if spec.scale_type is not ScaleType.Float32:
        raise ConfigError(f"{role} has scale_type {spec.scale_type}; supported is Float32")


def _rotation(algorithms: Sequence[AlgoConfig]) -> dict[str, Any]:
    for algorithm in algorithms:
        if not isinstance(algorithm, AlgoConfig):
            raise ConfigError(f"algo_config holds {algorithm!r}; it must hold algorithms such as QuarotConfig()")
        if not algorithm.supported:
            raise ConfigError(f"{type(algorithm).__name__} is not supported; supported are QuarotConfig and GPTQConfig")
    quarot = [algorithm for algorithm in algorithms if isinstance(algorithm, QuarotConfig)]
    if len(quarot) > 1:
        raise ConfigError(f"algo_config holds {len(quarot)} QuarotConfigs; it must hold at most one")
    if not quarot:
        return {"rotations": ()}
    (asked,) = quarot
    seed = (asked.seed or 0) if asked.use_random_had else None
    return {
        "rotations": DEFAULT_ROTATIONS,
        "seed": seed,
        "config": asked.r_config_path,
        "matrix_dim": asked.r_matrix_dim,
    }


def _extra_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of Quark's hundred options: those that mean something here. The rest raise, by name."""
    keywords: dict[str, Any] = {}
    for name, value in options.items():
        if name == "OpTypesToQuantize":
            keywords["op_types"] = _op_types(value)
        elif name == "CalibDataSize":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"CalibDataSize is {value!r}; it must be a positive whole number")
            keywords["windows"] = value
        elif name == "MatMulConstBOnly":
            if value is not True:
                raise ConfigError(f"MatMulConstBOnly is {value!r}; only True is supported: constant weights")
        else:
            raise ConfigError(
                f"option {name!r} is not supported; supported are OpTypesToQuantize, CalibDataSize, MatMulConstBOnly"
            )
    return keywords


def _op_types(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"OpTypesToQuantize is {value!r}; it must be a list such as ['MatMul', 'Gemm']")
    for op_type in value:
        if op_type not in LINEAR_OPS:
            raise ConfigError(f"OpTypesToQuantize holds {op_type!r}; supported are MatMul and Gemm")
    return tuple(value)
