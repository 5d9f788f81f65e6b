"""Starts: a network that is ready to be trained on some data.

Takes an opened network and the number of classes, injects where that has not been done, fits the classifier, and says
what images become for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from se_inject.errors import DataError, OptionError, SourceError
from se_inject.formats import InputFormat, check_input_size, read_format
from se_inject.heads import count_channels, count_outputs, replace_head
from se_inject.images import read_size
from se_inject.provenance import Source
from se_inject.rewrite import find_plan, inject, refuse_empty
from se_inject.sources import takes_num_classes


@dataclass(frozen=True)
class Start:
    """A network that is ready to be trained.

    Attributes:
        model: Injected, with a classifier for the data.
        source: How it is built; None if its file does not say.
        form: What images become for it.
        num_classes: Its outputs.
        fresh: Names of parameters that start from random values.
    """

    model: nn.Module
    source: Source | None
    form: InputFormat
    num_classes: int
    fresh: frozenset[str] = frozenset()


def prepare_start(
    model: nn.Module,
    source: Source | None,
    num_classes: int,
    *,
    classes: Sequence[str] = (),
    options: Mapping[str, Any],
    input_size: int | None = None,
) -> Start:
    """Inject where that has not been done, and fit the classifier to the data.

    Args:
        model: From an artifact or a library; it is changed.
        source: How it is built.
        num_classes: Classes of the data; 0 keeps the classifier.
        classes: Their names, if known.
        options: Of `inject`.
        input_size: Height and width of the images; by default the network's own.

    Raises:
        DataError: The network is no classifier, or its classifier cannot be replaced.
        SourceError: The artifact could not be built again with another number of classes.
        EmptyPlanError: The network has no place for a block.
        ModelError: Its plan leaves it no block.
        OptionError: The input size is below 1, or the network has its blocks already and options of `inject` are given.
    """
    check_input_size(input_size)
    model = inject_once(model, options, input_size=input_size, inplace=True)
    refuse_empty(model)  # what would be trained and compared "with SE" would have none
    form = read_model_format(model, source, input_size)
    num_outputs = count_outputs(model, form.size)
    fresh: frozenset[str] = frozenset()
    is_other = num_outputs != num_classes
    if num_classes and (is_other or (source is not None and source.names_others(classes))):
        fresh = replace_head(model, num_outputs, num_classes)
        if (found := count_outputs(model, form.size)) != num_classes:
            raise DataError(
                f"{type(model).__name__} gives {found} scores after its last layer was replaced; give it a classifier "
                f"of {num_classes} classes first"
            )
        if is_other and source is not None and not takes_num_classes(source):
            raise SourceError(
                f"{source.name} makes {num_outputs} classes and the data has {num_classes}; give the factory a "
                f"parameter num_classes, so that the result can be built again"
            )
        if is_other and source is not None:
            source = replace(source, options={**source.options, "num_classes": num_classes})
    if source is not None:
        kept = () if num_classes else source.classes
        source = replace(source, preprocess=form.to_preprocess(), classes=tuple(classes) or kept)
    return Start(model, source, form, num_classes or num_outputs, fresh)


def inject_once(
    model: nn.Module, options: Mapping[str, Any], *, input_size: int | None = None, inplace: bool = False
) -> nn.Module:
    """Inject where that has not been done.

    Args:
        model: With blocks or without.
        options: Of `inject`; there must be none where the network has its blocks.
        input_size: Height and width of the images that the plan is made for, where one is made.
        inplace: Likewise of `inject`.

    Raises:
        OptionError: The network has its blocks already, and options are given.
        EmptyPlanError: The network has no place for a block.
    """
    if find_plan(model) is None:
        example = None if "plan" in options else input_size
        return inject(model, example=example, inplace=inplace, **options)
    if options:
        given = next(iter(options)).replace("_", "-")
        raise OptionError(
            f"{type(model).__name__} has its blocks already, in which --{given} has no part; leave it out, or give the "
            f"network without blocks"
        )
    return model


def read_model_format(model: nn.Module, source: Source | None, input_size: int | None) -> InputFormat:
    """Read what images become for a network: as its source says, at its own size or the given one."""
    preprocess = source.preprocess if source is not None else {}
    plan = find_plan(model)
    size = read_size(plan)
    in_chans = count_channels(model) if plan is None else size[0]
    return read_format(preprocess, size, input_size=input_size, in_chans=in_chans)
