"""Rewriting: put the blocks of a plan into a model. The only stage that changes one.

Takes a model and a plan, gives the model with its blocks: each owner becomes an instance of a generated subclass whose
method runs the blocks. Class, attributes, hooks and every state-dict key stay; the only new keys are the blocks'.
Either all blocks go in, or the model is as it was.
"""

from __future__ import annotations

import copy
import operator
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, fx, nn

from se_inject.attention import make_block
from se_inject.block import Gate, Squeeze, is_block, mark_block
from se_inject.codegen import Method
from se_inject.draft import is_free
from se_inject.errors import ModelError, OptionError, PlanError, TraceError, get_first_line
from se_inject.generated import derive_class
from se_inject.inspection import write_entry
from se_inject.marks import OPTIMIZED, PLAN, REMOVED, Removed, check_kind, find_mark, mark_module
from se_inject.placements import Placement
from se_inject.places import Joining, Kind, Place
from se_inject.plan import DEFAULT_R, SE, Options, Plan, Site
from se_inject.planner import Survey, survey_model
from se_inject.reparameterization import refuse_merging
from se_inject.replay import replay_plan
from se_inject.sums import take_sum
from se_inject.tracing import Trace
from se_inject.twin import alone, get_device, get_dtype


@alone()
@torch.inference_mode(False)  # in which the copy could not be trained
def inject(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    r: float | Mapping[str, float] = DEFAULT_R,
    divisor: int = 8,
    bias: bool = True,
    squeeze: Squeeze = "mean",
    gate: Gate = "sigmoid",
    block: str | Callable[[int], nn.Module] = SE,
    placement: Placement = "standard",
    concat: Joining = "joint",
    at: Iterable[Kind] = (),
    stages: Iterable[int] = (),
    skip_last_stage: bool = False,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    example: object = None,
    inplace: bool = False,
) -> nn.Module:
    """Put squeeze-and-excitation blocks into a trained network, as an exact identity.

    The result gives the same outputs as the model, bit for bit, until its blocks are trained. It is of the same
    class, with the same attributes and state-dict keys; `blocks` lists what is new. Arguments that the example
    leaves at their defaults, and flags, keep the values that they have there: code that reads them refuses others.
    The network's own hooks are run too while a copy of it runs over fake tensors, without numbers; one that keeps
    what it sees keeps such a tensor.

    Args:
        model: The trained network.
        plan: What to do, from `make_plan`; then the other options are not used, but `inplace`, and `block` where the
            plan was made with a factory.
        r: The reduction ratio; or one by pattern, `{"layer4.*": 32}`.
        divisor: Hidden channels are rounded to a multiple of this.
        bias: Whether the blocks' layers have biases.
        squeeze: What a block squeezes a map to: its "mean" or its "max".
        gate: The activation of a gate: "sigmoid", "hard_sigmoid" or "tanh".
        block: "se", a name of timm's `create_attn`, or a function that makes a module for a number of channels.
        placement: Where the block stands at a merge: "standard", "pre", "post", "identity" or "conv3x3".
        concat: "joint" squeezes the branches of a merge together, "separate" gives each a block of its own.
        at: The kinds of places, such as "fusion" or "stage"; see `make_plan`.
        stages: The stages that alone receive blocks.
        skip_last_stage: Leave out the last stage.
        include: Patterns of paths that alone receive blocks.
        exclude: Patterns of paths that receive none.
        example: An input (N, C, H, W), a tuple of arguments, a dict of keyword arguments, or the height and width of
            images; found if None.
        inplace: Change the given model, instead of a copy.

    Raises:
        ModelError: The model cannot be changed (wrapped, compiled, scripted, quantised, injected already).
        ExampleError: The network does not run on the example.
        OptionError: An option is out of range, or a pattern matches nothing.
        EmptyPlanError: No merge can receive a block; the message lists the reasons.
        PlanError: The plan was made for another network.

    Example:
        >>> import torchvision
        >>> model = inject(torchvision.models.resnet18(), r=16)
        >>> type(model).__name__, len(blocks(model))
        ('ResNet', 8)
    """
    options = Options(
        r, divisor, bias, squeeze, gate, block, placement, concat, at, stages, skip_last_stage, include, exclude
    )
    if plan is None:
        survey = survey_model(model, options, example=example)
    elif replace(options, block=SE) != Options() or (isinstance(block, str) and block != SE) or example is not None:
        raise OptionError("plan= holds all options already; give either plan= or the options, not both")
    else:
        survey = replay_plan(model, plan, block=None if isinstance(block, str) else block)
    surgeries = _prepare(model, survey)
    target = model if inplace else copy_model(model)
    for surgery in surgeries:
        surgery.perform(target)
    mark_module(target, PLAN, survey.plan)
    return target


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """List the blocks of a model by path: our own, or those of another attention that was injected.

    Example:
        >>> import torchvision
        >>> list(blocks(inject(torchvision.models.resnet18())).items())[0]
        ('layer1.0.se', SqueezeExcite(64, 16))
    """
    check_kind(model)
    return {path: module for path, module in model.named_modules() if is_block(module)}


