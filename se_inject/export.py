"""Export: write an injected network as one of timm's own SE networks.

Takes an injected model and timm's name of a network that has the same skeleton and SE blocks in the same places, gives
that network with the weights, after both were compared: by names and shapes, and by their outputs. Changes no model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from se_inject.calls import Entry
from se_inject.counterpart import map_keys
from se_inject.errors import ExampleError, ExportError, StandardFormError
from se_inject.plan import Plan
from se_inject.provenance import Source
from se_inject.rewrite import blocks, copy_model, get_plan
from se_inject.sources import build_skeleton, resolve_name
from se_inject.standard import standardize
from se_inject.twin import get_dtype

TOLERANCE = 1e-5
"""How far outputs may lie apart, relative to the largest; a wrong gate, place or activation is far above it."""


@dataclass(frozen=True)
class Export:
    """timm's network with the weights of an injected one.

    Attributes:
        model: The network, in eval mode, on the CPU.
        name: timm's name for it.
        options: What `timm.create_model` needs beside the name.
        difference: The largest difference of the outputs, relative to the largest output.
    """

    model: nn.Module
    name: str
    options: Mapping[str, Any]
    difference: float


def export_to_timm(model: nn.Module, name: str, *, example: Tensor | None = None) -> Export:
    """Put the weights of an injected network into timm's own SE network.

    timm's blocks have gain 1, so the network is exported in standard form (see `standardize`), or as it is where timm's
    network has the factor 2 too (`nf_seresnet50`). Names map by name, or by order where all shapes agree. Outputs are
    compared twice: with the weights drawn anew, so that every part counts, and as they are.

    Args:
        model: From `inject` or `load`; it is not changed.
        name: timm's name, with or without `timm:`.
        example: An input (N, C, H, W) to compare on; random numbers of the plan's own size if None.

    Raises:
        ModelError: The model has not been injected.
        SourceError: timm has no such network.
        ExportError: It is another network; the message says what differs.
        ExampleError: The plan's own input is not one map; give `example`.

    Example:
        >>> import timm
        >>> model = inject(timm.create_model("resnet18"), r=16)
        >>> export_to_timm(model, "seresnet18").difference < 1e-5
        True
    """
    plan = get_plan(model)
    library, short = resolve_name(name if name.startswith("timm:") else f"timm:{name}")
    assert library == "timm"
    options = _read_options(short, model.state_dict())
    skeleton = build_skeleton(Source("timm", short, options)).eval()
    keys = map_keys(model, skeleton, short)
    images = _draw_images(plan) if example is None else example
    forms = [copy_model(model)]
    reason = ""
    try:
        forms.insert(0, standardize(model))
    except StandardFormError as error:
        reason = f"; {error}"
    found = []
    for form in forms:
        drawn = _draw_weights(form)
        found.append(_compare(drawn, _transfer(drawn, skeleton, keys), images))
        if found[-1] <= TOLERANCE:
            target = _transfer(form, skeleton, keys)
            return Export(target, short, options, _compare(model, target, images))
    raise ExportError(
        f"{short} has the layers of {plan.model} with its blocks, but does something else with them: outputs differ by "
        f"{min(found):.0e} of the largest (strides, activations, or where the blocks stand){reason}"
    )


def _transfer(model: nn.Module, skeleton: nn.Module, keys: Mapping[str, str]) -> nn.Module:
    """Load a network's weights into a copy of timm's; types follow the weights."""
    target = copy.deepcopy(skeleton).to(get_dtype(model))
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    own = model.state_dict()
    state = {theirs: own[ours].detach().cpu().reshape(shapes[theirs]) for ours, theirs in keys.items()}
    target.load_state_dict(state)
    return target


def _draw_weights(model: nn.Module) -> nn.Module:
    """Draw anew, in a copy, what could hide a difference: the blocks' layers, and norms that are zero."""
    drawn = copy_model(model).float().cpu().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in blocks(drawn).values():
            for parameter in block.parameters():
                width = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
                parameter.normal_(0, width, generator=generator)
        for parameter in drawn.parameters():
            if parameter.ndim <= 1 and not parameter.any():
                parameter.uniform_(0.2, 0.4, generator=generator)
    return drawn


def _compare(model: nn.Module, target: nn.Module, images: Tensor) -> float:
    """Compute the largest difference of two networks' outputs in fp32, relative to the largest output."""
    with torch.no_grad():
        ours, theirs = (copy_model(m).float().cpu().eval()(images.float().cpu()) for m in (model, target))
    if ours.shape != theirs.shape:
        return float("inf")
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    return float("inf") if difference.isnan() else difference.item()


def _draw_images(plan: Plan) -> Tensor:
    call = plan.calls[Entry("").key]
    shapes = [x["tensor"] for x in (*call["args"], *call["kwargs"].values()) if isinstance(x, dict) and "tensor" in x]
    if len(shapes) != 1:
        raise ExampleError("the network does not take one tensor; give example= with images (N, C, H, W)")
    return torch.randn(1, *shapes[0][1:], generator=torch.Generator().manual_seed(0))


def _read_options(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read from the weights how many classes and input channels timm's network must have."""
    config = timm.get_pretrained_cfg(name.partition(".")[0])
    if config is None:
        return {}
    options = {}
    classifier, stem = config.classifier, config.first_conv
    if isinstance(classifier, str):
        matrices = [value for key, value in state.items() if value.ndim == 2 and key.endswith(".weight")]
        head = state.get(f"{classifier}.weight", matrices[-1] if matrices else None)  # the last, under another name
        options["num_classes"] = 0 if head is None else head.shape[0]
    if isinstance(stem, str) and f"{stem}.weight" in state:
        options["in_chans"] = state[f"{stem}.weight"].shape[1]
    defaults = {"num_classes": config.num_classes, "in_chans": config.input_size[0]}
    return {key: value for key, value in options.items() if value != defaults[key]}
