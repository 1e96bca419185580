"""Triton kernels compiled for chips none of which is needed: what they take there, and how they load and multiply."""

import re
import subprocess

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

KILO = 1024
# bytes of shared memory that one program may have
SHARED = {
    80: 163 * KILO,
    86: 99 * KILO,
    89: 99 * KILO,
    90: 227 * KILO,
    100: 227 * KILO,
    103: 227 * KILO,
    120: 99 * KILO,
    "gfx942": 64 * KILO,
}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def target(chip):
    """The chip as kernels' `launch_options` name it."""
    return chip if isinstance(chip, int) else "hip"


def compile_kernel(kernel, chip, types, constants, launch):
    """types: of the arguments that are neither constants nor whole numbers. launch: what `launch_options` gives."""
    stages = ("num_warps", "num_stages", "enable_fp_fusion")
    constants = {**constants, **{key: value for key, value in launch.items() if key not in stages}}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    device = GPUTarget("cuda", chip, 32) if isinstance(chip, int) else GPUTarget("hip", chip, 64)
    return triton.compile(source, target=device, options={key: launch[key] for key in stages})


def resources(kernel, chip, folder):
    """Registers a thread, bytes or registers spilled, and bytes of shared memory."""
    if not isinstance(chip, int):
        registers, spills = (
            int(re.search(rf"\.vgpr_{key}:\s*(\d+)", kernel.asm["amdgcn"])[1]) for key in ("count", "spill_count")
        )
        return registers, spills, kernel.metadata.shared
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    arch = nvidia.sm_arch_from_capability(chip)
    command = [nvidia.get_ptxas(chip).path, "-v", f"--gpu-name={arch}", source, "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return (
        int(re.search(r"Used (\d+) registers", report)[1]),
        sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report).groups())),
        kernel.metadata.shared,
    )


def do_not_fit(kernels, chip, folder):
    """Those of (label, compiled kernel, allowed spills) that spill more, or need too much shared memory: a line each."""
    failures = []
    for label, kernel, allowed in kernels:
        registers, spills, shared = resources(kernel, chip, folder)
        line = f"{label}: {registers} registers, {spills} spilled, {shared} of {SHARED[chip]} bytes shared"
        print(line)
        if spills > allowed or shared > SHARED[chip]:
            failures.append(line)
    return "\n".join(failures)


def load_sizes(kernel):
    """How many bytes the loads from global memory take each, of a kernel compiled for CUDA: a set."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)\s", kernel.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\S*\s+\[[^]]*\], \[[^]]*\], (\w+)", kernel.asm["ptx"])
    return {int(count or 1) * int(bits) // 8 for count, bits in loads} | {int(size, 0) for size in copies}
