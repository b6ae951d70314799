"""Make a file for bench/results from the raw logs of a run: `python -m bench.readings tests/data/h100 --out FILE`.

The folder has origin.json (GPU, date, commit, versions, method of timing) and the logs: cells.jsonl (networks against
nn.Sequential) and, if they were measured, tinycudann.log, quack.log, transfer.log, planes.jsonl and
narrow_float32.jsonl (full fp32 on tensor cores). bench/results/README.md describes the file.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.problem import Problem
from mlp_fused import files

FORMAT = "readings"  # the value of "format"; files of bench/gpu.py have a "schema" instead

# The systems that compute a network. "eager" is nn.Sequential, "compile" is torch.compile of it. "captured" and
# "captured_eager" are captured steps of ours and of nn.Sequential. tiny-cuda-nn runs as its PyTorch module, or by the
# functions under it ("direct"), each with and without JIT fusion. quack runs with and without autotuning.
SYSTEMS = (
    *("ours", "eager", "compile", "captured", "captured_eager"),
    *("tinycudann", "tinycudann_direct", "tinycudann_jit", "tinycudann_jit_direct", "quack", "quack_tuned"),
)

# The networks in cells.jsonl, by name.
CELLS = {
    "seed": Problem((784, 512, 512, 10), 256, cross_entropy=True),
    "narrow32": Problem((32,) * 5, 2**20, "bf16"),
    "narrow64": Problem((64,) * 5, 2**20, "bf16"),
    "narrow64-gelu": Problem((64,) * 5, 2**20, "bf16", "gelu"),
    "narrow64-fp32": Problem((64,) * 5, 2**20),
    "narrow128": Problem((128,) * 5, 2**20, "bf16"),
    "narrow128x5": Problem((*(128,) * 6, 3), 2**18, "bf16"),
    "narrow16-64-64-16": Problem((16, 64, 64, 16), 2**21, "fp16"),
    "wide-in": Problem((784, 128, 128, 10), 2**16, "bf16"),
    "middle256": Problem((256,) * 5, 16384, "bf16", "gelu"),
    "middle512": Problem((512,) * 5, 16384, "bf16", "gelu"),
    "middle512relu": Problem((512,) * 5, 16384, "bf16"),
    "middle1024": Problem((1024,) * 5, 16384, "bf16", "gelu"),
    "large1024": Problem((1024, 4096, 1024), 8192, "bf16", "gelu"),
    "large4096": Problem((4096, 16384, 4096), 8192, "bf16", "gelu"),
    "large4096-1k": Problem((4096, 16384, 4096), 1024, "bf16", "gelu"),
    "fp32-1024": Problem((1024, 4096, 1024), 8192, activation="gelu"),
    "fp32-4096": Problem((4096, 16384, 4096), 2048, activation="gelu"),
    "tf32-1024": Problem((1024, 4096, 1024), 8192, activation="gelu"),
    "odd1000": Problem((1000,) * 4, 4099, "bf16"),
    "latency1": Problem((784, 512, 512, 10), 1),
    "latency-n64": Problem((64,) * 5, 64, "bf16"),
}
TF32 = ("tf32-1024",)  # the cells that ran with tf32 allowed

# The names of phases and systems in cells.jsonl.
PHASES = {"fwd": "inference", "train": "training", "step": "step"}
CELL_SYSTEMS = {
    **{name: name for name in ("ours", "eager", "compile")},
    "captured ours": "captured",
    "captured eager": "captured_eager",
}

Record = dict[str, Any]


def network(
    name: str,
    problem: Problem,
    phase: str,
    systems: Mapping[str, Record],
    *,
    precision: str | None = None,
    bias: bool = True,
    input_gradient: bool | None = False,
    path: str | None = None,
    difference: float | None = None,
    error_float64: Mapping[str, float] | None = None,
) -> Record:
    """Make the record of one network in one phase. Entries that were not measured or recorded are None."""
    if unknown := set(systems) - set(SYSTEMS):
        raise ValueError(f"{name} has the systems {', '.join(sorted(unknown))}; they need to be in SYSTEMS")
    return {
        "id": f"{name}-{phase}" + "-dx" * bool(input_gradient),
        "widths": list(problem.widths),
        "rows": problem.rows,
        "dtype": problem.dtype,
        "precision": precision,
        "activation": problem.activation,
        "bias": bias,
        "phase": phase,
        "input_gradient": input_gradient,
        "path": path,
        "systems": {system: systems.get(system) for system in SYSTEMS},
        "difference": difference,
        "error_float64": error_float64,
    }


def reading(loop_ms: float, spread: tuple[float, float] | None = None, device: Record | None = None) -> Record:
    """Make the record of one system's milliseconds. `device` has the times of its kernels."""
    low, high = spread or (None, None)
    rest = device or {"device_ms": None, "kernels": None}
    return {"loop_ms": loop_ms, "loop_low_ms": low, "loop_high_ms": high, **rest}


