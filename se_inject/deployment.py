"""Deployment: write a network as a file for evaluation, which runs without its code and without se-inject.

Takes a network with or without blocks, gives a program of torch.export, an ONNX model, or an artifact. What is to be
written is read back, run, and compared with the network before it takes the target's place. The model is not changed.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from se_inject.artifact import save
from se_inject.calls import Call, Entry, decode_call
from se_inject.errors import ExportError, ModelError
from se_inject.examples import find_running, list_calls
from se_inject.files import SUFFIXES, check_target, write_whole
from se_inject.fused import FusedSqueezeExcite
from se_inject.optimization import find_optimization, optimize
from se_inject.programs import (
    INSTALL,
    ONNX,
    TORCH,
    Freedom,
    Program,
    check_packages,
    check_size,
    explain_failure,
    list_tensors,
    make_program,
)
from se_inject.provenance import Source
from se_inject.rewrite import copy_model, find_plan
from se_inject.trials import compare_outputs, draw_call, draw_sizes, draw_smaller, draw_trials, run_call
from se_inject.twin import make_twin

Format = Literal["torch.export", "onnx", "artifact"]


@dataclass(frozen=True)
class Deployment:
    """What was written.

    Attributes:
        format: The kind of file.
        inputs: The shapes of its inputs, with "N" for a batch of any size, "H" and "W" for images of any size that
            the network takes; none for an artifact, which takes any shape.
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

    @property
    def size(self) -> Literal["dynamic", "fixed"]:
        """Whether it takes images of several sizes."""
        is_open = any(isinstance(size, str) for shape in self.inputs for size in shape[1:])
        return "dynamic" if is_open or not self.inputs else "fixed"

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
            "size": self.size,
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
    dynamic_size: bool = False,
    example: object = None,
    source: Source | None = None,
) -> Deployment:
    """Write a network as a file for evaluation.

    The number of images is left open where the program then gives what the network gives, for one image and for three;
    otherwise it is fixed, and a note says why. All other sizes are those of the example, unless they are to be open.

    Args:
        model: From `inject`, `load` or `optimize`, or any other network. It is not changed.
        path: `.pt2` (torch.export), `.onnx` (in one piece; needs `se-inject[onnx]`), or an artifact of an injected
            network (`.pt`, `.pth`, `.safetensors`).
        optimized: Run it through `optimize` first; what is written is compared with the network as it was.
        input_size: Height and width of the images, where they are not those of the example.
        dynamic_size: Leave the height and the width of the images open too, for all that the network takes. The program
            is tried on larger and smaller ones; where they cannot be open, a note says why.
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
        difference = compare_outputs(network, reference, [call])
        save(network, target, source=source)
        return Deployment("artifact", (), difference, _count_parameters(network))
    for block in network.modules():
        if isinstance(block, FusedSqueezeExcite):
            block.kernels = False  # operators of ours, which nobody has where the program runs
    draw = functools.partial(draw_trials, call, reference, num_images=_count_images(example))
    program, deployment = _make_program(network, reference, target, draw, dynamic_size=dynamic_size)
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
    is_known = example is None and values is not None
    calls = [decode_call(values, twin)] if is_known else list_calls(twin, example)
    drawn = (draw_call(call, model, input_size=input_size) for call in calls)
    run = functools.partial(run_call, model)
    return find_running(model, drawn, run, hint="give the size that it is used on (--input-size, example=)")[0]


def _make_program(
    network: nn.Module, reference: nn.Module, target: Path, draw: Callable[[Freedom], list[Call]], *, dynamic_size: bool
) -> tuple[Program, Deployment]:
    """Make the most open program that does what the reference does."""
    reasons: dict[Freedom, str] = {}
    for freedom in [
        Freedom(batch, size) for size in ((True, False) if dynamic_size else (False,)) for batch in (True, False)
    ]:
        try:
            given, *trials = draw(freedom)
            program = make_program(network, given, target.suffix, freedom)
            difference = compare_outputs(program.run, reference, trials)
            refusals = _try_sizes(program, reference, given, trials[-1]) if freedom.size else []
        except Exception as error:  # noqa: BLE001  torch raises anything where it cannot follow a network
            reasons[freedom] = explain_failure(error)
            continue
        notes = [*_explain(reasons, freedom), *refusals]
        if not program.is_read:
            notes.append(f"{target} was not run, for onnxruntime is not installed; {INSTALL}")
        return program, Deployment(
            format="torch.export" if target.suffix == TORCH else "onnx",
            inputs=tuple(_describe(x, freedom) for x in list_tensors(given)),
            difference=difference if program.is_read else None,
            num_parameters=_count_parameters(network),
            notes=tuple(notes),
        )
    raise ExportError(f"{type(reference).__name__} cannot be written as {target.suffix}: {[*reasons.values()][-1]}")


def _try_sizes(program: Program, reference: nn.Module, given: Call, call: Call) -> list[str]:
    """Try a program on much smaller images than those of a call, and where what torch found it to hold for ends.

    Returns:
        What it refuses.

    Raises:
        ExportError: It takes them and gives something else than the network does.
    """
    trials = {
        "much smaller images than those of the injection": draw_smaller(call, reference),
        "images of some sizes": draw_sizes(given, reference, None, program.edges),
    }
    refused = []
    for what, calls in trials.items():
        try:
            compare_outputs(program.run, reference, calls)
        except ExportError:
            raise
        except Exception as error:  # noqa: BLE001  runtimes raise anything
            refused.append(f"{what} are refused: {explain_failure(error)}")
    return refused[:1]


def _explain(reasons: Mapping[Freedom, str], found: Freedom) -> list[str]:
    """Say why what was asked for is not open: by the attempt that differs from what was found in nothing else."""
    wider = {"batch": replace(found, batch=True), "size": replace(found, size=True)}
    return [
        f"the {what} is fixed, for it cannot be left open: {reasons[freedom]}"
        for what, freedom in wider.items()
        if freedom in reasons
    ]


def _describe(tensor: Tensor, freedom: Freedom) -> tuple[int | str, ...]:
    letters = {dim: name[0].upper() if dim else "N" for dim, name in freedom.name(tensor).items()}
    return tuple(letters.get(dim, size) for dim, size in enumerate(tensor.shape))


def _count_images(example: object) -> int:
    """Count the images of an example; one if none was given."""
    leaves = tree_leaves(dict(example) if isinstance(example, Mapping) else example)
    return next((len(x) for x in leaves if isinstance(x, Tensor)), 1)


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
