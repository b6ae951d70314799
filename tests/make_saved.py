"""Write the files that users save, with today's code. Later code has to load them (test_saved_files.py).

    python tests/make_saved.py

writes tests/data/saved/<commit>/, where <commit> is HEAD. It refuses if that folder exists, or if the code differs from
HEAD. Kernels run in Triton's interpreter. For each file with a model, `outputs.json` has an input, the model's output,
and the gradient of the output's sum with respect to the input. For a checkpoint of `train`, it has the history of the
resumed run instead of the gradient. `versions.json` has the commit and the libraries' versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import libraries
import numpy as np
import torch
from torch import Tensor, nn

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, Pointwise, fuse
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.engine import table_files
from mlp_fused.engine.row_kernels import stamped
from mlp_fused.train.predict import load_model

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CODE = ("mlp_fused", "kernels")
LIBRARIES = ("torch", "triton", "torchvision", "numpy")
TRAIN = "--hidden 8 --batch-size 16 --lr 0.02 --dropout 0.1 --workers 0 --device cpu --epochs"


def fused(model: nn.Module, **options: Any) -> nn.Module:
    fuse(model, **options)
    return model


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.25), nn.Linear(8, 3))


# Whole models, by file. Their inputs have 6 features.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused_mlp.pt": lambda: FusedMLP(6, [8, 8, 3], activation_layer="gelu", dropout=0.25, recompute=False),
    "fused_mlp.pkl": lambda: FusedMLP(6, [8, 8, 3], activation_layer="gelu", dropout=0.25, recompute=False),
    "fused_mlp_table_activations.pt": lambda: FusedMLP(
        6,
        [8, 8, 3],
        activation_layer=ACTIVATIONS["quick_gelu"],
        output_activation=Pointwise("softplus", beta=2.0),
        recompute=True,
    ),
    "fused_mlp_prelu.pt": lambda: FusedMLP(6, [8, 3], norm_layer=nn.LayerNorm, activation_layer=nn.PReLU(8)),
    "fused_linear.pt": lambda: FusedLinear(
        6, 3, activation=ACTIVATIONS["leaky_relu"].bind(negative_slope=0.3), backend="reference"
    ),
    "fused_sequential.pt": lambda: fused(sequential(), recompute=True),
    "fused_torchvision_mlp.pt": lambda: fused(
        libraries.load("torchvision").ops.MLP(6, [8, 3], activation_layer=nn.GELU, dropout=0.25)
    ),
    "fused_encoder_layer.pt": lambda: fused(nn.TransformerEncoderLayer(6, 2, 12, dropout=0.25)),
}
# The models whose state_dicts are saved, by file.
STATES = {"state_fused_mlp.pt": "fused_mlp.pt", "state_fused_linear.pt": "fused_linear.pt"}


def example(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """An input, its output, and the gradient of the output's sum with respect to the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    return {"x": x.tolist(), "y": y.tolist(), "dx": dx.tolist()}


def write_models(folder: Path, outputs: dict[str, Any]) -> None:
    models: dict[str, nn.Module] = {}
    for seed, (name, make) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        model = models[name] = make().eval()
        outputs[name] = example(model, torch.randn(5, 6))
        if name.endswith(".pkl"):
            (folder / name).write_bytes(pickle.dumps(model, protocol=2))
        else:
            torch.save(model, folder / name)
    for name, source in STATES.items():
        torch.save(models[source].state_dict(), folder / name)
        outputs[name] = outputs[source]


# For each file: the model's backend, True if gradients are recorded, and the backend written into the program; None if
# the program has no operator. On a CPU, a model with backend="auto" is exported without the operator. So the first
# model has "triton", and `write_exported` writes "auto" into its program, as an export on a GPU would. Programs with
# "triton" run kernels, here in the interpreter.
EXPORTED = {
    "exported_operator.pt2": ("triton", False, "auto"),
    "exported_operator_of_kernels.pt2": ("triton", False, "triton"),
    "exported_operator_for_training.pt2": ("triton", True, "triton"),
    "exported_plain.pt2": ("auto", False, None),
}


def write_exported(folder: Path, outputs: dict[str, Any]) -> None:
    """Write exported programs with the operator, and one without it."""
    for name, (backend, training, written) in EXPORTED.items():
        torch.manual_seed(0)
        model = FusedMLP(6, [8, 8, 3], activation_layer="gelu", dropout=0.25, backend=backend).eval()
        x = torch.randn(5, 6)
        rows = torch.export.Dim("rows", min=1, max=64)
        with torch.set_grad_enabled(training):
            program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        operators = [node for node in program.graph.nodes if node.target is torch.ops.mlp_fused.mlp.default]
        assert len(operators) == (written is not None)
        for node in operators:
            node.args = tuple(written if argument == "triton" else argument for argument in node.args)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, folder / name)
        outputs[name] = example(model, x)


