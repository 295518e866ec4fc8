"""An episode's tokens: what was sampled stays, what is given is appended, and budgets end it."""

from typing import cast

import pytest

from actors.data.rendering import Rendering
from actors.environments.episode import Budgets, Episode
from actors.types import Completion, Prompt, Sampling, Turn, VersionSpan
from benchmarks.shapes import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TOKENIZER = byte_tokenizer(258)
TOKENIZER.chat_template = TEMPLATE
QUESTION = [{"role": "user", "content": "Guess."}]


def tokens(text: str) -> tuple[int, ...]:
    return tuple(cast("list[int]", TOKENIZER(text, add_special_tokens=False)["input_ids"]))


def completion(text: str, *, reason: str = "stop", version: int = 0) -> Completion:
    """An answer as an engine returns it: with its end-of-sequence token if it ended by itself."""
    token_ids = tokens(text + ("</s>" if reason == "stop" else ""))
    logprobs = tuple(-0.1 * i for i in range(len(token_ids)))
    return Completion("r", token_ids, logprobs, text, reason, (VersionSpan(version, len(token_ids)),))


def episode(**changed: int) -> Episode:
    budgets = {"turns": 5, "turn_tokens": 50, "episode_tokens": 300, "observation_tokens": 100} | changed
    prompt_text = Rendering().conversation(QUESTION, TOKENIZER, add_generation_prompt=True)
    return Episode(
        Prompt(3, prompt_text, tokens(prompt_text), "Guess.", "7", ""),
        QUESTION,
        sampling=Sampling(1.0, 10_000, seed=2**63 - 1),
        budgets=Budgets(**budgets),
        rendering=Rendering(),
        tokenizer=TOKENIZER,
    )


def test_turns_are_sampled_and_given_tokens_in_their_order():
    played = episode()
    first = played.request("a")
    assert (first.prompt_token_ids, first.sampling.max_tokens) == (tokens("<s>user:Guess.</s><s>assistant:"), 50)
    played.answer(completion("It is 5", version=1))
    played.observe([{"role": "user", "content": "Higher."}])
    second = played.request("b")
    assert second.prompt_token_ids == tokens(
        "<s>user:Guess.</s><s>assistant:It is 5</s><s>user:Higher.</s><s>assistant:"
    )
    assert (first.sampling.seed, second.sampling.seed) == (2**63 - 1, 0)
    played.answer(completion("Then 7", version=2))
    trajectory = played.trajectory()
    given = len(tokens("<s>user:Higher.</s><s>assistant:"))
    assert trajectory.turns == (Turn(True, 8), Turn(False, given), Turn(True, 7))
    assert trajectory.token_ids == tokens("It is 5</s><s>user:Higher.</s><s>assistant:Then 7</s>")
    assert len(trajectory.logprobs) == 15 and trajectory.text == "Then 7" and trajectory.finish_reason == "stop"
    assert trajectory.version_spans == (VersionSpan(1, 8), VersionSpan(2, 7))


def test_an_answer_that_was_cut_off_gets_its_end_and_is_not_tokenized_again():
    played = episode()
    # Tokens that the tokenizer would not choose for their text.
    sampled = (*tokens("I"), *tokens("t"), *tokens(" is"))
    played.answer(Completion("r", sampled, (-1.0,) * len(sampled), "It is", "length", (VersionSpan(0, len(sampled)),)))
    assert played.trajectory().finish_reason == "length"
    played.observe([{"role": "user", "content": "Go on."}])
    assert played.trajectory().token_ids == (*sampled, *tokens("</s><s>user:Go on.</s><s>assistant:"))
    played.answer(completion("7"))
    assert played.trajectory().finish_reason == "stop"


def test_budgets_of_turns_tokens_and_observations():
    played = episode(turns=2)
    for left in (50, 50, 0):
        assert played.tokens_left == left
        if left:
            played.answer(completion("5"))
            played.observe([{"role": "user", "content": "Higher."}])
    short = episode(episode_tokens=60)
    short.answer(completion("5"))
    short.observe([{"role": "user", "content": "Higher."}])
    assert short.tokens_left == 60 - len(short.trajectory().token_ids) < 50
    full = episode(episode_tokens=26)
    full.answer(completion("5"))
    full.observe([{"role": "user", "content": "Higher."}])
    assert (full.tokens_left, full.trajectory().finish_reason) == (0, "length")
    assert full.trajectory().turns == (Turn(True, 2),)
    long = episode(observation_tokens=4)
    long.answer(completion("5"))
    long.observe([{"role": "user", "content": "abcdefgh"}])
    assert str(TOKENIZER.decode(list(long.trajectory().token_ids))).endswith("<s>user:abcd [cut]</s><s>assistant:")


@pytest.mark.parametrize("seed", [None, 5])
def test_each_turn_has_a_seed_of_its_own(seed: int | None):
    played = episode()
    played._sampling = Sampling(1.0, 9, seed=seed)
    seeds = []
    for _ in range(3):
        seeds.append(played.request("r").sampling.seed)
        played.answer(completion("5"))
        played.observe([{"role": "user", "content": "Higher."}])
    assert seeds == ([None] * 3 if seed is None else [5, 6, 7])
