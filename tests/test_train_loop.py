"""The training loop: data, split, scaling, loaders, steps, validation, timing, checkpoints and resumption."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from mlp_fused import FusedMLP, checkpoint
from mlp_fused.checkpoint import load_checkpoint, save_checkpoint
from mlp_fused.dtypes import pick_device
from mlp_fused.errors import UserError
from mlp_fused.kernels.launch import count_launches
from mlp_fused.scaling import Scaling
from mlp_fused.train import loop, tasks
from mlp_fused.train.config import Config, build_model, build_torch_model
from mlp_fused.train.data import load_data, split
from mlp_fused.train.distributed import Part, Processes
from mlp_fused.train.loop import ArrayDataset, evaluate, make_loader, make_optimizer, train, train_epoch
from mlp_fused.train.timer import StepTimer

CPU = torch.device("cpu")
ALONE = Processes(CPU)
TINY = Config(hidden=(8,), epochs=3, batch_size=16)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """70 rows of 2 x 3 "pixels" in 3 classes; 56 to train on, so that the last batch of 16 is not full."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 70)
    x = random.normal(size=(70, 2, 3)) + 2 * y[:, None, None]
    path = tmp_path / "data.npz"
    np.savez(path, x=x, y=y)
    return str(path)


def quiet(text: str) -> None:
    """A report that nobody reads."""


def run(config: Config, **changes: Any) -> loop.Result:
    return train(dataclasses.replace(config, **changes), report=quiet)


def assert_same_bits(one: loop.Result, other: loop.Result) -> None:
    assert one.history == other.history
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key


def test_statistics_come_from_the_training_rows_alone(data: str) -> None:
    rows = load_data(data)
    training_rows, _ = split(70, 0.2, 0)
    expected = Scaling.fit(rows.x[training_rows])
    scaling = run(TINY, data=data).scaling
    assert torch.equal(scaling.mean, expected.mean)
    assert torch.equal(scaling.scale, expected.scale)
    assert not torch.equal(scaling.mean, Scaling.fit(rows.x).mean)


RANDOM = np.random.default_rng(0)
ORDER, SECONDS, METRES = RANDOM.permutation(200), RANDOM.uniform(0, 300, 400), RANDOM.uniform(0, 2, (400, 2))
SIDES = RANDOM.integers(0, 2, 400)