def find_plan(model: nn.Module) -> Plan | None:
    """Return the plan that a model was injected with, or None."""
    plan = find_mark(model, PLAN)
    return plan if isinstance(plan, Plan) else None


def refuse_optimized(model: nn.Module) -> None:
    """Refuse a network that is optimized.

    Raises:
        ModelError: It is.
    """
    if find_mark(model, OPTIMIZED) is not None:
        raise ModelError(
            f"{type(model).__name__} is optimized, for evaluation alone; use the network that it was made from"
        )


def refuse_empty(model: nn.Module) -> None:
    """Refuse a network that was injected and has no block left.

    Raises:
        ModelError: It has none.
    """
    plan = find_plan(model)
    if plan is not None and not plan.sites:
        why = (
            f"all {plan.num_folded} were folded into its weights; se-inject eject, without --fold, writes its state "
            f"dict for --weights"
            if plan.is_folded
            else "its plan has no site; make another one"
        )
        raise ModelError(f"{type(model).__name__} has no block: {why}")


def refuse_lost(model: nn.Module) -> None:
    """Refuse a network one of whose blocks is no longer where its plan has it.

    Raises:
        ModelError: It was taken out, or something else stands in its place; a file would not be readable again.
    """
    plan, own = find_plan(model), blocks(model)
    lost = [site.path for site in plan.sites if site.path not in own] if plan is not None else []
    if lost:
        held = dict(model.named_modules()).get(lost[0])
        raise ModelError(
            f"{lost[0]} was a block and is {'gone' if held is None else f'now of class {type(held).__name__}'}; "
            f"inject with exclude= or with a plan that has no site there, or keep the network with torch.save"
        )


def get_plan(model: nn.Module) -> Plan:
    """Return the plan that a model was injected with.

    Raises:
        ModelError: The model has not been injected.
    """
    plan = find_plan(model)
    refuse_optimized(model)
    if plan is None:
        raise ModelError(f"{type(model).__name__} has not been injected; call se_inject.inject(model) first")
    return plan


@dataclass
class _Surgery:
    """What happens to one owner: its blocks, and its new class or (a GraphModule's) graph."""

    path: str
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    graph: fx.Graph | None = None
    cls: type[nn.Module] | None = None
    notes: list[str] = field(default_factory=list)

    def perform(self, model: nn.Module) -> None:
        """Change the owner in a model; nothing in here is expected to fail."""
        owner = model.get_submodule(self.path)
        # timm's networks have `se = None`, and a method that was chosen for the instance would shadow the class's.
        removed = {name: vars(owner).pop(name) for name in (*self.blocks, *self.methods) if name in vars(owner)}
        children = tuple(name for name in self.blocks if name in owner._modules)
        for name, block in self.blocks.items():
            owner.add_module(name, mark_block(block).train(owner.training))
        if self.graph is not None:
            cast("fx.GraphModule", owner).graph = self.graph
        else:
            assert self.cls is not None
            owner.__class__ = self.cls
        mark_module(owner, REMOVED, Removed(tuple(self.blocks), removed, children))
        refuse_merging(model, self.path)


