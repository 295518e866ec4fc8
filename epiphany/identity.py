"""The identity of a run: what must stay the same for it to be resumed. Loads no torch, so that a refusal comes at
once.
"""

from pathlib import Path

from conf.schema import Settings
from conf.validate import named_terms
from epiphany.report.run_folder import Layout, check_identity, read_settings


def identity_of_settings(settings: Settings) -> dict[str, object]:
    """The settings that must stay the same for a run to be resumed."""
    model, lora = settings.model, settings.model.lora
    return {
        "model.path": model.path,
        "model.revision": model.revision,
        "model.quantization": model.quantization,
        "model.keep_16bit": list(model.keep_16bit),
        "model.dtype": model.dtype,
        "model.lora.rank": lora.rank,
        "model.lora.alpha": lora.alpha,
        "model.lora.rslora": lora.rslora,
        "model.lora.target_modules": sorted(lora.target_modules),
        "algorithm.name": settings.algorithm.name,
        "algorithm.group_size": settings.algorithm.group_size,
        "learner.optimizer": settings.learner.optimizer,
        "sampling.temperature": settings.sampling.temperature,
        "data.source": settings.data.source,
        "run.seed": settings.run.seed,
        "reward.terms": [
            f"{term.weight:g} x {term.name} = {term.fn} {dict(term.options) or ''}".strip()
            for term in named_terms(settings.reward.terms)
        ],
    }


def identity(settings: Settings, *, prompts: str, weights: str) -> dict[str, object]:
    """All that must stay the same: settings, and the fingerprints of the training prompts and the base model's
    weights.
    """
    return {
        **identity_of_settings(settings),
        "the training prompts": prompts,
        "the base model's weights": weights,
    }


def check_early(settings: Settings) -> None:
    """Raises RunFolderError if run.folder holds another run, as far as the settings tell."""
    folder = Layout(Path(settings.run.folder))
    if folder.settings.is_file():
        old, _ = read_settings(folder)
        new = identity_of_settings(settings)
        check_identity(
            folder, {key: value for key, value in old.items() if key in new}, new, resume=settings.run.resume
        )
