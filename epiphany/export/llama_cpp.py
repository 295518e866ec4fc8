"""What llama.cpp says of given tokens: a script, for a process of its own that may crash or write what it likes to
stderr. Knows nothing of Epiphany.

    python -P llama_cpp.py FILE THREADS < answers.json

Reads a list of [prompt tokens, answer tokens] and writes, for each answer, the most probable tokens at each place of it
with their log-probabilities, as a list of [token, logprob] pairs.
"""

import importlib
import json
import sys
from typing import Any

CANDIDATES = 50


def main() -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    file, threads = sys.argv[1], int(sys.argv[2])
    answers = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = max(len(prompt) + len(tokens) for prompt, tokens in answers) + 8
    params.n_parallel, params.n_gpu_layers, params.warmup = 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    places = [[_next_token(server, [*prompt, *tokens[:i]]) for i in range(len(tokens))] for prompt, tokens in answers]
    print(json.dumps(places))


def _next_token(server: Any, tokens: list[int]) -> list[tuple[int, float]]:
    """The most probable tokens after these; what was computed of them before is in the server's cache."""
    asked = {"prompt": tokens, "n_predict": 1, "n_probs": CANDIDATES, "temperature": 0, "cache_prompt": True}
    (token,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    return [(candidate["id"], candidate["logprob"]) for candidate in token["top_logprobs"]]


if __name__ == "__main__":
    main()
