"""The training loop, on scikit-learn's digits and a net that is trained in the test."""

import copy
import json
import math
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from se_inject import blocks, eject, inject
from se_inject.checkpoints import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from se_inject.datasets import open_data
from se_inject.errors import ArtifactError, DataError, OptionError, TrainingError
from se_inject.formats import InputFormat
from se_inject.jobs import InterruptedTrainingError, Job
from se_inject.loaders import EvalLoader, TrainLoader
from se_inject.recipe import Recipe
from se_inject.recipe_files import read_recipe
from se_inject.runlog import CURVES, METRICS, RunLog, draw_curves, read_metrics
from se_inject.scores import evaluate
from se_inject.signals import Signals
from se_inject.stages import Stage, list_stages
from se_inject.tasks import autocast, make_optimizer, make_scheduler, make_task, make_teacher
from se_inject.training import train
from se_inject.world import World
from tests.digits import DigitNet, write_digits

FORM = InputFormat((1, 8, 8), (0.3,), (0.3,))
SMALL = Recipe(
    label_temperature=1.0,
    batch_norm="train",
    optimizer="sgd",
    clip=0,
    smoothing=0.1,
    gates_share=0.1,
    epochs=2,
    batch_size=16,
    crop="none",
    hflip=0,
    workers=0,
    lr=0.02,
    se_lr=0.1,
    gates_lr=0.2,
)
pytestmark = pytest.mark.filterwarnings("ignore:Cosine annealing scheduler:UserWarning")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(str(write_digits(tmp_path_factory.mktemp("digits"), 160)), mode="L")


def make_job(digits, recipe=SMALL, model=None, **options):
    torch.manual_seed(0)
    model = inject(DigitNet(), r=4, example=torch.zeros(2, 1, 8, 8)) if model is None else model
    world = World(torch.device("cpu"))
    return Job(
        model,
        TrainLoader(digits, FORM, recipe, world, num_classes=10),
        EvalLoader(digits.val, FORM, batch_size=32, workers=0, world=world, num_classes=10),
        recipe,
        world,
        10,
        **{"settings": {"recipe": recipe.to_values()}, **options},
    )


def keep_nothing(model, name):
    pass


def run(job, folder, *, resume=False, keep=keep_nothing):
    folder.mkdir(exist_ok=True)
    with RunLog(folder, "test") as log:
        return train(job, folder, log, keep, resume=resume)


def assert_same_states(left, right):
    assert list(left) == list(right)
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def test_the_stages_share_the_steps():
    assert list_stages(replace(SMALL, gates_share=0.25), 20, has_blocks=True) == [
        Stage("gates", 0, 5),
        Stage("all", 5, 20),
    ]
    assert list_stages(replace(SMALL, gates_share=0), 20, has_blocks=True) == [Stage("all", 0, 20)]
    assert list_stages(replace(SMALL, gates_share=1), 20, has_blocks=True) == [Stage("gates", 0, 20)]
    assert list_stages(replace(SMALL, train="gates"), 20, has_blocks=True) == [Stage("gates", 0, 20)]


def test_a_network_without_blocks_has_the_whole_budget_for_everything():
    assert list_stages(replace(SMALL, train="gates"), 20, has_blocks=False) == [Stage("all", 0, 20)]


