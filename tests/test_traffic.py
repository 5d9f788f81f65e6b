"""What `benchmarks.traffic` counts."""

import torch
from torch import nn

from benchmarks.traffic import ByteCounter, Traffic, measure_traffic, write_table
from se_inject import inject
from tests import nets

MAP = 2 * 3 * 4 * 4 * 4
"""Bytes of a map (2, 3, 4, 4) of fp32."""


def test_inputs_and_outputs_of_operators_that_are_no_views_count():
    x = torch.randn(2, 3, 4, 4)
    with ByteCounter() as counter:
        (x.flatten(1)[:, :24] + 1).relu_()
    assert counter.count == MAP // 2 * 2 + MAP // 2 * 2


def test_parameters_and_what_has_one_storage_do_not_count_as_saved():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    found = measure_traffic(model, torch.randn(2, 3, 4, 4))
    # The norm has weight, bias, running mean and running variance.
    assert found.evaluation == 4 * MAP + 4 * 3 * 4
    # The norm keeps its input and the batch's mean and deviation, the ReLU its result.
    assert found.saved == 2 * MAP + 2 * 3 * 4


def test_blocks_cost_traffic_and_the_table_has_the_ratios():
    plain = nets.Residual(8)
    torch.manual_seed(0)
    images = torch.randn(2, 8, 16, 16)
    found = {"plain": measure_traffic(plain, images), "se-inject": measure_traffic(inject(plain, r=4), images)}
    assert found["se-inject"].training > found["plain"].training
    table = write_table({"resnet18": {**found, "timm": Traffic(*(2 * n for n in vars(found["plain"]).values()))}}, {})
    assert "| resnet18 (legacy_seresnet18) | timm | 2.000 | 2.000 | 2.000 |" in table
