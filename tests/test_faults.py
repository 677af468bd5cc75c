"""Processes that are killed, disks that are full, and Ctrl-C: the old model or the new one, nothing else."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import faults
import small_llama
from onnx_quarot import partial
from onnx_quarot.save import workspace

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")


def hear_interrupts() -> None:
    """Shells start what runs in the background deaf to SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_killed_save_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    outcomes = faults.kill_trials(tmp_path, 8, random.Random(1))
    assert sum(outcomes.values()) == 8
    assert outcomes["killed"] >= 1, f"hardly a kill hit a save: {outcomes}"


@pytest.mark.parametrize("target_exists", [False, True])
@pytest.mark.parametrize("moment", ["announced", "moved"])
def test_a_data_file_without_its_model_goes_with_the_next_save(
    tmp_path: Path, target_exists: bool, moment: str
) -> None:
    target = tmp_path / "b.onnx"
    if target_exists:
        faults.save_in_two_files(small_llama.save(tmp_path / "a.onnx"), target)
    before = {p.name for p in tmp_path.iterdir()}
    name = "b.onnx.1.data" if target_exists else "b.onnx.data"
    folder, lock = partial.claim(target)
    (folder / target.name).write_bytes(b"model")
    (folder / name).write_bytes(b"weights")
    partial.announce(folder, name)
    if moment == "moved":
        (folder / name).rename(tmp_path / name)
    os.close(lock)  # as the death of the process does
    with workspace(target):
        pass
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("again", [False, True], ids=["as it was", "another of its name"])
def test_the_data_of_a_model_that_was_replaced_goes_with_the_next_save(tmp_path: Path, again: bool) -> None:
    """A kill between the new model's rename and the end of the old one's data."""
    target, source = tmp_path / "b.onnx", small_llama.save(tmp_path / "a.onnx")
    faults.save_in_two_files(source, target)
    folder, lock = partial.claim(target)
    for name in ("b.onnx", "b.onnx.1.data"):
        (folder / name).write_bytes(b"new")
    partial.announce(folder, "b.onnx.1.data", [tmp_path / "b.onnx.data"])
    for name in ("b.onnx.1.data", "b.onnx"):
        (folder / name).replace(tmp_path / name)
    os.close(lock)
    if again:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(tmp_path / "b.onnx.data")
    with workspace(target):
        pass
    left = {"a.onnx", "b.onnx", "b.onnx.1.data", *(["b.onnx.data"] if again else [])}
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize("moment", ["announced", "data moved", "model moved"])
def test_what_a_process_removes_that_ends_in_the_middle(tmp_path: Path, moment: str) -> None:
    target = tmp_path / "b.onnx"
    folder, lock = partial.claim(target)
    (folder / target.name).write_bytes(b"model")
    (folder / "b.onnx.data").write_bytes(b"weights")
    partial.announce(folder, "b.onnx.data")
    for name in {"announced": [], "data moved": ["b.onnx.data"], "model moved": ["b.onnx.data", "b.onnx"]}[moment]:
        (folder / name).rename(tmp_path / name)
    partial.remove_live()
    os.close(lock)
    whole = ["b.onnx", "b.onnx.data"] if moment == "model moved" else []
    assert sorted(os.listdir(tmp_path)) == whole


def test_the_work_of_a_living_process_stays(tmp_path: Path) -> None:
    with workspace(tmp_path / "b.onnx") as one:
        (one / "half").write_bytes(b"x")
        with workspace(tmp_path / "b.onnx") as other:
            assert other != one
            assert (one / "half").read_bytes() == b"x"
        with workspace(tmp_path / "c.onnx"):
            assert one.is_dir()
    assert os.listdir(tmp_path) == []


