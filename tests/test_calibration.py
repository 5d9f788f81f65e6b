"""What a recipe leaves to the images, settled before the first step."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torchvision
from sklearn.linear_model import LogisticRegression
from torch import nn

from se_inject import calibration, inject
from se_inject.calibration import calibrate
from se_inject.datasets import open_data
from se_inject.groups import iterate_batch_norms
from se_inject.heads import find_classifier, replace_head
from se_inject.loaders import TrainLoader
from se_inject.recipe import Recipe
from se_inject.runlog import METRICS, read_metrics
from se_inject.tasks import make_task
from se_inject.world import World
from tests.digits import DigitNet, write_digits
from tests.test_training import FORM, SMALL, make_job, run

WORLD = World(torch.device("cpu"))
OPEN = replace(SMALL, batch_norm="auto", label_temperature=0.0, optimizer="auto")
FRESH = frozenset({"fc.weight", "fc.bias"})


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(str(write_digits(tmp_path_factory.mktemp("digits"), 160)), mode="L")


@pytest.fixture
def loader(digits):
    return TrainLoader(digits, FORM, SMALL, WORLD, num_classes=10)


def settle(model, loader, recipe=OPEN, **options):
    return calibrate(model, loader, recipe, WORLD, compute=nullcontext, **options)[0]


class Oracle(nn.Module):
    """Knows the labels by the order of the batches, is wrong for one image in four, and is as sure as it is told."""

    def __init__(self, loader, sureness):
        super().__init__()
        self.answers, self.sureness = [labels.clone() for _, labels in loader.iterate(0)], sureness
        for labels in self.answers:
            labels[::4] = (labels[::4] + 1) % 10

    def forward(self, images):
        return self.sureness * nn.functional.one_hot(self.answers.pop(0), 10).float()


@pytest.mark.parametrize("sureness", [5.0, 8.0])
def test_the_temperature_makes_a_network_as_sure_as_it_is_right(loader, sureness):
    # The cross-entropy is lowest where the softmax gives the right class 3 in 4: e^(s/T) / (e^(s/T) + 9) = 0.75.
    best = sureness / torch.tensor(27.0).log().item()
    found = settle(Oracle(loader, sureness), loader)
    assert found.label_temperature == pytest.approx(1.5 * best, rel=0.02)


def test_a_network_that_is_far_too_sure_has_the_highest(loader):
    assert settle(Oracle(loader, 100.0), loader).label_temperature == pytest.approx(6.0)


def test_images_without_labels_leave_everything_as_usual(loader):
    model = Oracle(loader, 5.0)
    batches = [(images, torch.full_like(labels, -1)) for images, labels in loader.iterate(0)]
    loader.iterate = lambda *_: iter(batches)
    found = settle(model, loader)
    assert (found.batch_norm, found.optimizer, found.label_temperature) == ("train", "sgd", 1)


def test_without_labels_in_the_loss_nothing_is_run(loader):
    found = settle(Oracle(loader, 5.0), None, replace(OPEN, distill=1.0))
    assert (found.batch_norm, found.label_temperature) == ("train", 1)


def test_what_the_recipe_says_stays(loader):
    recipe = replace(OPEN, batch_norm="frozen", label_temperature=2.0, optimizer="lamb")
    assert settle(None, loader, recipe) == recipe


def learn(loader, *, epochs=8):
    """A network that knows the digits, and whose statistics are those of the digits."""
    torch.manual_seed(0)
    model = DigitNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        for images, labels in loader.iterate(epoch):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def shift(loader, by):
    """The same images, brighter: the statistics that a network has of them are wrong."""
    batches = [(images + by, labels) for images, labels in loader.iterate(0)]
    loader.iterate = lambda *_: iter(batches)


def test_batches_that_are_all_alike_leave_the_statistics(loader):
    """Each has one image, many times: its own statistics make all of its maps the same."""
    model = learn(loader)
    batches = [(torch.stack([images[0]] * 16), labels[:1].repeat(16)) for images, labels in loader.iterate(0)]
    loader.iterate = lambda *_: iter(batches)
    found = settle(model, loader)
    assert (found.batch_norm, found.optimizer) == ("frozen", "adamw")
    assert (found.lr, found.se_lr, found.warmup_share) == pytest.approx((0.03 * OPEN.lr, 0.3 * OPEN.se_lr, 0.3))


def test_images_of_another_brightness_have_statistics_of_their_own(loader):
    model = learn(loader)
    shift(loader, 3.0)
    found = settle(model, loader)
    assert (found.batch_norm, found.optimizer, found.lr) == ("train", "sgd", OPEN.lr)


def test_blocks_alone_learn_with_frozen_statistics_and_sgd(loader):
    """The control, which has no blocks, learns as a whole: it has the choice."""
    model = learn(loader)
    batches = [(torch.stack([images[0]] * 16), labels[:1].repeat(16)) for images, labels in loader.iterate(0)]
    loader.iterate = lambda *_: iter(batches)
    recipe = replace(OPEN, train="gates")
    found = settle(inject(model, r=4, example=torch.zeros(2, 1, 8, 8)), loader, recipe)
    assert (found.optimizer, found.lr) == ("sgd", OPEN.lr)
    assert settle(model, loader, recipe).batch_norm == "frozen"


@pytest.mark.parametrize("fresh", [frozenset(), FRESH])
def test_nothing_but_a_fresh_classifier_is_changed(loader, fresh):
    model = inject(learn(loader), r=4, example=torch.zeros(2, 1, 8, 8)).train()
    model.bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    settle(model, loader, fresh=fresh)
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == fresh
    assert [module.training for module in model.modules()] == modes
    assert all(norm.track_running_stats for norm in iterate_batch_norms(model))


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_fresh_classifier_is_scikit_learns_logistic_regression(loader, batch_norm):
    model = learn(loader)
    kept = model.fc.weight.clone()
    images, labels = (torch.cat(items) for items in zip(*loader.iterate(0), strict=True))
    settle(model, loader, replace(OPEN, batch_norm=batch_norm), fresh=FRESH)
    assert not torch.equal(model.fc.weight, kept)
    model.train(batch_norm == "train")
    with torch.no_grad():
        used = []
        hook = model.fc.register_forward_pre_hook(lambda _, args: used.append(args[0]))
        answers = torch.cat([model(batch) for batch in images.split(16)]).argmax(1)
        hook.remove()
    used = torch.cat(used)
    center, scale = used.mean(0), (used - used.mean(0)).square().mean().sqrt()
    inputs = ((used - center) / scale).numpy()
    # The loss is a mean with penalty / 2 |w|^2; scikit-learn's is a sum with |w|^2 / 2C.
    strengths = [1 / (len(labels) * penalty) for penalty in (1e-2, 1e-1, 1.0)]
    fits = [LogisticRegression(C=c, max_iter=10_000, tol=1e-8).fit(inputs, labels) for c in strengths]
    own = model.fc.weight.detach() * scale
    errors = [float((own - torch.from_numpy(fit.coef_)).abs().max()) for fit in fits]
    assert min(errors) < 2e-3
    assert (answers == labels).float().mean() > 0.9


def test_as_many_images_are_used_as_memory_has_room_for(loader, monkeypatch):
    """Room for 20 images with scores of ten classes is a batch and a bit; for 9, there is not one of each class."""
    used = []
    for num in (20, 9):
        monkeypatch.setattr(calibration, "_MAX_SCORES", 10 * num)
        model = learn(loader)
        kept = model.fc.weight.clone()
        model.fc.register_forward_pre_hook(lambda _, args: used.append(len(args[0])))
        used.clear()
        settle(model, loader, replace(OPEN, batch_norm="train"), fresh=FRESH)
        assert torch.equal(model.fc.weight, kept) == (num < 10)
        assert sum(used[1:]) == (2 * loader.batch_size if num == 20 else 0)


def test_a_fresh_classifier_without_a_bias_is_fitted(loader):
    model = learn(loader)
    model.fc = nn.Linear(32, 10, bias=False)
    settle(model, loader, fresh={"fc.weight"})
    images, labels = next(loader.iterate(0))
    assert (model(images).argmax(1) == labels).float().mean() > 0.8


@pytest.mark.parametrize(
    ("name", "size", "head"), [("resnet18", 32, "fc"), ("googlenet", 64, "fc"), ("squeezenet1_1", 64, None)]
)
def test_the_classifier_is_the_layer_whose_outputs_are_the_networks(name, size, head):
    """GoogLeNet has auxiliary heads; SqueezeNet's last convolution is followed by a ReLU and a mean."""
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=11, **options)
    fresh = replace_head(model, 11, 7)
    found = find_classifier(model, fresh, torch.randn(2, 3, size, size))
    assert found is (model.get_submodule(head) if head else None)