def _prepare(model: nn.Module, survey: Survey) -> list[_Surgery]:
    """Do all that can fail: edit the graphs, write the code, make the blocks."""
    surgeries: dict[str, _Surgery] = {}
    for entry, sites in survey.plan.iterate_entries():
        surgery = surgeries.setdefault(entry.path, _Surgery(entry.path))
        inspection = survey.inspections[entry]
        for site in sites:
            surgery.blocks[site.name] = _make_block(site, survey, model)
            gated = f"{site.describe_branches()} at `{site.merge}`" if site.branches else f"the {site.merge}"
            surgery.notes.append(f"`{site.name}` gates {gated}")
            for trace, places in zip(inspection.traces, inspection.found, strict=False):
                if not trace.doubt:
                    _insert_block(trace.graph, site.name, places[site.index])
        if survey.recipe is None:
            _take_sums(inspection.traces, {site.name for site in sites})
        owner = survey.twin.model.get_submodule(entry.path)
        if isinstance(owner, fx.GraphModule):
            surgery.graph = forget_values(inspection.traces[0].graph)
            continue
        try:
            placed = [(site.name, inspection.places[site.index]) for site in sites]
            surgery.methods[entry.method] = write_entry(owner, inspection, placed)
        except TraceError as error:
            raise PlanError(f"{entry} cannot be written as code: {error}; exclude it") from error
    prefix, purpose = ("SE", "squeeze-and-excitation") if survey.recipe is None else ("Gated", "channel attention")
    for surgery in surgeries.values():
        if surgery.graph is None:
            base = type(model.get_submodule(surgery.path))
            surgery.cls = derive_class(base, surgery.notes, surgery.methods, prefix=prefix, purpose=f"with {purpose}")
    return list(surgeries.values())


def _make_block(site: Site, survey: Survey, model: nn.Module) -> nn.Module:
    owner = model.get_submodule(site.owner)
    if not is_free(owner, site.name) or not re.fullmatch(r"se\d*", site.name):
        raise PlanError(
            f"{type(owner).__name__} at {site.owner!r} has no room for an attribute {site.name!r}; make a new plan"
        )
    home = owner if any(p.is_floating_point() for p in owner.parameters()) else model
    return make_block(site, survey.plan, survey.recipe, device=get_device(home), dtype=get_dtype(home))


def _insert_block(graph: fx.Graph, name: str, place: Place) -> None:
    nodes = {node.name: node for node in graph.nodes}
    sources = [nodes[edge.node] for edge in place.edges]
    readers = [[nodes[consumer] for consumer in edge.consumers] for edge in place.edges]
    if len(sources) == 1:
        first = next(node for node in graph.nodes if node in readers[0])
        with graph.inserting_before(first):
            block = graph.call_module(name, (sources[0],))
        block.meta["value"] = sources[0].meta["value"]
        for reader in readers[0]:
            reader.replace_input_with(sources[0], block)
            written = reader.meta.get("mutates", ())
            reader.meta["mutates"] = tuple(block if node is sources[0] else node for node in written)
        return
    operations = [nodes[operation] for operation in place.operations]
    for operation in operations[:-1]:
        operations[-1].prepend(operation)  # the additions of a chain wait until every branch has been gated
    with graph.inserting_before(operations[0]):
        block = graph.call_module(name, tuple(sources))
        block.meta["unpacked"] = len(sources)
        gated = [_take_item(graph, block, i, source) for i, source in enumerate(sources)]
    for source, consumers, item in zip(sources, readers, gated, strict=True):
        for consumer in consumers:
            consumer.replace_input_with(source, item)


def _take_item(graph: fx.Graph, block: fx.Node, i: int, branch: fx.Node) -> fx.Node:
    item = graph.create_node("call_function", operator.getitem, (block, i), name=f"{branch.name}_gated")
    item.meta["value"] = branch.meta["value"]
    return item


def _take_sums(traces: Iterable[Trace], names: set[str]) -> None:
    """Let our own blocks add the shortcuts that their maps are added to at once."""
    for graph in (trace.graph for trace in traces if not trace.doubt):
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target in names]:
            take_sum(graph, node, in_order=True)


def forget_values(graph: fx.Graph) -> fx.Graph:
    """Copy a graph without its values, and without our tracer, which reading a pickle would call again."""
    clean = fx.Graph()
    clean.output(clean.graph_copy(graph, {}))
    for node in clean.nodes:
        node.meta.clear()
    return clean


def copy_model(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """Copy a model, with its tensors.

    Args:
        model: Stays as it is.
        shared: Parameters that the copy shares with it, because they are to be replaced there at once.

    Raises:
        ModelError: It cannot be copied.
    """
    try:
        with torch.no_grad():  # else the parameters of a scripted module's copy would be no leaves
            copied = copy.deepcopy(model, {id(parameter): parameter for parameter in shared})
    except (TypeError, RuntimeError, AssertionError, pickle.PickleError) as error:
        line = get_first_line(error)
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({line}); make pruned or normalised weights permanent "
            f"(torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm) first; `inject` alone can do "
            f"without a copy, with inplace=True"
        ) from error
    for own, original in zip(copied.parameters(), model.parameters(), strict=True):
        own.requires_grad_(original.requires_grad)
    return copied
