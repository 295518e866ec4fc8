"""The processes of a test, and no others: tests run beside each other."""

import contextlib
import os
from pathlib import Path

import psutil

from tests.helpers.runs import wait_for

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
RAY = ("ray::", "raylet", "gcs_server")


def family(pid: int | None = None) -> list[psutil.Process]:
    """The living descendants of a process, by default of this one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(pid or os.getpid()).children(recursive=True) if is_alive(p)]
    return []


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def ray_processes(pid: int | None = None) -> list[psutil.Process]:
    """Those of Ray among them."""
    return [process for process in family(pid) if name_of(process).startswith(RAY)]


def name_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def wait_until_gone(processes: list[psutil.Process], seconds: float = 60.0) -> None:
    wait_for(lambda: not any(map(is_alive, processes)), seconds)


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which any of the processes can be reached."""
    pids = {process.pid for process in processes}
    connections = psutil.net_connections("inet")
    return {c.laddr.ip for c in connections if c.laddr and c.status == "LISTEN" and c.pid in pids}


def mapped_files(processes: list[psutil.Process]) -> dict[int, set[str]]:
    """The files that each process has mapped into memory."""
    files: dict[int, set[str]] = {}
    for process in processes:
        with contextlib.suppress(OSError):  # it has ended
            regions = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            files[process.pid] = {
                fields[5] for fields in (region.split(None, 5) for region in regions) if len(fields) > 5
            }
    return files
