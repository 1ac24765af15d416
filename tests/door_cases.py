"""What the tests of the doors share: a home with a short prompt, a door run in this process or in a child that is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harkd.homes.events import Label
from harkd.homes.readers import marble_home
from tests.helpers import ROOT
from tests.marble_files import environment, labels, marble
from tests.tiny import tiny_model

LABELS = ("COOKING", "EATING", "WATCHING_TV")
_full_home = marble_home.home


def short_home(transition: bool, smartphone: bool):
    """MARBLE's home with a prompt of some 700 tokens in place of 3,000."""
    home = _full_home(transition, smartphone)
    return replace(home, rooms=(("kitchen", ("fridge",)),), labels=tuple(map(Label, LABELS)), rules=("Be brief.",), example=home.example[:1])


@pytest.fixture(scope="module", autouse=True)
def short_prompts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marble_home, "home", short_home)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return f"marble:{marble(tmp_path_factory.mktemp('data'), days=6, events=3)}"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Eight days of 12 events, hence two windows each: one person cooks, watches television, eats, and does something that nobody wrote down."""
    root = tmp_path_factory.mktemp("mixed")
    for day in range(8):
        start, folder = day * 86_400, root / f"A1a/instance{day + 1}"
        sensors = ["R7", "R7", "E2", "P8", "P1", "R7", "P4", "P1", "R7", "P8", "R7", "E2"]
        environment(folder, *((sensor, ("ON", "OFF")[n % 2], start + n, "1") for n, sensor in enumerate(sensors)))
        labels(folder, "1", (start, start + 1, "COOKING"), (start + 2, start + 3, "WATCHING_TV"), (start + 4, start + 6, "EATING"), (start + 9, start + 11, "WATCHING_TV"))
    return f"marble:{root}"


@pytest.fixture
def one_thread():
    """As in `child`: how a product is divided among threads decides its last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(main, *argv) -> dict:
    """Run a door that must succeed; its result."""
    code, result, _, err = outcome(main, *argv)
    assert code == 0, err
    return result


def outcome(main, *argv) -> tuple[int, dict | None, str, str]:
    """(exit code, the last line as JSON, stdout, stderr)."""
    with contextlib.redirect_stdout(_Text()) as out, contextlib.redirect_stderr(_Text()) as err:
        code = main([str(part) for part in argv])
    text = out.getvalue()
    return code, json.loads(text.splitlines()[-1]) if code == 0 else None, text, err.getvalue()


def _Text():
    import io

    return io.StringIO()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def child(door: str, *argv) -> subprocess.Popen:
    """The door in a process of its own, with the short home, once it begins."""
    process = spawn(door, *argv)
    assert process.stdout.readline() == "ready\n"
    return process


def spawn(door: str, *argv, **environment) -> subprocess.Popen:
    """The door in a process of its own, which says "ready" first."""
    code = (
        "import sys; from tests.door_cases import short_home, marble_home; marble_home.home = short_home; import torch; torch.set_num_threads(1);"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # which jobs in the background inherit as ignored
        f"from harkd.{door} import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, env=env, **pipes)


def kill(process: subprocess.Popen, reached, how=signal.SIGKILL) -> tuple[int, str, str]:
    """Wait until `reached()`, or the end, and end the child; (return code, stdout, stderr)."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
