import timm
import torch

from se_inject import inject
from se_inject.costs import compare_costs
from se_inject.rewrite import get_plan
from tests import nets


def test_resnet50_costs_what_the_paper_says():
    model = inject(timm.create_model("resnet50"))
    before, after = compare_costs(model, get_plan(model))
    assert (before.parameters, after.parameters) == (25_557_032, 28_088_024)
    # Two multiply-accumulates a weight of the blocks' layers, once an image.
    assert after.macs - before.macs == sum(2 * s.channels * s.hidden for s in get_plan(model).sites)
    assert 4.08e9 < before.macs < 4.10e9  # 4.1 G in timm's table
    assert after.size - before.size == 4 * get_plan(model).num_parameters


def test_blocks_over_several_maps_are_counted_and_kept():
    model = inject(nets.wrap(nets.Dense()))
    x = torch.randn(2, 3, 8, 8)
    y = model.eval()(x)
    before, after = compare_costs(model, get_plan(model))
    assert after.macs - before.macs == 2 * 24 * 8
    assert torch.equal(model(x), y)
