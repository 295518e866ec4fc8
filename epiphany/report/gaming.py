"""A reward that is earned without answering better: what evaluations see and no single step does. Plain Python."""

from collections.abc import Collection, Sequence

from conf.schema import TermSettings
from conf.validate import named_terms
from epiphany.report import metrics
from epiphany.report.diagnosis import RECENT, Means
from epiphany.report.evaluation import one_line
from epiphany.report.metrics import Row
from epiphany.report.run_folder import Layout
from rewards.registry import REGISTRY

RISE = 0.1  # of a term, that counts


def answer_terms(terms: Sequence[TermSettings]) -> set[str]:
    """The names of those terms of the reward that say whether an answer is right."""
    return {str(term.name) for term in named_terms(terms) if term.fn in REGISTRY and REGISTRY[term.fn].checks_answer}


def lines_of_evaluation(folder: Layout, record: Row, terms: Sequence[TermSettings]) -> list[str]:
    """What an evaluation that was just recorded says, for the console."""
    text = gamed_reward(metrics.read(folder.metrics), metrics.read(folder.evaluations), checking=answer_terms(terms))
    return [one_line(record), *([] if text is None else [f"step {record['step']}: gamed reward: {text}"])]


def gamed_reward(rows: Sequence[Row], evaluations: Sequence[Row], *, checking: Collection[str]) -> str | None:
    """A sentence if terms of the reward have risen since the first evaluation and no more held-out questions are
    answered right; None otherwise, and where nothing says which answers are right.

    `rows` are those of metrics.jsonl, `evaluations` those of evaluations.jsonl, of which the last ones under the same
    reward are compared. The terms `checking`, which say what is right, do not count: where they alone rise, the
    training questions are learned by heart.
    """
    if not evaluations:
        return None
    of_reward = [record for record in evaluations if record["reward"] == evaluations[-1]["reward"]]
    rows = [row for row in rows if row["step"] > of_reward[0]["step"]]
    before, now = of_reward[0]["greedy"]["lenient"], of_reward[-1]["greedy"]["lenient"]
    if len(of_reward) < 2 or len(rows) < 2 * RECENT or before is None or now is None or now > before or now >= 1:
        return None
    first, last = (Means([row["reward_terms"] for row in part]) for part in (rows[:RECENT], rows[-RECENT:]))
    risen = [
        f"{name} rose from {low:.2f} to {high:.2f}"
        for name in rows[0]["reward_terms"]
        if name not in checking and (high := last[name]) - (low := first[name]) >= RISE
    ]
    if not risen:
        return None
    return (
        f"in training, the reward's {', '.join(risen)}, but of the held-out questions {before:.1%} were answered right "
        f"before and {now:.1%} are now: the reward is earned with something else. Read the answers side by side in the "
        "report, and lower the weights of these terms in reward.terms; if it is the form of answers that is being "
        "learned, train on and look again"
    )
