"""Artifacts: an injected network as a file of tensors and plain values.

Takes an injected model, gives `model.pt` (a dict that `torch.load(..., weights_only=True)` reads) or `.safetensors`,
and back. The network is built anew from its source, the plan is replayed, and the tensors are loaded strictly; no code
comes from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from se_inject.block import GAIN, SqueezeExcite, is_block
from se_inject.claims import check_weights
from se_inject.errors import ArtifactError, ExampleError, ModelError, OptionError, PlanError, SourceError
from se_inject.files import check_suffix
from se_inject.folders import check_config, find_weights
from se_inject.generated import get_base
from se_inject.hub import locate
from se_inject.marks import SOURCE, find_mark, mark_module
from se_inject.optimization import find_optimization, optimize_again
from se_inject.plan import SE, Plan
from se_inject.provenance import UNRECORDED, Source
from se_inject.records import read_record, write_record
from se_inject.rewrite import blocks, find_plan, get_plan, inject, refuse_lost
from se_inject.sources import build_skeleton

FORMAT = "se-inject"


def save(model: nn.Module, path: str | os.PathLike[str], *, source: Source | None = None) -> None:
    """Write an injected network, or such a one that is optimized: its source, its plan and its state dict.

    The file is written beside its target and renamed, so that the old or the new one is there, whole, at any time.

    Args:
        model: From `inject`, `load` or `optimize`; wrappers (DDP, torch.compile) are seen through.
        path: `.pt`, `.pth` or `.safetensors`.
        source: How the network is built. A network loaded by `load` knows; timm's networks are recognised, if they are
            as timm builds them. For others give `base=` to `load`.

    Raises:
        ModelError: The model has not been injected, or has lost a block.
        ArtifactError: The file cannot be written, or the state dict holds something else than plain tensors.

    Example:
        >>> import timm
        >>> save(inject(timm.create_model("resnet18")), "model.pt")
    """
    target = Path(path)
    check_suffix(target)
    while find_plan(model) is None and isinstance(inner := _get_wrapped(model), nn.Module):
        model = inner
    plan = find_plan(model) or get_plan(model)
    refuse_lost(model)
    source = source or get_source(model) or _recognise_timm(model)
    if source is not None and source.library == "timm":  # reset_classifier may have been called since
        num_classes = getattr(model, "num_classes", None)
        classes = source.classes if len(source.classes) == num_classes else ()
        source = replace(source, options={**source.options, "num_classes": num_classes}, classes=classes)
    values: dict[str, Any] = {
        "source": None if source is None else source.to_values(),
        "plan": json.loads(plan.to_json()),
    }
    if (optimization := find_optimization(model)) is not None:
        values["optimization"] = optimization
    # A plan is cut with the gain of an exact identity; a network in standard form and an optimized one have others.
    own = {path: block for path, block in blocks(model).items() if isinstance(block, SqueezeExcite)}
    if gains := {path: block.gain for path, block in own.items() if block.gain != GAIN}:
        values["gains"] = gains
    write_record(target, FORMAT, values, model.state_dict())


def load(
    path: str | os.PathLike[str],
    *,
    base: nn.Module | Callable[[], nn.Module] | None = None,
    block: Callable[[int], nn.Module] | None = None,
    trust_source: bool = False,
) -> nn.Module:
    """Read an injected network from a file, a folder or the hub; it is in eval mode and on the CPU.

    Args:
        path: What `save` or `save_folder` wrote, or `hf-hub:USER/NAME` or `hf-hub:USER/NAME@REVISION`.
        base: The original network, or a function that builds it, where the file does not say how (the user's own
            module). A given module is not changed.
        block: Makes the blocks, where the network was injected with a factory of the user's.
        trust_source: Import and call the factory that the file names.

    Raises:
        ArtifactError: There is no such file, it is cut short, holds code, has a newer format, or is of another network.
        SourceError: The network cannot be built, is built by a factory that is not trusted, or cannot be fetched.

    Example:
        >>> model = load("model.pt")
    """
    target, config = find_weights(locate(path))
    values, state = read_artifact(target)
    check_config(config, values, target.parent)
    source = None if values["source"] is None else Source.from_values(values["source"])
    if base is not None:
        network = base if isinstance(base, nn.Module) else base()
    elif source is not None:
        num_weights = sum(tensor.numel() for tensor in state.values())
        network = build_skeleton(source, trust_source=trust_source, num_weights=num_weights)
    else:
        raise SourceError(f"{path} does not say how its network is built; give load(..., base=) the original network")
    try:
        plan = Plan.from_json(json.dumps(values["plan"]))
        check_weights(plan.num_parameters, state, target)
        model = inject(network, plan=plan, block=block or SE, inplace=base is None)
        if values.get("optimization") is not None:
            model = optimize_again(model, values["optimization"])
    except OptionError as error:
        raise ArtifactError(
            f"{path}: {error!s:.300}; give load(..., block=) the function that makes its blocks"
        ) from error
    except (PlanError, ModelError, ExampleError) as error:
        raise ArtifactError(f"{path} is of another network: {error!s:.400}") from error
    _load_state(model, state, target)
    _set_gains(model, values.get("gains", {}), target)
    mark_module(model, SOURCE, source)
    return model.eval()


def read_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the plain values and the tensors of an artifact, after its digest was checked.

    Raises:
        ArtifactError: The file is no artifact of ours, is damaged, or of a newer version.
    """
    hint = "a state dict is given with --weights, or torch.load"
    return read_record(path, FORMAT, hint, needs=frozenset({"source", "plan"}))


