"""What an import costs, and what is public."""

import json
import os
import subprocess
import sys

import pytest

import harkd
from tests.helpers import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in (ROOT / "harkd").rglob("*.py") if path.name != "__main__.py"
)


def python(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(imports: str) -> set[str]:
    """The top-level packages that these imports load; a socket that they open is an error."""
    code = "import socket, sys\ndef refuse(*a, **k): raise OSError('no network')\nsocket.create_connection = socket.getaddrinfo = socket.socket.__init__ = refuse\n"
    return set(json.loads(python(f"{code}{imports}\nimport json; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))")))


def test_import_harkd_loads_nothing_heavy():
    assert not {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "tqdm"} & loaded("import harkd")


@pytest.mark.parametrize("module", ["harkd.homes.dataset", "harkd.homes.prompt", "harkd.homes.answer", "harkd.homes.__main__", "harkd.doors"])
def test_homes_needs_no_torch(module):
    assert not {"torch", "numpy"} & loaded(f"import {module}")


@pytest.mark.parametrize("door", ["generate", "train", "eval", "recognize"])
def test_a_doors_help_and_mistakes_do_not_wait_for_torch(door):
    parse = f"from harkd.{door} import main; assert main(['--nonsense']) == 2 and main(['--help']) == 0"
    code = f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {parse}"
    assert not {"torch", "tokenizers", "safetensors"} & loaded(code)


def test_all_modules_can_be_imported_without_network_or_test_packages():
    assert not {"transformers", "peft", "sklearn", "pandas", "jinja2", "matplotlib"} & loaded("import " + ", ".join(MODULES))


def test_every_public_name_exists():
    assert len(harkd.__all__) == len(set(harkd.__all__)) <= 14
    for name in harkd.__all__:
        assert getattr(harkd, name) is not None and name in dir(harkd)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        harkd.nonsense


def test_importing_everything_costs_little_beyond_torch(tmp_path):
    """From the second import on, which finds compiled files; in CPU time, which other processes disturb less than the wall clock."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = f"import time, torch; before = time.process_time(); import {', '.join(MODULES)}; print(time.process_time() - before)"
    assert min(float(python(code, **compiled)) for _ in range(3)) <= 2 * 0.3  # 0.3 s, twice that under load


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_is_not_the_parents():
    parent = bytearray(b"x") * 300_000_000
    child = python("from harkd.doors import peak_memory; print(peak_memory()['cpu'])")
    assert 1e6 < int(child) < 100e6 < len(parent)
