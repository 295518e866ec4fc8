"""The numbers that the page draws: rows of metrics as curves, evaluations, warnings, and where the time went. Plain
Python.
"""

from collections.abc import Mapping, Sequence

from epiphany.report.metrics import Row
from epiphany.report.sinks import numbers_of

MAX_POINTS = 2000  # of a curve
# What is drawn, by section. A name that ends in /* stands for all that begin so; a section shows what was measured.
SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Reward": {
        "reward": "mean reward of the step's scored completions",
        "reward_terms/*": "mean of this term of the reward",
        "zero_variance_share": "groups in which all rewards are equal: nothing is learned from them",
        "constant_share": "prompts for which one and the same text is a best answer",
        "length_correlation": "correlation within groups of a completion's reward and its length",
        "unscorable_share": "completions that could not be scored",
    },
    "Answers": {
        "completion_tokens": "mean number of sampled tokens of a completion",
        "truncated_share": "completions cut off at sampling.max_tokens",
        "by_source/*": "of the answers to this source",
    },
    "Policy": {
        "entropy": "mean entropy over the trained tokens, in nats",
        "reference_kl": "KL divergence from the base model, in nats per token",
        "logprob_gap": "mean difference between the learner's and the engine's log-probability, in nats",
        "logprob_gap_max": "the largest of these differences",
        "capped_share": "trained tokens whose importance weight is over its cap",
        "clipped_share": "trained tokens without gradient because of the clip",
        "staleness": "mean number of versions between sampling and training",
        "grad_norm": "norm of the gradient before clipping",
        "loss": "mean loss over the step's optimizer steps",
        "learning_rate": "learning rate of the step",
        "explained_variance": "share of the returns' variance that the critic explained",
    },
    "Time": {
        "seconds": "wall-clock seconds of the step, without evaluations",
        "rollout_seconds": "seconds of sampling, of the worker that sampled longest",
        "learner_seconds": "seconds of the learner's step",
        "rollout_tokens_per_second": "sampled tokens per second of sampling",
        "learner_tokens_per_second": "tokens per second of the learner, prompts included",
    },
}


def curves(rows: Sequence[Row]) -> dict[str, object]:
    """The steps, and the values of each curve at them: None where nothing was measured.

    With more than MAX_POINTS rows, every k-th and the last are taken; `every` is k.
    """
    every = -(-len(rows) // MAX_POINTS) or 1
    taken = [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]
    numbers = [numbers_of({key: value for key, value in row.items() if key != "workers"}) for row in taken]
    names = dict.fromkeys(name for of_step in numbers for name in of_step)
    return {
        "steps": [row["step"] for row in taken],
        "every": every,
        "values": {name: [of_step.get(name) for of_step in numbers] for name in names},
    }


def warnings(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Every warning of the run once, as it was last said, with the steps that it was on."""
    seen: dict[str, list[Row]] = {}
    for row in rows:
        for name in row.get("warnings") or {}:
            seen.setdefault(name, []).append(row)
    return [
        {
            "name": name.replace("_", " "),
            "text": of_name[-1]["warnings"][name],
            "first": of_name[0]["step"],
            "last": of_name[-1]["step"],
            "steps": len(of_name),
            "is_current": of_name[-1] is rows[-1],
        }
        for name, of_name in seen.items()
    ]


def seconds_by_part(rows: Sequence[Row], evaluations: Sequence[Row]) -> dict[str, float]:
    """Seconds of all steps and evaluations. Sampling and learning overlap where a run may be stale."""

    def total(of: Sequence[Row], name: str) -> float:
        return sum(row.get(name) or 0.0 for row in of)

    return {
        "steps": total(rows, "seconds"),
        "sampling": total(rows, "rollout_seconds"),
        "learning": total(rows, "learner_seconds"),
        "evaluations": total(evaluations, "seconds"),
    }
