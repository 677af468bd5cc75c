"""An evaluation as one self-contained HTML page: figures, layers before and after, time by operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from onnx_quarot.data import Batch, as_batches, input_specs
from onnx_quarot.errors import ModelError
from onnx_quarot.evaluation import Metrics, ModelFigures, fitted
from onnx_quarot.layers import LayerFigures, compare_layers
from onnx_quarot.load import load
from onnx_quarot.op_times import op_times
from onnx_quarot.progress import Progress
from onnx_quarot.provenance import recorded
from onnx_quarot.sensitivity import Sensitivities, measure_sensitivity

Array = np.ndarray[Any, Any]
_BEFORE, _AFTER = "var(--before)", "var(--after)"  # colours that the page defines, for either scheme
_PICTURES = 6  # layers whose channels are drawn
_WORST = 8  # layers in a table
_STEPS = [m * 10**e for e in range(9) for m in (1, 2, 5)]  # between lines of a grid
_BINS = 240  # of a picture; the loudest channel of each is drawn
_WIDTH, _HEIGHT = 860, 200
_SENSITIVITY_TOKENS = 64  # a window of text for the sensitivities: the model is run once a layer


def evaluation_page(
    reference: Path,
    candidate: Path,
    metrics: Metrics,
    data: object,
    *,
    tokenizer: object = None,
    window: int = 512,
    threads: int = 1,
    sensitivity: float = 60.0,
    progress: Progress | None = None,
) -> str:
    """The page for `metrics`, with what the first batch of `data` (as for `evaluate`) shows about every layer.

    sensitivity: about how many seconds may be spent on running the model once for each layer; 0 leaves that out.

    Raises what `evaluate` does, and ModelError if the two models have no linear layer in common.
    """
    specs = input_specs(reference)

    def first_batch(length: int) -> Batch:
        return next(as_batches(data, specs, tokenizer=tokenizer, window=length, limit=1))

    batch = first_batch(window)
    turned = recorded(load(reference)).carried(batch, recorded(load(candidate)))
    feeds = (fitted(reference, specs, batch), fitted(candidate, input_specs(candidate), turned))
    layers = compare_layers(reference, candidate, feeds, progress=progress)
    times = [op_times(path, fed, threads=threads) for path, fed in zip((reference, candidate), feeds, strict=True)]
    found: Sensitivities | str = "Not measured, as asked."
    if sensitivity > 0:
        small = fitted(reference, specs, first_batch(min(window, _SENSITIVITY_TOKENS)))
        try:
            found = measure_sensitivity(
                reference,
                candidate,
                small,
                logits=metrics.logits,
                seconds=sensitivity,
                first=[layer.name for layer in sorted(layers, key=_own_noise)],
                progress=progress,
            )
        except ModelError as error:
            found = f"Not measured: {error}."
    return render(metrics, layers, times, found)


def _own_noise(layer: LayerFigures) -> float:
    known = layer.input_sqnr if layer.input_sqnr is not None else layer.output_sqnr
    return float("inf") if known is None else known


def render(
    metrics: Metrics,
    layers: Sequence[LayerFigures],
    times: Sequence[Mapping[str, float]],
    sensitivity: Sensitivities | str,
) -> str:
    """The page from its figures; of the sensitivities, why there are none."""
    names = [layer.name for layer in layers]
    ratios = [layer.outlier_ratios() for layer in layers]
    kurtoses = [layer.kurtosis for layer in layers]
    loudest = sorted(range(len(layers)), key=lambda i: -ratios[i][0])[:_PICTURES]
    sections = [
        ("Figures", _table(metrics)),
        (
            "Outliers of every layer's input: loudest channel over median channel",
            _lines(names, [[r[0] for r in ratios], [r[1] for r in ratios]], "times", logarithmic=True),
        ),
        (
            "Kurtosis of every layer's input (3 is a normal distribution)",
            _lines(names, [[k[0] for k in kurtoses], [k[1] for k in kurtoses]], "kurtosis", logarithmic=True),
        ),
        (
            "Signal over noise: quantization of the input, and the output beside the reference's",
            _lines(
                names,
                [[x.input_sqnr for x in layers], [x.output_sqnr for x in layers]],
                "dB",
                legend=("input", "output"),
            )
            + _worst(layers),
        ),
        ("Sensitivity: what quantizing one layer alone does to the output", _sensitivity(sensitivity)),
        (
            "Largest magnitude and kurtosis of every channel, for the layers with the loudest",
            _pictures([layers[i] for i in loudest]),
        ),
        ("Where the time goes, in milliseconds a run", _times(times)),
    ]
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    title = " beside ".join(_told_apart(Path(metrics.candidate.path), Path(metrics.reference.path)))
    return _PAGE.format(title=escape(title), body=body)


def _told_apart(first: Path, second: Path) -> tuple[str, str]:
    """As much of the ends of two paths as they differ in: folders often tell models apart, not names."""
    ends = [path.resolve().parts for path in (first, second)]
    shared = next((i for i, (a, b) in enumerate(zip(*map(reversed, ends), strict=False)) if a != b), 0)
    return str(Path(*ends[0][-shared - 1 :])), str(Path(*ends[1][-shared - 1 :]))


def _table(metrics: Metrics) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows: list[tuple[str, Callable[[ModelFigures], str]]] = [
        ("size, MB", lambda m: f"{m.size_bytes / 1e6:,.1f}"),
        ("perplexity", lambda m: number(m.perplexity, ".3f")),
        ("prefill, tokens/s", lambda m: number(m.prefill_tokens_per_second, ".0f")),
        ("decode, tokens/s", lambda m: number(m.decode_tokens_per_second, ".1f")),
    ]
    lines = [
        f"<tr><th>{name}</th><td>{show(metrics.reference)}</td><td>{show(metrics.candidate)}</td></tr>"
        for name, show in rows
        if show(metrics.reference) or show(metrics.candidate)
    ]
    both: list[tuple[str, str]] = [
        ("perplexity, times the reference's", number(metrics.perplexity_ratio, ".4f")),
        ("KL divergence, nats", number(metrics.kl_divergence, ".5f")),
        ("same most likely token", number(metrics.top1_agreement, ".2%")),
        *((f"cosine of {name}", f"{value:.5f}") for name, value in metrics.cosine.items()),
    ]
    lines += [f"<tr><th>{escape(n)}</th><td></td><td>{v}</td></tr>" for n, v in both if v]
    head = "<tr><th></th><th>reference</th><th>candidate</th></tr>"
    count = f"{metrics.tokens:,} predictions" if metrics.tokens else f"{metrics.windows} batches"
    return f"<table>{head}{''.join(lines)}</table><p>{count}.</p>"


def _lines(
    layers: Sequence[str],
    series: Sequence[Sequence[float | None]],
    unit: str,
    *,
    legend: Sequence[str] = ("reference", "candidate"),
    logarithmic: bool = False,
) -> str:
    """One dot a layer and series, over the layers in the order of the graph."""
    known = [v for values in series for v in values if v is not None and np.isfinite(v)]
    if logarithmic:
        known = [v for v in known if v > 0]
    if not known:
        return "<p>None of the layers has this figure.</p>"
    least = min(known)

    def scaled(value: float) -> float:
        return log10(max(value, least)) if logarithmic else value

    low, high = (f(scaled(v)) for f, v in ((floor, least), (ceil, max(known))))
    step = next(s for s in _STEPS if s * 5 >= high - low)
    low -= low % step
    high = low + step * max(1, ceil((high - low) / step))
    parts = []
    for tick in range(low, high + 1, step):
        y = _HEIGHT - (tick - low) / (high - low) * (_HEIGHT - 16) - 8
        label = f"{10.0**tick:g}" if logarithmic else f"{tick}"
        parts.append(f'<line x1="46" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="42" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    colours = (_BEFORE, _AFTER)[-len(series) :]
    for values, colour, name in zip(series, colours, legend, strict=True):
        for i, value in enumerate(values):
            if value is None or not np.isfinite(value):
                continue
            x = 52 + i / max(1, len(layers) - 1) * (_WIDTH - 62)
            y = _HEIGHT - (scaled(value) - low) / (high - low) * (_HEIGHT - 16) - 8
            tip = escape(f"{layers[i]}: {name} {value:.3g} {unit}")
            dot = f'cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill:{colour}"'
            parts.append(f"<circle {dot}><title>{tip}</title></circle>")
    keys = "".join(
        f'<span class="key"><i style="background:{c}"></i>{n}</span>' for c, n in zip(colours, legend, strict=True)
    )
    note = '<span class="note">a dot a layer, in the order of the graph</span>'
    return f'<p>{keys}{note}</p><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _sensitivity(found: Sensitivities | str) -> str:
    if isinstance(found, str):
        return f"<p>{escape(found)}</p>"
    total = sum(layer.error for layer in found.layers)
    how = (
        f"The float model was run with a single layer quantized, its weights and its activations: {found.measure}"
        + (f", over {found.rows} tokens" if found.rows else "")
        + f". All {found.quantized} quantized layers together: {found.all:.3g}"
    )
    if len(found.layers) == found.quantized:
        how += f" (the sum of each alone is {total:.3g})."
    else:
        how += f". There was time for {len(found.layers)} layers, the noisiest (--sensitivity gives it more)."
    most = sorted(found.layers, key=lambda layer: -layer.error)[:_WORST]
    lines = "".join(
        f"<tr><td>{escape(x.name)}</td><td>{x.error:.3g}</td><td>{x.error / max(total, 1e-300):.1%}</td></tr>"
        for x in most
    )
    head = f"<tr><th>the most sensitive layers</th><th>{escape(found.measure)}</th><th>of the sum</th></tr>"
    dots = _lines(
        [x.name for x in found.layers], [[x.error for x in found.layers]], "", legend=("alone",), logarithmic=True
    )
    return f"<p>{escape(how)}</p>{dots}<table>{head}{lines}</table>"


def _worst(layers: Sequence[LayerFigures]) -> str:
    known = sorted((x for x in layers if x.output_sqnr is not None), key=lambda x: x.output_sqnr or 0.0)[:_WORST]
    if not known:
        return ""
    lines = "".join(
        f"<tr><td>{escape(x.name)}</td><td>{'' if x.input_sqnr is None else f'{x.input_sqnr:.1f}'}</td>"
        f"<td>{x.output_sqnr:.1f}</td></tr>"
        for x in known
    )
    return f"<table><tr><th>the noisiest outputs</th><th>input, dB</th><th>output, dB</th></tr>{lines}</table>"


def _pictures(layers: Sequence[LayerFigures]) -> str:
    figures = []
    for layer in layers:
        drawn = "".join(
            _bars(values, max(float(v.max()) for v in pair), f"{name}, {what}", colour)
            for what, pair in (("largest", layer.peaks), ("kurtosis", layer.channel_kurtosis))
            for values, name, colour in zip(pair, ("reference", "candidate"), (_BEFORE, _AFTER), strict=True)
        )
        figures.append(f"<figure><figcaption>{escape(layer.name)}</figcaption>{drawn}</figure>")
    return f'<div class="pictures">{"".join(figures)}</div>'


def _bars(values: Array, top: float, title: str, colour: str) -> str:
    """A bar a channel, or the highest of some neighbours."""
    bins = np.array_split(values, min(_BINS, values.size))
    heights = [float(b.max()) / (top or 1.0) * 90 for b in bins]
    bars = "".join(f"M{i * 400 / len(bins):.1f} 96v-{max(h, 0.5):.1f}" for i, h in enumerate(heights))
    return (
        f'<svg viewBox="0 0 400 112" role="img"><path d="{bars}" style="stroke:{colour}" stroke-width="1.4"/>'
        f'<text x="0" y="110">{title}: at most {values.max():.3g}, median {np.median(values):.3g}</text></svg>'
    )


def _times(times: Sequence[Mapping[str, float]]) -> str:
    longest = max((sum(t.values()) for t in times), default=1.0)
    parts = []
    for name, found in zip(("reference", "candidate"), times, strict=True):
        total = sum(found.values())
        shown = list(found.items())[:8]
        shown.append(("the rest", total - sum(v for _, v in shown)))
        lines = ""
        for op, ms in shown:
            bar = f'<i class="bar" style="width:{ms / longest * 420:.0f}px"></i>'
            lines += f"<tr><td>{escape(op)}</td><td>{ms:.1f}</td><td>{bar}</td></tr>"
        parts.append(f"<table><tr><th>{name}</th><th>{total:.1f}</th><th></th></tr>{lines}</table>")
    return "".join(parts)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark; --page: #ffffff; --text: #0f172a; --soft: #475569; --line: #e2e8f0;
         --before: #c2410c; --after: #1d4ed8 }}
 @media (prefers-color-scheme: dark) {{
  :root {{ --page: #0f172a; --text: #e2e8f0; --soft: #94a3b8; --line: #334155; --before: #fb923c; --after: #60a5fa }}
 }}
 body {{ font: 14px/1.45 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 2rem auto;
        max-width: 58rem; padding: 0 1rem }}
 h1 {{ font-size: 1.35rem; overflow-wrap: anywhere }} h2 {{ font-size: 1.05rem; margin-top: 2rem }}
 table {{ border-collapse: collapse; margin: .6rem 0 }} td, th {{ padding: .2rem .8rem .2rem 0; text-align: left }}
 td + td, th + td, th + th {{ text-align: right; font-variant-numeric: tabular-nums }}
 td:has(.bar) {{ text-align: left }}
 tr {{ border-bottom: 1px solid var(--line) }}
 svg {{ width: 100%; height: auto }} svg text {{ font-size: 11px; fill: var(--soft) }} .grid {{ stroke: var(--line) }}
 .key {{ margin-right: 1.2rem }} .key i {{ display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
   margin-right: .4rem }}
 .bar {{ display: inline-block; height: .7rem; background: var(--after) }}
 .pictures figure {{ display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; margin: .8rem 0 }}
 figcaption {{ grid-column: 1 / 3 }} figcaption, .note {{ color: var(--soft) }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