# Features, how far they are moved, and their classes.
FAR_FROM_ZERO: dict[str, tuple[np.ndarray, Any, np.ndarray]] = {
    "x + 1.7e9": (RANDOM.normal(size=(400, 2)) + 4 * SIDES[:, None], 1.7e9, SIDES),
    "unix seconds": (SECONDS, 1.7e9, (SECONDS // 75).astype(int)),
    "integer ids": (ORDER, 10**9, ORDER // 50),
    "integer ids beyond float64": (ORDER, 2**60, ORDER // 50),
    "unsigned ids": (ORDER.astype(np.uint64), np.uint64(2**63), ORDER // 50),
    "UTM coordinates": (METRES, np.array([500_000, 5_400_000]), (METRES > 1) @ (1, 2)),
}


@pytest.mark.parametrize(("x", "distance", "y"), FAR_FROM_ZERO.values(), ids=FAR_FROM_ZERO)
def test_features_far_from_zero_are_learned_as_those_near_it(
    tmp_path: Path, x: np.ndarray, distance: Any, y: np.ndarray
) -> None:
    """Centred in float32, as once they were, they gave from 0.2 to 0.9."""
    config = dataclasses.replace(TINY, hidden=(32,), epochs=30, batch_size=32, lr=0.02, data=str(tmp_path / "d.npz"))
    results = []
    for features in (x, x + distance):
        np.savez(tmp_path / "d.npz", x=features, y=y)
        results.append(run(config))
    near, far = results
    assert near.accuracy >= 0.95
    assert far.accuracy == near.accuracy
    assert far.losses == pytest.approx(near.losses, rel=1e-2, abs=1e-3)


def test_lines_about_data_come_before_training(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3))
    x[:, 1], x[0, 2] = 5, 1e20
    np.savez(tmp_path / "d.npz", x=x, y=random.integers(0, 2, 40) * 7)
    lines: list[str] = []
    train(dataclasses.replace(TINY, data=str(tmp_path / "d.npz"), validation_fraction=0.1), report=lines.append)
    fix = "numpy.unique(y, return_inverse=True)[1] numbers the classes that occur, --task regression takes y as numbers"
    assert lines[1:5] == [
        f"6 of 8 classes never occur in y; {fix}",
        loop.SCALED,
        "constant in the training rows: 1 of 3 features (column 1, counted from 0)",
        "stretched by outliers, so that most of their values become equal in float32: 1 of 3 features (column 2, "
        "counted from 0); clip the outliers or take logarithms",
    ]


def test_the_share_of_the_largest_class_stands_beside_the_accuracy(tmp_path: Path) -> None:
    """The accuracy of always answering what is most frequent among the training rows."""
    y = np.where(np.arange(100) % 5 == 0, "rare", "usual")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(100, 2)), y=y)
    lines: list[str] = []
    result = train(dataclasses.replace(TINY, data=str(tmp_path / "d.npz")), report=lines.append)
    share = (y[split(100, 0.2, 0)[1].numpy()] == "usual").mean()
    assert lines[-1] == (
        f"validation accuracy: {result.accuracy:.4f} (class usual, the largest, is {share:.4f} of the validation rows)"
    )


def rows_of(loader: DataLoader[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


def numbered(rows: int = 50) -> ArrayDataset:
    return ArrayDataset(torch.zeros(rows, 1), torch.arange(rows))


def test_order_depends_on_the_seed_and_the_epoch_but_not_on_workers() -> None:
    def epochs(workers: int) -> list[list[int]]:
        config = dataclasses.replace(TINY, workers=workers)
        loader = make_loader(numbered(), config, ALONE, torch.Generator().manual_seed(3))
        return [rows_of(loader) for _ in range(3)]

    alone = epochs(0)
    assert alone == epochs(2)
    assert all(sorted(epoch) == list(range(50)) for epoch in alone)
    assert alone[0] != alone[1] != alone[2]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [48, 50, 51, 5])
def test_the_parts_of_all_processes_are_the_batches_of_one(rows: int, count: int) -> None:
    config = dataclasses.replace(TINY, batch_size=24)

    def epochs(processes: Processes) -> list[list[int]]:
        loader = make_loader(numbered(rows), config, processes, torch.Generator().manual_seed(3))
        return [labels.tolist() for _ in range(2) for _, labels in loader]

    whole = epochs(ALONE)
    parts = [epochs(Processes(CPU, rank, count)) for rank in range(count)]
    samplers = [Part(BatchSampler(range(rows), 24, False), rank, count) for rank in range(count)]
    weights = [sampler.weights * 2 for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(whole) / 2] * count
    for step, batch in enumerate(whole):
        mine = [part[step] for part, weight in zip(parts, weights) if weight[step]]
        assert sorted(label for part in mine for label in part) == sorted(batch)
        assert all(part[step] for part in parts)  # a network gets a row at the least
        mean = sum(weight[step] * np.mean(part[step]) for part, weight in zip(parts, weights)) / count
        assert mean == pytest.approx(np.mean(batch))
        if len(batch) % count == 0:
            assert {weight[step] for weight in weights} == {1.0}


class InterruptsIgnored(ArrayDataset):
    """The label of every row: whether the process that loads it ignores Ctrl-C."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], torch.tensor(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_the_main_process_answers_ctrl_c(workers: int) -> None:
    dataset = InterruptsIgnored(torch.zeros(4, 1), torch.zeros(4))
    assert rows_of(make_loader(dataset, dataclasses.replace(TINY, workers=workers), ALONE)) == [workers] * 4


def test_without_an_order_rows_come_as_they_are() -> None:
    assert rows_of(make_loader(numbered(), TINY, ALONE)) == list(range(50))


def test_a_gpu_has_pinned_memory_and_lasting_workers() -> None:
    on_gpu = make_loader(numbered(), TINY, Processes(torch.device("cuda")))
    assert (on_gpu.pin_memory, on_gpu.num_workers, on_gpu.persistent_workers) == (True, 2, True)
    on_cpu = make_loader(numbered(), TINY, ALONE)
    assert (on_cpu.pin_memory, on_cpu.num_workers, on_cpu.persistent_workers) == (False, 0, False)
    assert (
        make_loader(numbered(), dataclasses.replace(TINY, workers=0), Processes(torch.device("cuda"))).num_workers == 0
    )


def test_the_model_is_fused_mlp_with_no_dropout_on_the_logits() -> None:
    model = build_model(6, 3, Config(hidden=(8, 4), activation="silu", dropout=0.5, backend="reference"))
    assert isinstance(model, FusedMLP)
    assert model.backend == "reference"
    kinds = [nn.Linear, nn.SiLU, nn.Dropout, nn.Linear, nn.SiLU, nn.Dropout, nn.Linear]
    assert [type(child) for child in model] == kinds
    assert model[2].p == 0.5
    assert model(torch.randn(5, 6)).shape == (5, 3)


def test_no_hidden_layer_is_a_linear_classifier(data: str) -> None:
    assert [type(child) for child in run(TINY, data=data, hidden=()).network.children()] == [nn.Linear]


def test_the_torch_twin_starts_from_the_same_parameters() -> None:
    torch.manual_seed(1)
    ours = build_model(6, 3, TINY)
    torch.manual_seed(1)
    twin = build_torch_model(6, 3, TINY)
    assert type(twin) is nn.Sequential  # which FusedMLP is a subclass of
    assert [repr(child) for child in twin.children()] == [repr(child) for child in ours.children()]
    for key, value in ours.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


@pytest.mark.parametrize(
    ("changes", "kind", "rate"),
    [
        ({}, torch.optim.Adam, 1e-3),
        ({"lr": 0.5}, torch.optim.Adam, 0.5),
        ({"optimizer": "sgd"}, torch.optim.SGD, 0.05),
        ({"optimizer": "sgd", "lr": 0.5}, torch.optim.SGD, 0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_optimizers(changes: dict[str, Any], kind: type, rate: float, where: str) -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), Config(**changes), torch.device(where))
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == rate
    assert optimizer.defaults["fused"] is (where == "cuda")
    assert optimizer.defaults.get("momentum", 0.9) == 0.9


def test_an_epoch_is_the_loop_of_a_first_course() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(5)]
    models = [build_torch_model(6, 3, TINY) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].eval()  # which the epoch has to undo
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = train_epoch(models[0], batches, nn.CrossEntropyLoss(), optimizers[0], scaler, CPU, "fp32", StepTimer(CPU))
    expected = []
    for x, y in batches:
        optimizers[1].zero_grad()
        loss = nn.functional.cross_entropy(models[1](x), y)
        loss.backward()
        optimizers[1].step()
        expected.append(loss.item())

    assert losses == expected
    assert models[0].training
    for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(ours, theirs)


class Probe(nn.Module):
    """Notes in which modes it is called, and in which dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.calls: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls.append((self.training, torch.is_inference_mode_enabled(), y.dtype))
        return y


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_training_and_validation_have_their_modes(data: str, name: Any, dtype: torch.dtype) -> None:
    probe = Probe()
    config = dataclasses.replace(TINY, data=data, epochs=2, dtype=name)
    train(config, build=lambda features, classes, config: probe, report=quiet)
    epoch = [(True, False, dtype)] * 4 + [(False, True, dtype)]  # 56 rows by 16, then 14
    assert probe.calls == epoch * 2
    assert probe.linear.weight.dtype == torch.float32


class Float32Loss(nn.CrossEntropyLoss):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        return super().forward(logits, labels)


def test_the_loss_is_taken_in_float32() -> None:
    """Its sums of exponentials lose too much in 16 bits."""
    probe, loss_function = Probe(), Float32Loss()
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]
    optimizer = make_optimizer(probe, TINY, CPU)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train_epoch(probe, batches, loss_function, optimizer, scaler, CPU, "bf16", StepTimer(CPU))
    evaluate(probe, batches, loss_function, ALONE, "bf16")
    assert [dtype for _, _, dtype in probe.calls] == [torch.bfloat16] * 2


def test_validation_rows_keep_their_order_and_training_rows_do_not(data: str) -> None:
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    network = nn.Linear(6, 3)
    network.register_forward_pre_hook(lambda module, inputs: seen[module.training].append(inputs[0].clone()))
    train(dataclasses.replace(TINY, data=data, epochs=2), build=lambda *arguments: network, report=quiet)
    training_epochs, validation_epochs = (torch.cat(seen[mode]).chunk(2) for mode in (True, False))
    assert torch.equal(*validation_epochs)
    assert not torch.equal(*training_epochs)


def test_evaluate_weighs_batches_by_their_rows() -> None:
    x, y = torch.randn(10, 3), torch.randint(0, 3, (10,))
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    loss, accuracy = evaluate(nn.Identity(), batches, nn.CrossEntropyLoss(), ALONE, "fp32")
    assert loss == pytest.approx(nn.functional.cross_entropy(x, y).item())
    assert accuracy == (x.argmax(dim=1) == y).sum().item() / 10


def test_digits_reach_97_percent_within_a_minute() -> None:
    began = time.process_time()
    result = run(Config())
    assert result.accuracy >= 0.97
    assert time.process_time() - began < 2 * 60  # on two cores, whatever else they are doing
    assert len(result.losses) == 15 * math.ceil(1438 / 64)
    assert len(result.history) == 15
    assert not result.model.training


@pytest.mark.parametrize(
    "changes", [{"optimizer": "sgd"}, {"dropout": 0.2}, {"hidden": ()}, {"dtype": "bf16"}], ids=str
)
def test_other_ways_learn_too(data: str, changes: dict[str, Any]) -> None:
    result = run(TINY, data=data, epochs=10, lr=0.02, **changes)
    assert result.history[-1].loss < 0.7 * result.history[0].loss


def test_the_seed_decides_everything(data: str) -> None:
    dropped = dataclasses.replace(TINY, data=data, dropout=0.5)
    assert_same_bits(run(dropped), run(dropped))
    assert run(dropped).losses != run(dropped, seed=1).losses


@pytest.mark.parametrize("hidden", [(64, 64), pytest.param(Config.hidden, marks=pytest.mark.full)], ids=str)
def test_the_kernels_train_as_torch_does(hidden: tuple[int, ...]) -> None:
    """An epoch of digits in the interpreter, loss by loss; at the default widths it takes a minute."""
    config = Config(hidden=hidden, epochs=1, backend="triton")
    with count_launches() as launches:
        ours = run(config)
    twin = train(config, build=build_torch_model, report=quiet)
    # 3 layers as one network: forward, dgrad, wgrad, its sums; one by one: 3 forward, 2 dgrad, 3 wgrad.
    assert sum(launches.values()) >= len(ours.losses) * (4 if max(hidden) <= 64 else 8)
    assert len(ours.losses) == len(twin.losses) == 23
    assert ours.losses == pytest.approx(twin.losses, rel=0, abs=1e-4)


def test_divergence_is_said_and_not_saved(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(UserError, match=r"training diverged in epoch 1.*below --lr 1e\+30"):
        run(TINY, data=data, optimizer="sgd", lr=1e30, checkpoint=str(path))
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_on_a_gpu(device: str, tmp_path: Path, dtype: Any, optimizer: Any) -> None:
    config = Config(device=device, dtype=dtype, optimizer=optimizer, checkpoint=str(tmp_path / "run.pt"))
    result = run(config, epochs=10)
    assert result.accuracy >= 0.95
    assert sum(result.timer.percent.values()) == pytest.approx(100)
    assert min(ms for phase, ms in result.timer.milliseconds.items() if phase != "copy") > 0
    assert re.search(r"^a batch's copy takes \S+ ms .*: \d+% of it were hidden$", str(result.timer), re.M)
    assert len(run(config, epochs=11, resume=True).history) == 11
    on_cpu = run(config, device="cpu", dtype="fp32", checkpoint=None)
    assert result.accuracy == pytest.approx(on_cpu.accuracy, abs=0.03)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(item=lambda: None))
    assert [pick_device(name, 1) for name in ("auto", "cuda", "cpu")] == [torch.device("cuda:1")] * 2 + [CPU]
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="^--device cuda:1 is one GPU for several processes; --device cuda gives each"):
        pick_device("cuda:1", 0)
    with pytest.raises(UserError, match="--nproc-per-node starts more processes than this machine has GPUs, 2; each"):
        pick_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 1) == CPU


