"""What changes over a run: the learning rate, the weight of the MTP loss, the speed of the router biases.

DeepSeek-V3, section 4.2. Steps count from 1 to `config.steps`, the number of the update they lead to.
"""

import math

from abyssal.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rises linearly to `lr`, which update `warmup_steps` is the first to have, stays, and falls to `final_lr`,
    which the last update has."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    falling = round(config.steps * config.decay_fraction)
    progress = (step - (config.steps - falling)) / falling if falling else 0.0
    if progress <= 0:
        return config.lr
    left = {
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),  # Hägele et al. 2024
    }[config.decay]
    return config.final_lr + (config.lr - config.final_lr) * left


def mtp_weight(config: TrainConfig, step: int) -> float:
    """λ of equation 25: one weight, and a smaller one towards the end."""
    return config.mtp_weight_late if _in_last(config, step, config.mtp_late_fraction) else config.mtp_weight


def bias_speed(config: TrainConfig, step: int) -> float:
    """γ of the auxiliary-loss-free update (section 2.1.2); 0 at the end, so that the last steps are trained for the
    routing that the model keeps."""
    return 0.0 if _in_last(config, step, config.bias_freeze_fraction) else config.bias_speed


def _in_last(config: TrainConfig, step: int, fraction: float) -> bool:
    return step > config.steps - round(config.steps * fraction)
