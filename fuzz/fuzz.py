"""Feed hostile input to one target after the other for a while: `python fuzz/fuzz.py TARGET SECONDS [SEED]`.

Targets: model (mutated exports through load, discovery and rotation), operator (random nodes through ONNX Runtime),
gguf, config. Every input runs in a worker process with a limit on its memory. A finding is a crash, more than 10 s of
computing, more than 60 s of anything, an exception that is not this package's own, or a file outside the output folder:
then the exit code is 1, and the case's seed and the reason are printed. `python fuzz/fuzz.py TARGET 1 SEED` repeats it.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

import targets  # noqa: E402

SECONDS = 10.0  # of computing: a busy machine is no finding
WALL_SECONDS = 60.0
MEMORY = 6 << 30  # address space; the libraries alone map more than 2 GB
CASES_A_WORKER = 400


def work(connection: Connection, target: str) -> None:
    """Run cases as their seeds arrive; answer with what is wrong, or how the case ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    case = targets.TARGETS[target]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in" / "out").mkdir(parents=True)
        while True:
            seed = connection.recv()
            if seed is None:
                return
            try:
                answer = case(seed, folder / "in")
                stray = [p for p in folder.iterdir() if p.name != "in"] + list((folder / "in" / "out").glob(".*"))
                if stray:
                    answer = f"WRONG: files outside the output: {stray}"
            except MemoryError:
                answer = "refused MemoryError"
            except BaseException:
                answer = "WRONG: raised: " + "".join(traceback.format_exc().splitlines(True)[-12:])
            connection.send(answer)
            targets.clear(folder / "in")


def cpu_seconds(pid: int | None) -> float:
    """Time a process has computed for, all threads together."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Worker:
    """A process that is replaced when it dies."""

    def __init__(self, target: str) -> None:
        self.connection, theirs = mp.Pipe()
        context = mp.get_context("spawn")
        self.process = context.Process(target=work, args=(theirs, target), daemon=True)
        self.process.start()
        theirs.close()
        self.cases = 0

    def run(self, seed: int) -> str:
        self.connection.send(seed)
        self.cases += 1
        if self.cases == 1:
            self.connection.poll(2 * WALL_SECONDS)  # the first case imports everything
        start, before = time.monotonic(), cpu_seconds(self.process.pid)
        while not self.connection.poll(0.5):
            if cpu_seconds(self.process.pid) - before > SECONDS:
                return f"WRONG: no answer after {SECONDS:.0f} s of computing"
            if time.monotonic() - start > WALL_SECONDS:
                return f"WRONG: no answer after {WALL_SECONDS:.0f} s"
        try:
            return str(self.connection.recv())
        except EOFError:
            self.process.join()
            return f"WRONG: the process died with exit code {self.process.exitcode}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(target: str, seconds: float, seed: int = 0) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """How often the cases ended how, and the seeds of those that went wrong with the reason."""
    ends: dict[str, int] = {}
    findings: list[tuple[int, str]] = []
    worker, start = Worker(target), time.monotonic()
    while time.monotonic() - start < seconds and len(findings) < 20:
        answer = worker.run(seed)
        if answer.startswith("WRONG"):
            findings.append((seed, answer))
        if (answer.startswith("WRONG") and not answer.startswith("WRONG: raised")) or worker.cases >= CASES_A_WORKER:
            worker.stop()
            worker = Worker(target)
        ends[answer.split(":")[0]] = ends.get(answer.split(":")[0], 0) + 1
        seed += 1
    worker.stop()
    return ends, findings


def main() -> int:
    target, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends, findings = fuzz(target, seconds, seed)
    print(f"{target}: {sum(ends.values())} cases in {seconds:.0f} s, seeds from {seed}: {ends}")
    for number, reason in findings:
        print(f"--- seed {number}\n{reason}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
