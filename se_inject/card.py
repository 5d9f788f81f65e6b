"""Model cards: what a network is, as the README.md of its folder, which the hub shows.

Takes what an artifact says and what was measured of it, gives Markdown with the hub's front matter. What is not known
is said to be unknown; names and lines of code come from anybody's network and are quoted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml
from huggingface_hub import ModelCardData

from se_inject import __version__
from se_inject.errors import OptionError
from se_inject.measured import Measured
from se_inject.plan import SE, Plan
from se_inject.provenance import RANDOM, UNRECORDED, Source

UNKNOWN = "unknown"
_MANY = 20
_CITATION = """```bibtex
@article{hu2020squeeze,
  title   = {Squeeze-and-Excitation Networks},
  author  = {Hu, Jie and Shen, Li and Albanie, Samuel and Sun, Gang and Wu, Enhua},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {42},
  number  = {8},
  pages   = {2011--2023},
  year    = {2020},
  note    = {arXiv:1709.01507}
}
```"""


@dataclass(frozen=True)
class Origin:
    """Where a network's weights come from, as far as it is known.

    Attributes:
        repository: On the hub; empty if it is not known, or if they do not come from there.
        license: Of these weights, as timm says; empty if it says nothing.
    """

    repository: str = ""
    license: str = ""


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        title: The network's name.
        address: What `load` takes.
        plan: Where the blocks stand.
        source: How the network is built, if its file says so.
        num_parameters: Of the whole network.
        is_fresh: Whether the blocks are exact identities still.
        license: As its publisher says; empty if that was not said.
        origin: Of the weights.
        measured: What its fine-tune measured; None if that is not known.
    """

    title: str
    address: str
    plan: Plan
    source: Source | None
    num_parameters: int
    is_fresh: bool
    license: str = ""
    origin: Origin = Origin()
    measured: Measured | None = None

    def __str__(self) -> str:
        """Write the card."""
        parts = [
            f"---\n{_describe_for_hub(self)}\n---",
            f"# {_escape(self.title)}",
            _describe(self),
            "## How to load it",
            *_describe_loading(self),
            "## Accuracy",
            *_describe_accuracy(self.measured),
            "## Blocks",
            *_describe_blocks(self.plan),
            "## Training",
            *_describe_training(self),
            "## Licence",
            _describe_license(self),
            "## Citation",
            _CITATION,
        ]
        return "\n\n".join(parts) + "\n"