# cells.jsonl


def cells(text: str) -> Iterator[Record]:
    """Yield the networks of cells.jsonl, which has one cell per line."""
    for line in text.splitlines():
        cell = json.loads(line)
        problem = CELLS[cell["cell"]]
        precision = None if problem.dtype != "fp32" else "tf32" if cell["cell"] in TF32 else "ieee"
        for short, phase in PHASES.items():
            timed = {name.removeprefix(f"{short} "): name for name in cell["ms"] if name.startswith(f"{short} ")}
            if not timed:
                continue
            errors = cell.get("err64", {}).get(short)
            yield network(
                cell["cell"],
                problem,
                phase,
                {CELL_SYSTEMS[system]: _cell_reading(cell, name) for system, name in timed.items()},
                precision=precision,
                path=cell["path"],
                difference=cell.get("rel", {}).get(short),
                error_float64=None if errors is None else dict(zip(("ours", "eager"), errors, strict=True)),
            )


def _cell_reading(cell: Record, name: str) -> Record:
    median, low, high = cell["ms"][name]
    if name not in cell["dev"]:
        return reading(median, (low, high))
    kernels = [{"name": kernel, "ms": ms, "launches": count} for kernel, (ms, count) in cell["kernels"][name]]
    return reading(median, (low, high), {"device_ms": cell["dev"][name], "kernels": kernels})


# tinycudann.log and quack.log


def tinycudann(text: str) -> Iterator[Record]:
    """Yield the networks of tinycudann.log: fp16, relu, no bias.

    In this log, every backward of tiny-cuda-nn computes the gradient of x, but eager's does not.
    """
    for title, body in re.findall(r"^(W\d+ hidden .*)\n((?:  .*\n)+)", text, re.MULTILINE):
        width, hidden, first, last, rows = map(int, re.findall(r"\d+", title))
        problem = Problem((first, *(width,) * hidden, last), rows, "fp16")
        logged = {name: ast.literal_eval(numbers) for name, numbers in re.findall(r"^  (\D+) (\{.*\})$", body, re.M)}
        ours = logged["ours"]
        theirs = {"tinycudann": logged["tcnn"], "tinycudann_jit": logged.get("tcnn jit")}

        def their_readings(name: str, theirs: Mapping[str, Record | None] = theirs) -> dict[str, Record]:
            return {
                f"{system}{suffix}": reading(numbers[f"{name}_{interface}"])
                for system, numbers in theirs.items()
                if numbers is not None
                for interface, suffix in (("user", ""), ("raw", "_direct"))
            }

        phases: tuple[tuple[str, bool, dict[str, Record]], ...] = (
            ("inference", False, _our_readings(ours, "inference", "eager_inference") | their_readings("inference")),
            ("training", False, _our_readings(ours, "fwd_bwd", "eager_fwd_bwd")),
            ("training", True, _our_readings(ours, "fwd_bwd_dx") | their_readings("fwd_bwd")),
        )
        for phase, input_gradient, systems in phases:
            name = f"tinycudann-{problem}"
            yield network(name, problem, phase, systems, bias=False, input_gradient=input_gradient, path=ours["path"])


def _our_readings(ours: Mapping[str, float], name: str, eager: str | None = None) -> dict[str, Record]:
    return {"ours": reading(ours[name])} | ({} if eager is None else {"eager": reading(ours[eager])})


