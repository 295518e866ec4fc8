"""The base model with an adapter in its weights, tensor by tensor, so that a model larger than memory can be merged.

W + (alpha / rank) B A is computed in float32 from the checkpoint's own weights, and rounded once. Knows files and
tensors; loads no model.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from actors.models.hub import PATTERNS
from actors.types import Adapter
from conf.errors import UsageError

SHARD_BYTES = 2 << 30  # of a file of weights, and about the memory that merging takes
WEIGHT_FILES = "*.safetensors"
INDEX = "model.safetensors.index.json"
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


class ExportError(UsageError):
    """A model that cannot be exported so; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights in `folder`: for each tensor's name the file that holds it, in the order of the files."""

    folder: Path
    file_of: Mapping[str, Path]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Raises ExportError if the folder has no weights as safetensors."""
        file_of = {}
        for file in sorted(folder.glob(WEIGHT_FILES)):
            with safe_open(file, framework="pt") as opened:
                file_of |= dict.fromkeys(opened.keys(), file)
        if not file_of:
            raise ExportError(f"task=export: {folder} has no weights as safetensors; export from such a model")
        return cls(folder, file_of)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in set(self.file_of.values()))

    @property
    def dtype(self) -> str:
        """The type of most of the weights, as torch calls it."""
        kinds: Counter[str] = Counter()
        for file in set(self.file_of.values()):
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                kinds.update(opened.get_slice(name).get_dtype() for name in names)
        (kind, _), *_ = kinds.most_common(1)
        return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(kind, kind)

    def weight_of(self, module: str) -> str:
        """The name of a linear layer's weight here, where a model with an image encoder has longer names than
        transformers. Raises ExportError.
        """
        name = f"{module}.weight"
        if name in self.file_of:
            return name
        layer = "layers." + name.partition("layers.")[2]
        found = [key for key in self.file_of if key.endswith(f".{layer}") and "vision" not in key]
        if len(found) != 1:
            raise ExportError(f"task=export: the checkpoint in {self.folder} has no weight for the layer {module}")
        return found[0]


def check_merge(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by the name of the weight that they change. Raises ExportError if one is quantized or does not fit."""
    flat = adapter.flat.cpu()
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for entry in adapter.layout.entries:
        sides.setdefault(entry.module, {})[entry.side] = entry.view(flat)
    pairs = {checkpoint.weight_of(module): (of["A"], of["B"]) for module, of in sides.items()}
    for name, (a, b) in pairs.items():
        with safe_open(checkpoint.file_of[name], framework="pt") as opened:
            weight = opened.get_slice(name)
            shape, kind = tuple(weight.get_shape()), weight.get_dtype()
        if kind not in ("F32", "BF16", "F16"):
            raise ExportError(
                f"task=export: {name} is stored in {kind}, so there are no 16-bit weights to merge into; export from a "
                "run on the plain model, or use format=peft"
            )
        if shape != (b.shape[0], a.shape[1]):
            raise ExportError(f"task=export: {name} is {shape}, the adapter is for {(b.shape[0], a.shape[1])}")
    return pairs


def merge(checkpoint: Checkpoint, adapter: Adapter, to: Path, *, dtype: torch.dtype | None) -> None:
    """Write the merged model to the new folder `to`, weights in `dtype` (None: each in the type that it has)."""
    pairs, scaling = check_merge(checkpoint, adapter), adapter.layout.scaling
    to.mkdir(parents=True)
    for file in _beside_weights(checkpoint.folder):
        shutil.copy(file, to)
    if dtype is not None:
        _set_dtype(to / "config.json", str(dtype).removeprefix("torch."))

    def merged() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in _tensors(checkpoint):
            wanted = dtype if dtype is not None and weight.dtype in PLAIN else weight.dtype
            if name in pairs:
                a, b = pairs[name]
                weight = torch.addmm(weight.float(), b, a, alpha=scaling)
            yield name, weight.to(wanted).contiguous()

    _write_shards(merged(), to)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    for file in dict.fromkeys(checkpoint.file_of.values()):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            for name in names:
                yield name, opened.get_tensor(name)


def _beside_weights(folder: Path) -> Sequence[Path]:
    """What a model needs beside its weights: configuration, tokenizer, chat template."""
    files = [file for pattern in PATTERNS if pattern != WEIGHT_FILES for file in sorted(folder.glob(pattern))]
    return [file for file in files if not file.name.endswith(".index.json")]


def _set_dtype(config: Path, name: str) -> None:
    content = json.loads(config.read_text())
    keys = [key for key in ("dtype", "torch_dtype") if key in content] or ["dtype"]
    for part in (content, content.get("text_config", {})):
        part |= dict.fromkeys((key for key in keys if part is content or key in part), name)
    config.write_text(json.dumps(content, indent=2))


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], to: Path) -> None:
    """Files of about SHARD_BYTES, and their index if there are several."""
    shard: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    total = size = 0

    def flush() -> None:
        save_file(shard, to / f"{len(names)}.part", metadata={"format": "pt"})
        names.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(names) == 1:
        (to / "0.part").rename(to / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    for i, file in enumerate(files):
        (to / f"{i}.part").rename(to / file)
    weight_map = {name: file for file, of_file in zip(files, names, strict=True) for name in of_file}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (to / INDEX).write_text(json.dumps(index, indent=1))
