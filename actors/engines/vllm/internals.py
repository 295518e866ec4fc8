"""Read and write what vLLM does not document: its LoRA buffers, its weights, its scheduler's outputs.

interfaces.py lists the attributes, patches.py and lora_patches.py change vLLM's code, tensor_parallel.py extends its
workers. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from actors.engines.base import AdapterError, check_adapter
from actors.engines.stop_strings import StopStrings
from actors.engines.vllm.interfaces import (
    DeviceWorker,
    EngineCore,
    LoraSlices,
    PaddedVocabulary,
    StackedLinear,
)
from actors.models.families import family_of
from actors.models.weight_sharing import BaseWeights, Nf4Weight, SharingImpossible, persistent_buffers
from actors.types import Adapter, AdapterLayout

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.v1.engine.core_client import InprocClient

LORA_ID = 1
LORA_NAME = "epiphany"
NO_PATH = "held in memory"  # LoRARequest refuses an empty path; nothing ever reads this one
LORA_RANKS = (16, 32, 64, 128, 256, 320, 512)  # vLLM's MaxLoRARanks; our kernels take no less than 16


def slot_rank(rank: int) -> int:
    """The smallest rank of LORA_RANKS that holds `rank`; the rest of a slot stays zero."""
    if rank > LORA_RANKS[-1]:
        raise AdapterError(f"model.lora.rank={rank} is over vLLM's limit of {LORA_RANKS[-1]}")
    return min(r for r in LORA_RANKS if r >= rank)


def engine_core(engine: LLMEngine) -> EngineCore:
    """The scheduler and executor of an engine that runs in this process."""
    return cast(EngineCore, cast("InprocClient", engine.engine_core).engine_core)


def driver_worker(engine: LLMEngine) -> DeviceWorker:
    """The worker of an engine with one device."""
    return engine_core(engine).model_executor.driver_worker.worker


class AdapterSlot:
    """A vLLM worker's buffers for the one adapter, and the copy into them.

    The buffers never move, so CUDA graphs stay valid. B is stored times alpha / rank. If layers are sharded over
    several workers, each buffer holds the part that `slice_lora_a` and `slice_lora_b` give.
    """

    def __init__(self, worker: DeviceWorker, layout: AdapterLayout) -> None:
        from vllm.lora.request import LoRARequest

        self._layout = layout
        self._family = family_of(worker.model_runner.model_config.hf_config)
        self._workers_manager = worker.model_runner.lora_manager
        self._manager = self._workers_manager._adapter_manager
        self._request = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        self._activate()
        layer = next(iter(self._manager.modules.values()))
        self._is_whole = layer.tp_size == 1
        first = layer.lora_a_stacked[0]
        self._staging = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        self._targets, self._sources = self._match_buffers()

    def _activate(self) -> int:
        """Register an all-zero adapter (vLLM's own warm-up adapter) if there is none, and return its slot."""
        if LORA_ID not in self._manager.list_adapters():
            self._workers_manager.add_dummy_lora(self._request, rank=self._layout.rank)
        self._manager.activate_adapter(LORA_ID)
        return self._manager.lora_index_to_id.index(LORA_ID)

    def _match_buffers(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The part of each buffer that an adapter fills, and the view of the staging copy that goes there."""
        slot, rank = self._activate(), self._layout.rank
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

    def write(self, adapter: Adapter) -> None:
        """Copy the adapter in, on the device's current stream. Raises AdapterError before the old one is changed."""
        check_adapter(adapter, self._layout)
        self.copy(adapter.flat)

    @torch.no_grad()
    def copy(self, flat: torch.Tensor) -> None:
        """`write` without checks."""
        self._activate()
        self._staging.copy_(flat, non_blocking=True)
        self._staging[self._layout.start_of_b :].mul_(self._layout.scaling)
        torch._foreach_copy_(self._targets, self._sources)


def base_weights(engine: LLMEngine) -> BaseWeights:
    """The loaded weights under transformers' names: views of vLLM's own tensors.

    vLLM stacks q, k, v and gate, up along the output dimension (`output_sizes`), hides layers behind `base_layer` where
    LoRA wraps them, pads the vocabulary, and keeps one QuantState a slice of an nf4 weight (`bnb_quant_state`,
    `bnb_shard_offsets`). Raises SharingImpossible where a layer holds no plain weight.
    """
    runner = driver_worker(engine).model_runner
    family = family_of(runner.model_config.hf_config)
    weights: BaseWeights = {}
    for path, module in runner.model.named_modules(remove_duplicate=False):
        # The dot lets a part of a name match at its end, too.
        name = family.name_from_vllm(path.removesuffix(".base_layer") + ".").removesuffix(".")
        parent, _, leaf = name.rpartition(".")
        slices = family.fused_projections.get(leaf, (leaf,))
        weights |= {f"{name}.{kind}": buffer for kind, buffer in persistent_buffers(module)}
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.numel() == 0:
                raise SharingImpossible(f"vLLM keeps the weights of {path} in a layout of its own")
            names = [f"{parent}.{layer}.{kind}" if parent else f"{layer}.{kind}" for layer in slices]
            states = getattr(parameter, "bnb_quant_state", None)
            if states is not None:
                if len(states) != len(names):
                    raise SharingImpossible(f"vLLM holds {path} in {len(states)} parts")
                offsets = vars(parameter)["bnb_shard_offsets"].tolist()
                for i, name in enumerate(names):
                    weights[name] = Nf4Weight(parameter.data[offsets[i] : offsets[i + 1]], states[i])
            elif hasattr(module, "org_vocab_size"):
                weights[names[0]] = parameter.data[: cast(PaddedVocabulary, module).org_vocab_size]
            else:
                sizes = cast(StackedLinear, module).output_sizes if len(names) > 1 else [len(parameter)]
                weights |= zip(names, parameter.data.split(sizes), strict=True)
    return weights


def sampled_counts(engine: LLMEngine) -> dict[str, int]:
    """Tokens sampled so far by each request of the scheduler, including those that are still on the device."""
    states = engine.output_processor.request_states
    counts = {}
    for internal_id, request in engine_core(engine).scheduler.requests.items():
        state = states.get(internal_id)
        if state is not None:
            counts[state.external_req_id] = request.num_output_tokens + request.num_output_placeholders
    return counts


@dataclass(frozen=True)
class Sampled:
    """A finished request, under the name that it was added by."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


class Outputs:
    """Advances the engine and collects what it samples, in place of vLLM's output processor.

    The output processor makes several objects per token and sequence for streams that nobody reads here. Relies on
    EngineCoreOutput (`new_token_ids`, `new_logprobs.logprobs`, whose first column is the sampled token's) and on
    `_finish_request`.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self._core = engine.engine_core
        self._processor = engine.output_processor
        self._parts: dict[str, tuple[list[int], list[np.ndarray]]] = {}

    def partial(self) -> dict[str, list[int]]:
        """The tokens of each running request so far, under the name that it was added by."""
        states = self._processor.request_states
        return {states[internal_id].external_req_id: token_ids for internal_id, (token_ids, _) in self._parts.items()}

    def step(self, stops: Mapping[str, StopStrings]) -> list[Sampled]:
        """One step of the engine; the requests that it finished. `stops` are those of each request that runs."""
        finished = []
        for output in self._core.get_output().outputs:
            state = self._processor.request_states.get(output.request_id)
            if state is None:  # it ended with a stop text while this step was under way
                continue
            token_ids, logprobs = self._parts.setdefault(output.request_id, ([], []))
            if output.new_token_ids:
                token_ids += output.new_token_ids
                logprobs.append(output.new_logprobs.logprobs)  # type: ignore[union-attr] - every request asks for them
            reason = output.finish_reason
            if stops[state.external_req_id].ends(token_ids):
                if reason is None:
                    self._core.abort_requests([output.request_id])
                reason = "stop"
            if reason is not None:
                del self._parts[output.request_id]
                self._processor._finish_request(state)
                sampled = np.concatenate(logprobs)[: len(token_ids), 0].tolist()
                finished.append(Sampled(state.external_req_id, tuple(token_ids), tuple(sampled), str(reason)))
        return finished
