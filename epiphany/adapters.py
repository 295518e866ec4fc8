"""The adapter of a run or of a model in use: what the settings say of it, and what is stored. Knows no engine."""

from pathlib import Path

import torch

from actors.models.families import ModelFamily, family_of
from actors.models.lora import LoraArguments, adapter_layout
from actors.models.peft_folder import PeftFolder, read_peft_folder
from actors.models.source import ModelSource
from actors.models.weight_sharing import build_meta_model
from actors.types import Adapter, AdapterLayout
from conf.schema import Settings


def lora_arguments(settings: Settings, family: ModelFamily) -> LoraArguments:
    """What describes the adapter: that of model.adapter, if one is named, else what model.lora asks for.

    rsLoRA (arXiv:2312.03732) is an alpha that is larger by the root of the rank, so that every engine and PEFT serve it
    as it is.
    """
    if (stored := _stored(settings)) is not None:
        return stored.lora
    lora = settings.model.lora
    alpha = lora.alpha * lora.rank**0.5 if lora.rslora else lora.alpha
    targets = family.targets if lora.target_modules is None else lora.target_modules
    return {"rank": lora.rank, "alpha": alpha, "target_modules": list(targets)}


def adapter_layout_of(settings: Settings, source: ModelSource) -> AdapterLayout:
    """What lies where in the adapter's buffer, on any machine."""
    trusted = settings.model.trust_remote_code
    meta_model = build_meta_model(source, dtype="float32", trust_remote_code=trusted)
    return adapter_layout(meta_model, **lora_arguments(settings, family_of(meta_model.config)))


def stored_adapter(settings: Settings, layout: AdapterLayout) -> Adapter | None:
    """The adapter in model.adapter, which `layout` is that of; None if none is named. Raises AdapterError."""
    stored = _stored(settings)
    return None if stored is None else stored.load(layout)


def no_adapter(layout: AdapterLayout) -> Adapter:
    """An adapter that leaves the base model as it is."""
    return Adapter(0, layout, torch.zeros(layout.size))


def _stored(settings: Settings) -> PeftFolder | None:
    folder = settings.model.adapter
    return None if folder is None else read_peft_folder(Path(folder).expanduser())
