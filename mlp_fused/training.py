"""Training a classifier as a first course teaches it: data, loaders, the loop, validation, checkpoints.

`mlp-fused train` is `train(Config(...))` with a command line before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from . import memory, plan
from .environment import distorted
from .module import FusedMLP
from .prefetch import CopyTimer, DevicePrefetcher
from .processes import Part, Processes, join

__all__ = [
    "ArrayDataset",
    "Config",
    "Data",
    "Epoch",
    "Result",
    "Scaling",
    "StepTimer",
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
    "progress",
    "save_checkpoint",
    "split",
    "to_features",
    "to_labels",
    "train",
    "train_epoch",
]

Item = TypeVar("Item")
Batches = Iterable[Sequence[Tensor]]
Build = Callable[[int, int, "Config"], nn.Module]
DtypeName = Literal["fp32", "bf16", "fp16"]
OptimizerName = Literal["adam", "sgd"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATES: dict[str, float] = {"adam": 1e-3, "sgd": 0.05}
MOMENTUM = 0.9  # SGD's
STATE: dict[str, int] = {"adam": 2, "sgd": 1}  # tensors that an optimizer keeps of each parameter
MOST_CLASSES = 2**16  # of data with fewer rows than that; a label beyond is no class but an id, and a network too large


class UserError(Exception):
    """A mistake that the user can mend: one sentence that says what was found and what is needed."""


@dataclass(frozen=True)
class Config:
    """What `mlp-fused train` is told: one field for each of its flags, with the flags' defaults.

    Attributes:
        data: an npz file with arrays x and y; None for scikit-learn's handwritten digits.
        hidden: widths of the hidden layers; none at all make a linear classifier.
        activation: a name from `mlp_fused.ACTIVATIONS`.
        dropout: probability of dropping an activation of a hidden layer.
        backend: what computes the network, "auto", "triton" or "reference".
        optimizer: "adam", or "sgd" with momentum 0.9.
        lr: learning rate; None for `LEARNING_RATES[optimizer]`.
        epochs: passes over the training rows, in all (those before a resumption included).
        batch_size: rows per step, of all processes together.
        dtype: "fp32"; or the 16-bit type of autocast, "bf16" or "fp16" (which scales the loss).
        validation_fraction: the part of the rows that is kept for validation.
        seed: of the split, the initial parameters, the shuffling and dropout.
        device: a torch device; "auto" for a CUDA GPU where there is one, else the CPU. Of several processes on GPUs,
            each has one of its own.
        workers: processes that load batches; None for 2 with a GPU and 0 (in this process) without.
        checkpoint: a file to write after each epoch; None for no file.
        resume: carry on from `checkpoint`.

    Raises:
        UserError: a value that cannot be used.
    """

    data: str | None = None
    hidden: tuple[int, ...] = (512, 512)
    activation: str = "gelu"
    dropout: float = 0.0
    backend: plan.Backend = "auto"
    optimizer: OptimizerName = "adam"
    lr: float | None = None
    epochs: int = 15
    batch_size: int = 64
    dtype: DtypeName = "fp32"
    validation_fraction: float = 0.2
    seed: int = 0
    device: str = "auto"
    workers: int | None = None
    checkpoint: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, choices in (("optimizer", OptimizerName), ("dtype", DtypeName), ("backend", plan.Backend)):
            if getattr(self, name) not in get_args(choices):
                raise UserError(
                    f"--{name} is {getattr(self, name)}; it needs to be one of {_listed(get_args(choices))}"
                )
        checks = (
            ("hidden", all(width >= 1 for width in self.hidden), "widths of 1 or more"),
            ("dropout", 0 <= self.dropout <= 1, "a probability, from 0 to 1"),
            ("lr", self.lr is None or 0 < self.lr < math.inf, "a finite number above 0"),
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1, both excluded"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
            ("workers", self.workers is None or self.workers >= 0, "0 or more"),
        )
        for name, holds, need in checks:
            if not holds:
                raise UserError(f"{_flag(name)} is {_shown(getattr(self, name))}; it needs to be {need}")
        if self.resume and self.checkpoint is None:
            raise UserError("--resume needs --checkpoint FILE, the file to carry on from")

    @property
    def learning_rate(self) -> float:
        """`lr`, or the optimizer's default."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr


