"""The picture of what a rotation does: one layer's input before and after, tokens by channels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_quarot import pipeline
from onnx_quarot.calibrate import inner_values
from onnx_quarot.data import as_batches, input_specs
from onnx_quarot.errors import ConfigError, ModelError, SaveError
from onnx_quarot.load import load
from onnx_quarot.progress import NullProgress, Progress
from onnx_quarot.sites import linear_sites

Array = npt.NDArray[np.float32]
TOKENS = 128


def draw(
    model: Path,
    text: Path,
    target: Path,
    *,
    layer: str | None = None,
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> None:
    """Draw the input of one linear layer of `model`, before and after rotation, into the PNG `target`.

    The input is taken on the first `tokens` tokens of `text`, read with the tokenizer.json beside the model; token 0,
    an attention sink of a scale of its own, is left out. layer: the node's name; None for the layer whose loudest
    channel stands out most from the median one, token after token.
    Errors: ConfigError if matplotlib is not installed, ModelError for a layer that the model does not have, SaveError
    for a target that cannot be written, and those of reading `text`.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("picture: needs the package matplotlib: pip install 'onnx-quarot[picture]'") from None
    matplotlib.use("Agg")
    show = progress or NullProgress()
    with tempfile.TemporaryDirectory(prefix="onnx_quarot_picture_") as scratch, show.task("drawing", None):
        rotated = Path(scratch) / "rotated.onnx"
        pipeline.rotate(model, rotated, verify=False)
        tokenizer = model.parent / "tokenizer.json"
        batch = next(as_batches(text, input_specs(model), tokenizer=tokenizer, window=tokens, limit=1))
        before = _inputs(model, batch)
        name = layer if layer is not None else max(before, key=lambda key: _spread(before[key]))
        if name not in before:
            raise ModelError(f"layer: {name!r} is no linear layer of the model")
        after = _inputs(rotated, batch, only=name)[name]
    _plot(before[name], after, name, target)


def _inputs(model: Path, batch: Mapping[str, Any], only: str | None = None) -> dict[str, Array]:
    """What enters each linear layer (or `only` one), as tokens by channels; by node name."""
    sites = [site for site in linear_sites(load(model)) if only in (None, site.node_name)]
    wanted = [site.activation for site in sites]
    values = inner_values(model, wanted, batch)
    return {s.node_name: values[s.activation].reshape(-1, values[s.activation].shape[-1]) for s in sites}


def _spread(x: Array) -> float:
    """How far the loudest channel stands out, by what channels hold in most tokens, not in a single odd one."""
    levels = np.quantile(np.abs(x), 0.75, axis=0)
    return float(levels.max() / np.median(levels))


def _plot(before: Array, after: Array, name: str, target: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2,
        2,
        figsize=(11, 5.4),
        dpi=120,
        sharex=True,
        sharey="row",
        height_ratios=(1, 1.25),
        layout="constrained",
    )
    parts = (("before rotation", np.abs(before[1:])), ("after rotation", np.abs(after[1:])))
    top = max(float(x.max()) for _, x in parts)
    bright = 3 * float(np.quantile(parts[1][1], 0.99))
    for column, (title, x) in enumerate(parts):
        bars, grid = axes[:, column]
        peaks = x.max(axis=0)
        colour = "#c0392b" if column == 0 else "#2471a3"
        bars.vlines(np.arange(len(peaks)), 0, peaks, color=colour, linewidth=0.6)
        bars.axhline(float(np.median(peaks)), color="black", linewidth=0.8, linestyle="--")
        bars.set_title(f"{title}: largest {peaks.max():.1f}, median channel {np.median(peaks):.2f}", fontsize=11)
        bars.set_ylim(0, top * 1.05)
        bars.spines[["top", "right"]].set_visible(False)
        image = grid.imshow(
            x,
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=bright,
            interpolation="nearest",
            extent=(-0.5, x.shape[1] - 0.5, x.shape[0] + 0.5, 0.5),
        )
        grid.set_xlabel("channel")
    axes[0, 0].set_ylabel("largest |x| of channel")
    axes[1, 0].set_ylabel("token")
    figure.colorbar(image, ax=axes[1, :], label="|x|", extend="max", pad=0.01)
    figure.suptitle(f"What enters {name}", fontsize=12)
    try:
        figure.savefig(target, format="png")
    except OSError as error:
        raise SaveError(f"picture: {str(target)!r} cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)
