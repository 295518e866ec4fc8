"""The engines that benchmarks.decode compares, and a decoding step as each takes it.

`bare` is vLLM as it comes and without an adapter, `stock` is vLLM as it comes with one, `ours` is VllmEngine with its
changes to vLLM. All get the settings that any user could give.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from actors.engines.base import EngineOptions
from actors.engines.vllm.adapter_slot import LORA_ID, LORA_NAME, NO_PATH, AdapterSlot, slot_rank
from actors.engines.vllm.engine import VllmEngine
from actors.engines.vllm.environment import set_environment
from actors.engines.vllm.internals import driver_worker
from actors.engines.vllm.start import device_arguments
from actors.models.lora import lora_arguments_of
from actors.types import Adapter, Request, Sampling
from benchmarks.common import build_engine, new_requests, plan_engine, random_adapter
from benchmarks.engine_steps import SteppingEngine, timed_steps
from benchmarks.work import random_prompt, work_settings

if TYPE_CHECKING:
    from vllm import LLMEngine

ENGINES = ("bare", "stock", "ours")
RUNS, EDGE, GROUP = 3, 12, 8  # EDGE: steps at both ends that may hold prompts or finished sequences


class StockVllm:
    """vLLM through its public API, with the arguments of VllmEngine; with `adapter`, or without LoRA."""

    def __init__(self, options: EngineOptions, adapter: Adapter | None) -> None:
        set_environment(device=options.device, threads=options.threads)
        from vllm import EngineArgs, LLMEngine
        from vllm.lora.request import LoRARequest

        arguments: dict[str, object] = {
            "model": options.model_path,
            "skip_tokenizer_init": True,
            "dtype": options.dtype,
            "seed": options.seed,
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "gpu_memory_utilization": 0.05,  # only a start-up check once the cache is given in bytes
            "kv_cache_memory_bytes": options.kv_cache_bytes,
            "enforce_eager": options.enforce_eager,
            "enable_prefix_caching": True,
            "async_scheduling": options.device != "cpu",
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "compilation_config": {
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "max_cudagraph_capture_size": options.max_num_seqs,
            },
            **device_arguments(options),
        }
        self._lora = None
        if adapter is not None:
            arguments |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": slot_rank(adapter.layout.rank),
                "lora_target_modules": list(lora_arguments_of(adapter.layout)["target_modules"]),
            }
            self._lora = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        make_arguments = cast("Callable[..., EngineArgs]", EngineArgs)
        self.vllm = LLMEngine.from_engine_args(make_arguments(**arguments))
        self.with_logprobs = True
        if adapter is not None:
            AdapterSlot(driver_worker(self.vllm), adapter.layout).write(adapter)

    @property
    def unfinished(self) -> int:
        return self.vllm.get_num_unfinished_requests()

    def submit(self, requests: Sequence[Request]) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            params = SamplingParams(
                temperature=request.sampling.temperature,
                max_tokens=request.sampling.max_tokens,
                ignore_eos=True,
                logprobs=0 if self.with_logprobs else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
            self.vllm.add_request(request.request_id, prompt, params, lora_request=self._lora)

    def step(self) -> Sequence[object]:
        return self.vllm.step()


class DecodeBench:
    """The engine `name` on the weights in `model` with room for `sequences`, and the time of its steps."""

    def __init__(self, name: str, model: Path, folder: Path, *, sequences: int, overrides: Sequence[str]) -> None:
        limits = [f"model.path={model}", f"engine.max_num_seqs={sequences}"]
        settings = work_settings("w", folder, *limits, *overrides)
        self.name = name
        if name == "ours":
            self.plan, engine = build_engine(settings)
            ours = cast(VllmEngine, engine)
            ours.load_adapter(random_adapter(self.plan, b_std=1e-4))
            self.engine: SteppingEngine[object] = ours
            self.vllm: LLMEngine = ours._engine
        else:
            self.plan = plan_engine(settings)
            stock = StockVllm(self.plan.engine, random_adapter(self.plan, b_std=1e-4) if name == "stock" else None)
            self.engine, self.vllm = stock, stock.vllm
        draw = random.Random(0)
        self._prompts = [random_prompt(draw, self.plan.shape.vocabulary) for _ in range(-(-sequences // GROUP))]

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter that a step reads."""
        return 2 * self.plan.layout.size if self.name != "bare" else 0

    def submit(self, count: int, tokens: int) -> None:
        """Start `count` sequences of `tokens` tokens, GROUP of each prompt."""
        self.engine.submit(new_requests([self._prompts[i // GROUP] for i in range(count)], Sampling(1.0, tokens)))

    def finish(self) -> None:
        """Sample what is unfinished to the end."""
        timed_steps(self.engine)

    def run(self, count: int, tokens: int) -> dict[str, float]:
        """One run of `count` sequences to `tokens` each."""
        requests = new_requests([self._prompts[i // GROUP] for i in range(count)], Sampling(1.0, tokens))
        steps = timed_steps(self.engine, requests)
        steady = steps.seconds[EDGE : tokens - EDGE] or steps.seconds
        return {
            "step_ms": 1e3 * statistics.median(steady),
            "step_ms_mean": 1e3 * statistics.mean(steady),
            "step_ms_p95": 1e3 * sorted(steady)[int(0.95 * len(steady))],
            "steps": len(steps.seconds),
            "steps_seconds": sum(steps.seconds),
            "wall_seconds": steps.wall_seconds,
            "tokens_per_second": count * tokens / steps.wall_seconds,
            "tokens_per_second_decoding": count / statistics.mean(steady),
        }

    def runs(self, count: int, tokens: int) -> dict[str, object]:
        """The middle one of RUNS runs, by step, and the steps of all."""
        runs = sorted((self.run(count, tokens) for _ in range(RUNS)), key=lambda run: run["step_ms"])
        return {**runs[len(runs) // 2], "step_ms_of_runs": [round(run["step_ms"], 3) for run in runs]}

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but an embedding that is not also the head."""
        total, embedding, has_head = 0, 0, False
        for path, module in driver_worker(self.vllm).model_runner.model.named_modules():
            size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters(recurse=False))
            if "embed_tokens" in path:
                embedding += size
            has_head |= "lm_head" in path and size > 0 and "embed_tokens" not in path
            total += size
            if "base_layer" in path:
                total += sum(scales.nbytes for scales in getattr(module, "nf4_scales", []))
        return total - (embedding if has_head else 0)
