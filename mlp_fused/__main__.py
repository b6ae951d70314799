"""The command line: `mlp-fused train | predict | tune | transfer | env`; the same as `python -m mlp_fused`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, get_args

import torch

from . import ACTIVATIONS, __version__
from .dtypes import DtypeName
from .engine.settings import Backend
from .environment import describe
from .errors import UserError
from .train import predict
from .train.config import LEARNING_RATES, MOMENTUM, Config, OptimizerName
from .train.data import TaskName
from .train.distributed import is_first, is_first_to_fail
from .train.loop import train
from .transfer import measurement
from .tune import tuner
from .tune.tuner import tune

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


def parser() -> argparse.ArgumentParser:
    """The flags of `mlp-fused train` are the fields of `Config`, which holds their defaults; `tune`'s of its own."""
    top = _Parser(
        prog="mlp-fused", description="The multi-layer perceptron as fused Triton kernels.", allow_abbrev=False
    )
    top.add_argument("--version", action="version", version=f"mlp-fused {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="train | predict | tune | transfer | env")
    commands.add_parser(
        "env", help="print what a bug report needs: versions, GPU, driver, backend, switches", allow_abbrev=False
    )
    command = commands.add_parser(
        "train",
        help="train a network on handwritten digits, or on data of your own",
        description="Train a network, validate it after each epoch, and say where the time of its steps went. Features "
        "are scaled column by column in float64: minus the mean, divided by a quarter of the range, both of the "
        "training rows. The model in a checkpoint does this itself, so it takes features as they are in the file.",
        allow_abbrev=False,
    )

    data = command.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="FILE.npz",
        help="arrays x (N, ...), any numeric dtype, not scaled, and y (N,), whole numbers from 0 or names of classes; "
        "for a regression y (N,) or (N, k), numbers (default: scikit-learn's 1797 handwritten digits)",
    )
    data.add_argument(
        "--task",
        choices=get_args(TaskName),
        help="classification learns the classes y; regression the numbers y, by a squared error, scaled by their "
        "standard deviation in training and back in predictions (default: %(default)s)",
    )
    data.add_argument(
        "--validation-fraction", type=float, metavar="PART", help="rows kept for validation (default: %(default)s)"
    )
    data.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="rows per step, of all processes together under torchrun (default: %(default)s)",
    )
    data.add_argument(
        "--workers", type=int, metavar="N", help="processes that load batches (default: 2 with a GPU, 0 without)"
    )

    network = command.add_argument_group("network")
    hidden = " ".join(map(str, Config.hidden))
    network.add_argument(
        "--hidden", type=int, nargs="*", metavar="WIDTH", help=f"widths of the hidden layers (default: {hidden})"
    )
    network.add_argument(
        "--activation", metavar="NAME", help=f"%(default)s by default; one of: {', '.join(ACTIVATIONS)}"
    )
    network.add_argument("--dropout", type=float, metavar="P", help="after each hidden layer (default: %(default)s)")
    network.add_argument("--backend", choices=get_args(Backend), help="what computes it (default: %(default)s)")

    training = command.add_argument_group("training")
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    training.add_argument("--epochs", type=int, metavar="N", help="passes over the data, in all (default: %(default)s)")
    training.add_argument(
        "--optimizer",
        choices=get_args(OptimizerName),
        help=f"sgd has momentum {MOMENTUM}; fused on a GPU (default: %(default)s)",
    )
    training.add_argument("--lr", type=float, metavar="RATE", help=f"learning rate (default: {rates})")
    training.add_argument(
        "--dtype",
        choices=get_args(DtypeName),
        help="bf16, fp16: mixed precision by autocast; fp16 needs a GPU (default: %(default)s)",
    )
    training.add_argument(
        "--device", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s, a GPU where there is one)"
    )
    training.add_argument(
        "--seed", type=int, metavar="N", help="of split, parameters, shuffling and dropout (default: %(default)s)"
    )

    checkpoint = command.add_argument_group("checkpoint")
    checkpoint.add_argument("--checkpoint", metavar="FILE", help="written after each epoch (default: none is written)")
    checkpoint.add_argument(
        "--resume",
        action="store_true",
        help="carry on from --checkpoint, with the flags that it was begun with; --epochs, --device, --backend and "
        "--workers may differ (default: begin anew)",
    )
    command.set_defaults(**dataclasses.asdict(Config()))
    _add_predict(commands)
    _add_tune(commands)
    _add_transfer(commands)
    return top


def _add_predict(commands: Any) -> None:
    """The flags of `mlp-fused predict` are the fields of `predict.Config`."""
    command = commands.add_parser(
        "predict",
        help="write what a trained network predicts for rows of a file",
        description="Write a trained network's predictions for the rows of a file: each row's label and the classes' "
        "probabilities, or a regression's values.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--checkpoint", metavar="FILE", required=True, help="what mlp-fused train --checkpoint wrote (no default)"
    )
    command.add_argument(
        "--data",
        metavar="FILE.npz",
        required=True,
        help="array x (N, ...) of features as in the training's file, not scaled: the model does that (no default)",
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="FILE.npz with arrays labels, probabilities and classes, for a regression values; or FILE.csv with the "
        "same in columns (no default)",
    )
    command.add_argument(
        "--device", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s, a GPU where there is one)"
    )
    command.set_defaults(device=predict.Config.device)


