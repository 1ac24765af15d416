"""tools.bench_live measures a window after the first, and tells what it cannot measure."""

from tests.door_cases import mixed, model, outcome, short_prompts  # noqa: F401
from tools.bench_live import main


def test_the_ratio_is_that_of_the_median_window(model, mixed):
    code, result, text, _ = outcome(main, model, "--data", mixed, "--windows", 3, "--dtype", "float32")
    median = float(text.split("a window: median ")[1].split()[0])
    assert code == 0 and "; 3 windows" in text and abs(result["ratios"]["window_to_limit"] - median / 4) < 0.002


def test_mistakes_are_told(model, mixed, tmp_path):
    empty = tmp_path / "home"
    empty.mkdir()
    (empty / "home.json").write_text('{"name": "h", "rooms": {}, "labels": {"A": ""}}')
    (empty / "events.csv").write_text("time,sensor,room,state\n")
    cases = (("/nowhere",), "/nowhere"), ((model, "--data", "marble:/nowhere"), "no folder"), ((model, "--windows", 0), "--windows must be")
    for flags, message in (*cases, ((model, "--data", f"csv:{empty}", "--dtype", "float32"), "fewer than two windows")):
        code, _, _, err = outcome(main, *flags)
        assert code == 2 and message in err and err.count("\n") == 1
