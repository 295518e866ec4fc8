"""DataParallel: learners that take one step together, each with a share of the rows.

Every rank holds the whole adapter and optimizer. In each step the ranks exchange one sum of the flat gradient, and the
sums behind the statistics. Knows torch.distributed; knows neither rows nor the runtime.
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
class DataParallel:
    """This learner is number `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1

    def shard(self, costs: Sequence[int]) -> slice:
        """The rows of this rank, for rows of these `costs`: neighbors, with about the same total at each rank."""
        ends = [0, *accumulate(costs)]
        total = ends[-1]
        if not total:
            return slice(0, len(costs) if self.rank == 0 else 0)
        # A row belongs to the rank whose interval of the total contains the row's midpoint.
        midpoints = [(start + end) / 2 for start, end in pairwise(ends)]
        ranks = [min(int(midpoint * self.world_size / total), self.world_size - 1) for midpoint in midpoints]
        return slice(sum(rank < self.rank for rank in ranks), sum(rank <= self.rank for rank in ranks))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def maximum(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its maximum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def open_store(host: str) -> tuple[dist.TCPStore, int]:
    """The store through which ranks find each other, which listens on `host` alone, and its port."""
    server = socket.create_server((host, 0))
    port = server.getsockname()[1]
    store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach())
    return store, port


def connect_store(host: str, port: int, *, seconds: float) -> dist.TCPStore:
    """The store that the first rank opened."""
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))


def join(store: dist.TCPStore, ranks: DataParallel, *, host: str, device: torch.device | str, seconds: float) -> None:
    """Connect with the other ranks over the interface with the address `host`; each exchange may take `seconds`."""
    interface = next(
        name for name, addresses in psutil.net_if_addrs().items() if any(entry.address == host for entry in addresses)
    )
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = interface
    # Reductions of this size gain nothing from NVLink's multicast, which fails on machines that share a switch.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    dist.init_process_group(
        "nccl" if torch.device(device).type == "cuda" else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=seconds),
    )


def leave() -> None:
    """Undo `join`."""
    dist.destroy_process_group()
