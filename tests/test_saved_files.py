"""Files of older versions of mlp_fused load and give the results of those versions.

`data/saved/<commit>/` holds the files that make_saved.py wrote with the code of that commit. data/saved/README.md lists
them.

Stored outputs are compared by torch.testing.assert_close, because another processor or another torch may add up a
product in another order. Outputs computed here are compared exactly.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from libraries import needs
from torch import Tensor, nn

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, Pointwise, fuse
from mlp_fused.engine import paths, tables
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.launch import count_launches
from mlp_fused.kernels.tile_config import Problem
from mlp_fused.train.config import Config
from mlp_fused.train.loop import train
from mlp_fused.train.predict import load_model, predict

SAVED = Path(__file__).parent / "data" / "saved"
FOLDERS = sorted(path.parent for path in SAVED.glob("*/versions.json"))


def files(pattern: str) -> Any:
    """Parametrize over the files that match a pattern, in the folders of all commits."""
    paths = [path for folder in FOLDERS for path in sorted(folder.glob(pattern))]
    ids = [f"{path.parent.name}-{path.name}" for path in paths]
    marks = [[needs("torchvision")] if "torchvision" in path.name else [] for path in paths]
    return pytest.mark.parametrize("path", [pytest.param(p, id=i, marks=m) for p, i, m in zip(paths, ids, marks)])


def reading(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """The input and outputs that make_saved.py stored for a file."""
    outputs = json.loads((path.parent / "outputs.json").read_text())[path.name]
    return {name: torch.tensor(outputs[name], device=device) for name in ("x", "y", "dx") if name in outputs}


def assert_gives(model: nn.Module, path: Path, device: str = "cpu") -> None:
    """Assert the stored output and the stored gradient of its sum, with a wider tolerance on a GPU."""
    stored = reading(path, device)
    tolerances = {} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    x = stored["x"].requires_grad_()
    y = model(x)
    torch.testing.assert_close(y, stored["y"], **tolerances)
    y.sum().backward()
    torch.testing.assert_close(x.grad, stored["dx"], **tolerances)


def load(path: Path, device: str = "cpu") -> Any:
    if path.suffix == ".pkl":
        return pickle.loads(path.read_bytes()).to(device)
    return torch.load(path, weights_only=False, map_location=device)


MODELS = files("fused_*")


@MODELS
def test_a_saved_model_gives_its_stored_output(path: Path, device: str) -> None:
    model = load(path, device)
    assert not model.training
    assert_gives(model, path, device)
    if isinstance(model, nn.Sequential):
        x = reading(path, device)["x"]
        twin = nn.Sequential(*model.children())
        assert device == "cuda" or torch.equal(model(x), twin(x))


@MODELS
def test_a_saved_model_trains(path: Path, device: str) -> None:
    model, x = load(path, device).train(), reading(path, device)["x"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters()))


@MODELS
def test_a_saved_model_runs_on_kernels(path: Path, device: str) -> None:
    """Use `backend="triton"`, in the interpreter or on a GPU."""
    model = load(path, device)
    model.backend = "triton"
    stored = reading(path, device)
    with count_launches() as launches:
        y = model(stored["x"])
    assert launches
    torch.testing.assert_close(y, stored["y"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_settings_of_saved_models(folder: Path) -> None:
    mlp, pickled = load(folder / "fused_mlp.pt"), load(folder / "fused_mlp.pkl")
    for model in (mlp, pickled):
        assert type(model) is FusedMLP
        assert (model.recompute, model.backend) == (False, "auto")
        assert [child.p for child in model if isinstance(child, nn.Dropout)] == [0.25] * 3
        assert {type(model[index]) for index in (1, 4)} == {nn.GELU}
    activated = load(folder / "fused_mlp_table_activations.pt")
    assert activated.recompute is True
    pointwise = [child for child in activated if isinstance(child, Pointwise)]
    assert [child.activation for child in pointwise] == [
        ACTIVATIONS["quick_gelu"],
        ACTIVATIONS["quick_gelu"],
        ACTIVATIONS["softplus"].bind(beta=2.0),
    ]
    linear = load(folder / "fused_linear.pt")
    assert type(linear) is FusedLinear
    assert linear.backend == "reference"
    assert linear.activation is ACTIVATIONS["leaky_relu"].bind(negative_slope=0.3)  # a row of the table itself
    sequential = load(folder / "fused_sequential.pt")
    assert isinstance(sequential, nn.Sequential)
    assert (sequential.recompute, sequential.backend) == (True, "auto")
    prelu = load(folder / "fused_mlp_prelu.pt")
    assert [type(child) for child in prelu] == [nn.Linear, nn.LayerNorm, nn.PReLU, nn.Dropout, nn.Linear, nn.Dropout]


@files("state_*.pt")
def test_a_saved_state_dict_loads(path: Path, device: str) -> None:
    whole = load(path.with_name(path.name.removeprefix("state_")), device)
    model: nn.Module
    if path.name == "state_fused_mlp.pt":
        model = FusedMLP(6, [8, 8, 3], activation_layer="gelu", dropout=0.25)
    else:
        model = FusedLinear(6, 3, activation=ACTIVATIONS["leaky_relu"].bind(negative_slope=0.3))
    model.to(device).eval()
    state = torch.load(path, weights_only=True, map_location=device)
    assert model.load_state_dict(state) == ([], [])
    assert list(state) == list(model.state_dict()) == list(whole.state_dict())
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in state.items())
    assert_gives(model, path, device)


# The names that pickles may contain. They must stay importable. Names with an underscore are called only by pickle.
NAMES = {
    "mlp_fused.convert _remake",  # rebuilds a module that `fuse` replaced, from its original class
    "mlp_fused.kernels.activations _restore",  # rebuilds an Activation from its name and parameters
    "mlp_fused.module FusedLinear",
    "mlp_fused.module FusedMLP",
    "mlp_fused.module Pointwise",
    "mlp_fused.scaling Scaling",
    "mlp_fused.scaling Unscaling",
}


def project_names(content: bytes) -> set[str]:
    """The names of this project in a pickle of protocol 2 or a file of torch.save."""
    pickles = [content]
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        assert pickles
    names: set[str] = set()
    for pickled in pickles:
        for opcode, argument, _ in pickletools.genops(pickled):
            assert opcode.name not in ("INST", "STACK_GLOBAL")  # these opcodes name objects differently
            if opcode.name == "GLOBAL" and str(argument).startswith("mlp_fused"):
                names.add(str(argument))
    return names


PICKLES = sorted(path for path in SAVED.rglob("*") if path.suffix in (".pt", ".pkl"))


@pytest.mark.parametrize("path", PICKLES, ids=lambda path: path.relative_to(SAVED).as_posix())
def test_names_in_saved_pickles_are_stable(path: Path) -> None:
    names = project_names(path.read_bytes())
    assert names <= NAMES
    assert bool(names) == path.name.startswith(("fused_", "trained_"))  # such files hold a whole model


def test_every_stable_name_can_be_looked_up() -> None:
    unpickler = pickle.Unpickler(io.BytesIO())
    for name in NAMES:
        assert callable(unpickler.find_class(*name.split(" ")))


NEW_MODELS = {
    "FusedMLP": lambda: FusedMLP(6, [8, 3], activation_layer="quick_gelu", output_activation="sine"),
    "FusedLinear": lambda: FusedLinear(6, 3, activation=ACTIVATIONS["elu"].bind(alpha=0.5)),
    "fused": lambda: nn.ModuleList(
        [nn.Sequential(nn.Linear(6, 3), nn.ReLU()), nn.TransformerEncoderLayer(6, 2, 12)],
    ),
}


@pytest.mark.parametrize("name", NEW_MODELS)
def test_names_in_new_pickles_are_stable(name: str) -> None:
    model: nn.Module = NEW_MODELS[name]()
    fuse(model)
    x = torch.randn(5, 6)
    for module in model if isinstance(model, nn.ModuleList) else [model]:
        module(x).sum().backward()  # cached paths are not pickled
    file = io.BytesIO()
    torch.save(model, file)
    for content in (file.getvalue(), pickle.dumps(model, protocol=2)):
        assert project_names(content)
        assert project_names(content) <= NAMES


@pytest.fixture
def copied(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a checkpoint and its data to the current folder. Returns the checkpoint's path."""
    for file in (path, path.with_suffix(".npz")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path(path.name)


def features(path: Path) -> np.ndarray:
    return np.load(path.with_suffix(".npz"))["x"][:5]


@files("train_*.pt")
def test_a_saved_checkpoint_is_a_model(path: Path, copied: Path) -> None:
    model, stored = load_model(copied), reading(path)
    x = torch.from_numpy(features(path))
    assert torch.equal(x, stored["x"])
    torch.testing.assert_close(model(x), stored["y"].to(model(x).dtype), rtol=1e-5, atol=1e-5)
    predictions = predict(copied, features(path))
    if "regression" in path.name:
        assert predictions.values == pytest.approx(stored["y"][:, 0].numpy(), rel=1e-5)
    else:
        assert predictions.labels.tolist() == [["elm", "oak", "yew"][index] for index in stored["y"].argmax(1)]


@files("train_*.pt")
def test_a_saved_checkpoint_resumes_with_the_numbers_of_its_version(path: Path, copied: Path) -> None:
    stored = json.loads((path.parent / "outputs.json").read_text())[path.name]["history"]
    task: Any = "regression" if "regression" in path.name else "classification"
    config = Config(
        data=copied.with_suffix(".npz").name,
        task=task,
        checkpoint=str(copied),
        hidden=(8,),
        batch_size=16,
        lr=0.02,
        dropout=0.1,
        workers=0,
        device="cpu",
        epochs=4,
        resume=True,
    )
    history = [dataclasses.asdict(epoch) for epoch in train(config, report=lambda text: None).history]
    assert len(history) == len(stored) == 4
    for now, then in zip(history, stored):
        numbers = [name for name, value in then.items() if isinstance(value, float) and "second" not in name]
        assert numbers
        assert {name: now[name] for name in numbers} == pytest.approx({name: then[name] for name in numbers}, rel=1e-4)


@files("trained_model.pt")
def test_a_saved_trained_model_gives_its_stored_output(path: Path) -> None:
    assert_gives(load(path), path)


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def exported(path: Path) -> nn.Module:
    """The program in a file. Skips the test if a newer torch saved it, because torch does not promise to load it."""
    writer = json.loads((path.parent / "versions.json").read_text())["torch"]
    if version_tuple(torch.__version__) < version_tuple(writer):
        pytest.skip(f"torch {writer} exported the file, and torch {torch.__version__} is older")
    return torch.export.load(path).module()


@files("exported_*.pt2")
def test_a_saved_program_gives_its_stored_output(path: Path) -> None:
    program, stored = exported(path), reading(path)
    with torch.no_grad(), count_launches() as launches:
        y = program(stored["x"])
        torch.testing.assert_close(program(torch.cat([stored["x"]] * 2)), torch.cat([y, y]))  # another batch size
    torch.testing.assert_close(y, stored["y"])
    assert bool(launches) == path.name.startswith(("exported_operator_of_kernels", "exported_operator_for_training"))


@files("exported_plain.pt2")
def test_a_saved_plain_program_trains(path: Path) -> None:
    assert_gives(exported(path), path)


@files("exported_operator_for_training.pt2")
def test_a_saved_program_with_the_operator_trains(path: Path) -> None:
    program = exported(path)
    assert_gives(program, path)
    assert all(parameter.grad is not None for parameter in program.parameters())


@files("table_schema_*.json")
def test_a_saved_table_is_read_and_its_rows_for_torch_are_used(path: Path, table_folder: Path) -> None:
    """Read a saved table as the user's table. Torch must run where a row says so.

    Tables before schema 3 do not name the kernels that they measured, so their rows for our kernels are not used.
    """
    written = json.loads(path.read_text())
    assert written["schema"] == int(path.stem[-1])
    # With another Triton, only tiles that this version would measure are used, which another test checks.
    written["versions"]["triton"] = ".".join(map(str, tables.TRITON_VERSION)) + ".0"
    user = tables.user_path(written["device"])
    user.parent.mkdir(parents=True)
    user.write_text(json.dumps(written))
    paths.forget_tables()
    device = dataclasses.replace(DEVICES["NVIDIA H100"], name=written["device"])
    assert len(written["gemms"]) == 6
    for row in written["gemms"]:
        out, wide, rows = row["width_out"], row["width_in"], row["rows"]
        m, n, k = {"forward": (rows, out, wide), "dgrad": (rows, wide, out), "wgrad": (out, wide, rows)}[row["kind"]]
        activations = [row["activation"]] if "activation" in row else ["relu", "gelu", "identity"]
        for activation in activations:
            if row["kind"] == "wgrad" and activation != "identity":
                continue
            problem = Problem(row["kind"], m, n, k, getattr(torch, row["dtype"]), row["precision"], True, activation)
            choice = tables.choice_for(problem, device)
            assert f"measured on {written['device']}" in choice.source
            if row["tile"] is None:
                assert choice.tile is None
    networks = written["networks"]
    assert len(networks) == (0 if written["schema"] == 1 else 2)
    for row in networks:
        dtype = getattr(torch, row["dtype"])
        asked = (tuple(row["widths"]), dtype, row["precision"], row["activation"], row["training"], device)
        assert written["schema"] > 2 or tables.path_for(*asked) == (row["path"] if row["path"] == "torch" else None)
