"""Train a network: data loaders, the training loop, validation, checkpoints.

`mlp-fused train` parses the command line into a `Config` and calls `train`. The other parts have their own modules:
`config` (settings, network), `data`, `tasks` (classification, regression), `state` (everything that a checkpoint
restores), `timer` and `distributed`. `checkpoint` and `scaling` are shared with other commands.
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
from ..scaling import Scaling, column_remarks, join_modules
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
    "each feature is scaled: minus its mean, divided by a quarter of its range, over the training rows; "
    "the model in a checkpoint includes the scaling"
)
STATE: dict[str, int] = {"adam": 2, "sgd": 1}  # tensors of optimizer state for each parameter


class ArrayDataset(Dataset[tuple[Tensor, Tensor]]):
    """Dataset of the pairs (x[i], y[i]), x (N, features), y (N, ...)."""

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
    """Make a DataLoader with batches of `config.batch_size` rows, over all processes.

    With the generator `order`, `dataset` has the rows of all processes. They are shuffled in each epoch, and each
    process loads its part of every batch. Without `order`, `dataset` has the rows of this process only, and they keep
    their order.

    The order of the rows does not depend on the number of workers. A DataLoader draws the seed of its workers from its
    own generator whenever they start, also after a resume. So the shuffling uses another generator, `order`, whose
    state is in the checkpoint.
    """
    on_gpu = processes.device.type == "cuda"
    workers = config.workers if config.workers is not None else 2 * on_gpu
    size = min(config.batch_size, max(1, len(dataset)))  # any batch size from len(dataset) on is one batch of all rows
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
    """Ignore Ctrl-C in a worker process. The terminal sends it to every process; the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Make the optimizer: Adam, or SGD with momentum. On a GPU it is PyTorch's fused implementation."""
    fused = device.type == "cuda"
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=fused)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=MOMENTUM, fused=fused)


def _path_taken(model: nn.Module, rows: int, config: Config, device: torch.device) -> str:
    """Describe the path of the network for a batch of `rows` rows, with the reason.

    Raises:
        UserError: the backend is "triton", but the Triton kernels cannot run.
    """
    if not isinstance(model, FusedMLP):
        return "plain PyTorch modules"
    with autocast(config.dtype, device):
        explanation = model.explain(rows)
    backend = settings.DEFAULT_BACKEND if config.backend == "auto" else config.backend
    if backend == "triton" and explanation.path == "reference":
        raise UserError(f"the backend is triton, but {explanation.reason}")
    return f"the {explanation.path} path ({explanation.reason})"


@dataclass(frozen=True)
class Result:
    """The result of `train`.

    Attributes:
        model: the trained model in eval mode, Sequential(scaling, network), or for a regression Sequential(scaling,
            network, unscaling). Its input is the features as they are in the file.
        history: losses and metrics of every epoch, including those before a resume.
        losses: the training loss of each step of this call, in order.
        timer: the time of the steps, by phase.
    """

    model: nn.Sequential
    history: list[Epoch]
    losses: list[float] = field(repr=False)
    timer: StepTimer = field(repr=False)

    @property
    def network(self) -> nn.Module:
        """The network in the model, without the scaling."""
        return self.model.get_submodule("network")

    @property
    def scaling(self) -> Scaling:
        """The scaling of the features, which is the first module of the model."""
        scaling = self.model.get_submodule("scaling")
        assert isinstance(scaling, Scaling)
        return scaling

    @property
    def accuracy(self) -> float | None:
        """The validation accuracy after the last epoch, from 0 to 1. None for a regression."""
        return self.history[-1].accuracy

    @property
    def r2(self) -> float | None:
        """The validation R² after the last epoch. None for a classification."""
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
    """Run one training step for each batch: x (M, features) and y (M,), or (M, k) for a regression.

    Returns the loss of each step times its weight. Losses stay on the device until the end of the epoch, because
    reading one would synchronize with the device.
    """
    model.train()
    losses = []
    timer.start()
    for (x, y), weight in zip(DevicePrefetcher(batches, device, timer=timer.copies), weights):
        timer.mark("loading")
        with autocast(dtype, device):
            loss = loss_function(model(x).float(), y)  # the loss is computed in fp32 under autocast, too
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
    """Return the mean loss and the mean metrics over all rows, (loss, metric, ...). Rows of all processes count.

    A batch is x (M, features), y (M, ...). `measure(outputs, y)` returns the metrics (measures,), summed over the rows
    of a batch. By default it counts the correct rows, and the mean is the accuracy, from 0 to 1.

    Both eval() and inference_mode() are needed: eval() disables dropout, inference_mode() saves nothing for backward.
    """
    model.eval()
    device = processes.device
    rows = 0
    loss = torch.zeros((), device=device)
    metrics = [torch.zeros(measures, device=device)]
    with torch.inference_mode(), autocast(dtype, device):
        for x, y in DevicePrefetcher(batches, device):
            outputs = model(x).float()
            loss += loss_function(outputs, y) * len(y)
            metrics.append(measure(outputs, y))
            rows += len(y)
    *sums, all_rows = processes.sum([loss.item(), *torch.stack(metrics).cpu().double().sum(dim=0).tolist(), rows])
    return tuple(total / all_rows for total in sums)


