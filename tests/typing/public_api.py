"""Every public name, used as the README does; mypy and basedpyright check it, and nothing runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
import xarray
from torch import nn

import se_inject
from se_inject import (
    Plan,
    SEInjectError,
    Site,
    SqueezeExcite,
    blocks,
    collect_gates,
    disable_adapters,
    eject,
    freeze_backbone,
    inject,
    list_adapters,
    load,
    load_adapter,
    make_plan,
    optimize,
    param_groups,
    plain_autograd,
    push_to_hub,
    save,
    save_adapter,
    save_folder,
    set_adapter,
    standardize,
)
from se_inject.adapters import Adapter


def cut(network: nn.Module, images: torch.Tensor) -> nn.Module:
    plan = make_plan(network, r={"layer4.*": 32}, placement="standard", at=("residual", "concat"), example=images)
    assert_type(plan, Plan)
    assert_type(plan.sites, tuple[Site, ...])
    assert_type(plan.num_parameters, int)
    assert_type(plan.to_json(), str)
    assert_type(Plan.from_json(plan.to_json()), Plan)
    assert_type([site.path for site in plan.sites], list[str])
    assert_type(inject(network, r=16, divisor=8, squeeze="max", gate="tanh", block="eca"), nn.Module)
    assert_type(inject(network, block=lambda channels: nn.Conv2d(channels, channels, 1), inplace=True), nn.Module)
    return inject(network, plan=plan)


def go_on(model: nn.Module, images: torch.Tensor) -> None:
    assert_type(blocks(model), dict[str, nn.Module])
    assert_type(eject(model, gates={"layer1.0.se": torch.ones(64)}), nn.Module)
    assert_type(standardize(model, strict=False, inplace=True), nn.Module)
    assert_type(optimize(model, images, kernels=False), nn.Module)
    assert_type(freeze_backbone(model), nn.Module)
    groups = param_groups(model, lr=1e-3, se_lr=1e-2, weight_decay=1e-4)
    assert_type(groups, list[dict[str, Any]])
    torch.optim.SGD(groups, momentum=0.9)
    with plain_autograd():
        assert_type(model(images).sum().backward(), Any)
    gates = collect_gates(model, [(images, torch.tensor([0]))], classes=["cat", "dog"])
    assert_type(gates, dict[str, xarray.Dataset])


def keep(model: nn.Module, folder: Path) -> None:
    save(model, folder / "model.pt")
    assert_type(load(folder / "model.pt", trust_source=True), nn.Module)
    assert_type(load("model.safetensors", base=nn.Sequential), nn.Module)
    save_folder(model, folder / "birds", license="mit", run=folder / "runs")
    assert_type(push_to_hub(model, "user/birds", private=True), str)
    save_adapter(model, folder / "birds.safetensors")
    shared = load_adapter(eject(model), "birds.safetensors", name="birds")
    assert_type(shared, nn.Module)
    assert_type(list_adapters(shared), dict[str, Adapter])
    set_adapter(shared, "birds")
    with disable_adapters(shared):
        shared(torch.zeros(1, 3, 8, 8))


def use_block(x: torch.Tensor) -> None:
    block = SqueezeExcite(256, 16, squeeze="mean", gate="sigmoid", channel_dim=1, dtype=torch.float32)
    assert_type(block(x), Any)
    assert_type(block.compute_gate(x), torch.Tensor)
    assert_type(block.forward(x, shortcut=x), torch.Tensor | tuple[torch.Tensor, ...])


def fail(network: nn.Module) -> str:
    try:
        inject(network, squeeze="median")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        network.foo = se_inject.injekt  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    except SEInjectError as error:
        assert_type(error, SEInjectError)
        return str(error)
    return assert_type(se_inject.__version__, str)


def count(reasons: Mapping[str, int]) -> int:
    return sum(reasons.values())
