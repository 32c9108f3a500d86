"""Runs code that a model wrote, in a process that can compute and nothing else.

The process has no network, makes no other process or thread, writes no file and reads none but Python's own library;
its memory, its time and its answer are bounded. Linux holds it to that: seccomp lets through only the system calls that
computing needs, Landlock only the library's files, and rlimits the rest. Where one of them is missing nothing is run.
"""

import json
import secrets
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

JAIL = Path(__file__).with_name("jail.py")
SAID = 4096  # bytes of a verdict that are read


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 5.0  # by the clock; and of the processor, rounded up
    memory_bytes: int = 1 << 30  # of address space
    open_files: int = 32


@dataclass(frozen=True)
class Verdict:
    """How a program ended: `passed`, it came to its end; `failed`, it raised; `timeout`; `killed`, by a limit or by
    itself, before its end."""

    end: Literal["passed", "failed", "timeout", "killed"]
    why: str = ""


class Unsafe(ValueError):
    """This machine cannot hold a program; the message says what is missing."""


def run(program: str, limits: Limits | None = None) -> Verdict:
    """Runs a Python program that uses the standard library. Raises Unsafe where it cannot be held."""
    check()
    return _run(program, limits or Limits())


@cache
def check() -> None:
    """Raises Unsafe, with the reason, unless a program that tries to leave is held here."""
    if sys.platform != "linux":
        raise Unsafe(f"code is run only on Linux, where seccomp and Landlock hold it; this is {sys.platform}")
    verdict = _run(_ESCAPES, Limits())
    if verdict.end != "passed":
        raise Unsafe(f"code is not run: this machine does not hold it: {verdict.why or verdict.end}")


_ESCAPES = """
import os, socket
for name, leave in (
    ("the network", lambda: socket.socket()),
    ("another process", lambda: os.fork()),
    ("a file written", lambda: open("/tmp/abyssal-escape", "w")),
    ("a file read", lambda: open("/etc/passwd")),
):
    try:
        leave()
    except OSError:
        continue
    raise SystemExit("not held: " + name)
"""


def _run(program: str, limits: Limits) -> Verdict:
    token = secrets.token_hex(16)  # only the jail knows it: a program that ends itself early has not passed
    given = json.dumps({"program": program, "token": token, "limits": asdict(limits)}).encode()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(JAIL)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0"}, cwd="/", close_fds=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        try:
            process.stdin.write(given)
            process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            # The process ends itself in time, unless it turns the signal off.
            code = process.wait(2 * limits.seconds + 5)
        except subprocess.TimeoutExpired:
            return Verdict("timeout", f"longer than {limits.seconds:g} s")
        said = process.stdout.read(SAID)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    try:
        told = json.loads(said)
    except (ValueError, RecursionError):  # written by the program itself, which may write anything
        told = None
    if not isinstance(told, dict) or told.get("token") != token:
        if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):  # the last follows the first
            return Verdict("timeout", f"longer than {limits.seconds:g} s")
        return Verdict("killed", f"ended by itself or by a limit, with code {code}")
    return Verdict("passed") if told["end"] == "passed" else Verdict("failed", str(told.get("why", ""))[:500])