def train(config: Config, *, build: Build = build_model, report: Callable[[str], None] = print) -> Result:
    """Train a network. Under torchrun, all processes train it together, each on a part of every batch.

    Every process reads the data and the checkpoint to resume from. Only rank 0 reports and writes checkpoints. If one
    process raises an exception, the caller has to end the others, as torchrun does.

    Args:
        config: the settings.
        build: a function (features, outputs, config) -> network, initialized on the CPU.
        report: called with each line of progress.

    Raises:
        UserError: a mistake that the user can fix. An existing checkpoint is then unchanged.
        KeyboardInterrupt: Ctrl-C was pressed. The message names the last checkpoint.
        torch.OutOfMemoryError: the GPU memory is full. The message names the last checkpoint and ways to use less
            memory.
    """
    with join(functools.partial(pick_device, config.device)) as processes:
        return _train(config, processes, build, report if processes.rank == 0 else _report_nothing)


def _report_nothing(text: str) -> None:
    """Ignore a line of progress, in all processes except rank 0."""


def _train(config: Config, processes: Processes, build: Build, report: Callable[[str], None]) -> Result:
    device, is_first = processes.device, processes.rank == 0
    check_dtype(config.dtype, device)
    if config.batch_size % processes.count:
        raise UserError(
            f"--batch-size is {config.batch_size}; it needs to be a multiple of {processes.count}, the number of "
            "processes, which share each batch"
        )
    path = None if config.checkpoint is None else Path(config.checkpoint)
    data, resumed = _read(path, config, is_first)
    training, validation = data.split(config.validation_fraction, config.seed)
    # index_select here and below, because x[rows] fails for uint64 in torch 2.9
    scaling = make_scaling(path, resumed) if path and resumed else Scaling.fit(data.x.index_select(0, training))
    task = make_task(data, training, validation)
    own_part = validation[processes.rank :: processes.count]
    training_set, validation_set = (
        ArrayDataset(scaling.in_parts(data.x.index_select(0, part)), task.targets[part])
        for part in (training, own_part)
    )
    order = torch.Generator().manual_seed(config.seed)
    training_batches = make_loader(training_set, config, processes, order)
    validation_batches = make_loader(validation_set, config, processes)

    torch.manual_seed(config.seed)
    model = join_modules(scaling, build(data.x.shape[1], data.outputs, config), task.unscaling).to(device)
    network = model.get_submodule("network")
    if not is_first:
        torch.manual_seed(config.seed + processes.rank)  # so that Dropout draws other masks in every process
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
        report(f"resuming from {path}, after epoch {len(state.history)}")
    elif path and path.exists():
        report(f"{path} will be replaced after the first epoch; use --resume to continue from it")

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
                    timer.reset()  # leave out the first epoch: it compiles kernels, starts workers and fills caches
                began = time.perf_counter()
                batches: Batches = training_batches
                if is_first:
                    batches = progress(training_batches, f"epoch {epoch}/{config.epochs}")
                own_losses = train_epoch(
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
                step_losses = [total / processes.count for total in processes.sum(own_losses)]
                processes.broadcast(network.buffers())
                validation_loss, *metrics = evaluate(
                    network,
                    interrupt.checked(validation_batches),
                    task.loss_function,
                    processes,
                    config.dtype,
                    task.measure,
                    task.measures,
                )
                if not math.isfinite(validation_loss):
                    raise UserError(
                        f"training diverged in epoch {epoch}: the validation loss is {validation_loss}; "
                        f"try a smaller learning rate than --lr {config.learning_rate}"
                    )
                losses += step_losses
                result = task.epoch(sum(step_losses) / len(step_losses), validation_loss, metrics)
                state.history.append(result)
                if path:
                    checkpoint = state.checkpoint()
                    if is_first:
                        header = {"format": FORMAT, "rounded": scaling.rounding is not None, "data": data.description}
                        save_checkpoint(path, {**header, "config": run_settings(config), **checkpoint})
                    processes.wait()
                    saved = epoch
                report(
                    f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs}  loss {result.loss:.4f}  "
                    f"validation loss {validation_loss:.4f}  {task.describe(result)}  "
                    f"{time.perf_counter() - began:.1f} s"
                )
                interrupt.check()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_where_stopped(path, saved)) from None
        except torch.OutOfMemoryError as error:
            if isinstance(network, FusedMLP):
                with autocast(config.dtype, device):
                    memory.explain(error, network, rows, STATE[config.optimizer], _memory_hints(config, saved > 0))
            memory.add(error, _where_stopped(path, saved))
            raise
        except Exception:
            if not interrupt.received:
                raise
            # After Ctrl-C, the error only means that another process has already ended.
            raise KeyboardInterrupt(_where_stopped(path, saved)) from None

    if timer.steps:
        report(_describe_steps(timer, warm=config.epochs > first))
        if remark := about_times(device):
            report(remark)
    else:
        report(f"nothing left to train: {path} has {count(saved, 'epoch')}, and --epochs is {config.epochs}")
    report(task.summary(state.history[-1]))
    if path:
        report(f"checkpoint: {path}")
    return Result(model.eval(), state.history, losses, timer)


