"""tools.gpu_check without a GPU: it says so; and every line of its checks and measurements runs on the CPU with tiny shapes."""

import json
import math
import subprocess
import sys
import time

import pytest
import torch

from harkd.kernels.attention import attention
from tools import gpu_baselines, gpu_check, gpu_kernels, gpu_parts, gpu_training
from tools.gpu_check import Bench, Check, Record, exactness, main, run_benches, run_checks

TINY = gpu_kernels.Setting(
    device="cpu",
    dtype=torch.float32,
    dtypes=(torch.float16,),
    heads=((4, 2),),
    checked=(3, 1),
    dim=32,
    pack=(2, 10),
    shared=(9, 2, 5),
    ragged=(1, 0, 9),
    batches=(1, 3),
    keys=(5, 20),
    page=8,
    new=(1, 5, 20),
    layers=(("0.6B", 32, 48, 16, 40),),
    tokens=(9,),
    rank=4,
    wide=(3, 48),
    rows=20,
    vocab=100,
    width=16,
)
MACHINE = {"gpu": "none", "bytes_per_second": 1e12, "operations_per_second": 1e15}


def soon() -> float:
    """A deadline."""
    return time.monotonic() + 600


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "results" / "kernels.json", MACHINE)


def built():
    return lambda: 1


def once(function):
    """Stands in for the timer: runs the function, and finds that everything takes 2 ms."""
    assert function() is not None
    return 2.0, 0.1, True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["--only", "kernels"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "no CUDA GPU" in out.err


def test_parts_are_known():
    with pytest.raises(SystemExit) as stop:
        main(["--only", "nonsense"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_every_check_runs_and_passes(record):
    run_checks(record, gpu_kernels.checks(TINY), TINY.dtypes, soon())
    assert record.wrong == [] and len(record.checks) >= 20
    assert all(0 <= error <= 1 for error in record.checks.values())
    assert json.loads(record.path.read_text())["checks"] == record.checks


def test_every_measurement_runs(record, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(gpu_baselines, "flex_attention", lambda q, k, v, block_mask, enable_gqa: q + (k + v).sum())  # has no backward pass on a CPU
    run_benches(record, gpu_kernels.benches(TINY), once, lambda function: 10**9, time.monotonic() + 600)
    assert record.wrong == []
    kinds = ("packed attention, pack", "packed attention, shared", "cached", "LoRA", "RMSNorm", "add and", "SwiGLU", "norms", "vocabulary", "divergence")
    for kind in kinds:
        names = [name for name in record.ratios if name.startswith(kind)]
        assert any(name.endswith("/ limit") for name in names) and (len(names) > 3 or kind == "divergence"), kind
    assert all(ratio == 1 for name, ratio in record.ratios.items() if not name.endswith("limit"))
    assert "MISSED" in capsys.readouterr().out, "at 2 ms for all, targets above 1 are missed"
    saved = json.loads(record.path.read_text())
    assert saved["machine"] == MACHINE and saved["ratios"] == record.ratios and all(row["ms"] == 2 for row in saved["rows"])


@pytest.mark.filterwarnings("ignore:flex_attention called")
@pytest.mark.parametrize("name", ["pack", "shared prefix", "ragged pack"])
def test_baselines_do_the_same_work(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    plan = gpu_kernels.packed_plans(TINY)[name]
    qkv = TINY.queries(int(plan.cu_q[-1]), 4, 2)
    ours, packed = attention(*qkv, plan), [x.transpose(0, 1)[None] for x in qkv]
    assert torch.allclose(gpu_baselines.flex(plan)(*packed)[0].transpose(0, 1), ours, atol=1e-5)
    if name == "pack":
        separate = [x.view(2, 10, -1, 32).transpose(1, 2) for x in qkv]
        assert torch.allclose(gpu_baselines.flash(*separate).transpose(1, 2).reshape(ours.shape), ours, atol=1e-5)
    for group in gpu_kernels.lora_groups(TINY, *TINY.layers[0][1:], 9):
        n, outputs = len(group.weights), gpu_baselines.addmm_lora(group.weights, 2.0, *group.trained)()
        ours = gpu_kernels.lora(n, "torch", *group.trained, *group.weights)
        eager = gpu_baselines.eager_lora(group.weights, 2.0, *group.trained)
        assert all(torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4) for a, b, c in zip(ours, eager, outputs[:-1:3], strict=True))


def test_wrong_kernels_are_told(record):
    x = torch.randn(30, 7)
    wrong = {
        "zeros": lambda backend, x: x.sin() * (backend == "torch"),
        "too large": lambda backend, x: x.sin() * (1.1 if backend == "triton" else 1),
        "not a number": lambda backend, x: x.sin() + (math.nan if backend == "triton" else 0),
        "gradient": lambda backend, x: x.sin() if backend == "torch" else x.sin().detach() + 0 * x,
    }
    checks = [Check(name, function, [x], 1) for name, function in wrong.items()]
    run_checks(record, [*checks, Check("right", lambda backend, x: x.sin(), [x], 1)], (torch.float16,), soon())
    assert [text.split(",")[0] for text in record.wrong] == list(wrong)
    with pytest.raises(ValueError, match="would pass"):
        exactness(Check("nothing", lambda backend, x: x * 0, [x], 0), torch.float16)


def test_failures_and_lack_of_time_are_counted(record, capsys):
    def broken(*_):
        raise RuntimeError("no such kernel")

    bench = Bench("sum", {"a": broken, "b": built}, {"base": built, "bad": lambda: broken}, bytes=1e9, targets={"base": 2.0})
    run_benches(record, [bench], once, lambda function: 0, time.monotonic() + 60)
    assert record.ratios == {"sum, b / limit": 0.5, "sum, b / base": 1.0}
    check = Check("check", broken, [torch.ones(2)], 0)
    run_checks(record, [check], (torch.float16,), soon())
    run_benches(record, [bench], once, lambda function: 0, time.monotonic() - 1)
    run_checks(record, [check], (torch.float16,), time.monotonic() - 1)
    assert len(record.wrong) == 3 and all("no such kernel" in text for text in record.wrong) and record.skipped == ["sum", "check, float16"]
    saved = json.loads(record.path.read_text())
    assert saved["wrong"] == record.wrong and saved["skipped"] == record.skipped
    assert "MISSED" in capsys.readouterr().out


def test_the_whole_command_with_a_gpu_played(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: MACHINE | {"torch": "2", "triton": "3"})
    monkeypatch.setattr(gpu_check, "device_time", once)
    monkeypatch.setattr(gpu_kernels, "checks", lambda setting: [])
    monkeypatch.setattr(gpu_kernels, "benches", lambda setting: [Bench("sum", {"": built}, {"base": built})])
    assert main(["--only", "kernels", "--out", str(tmp_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ratios"] == {"sum / base": 1.0} and last["gpu"] == "none" and last["wrong"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kernels-none-torch-2-triton-3.json"]
    monkeypatch.setattr(gpu_kernels, "checks", lambda setting: (1 / n for n in (0,)))
    assert main(["--only", "kernels", "--out", str(tmp_path)]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ratios"] == {"sum / base": 1.0} and last["wrong"] == 2  # one for each dtype, and the benches ran all the same


def test_all_parts_run_in_processes_of_their_own(monkeypatch, tmp_path, capsys):
    """Each with its share of what time is left; one that is killed tells no ratios, and is no success."""
    asked, codes = [], {"kernels": 0, "generation": -9, "training": 0}

    def follow(command, seconds, tell):
        asked.append(command[command.index("--only") :])
        tell("killed" if "generation" in command else json.dumps({"ratios": {asked[-1][1]: 2.0}}))
        return codes[asked[-1][1]]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_parts, "follow", follow)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert main(["--seconds", "100"]) == 1
    assert [command[1] for command in asked] == list(codes) and {command[3] for command in asked} == {str(tmp_path)}
    assert [float(command[5]) for command in asked] == pytest.approx([40, 58, 100], abs=1)  # nothing took any time
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"exit_codes": codes, "ratios": {"kernels": 2.0, "training": 2.0}}
    codes["generation"] = 0
    assert main(["--seconds", "100"]) == 0


def test_a_process_that_takes_too_long_is_killed_with_its_children():
    script = "import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    lines, began = [], time.monotonic()
    assert gpu_parts.follow([sys.executable, "-c", script], 2, lines.append) == -9 and lines == ["begun"]
    assert time.monotonic() - began < 30  # the child held the pipe

    def refuse(line):
        raise ValueError(line)

    with pytest.raises(ValueError, match="begun"):
        gpu_parts.follow([sys.executable, "-c", script], 60, refuse)
    assert time.monotonic() - began < 30


PLAYED = """
import json, sys, time
print("harkd     examples_per_s 9  seconds 2", flush=True)
if "8B" in sys.argv:
    time.sleep(float(sys.argv[1]))
    sys.exit(1)
print(json.dumps({"ratios": {"examples_to_peft": 2.1, "memory_to_peft": 0.4, "to_limit": 0.3}}))
"""


def test_training_is_measured_at_both_sizes(monkeypatch, tmp_path, capsys):
    """The benchmark's processes are played: one that misses a target, and one that fails, or takes too long."""
    asked, follow, seconds = [], gpu_training.follow, 0

    def played(command, left, tell):
        asked.append(command)
        return follow([sys.executable, "-c", PLAYED, str(seconds), *command[1:]], min(left, 3), tell)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "machine", lambda: MACHINE | {"torch": "2", "triton": "3"})
    monkeypatch.setattr(gpu_training, "follow", played)
    assert main(["--only", "training", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    ratios = {"examples_to_peft": 2.1, "memory_to_peft": 0.4, "to_limit": 0.3}
    assert json.loads(out.splitlines()[-1])["ratios"] == {f"0.6B, {name}": ratio for name, ratio in ratios.items()}
    assert "2.100  0.6B, examples_to_peft  MISSED" in out and out.count("MISSED") == 1
    saved = json.loads((tmp_path / "training-none-torch-2-triton-3.json").read_text())
    assert saved["wrong"] == ["8B: no ratios, exit code 1"]
    assert saved["rows"] == [{"name": f"{size}, harkd", "examples_per_s": 9.0, "seconds": 2.0} for size in ("0.6B", "8B")]
    for command, size, layers in zip(asked, ("0.6B", "8B"), ("28", "12"), strict=True):
        assert command[1:3] == ["-m", "tools.bench_train"] and command[command.index("--like") + 1] == size and command[command.index("--layers") + 1] == layers
    seconds = 60
    assert main(["--only", "training", "--out", str(tmp_path)]) == 1
    saved = json.loads((tmp_path / "training-none-torch-2-triton-3.json").read_text())
    assert saved["skipped"] == ["8B"] and len(saved["rows"]) == 2  # what was told before it was killed
