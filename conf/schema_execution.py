"""Settings of how a run is executed: engine, sampling, evaluation, hardware, workers and the run folder."""

from dataclasses import dataclass, field

from conf.facts import ENGINES, SINKS
from conf.fields import Options, explained, setting


@dataclass
class EngineSettings:
    """The rollout engine."""

    name: str = setting(
        "auto",
        "auto: vLLM where it runs, else transformers.",
        choices=("auto", *ENGINES),
    )
    share_weights: str = setting(
        "auto",
        "One copy of the base weights for engine and learner. auto: if possible. always: stop if it is not.",
        choices=("auto", "always", "never"),
    )
    max_num_seqs: int | None = setting(
        None, "Sequences decoded at the same time. null: the memory plan decides (64 without a GPU).", minimum=1
    )
    max_num_batched_tokens: int | None = setting(
        None, "Tokens in one engine step. null: the memory plan decides (vLLM's default without a GPU).", minimum=1
    )
    kv_cache_gib: float | None = setting(
        None, "Size of the KV cache. null: enough for max_num_seqs sequences of full length.", above=0
    )
    sleep_mode: bool | None = setting(
        None,
        "The engine gives the memory of its KV cache to the learner while it learns (runtime.max_staleness=0 only). "
        "null: only if the memory plan needs it.",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "auto: the model's type. fp8: half the size, but a larger log-probability gap between engine and learner.",
        choices=("auto", "fp8"),
    )
    per_request_seeds: bool | None = setting(
        None,
        "A sample does not depend on the rest of the batch. null: true on a CPU, false on a GPU, where it costs speed.",
    )
    enforce_eager: bool | None = setting(None, "Skip compilation and CUDA graphs. null: true on a CPU, false on a GPU.")
    tensor_parallel_size: int = setting(
        1, "GPUs of one machine over which each engine is spread (runtime=ray, 16-bit weights).", minimum=1
    )


@dataclass
class SamplingSettings:
    """How completions are sampled in training."""

    temperature: float = setting(1.0, "Sampling temperature.", above=0)
    top_k: int = setting(
        0,
        "Sample from the top_k most probable tokens only. 0: from all. With top_k, top_p or min_p the learner computes "
        "the probabilities of the truncated distribution, too.",
        minimum=0,
    )
    top_p: float = setting(
        1.0, "Sample from the fewest tokens that have this probability together.", above=0, maximum=1
    )
    min_p: float = setting(
        0.0,
        "Sample only tokens that are at least min_p times as probable as the most probable one.",
        minimum=0,
        below=1,
    )
    prefill: str = setting(
        "",
        "The beginning of every answer, such as '<think>': the model continues it, and the reward sees it as a part of "
        "the answer.",
    )
    stop: list[str] = field(
        default_factory=list,
        metadata=explained(
            "Texts that end an answer, such as '</answer>'. The reward sees the answer with the first of them."
        ),
    )
    max_tokens: int = setting(256, "Longest completion, in tokens; longer ones are cut off.", minimum=1)


@dataclass
class EvaluationSettings:
    """Evaluation on held-out questions: one greedy completion of each, and `samples` sampled ones."""

    every: int = setting(0, "Steps between evaluations. 0: only before and after training.", minimum=0)
    temperature: float | None = setting(
        None, "Temperature of the sampled completions. null: sampling.temperature.", above=0
    )
    top_k: int | None = setting(None, "The same for top_k. null: sampling.top_k.", minimum=0)
    top_p: float | None = setting(None, "The same for top_p. null: sampling.top_p.", above=0, maximum=1)
    min_p: float | None = setting(None, "The same for min_p. null: sampling.min_p.", minimum=0, below=1)
    stop: list[str] | None = field(
        default=None, metadata=explained("The same for stop, in greedy completions, too. null: sampling.stop.")
    )
    prefill: str | None = setting(None, "The same for prefill, in greedy completions, too. null: sampling.prefill.")
    chat_template_kwargs: Options | None = field(
        default=None,
        metadata=explained("Variables of the chat template for held-out questions. null: model.chat_template_kwargs."),
    )
    samples: int = setting(4, "Sampled completions of each question. 0: greedy only.", minimum=0)
    max_prompts: int | None = setting(None, "Questions to use. null: all that are held out.", minimum=1)
    source: str | None = setting(
        None, "For task=evaluate: a source of questions, as data.source, in place of the held-out ones."
    )
    split: str = setting("test", "Split of evaluation.source, if that is a Hugging Face dataset.")
    prompt_column: str | None = setting(None, "Its column with the questions. null: found by its name.")
    answer_column: str | None = setting(None, "Its column with the answers. null: found by its name.")
    compare_base: bool = setting(True, "For task=evaluate: the base model's answers, too, beside the adapter's.")
    output: str | None = setting(
        None, "For task=evaluate: the folder of the result. null: one in `evaluated` in the run's folder, or here."
    )


