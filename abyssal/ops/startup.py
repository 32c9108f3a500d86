"""Says what a first call is waiting for: kernels are compiled when they are first met, seconds each, then kept on disk.

Triton keeps compiled kernels by source, device, compiler version and constants, so a second start finds them. There is
no autotuning: block sizes are chosen by rules measured on an H100 (docs/kernels.md), and nothing is timed in a request.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SLOW = 1.0  # seconds of compiling in all from which it is worth a line


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[None]:
    """Within it, a line for each kernel compiled once compiling has taken SLOW seconds, and a sum at the end.

    `say` is given one line at a time. Does nothing where Triton isn't installed. Calls may be nested: the inner
    one tells, the outer one goes on after it.
    """
    try:
        from triton import knobs
    except ImportError:
        yield
        return
    kernels, total, began = 0, 0.0, 0.0

    def before(**told: Any) -> None:
        nonlocal began
        began = time.perf_counter()
        if total > SLOW:
            say(f"compiling {told['fn'].name.rpartition('.')[2]} ({kernels} kernels in {total:.0f} s so far)")

    def after(**told: Any) -> None:
        nonlocal kernels, total
        kernels, total = kernels + 1, total + time.perf_counter() - began

    kept = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = before, after
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = kept
        if total > SLOW:
            say(f"compiled {kernels} kernels in {total:.1f} s; they are kept on disk for the next start")
