"""The expected failures of se-inject, and how what others raise is put into their messages.

Each message says what was found, what was expected and what to do. Everything derives from `SEInjectError`, so that a
caller (and the command line) catches one type, and from the builtin exception that it is.
"""


class SEInjectError(Exception):
    """The base of every failure that se-inject expects."""


class ModelError(SEInjectError, TypeError):
    """The model is not one that can be changed: wrapped, compiled, scripted, quantised or already injected."""


class ExampleError(SEInjectError, ValueError):
    """The network does not run on the example input, or no example input could be found."""


class OptionError(SEInjectError, ValueError):
    """An option is out of its range, or a pattern matches nothing."""


class EmptyPlanError(SEInjectError, ValueError):
    """The network has no place for a block; the message lists the reasons.

    Attributes:
        passed_over: The merges, each a `PassedOver` with its reason.
    """

    def __init__(self, message: str, passed_over: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.passed_over = passed_over


class PlanError(SEInjectError, ValueError):
    """A plan does not fit the network, or is not a plan."""


class SourceError(SEInjectError, ValueError):
    """A model name, a factory or its weights could not be resolved."""


class ArtifactError(SEInjectError, OSError):
    """A file could not be read or written, or is not what it should be."""


class StandardFormError(SEInjectError, ValueError):
    """The gain of a block cannot be folded into the layer before it."""


class ExportError(SEInjectError, ValueError):
    """A network is not the other one that it should be written as; the message says what differs."""


class TraceError(SEInjectError, RuntimeError):
    """A forward could not be followed; the message is the reason that the plan shows."""


class RecipeError(SEInjectError, ValueError):
    """A recipe has unknown keys or bad values; the message lists all of them."""


class DataError(SEInjectError, ValueError):
    """Images and classes are not what a network can be trained on, or cannot be read."""


class TrainingError(SEInjectError, RuntimeError):
    """A training run cannot go on; the message says where it stopped and what is kept."""


def get_first_line(error: BaseException) -> str:
    """Return the first line of an error's message, as it can be printed, or its type where it has none."""
    return make_printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def make_printable(text: object) -> str:
    """Write a text without what would move a terminal's cursor, or hide what follows: it may come from a file."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
