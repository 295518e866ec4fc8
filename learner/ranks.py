"""Ranks: learners that take one step together, each with a share of the rows.

Every rank holds the whole adapter and optimizer; what they exchange is one sum of the flat gradient a step, and the sums
behind the statistics. Knows torch.distributed; knows neither rows nor the runtime.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate, pairwise

import psutil
import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This learner is number `index` of `count`."""

    index: int = 0
    count: int = 1

    def share(self, costs: Sequence[int]) -> slice:
        """Which of the rows with these costs are this rank's: neighbours, of about the same cost together at each rank."""
        ends = [0, *accumulate(costs)]
        # A row is its rank's in whose part of the whole the middle of it lies.
        middles = [(a + b) / 2 for a, b in pairwise(ends)]
        of = [min(int(m * self.count / ends[-1]), self.count - 1) for m in middles] if ends[-1] else [0] * len(costs)
        return slice(sum(i < self.index for i in of), sum(i <= self.index for i in of))

    def add_up(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all ranks."""
        if self.count > 1:
            dist.all_reduce(tensor)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its largest over all ranks."""
        if self.count > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def open_store(host: str) -> tuple[dist.TCPStore, int]:
    """Where ranks find each other: a store of this process that listens on `host` alone, and its port."""
    server = socket.create_server((host, 0))
    port = server.getsockname()[1]
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    return store, port


def find_store(host: str, port: int, *, seconds: float) -> dist.TCPStore:
    """The store that the first rank opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))


def join(store: dist.TCPStore, ranks: Ranks, *, host: str, device: torch.device | str, seconds: float) -> None:
    """Connect with the other ranks over the interface that has the address `host`; they have `seconds` for each exchange."""
    interface = next(n for n, found in psutil.net_if_addrs().items() if any(a.address == host for a in found))
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = interface
    # Reductions of this size gain nothing from NVLink's multicast, which fails on machines that share a switch.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group(
        "nccl" if torch.device(device).type == "cuda" else "gloo", store=store, rank=ranks.index, world_size=ranks.count,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip


def leave() -> None:
    """Undo `join`."""
    dist.destroy_process_group()
