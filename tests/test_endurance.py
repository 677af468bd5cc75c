"""Many runs, many threads, many sessions, a fork; and the same bytes whatever the number of threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnx_quarot as oq
import small_llama
from onnx_quarot.custom_op import add_hadamard


def one_node(path: Path, size: int) -> Path:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", size]))
    graph.inputs.append(x)
    model = ir.Model(graph, ir_version=10)
    node = add_hadamard(model, x, size=size, name="h")
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    ir.save(model, path)
    return path


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


RUNS = """
import sys
import numpy as np
import pytest
import onnx_quarot as oq
from test_endurance import resident

session = oq.session(sys.argv[1], threads=2)
x = np.ones((40, 1536), np.float32)
bad = np.ones((40, 1535), np.float32)

def runs(count):
    for number in range(count):
        session.run(None, {"x": x})
        oq.hadamard(x)
        if number % 50 == 0:  # errors are statuses that someone has to release
            with pytest.raises(Exception, match="1535"):
                session.run(None, {"x": bad})

runs(2000)
before = resident()
runs(10000)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_over_ten_thousand_runs(tmp_path: Path) -> None:
    # A process of its own: what other tests leave behind is handed back or reused while this one counts.
    path = one_node(tmp_path / "m.onnx", 1536)
    command = [sys.executable, "-c", RUNS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    # Less than 200 bytes a run, in a result of 240 KB.
    assert int(done.stdout) < 2 << 20


def test_eight_sessions_used_by_eight_threads(tmp_path: Path) -> None:
    path = one_node(tmp_path / "m.onnx", 576)
    sessions = [oq.session(path, threads=1 + i % 3) for i in range(8)]
    inputs = [np.random.default_rng(i).standard_normal((1 + 30 * i, 576)).astype(np.float32) for i in range(8)]
    expected = [oq.hadamard(x) for x in inputs]

    def work(i: int) -> None:
        for repeat in range(40):
            session = sessions[0] if repeat % 2 else sessions[(i + repeat) % 8]
            assert np.array_equal(session.run(None, {"x": inputs[i]})[0], expected[i])
            assert np.array_equal(oq.hadamard(inputs[i], threads=2), expected[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_after_import_works(tmp_path: Path) -> None:
    path = one_node(tmp_path / "m.onnx", 576)
    script = (
        "import os, sys, numpy as np, onnx_quarot as oq\n"
        "x = np.ones((300, 576), np.float32)\n"
        "expected = oq.hadamard(x, threads=2)\n"
        "child = os.fork()\n"
        "y = oq.hadamard(x, threads=2)\n"
        "assert np.array_equal(y, expected)\n"
        "assert np.array_equal(oq.session(sys.argv[1], threads=2).run(None, {'x': x})[0], expected)\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "else:\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=120)


def test_the_same_bytes_every_time_and_on_any_number_of_cores(tmp_path: Path) -> None:
    config = small_llama.Config(layers=1, heads=8, head_size=32, ffn=512, vocab=300)
    source = small_llama.save(tmp_path / "m.onnx", config)
    script = (
        "import os, sys, numpy as np, onnx_quarot as oq\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import small_llama\n"
        "if sys.argv[4] == '1' and hasattr(os, 'sched_setaffinity'):\n"
        "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        f"config = small_llama.{config}\n"
        "feeds = [small_llama.decoder_feeds(config, np.random.default_rng(i)) for i in range(20)]\n"
        "oq.rotate(sys.argv[2], sys.argv[3] + '/rotated.onnx', seed=3)\n"
        "for scheme in ('a8w8', 'a8w4-block', 'a8w8-dynamic'):\n"  # static ranges, GPTQ, packed panels
        "    oq.quantize(sys.argv[2], f'{sys.argv[3]}/{scheme}.onnx', feeds, scheme=scheme, seed=3)\n"
    )
    digests = set()
    for number, cores in enumerate(("1", "all", "all")):
        out = tmp_path / str(number)
        out.mkdir()
        # Another seed of str.__hash__ each time: no order may come from a set.
        subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), source, out, cores],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(number)},
        )
        digests.add(tuple((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(out.iterdir())))
        assert len(list(out.iterdir())) == 4
    assert len(digests) == 1
