"""Attention and its relatives as plain tensor functions; they know nothing of Qwen3 or of homes. Installed as `harkd.kernels`."""