def test_the_losses_of_two_steps_are_these(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("se_inject.training._CHECK_EVERY", 1)
    recipe = replace(SMALL, epochs=2 / 7, gates_share=0.5)
    run(make_job(digits, recipe), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run" / METRICS) if "loss" in line]
    assert [(line["step"], line["stage"]) for line in lines] == [(1, "gates"), (2, "all")]
    # Literals of one run; sums on other processors are added in another order.
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES, rel=1e-4)


def test_in_the_first_stage_the_blocks_alone_change(digits, tmp_path):
    job = make_job(digits, replace(SMALL, train="gates", ema=0))
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    outcome = run(job, tmp_path / "run")
    inside = tuple(f"{path}." for path in blocks(outcome.model))
    changed = {key for key, value in outcome.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(inside)}


def test_no_state_of_a_frozen_network_changes(digits, tmp_path):
    class Stateful(DigitNet):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.InstanceNorm2d(16, track_running_stats=True)
            torch.nn.utils.parametrizations.spectral_norm(self.stem)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if self.training:
                self.seen += 1
            x = torch.relu(self.norm(self.bn(self.stem(x))))
            return self.fc(self.block2(self.down(self.block1(x))).mean((2, 3)))

    model = inject(Stateful(), r=4, example=torch.zeros(2, 1, 8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    outcome = run(make_job(digits, replace(SMALL, train="gates", ema=0), model), tmp_path / "run")
    inside = tuple(f"{path}." for path in blocks(outcome.model))
    changed = {key for key, value in outcome.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(inside)}


def test_outputs_that_are_no_scores_in_train_mode_are_refused(digits, tmp_path):
    class Features(DigitNet):
        def forward(self, x):
            features = self.block2(self.down(self.block1(self.bn(self.stem(x)).relu()))).mean((2, 3))
            return (features, self.fc(features)) if self.training else self.fc(features)

    model = inject(Features(), r=4, example=torch.zeros(2, 1, 8, 8))
    with pytest.raises(DataError, match="the network gives 32 scores for 10 classes"):
        run(make_job(digits, model=model), tmp_path / "run")


def test_a_network_that_does_not_run_in_train_mode_says_so_in_one_line(digits, tmp_path):
    class Auxiliary(DigitNet):
        """As torchvision's Inception, whose auxiliary head needs larger images than it does."""

        def forward(self, x):
            if self.training:
                torch.nn.functional.avg_pool2d(x, 9)
            return super().forward(x)

    model = inject(Auxiliary(), r=4, example=torch.zeros(2, 1, 8, 8))
    with pytest.raises(
        DataError, match=r"does not run in train mode on images \(1, 8, 8\): .*; try another --input-size"
    ):
        run(make_job(digits, model=model), tmp_path / "run")


def test_the_teacher_sees_the_images_as_they_were(digits):
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(64, 10, bias=False)

        def forward(self, x):
            return self.fc(x.neg_().flatten(1))

    torch.manual_seed(0)
    model = InPlace()
    images, labels = next(make_job(digits).train.iterate(0))
    task = make_task(model, replace(SMALL, distill=1.0), make_teacher(model), 10).eval()
    # They are the same network, whose distance is zero where both are handed the same.
    assert task(images.clone(), labels)["loss"].item() == pytest.approx(0, abs=1e-6)
    job = make_job(digits)
    scores = evaluate(model, job.val, job.world, num_classes=10, teacher=make_teacher(model))
    assert scores.top1 == 100


def test_a_fresh_classifier_learns_in_the_first_stage_too(digits, tmp_path):
    fresh = frozenset({"fc.weight", "fc.bias"})
    job = make_job(digits, replace(SMALL, train="gates", ema=0), fresh=fresh)
    before = job.model.fc.weight.clone()
    run(job, tmp_path / "run")
    assert not torch.equal(job.model.fc.weight, before)
    groups = {g["name"]: g["lr"] for g in make_optimizer(job.model, SMALL, "all", fresh).param_groups}
    assert groups["fresh"] == SMALL.head_lr


def test_an_optimizer_that_cannot_be_made_here_is_one_line(digits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = replace(SMALL, optimizer="fusedadam")
    with pytest.raises(OptionError, match=r"^the optimizer fusedadam cannot be made here: CUDA required for APEX"):
        make_optimizer(make_job(digits, recipe).model, recipe, "all")


@pytest.mark.parametrize("se_lr", [1e-4, 0.2])
def test_each_group_ends_at_its_own_share_of_its_peak(digits, se_lr):
    recipe = replace(SMALL, lr=0.02, se_lr=se_lr, warmup_share=0.25, min_lr_share=0.1)
    optimizer = make_optimizer(make_job(digits, recipe).model, recipe, "all")
    peaks = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert set(peaks.values()) == {0.02, se_lr}
    scheduler = make_scheduler(optimizer, recipe, 8)
    shares = [0.5, cosine(2), cosine(3), cosine(4), cosine(5), cosine(6), cosine(7), 0.1]
    for step, share in enumerate(shares, 1):
        scheduler.step_update(step)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({name: share * peak for name, peak in peaks.items()})


def cosine(step):
    return 0.1 + 0.9 * (1 + math.cos(math.pi * step / 8)) / 2


def test_frozen_batch_norms_keep_their_statistics(digits, tmp_path):
    job = make_job(digits, replace(SMALL, batch_norm="frozen", epochs=0.5))
    before = job.model.bn.running_mean.clone()
    run(job, tmp_path / "run")
    assert torch.equal(job.model.bn.running_mean, before)


def test_everything_learns_afterwards(digits, tmp_path):
    job = make_job(digits, replace(SMALL, ema=0))
    before = {name: parameter.detach().clone() for name, parameter in job.model.named_parameters()}
    run(job, tmp_path / "run")
    assert all(not torch.equal(p, before[name]) for name, p in job.model.named_parameters())


def test_the_average_is_what_is_scored_and_given(digits, tmp_path):
    job = make_job(digits)
    outcome = run(job, tmp_path / "run")
    assert outcome.model is not job.model
    assert type(outcome.model) is type(job.model)
    assert not torch.equal(outcome.model.fc.weight, job.model.fc.weight)
    assert outcome.history[0]["step"] == 0
    assert outcome.history[-1]["top1"] == outcome.scores.top1


def test_a_run_writes_metrics_curves_and_event_files(digits, tmp_path):
    kept = []
    outcome = run(make_job(digits), tmp_path / "run", keep=lambda model, name: kept.append(name))
    lines = read_metrics(tmp_path / "run" / METRICS)
    assert [line["epoch"] for line in lines if "top1" in line] == [0, 1, 2]
    assert {"step", "epoch", "stage", "loss", "lr", "images_per_second"} == set(lines[1])
    assert (tmp_path / "run" / CURVES).read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [round(e.value, 3) for e in events.Scalars("val/top1")] == [round(h["top1"], 3) for h in outcome.history]
    assert kept.count("last") == 2
    assert "best" in kept


def test_what_a_run_that_began_anew_wrote_before_is_dropped(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for rate, num in ((0.1, 3), (0.2, 2)):
        with RunLog(tmp_path, "test") as log:
            log.begin(5, 0)
            for step in range(num):
                log.note_step(step + 1, epoch=0, stage="all", loss=1.0, rates={"backbone": rate}, images_per_second=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("lr/backbone")] == [(1, 0.2), (2, 0.2)]
    assert len(read_metrics(tmp_path / METRICS)) == 2


def test_lines_that_a_power_cut_left_behind_are_left_out(digits, tmp_path):
    outcome = run(make_job(digits, replace(SMALL, epochs=1)), tmp_path / "run")
    path = tmp_path / "run" / METRICS
    lines = read_metrics(path)
    with path.open("ab") as file:
        file.write(b'\0\0\0\0\n[1]\n{"step": 9\n\xff\n{"epo')
    assert read_metrics(path) == lines
    assert run(make_job(digits, replace(SMALL, epochs=1)), tmp_path / "run", resume=True).history == outcome.history
    draw_curves({"one": lines, "lost": []}, tmp_path / "curves.png")


def test_a_wish_to_end_before_the_first_step_is_fulfilled_at_once(digits, tmp_path, monkeypatch):
    def calibrate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr("se_inject.training.calibrate", calibrate)
    with pytest.raises(TrainingError, match=r"^stopped before the first step of \d+; the same command with --resume"):
        run(make_job(digits), tmp_path / "run")
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)  # before the run takes signals itself
        with pytest.raises(TrainingError, match=r"^stopped before the first step"):
            run(make_job(digits), tmp_path / "run")


def test_a_loss_that_is_no_number_before_the_first_checkpoint_says_so(digits, tmp_path):
    recipe = replace(SMALL, lr=1e30, gates_share=0.0, clip=0.0)
    with pytest.raises(TrainingError, match=r"no finite number .*; there is no checkpoint yet; try --set lr="):
        run(make_job(digits, recipe), tmp_path / "run")


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.0, "optimizer": "adamw"}, {"mixup": 0.2, "cutmix": 1.0, "erase": 0.5}]
)
@pytest.mark.parametrize("stop", [1, 4, 7, 9])
def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path, options, stop):
    """Stopped in the first stage, at its end, at the end of an epoch, and within one."""
    recipe = replace(SMALL, gates_share=0.29, **options)
    job = make_job(digits, recipe)
    whole = run(job, tmp_path / "whole")
    first = make_job(digits, recipe)
    with pytest.raises(InterruptedTrainingError, match=f"stopped after step {stop} of 14; .* --resume goes on"):
        run_until(first, tmp_path / "part", stop)
    second = make_job(digits, recipe)
    torch.manual_seed(7)  # another random state, as another process has
    outcome = run(second, tmp_path / "part", resume=True)
    assert_same_states(outcome.model.state_dict(), whole.model.state_dict())
    assert_same_states(second.model.state_dict(), job.model.state_dict())
    assert outcome.history == whole.history
    assert torch.equal(outcome.scores.confusion, whole.scores.confusion)
    own, expected = (
        [
            {k: v for k, v in line.items() if k != "images_per_second"}
            for line in read_metrics(tmp_path / name / METRICS)
        ]
        for name in ("part", "whole")
    )
    assert [line for line in own if "top1" in line] == [line for line in expected if "top1" in line]