def quack(text: str) -> Iterator[Record]:
    """Yield the network of quack.log, without and with quack's autotuning: gelu_tanh, no bias.

    The log has no dtype, and does not record if the backward computed the gradient of x.
    """
    for line in text.splitlines():
        if not (match := re.match(r"(\d+)x([\d>-]+) tuned=(\w+) .*?: (\{.*?\});", line)):
            continue
        rows, widths, tuned, numbers = match.groups()
        problem = Problem(tuple(map(int, widths.split("->"))), int(rows), activation="gelu_tanh")
        names = {"ours": "ours", "eager": "eager", "quack": "quack_tuned" if tuned == "True" else "quack"}
        times = {names[system]: both for system, both in ast.literal_eval(numbers).items()}
        for i, phase in enumerate(("inference", "training")):
            systems = {system: reading(both[i]) for system, both in times.items()}
            input_gradient = None if phase == "training" else False
            record = network(names["quack"], problem, phase, systems, bias=False, input_gradient=input_gradient)
            yield {**record, "dtype": None}


# transfer.log

DURATION = re.compile(r"([\d.e+]+) (s|ms|µs)")
UNITS = {"s": 1e3, "ms": 1.0, "µs": 1e-3}


def durations(text: str) -> list[float]:
    """Return all times in a text, in milliseconds."""
    return [float(f"{float(value) * UNITS[unit]:.6g}") for value, unit in DURATION.findall(text)]


def transfer(text: str) -> Record:
    """Parse the output of `mlp-fused transfer` for one network. Older logs have the title "every time after that"."""
    parts = dict(re.findall(r"^(\S.*)\n((?:  .+\n|\n(?=  ))+)", text, re.MULTILINE))
    by_title = {title.split(",")[0].split(" (")[0]: body for title, body in parts.items()}
    (network_line,) = re.findall(r"^(.+ parameters, input .+)$", text, re.MULTILINE)
    return {
        "network": network_line,
        "first_touch_ms": _first_touch(by_title["first touch"]),
        "each_time": [*_each_time(by_title.get("after the first call") or by_title["every time after that"])],
        "on_cpu_ms": {
            name: durations(cells)[0]
            for name, cells in re.findall(r"^  (\w+) (?:on the CPU) +(.*)$", text, re.MULTILINE)
        },
        "steps": [*_steps(by_title["a step by batch size"])],
    }


def _first_touch(body: str) -> dict[str, float]:
    """Return the milliseconds of first calls by name. The first forward has two, for compiled and loaded kernels."""
    ms: dict[str, float] = {}
    for name, time, note in re.findall(
        r"^  (\w+(?: \w+)?)? {2,}([\d.e+]+ (?:s|ms|µs))(?:  (.*))?$", body, re.MULTILINE
    ):
        ms[f"first forward, {note}" if note else name] = durations(time)[0]
    return ms


def _each_time(body: str) -> Iterator[Record]:
    """Yield the copies, the launch and the kernels at the largest batch, by three clocks."""
    for line in body.splitlines():
        if not (times := durations(line)):
            continue
        device, host, returned = times if len(times) == 3 else (None, times[0], None)
        rate = re.search(r"([\d.]+) +(\d+)%$", line) if len(times) == 3 else None
        yield {
            "name": re.split(r" {2,}", line.strip())[0],
            "device_ms": device,
            "host_ms": host,
            "returned_ms": returned,
            "gbps": float(rate[1]) if rate else None,
            "ceiling_share": int(rate[2]) / 100 if rate else None,
        }


STEP_COLUMNS = ("cpu_ms", "usual_ms", "prefetched_ms", "resident_ms", "copy_ms", "launch_ms", "kernels_ms")


def _steps(body: str) -> Iterator[Record]:
    """Yield a step for each batch size: on the CPU, in three ways on the GPU, its parts, and the slowest part."""
    for rows, nbytes, rest in re.findall(r"^ +([\d,]+) +([\d,]+)  (.+)$", body, re.MULTILINE):
        yield {
            "rows": int(rows.replace(",", "")),
            "bytes": int(nbytes.replace(",", "")),
            **dict(zip(STEP_COLUMNS, durations(rest), strict=True)),
            "bound": next(part for part, cell in zip(STEP_COLUMNS, re.split(r"  +", rest.strip())) if cell[0] == "*"),
        }


def ceilings(text: str) -> dict[str, float]:
    """Parse the rates of large copies in transfer.log. In the GPU's memory, both read and written bytes count."""
    (line,) = re.findall(r"^ceilings: (.*)$", text, re.MULTILINE)
    to_device, to_host, memory = (float(value) for value in re.findall(r"([\d.]+) GB/s", line))
    return {"memory_gbps": memory, "to_device_gbps": to_device, "to_host_gbps": to_host}