def test_a_batch_that_processes_cannot_share_evenly(data: str) -> None:
    config = dataclasses.replace(TINY, data=data)
    with pytest.raises(
        UserError, match="^--batch-size is 16, for all 3 processes together; it needs to be a multiple of"
    ):
        loop._train(config, Processes(CPU, 0, 3), build_model, quiet)


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "pick_device", lambda name, local: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match="--dtype bf16 is beyond Tesla T4; it has fp32 and fp16"):
        run(TINY, dtype="bf16")


def test_phases_end_at_their_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 1.5, 3.5, 7.5, 8.0, 9.0, 9.5, 11.5, 15.5, 16.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = StepTimer(CPU)
    timer.start()
    for phase in StepTimer.PHASES * 2:
        timer.mark(phase)
    timer.read()
    assert timer.steps == 2
    assert timer.milliseconds == {
        "loading": 1000.0,
        "copy": 500.0,
        "forward": 2000.0,
        "backward": 4000.0,
        "optimizer": 500.0,
    }
    assert timer.percent["forward"] == 25.0
    lines = [line.split() for line in str(timer).splitlines()]
    assert lines[0] == ["ms/step", "percent"]
    assert lines[3] == ["forward", "2000.000", "25.0"]
    assert lines[6] == ["sum", "8000.000", "100.0"]


