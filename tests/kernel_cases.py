"""Compiles Triton kernels for GPUs that are not here, with the tiles that ship.

A kernel's test file writes a short list and one test:

    CASES = [
        Case("harkd.kernels.lora_triton:_backward", {"x": "*bf16", "a": "*bf16", "out": "*fp32", "rows": "i32", "width": "i32:16"},
             {"RANK": 16, "BLOCK_M": 64}, num_warps=4, num_stages=3, matrix=True),
    ]

    @each_target
    def test_kernels_compile(target):
        assert_compiles(CASES, target)

Signature types are Triton's; a pointer counts as aligned to 16 bytes, as torch allocates, an integer ends in `:16` where it is always a
multiple of 16. Arguments not in the signature are constants (also an argument whose value is 1, which Triton makes one). A constant such as
"tl.bfloat16" names a type. Where tiles differ by GPU, write one case for each with `targets`.

`wide` is how many pointers at least are moved by 64 bits: those that reach rows beyond 2^31 elements.

All cases of a list are compiled in one child process without TRITON_INTERPRET, since under it @triton.jit gives no kernel that compiles, and
without a cache. A case fails on an error, on an atomic operation, on a register that is spilled, on more shared memory than the chip has, and, where `matrix` is
set, on sm_90 code without wgmma. The ordinary suite compiles for sm_90, `-m slow` for the others.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace

import pytest

from tests.helpers import ROOT

TARGETS = {  # backend, architecture, threads of a warp, bytes of shared memory that one block may have
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
each_target = pytest.mark.parametrize("target", [name if name == "sm_90" else pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])


@dataclass(frozen=True)
class Case:
    """One kernel with the types and constants of one launch; `kernel` is "module:function"."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    matrix: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    wide: int = 0


def compile_cases(cases: list[Case]) -> list[dict]:
    """One result for each case and target: `name`, `error` (None where all is well), `shared`, `spills`, `registers`, `wgmma`."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        command = [sys.executable, "-m", "tests.kernel_cases"]
        text = json.dumps([asdict(case) for case in cases])
        child = subprocess.run(command, input=text, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def assert_compiles(cases: list[Case], target: str | None = None) -> None:
    """Every case compiles for each of its targets, or for this one of them, within the chip's registers and shared memory."""
    cases = [replace(case, targets=(target,)) for case in cases if target in case.targets] if target else cases
    results = compile_cases(cases)
    assert len(results) == sum(len(case.targets) for case in cases) > 0
    wrong = [f"{result['name']}: {result['error']}" for result in results if result["error"]]
    assert not wrong, "\n".join(wrong)


def _source(case: dict):
    from triton import language as tl
    from triton.compiler import ASTSource

    module, _, name = case["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    missing = set(names) - set(case["signature"]) - set(case["constants"])
    unknown = (set(case["signature"]) | set(case["constants"])) - set(names)
    if missing or unknown:
        raise TypeError(f"arguments missing {sorted(missing)}, unknown {sorted(unknown)}")
    types = {name: case["signature"].get(name, "constexpr") for name in names}
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    constants = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value for name, value in case["constants"].items()
    }
    return ASTSource(kernel, {name: kind.removesuffix(":16") for name, kind in types.items()}, constants, attributes)


def _result(case: dict, target: str) -> dict:
    """What one compilation gave. Spills: bytes that ptxas stores and loads, or registers that LLVM spills for AMD."""
    import triton
    from triton.backends.compiler import GPUTarget

    backend, architecture, warp, limit = TARGETS[target]
    constants = ", ".join(f"{name}={value}" for name, value in case["constants"].items())
    result = {"name": f"{case['kernel']} ({constants}) on {target}", "error": None}
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            options = {"num_warps": case["num_warps"], "num_stages": case["num_stages"]}
            compiled = triton.compile(_source(case), target=GPUTarget(backend, architecture, warp), options=options)
    except Exception as error:  # whatever a compiler may raise is this case's result, and the test fails with it
        return result | {"error": f"{type(error).__name__}: {error}\n{log.getvalue()[-2000:]}"}
    if backend == "cuda":
        text = log.getvalue()
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
        registers = re.findall(r"Used (\d+) registers", text)
    else:
        text = compiled.asm["amdgcn"]
        spills = re.findall(r"\.[sv]gpr_spill_count: +(\d+)", text)
        registers = re.findall(r"\.vgpr_count: +(\d+)", text)
    if not spills or not registers:
        return result | {"error": "the compiler tells nothing of registers"}
    spilled, shared, wgmma = sum(map(int, spills)), compiled.metadata.shared, "wgmma" in compiled.asm.get("ptx", "")
    result |= {"shared": shared, "spills": spilled, "registers": max(map(int, registers)), "wgmma": wgmma}
    if spilled:
        result["error"] = f"spills {spilled}"
    elif "tt.atomic" in compiled.asm["ttir"]:
        result["error"] = "atomics, which add up in no fixed order"
    elif shared > limit:
        result["error"] = f"{shared} bytes of shared memory, the chip has {limit}"
    elif len(re.findall(r"tt\.addptr .*, (?:tensor<[0-9x]+)?i64", compiled.asm["ttir"])) < case["wide"]:
        result["error"] = "offsets of 32 bits"
    elif case["matrix"] and target == "sm_90" and not wgmma:
        result["error"] = "no wgmma"
    return result


if __name__ == "__main__":
    print(json.dumps([_result(case, target) for case in json.load(sys.stdin) for target in case["targets"]]))
