"""Tests run beside each other on two cores: a second thread for models this small only gets in the way. Where there is
no GPU, Triton's kernels run through its interpreter, which must be asked for before anything imports Triton."""

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
