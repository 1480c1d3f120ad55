"""The Triton kernels: run where there is no GPU, and compiled for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # there is none for macOS


def test_kernels_compute_attention():
    # A process of its own: triton reads TRITON_INTERPRET once, and then it holds for good.
    interpret = "0" if torch.cuda.is_available() else "1"
    tests = Path(__file__).with_name("kernels_in_their_own_process.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    ended = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": interpret}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minitune.fast import triton_attention as kernels

types = {"cu_q": "*i32", "cu_k": "*i32", "Lse": "*fp32", "Delta": "*fp32"}
sizes = ["M", "T", "H", "q_stride", "q_head_stride", "kv_stride", "kv_head_stride"]
types |= dict.fromkeys(sizes, "i32")
for capability, dtype, size, D in (80, "bf16", 2, 128), (90, "fp16", 2, 128), (80, "fp32", 4, 32):
    options = dict(kernels.TILES[size])
    constants = {"D": D, "TILE": options.pop("TILE")}
    for kernel in kernels.forward_kernel, kernels.dq_kernel, kernels.dkdv_kernel:
        signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constants)
        program = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert program.metadata.shared <= 99 * 1024, (kernel, dtype, program.metadata.shared)
        assert not re.search(r"\\b(atom|red)\\.", program.asm["ptx"]), kernel
"""


def test_kernels_compile_fit_and_have_no_atomics(tmp_path):
    # The interpreter takes what the compiler refuses, and knows no limits.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