def test_a_classifier_that_cannot_be_fitted_learns_as_the_rest(loader):
    class Scaled(DigitNet):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = Scaled()
    before = model.fc.weight.clone()
    found = settle(model, loader, fresh=FRESH)
    assert torch.equal(model.fc.weight, before)
    assert (found.batch_norm, found.label_temperature) == ("train", 1)


def test_the_loss_divides_the_outputs_and_the_network_does_not(digits):
    job = make_job(digits)
    job.model.eval()
    images, labels = next(job.train.iterate(0))
    found = make_task(job.model, replace(SMALL, label_temperature=3.0), None, 10)(images, labels)
    assert torch.equal(found["output"], job.model(images))
    plain = make_task(job.model, SMALL, None, 10)
    assert found["loss"].item() == pytest.approx(plain.criterion(found["output"] / 3, labels).item())


@pytest.mark.parametrize(
    ("changes", "options"),
    [({"label_temperature": 0.0}, {}), ({"label_temperature": 2.5}, {}), ({"batch_norm": "auto"}, {"fresh": FRESH})],
)
def test_a_run_says_what_was_settled(digits, tmp_path, changes, options):
    recipe = replace(SMALL, epochs=1, **changes)
    expected, _ = calibrate(
        make_job(digits).model, make_job(digits, recipe).train, recipe, WORLD, compute=nullcontext, **options
    )
    run(make_job(digits, recipe, **options), tmp_path / "run")
    found = [line for line in read_metrics(tmp_path / "run" / METRICS) if "top1" in line]
    assert [(line["batch_norm"], line["label_temperature"]) for line in found] == [
        (expected.batch_norm, expected.label_temperature)
    ] * 2


def test_auto_is_sgd_unless_everything_learns_with_frozen_statistics():
    found = Recipe().settle("frozen", 2.0)
    assert (found.optimizer, found.label_temperature) == ("adamw", 2.0)
    assert found.head_lr == pytest.approx(0.0003)
    assert Recipe().settle("train", 1.0).optimizer == "sgd"
    assert Recipe(batch_norm="frozen").settle("train", 1.0).optimizer == "adamw"
    assert Recipe(batch_norm="sync", optimizer="lion").settle("frozen", 1.0).optimizer == "lion"
    assert Recipe(warmup_share=0.5).settle("frozen", 1.0).warmup_share == 0.5
