"""A wish to stop is heard once, however often it arrives at once; another one ends the process."""

import os
import signal
import time

import pytest

from abyssal.train import signals
from abyssal.train.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_wish_that_arrives_twice_is_one(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.received == number
    assert signal.getsignal(number) is before


def test_another_wish_ends_the_process_as_if_nothing_caught_it(monkeypatch):
    monkeypatch.setattr(signals, "SAME", 0.01)
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # the handler that was there before raises
