"""Rewriting: put the blocks of a plan into a model. The only stage that changes one.

Takes a model and a plan, gives the model with its blocks: each owner becomes an instance of a generated subclass whose
method runs the blocks. Class, attributes, hooks and every state-dict key stay; the only new keys are the blocks'.
Either all blocks go in, or the model is as it was.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import linecache
import operator
import re
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx, nn

from se_inject.block import SqueezeExcite
from se_inject.codegen import Method, write_class
from se_inject.errors import ModelError, OptionError, PlanError, TraceError
from se_inject.inspection import write_entry
from se_inject.merges import Merge
from se_inject.plan import DEFAULT_R, Options, Placement, Plan, Site
from se_inject.planner import Survey, is_free, replay_plan, survey_model
from se_inject.twin import get_device, get_dtype

_GENERATED = "se_inject.generated"
_PLAN_ATTRIBUTE = "_se_inject_plan"


def inject(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    r: float | Mapping[str, float] = DEFAULT_R,
    divisor: int = 8,
    bias: bool = True,
    placement: Placement = "standard",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    example: object = None,
    inplace: bool = False,
) -> nn.Module:
    """Put squeeze-and-excitation blocks into a trained network, as an exact identity.

    The result gives the same outputs as the model, bit for bit, until its blocks are trained. It is of the same class,
    with the same attributes and state-dict keys; `blocks` lists what is new.

    Args:
        model: The trained network.
        plan: What to do, from `make_plan`; then the other options but `inplace` are not used.
        r: The reduction ratio; or one by pattern, `{"layer4.*": 32}`.
        divisor: Hidden channels are rounded to a multiple of this.
        bias: Whether the blocks' layers have biases.
        placement: Where the block stands at a merge; see `make_plan`.
        include: Patterns of paths that alone receive blocks.
        exclude: Patterns of paths that receive none.
        example: An input (N, C, H, W), a tuple of arguments or a dict of keyword arguments; found if None.
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
    options = Options(r, divisor, bias, placement, include, exclude)
    if plan is None:
        survey = survey_model(model, options, example=example)
    elif options != Options() or example is not None:
        raise OptionError("plan= holds all options already; give either plan= or the options, not both")
    else:
        survey = replay_plan(model, plan)
    surgeries = _prepare(model, survey)
    target = model if inplace else _copy(model)
    for surgery in surgeries:
        surgery.perform(target)
    setattr(target, _PLAN_ATTRIBUTE, survey.plan)
    return target


def blocks(model: nn.Module) -> dict[str, SqueezeExcite]:
    """List the squeeze-and-excitation blocks of a model by path.

    Example:
        >>> import torchvision
        >>> list(blocks(inject(torchvision.models.resnet18())).items())[0]
        ('layer1.0.se', SqueezeExcite(64, 16))
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, SqueezeExcite)}


def find_plan(model: nn.Module) -> Plan | None:
    """Return the plan that a model was injected with, or None."""
    plan = vars(model).get(_PLAN_ATTRIBUTE)
    return plan if isinstance(plan, Plan) else None


def get_plan(model: nn.Module) -> Plan:
    """Return the plan that a model was injected with.

    Raises:
        ModelError: The model has not been injected.
    """
    plan = find_plan(model)
    if plan is None:
        raise ModelError(f"{type(model).__name__} has not been injected; call se_inject.inject(model) first")
    return plan


def get_base(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a generated class was derived from; any other class is returned as it is."""
    return cls._se_inject_code[0] if "_se_inject_code" in vars(cls) else cls  # type: ignore[attr-defined]


@dataclass
class _Surgery:
    """What happens to one owner: its blocks, and its new class or (a GraphModule's) graph."""

    path: str
    blocks: dict[str, SqueezeExcite] = field(default_factory=dict)
    methods: dict[str, Method] = field(default_factory=dict)
    graph: fx.Graph | None = None
    cls: type[nn.Module] | None = None
    notes: list[str] = field(default_factory=list)

    def perform(self, model: nn.Module) -> None:
        """Change the owner in a model; nothing in here is expected to fail."""
        owner = model.get_submodule(self.path)
        for name, block in self.blocks.items():
            vars(owner).pop(name, None)  # timm's networks have `se = None`
            owner.add_module(name, block.train(owner.training))
        if self.graph is not None:
            cast("fx.GraphModule", owner).graph = self.graph
            return
        for method in self.methods:
            vars(owner).pop(method, None)  # a method that was chosen for the instance would shadow the class's
        assert self.cls is not None
        owner.__class__ = self.cls


def _prepare(model: nn.Module, survey: Survey) -> list[_Surgery]:
    """Do all that can fail: edit the graphs, write the code, make the blocks."""
    surgeries: dict[str, _Surgery] = {}
    for entry, sites in survey.plan.iterate_entries():
        surgery = surgeries.setdefault(entry.path, _Surgery(entry.path))
        inspection = survey.inspections[entry]
        for site in sites:
            surgery.blocks[site.name] = _make_block(site, survey.plan, model)
            surgery.notes.append(f"`{site.name}` gates {site.describe_branches()} at `{site.merge}`")
            for trace, merges in zip(inspection.traces, inspection.found, strict=True):
                if not trace.doubt:
                    _insert_block(trace.graph, site.name, merges[site.index])
        owner = survey.twin.model.get_submodule(entry.path)
        if isinstance(owner, fx.GraphModule):
            surgery.graph = _forget_values(inspection.traces[0].graph)
        else:
            try:
                placed = [(site.name, inspection.merges[site.index]) for site in sites]
                surgery.methods[entry.method] = write_entry(owner, inspection.traces, placed)
            except TraceError as error:
                raise PlanError(f"{entry} cannot be written as code: {error}; exclude it") from error
    for surgery in surgeries.values():
        if surgery.graph is None:
            surgery.cls = _derive_class(type(model.get_submodule(surgery.path)), surgery.notes, surgery.methods)
    return list(surgeries.values())


