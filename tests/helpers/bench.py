"""An engine and a policy on the same model, and what to ask of them."""

from typing import Any

import torch

from actors.engines.base import Engine
from actors.models.families import FAMILIES
from actors.models.lora import LoraArguments
from actors.types import Adapter, AdapterEntry, AdapterLayout, Completion, Request, Sampling
from learner.model.policy import Policy

LORA: LoraArguments = {"rank": 8, "alpha": 16.0, "target_modules": FAMILIES["llama"].targets}
SYSTEM = "You are a careful assistant who answers briefly. " * 12  # several cache blocks of 32 tokens


class Bench:
    """An engine beside a policy on the same model."""

    def __init__(self, name: str, engine: Engine, policy: Policy | None, tokenizer: Any) -> None:
        self.name, self.engine, self.policy, self.tokenizer = name, engine, policy, tokenizer
        small = AdapterLayout(8, 16.0, (AdapterEntry("m", "A", (8, 4), 0), AdapterEntry("m", "B", (4, 8), 32)))
        self.layout = policy.lora.layout if policy else small

    def adapter(self, version: int, *, seed: int | None = None, scale: float = 0.05) -> Adapter:
        """Zeros, or random values that change what the model says."""
        flat = torch.zeros(self.layout.size)
        if seed is not None:
            flat.normal_(0, scale, generator=torch.Generator().manual_seed(seed))
        return Adapter(version, self.layout, flat)

    def tokens(self, text: str) -> tuple[int, ...]:
        if self.tokenizer is None:
            return (2, 3, 4)
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        return tuple(self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))

    def sample(self, *, count: int = 4, tokens: int = 8, temperature: float = 1.0, seed: int = 0) -> list[Completion]:
        sampling = [Sampling(temperature, tokens, seed + i) for i in range(count)]
        self.engine.submit([Request(f"{seed}/{i}", self.tokens("What is 2 + 2?"), s) for i, s in enumerate(sampling)])
        return sorted(self.finish(), key=lambda c: c.request_id)

    def finish(self) -> list[Completion]:
        done: list[Completion] = []
        while self.engine.unfinished:
            done += self.engine.step()
        return done
