"""Every setting of Epiphany, typed, with its default, its explanation and its limits: the only home of defaults.

The YAML files in this folder are presets. Hydra merges them into these classes, so that an unknown key or a value of
the wrong type stops the program before anything loads. Knows no other package of Epiphany.
"""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.facts import TASKS
from conf.fields import setting
from conf.schema_execution import (
    DifficultySettings,
    EngineSettings,
    EvaluationSettings,
    HardwareSettings,
    RunSettings,
    RuntimeSettings,
    SamplingSettings,
)
from conf.schema_inputs import (
    DataSettings,
    LoraSettings,
    ModelSettings,
    RewardSettings,
    SourceSettings,
    TermSettings,
)
from conf.schema_training import (
    AlgorithmSettings,
    LearnerSettings,
    OnlineDPOSettings,
    PPOSettings,
    WarmupSettings,
)
from conf.schema_use import ChatSettings, ExportSettings, GenerateSettings, ReportSettings, ServeSettings

__all__ = [
    "GROUPS",
    "AlgorithmSettings",
    "ChatSettings",
    "DataSettings",
    "DifficultySettings",
    "EngineSettings",
    "EvaluationSettings",
    "ExportSettings",
    "GenerateSettings",
    "HardwareSettings",
    "LearnerSettings",
    "LoraSettings",
    "ModelSettings",
    "OnlineDPOSettings",
    "PPOSettings",
    "ReportSettings",
    "RewardSettings",
    "RunSettings",
    "RuntimeSettings",
    "SamplingSettings",
    "ServeSettings",
    "Settings",
    "SourceSettings",
    "TermSettings",
    "WarmupSettings",
    "register",
]


@dataclass
class Settings:
    """All settings."""

    task: str = setting("train", "What to do.", choices=tuple(TASKS))

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    difficulty: DifficultySettings = field(default_factory=DifficultySettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    chat: ChatSettings = field(default_factory=ChatSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    run: RunSettings = field(default_factory=RunSettings)


# The folders of presets. Experiments and benchmarks span sections; the others each fill the section of their name.
GROUPS = ("model", "data", "reward", "algorithm", "hardware", "runtime", "experiment", "benchmark")


def register() -> None:
    """Make the schema known to Hydra under the name that config.yaml builds on."""
    ConfigStore.instance().store(name="schema", node=Settings)
