"""Offloading of activations: what checkpointing saves per layer moves to pinned host memory and returns in backward.

Copies run on a stream of their own: to the host while the next layer computes, and back while the layer behind it does.
On a CPU it does nothing. Knows torch only.
"""

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from learner.memory.footprint import SLAB_BYTES

MAX_COPIES = 2  # copies to the host in flight; each keeps its source alive


class HostMemory:
    """Pinned memory in slabs of SLAB_BYTES, which are used again: torch would round a tensor up to a power of two."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, size: int) -> list[torch.Tensor]:
        """Slabs (uint8) that hold `size` bytes together."""
        count = -(-size // SLAB_BYTES)
        while len(self._free) < count:
            self._free.append(torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available()))
        return [self._free.pop() for _ in range(count)]

    def give_back(self, slabs: list[torch.Tensor]) -> None:
        self._free += slabs


@dataclass
class _Offloaded:
    """A tensor in the host's memory, number `index` of those that were saved. `event` ends the last copy, and
    `returning` is the tensor on the device once its way back has begun.
    """

    index: int
    slabs: list[torch.Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    event: torch.Event
    returning: torch.Tensor | None = None


class Offload:
    """Within `saving`, every tensor of at least `min_bytes` that autograd saves stays in pinned memory until backward.

    Parameters are not moved. Backward needs tensors in the opposite order: with each, the one before it sets out.
    """

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._min_bytes = 0
        self._stream: torch.cuda.Stream | None = None
        self._in_flight: deque[tuple[torch.Event, torch.Tensor]] = deque()
        self._saved: list[_Offloaded] = []

    @contextlib.contextmanager
    def saving(self, *, min_bytes: int) -> Iterator[None]:
        """Forgets what the last forward pass with gradients saved: one graph at a time may wait for its backward pass.
        Without gradients it does nothing.
        """
        if not torch.is_grad_enabled():
            yield
            return
        self._min_bytes = min_bytes
        for saved in self._saved:
            self._memory.give_back(saved.slabs)
        self._saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Offloaded:
        if not tensor.is_cuda or tensor.nbytes < self._min_bytes or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        flat, slabs = _bytes(tensor), self._memory.take(tensor.nbytes)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for slab, part in zip(slabs, flat.split(SLAB_BYTES), strict=True):
                slab[: len(part)].copy_(part, non_blocking=True)
        copied = self._stream.record_event()
        saved = _Offloaded(len(self._saved), slabs, tensor.shape, tensor.dtype, tensor.device, copied)
        self._saved.append(saved)
        self._in_flight.append((copied, flat))
        while len(self._in_flight) > MAX_COPIES:
            oldest, _ = self._in_flight.popleft()
            torch.cuda.current_stream().wait_event(oldest)
        return saved

    def _unpack(self, saved: torch.Tensor | _Offloaded) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        tensor = self._send_back(saved)
        torch.cuda.current_stream().wait_event(saved.event)
        self._in_flight.clear()  # copies to the host came before on the same stream
        saved.returning = None
        if saved.index:
            self._send_back(self._saved[saved.index - 1])
        return tensor

    def _send_back(self, saved: _Offloaded) -> torch.Tensor:
        """The tensor on the device, whose values are there at `saved.event`."""
        assert self._stream is not None
        if saved.returning is None:
            saved.returning = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
            flat = _bytes(saved.returning)
            self._stream.wait_stream(torch.cuda.current_stream())  # which may still read what was here before
            with torch.cuda.stream(self._stream):
                for slab, part in zip(saved.slabs, flat.split(SLAB_BYTES), strict=True):
                    part.copy_(slab[: len(part)], non_blocking=True)
            saved.event = self._stream.record_event()
        return saved.returning


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor as bytes, where they lie if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
