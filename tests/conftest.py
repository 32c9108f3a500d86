"""Tests run beside each other on two cores: a second thread for models this small only gets in the way."""

import torch

torch.set_num_threads(1)
