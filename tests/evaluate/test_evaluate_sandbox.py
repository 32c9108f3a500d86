"""What a model wrote computes, and does nothing else: each way out, each limit, and what it means to pass."""

import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from abyssal.evaluate import sandbox
from abyssal.evaluate.jail import filter_of
from abyssal.evaluate.sandbox import Limits, Unsafe, Verdict, run

QUICK = Limits(seconds=1)

try:
    sandbox.check()
    held = True
except Unsafe as error:
    held, why = False, str(error)

needs_holding = pytest.mark.skipif(not held, reason="seccomp or Landlock is missing here")


def ends(program: str, limits: Limits = QUICK) -> Verdict:
    return run(textwrap.dedent(program), limits)


def done_of(actions: tuple[str, ...]) -> list[str]:
    """Those of the actions that a program could do, each tried in the same process."""
    program = f"""
        done = []
        for action in {actions!r}:
            try:
                exec(action, {{}})
                done.append(action)
            except Exception:
                pass
        assert not done, done
    """
    verdict = ends(program, Limits(seconds=10))
    if verdict.end == "passed":
        return []
    return [action for action in actions if repr(action) in verdict.why] or [verdict.why]


@needs_holding
def test_a_program_that_computes_passes_with_the_library_at_hand() -> None:
    program = """
        import collections, datetime, functools, hashlib, heapq, itertools, math, random, re, statistics, string, typing
        import ctypes, decimal, fractions, json, zoneinfo
        assert sum(math.gcd(a, b) for a, b in itertools.product(range(50), repeat=2)) > 2500
        assert re.sub(r"\\d", "x", "a1") == "ax" and hashlib.md5(b"a").hexdigest()[0] == "0"
        random.seed(3); random.random(); datetime.datetime.now(); print("said to nobody" * 100000)
    """
    assert ends(program) == Verdict("passed")


@needs_holding
@pytest.mark.parametrize(
    "program,why",
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"), ("1 / 0", "ZeroDivisionError"), ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"), ("import numpy", "ModuleNotFoundError"), ("f()", "NameError"),
        ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    ],
)  # fmt: skip
def test_a_program_that_raises_or_leaves_early_fails_and_says_why(program: str, why: str) -> None:
    verdict = ends(program)
    assert verdict.end == "failed" and verdict.why.startswith(why)


@needs_holding
def test_a_program_that_ends_itself_before_its_end_has_not_passed() -> None:
    assert ends("import os; os._exit(0)").end == "killed"
    for said in ('{"token": "", "end": "passed"}', "[]", "[" * 4000, "1", ""):
        assert ends(f"import os; os.write(3, {said.encode()!r}); os._exit(0)").end == "killed"
    assert ends("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").end == "killed"


@needs_holding
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_there_is_no_network(family: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert socket.create_connection(("127.0.0.1", port)).close() is None  # it can be reached from here
        verdict = ends(f"import socket; socket.socket(socket.{family}).connect(('127.0.0.1', {port}))")
    assert verdict.why.startswith("PermissionError")
    assert ends("import socket; socket.create_connection(('127.0.0.1', 9), 1)").why.startswith("PermissionError")


@needs_holding
def test_these_tests_would_see_what_is_not_refused() -> None:
    assert done_of(("1 / 0", "import os; os.getpid()", "x = 'y'")) == ["import os; os.getpid()", "x = 'y'"]


@needs_holding
def test_no_process_and_no_thread_is_made() -> None:
    """A fork bomb is one refusal."""
    assert ends("import os\nwhile True: os.fork()").why.startswith("PermissionError")
    actions = (
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])", "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import threading; threading.Thread(target=print).start()", "import multiprocessing as m; m.Process().start()",
        "import ctypes; assert ctypes.CDLL(None).fork() >= 0",
        "import ctypes; assert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) >= 0",
    )  # fmt: skip
    assert done_of(actions) == []


