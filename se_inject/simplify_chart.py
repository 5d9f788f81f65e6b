"""Chart of a simplification: what each step cost in accuracy and brought in speed and parameters, for the eye.

Takes a `Simplified`, writes a picture. Measures nothing.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from se_inject.files import check_suffix, write_whole
from se_inject.simplify import Simplified

SUFFIXES = (".png", ".svg", ".pdf")


def draw_steps(simplified: Simplified, path: Path) -> None:
    """Draw top-1 against the blocks' part of the parameters and against the speed, a point a step.

    Args:
        simplified: What a simplification ended with.
        path: `.png`, `.svg` or `.pdf`.

    Raises:
        ArtifactError: The file cannot be written.
    """
    check_suffix(path, SUFFIXES)
    steps = simplified.steps
    top1 = [simplified.before.top1, *(step.top1 for step in steps)]
    parameters = [simplified.parameters, *(step.parameters for step in steps)]
    speeds = [1.0, *(step.speed for step in steps)]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, label in (
        (left, [100 * n / parameters[0] for n in parameters], "parameters, % of the start"),
        (right, [100 * speed for speed in speeds], "images a second, % of the start"),
    ):
        for action, marker, name in (("fold", "o", "a block folded"), ("reduce", "s", "a block made smaller")):
            own = [i for i, step in enumerate(steps, 1) if step.action == action]
            if own:
                axes.plot([values[i] for i in own], [top1[i] for i in own], marker, markersize=4, label=name)
        axes.plot(values[:1], top1[:1], "*", color="black", markersize=9, label="at the start")
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(alpha=0.3)
    left.plot([100 * n / parameters[0] for n in parameters], top1, color="tab:blue", linewidth=0.8, zorder=0)
    left.invert_xaxis()
    left.set_ylabel("top-1 on the validation images, %")
    left.set_title(
        f"{simplified.num_folded} of {simplified.num_folded + len(simplified.kept)} blocks folded", fontsize=9
    )
    right.set_title("timed in turns; other work on the machine shows", fontsize=9)
    right.legend(fontsize=8)
    content = BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150)
    write_whole(path, lambda file: file.write(content.getvalue()))