def train(folder: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "mlp_fused", "train", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )


def write_checkpoints(folder: Path, outputs: dict[str, Any]) -> None:
    """Write checkpoints of `train` after two epochs, their data, and the history of a run resumed to epoch four."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    x = (random.normal(size=(60, 3)) + 2 * labels[:, None]).astype(np.float32)
    targets = {"classification": np.array(["elm", "oak", "yew"])[labels], "regression": 100 + x.sum(axis=1)}
    for task, y in targets.items():
        name = f"train_{task}"
        np.savez(folder / f"{name}.npz", x=x, y=y)
        command = ["--data", f"{name}.npz", "--task", task, "--checkpoint", f"{name}.pt", *TRAIN.split()]
        train(folder, *command, "2")
        model = load_model(folder / f"{name}.pt")
        with torch.no_grad():
            outputs[f"{name}.pt"] = {"x": x[:5].tolist(), "y": model(torch.from_numpy(x[:5])).tolist()}
        with tempfile.TemporaryDirectory() as other:
            for suffix in ("npz", "pt"):
                (Path(other) / f"{name}.{suffix}").write_bytes((folder / f"{name}.{suffix}").read_bytes())
            train(Path(other), *command, "4", "--resume")
            outputs[f"{name}.pt"]["history"] = load_checkpoint(Path(other) / f"{name}.pt")["history"]
    model = load_model(folder / "train_classification.pt")
    torch.save(model, folder / "trained_model.pt")
    outputs["trained_model.pt"] = example(model, torch.from_numpy(x[:5]))


def write_tables(folder: Path) -> None:
    """Write a few rows of the readings of an H100, in schema 1 and in today's schema."""
    source = TESTS / "data" / "h100"
    old = json.loads((source / "tuned.json").read_text())
    products = [row for row in old["gemms"] if row["rows"] == 16384 and row["width_in"] == row["width_out"] == 512]
    products += [row for row in old["gemms"] if row["dtype"] == "float32" and row["tile"]][:3]
    (folder / "table_schema_1.json").write_text(json.dumps({**old, "gemms": products}, indent=1) + "\n")
    new = table_files.read(ROOT / "kernels" / "tuned" / "nvidia_h100_80gb_hbm3.json")
    keys = {tuple(row[name] for name in ("kind", "rows", "width_out", "width_in", "dtype")) for row in products}
    gemms = tuple(row for row in new.gemms if (row.kind, row.rows, row.width_out, row.width_in, row.dtype) in keys)
    cell = next(json.loads(line) for line in (source / "cells.jsonl").open() if '"cell": "narrow64"' in line)
    networks = tuple(
        stamped(
            table_files.Network(
                (64,) * 5,
                2**20,
                "bfloat16",
                "ieee",
                "relu",
                training,
                path,
                {path: cell["ms"][f"{phase} ours"][0], "torch": cell["ms"][f"{phase} eager"][0]},
            )
        )
        for training, path, phase in ((False, "network", "fwd"), (True, "stored", "train"))
    )
    table = table_files.Table(new.device, new.date, new.versions, gemms, networks, new.arch, new.multiprocessors)
    table_files.write(folder / "table_schema_4.json", table)


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    if changed := git("status", "--porcelain", "--", *CODE):
        sys.exit(f"the code is not that of HEAD; commit it first:\n{changed}")
    commit = git("rev-parse", "--short=7", "HEAD")
    folder = TESTS / "data" / "saved" / commit
    if folder.exists():
        sys.exit(f"{folder} exists; saved files are never written again")
    folder.mkdir()
    outputs: dict[str, Any] = {}
    write_models(folder, outputs)
    write_exported(folder, outputs)
    write_checkpoints(folder, outputs)
    write_tables(folder)
    (folder / "outputs.json").write_text(json.dumps(outputs) + "\n")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in LIBRARIES}}
    (folder / "versions.json").write_text(json.dumps({"commit": commit, **versions}, indent=1) + "\n")
    print(*(f"{path.stat().st_size:>8}  {path.relative_to(ROOT)}" for path in sorted(folder.iterdir())), sep="\n")
    print(", ".join(f"{name} {version}" for name, version in {"mlp_fused at": commit, **versions}.items()))


if __name__ == "__main__":
    main()
