"""task=export: write the trained model for others, load it as they would, and keep it only if it is the same model."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from actors.models.loading import local_folder
from actors.models.peft_folder import write_peft_folder
from actors.models.source import ModelSource
from actors.rollout import RolloutWorker
from actors.types import Adapter
from conf.errors import disk_errors
from conf.schema import Settings
from epiphany.adapters import adapter_layout_of, stored_adapter
from epiphany.export.card import model_card, public_name
from epiphany.export.gguf import check_gguf, write_gguf
from epiphany.export.merge import Checkpoint, ExportError, check_merge, merge
from epiphany.export.proof import Answer, Proof, bound_of, check_llama_cpp, prove_llama_cpp, prove_transformers
from epiphany.report.run_folder import Layout
from epiphany.rows import system_prompt_of
from epiphany.run_data import load_model_source
from epiphany.run_plan import choose_device
from epiphany.use.evaluate import load_questions
from epiphany.use.model import Load, answer_sampling, describe, open_model

HUB = "hub:"
PROOF_TOKENS = 64  # of each answer that are compared
LLAMA_CPP_PROOF_TOKENS = 16  # llama.cpp computes one token at a time, on the CPU
GGUF, GGUF_FORMATS = "model.gguf", ("gguf", "ollama")


@dataclass(frozen=True)
class Work:
    """What is exported: the adapter, the model and the checkpoint that it was trained on, and where the result goes."""

    settings: Settings
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    checkpoint: Checkpoint
    target: Path

    @property
    def is_gguf(self) -> bool:
        return self.settings.export.format in GGUF_FORMATS

    @property
    def kind(self) -> str:
        """The type of the exported weights."""
        asked = self.settings.export
        if self.is_gguf:
            return asked.gguf_type
        return "float32" if asked.format == "peft" or asked.dtype == "float32" else self._dtype

    @property
    def _dtype(self) -> str:
        asked = self.settings.export.dtype
        return self.checkpoint.dtype if asked == "auto" else asked


def export(settings: Settings, note: Callable[[str], None]) -> Path:
    """Export, prove and return the folder. Raises UsageError, before any work where that can be known."""
    work = _prepare(settings)
    note(f"{describe(settings)}, as {settings.export.format}")
    answers = _engine_answers(work, note)
    scratch = work.target.with_name(f".{work.target.name}.writing")
    with disk_errors(work.target):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        note(f"writing {work.target} ...")
        _write(work, scratch)
        note("loading it again ...")
        proof = _prove(work, scratch, answers)
        note(proof.line())
        if not proof.holds:
            raise ExportError(
                f"task=export: this is not the model that was trained: it differs by {proof.mean:.2g} nats a token, "
                f"and {proof.bound:.2g} are allowed. It is left in {scratch}, and is no export"
            )
        (scratch / "README.md").write_text(model_card(settings, proof))
        scratch.rename(work.target)
    note(f"exported to {work.target}")
    if (hub := _hub_name(settings)) is not None:
        _push(work.target, hub)
        note(f"pushed to {hub}")
    return work.target


def _prepare(settings: Settings) -> Work:
    """Everything that can be refused before the engine starts."""
    asked = settings.export
    if settings.model.adapter is None:
        raise ExportError("task=export: there is no adapter to export; name a run, or an adapter in model.adapter")
    target = _target(settings)
    if target.exists():
        raise ExportError(f"export.to={target} is there already; name another folder")
    is_gguf = asked.format in GGUF_FORMATS
    if is_gguf:
        check_gguf(asked.llama_cpp, asked.gguf_type)
        check_llama_cpp()
    source, tokenizer = load_model_source(settings)
    adapter = stored_adapter(settings, adapter_layout_of(settings, source))
    assert adapter is not None
    checkpoint = Checkpoint.open(local_folder(source))
    needed = 4 * adapter.flat.numel()
    if asked.format != "peft":
        check_merge(checkpoint, adapter)
        # A GGUF file is written beside the merged model, in float32 unless another type is asked for.
        in_float32 = asked.dtype == "float32" or (is_gguf and asked.dtype == "auto")
        needed = checkpoint.size * (2 if in_float32 else 1) * (2 if is_gguf else 1)
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ExportError(
            f"export.to={target}: this needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there"
        )
    return Work(settings, source, tokenizer, adapter, checkpoint, target)


def _target(settings: Settings) -> Path:
    asked, run = settings.export, Layout(Path(settings.run.folder))
    if asked.to is not None and not asked.to.startswith(HUB):
        return Path(asked.to).expanduser()
    return (run.path if run.settings.is_file() else Path("exported")) / "export" / asked.format


def _hub_name(settings: Settings) -> str | None:
    to = settings.export.to
    return to.removeprefix(HUB) if to is not None and to.startswith(HUB) else None


def _engine_answers(work: Work, note: Callable[[str], None]) -> list[Answer]:
    """Greedy answers of the training engine to held-out questions; the engine is closed when this returns."""
    settings = work.settings
    asked = replace(settings, evaluation=replace(settings.evaluation, max_prompts=settings.export.proof_answers))
    _, questions = load_questions(asked, lambda _line: None)
    most = LLAMA_CPP_PROOF_TOKENS if work.is_gguf else PROOF_TOKENS
    sampling = answer_sampling(settings, temperature=0.0, max_tokens=min(most, settings.sampling.max_tokens))
    prompts = questions.prompts
    load = Load(len(prompts), max(len(prompt.token_ids) for prompt in prompts), sampling.max_tokens)
    with ExitStack() as closing:
        model = open_model(settings, work.source, work.tokenizer, load, note=note, closing=closing)
        worker = RolloutWorker(model.engine, seed=settings.run.seed)
        worker.dispatch(prompts, sampling, 1)
        answers: list[Answer] = []
        while worker.unfinished:
            for key in worker.run_engine().finished:
                group = worker.pop_group(key)
                (trajectory,) = group.trajectories
                answers.append(Answer(group.prompt.token_ids, trajectory.token_ids, trajectory.logprobs))
    return answers


def _write(work: Work, folder: Path) -> None:
    settings, asked = work.settings, work.settings.export
    if asked.format == "peft":
        write_peft_folder(folder, work.adapter, base_model=settings.model.path)
        return
    dtype = None if asked.dtype == "auto" else getattr(torch, asked.dtype)
    if asked.format == "merged":
        merge(work.checkpoint, work.adapter, folder, dtype=dtype)
        _keep_template(work, folder)
        return
    folder.mkdir(parents=True)
    merged = folder / "merged"
    merge(work.checkpoint, work.adapter, merged, dtype=dtype or torch.float32)  # rounded once, by llama.cpp
    _keep_template(work, merged)
    write_gguf(merged, folder / GGUF, kind=asked.gguf_type, llama_cpp=asked.llama_cpp)
    shutil.rmtree(merged)
    if asked.format == "ollama":
        (folder / "Modelfile").write_text(_modelfile(settings))


def _prove(work: Work, folder: Path, answers: list[Answer]) -> Proof:
    settings, device = work.settings, choose_device(work.settings)
    bound = bound_of(work.kind, engine_dtype=device.dtype, quantization=settings.model.quantization)
    if settings.export.format == "peft":
        return prove_transformers(work.checkpoint.folder, answers, bound=bound, adapter=folder)
    if settings.export.format == "merged":
        return prove_transformers(folder, answers, bound=bound)
    return prove_llama_cpp(folder / GGUF, answers, bound=bound, threads=device.threads)


def _keep_template(work: Work, folder: Path) -> None:
    """The chat template of the run, if it has one of its own, goes with the model."""
    if work.settings.model.chat_template is not None:
        (folder / "chat_template.jinja").write_text(str(work.tokenizer.chat_template))


def _modelfile(settings: Settings) -> str:
    """Ollama knows the chat template by the one in the GGUF file."""
    system_prompt = system_prompt_of(settings, settings.data.system_prompt)
    lines = [f"# {public_name(settings.model.path)}, trained by reinforcement learning", f"FROM ./{GGUF}"]
    if system_prompt:
        lines.append(f'SYSTEM """{system_prompt}"""')
    lines.append(f"PARAMETER num_ctx {settings.data.max_prompt_tokens + settings.sampling.max_tokens}")
    return "\n".join(lines) + "\n"


def _push(folder: Path, name: str) -> None:
    """Upload the folder to the hub. Raises ExportError; the export stays here."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"export.to={HUB}{name}: the hub does not take it ({reason}); it is in {folder}") from error
