"""Draws the rewards of learning runs: `python -m benchmarks.plot <lines of benchmarks.learning> <picture>`.

One panel for each run, one line for each seed: the mean reward of the last WINDOW steps, which is the share of right
answers among those sampled. The dashed lines are the greedy accuracy on the held-out questions, before and after
(median of the seeds).
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

WINDOW = 5  # steps
TITLES = {
    "sums": "one-digit sums, held-out questions drawn anew",
    "sums-unseen": "one-digit sums, held-out questions never trained on",
}


def smoothed(values: list[float]) -> list[float]:
    """The mean of the last WINDOW values at each place."""
    return [statistics.fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))]


def draw(runs: dict[str, list[dict[str, Any]]], picture: Path) -> None:
    figure = Figure(figsize=(5 * len(runs), 3.2))
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)
    for panel, (name, lines) in zip(panels[0], runs.items(), strict=True):
        for line in lines:
            steps = range(1, len(line["rewards"]) + 1)
            panel.plot(steps, smoothed(line["rewards"]), linewidth=1.3, label=f"seed {line['seed']}")
        for moment in ("before", "after"):
            accuracy = statistics.median(line[moment]["greedy"] for line in lines)
            panel.axhline(accuracy, color="grey", linewidth=0.8, linestyle="--")
            panel.annotate(f"held out, {moment}: {accuracy:.1%}", (1, accuracy + 0.015), fontsize=7, color="grey")
        panel.set(title=TITLES.get(name, name), xlabel="step", ylim=(0, 1.05))
        panel.title.set_fontsize(9)
        panel.legend(fontsize=7, loc="lower right")
    panels[0][0].set_ylabel(f"reward (mean of {WINDOW} steps)")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    source, picture = map(Path, sys.argv[1:])
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for text in source.read_text().splitlines():
        line = json.loads(text)
        runs[line["run"]].append(line)
    draw(runs, picture)


if __name__ == "__main__":
    main()
