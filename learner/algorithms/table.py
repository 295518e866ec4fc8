"""The table of algorithms: every name that `algorithm.name` knows, and how a user's own recipe is found."""

from collections.abc import Mapping
from dataclasses import replace

from conf.errors import UsageError
from conf.schema import AlgorithmSettings
from learner.algorithms.base import Algorithm
from learner.algorithms.online_dpo import OnlineDPO
from learner.algorithms.policy_gradient import PolicyGradient
from learner.algorithms.recipe import (
    Recipe,
    batch_normalized,
    clipped_weight,
    generalized,
    group_centered,
    group_relative,
    leave_one_out,
    likelihood,
    reinforce,
    sequence_clip,
    sequence_ratio,
    token_clip,
    token_ratio,
)
from learner.losses.aggregation import constant_length, sequence_mean, sequence_sum, token_mean
from rewards.user_function import import_object

GRPO = Recipe(group_relative, token_clip, sequence_mean, token_ratio)
RECIPES = {
    # DeepSeekMath, arXiv:2402.03300, equation 3: 1/N sum_i 1/T_i sum_t min(w A, clip(w) A).
    "grpo": GRPO,
    # arXiv:2503.20783: no division by the deviation, none by the length.
    "dr_grpo": replace(GRPO, advantage=group_centered, aggregation=constant_length),
    # arXiv:2503.14476, equation 8: 1 / sum T_i, clip_high over clip_low, dynamic sampling, overlong penalty.
    "dapo": replace(GRPO, aggregation=token_mean),
    # arXiv:2507.18071, equation 5: one ratio per completion.
    "gspo": replace(GRPO, surrogate=sequence_clip, ratio=sequence_ratio),
    # MiniMax-M1, arXiv:2506.13585, equation 4: the weight is clipped, the gradient stays.
    "cispo": replace(GRPO, surrogate=clipped_weight, aggregation=token_mean),
    # arXiv:2402.14740: REINFORCE on whole completions against the mean of the others; KL in the reward.
    "rloo": Recipe(leave_one_out, reinforce, sequence_sum, ratio=None),
    # arXiv:2501.03262: no groups; returns of each token (KL in the reward) normalized over the batch.
    "reinforce_pp": Recipe(batch_normalized, token_clip, token_mean, token_ratio),
    # arXiv:1707.06347: generalized advantages against a value head.
    "ppo": Recipe(generalized, token_clip, token_mean, token_ratio, has_critic=True),
}
ALGORITHMS = (*RECIPES, "online_dpo")
# Supervised fine-tuning: the mean negative log-likelihood of the batch's tokens. Its rows come from nobody's policy.
SFT = Recipe(likelihood, reinforce, token_mean, ratio=None)


def find_recipe(name: str) -> Recipe:
    """The recipe of one of RECIPES, or module:RECIPE or file.py:RECIPE of the user's. Raises UsageError."""
    if name in RECIPES:
        return RECIPES[name]
    try:
        recipe = import_object(name)
    except Exception as error:  # the user's file may raise anything
        raise UsageError(
            f"algorithm.name={name} is neither one of {', '.join(ALGORITHMS)} nor a module:RECIPE that can be imported "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(recipe, Recipe):
        raise UsageError(f"algorithm.name={name}: not a Recipe (learner/algorithms/recipe.py)")
    if not callable(recipe.aggregation):
        raise UsageError(
            f"algorithm.name={name}: its aggregation is {recipe.aggregation!r}, which is no function; choose one of "
            "learner/losses/aggregation.py"
        )
    return recipe


def make_algorithm(settings: AlgorithmSettings, *, max_tokens: int, term_weights: Mapping[str, float]) -> Algorithm:
    """The algorithm `settings.name`: one of ALGORITHMS, or the user's own recipe. Raises UsageError.

    `max_tokens` is where completions are cut off, `term_weights` those of the reward's terms.
    """
    if settings.name == "online_dpo":
        return OnlineDPO(settings)
    recipe = find_recipe(settings.name)
    return PolicyGradient(recipe, settings, max_tokens=max_tokens, term_weights=term_weights)


def supervised(*, max_tokens: int) -> Algorithm:
    """Supervised fine-tuning on demonstrations."""
    settings = AlgorithmSettings(name="sft", importance_sampling_cap=None)
    return PolicyGradient(SFT, settings, max_tokens=max_tokens, term_weights={})


def has_critic(name: str) -> bool:
    """Whether the algorithm trains a value head, which takes memory. Raises UsageError."""
    return name != "online_dpo" and find_recipe(name).has_critic
