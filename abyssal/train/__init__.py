"""Pretraining (DeepSeek-V3, sections 2.1.2, 2.2 and 4.2): `train` takes a `TrainConfig` and leaves a model.

`trainer.py` is one optimizer step, `loop.py` the run around it, `loss.py` what is minimised.
"""

from abyssal.train.config import TrainConfig, run_names
from abyssal.train.diagnose import NotFinite
from abyssal.train.loop import RunResult, train
from abyssal.train.metrics import read_metrics

__all__ = ["NotFinite", "RunResult", "TrainConfig", "read_metrics", "run_names", "train"]
