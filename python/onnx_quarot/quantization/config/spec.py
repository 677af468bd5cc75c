"""How one tensor, and how one layer, is quantized."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar, TypeVar

from ...errors import ConfigError
from .data_type import DataType
from .plain import a_dict


class CalibMethod(Enum):
    """How a range is taken from calibration data."""

    MinMax = 0
    MinMSE = 1
    Percentile = 2
    Entropy = 3
    LayerwisePercentile = 4
    Distribution = 5


class ScaleType(Enum):
    """What kind of number a scale is."""

    Float32 = 0
    PowerOf2 = 1
    Int16 = 2


class QuantGranularity(Enum):
    """How much of a tensor shares one scale."""

    Tensor = 0
    Channel = 1
    Group = 2


E = TypeVar("E", bound=Enum)


def _member(kind: type[E], value: E | str, argument: str) -> E:
    """`value`, or the member named `Member` or `Kind.Member`; errors: ConfigError naming `argument`."""
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        member = kind.__members__.get(value.removeprefix(f"{kind.__name__}."))
        if member is not None:
            return member
    names = ", ".join(kind.__members__)
    raise ConfigError(f"{argument} is {value!r}; it must be a {kind.__name__}: {names}")


def _text(member: Enum) -> str:
    return f"{type(member).__name__}.{member.name}"


class QTensorConfig:
    """How one tensor is quantized.

    `calibration_method` and `quant_granularity` may be None: then the quantizer chooses by the tensor's role (its
    own default method; one scale a tensor for activations, one a channel for weights). Given, they are honoured.
    """

    def __init__(
        self,
        symmetric: bool,
        scale_type: ScaleType | str,
        calibration_method: CalibMethod | str | None,
        quant_granularity: QuantGranularity | str | None,
        data_type: DataType | str,
    ) -> None:
        if not isinstance(symmetric, bool):
            raise ConfigError(f"symmetric is {symmetric!r}; it must be True or False")
        self.symmetric = symmetric
        self.scale_type = _member(ScaleType, scale_type, "scale_type")
        self.calibration_method: CalibMethod | None = None
        if calibration_method is not None:
            self.calibration_method = _member(CalibMethod, calibration_method, "calibration_method")
        self.quant_granularity: QuantGranularity | None = None
        if quant_granularity is not None:
            self.quant_granularity = _member(QuantGranularity, quant_granularity, "quant_granularity")
        self.data_type = DataType.parse(data_type)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QTensorConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.to_dict().items())))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.to_dict().items())})"

    def set_symmetric(self, symmetric: bool) -> None:
        """Set whether zero has the code zero."""
        self.symmetric = symmetric

    def set_scale_type(self, scale_type: ScaleType) -> None:
        """Set the kind of scale."""
        self.scale_type = scale_type

    def set_calibration_method(self, calibration_method: CalibMethod) -> None:
        """Set the range method."""
        self.calibration_method = calibration_method

    def set_quant_granularity(self, quant_granularity: QuantGranularity) -> None:
        """Set how much shares one scale."""
        self.quant_granularity = quant_granularity

    def set_data_type(self, data_type: DataType) -> None:
        """Set the number format."""
        self.data_type = data_type

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what was left to the quantizer is left out."""
        out: dict[str, Any] = {"symmetric": self.symmetric, "scale_type": _text(self.scale_type)}
        if self.calibration_method is not None:
            out["calibration_method"] = _text(self.calibration_method)
        if self.quant_granularity is not None:
            out["quant_granularity"] = _text(self.quant_granularity)
        return {**out, "data_type": self.data_type.value}

    @staticmethod
    def from_dict(d: dict[str, Any]) -> QTensorConfig:
        """The inverse of `to_dict`; errors: ConfigError for an unknown or missing key."""
        d = a_dict(d, "tensor config")
        known = {"symmetric", "scale_type", "calibration_method", "quant_granularity", "data_type"}
        if unknown := sorted(set(d) - known):
            raise ConfigError(f"tensor config has the key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if "data_type" not in d:
            raise ConfigError("tensor config has no 'data_type'; it must name one, such as 'Int8'")
        data_type = DataType.parse(d["data_type"])
        return QTensorConfig(
            d.get("symmetric", data_type.signed),
            d.get("scale_type", ScaleType.Float32),
            d.get("calibration_method"),
            d.get("quant_granularity"),
            data_type,
        )


class _Preset(QTensorConfig):
    """A specification whose number format is in its name; a subclass states its three defaults."""

    DATA_TYPE: ClassVar[DataType]
    SYMMETRIC: ClassVar[bool] = True
    SCALE_TYPE: ClassVar[ScaleType] = ScaleType.Float32

    def __init__(
        self,
        symmetric: bool | None = None,
        scale_type: ScaleType | str | None = None,
        calibration_method: CalibMethod | str | None = None,
        quant_granularity: QuantGranularity | str | None = None,
        data_type: DataType | str | None = None,
    ) -> None:
        super().__init__(
            self.SYMMETRIC if symmetric is None else symmetric,
            self.SCALE_TYPE if scale_type is None else scale_type,
            calibration_method,
            quant_granularity,
            self.DATA_TYPE if data_type is None else data_type,
        )


class Int4Spec(_Preset):
    """int4, symmetric."""

    DATA_TYPE = DataType.Int4


class UInt4Spec(_Preset):
    """uint4, with a zero point."""

    DATA_TYPE = DataType.UInt4
    SYMMETRIC = False


class Int8Spec(_Preset):
    """int8, symmetric."""

    DATA_TYPE = DataType.Int8


class UInt8Spec(_Preset):
    """uint8, with a zero point."""

    DATA_TYPE = DataType.UInt8
    SYMMETRIC = False


class XInt8Spec(Int8Spec):
    """int8 with scales that are powers of two."""

    SCALE_TYPE = ScaleType.PowerOf2


class Int16Spec(_Preset):
    """int16, symmetric."""

    DATA_TYPE = DataType.Int16


class UInt16Spec(_Preset):
    """uint16, with a zero point."""

    DATA_TYPE = DataType.UInt16
    SYMMETRIC = False


class Int32Spec(_Preset):
    """int32, symmetric."""

    DATA_TYPE = DataType.Int32


class UInt32Spec(_Preset):
    """uint32, with a zero point."""

    DATA_TYPE = DataType.UInt32
    SYMMETRIC = False


class Float16Spec(_Preset):
    """float16."""

    DATA_TYPE = DataType.Float16


class BFloat16Spec(_Preset):
    """bfloat16."""

    DATA_TYPE = DataType.BFloat16


class BFP16Spec(_Preset):
    """Block floating point, 16 bits."""

    DATA_TYPE = DataType.BFP16


class MX4Spec(_Preset):
    """MX4."""

    DATA_TYPE = DataType.MX4


class MX6Spec(_Preset):
    """MX6."""

    DATA_TYPE = DataType.MX6


class MX9Spec(_Preset):
    """MX9."""

    DATA_TYPE = DataType.MX9


class MXFP4E2M1Spec(_Preset):
    """MXFP4 (E2M1)."""

    DATA_TYPE = DataType.MXFP4E2M1


class MXFP6E3M2Spec(_Preset):
    """MXFP6 (E3M2)."""

    DATA_TYPE = DataType.MXFP6E3M2


class MXFP6E2M3Spec(_Preset):
    """MXFP6 (E2M3)."""

    DATA_TYPE = DataType.MXFP6E2M3


class MXFP8E5M2Spec(_Preset):
    """MXFP8 (E5M2)."""

    DATA_TYPE = DataType.MXFP8E5M2


class MXFP8E4M3Spec(_Preset):
    """MXFP8 (E4M3)."""

    DATA_TYPE = DataType.MXFP8E4M3


class MXInt8Spec(_Preset):
    """MXINT8."""

    DATA_TYPE = DataType.MXInt8


class QLayerConfig:
    """How a linear layer is quantized. `activation` and `input_tensors` are two names of the same thing.

    Errors: ConfigError if both are given and differ, or if a value is not a tensor specification.
    """

    def __init__(
        self,
        input_tensors: QTensorConfig | None = None,
        activation: QTensorConfig | None = None,
        weight: QTensorConfig | None = None,
        bias: QTensorConfig | None = None,
        output_tensors: QTensorConfig | None = None,
    ) -> None:
        given = {
            "input_tensors": input_tensors,
            "activation": activation,
            "weight": weight,
            "bias": bias,
            "output_tensors": output_tensors,
        }
        for name, value in given.items():
            if value is not None and not isinstance(value, QTensorConfig):
                found = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
                raise ConfigError(f"{name} is {found}; it must be a tensor specification such as UInt8Spec()")
        if input_tensors is not None and activation is not None and input_tensors != activation:
            raise ConfigError("activation and input_tensors differ; they are two names of one thing, give one")
        self.activation = activation if activation is not None else input_tensors
        self.weight = weight
        self.bias = bias
        self.output_tensors = output_tensors

    @property
    def input_tensors(self) -> QTensorConfig | None:
        """The activation's specification under its other name."""
        return self.activation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QLayerConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.activation, self.weight, self.bias, self.output_tensors))

    def __repr__(self) -> str:
        parts = {"activation": self.activation, "weight": self.weight, "bias": self.bias}
        parts["output_tensors"] = self.output_tensors
        return f"QLayerConfig({', '.join(f'{k}={v!r}' for k, v in parts.items() if v is not None)})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of the parts that are given."""
        parts = {"input_tensors": self.activation, "weight": self.weight, "bias": self.bias}
        parts["output_tensors"] = self.output_tensors
        return {name: spec.to_dict() for name, spec in parts.items() if spec is not None}

    @staticmethod
    def from_dict(d: dict[str, Any]) -> QLayerConfig:
        """The inverse of `to_dict`; errors: ConfigError for an unknown key."""
        d = a_dict(d, "layer config")
        known = ("input_tensors", "activation", "weight", "bias", "output_tensors")
        if unknown := sorted(set(d) - set(known)):
            raise ConfigError(f"layer config has the key {unknown[0]!r}; known are {', '.join(known)}")
        return QLayerConfig(**{k: None if v is None else QTensorConfig.from_dict(v) for k, v in d.items()})
