"""Triton reads TRITON_INTERPRET when it is imported, so it is set before any test: kernels run on the CPU by Triton's interpreter.

Tests that compile kernels do so in a child process without it. One thread is the fastest for models of a few thousand parameters, and far
faster beside other processes.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
