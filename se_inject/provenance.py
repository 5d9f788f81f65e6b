"""Provenance: how a network is built, in plain values that a file can hold.

Takes what a file says, gives a `Source`, or refuses it. `sources` builds networks from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from se_inject.errors import SourceError, make_printable

Library = Literal["timm", "torchvision", "factory"]
RANDOM = "none (random)"
UNRECORDED = "not recorded"
"""Of a network that was recognised by what it is, whose weights may be anybody's."""
REMOTE = ("hf-hub:", "local-dir:")
"""How timm's names begin, of networks that a hub or a folder describes."""
_MAX_NAME = 500
_MAX_SIZE = 1 << 14
"""Of the sides of images, in pixels."""


@dataclass(frozen=True)
class Source:
    """How a network is built, in plain values.

    Attributes:
        library: timm, torchvision or factory.
        name: The library's name for it, or `package.module:factory`.
        options: What the builder is called with.
        weights: Where the weights came from, in words.
        preprocess: How an image becomes an input; see `images`.
        classes: Names of the outputs; empty if they are ImageNet's or not known.
    """

    library: Library
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: str = RANDOM
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"

    @property
    def needs_trust(self) -> bool:
        """Whether building it runs code, or fetches what a hub or folder holds: not done for a file that says so."""
        return self.library == "factory" or self.name.startswith(REMOTE)

    def to_values(self) -> dict[str, Any]:
        """Turn into plain values, for a file; of weights that came from a file, the name, and not its folder."""
        is_file = Path(self.weights).is_absolute()
        weights = Path(self.weights).name if is_file else self.weights
        return {**asdict(self), "weights": weights, "classes": list(self.classes)}

    def names_others(self, classes: Sequence[str]) -> bool:
        """Tell whether the outputs are known to be other classes than these, or the same ones in another order."""
        known, given = (list(map(make_printable, names)) for names in (self.classes, classes))
        return bool(known and given) and known != given

    @classmethod
    def from_values(cls, values: object) -> Source:
        """Read what `to_values` gave.

        Raises:
            SourceError: The values are something else.
        """
        expected = {"library": str, "name": str, "options": dict, "weights": str, "preprocess": dict, "classes": list}
        given = {"classes": [], **values} if isinstance(values, dict) else {}
        is_known = given.keys() == expected.keys() and all(isinstance(given[k], kind) for k, kind in expected.items())
        if not is_known or given["library"] not in get_args(Library) or len(given["name"]) > _MAX_NAME:
            raise SourceError("the file does not say how its network is built")
        if not all(map(_is_setting, given["preprocess"].values())):
            raise SourceError("the file does not say how images become inputs of its network")
        shown = {key: make_printable(given[key]) for key in ("name", "weights")}
        return cls(**{**given, **shown, "classes": tuple(map(make_printable, given["classes"]))})


def _is_setting(value: object) -> bool:
    """Tell whether a value can say how an image becomes an input: a word, or numbers that no image is too large for."""
    if isinstance(value, list):
        return len(value) <= len("NCDHW") and all(type(x) in (int, float) and abs(x) <= _MAX_SIZE for x in value)
    return (
        value is None or isinstance(value, (str, bool)) or (isinstance(value, (int, float)) and abs(value) <= _MAX_SIZE)
    )
