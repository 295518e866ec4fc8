"""Convert a .gguf file once into a folder of bfloat16 weights that transformers and vLLM load.

The folder gets its place in the cache by one rename, so that an interrupted conversion leaves nothing that counts.
Knows transformers; does not know where the file comes from.
"""

import contextlib
import hashlib
import io
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from actors.models.loading import LoadingReport, check_finite, check_loading_report
from actors.models.source import ModelError, cache_folder, writing_to

# What transformers and gguf raise on files of other kinds, and on damaged or truncated ones.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error)


def converted_folder(gguf: Path) -> Path:
    """The folder with the dequantized weights and the tokenizer of `gguf`. Raises ModelError."""
    digest = hashlib.sha256(f"{gguf.name}:{gguf.stat().st_size}:{_head_digest(gguf)}".encode()).hexdigest()[:12]
    folder = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if _is_complete(folder):
        return folder
    print(f"converting {gguf.name} once into {folder}", file=sys.stderr)
    with writing_to(folder.parent, variable="EPIPHANY_CACHE"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, _quiet():
            model, tokenizer = _load(gguf)
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            _sync(Path(scratch))
            _move(Path(scratch), folder)
    return folder


def _load(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in bfloat16, checked, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"model.path: {gguf} cannot be read as a GGUF file ({reason}); copy or download it again"
        ) from error
    model, report = cast("tuple[PreTrainedModel, LoadingReport]", loaded)
    check_loading_report(str(gguf), report)
    check_finite(model, str(gguf))
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    # The weights are plain now: clear the marks that would make transformers refuse to save them.
    delattr(model.config, "quantization_config")
    for name, value in (("is_quantized", False), ("hf_quantizer", None)):
        setattr(model, name, value)
    model.config.dtype = torch.bfloat16
    model.config._name_or_path = ""
    return model, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show neither progress bars nor warnings of transformers, about which a user can do nothing."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _is_complete(folder: Path) -> bool:
    """Whether the configuration, the tokenizer and weights are there."""
    names = ("config.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in names) and any(folder.glob("*.safetensors"))


def _move(scratch: Path, folder: Path) -> None:
    """Rename a complete `scratch` to `folder`, unless another process was faster; `scratch` exists afterwards."""
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        scratch.rename(folder)
        scratch.mkdir()
    except OSError:
        if not _is_complete(folder):
            raise


def _sync(folder: Path) -> None:
    """Write the files of `folder` to the disk, so that a rename never shows a file without its content."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _head_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 20)).hexdigest()
