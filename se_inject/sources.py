"""Sources: find the network that a name means, build it, and fetch its weights.

Takes names (`resnet50`, `torchvision:resnet50`, `hf-hub:...`, `package.module:factory`), gives the network and a
`Source` that says how to build it again. timm and torchvision do the work.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from se_inject.allowance import Allowance
from se_inject.downloads import build, fetch
from se_inject.errors import SourceError
from se_inject.files import PROGRAMS, SUFFIXES, read_state_dict
from se_inject.provenance import RANDOM, REMOTE, Library, Source

_RESERVED = ("weights", "weights_backbone", "progress")
"""What torchvision's builders fetch weights by; timm's are the parameters of `create_model` itself."""


@dataclass(frozen=True)
class Network:
    """A network and its source."""

    model: nn.Module
    source: Source


def open_network(
    name: str,
    *,
    pretrained: bool = True,
    weights: Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
) -> Network:
    """Build the network that a name means, with weights.

    Args:
        name: `resnet50` (timm's if there is one, else torchvision's), `timm:NAME`, `torchvision:NAME`,
        `hf-hub:USER/NAME` or
            `package.module:factory`, with the working directory importable.
        pretrained: Fetch the library's default weights; a factory's network comes as it is.
        weights: A state dict to load instead.
        num_classes: Replace the classifier by one for so many classes.
        in_chans: Channels of the input, where it is not the network's own; for timm's networks and factories.

    Raises:
        SourceError: There is no such network, it cannot have so many channels, or its weights cannot be fetched or
            do not fit.
        ArtifactError: The weights' file cannot be read.
    """
    if num_classes is not None and num_classes < 1:
        raise SourceError(f"--num-classes is {num_classes}; it must be at least 1")
    if in_chans is not None and in_chans < 1:
        raise SourceError(f"--in-chans is {in_chans}, expected at least 1")
    library, short = resolve_name(name)
    open_it = {"timm": _open_timm, "torchvision": _open_torchvision, "factory": _open_factory}[library]
    given = {"num_classes": num_classes, "in_chans": in_chans}
    network = open_it(short, pretrained and weights is None, {k: v for k, v in given.items() if v is not None})
    if weights is not None:
        load_weights(network.model, read_state_dict(weights), str(weights), num_classes)
        network = Network(network.model, replace(network.source, weights=str(weights)))
    return network


def resolve_name(name: str) -> tuple[Library, str]:
    """Find out which library a name belongs to.

    Raises:
        SourceError: No library has it; the message lists the nearest names, or says that it is a file.
    """
    import timm
    import torchvision

    head, colon, tail = name.partition(":")
    if head in ("hf-hub", "local-dir"):
        return "timm", name
    if colon and head not in ("timm", "torchvision"):
        return "factory", name
    short = tail if colon else name
    if short.endswith((*SUFFIXES, *PROGRAMS)) or os.sep in short:
        raise SourceError(_explain_file(name))
    known = {"timm": timm.list_models(), "torchvision": torchvision.models.list_models()}
    if head != "torchvision" and short.partition(".")[0] in known["timm"]:
        return "timm", short
    if head != "timm" and short in known["torchvision"]:
        return "torchvision", short
    names = [n for library, models in known.items() if not colon or library == head for n in models]
    where = f"{head} has no network" if colon else "neither timm nor torchvision has a network"
    near = list(dict.fromkeys(difflib.get_close_matches(short, names, n=5, cutoff=0.5)))
    hint = f"; the nearest names are {', '.join(near)}" if near else "; timm.list_models() lists the names"
    raise SourceError(f"{where} {short!r}{hint}")


def _explain_file(name: str) -> str:
    """Say why a path is no name of a network."""
    if not Path(name).is_file():
        return f"there is no file {name}"
    what = "a program, which has no layers to work on" if name.endswith(PROGRAMS) else "no artifact of se-inject"
    return f"{name} is {what}; expected an artifact ({', '.join(SUFFIXES)}) or the name of a network"


def build_skeleton(source: Source, *, trust_source: bool = False, num_weights: int | None = None) -> nn.Module:
    """Build a source's network with random weights, to be loaded from an artifact.

    Args:
        source: From an artifact.
        trust_source: Import and call the factory that the source names, and fetch from the hub that it names; without
            it, these are refused.
        num_weights: How many weights there are to be loaded; a network of many more is refused before it is made.

    Raises:
        SourceError: It cannot be built, or is a factory and not trusted.
    """
    if not trust_source:
        _check_harmless(source)
    allowance = nullcontext() if num_weights is None or trust_source else Allowance(num_weights)
    with allowance:
        if source.library == "factory":
            return _call_factory(source.name, dict(source.options))
        is_remote = source.name.startswith(REMOTE)
        library, name = resolve_name(source.name if is_remote else str(source))
        make = _build_timm if library == "timm" else _build_torchvision
        return make(name, dict(source.options))


def _check_harmless(source: Source) -> None:
    """Refuse what a file must not make us do: run code, go to the network, or open other files."""
    if source.library == "factory":
        raise SourceError(
            f"the network is built by {source.name:.80}, which is code: give load(..., base=) the network or "
            f"factory, or trust_source=True (--trust-source) if you know it"
        )
    if source.name.startswith(REMOTE):
        raise SourceError(
            f"the network is built by what {source.name!r:.80} holds: give load(..., base=) the network, or "
            f"trust_source=True (--trust-source) if you know it"
        )
    import timm

    reserved = {*inspect.signature(timm.create_model).parameters, *_RESERVED} - {"kwargs"}
    if given := sorted(reserved & set(source.options)):
        raise SourceError(f"the file gives the builder of its network {', '.join(given)}, which no file may choose")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], origin: str, num_classes: int | None = None) -> None:
    """Load a state dict strictly; with `num_classes`, a classifier of another size keeps its fresh weights.

    Raises:
        SourceError: Names or shapes differ; the message shows the first ones.
    """
    own = model.state_dict()
    # Batch norms count their batches since torch 0.4.1; older files do not have it, and torch reads them all the same.
    counters = {key: own[key] for key in own if key.endswith("num_batches_tracked") and key not in state}
    state = {**state, **counters}
    other = [key for key in state if key in own and own[key].shape != state[key].shape]
    if num_classes is not None:
        other = [key for key in other if own[key].shape[:1] != (num_classes,)]
        state = {
            key: own[key] if key in own and own[key].shape != value.shape else value for key, value in state.items()
        }
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected or other:
        found = [
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
            if keys
        ]
        hint = "; --num-classes sets the number of classes" if other and not missing and not unexpected else ""
        raise SourceError(f"the weights of {origin} are not those of {type(model).__name__}: {'; '.join(found)}{hint}")
    model.load_state_dict(state)


def _open_timm(name: str, pretrained: bool, options: dict[str, Any]) -> Network:  # noqa: FBT001
    import timm

    model = fetch(lambda: timm.create_model(name, pretrained=pretrained, **options), f"timm:{name}")
    config = getattr(model, "pretrained_cfg", None) or {}
    weights = name if ":" in name else config.get("hf_hub_id") or config.get("url") or name
    architecture = config.get("architecture", name)
    if ":" not in name:
        name = ".".join(filter(None, (architecture, config.get("tag"))))
    elif hasattr(model, "_model_args"):  # with timm's name for it, the file loads without the hub
        name, options = architecture, {**model._model_args, "num_classes": model.num_classes}
    source = Source("timm", name, options, str(weights) if pretrained else RANDOM, _read_timm_preprocess(model))
    return Network(model, source)


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    make = fetch if name.startswith(REMOTE) else build
    model: nn.Module = make(lambda: timm.create_model(name, pretrained=False, **options), f"timm:{name}")
    return model


def _read_timm_preprocess(model: nn.Module) -> dict[str, Any]:
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    return {"library": "timm", **{key: list(v) if isinstance(v, tuple) else v for key, v in config.items()}}


def _open_torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> Network:  # noqa: FBT001
    import torchvision

    if options.pop("in_chans", 3) != 3:
        raise SourceError(f"torchvision:{name} takes three channels; --in-chans goes with networks of timm")
    num_classes = options.get("num_classes")
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    if weights is None:
        model = _build_torchvision(name, options)
        return Network(model, Source("torchvision", name, {**options, **_read_torchvision_options(model)}))
    model = fetch(lambda: torchvision.models.get_model(name, weights=weights), f"torchvision:{name}")
    options |= _read_torchvision_options(model)
    if num_classes is not None:
        state = model.state_dict()
        model = _build_torchvision(name, options)
        load_weights(model, state, str(weights), num_classes)
    source = Source("torchvision", name, options, str(weights), _read_torchvision_preprocess(weights))
    return Network(model, source)


def _build_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    import torchvision

    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    if "weights_backbone" in parameters:
        options = {"weights_backbone": None, **options}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}  # their own initialisation takes a minute, and warns
    model: nn.Module = build(lambda: torchvision.models.get_model(name, weights=None, **options), f"torchvision:{name}")
    return model


def _read_torchvision_options(model: nn.Module) -> dict[str, Any]:
    """Read what torchvision's builders of GoogLeNet and Inception v3 change when they are given weights."""
    return {
        key: vars(model)[key] for key in ("aux_logits", "transform_input") if isinstance(vars(model).get(key), bool)
    }


