"""How completions are drawn in training and in evaluation, from the settings."""

from actors.types import Sampling, Truncation
from conf.schema import Settings


def training_sampling(settings: Settings) -> Sampling:
    """How training samples."""
    asked = settings.sampling
    return Sampling(
        asked.temperature,
        asked.max_tokens,
        truncation=Truncation(asked.top_k, asked.top_p, asked.min_p),
        stop=tuple(asked.stop),
    )


def evaluation_sampling(settings: Settings) -> Sampling:
    """How the sampled completions of an evaluation are drawn: as in training, but for what is set apart."""
    training, asked = training_sampling(settings), settings.evaluation
    truncation = training.truncation
    return Sampling(
        training.temperature if asked.temperature is None else asked.temperature,
        training.max_tokens,
        truncation=Truncation(
            truncation.top_k if asked.top_k is None else asked.top_k,
            truncation.top_p if asked.top_p is None else asked.top_p,
            truncation.min_p if asked.min_p is None else asked.min_p,
        ),
        stop=training.stop if asked.stop is None else tuple(asked.stop),
    )
