"""Methods of `nn.Module` that are another one for a while."""

import pytest
import torch
from torch import nn

from se_inject import inject, optimize
from se_inject.errors import EmptyPlanError
from se_inject.interception import intercepted, intercepting
from tests import nets

NAMES = "__call__", "__setattr__", "__getattr__", "train"


def get_methods():
    return [vars(nn.Module)[name] for name in NAMES]


def test_a_function_is_called_for_the_method_of_every_module():
    seen = []

    def call(original, module, /, *args, **kwargs):
        seen.append((module, args, kwargs))
        return original(module, *args, **kwargs) + 1

    before, layer, x = get_methods(), nn.ReLU(), -torch.ones(2)
    with intercepted("__call__", call):
        assert layer(x).tolist() == [1, 1]
        assert layer(input=x).tolist() == [1, 1]
    assert seen == [(layer, (x,), {}), (layer, (), {"input": x})]
    assert get_methods() == before
    assert layer(x).tolist() == [0, 0]


def test_the_innermost_is_asked_first():
    def add(original, module, *args):
        return original(module, *args) + 1

    def double(original, module, *args):
        return 2 * original(module, *args)

    layer, x = nn.Identity(), torch.ones(1)
    with intercepted("__call__", add):
        with intercepted("__call__", double):
            assert layer(x) == 4
        assert layer(x) == 2
    assert layer(x) == 1


def test_a_method_that_was_set_stays_for_as_long_as_the_outermost_context():
    before = get_methods()
    with intercepting():
        with intercepted("train", lambda original, module, mode=True: None):
            assert nn.ReLU().train() is None
        during = get_methods()
        assert isinstance(nn.ReLU().train(), nn.ReLU)
        with intercepted("train", lambda original, module, mode=True: None), intercepting():
            assert get_methods() == during
        assert get_methods() == during != before
    assert get_methods() == before


def test_methods_are_as_before_after_an_error():
    before = get_methods()
    with pytest.raises(ZeroDivisionError), intercepting(), intercepted("__setattr__", lambda *args: 1 / 0):
        nn.ReLU()
    assert get_methods() == before


def test_nothing_of_an_injection_stays_in_torchs_modules():
    before = get_methods()
    optimize(inject(nets.TwoBranches()).eval())
    with pytest.raises(EmptyPlanError):
        inject(nn.Linear(2, 2), example=torch.ones(1, 2))
    assert get_methods() == before