# What a resumed run may be told otherwise, since its numbers do not depend on it (or, for the device and the backend,
# only their rounding does). The data may lie elsewhere; they are compared themselves.
MAY_CHANGE = {"data", "epochs", "device", "backend", "workers", "checkpoint", "resume"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    """A value as it would be typed."""
    return " ".join(map(str, value)) or "empty" if isinstance(value, list | tuple) else str(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def first_line(error: BaseException) -> str:
    """An error's text, the first line of it, without a full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .") if lines else type(error).__name__


@dataclass(frozen=True)
class Data:
    """Labelled rows: x (N, features) float32, finite; y (N,) int64 in 0 ... classes - 1."""

    name: str
    x: Tensor
    y: Tensor

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What tells these data from others: their sizes and a digest of every value."""
        digest = hashlib.sha256(self.x.numpy().data)
        digest.update(self.y.numpy().data)
        sizes = {"rows": len(self.x), "features": self.x.shape[1], "classes": self.classes}
        return {**sizes, "sha256": digest.hexdigest()}


def load_data(path: str | None) -> Data:
    """The arrays x and y of an npz file, or scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    Raises:
        UserError: the file or its arrays cannot be used; scikit-learn is not installed.
    """
    if path is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError(
                "the default data are scikit-learn's digits, and scikit-learn is not installed: "
                'pip install "mlp_fused[demo]", or give data of your own with --data FILE.npz'
            ) from None
        digits = load_digits()
        return Data("digits", to_features(digits.images), to_labels(digits.target))

    x, y = _read_npz(path)
    try:
        data = Data(path, to_features(x), to_labels(y))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if len(data.x) != len(data.y):
        raise UserError(f"{path}: x has {len(x)} rows and y has {len(y)} labels; there needs to be one label a row")
    if len(x) < 2:
        raise UserError(f"{path}: there is one row; training and validation need one each at the least")
    return data


def _read_npz(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Arrays x and y, nothing pickled among them."""
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    except Exception:  # numpy answers a file of another kind with errors of every class
        raise UserError(f"{path} is not an npz file; numpy.savez(file, x=..., y=...) writes one") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"{path} holds one array; it needs to be an npz file: numpy.savez(file, x=..., y=...)")
    with file:
        missing = [name for name in ("x", "y") if name not in file.files]
        if missing:
            raise UserError(
                f"{path} has no array {' and no array '.join(missing)}; it has {_listed(file.files)}, "
                "and needs x (a row an example) and y (their labels)"
            )
        try:
            x = file[(name := "x")]
            y = file[(name := "y")]
        except Exception as error:  # a damaged or a pickled member: zipfile's, zlib's and numpy's errors
            raise UserError(f"cannot read array {name} of {path}: {first_line(error)}") from None
        return x, y


def to_features(x: np.ndarray) -> Tensor:
    """x (N, ...) of any real numeric dtype as float32 (N, features).

    Raises:
        UserError: no data; complex numbers, text, objects, dates; NaN or infinity.
    """
    if x.ndim == 0 or x.size == 0:
        raise UserError(
            f"x is of shape {x.shape}, {'a single number' if x.ndim == 0 else 'empty'}; it needs rows of data"
        )
    if x.dtype.kind not in "biuf":
        raise UserError(f"x is of dtype {x.dtype}; it needs to be real numbers (integer, float or bool)")
    with np.errstate(over="ignore", invalid="ignore"):
        rows = torch.from_numpy(np.ascontiguousarray(x.reshape(len(x), -1), dtype=np.float32))
    bad = ~torch.isfinite(rows)
    if bad.any():
        first = int(bad.any(dim=1).nonzero()[0])
        raise UserError(
            f"x has {_count(int(bad.sum()), 'value')} NaN, infinite or beyond float32, the first in row {first} "
            "(counted from 0); mend or leave out those rows"
        )
    return rows


def to_labels(y: np.ndarray) -> Tensor:
    """y (N,) or (N, 1), whole numbers of any real dtype, as int64 (N,).

    Raises:
        UserError: labels that are no numbers, not whole, negative, or too large to be classes.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise UserError(
            f"y is of shape {y.shape}; it needs one label a row (numpy.argmax(y, axis=1) makes them of one-hot rows)"
        )
    if y.dtype.kind not in "biuf":
        raise UserError(
            f"y is of dtype {y.dtype}; labels need to be whole numbers (numpy.unique(y, return_inverse=True)[1])"
        )
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        _refuse_labels(y, ~np.isfinite(y) | (y != np.floor(y)), "that are not whole numbers")
    limit = max(MOST_CLASSES, len(y))
    _refuse_labels(y, (y < 0) | (y >= limit), f"outside 0 ... {limit - 1}")
    return torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64))


def _refuse_labels(y: np.ndarray, bad: np.ndarray, what: str) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise UserError(
            f"y has {_count(int(bad.sum()), 'label')} {what}, the first in row {first} (counted from 0): {y[first]}; "
            "labels need to be 0, 1, ... up to the number of classes less one"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def split(rows: int, validation_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers for training and for validation, at least one each: a shuffle that depends on the seed alone."""
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    kept = min(max(1, round(rows * validation_fraction)), rows - 1)
    return shuffled[kept:], shuffled[:kept]


@dataclass(frozen=True)
class Scaling:
    """(x - mean) / scale, column by column: mean, scale (features,) float64, taken from the training rows alone.

    The scale is a quarter of the column's range, about the standard deviation of a bell-shaped column. The standard
    deviation itself would blow up columns that are nearly always constant, such as the pixels at an image's border:
    with it, 0.6 percentage points fewer of the digits are recognised.
    """

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Scaling:
        """The statistics of x (N, features), N > 0. A constant column is only centred."""
        low, high = x.amin(dim=0).double(), x.amax(dim=0).double()
        return cls(x.mean(dim=0, dtype=torch.float64), torch.where(high > low, (high - low) / 4, 1.0))

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, features) float32, scaled."""
        return x.double().sub_(self.mean).div_(self.scale).float()  # float64 in between: large means cancel


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


def pick_device(name: str, local: int | None = None) -> torch.device:
    """The torch device of that name; for "auto" a CUDA GPU where there is one, else the CPU.

    `local`: this process's number on its machine, where it is one of several, each of which has a GPU of its own.

    Raises:
        UserError: there is none such.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if local is None or name == "cpu":
            return torch.device(name)
    if local is not None and name.startswith("cuda"):
        gpus = torch.cuda.device_count()
        if name != "cuda":
            raise UserError(f"--device {name} is one GPU for several processes; --device cuda gives each its own")
        if local >= gpus > 0:
            raise UserError(
                f"torchrun's --nproc-per-node starts more processes than this machine has GPUs, {gpus}; each needs one "
                "of its own (or --device cpu)"
            )
        name = f"cuda:{local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # AssertionError, RuntimeError, ImportError: it depends on the kind of device
        why = first_line(error).partition(". ")[0]  # torch goes on with all that it could run on
        raise UserError(f"--device {name} cannot be used here: {why}; cpu always can") from None
    return device


def _check_dtype(name: DtypeName, device: torch.device) -> None:
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 needs a GPU; on the CPU there are fp32 and bf16")
    if name == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError(f"--dtype bf16 is beyond {torch.cuda.get_device_name()}; it has fp32 and fp16")


def _autocast(name: DtypeName, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[name], enabled=name != "fp32")


def build_model(features: int, classes: int, config: Config) -> nn.Module:
    """The network: x (M, features) -> logits (M, classes).

    Raises:
        UserError: an unknown activation; a network that memory does not hold.
    """
    try:
        model = FusedMLP(
            features,
            [*config.hidden, classes],
            activation_layer=config.activation,
            dropout=config.dropout,
            backend=config.backend,
        )
    except (TypeError, ValueError) as error:
        raise UserError(str(error).replace("activation_layer is", "--activation is")) from None
    except RuntimeError as error:
        raise UserError(f"--hidden {_shown(config.hidden)} makes no network here: {first_line(error)}") from None
    del model[-1]  # the Dropout that torchvision's order puts after the last Linear: dropped logits would be zeros
    return model


def build_torch_model(features: int, classes: int, config: Config) -> nn.Module:
    """`build_model`'s modules in a plain nn.Sequential: the same initial parameters, computed by torch."""
    model = build_model(features, classes, config)
    return nn.Sequential(*model.children())


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum; one fused kernel a step on a GPU."""
    fused = device.type == "cuda"
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=fused)
    return torch.optim.SGD(model.parameters(), lr=config.learning_rate, momentum=MOMENTUM, fused=fused)


def _path_taken(model: nn.Module, rows: int, config: Config, device: torch.device) -> str:
    """Which path the network takes for a batch of that many rows, and why.

    Raises:
        UserError: the Triton kernels were asked for and cannot run.
    """
    if not isinstance(model, FusedMLP):
        return "torch's own modules"
    with _autocast(config.dtype, device):
        taken = model.explain(rows)
    wanted = plan.DEFAULT_BACKEND if config.backend == "auto" else config.backend
    if wanted == "triton" and taken.path == "reference":
        raise UserError(f"the backend is triton, but {taken.reason}")
    return f"the {taken.path} path ({taken.reason})"


class StepTimer:
    """Where the time of training steps goes: milliseconds by phase.

    Each `mark(phase)` ends a phase that began at the mark before it, or at `start()`. On the CPU marks are read off the
    host's clock. On a GPU they are events in its stream, which the host does not wait for: they are read once an epoch,
    by `read()`. "loading" is then the time in which the device stood waiting for its next batch, "copy" that in which
    it waited for the copy of one that was loaded, as `copies` has timed it: what hides behind its work costs nothing.
    """

    PHASES = ("loading", "copy", "forward", "backward", "optimizer")
    MOST_PENDING = 10_000  # marks; beyond, they are read in mid-epoch: one wait in 2000 steps

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: list[tuple[str, Any]] = []
        self.copies = None if device.type == "cpu" else CopyTimer()
        self.reset()

    def reset(self) -> None:
        """Forget what was timed."""
        self.steps = 0
        self._pending.clear()
        self._milliseconds = dict.fromkeys(self.PHASES, 0.0)
        if self.copies is not None:
            self.copies.reset()

    def start(self) -> None:
        """The next phase begins now."""
        self.read()
        self._pending = [("start", self._now())]

    def mark(self, phase: str) -> None:
        """The phase ends now, and the next one begins. "optimizer" is a step's last."""
        self._pending.append((phase, self._now()))
        self.steps += phase == self.PHASES[-1]
        if len(self._pending) >= self.MOST_PENDING:
            self.read()

    def read(self) -> None:
        """Add up the phases marked so far, waiting for the device to reach the last mark."""
        if self._device.type != "cpu" and self._pending:
            self._pending[-1][1].synchronize()
        for (_, begin), (phase, end) in zip(self._pending, self._pending[1:]):
            self._milliseconds[phase] += (end - begin) * 1e3 if self._device.type == "cpu" else begin.elapsed_time(end)
        del self._pending[:-1]
        if self.copies is not None:
            self.copies.read()

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self._device).Event(enable_timing=True)
        event.record()
        return event

    @property
    def milliseconds(self) -> dict[str, float]:
        """Mean milliseconds per step, by phase."""
        return {phase: total / max(1, self.steps) for phase, total in self._totals.items()}

    @property
    def percent(self) -> dict[str, float]:
        """Each phase's part of the sum of all."""
        whole = sum(self._totals.values())
        return {phase: 100 * total / whole if whole else 0.0 for phase, total in self._totals.items()}

    @property
    def _totals(self) -> dict[str, float]:
        """Milliseconds by phase; the wait for a copy, which is within the loading that was marked, apart."""
        totals = dict(self._milliseconds)
        if self.copies is not None:
            waited = min(totals["loading"], self.copies.waited_ms * self.copies.batches)
            totals["loading"] -= waited
            totals["copy"] += waited
        return totals

    def __str__(self) -> str:
        rows = [(phase, self.milliseconds[phase], self.percent[phase]) for phase in self.PHASES]
        rows.append(("sum", sum(self.milliseconds.values()), sum(self.percent.values())))
        lines = [f"{'':<10}{'ms/step':>10}{'percent':>9}"]
        lines += [f"{phase:<10}{milliseconds:>10.3f}{percent:>9.1f}" for phase, milliseconds, percent in rows]
        if self.copies is not None and self.copies.batches:
            lines.append(
                f"a batch's copy takes {self.copies.copy_ms:.3f} ms on a stream of its own: "
                f"{self.copies.hidden:.0%} of it were hidden"
            )
        return "\n".join(lines)


# What a checkpoint holds, and in which types.
CHECKPOINT: dict[str, type] = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "epoch": int,
    "random": dict,
    "config": dict,
    "data": dict,
    "mean": Tensor,
    "scale": Tensor,
    "history": list,
}


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write the file whole or not at all: whatever happens meanwhile, `path` holds the old checkpoint or the new one.

    Raises:
        UserError: it cannot be written; the old one is still there.
    """
    path = Path(path).resolve()  # a link stays one
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())  # the bytes before the name: a crash must not leave an empty file under it
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write the checkpoint {path}: {first_line(error)}; what was there before is as it was"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name in the same folder, so that replacing is one step of the file system."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _check_writable(path: Path) -> None:
    """Before hours of training rather than after.

    Raises:
        UserError: no checkpoint could be written there, or what it would replace is no checkpoint.
    """
    path = path.resolve()
    if path.is_dir():
        raise UserError(f"--checkpoint {path} is a folder; it needs to be a file")
    try:
        with open(_temporary(path), "wb"):
            pass
        _temporary(path).unlink()
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}, the folder of --checkpoint: {error.strerror}") from None
    if path.exists():
        try:
            load_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}, so it will not be overwritten") from None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU; nothing in the file is executed.

    Its "model" is a state_dict; "mean" and "scale" are the `Scaling` of the features that the model was trained with.

    Raises:
        UserError: there is no such file, or it is not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a file of another kind: pickle's, zipfile's and torch's own errors
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from None
    if not isinstance(checkpoint, dict) or any(
        not isinstance(checkpoint.get(name), kind) for name, kind in CHECKPOINT.items()
    ):
        raise UserError(f"{path} is not a checkpoint of mlp-fused train")
    return checkpoint


def _check_same_run(checkpoint: dict[str, Any], config: Config, data: Data) -> None:
    """Refuse to carry on with other data, another network, or another course of training."""
    told = _settings(config)
    needed = checkpoint["config"]
    differences = [
        f"{_flag(name)} is {_shown(value)}, it needs {_shown(needed.get(name))}"
        for name, value in told.items()
        if name not in MAY_CHANGE and value != needed.get(name)
    ]
    now, then = data.description, checkpoint["data"]
    if now != then:
        differences.append(
            f"--data has {_sizes(now)}, it needs {_sizes(then)}"
            + (" of other values" if {**now, "sha256": None} == {**then, "sha256": None} else "")
        )
    if differences:
        raise UserError(f"{config.checkpoint} is the checkpoint of another run: {'; '.join(differences)}")


def _sizes(description: Mapping[str, Any]) -> str:
    return ", ".join(f"{description[name]} {name}" for name in ("rows", "features", "classes"))


def _settings(config: Config) -> dict[str, Any]:
    """The configuration in types that weights_only reads, the learning rate filled in."""
    return {**dataclasses.asdict(config), "hidden": list(config.hidden), "lr": config.learning_rate}


@dataclass(frozen=True)
class Epoch:
    """One pass: mean loss while training, then loss and accuracy (0 to 1) on the validation rows."""

    loss: float
    validation_loss: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What training gives.

    Attributes:
        model: the trained network, in eval mode.
        scaling: what x goes through before the model.
        history: every epoch, those before a resumption included.
        losses: the loss of each step that this call ran, in order.
        timer: where the steps' time went.
    """

    model: nn.Module
    scaling: Scaling
    history: list[Epoch]
    losses: list[float] = field(repr=False)
    timer: StepTimer = field(repr=False)

    @property
    def accuracy(self) -> float:
        """On the validation rows, after the last epoch; 0 to 1."""
        return self.history[-1].accuracy


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
        with _autocast(dtype, device):
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
    model: nn.Module, batches: Batches, loss_function: nn.Module, processes: Processes, dtype: DtypeName
) -> tuple[float, float]:
    """Mean loss, and accuracy from 0 to 1, over batches of x (M, features), y (M,), those of all processes.

    eval() turns dropout off; inference_mode keeps nothing for a backward pass. Neither does the other's work.
    """
    model.eval()
    device = processes.device
    rows = 0
    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with torch.inference_mode(), _autocast(dtype, device):
        for x, y in DevicePrefetcher(batches, device):
            logits = model(x).float()
            loss += loss_function(logits, y) * len(y)
            correct += (logits.argmax(dim=1) == y).sum()
            rows += len(y)
    loss_of_all, correct_of_all, rows_of_all = processes.sum([loss.item(), correct.item(), rows])
    return loss_of_all / rows_of_all, correct_of_all / rows_of_all


