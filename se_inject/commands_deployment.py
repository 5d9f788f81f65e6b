"""Commands for deployment: `export`, `bench`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from se_inject import console
from se_inject.arguments import AsJson, Device, InputSize, Opened, open_model, open_peer, takes
from se_inject.errors import OptionError
from se_inject.plan_arguments import read_options


@takes(open_model=open_model)
def run_export(
    open_model: functools.partial[Opened],
    *,
    optimized: Annotated[
        bool,
        typer.Option("--optimize", help="Make it fast first: norms folded, blocks run with the layers around them."),
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="timm:NAME|adapter|folder|hf-hub:USER/NAME",
            help="The weights of timm's own SE network, as in timm:seresnet50; an adapter: the blocks alone; or a "
            "folder with a model card, here or on the Hugging Face hub.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="A program: .pt2 (torch.export) or .onnx; or the network in another format (.pt, .pth, .safetensors). "
            "model.pt2; fast.pt2 with --optimize; NAME.pt, adapter.safetensors or the folder model with --to.",
        ),
    ] = None,
    license_name: Annotated[
        str,
        typer.Option(
            "--license", metavar="NAME", help="For the model card, by its name on the hub: mit, cc-by-4.0, ..."
        ),
    ] = "",
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FOLDER", help="Of the fine-tune, whose recipe and scores the model card shows."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository on the hub that others cannot see.")
    ] = False,
    input_size: InputSize = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Leave the images' height and width open, beside their number.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a network as a program that runs without its code, or as timm's own SE network, after comparing the two."""
    is_published = to == "folder" or (to or "").startswith("hf-hub:")
    if (license_name or run is not None or private) and not is_published:
        raise OptionError("--license, --run and --private go with --to folder and --to hf-hub:USER/NAME")
    from se_inject.reading import seed_all

    seed_all(0)  # weights that are not fetched are drawn: the same command gives the same file
    if to is not None:
        given = {"--optimize": optimized, "--input-size": input_size is not None, "--dynamic-size": dynamic_size}
        if found := next((option for option, is_given in given.items() if is_given), None):
            what = {"adapter": "the blocks alone"}.get(to, "the network as it is" if is_published else "timm's network")
            raise OptionError(f"--to writes {what}, and {found} has no part in it; leave out one of the two")
        if to == "adapter":
            _export_adapter(open_model, out or Path("adapter.safetensors"), as_json=as_json)
        elif is_published:
            _publish(open_model, to, out, license_name, run, private=private, as_json=as_json)
        else:
            _export_to_timm(open_model, to, out, as_json=as_json)
        return
    from se_inject.deployment import check_deployment, deploy
    from se_inject.files import SUFFIXES

    target = out or Path("fast.pt2" if optimized else "model.pt2")
    check_deployment(target)
    if dynamic_size and target.suffix in SUFFIXES:
        raise OptionError(f"{target} holds the network for any size; --dynamic-size goes with programs (.pt2, .onnx)")
    if target.suffix in SUFFIXES and not optimized:
        _convert(open_model, target, input_size, as_json=as_json)
        return
    network, source = open_model()
    deployment = deploy(
        network, target, optimized=optimized, input_size=input_size, dynamic_size=dynamic_size, source=source
    )
    for note in deployment.notes:
        console.talk(note)
    if as_json:
        console.print_json({"out": str(target), **deployment.to_values()})
    else:
        console.stdout.out(f"{target}: {deployment}")