def test_what_lies_between_epochs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 100.0, 101.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    timer = StepTimer(CPU)
    for _ in range(2):
        timer.start()
        timer.mark("optimizer")
    timer.read()
    assert timer.milliseconds["optimizer"] == 1000.0


class FakeEvent:
    """What StepTimer needs of torch.cuda.Event: one millisecond apart; waits are counted."""

    clock = itertools.count()
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = next(self.clock)

    def synchronize(self) -> None:
        FakeEvent.waits += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


@pytest.fixture
def gpu_timer(monkeypatch: pytest.MonkeyPatch) -> StepTimer:
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=FakeEvent))
    monkeypatch.setattr(FakeEvent, "waits", 0)
    return StepTimer(torch.device("cuda"))


def test_a_gpus_events_are_read_once_an_epoch(gpu_timer: StepTimer) -> None:
    gpu_timer.start()
    for phase in StepTimer.PHASES * 100:
        gpu_timer.mark(phase)
    assert FakeEvent.waits == 0
    gpu_timer.read()
    assert FakeEvent.waits == 1
    assert gpu_timer.steps == 100
    assert gpu_timer.milliseconds == dict.fromkeys(StepTimer.PHASES, 1.0)


def test_waiting_for_a_copy_is_no_loading(gpu_timer: StepTimer) -> None:
    """Of 1 ms of loading each, 0.25 ms were the wait for a copy of 2 ms."""

    @dataclasses.dataclass
    class At:
        at: float

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: At) -> float:
            return end.at - self.at

    assert gpu_timer.copies
    gpu_timer.start()
    for _ in range(8):
        gpu_timer.copies.add(At(1), At(3), At(5), At(5.25))
        for phase in StepTimer.PHASES:
            if phase != "copy":
                gpu_timer.mark(phase)
    gpu_timer.read()
    assert gpu_timer.milliseconds == {**dict.fromkeys(StepTimer.PHASES, 1.0), "loading": 0.75, "copy": 0.25}
    assert sum(gpu_timer.percent.values()) == pytest.approx(100)
    assert str(gpu_timer).endswith("\na batch's copy takes 2.000 ms on a stream of its own: 88% of it were hidden")
    gpu_timer.reset()
    assert "hidden" not in str(gpu_timer)


