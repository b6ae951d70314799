"""The training loop: split, scaling, loaders, steps, validation."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader
from trainings import ALONE, CPU, TINY, assert_same_bits, quiet, run, write_data

from mlp_fused.errors import UserError
from mlp_fused.kernels.launch import count_launches
from mlp_fused.scaling import Scaling
from mlp_fused.train import loop
from mlp_fused.train.config import Config, build_model, build_torch_model
from mlp_fused.train.data import load_data, split
from mlp_fused.train.distributed import Part, Processes
from mlp_fused.train.loop import ArrayDataset, evaluate, make_loader, make_optimizer, train, train_epoch
from mlp_fused.train.timer import StepTimer


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_data(tmp_path)


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


# Features, their offset, and their classes.
FAR_FROM_ZERO: dict[str, tuple[np.ndarray, Any, np.ndarray]] = {
    "x + 1.7e9": (RANDOM.normal(size=(400, 2)) + 4 * SIDES[:, None], 1.7e9, SIDES),
    "unix seconds": (SECONDS, 1.7e9, (SECONDS // 75).astype(int)),
    "integer ids": (ORDER, 10**9, ORDER // 50),
    "integer ids beyond float64": (ORDER, 2**60, ORDER // 50),
    "unsigned ids": (ORDER.astype(np.uint64), np.uint64(2**63), ORDER // 50),
    "UTM coordinates": (METRES, np.array([500_000, 5_400_000]), (METRES > 1) @ (1, 2)),
}


@pytest.mark.parametrize(("x", "distance", "y"), FAR_FROM_ZERO.values(), ids=FAR_FROM_ZERO)
def test_features_far_from_zero_cost_no_accuracy(tmp_path: Path, x: np.ndarray, distance: Any, y: np.ndarray) -> None:
    """Features are centred in float64. If they were centred in float32, the accuracy was 0.2 to 0.9."""
    config = dataclasses.replace(TINY, hidden=(32,), epochs=30, batch_size=32, lr=0.02, data=str(tmp_path / "d.npz"))
    results = []
    for features in (x, x + distance):
        np.savez(tmp_path / "d.npz", x=features, y=y)
        results.append(run(config))
    near, far = results
    assert near.accuracy >= 0.95
    assert far.accuracy == near.accuracy
    assert far.losses == pytest.approx(near.losses, rel=1e-2, abs=1e-3)


def test_remarks_on_the_data_come_before_training(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(40, 3))
    x[:, 1], x[0, 2] = 5, 1e20
    np.savez(tmp_path / "d.npz", x=x, y=random.integers(0, 2, 40) * 7)
    lines: list[str] = []
    train(dataclasses.replace(TINY, data=str(tmp_path / "d.npz"), validation_fraction=0.1), report=lines.append)
    fix = "use numpy.unique(y, return_inverse=True)[1] to number the classes, or --task regression to predict numbers"
    assert lines[1:5] == [
        f"6 of 8 classes never occur in y; {fix}",
        loop.SCALED,
        "constant in the training rows: 1 of 3 features (column 1, counted from 0)",
        "stretched by outliers, so that most of their values become equal in float32: 1 of 3 features (column 2, "
        "counted from 0); clip the outliers or take logarithms",
    ]


def test_the_share_of_the_largest_class_is_reported_with_the_accuracy(tmp_path: Path) -> None:
    """This is the accuracy of always predicting the most frequent class of the training rows."""
    y = np.where(np.arange(100) % 5 == 0, "rare", "usual")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(100, 2)), y=y)
    lines: list[str] = []
    result = train(dataclasses.replace(TINY, data=str(tmp_path / "d.npz")), report=lines.append)
    share = (y[split(100, 0.2, 0)[1].numpy()] == "usual").mean()
    assert lines[-1] == (
        f"validation accuracy: {result.accuracy:.4f} (always predicting usual, the largest class: {share:.4f})"
    )


def row_numbers(loader: DataLoader[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


def numbered(rows: int = 50) -> ArrayDataset:
    return ArrayDataset(torch.zeros(rows, 1), torch.arange(rows))


def test_order_depends_on_the_seed_and_the_epoch_but_not_on_workers() -> None:
    def epochs(workers: int) -> list[list[int]]:
        config = dataclasses.replace(TINY, workers=workers)
        loader = make_loader(numbered(), config, ALONE, torch.Generator().manual_seed(3))
        return [row_numbers(loader) for _ in range(3)]

    alone = epochs(0)
    assert alone == epochs(2)
    assert all(sorted(epoch) == list(range(50)) for epoch in alone)
    assert alone[0] != alone[1] != alone[2]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [48, 50, 51, 5])
def test_the_parts_of_all_processes_form_the_batches_of_one(rows: int, count: int) -> None:
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
        counted = [part[step] for part, weight in zip(parts, weights) if weight[step]]
        assert sorted(label for part in counted for label in part) == sorted(batch)
        assert all(part[step] for part in parts)  # every process gets at least one row
        mean = sum(weight[step] * np.mean(part[step]) for part, weight in zip(parts, weights)) / count
        assert mean == pytest.approx(np.mean(batch))
        if len(batch) % count == 0:
            assert {weight[step] for weight in weights} == {1.0}


class InterruptsIgnored(ArrayDataset):
    """A dataset whose labels are 1 if the loading process ignores Ctrl-C."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], torch.tensor(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_the_main_process_handles_ctrl_c(workers: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
    try:
        check_handlers(workers)
    finally:
        signal.signal(signal.SIGINT, before)


