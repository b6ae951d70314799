"""Libraries that bring the training loop: a FusedMLP in Lightning and in skorch beside the plain twin.

On the reference path on a CPU, the numbers equal the twin's bit for bit. With the kernels they differ by rounding.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import load
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mlp_fused import FusedMLP

Y = torch.arange(48) % 3
X = torch.randn(48, 12, generator=torch.Generator().manual_seed(0)) + nn.functional.one_hot(Y, 12)
BACKENDS = ["reference", "triton"]


def networks(backend: Any, dropout: float = 0.0) -> tuple[nn.Module, nn.Sequential]:
    """A FusedMLP and its plain twin with the same parameters."""
    fused = FusedMLP(12, [16, 16, 3], activation_layer="gelu", dropout=dropout, backend=backend)
    return fused, nn.Sequential(*copy.deepcopy(list(fused.children())))


def assert_same_numbers(fused: nn.Module, twin: nn.Module, exact: bool, tolerance: float = 2e-5) -> None:
    twin_state = twin.state_dict()
    for name, value in fused.state_dict().items():
        assert (
            torch.equal(value, twin_state[name]) if exact else torch.allclose(value, twin_state[name], atol=tolerance)
        ), name


@pytest.fixture
def lightning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightning warns about its own imports
        return load("lightning")


def lightning_module(lightning: Any, network: nn.Module) -> Any:
    """The library's first example: a loss in training_step, an optimizer in configure_optimizers."""

    class Classifier(lightning.LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.network(x), y)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            x, y = batch
            self.log("accuracy", (self.network(x).argmax(dim=1) == y).float().mean())

        def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.network(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            # With a larger eps, rounding does not decide the sign of a step whose gradient is almost zero.
            return torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-3)

    return Classifier(network)


def trainer(lightning: Any, device: str, folder: Path, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=16)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lightning(lightning: Any, device: str, backend: str, tmp_path: Path, options: dict[str, Any]) -> None:
    trained = []
    for network in networks(backend):
        module = lightning_module(lightning, network)
        fitter = trainer(lightning, device, tmp_path, **options)
        fitter.fit(module, loader(), loader())
        metrics = dict(fitter.callback_metrics)
        trained.append((network, metrics, torch.cat(fitter.predict(module, loader()))))
    (fused, metrics, outputs), (twin, twin_metrics, twin_outputs) = trained
    tolerance = 2e-2 if "precision" in options else 2e-5
    assert_same_numbers(fused.cpu(), twin.cpu(), backend == "reference" and device == "cpu", tolerance)
    assert torch.allclose(outputs.float(), twin_outputs.float(), atol=3 * tolerance)
    assert metrics["loss"].item() == pytest.approx(twin_metrics["loss"].item(), abs=tolerance)
    assert metrics["accuracy"].item() == pytest.approx(twin_metrics["accuracy"].item(), abs=0.05)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_lightnings_checkpoint_loads_into_the_twin(lightning: Any, device: str, backend: str, tmp_path: Path) -> None:
    fused, twin = networks(backend)
    fitter = trainer(lightning, device, tmp_path)
    fitter.fit(lightning_module(lightning, fused), loader())
    fitter.save_checkpoint(tmp_path / "run.ckpt")
    twin_module = lightning_module(lightning, twin)
    twin_trainer = trainer(lightning, device, tmp_path)
    twin_trainer.fit_loop.max_epochs = 3
    twin_trainer.fit(twin_module, loader(), ckpt_path=tmp_path / "run.ckpt")
    fused_trainer = trainer(lightning, device, tmp_path)
    fused_trainer.fit_loop.max_epochs = 3
    resumed = networks(backend)[0]
    fused_trainer.fit(lightning_module(lightning, resumed), loader(), ckpt_path=tmp_path / "run.ckpt")
    assert not torch.equal(twin[0].weight.cpu(), fused[0].weight.cpu())  # training continued
    assert_same_numbers(resumed.cpu(), twin.cpu(), backend == "reference" and device == "cpu")


class Plain(nn.Sequential):
    """The plain twin as a class, because skorch constructs modules from arguments."""

    def __init__(self, backend: Any) -> None:
        super().__init__(*FusedMLP(12, [16, 16, 3], activation_layer="gelu", backend=backend).children())


def skorch_classifiers(device: str, backend: str) -> list[Any]:
    skorch = load("skorch")
    options = {
        "criterion": nn.CrossEntropyLoss,
        "optimizer": torch.optim.Adam,
        "lr": 0.01,
        "max_epochs": 3,
        "batch_size": 16,
        "verbose": 0,
        "device": device,
    }
    fused = {"in_channels": 12, "hidden_channels": [16, 16, 3], "activation_layer": "gelu", "backend": backend}
    return [
        skorch.NeuralNetClassifier(FusedMLP, **{f"module__{name}": value for name, value in fused.items()}, **options),
        skorch.NeuralNetClassifier(Plain, module__backend=backend, **options),
    ]


def fitted(classifier: Any) -> Any:
    torch.manual_seed(1)
    return classifier.fit(X.numpy(), Y.numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_skorch(device: str, backend: str) -> None:
    fused, twin = map(fitted, skorch_classifiers(device, backend))
    assert isinstance(fused.module_, FusedMLP)
    assert_same_numbers(fused.module_, twin.module_, backend == "reference" and device == "cpu")
    assert fused.history[:, "train_loss"] == pytest.approx(twin.history[:, "train_loss"], abs=1e-4)
    assert fused.history[-1, "train_loss"] < fused.history[0, "train_loss"]
    x = X.numpy()
    assert fused.predict_proba(x) == pytest.approx(twin.predict_proba(x), abs=1e-4)
    assert (fused.predict(x) == fused.predict_proba(x).argmax(axis=1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_skorch_in_scikit_learn(device: str, backend: str) -> None:
    """Clone, configure, cross-validate and pickle an estimator like scikit-learn does."""
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_score

    fused, twin = (clone(classifier).set_params(max_epochs=1) for classifier in skorch_classifiers(device, backend))
    scores = []
    for classifier in (fused, twin):
        torch.manual_seed(1)
        scores.append(cross_val_score(classifier, X.numpy(), Y.numpy(), cv=2, scoring="neg_log_loss"))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    once = fitted(fused)
    copied = pickle.loads(pickle.dumps(once))
    assert np.array_equal(copied.predict_proba(X.numpy()), once.predict_proba(X.numpy()))
