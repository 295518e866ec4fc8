"""Activations in the host's memory: what checkpointing keeps of each layer goes to pinned memory and comes back in backward.

Copies out run on a stream of their own beside the next layer; copies back are small beside a layer's recomputation. On
a CPU there is nowhere to go, and it does nothing. Knows torch only.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

DEPTH = 2  # copies that may be under way; each keeps its source alive


@dataclass(frozen=True)
class _Parked:
    host: torch.Tensor
    device: torch.device
    done: torch.Event


class Offload:
    """Within `saving`, every tensor of at least `min_bytes` that autograd saves lives in pinned memory until backward."""

    def __init__(self) -> None:
        self._min_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._under_way: deque[tuple[torch.Event, torch.Tensor]] = deque()

    @contextlib.contextmanager
    def saving(self, *, min_bytes: int) -> Iterator[None]:
        self._min_bytes = min_bytes
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Parked:
        if not tensor.is_cuda or tensor.nbytes < self._min_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        done: Any = self._stream.record_event()
        self._under_way.append((done, tensor))
        while len(self._under_way) > DEPTH:
            oldest, _ = self._under_way.popleft()
            torch.cuda.current_stream().wait_event(oldest)  # type: ignore[arg-type]
        return _Parked(host, tensor.device, done)

    def _unpack(self, saved: torch.Tensor | _Parked) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._under_way.clear()
        torch.cuda.current_stream().wait_event(saved.done)  # type: ignore[arg-type]
        return saved.host.to(saved.device, non_blocking=True)
