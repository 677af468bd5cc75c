"""Many runs, many threads, many sessions, a fork; and the same bytes whatever the number of threads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_quarot as oq
import small_llama
from onnx_quarot.custom_op import DOMAIN
from onnx_quarot.qlinear import pack, pack_scales

COLUMNS = 48


def every_operator(path: Path, size: int) -> Path:
    """Every operator of the library on one input, [b, size]: outputs h, q, d, l8, l4 and what goes with them."""
    rng = np.random.default_rng(size)
    wide = rng.integers(-127, 128, (size, COLUMNS)).astype(np.int8)
    narrow = rng.integers(-8, 8, (size, COLUMNS)).astype(np.int8)
    constants = {
        "scale": np.array(0.05, np.float32),
        "zero": np.array(3, np.int8),
        "w8": pack(wide),
        "s8": rng.random(COLUMNS).astype(np.float32),
        "w4": pack(narrow, 64),
        "s4": pack_scales(rng.random((-(-size // 64), COLUMNS)).astype(np.float32)),
    }
    linear = {"K": size, "N": COLUMNS, "layout_version": 1}
    outputs = ("h", "q", "d", "d_scale", "l8", "l4")
    graph = helper.make_graph(
        [
            helper.make_node("Hadamard", ["x"], ["h"], domain=DOMAIN),
            helper.make_node("HadamardQuantizeLinear", ["x", "scale", "zero"], ["q"], domain=DOMAIN),
            helper.make_node("HadamardDynamicQuantizeLinear", ["x"], ["d", "d_scale"], domain=DOMAIN),
            helper.make_node("QLinear", ["x", "w8", "s8"], ["l8"], domain=DOMAIN, rotate=1, **linear),
            helper.make_node("QLinear", ["x", "w4", "s4"], ["l4"], domain=DOMAIN, bits=4, block=64, **linear),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", size])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    """Bit for bit."""
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


RUNS = """
import sys
import numpy as np
import pytest
import onnx_quarot as oq
from test_endurance import resident, same

session = oq.session(sys.argv[1], threads=2)
x = np.random.default_rng(0).standard_normal((20, 1536)).astype(np.float32)
bad = np.ones((20, 1535), np.float32)
expected = session.run(None, {"x": x})

def runs(count):
    for number in range(count):
        found = session.run(None, {"x": x})
        oq.hadamard(x)
        if number % 50 == 0:  # errors are statuses that someone has to release
            with pytest.raises(Exception, match="1535"):
                session.run(None, {"x": bad})
            assert same(found, expected)

runs(2000)
before = resident()
runs(10000)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_over_ten_thousand_runs(tmp_path: Path) -> None:
    # A process of its own: what other tests leave behind is handed back or reused while this one counts.
    path = every_operator(tmp_path / "m.onnx", 1536)
    command = [sys.executable, "-c", RUNS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    # Less than 200 bytes a run, in results of 160 KB.
    assert int(done.stdout) < 2 << 20


def test_eight_sessions_used_by_eight_threads(tmp_path: Path) -> None:
    path = every_operator(tmp_path / "m.onnx", 576)
    sessions = [oq.session(path, threads=1 + i % 3) for i in range(8)]
    inputs = [np.random.default_rng(i).standard_normal((1 + 30 * i, 576)).astype(np.float32) for i in range(8)]
    expected = [oq.session(path, threads=1).run(None, {"x": x}) for x in inputs]

    def work(i: int) -> None:
        for repeat in range(40):
            session = sessions[0] if repeat % 2 else sessions[(i + repeat) % 8]
            assert same(session.run(None, {"x": inputs[i]}), expected[i])
            assert np.array_equal(oq.hadamard(inputs[i], threads=2), expected[i][0])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_after_import_works(tmp_path: Path) -> None:
    path = every_operator(tmp_path / "m.onnx", 576)
    script = (
        "import os, sys, numpy as np, onnx_quarot as oq\n"
        "x = np.random.default_rng(0).standard_normal((300, 576)).astype(np.float32)\n"
        "expected = oq.hadamard(x, threads=2)\n"
        "child = os.fork()\n"
        "y = oq.hadamard(x, threads=2)\n"
        "assert np.array_equal(y, expected)\n"
        "results = [oq.session(sys.argv[1], threads=n).run(None, {'x': x}) for n in (1, 2)]\n"
        "assert np.array_equal(results[0][0], expected)\n"
        "assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "else:\n"
        "    os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True, timeout=120)


# Each with what could depend on the number of threads or the order of a set: static ranges, GPTQ in blocks, packed
# panels, layers chosen by measuring, ranges and codes of caches, rotations chosen by measuring.
RECIPES = """
    ("a8w8", {}),
    ("a16w8", {}),
    ("a8w8-block", {}),
    ("a8w4-block", {"weights": "gptq"}),
    ("a4w4", {"block": 64}),
    ("a8w8-dynamic", {}),
    ("a8w4-dynamic", {"weights": "gptq"}),
    ("a8w8", {"mixed": 0.3}),
    ("a8w8", {"kv_cache": "int8"}),
    ("a8w8", {"kv_cache": "int4"}),
    ("a8w8", {"seed": "search:2"}),
"""


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
        "feeds = [small_llama.decoder_feeds(config, np.random.default_rng(i)) for i in range(12)]\n"
        "oq.rotate(sys.argv[2], sys.argv[3] + '/rotated.onnx', seed=3)\n"
        f"for number, (scheme, options) in enumerate([{RECIPES}]):\n"
        "    options = {'seed': 3, **options}\n"
        "    oq.quantize(sys.argv[2], f'{sys.argv[3]}/{number}.onnx', feeds, scheme=scheme, **options)\n"
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
        assert len(list(out.iterdir())) == 12
    assert len(digests) == 1
