"""Stopping on request: SIGUSR1 or SIGTERM ends a stage with exit code 75, and started again it goes on.

What a request does depends on what is under way:

    work of one process          `Interrupted` is raised in the main thread, wherever that is
    the start of several ranks   the process leaves at once, even out of native code that waits for another rank (`leave_at_once`)
    a loop that saves            it is noted, and the loop asks for it at the end of each step (`defer`, `request`)

The first request stands, and later ones change nothing. SIGUSR2 prints the stacks of all threads, and changes nothing either.
A forked process is not asked: to it the signals mean what they usually do. A program that serves a stage calls
`leave_to_parent`: a scheduler sends its signals to all processes of a job, and the stage still needs it to finish a step.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from megatron_ext.errors import EXIT_AGAIN, Interrupted

REQUESTS = (signal.SIGUSR1, signal.SIGTERM)


@dataclass
class _Listener:
    """What this process does about a request, and the first that came."""

    listens: bool = False
    heeds: Literal["raise", "leave", "defer"] = "raise"
    request: str = ""  # the name of its signal
    last_words: Callable[[str], None] = lambda _: None


_listener = _Listener()


def listen() -> None:
    """From here on the signals mean what is said above; SIGUSR2 prints to standard error as it is now. For the main thread.

    What this process does about a request is, at first, to raise `Interrupted`.
    """
    if _listener.listens:
        return
    _listener.listens = True
    for number in REQUESTS:
        signal.signal(number, _take)
    faulthandler.register(signal.SIGUSR2, file=os.dup(2), all_threads=True)
    os.register_at_fork(after_in_child=_forget)


def leave_at_once(last_words: Callable[[str], None] = lambda _: None) -> None:
    """From here on a request ends this process within moments, with `EXIT_AGAIN`; `last_words` of it are said first.

    A thread of its own sees to that: the main one may wait in native code for ranks that will never come.
    """
    _listener.last_words = last_words
    if _listener.heeds == "leave":
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # the number of each signal, whatever the main thread does
    _listener.heeds = "leave"
    threading.Thread(target=_leave_when_asked, args=(reader,), name="requests", daemon=True).start()


def defer() -> None:
    """From here on requests are only noted: what runs asks for them where it can stop."""
    _listener.heeds = "defer"


@contextlib.contextmanager
def held() -> Iterator[Callable[[], None]]:
    """A request that comes in here is only noted, until the function that this gives is called: that raises it, and ends the holding."""
    before = _listener.heeds
    if before == "raise":
        _listener.heeds = "defer"

    def let_go() -> None:
        _listener.heeds = before
        if before == "raise":
            check()

    try:
        yield let_go
    finally:
        _listener.heeds = before


def check() -> None:
    """Raise `Interrupted` where a request has come."""
    if _listener.request:
        raise Interrupted(f"asked to stop ({_listener.request}); what was finished is kept, and the same command goes on from there")


def leave_to_parent() -> None:
    """In a program that works for a stage and ends when that does: requests are the stage's to answer, and stacks are not shown."""
    for number in (*REQUESTS, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def ignore() -> None:
    """From here on requests change nothing, to the very end of this process: its result stands.

    The interpreter, when it ends, gives a signal with a handler of Python's its usual meaning again, and to end takes it a while.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def request() -> str:
    """The name of the first request's signal; '' where there was none."""
    return _listener.request


def _take(number: int, _: FrameType | None) -> None:
    if _listener.request:
        return
    _listener.request = signal.Signals(number).name
    if _listener.heeds == "raise":
        check()


def _leave_when_asked(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in REQUESTS and _listener.heeds == "leave":
                try:
                    _listener.last_words(signal.Signals(number).name)
                finally:
                    os._exit(EXIT_AGAIN)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