@takes(open_model=open_model, read_options=read_options)
def run_bench(
    open_model: functools.partial[Opened],
    *,
    batch_size: Annotated[int, typer.Option("--batch", metavar="N", help="Images at once.")] = 1,
    input_size: InputSize = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="MODEL",
            help="A network to measure beside it, as timm:seresnet50; whatever MODEL can be. Repeatable.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", metavar="N", help="How often each is timed, in turn.")] = 20,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Through torch.compile too.")] = True,
    training: Annotated[bool, typer.Option("--training", help="Time steps of training too.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Maps with the channels last.")] = False,
    precision: Annotated[str, typer.Option("--precision", metavar="fp32|bf16", help="bf16 is autocast.")] = "fp32",
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="Of the CPU; torch's choice.")] = None,
    device: Device = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw a chart (.png, .svg, .pdf).")
    ] = None,
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Measure what SE costs: bytes, memory and time of the plain, the injected, the optimized network and of peers."""
    from se_inject.speed import measure_network
    from se_inject.speed_tables import print_speed
    from se_inject.timing import Conditions
    from se_inject.world import choose_device

    if plot is not None:
        from se_inject.files import check_target
        from se_inject.speed_chart import SUFFIXES, draw_speed

        check_target(plot, SUFFIXES)
    conditions = Conditions(
        batch_size, input_size, rounds, compiled, training, channels_last, precision, threads, choose_device(device)
    )
    network, source = open_model()
    trust_source = open_model.keywords["trust_source"]
    peers = {name: open_peer(name, beside=source, trust_source=trust_source) for name in compare or ()}
    options = read_options()
    measured = measure_network(network, conditions, peers=peers, options=options, report=console.talk)
    if plot is not None:
        draw_speed(measured.rows, f"{source or type(network).__name__}, {measured.describe()}", plot)
        console.talk(f"wrote {plot}")
    if as_json:
        console.print_json({"model": open_model.keywords["model"], **measured.to_values()})
    else:
        print_speed(measured.rows)
        console.talk(measured.describe())


def _convert(open_model: functools.partial[Opened], target: Path, input_size: int | None, *, as_json: bool) -> None:
    """Write an artifact in another format; in its own that would be a copy, of which nothing would be other."""
    from se_inject.artifact import save
    from se_inject.files import SAFETENSORS

    before = Path(open_model.keywords["model"]).suffix
    if before and (before == SAFETENSORS) == (target.suffix == SAFETENSORS):
        raise OptionError(
            f"{target} would hold the same network again; give --optimize, --to timm:NAME, or a program (.pt2, .onnx)"
        )
    if input_size is not None:
        raise OptionError(f"{target} holds the network for any size; --input-size goes with programs (.pt2, .onnx)")
    network, source = open_model()
    save(network, target, source=source)
    if as_json:
        console.print_json({"out": str(target), "format": "artifact", "bytes": target.stat().st_size})
    else:
        console.stdout.out(f"{target}: the same network, {target.stat().st_size:,} bytes")


def _publish(
    open_model: Callable[..., Opened], to: str, out: Path | None, license_name: str, run: Path | None, *, private: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from se_inject.hub import HUB, read_name
    from se_inject.publishing import check_folder, push_to_hub, save_folder

    if to.startswith(HUB):
        read_name(to)
        if out is not None:
            raise OptionError(f"--to {to} writes no file, and --out has no part in it; leave out one of the two")
        network, source = open_model()
        address = push_to_hub(network, to, license=license_name, run=run, private=private or None, source=source)
        where, values = to, {"to": to, "commit": address}
    else:
        if private:
            raise OptionError("--private goes with --to hf-hub:USER/NAME; a folder is as private as where it lies")
        folder = out or Path("model")
        check_folder(folder)
        network, source = open_model()
        save_folder(network, folder, license=license_name, run=run, source=source)
        where, values = str(folder), {"to": to, "out": str(folder)}
    if as_json:
        console.print_json(values)
    else:
        console.stdout.out(f"{where}: the network and its model card, which says how to load it")


def _export_adapter(open_model: Callable[..., Opened], target: Path, *, as_json: bool) -> None:
    from se_inject.adapters import save_adapter
    from se_inject.files import check_target
    from se_inject.rewrite import get_plan

    check_target(target)
    network, _ = open_model()
    save_adapter(network, target)
    plan = get_plan(network)
    if as_json:
        values = {"blocks": len(plan.sites), "parameters": plan.num_parameters, "bytes": target.stat().st_size}
        console.print_json({"out": str(target), "to": "adapter", **values})
    else:
        console.stdout.out(
            f"{target}: the {len(plan.sites)} blocks of {plan.model}, {plan.num_parameters:,} parameters; give it as "
            f"--adapter {target} with the network that they were tuned on"
        )


def _export_to_timm(open_model: Callable[..., Opened], to: str, out: Path | None, *, as_json: bool) -> None:
    from se_inject.export import export_to_timm
    from se_inject.files import check_target, write_tensors

    library, _, name = to.partition(":")
    if library != "timm" or not name:
        raise OptionError(
            f"--to is {to!r}; expected timm:NAME, as in timm:seresnet50, adapter, folder or hf-hub:USER/NAME"
        )
    target = out or Path(f"{name}.pt")
    check_target(target)
    network, _ = open_model(pretrained=False)
    export = export_to_timm(network, name)
    write_tensors(target, export.model.state_dict(), {})
    if as_json:
        values = {"out": str(target), "to": to, "options": export.options, "difference": export.difference}
        console.print_json(values)
    else:
        options = "".join(f", {key}={value}" for key, value in export.options.items())
        console.stdout.out(
            f"{target}: timm.create_model({export.name!r}{options}, checkpoint_path={str(target)!r}); "
            f"outputs differ by {export.difference:.1g} of the largest"
        )
