import math

import pytest
import torch
from torch import nn

from se_inject.datasets import open_data
from se_inject.errors import DataError, OptionError, TrainingError
from se_inject.formats import InputFormat
from se_inject.loaders import EvalLoader
from se_inject.scores import Scores, evaluate, quote_batch_size
from se_inject.world import World, choose_device, join_world
from tests.images_on_disk import make_folder, make_two_folders

WORLD = World(torch.device("cpu"))


class Batches:
    """What `evaluate` needs of a loader: images whose first numbers are the scores that the network gives."""

    batch_size = 2
    is_stream = False

    class bad:  # noqa: N801
        share = staticmethod(lambda world: None)
        check = staticmethod(lambda: None)

    def __init__(self, scores, labels, batch_size=2):
        self.scores, self.labels, self.batch_size = torch.tensor(scores).float(), torch.tensor(labels), batch_size
        self.num_images = len(labels)

    def __iter__(self):
        return iter(zip(self.scores.split(self.batch_size), self.labels.split(self.batch_size), strict=True))


class Stream(Batches):
    """A loader whose order is not fixed."""

    is_stream = True


def make_scores(answers, num_classes):
    return torch.nn.functional.one_hot(torch.tensor(answers), num_classes).tolist()


def count(scores, labels, num_classes, loader=Batches, **options):
    return evaluate(nn.Identity(), loader(scores, labels), WORLD, num_classes=num_classes, **options)


def test_the_numbers_are_those_of_a_count_by_hand():
    found = count(make_scores([0, 1, 1, 2, 0], 3), [0, 0, 1, 2, 2], 3, classes=("a", "b", "c"))
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert found.num_images == 5
    assert found.top1 == 60.0
    assert found.top5 == 100.0  # three classes
    assert found.hits.tolist() == [1, 0, 1, 1, 0]
    assert found.list_per_class() == {"a": 50.0, "b": 100.0, "c": 50.0}
    right, wrong = math.log(math.e + 2) - 1, math.log(math.e + 2)
    assert found.loss == pytest.approx((3 * right + 2 * wrong) / 5)


def test_plain_values_hold_the_same():
    found = count(make_scores([0, 1, 1], 2), [0, 0, 1], 2).to_values()
    assert found.pop("loss") == pytest.approx((2 * (math.log(math.e + 1) - 1) + math.log(math.e + 1)) / 3)
    assert found == {
        "num_images": 3, "top1": 200 / 3, "top5": 100.0, "per_class": {"0": 50.0, "1": 100.0},
        "confusion": [[1, 1], [0, 1]],
    }  # fmt: skip


def test_top5_counts_the_five_most_probable():
    falling = list(range(7, 0, -1))  # class 0 is the most probable
    found = count([falling] * 7, list(range(7)), 7)
    assert found.num_top5 == 5
    assert found.top1 == pytest.approx(100 / 7)
    assert found.top5 == pytest.approx(500 / 7)


def test_a_class_without_images_has_no_accuracy():
    assert count(make_scores([0, 1], 3), [0, 0], 3).list_per_class() == {"0": 50.0, "1": None, "2": None}


def test_images_without_a_label_do_not_count():
    found = count(make_scores([0, 1, 1, 0], 2), [0, -1, -2, 1], 2)
    assert found.num_images == 2
    assert found.hits.tolist() == [1, 2, 2, 0]
    assert found.top1 == 50.0


def test_no_images_at_all_are_no_error():
    found = count(make_scores([0], 2), [-1], 2)
    assert (found.num_images, found.top1, found.top5, found.loss) == (0, 0.0, 0.0, 0.0)


def test_a_stream_has_no_hits():
    assert count(make_scores([0, 1], 2), [0, 0], 2, loader=Stream).hits is None


def test_a_teacher_gives_the_labels_of_what_could_be_read():
    teacher = nn.Linear(2, 2, bias=False)
    teacher.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # the other class
    found = count(make_scores([0, 1, 1], 2), [-1, -1, -2], 2, teacher=teacher)
    assert found.confusion.tolist() == [[0, 1], [1, 0]]
    assert found.hits.tolist() == [0, 0, 2]


def test_the_network_is_in_eval_mode_for_the_time():
    class Looks(nn.Module):
        def forward(self, x):
            modes.append((self.training, torch.is_grad_enabled()))
            return x

    modes, model = [], Looks()
    evaluate(model, Batches(make_scores([0, 1], 2), [0, 1]), WORLD, num_classes=2)
    assert modes == [(False, False)]
    assert model.training


def test_batches_are_told_of():
    sizes = []
    count(make_scores([0, 1, 1], 2), [0, 0, 1], 2, on_batch=lambda labels: sizes.append(len(labels)))
    assert sizes == [2, 1]


def test_labels_beyond_the_outputs_are_an_error():
    with pytest.raises(DataError, match="an image has the label 2, the network has 2 classes"):
        count(make_scores([0, 1], 2), [0, 2], 2)


@pytest.mark.parametrize(("model", "match"), [
    (nn.Unflatten(1, (2, 1)), r"the network gives \(2, 2, 1\); expected scores \(N, classes\), it must be a class"),
    (nn.Linear(2, 3), "the network gives 3 scores for 2 classes"),
])  # fmt: skip
def test_what_is_no_classifier_is_refused(model, match):
    with pytest.raises(DataError, match=match):
        evaluate(model, Batches(make_scores([0, 1], 2), [0, 1]), WORLD, num_classes=2)


def test_several_answers_are_no_scores():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(DataError, match="the network gives tuple; expected scores"):
        evaluate(Pair(), Batches(make_scores([0, 1], 2), [0, 1]), WORLD, num_classes=2)


