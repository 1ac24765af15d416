"""The compile tests themselves: what is sound passes, and each way to go wrong is told."""

from dataclasses import replace

import pytest

from tests.kernel_cases import TARGETS, Case, assert_compiles, compile_cases

SOUND = Case(
    "tests.wrong_kernels:product",
    {"x": "*bf16", "y": "*bf16", "out": "*fp32", "n": "i32:16"},
    {"ROWS": 64, "INNER": 64, "MATRIX": True},
    matrix=True,
)
WRONG = {
    "no wgmma": replace(SOUND, constants=SOUND.constants | {"MATRIX": False}, targets=("sm_90",)),
    "spills": replace(SOUND, constants=SOUND.constants | {"ROWS": 128}, num_warps=1, targets=("sm_80",)),
    "shared memory": replace(SOUND, constants=SOUND.constants | {"ROWS": 128}, num_stages=8, targets=("sm_80",)),
    "offsets of 32 bits": replace(SOUND, constants=SOUND.constants | {"INNER": 32}, wide=9, targets=("sm_80",)),
    "atomics": Case("tests.wrong_kernels:atomic", {"x": "*fp32"}, {"ROWS": 32}, targets=("sm_90",)),
    "CompilationError": Case("tests.wrong_kernels:broken", {"x": "*i32"}, {"n": 3, "ROWS": 32}, targets=("sm_90",)),
    "missing ['n'], unknown ['m']": Case("tests.wrong_kernels:broken", {"x": "*i32"}, {"m": 3, "ROWS": 32}, targets=("gfx942",)),
    "AttributeError": Case("tests.wrong_kernels:nothing", {}, targets=("gfx942",)),
}
OVERFULL = replace(WRONG["spills"], targets=("gfx942",))


@pytest.fixture(scope="module")
def results():
    return compile_cases([SOUND, *WRONG.values(), OVERFULL])


def test_sound_kernel_compiles_for_every_target(results):
    for result, target in zip(results, TARGETS, strict=False):
        assert result["name"].endswith(target) and result["error"] is None and result["spills"] == 0
        assert 0 < result["shared"] <= TARGETS[target][3] and 0 < result["registers"] <= 512
        assert result["wgmma"] == (target == "sm_90")


@pytest.mark.parametrize("index, word", list(enumerate(WRONG)))
def test_wrong_kernels_are_told(index, word, results):
    assert word in results[len(TARGETS) + index]["error"]


def test_spills_on_amd(results):
    assert "spills" in results[-1]["error"]


def test_the_assertion_fails():
    with pytest.raises(AssertionError, match="no wgmma"):
        assert_compiles([WRONG["no wgmma"]])
    with pytest.raises(AssertionError):
        assert_compiles([])
