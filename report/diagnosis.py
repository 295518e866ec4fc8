"""What goes wrong in a run, in words, each with the setting to try. Plain Python over lines of metrics.jsonl.

Every rule compares the last RECENT steps, and some of them with the first ones, so that one odd step says nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

Row = Mapping[str, Any]
RECENT = 5


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
        return {name: text for name, rule in RULES.items() if (text := rule(self._first, self._last)) is not None}


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return mean(values) if values else None


def no_signal(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    share, reward = _mean(last, "no_signal_share"), _mean(last, "reward")
    if share is None or share < 0.8:
        return None
    return (
        f"in {share:.0%} of the groups all answers score the same (reward {reward:.2f}), so that they teach nothing: take "
        "prompts that are neither too easy nor too hard, algorithm.flat_groups=resample, a larger algorithm.group_size, or a "
        "reward with partial marks"
    )


def entropy_collapse(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    before, now = _mean(first, "entropy"), _mean(last, "entropy")
    if before is None or now is None or now > 0.1 or now > before / 5:
        return None
    return (
        f"entropy fell from {before:.2f} to {now:.3f}: answers hardly differ any more, so that little more can be learned; "
        "algorithm.clip_high=0.28, algorithm.entropy_coefficient=0.001, algorithm.kl_coefficient=0.01 or a lower "
        "learner.learning_rate keep it up"
    )


def length_explosion(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    (before, now), cut = (_mean(rows, "completion_tokens") for rows in (first, last)), _mean(last, "truncated_share")
    if before is None or now is None or cut is None or now < 1.5 * before or cut < 0.3:
        return None
    return (
        f"answers grew from {before:.0f} to {now:.0f} tokens and {cut:.0%} are cut off: algorithm.overlong_buffer=0.2 takes "
        "reward off long ones, algorithm=dr_grpo does not favour length, sampling.max_tokens gives them room"
    )


def cut_off(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    share = _mean(last, "truncated_share")
    if share is None or share < 0.9 or length_explosion(first, last):
        return None
    return (
        f"{share:.0%} of the answers are cut off at the limit: raise sampling.max_tokens, or ask for short answers in "
        "data.system_prompt"
    )


def kl_runaway(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    before, now = _mean(first, "reference_kl"), _mean(last, "reference_kl")
    if before is None or now is None or now < 0.5 or now < 5 * before:
        return None
    return (
        f"KL to the base model rose from {before:.3f} to {now:.2f} nats a token: raise algorithm.kl_coefficient (or "
        "algorithm.beta), set algorithm.kl_target=0.1, or lower learner.learning_rate"
    )


def never_clipped(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    share = _mean(last, "clipped_share")
    if share is None or share > 1e-5:
        return None
    return (
        "the clip never cuts anything although a batch takes several optimizer steps: they change little; raise "
        "learner.learning_rate, or save their time with algorithm.epochs=1 and algorithm.minibatches=1"
    )


def always_clipped(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    share = _mean(last, "clipped_share")
    if share is None or share < 0.4:
        return None
    return (
        f"the clip cuts off {share:.0%} of the tokens: the steps of a batch lead too far from where it was sampled; lower "
        "learner.learning_rate, algorithm.epochs or algorithm.minibatches"
    )


def mismatch(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    apart, capped, lag = _mean(last, "mismatch"), _mean(last, "capped_share"), _mean(last, "lag")
    if apart is None or capped is None or (apart < 0.1 and capped < 0.05):
        return None
    what = "runtime.max_staleness lower" if lag else "model.dtype=float32, engine.kv_cache_dtype=auto"
    return (
        f"engine and learner differ by {apart:.2f} in a token's log-probability, and {capped:.0%} of the importance weights "
        f"are over their cap: {what}, or algorithm.importance_mode=mask"
    )


def constant_answers(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    share = _mean(last, "constant_share")
    if share is None or share < 0.8:
        return None
    text = last[-1]["constant_text"]
    return (
        f"{text!r} is the best answer to {share:.0%} of the prompts: the reward may be had without an answer; look at "
        "completions/, at what reward.terms give to that text, and at how often the data's answer is the same"
    )


def blind_critic(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    explained = _mean(last, "explained_variance")
    if explained is None or explained > 0 or first[0]["step"] == last[0]["step"]:
        return None
    return (
        f"the critic explains nothing of the returns (explained variance {explained:.2f}): algorithm.critic_warmup_steps=10, "
        "another algorithm.value_learning_rate, or algorithm=grpo, which needs none"
    )


RULES: dict[str, Callable[[Sequence[Row], Sequence[Row]], str | None]] = {
    rule.__name__: rule
    for rule in (
        no_signal, entropy_collapse, length_explosion, cut_off, kl_runaway, never_clipped, always_clipped, mismatch,
        constant_answers, blind_critic,
    )
}  # fmt: skip
