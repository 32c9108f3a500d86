"""A program by itself: `sandbox.py` starts this file in a new interpreter, which gives up all it can, and then runs
what it is given. Nothing but the standard library is imported here. What holds it is in the kernel: see `confine`.
"""

import ctypes
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from typing import Any

# ---- seccomp: the system calls of computing, by number on x86-64 and on aarch64 (None: it has no such call)

_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "lseek": (8, 62),
    "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "pipe2": (293, 59),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96),
    "rseq": (334, 293), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getrandom": (318, 278),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165), "uname": (63, 160),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "poll": (7, None), "ppoll": (271, 73),
    "select": (23, None), "pselect6": (270, 72), "setitimer": (38, 103), "alarm": (37, None), "exit": (60, 93),
    "exit_group": (231, 94), "restart_syscall": (219, 128), "arch_prctl": (158, None),
}  # fmt: skip
_OPENING = {"open": (2, None, 1), "openat": (257, 56, 2)}  # and which argument has the flags: only to read
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
_ONLY_WITH: dict[str, tuple[int, int, int, tuple[int, ...]]] = {  # and an argument that is one of these
    "fcntl": (72, 25, 1, (0, 1, 2, 3, 1030)),  # descriptors copied, their flags asked
    "kill": (62, 129, 0, ()),  # () stands for this process
    "tgkill": (234, 131, 0, ()),
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _HAS, _RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: a word of the call's data, two comparisons, the verdict
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refused with EPERM


def filter_of(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The BPF program: (code, jump if true, jump if false, operand) each. Raises OSError for another machine."""
    if machine not in _AUDIT:
        raise OSError(f"no list of system calls for {machine}")
    column = list(_AUDIT).index(machine)
    # Data: the call's number at 0, the architecture at 4, arguments of 8 bytes from 16. Another architecture is killed.
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    for numbers in _CALLS.values():
        if numbers[column] is not None:
            program += [(_EQUAL, 0, 1, numbers[column] or 0), (_RETURN, 0, 0, _ALLOW)]
    for *opens, argument in _OPENING.values():
        number = opens[column]
        if number is not None:
            program += [
                (_EQUAL, 0, 4, number), (_LOAD, 0, 0, 16 + 8 * argument), (_HAS, 1, 0, _WRITING),
                (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE),
            ]  # fmt: skip
    for x86, arm, argument, values in _ONLY_WITH.values():
        tests = [step for v in values or (pid,) for step in ((_EQUAL, 0, 1, v), (_RETURN, 0, 0, _ALLOW))]
        program += [(_EQUAL, 0, len(tests) + 2, (x86, arm)[column]), (_LOAD, 0, 0, 16 + 8 * argument)]
        program += [*tests, (_RETURN, 0, 0, _REFUSE)]
    return [*program, (_RETURN, 0, 0, _REFUSE)]


# ---- Landlock: what files

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ALL = (
    1 << 13
) - 1  # what the first version of Landlock can refuse; later ones, and truncation, are refused by seccomp
_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every architecture


def _readable() -> dict[str, int]:
    """Python's own library and what it is linked with, but no installed packages: among them may be the answers. Each
    path with what may be done there: of these folders names may be listed, and what lies in them read."""
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    linked = {sys.base_prefix + "/lib", "/usr/lib", "/usr/lib64", "/lib", "/lib64"}
    rights = dict.fromkeys(("/etc/ld.so.cache", "/dev/null"), _READ_FILE)
    rights["/usr/share/zoneinfo"] = _READ_FILE | _READ_DIR
    for folder in {os.path.realpath(path) for path in python | linked if os.path.isdir(path)}:
        rights[folder] = _READ_DIR
        for entry in os.scandir(folder):
            # Python's own folder is one of these; a link would open what it leads to.
            packages = entry.name in ("site-packages", "dist-packages") or entry.name.startswith("python")
            if not entry.is_symlink() and not packages:
                rights.setdefault(entry.path, _READ_FILE | (_READ_DIR if entry.is_dir() else 0))
    return {path: right for path, right in rights.items() if os.path.exists(path)}


def _landlock(libc: Any) -> None:
    handled = struct.pack("Q", _ALL)
    ruleset = libc.syscall(_CREATE, handled, len(handled), 0)
    if ruleset < 0:
        raise OSError(f"Landlock is missing: {os.strerror(ctypes.get_errno())}")
    for path, rights in _readable().items():
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", rights, descriptor)
        if libc.syscall(_ADD, ruleset, 1, rule, 0) < 0:
            raise OSError(f"Landlock: {path}: {os.strerror(ctypes.get_errno())}")
        os.close(descriptor)
    if libc.syscall(_RESTRICT, ruleset, 0) < 0:
        raise OSError(f"Landlock: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _seccomp(libc: Any) -> None:
    code = filter_of(platform.machine(), os.getpid())
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    program = struct.pack("HP", len(code), ctypes.addressof(filters))
    if libc.prctl(22, 2, program, 0, 0) < 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(f"seccomp is missing: {os.strerror(ctypes.get_errno())}")


def confine(seconds: float, memory_bytes: int, open_files: int) -> None:
    """Gives up everything but computing, for good. Raises OSError naming what cannot be given up."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) < 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    processor = math.ceil(seconds)
    for which, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0), (resource.RLIMIT_FSIZE, 0, 0), (resource.RLIMIT_NOFILE, open_files, open_files),
        (resource.RLIMIT_CPU, processor, processor + 1), (resource.RLIMIT_AS, memory_bytes, memory_bytes),
    ):  # fmt: skip
        resource.setrlimit(which, (soft, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # of the clock, from here on; its signal ends the process
    _landlock(libc)
    _seccomp(libc)


def main() -> None:
    """Reads what to run from the standard input, and says on the standard output how it ended."""
    given = json.loads(sys.stdin.buffer.read())
    end: dict[str, str] = {"token": given["token"], "end": "failed"}
    out = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    try:
        confine(**given["limits"])
        exec(compile(given["program"], "<answer>", "exec"), {"__name__": "__main__"})
        end["end"] = "passed"
    except BaseException as error:  # SystemExit is no end that a program may choose
        end["why"] = f"{type(error).__name__}: {error}"[:500]
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(out, json.dumps(end).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
