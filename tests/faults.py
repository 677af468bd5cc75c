"""Saving under kill -9. As a script: `python tests/faults.py [TRIALS]`, 200 by default."""

from __future__ import annotations

import collections
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import onnx_ir as ir

import small_llama
from onnx_quarot import save as saving
from onnx_quarot.load import load

# Saves its models over and over, so that a kill at a random moment hits a save.
SAVER = """
import sys, itertools
sys.path.insert(0, sys.argv[1])
import faults
from pathlib import Path
sources = [Path(p) for p in sys.argv[3:]]
faults.save_in_two_files(sources[0], Path(sys.argv[2]))
print("ready", flush=True)
for source in itertools.cycle(sources):
    faults.save_in_two_files(source, Path(sys.argv[2]))
"""


def save_in_two_files(source: Path, target: Path) -> None:
    """Save as models above 64 MB are: a file and its data."""
    with mock.patch.object(saving, "_SINGLE_FILE_BYTES", 0), saving.workspace(target) as folder:
        saving.stage(load(source), target, folder).publish(source)


def fingerprint(path: Path) -> str:
    """Of all weights of a model, read back from its files."""
    digest = hashlib.sha256()
    for name, value in sorted(load(path).graph.initializers.items()):
        assert value.const_value is not None
        digest.update(name.encode() + value.const_value.tobytes())
    return digest.hexdigest()


def kill_trials(folder: Path, trials: int, rng: random.Random) -> collections.Counter[str]:
    """Kill a process that saves to one path; check what is there; save once more and check that nothing else is.

    Returns how often the kill left a workspace behind (``killed``) or hit between two saves (``between``).
    """
    (folder / "out").mkdir()
    target = folder / "out" / "b.onnx"
    config = small_llama.Config(layers=4, heads=8, head_size=16, ffn=512, vocab=2000)
    sources = [small_llama.save(folder / f"a{seed}.onnx", config, seed) for seed in range(2)]
    whole = {fingerprint(source) for source in sources}
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(trials):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(Path(__file__).parent), str(target), *map(str, sources)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        assert fingerprint(target) in whole, "neither the old model nor the new one"
        left = [p.name for p in target.parent.iterdir() if p.name.endswith(".partial")]
        assert len(left) <= 1, f"what earlier processes left was not removed: {left}"
        outcomes["killed" if left else "between"] += 1
        save_in_two_files(sources[0], target)
        names = sorted(os.listdir(target.parent))
        data = {
            Path(v.const_value.path).name
            for v in load(target).graph.initializers.values()
            if isinstance(v.const_value, ir.ExternalTensor)
        }
        assert names == sorted({"b.onnx", *data}), f"left behind: {names}"
    return outcomes


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as place:
        print(dict(kill_trials(Path(place), count, random.Random(0))))
