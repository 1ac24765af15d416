"""One sound kernel and ways to spoil it, to show that tests/kernel_cases.py can fail."""

import triton
import triton.language as tl


@triton.jit
def product(x, y, out, n, ROWS: tl.constexpr, INNER: tl.constexpr, MATRIX: tl.constexpr):
    """out [ROWS, ROWS] = x [ROWS, n] @ y [n, ROWS], by the matrix unit or by sums."""
    rows, inner = tl.arange(0, ROWS), tl.arange(0, INNER)
    total = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for start in range(0, n, INNER):
        left = tl.load(x + rows[:, None] * n + start + inner[None, :])
        right = tl.load(y + (start + inner)[:, None] * ROWS + rows[None, :])
        if MATRIX:
            total = tl.dot(left, right, total)
        else:
            total += tl.sum(left, 1)[:, None] * tl.sum(right, 0)[None, :]
    tl.store(out + rows[:, None] * ROWS + rows[None, :], total)


@triton.jit
def atomic(x, ROWS: tl.constexpr):
    """Adds up in the order in which programs come."""
    tl.atomic_add(x + tl.arange(0, ROWS), 1.0)


@triton.jit
def broken(x, n, ROWS: tl.constexpr):
    """Adds vectors of two lengths."""
    tl.store(x + tl.arange(0, ROWS), tl.arange(0, ROWS) + tl.arange(0, 2 * ROWS))
