"""Kernels run through Triton's interpreter here, on CPU tensors; where there is a GPU the same operations are left to
`tests/gpu`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="package")
def integers_from_arrays() -> Iterator[None]:
    """Triton's interpreter turns an array of one element into an int (a loop's bound), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield
