"""How far the images want gates of their own, and the rate that blocks have by it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from benchmarks.dependence import write_table
from se_inject import blocks, inject
from se_inject.block import SqueezeExcite
from se_inject.calibration import calibrate
from se_inject.datasets import open_data
from se_inject.dependence import FEWEST, measure_dependence
from se_inject.jobs import InterruptedTrainingError
from se_inject.loaders import TrainLoader
from se_inject.recipe import Recipe
from se_inject.world import World
from tests import nets
from tests.digits import write_digits
from tests.ranks import run_in_two
from tests.test_calibration import learn
from tests.test_training import FORM, SMALL, assert_same_states, make_job, run, run_until

WORLD = World(torch.device("cpu"))
OPEN = replace(SMALL, batch_norm="auto", label_temperature=0.0, optimizer="auto", se_lr=0.0, gates_share=0.0)
EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(str(write_digits(tmp_path_factory.mktemp("digits"), 640)), mode="L")


@pytest.fixture
def loader(digits):
    return TrainLoader(digits, FORM, SMALL, WORLD, num_classes=10)


def measure(model, batches, temperature=1.0):
    own = {path: block for path, block in blocks(model).items() if isinstance(block, SqueezeExcite)}
    return measure_dependence(model, own, batches, WORLD, temperature=temperature, compute=nullcontext)


def compute_by_ridge(model, images, labels, temperature):
    """The same figure image by image, and by scikit-learn's regression."""
    shares = []
    for block in blocks(model).values():
        squeezed, wanted = [], []
        hook = block.register_forward_pre_hook(
            lambda _, args, seen=squeezed: seen.append(args[0].detach().mean((2, 3)))
        )
        for image, label in zip(images, labels, strict=True):
            loss = nn.functional.cross_entropy(model(image[None]) / temperature, label[None])
            wanted.append(torch.autograd.grad(loss, block.fc2.bias)[0])  # one image: its gate's own gradient
        hook.remove()
        x, y = torch.cat(squeezed).double(), torch.stack(wanted).double()
        x = ((x - x.mean(0)) / x.std(0)).numpy()
        rest = (y - y.mean(0)).numpy()
        found = []
        for ridge in (0.03, 0.1, 0.3, 1.0, 3.0):
            each = []
            for learned, tried in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
                fit = Ridge(ridge * len(x[learned]) * x.shape[1], fit_intercept=False)
                mean = rest[learned].mean(0)
                guess = fit.fit(x[learned], rest[learned] - mean).predict(x[tried])
                each.append(1 - ((rest[tried] - guess) ** 2).sum() / (rest[tried] ** 2).sum())
            found.append(sum(each) / 2)
        shares.append(found)
    return float(torch.tensor(shares).mean(0).max())


def test_it_is_what_ridge_regression_of_each_images_gradient_explains(loader):
    model = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    batches = list(loader.iterate(0))[:9]
    images, labels = (torch.cat(items) for items in zip(*batches, strict=True))
    found = measure(model, batches, 2.0)
    assert 0.01 < found < 1
    assert found == pytest.approx(compute_by_ridge(model, images, labels, 2.0), rel=1e-3)


def test_images_that_tell_nothing_of_their_labels_explain_nothing():
    torch.manual_seed(0)
    model = inject(nets.TwoBranches()).eval()
    batches = [(torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))) for _ in range(8)]
    assert measure(model, batches) < 0.003


def test_images_without_labels_are_left_out(loader):
    model = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    batches = list(loader.iterate(0))[:10]
    more = [
        (torch.cat([images, torch.randn(3, 1, 8, 8)]), torch.cat([labels, torch.tensor([-1, -2, -1])]))
        for images, labels in batches
    ]
    assert measure(model, more) == pytest.approx(measure(model, batches), rel=1e-4)


def test_too_few_images_tell_nothing(loader):
    model = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    batches = list(loader.iterate(0))
    few = FEWEST // SMALL.batch_size
    assert measure(model, batches[: few - 1]) == 0 < measure(model, batches[:few])


def test_a_broken_network_tells_nothing(loader):
    model = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    model.stem.weight.data.fill_(float("nan"))
    assert measure(model, list(loader.iterate(0))[:10]) == 0


def test_a_block_that_is_run_twice_tells_nothing_of_one_image(loader):
    class Twice(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) + self.model(x.flip(-1))

    once = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    batches = list(loader.iterate(0))[:10]
    assert measure(once, batches) > 0
    assert measure(Twice(once), batches) == 0


def test_a_block_of_which_nothing_comes_explains_nothing(loader):
    class Aside(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.fc = model, nn.Linear(64, 10)

        def forward(self, x):
            self.model(x)
            return self.fc(x.flatten(1))

    model = Aside(inject(learn(loader, epochs=1), r=4, example=EXAMPLE)).eval()
    assert measure(model, list(loader.iterate(0))[:10]) == 0


def test_nothing_is_left_on_the_network(loader):
    model = inject(learn(loader, epochs=1), r=4, example=EXAMPLE).eval()
    batches = list(loader.iterate(0))[:9]
    free = measure(model, batches)
    for block in blocks(model).values():
        block.requires_grad_(False)
    assert measure(model, batches) == pytest.approx(free)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def settle(model, loader, recipe=OPEN):
    return calibrate(model, loader, recipe, WORLD, compute=nullcontext)[0]


def test_blocks_are_faster_where_the_images_want_gates_of_their_own(loader):
    """A network that has seen the digits once gets much wrong that its maps tell; one that knows them all, nothing."""
    early, late = (inject(learn(loader, epochs=epochs), r=4, example=EXAMPLE) for epochs in (1, 20))
    recipe = replace(OPEN, batch_norm="frozen", optimizer="sgd")
    assert settle(early, loader, recipe).se_lr == pytest.approx(10 * OPEN.lr)
    assert settle(late, loader, recipe).se_lr == OPEN.lr
    assert settle(early, loader, replace(OPEN, batch_norm="train")).se_lr == pytest.approx(10 * OPEN.lr)


@pytest.mark.parametrize(
    "changes", [{"se_lr": 0.03}, {"optimizer": "adamw"}, {"train": "gates"}, {"distill": 1.0}, {"batch_norm": "frozen"}]
)
def test_what_is_settled_without_the_images_is_not_measured(loader, monkeypatch, changes):
    monkeypatch.setattr("se_inject.calibration.measure_dependence", None)
    recipe = replace(OPEN, **changes)
    expected = recipe.settle(recipe.batch_norm, 1.0).se_lr
    assert settle(inject(learn(loader, epochs=1), r=4, example=EXAMPLE), loader, recipe).se_lr == expected


def test_a_network_without_blocks_has_the_backbones_rate(loader):
    assert settle(learn(loader, epochs=1), loader).se_lr == OPEN.lr


def test_the_rate_that_follows():
    assert [Recipe().settle("train", 1.0, share).se_lr for share in (0.0, 0.0049, 0.005)] == [0.01, 0.01, 0.1]
    assert Recipe(lr=0.04).settle("train", 1.0, 0.1).se_lr == 0.4
    assert Recipe(se_lr=0.02).settle("train", 1.0, 0.1).se_lr == 0.02
    assert Recipe().settle("frozen", 1.0, 0.1).se_lr == pytest.approx(0.003)  # AdamW's
    assert Recipe(optimizer="lamb").settle("train", 1.0, 0.1).se_lr == 0.01


def test_an_interrupted_run_keeps_the_rate_that_was_settled(digits, tmp_path):
    """Without it the steps after the interruption would be ten times smaller for the blocks."""
    recipe = replace(OPEN, epochs=0.5, batch_norm="train")
    whole = run(make_job(digits, recipe), tmp_path / "whole")
    assert whole.history[0]["se_lr"] == pytest.approx(10 * OPEN.lr)
    with pytest.raises(InterruptedTrainingError):
        run_until(make_job(digits, recipe), tmp_path / "part", 2 * 30 + 12)  # the images are looked at twice before
    outcome = run(make_job(digits, recipe), tmp_path / "part", resume=True)
    assert outcome.history == whole.history
    assert_same_states(outcome.model.state_dict(), whole.model.state_dict())


def test_two_processes_settle_the_same_by_the_images_of_both(tmp_path):
    script = """
        from contextlib import nullcontext
        from se_inject import blocks, inject
        from se_inject.dependence import measure_dependence
        from se_inject.world import World
        from tests import nets

        model = inject(nets.TwoBranches()).eval()
        kinds = torch.randint(0, 3, (4, 64))
        batches = [(torch.randn(64, 3, 8, 8) + 3 * torch.eye(3)[kind][:, :, None, None], kind) for kind in kinds]
        own = dict(blocks(model))
        measure = lambda batches, world: measure_dependence(
            model, own, batches, world, temperature=1.0, compute=nullcontext
        )
        alone = measure(batches, World(torch.device("cpu")))
        part = [(images[rank::2], labels[rank::2]) for images, labels in batches]
        together = measure(part, World(torch.device("cpu"), rank, 2))
        assert alone > 0.01 and abs(together / alone - 1) < 1e-4, (alone, together)
        """
    run_in_two(script, tmp_path)


def test_the_table_has_a_line_for_all_seeds():
    rows = [
        {"network": "resnet20", "data": name, "num_train": 5000, "dependence": share, "se_lr": rate}
        for name, share, rate in (("plain", 0.0003, 0.01), ("mixed", 0.012, 0.1), ("mixed", 0.0048, 0.01))
    ]
    assert write_table(rows).splitlines()[2:] == [
        "| resnet20 | plain | 5,000 | 0.03 | 0.01 |",
        "| resnet20 | mixed | 5,000 | 1.20, 0.48 | 0.1, 0.01 |",
    ]
