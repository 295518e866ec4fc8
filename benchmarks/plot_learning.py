"""The curves of learning runs in one picture.

python -m benchmarks.plot_learning OUT.png [LABEL=metrics.jsonl ...] draws reward over steps and over seconds.
"""

import sys
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt

from report.metrics import read

WINDOW = 5


def smooth(values: list[float]) -> list[float]:
    return [
        sum(values[max(0, i - WINDOW + 1) : i + 1]) / len(values[max(0, i - WINDOW + 1) : i + 1])
        for i in range(len(values))
    ]


def main() -> None:
    out, *curves = sys.argv[1:]
    figure, (by_step, by_second) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for curve in curves:
        label, _, file = curve.partition("=")
        rows = read(Path(file))
        rewards = smooth([row["reward"] for row in rows])
        style = {"label": label, "linestyle": "--" if label.startswith("TRL") else "-"}
        by_step.plot([row["step"] for row in rows], rewards, **style)
        by_second.plot(list(accumulate(row["seconds"] for row in rows)), rewards, **style)
    by_step.set(xlabel="step", ylabel=f"training reward (mean of {WINDOW} steps)", title="by step")
    by_second.set(xlabel="seconds in steps", title="by time")
    by_step.legend()
    for axes in (by_step, by_second):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
