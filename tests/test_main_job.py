"""The whole job by command line on real recordings, with random weights and the real tokenizer: minutes long, hence marked slow."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.helpers import MARBLE, QWEN3, ROOT, needs_marble, needs_qwen3

COMMANDS = f"""
tools.make_checkpoint OUT/small --tokenizer {QWEN3}
harkd.generate --model OUT/small --data marble:{MARBLE} --transition label --limit 4 --max-new-tokens 64 --out OUT/traces
harkd.train --model OUT/small --train-on truth --data marble:{MARBLE} --transition label --limit 20 --validation 0 \
    --lora-rank 32 --lora-alpha 64 --lr 5e-3 --epochs 75 --batch-tokens 3500 --out OUT/adapter
harkd.eval --model OUT/small --adapter OUT/adapter --model baseline:majority --model baseline:sensor --data marble:{MARBLE} \
    --transition label --split train --limit 20 --temperature 0 --max-new-tokens 256 --out OUT/eval
"""


@pytest.mark.slow
@needs_marble
@needs_qwen3
def test_the_main_job_on_the_real_recordings(tmp_path):
    """Traces are written, the truth of 20 training windows is learnt to 95 % of their labels, and model, adapter and both baselines are scored."""
    results = []
    for command in COMMANDS.strip().splitlines():
        arguments = shlex.split(command.replace("OUT", str(tmp_path)))
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        results.append(done.stdout.splitlines()[-1])
    traces, adapter, scores = map(json.loads, results[1:])
    assert traces["traces"] == traces["wanted"] > 0
    assert adapter["examples"] >= 19
    base, adapted, majority, sensor = scores["models"]
    assert adapted["accuracy"] >= 0.95 and adapted["malformed"] == 0 and adapted["missing"] == 0
    assert base["accuracy"] == 0 and 0 < majority["accuracy"] < sensor["accuracy"] < adapted["accuracy"]
