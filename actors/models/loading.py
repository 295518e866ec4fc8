"""Load a base model's frozen weights, and refuse a checkpoint that would train on wrong numbers.

Knows transformers and bitsandbytes; knows neither the hub, engines nor objectives.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypedDict, cast, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from actors.models.families import family_of
from actors.models.host_memory import move_to_host
from actors.models.source import ModelError, ModelSource
from conf.errors import UsageError


def load_config(source: ModelSource, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration. Raises ModelError if it cannot be read."""
    with _readable(source):
        return AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)


def model_class(config: PretrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """What makes a language model of this configuration: some models have none without their image encoder."""
    is_language_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map")
    return AutoModelForCausalLM if is_language_model else AutoModelForImageTextToText


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return list(cast("torch.nn.ModuleList", model.get_decoder().layers))


def choose_dtype(name: str, device: str) -> str:
    """`auto` is float32 on a CPU, bfloat16 on a GPU. A GPU without bfloat16 computes in float16 instead."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    if name == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return name


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; None if it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def checkpoint_quantization(source: ModelSource, *, trust_remote_code: bool) -> str | None:
    """ "nf4" if the checkpoint is a 4-bit bitsandbytes one, None if it is plain. Raises ModelError for other kinds."""
    stored = getattr(load_config(source, trust_remote_code=trust_remote_code), "quantization_config", None)
    if stored is None:
        return None
    options: dict[str, object] = stored if isinstance(stored, dict) else stored.to_dict()
    if options.get("quant_method") == "bitsandbytes" and options.get("load_in_4bit"):
        return "nf4"
    raise ModelError(
        f"model.path: {source.path} is quantized by {options.get('quant_method')}; train from the plain weights (with "
        "model.quantization=nf4 if they must be small) or from a 4-bit bitsandbytes checkpoint"
    )


def check_checkpoint(source: ModelSource, model: PreTrainedModel, *, trust_remote_code: bool) -> None:
    """Compare names and shapes of the checkpoint with `model`, which is on the meta device. Reads no weights.

    Raises ModelError if a weight is missing or has another shape: transformers would fill it with random numbers, vLLM
    would leave its memory as it is.
    """
    # The shapes of a quantized checkpoint are those of packed bytes.
    if checkpoint_quantization(source, trust_remote_code=trust_remote_code) is not None:
        stored: set[str] = set()
        for file in local_folder(source).glob("*.safetensors"):
            with _readable(source), safe_open(file, framework="pt") as tensors:
                stored |= set(tensors.keys())
        missing = {name for name, _ in model.named_parameters()} - stored
        check_loading_report(source.path, {"missing_keys": missing, "mismatched_keys": ()})
        return
    with _readable(source, RuntimeError):
        loaded = model_class(load_config(source, trust_remote_code=trust_remote_code)).from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=trust_remote_code,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _, report = cast("tuple[PreTrainedModel, LoadingReport]", loaded)
    check_loading_report(source.path, report)


class LoadingReport(TypedDict):
    """What transformers says it could not load (`output_loading_info`): names, and names with both shapes."""

    missing_keys: Iterable[str]
    mismatched_keys: Iterable[tuple[object, ...]]


def check_loading_report(path: str, report: LoadingReport) -> None:
    """Raises ModelError if a weight of the model is missing from the checkpoint or has another shape there."""
    bad = [*sorted(report["missing_keys"]), *sorted(str(name) for name, *_ in report["mismatched_keys"])]
    if bad:
        raise ModelError(
            f"model.path: {path} lacks {len(bad)} of the model's weights, or has them in another shape: "
            f"{_first(bad)}; copy or download it again"
        )


def check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises ModelError if a weight (of nf4: a scale) of the base model holds NaN or infinity."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if not parameter.numel():
            continue  # a layer of which this process keeps a part, and which was looked at when it was loaded
        if parameter.is_floating_point():
            tensors[name] = parameter.detach()
        elif state is not None:
            tensors[name] = state.state2.absmax if state.nested else state.absmax
    # NaN spreads to both extremes, and they need no memory, which a mask of a large weight would.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).float() for tensor in tensors.values()])
    bad = [name for name, good in zip(tensors, extremes.isfinite().all(1).tolist(), strict=True) if not good]
    if bad:
        raise ModelError(f"model.path: {path} holds NaN or infinity in {_first(bad)}; copy or download it again")


def _first(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def load_base_model(
    source: ModelSource,
    *,
    dtype: str,
    device: str,
    quantization: str,
    trust_remote_code: bool,
    attention: str | None = None,
    keep_16bit: Sequence[str] = (),
    embedding_on_host: bool = False,
) -> PreTrainedModel:
    """The frozen base model on `device`, in `dtype` or as nf4 with double quantization computed in `dtype`.

    `attention` is an implementation of transformers; None takes one that computes all of the family's attention.
    A checkpoint that is in nf4 already is loaded as it is. `keep_16bit` names linear layers that nf4 leaves alone.
    Raises ModelError if the checkpoint cannot be read.
    """
    in_flight = quantization == "nf4" and checkpoint_quantization(source, trust_remote_code=trust_remote_code) is None
    config = load_config(source, trust_remote_code=trust_remote_code)
    if attention is None:
        attention = family_of(config).plain_attention
    nf4 = {"quantization_config": _nf4_config(dtype, keep_16bit)} if in_flight else {}
    with _readable(source):
        model: PreTrainedModel = model_class(config).from_pretrained(
            source.path,
            revision=source.revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            device_map={"": device},
            **nf4,
        )
    for module in model.modules():
        disable_repacking(module)
    keep_language_model(model)
    model.requires_grad_(False)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    if embedding_on_host:
        move_to_host(model, model.get_input_embeddings())
    return model


def keep_language_model(model: PreTrainedModel) -> None:
    """Take the parts for images and sound out of a model, which are neither trained nor served."""
    decoder, base = model.get_decoder(), model.base_model
    if decoder is not base:
        for name, part in list(base.named_children()):
            if part is not decoder:
                setattr(base, name, None)


def _nf4_config(dtype: str, keep_16bit: Sequence[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=["lm_head", *keep_16bit],
    )


@runtime_checkable
class _RepackingLinear(Protocol):
    """bitsandbytes' Linear4bit as far as it is used here."""

    support_avx512bf16_for_cpu: bool


def disable_repacking(module: object) -> None:
    """Disable bitsandbytes' CPU repacking (`Linear4bit.forward`): other readers assume the original layout."""
    if isinstance(module, _RepackingLinear):
        module.support_avx512bf16_for_cpu = False


def fingerprint(source: ModelSource) -> str:
    """A hash that changes with the weights of a model.

    It covers the sizes of its files and 4 KiB at 64 places of each: reading all of a large model would take minutes.
    """
    digest, folder = hashlib.sha256(), local_folder(source)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def local_folder(source: ModelSource) -> Path:
    """The folder on this machine that holds the model's files."""
    from huggingface_hub import snapshot_download

    folder = Path(source.path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))


@contextmanager
def _readable(source: ModelSource, *more: type[Exception]) -> Iterator[None]:
    """Turn the errors of a checkpoint that cannot be read into a ModelError."""
    try:
        yield
    except UsageError:
        raise
    except (SafetensorError, OSError, ValueError, *more) as error:
        raise ModelError(f"model.path: {source.path} cannot be read: {' '.join(str(error).split())[:300]}") from error
