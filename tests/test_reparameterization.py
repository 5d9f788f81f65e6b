import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from se_inject import eject, inject, optimize
from se_inject.errors import ModelError
from tests import nets


class Merged(nets.RepVgg):
    """Can merge its branches."""

    def switch_to_deploy(self):
        return "merged"


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.plain = Merged(), nn.Identity()

    def forward(self, x):
        return self.plain(self.body(x))

    def fuse(self):
        return "fused"


class Root(nn.Sequential):
    def fuse(self):
        return "all parts"


def make():
    return Root(*nets.wrap(Around()))


def test_an_owner_and_what_it_stands_in_refuse_and_the_root_does_not():
    injected = inject(make(), at=["fusion"])
    for model in (injected, copy.deepcopy(injected), pickle.loads(pickle.dumps(injected))):
        with pytest.raises(ModelError, match="^switch_to_deploy of SEMerged would leave out an injected block"):
            model[1].body.switch_to_deploy()
        with pytest.raises(ModelError, match="^fuse of Around would leave out an injected block"):
            model[1].fuse()
        assert model.fuse() == "all parts"


def test_without_the_blocks_branches_are_merged_again():
    ejected = eject(inject(make(), at=["fusion"]))
    assert ejected[1].body.switch_to_deploy() == "merged"
    assert ejected[1].fuse() == "fused"


def test_the_original_goes_on_merging():
    net = make()
    inject(net, at=["fusion"])
    assert net[1].fuse() == "fused"


def test_a_root_that_owns_a_block_refuses():
    class Net(nets.TwoBranches):
        def fuse(self):
            return "fused"

    with pytest.raises(ModelError, match="fuse of SENet would leave out"):
        inject(Net()).fuse()


@pytest.mark.parametrize("is_injected", [True, False])
def test_an_optimized_network_says_that_it_cannot_be_merged(is_injected):
    net = timm.create_model("repvgg_a0").eval()
    if is_injected:
        net = inject(net, at=["fusion"], example=torch.zeros(1, 3, 64, 64))
    fast = optimize(net, torch.zeros(1, 3, 64, 64))
    with pytest.raises(ModelError, match="re-parameterise the network first, then (optimize|inject)$"):
        timm.utils.reparameterize_model(fast)
    first = optimize(timm.utils.reparameterize_model(timm.create_model("repvgg_a0").eval()), torch.zeros(1, 3, 64, 64))
    assert first(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
