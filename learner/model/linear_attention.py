"""Linear attention over a packed stream: Qwen3.5's gated delta rule (arXiv:2412.06464).

Its layers carry a state from token to token and look back a few tokens by a convolution. transformers' own forward pass
would run through the stream as through one sequence. Here each prompt begins with an empty state, and each completion
goes on from the state that its prompt ends with, so that the prompt is computed once. Suffixes: S stream, N segments, Q
tokens of one segment, C channels, H heads, D size of a head.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from learner.model.probe import Probe
from learner.packing import Packing, Segment

LINEAR_ATTENTION = "linear_attention"  # in a configuration's layer_types


class DeltaNet(Protocol):
    """transformers' Qwen3_5GatedDeltaNet, as far as it is used here."""

    in_proj_qkv: torch.nn.Module
    in_proj_z: torch.nn.Module
    in_proj_b: torch.nn.Module
    in_proj_a: torch.nn.Module
    out_proj: torch.nn.Module
    conv1d: torch.nn.Conv1d
    norm: torch.nn.Module
    dt_bias: torch.Tensor
    A_log: torch.Tensor
    key_dim: int
    value_dim: int
    head_k_dim: int
    head_v_dim: int
    num_k_heads: int
    num_v_heads: int
    activation: str


def pack_linear_attention(model: PreTrainedModel) -> bool:
    """Let the linear attention of `model`, if it has any that is known, compute a packed stream; whether it has."""
    if LINEAR_ATTENTION not in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        return False
    from transformers.models.qwen3_5 import modeling_qwen3_5

    layers = [module for module in model.modules() if isinstance(module, modeling_qwen3_5.Qwen3_5GatedDeltaNet)]
    for module in layers:
        vars(module)["forward"] = partial(_forward, cast(DeltaNet, module), modeling_qwen3_5)
    return bool(layers)


def _forward(
    net: DeltaNet,
    library: ModuleType,
    hidden_states: torch.Tensor,
    cache_params: object = None,
    attention_mask: object = None,
    *,
    packing: Packing | Probe,
    **keywords: object,
) -> torch.Tensor:
    """hidden_states [1, S, hidden] -> [1, S, hidden]. With a Probe, the call is recorded and the result is empty."""
    if isinstance(packing, Probe):
        packing.record(keywords)
        return torch.empty_like(hidden_states)
    stream = hidden_states[0]
    mixed_SC = ACT2FN[net.activation](_convolve(net.in_proj_qkv(stream), net.conv1d.weight[:, 0], packing))
    query, key, value = mixed_SC.split([net.key_dim, net.key_dim, net.value_dim], dim=-1)
    query_SHD, key_SHD, value_SHD = (
        query.unflatten(-1, (-1, net.head_k_dim)),
        key.unflatten(-1, (-1, net.head_k_dim)),
        value.unflatten(-1, (-1, net.head_v_dim)),
    )
    shared = net.num_v_heads // net.num_k_heads
    if shared > 1:
        query_SHD, key_SHD = (x.repeat_interleave(shared, dim=1) for x in (query_SHD, key_SHD))
    beta_SH = net.in_proj_b(stream).sigmoid()
    decay_SH = -net.A_log.float().exp() * F.softplus(net.in_proj_a(stream).float() + net.dt_bias)
    rule = cast("Callable[..., tuple[torch.Tensor, torch.Tensor]]", library.torch_chunk_gated_delta_rule)
    output_SHD = _carry_state(rule, (query_SHD, key_SHD, value_SHD), decay_SH, beta_SH, packing)
    gate_SHD = net.in_proj_z(stream).unflatten(-1, (-1, net.head_v_dim))
    normed = net.norm(output_SHD.reshape(-1, net.head_v_dim), gate_SHD.reshape(-1, net.head_v_dim))
    return net.out_proj(normed.view(len(stream), -1))[None]


def _convolve(x_SC: torch.Tensor, weight_CK: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The causal convolution of each channel over each token and the K - 1 before it in its sequence."""
    padded = torch.cat([x_SC, x_SC.new_zeros(1, x_SC.shape[1])])
    taps = weight_CK.shape[1]
    total = torch.zeros_like(x_SC, dtype=torch.float32)
    for back in range(taps):
        total = total + padded.index_select(0, packing.before(back)).float() * weight_CK[:, taps - 1 - back].float()
    return total.to(x_SC.dtype)


def _carry_state(
    rule: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    decay_SH: torch.Tensor,
    beta_SH: torch.Tensor,
    packing: Packing,
) -> torch.Tensor:
    """The rule over all prompts, and then over all completions from their prompts' states: [S, H, D]."""
    batches, outputs_S = packing.padded
    prompts = [segment for segment in packing.segments if not segment.prefix_length]
    completions = [segment for segment in packing.segments if segment.prefix_length]
    state: torch.Tensor | None = None
    outputs = []
    for segments, batch in zip(filter(None, (prompts, completions)), batches, strict=True):
        if segments is completions and state is not None:
            state = state.index_select(0, _prompts_of(completions, prompts).to(state.device))
        shape = batch.queries.shape
        q, k, v, decay, beta = (
            x.index_select(0, batch.queries.flatten()).view(*shape, *x.shape[1:]) for x in (*streams, decay_SH, beta_SH)
        )
        lengths = torch.tensor([segment.length for segment in segments], device=q.device)
        # Padding neither decays the state nor writes to it.
        is_token = (torch.arange(shape[1], device=q.device) < lengths[:, None])[..., None]
        output, state = rule(
            q,
            k,
            v,
            g=decay * is_token,
            beta=beta * is_token,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, outputs_S)


def _prompts_of(completions: list[Segment], prompts: list[Segment]) -> torch.Tensor:
    """The index of each completion's prompt."""
    index = {prompt.start: number for number, prompt in enumerate(prompts)}
    return torch.tensor([index[completion.prefix_start] for completion in completions])