@dataclass
class DifficultySettings:
    """What `task=difficulty` measures: how often the model answers each prompt of the data right."""

    samples: int = setting(8, "Completions of each prompt.", minimum=1)
    max_prompts: int | None = setting(None, "Rows to measure, from the first on. null: all.", minimum=1)
    output: str | None = setting(
        None,
        "The .jsonl file with all rows and their pass_rate. null: <source>.difficulty.jsonl beside a file, else "
        "difficulty.jsonl in run.folder.",
    )


@dataclass
class HardwareSettings:
    """What this process runs on."""

    device: str = setting("auto", "auto: a GPU if there is one.", choices=("auto", "cpu", "cuda"))
    vram_gib: float | None = setting(
        None, "Most GPU memory to use, CUDA context included. null: 90 % of what is free.", minimum=1
    )
    threads: int | None = setting(
        None, "CPU threads of torch and vLLM. null: the cores that this process may use.", minimum=1
    )


@dataclass
class RuntimeSettings:
    """How the workers run."""

    name: str = setting("local", "local: all in one process. ray: each worker is an actor.", choices=("local", "ray"))
    reward_workers: int = setting(1, "Scoring processes (with Ray: one actor each).", minimum=1)
    rollout_workers: int = setting(1, "Rollout engines (runtime=ray).", minimum=1)
    rollout_gpus: float | None = setting(
        None,
        "GPUs that each rollout worker reserves; 0.5 lets two workers share one. null: as many as it needs.",
        minimum=0,
    )
    learner_gpus: float | None = setting(None, "GPUs that each learner reserves, likewise.", minimum=0)
    learner_data_parallel_size: int = setting(
        1, "Learners that share the rows of each step; gradients are all-reduced (runtime=ray).", minimum=1
    )
    learner_shards: int = setting(
        1,
        "Learners among which the base weights are split, for a model that is larger than one GPU; divides "
        "learner_data_parallel_size.",
        minimum=1,
    )
    address: str | None = setting(
        None,
        "A running Ray cluster: auto, or host:port. null: start Ray on this machine, reachable from it alone.",
    )
    worker_start_timeout_seconds: float = setting(
        900.0, "Time that a worker may take to start before it is replaced.", above=0
    )
    worker_timeout_seconds: float = setting(
        180.0, "Time that a started worker may take to answer before it is replaced.", above=0
    )
    learner_timeout_seconds: float = setting(
        3600.0, "Time that the learner may take to start, to step or to save before the run ends.", above=0
    )
    max_worker_restarts: int = setting(
        4,
        "Most restarts of one worker between two optimizer steps (the loss of a machine may count twice).",
        minimum=0,
    )
    max_staleness: int = setting(
        0, "Adapter versions by which a trained sample may lag behind the policy. 0: strictly on-policy.", minimum=0
    )


@dataclass
class RunSettings:
    """The run folder, its length and its state."""

    name: str = setting("default", "Name of the run: letters, digits, '.', '_' and '-'.")
    folder: str = setting("runs/${run.name}", "Folder of the run. `run=<folder>` is short for `run.folder=<folder>`.")
    steps: int = setting(100, "Steps to train, those before a resume included.", minimum=1)
    seed: int = setting(0, "Seed of the adapter and of sampling.", minimum=0)
    resume: str = setting(
        "auto",
        "auto: resume from the newest valid checkpoint. never: require an empty folder. A number: resume at that step.",
    )
    checkpoint_every: int = setting(10, "Steps between checkpoints.", minimum=1)
    keep_checkpoints: int = setting(2, "Checkpoints to keep.", minimum=1)
    sinks: list[str] = field(
        default_factory=list,
        metadata=explained(
            "Where metrics go in addition to JSONL and TensorBoard. The library must be installed.",
            choices=tuple(SINKS),
        ),
    )
