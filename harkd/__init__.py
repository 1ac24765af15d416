"""harkd: distil the recognition of human activities in homes from a large Qwen3 into a small one.

The public names below are imported when they are first used, so that `import harkd` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "load_model": "harkd.qwen3.weights",
    "load_tokenizer": "harkd.qwen3.tokenizer",
    "load_generator": "harkd.recognition",
    "Generator": "harkd.sampling.generator",
    "Request": "harkd.sampling.request",
    "Sampling": "harkd.sampling.request",
    "read": "harkd.homes.dataset",
    "prompt": "harkd.homes.prompt",
    "parse_answer": "harkd.homes.answer",
    "score": "harkd.scoring.metrics",
    "Recognizer": "harkd.live",
    "UserError": "harkd.errors",
}
__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'harkd' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