# On images


class Bright(nn.Module):
    """Class 1 for bright images."""

    def forward(self, x):
        level = x.mean((1, 2, 3))
        return torch.stack([-level, level], 1)


FORM = InputFormat((3, 8, 8), (0.5,) * 3, (0.25,) * 3)


def load(images, batch_size=4, world=WORLD, **options):
    return EvalLoader(images, FORM, batch_size=batch_size, workers=0, world=world, **options)


def test_a_ragged_last_batch_counts_as_it_is(tmp_path):
    data = open_data(str(make_two_folders(tmp_path, num_val=5)), is_evaluation=True)
    found = evaluate(Bright(), load(data.val), WORLD, num_classes=2, classes=data.classes)
    assert found.confusion.tolist() == [[5, 0], [0, 5]]
    assert found.list_per_class() == {"cat": 100.0, "dog": 100.0}
    assert found.hits.tolist() == [1] * 10


def test_unreadable_images_do_not_count(tmp_path):
    data = open_data(str(make_folder(tmp_path, num=3)), is_evaluation=True)
    (tmp_path / "dog" / "0.png").write_bytes(b"")
    found = evaluate(Bright(), load(data.val, max_bad=1), WORLD, num_classes=2)
    assert found.confusion.tolist() == [[3, 0], [0, 2]]
    assert found.hits.tolist() == [1, 1, 1, 2, 1, 1]
    with pytest.raises(DataError, match=r"1 image cannot be read, at most 0 are skipped: .*dog/0.png"):
        evaluate(Bright(), load(data.val), WORLD, num_classes=2)


def test_processes_add_up_to_one(tmp_path, monkeypatch):
    """Each of two processes evaluates its share; what they would send each other is added up by hand."""
    data = open_data(str(make_folder(tmp_path, num=4)), is_evaluation=True)
    (tmp_path / "cat" / "1.png").write_bytes(b"")
    sent = []
    for rank in range(2):
        world = World(torch.device("cpu"), rank, 2)
        monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: sent.append(tensor.clone()))
        evaluate(Bright(), load(data.val, 3, world, max_bad=1), world, num_classes=2)
    half = len(sent) // 2
    flags, confusion, _, hits = (a + b for a, b in zip(sent[:half], sent[half:], strict=True))
    assert flags.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert confusion.tolist() == [[3, 0], [0, 4]]
    assert hits.tolist() == [1, 2, 1, 1, 1, 1, 1, 1]


# Memory


class Hungry(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


ERRORS = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_in_evaluation_says_which_batch_size_to_try(error):
    match = r"^out of memory with batch-size 2; try --batch-size 1$"
    with pytest.raises(OptionError, match=match):
        evaluate(Hungry(error), Batches(make_scores([0, 1], 2), [0, 1]), WORLD, num_classes=2)


def test_out_of_memory_in_training_says_which_batch_size_to_try():
    match = r"^out of memory with batch_size 64; try --set batch_size=32$"
    with pytest.raises(OptionError, match=match), quote_batch_size("batch_size", 64):
        raise ERRORS[0]
    with pytest.raises(OptionError, match=match):  # validation between epochs
        evaluate(
            Hungry(ERRORS[0]), Batches(make_scores([0, 1], 2), [0, 1]), WORLD, num_classes=2,
            quoting=quote_batch_size("batch_size", 64),
        )  # fmt: skip


def test_one_image_that_does_not_fit_needs_a_smaller_size():
    with (
        pytest.raises(OptionError, match="batch_size 1; try a smaller --input-size"),
        quote_batch_size("batch_size", 1),
    ):
        raise ERRORS[0]


def test_a_batch_too_small_for_batch_norm_says_what_to_try():
    norm = torch.nn.BatchNorm2d(4)
    match = r"^with batch_size 1 a batch norm gets one value .*--set batch_size=2, --set batch_norm=frozen or a larger"
    with pytest.raises(OptionError, match=match), quote_batch_size("batch_size", 1):
        norm(torch.zeros(1, 4, 1, 1))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), ValueError("shapes differ"), DataError("out of memory"), KeyError("out of memory")],
)
def test_other_errors_are_left_as_they_are(error):
    with pytest.raises(type(error)) as caught, quote_batch_size("batch_size", 64):
        raise error
    assert caught.value is error


def test_scores_are_frozen():
    with pytest.raises(AttributeError):
        Scores(torch.zeros(2, 2), 0, 0.0).loss = 1.0


# The world


def test_one_process_is_a_world():
    with join_world("cpu") as world:
        assert (world.device, world.rank, world.size) == (torch.device("cpu"), 0, 1)
        assert world.is_main
        assert not world.is_cuda
        world.wait()
        assert world.add_up(torch.ones(2)).tolist() == [1, 1]


def test_a_process_that_has_ended_is_one_line_for_the_others(monkeypatch):
    there = {"device": "cpu", "global_rank": 1, "world_size": 2, "distributed": True}
    monkeypatch.setattr("se_inject.world.init_distributed_device_so", lambda _: there)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    match = r"^another of the 2 processes has ended; start them again, a fine-tune with --resume$"
    with pytest.raises(TrainingError, match=match), join_world("cpu"):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:5] Read error\nmore")
    with pytest.raises(RuntimeError, match=r"^a mistake$"), join_world("cpu"):
        raise RuntimeError("a mistake")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "vulkan", "hpu"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device):
    with pytest.raises(OptionError, match=rf"^device is '{device}', which cannot be used here: .{{5,220}}$"):
        choose_device(device)
