"""Triton reads TRITON_INTERPRET when it is imported, so it is set before any test: kernels run on the CPU by Triton's interpreter.

Tests that compile kernels do so in a child process without it.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
