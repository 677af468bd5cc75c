"""Ctrl-C for commands: heard at once, also while compiled code runs for a long time."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from onnx_quarot.partial import remove_live

_GRACE = 0.3  # seconds for Python to unwind by itself
EXIT_CODE = 130


@contextmanager
def prompt_interrupts() -> Iterator[None]:
    """Within, an interrupt ends the process in less than a second even if the main thread does not return to Python.

    Python hears of a signal when compiled code returns to it, which a run of a large model does after many seconds.
    The signal itself arrives at once, though, in the socket that is watched here. Work that was half done is removed.
    SIGTERM, with which machines stop a process, is treated as an interrupt. For the main thread of a command; in any
    other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    old_descriptor = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    over, ending = threading.Event(), threading.Event()
    threading.Thread(target=_watch, args=(reading, over, ending), daemon=True, name="interrupts").start()
    try:
        yield
    finally:
        over.set()
        if ending.is_set():
            threading.Event().wait()  # the process ends as it is
        signal.set_wakeup_fd(old_descriptor)
        signal.signal(signal.SIGTERM, old_handler)
        writing.close()


def _watch(reading: socket.socket, over: threading.Event, ending: threading.Event) -> None:
    with reading:
        while received := reading.recv(16):
            if {signal.SIGINT, signal.SIGTERM} & set(received) and not over.wait(_GRACE):
                ending.set()
                remove_live()
                print("error: interrupted", file=sys.stderr, flush=True)
                # The main thread is still at work: a second pass gets what it wrote meanwhile.
                time.sleep(0.05)
                remove_live()
                os._exit(EXIT_CODE)
