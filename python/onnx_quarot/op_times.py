"""Where a model's time goes, by operator, as ONNX Runtime's profiler counts it."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from onnx_quarot.custom_op import session as open_session


def op_times(
    model: Path, batch: Mapping[str, np.ndarray[Any, Any]], *, threads: int = 1, runs: int = 3
) -> dict[str, float]:
    """Milliseconds a run of each kind of operator, the longest first; the first run is not counted."""
    with tempfile.TemporaryDirectory(prefix="onnx-quarot-") as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = open_session(model, session_options=options, threads=threads)
        feeds = {i.name: batch[i.name] for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()][:1]  # not the copies of every cache
        for _ in range(runs + 1):
            session.run(outputs, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(kernels) // (runs + 1)
    totals: dict[str, float] = defaultdict(float)
    for event in kernels[per_run:]:
        totals[event["args"]["op_name"]] += event["dur"] / 1e3 / runs
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
