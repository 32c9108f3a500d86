"""The decoding step, compiled: on a CPU that is what lets it read the weights at the speed of memory."""

import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from abyssal.files import cache_folder
from abyssal.source import code_digest

Result = TypeVar("Result")
Step = Callable[..., Result]


def can_compile(device: torch.device) -> bool:
    """Whether a step can be compiled here: for a CPU, that takes a C++ compiler and Python's headers."""
    if device.type != "cpu":
        return False
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return headers.is_file() and any(shutil.which(name) for name in ("g++", "clang++", "c++"))


class Compiled:
    """`step`, compiled once for each shape of its arguments. What is made is kept on disk, in the user's cache
    folder, so that the next process starts in seconds."""

    def __init__(self, step: Step[Result], say: Callable[[str], None]) -> None:
        # torch reads where to keep what it makes from here alone.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        # The wrapper in C++ launches the step's kernels in half the time that the one in Python takes.
        self._step = torch.compile(step, dynamic=False, fullgraph=True, options={"cpp_wrapper": True})
        self._say = say
        self._known: set[tuple[object, ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        shapes = tuple(tuple(a.shape) for a in arguments if isinstance(a, Tensor))
        if shapes in self._known:
            # Everything else that a guard would look at is fixed by whoever made this step.
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
                return self._step(*arguments)
        self._say("compiling the decoding step (the first time takes a minute; it is kept on disk) ...")
        started = time.perf_counter()
        # torch's key for what lies on disk does not cover our operations, which it calls by their signatures.
        with torch.compiler.config.patch(cache_key_tag=f"abyssal-{code_digest('ops')}"):  # type: ignore[attr-defined]
            result = self._step(*arguments)
        self._say(f"compiled in {time.perf_counter() - started:.0f} s")
        self._known.add(shapes)
        return result
