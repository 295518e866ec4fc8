"""Facts that several packages need: names that the command line knows, and what sets the algorithms apart.

ALGORITHMS is the only home of what an algorithm reads; validate.py refuses the settings that it does not. How an
algorithm computes is learner/algorithms' business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TASKS = {
    "train": "train, or resume the run in run.folder",
    "generate": "answer generate.prompt, or every question of generate.prompts",
    "chat": "talk to the model",
    "serve": "answer requests of OpenAI's interface, by vLLM's server",
    "evaluate": "measure the model, and whether its adapter makes it better than its base",
    "export": "write the model for others, and prove that it is the same",
    "difficulty": "sample answers to every prompt of data.source and write its pass rate beside it",
    "report": "write one HTML page of the run in run.folder: curves, answers before and after, rollouts, warnings",
    "status": "show how the run in run.folder is doing",
    "doctor": "show what this machine has, what does not fit together, and what will be slow",
    "plan": "show what would run and whether it fits into memory, and start nothing",
}
# Tasks that use the model of a run, or a model alone.
USING_A_MODEL = ("generate", "chat", "serve", "evaluate", "export")
ENGINES = ["vllm", "transformers"]
SINKS = ["wandb", "trackio"]


@dataclass(frozen=True)
class AlgorithmFacts:
    """`groupwise`: an advantage compares the completions of one prompt. `has_clip`: the ratio policy / old is clipped.
    `has_dual_clip`: the ratio can be capped for negative advantages, too. `has_critic`: a value head is trained.
    `has_pairs`: the loss compares two completions, and is no policy gradient."""

    groupwise: bool = False
    has_clip: bool = False
    has_dual_clip: bool = False
    has_critic: bool = False
    has_pairs: bool = False

    @property
    def is_policy_gradient(self) -> bool:
        return not self.has_pairs


ALGORITHMS = {
    "grpo": AlgorithmFacts(groupwise=True, has_clip=True, has_dual_clip=True),
    "dr_grpo": AlgorithmFacts(groupwise=True, has_clip=True, has_dual_clip=True),
    "dapo": AlgorithmFacts(groupwise=True, has_clip=True, has_dual_clip=True),
    "gspo": AlgorithmFacts(groupwise=True, has_clip=True, has_dual_clip=True),
    "cispo": AlgorithmFacts(groupwise=True, has_clip=True),
    "rloo": AlgorithmFacts(groupwise=True),
    "reinforce_pp": AlgorithmFacts(has_clip=True, has_dual_clip=True),
    "ppo": AlgorithmFacts(has_clip=True, has_dual_clip=True, has_critic=True),
    "online_dpo": AlgorithmFacts(has_pairs=True),
}

# For each fact, the settings below `algorithm.` that only algorithms with this fact read. All read the rest.
READ_WITH = {
    "groupwise": ("scale_rewards", "normalize_terms"),
    "has_clip": ("clip_low", "clip_high"),
    "has_dual_clip": ("dual_clip",),
    "has_critic": ("ppo",),
    "has_pairs": ("online_dpo",),
    "is_policy_gradient": (
        "overlong_buffer",
        "loss_aggregation",
        "kl_coefficient",
        "kl_estimator",
        "kl_placement",
        "kl_target",
        "importance_sampling_cap",
        "importance_sampling_level",
        "importance_sampling_mode",
    ),
}


def readers(name: str) -> Sequence[str]:
    """The algorithms that read the setting algorithm.<name> (for a section: `ppo` or `online_dpo`)."""
    needed = [fact for fact, names in READ_WITH.items() if name in names]
    return [algorithm for algorithm, facts in ALGORITHMS.items() if all(getattr(facts, fact) for fact in needed)]
