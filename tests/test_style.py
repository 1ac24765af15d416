"""The house's rules that can be checked: sizes, docstrings, what is never used, and who may know whom."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.helpers import ROOT

FILES = sorted(path for folder in ("harkd", "kernels", "tools") for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]
every_file = pytest.mark.parametrize("path", FILES, ids=NAMES)

ROOMS = ("qwen3", "sampling", "homes", "distill", "scoring")
MAY_KNOW = {  # besides COMMON
    "kernels": {"kernels"},
    "homes": {"homes"},
    "qwen3": {"qwen3", "kernels", "tensors", "distributed"},
    "sampling": {"sampling", "qwen3", "kernels"},
    "distill": {"distill", "qwen3", "homes", "kernels", "tensors", "distributed"},
    "scoring": {"scoring", "homes"},
}
COMMON = {"errors", "files", "jsonl", "memory"}  # these, and tensors, know no room; distributed meets others on a device that qwen3 names
EXCEPTIONS = {
    "harkd/homes/__main__.py": {"doors", "qwen3"},  # a door, which counts tokens
    "harkd/distill/batch_file.py": {"sampling"},  # writes a Sampling's values, and draws nothing
}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node) -> int:
    return node.end_lineno - node.lineno + 1


def imports(tree) -> set[str]:
    """Full names of all that a file imports, inside functions too."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names if node.module == "harkd"}
    return names


def known(tree) -> set[str]:
    """The rooms and files of harkd that a file imports from."""
    return {name.split(".")[1] for name in imports(tree) if name.startswith("harkd.")}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "kernels" if parts[0] == "kernels" else parts[1] if parts[0] == "harkd" and len(parts) > 2 else ""


def code_lines(path: Path) -> int:
    """Lines of a file that hold code: not blank, no comment, no docstring."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    lines = {line for token in tokens if token.type not in layout for line in range(token.start[0], token.end[0] + 1)}
    owners = [node for node in ast.walk(TREES[path]) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)]
    return len(lines - {line for node in owners for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)})


def test_the_whole_house_is_seen():
    assert len(FILES) > 40 and {room(path) for path in FILES} >= {*ROOMS, "kernels"}
    house = [path for path in FILES if path.relative_to(ROOT).parts[0] != "tools"]
    assert 4000 < sum(map(code_lines, house)) <= 8250


@every_file
def test_sizes_and_docstrings(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300 and max(map(len, lines), default=0) <= 140
    private = {id(node) for owner in ast.walk(TREES[path]) if isinstance(owner, ast.ClassDef) and owner.name.startswith("_") for node in ast.walk(owner)}
    for function in functions(TREES[path]):
        where = f"{path.name}: {function.name}"
        assert length(function) <= 60, where
        if length(function) > 12 and not function.name.startswith("_") and id(function) not in private and not path.is_relative_to(ROOT / "tools"):
            assert ast.get_docstring(function), where
    if path.name != "__init__.py":
        assert ast.get_docstring(TREES[path]), "a module opens with what it computes"


@every_file
def test_what_is_never_used(path):
    tree, text = TREES[path], path.read_text(encoding="utf-8")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not (len(node.body) == 1 and isinstance(node.body[0], ast.Pass)), f"line {node.lineno}"
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "compile", "__import__")), f"line {node.lineno}"
            assert ast.unparse(node.func) not in ("torch.load", "torch.save"), f"line {node.lineno}"
    assert not {name.split(".")[0] for name in imports(tree)} & {"pickle", "dill", "joblib", "yaml", "requests", "urllib"}
    assert not re.search(r"\b(TO[D]O|FIX[M]E|X[X]X|NotImplemented[E]rror)\b", text)
    if room(path) or path.parent.name == "harkd":
        assert not {name.split(".")[0] for name in imports(tree)} & {"transformers", "peft", "sklearn", "pandas", "jinja2"}


@every_file
def test_who_may_know_whom(path):
    name, tree = path.relative_to(ROOT).as_posix(), TREES[path]
    if room(path):
        common = COMMON if room(path) != "kernels" else set()
        assert known(tree) <= MAY_KNOW[room(path)] | common | EXCEPTIONS.get(name, set())
    if path.parent.name == "harkd" or room(path):
        assert not known(tree) & {"generate", "train", "eval"}, "nobody knows the doors"
    if room(path) == "homes":
        assert not {module.split(".")[0] for module in imports(tree)} & {"torch", "numpy", "tokenizers"}
    if path.stem in {*COMMON, "tensors"} and path.parent.name == "harkd":
        assert known(tree) <= COMMON

