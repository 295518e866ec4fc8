"""From settings to the machine, the model, prompts and the rollout engine.

The only place outside launch.py that reads whole sections of the settings; the classes themselves take narrow
arguments.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from actors.engine import Engine
from actors.models import (
    ModelSource,
    choose_dtype,
    end_of_sequence_ids,
    load_base_model,
    load_tokenizer,
    resolve_model,
)
from actors.prompts import PromptSet
from actors.sources import Loaded, load_rows
from actors.types import AdapterLayout
from actors.vllm_internals import EngineUnavailable, check_version, set_environment
from actors.vllm_mends import check_nf4
from conf.errors import UsageError
from conf.schema import Settings


@dataclass(frozen=True)
class Machine:
    """What this process runs on."""

    device: str
    threads: int
    dtype: str


def build_machine(settings: Settings) -> Machine:
    """Choose device, threads and dtype. Raises UsageError if a GPU is asked for and there is none."""
    hardware = settings.hardware
    device = hardware.device if hardware.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("hardware.device=cuda: torch finds no GPU here; use hardware=auto or hardware=cpu")
    threads = hardware.threads or len(os.sched_getaffinity(0))
    if device == "cpu":
        torch.set_num_threads(threads)
    return Machine(device, threads, choose_dtype(settings.model.dtype, device))


def build_model_source(settings: Settings) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    model = settings.model
    source = resolve_model(model.path, revision=model.revision, package=model.package)
    tokenizer = load_tokenizer(source, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
    return source, tokenizer


def build_rows(settings: Settings) -> tuple[Loaded, Loaded | None]:
    """The training rows, and those of data.held_out_source if there is one."""
    data = settings.data

    def load(source: str, task: dict[str, Any]) -> Loaded:
        return load_rows(
            source, task=task, split=data.split, prompt_column=data.prompt_column, answer_column=data.answer_column,
            system_prompt=data.system_prompt, max_bad_rows=data.max_bad_rows, seed=data.seed,
        )  # fmt: skip

    held_out = None
    if data.held_out_source is not None:
        held_out = load(data.held_out_source, {**data.task, **data.held_out_task})
    return load(data.source, data.task), held_out


def build_prompts(
    settings: Settings, rows: Loaded, held_out: Loaded | None, tokenizer: PreTrainedTokenizerBase
) -> PromptSet:
    data = settings.data
    return PromptSet(
        rows.rows, tokenizer, held_out=data.held_out, max_prompt_tokens=data.max_prompt_tokens, seed=data.seed,
        held_out_rows=None if held_out is None else held_out.rows,
    )  # fmt: skip


def lora_arguments(settings: Settings) -> dict:
    """Keyword arguments of actors.lora.FlatLora, but for the seed. rsLoRA is an alpha that is larger by the root of the rank, so
    that every engine and PEFT serve it as it is."""
    lora = settings.model.lora
    alpha = lora.alpha * lora.rank**0.5 if lora.rslora else lora.alpha
    return {"rank": lora.rank, "alpha": alpha, "target_modules": lora.target_modules}


def samples_repeat(settings: Settings, machine: Machine) -> bool:
    """Whether a prompt's samples are to be the same in every run with the same seed."""
    asked = settings.engine.per_request_seeds
    return machine.device == "cpu" if asked is None else asked


def choose_engine(settings: Settings, machine: Machine) -> tuple[str, str]:
    """The engine's name, and why; `settings` are those that the memory plan has filled. Raises EngineUnavailable if vLLM is
    asked for, by name or by what only it can do, and cannot run."""
    if settings.engine.name == "transformers":
        return "transformers", "asked for"
    is_nf4 = settings.model.quantization == "nf4"
    if machine.device == "cpu" and is_nf4:
        if settings.engine.name == "vllm":
            raise EngineUnavailable("vLLM holds no nf4 weights on a CPU; use engine.name=transformers")
        return "transformers", "vLLM holds no nf4 weights on a CPU"
    try:
        version = check_version()
        if is_nf4:
            set_environment(device=machine.device, threads=machine.threads)  # before vLLM is imported
            check_nf4()
        return "vllm", f"version {version}"
    except EngineUnavailable as reason:
        if settings.engine.name == "vllm" or settings.engine.tensor_parallel_size > 1:
            raise
        return "transformers", str(reason)


def build_engine(
    settings: Settings, machine: Machine, name: str, source: ModelSource, tokenizer: PreTrainedTokenizerBase,
    layout: AdapterLayout,
) -> Engine:  # fmt: skip
    """The rollout engine `name`, which loads the base weights. `settings` are those that the memory plan has filled."""
    engine, model = settings.engine, settings.model
    assert engine.max_num_seqs is not None and engine.kv_cache_gib is not None
    eos = end_of_sequence_ids(source, tokenizer)
    if name == "transformers":
        from actors.transformers_engine import TransformersEngine

        base = load_base_model(
            source, dtype=machine.dtype, device=machine.device, quantization=model.quantization,
            trust_remote_code=model.trust_remote_code, keep_16bit=model.keep_16bit,
        )  # fmt: skip
        return TransformersEngine(
            base, tokenizer, lora=lora_arguments(settings), eos_token_ids=eos, max_num_seqs=engine.max_num_seqs
        )
    from actors.vllm_engine import VllmEngine, VllmOptions

    on_cpu = machine.device == "cpu"
    max_model_len = settings.data.max_prompt_tokens + settings.sampling.max_tokens
    options = VllmOptions(
        model_path=source.path, revision=source.revision, dtype=machine.dtype, quantization=model.quantization,
        device=machine.device, threads=machine.threads, max_model_len=max_model_len, max_num_seqs=engine.max_num_seqs,
        kv_cache_bytes=int(engine.kv_cache_gib * 2**30),
        enforce_eager=on_cpu if engine.enforce_eager is None else engine.enforce_eager,
        per_request_seeds=samples_repeat(settings, machine),
        seed=settings.run.seed, trust_remote_code=model.trust_remote_code,
        max_num_batched_tokens=engine.max_num_batched_tokens, kv_cache_dtype=engine.kv_cache_dtype,
        keep_16bit=tuple(model.keep_16bit), share_weights=engine.share_weights != "never",
        release_cache=bool(engine.release_cache), tensor_parallel_size=engine.tensor_parallel_size,
    )  # fmt: skip
    return VllmEngine(options, tokenizer, layout=layout, eos_token_ids=eos)
