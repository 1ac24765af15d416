"""What the tests of the training door share: arguments that learn the truth, and traces of a teacher."""

import pytest

from harkd.distill.traces import Trace, TraceWriter, agreement
from harkd.homes.answer import canonical
from harkd.homes.dataset import read
from harkd.homes.prompt import prompt
from tests.door_cases import LABELS, content, lines, mixed, model, short_prompts  # noqa: F401


@pytest.fixture
def truth(model, mixed, tmp_path):
    return ["--model", model, "--train-on", "truth", "--data", mixed, "--out", tmp_path / "out", "--lr", 0.03, "--batch-tokens", 3000, "--epochs", 2]


@pytest.fixture(scope="module")
def traces(mixed, tmp_path_factory):
    """Two samples of every training window: the first right, the second wrong in its last events, that of the last window cut off."""
    folder, dataset = tmp_path_factory.mktemp("traces"), read(mixed)
    windows = list(dataset.windows("train"))
    with TraceWriter(folder) as writer:
        for window in windows:
            true = [list(event.labels) for event in window.events]
            right = [labels[0] if labels else "EATING" for labels in true]
            for sample, labels in enumerate((right, [right[0]] + ["EATING"] * (len(right) - 1))):
                turn = {"role": "assistant", "reasoning_content": f"The fridge {sample}.", "content": f"So:\n{canonical(labels)}"}
                cut_off = sample == 1 and window is windows[-1]
                writer.write(
                    Trace(
                        data=mixed, home=window.home, group=window.group, recording=window.recording, window=window.id, sample=sample, labels=list(LABELS),
                        messages=[*prompt(dataset.homes[0], window), turn], answer=[None] * len(labels) if cut_off else labels, causes={}, truth=true,
                        agreement=0.0 if cut_off else agreement(labels, true), tokens={"prompt": 1, "completion": 9}, finish_reason="length" if cut_off else "stop",
                        seed=0, model="teacher", thinking=True, template="1", answer_form="1",
                    )  # fmt: skip
                )
    return folder


def losses(out):
    return [record["loss"] for record in lines(out / "metrics.jsonl") if "loss" in record]
