"""The temperature of the loss, fitted before the first step."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from se_inject.calibration import fit_temperature
from se_inject.datasets import open_data
from se_inject.loaders import TrainLoader
from se_inject.runlog import METRICS, read_metrics
from se_inject.tasks import make_task
from se_inject.world import World
from tests.digits import write_digits
from tests.test_training import FORM, SMALL, make_job, run

WORLD = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(str(write_digits(tmp_path_factory.mktemp("digits"), 160)), mode="L")


class Oracle(nn.Module):
    """Knows the labels by the order of the batches, is wrong for one image in four, and is as sure as it is told."""

    def __init__(self, batches, sureness):
        super().__init__()
        self.answers, self.sureness = [labels.clone() for _, labels in batches], sureness
        for labels in self.answers:
            labels[::4] = (labels[::4] + 1) % 10

    def forward(self, images):
        return self.sureness * nn.functional.one_hot(self.answers.pop(0), 10).float()


@pytest.mark.parametrize("sureness", [5.0, 8.0])
def test_the_temperature_makes_a_network_as_sure_as_it_is_right(digits, sureness):
    loader = TrainLoader(digits, FORM, SMALL, WORLD, num_classes=10)
    model = Oracle(list(loader.iterate(0)), sureness)
    # The cross-entropy is lowest where the softmax gives the right class 3 in 4: e^(s/T) / (e^(s/T) + 9) = 0.75.
    best = sureness / torch.tensor(27.0).log().item()
    assert fit_temperature(model, loader, WORLD, torch.no_grad) == pytest.approx(1.5 * best, rel=0.02)


def test_a_network_that_is_far_too_sure_has_the_highest(digits):
    loader = TrainLoader(digits, FORM, SMALL, WORLD, num_classes=10)
    model = Oracle(list(loader.iterate(0)), 100.0)
    assert fit_temperature(model, loader, WORLD, torch.no_grad) == pytest.approx(6.0)


def test_images_without_labels_leave_the_outputs_as_they_are(digits):
    loader = TrainLoader(digits, FORM, SMALL, WORLD, num_classes=10)
    model = Oracle(list(loader.iterate(0)), 5.0)
    batches = [(images, torch.full_like(labels, -1)) for images, labels in loader.iterate(0)]
    loader.iterate = lambda *_: iter(batches)
    assert fit_temperature(model, loader, WORLD, torch.no_grad) == 1


def test_fitting_changes_nothing_in_the_network(digits):
    job = make_job(digits)
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    job.model.train()
    fit_temperature(job.model, job.train, WORLD, torch.no_grad)
    assert job.model.training
    for key, value in job.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_loss_divides_the_outputs_and_the_network_does_not(digits):
    job = make_job(digits)
    job.model.eval()
    images, labels = next(job.train.iterate(0))
    found = make_task(job.model, SMALL, None, label_temperature=3.0)(images, labels)
    assert torch.equal(found["output"], job.model(images))
    plain = make_task(job.model, SMALL, None, label_temperature=1.0)
    assert found["loss"].item() == pytest.approx(plain.criterion(found["output"] / 3, labels).item())


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"label_temperature": 0.0}, {}, None),
        ({"label_temperature": 2.5}, {}, 2.5),
        ({"label_temperature": 0.0}, {"fresh": frozenset({"fc.weight", "fc.bias"})}, 1.0),
    ],
)
def test_a_run_says_at_which_temperature_it_learned(digits, tmp_path, changes, options, expected):
    job = make_job(digits, replace(SMALL, epochs=1, **changes), **options)
    if expected is None:
        expected = fit_temperature(job.model, job.train, WORLD, torch.no_grad)
        assert expected != 1
    run(job, tmp_path / "run")
    found = [line["label_temperature"] for line in read_metrics(tmp_path / "run" / METRICS) if "top1" in line]
    assert found == [expected, expected]
