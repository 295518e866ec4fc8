"""Training diagnostics: what goes wrong in a run, in words, with settings to try. Plain Python over rows of metrics.

Every rule compares the last RECENT steps, some of them with the first ones, so that one odd step says nothing.
"""

import math
from collections.abc import Callable, Sequence
from statistics import mean

from epiphany.report.metrics import Row

RECENT = 5


class Means:
    """The mean of a column over `rows`, without those in which it is None; NaN, for which no comparison holds, if it is
    None in all of them."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __getitem__(self, name: str) -> float:
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return mean(values) if values else math.nan


class Diagnosis:
    """Remembers as many rows of a run as the rules need; `rows` are those of earlier sessions."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._first: list[Row] = []
        self._last: list[Row] = []
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> dict[str, str]:
        """Add the next row; returns what is wrong now, as a sentence by the name of its rule."""
        if len(self._first) < RECENT:
            self._first.append(row)
        self._last = [*self._last, row][-RECENT:]
        if len(self._last) < RECENT:
            return {}
        first, last = Means(self._first), Means(self._last)
        return {name: text for name, rule in RULES.items() if (text := rule(first, last)) is not None}


def no_signal(first: Means, last: Means) -> str | None:
    share, reward = last["zero_variance_share"], last["reward"]
    if not share >= 0.8:
        return None
    return (
        f"in {share:.0%} of the groups all answers get the same reward ({reward:.2f} in the mean), so there is nothing "
        "to learn from them. Use prompts that are neither too easy nor too hard, a larger algorithm.group_size, "
        "algorithm.zero_variance_groups=resample, or a reward that gives partial credit"
    )


def entropy_collapse(first: Means, last: Means) -> str | None:
    before, now = first["entropy"], last["entropy"]
    if not (now <= 0.1 and now <= before / 5):
        return None
    return (
        f"entropy fell from {before:.2f} to {now:.3f}: outputs have become nearly deterministic, and little signal "
        "remains. Try algorithm.clip_high=0.28, algorithm.entropy_coefficient=0.001, algorithm.kl_coefficient=0.01, or "
        "a lower learner.learning_rate"
    )


def length_explosion(first: Means, last: Means) -> str | None:
    before, now, truncated = first["completion_tokens"], last["completion_tokens"], last["truncated_share"]
    if not (now >= 1.5 * before and truncated >= 0.3):
        return None
    return (
        f"answers grew from {before:.0f} to {now:.0f} tokens, and {truncated:.0%} are truncated. "
        "algorithm.overlong_buffer=0.2 penalizes long answers, algorithm=dr_grpo does not favor them, and a larger "
        "sampling.max_tokens gives them more space"
    )


def truncated_answers(first: Means, last: Means) -> str | None:
    truncated = last["truncated_share"]
    if not (truncated >= 0.9 and not length_explosion(first, last)):
        return None
    return (
        f"{truncated:.0%} of the answers are truncated: raise sampling.max_tokens, or ask for short answers in "
        "data.system_prompt"
    )


def kl_runaway(first: Means, last: Means) -> str | None:
    before, now = first["reference_kl"], last["reference_kl"]
    if not (now >= 0.5 and now >= 5 * before):
        return None
    return (
        f"the KL divergence from the base model rose from {before:.3f} to {now:.2f} nats per token: raise "
        "algorithm.kl_coefficient (or algorithm.online_dpo.beta), set algorithm.kl_target=0.1, or lower "
        "learner.learning_rate"
    )


def never_clipped(first: Means, last: Means) -> str | None:
    if not last["clipped_share"] <= 1e-5:
        return None
    return (
        "no token is ever clipped although a batch takes several optimizer steps, so these change little. Raise "
        "learner.learning_rate, or save their time with algorithm.epochs=1 and algorithm.minibatches=1"
    )


def always_clipped(first: Means, last: Means) -> str | None:
    clipped = last["clipped_share"]
    if not clipped >= 0.4:
        return None
    return (
        f"{clipped:.0%} of the tokens are clipped: the optimizer steps of a batch move the policy too far from the one "
        "that sampled it. Lower learner.learning_rate, algorithm.epochs or algorithm.minibatches"
    )


def logprob_gap(first: Means, last: Means) -> str | None:
    gap, capped = last["logprob_gap"], last["capped_share"]
    if not (gap >= 0.1 or capped >= 0.05):
        return None
    is_stale = last["staleness"] > 0
    advice = "a lower runtime.max_staleness" if is_stale else "model.dtype=float32, engine.kv_cache_dtype=auto"
    return (
        f"engine and learner differ by {gap:.2f} nats in a token's log-probability, and {capped:.0%} of the importance "
        f"weights are over their cap. Try {advice}, or algorithm.importance_sampling_mode=mask"
    )