def test_a_run_that_was_killed_while_it_validated_validates_again(digits, tmp_path):
    recipe = replace(SMALL, checkpoint_minutes=1e-9)
    whole = run(make_job(digits, recipe), tmp_path / "whole")
    job, calls = make_job(digits, recipe), []

    class KilledError(Exception):
        pass

    class Validation:
        def __iter__(self):
            calls.append(1)
            if len(calls) == 3:  # before the first step, after an epoch, at the end
                raise KilledError
            return iter(job.val)

        def __getattr__(self, name):
            return getattr(job.val, name)

    with pytest.raises(KilledError):
        run(replace(job, val=Validation()), tmp_path / "part")
    kept = []
    outcome = run(make_job(digits, recipe), tmp_path / "part", resume=True, keep=lambda model, name: kept.append(name))
    assert outcome.history == whole.history
    assert "last" in kept


def run_until(job, folder, stop):
    """Run, and send the process a Ctrl-C in the given step."""
    iterate = job.train.iterate
    seen = [0]

    def count(*args):
        for batch in iterate(*args):
            seen[0] += 1
            if seen[0] == stop:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    job.train.iterate = count
    return run(job, folder)


def test_a_second_ctrl_c_is_at_once(digits, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in the background without it
    job = make_job(digits)
    original = job.model.fc.forward

    def interrupt(x):
        if job.model.training:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return original(x)

    job.model.fc.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_in_another_thread_too(digits, tmp_path):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(run(make_job(digits), tmp_path / "run")))
    thread.start()
    thread.join()
    assert len(outcomes) == 1


