"""What timm's training and validation scripts are made of runs an injected network as it runs any other."""

import copy
import math

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader
from timm.models import (
    FeatureHookNet,
    FeatureListNet,
    load_checkpoint,
    resume_checkpoint,
)
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    NativeScaler,
    accuracy,
    freeze,
    reparameterize_model,
    unfreeze,
)
from timm.utils.model import avg_ch_var, avg_sq_ch_mean, extract_spp_stats
from torch import nn

from se_inject import blocks, inject
from se_inject.errors import ModelError
from tests import nets
from tests.equality import assert_same_network
from tests.images_on_disk import make_two_folders

X = (2, 3, 64, 64)


def make_original(name="resnet18", **options):
    return nets.enliven(timm.create_model(name, num_classes=2, **options))


def make_tuned(name="resnet18", **options):
    """Inject, and give the gates something to do."""
    model = inject(make_original(name, **options))
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight, std=0.5)
    return model


def make_loader(root, split, **options):
    return create_loader(
        create_dataset("", root=root, split=split),
        input_size=(3, 32, 32),
        batch_size=4,
        num_workers=0,
        use_prefetcher=False,
        **options,
    )


def validate(model, loader):
    """The loop of timm's validate.py. Gives the mean loss and the top-1."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.eval()
    with torch.inference_mode():
        for images, target in loader:
            output = model(images)
            losses.update(nn.functional.cross_entropy(output, target).item(), len(images))
            top1.update(accuracy(output, target, topk=(1,))[0].item(), len(images))
    return losses.avg, top1.avg


def make_training(model):
    """What timm's train.py makes of a model: a task with a moving average, an optimizer and a scaler."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False)
    task.setup_ema(decay=0.5)
    return task, optimizer, NativeScaler(device="cpu")


@pytest.mark.filterwarnings(  # timm leaves the files of a folder open
    "ignore:unclosed file:ResourceWarning",
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)
def test_a_run_of_training_is_saved_resumed_and_validated(tmp_path):
    root = str(make_two_folders(tmp_path / "images", size=(40, 40)))
    original = make_original()
    model = inject(original)
    assert validate(model, make_loader(root, "val")) == validate(original, make_loader(root, "val"))

    task, optimizer, scaler = make_training(model)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=2, warmup_epochs=1)
    saver = CheckpointSaver(model, optimizer, task=task, amp_scaler=scaler, checkpoint_dir=str(tmp_path))
    for epoch in range(2):
        model.train()
        for images, target in make_loader(root, "train", is_training=True):
            optimizer.zero_grad()
            loss = task(images, target)["loss"]
            scaler(loss, optimizer, clip_grad=0.02, clip_mode="agc", parameters=model.parameters())
            task.update_ema()
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=validate(model, make_loader(root, "val"))[1])
    assert all(block.fc2.weight.any() for block in blocks(model).values())

    file = str(tmp_path / "last.pth.tar")
    x = torch.randn(X)
    again, again_optimizer, again_scaler = make_training(inject(make_original()))
    assert resume_task_checkpoint(again, file, again_optimizer, again_scaler, log_info=False) == 2
    resumed = inject(make_original())
    assert resume_checkpoint(resumed, file, log_info=False) == 2
    averaged = inject(make_original())
    load_checkpoint(averaged, file, use_ema=True)
    with torch.no_grad():
        assert torch.equal(again.get_eval_model().eval()(x), model.eval()(x))
        assert torch.equal(resumed.eval()(x), model(x))
        assert torch.equal(averaged.eval()(x), task.get_eval_model(ema=True).eval()(x))
    expected = optimizer.state_dict()["state"]
    assert len(expected) == len(list(model.parameters()))
    for key, state in again_optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], expected[key]["exp_avg"])
    assert validate(resumed, make_loader(root, "val")) == validate(model, make_loader(root, "val"))