def test_events_of_a_long_epoch_do_not_pile_up(gpu_timer: StepTimer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimer, "MOST_PENDING", 12)
    gpu_timer.start()
    for phase in StepTimer.PHASES * 20:
        gpu_timer.mark(phase)
        assert len(gpu_timer._pending) < 12
    gpu_timer.read()
    assert gpu_timer.milliseconds == dict.fromkeys(StepTimer.PHASES, 1.0)


def test_the_first_epoch_is_left_out_where_there_are_more(data: str) -> None:
    assert run(TINY, data=data, epochs=1).timer.steps == 4
    timer = run(TINY, data=data, epochs=3).timer
    assert timer.steps == 8
    assert min(ms for phase, ms in timer.milliseconds.items() if phase != "copy") > 0
    assert timer.milliseconds["copy"] == 0  # on a CPU
    assert sum(timer.percent.values()) == pytest.approx(100)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    run(TINY, data=data)
    assert "epoch 3/3" in terminal.getvalue()
    assert "4/4" in terminal.getvalue() or "/4 [" in terminal.getvalue()


def test_no_bar_elsewhere(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(TINY, data=data)
    assert capfd.readouterr().err == ""


def test_no_bar_without_tqdm(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert len(run(TINY, data=data).history) == 3
    assert terminal.getvalue() == ""


def test_a_checkpoint_is_written_each_epoch_and_read_without_running_anything(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    result = run(TINY, data=data, checkpoint=str(path))
    saved = torch.load(path, weights_only=True)
    assert saved["format"] == checkpoint.FORMAT
    assert saved["epoch"] == 3
    assert [tasks.Epoch(**epoch) for epoch in saved["history"]] == result.history
    assert saved["config"]["hidden"] == [8]
    assert saved["config"]["lr"] == 1e-3
    assert saved["data"]["rows"] == 70
    assert {"order", "processes"} == saved["random"].keys()
    assert [random.keys() for random in saved["random"]["processes"]] == [{"torch", "cuda"}]
    assert sorted(tmp_path.iterdir()) == [tmp_path / "data.npz", path]

    network = FusedMLP(6, [8, 3], activation_layer="gelu")  # as a later user builds it
    model = nn.Sequential(OrderedDict(scaling=Scaling(torch.zeros(6), torch.ones(6)), network=network))
    model.load_state_dict(saved["model"])
    x = load_data(data).x
    assert torch.equal(model.eval()(x), result.model(x))
    assert torch.equal(result.network(result.scaling(x)), result.model(x))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.5}, {"optimizer": "sgd"}, {"dropout": 0.3, "dtype": "bf16"}],
    ids=lambda changes: ",".join(map(str, changes.values())) or "plain",
)
def test_a_resumed_run_is_the_uninterrupted_one(
    data: str, tmp_path: Path, workers: int, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(TINY, data=data, workers=workers, **changes)
    whole = run(config, epochs=4)
    path = str(tmp_path / "run.pt")
    first = run(config, epochs=1, checkpoint=path)
    torch.manual_seed(99)  # whatever happens between
    second = run(config, epochs=3, checkpoint=path, resume=True)
    third = run(config, epochs=4, checkpoint=path, resume=True)
    assert_same_bits(third, whole)
    assert first.losses + second.losses + third.losses == whole.losses


def test_the_state_of_the_gradient_scaler_comes_back(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 itself needs a GPU; the scaler it brings also works without."""
    path = str(tmp_path / "run.pt")
    made = []
    original = torch.amp.GradScaler

    def enabled(kind: str, enabled: bool) -> torch.amp.GradScaler:
        made.append(original(kind, init_scale=2.0**10, growth_interval=5))
        return made[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", enabled)
    whole = run(TINY, data=data)
    run(TINY, data=data, epochs=2, checkpoint=path)
    assert_same_bits(run(TINY, data=data, epochs=3, checkpoint=path, resume=True), whole)
    assert made[0].get_scale() == made[2].get_scale() == 2.0**12  # grown after 5 and 10 of 12 steps


def test_a_checkpoint_of_a_gpu_goes_on_without(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers: list[torch.optim.Optimizer] = []

    def noted(*arguments: Any) -> torch.optim.Optimizer:
        optimizers.append(make_optimizer(*arguments))
        return optimizers[-1]

    path = tmp_path / "run.pt"
    run(TINY, data=data, epochs=1, checkpoint=str(path))
    saved = load_checkpoint(path)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True
    saved["random"]["processes"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    save_checkpoint(path, saved)
    monkeypatch.setattr(loop, "make_optimizer", noted)
    resumed = run(TINY, data=data, checkpoint=str(path), resume=True)
    assert optimizers[0].param_groups[0]["fused"] is False
    assert_same_bits(resumed, run(TINY, data=data))


def test_nothing_left_to_train(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    whole = run(config)
    lines: list[str] = []
    again = train(dataclasses.replace(config, resume=True, epochs=2), report=lines.append)
    assert_same_bits(again, whole)
    assert again.losses == []
    assert any("nothing left to train" in line for line in lines)
    assert lines[-2].startswith(f"validation accuracy: {whole.accuracy:.4f} (class ")


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden": (8, 8)}, "--hidden is 8 8, it needs 8"),
    "no hidden": ({"hidden": ()}, "--hidden is empty, it needs 8"),
    "activation": ({"activation": "relu"}, "--activation is relu, it needs gelu"),
    "dropout": ({"dropout": 0.1}, "--dropout is 0.1, it needs 0.0"),
    "optimizer": ({"optimizer": "sgd", "lr": 1e-3}, "--optimizer is sgd, it needs adam"),
    "lr": ({"lr": 0.1}, "--lr is 0.1, it needs 0.001"),
    "batch size": ({"batch_size": 8}, "--batch-size is 8, it needs 16"),
    "dtype": ({"dtype": "bf16"}, "--dtype is bf16, it needs fp32"),
    "seed": ({"seed": 1}, "--seed is 1, it needs 0"),
    "split": ({"validation_fraction": 0.5}, "--validation-fraction is 0.5, it needs 0.2"),
    "data": ({"data": None}, "--data has 1797 rows, 64 features, 10 classes, it needs 70 rows, 6 features, 3 classes"),
    "two": ({"seed": 1, "lr": 0.1}, "--lr is 0.1, it needs 0.001; --seed is 1, it needs 0"),
}


@pytest.mark.parametrize(("changes", "sentence"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_a_checkpoint_of_another_run(data: str, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(UserError) as caught:
        run(config, epochs=2, resume=True, **changes)
    assert str(caught.value) == f"{config.checkpoint} is the checkpoint of another run: {sentence}"
    assert (tmp_path / "run.pt").read_bytes() == before


def test_other_values_of_the_same_sizes(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    arrays = dict(np.load(data))
    arrays["x"][0, 0, 0] += 1
    np.savez(data, **arrays)
    with pytest.raises(UserError, match="it needs 70 rows, 6 features, 3 classes of other values"):
        run(config, epochs=2, resume=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_labels_of_other_classes_than_a_checkpoints(data: str, tmp_path: Path, classes: int) -> None:
    """More or fewer: refused on the host, before any network is built."""
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    before = (tmp_path / "run.pt").read_bytes()
    arrays = dict(np.load(data))
    np.savez(data, x=arrays["x"], y=np.arange(len(arrays["y"])) % classes)
    built: list[object] = []
    with pytest.raises(UserError, match=f"--data has 70 rows, 6 features, {classes} classes, it needs .* 3 classes$"):
        train(dataclasses.replace(config, epochs=2, resume=True), build=lambda *_: built.append(1), report=quiet)
    assert built == []
    assert (tmp_path / "run.pt").read_bytes() == before


def test_the_data_may_have_moved_and_workers_may_differ(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    whole = run(TINY, data=data)
    run(config, epochs=1)
    moved = Path(data).rename(tmp_path / "elsewhere.npz")
    assert_same_bits(run(config, data=str(moved), workers=1, backend="reference", resume=True), whole)


@pytest.mark.parametrize("name", checkpoint.PARTS)
def test_a_checkpoint_with_a_part_of_another_kind(data: str, tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    save_checkpoint(tmp_path / "run.pt", {**load_checkpoint(tmp_path / "run.pt"), name: None})
    with pytest.raises(UserError, match=r"run.pt is not a checkpoint of mlp-fused train$"):
        run(config, epochs=2, resume=True)


def test_a_batch_larger_than_the_data_is_all_of_it(data: str) -> None:
    assert len(run(TINY, data=data, batch_size=10**30).losses) == TINY.epochs


def test_weights_that_do_not_fit(data: str, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, data=data, epochs=1, checkpoint=str(tmp_path / "run.pt"))
    run(config)
    saved = load_checkpoint(tmp_path / "run.pt")
    saved["model"]["network.0.weight"] = torch.zeros(9, 6)
    save_checkpoint(tmp_path / "run.pt", saved)
    with pytest.raises(UserError, match=r"run.pt does not fit this network: "):
        run(config, epochs=2, resume=True)


def fail_midway(save: Callable[..., None], error: BaseException) -> Callable[..., None]:
    def torch_save(checkpoint: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise error

    return torch_save


def fail(_: Callable[..., None], error: BaseException) -> Callable[..., None]:
    def replace(*arguments: object) -> None:
        raise error

    return replace


@pytest.mark.parametrize(
    ("module", "name", "how"),
    [(torch, "save", fail_midway), (os, "fsync", fail), (os, "replace", fail)],
    ids=["save", "fsync", "replace"],
)
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_a_failed_write_leaves_the_old_checkpoint(
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    how: Callable[..., Any],
    error: BaseException,
) -> None:
    config = dataclasses.replace(TINY, data=data, checkpoint=str(tmp_path / "run.pt"))
    run(config, epochs=1)
    before = (tmp_path / "run.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, how(getattr(module, name), error))
        with pytest.raises((UserError, KeyboardInterrupt)) as caught:
            run(config, resume=True)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", "run.pt"]
    if isinstance(error, KeyboardInterrupt):
        assert "is the last checkpoint, after epoch 1" in str(caught.value)
    else:
        assert f"cannot write the checkpoint {tmp_path / 'run.pt'}: {error}; what was there" in str(caught.value)
    assert len(run(config, resume=True).history) == 3


def test_a_checkpoint_behind_a_link_stays_behind_it(tmp_path: Path) -> None:
    link, target = tmp_path / "link.pt", tmp_path / "target.pt"
    target.write_bytes(b"old")
    link.symlink_to(target)
    save_checkpoint(link, {"epoch": 1})
    assert link.is_symlink()
    assert torch.load(target, weights_only=True) == {"epoch": 1}


def test_a_checkpoint_has_the_permissions_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "run.pt", {})
    assert (tmp_path / "run.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


class Interrupted(nn.Module):
    """A network that Ctrl-C hits in its nth call."""

    def __init__(self, network: nn.Module, calls: int) -> None:
        super().__init__()
        self.network = network
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        return self.network(x)


@pytest.mark.parametrize(
    ("calls", "checkpoint", "sentence"),
    [  # an epoch calls the network 4 + 1 times
        (2, True, r"stopped before the end of the first epoch; nothing was written to .*run.pt"),
        (5, True, r"stopped before the end of the first epoch; nothing was written to .*run.pt"),
        (
            6,
            True,
            r"stopped; .*run.pt is the last checkpoint, after epoch 1: the same command with --resume carries on",
        ),
        (
            15,
            True,
            r"stopped; .*run.pt is the last checkpoint, after epoch 2: the same command with --resume carries on",
        ),
        (6, False, r"stopped; no checkpoint was asked for \(--checkpoint FILE\)"),
    ],
)
def test_ctrl_c(data: str, tmp_path: Path, calls: int, checkpoint: bool, sentence: str) -> None:
    path = tmp_path / "run.pt"
    config = dataclasses.replace(TINY, data=data, checkpoint=str(path) if checkpoint else None)

    def build(calls: int) -> Callable[..., nn.Module]:
        return lambda *arguments: Interrupted(build_model(*arguments), calls)

    with pytest.raises(KeyboardInterrupt, match=f"^{sentence}$"):
        train(config, build=build(calls), report=quiet)
    assert path.exists() is (checkpoint and calls > 5)
    if path.exists():
        resumed = train(dataclasses.replace(config, resume=True), build=build(-1), report=quiet)
        assert_same_bits(resumed, train(dataclasses.replace(config, checkpoint=None), build=build(-1), report=quiet))