def test_a_run_that_is_over_is_not_run_again(digits, tmp_path):
    whole = run(make_job(digits), tmp_path / "run")
    again = run(make_job(digits), tmp_path / "run", resume=True)
    assert again.seconds == whole.seconds > 0
    assert again.scores.top1 == whole.scores.top1
    assert_same_states(again.model.state_dict(), whole.model.state_dict())


def test_a_run_goes_on_with_images_that_were_moved(digits, tmp_path):
    def make(**data):
        job = make_job(digits)
        return replace(job, settings={**job.settings, "data": data})

    whole = run(make(origin="here", digest="a"), tmp_path / "run")
    assert run(make(origin="there", digest="a"), tmp_path / "run", resume=True).seconds == whole.seconds
    with pytest.raises(TrainingError, match=r"data.digest was 'a' and is 'b'; data.origin was 'here' and is 'there'"):
        run(make(origin="there", digest="b"), tmp_path / "run", resume=True)


def test_another_run_is_not_gone_on_with(digits, tmp_path):
    run(make_job(digits), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"is of another run: recipe.lr was 0.02 and is 0.5; .*--run"):
        run(make_job(digits, replace(SMALL, lr=0.5)), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "content", [b"", b"not a zip", {"format": "other"}, {"format": "se-inject checkpoint", "version": 9}]
)
def test_a_checkpoint_that_is_none_is_an_error(tmp_path, content):
    path = tmp_path / CHECKPOINT
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        names = ("step", "model", "ema", "optimizer", "settings", "history", "seconds") if "version" in content else ()
        torch.save({**content, **dict.fromkeys(names)}, path)
    with pytest.raises(ArtifactError, match="cannot be read|is no|has format version 9, this se-inject reads up"):
        read_checkpoint(tmp_path, {})


def test_a_checkpoint_that_changed_on_the_disk_is_an_error(tmp_path):
    values = {"model": {"w": torch.arange(4000.0)}, "optimizer": {"state": {0: {"momentum": torch.ones(3)}}}}
    write_checkpoint(
        tmp_path, Checkpoint(3, ema=None, settings={"lr": 0.1}, history=[{"top1": 1.0}], seconds=2.0, **values)
    )
    assert read_checkpoint(tmp_path, {"lr": 0.1}).step == 3
    path = tmp_path / CHECKPOINT
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(4000.0)[2000].numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is damaged: its digest is not that of what it holds"):
        read_checkpoint(tmp_path, {"lr": 0.1})


def test_a_checkpoint_without_a_digest_is_of_the_version_before(tmp_path):
    write_checkpoint(tmp_path, Checkpoint(3, {}, None, {}, {}, [], 2.0))
    content = torch.load(tmp_path / CHECKPOINT)
    torch.save({**content, "version": 1, "digest": None}, tmp_path / CHECKPOINT)
    assert read_checkpoint(tmp_path, {}).step == 3


