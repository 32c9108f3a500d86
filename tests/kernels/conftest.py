"""Kernels run through Triton's interpreter here, on CPU tensors. It must be asked for before Triton is imported; where
there is a GPU the same tests are left to `tests/gpu`."""

import os

import pytest
import torch

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton")
