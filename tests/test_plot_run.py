"""tools.plot_run draws what a run's metrics hold, and says so where they hold nothing."""

import json

import pytest

from tools.plot_run import main

STEP = {"epoch": 0, "lr": 1e-4, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 50.0}


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_run_becomes_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    steps = [{**STEP, "step": n, "loss": 2.0 / n, "ways": {"sequence": 1.5 / n} if n % 2 else {"on-policy": 0.5 / n}} for n in range(1, 6)]
    write(tmp_path, {"step": 0, "epoch": 0, "validation_loss": 3.0}, *steps, {"step": 5, "epoch": 0, "validation_loss": 2.5})
    assert main([str(tmp_path)]) == 0
    drawn = "loss, validation_loss, ways.sequence, ways.on-policy, lr, grad_norm, tokens_per_second"
    assert capsys.readouterr().out == f"{tmp_path / 'metrics.png'}: {drawn}\n"
    from matplotlib.image import imread

    tall = imread(tmp_path / "metrics.png")
    assert tall.std() > 0.01
    write(tmp_path, *({**step, "ways": {"sequence": step["loss"]}} for step in steps))
    assert main([str(tmp_path), "--out", str(tmp_path / "other.png")]) == 0
    assert imread(tmp_path / "other.png").shape[0] < tall.shape[0] and imread(tmp_path / "other.png").shape[1] == tall.shape[1]
    assert "ways" not in capsys.readouterr().out


def test_nothing_to_draw_is_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(tmp_path)]) == 2 and "metrics.jsonl cannot be read" in capsys.readouterr().err
    write(tmp_path)
    assert main([str(tmp_path)]) == 2 and "holds no step yet" in capsys.readouterr().err