@pytest.mark.parametrize(
    ("name", "block", "neighbour"),
    [
        ("resnet18", "layer3.0.se", "layer3.0.conv2.weight"),
        ("convnext_atto", "stages.1.blocks.0.se", "stages.1.blocks.0.conv_dw.weight"),
        ("dla34", "level3.tree1.tree1.se", "level3.tree1.tree1.conv2.weight"),
    ],
)
def test_layer_decay_gives_a_block_the_rate_of_its_layer(name, block, neighbour):
    model = make_tuned(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    groups = {id(p): (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    parameters = dict(model.named_parameters())
    assert len(groups) == len(parameters) == sum(len(g["params"]) for g in optimizer.param_groups)
    scale, decay = groups[id(parameters[neighbour])]
    assert 0 < scale < 1
    for layer in ("fc1", "fc2"):
        assert groups[id(parameters[f"{block}.{layer}.weight"])] == (scale, decay) == (scale, 0.05)
        assert groups[id(parameters[f"{block}.{layer}.bias"])] == (scale, 0.0)


def test_frozen_layers_take_their_blocks_along():
    model = make_tuned().train()
    x = torch.randn(X)
    freeze(model, ["conv1", "bn1", "layer1", "layer2"])
    model(x).sum().backward()
    for path, block in blocks(model).items():
        is_frozen = path.startswith(("layer1", "layer2"))
        assert (block.fc1.weight.grad is None) is is_frozen, path
        assert (block.fc2.weight.grad is None) is is_frozen, path
    unfreeze(model, ["conv1", "bn1", "layer1", "layer2"])
    assert all(p.requires_grad for p in model.parameters())
    model(x).sum().backward()
    assert all(block.fc1.weight.grad.any() for block in blocks(model).values())


def test_activations_of_blocks_are_watched_by_pattern():
    model = make_tuned().eval()
    watched = {"hook_fn_locs": ["layer?.?.se", "layer?.?"], "hook_fns": [avg_sq_ch_mean, avg_ch_var]}
    with torch.no_grad():
        stats = extract_spp_stats(model, **watched, input_shape=[2, 3, 32, 32])
    assert {name: len(values) for name, values in stats.items()} == {"avg_sq_ch_mean": 8, "avg_ch_var": 8}
    assert all(math.isfinite(value) and value > 0 for values in stats.values() for value in values)


@pytest.mark.parametrize(
    ("name", "options", "num_blocks"),
    [
        ("resnet18", {}, 8),
        ("resnet18", {"feature_cls": "dict", "out_indices": (2, 4)}, 8),
        ("resnet18", {"feature_cls": "hook", "out_indices": (1, 3)}, 8),
        ("resnet18", {"feature_cls": "getter", "out_indices": (4,)}, 8),
        ("densenet121", {"out_indices": (1, 2)}, 2),
        ("efficientnet_lite0", {}, 9),
        ("regnetx_002", {"out_indices": (2,)}, 2),
    ],
)
def test_a_network_that_gives_features_alone_is_injected(name, options, num_blocks):
    original = nets.enliven(timm.create_model(name, features_only=True, **options))
    model = inject(original)
    assert type(model) is type(original)
    assert len(blocks(model)) == num_blocks
    assert model.feature_info.channels() == original.feature_info.channels()
    x = torch.randn(X)
    assert_same_network(original, model, x)
    for block in blocks(model).values():
        nn.init.normal_(block.fc2.weight)
    last, expected = ([*found.values()] if isinstance(found, dict) else found for found in (model(x), original(x)))
    assert not torch.equal(last[-1], expected[-1])


def test_features_by_a_graph_are_made_of_the_injected_network():
    with pytest.raises(ModelError, match="graph_module is a feature extractor of torchvision's; inject first"):
        inject(timm.create_model("resnet18", features_only=True, feature_cls="fx"))


@pytest.mark.parametrize("kind", [FeatureListNet, FeatureHookNet, FeatureGetterNet])
def test_features_are_taken_of_an_injected_network(kind):
    model = make_tuned().eval()
    x = torch.randn(X)
    with torch.no_grad():
        final, expected = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        found = kind(copy.deepcopy(model), out_indices=(1, 4)).eval()(x)
    assert torch.equal(found[0], expected[1])
    assert torch.equal(found[1], expected[4])


def test_a_network_that_is_cut_short_keeps_the_blocks_before():
    model = make_tuned().eval()
    x = torch.randn(X)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[2], intermediates_only=True)
        model.prune_intermediate_layers([2], prune_head=True)
        assert torch.equal(model.forward_features(x), expected[0])
    assert {path.split(".")[0] for path in blocks(model)} == {"layer1", "layer2"}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_lite0"])
def test_checkpointed_activations_give_the_same_gradients(name):
    model = make_tuned(name).double().train()
    x = torch.randn(X, dtype=torch.float64)
    outputs, gradients = [], []
    for is_on in (False, True):
        again = copy.deepcopy(model)
        again.set_grad_checkpointing(is_on)
        outputs.append(again(x))
        outputs[-1].square().mean().backward()
        gradients.append({name: p.grad for name, p in again.named_parameters()})
    assert torch.equal(*outputs)
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)  # the sums run in another order


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9"])
def test_a_network_that_was_reparameterized_is_injected(name):
    original = reparameterize_model(make_original(name).eval())
    assert_same_network(original, inject(original), torch.randn(X))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repvgg_a0", {"at": ["fusion"]}, "reparameterize of SERepVggBlock would leave out an injected block"),
        ("mobileone_s0", {"include": ["stages.0.*"]}, "reparameterize of MobileOneBlock would leave out"),
        ("repvit_m0_9", {"at": ["fusion"]}, "fuse of SERepVggDw would leave out .*; re-parameterise the network first"),
    ],
)
def test_branches_are_not_merged_over_a_block(name, options, message):
    model = inject(make_original(name).eval(), **options)
    with pytest.raises(ModelError, match=message):
        reparameterize_model(model)


def test_branches_without_a_block_among_them_are_merged():
    model = make_tuned("repvit_m0_9").eval()
    x = torch.randn(X)
    merged = reparameterize_model(model)
    assert len(blocks(merged)) == len(blocks(model)) == 26
    with torch.no_grad():
        torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)  # folded weights are rounded