def train(config: Config, *, build: Build = build_model, report: Callable[[str], None] = print) -> Result:
    """Train a classifier as configured; under torchrun, together with the other processes, each on a part of the data.

    Every process reads the data, and the checkpoint that it carries on from; the first alone reports, and writes. None
    is to be used further after an exception in one of them.

    Args:
        config: what to do.
        build: (features, classes, config) -> the network, initialised on the CPU.
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
    _check_dtype(config.dtype, device)
    if config.batch_size % processes.count:
        raise UserError(
            f"--batch-size is {config.batch_size}, for all {processes.count} processes together; "
            f"it needs to be a multiple of {processes.count}"
        )
    path = None if config.checkpoint is None else Path(config.checkpoint)
    resumed = load_checkpoint(path) if path and config.resume else None
    if path and is_first:
        _check_writable(path)
    data = load_data(config.data)
    if resumed:
        _check_same_run(resumed, config, data)

    training, validation = split(len(data.x), config.validation_fraction, config.seed)
    validated = validation[processes.rank :: processes.count]
    scaling = Scaling(resumed["mean"], resumed["scale"]) if resumed else Scaling.fit(data.x[training])
    order = torch.Generator().manual_seed(config.seed)
    training_set = ArrayDataset(scaling(data.x[training]), data.y[training])
    validation_set = ArrayDataset(scaling(data.x[validated]), data.y[validated])
    training_batches = make_loader(training_set, config, processes, order)
    validation_batches = make_loader(validation_set, config, processes)

    torch.manual_seed(config.seed)
    model = build(data.x.shape[1], data.classes, config).to(device)
    if not is_first:
        torch.manual_seed(config.seed + processes.rank)  # Dropout drops otherwise in every process
    loss_function = nn.CrossEntropyLoss()
    optimizer = make_optimizer(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "fp16")
    state = _State(model, optimizer, scaler, order, processes)
    timer = StepTimer(device)
    rows = -(-min(config.batch_size, len(training)) // processes.count)
    path_taken = _path_taken(model, rows, config, device)

    report(
        f"{data.name}: {data.x.shape[1]} features, {data.classes} classes, "
        f"{len(training)} rows to train on, {len(validation)} to validate"
    )
    report(str(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    together = f", in each of {processes.count} processes" if processes.count > 1 else ""
    report(f"{parameters:,} parameters on {device}{together}, {path_taken}")
    if resumed:
        state.restore(resumed, path)
        report(f"carrying on from {path}, after epoch {len(state.history)}")
    elif path and path.exists():
        report(f"{path} will be replaced after the first epoch; --resume would carry on from it")

    parallel = processes.parallel(model)
    part = training_batches.batch_sampler
    assert isinstance(part, Part)
    losses: list[float] = []
    first = len(state.history) + 1
    saved = first - 1
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        try:
            for epoch in range(first, config.epochs + 1):
                if epoch == first + 1:
                    timer.reset()  # the first epoch compiled kernels, started workers, filled caches
                began = time.perf_counter()
                batches: Batches = training_batches
                if is_first:
                    batches = progress(training_batches, f"epoch {epoch}/{config.epochs}")
                mine = train_epoch(
                    parallel, batches, loss_function, optimizer, scaler, device, config.dtype, timer, part.weights
                )
                steps = [total / processes.count for total in processes.sum(mine)]
                processes.take_over(model.buffers())
                loss, accuracy = evaluate(model, validation_batches, loss_function, processes, config.dtype)
                if not math.isfinite(loss):
                    raise UserError(
                        f"training diverged in epoch {epoch}: the validation loss is {loss}; "
                        f"a learning rate below --lr {config.learning_rate} may help"
                    )
                losses += steps
                state.history.append(Epoch(sum(steps) / len(steps), loss, accuracy))
                if path:
                    checkpoint = state.checkpoint()
                    if is_first:
                        settings = {"config": _settings(config), "data": data.description}
                        save_checkpoint(path, {**settings, **dataclasses.asdict(scaling), **checkpoint})
                    processes.wait()
                    saved = epoch
                report(
                    f"epoch {epoch:>{len(str(config.epochs))}}/{config.epochs}  loss {state.history[-1].loss:.4f}  "
                    f"validation loss {loss:.4f}  accuracy {accuracy:.4f}  {time.perf_counter() - began:.1f} s"
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_where_stopped(path, saved)) from None
        except torch.OutOfMemoryError as error:
            if isinstance(model, FusedMLP):
                with _autocast(config.dtype, device):
                    memory.explain(error, model, rows, STATE[config.optimizer], _mends(config, saved > 0))
            memory.add(error, _where_stopped(path, saved))
            raise

    if timer.steps:
        about = "the first epoch, which warms up, left out" if config.epochs > first else "warming up included"
        report(f"\nwhere a step's time went (mean of {_count(timer.steps, 'step')}, {about}):\n{timer}\n")
        if marked := about_times(device):
            report(marked)
    else:
        report(f"nothing left to train: {path} has {_count(saved, 'epoch')} behind it, --epochs is {config.epochs}")
    report(f"validation accuracy: {state.history[-1].accuracy:.4f}")
    if path:
        report(f"checkpoint: {path}")
    model.eval()
    return Result(model, scaling, state.history, losses, timer)


def progress(items: Iterable[Item], description: str) -> Iterable[Item]:
    """The items, with a progress bar where there is a terminal to draw it on, and tqdm to draw it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False, disable=None)  # None: where stderr is no terminal