def _add_tune(commands: Any) -> None:
    """The flags of `mlp-fused tune` are the fields of `tuning.Config`, which holds their defaults."""
    command = commands.add_parser(
        "tune",
        help="measure which tiles and paths are fastest on this GPU",
        description="Measure torch's own kernels and these on this GPU, for each product of a network, and for narrow "
        "networks as a whole; and write what is fastest into a table that every later process reads.",
        allow_abbrev=False,
    )
    what = command.add_argument_group("what is measured")
    what.add_argument(
        "--dims",
        type=int,
        nargs="+",
        action="append",
        metavar="WIDTH",
        help="a network, by its widths from the input to the output, such as 784 512 10; may be given several times "
        "(default: the grid of the benches)",
    )
    batches, dtypes = (" ".join(map(str, values)) for values in (tuner.BATCHES, tuner.DTYPES))
    what.add_argument(
        "--batch", type=int, nargs="+", metavar="N", help=f"rows of a batch, with --dims (default: {batches})"
    )
    what.add_argument(
        "--dtype",
        nargs="+",
        choices=get_args(tuner.DtypeName),
        help=f"what is computed in, with --dims; tf32 is fp32 where torch is allowed tf32 (default: {dtypes})",
    )
    what.add_argument(
        "--activation",
        metavar="NAME",
        help=f"after every hidden layer, with --dims; train --help lists them (default: {tuner.ACTIVATION})",
    )
    command.add_argument(
        "--minutes", type=float, metavar="T", help="how long it may take, about (default: %(default)s)"
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        help="the table to write, or to add to (default: your own, ~/.cache/mlp_fused/<gpu>.json, which is read)",
    )
    command.set_defaults(**{**dataclasses.asdict(tuner.Config()), "dims": None})


def _add_transfer(commands: Any) -> None:
    """The flags of `mlp-fused transfer` are the fields of `transfer.Config`, which holds their defaults."""
    command = commands.add_parser(
        "transfer",
        help="take a network's time apart: first touch, copies, launches, kernels; and the CPU's beside it",
        description="Measure where a network's time goes on this GPU and on this CPU: what only the first call costs, "
        "copies, launches, kernels; which part bounds a step, from which batch size on the GPU wins, and what to do.",
        allow_abbrev=False,
    )
    network = command.add_argument_group("network")
    dims, batch = (" ".join(map(str, values)) for values in (measurement.DIMS, measurement.BATCH))
    network.add_argument(
        "--dims",
        type=int,
        nargs="+",
        metavar="WIDTH",
        help=f"its widths from the input to the output (default: {dims})",
    )
    network.add_argument(
        "--checkpoint", metavar="FILE", help="that of a checkpoint of mlp-fused train instead (default: that of --dims)"
    )
    network.add_argument(
        "--activation",
        metavar="NAME",
        help=f"after every hidden layer of --dims; train --help lists them (default: {measurement.ACTIVATION})",
    )
    what = command.add_argument_group("what is measured")
    what.add_argument(
        "--batch",
        type=int,
        nargs="+",
        metavar="N",
        help=f"batch sizes, rows; the largest is the one that is taken apart (default: {batch})",
    )
    what.add_argument("--dtype", choices=get_args(DtypeName), help="of parameters and inputs (default: %(default)s)")
    what.add_argument(
        "--inference",
        action="store_true",
        help="forward and the output copied back (default: forward and backward)",
    )
    what.add_argument("--device", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s, a GPU where there is one)")
    output = command.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    output.add_argument(
        "--plot",
        metavar="FILE",
        help="draw time against batch size, into FILE.png or FILE.svg; needs matplotlib (default: none is drawn)",
    )
    command.set_defaults(**dataclasses.asdict(measurement.Config()))


def _end(status: int, message: str) -> int:
    """The exit status, the message being printed, by one of several processes."""
    if is_first_to_fail():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(0.5)  # torchrun ends all processes when one has ended, and another one is about to print
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, by default `sys.argv`'s.

    The exit status: 0; 2 after a user's mistake, or out of memory; 130 after Ctrl-C.
    """
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    if command != "train" and not is_first():  # of several processes, one is enough
        return 0
    if command == "env":
        print(describe())
        return 0

    def report(text: str) -> None:
        print(text, flush=True)

    try:
        if command == "tune":
            tune(tuner.Config(**{**arguments, "dims": arguments["dims"] or ()}), report=report)
        elif command == "predict":
            predict.run(predict.Config(**arguments), report=report)
        elif command == "transfer":
            measurement.run(measurement.Config(**arguments), report=report)
        else:
            train(Config(**arguments), report=report)
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
