"""What a user asks for while runs follow each other."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from se_inject import experiment
from se_inject.errors import TrainingError
from se_inject.experiment import run_experiment
from se_inject.signals import Signals
from se_inject.world import World


def test_a_wish_that_comes_in_a_runs_last_moments_is_there_in_the_next():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as all_runs:
        with Signals() as run:
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.is_asked
            assert not all_runs.is_asked
        assert all_runs.is_asked
        with Signals() as run:
            assert run.is_asked
    assert signal.getsignal(signal.SIGTERM) is before
    with Signals() as later:
        assert not later.is_asked


def test_while_there_is_nothing_to_lose_a_wish_is_fulfilled_at_once():
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt), signals.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.is_asked
        with pytest.raises(KeyboardInterrupt), signals.at_once():
            pass


def test_the_second_run_does_not_begin(tmp_path, monkeypatch):
    begun = []

    def run_arm(wanted, arm, *rest):
        begun.append(arm)
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
        return arm, torch.nn.Identity()

    monkeypatch.setattr(experiment, "_run_arm", run_arm)
    data = SimpleNamespace(write_split=lambda folder: None)
    request = SimpleNamespace(
        folder=tmp_path, resume=False, runs=[(0, "se"), (0, "control")], recipe=SimpleNamespace(to_values=dict)
    )
    wanted = SimpleNamespace(request=request, data=data)
    with pytest.raises(TrainingError, match="stopped after 1 of 2 runs; the same command with --resume goes on"):
        run_experiment(wanted, World(torch.device("cpu")))
    assert begun == ["se"]
    request.runs.pop()
    assert run_experiment(wanted, World(torch.device("cpu")))[0] == ["se"]  # it is done all the same
