"""Weights in pinned memory of the host, which the GPU reads where they lie: by CUDA's unified addresses.

Of an embedding, a forward pass needs the rows of its tokens only, a few KiB each. Knows torch; knows no model's engine.
"""

from dataclasses import dataclass

import torch

INTEGERS = {2: "<i2", 4: "<i4"}  # by their size: NumPy has no bfloat16


@dataclass(frozen=True)
class _Mapped:
    """Memory of the host as CUDA's array interface describes memory of a GPU; it lives as long as this does."""

    host: torch.Tensor

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": tuple(self.host.shape),
            "typestr": INTEGERS[self.host.element_size()],
            "data": (self.host.data_ptr(), False),
            "version": 2,
        }


def on_host(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of the same GPU with the values of `weight`, whose memory is the host's."""
    host = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)
    return torch.as_tensor(_Mapped(host), device=weight.device).view(weight.dtype)


def move_to_host(model: torch.nn.Module, embedding: torch.nn.Module) -> None:
    """Move the weight of `embedding`, a layer of `model`, to the host. Other layers must not compute with it."""
    weight = embedding.weight
    assert isinstance(weight, torch.nn.Parameter)
    users = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    assert users == [embedding], "a model whose head is its embedding needs it on the GPU"
    weight.data = on_host(weight.data)
    torch.cuda.empty_cache()
