"""Compiles every Triton kernel ahead of time, without a GPU, and prints what ptxas says of each as JSON lines.

Run by test_kernels.py in a process of its own: there Triton must not interpret.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from muse_fast.kernels import dino_loss

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
INTEGERS = {"teacher_rows", "student_rows", "pairs", "first_pair"}
FULL_PRECISION = {"center", "stats", "student_stats", "teacher_stats", "loss", "loss_gradient"}
KERNELS: list[tuple[Any, dict[str, Any]]] = [
    (dino_loss.row_stats_kernel, {"CENTERED": True}),
    (dino_loss.pair_loss_kernel, {}),
    (dino_loss.student_gradient_kernel, {}),
]


def signature(kernel: Any, constants: dict[str, Any], logits: str) -> dict[str, str]:
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = "*i64"
        elif name in FULL_PRECISION:
            types[name] = "*fp32"
        elif name.endswith("stride"):
            types[name] = "i64"
        elif name.startswith("inverse"):
            types[name] = "fp32"
        else:
            types[name] = logits
    return types


def ptxas_report(ptx: str, arch: int) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(ptx)
        source.flush()
        suffix = "a" if arch >= 90 else ""
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name=sm_{arch}{suffix}",
            source.name,
            "-o",
            "/dev/null",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> None:
    for arch in (80, 90):
        for dtype, logits in POINTER.items():
            for kernel, flags in KERNELS:
                constants = flags | {"NUM_COLUMNS": 65536, "BLOCK": dino_loss.BLOCK}
                source = ASTSource(kernel, signature(kernel, constants, logits), constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
                report = ptxas_report(compiled.asm["ptx"], arch)
                row = {
                    "kernel": kernel.__name__,
                    "arch": arch,
                    "dtype": str(dtype),
                    "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
                    "registers": int(re.findall(r"Used (\d+) registers", report)[0]),
                    "shared_bytes": compiled.metadata.shared,
                }
                print(json.dumps(row))


if __name__ == "__main__":
    main()