def _make_block(site: Site, plan: Plan, model: nn.Module) -> SqueezeExcite:
    owner = model.get_submodule(site.owner)
    if not is_free(owner, site.name) or not re.fullmatch(r"se\d*", site.name):
        raise PlanError(
            f"{type(owner).__name__} at {site.owner!r} has no room for an attribute {site.name!r}; make a new plan"
        )
    home = owner if any(p.is_floating_point() for p in owner.parameters()) else model
    return SqueezeExcite(
        site.channels,
        site.r,
        divisor=plan.divisor,
        bias=plan.bias,
        num_spatial=site.num_spatial,
        channel_dim=site.channel_dim,
        device=get_device(home),
        dtype=get_dtype(home),
    )


def _insert_block(graph: fx.Graph, name: str, merge: Merge) -> None:
    nodes = {node.name: node for node in graph.nodes}
    branches = [nodes[branch.node] for branch in merge.branches]
    consumers = [nodes[branch.consumer] for branch in merge.branches]
    if len(branches) == 1:
        with graph.inserting_before(consumers[0]):
            consumers[0].replace_input_with(branches[0], graph.call_module(name, (branches[0],)))
        return
    operations = [nodes[operation] for operation in merge.operations]
    for operation in operations[:-1]:
        operations[-1].prepend(operation)  # the additions of a chain wait until every branch has been gated
    with graph.inserting_before(operations[0]):
        block = graph.call_module(name, tuple(branches))
        block.meta["joint"] = len(branches)
        gated = [_take_item(graph, block, i, branch) for i, branch in enumerate(branches)]
    for branch, consumer, item in zip(branches, consumers, gated, strict=True):
        consumer.replace_input_with(branch, item)


def _take_item(graph: fx.Graph, block: fx.Node, i: int, branch: fx.Node) -> fx.Node:
    return graph.create_node("call_function", operator.getitem, (block, i), name=f"{branch.name}_gated")


def _forget_values(graph: fx.Graph) -> fx.Graph:
    for node in graph.nodes:
        node.meta.clear()
    return graph


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:
        line = str(error).splitlines()[0]
        raise ModelError(f"{type(model).__name__} cannot be copied ({line}); use inplace=True") from error


# Generated classes. They live in modules of their own, so that inspect.getsource and tracebacks show their code.

_classes: dict[tuple[object, ...], type[nn.Module]] = {}


def _derive_class(base: type[nn.Module], notes: list[str], methods: Mapping[str, Method]) -> type[nn.Module]:
    name = f"SE{base.__name__}"
    docstring = f"{base.__name__} with squeeze-and-excitation: {'; '.join(notes)}."
    source = write_class(name, base.__name__, docstring.replace("\\", "/").replace('"', "'"), list(methods.values()))
    names = {name: value for method in methods.values() for name, value in method.names.items()}
    return _make_class(base, name, source, names)


def _make_class(base: type[nn.Module], name: str, source: str, names: Mapping[str, object]) -> type[nn.Module]:
    """Make the class of a source text; the same text over the same base gives the same class."""
    key = (base, source, *sorted((name, id(value)) for name, value in names.items()))
    if key not in _classes:
        identity = repr((base.__module__, base.__qualname__, len(_classes), source)).encode()
        module = types.ModuleType(f"{_GENERATED}.{name}_{hashlib.sha256(identity).hexdigest()[:8]}")
        module.__file__ = f"<{module.__name__}>"
        vars(module).update(names)
        vars(module)[base.__name__] = base
        try:
            exec(compile(source, module.__file__, "exec"), vars(module))  # noqa: S102  our own code, from the plan
        except Exception as error:
            message = f"no class can be derived from {base.__qualname__} ({error}); exclude its modules"
            raise ModelError(message) from error
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
        sys.modules[module.__name__] = module
        made = vars(module)[name]
        made._se_inject_code = (base, name, source, dict(names))
        made.__reduce_ex__ = _reduce
        _classes[key] = made
    return _classes[key]


def _reduce(self: nn.Module, protocol: int) -> Any:
    """Pickle an instance of a generated class: the class is made anew from its base and its source."""
    cls: type[nn.Module] = next(c for c in type(self).__mro__ if "_se_inject_code" in vars(c))
    reduced: Any = super(cls, self).__reduce_ex__(protocol)
    if type(self) is not cls:
        return reduced  # an instance of somebody's subclass, pickled like any other
    constructor, args, *rest = reduced
    if args[:1] != (cls,):
        raise TypeError(f"{cls.__name__} cannot be pickled: {get_base(cls).__name__} defines a __reduce__ of its own")
    base, name, source, names = cls._se_inject_code  # type: ignore[attr-defined]
    modules = {key: value.__name__ for key, value in names.items() if isinstance(value, types.ModuleType)}
    others = {key: value for key, value in names.items() if key not in modules}
    return (_restore, ((base, name, source, others, modules), constructor, *args[1:]), *rest)


def _restore(code: tuple[Any, ...], constructor: Any, *args: object) -> Any:
    base, name, source, names, modules = code
    imported = {key: importlib.import_module(module) for key, module in modules.items()}
    return constructor(_make_class(base, name, source, {**names, **imported}), *args)
