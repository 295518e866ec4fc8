"""The table of docs/models.md from lines of benchmarks.models: `python -m benchmarks.models_table FILE ...`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.engines.registry import ENGINES
from actors.models.families import FAMILIES

COLUMNS = ("family", "`model_type`", "CPU, vLLM", "CPU, transformers", "GPU, bf16", "GPU, nf4")
Line = dict[str, Any]


def in_float32(line: Line | None) -> str:
    """The largest distances of engine, learner and gradient."""
    if line is None:
        return "-"
    return f"{line['engine_max']:.0e}, {line['learner_max']:.0e}, {line['gradient']:.0e}"


def in_16_bits(line: Line | None) -> str:
    """The mean distances of engine, learner and a plain pass."""
    if line is None:
        return "-"
    return f"{line['engine_mean']:.3f}, {line['learner_mean']:.3f}, {line['plain_mean']:.3f}"


def _on_gpu(by_key: Mapping[tuple[str, bool, str, str], Line], model_type: str, quantization: str) -> Line | None:
    """What vLLM computed, else the simple engine."""
    lines = (by_key.get((model_type, False, engine, quantization)) for engine in ENGINES)
    return next(filter(None, lines), None)


def main() -> None:
    lines = [json.loads(line) for file in sys.argv[1:] for line in Path(file).read_text().splitlines()]
    by_key = {
        (line["model"], "CPU" in line["machine"], line["engine"], line["quantization"]): line
        for line in lines
        if "error" not in line
    }
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    for model_type, family in FAMILIES.items():
        cells = [
            family.name,
            f"`{model_type}`",
            in_float32(by_key.get((model_type, True, "vllm", "none"))),
            in_float32(by_key.get((model_type, True, "transformers", "none"))),
            *(in_16_bits(_on_gpu(by_key, model_type, quantization)) for quantization in ("none", "nf4")),
        ]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
