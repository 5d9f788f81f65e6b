"""Arguments: what the commands of the command line take, and how it is read.

Takes words from the command line, gives options as the stages take them, and opened networks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from se_inject import console
from se_inject.errors import OptionError

Opened = tuple[Any, Any]
"""A network and its `Source` or None; their types live in modules that load when they are used."""

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm or torchvision name (resnet50, timm:resnet50.a1_in1k, torchvision:resnet50, hf-hub:USER/NAME), a "
        "package.module:factory, or what se-inject wrote: a file, a folder, or hf-hub:USER/NAME with such a folder.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", metavar="FILE", help="A state dict to load (.pt, .pth, .safetensors).")
]
Pretrained = Annotated[bool, typer.Option("--pretrained/--no-pretrained", help="Fetch the library's weights.")]
NumClasses = Annotated[
    int | None, typer.Option("--num-classes", metavar="N", help="Replace the classifier by one for N classes.")
]
InChans = Annotated[
    int | None, typer.Option("--in-chans", metavar="N", help="Input channels, where they are not the network's own.")
]
AdapterFile = Annotated[
    Path | None, typer.Option("--adapter", metavar="FILE", help="An adapter to put onto the network.")
]
TrustSource = Annotated[bool, typer.Option("--trust-source", help="Import the factory that a file of ours names.")]
DataName = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DIR",
        help="A folder with train/ and val/, or with a folder a class, of which `finetune` holds about a fifth back, "
        "`search` takes the rest, and all else takes all, without --split; or a name of timm's with its root: "
        "torch/cifar10:ROOT, hfds/USER/NAME, wds/:ROOT.",
    ),
]
TrainSplit = Annotated[
    str | None,
    typer.Option("--train-split", metavar="NAME", help="The folder in DIR, or the split of timm's data, that trains."),
]
ValSplit = Annotated[
    str | None,
    typer.Option(
        "--val-split",
        metavar="NAME",
        help="The folder in DIR, or the split of timm's data, to be scored on; val/ or the like, or validation.",
    ),
]
Download = Annotated[bool, typer.Option("--download", help="Let timm fetch data that are missing.")]
SplitFile = Annotated[
    Path | None,
    typer.Option(
        "--split",
        metavar="FILE",
        help="split.json of a run: which images of a single folder train, and which validate.",
    ),
]
InputSize = Annotated[
    int | None,
    typer.Option("--input-size", metavar="N", help="Height and width of images; the network's own."),
]
BatchSize = Annotated[int, typer.Option("--batch-size", metavar="N", help="Images at once.")]
Workers = Annotated[int, typer.Option("--workers", metavar="N", min=0, help="Processes that read images.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="cpu, cuda, ...; auto is CUDA if there is one.")]
MaxBad = Annotated[
    int,
    typer.Option("--max-bad", metavar="N", min=0, help="How many images that cannot be read are skipped, by name."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def open_model(
    model: ModelName,
    *,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    adapter: AdapterFile = None,
    trust_source: TrustSource = False,
) -> Opened:
    """Open the network that is named, with its source."""
    for library in ("timm", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from se_inject.artifact import get_source, load
    from se_inject.sources import open_network

    if _is_ours(model):
        if any(option is not None for option in (weights, num_classes, in_chans)):
            raise OptionError(
                f"{model} holds its own weights; --weights, --num-classes and --in-chans go with a model name"
            )
        network = load(model, trust_source=trust_source)
        source = get_source(network)
    else:
        opened = open_network(model, pretrained=pretrained, weights=weights, num_classes=num_classes, in_chans=in_chans)
        network, source = opened.model, opened.source
    console.talk(f"{source or model}, weights: {source.weights if source else model}")
    if adapter is not None:
        from se_inject.adapters import load_adapter

        network = load_adapter(network, adapter, name=adapter.stem, inplace=True)
    return network, source


def open_peer(name: str, *, beside: Any, trust_source: bool) -> Any:
    """Open a network that another one is compared to, with random weights.

    Args:
        name: What MODEL can be. A network of timm's or torchvision's gets the classes and the input channels that the
            other one was built with.
        beside: The other one's `Source`, or None.
        trust_source: Import the factory that a file of ours names.
    """
    from se_inject.sources import resolve_name

    is_built = beside is not None and not _is_ours(name) and resolve_name(name)[0] != "factory"
    # 0 classes are a network without a classifier, which no option can ask for.
    options = {key: beside.options.get(key) or None for key in ("num_classes", "in_chans")} if is_built else {}
    network, _ = open_model(name, pretrained=False, trust_source=trust_source, **options)
    return network


def _is_ours(model: str) -> bool:
    """Tell whether a name is that of a file, a folder or a repository of ours; what is none may be a library's."""
    from se_inject.files import SUFFIXES
    from se_inject.folders import is_folder
    from se_inject.hub import HUB, fetch_folder

    if model.startswith(HUB):
        return fetch_folder(model) is not None
    path = Path(model)
    # A folder that is given as a path is one, whatever it holds; a name alone may be a library's.
    return (path.suffix in SUFFIXES and path.is_file()) or (path.is_dir() and (os.sep in model or is_folder(path)))


def name_data(
    *,
    data: DataName,
    train_split: TrainSplit = None,
    val_split: ValSplit = None,
    split: SplitFile = None,
    download: Download = False,
) -> dict[str, Any]:
    """Read where the images are, as `open_data` takes it."""
    named = {"train_split": train_split, "val_split": val_split}
    options = {key: name for key, name in named.items() if name is not None}
    return {"name": data, "download": download, "split": split, "options": options}


def read_validation(
    *,
    data: DataName,
    val_split: ValSplit = None,
    split: SplitFile = None,
    download: Download = False,
    batch_size: BatchSize = 64,
    workers: Workers = 2,
    input_size: InputSize = None,
    max_bad: MaxBad = 0,
) -> dict[str, Any]:
    """Read which images a network is scored on, as `open_validation` takes it."""
    return {
        "data": name_data(data=data, val_split=val_split, split=split, download=download),
        "batch_size": batch_size,
        "workers": workers,
        "input_size": input_size,
        "max_bad": max_bad,
    }


def write_words(reader: functools.partial[Any]) -> list[str]:
    """Write what a reader of options was given as words of the command line; what is as by default is left out."""
    words: list[str] = []
    for name, parameter in inspect.signature(reader.func).parameters.items():
        value, option = reader.keywords[name], name.replace("_", "-")
        if value is None:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY:
            words.append(str(value))
        elif isinstance(value, bool) and value != parameter.default:
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value != parameter.default:
            words += [f"--{option}", str(value)]
    return words


def takes(**readers: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a reader in place of a parameter, which gets a function that reads them.

    An option that the command has as a parameter too is as the command says, and both get it.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        inner = {name: inspect.signature(reader, eval_str=True).parameters for name, reader in readers.items()}
        merged: dict[str, inspect.Parameter] = {}
        for name, parameter in own.parameters.items():
            merged.update(inner.get(name, {name: parameter}))
        merged.update({name: parameter for name, parameter in own.parameters.items() if name in merged})

        @functools.wraps(command)
        def run(**given: Any) -> None:
            read = {
                name: functools.partial(reader, **{key: given[key] for key in inner[name]})
                for name, reader in readers.items()
            }
            command(**{name: value for name, value in given.items() if name in own.parameters}, **read)

        ordered = sorted(merged.values(), key=lambda parameter: parameter.kind)
        vars(run)["__signature__"] = own.replace(parameters=ordered)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
        return run

    return wrap
