"""The kernels of LoRA, RMSNorm, rotary embedding and SwiGLU compile for every target with the tiles that ship (one child process for all)."""

import torch

from harkd.kernels import lora_triton, rms_norm_triton, rope_triton
from harkd.kernels.tiles import ANY, tile_for
from tests.kernel_cases import TARGETS, Case, assert_compiles, each_target


def bf16(names):
    return {name: "*bf16" for name in names.split()}


def rms_norm():
    numbers = {"rows": "i32", "size": "i32:16", "eps": "fp32"}
    tiles = {width: rms_norm_triton._launch(torch.empty(0), width) for width in (1024, 5120)}
    launch, wide = ({"ROWS": rows, "BLOCK": block, "ADD": True} for rows, block, _ in tiles.values())
    yield Case("harkd.kernels.rms_norm_triton:_forward", bf16("x hidden weight h y") | numbers, launch, tiles[1024][2], wide=4)
    backward, wide = bf16("h weight dh dy dx") | {"dw": "*fp32"} | numbers, wide | {"BLOCKS": rms_norm_triton.TRAINED_BLOCKS, "TRAINED": True}
    yield Case("harkd.kernels.rms_norm_triton:_backward", backward, wide, tiles[5120][2], wide=4)


def rope():
    numbers = {"tokens": "i32", "q_heads": "i32:16", "k_heads": "i32", "q_stride": "i32:16", "k_stride": "i32:16", "eps": "fp32"}
    *_, launch = rope_triton._launch(torch.empty(1, 16, 128), torch.empty(1, 8, 128))
    warps, inputs = launch.pop("num_warps"), "q k q_weight k_weight cos sin "
    yield Case("harkd.kernels.rope_triton:_forward", bf16(inputs + "q_out k_out") | numbers, launch, warps)
    backward = bf16(inputs + "dq_out dk_out dq dk") | {"dw": "*fp32"} | numbers
    yield Case("harkd.kernels.rope_triton:_backward", backward, launch | {"TRAINED": True}, warps)


def swiglu():
    tile, numbers = tile_for("swiglu", 0, ANY), {"size": "i32:16", "gate_stride": "i32:16", "up_stride": "i32:16"}
    for kernel, names in (("_forward", "gate up y"), ("_backward", "gate up dy dgate dup")):
        yield Case(f"harkd.kernels.swiglu_triton:{kernel}", bf16(names) | numbers, {"BLOCK": tile.n}, tile.warps)


def lora(rank, targets):
    tile = tile_for("lora_backward", rank, ANY)
    numbers = {"rows": "i32", "columns": "i32:16", "low_stride": "i32:16", "rank": "i32:16", "scale": "fp32"}
    signature = bf16("low b dy") | numbers | {"ds": "*fp32", "db": "*fp32", "span": "i32:16"}
    constants = {"RANK": rank, "BLOCK_M": tile.m, "BLOCK_N": tile.n}
    return Case("harkd.kernels.lora_triton:_backward", signature, constants, tile.warps, tile.stages, True, targets, 4)


@each_target
def test_kernels_compile(target):
    cases = [*rms_norm(), *rope(), *swiglu()]
    cases += [lora(16, tuple(TARGETS)), lora(lora_triton.LARGEST_FUSED_RANK, ("sm_80", "sm_90"))]
    assert_compiles(cases, target)
