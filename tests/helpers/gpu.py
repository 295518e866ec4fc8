"""What the tests that need a GPU share."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from actors.models.families import FAMILIES
from actors.models.lora import LoraArguments
from actors.types import Prompt

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LORA: LoraArguments = {"rank": 16, "alpha": 32.0, "target_modules": FAMILIES["llama"].targets}


def chat_prompt(tokenizer: PreTrainedTokenizerBase, ordinal: int, question: str, answer: str) -> Prompt:
    """The question as the user's turn of a chat."""
    chat = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return Prompt(ordinal, text, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), "", answer, "")
