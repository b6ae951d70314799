"""The command line: `mlp-fused train | predict | tune | transfer | env`; the same as `python -m mlp_fused`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from . import __version__, train, transfer, tune
from .environment import describe
from .errors import UserError
from .flags import add_flags
from .train import predict
from .train.distributed import is_first, is_first_to_fail

__all__ = ["main"]

USER_ERROR = 2  # argparse's own exit status for a mistake on the command line
FAILED = 1  # Python's own for an exception
INTERRUPTED = 130  # a shell's for Ctrl-C: 128 + SIGINT


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it; of several processes, one alone says anything."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_first():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        sys.exit(_end(USER_ERROR, f"{self.prog}: {message} ({self.prog} --help lists what there is)"))


class Command(NamedTuple):
    """A command: what --help says of it, its settings, and what runs them."""

    summary: str
    description: str
    config: Any
    run: Callable[..., object]


COMMANDS = {
    "train": Command(
        "train a network on handwritten digits, or on data of your own",
        "Train a network, validate it after each epoch, and say where the time of its steps went. Features "
        "are scaled column by column in float64: minus the mean, divided by a quarter of the range, both of the "
        "training rows. The model in a checkpoint does this itself, so it takes features as they are in the file.",
        train.Config,
        train.train,
    ),
    "predict": Command(
        "write what a trained network predicts for rows of a file",
        "Write a trained network's predictions for the rows of a file: each row's label and the classes' "
        "probabilities, or a regression's values.",
        predict.Config,
        predict.run,
    ),
    "tune": Command(
        "measure which tiles and paths are fastest on this GPU",
        "Measure torch's own kernels and these on this GPU, for each product of a network, and for narrow "
        "networks as a whole; and write what is fastest into a table that every later process reads.",
        tune.Config,
        tune.tune,
    ),
    "transfer": Command(
        "take a network's time apart: first touch, copies, launches, kernels; and the CPU's beside it",
        "Measure where a network's time goes on this GPU and on this CPU: what only the first call costs, "
        "copies, launches, kernels; which part bounds a step, from which batch size on the GPU wins, and what to do.",
        transfer.Config,
        transfer.run,
    ),
}


def parser() -> argparse.ArgumentParser:
    """The command line: each command's flags are the fields of its Config."""
    top = _Parser(
        prog="mlp-fused", description="The multi-layer perceptron as fused Triton kernels.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"mlp-fused {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join([*COMMANDS, "env"]))
    commands.add_parser(
        "env", help="print what a bug report needs: versions, GPU, driver, backend, switches", allow_abbrev=False
    )
    for name, command in COMMANDS.items():
        flags = commands.add_parser(name, help=command.summary, description=command.description, allow_abbrev=False)
        add_flags(flags, command.config)
    return top


def _end(status: int, message: str) -> int:
    """The exit status, the message being printed, by one of several processes."""
    if is_first_to_fail():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(0.5)  # torchrun ends all processes when one has ended, and another one is about to print
    return status


def main(argv: Sequence[str] | None = None, run: Callable[..., object] | None = None) -> int:
    """Run a command, by default `sys.argv`'s, by `run` instead of its own function where that is given.

    The exit status: 0; 2 after a user's mistake, or out of memory; 130 after Ctrl-C.
    """
    arguments = vars(parser().parse_args(argv))
    name = arguments.pop("command")
    if name != "train" and not is_first():  # of several processes, one is enough
        return 0
    if name == "env":
        print(describe())
        return 0

    def report(text: str) -> None:
        print(text, flush=True)

    command = COMMANDS[name]
    try:
        (run or command.run)(command.config(**arguments), report=report)
    except (UserError, torch.OutOfMemoryError) as error:
        return _end(USER_ERROR, f"mlp-fused: {error}")
    except KeyboardInterrupt as interrupt:
        return _end(INTERRUPTED, f"mlp-fused: {str(interrupt) or 'stopped'}")
    except Exception:
        if is_first_to_fail():
            raise
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
