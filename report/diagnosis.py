"""What goes wrong in a run, in words, each with the setting to try. Plain Python over lines of metrics.jsonl.

Every rule compares the last RECENT steps, and some of them with the first ones, so that one odd step says nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

Row = Mapping[str, Any]
RECENT = 5


class Means:
    """The mean of a column over `rows`; NaN, for which no comparison holds, where it was not measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __getitem__(self, name: str) -> float:
        values = [row[name] for row in self.rows if row.get(name) is not None]
        return mean(values) if values else math.nan


class Diagnosis:
    """Remembers as much of a run's lines as the rules need, `rows` first."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._first: list[Row] = []
        self._last: list[Row] = []
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> dict[str, str]:
        """Take up the next line; what is wrong now, by name."""
        if len(self._first) < RECENT:
            self._first.append(row)
        self._last = [*self._last, row][-RECENT:]
        if len(self._last) < RECENT:
            return {}
        first, last = Means(self._first), Means(self._last)
        return {name: text for name, rule in RULES.items() if (text := rule(first, last)) is not None}


def no_signal(first: Means, last: Means) -> str | None:
    share, reward = last["no_signal_share"], last["reward"]
    if not (share >= 0.8):
        return None
    return (
        f"in {share:.0%} of the groups all answers score the same (reward {reward:.2f}), so that they teach nothing: take "
        "prompts that are neither too easy nor too hard, algorithm.flat_groups=resample, a larger algorithm.group_size, or a "
        "reward with partial marks"
    )


def entropy_collapse(first: Means, last: Means) -> str | None:
    before, now = first["entropy"], last["entropy"]
    if not (now <= 0.1 and now <= before / 5):
        return None
    return (
        f"entropy fell from {before:.2f} to {now:.3f}: answers hardly differ any more, so that little more can be learned; "
        "algorithm.clip_high=0.28, algorithm.entropy_coefficient=0.001, algorithm.kl_coefficient=0.01 or a lower "
        "learner.learning_rate keep it up"
    )


def length_explosion(first: Means, last: Means) -> str | None:
    before, now, cut = first["completion_tokens"], last["completion_tokens"], last["truncated_share"]
    if not (now >= 1.5 * before and cut >= 0.3):
        return None
    return (
        f"answers grew from {before:.0f} to {now:.0f} tokens and {cut:.0%} are cut off: algorithm.overlong_buffer=0.2 takes "
        "reward off long ones, algorithm=dr_grpo does not favour length, sampling.max_tokens gives them room"
    )


def cut_off(first: Means, last: Means) -> str | None:
    share = last["truncated_share"]
    if not (share >= 0.9 and not length_explosion(first, last)):
        return None
    return (
        f"{share:.0%} of the answers are cut off at the limit: raise sampling.max_tokens, or ask for short answers in "
        "data.system_prompt"
    )


def kl_runaway(first: Means, last: Means) -> str | None:
    before, now = first["reference_kl"], last["reference_kl"]
    if not (now >= 0.5 and now >= 5 * before):
        return None
    return (
        f"KL to the base model rose from {before:.3f} to {now:.2f} nats a token: raise algorithm.kl_coefficient (or "
        "algorithm.beta), set algorithm.kl_target=0.1, or lower learner.learning_rate"
    )


def never_clipped(first: Means, last: Means) -> str | None:
    if not (last["clipped_share"] <= 1e-5):
        return None
    return (
        "the clip never cuts anything although a batch takes several optimizer steps: they change little; raise "
        "learner.learning_rate, or save their time with algorithm.epochs=1 and algorithm.minibatches=1"
    )


def always_clipped(first: Means, last: Means) -> str | None:
    share = last["clipped_share"]
    if not (share >= 0.4):
        return None
    return (
        f"the clip cuts off {share:.0%} of the tokens: the steps of a batch lead too far from where it was sampled; lower "
        "learner.learning_rate, algorithm.epochs or algorithm.minibatches"
    )


def mismatch(first: Means, last: Means) -> str | None:
    apart, capped = last["mismatch"], last["capped_share"]
    if not (apart >= 0.1 or capped >= 0.05):
        return None
    what = "runtime.max_staleness lower" if last["lag"] > 0 else "model.dtype=float32, engine.kv_cache_dtype=auto"
    return (
        f"engine and learner differ by {apart:.2f} in a token's log-probability, and {capped:.0%} of the importance weights "
        f"are over their cap: {what}, or algorithm.importance_mode=mask"
    )


def constant_answers(first: Means, last: Means) -> str | None:
    share = last["constant_share"]
    if not (share >= 0.8):
        return None
    text = last.rows[-1]["constant_text"]
    return (
        f"{text!r} is the best answer to {share:.0%} of the prompts: the reward may be had without an answer; look at "
        "completions/, at what reward.terms give to that text, and at how often the data's answer is the same"
    )


def blind_critic(first: Means, last: Means) -> str | None:
    explained = last["explained_variance"]
    if not (explained <= 0 and last["step"] > first["step"]):
        return None
    return (
        f"the critic explains nothing of the returns (explained variance {explained:.2f}): algorithm.critic_warmup_steps=10, "
        "another algorithm.value_learning_rate, or algorithm=grpo, which needs none"
    )


RULES: dict[str, Callable[[Means, Means], str | None]] = {
    rule.__name__: rule
    for rule in (
        no_signal, entropy_collapse, length_explosion, cut_off, kl_runaway, never_clipped, always_clipped, mismatch,
        constant_answers, blind_critic,
    )
}  # fmt: skip
