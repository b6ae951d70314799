"""Training a network as a first course teaches it: data, loaders, the loop, validation, checkpoints.

`mlp-fused train` is `train(Config(...))` with a command line before it. The parts are modules of their own: `config`
(the settings and the network), `data`, `tasks` (classification, regression), `state` (all that a resumption needs),
`timer`, `distributed`; and, shared with other commands, `checkpoint` and `scaling`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from .. import memory
from ..checkpoint import FORMAT, check_checkpoint, load_checkpoint, make_scaling, save_checkpoint
from ..dtypes import DTYPES, DtypeName, autocast, check_dtype, pick_device
from ..engine import settings
from ..environment import distorted
from ..errors import UserError, count, first_line
from ..module import FusedMLP
from ..prefetch import DevicePrefetcher
from ..progress import progress
from ..scaling import Scaling, column_remarks, whole
from .config import (
    LEARNING_RATES,
    MOMENTUM,
    Build,
    Config,
    OptimizerName,
    build_model,
    build_torch_model,
)
from .data import Data, load_data, split, to_features, to_labels
from .distributed import Part, Processes, join
from .interrupt import Interrupt
from .state import State, check_same_data, check_same_run, run_settings
from .tasks import Epoch, correct, make_task
from .timer import StepTimer

__all__ = [
    "DTYPES",
    "LEARNING_RATES",
    "MOMENTUM",
    "ArrayDataset",
    "Config",
    "Data",
    "DtypeName",
    "Epoch",
    "OptimizerName",
    "Result",
    "Scaling",
    "UserError",
    "about_times",
    "build_model",
    "build_torch_model",
    "evaluate",
    "first_line",
    "load_checkpoint",
    "load_data",
    "make_loader",
    "make_optimizer",
    "pick_device",
    "save_checkpoint",
    "split",
    "to_features",
    "to_labels",
    "train",
    "train_epoch",
]

Batches = Iterable[Sequence[Tensor]]

SCALED = (
    "features are scaled column by column: minus the mean, divided by a quarter of the range, both of the training "
    "rows; the model in a checkpoint does this itself"
)
STATE: dict[str, int] = {"adam": 2, "sgd": 1}  # tensors that an optimizer keeps of each parameter


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Row i of x (N, features) with its label y[i], for a DataLoader."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def make_loader(
    dataset: ArrayDataset, config: Config, processes: Processes, order: torch.Generator | None = None
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of `config.batch_size` rows, shuffled anew each epoch by `order`; in the dataset's order without it.

    Shuffled, each process gets its part of the batches that a single one would have; in order, its dataset is its own.

    The order of the rows does not depend on the number of workers. A loader draws its workers' seed from its generator
    whenever they start, which is at each resumption too; so the shuffling has a generator of its own, whose state a
    checkpoint holds.
    """
    on_gpu = processes.device.type == "cuda"
    workers = config.workers if config.workers is not None else 2 * on_gpu
    size = min(config.batch_size, max(1, len(dataset)))  # a batch of all rows may be asked for by any large number
    if order is None:
        part = Part(BatchSampler(SequentialSampler(dataset), -(-size // processes.count), False), 0, 1)
    else:
        batches = BatchSampler(RandomSampler(dataset, generator=order), size, False)
        part = Part(batches, processes.rank, processes.count)
    return DataLoader(
        dataset,
        batch_sampler=part,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
        generator=torch.Generator().manual_seed(config.seed),
    )


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum; one fused kernel a step on a GPU."""
    fused = device.type == "cuda"
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=fused)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=MOMENTUM, fused=fused)


def _path_taken(model: nn.Module, rows: int, config: Config, device: torch.device) -> str:
    """The path that the network takes for a batch of that many rows, and the reason.

    Raises:
        UserError: the Triton kernels were asked for and cannot run.
    """
    if not isinstance(model, FusedMLP):
        return "torch's own modules"
    with autocast(config.dtype, device):
        taken = model.explain(rows)
    wanted = settings.DEFAULT_BACKEND if config.backend == "auto" else config.backend
    if wanted == "triton" and taken.path == "reference":
        raise UserError(f"the backend is triton, but {taken.reason}")
    return f"the {taken.path} path ({taken.reason})"


@dataclass(frozen=True)
class Result:
    """The result of a training.

    Attributes:
        model: the trained model, in eval mode: Sequential(scaling, network), for regression with an unscaling behind.
            It takes features as they are in the file.
        history: every epoch, those before a resumption included.
        losses: the loss of each step that this call ran, in order.
        timer: where the steps' time went.
    """

    model: nn.Sequential
    history: list[Epoch]
    losses: list[float] = field(repr=False)
    timer: StepTimer = field(repr=False)

    @property
    def network(self) -> nn.Module:
        """The model without the scaling."""
        return self.model.get_submodule("network")

    @property
    def scaling(self) -> Scaling:
        """The model's first module."""
        scaling = self.model.get_submodule("scaling")
        assert isinstance(scaling, Scaling)
        return scaling

    @property
    def accuracy(self) -> float | None:
        """On the validation rows, after the last epoch; 0 to 1. None for a regression."""
        return self.history[-1].accuracy

    @property
    def r2(self) -> float | None:
        """R² on the validation rows, after the last epoch. None for a classification."""
        return self.history[-1].r2


def train_epoch(
    model: nn.Module,
    batches: Batches,
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    dtype: DtypeName,
    timer: StepTimer,
    weights: Iterable[float] = itertools.repeat(1.0),
) -> list[float]:
    """One step for each batch of x (M, features), y (M,). Returns the steps' losses, each times its weight.

    Losses stay on the device until the end: reading one would make the host wait for the device at each step.
    """
    model.train()
    losses = []
    timer.start()
    for (x, y), weight in zip(DevicePrefetcher(batches, device, timer=timer.copies), weights):
        timer.mark("loading")
        with autocast(dtype, device):
            loss = loss_function(model(x).float(), y)  # in fp32, whatever the model computes in
            loss = loss if weight == 1 else loss * weight
        timer.mark("forward")
        scaler.scale(loss).backward()
        timer.mark("backward")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        timer.mark("optimizer")
        losses.append(loss.detach())
    timer.read()
    return torch.stack(losses).tolist()


def evaluate(
    model: nn.Module,
    batches: Batches,
    loss_function: nn.Module,
    processes: Processes,
    dtype: DtypeName,
    measure: Callable[[Tensor, Tensor], Tensor] = correct,
    measures: int = 1,
) -> tuple[float, ...]:
    """Mean loss, then the mean of each of the `measures` numbers that `measure(outputs, y)` sums over a batch.

    By default this is the accuracy, from 0 to 1. The means are over the rows of all batches x (M, features),
    y (M, ...), those of all processes.

    eval() turns dropout off; inference_mode keeps nothing for a backward pass. Neither does the other's work.
    """
    model.eval()
    device = processes.device
    rows = 0
    loss = torch.zeros((), device=device)
    measured = [torch.zeros(measures, device=device)]
    with torch.inference_mode(), autocast(dtype, device):
        for x, y in DevicePrefetcher(batches, device):
            outputs = model(x).float()
            loss += loss_function(outputs, y) * len(y)
            measured.append(measure(outputs, y))
            rows += len(y)
    *sums, rows_of_all = processes.sum([loss.item(), *torch.stack(measured).cpu().double().sum(dim=0).tolist(), rows])
    return tuple(total / rows_of_all for total in sums)


def train(config: Config, *, build: Build = build_model, report: Callable[[str], None] = print) -> Result:
    """Train a network as configured; under torchrun, together with the other processes, each on a part of the data.

    Every process reads the data, and the checkpoint that it carries on from; the first alone reports, and writes. None
    is to be used further after an exception in one of them.

    Args:
        config: what to do.
        build: (features, outputs, config) -> the network, initialised on the CPU.
        report: is given what a user wants to read, piece by piece.

    Raises:
        UserError: a mistake that the user can mend; nothing that was there before is lost.
        KeyboardInterrupt: Ctrl-C; its text says where the last checkpoint is.
        torch.OutOfMemoryError: a GPU is full; its text says that too, and what takes less.
    """
    with join(functools.partial(pick_device, config.device)) as processes:
        return _train(config, processes, build, report if processes.rank == 0 else _say_nothing)


def _say_nothing(text: str) -> None:
    """The report of all processes but the first."""


def _train(config: Config, processes: Processes, build: Build, report: Callable[[str], None]) -> Result:
    device, is_first = processes.device, processes.rank == 0
    check_dtype(config.dtype, device)
    if config.batch_size % processes.count:
        raise UserError(
            f"--batch-size is {config.batch_size}, for all {processes.count} processes together; "
            f"it needs to be a multiple of {processes.count}"
        )
    path = None if config.checkpoint is None else Path(config.checkpoint)
    data, resumed = _read(path, config, is_first)
    training, validation = data.split(config.validation_fraction, config.seed)
    # index_select here and below: torch 2.9 does not index uint64 by brackets
    scaling = make_scaling(path, resumed) if path and resumed else Scaling.fit(data.x.index_select(0, training))
    task = make_task(data, training, validation)
    mine = validation[processes.rank :: processes.count]
    training_set, validation_set = (
        ArrayDataset(scaling.in_parts(data.x.index_select(0, rows)), task.targets[rows]) for rows in (training, mine)
    )
    order = torch.Generator().manual_seed(config.seed)
    training_batches = make_loader(training_set, config, processes, order)
    validation_batches = make_loader(validation_set, config, processes)

    torch.manual_seed(config.seed)
    model = whole(scaling, build(data.x.shape[1], data.outputs, config), task.unscaling).to(device)
    network = model.get_submodule("network")
    if not is_first:
        torch.manual_seed(config.seed + processes.rank)  # Dropout drops otherwise in every process
    optimizer = make_optimizer(network, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
    state = State(model, optimizer, scaler, order, processes)
    timer = StepTimer(device)
    rows = -(-min(config.batch_size, len(training)) // processes.count)
    path_taken = _path_taken(network, rows, config, device)

    if is_first:
        for line in _describe_data(data, training, validation, training_set.x):
            report(line)
    report(_describe_network(network, processes, path_taken))
    if resumed:
        state.restore(resumed, path)
        report(f"carrying on from {path}, after epoch {len(state.history)}")
    elif path and path.exists():
        report(f"{path} will be replaced after the first epoch; --resume would carry on from it")

    parallel = processes.parallel(network)
    part = training_batches.batch_sampler
    assert isinstance(part, Part)
    losses: list[float] = []
    first = len(state.history) + 1
    saved = first - 1
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, Interrupt(repeats=processes.count > 1) as interrupt:
        try:
            for epoch in range(first, config.epochs + 1):
                if epoch == first + 1:
                    timer.reset()  # the first epoch compiled kernels, started workers, filled caches
                began = time.perf_counter()
                batches: Batches = training_batches
                if is_first:
                    batches = progress(training_batches, f"epoch {epoch}/{config.epochs}")
                losses_here = train_epoch(
                    parallel,
                    interrupt.checked(batches),
                    task.loss_function,
                    optimizer,
                    scaler,
                    device,
                    config.dtype,
                    timer,
                    part.weights,
                )
                steps = [total / processes.count for total in processes.sum(losses_here)]
                processes.take_over(network.buffers())
                loss, *measured = evaluate(
                    network,
                    interrupt.checked(validation_batches),
                    task.loss_function,
                    processes,
                    config.dtype,
                    task.measure,
                    task.measures,
                )
                if not math.isfinite(loss):
                    raise UserError(
                        f"training diverged in epoch {epoch}: the validation loss is {loss}; "
                        f"a learning rate below --lr {config.learning_rate} may help"
                    )
                losses += steps
                passed = task.epoch(sum(steps) / len(steps), loss, measured)
                state.history.append(passed)
                if path:
                    checkpoint = state.checkpoint()
                    if is_first:
                        what = {"format": FORMAT, "rounded": scaling.rounding is not None, "data": data.description}
                        save_checkpoint(path, {**what, "config": run_settings(config), **checkpoint})
                    processes.wait()
                    saved = epoch
                report(
                    f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs}  loss {passed.loss:.4f}  "
                    f"validation loss {loss:.4f}  {task.describe(passed)}  {time.perf_counter() - began:.1f} s"
                )
                interrupt.check()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_where_stopped(path, saved)) from None
        except torch.OutOfMemoryError as error:
            if isinstance(network, FusedMLP):
                with autocast(config.dtype, device):
                    memory.explain(error, network, rows, STATE[config.optimizer], _mends(config, saved > 0))
            memory.add(error, _where_stopped(path, saved))
            raise
        except Exception:
            if not interrupt.received:
                raise
            # Another process has answered Ctrl-C already, and is gone.
            raise KeyboardInterrupt(_where_stopped(path, saved)) from None

    if timer.steps:
        report(_describe_steps(timer, warm=config.epochs > first))
        if marked := about_times(device):
            report(marked)
    else:
        report(f"nothing left to train: {path} has {count(saved, 'epoch')} behind it, --epochs is {config.epochs}")
    report(task.summary(state.history[-1]))
    if path:
        report(f"checkpoint: {path}")
    return Result(model.eval(), state.history, losses, timer)


def _read(path: Path | None, config: Config, is_first: bool) -> tuple[Data, dict[str, Any] | None]:
    """The data, and the checkpoint of this same run if it is to be carried on."""
    resumed = load_checkpoint(path) if path and config.resume else None
    if resumed:
        check_same_run(resumed, config)
    if path and is_first:
        check_checkpoint(path)
    data = load_data(config.data, config.task)
    if resumed:
        check_same_data(resumed, config, data)
    return data, resumed


def _describe_data(data: Data, training: Tensor, validation: Tensor, scaled: Tensor) -> list[str]:
    """Sizes, anything that looks wrong, and how the features were scaled."""
    classes = f"{data.outputs} class{'es' * (data.outputs != 1)}"
    outputs = classes if data.shape is None else count(data.outputs, "target")
    own = " (the file's own)" if data.validation_rows else ""
    sizes = (
        f"{data.name}: {count(data.x.shape[1], 'feature')}, {outputs}, {count(len(training), 'row')} to train on, "
        f"{len(validation)} to validate{own}"
    )
    return [sizes, *data.remarks(), SCALED, *column_remarks(data.x.index_select(0, training), scaled)]


def _describe_network(network: nn.Module, processes: Processes, path_taken: str) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    together = f", in each of {processes.count} processes" if processes.count > 1 else ""
    return f"{network}\n{parameters:,} parameters on {processes.device}{together}, {path_taken}"


def _describe_steps(timer: StepTimer, warm: bool) -> str:
    about = "the first epoch, which warms up, left out" if warm else "warming up included"
    return f"\nwhere a step's time went (mean of {count(timer.steps, 'step')}, {about}):\n{timer}\n"


def about_times(device: torch.device) -> str | None:
    """The remark on times that were taken under a switch that distorts them."""
    reason = distorted(device.type)
    return reason and f"these times mean little: {reason}\n"


def _mends(config: Config, saved: bool) -> list[str]:
    """Ways to take less memory, by flags."""
    anew = " (begins anew)" if saved else ""
    mends = [f"a smaller --batch-size{anew}", "more GPUs, each a part of a batch (torchrun)"]
    return mends + [f"--dtype bf16{anew}"] * (config.dtype == "fp32")


def _where_stopped(path: Path | None, saved: int) -> str:
    if path is None:
        return "stopped; no checkpoint was asked for (--checkpoint FILE)"
    if not saved:
        return f"stopped before the end of the first epoch; nothing was written to {path}"
    return f"stopped; {path} is the last checkpoint, after epoch {saved}: the same command with --resume carries on"
