"""Episode: one trajectory as it grows, turn after turn, in tokens. Token in, token out.

What was sampled stays as it was sampled; what an environment says is tokenized alone and appended as the chat template
writes it. Knows tokenizers; knows neither engines nor what the environment is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from actors.data.continuation import Message, appended_tokens, continuation
from actors.data.rendering import Rendering
from actors.types import Completion, Prompt, Request, Sampling, Trajectory, Turn

CUT = " [cut]"  # behind an observation of which the model sees the beginning only


@dataclass(frozen=True)
class Budgets:
    """How long an episode may be: answers, tokens of one answer, tokens behind the prompt, and tokens of what comes
    from outside between two answers.
    """

    turns: int
    turn_tokens: int
    episode_tokens: int
    observation_tokens: int


class Episode:
    """The trajectory of one sample of `prompt`, whose conversation so far is `messages`. `sampling` has the seed of the
    first answer; each further one has the next.
    """

    def __init__(
        self,
        prompt: Prompt,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        budgets: Budgets,
        rendering: Rendering,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._prompt = prompt
        self._messages = list(messages)
        self._sampling, self._budgets = sampling, budgets
        self._rendering, self._tokenizer = rendering, tokenizer
        self._token_ids: list[int] = []
        self._turns: list[Turn] = []
        self._answers: list[Completion] = []
        self.was_cut = False

    @property
    def tokens_left(self) -> int:
        """How long the next answer may be; 0 if there may be none."""
        budgets = self._budgets
        if len(self._answers) >= budgets.turns:
            return 0
        return max(0, min(budgets.turn_tokens, budgets.episode_tokens - len(self._token_ids)))

    def request(self, request_id: str) -> Request:
        """What to sample next: everything so far is the prompt."""
        seed, turn = self._sampling.seed, len(self._answers)
        sampling = replace(
            self._sampling, max_tokens=self.tokens_left, seed=None if seed is None else (seed + turn) % 2**63
        )
        return Request(request_id, (*self._prompt.token_ids, *self._token_ids), sampling)

    def answer(self, completion: Completion) -> None:
        """Append what the engine sampled."""
        self._answers.append(completion)
        self._token_ids += completion.token_ids
        self._turns.append(Turn(True, len(completion.token_ids)))
        self._messages.append({"role": "assistant", "content": completion.text})
        self.was_cut = completion.finish_reason == "length"

    def observe(self, messages: Sequence[Message]) -> None:
        """Append what came from outside, up to where the next answer begins. Raises DataError if the chat template
        refuses it. Where the episode's tokens do not suffice, nothing is appended, and the episode is over.
        """
        shown = [{**message, "content": self._shortened(str(message["content"]))} for message in messages]
        text = continuation(self._rendering, self._tokenizer, before=self._messages[:-1], behind=shown)
        given = appended_tokens(text, self._tokenizer, last_sampled=self._answers[-1].token_ids[-1])
        if len(self._token_ids) + len(given) >= self._budgets.episode_tokens:
            self.was_cut = True
            self._budgets = replace(self._budgets, turns=len(self._answers))
            return
        self._token_ids += given
        self._turns.append(Turn(False, len(given)))
        self._messages += shown

    def trajectory(self) -> Trajectory:
        """The episode as it is now; its text is the last answer's."""
        return Trajectory(
            token_ids=tuple(self._token_ids),
            turns=tuple(self._turns),
            logprobs=tuple(logprob for answer in self._answers for logprob in answer.logprobs),
            text=self._answers[-1].text,
            finish_reason="length" if self.was_cut else "stop",
            version_spans=tuple(span for answer in self._answers for span in answer.version_spans),
        )

    def _shortened(self, text: str) -> str:
        """The beginning of a text, as long as the budget of an observation allows."""
        most = self._budgets.observation_tokens
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(token_ids) <= most:
            return text
        return str(self._tokenizer.decode(token_ids[:most])) + CUT