def test_files_of_others_are_not_taken_for_abandoned_work(tmp_path: Path) -> None:
    names = [".b.onnx.partial", ".b.onnx.old.partial", ".b2onnx.abcdefgh.partial", "b.onnx.data", ".b.onnx.data"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".b.onnx.abcdefgh.partial").write_bytes(b"a file")
    with workspace(tmp_path / "b.onnx"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*names, ".b.onnx.abcdefgh.partial"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def command(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_quarot.cli", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, **options,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


BIG = small_llama.Config(heads=8, head_size=16, ffn=512, vocab=2000)  # 3 MB


def test_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx", BIG)
    small_llama.save(small_disk / "b.onnx")
    before = (small_disk / "b.onnx").read_bytes()
    done = command("rotate", source, small_disk / "b.onnx")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: output: writing")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(small_disk) == ["b.onnx"]
    assert (small_disk / "b.onnx").read_bytes() == before


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx", BIG)
    (tmp_path / "out").mkdir()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = command("rotate", source, tmp_path / "out" / "b.onnx", preexec_fn=limit)
    assert done.returncode == 1
    assert "error: output: writing" in done.stderr
    assert os.listdir(tmp_path / "out") == []


def test_an_unwritable_folder(tmp_path: Path) -> None:
    source = small_llama.save(tmp_path / "a.onnx")
    place = tmp_path / "out"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        immutable = subprocess.run(["chattr", "+i", str(place)], capture_output=True)
        if immutable.returncode:
            pytest.skip("this user may write everywhere")
    try:
        done = command("rotate", source, place / "b.onnx")
    finally:
        subprocess.run(["chattr", "-i", str(place)], capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: output: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(place) == []


def test_external_data_that_is_cut_while_saving(tmp_path: Path) -> None:
    """The file shrinks after it was checked, under the memory map: an error, not a crash, and the old output stays."""
    source = small_llama.save(tmp_path / "a.onnx", BIG, external=True)
    target = small_llama.save(tmp_path / "b.onnx")
    before = target.read_bytes()
    script = (
        "import os, sys, onnx_quarot as oq\n"
        "from onnx_quarot import pipeline\n"
        "original = pipeline.rotate_model\n"
        "def cut(model, plan):\n"
        "    original(model, plan)\n"
        "    os.truncate(sys.argv[1] + '.data', 5000)\n"
        "pipeline.rotate_model = cut\n"
        "try:\n"
        "    oq.rotate(sys.argv[1], sys.argv[2])\n"
        "except oq.OnnxQuarotError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, source, target], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ModelError model: external data")
    assert "\n" not in done.stdout.strip()
    assert sorted(os.listdir(tmp_path)) == ["a.onnx", "a.onnx.data", "b.onnx"]
    assert target.read_bytes() == before


CUT_WHILE_MAPPED = """
import os, sys
from onnx_quarot import cli, evaluation, pipeline, verify
place, source = sys.argv.pop(1), sys.argv[2]

def cut_after(module, name, then=lambda result: None):
    original = getattr(module, name)
    def patched(*arguments, **options):
        result = original(*arguments, **options)
        then(result)
        os.truncate(source + ".data", 4096)
        return result
    setattr(module, name, patched)

if place == "weights":  # mapped as they are read; the cut comes before they are written
    cut_after(pipeline, "load", lambda model: [v.const_value.numpy() for v in model.graph.initializers.values()])
elif place == "verification":
    cut_after(verify, "session")
else:
    cut_after(evaluation, "open_session")
cli.main()
"""


@pytest.mark.parametrize("place", ["weights", "verification", "evaluation"])
def test_external_data_that_is_cut_under_a_memory_map(tmp_path: Path, place: str) -> None:
    """The system would end the process at the first byte that is missing, ours or ONNX Runtime's to read."""
    source = small_llama.save(tmp_path / "a.onnx", BIG, external=True)
    (tmp_path / "out").mkdir()
    target = small_llama.save(tmp_path / "out" / "b.onnx", BIG)
    before = target.read_bytes()
    feeds = small_llama.decoder_feeds(BIG, np.random.default_rng(0))
    np.savez(tmp_path / "data.npz", **feeds)
    arguments = {
        "weights": ["rotate", source, target],
        "verification": ["rotate", source, target],
        "evaluation": ["evaluate", source, target, "--data", tmp_path / "data.npz"],
    }[place]
    done = subprocess.run(
        [sys.executable, "-c", CUT_WHILE_MAPPED, place, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("error: model: external data was cut off")
    assert os.listdir(tmp_path / "out") == ["b.onnx"]
    assert target.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("where", ["compiled code", "Python"])
def test_an_interrupt_ends_a_command_soon_and_cleans_up(tmp_path: Path, number: signal.Signals, where: str) -> None:
    """In compiled code that does not return for long, the main thread never hears of it."""
    source = small_llama.save(tmp_path / "a.onnx")
    (tmp_path / "out").mkdir()
    wait = {
        "compiled code": "ctypes.CDLL(None).sleep(30)",
        "Python": "import time; time.sleep(30)",
    }[where]
    script = (
        "import ctypes, sys\n"
        "from onnx_quarot import cli, pipeline\n"
        "def busy(*arguments, **options):\n"
        "    print('busy', flush=True)\n"
        "    " + wait + "\n"
        "pipeline.verify_model = busy\n"
        "cli.main()\n"
    )
    arguments = ["rotate", str(source), str(tmp_path / "out" / "b.onnx")]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "busy\n"
        assert len(os.listdir(tmp_path / "out")) == 1
        start = time.monotonic()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
        assert time.monotonic() - start < 10  # of the 30 it would have taken; a second, on a machine that is not busy
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "error: interrupted"
    assert os.listdir(tmp_path / "out") == []


def test_the_trials_see_a_broken_model(tmp_path: Path) -> None:
    """The check of the trials is worth something: it fails for a model whose data is another's."""
    faults.save_in_two_files(small_llama.save(tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert faults.fingerprint(tmp_path / "b.onnx") == faults.fingerprint(tmp_path / "a.onnx")
    data = tmp_path / "b.onnx.data"
    content = np.fromfile(data, np.uint8)
    content[: len(content) // 2] = 0
    content.tofile(data)
    assert faults.fingerprint(tmp_path / "b.onnx") != faults.fingerprint(tmp_path / "a.onnx")
