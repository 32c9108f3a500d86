"""Learning rate, MTP weight and bias speed at steps worked out by hand."""

import pytest

from abyssal.train import TrainConfig
from abyssal.train.schedule import bias_speed, learning_rate, mtp_weight


def config(**changes):
    base = {"model": "tiny", "out": "run", "steps": 100, "lr": 1.0, "warmup_steps": 10, "decay_fraction": 0.4}
    return TrainConfig.of(base | {"final_lr": 0.2} | changes)


@pytest.mark.parametrize(
    ("decay", "step", "rate"),
    [
        ("cosine", 1, 0.1),
        ("cosine", 10, 1.0),
        ("cosine", 60, 1.0),
        ("cosine", 70, 0.2 + 0.8 * (1 + 2**-0.5) / 2),  # a quarter down: cos(pi/4)
        ("cosine", 80, 0.6),
        ("cosine", 100, 0.2),
        ("linear", 70, 0.8),
        ("linear", 100, 0.2),
        ("sqrt", 70, 0.6),  # 1 - sqrt(1/4)
        ("sqrt", 100, 0.2),
    ],
)
def test_learning_rate(decay, step, rate):
    assert learning_rate(config(decay=decay), step) == pytest.approx(rate, abs=1e-12)


def test_without_warm_up_or_decay_the_rate_is_constant():
    constant = config(warmup_steps=0, decay_fraction=0)
    assert {learning_rate(constant, step) for step in range(1, 101)} == {1.0}


def test_mtp_weight_falls_for_the_last_third():
    weights = [mtp_weight(config(steps=90), step) for step in range(1, 91)]
    assert weights == [0.3] * 60 + [0.1] * 30


def test_biases_stand_still_at_the_end():
    speeds = [bias_speed(config(bias_freeze_fraction=0.05), step) for step in range(1, 101)]
    assert speeds == [0.001] * 95 + [0.0] * 5