def about_times(device: torch.device) -> str | None:
    """What to say of times that were taken under a switch that distorts them."""
    reason = distorted(device.type)
    return reason and f"these times mean little: {reason}\n"


def _mends(config: Config, saved: bool) -> list[str]:
    """What takes less memory, by flags."""
    anew = " (begins anew)" if saved else ""
    mends = [f"a smaller --batch-size{anew}", "more GPUs, each a part of a batch (torchrun)"]
    return mends + [f"--dtype bf16{anew}"] * (config.dtype == "fp32")


def _where_stopped(path: Path | None, saved: int) -> str:
    if path is None:
        return "stopped; no checkpoint was asked for (--checkpoint FILE)"
    if not saved:
        return f"stopped before the end of the first epoch; nothing was written to {path}"
    return f"stopped; {path} is the last checkpoint, after epoch {saved}: the same command with --resume carries on"


@dataclass
class _State:
    """All that the next epoch depends on, data and configuration apart. The loop draws no other random numbers."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: torch.Generator
    processes: Processes
    history: list[Epoch] = field(default_factory=list)

    def checkpoint(self) -> dict[str, Any]:
        device = self.processes.device
        random = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": len(self.history),
            "random": {"order": self.order.get_state(), "processes": self.processes.gather(random)},
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        }

    def restore(self, checkpoint: dict[str, Any], path: Path | None) -> None:
        """Put everything back as `checkpoint()` found it; a process that was not there then keeps the seed it has.

        Raises:
            UserError: the checkpoint is of another network, or damaged.
        """
        device = self.processes.device
        on_gpu = device.type == "cuda"
        try:
            self.model.load_state_dict(checkpoint["model"])
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = on_gpu  # the device may be another one now
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            for random in checkpoint["random"]["processes"][self.processes.rank :][:1]:
                torch.set_rng_state(random["torch"])
                if on_gpu and random["cuda"] is not None:
                    torch.cuda.set_rng_state(random["cuda"], device)
            self.order.set_state(checkpoint["random"]["order"])
            self.history = [Epoch(**epoch) for epoch in checkpoint["history"]]
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} does not fit this network: {first_line(error)}") from None
