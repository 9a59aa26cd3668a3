"""The experts of a layer as other code computes them: what ``ling_ops`` is timed against."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def torch_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
) -> torch.Tensor:
    """Sort, gather, two torch grouped products, SwiGLU, weighted sum; no sync, all gradients."""
    tokens, k = indices.shape
    ids = indices.reshape(-1)
    ordered, order = ids.sort(stable=True)
    experts = torch.arange(1, len(down) + 1, device=ids.device, dtype=ids.dtype)
    ends = torch.searchsorted(ordered, experts, out_int32=True)
    rows = x.index_select(0, order // k)
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=ids.device)
    y = y.index_select(0, back).view(tokens, k, -1)
    return (y * weights.to(y.dtype).unsqueeze(-1)).sum(1)


def transformers_experts(gate_up: torch.Tensor, down: torch.Tensor):
    """transformers' ``grouped_mm`` experts implementation, or None where it can't be imported."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        forward = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    except (ImportError, KeyError):
        return None

    def apply_gate(h: torch.Tensor) -> torch.Tensor:
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up

    module = SimpleNamespace(
        gate_up_proj=gate_up,
        down_proj=down,
        num_experts=len(down),
        act_fn=F.silu,
        _apply_gate=apply_gate,
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
    )
    return lambda x, weights, indices: forward(module, x, indices, weights)
