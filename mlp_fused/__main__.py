"""The command line, `mlp-fused train | predict | tune | transfer | env`, also as `python -m mlp_fused`."""

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

# Exit statuses
USER_ERROR = 2  # a mistake on the command line, as in argparse
FAILED = 1  # an exception, as in Python
INTERRUPTED = 130  # Ctrl-C, as in a shell: 128 + SIGINT


class _Parser(argparse.ArgumentParser):
    """A parser that prints an error in one line, without the usage. Of several processes, only one prints."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if is_first():
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        sys.exit(_end(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)"))


class Command(NamedTuple):
    """A command: its texts in --help, its class of settings, and the function that runs it."""

    summary: str
    description: str
    config: Any
    run: Callable[..., object]


COMMANDS = {
    "train": Command(
        "train a network on handwritten digits, or on your own data",
        "Train a network, validate it after each epoch, and print the time of a training step by phase. Each feature "
        "is scaled in float64: minus its mean, divided by a quarter of its range, over the training rows. The model "
        "in a checkpoint includes the scaling, so its input is the features as they are in the file.",
        train.Config,
        train.train,
    ),
    "predict": Command(
        "predict the rows of a file with a trained network",
        "Predict the rows of a file with a trained network. Write the label and the class probabilities of each row, "
        "or the values of a regression.",
        predict.Config,
        predict.run,
    ),
    "tune": Command(
        "measure which tiles and paths are fastest on this GPU",
        "Measure PyTorch and the Triton kernels on this GPU, for each product of a network, and for narrow networks as "
        "a whole. Write the fastest into a table that later processes read.",
        tune.Config,
        tune.tune,
    ),
    "transfer": Command(
        "measure the time of a network on GPU and CPU: first call, copies, launches, kernels",
        "Measure the parts of a network's time on this GPU, and its time on this CPU: the first call, copies, launches "
        "and kernels. Print the part that bounds a step, the batch size from which the GPU is faster, and advice.",
        transfer.Config,
        transfer.run,
    ),
}


def parser() -> argparse.ArgumentParser:
    """Make the parser. The flags of a command are the fields of its Config."""
    top = _Parser(
        prog="mlp-fused", description="The multi-layer perceptron as fused Triton kernels.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"mlp-fused {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar=" | ".join([*COMMANDS, "env"]))
    commands.add_parser(
        "env", help="print versions, GPU, driver, backend and switches, for a bug report", allow_abbrev=False
    )
    for name, command in COMMANDS.items():
        flags = commands.add_parser(name, help=command.summary, description=command.description, allow_abbrev=False)
        add_flags(flags, command.config)
    return top


def _end(status: int, message: str) -> int:
    """Print the message, in one process only, and return the exit status."""
    if is_first_to_fail():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(0.5)  # torchrun ends all processes once one has ended; wait for the one that prints
    return status


def main(argv: Sequence[str] | None = None, run: Callable[..., object] | None = None) -> int:
    """Run a command and return the exit status: 0, 2 after a user's mistake or out of memory, or 130 after Ctrl-C.

    Args:
        argv: the arguments; by default those of `sys.argv`.
        run: a function (config, report) to call instead of the command's own.
    """
    arguments = vars(parser().parse_args(argv))
    name = arguments.pop("command")
    if name != "train" and not is_first():  # only train uses several processes
        return 0
    if name == "env":
        print(describe())
        return 0

    def report(text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        # Where stdout is ASCII, "R²" must not end a training with an error.
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

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
