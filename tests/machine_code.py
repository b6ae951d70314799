"""Registers, spills and instructions of a compiled kernel, read from its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mlp_fused.kernels import planes

__all__ = ["read_amdgcn", "read_cubin"]


def read_cubin(compiled: Any, precision: str) -> dict[str, int]:
    """Read registers, spills and instructions from cuobjdump and the PTX. A spilled word is four bytes of stack.

    Waits are counted only for one-pass kernels and products of planes, and instructions for the latter.
    """
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        ptx, waits, instructions = compiled.asm["ptx"], 0, 0
        slow = "one_pass" in compiled.metadata.name or precision in planes.PLANES
        if slow and "wgmma" in ptx:  # reading machine code takes as long as compiling it
            sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
            waits = len(re.findall(r"WARPGROUP\.DEPBAR", sass))  # one per product if products are serialised
            by_planes = precision in planes.PLANES and compiled.metadata.name.split("_")[0] != "network"
            instructions = count_in_loop(sass) if by_planes else 0
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert match, usage.stdout
    return {
        "registers": int(match[1]),
        "spills": int(match[2]) // 4,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "waits": waits,
        "instructions": instructions,
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "tma": len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "setmaxnreg": len(re.findall(r"setmaxnreg", ptx)),
        "to_16_bits": len(re.findall(r"cvt\.rn\S*\.b?f16", ptx)),
        "with_relu": len(re.findall(r"cvt\.rn\.relu", ptx)),
    }


EPILOGUE = 60  # the fewest instructions of an epilogue; other jumps in a loop are shorter


def count_in_loop(sass: str) -> int:
    """Count the instructions of the loop that multiplies. An epilogue that most iterations jump over does not count."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    indices = {int(address, 16): index for index, (address, _) in enumerate(code)}
    jumps = {
        index: indices[int(target[1], 16)]
        for index, (_, text) in enumerate(code)
        if (target := re.match(r"@\S+ BRA\b.*?(0x[0-9a-f]+)", text))
    }
    products = [index for index, (_, text) in enumerate(code) if "HGMMA" in text]
    loops = [(end, start) for end, start in jumps.items() if start <= products[0] and products[-1] <= end]
    end, index = min(loops, key=lambda loop: loop[0] - loop[1])
    count = 0
    while index <= end:
        after = jumps.get(index, 0)
        is_epilogue = index + EPILOGUE < after <= end and not any(index < product < after for product in products)
        index = after if is_epilogue else index + 1
        count += 1
    return count


def read_amdgcn(text: str) -> dict[str, int]:
    """Read registers, spills and instructions from the assembler's summary."""

    def summary(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", text)
        assert match, name
        return int(match[1])

    return {
        "registers": summary("vgpr_count"),
        "spills": summary("vgpr_spill_count"),
        "mfma": len(re.findall(r"\bv_mfma", text)),
    }