def _read_torchvision_preprocess(weights: Any) -> dict[str, Any]:
    preset = weights.transforms()
    values = {key: vars(preset).get(key) for key in ("crop_size", "resize_size", "mean", "std")}
    if None in values.values():
        return {}  # not a classifier
    sizes = {key: values[key][0] for key in ("crop_size", "resize_size")}  # the preset keeps [224] of 224
    statistics = {key: list(values[key]) for key in ("mean", "std")}
    return {"library": "torchvision", **sizes, **statistics, "interpolation": preset.interpolation.value}


def _open_factory(name: str, pretrained: bool, options: dict[str, Any]) -> Network:  # noqa: ARG001, FBT001
    return Network(_call_factory(name, options), Source("factory", name, options, weights="as the factory made them"))


def takes_num_classes(source: Source) -> bool:
    """Tell whether a source can be built with another number of classes; a factory needs a parameter for it."""
    if source.library != "factory":
        return True
    factory = _find_factory(source.name)
    if isinstance(factory, nn.Module):
        return False
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)


def _call_factory(name: str, options: dict[str, Any]) -> nn.Module:
    factory = _find_factory(name)
    try:
        model = factory if isinstance(factory, nn.Module) else factory(**options)
    except Exception as error:
        raise SourceError(f"{name}({_format_options(options)}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{name} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _find_factory(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SourceError(
            f"{module_name!r} cannot be imported for {name}: {error}; run where it can be found"
        ) from error
    factory = getattr(module, attribute, None)
    if factory is None:
        near = difflib.get_close_matches(attribute, [n for n in vars(module) if callable(vars(module)[n])], n=5)
        raise SourceError(
            f"{module_name} has no {attribute!r}" + (f"; the nearest are {', '.join(near)}" if near else "")
        )
    return factory


def _format_options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())
