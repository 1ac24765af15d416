"""How much memory this process took at most, and how much is free."""

from __future__ import annotations

import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path


def reset_peak_memory() -> None:
    """Let peak_memory count anew from what is held now: on a GPU, and of the process where the system can (Linux)."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets the peak resident size


def peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process, and of its GPU where it used one, since the start or reset_peak_memory."""
    peak = {"cpu": _peak_resident()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    with suppress(OSError, IndexError):  # first: what getrusage says is inherited from the parent, and never reset
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: str = "cpu") -> int:
    """Bytes that can still be had: of a GPU what its driver and torch have, else what the system and the container, if there is one, leave.

    What others hold as file cache can be had too.
    """
    if device.startswith("cuda"):
        cuda = sys.modules["torch"].cuda
        return cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS: all there are
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, IndexError):  # Linux
        free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) << 10
    with suppress(OSError, ValueError, IndexError):
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        cached = Path("/sys/fs/cgroup/memory.stat").read_text().partition("\ninactive_file ")[2].split()[0]
        free = min(free, limit - used + int(cached))
    return max(free, 0)
