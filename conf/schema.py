"""Every setting of Epiphany, typed, with its default: the only home of defaults.

The YAML files beside this one name presets; Hydra lays them over these classes, so an unknown key or a
value of the wrong type stops the program before anything loads. Knows no other package of Epiphany.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class LoraSettings:
    """The adapter that is trained."""

    rank: int = 16
    alpha: float = 32.0
    # Scale by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732) in place of alpha / rank.
    rslora: bool = False
    # DoRA is refused: no engine here serves it.
    dora: bool = False
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class ModelSettings:
    """The frozen base model and its adapter."""

    # A folder, a Hugging Face id, or a .gguf file.
    path: str = MISSING
    revision: str | None = None
    # A package that carries the same model as a GGUF file, used where the hub cannot be reached.
    package: str | None = None
    # float32, bfloat16, float16, or auto (float32 on a CPU; bfloat16 on a GPU that has it, else float16).
    dtype: str = "auto"
    # none (the weights as they are: a bitsandbytes checkpoint stays 4-bit), or nf4 (QLoRA through bitsandbytes).
    quantization: str = "none"
    # Linear layers that nf4 leaves in 16 bit, as patterns of their names: ["model.layers.0.*", "*.down_proj"].
    # Layers that the engine fuses (q, k, v; gate, up) stay together.
    keep_16bit: list[str] = field(default_factory=list)
    # A Jinja chat template (text or file) in place of the tokenizer's own.
    chat_template: str | None = None
    trust_remote_code: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class DataSettings:
    """Where prompts come from."""

    # A .jsonl, .csv or .parquet file, a Hugging Face dataset id, or reasoning_gym:<task>.
    source: str = MISSING
    # Options of a reasoning-gym task; `size` is the number of rows that it makes.
    task: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    # Column names; null finds them by themselves.
    prompt_column: str | None = None
    answer_column: str | None = None
    system_prompt: str | None = None
    # Questions set aside for evaluation, never trained on ...
    held_out: int = 64
    # ... or rows of a source of their own, of which the first `held_out` count; for reasoning-gym with these options.
    held_out_source: str | None = None
    held_out_task: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_prompt_tokens: int = 512
    max_bad_rows: int = 0


@dataclass
class TermSettings:
    """One term of the reward: a registered name, package.module:function or path/to/file.py:function, and its weight."""

    fn: str = MISSING
    # What the term is called in metrics and rows. Null: the function's name, with a number if that is taken.
    name: str | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class RewardSettings:
    """How completions are scored."""

    terms: list[TermSettings] = field(default_factory=list)
    # Each scoring process has this deadline a sample and this memory limit.
    deadline_seconds: float = 10.0
    memory_gib: float = 2.0
    # A group with fewer scorable samples than this share is dropped and another prompt takes its place.
    quorum: float = 0.5
    # Stop at the start if the gold answer does not score full marks.
    check_gold: bool = True


@dataclass
class AlgorithmSettings:
    """The objective (learner/objectives.py) and its constants. docs/algorithms.md says when to choose which."""

    name: str = "grpo"
    prompts_per_step: int = 16
    group_size: int = 8
    # Passes over a batch, and optimizer steps of each, which share its prompts.
    epochs: int = 1
    minibatches: int = 1

    # What advantages are divided by: the deviation of the group's rewards or the batch's, or none. Null: the algorithm's own.
    reward_scale: str | None = None
    # Normalise each term of the reward by itself (GDPO).
    normalise_terms: bool = False
    # Groups in which all rewards are equal: keep, drop (they count in no mean), or resample: others take their place, as long
    # as these are not more than max_resampled times the batch.
    flat_groups: str = "keep"
    max_resampled: float = 3.0
    # Completions that were cut off do not count.
    mask_truncated: bool = False
    # Up to 1 is taken off the reward over the last part of sampling.max_tokens, of this size (0.2: a fifth); 0: nothing.
    overlong_buffer: float = 0.0

    # The ratio policy / old lies between 1 - clip_low and 1 + clip_high where it helps, and is at most clip_most where it hurts.
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_most: float | None = None
    # sequence (each completion counts the same), token (each token), constant (each token as 1 / sampling.max_tokens of a
    # completion) or whole (each token as a completion). Null: the algorithm's own.
    token_weights: str | None = None
    # Weight of KL(policy || base model) by the estimator k1, k2 or k3, in the loss or taken off the reward; 0 skips the
    # reference pass. With a target the weight rises and falls by up to 2 % a step.
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    kl_in: str = "loss"
    kl_target: float | None = None
    # Weight of the policy's entropy, which is raised.
    entropy_coefficient: float = 0.0
    # Importance weights that correct engine/learner mismatch, of a token or a sequence: over the cap they are truncated, or
    # masked (0). Null turns the correction off.
    importance_cap: float | None = 2.0
    importance_level: str = "token"
    importance_mode: str = "truncate"

    # PPO: discount, GAE's lambda, how far a value may move in a step (null: anywhere), the learning rate of the value head, and
    # steps for it alone at the start.
    gamma: float = 1.0
    gae_lambda: float = 1.0
    value_clip: float | None = 0.2
    value_learning_rate: float = 5e-3
    critic_warmup_steps: int = 0

    # Online DPO: strength of the reference, and sigmoid (DPO), ipo or hinge.
    beta: float = 0.1
    preference_loss: str = "sigmoid"


@dataclass
class LearnerSettings:
    """One optimizer step."""

    learning_rate: float = 1e-4
    # A rise over warmup_steps, then constant, linear or cosine, down to learning_rate * final_rate at run.steps.
    schedule: str = "constant"
    warmup_steps: int = 0
    final_rate: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    # adamw, or adamw8bit (bitsandbytes: moments in one byte each).
    optimizer: str = "adamw"
    # Tokens of one packed micro-batch, and tokens whose logits exist at one time. Null: the memory plan decides, here
    # and below (without a GPU: 8,192, 1,024, false and false).
    micro_batch_tokens: int | None = None
    logit_chunk_tokens: int | None = None
    # Compute activations again in backward, and keep what that needs in the host's memory.
    gradient_checkpointing: bool | None = None
    offload_activations: bool | None = None
    # liger-kernel's fused norms, rotary embedding and SwiGLU, where it is installed and knows the model.
    fused_kernels: bool = True


@dataclass
class EngineSettings:
    """The rollout engine."""

    # vllm, transformers, or auto (vLLM where it runs).
    name: str = "auto"
    # One copy of the base weights for engine and learner: auto (where it can be), always (or stop), never.
    share_weights: str = "auto"
    # Sequences in flight, and tokens of one engine step. Null: the memory plan decides (without a GPU: 64, vLLM's own).
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    # Null sizes the cache for max_num_seqs sequences of full length.
    kv_cache_gib: float | None = None
    # Lend the cache's memory to the learner while it works (max_staleness=0 only); null: where the memory plan must.
    release_cache: bool | None = None
    # auto (the model's), or fp8: half the cache, for a larger difference between engine and learner.
    kv_cache_dtype: str = "auto"
    # Repeatable samples whatever shares the batch; null: on for the CPU, off for a GPU, where they cost speed.
    per_request_seeds: bool | None = None
    # Skip compilation and CUDA graphs; null: on for the CPU only.
    enforce_eager: bool | None = None
    # GPUs of one machine that each rollout worker's engine is spread over (runtime=ray, 16-bit weights).
    tensor_parallel_size: int = 1


@dataclass
class SamplingSettings:
    """How completions are drawn in training."""

    temperature: float = 1.0
    max_tokens: int = 256


@dataclass
class EvaluationSettings:
    """Held-out evaluation: greedy, and `samples` draws a prompt at the training temperature."""

    every: int = 0
    samples: int = 4
    # Null takes all held-out prompts.
    max_prompts: int | None = None


@dataclass
class HardwareSettings:
    """What this process runs on: cpu, cuda, or auto."""

    device: str = "auto"
    # The most that this process may take of the card, CUDA context included. Null: what is free, less a tenth.
    vram_gib: float | None = None
    # Threads of torch and vLLM on the CPU; null takes the cores this process may use.
    threads: int | None = None


@dataclass
class RuntimeSettings:
    """How the workers are run: local (all in one process) or ray (each an actor)."""

    name: str = "local"
    # Child processes that score, with Ray one in each of as many actors.
    reward_workers: int = 1
    rollout_workers: int = 1
    # GPUs that each rollout worker and each learner reserves. Null: as many as it needs, none without GPUs. 0.5 lets two
    # workers share one, each with half of its memory.
    rollout_gpus: float | None = None
    learner_gpus: float | None = None
    # Learners that share the rows of each step and add up their gradients.
    learner_ranks: int = 1
    # A running cluster: auto (found by itself) or host:port. Null starts Ray on this machine, reachable from it alone.
    address: str | None = None
    # Seconds that workers may take to start, and after that to answer; then another takes a worker's place.
    start_seconds: float = 900.0
    stall_seconds: float = 180.0
    # Seconds that the learner may take to start, to step or to save; then the run ends.
    learner_seconds: float = 3600.0
    # How often a worker may be lost between two steps: the loss of a machine counts once or twice for each that was on it.
    max_losses: int = 4
    # Versions by which a trained sample may lag behind the policy; 0 is strictly on-policy.
    max_staleness: int = 0


@dataclass
class RunSettings:
    """The run folder, its length and its state."""

    name: str = "default"
    folder: str = "runs/${run.name}"
    steps: int = 100
    seed: int = 0
    # auto goes on from the newest sound checkpoint; never wants an empty folder; a number picks a step.
    resume: str = "auto"
    checkpoint_every: int = 10
    keep_checkpoints: int = 2


@dataclass
class Settings:
    """All of it. `task` is train, or status: show how the run in run.folder is doing, and nothing else."""

    task: str = "train"

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    hardware: HardwareSettings = field(default_factory=HardwareSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    run: RunSettings = field(default_factory=RunSettings)


GROUPS = ("model", "data", "reward", "algorithm", "hardware", "runtime", "experiment")


def register() -> None:
    """Make the schema known to Hydra under the names that conf/*.yaml build on."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Settings)
