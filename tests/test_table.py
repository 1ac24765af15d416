"""Tables for the terminal, compared with what they should look like."""

from harkd.scoring.table import align, comparison, shorten


def test_columns_are_aligned():
    assert align([["a", "long"], ["name", "1"], ["b", ""]]) == "a     long\nname     1\nb"


def test_comparison_with_the_first_model():
    models = [
        {"name": "Qwen/Qwen3-32B", "weighted_f1": 0.8, "macro_f1": 0.75, "accuracy": 0.8125, "malformed": 0, "missing": 3}
        | {"parameters": 32_762_123_264, "seconds_per_window": 12.3456},
        {"name": "baseline:sensor", "weighted_f1": 0.6, "macro_f1": 0.5, "accuracy": 0.5, "malformed": 0, "missing": 1200}
        | {"parameters": None, "seconds_per_window": 0.0000123},
        {"name": "no scored event", "weighted_f1": None},
    ]
    assert comparison(models).splitlines() == [
        "model            weighted F1  macro F1  accuracy  malformed  missing      parameters  s/window     gap  ratio",
        "Qwen/Qwen3-32B         0.800     0.750     0.812          0        3  32,762,123,264      12.3  +0.000  1.000",
        "baseline:sensor        0.600     0.500     0.500          0    1,200               -  1.23e-05  -0.200  0.750",
        "no scored event            -         -         -          -        -               -         -       -      -",
    ]


def test_a_figure_is_followed_by_its_interval():
    models = [{"name": "a", "weighted_f1": 0.5, "weighted_f1_interval": [0.4, 0.625]}, {"name": "b", "weighted_f1": 0.5, "weighted_f1_interval": None}]
    rows = comparison(models).splitlines()
    assert "a      0.500 [0.400, 0.625] " in rows[1] and "[" not in rows[2]


def test_no_ratio_to_zero_or_to_nothing():
    for first, gap in ((0.0, "+0.500"), (None, "-")):
        rows = comparison([{"name": "a", "weighted_f1": first}, {"name": "b", "weighted_f1": 0.5}]).splitlines()
        assert rows[2].split()[-2:] == [gap, "-"]
    assert len(comparison([]).splitlines()) == 1


def test_the_middle_of_a_long_label_is_left_out():
    assert [shorten(label) for label in ("COOKING", "PREPARING_COLD_MEAL_AND_DRINKS")] == ["COOKING", "PREPARING_CO…_AND_DRINKS"]