def _read(path: Path | None, config: Config, is_first: bool) -> tuple[Data, dict[str, Any] | None]:
    """Load the data and, with --resume, the checkpoint. Check that they belong together."""
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
    """Return lines with the sizes, the scaling, and anything that looks wrong."""
    classes = f"{data.outputs} class{'es' * (data.outputs != 1)}"
    outputs = classes if data.shape is None else count(data.outputs, "target")
    source = " (from the file)" if data.validation_rows else ""
    sizes = (
        f"{data.name}: {count(data.x.shape[1], 'feature')}, {outputs}, {count(len(training), 'training row')}, "
        f"{count(len(validation), 'validation row')}{source}"
    )
    return [sizes, *data.remarks(), SCALED, *column_remarks(data.x.index_select(0, training), scaled)]


def _describe_network(network: nn.Module, processes: Processes, path_taken: str) -> str:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    together = f", in each of {processes.count} processes" if processes.count > 1 else ""
    return f"{network}\n{parameters:,} parameters on {processes.device}{together}, {path_taken}"


def _describe_steps(timer: StepTimer, warm: bool) -> str:
    warmup = "without the first epoch, which includes warmup" if warm else "including warmup"
    return f"\ntime of a training step (mean of {count(timer.steps, 'step')}, {warmup}):\n{timer}\n"


def about_times(device: torch.device) -> str | None:
    """Return a warning if a debug switch distorts the times, else None."""
    reason = distorted(device.type)
    return reason and f"these times are distorted: {reason}\n"


def _memory_hints(config: Config, saved: bool) -> list[str]:
    """Flags that reduce the memory. If a checkpoint was saved, say which of them cannot resume from it."""
    restarts = " (restarts the training)" if saved else ""
    hints = [f"a smaller --batch-size{restarts}", "more GPUs, which share each batch (torchrun)"]
    return hints + [f"--dtype bf16{restarts}"] * (config.dtype == "fp32")


def _where_stopped(path: Path | None, saved: int) -> str:
    if path is None:
        return "stopped; no checkpoint was saved (use --checkpoint FILE)"
    if not saved:
        return f"stopped before the end of the first epoch; no checkpoint was written to {path}"
    return f"stopped; {path} is the last checkpoint, after epoch {saved}; add --resume to the same command to continue"
