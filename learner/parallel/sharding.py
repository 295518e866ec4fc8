"""A frozen base that is larger than one GPU: each rank keeps a part of every decoder layer, and all of them gather a
layer when they compute it.

Weights that are never trained have neither gradients nor moments to shard, so that one gather for each layer and pass
is all of it; the next layer's is under way while one is computed. torch's FSDP2 would do the same, but shards a model
only once its ranks have met, which here they do after each has loaded its part. Knows torch.distributed and decoders;
knows neither checkpoints nor quantization.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from learner.parallel.data_parallel import DataParallel

ALIGNMENT = 256  # bytes at which a weight may begin


@dataclass(frozen=True)
class Shard:
    """Which part of each layer a rank keeps: number `index` of `count`."""

    index: int
    count: int


@dataclass(frozen=True)
class _Weight:
    """A weight and its place in the bytes of its layer."""

    parameter: torch.nn.Parameter
    start: int
    size: int
    shape: torch.Size


class ShardedLayer:
    """A decoder layer whose linear layers have their weights only between `show` and `hide`.

    `size` is that of the whole layer in bytes, and `part` (uint8) what this rank keeps.
    """

    def __init__(self, layer: torch.nn.Module, shard: Shard) -> None:
        self.module = layer
        self._weights: list[_Weight] = []
        end = 0
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                weight = cast(torch.nn.Parameter, module.weight)
                self._weights.append(_Weight(weight, end, weight.nbytes, weight.shape))
                end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
        self.size = -(-end // (shard.count * ALIGNMENT)) * shard.count * ALIGNMENT
        whole = torch.zeros(self.size, dtype=torch.uint8, device=self._weights[0].parameter.device)
        for weight in self._weights:
            whole[weight.start : weight.start + weight.size] = weight.parameter.data.view(-1).view(torch.uint8)
        self.part = whole.chunk(shard.count)[shard.index].clone()
        self.hide()

    def show(self, whole: torch.Tensor) -> None:
        """Let the layer compute with the bytes of the whole layer."""
        for weight in self._weights:
            values = whole[weight.start : weight.start + weight.size].view(weight.parameter.dtype)
            weight.parameter.data = values.view(weight.shape)

    def hide(self) -> None:
        for weight in self._weights:
            weight.parameter.data = weight.parameter.data.new_empty(0)


@dataclass(frozen=True)
class _Coming:
    """A layer whose bytes are on their way into `buffer`."""

    number: int
    buffer: torch.Tensor
    work: dist.Work


class ShardedBase:
    """The layers of a decoder, of which one is whole at a time, and the next one is gathered.

    Every rank must compute the same layers in the same order. After `connect`, ranks can compute.
    """

    def __init__(self, layers: Sequence[ShardedLayer], shard: Shard) -> None:
        self._layers = layers
        self._shard = shard
        self._group: dist.ProcessGroup | None = None
        largest = max(layer.size for layer in layers)
        device = layers[0].part.device
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self._current: int | None = None
        self._coming: _Coming | None = None
        for number, layer in enumerate(layers):
            layer.module.register_forward_pre_hook(lambda *_, number=number: self._need(number))
            layer.module.register_forward_hook(lambda *call, number=number: self._need_in_backward(number, call[-1]))

    def connect(self, ranks: DataParallel, *, seconds: float) -> None:
        """Meet the ranks that keep the other parts: neighbors. All ranks must call it; a gather may take `seconds`."""
        count, timeout = self._shard.count, timedelta(seconds=seconds)
        groups = [
            dist.new_group(list(range(first, first + count)), timeout=timeout)
            for first in range(0, ranks.world_size, count)
        ]
        self._group = cast(dist.ProcessGroup, groups[ranks.rank // count])

    def _need_in_backward(self, number: int, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self._need(number))

    def _need(self, number: int) -> None:
        """Make layer `number` whole, and let the one come that is needed after it in this direction."""
        if number == self._current:
            return
        step = 1 if self._current is None or number > self._current else -1
        if self._current is not None:
            self._layers[self._current].hide()
        coming = self._coming
        if coming is None or coming.number != number:
            if coming is not None:
                coming.work.wait()
            coming = self._gather(number, self._buffers[0])
        coming.work.wait()
        self._layers[number].show(coming.buffer)
        self._current = number
        following = number + step
        other = self._buffers[1] if coming.buffer is self._buffers[0] else self._buffers[0]
        self._coming = self._gather(following, other) if 0 <= following < len(self._layers) else None

    def _gather(self, number: int, buffer: torch.Tensor) -> _Coming:
        layer = self._layers[number]
        work = dist.all_gather_into_tensor(buffer[: layer.size], layer.part, group=self._group, async_op=True)
        assert work is not None
        return _Coming(number, buffer, work)
