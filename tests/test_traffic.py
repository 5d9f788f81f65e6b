"""What `benchmarks.traffic` counts."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks import traffic
from benchmarks.traffic import Row, write_table
from se_inject import inject
from se_inject.traffic import ByteCounter, measure_traffic
from tests import nets

MAP = 2 * 3 * 4 * 4 * 4
"""Bytes of a map (2, 3, 4, 4) of fp32."""


def test_inputs_and_outputs_of_operators_that_are_no_views_count():
    x = torch.randn(2, 3, 4, 4)
    with ByteCounter() as counter:
        (x.flatten(1)[:, :24] + 1).relu_()
    assert counter.count == MAP // 2 * 2 + MAP // 2 * 2


def test_memory_that_is_only_asked_for_and_views_by_another_name_do_not_count():
    x = torch.randn(2, 3, 4, 4)
    with ByteCounter() as counter:
        torch.empty_strided((2, 3, 4, 4), (48, 1, 12, 3))
        x.new_empty_strided((2, 3, 4, 4), (48, 1, 12, 3))
        torch.empty(2, 3, 4, 4), torch.empty_like(x), x.new_empty(2, 3, 4, 4)
        torch.ops.aten._unsafe_view(x, (2, 48))
    assert counter.count == 0
    assert counter.peak > 0


def test_a_network_whose_outputs_have_no_gradient_takes_no_step():
    model = nn.Conv2d(3, 3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="^no output has a gradient$"):
        measure_traffic(model, torch.randn(2, 3, 4, 4))


@pytest.mark.slow
def test_what_is_counted_of_a_resnet50_is_what_the_table_says():
    written = json.loads((Path(traffic.__file__).parent / "results" / "traffic.json").read_text())
    plain = written["bytes"]["resnet50"]["plain"]
    model = timm.create_model("resnet50")
    found = measure_traffic(model, torch.randn(8, 3, 224, 224))
    assert vars(found) == {key: plain[key] for key in ("evaluation", "training", "saved", "peak")}


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
    counted = [measure_traffic(model, images) for model in (plain, inject(plain, r=4))]
    assert counted[1].training > counted[0].training
    rows = [Row(*vars(traffic).values(), 100) for traffic in counted]
    twice = Row(*(2 * n for n in vars(rows[0]).values()))
    table = write_table({"resnet18": {"plain": rows[0], "se-inject": rows[1], "timm": twice}}, {}, 8)
    assert "| resnet18 (seresnet18) | timm | 2.000 | 2.000 | 2.000 | 2.000 | 2.000 |" in table


def test_what_is_written_into_is_not_read():
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    with ByteCounter() as counter:
        torch.mul(x, y, out=x)
    assert counter.count == 3 * MAP


def test_the_peak_is_what_is_held_at_once():
    x = torch.randn(2, 3, 4, 4)
    with ByteCounter() as counter:
        y = x + 1
        z = y * 2
        del y
        z = z * 3
        z.mul_(2)
    assert counter.peak == 2 * MAP
