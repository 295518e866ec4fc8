"""The settings of a task that uses a model: those of the run that trained it, with what the command changes.

A run is used if the command names one, or if there is one in run.folder and the command names no model. Loads no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from conf.compose import compose_config, to_settings
from conf.errors import UsageError
from conf.facts import USING_A_MODEL
from conf.overrides import IMPLIED, normalize_overrides
from conf.schema import GROUPS, Settings
from conf.validate import check_settings
from epiphany.report.run_folder import ADAPTER_WEIGHTS, Layout, read_settings

# Presets that a task may choose anew for the model of a run.
CHANGEABLE = ("hardware", "runtime", "data", "reward", "benchmark")
# Settings that would name another model than the run's.
OF_THE_MODEL = ("model.path", "model.revision", "model.package", "model.package_path")


def load_settings(*overrides: str) -> Settings:
    """The checked settings that `python launch.py <overrides>` would have. Raises UsageError."""
    return settings_of_task(compose_config(overrides), normalize_overrides(overrides))


def settings_of_task(config: DictConfig, overrides: Sequence[str]) -> Settings:
    """The checked settings of the command that composed `config` from the normalized `overrides`."""
    if config.task in USING_A_MODEL:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o not in IMPLIED])
        keys = {override.key_or_group for override in parsed}
        folder = Layout(Path(config.run.folder))
        is_named = bool(keys & {"run.folder", "run.name"})
        if is_named and not folder.settings.is_file():
            raise UsageError(f"run.folder={folder.path}: there is no run; name one, or a model with model.path")
        if is_named or (folder.settings.is_file() and not any(key.split(".")[0] == "model" for key in keys)):
            config = _of_run(folder, config, parsed)
    settings = to_settings(config)
    check_settings(settings)
    return settings


def adapter_of(folder: Layout) -> Path:
    """The folder of the run's adapter: the final one, else that of the newest checkpoint. Raises UsageError."""
    checkpoints = sorted(folder.checkpoints.glob("step-*"), reverse=True)
    for path in [folder.adapter, *checkpoints]:
        if (path / ADAPTER_WEIGHTS).is_file():
            return path
    raise UsageError(
        f"run.folder={folder.path}: the run has saved no adapter yet; model.adapter=null uses its base model"
    )


def _of_run(folder: Layout, config: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """The settings that the run was last started with, changed by the overrides."""
    try:
        chosen = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Settings), read_settings(folder).settings))
    except OmegaConfBaseException as error:
        raise UsageError(
            f"{folder.settings} has settings that this version of Epiphany does not know; use the version that made "
            f"it: {str(error).splitlines()[0]}"
        ) from error
    chosen.task, chosen.run.folder = config.task, str(folder.path)
    keys = [override.key_or_group for override in overrides]
    if "model.adapter" not in keys:
        chosen.model.adapter = str(adapter_of(folder))
    for override in overrides:
        _apply(chosen, override, folder)
    return chosen


def _apply(config: DictConfig, override: Override, folder: Layout) -> None:
    key = override.key_or_group
    if key in ("task", "run.folder", "run.name") or key.startswith("hydra"):
        return
    if override.is_sweep_override() or override.is_delete():
        raise UsageError(f"{override.input_line}: a task that uses a run takes one value for each setting")
    if key in GROUPS:
        if key not in CHANGEABLE:
            raise UsageError(
                f"{override.input_line}: the run in {folder.path} has settled this; change single settings, or name a "
                "model with model.path and no run"
            )
        preset = OmegaConf.load(Path(str(conf.__file__)).parent / key / f"{override.value()}.yaml")
        if key == "benchmark":  # spans sections
            config.merge_with(preset)
        else:
            config[key] = OmegaConf.merge(OmegaConf.structured(getattr(Settings(), key)), preset)
        return
    if key in OF_THE_MODEL or key.startswith("model.lora."):
        raise UsageError(f"{override.input_line}: the run in {folder.path} has its own model; name no run for another")
    try:
        OmegaConf.update(config, key, override.value(), merge=False, force_add=override.is_force_add())
    except OmegaConfBaseException as error:
        raise UsageError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
