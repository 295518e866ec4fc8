"""The identity of a run: what must stay the same for it to be resumed, and what may change and is said then. Loads no
torch, so that a refusal comes at once.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from actors.models.adapter import WEIGHTS
from conf.errors import disk_errors
from conf.fields import walk
from conf.schema import Settings
from conf.validate import named_terms
from epiphany.report.run_folder import Layout, check_identity, read_settings


def identity_of_settings(settings: Settings) -> dict[str, object]:
    """The settings that must stay the same for a run to be resumed."""
    model, lora = settings.model, settings.model.lora
    return {
        "model.path": model.path,
        "model.revision": model.revision,
        "model.adapter": model.adapter,
        "model.quantization": model.quantization,
        "model.keep_16bit": list(model.keep_16bit),
        "model.dtype": model.dtype,
        "model.lora.rank": lora.rank,
        "model.lora.alpha": lora.alpha,
        "model.lora.rslora": lora.rslora,
        "model.lora.target_modules": None if lora.target_modules is None else sorted(lora.target_modules),
        "algorithm.name": settings.algorithm.name,
        "algorithm.group_size": settings.algorithm.group_size,
        "sampling.temperature": settings.sampling.temperature,
        "sampling.top_k": settings.sampling.top_k,
        "sampling.top_p": settings.sampling.top_p,
        "sampling.min_p": settings.sampling.min_p,
        "sampling.stop": list(settings.sampling.stop),
        "data.source": settings.data.source,
        "data.sources": [f"{source.weight:g} x {source.name} = {source.source}" for source in settings.data.sources],
        "data.difficulty": settings.data.difficulty and list(settings.data.difficulty),
        "data.revisit_solved": settings.data.revisit_solved,
        "run.seed": settings.run.seed,
        **{f"warmup.{setting.key}": setting.value for setting in walk(settings.warmup)},
        "reward.terms": [
            f"{term.weight:g} x {term.name} = {term.fn} {dict(term.options) or ''} {' '.join(term.sources)}".strip()
            for term in named_terms(settings.reward.terms)
        ],
    }


def identity(settings: Settings, *, prompts: str, weights: str) -> dict[str, object]:
    """All that must stay the same: settings, and the fingerprints of the training prompts, the base model's weights and
    the adapter that training starts from.
    """
    start = adapter_fingerprint(settings)
    return {
        **identity_of_settings(settings),
        **({} if start is None else {"the weights of model.adapter": start}),
        "the training prompts": prompts,
        "the base model's weights": weights,
    }


def adapter_fingerprint(settings: Settings) -> str | None:
    """A hash of the weights in model.adapter; None if no adapter is named. Raises DiskError."""
    if settings.model.adapter is None:
        return None
    file = Path(settings.model.adapter).expanduser() / WEIGHTS
    with disk_errors(file):
        return _hash(file.read_bytes())


def user_files(settings: Settings) -> dict[str, str]:
    """A hash of each file of the user's that holds a reward or the algorithm, by the name that the settings give it."""
    names = [*(term.fn for term in settings.reward.terms), settings.algorithm.name]
    modules = sorted({name.rpartition(":")[0] for name in names if ":" in name})
    files = {module: file for module in modules if (file := _file_of(module)) is not None}
    hashes = {}
    for module, file in files.items():
        with disk_errors(file):
            hashes[module] = _hash(file.read_bytes())
    return hashes


def reward_fingerprint(settings: Settings, files: Mapping[str, str]) -> str:
    """Tells whether scores can be compared: a hash of the reward's terms and of the `user_files` that hold them."""
    terms = [
        [
            *(term.fn, term.name, term.weight, dict(term.options), list(term.sources), term.max_score),
            files.get(term.fn.rpartition(":")[0]),
        ]
        for term in named_terms(settings.reward.terms)
    ]
    return _hash(json.dumps(terms, sort_keys=True).encode())


def check_early(settings: Settings) -> None:
    """Raises RunFolderError if run.folder holds another run, as far as the settings tell."""
    folder = Layout(Path(settings.run.folder))
    if folder.settings.is_file():
        old = read_settings(folder).identity
        new = identity_of_settings(settings)
        check_identity(
            folder, {key: value for key, value in old.items() if key in new}, new, resume=settings.run.resume
        )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _file_of(module: str) -> Path | None:
    """The file of a module, which is named by its path or as import does; None if it is not found."""
    if module.endswith(".py"):
        candidates = [Path(module).expanduser()]
    else:
        path = module.replace(".", "/")
        folders = [*map(Path, sys.path), Path()]
        candidates = [folder / name for folder in folders for name in (f"{path}.py", f"{path}/__init__.py")]
    return next((file for file in candidates if file.is_file()), None)
