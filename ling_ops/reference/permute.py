"""Moving tokens into expert order and back, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import upcast


def permute(x: Tensor, row_token: Tensor) -> Tensor:
    """Rows [T*K,H] of x [T,H] in expert order; rows whose token is -1 are zero."""
    rows = x[row_token.clamp(min=0).long()]
    return torch.where((row_token >= 0).unsqueeze(-1), rows, 0.0)


def combine(
    rows: Tensor, token_row: Tensor, weights: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    """out[t] = residual[t] + sum over k of weights[t,k] * rows[token_row[t,k]], in rows' dtype.

    The sum is taken in fp32 (float64 for float64). Both factors of a dropped pair are replaced
    by zero, so that neither a NaN row nor a NaN weight of it is seen, forward or backward.
    """
    present = token_row >= 0
    gathered = rows[token_row.clamp(min=0).long()]
    gathered = upcast(torch.where(present.unsqueeze(-1), gathered, 0.0))
    if weights is not None:
        gathered = gathered * torch.where(present, weights, 0.0).to(gathered.dtype).unsqueeze(-1)
    out = gathered.sum(1)
    if residual is not None:
        out = out + residual.to(out.dtype)
    return out.to(rows.dtype)


def combine_backward(
    grad_out: Tensor, rows: Tensor, row_pair: Tensor, weights: Tensor | None, num_choices: int
) -> tuple[Tensor, Tensor]:
    """(grad_rows [T*K,H] in rows' dtype, grad_weights [T,K] in fp32) of `combine`."""
    tokens = grad_out.shape[0]
    is_row = (row_pair >= 0).unsqueeze(-1)
    grad = upcast(permute(grad_out, torch.where(row_pair >= 0, row_pair // num_choices, -1)))
    products = (grad * torch.where(is_row, upcast(rows), 0.0)).sum(-1)
    pair = torch.where(row_pair >= 0, row_pair, tokens * num_choices).long()
    grad_weights = products.new_zeros(tokens * num_choices + 1).scatter_(0, pair, products)
    grad_weights = grad_weights[:-1].view(tokens, num_choices)
    if weights is not None:
        factor = weights.reshape(-1).to(grad.dtype)[row_pair.clamp(min=0).long()].unsqueeze(-1)
        grad = grad * torch.where(is_row, factor, 0.0)
    return grad.to(rows.dtype), grad_weights