def check_license(name: str) -> None:
    """Refuse what is no licence's short name on the hub.

    Raises:
        OptionError: It is none.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", name):
        raise OptionError(
            f"the license is {name!r}; expected its short name on the hub, as in mit, apache-2.0, cc-by-4.0 or other"
        )


def find_origin(source: Source | None, config: object) -> Origin:
    """Find out where weights come from.

    Args:
        source: How the network is built.
        config: timm's `pretrained_cfg` of the network; it may speak of other weights than those that it has.
    """
    if source is None or source.library != "timm":
        return Origin()
    if source.weights.startswith("hf-hub:"):
        return Origin(source.weights.removeprefix("hf-hub:").partition("@")[0])
    known = config if isinstance(config, Mapping) else {}
    repository, address = (str(known.get(key) or "") for key in ("hf_hub_id", "url"))
    if source.weights in (RANDOM, UNRECORDED) or source.weights not in (repository, address):
        return Origin()
    return Origin(repository if source.weights == repository else "", str(known.get("license") or "").lower())


def _describe_for_hub(card: Card) -> str:
    is_classifier = card.source is not None and bool(card.source.preprocess)
    tags = ["squeeze-and-excitation", "channel-attention", *([card.source.library] if card.source is not None else [])]
    data = ModelCardData(
        license=card.license or card.origin.license or UNKNOWN,
        library_name="se-inject",
        base_model=card.origin.repository or None,
        pipeline_tag="image-classification" if is_classifier else None,
        tags=[tag for tag in tags if tag != "factory"],
    )
    return data.to_yaml()


def _describe(card: Card) -> str:
    source, plan = card.source, card.plan
    begun = ""
    if source is not None and source.library == "factory":
        begun = f", built by `{_quote(source.name)}`,"
    elif source is not None and source.weights in (RANDOM, UNRECORDED):  # older files say the first for both
        begun = f", built as `{_quote(str(source).partition('.')[0] if source.library == 'timm' else str(source))}`,"
    elif source is not None:
        begun = f", built as `{_quote(str(source))}` and begun from the weights `{_quote(source.weights)}`,"
    text = f"`{_quote(plan.model)}`{begun} {_summarise_blocks(card)}"
    if source is None or not source.classes:
        return text
    names = ", ".join(f"`{_quote(name)}`" for name in source.classes[:_MANY])
    more = f", and {len(source.classes) - _MANY:,} more" if len(source.classes) > _MANY else ""
    return f"{text}\n\nIts {len(source.classes):,} classes: {names}{more}."


def _summarise_blocks(card: Card) -> str:
    plan, num_parameters = card.plan, f"{card.num_parameters:,} parameters"
    if plan.is_folded:
        return (
            f"with {num_parameters}. All {plan.num_folded} blocks of channel attention, put in by se-inject "
            f"{__version__}, were folded into its weights, which carry the same gates for every image."
        )
    share = plan.num_parameters / card.num_parameters
    return (
        f"with {len(plan.sites)} blocks of channel attention, put in by se-inject {__version__}: {num_parameters}, "
        f"{plan.num_parameters:,} ({share:.2%}) in the blocks. Each block begins as an exact identity, so that before "
        "any training the network computes what it computed without them, bit for bit."
    )


def _describe_loading(card: Card) -> Iterator[str]:
    source, needs, hint = card.source, "", ""
    if source is None:
        needs, hint = ", base=network", "`network` is the network without blocks, which the file cannot build."
    elif source.library == "factory":
        needs = f", base={source.name.partition(':')[2]}"
        hint = f"The network is built by `{_quote(source.name)}`, which is code and not in the file."
    elif source.needs_trust:
        needs = ", trust_source=True"
        hint = f"The network is built by what `{_quote(source.name)}` holds, which is not in the file."
    yield f"```python\nimport se_inject\n\nmodel = se_inject.load({json.dumps(card.address)}{needs})\n```"
    if hint:
        yield hint
    yield "Nothing in the files is executed." + _describe_command(card)


def _describe_command(card: Card) -> str:
    """Say how the network is named on the command line, which cannot be given one that the file does not name."""
    if card.source is None:
        return ""
    option = " --trust-source" if card.source.needs_trust else ""
    return (
        " On the command line it stands where a MODEL is expected, as in "
        f"`se-inject predict {_quote(card.address)} cat.png{option}`."
    )


def _describe_accuracy(measured: Measured | None) -> Iterator[str]:
    if measured is None:
        yield "Not measured."
        return
    what = "on the validation images" if not measured.num_images else f"on {measured.num_images:,} validation images"
    if not measured.has_labels:
        what = f"agreement with the original network's classes, {what}, which have no labels"
    scores = measured.scores
    yield (
        f"| {what} | top-1 | top-5 |\n|---|---:|---:|\n| before the fine-tune | {measured.before:.2f} % | |\n"
        f"| this network, after epoch {float(scores['epoch']):g} | {float(scores['top1']):.2f} % "
        f"| {float(scores['top5']):.2f} % |"
    )
    if measured.verdict:
        yield (
            "Against the same network without blocks, fine-tuned for as many steps on the same images: "
            f"{measured.verdict}."
        )


def _describe_blocks(plan: Plan) -> Iterator[str]:
    kind = "squeeze-and-excitation" if plan.block == SE else f"`{_quote(plan.block)}`"
    yield (
        f"Blocks: {kind}. Placement: {plan.placement}; branches of a concatenation: {plan.concat}; squeeze: "
        f"{plan.squeeze}; gate: {plan.gate}."
    )
    yield f"All {plan.num_folded} were folded into the weights." if plan.is_folded else _tabulate_blocks(plan)
    if reasons := plan.count_reasons():
        yield "Without a block:\n\n" + "\n".join(
            f"- {num} {_quote(kind)}: {_escape(reason)}" for (kind, reason), num in reasons.items()
        )


def _tabulate_blocks(plan: Plan) -> str:
    rows = ["| block | at | branch | channels | hidden | parameters |", "|---|---|---|---:|---:|---:|"]
    for site in plan.sites:
        cells = (
            f"`{_quote_in_cell(site.path)}`", f"{_quote_in_cell(site.kind)}: `{_quote_in_cell(site.merge)}`",
            f"`{_quote_in_cell(site.describe_branches())}`" if site.branches else "", f"{site.channels}",
            f"{site.hidden or ''}", f"{site.num_parameters:,}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _describe_training(card: Card) -> Iterator[str]:
    if card.measured is None:
        yield "The blocks have not been trained." if card.is_fresh else "How it was trained is not recorded here."
        return
    name = card.measured.recipe_name
    yield f"Fine-tuned with se-inject's recipe `{name}`:" if name else "Fine-tuned with this recipe of se-inject's:"
    yield f"```yaml\n{yaml.safe_dump(card.measured.recipe.to_values(), sort_keys=False).strip()}\n```"


def _describe_license(card: Card) -> str:
    theirs = f"of the weights that it was begun from, timm says `{_quote(card.origin.license)}`"
    if card.license:
        return f"`{card.license}`, says its publisher" + (f"; {theirs}." if card.origin.license else ".")
    if card.origin.license:
        return f"Its publisher did not say; {theirs}."
    return "Unknown: its publisher did not say, and of the weights that it was begun from it is not known."


def _quote(text: str) -> str:
    """Prepare text of anybody's for a span of code."""
    return " ".join(str(text).replace("`", "'").split())


def _quote_in_cell(text: str) -> str:
    """Prepare text of anybody's for a span of code in a table's cell, where alone a bar is taken with a backslash."""
    return _quote(text).replace("|", "\\|")


def _escape(text: str) -> str:
    """Prepare text of anybody's for running text."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(str(text).split()))