def unscored_answers(first: Means, last: Means) -> str | None:
    share = last["unscorable_share"]
    if not share >= 0.05:
        return None
    error = next((row["unscorable_error"] for row in reversed(last.rows) if row.get("unscorable_error")), "not known")
    return (
        f"{share:.0%} of the answers cannot be scored and train nothing; the last reason: {error}. Correct the reward, "
        "or raise reward.deadline_seconds or reward.memory_gib if that is the reason"
    )


def constant_answers(first: Means, last: Means) -> str | None:
    share = last["constant_share"]
    if not share >= 0.8:
        return None
    text = last.rows[-1].get("constant_text")
    return (
        f"for {share:.0%} of the prompts {text!r} is a best answer, so the reward may not depend on the question. Look "
        "at the run's completions, at what reward.terms give to that text, and at how often data.source has the same "
        "answer"
    )


def constant_terms(first: Means, last: Means) -> str | None:
    of_steps = [row.get("constant_terms") or {} for row in last.rows]
    if no_signal(first, last) is not None:
        return None  # which says more
    always = {name: value for name, value in of_steps[0].items() if all(row.get(name) == value for row in of_steps)}
    never = [name for name, value in always.items() if value == 0]
    if never:
        return (
            f"no answer has earned anything of the reward's {', '.join(never)} in {RECENT} steps, so it teaches "
            "nothing. Give partial credit for it in reward.terms, show the form in data.system_prompt, begin with "
            "demonstrations of it (warmup.steps), or sample more answers with algorithm.group_size"
        )
    always = {name: value for name, value in always.items() if value == 1}
    if always:
        earned = ", ".join(f"{name} ({value:g})" for name, value in always.items())
        return (
            f"every answer has earned all of the reward's {earned} in {RECENT} steps, so it teaches nothing more. If "
            "the other terms of reward.terms do not rise either, use harder prompts"
        )
    return None


def sacrificed_term(first: Means, last: Means) -> str | None:
    before, now = first["reward"], last["reward"]
    names = first.rows[0].get("reward_terms") or {}
    values = [(name, _of_term(first, name), _of_term(last, name)) for name in names]
    fallen = [(name, high, low) for name, high, low in values if high - low >= 0.05 and low <= high / 2]
    if not (fallen and now >= before):
        return None
    terms = ", ".join(f"{name} fell from {high:.2f} to {low:.2f}" for name, high, low in fallen)
    return (
        f"the reward rose from {before:.2f} to {now:.2f}, but its {terms}, and answers went from "
        f"{first['completion_tokens']:.0f} to {last['completion_tokens']:.0f} tokens: what is easier to earn has been "
        "bought with what is harder. Begin with demonstrations that earn both (warmup.steps), lower the weights of the "
        "other terms of reward.terms, or use algorithm=dr_grpo, where a weight also counts in groups that differ in "
        "the easier terms only"
    )


def _of_term(means: Means, name: str) -> float:
    return Means([row.get("reward_terms") or {} for row in means.rows])[name]


def rewarded_length(first: Means, last: Means) -> str | None:
    correlation, before, now = last["length_correlation"], first["completion_tokens"], last["completion_tokens"]
    grows = correlation >= 0.5 and now >= 1.3 * before
    shrinks = correlation <= -0.5 and now <= before / 1.3
    if not (grows or shrinks):
        return None
    return (
        f"within a group, {'longer' if grows else 'shorter'} answers get more reward (correlation {correlation:.2f}), "
        f"and answers went from {before:.0f} to {now:.0f} tokens. If that is not what you want, see which of "
        "reward.terms pays for length, add a term that does not (length, soft_overlong), or use algorithm=dr_grpo, "
        "which does not favor long answers"
    )


def blind_critic(first: Means, last: Means) -> str | None:
    explained = last["explained_variance"]
    if not (explained <= 0 and last["step"] > first["step"]):
        return None
    return (
        f"the critic explains nothing of the returns (explained variance {explained:.2f}): try "
        "algorithm.ppo.critic_warmup_steps=10, another algorithm.ppo.value_learning_rate, or algorithm=grpo, which has "
        "no critic"
    )


RULES: dict[str, Callable[[Means, Means], str | None]] = {
    rule.__name__: rule
    for rule in (
        no_signal,
        entropy_collapse,
        length_explosion,
        truncated_answers,
        kl_runaway,
        never_clipped,
        always_clipped,
        logprob_gap,
        unscored_answers,
        constant_answers,
        constant_terms,
        sacrificed_term,
        rewarded_length,
        blind_critic,
    )
}
