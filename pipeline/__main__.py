"""The command `dllmc`: errors become one line on standard error and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from pipeline.cli import Invocation, group
from pipeline.errors import DllmcError, EnvironmentFault, WillNotFit
from pipeline.folder import STAGES

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 130
TERMINATED = 143
OUR_BUG = 1
SIGNAL_AGAIN_SECONDS = 0.05
PUBLISHING = ("export", *STAGES)

# Import name -> what installs it; only the runner's own packages come without an extra.
INSTALLED_BY = {
    **dict.fromkeys(("numpy", "onnxruntime", "tokenizers"), "dllmc"),
    **dict.fromkeys(
        ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors", "pydantic", "yaml"),
        "dllmc[export]",
    ),
    **dict.fromkeys(("huggingface_hub", "datasets"), "dllmc[hf]"),
    "matplotlib": "dllmc[study]",
    "ray": "dllmc[ray]",
    "jinja2": "dllmc[chat]",
}
# How libraries say in words what Python says with MemoryError and ENOSPC.
NO_MEMORY_WORDS = (
    "not enough memory",
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
)
NO_SPACE_WORDS = ("no space left on device", "os error 28", "disk quota exceeded")


class Terminated(BaseException):
    """SIGTERM arrived; unwinds like KeyboardInterrupt, so that nothing half-written stays."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    invocation = Invocation()
    arrived: list[type[BaseException]] = []
    with _signals_raise(arrived):
        try:
            return _run(arguments, invocation)
        except click.ClickException as fault:
            fault.show()
            return fault.exit_code
        except (KeyboardInterrupt, click.Abort):
            return _stopped(KeyboardInterrupt, invocation)
        except Terminated:
            return _stopped(Terminated, invocation)
        except Exception as fault:
            # Extension modules turn the exception of a signal into one of their own.
            return _stopped(arrived[-1], invocation) if arrived else _fail(fault, invocation)


def _run(arguments: Sequence[str] | None, invocation: Invocation) -> int:
    with warnings.catch_warnings(), _signals_not_lost():
        _quiet_libraries()
        result = group.main(arguments, prog_name="dllmc", standalone_mode=False, obj=invocation)
    return result if isinstance(result, int) else 0


def _stopped(kind: type[BaseException], invocation: Invocation) -> int:
    word, code = ("terminated", TERMINATED) if kind is Terminated else ("interrupted", INTERRUPTED)
    return _report(f"{word}{_left_behind(invocation)}", code)


def _left_behind(invocation: Invocation) -> str:
    if invocation.command == "study":
        return "; finished cells are kept, repeat the command to go on"
    return "; nothing was published, repeat the command to go on" if invocation.command in PUBLISHING else ""


@contextmanager
def _signals_raise(arrived: list[type[BaseException]]) -> Iterator[None]:
    """Raise for SIGTERM, and for SIGINT unless it is ignored; `arrived` keeps what was raised."""

    def raising(kind: type[BaseException]) -> Callable[[int, FrameType | None], None]:
        def handle(number: int, frame: FrameType | None) -> None:
            arrived.append(kind)
            raise kind

        return handle

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, raising(Terminated))}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, raising(KeyboardInterrupt))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _signals_not_lost() -> Iterator[None]:
    """Send a signal again whose exception Python dropped: torch has many weakref callbacks, where that happens."""
    numbers = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}
    pending: list[threading.Timer] = []
    before = sys.unraisablehook

    def hook(dropped: UnraisableHookArgs) -> None:
        number = numbers.get(dropped.exc_type)
        if number is None:
            before(dropped)
            return
        # Later, since now it would be raised in this hook and dropped with it.
        pending.append(threading.Timer(SIGNAL_AGAIN_SECONDS, os.kill, (os.getpid(), number)))
        pending[-1].daemon = True
        pending[-1].start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in pending:
            timer.cancel()


def _quiet_libraries() -> None:
    """Show our own notes, one line each, and none of the libraries' chatter."""
    warnings.simplefilter("ignore")
    clear = "\r\x1b[K" if sys.stderr.isatty() else ""
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR, format=f"{clear}%(message)s", force=True)
    logging.getLogger("pipeline").setLevel(logging.INFO)


def _fail(fault: BaseException, invocation: Invocation) -> int:
    if invocation.debug:
        traceback.print_exception(fault)
    known = as_known(fault)
    if known is not None:
        return _report(str(known), known.exit_code)
    return _report(
        f"internal error, a bug in dllmc: {type(fault).__name__}: {fault}; "
        f"repeat with --debug and report the traceback",
        OUR_BUG,
    )


def as_known(fault: BaseException) -> DllmcError | None:
    """What a library's exception, or the one that caused it, means to the user; None when it is our bug."""
    words = str(fault).lower()
    if isinstance(fault, DllmcError):
        return fault
    if isinstance(fault, MemoryError) or any(word in words for word in NO_MEMORY_WORDS):
        return WillNotFit("not enough memory; close other programs, or use a machine with more")
    if any(word in words for word in NO_SPACE_WORDS):
        return WillNotFit(f"the disk is full: {fault}; free some space and repeat")
    if isinstance(fault, OSError) and fault.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return EnvironmentFault(f"{fault.filename or 'a file'} is not accessible: {fault.strerror}")
    if isinstance(fault, ModuleNotFoundError):
        package = (fault.name or "").split(".")[0]
        if package in INSTALLED_BY:
            return EnvironmentFault(
                f"the package {package!r} is missing; install it with `pip install '{INSTALLED_BY[package]}'`"
            )
    return None if fault.__cause__ is None else as_known(fault.__cause__)


def _report(message: str, code: int) -> int:
    # Names from a model folder may hold terminal escapes; a message is one line of printable text.
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    print(f"dllmc: {text}", file=sys.stderr, flush=True)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
