"""Offloading of activations: what checkpointing saves per layer moves to pinned host memory and returns in backward.

Copies to the host run on a stream of their own, in parallel with the next layer; copies back are short compared with
the recomputation of a layer. On a CPU it does nothing. Knows torch only.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

MAX_COPIES = 2  # copies in flight; each keeps its source alive


@dataclass(frozen=True)
class _Offloaded:
    host: torch.Tensor
    device: torch.device
    copied: torch.Event


class Offload:
    """Within `saving`, every tensor of at least `min_bytes` that autograd saves stays in pinned memory until backward.

    Parameters are not moved.
    """

    def __init__(self) -> None:
        self._min_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._in_flight: deque[tuple[torch.Event, torch.Tensor]] = deque()

    @contextlib.contextmanager
    def saving(self, *, min_bytes: int) -> Iterator[None]:
        self._min_bytes = min_bytes
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Offloaded:
        if not tensor.is_cuda or tensor.nbytes < self._min_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        copied = self._stream.record_event()
        self._in_flight.append((copied, tensor))
        while len(self._in_flight) > MAX_COPIES:
            oldest, _ = self._in_flight.popleft()
            torch.cuda.current_stream().wait_event(oldest)
        return _Offloaded(host, tensor.device, copied)

    def _unpack(self, saved: torch.Tensor | _Offloaded) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        self._in_flight.clear()
        torch.cuda.current_stream().wait_event(saved.copied)
        return saved.host.to(saved.device, non_blocking=True)
