"""Algorithms that work on a model before it is quantized."""

from __future__ import annotations

from typing import Any, ClassVar

from ...errors import ConfigError
from .plain import a_dict


class AlgoConfig:
    """Options of one algorithm. `supported` False: the name is known, using it raises ConfigError."""

    name: ClassVar[str]
    supported: ClassVar[bool] = False

    def __init__(self, **options: Any) -> None:
        for option, value in options.items():
            setattr(self, option, value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the algorithm's `name` among them."""
        return {"name": self.name, **{k: v for k, v in vars(self).items() if v is not None}}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


class QuarotConfig(AlgoConfig):
    """Rotate with Hadamard matrices first (Ashkboos et al., QuaRot, arXiv:2404.00456).

    Everything is optional: sizes and sites are discovered in the model.
    r_matrix_dim: the width of the rotated stream; given, the model must have it.
    use_random_had: random signs, the same on every run (see `seed`).
    r_config_path: a rotation_config.json with node names, used in place of discovery.
    seed: which random signs; 0 if `use_random_had` is set without one.
    """

    name = "quarot"
    supported = True

    def __init__(
        self,
        r_matrix_dim: int | None = None,
        use_random_had: bool = False,
        r_config_path: str | None = None,
        seed: int | None = None,
    ) -> None:
        if r_matrix_dim is not None and (
            isinstance(r_matrix_dim, bool) or not isinstance(r_matrix_dim, int) or r_matrix_dim < 1
        ):
            raise ConfigError(f"r_matrix_dim is {r_matrix_dim!r}; it must be a positive whole number")
        if not isinstance(use_random_had, bool):
            raise ConfigError(f"use_random_had is {use_random_had!r}; it must be True or False")
        if seed is not None and not use_random_had:
            raise ConfigError(f"seed is {seed!r} while use_random_had is False; a seed needs use_random_had=True")
        super().__init__(
            r_matrix_dim=r_matrix_dim, use_random_had=use_random_had, r_config_path=r_config_path, seed=seed
        )
        self.r_matrix_dim = r_matrix_dim
        self.use_random_had = use_random_had
        self.r_config_path = r_config_path
        self.seed = seed


class SmoothQuantConfig(AlgoConfig):
    """SmoothQuant: known by name, not supported."""

    name = "smooth_quant"

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__(alpha=alpha)


class GPTQConfig(AlgoConfig):
    """GPTQ (Frantar et al., arXiv:2210.17323) chooses the integers of weights.

    bits: those of the weight's data type. perc_damp: damping of the Hessian, as a share of the mean of its diagonal.
    block_size: features whose errors are spread in one go; a matter of speed, the result does not depend on it. mse:
    ranges of least squared error. per_channel: scales are one a channel either way. group_size other than -1, act_order
    and weight_symmetric=False raise ConfigError.
    """

    name = "gptq"
    supported = True
    bits: int
    perc_damp: float
    mse: bool

    def __init__(
        self,
        bits: int = 8,
        block_size: int = 128,
        group_size: int = -1,
        perc_damp: float = 0.01,
        act_order: bool = False,
        per_channel: bool = False,
        mse: bool = False,
        weight_symmetric: bool = True,
    ) -> None:
        super().__init__(
            bits=bits,
            block_size=block_size,
            group_size=group_size,
            perc_damp=perc_damp,
            act_order=act_order,
            per_channel=per_channel,
            mse=mse,
            weight_symmetric=weight_symmetric,
        )


class CLEConfig(AlgoConfig):
    """Cross-layer equalization: known by name, not supported."""

    name = "cle"


class BiasCorrectionConfig(AlgoConfig):
    """Bias correction: known by name, not supported."""

    name = "bias_correction"


class AdaRoundConfig(AlgoConfig):
    """AdaRound: known by name, not supported."""

    name = "adaround"


class AdaQuantConfig(AlgoConfig):
    """AdaQuant: known by name, not supported."""

    name = "adaquant"


class AutoMixprecisionConfig(AlgoConfig):
    """Automatic mixed precision: known by name, not supported."""

    name = "auto_mixprecision"


_BY_NAME: dict[str, type[AlgoConfig]] = {
    cls.name: cls
    for cls in (
        QuarotConfig,
        SmoothQuantConfig,
        GPTQConfig,
        CLEConfig,
        BiasCorrectionConfig,
        AdaRoundConfig,
        AdaQuantConfig,
        AutoMixprecisionConfig,
    )
}


def from_dict(d: dict[str, Any]) -> AlgoConfig:
    """The algorithm a dict names; errors: ConfigError for a name or option that is unknown."""
    options = a_dict(d, "an entry of algo_config")
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ConfigError(f"algorithm name is {name!r}; it must be one of {', '.join(_BY_NAME)}")
    try:
        return _BY_NAME[name](**options)
    except TypeError as error:
        raise ConfigError(f"algorithm {name!r}: {error}") from None
