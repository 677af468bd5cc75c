"""The number formats a tensor specification can name."""

from __future__ import annotations

from enum import Enum

from ...errors import ConfigError


class DataType(Enum):
    """A number format. Those without integer codes are known by name only, to be refused by name."""

    Int4 = "Int4"
    UInt4 = "UInt4"
    Int8 = "Int8"
    UInt8 = "UInt8"
    Int16 = "Int16"
    UInt16 = "UInt16"
    Int32 = "Int32"
    UInt32 = "UInt32"
    Float16 = "Float16"
    BFloat16 = "BFloat16"
    BFP16 = "BFP16"
    MX4 = "MX4"
    MX6 = "MX6"
    MX9 = "MX9"
    MXFP4E2M1 = "MXFP4E2M1"
    MXFP6E3M2 = "MXFP6E3M2"
    MXFP6E2M3 = "MXFP6E2M3"
    MXFP8E5M2 = "MXFP8E5M2"
    MXFP8E4M3 = "MXFP8E4M3"
    MXInt8 = "MXInt8"

    @classmethod
    def parse(cls, value: DataType | str) -> DataType:
        """The format of that name; errors: ConfigError for a name that is none."""
        try:
            return value if isinstance(value, cls) else cls(value)
        except ValueError:
            raise ConfigError(f"data_type is {value!r}; it must be one of {', '.join(cls.__members__)}") from None

    @property
    def is_integer(self) -> bool:
        """Whether values are plain integer codes with a scale."""
        return self.value.removeprefix("U").startswith("Int")

    @property
    def bits(self) -> int:
        """Width of one integer code in bits."""
        if not self.is_integer:
            raise ConfigError(f"data_type {self.value} has no integer codes")
        return int(self.value.removeprefix("U").removeprefix("Int"))

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return not self.value.startswith("U")


Int4, UInt4, Int8, UInt8 = DataType.Int4, DataType.UInt4, DataType.Int8, DataType.UInt8
Int16, UInt16, Int32, UInt32 = DataType.Int16, DataType.UInt16, DataType.Int32, DataType.UInt32
Float16, BFloat16 = DataType.Float16, DataType.BFloat16
