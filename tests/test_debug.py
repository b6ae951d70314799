"""MLP_FUSED_DEBUG=1 names the layer of an error and changes no result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from out_of_memory import on_call
from readme import ROOT, readme

from mlp_fused.engine.schedule import Step, run_checked
from mlp_fused.environment import SWITCHES

SETUP = """
import torch
from mlp_fused import FusedMLP
from torch.utils._python_dispatch import TorchDispatchMode

class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **keywords or {})

torch.manual_seed(0)
model = FusedMLP(4, [5, 6, 3])
x = torch.randn(2, 4)
"""


POISON = "model[3].weight.data[0, 0] = float('nan')\n"


FORWARD = r"layer 1 \(relu\), forward: 2 of 12 elements of h are NaN or infinite"


DEBUGGED = {
    "training": (POISON + "model(x)", FORWARD),
    "inference": (POISON + "with torch.inference_mode(): model(x)", FORWARD),
    "repeated": ("model(x)\nmodel(x)\n" + POISON + "model(x)", FORWARD),
    "registered operator": (POISON + "with Mode(): model(x)", FORWARD),
    "registered operator, inference": (
        POISON + "with torch.no_grad(), Mode(): model(x)",
        FORWARD,
    ),
    "input": ("model(x * float('inf'))", r"layer 0 \(relu\), forward: \d+ of 10 elements of h are NaN or infinite"),
    "backward": (
        "model(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 2 \(identity\), dgrad: \d+ of 12 elements of dx are NaN or infinite",
    ),
    "backward of a registered operator": (
        "with Mode(): model(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 2 \(identity\), dgrad: \d+ of 12 elements of dx are NaN or infinite",
    ),
    "parameters alone": (
        "FusedMLP(4, [3])(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 0 \(identity\), wgrad: \d+ of 12 elements of dw are NaN or infinite",
    ),
}


# One process for all of them: it reads programs, and writes the last line of each one's traceback.
RUN_PROGRAMS = """
import json, sys, traceback

messages = {}
for name, program in json.load(sys.stdin).items():
    try:
        exec(program, {})
        messages[name] = ""
    except Exception as error:
        messages[name] = traceback.format_exception_only(error)[-1].strip()
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    programs = {name: SETUP + program for name, (program, _) in DEBUGGED.items()}
    done = python(RUN_PROGRAMS, json.dumps(programs), MLP_FUSED_DEBUG="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.alone
@pytest.mark.parametrize("name", DEBUGGED)
def test_debugging_names_the_layer(name: str, messages: dict[str, str]) -> None:
    _, sentence = DEBUGGED[name]
    assert re.match(f"FloatingPointError: {sentence}$", messages[name])


@pytest.mark.alone
def test_memory_between_partial_sums_is_not_checked() -> None:
    """In deterministic mode, torch fills new memory with NaN. dW has 15 columns, and db begins at the 17th."""
    code = SETUP + "torch.use_deterministic_algorithms(True)\n"
    code += "FusedMLP(5, [3])(torch.randn(4096, 5)).sum().backward()"
    done = python(code, MLP_FUSED_DEBUG="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.alone
def test_debugging_changes_no_result() -> None:
    code = SETUP + "y = model(x); y.sum().backward(); y = model(x)\nprint(y.tolist(), model[0].weight.grad.tolist())"
    code = code.replace("model =", "torch.manual_seed(0); model =")
    assert python(code, MLP_FUSED_DEBUG="1").stdout == python(code).stdout != ""


def python(code: str, input: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    kernels = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "MLP_FUSED_BACKEND": "triton"}
    return subprocess.run(
        [sys.executable, "-c", code],
        input=input,
        env={**os.environ, **kernels, **environment},
        capture_output=True,
        text=True,
    )


def test_debugging_names_the_layer_whose_kernel_fails() -> None:
    """The wait before a step reports an illegal access of an earlier kernel without the name of this step's layer."""
    step = Step("forward", "layer 0 (identity)", "0: 4 -> 3", {}, (), lambda: None)
    message = "CUDA error: an illegal memory access was encountered"

    def illegal() -> None:
        raise RuntimeError(message)

    for call, sentence in ((1, message), (2, f"layer 0 (identity), forward: {message}")):
        with pytest.raises(RuntimeError) as caught:
            run_checked(step, {}, wait=on_call(call, illegal))
        assert str(caught.value) == sentence


@pytest.mark.alone
def test_the_readmes_example_of_debugging(tmp_path: Path) -> None:
    """Run the README's command and program, and compare the output with the README's."""
    program, sentence = re.findall(r"^```(?:python)?\n(.*?)^```", readme("debug"), re.MULTILINE | re.DOTALL)
    command = re.search(r"`(MLP_FUSED_DEBUG=1 .*) python nan.py`", readme("debug"))
    assert command
    (tmp_path / "nan.py").write_text(program)
    switches = dict(switch.split("=") for switch in command[1].split())
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    process = subprocess.run(
        [sys.executable, "nan.py"],
        cwd=tmp_path,
        env={**clean, **switches, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.stderr.strip().splitlines()[-1] == sentence.strip()
