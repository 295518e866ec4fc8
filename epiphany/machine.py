"""What this process may use of its machine, with the limits of a container (cgroup v2). Loads no torch."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
GPUS = Path("/proc/driver/nvidia/gpus")


def container_limit(name: str) -> float | None:
    """A limit of this container: bytes, or processors of `cpu.max`; None where there is none."""
    try:
        parts = (CGROUP / name).read_text().split()
    except OSError:
        return None
    if not parts or parts[0] == "max":
        return None
    return int(parts[0]) / int(parts[1]) if len(parts) > 1 else int(parts[0])


def free_memory() -> int:
    """Bytes of the host's memory that this process can take. What files are cached in counts as free."""
    free, limit = psutil.virtual_memory().available, container_limit("memory.max")
    if limit is None:
        return free
    used = container_limit("memory.current") or 0
    return max(0, min(free, int(limit - used + _cached_files())))


def gpus_of_machine() -> int:
    """How many GPUs NVIDIA's driver has, of which this process may see fewer; 1 if it does not say."""
    return max(1, len(list(GPUS.glob("*")))) if GPUS.is_dir() else 1


def _cached_files() -> int:
    """Bytes of this container that hold files, and that the system takes back where they are needed."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