@needs_holding
def test_no_file_is_written_removed_or_changed_anywhere(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("kept")
    mine.chmod(0o644)
    before = mine.stat()
    library = Path(os.__file__).with_name("abyssal_test_file.py")
    actions = (
        f"open({str(tmp_path / 'new')!r}, 'w')", f"open({str(mine)!r}, 'a')", f"open({str(library)!r}, 'w')",
        f"import os; os.open({str(mine)!r}, os.O_RDONLY | os.O_TRUNC)", f"import os; os.remove({str(mine)!r})",
        f"import os; os.truncate({os.__file__!r}, 0)", f"import os; os.open({os.__file__!r}, os.O_TRUNC)",
        f"import os; os.rename({str(mine)!r}, {str(tmp_path / 'other')!r})", f"import os; os.chmod({str(mine)!r}, 0)",
        f"import os; os.mkdir({str(tmp_path / 'folder')!r})", f"import os; os.utime({str(mine)!r}, (1, 1))",
        f"import os; os.symlink('/', {str(tmp_path / 'link')!r})", "import tempfile; tempfile.TemporaryFile()",
        "open('/dev/shm/abyssal', 'w')", "import os; os.memfd_create('hog')",
    )  # fmt: skip
    assert done_of(actions) == []
    assert os.listdir(tmp_path) == ["mine"] and mine.read_text() == "kept" and not library.exists()
    assert (mine.stat().st_mode, mine.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert Path(os.__file__).stat().st_size > 0


@needs_holding
def test_no_file_but_the_librarys_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for path in (tmp_path / "secret", "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ", __file__):
        assert ends(f"print(open({str(path)!r}).read())").why.startswith("PermissionError"), path
    assert ends(f"import os; assert os.listdir({str(tmp_path)!r})").end == "failed"
    packages = Path(os.__file__).parent
    for folder in (packages / "site-packages", packages / "dist-packages", Path("/usr/lib/python3/dist-packages")):
        for file in list(folder.rglob("*.py"))[:3]:  # of an installed package, which may hold the answers
            assert ends(f"open({str(file)!r}).read()").why.startswith("PermissionError"), file
    assert ends("import os; assert set(os.environ) <= {'PYTHONHASHSEED', 'LC_CTYPE'}, dict(os.environ)").end == "passed"


@needs_holding
def test_others_are_not_signalled_traced_or_limited() -> None:
    actions = (
        f"import os; os.kill({os.getpid()}, 0)", "import os; os.kill(0, 9)", "import os; os.kill(-1, 0)",
        f"import os; os.sched_setaffinity({os.getpid()}, [0])", "import os; os.nice(1)",
        f"import resource as r; r.prlimit({os.getpid()}, r.RLIMIT_NOFILE)",
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
        f"import os, fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {os.getpid()})",
        f"import ctypes; assert ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0",
        "import ctypes; assert ctypes.CDLL(None).unshare(0x10000000) == 0",
    )  # fmt: skip
    assert done_of(actions) == []


@needs_holding
@pytest.mark.parametrize(
    "program", ["x = [0] * (1 << 30)", "x = bytearray(1 << 31)", "x = []\nwhile 1: x += [[0] * 9999]"]
)
def test_memory_is_bounded(program: str) -> None:
    verdict = ends(program, Limits(seconds=5, memory_bytes=256 << 20))
    assert verdict.end == "failed" and verdict.why.startswith("MemoryError")


@needs_holding
def test_open_files_are_bounded() -> None:
    verdict = ends("import os\nwhile True: os.dup(0)")
    assert verdict.why.startswith("OSError: [Errno 24]")


@needs_holding
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "try:\n    while True: pass\nexcept BaseException: pass\nwhile True: pass",
        "import signal\nfor s in (14, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')",
    ],
)
def test_time_is_bounded_whatever_a_program_does_about_it(program: str) -> None:
    started = time.monotonic()
    assert ends(program, Limits(seconds=0.5)).end == "timeout"
    assert time.monotonic() - started < 20


@needs_holding
def test_a_program_deaf_to_signals_that_sleeps_is_killed_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(60)"
    monkeypatch.setattr(subprocess.Popen, "wait", shortened(subprocess.Popen.wait, 1.0))
    assert ends(program, Limits(seconds=0.1)).end == "timeout"


def shortened(wait, most: float):
    return lambda self, timeout=None: wait(self, timeout if timeout is None else min(timeout, most))


@needs_holding
def test_what_it_says_is_bounded() -> None:
    assert len(ends("raise ValueError('é' * 1000000)").why) <= 500
    assert ends("import os\nwhile True: os.write(3, b'x' * 4096)", Limits(seconds=0.5)).end == "timeout"


def test_where_nothing_holds_a_program_none_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of the two missing: an interpreter that says so stands for a kernel without it."""
    sandbox.check.cache_clear()
    try:
        loose = tmp_path / "loose.py"
        source = sandbox.JAIL.read_text()
        for missing in ("_landlock(libc)", "_seccomp(libc)"):
            loose.write_text(source.replace(f"    {missing}\n", "    pass\n"))
            monkeypatch.setattr(sandbox, "JAIL", loose)
            with pytest.raises(Unsafe, match="not held: "):
                run("pass")
        loose.write_text(source.replace("_CREATE, _ADD, _RESTRICT = 444", "_CREATE, _ADD, _RESTRICT = 9999"))
        with pytest.raises(Unsafe, match="Landlock is missing: Function not implemented"):
            run("pass")
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(Unsafe, match="only on Linux"):
            run("pass")
    finally:
        sandbox.check.cache_clear()


def test_a_machine_whose_calls_are_not_listed_is_refused() -> None:
    with pytest.raises(OSError, match="no list of system calls for riscv64"):
        filter_of("riscv64", 1)
    assert len(filter_of("x86_64", 1)) < 4096 and len(filter_of("aarch64", 1)) < 4096
    assert platform.machine() in ("x86_64", "aarch64")
