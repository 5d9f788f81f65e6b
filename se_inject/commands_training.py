"""Commands that run a network on images: `finetune`, `evaluate`, `predict`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from se_inject import console
from se_inject.arguments import (
    AsJson,
    Device,
    InputSize,
    MaxBad,
    Opened,
    name_data,
    open_model,
    read_validation,
    takes,
)
from se_inject.plan_arguments import read_options


@takes(open_model=open_model, name_data=name_data, read_options=read_options)
def run_finetune(
    open_model: Callable[[], Opened],
    name_data: Callable[[], dict[str, Any]],
    *,
    recipe: Annotated[
        str,
        typer.Option("--recipe", metavar="NAME|FILE", help="One of ours (short, se_only, ...), or a .yaml file."),
    ] = "short",
    epochs: Annotated[float | None, typer.Option("--epochs", metavar="N", help="Short for --set epochs=N.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override the recipe. Repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the tuned network.")] = Path(
        "tuned.pt"
    ),
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", "--run-folder", metavar="FOLDER", help="For checkpoints, logs, results; runs/NAME of --out."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the folder.")] = False,
    control: Annotated[
        bool, typer.Option("--compare", help="Train the network without blocks beside it, on the same budget.")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Repeat with N seeds.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the steps with torch.compile.")] = False,
    input_size: InputSize = None,
    max_bad: MaxBad = 0,
    device: Device = "auto",
    read_options: Callable[[], dict[str, Any]],
    as_json: AsJson = False,
) -> None:
    """Fine-tune a network on your images; a network without blocks is injected first."""
    from se_inject.experiment import Request
    from se_inject.finetune import finetune
    from se_inject.recipe_files import read_recipe
    from se_inject.world import join_world

    overrides = [*(settings or ()), *([] if epochs is None else [f"epochs={epochs}"])]
    request = Request(
        recipe=read_recipe(recipe, overrides),
        data=name_data(),
        options=read_options(),
        out=out,
        folder=run or Path("runs") / out.stem,
        has_control=control,
        num_seeds=seeds,
        input_size=input_size,
        max_bad=max_bad,
        compiled=compiled,
        resume=resume,
    )
    with join_world(device) as world:
        if world.is_main and resume and not request.has_begun():
            console.talk(f"{request.folder} holds no checkpoint: the run begins at the first step")
        tuned = finetune(open_model, request, world, console.make_progress() if world.is_main else None)
        if world.is_main and as_json:
            console.print_json(tuned.to_values())
        elif world.is_main:
            console.print_tuned(tuned)


@takes(open_model=open_model, read_validation=read_validation)
def run_evaluate(
    open_model: Callable[[], Opened],
    read_validation: Callable[[], dict[str, Any]],
    *,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure how well a network classifies: top-1, top-5, by class, and which classes it takes for which."""
    from se_inject.runlog import RunLog
    from se_inject.validation import open_validation
    from se_inject.world import join_world

    with join_world(device) as world:
        model, _, validation = open_validation(open_model, world=world, **read_validation())
        progress = console.make_progress() if world.is_main else None
        with RunLog(None, "evaluation", progress) as log, progress or nullcontext():
            log.begin_validation(validation.loader.num_own)
            scores = validation.score(model, on_batch=lambda labels: log.advance_validation(len(labels)))
        if world.is_main and as_json:
            console.print_json({**scores.to_values(), "unreadable": validation.list_unreadable()})
        elif world.is_main:
            console.print_scores(scores, validation.data.origin, validation.list_unreadable())


@takes(open_model=open_model)
def run_predict(
    open_model: Callable[[], Opened],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    *,
    top_k: Annotated[int, typer.Option("--top-k", help="How many classes an image.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Name the most probable classes of images, with the model's own preprocessing."""
    from dataclasses import asdict

    from se_inject.images import make_transform, predict_image
    from se_inject.rewrite import find_plan

    network, source = open_model()
    transform = make_transform(source, find_plan(network))
    names = source.classes if source is not None else ()
    predictions = {str(path): predict_image(network, path, transform, classes=names, top_k=top_k) for path in images}
    if as_json:
        console.print_json({path: [asdict(item) for item in classes] for path, classes in predictions.items()})
    else:
        console.print_predictions(predictions)
