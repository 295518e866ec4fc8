"""The settings of a task that uses a model: those of the run that trained it, with what the command changes.

A run is used if the command names one, or if there is one in run.folder and the command names no model. Loads no torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
from actors.models.adapter import WEIGHTS
from conf.compose import compose_config, to_settings
from conf.errors import UsageError
from conf.facts import USING_A_MODEL
from conf.overrides import IMPLIED, normalize_overrides
from conf.schema import GROUPS, Settings
from conf.validate import check_settings
from epiphany.report.run_folder import Layout, read_settings

# Presets that a task may choose anew for the model of a run.
CHANGEABLE = ("hardware", "runtime", "data", "reward", "benchmark")
# Presets that span sections.
SPANNING = ("benchmark", "experiment")
# Settings that would name another model than the run's.
OF_THE_MODEL = ("model.path", "model.revision", "model.package", "model.package_path")


def load_settings(*overrides: str) -> Settings:
    """The checked settings that `python launch.py <overrides>` would have. Raises UsageError."""
    return settings_of_task(compose_config(overrides), normalize_overrides(overrides))


def settings_of_task(config: DictConfig, overrides: Sequence[str]) -> Settings:
    """The checked settings of the command that composed `config` from the normalized `overrides`."""
    if config.task in USING_A_MODEL:
        parsed = OverridesParser.create().parse_overrides([o for o in overrides if o not in IMPLIED])
        folder = Layout(Path(config.run.folder))
        is_named = any(override.key_or_group in ("run.folder", "run.name") for override in parsed)
        if is_named and not folder.settings.is_file():
            raise UsageError(f"run.folder={folder.path}: there is no run; name one, or a model with model.path")
        if folder.settings.is_file():
            stored = _stored(folder)
            of_model = [override for override in parsed if override.key_or_group.split(".")[0] == "model"]
            if is_named or all(_agrees(stored, override) for override in of_model):
                config = _of_run(folder, stored, config.task, parsed)
    settings = to_settings(config)
    check_settings(settings)
    return settings


def settings_of_run(folder: Layout) -> Settings:
    """The settings that the run in `folder` was last started with. Raises UsageError."""
    return to_settings(_stored(folder))


def adapter_of(folder: Layout) -> Path:
    """The folder of the run's adapter: the final one, else that of the newest checkpoint. Raises UsageError."""
    checkpoints = sorted(folder.checkpoints.glob("step-*"), reverse=True)
    for path in [folder.adapter, *checkpoints]:
        if (path / WEIGHTS).is_file():
            return path
    raise UsageError(
        f"run.folder={folder.path}: the run has saved no adapter yet; model.adapter=null uses its base model"
    )


def _stored(folder: Layout) -> DictConfig:
    """The settings that the run was last started with. Raises UsageError if they are those of another version."""
    try:
        return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Settings), read_settings(folder).settings))
    except OmegaConfBaseException as error:
        raise UsageError(
            f"{folder.settings} has settings that this version of Epiphany does not know; use the version that made "
            f"it: {str(error).splitlines()[0]}"
        ) from error


def _of_run(folder: Layout, stored: DictConfig, task: str, overrides: Sequence[Override]) -> DictConfig:
    """The settings of the run for the task, changed by the overrides."""
    chosen = cast(DictConfig, OmegaConf.merge(stored, {"task": task, "run": {"folder": str(folder.path)}}))
    if all(override.key_or_group != "model.adapter" for override in overrides):
        chosen.model.adapter = str(adapter_of(folder))
    for override in overrides:
        _check(stored, override, folder)
    for override in overrides:
        _apply(chosen, override)
    return chosen


def _check(stored: DictConfig, override: Override, folder: Layout) -> None:
    """Raises UsageError for an override that would make the run's model another one."""
    key = override.key_or_group
    if override.is_sweep_override() or override.is_delete():
        raise UsageError(f"{override.input_line}: a task that uses a run takes one value for each setting")
    is_settled = (key in GROUPS and key not in CHANGEABLE) or key in OF_THE_MODEL or key.startswith("model.lora.")
    if is_settled and not _agrees(stored, override):
        raise UsageError(
            f"{override.input_line}: the run in {folder.path} has settled this; change single settings, or name a "
            "model with model.path and no run"
        )


def _agrees(stored: DictConfig, override: Override) -> bool:
    """Whether the run has what the override says: the value of a setting, or all of a preset."""
    key, value = override.key_or_group, override.value()
    if key not in GROUPS:
        return OmegaConf.select(stored, key) == value
    return _has_preset(stored, key, str(value))


def _has_preset(stored: DictConfig, group: str, name: str) -> bool:
    preset = _preset(group, name)
    others = [next(iter(entry.items())) for entry in preset.pop("defaults", [])]
    where = "" if group in SPANNING else group
    return all(_has_preset(stored, other.split("/")[-1], chosen) for other, chosen in others) and all(
        OmegaConf.select(stored, key) == value for key, value in _leaves(OmegaConf.to_container(preset), where)
    )


def _leaves(node: object, key: str) -> Iterator[tuple[str, object]]:
    """Each value that is no section, with its dotted key, but no lists of sections: what their entries leave out is
    filled in when they are stored.
    """
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}".lstrip("."))
    elif not (isinstance(node, list) and any(isinstance(entry, dict) for entry in node)):
        yield key, node


def _preset(group: str, name: str) -> DictConfig:
    file = Path(str(conf.__file__)).parent / group / f"{name}.yaml"
    if not file.is_file():
        raise UsageError(f"{group}={name} is no preset of Epiphany's: leave it out, the run has its settings already")
    return cast(DictConfig, OmegaConf.load(file))


def _apply(config: DictConfig, override: Override) -> None:
    key = override.key_or_group
    is_settled = key in GROUPS and key not in CHANGEABLE
    if is_settled or key in ("task", "run.folder", "run.name") or key.startswith("hydra"):
        return
    try:
        if key in SPANNING:
            config.merge_with(_preset(key, str(override.value())))
        elif key in GROUPS:
            default = OmegaConf.structured(getattr(Settings(), key))
            config[key] = OmegaConf.merge(default, _preset(key, str(override.value())))
        else:
            OmegaConf.update(config, key, override.value(), merge=True, force_add=override.is_force_add())
    except OmegaConfBaseException as error:
        raise UsageError(f"{override.input_line}: {str(error).splitlines()[0]}") from error
