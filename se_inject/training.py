"""Training: run a recipe on a network, from its start or from a checkpoint.

Takes a network, batches and a recipe, changes the network's weights and gives the `Outcome`. The recipe's stages (the
blocks alone, everything) follow each other, each along a cosine. Every random draw is a function of the seed and the
step, so that a run that was interrupted ends, on one CPU process, with the same bits as one that was not. timm has the
losses, optimizers, schedules, mixup and the moving average.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from timm.utils.distributed import distribute_bn
from torch import Tensor, nn

from se_inject.calibration import calibrate
from se_inject.checkpoints import CHECKPOINT, Checkpoint, read_checkpoint, write_checkpoint
from se_inject.errors import DataError, SEInjectError, TrainingError, get_first_line
from se_inject.jobs import InterruptedTrainingError, Job, Outcome
from se_inject.reading import Bad, seed_all
from se_inject.rewrite import blocks
from se_inject.runlog import RunLog
from se_inject.scores import Scores, evaluate, is_out_of_memory, quote_batch_size
from se_inject.signals import Signals
from se_inject.stages import Stage, list_stages, set_learning, set_modes
from se_inject.tasks import autocast, make_optimizer, make_scheduler, make_task

_CHECK_EVERY = 10
"""Steps between looks at the loss, which make a GPU wait."""
Keep = Callable[[nn.Module, str], None]


def train(job: Job, folder: Path, log: RunLog, keep: Keep, *, resume: bool = False) -> Outcome:
    """Train a network.

    Args:
        job: What is to be done.
        folder: For checkpoints; exists.
        log: Is told what happens.
        keep: Writes the network under a name: "last" after each epoch, "best" where it is the best so far.
        resume: Go on from the checkpoint in the folder, if there is one.

    Raises:
        TrainingError: The loss is no number, the checkpoint is of another run, or the run was interrupted (a signal;
            the checkpoint is written).
        DataError: Images or labels are bad.
        OptionError: The batch does not fit into memory.
        ArtifactError: A checkpoint cannot be written or read.
    """
    return _Run(job, folder, log, keep).run(resume=resume)


class _Run:
    """A run under way: the network, its average, and the step that is next."""

    def __init__(self, job: Job, folder: Path, log: RunLog, keep: Keep) -> None:
        self.job, self.folder, self.log, self.keep = job, folder, log, keep
        recipe, world = job.recipe, job.world
        self.recipe, self.dependence = recipe, 0.0  # settled before the first step
        self.model = job.model
        if recipe.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.ema = ModelEmaV3(self.model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.scores: Scores | None = None
        self.optimizer_state: Mapping[str, Any] = {}
        self.seconds = 0.0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=world.device)
        self._saved_at = time.monotonic()
        self._mix = Mixup(
            recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=job.num_classes
        ) if recipe.mixes else None  # fmt: skip
        self._erase = RandomErasing(recipe.erase, mode="pixel", device=str(world.device)) if recipe.erase else None

    def run(self, *, resume: bool) -> Outcome:
        with Signals() as signals:
            return self._run(signals, resume=resume)

    def _run(self, signals: Signals, *, resume: bool) -> Outcome:
        found = read_checkpoint(self.folder, self.job.settings) if resume else None
        self.log.begin(self.job.num_steps, found.step if found else 0)
        if found is not None:
            self._restore(found)
        else:
            self._begin(signals)
        stages = list_stages(self.recipe, self.job.num_steps, has_blocks=bool(blocks(self.model)))
        for stage in stages:
            if self.step < stage.last:
                self._run_stage(stage, signals)
        assert self.scores is not None
        return Outcome(self._get_result(), self.scores, self.history, self.seconds, self._compute_rate())

    def _begin(self, signals: Signals) -> None:
        """Look at the images, and validate the network as it is; nothing is lost if that is stopped."""
        doing = "fitting the classifier" if self.job.fresh else "looking at the images"
        job, quoting = self.job, quote_batch_size("batch_size", self.recipe.batch_size)
        try:
            with signals.at_once():
                with quoting, self.log.showing(doing):
                    self.recipe, self.dependence = calibrate(
                        self.model, job.train, self.recipe, job.world, fresh=job.fresh, compute=self._compute
                    )
                self._note(self._validate())
        except KeyboardInterrupt as error:
            raise InterruptedTrainingError(
                f"stopped before the first step of {self.job.num_steps}; the same command with --resume goes on"
            ) from error

    @property
    def _unreadable(self) -> dict[str, Bad]:
        return {"train": self.job.train.bad, "val": self.job.val.bad}

    def _compute(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.recipe, self.job.world)

    def _run_stage(self, stage: Stage, signals: Signals) -> None:
        job, recipe = self.job, self.recipe
        set_learning(self.model, stage, job.fresh, recipe)
        task = make_task(job.model, recipe, job.teacher, job.num_classes)
        if job.compiled:
            task.compile()
        if job.world.size > 1:
            ids = [job.world.device.index] if job.world.is_cuda else None
            task.prepare_distributed(device_ids=ids)
        optimizer = make_optimizer(self.model, recipe, stage.name, job.fresh)
        scheduler = make_scheduler(optimizer, recipe, stage.last - stage.first)
        if self.optimizer_state:
            optimizer.load_state_dict(dict(self.optimizer_state))
            self.optimizer_state = {}
        while self.step < stage.last:
            epoch, first = divmod(self.step, job.train.num_steps)
            is_asked = False
            with quote_batch_size("batch_size", recipe.batch_size):
                for images, labels in job.train.iterate(epoch, first):
                    set_modes(self.model, stage, recipe)
                    scheduler.step_update(self.step - stage.first + 1)  # at 0 the rates are zero
                    start = time.perf_counter()
                    loss = self._take_step(task, optimizer, images, labels)
                    self.seconds += time.perf_counter() - start
                    is_asked = self._look(stage, loss, optimizer, signals)
                    if is_asked or self.step == stage.last:
                        break
            self._pause(stage, optimizer, is_asked=is_asked)

    def _take_step(
        self, task: ClassificationTask, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
    ) -> Tensor:
        recipe, world = self.recipe, self.job.world
        seed_all(recipe.seed, self.step, world.rank)
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self._erase is not None:
            images = self._erase(images)
        if self._mix is not None:
            images, labels = self._mix(images, labels.clamp_min(0))
        with self._compute(), self._quote_size(images):
            loss: Tensor = task(images, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip:
            nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.grad is not None), recipe.clip)
        optimizer.step()
        loss = loss.detach()
        is_first_bad = ~loss.isfinite() & (self._bad_step < 0)
        self._bad_step = torch.where(is_first_bad, self.step, self._bad_step)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        return loss

    @contextlib.contextmanager
    def _quote_size(self, images: Tensor) -> Iterator[None]:
        """Turn an error of the first step, before which the network ran in eval mode alone, into one line."""
        try:
            yield
        except RuntimeError as error:
            if self.step or isinstance(error, SEInjectError) or is_out_of_memory(error):
                raise
            raise DataError(
                f"{type(self.model).__name__} does not run in train mode on images {tuple(images.shape[1:])}: "
                f"{get_first_line(error)}; try another --input-size"
            ) from error

    def _look(self, stage: Stage, loss: Tensor, optimizer: torch.optim.Optimizer, signals: Signals) -> bool:
        """Show where the run is, and check that it is well; tells whether somebody asked it to stop."""
        job = self.job
        is_due = self.step % _CHECK_EVERY == 0 or self.step == stage.last
        is_alone = job.world.size == 1
        if is_due or (is_alone and not job.world.is_cuda):
            self._check_loss()
        self.log.advance()
        if not is_due:
            return is_alone and signals.is_asked
        self.log.note_step(
            self.step,
            epoch=self.step / job.train.num_steps,
            stage=stage.name,
            loss=float(job.world.add_up(loss.clone()) / job.world.size),
            rates={str(group["name"]): float(group["lr"]) for group in optimizer.param_groups},
            images_per_second=self._compute_rate(),
        )
        job.train.bad.share(job.world)
        job.train.bad.check()
        # Processes have clocks of their own: they write at the ends of epochs alone, where all of them are. There a
        # checkpoint follows the validation, which a run that goes on from it would not do again.
        is_late = time.monotonic() - self._saved_at > 60 * self.recipe.checkpoint_minutes
        if is_alone and is_late and not self._is_at_end:
            self._save(stage, optimizer)
        asked = torch.tensor(int(signals.is_asked), device=job.world.device)
        return bool(job.world.add_up(asked))  # all of them stop at the same step

    def _compute_rate(self) -> float:
        return self.step * self.recipe.batch_size / self.seconds if self.seconds else 0.0

    def _check_loss(self) -> None:
        """Refuse to go on with a loss that is no number; what is on disk is from before."""
        bad = self.job.world.add_up((self._bad_step >= 0).long())
        if int(bad):
            raise self._refuse(f"the loss is no finite number at step {int(self._bad_step) + 1}")

    def _refuse(self, what: str) -> TrainingError:
        recipe = self.job.recipe
        is_kept = (self.folder / CHECKPOINT).is_file()
        kept = f"the last good checkpoint is kept in {self.folder}" if is_kept else "there is no checkpoint yet"
        return TrainingError(
            f"{what} of {self.job.num_steps}; {kept}; try --set "
            f"lr={recipe.lr / 10:g} --set se_lr={(recipe.se_lr or recipe.lr) / 10:g}, or --set clip=1"
        )

    def _pause(self, stage: Stage, optimizer: torch.optim.Optimizer, *, is_asked: bool) -> None:
        """Validate and save at the end of an epoch; save and stop where that was asked for."""
        self._check_loss()
        if self._is_at_end:
            self._note(self._validate())
        if self._is_at_end or is_asked:
            self._save(stage, optimizer)
        if is_asked:
            raise InterruptedTrainingError(
                f"stopped after step {self.step} of {self.job.num_steps}; the same command with --resume goes on"
            )

    @property
    def _is_at_end(self) -> bool:
        """Whether an epoch, or the run, is over."""
        return self.step == self.job.num_steps or self.step % self.job.train.num_steps == 0

    def _validate(self) -> Scores:
        job = self.job
        self.log.begin_validation(job.val.num_own)
        if job.world.size > 1:  # each process knows the statistics of its own images
            for network in dict.fromkeys((self.model, self._get_result())):  # in the same order everywhere
                distribute_bn(network, job.world.size, reduce=True)
        scores = evaluate(
            self._get_result(), job.val, job.world, num_classes=job.num_classes, classes=job.classes,
            teacher=None if job.is_labelled else job.teacher, temperature=self.recipe.label_temperature,
            compute=self._compute, on_batch=lambda labels: self.log.advance_validation(len(labels)),
            quoting=quote_batch_size("batch_size", self.recipe.batch_size),
        )  # fmt: skip
        if self.step and not math.isfinite(scores.loss):  # what is on disk is from before
            raise self._refuse(f"the validation's loss is no finite number after step {self.step}")
        return scores

    def _note(self, scores: Scores) -> None:
        epoch = self.step / self.job.train.num_steps
        values = {"step": self.step, "epoch": epoch, "val_loss": scores.loss, "top1": scores.top1, "top5": scores.top5,
                  "batch_norm": self.recipe.batch_norm, "label_temperature": self.recipe.label_temperature,
                  "se_lr": self.recipe.se_lr, "dependence": self.dependence}  # fmt: skip
        is_best = all(scores.top1 > item["top1"] for item in self.history if item["step"])
        self.history.append(values)
        self.scores = scores
        self.log.note_validation(values)
        if self.job.world.is_main and self.step:
            for name in ("last", *(["best"] if is_best else [])):
                self.keep(self._get_result(), name)

    def _get_result(self) -> nn.Module:
        """Return the network that is evaluated; the average of no step yet is the network itself."""
        return self.model if self.ema is None or not self.step else self.ema.module

    def _save(self, stage: Stage, optimizer: torch.optim.Optimizer) -> None:
        is_over = self.step == stage.last  # the next stage begins with an optimizer of its own
        if self.job.world.is_main:
            write_checkpoint(self.folder, Checkpoint(
                self.step, self.model.state_dict(), None if self.ema is None else self.ema.module.state_dict(),
                {} if is_over else optimizer.state_dict(), self.job.settings, self.history, self.seconds,
                {name: bad.list_names() for name, bad in self._unreadable.items()},
            ))  # fmt: skip
        self.job.world.wait()
        self._saved_at = time.monotonic()

    def _restore(self, found: Checkpoint) -> None:
        self.model.load_state_dict(dict(found.model))
        if self.ema is not None and found.ema is not None:
            self.ema.module.load_state_dict(dict(found.ema))
        self.step, self.history, self.optimizer_state = found.step, list(found.history), found.optimizer
        self.seconds, settled = found.seconds, found.history[0]
        for name, bad in self._unreadable.items():
            bad.note_names(set(found.unreadable.get(name, ())))
        self.dependence = settled.get("dependence", 0.0)  # older recipes had no use for it
        self.recipe = self.recipe.settle(settled["batch_norm"], settled["label_temperature"], self.dependence)
        if self.step == self.job.num_steps:  # it is over
            self.scores = self._validate()
