"""The command line: `se-inject MODEL --out model.pt`, and the other verbs.

Each command takes its options, calls the stages and prints. Expected failures become one line on stderr and exit code
1.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from se_inject import __version__, console
from se_inject.commands_deployment import run_bench, run_export
from se_inject.commands_gates import run_eject, run_search, run_simplify
from se_inject.commands_report import run_report
from se_inject.commands_surgery import run_inject, run_plan
from se_inject.commands_training import run_evaluate, run_finetune, run_predict
from se_inject.errors import SEInjectError

DEFAULT_VERB = "inject"
_ROOT_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")


class _DefaultGroup(TyperGroup):
    """A group of commands for which `se-inject MODEL ...` is short for `se-inject inject MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in _ROOT_OPTIONS:
            args = [DEFAULT_VERB, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_DefaultGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def show_version(*, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> None:
    """Retrofit squeeze-and-excitation blocks into trained CNNs. `se-inject MODEL` is short for `inject MODEL`."""
    if version:
        console.stdout.out(f"se-inject {__version__}")
        raise typer.Exit


def run_demo(
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write the network.")] = Path("model.pt"),
) -> None:
    """Inject into a real ImageNet network that needs no download, and show that nothing changes."""
    from se_inject.demo import run

    run(out)


for _name, _command in {
    "inject": run_inject,
    "plan": run_plan,
    "search": run_search,
    "finetune": run_finetune,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "report": run_report,
    "simplify": run_simplify,
    "eject": run_eject,
    "export": run_export,
    "bench": run_bench,
    "demo": run_demo,
}.items():
    app.command(_name)(_command)


def main() -> None:
    """Run the command line; expected failures end with one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of classes in any letters
    try:
        app()
    except SEInjectError as error:
        _fail(" ".join(str(error).split()))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"the output cannot be written: {error.strerror}")
        if error.errno == errno.ENAMETOOLONG and error.filename:
            _fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
        raise


def _fail(message: str) -> None:
    console.fail(message)
    sys.exit(1)
