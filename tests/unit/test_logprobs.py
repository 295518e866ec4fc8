"""Chunked log-probabilities against the plain formula and autograd."""

import pytest
import torch

from actors.models.families import LogitTransform
from learner.model.logprobs import token_logprobs


def changed(product: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    scaled = product * transform.scale
    return scaled if transform.softcap is None else transform.softcap * torch.tanh(scaled / transform.softcap)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.3), LogitTransform(0.5, softcap=1.5)])
@pytest.mark.parametrize("entropy_requires_grad", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_the_full_log_softmax(chunk: int, entropy_requires_grad: bool, transform: LogitTransform):
    """With `entropy_requires_grad`, gradients flow through the entropy, too."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    head = torch.randn(11, 5, generator=generator)
    targets = torch.randint(11, (7,), generator=generator)
    upstream = torch.randn(7, generator=generator)
    entropy_upstream = torch.randn(7, generator=generator) * entropy_requires_grad

    full = (changed(hidden @ head.T, transform) / 0.7).log_softmax(-1)
    full_entropy = -(full.exp() * full).sum(-1)
    expected = (full[range(7), targets] * upstream + full_entropy * entropy_upstream).sum()
    (expected_gradient,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    logprobs, entropy = token_logprobs(
        hidden,
        head,
        targets,
        temperature=0.7,
        chunk=chunk,
        transform=transform,
        entropy_requires_grad=entropy_requires_grad,
    )
    (gradient,) = torch.autograd.grad((logprobs * upstream + entropy * entropy_upstream).sum(), hidden)

    torch.testing.assert_close(logprobs, full[range(7), targets])
    torch.testing.assert_close(entropy, full_entropy)
    torch.testing.assert_close(gradient, expected_gradient)


def test_nothing_is_kept_without_gradient():
    hidden = torch.randn(4, 5)
    logprobs, _ = token_logprobs(hidden, torch.randn(11, 5), torch.tensor([0, 1, 2, 3]), temperature=1.0, chunk=2)
    assert not logprobs.requires_grad
