"""Deployment: write a network as a file for evaluation, which runs without its code and without se-inject.

Takes a network with or without blocks, gives a program of torch.export, an ONNX model, or an artifact. What is to be
written is read back, run, and compared with the network before it takes the target's place. The model is not changed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from se_inject.artifact import save
from se_inject.calls import Call, Entry, decode_call
from se_inject.errors import ExportError, ModelError, OptionError
from se_inject.examples import describe_shapes, fake_example, find_running, propose_examples
from se_inject.files import SUFFIXES, check_target, write_whole
from se_inject.fused import FusedSqueezeExcite
from se_inject.optimization import find_optimization, optimize
from se_inject.programs import (
    INSTALL,
    ONNX,
    TORCH,
    Program,
    check_packages,
    check_size,
    explain_failure,
    list_tensors,
    make_program,
)
from se_inject.rewrite import copy_model, find_plan
from se_inject.sources import Source
from se_inject.twin import get_device, get_dtype, make_twin

Format = Literal["torch.export", "onnx", "artifact"]

TOLERANCE = 1e-4
"""How far outputs may lie apart, relative to the largest: runtimes add in other orders. Types of 16 bits get more."""


@dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
        format: The kind of file.
        inputs: The shapes of its inputs, with "N" for a batch of any size; none for an artifact, which takes any shape.
        difference: The largest difference of its outputs to the network's, relative to the largest output; None if it
            was not run.
        num_parameters: How many parameters it has.
        notes: What did not go as it should.
    """

    format: Format
    inputs: tuple[tuple[int | str, ...], ...]
    difference: float | None
    num_parameters: int
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> Literal["dynamic", "fixed"]:
        """Whether it takes any number of images at once, or as many as `inputs` says."""
        return "dynamic" if all("N" in shape for shape in self.inputs) else "fixed"

    def __str__(self) -> str:
        shapes = ", ".join(f"({', '.join(map(str, shape))})" for shape in self.inputs)
        text = f"{self.num_parameters:,} parameters" + (f", input {shapes}" if shapes else "")
        if self.difference is None:
            return f"{text}; it was not run"
        return f"{text}; outputs differ by {self.difference:.1g} of the largest"

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values, for a program."""
        return {
            "format": self.format,
            "batch": self.batch,
            "inputs": [list(shape) for shape in self.inputs],
            "difference": self.difference,
            "parameters": self.num_parameters,
            "notes": list(self.notes),
        }


@torch.inference_mode(False)
@torch.no_grad()
def deploy(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    optimized: bool = False,
    input_size: int | None = None,
    example: object = None,
    source: Source | None = None,
) -> Deployment:
    """Write a network as a file for evaluation.

    The number of images is left open where the program then gives what the network gives, for one image and for three;
    otherwise it is fixed, and a note says why. All other sizes are those of the example.

    Args:
        model: From `inject`, `load` or `optimize`, or any other network. It is not changed.
        path: `.pt2` (torch.export), `.onnx` (in one piece; needs `se-inject[onnx]`), or an artifact of an injected
            network (`.pt`, `.pth`, `.safetensors`).
        optimized: Run it through `optimize` first; what is written is compared with the network as it was.
        input_size: Height and width of the images, where they are not those of the example.
        example: An input (N, C, H, W), a tuple of arguments or a dict of keyword arguments; if None, that of the
            injection, or else one is found.
        source: How the network is built, for an artifact; see `save`.

    Raises:
        ModelError: It cannot be copied, is optimized already, or has no blocks and was to be an artifact.
        ExampleError: It does not run on the example.
        OptionError: It takes no images of such a size.
        ExportError: It cannot be written in the format, or what was to be written does something else.
        ArtifactError: The file cannot be written.

    Example:
        >>> import torchvision
        >>> from se_inject import inject
        >>> deploy(inject(torchvision.models.squeezenet1_1()), "fast.pt2", optimized=True).batch
        'dynamic'
    """
    target = Path(path)
    check_deployment(target)
    check_size(model, target.suffix)
    if optimized and find_optimization(model) is not None:
        raise ModelError(f"{type(model).__name__} is optimized already; leave out --optimize (optimized=True)")
    if target.suffix in SUFFIXES and find_plan(model) is None:
        raise ModelError(f"{type(model).__name__} has no blocks, which {target} is for; inject first, or write .pt2")
    reference = copy_model(model).eval().requires_grad_(False)
    call = _find_call(reference, example, input_size)
    is_given = (example is not None or input_size is not None) and not (call.args and call.kwargs)
    network = optimize(model, (call.args or call.kwargs) if is_given else example) if optimized else reference
    if target.suffix in SUFFIXES:
        difference = _compare(network, reference, [call])
        save(network, target, source=source)
        return Deployment("artifact", (), difference, _count_parameters(network))
    for block in network.modules():
        if isinstance(block, FusedSqueezeExcite):
            block.kernels = False  # operators of ours, which nobody has where the program runs
    program, deployment = _make_program(network, reference, call, target, _count_images(example))
    write_whole(target, lambda file: file.write(program.data))
    return deployment


def check_deployment(path: Path) -> None:
    """Refuse a target that could not be written in the end.

    Raises:
        ArtifactError: The suffix names no format, or there is no such folder, or no right to write in it.
        ExportError: The format needs packages that are not installed.
    """
    check_target(path, (TORCH, ONNX, *SUFFIXES))
    check_packages(path.suffix)


def _find_call(model: nn.Module, example: object, input_size: int | None) -> Call:
    """Find what the network runs on, with random tensors."""
    twin = make_twin(model)
    plan, values = find_plan(model), find_optimization(model)
    if values is None and plan is not None:
        values = plan.calls[Entry("").key]
    calls: Iterable[Call]
    if example is not None:
        calls = [fake_example(twin, example)]
    else:
        calls = propose_examples(twin) if values is None else [decode_call(values, twin)]
    drawn = (_draw(call, model, input_size=input_size) for call in calls)
    run = functools.partial(_run, model)
    return find_running(model, drawn, run, hint="give the size that it is used on (--input-size, example=)")[0]


def _draw(call: Call, model: nn.Module, *, batch: int | None = None, input_size: int | None = None) -> Call:
    """Draw the tensors of a call from the standard normal distribution, the same ones each time; integers are zero."""
    if input_size is not None and (input_size < 1 or all(x.ndim != 4 for x in list_tensors(call))):
        raise OptionError(f"the input size is {input_size}; it goes with images (N, C, H, W) and must be at least 1")
    generator = torch.Generator().manual_seed(0)

    def draw(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        if batch is not None:
            shape[0] = batch
        if input_size is not None and x.ndim == 4:
            shape[2:] = [input_size, input_size]
        drawn = torch.randn(shape, generator=generator) if x.is_floating_point() else torch.zeros(shape)
        return drawn.to(get_device(model), x.dtype)

    return Call(*tree_map(draw, (call.args, call.kwargs)))


def _make_program(
    network: nn.Module, reference: nn.Module, call: Call, target: Path, num_images: int
) -> tuple[Program, Deployment]:
    """Make a program for any number of images, or else for so many, that does what the reference does."""
    reasons: list[str] = []
    for num in (None, num_images):
        try:
            given, *trials = _draw_batches(call, reference, num)
            program = make_program(network, given, target.suffix, is_dynamic=num is None)
            difference = _compare(program.run, reference, trials)
        except Exception as error:  # noqa: BLE001  torch raises anything where it cannot follow a network
            reasons.append(explain_failure(error))
            continue
        notes = [f"the batch is fixed, for it cannot be left open: {reason}" for reason in reasons]
        if not program.is_read:
            notes.append(f"{target} was not run, for onnxruntime is not installed; {INSTALL}")
        shapes = [tuple(x.shape) for x in list_tensors(given)]
        return program, Deployment(
            format="torch.export" if target.suffix == TORCH else "onnx",
            inputs=tuple(("N", *shape[1:]) if num is None else shape for shape in shapes),
            difference=difference if program.is_read else None,
            num_parameters=_count_parameters(network),
            notes=tuple(notes),
        )
    raise ExportError(f"{type(reference).__name__} cannot be written as {target.suffix}: {reasons[-1]}")


def _draw_batches(call: Call, model: nn.Module, num: int | None) -> list[Call]:
    """Draw what a network is exported on, and then what the program is tried on; any number of images if None."""
    are_alike = len({x.shape[:1] for x in list_tensors(call)}) == 1
    if num is not None:
        return [_draw(call, model, batch=num if are_alike else None)] * 2
    if not are_alike:
        raise ExportError("its inputs differ in their first dimension")
    return [_draw(call, model, batch=batch) for batch in (2, 1, 3)]


def _run(model: Callable[..., object], call: Call) -> object:
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (call.args, call.kwargs))
    return model(*args, **kwargs)


def _compare(run: Callable[..., object], reference: nn.Module, trials: Iterable[Call]) -> float:
    """Compute the largest difference of outputs, relative to the largest output.

    Raises:
        ExportError: It is above what rounding explains.
    """
    tolerance = max(TOLERANCE, 8 * torch.finfo(get_dtype(reference)).eps)
    largest = 0.0
    for trial in trials:
        found, expected = (
            [x.cpu().double() for x in tree_leaves(_run(model, trial)) if isinstance(x, Tensor)]
            for model in (run, reference)
        )
        are_alike = [x.shape for x in found] == [x.shape for x in expected]
        difference = max(map(_measure, found, expected), default=0.0) if are_alike else float("inf")
        if difference > tolerance:
            raise ExportError(
                f"outputs differ by {difference:.1g} of the largest on an input of {describe_shapes(trial)}"
            )
        largest = max(largest, difference)
    return largest


def _measure(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()


def _count_images(example: object) -> int:
    """Count the images of an example; one if none was given."""
    leaves = tree_leaves(dict(example) if isinstance(example, Mapping) else example)
    return next((len(x) for x in leaves if isinstance(x, Tensor)), 1)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
