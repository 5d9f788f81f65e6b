"""Costs: what a network takes before and after, counted over fake tensors.

Takes an injected model and its plan, gives exact counts: parameters, bytes, multiply-accumulates. Nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from se_inject.calls import Entry, decode_call
from se_inject.ejection import eject
from se_inject.errors import PlanError, get_first_line
from se_inject.examples import describe_shapes
from se_inject.plan import Plan
from se_inject.probe import DATA_DEPENDENT
from se_inject.twin import Twin, apart, make_twin, set_training


@dataclass(frozen=True)
class Costs:
    """What a network takes.

    Attributes:
        parameters: Number of parameters.
        size: Bytes of all parameters and buffers.
        flops: Floating point operations for one image (two for a multiply-accumulate), as torch's FlopCounterMode
            counts them: convolutions and matrix products. None for a network whose course depends on its data.
    """

    parameters: int
    size: int
    flops: int | None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one image."""
        return None if self.flops is None else self.flops // 2


def compare_costs(model: nn.Module, plan: Plan) -> tuple[Costs, Costs]:
    """Count what an injected network takes without its blocks and with them, at the input that its plan was made with.

    Args:
        model: An injected network.
        plan: The plan that it was injected with.

    Raises:
        PlanError: The network does not run on that input.
    """
    after = _count(model, plan)
    twin = make_twin(model)
    eject(twin.model, inplace=True)
    return _count(twin.model, plan, twin), after


def _count(model: nn.Module, plan: Plan, twin: Twin | None = None) -> Costs:
    twin = twin or make_twin(model)
    call = decode_call(plan.calls[Entry("").key], twin)
    num_images = next(x.shape[0] for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor))
    flops: int | None = None
    with (
        FlopCounterMode(display=False) as counter,
        set_training(twin.model, False),
        apart(twin.model),
        twin.mode,
        torch.no_grad(),
    ):
        try:
            twin.model(*call.args, **call.kwargs)
            flops = counter.get_total_flops() // num_images
        except DATA_DEPENDENT:
            pass
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__} does not run on an input of {describe_shapes(call)}, with which the plan was "
                f"made: {get_first_line(error)}; make a new plan for this network"
            ) from error
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        size=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        flops=flops,
    )