def test_without_a_checkpoint_resuming_is_beginning(digits, tmp_path):
    assert run(make_job(digits), tmp_path / "run", resume=True).history[0]["step"] == 0


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(digits, tmp_path):
    job = make_job(digits)
    iterate = job.train.iterate

    def spoil(epoch, first):
        for step, (images, labels) in enumerate(iterate(epoch, first)):
            yield (images * float("nan") if (epoch, step) == (1, 2) else images), labels

    job.train.iterate = spoil
    with pytest.raises(
        TrainingError, match=r"no finite number at step 10 of 14; the last good checkpoint is kept in .*lr=0.002"
    ):
        run(job, tmp_path / "run")
    found = read_checkpoint(tmp_path / "run", job.settings)
    assert found.step == 7
    assert all(value.isfinite().all() for value in found.model.values())


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(digits, tmp_path, monkeypatch):
    job = make_job(digits)
    real, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr("se_inject.checkpoints.torch.save", save)
    with pytest.raises(ArtifactError, match=r"checkpoint.pt cannot be written: No space left on device"):
        run(job, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run", job.settings).step == 7
    assert not list((tmp_path / "run").glob("*.part"))


def test_the_teacher_draws_the_outputs_to_its_own(digits, tmp_path):
    torch.manual_seed(0)
    job = make_job(digits, replace(SMALL, distill=1.0, temperature=2.0, ema=0))
    teacher = make_teacher(job.model)
    with torch.no_grad():
        for parameter in job.model.fc.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    images, _ = next(iter(job.val))

    def measure():
        with torch.no_grad():
            return (job.model.eval()(images) - teacher(images)).abs().mean()

    before = measure()
    run(replace(job, teacher=teacher), tmp_path / "run")
    assert measure() < 0.8 * before


def test_without_labels_the_teachers_answers_are_the_labels(digits, tmp_path):
    job = make_job(digits, replace(SMALL, distill=1.0))
    outcome = run(replace(job, teacher=make_teacher(job.model), is_labelled=False), tmp_path / "run")
    assert outcome.history[0]["top1"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["auto", "train", "frozen"])  # by rounding, "auto" is either of the others
def test_the_short_recipe_reaches_at_least_the_control(tmp_path, batch_norm):
    digits = open_data(str(write_digits(tmp_path / "digits")), mode="L")
    plain = replace(SMALL, epochs=1, lr=0.05)
    torch.manual_seed(0)
    trained = run(make_job(digits, plain, DigitNet()), tmp_path / "plain").model
    injected = inject(trained, r=4, example=torch.zeros(2, 1, 8, 8))
    fixed = ["epochs=1", "batch_size=16", "crop=none", "hflip=0", "workers=0", f"batch_norm={batch_norm}"]
    ahead = 0.0
    for seed in range(3):
        recipe = read_recipe("short", [*fixed, f"seed={seed}"])
        ours, theirs = (
            run(make_job(digits, recipe, copy.deepcopy(model)), tmp_path / f"{name}{seed}").scores
            for name, model in (("se", injected), ("control", eject(injected)))
        )
        assert ours.loss < theirs.loss
        assert ours.top1 > 97
        ahead += ours.top1 - theirs.top1
    # To one image of 1,347, which is as much as the processor's rounding decides.
    assert ahead > -0.23 or batch_norm != "auto"


def test_steps_can_be_compiled(digits, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda model, **options: compiled.append(model) or model)
    run(make_job(digits, compiled=True), tmp_path / "run")
    assert len(compiled) == 2


def test_bf16_is_an_option(digits, tmp_path):
    outcome = run(make_job(digits, replace(SMALL, precision="bf16", epochs=0.5)), tmp_path / "run")
    assert all(p.dtype is torch.float32 for p in outcome.model.parameters())
    assert outcome.scores.num_images == 40


@pytest.mark.parametrize(
    ("device", "computes", "expected"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_automatic_precision_is_bf16_where_a_gpu_computes_in_it(device, computes, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation: asked.append(including_emulation) or computes
    )
    monkeypatch.setattr("torch.autocast", lambda device, dtype, enabled: enabled)
    assert autocast(SMALL, World(torch.device(device))) is expected
    assert not any(asked)  # what is emulated does not count


def test_the_history_is_plain(digits, tmp_path):
    outcome = run(make_job(digits), tmp_path / "run")
    assert json.loads(json.dumps(outcome.history)) == outcome.history
    assert Path(tmp_path / "run" / CHECKPOINT).is_file()


LOSSES = [2.26621150970459, 2.5009167194366455]
