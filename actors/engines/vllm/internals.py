"""Read and write what vLLM does not document: its weights and its scheduler's outputs.

adapter_slot.py does so with its LoRA buffers. interfaces.py lists the attributes, patches.py and lora_patches.py change
vLLM's code, tensor_parallel.py extends its workers. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from actors.engines.stop_strings import StopStrings
from actors.engines.vllm.interfaces import (
    DeviceWorker,
    EngineCore,
    PaddedVocabulary,
    StackedLinear,
)
from actors.models.families import family_of
from actors.models.weight_sharing import BaseWeights, Nf4Weight, SharingImpossible, persistent_buffers

if TYPE_CHECKING:
    from vllm import LLMEngine
    from vllm.v1.engine.core_client import InprocClient


def engine_core(engine: LLMEngine) -> EngineCore:
    """The scheduler and executor of an engine that runs in this process."""
    return cast(EngineCore, cast("InprocClient", engine.engine_core).engine_core)


def driver_worker(engine: LLMEngine) -> DeviceWorker:
    """The worker of an engine with one device."""
    return engine_core(engine).model_executor.driver_worker.worker


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
