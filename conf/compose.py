"""From overrides to Settings, by Hydra. Raises UsageError for what cannot be composed."""

from collections.abc import Sequence
from typing import cast

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.errors import UsageError
from conf.overrides import check_overrides, normalize_overrides
from conf.schema import Settings, register
from conf.validate import check_settings

# What to do about settings without a default.
MISSING = {
    "model.path": "name a folder, a Hugging Face id or a .gguf file",
}


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """What `python launch.py <overrides>` composes. Raises UsageError."""
    check_overrides(overrides)
    register()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return compose("config", normalize_overrides(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError("\n".join(map(str, filter(None, (error, error.__cause__))))) from error


def load_settings(*overrides: str) -> Settings:
    """The checked settings of a run with these overrides. Raises UsageError."""
    settings = to_settings(compose_config(overrides))
    check_settings(settings)
    return settings


def to_settings(config: DictConfig) -> Settings:
    """The composed config as Settings. Raises UsageError if a setting without a default has no value."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        advice = (
            "a term needs fn: a registered name, module:function, or file.py:function; one of data.sources needs source"
        )
        raise UsageError("\n".join(f"{key}: {MISSING.get(key, advice)}" for key in missing))
    return cast(Settings, OmegaConf.to_object(config))
