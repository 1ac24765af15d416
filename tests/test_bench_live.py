"""tools.bench_live measures a window after the first, and tells what it cannot measure."""

from tests.door_cases import mixed, model, outcome, short_prompts  # noqa: F401
from tools.bench_live import main


def test_the_ratios_are_those_of_the_median_windows(model, mixed):
    code, result, text, _ = outcome(main, model, "--data", mixed, "--windows", 3, "--dtype", "float32")
    assert code == 0 and ", 3 windows\n" in text and text.count(": median") == 3
    for name, what in (("window", "ten events at once"), ("last_event", "the last of ten")):
        median = float(text.split(f"{what}: median ")[1].split()[0])
        assert abs(result["ratios"][f"{name}_to_limit"] - median / 4) < 0.002


def test_mistakes_are_told(model, mixed, tmp_path):
    empty = tmp_path / "home"
    empty.mkdir()
    (empty / "home.json").write_text('{"name": "h", "rooms": {}, "labels": {"A": ""}}')
    (empty / "events.csv").write_text("time,sensor,room,state\n")
    cases = (("/nowhere",), "/nowhere"), ((model, "--data", "marble:/nowhere"), "no folder"), ((model, "--windows", 0), "--windows must be")
    for flags, message in (*cases, ((model, "--data", f"csv:{empty}", "--dtype", "float32"), "fewer than two windows")):
        code, _, _, err = outcome(main, *flags)
        assert code == 2 and message in err and err.count("\n") == 1