def get_source(model: nn.Module) -> Source | None:
    """Return how a loaded network was built, if its file said so."""
    source = find_mark(model, SOURCE)
    return source if isinstance(source, Source) else None


def _get_wrapped(model: nn.Module) -> object:
    return getattr(model, "_orig_mod", getattr(model, "module", None))


def _load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    wrong = [k for k in own if k not in state or _differ(own[k], state[k])] + [k for k in state if k not in own]
    if wrong:
        names = ", ".join(wrong[:3])
        raise ArtifactError(
            f"{path} is of another network: {len(wrong)} tensors differ in name, shape or type ({names}, ...)"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    own.update((name, state[name]) for name in own)  # with torch's notes on versions, which some networks read
    model.load_state_dict(own)


def _differ(own: Tensor, given: Tensor) -> bool:
    """Tell whether a tensor cannot take the place of another; networks are saved in any floating type."""
    is_other = own.dtype != given.dtype and not (own.is_floating_point() and given.is_floating_point())
    return own.shape != given.shape or is_other


def _set_gains(model: nn.Module, gains: object, path: Path) -> None:
    found = {path: block for path, block in blocks(model).items() if isinstance(block, SqueezeExcite)}
    is_valid = isinstance(gains, dict) and all(isinstance(gain, float) for gain in gains.values())
    if not is_valid or not set(gains) <= set(found):  # type: ignore[call-overload]
        raise ArtifactError(f"{path} is of another network: its gains are not those of the {len(found)} blocks")
    for name, gain in gains.items():  # type: ignore[attr-defined]
        found[name].gain = gain


def _recognise_timm(model: nn.Module) -> Source | None:
    """Find timm's name for a network, and make sure that timm builds just this network by it."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping):
        config = getattr(config, "__dict__", {})
    if not config.get("architecture"):
        return None
    name = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    options = {**getattr(model, "_model_args", {}), "num_classes": getattr(model, "num_classes", None)}
    if not all(value is None or isinstance(value, (bool, int, float, str)) for value in options.values()):
        return None
    source = Source("timm", name, options, UNRECORDED)
    optimization = find_optimization(model)
    try:
        skeleton = build_skeleton(source)
        if optimization is not None:
            skeleton = optimize_again(inject(skeleton, plan=find_plan(model), inplace=True), optimization)
    except (SourceError, PlanError, OptionError, ExampleError):
        return None
    return source if _describe(skeleton) == _describe(model) else None


def _describe(model: nn.Module) -> dict[str, Any]:
    """Describe a network but for its blocks and weights: each module's class, settings and plain attributes."""
    described = {}
    blocks = tuple(f"{path}." for path, module in model.named_modules() if is_block(module))
    for path, module in model.named_modules():
        if not f"{path}.".startswith(blocks):
            plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
            plain.pop("training")
            described[path] = (get_base(type(module)), module.extra_repr(), plain)
    return described
