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
import torch
from minitune.fast import triton_attention as kernels
from minitune.fast.fused_attention import DELTA_ROWS, FUSE, choose_tiles

three = kernels.forward_kernel, kernels.dq_kernel, kernels.dkdv_kernel
types = {"cu_q": "*i32", "cu_k": "*i32", "Lse": "*fp32", "Delta": "*fp32"}
sizes = ["M", "H", "q_stride", "q_head_stride", "kv_stride", "kv_head_stride"]
sizes += ["dq_stride", "dkv_stride"]
types |= dict.fromkeys(sizes, "i32")
dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check(capability, dtype, kernel, **options):
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    program = compile(source, target=GPUTarget("cuda", capability, 32), options=options | FUSE)
    assert program.metadata.shared <= 99 * 1024, (kernel, dtype, program.metadata.shared)
    assert not re.search(r"\\b(atom|red)\\.", program.asm["ptx"]), kernel


for capability, dtype, D, max_seqlen in (90, "bf16", 64, 512), (80, "fp16", 128, 512), (80, "fp32", 32, 9):
    for kernel, tile in zip(three, choose_tiles(dtypes[dtype], D, max_seqlen)):
        check(capability, dtype, kernel, D=D, **tile._asdict())
check(80, "bf16", kernels.forward_kernel, D=64, **choose_tiles(torch.bfloat16, 64, 9)[0]._asdict())
check(80, "bf16", kernels.delta_kernel, D=64, ROWS=DELTA_ROWS)
"""


def test_kernels_compile_fit_and_have_no_atomics(tmp_path):
    # The interpreter takes what the compiler refuses, and knows no limits.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
