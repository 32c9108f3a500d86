"""One thread a test process: the models are tiny, and the cores belong to pytest's workers."""

import torch

torch.set_num_threads(1)
