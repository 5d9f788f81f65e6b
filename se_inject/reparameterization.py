"""Re-parameterisation: keep a network's own merging of its branches from leaving out the blocks that stand among them.

Takes an injected network and the path of an owner, and lets the methods that merge branches into one layer refuse, with
what to do. They read the weights of layers, and a block among these would be gone without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from se_inject.errors import ModelError

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
"""What timm's `reparameterize_model` calls."""


@dataclass(frozen=True)
class Refusal:
    """Stands in the place of a method that would leave out a block.

    Attributes:
        method: The method's name.
        owner: The class that has it.
        why: What would happen.
        what: What is to be done after it instead of before.
    """

    method: str
    owner: str
    why: str = "would leave out an injected block"
    what: str = "inject"

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        """Refuse.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"{self.method} of {self.owner} {self.why}; re-parameterise the network first, then {self.what}"
        )


def refuse_merging(model: nn.Module, path: str, *why: str) -> None:
    """Let the modules that hold a block refuse to be merged: its owner, and what stands around that.

    Args:
        model: The network.
        path: The owner's; or of a layer that is not what these methods expect any more.
        why: The last fields of `Refusal`.
    """
    for module in _iterate_around(model, path):
        for name in METHODS:
            if callable(getattr(type(module), name, None)) and not isinstance(vars(module).get(name), Refusal):
                vars(module)[name] = Refusal(name, type(module).__name__, *why)


def allow_merging(module: nn.Module) -> None:
    """Let a module be merged again."""
    for name in METHODS:
        if isinstance(vars(module).get(name), Refusal):
            del vars(module)[name]


def _iterate_around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """Go through an owner and all that it stands in; the whole network merges its parts and not itself."""
    owner = model.get_submodule(path)
    yield owner
    names = path.split(".")[:-1]
    for i in range(len(names)):
        yield model.get_submodule(".".join(names[: i + 1]))
