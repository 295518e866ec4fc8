"""vLLM's buffers for the one adapter, and the copy into them. Knows nothing of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from actors.engines.base import AdapterError, check_adapter
from actors.engines.vllm.interfaces import DeviceWorker, LoraSlices
from actors.models.families import family_of
from actors.models.weight_sharing import SharingImpossible
from actors.types import Adapter, AdapterLayout

LORA_ID = 1
LORA_NAME = "epiphany"
NO_PATH = "held in memory"  # LoRARequest refuses an empty path; nothing ever reads this one
LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)  # vLLM's MaxLoRARanks; our kernels take no less than 16


def slot_rank(rank: int) -> int:
    """The smallest rank of LORA_RANKS that holds `rank`; the rest of a slot stays zero."""
    if rank > LORA_RANKS[-1]:
        raise AdapterError(f"model.lora.rank={rank} is over vLLM's limit of {LORA_RANKS[-1]}")
    return min(r for r in LORA_RANKS if r >= rank)


class AdapterSlot:
    """A vLLM worker's buffers for the one adapter, and the copy into them.

    The buffers never move, so CUDA graphs stay valid. B is stored times alpha / rank. The staging copy takes memory
    while it is used only. If layers are sharded over several workers, each buffer holds the part that `slice_lora_a`
    and `slice_lora_b` give.
    """

    def __init__(self, worker: DeviceWorker, layout: AdapterLayout) -> None:
        from vllm.lora.request import LoRARequest

        self._layout = layout
        self._family = family_of(worker.model_runner.model_config.hf_config)
        self._workers_manager = worker.model_runner.lora_manager
        self._manager = self._workers_manager._adapter_manager
        self._request = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        slot = self._activate()
        layer = next(iter(self._manager.modules.values()))
        self._is_whole = layer.tp_size == 1
        first = layer.lora_a_stacked[0]
        self._staging = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        self._targets, self._sources = self._match_buffers(slot)
        self._staging.untyped_storage().resize_(0)

    def _activate(self) -> int:
        """Register an all-zero adapter (vLLM's own warm-up adapter) if there is none, and return its slot."""
        if LORA_ID not in self._manager.list_adapters():
            self._workers_manager.add_dummy_lora(self._request, rank=self._layout.rank)
        self._manager.activate_adapter(LORA_ID)
        return self._manager.lora_index_to_id.index(LORA_ID)

    def _match_buffers(self, slot: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The part of each buffer that an adapter fills, and the view of the staging copy that goes there."""
        rank = self._layout.rank
        targets, sources = [], []
        for entry in self._layout.entries:
            layer, index = self._find_layer(entry.module)
            matrix, is_a = entry.view(self._staging), entry.side == "A"
            buffers = layer.lora_a_stacked if is_a else layer.lora_b_stacked
            if index is None:
                # One layer to transformers, several slices to vLLM: they share A, and B is theirs end to end.
                parts = [matrix] * len(buffers) if is_a else matrix.split([b.shape[2] for b in buffers])
                slices = list(zip(buffers, parts, strict=True))
            else:
                shard = layer.slice_lora_a if is_a else layer.slice_lora_b
                slices = [(buffers[index], self._shard(shard, matrix, index, len(buffers)))]
            for buffer, source in slices:
                target = buffer[slot, 0, :rank, :] if is_a else buffer[slot, 0, :, :rank]
                if target.shape != source.shape:
                    raise AdapterError(
                        f"{entry.module} {entry.side} is {tuple(source.shape)}, the engine holds {tuple(target.shape)}"
                    )
                targets.append(target)
                sources.append(source)
        return targets, sources

    def _shard(
        self,
        shard: Callable[..., torch.Tensor | Sequence[torch.Tensor]],
        full: torch.Tensor,
        index: int,
        slices: int,
    ) -> torch.Tensor:
        """This worker's part of a matrix in the staging copy, as a view."""
        if self._is_whole:
            return full
        part = shard([full if i == index else None for i in range(slices)])[index] if slices > 1 else shard(full)
        assert isinstance(part, torch.Tensor)
        if part.untyped_storage().data_ptr() != self._staging.untyped_storage().data_ptr():
            raise AdapterError("vLLM cannot shard this model's fused layers over devices with an adapter")
        return part

    def _find_layer(self, module: str) -> tuple[LoraSlices, int | None]:
        """The LoRA layer that holds the linear layer `module`, and the index of its slice there (None: all of them)."""
        parent, _, leaf = self._family.name_in_vllm(module).rpartition(".")
        for packed, slices in [(leaf, [leaf]), *self._manager.packed_modules_mapping.items()]:
            layer = self._manager.modules.get(f"{parent}.{packed}")
            if layer is None or leaf not in slices:
                continue
            count = len(layer.lora_a_stacked)
            if len(slices) == 1 and count > 1:
                if not self._is_whole:
                    raise AdapterError(f"vLLM cannot shard {packed} of this model over devices with an adapter")
                return layer, None
            return layer, slices.index(leaf)
        raise AdapterError(f"the engine has no LoRA layer for {module}; check model.lora.target_modules")

    def whole_matrices(self) -> list[torch.Tensor]:
        """What holds each matrix of the layout. Raises SharingImpossible if vLLM splits or repeats one of them."""
        if len(self._targets) != len(self._layout.entries):
            raise SharingImpossible("vLLM has several layers where the model has one")
        return self._targets

    def write(self, adapter: Adapter) -> None:
        """Copy the adapter in, on the device's current stream. Raises AdapterError before the old one is changed."""
        check_adapter(adapter, self._layout)
        self.copy(adapter.flat)

    @torch.no_grad()
    def copy(self, flat: torch.Tensor) -> None:
        """`write` without checks."""
        self._activate()
        memory = self._staging.untyped_storage()
        memory.resize_(self._layout.size * self._staging.element_size())
        self._staging.copy_(flat, non_blocking=True)
        self._staging[self._layout.start_of_b :].mul_(self._layout.scaling)
        torch._foreach_copy_(self._targets, self._sources)
        memory.resize_(0)
