"""torch's random state as tensors of a checkpoint."""

from collections.abc import Mapping

import torch


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of the CPU ("random_cpu"), and of `device` if it is a GPU ("random_cuda")."""
    state = {"random_cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore what `random_state` returned, from any device. Other names are ignored."""
    torch.set_rng_state(tensors["random_cpu"].cpu())
    if "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"].cpu())