# planes.jsonl and narrow_float32.jsonl

# The kernels of fp16x3 that run in a network 64 wide with relu, by phase, with their tiles (kernels/network_tiles.py).
# The forward of training is called "keeping" in the log: it saves the tensors that the backward reads.
NARROW_KERNELS = {
    "inference": ("forward fp16x3 m64 w4 s1 x2",),
    "training": ("keeping fp16x3 m64 w4 s2 x2", "dgrad fp16x3 m64 w4 s2 x2", "wgrad fp16x3 m64 w4 s3 x2"),
}
NARROW_EAGER = {"inference": "forward eager", "training": "train eager"}


def float32(
    problem: Problem, phase: str, times: tuple[float, float], errors: tuple[float, float], kernels: int | None = None
) -> Record:
    """Make the record of a network in full fp32, by fp16x3 and by torch. Our time is a sum over `kernels` kernels."""
    return {
        "widths": list(problem.widths),
        "rows": problem.rows,
        "activation": problem.activation,
        "phase": phase,
        "summed_kernels": kernels,
        **{
            system: {"ms": ms, "error_float64": error}
            for system, ms, error in zip(("ours", "eager"), times, errors, strict=True)
        },
    }


def planes(text: str) -> Iterator[Record]:
    """Yield the networks of planes.jsonl. Their error is the one of y."""
    lines = [json.loads(line) for line in text.splitlines()]
    errors = {line["case"]: line["y"] for line in lines if line["part"] == "net errors"}
    for line in lines:
        if line["part"] != "nets":
            continue
        widths, activation, rows = line["case"].split()
        problem = Problem(tuple(map(int, widths.split("x"))), int(rows), activation=activation)
        for phase, name in (("inference", "forward"), ("training", "training")):
            ours, eager, _ = line["times"][name]  # the last one is the time of a host call
            yield float32(problem, phase, (ours, eager), tuple(errors[line["case"]]))


def narrow_float32(text: str) -> Iterator[Record]:
    """Yield the network 64 wide with relu of narrow_float32.jsonl. The error of training is the one of wgrad."""
    lines = [json.loads(line) for line in text.splitlines()]
    ms = {line["timed"]: line["ms"] for line in lines if "timed" in line}
    errors = {line["checked"]: (line["error"], line["torch"]) for line in lines if "error" in line}
    for phase, kernels in NARROW_KERNELS.items():
        names = [f"W64 relu {kernel}" for kernel in kernels]
        both = (sum(ms[name] for name in names), ms[f"W64 relu {NARROW_EAGER[phase]}"])
        yield float32(CELLS["narrow64-fp32"], phase, both, errors[names[-1]], len(names))


# The file


def published(folder: Path) -> Record:
    """Return the content of the file for bench/results, from a folder of raw logs. Logs may be missing."""

    def parsed(name: str, parse: Callable[[str], Iterator[Record]]) -> list[Record]:
        path = folder / name
        return [*parse(path.read_text())] if path.exists() else []

    origin = json.loads((folder / "origin.json").read_text())
    log = folder / "transfer.log"
    text = log.read_text() if log.exists() else None
    float32_networks = [*parsed("planes.jsonl", planes), *parsed("narrow_float32.jsonl", narrow_float32)]
    return {
        "format": FORMAT,
        "origin": {name: value for name, value in origin.items() if name != "ceilings"},
        "ceilings": origin["ceilings"] if text is None else ceilings(text),
        "networks": [
            *parsed("cells.jsonl", cells),
            *parsed("tinycudann.log", tinycudann),
            *parsed("quack.log", quack),
        ],
        "transfer": None if text is None else transfer(text),
        **({"float32": float32_networks} if float32_networks else {}),
    }


def written(content: Record) -> str:
    """Return the content as JSON, with one network per line and numbers of six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    content = rounded(content)
    lines = ",\n".join(f"  {json.dumps(network, ensure_ascii=False)}" for network in content["networks"])
    rest = json.dumps({**content, "networks": ["here"]}, indent=1, ensure_ascii=False)
    return rest.replace('[\n  "here"\n ]', f"[\n{lines}\n ]") + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="make a file for bench/results from the raw logs of a run")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with origin.json and the logs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options = parser.parse_args(arguments)
    content = published(options.folder)
    files.write_all({options.out: written(content).encode()})
    print(f"wrote {len(content['networks'])} readings to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
