"""What several test files share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
MARBLE = SHARED / "data" / "marble" / "dataset"
QWEN3 = SHARED / "qwen3"

needs_marble = pytest.mark.skipif(not MARBLE.is_dir(), reason="needs ../shared/data/marble")
needs_qwen3 = pytest.mark.skipif(not QWEN3.is_dir(), reason="needs ../shared/qwen3")