def check_handlers(workers: int) -> None:
    dataset = InterruptsIgnored(torch.zeros(4, 1), torch.zeros(4))
    assert row_numbers(make_loader(dataset, dataclasses.replace(TINY, workers=workers), ALONE)) == [workers] * 4


def test_without_shuffling_rows_keep_their_order() -> None:
    assert row_numbers(make_loader(numbered(), TINY, ALONE)) == list(range(50))


def test_a_gpu_has_pinned_memory_and_lasting_workers() -> None:
    on_gpu = make_loader(numbered(), TINY, Processes(torch.device("cuda")))
    assert (on_gpu.pin_memory, on_gpu.num_workers, on_gpu.persistent_workers) == (True, 2, True)
    on_cpu = make_loader(numbered(), TINY, ALONE)
    assert (on_cpu.pin_memory, on_cpu.num_workers, on_cpu.persistent_workers) == (False, 0, False)
    assert (
        make_loader(numbered(), dataclasses.replace(TINY, workers=0), Processes(torch.device("cuda"))).num_workers == 0
    )


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


def test_an_epoch_equals_a_plain_training_loop() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(5)]
    models = [build_torch_model(6, 3, TINY) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0].eval()  # the epoch must set training mode again
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
    """A module that records the modes and dtypes of its calls."""

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


def test_the_loss_is_computed_in_float32() -> None:
    """In 16 bits, its sums of exponentials would lose too much accuracy."""
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
    assert time.process_time() - began < 2 * 60  # CPU time, so that other load does not matter
    assert len(result.losses) == 15 * math.ceil(1438 / 64)
    assert len(result.history) == 15
    assert not result.model.training


@pytest.mark.parametrize(
    "changes", [{"optimizer": "sgd"}, {"dropout": 0.2}, {"hidden": ()}, {"dtype": "bf16"}], ids=str
)
def test_other_settings_learn_too(data: str, changes: dict[str, Any]) -> None:
    result = run(TINY, data=data, epochs=10, lr=0.02, **changes)
    assert result.history[-1].loss < 0.7 * result.history[0].loss


def test_the_seed_decides_everything(data: str) -> None:
    dropped = dataclasses.replace(TINY, data=data, dropout=0.5)
    assert_same_bits(run(dropped), run(dropped))
    assert run(dropped).losses != run(dropped, seed=1).losses


@pytest.mark.parametrize("hidden", [(64, 64), pytest.param(Config.hidden, marks=pytest.mark.full)], ids=str)
def test_the_kernels_train_like_torch(hidden: tuple[int, ...]) -> None:
    """Compare every loss of an epoch of digits in the interpreter. The default widths take a minute."""
    config = Config(hidden=hidden, epochs=1, backend="triton")
    with count_launches() as launches:
        ours = run(config)
    twin = train(config, build=build_torch_model, report=quiet)
    # 3 layers as one network take forward, dgrad, wgrad and its sums. One by one: 3 forward, 2 dgrad, 3 wgrad.
    assert sum(launches.values()) >= len(ours.losses) * (4 if max(hidden) <= 64 else 8)
    assert len(ours.losses) == len(twin.losses) == 23
    assert ours.losses == pytest.approx(twin.losses, rel=0, abs=1e-4)


def test_divergence_is_reported_and_not_saved(data: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(UserError, match=r"training diverged in epoch 1.*than --lr 1e\+30"):
        run(TINY, data=data, optimizer="sgd", lr=1e30, checkpoint=str(path))
    assert not path.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_on_a_gpu_agrees_with_a_cpu(device: str, tmp_path: Path, dtype: Any, optimizer: Any) -> None:
    config = Config(device=device, dtype=dtype, optimizer=optimizer, checkpoint=str(tmp_path / "run.pt"))
    result = run(config, epochs=10)
    assert result.accuracy >= 0.95
    assert sum(result.timer.percent.values()) == pytest.approx(100)
    assert min(ms for phase, ms in result.timer.milliseconds.items() if phase != "copy") > 0
    assert re.search(r"^copying a batch takes \S+ ms .*; \d+% of it overlaps with other work$", str(result.timer), re.M)
    assert len(run(config, epochs=11, resume=True).history) == 11
    on_cpu = run(config, device="cpu", dtype="fp32", checkpoint=None)
    assert result.accuracy == pytest.approx(on_cpu.accuracy, abs=0.03)


def test_a_batch_that_processes_cannot_split_evenly(data: str) -> None:
    config = dataclasses.replace(TINY, data=data)
    with pytest.raises(UserError, match="^--batch-size is 16; it needs to be a multiple of 3, the number of processes"):
        loop._train(config, Processes(CPU, 0, 3), build_model, quiet)


def test_bf16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(UserError, match="Tesla T4 does not support --dtype bf16; use fp32 or fp16"):
        loop._train(dataclasses.replace(TINY, dtype="bf16"), Processes(torch.device("cuda")), build_model, quiet)


def test_a_batch_larger_than_the_data_takes_all_rows(data: str) -> None:
    assert len(run(TINY, data=data, batch_size=2**63 - 1).losses) == TINY.epochs


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_largest_learning_rate_diverges_with_one_sentence(data: str, optimizer: Any) -> None:
    with pytest.raises(UserError, match=r"^training diverged in epoch 1: .*; try a smaller .* than --lr 1e\+36$"):
        run(TINY, data=data, optimizer=optimizer, lr=1e36, epochs=1)
