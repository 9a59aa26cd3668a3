"""The experts of a layer in plain PyTorch: the definition of `ling_ops.moe_mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import ACTIVATIONS, activate, activation_backward
from .gate import upcast
from .gemm import grouped_gemm, loop_grouped_gemm, loop_grouped_gemm_dw, row_experts
from .permute import combine, permute
from .route import Routing, route


class Steps(NamedTuple):
    """The ops that the layer is composed of: the reference's, or those that choose a kernel."""

    permute: Callable[[Tensor, Routing], Tensor]
    grouped_gemm: Callable[[Tensor, Tensor, Tensor], Tensor]
    unpermute: Callable[[Tensor, Routing, Tensor], Tensor]


REFERENCE_STEPS = Steps(
    lambda x, routing: permute(x, routing.row_token),
    grouped_gemm,
    lambda rows, routing, weights: combine(rows, routing.token_row, weights),
)


class _AddToMainGrad(torch.autograd.Function):
    """Hand a weight on; its gradient goes into an fp32 buffer instead of `.grad`."""

    @staticmethod
    def forward(ctx, weight: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        ctx.buffer.add_(grad)
        return None, None


def _with_bias(rows: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Add each row's expert's bias [E,N]; rows past the end stay zero, so that their slopes do."""
    if bias is None:
        return rows
    bias = F.pad(bias, (0, 0, 0, 1))
    return (rows + bias[row_experts(offsets, rows.shape[0])]).to(rows.dtype)


def moe_mlp(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    routing: Routing,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "swiglu",
    swiglu_limit: float | None = None,
    main_grads: tuple[Tensor, Tensor] | None = None,
    steps: Steps = REFERENCE_STEPS,
) -> Tensor:
    """See `ling_ops.moe_mlp`; the routing is given here."""
    if main_grads is not None:
        gate_up_proj = _AddToMainGrad.apply(gate_up_proj, main_grads[0])
        down_proj = _AddToMainGrad.apply(down_proj, main_grads[1])
    offsets = routing.expert_offsets
    rows = steps.permute(x, routing)
    h = _with_bias(steps.grouped_gemm(rows, gate_up_proj, offsets), gate_up_bias, offsets)
    a = activate(h, activation, swiglu_limit)
    y = _with_bias(steps.grouped_gemm(a, down_proj, offsets), down_bias, offsets)
    return steps.unpermute(y, routing, weights)


def moe_up(
    x: Tensor,
    proj: Tensor,
    row_token: Tensor,
    offsets: Tensor,
    activation: int,
    limit: float,
    write_h: bool,
) -> tuple[Tensor, Tensor]:
    """(h [M,2I] or [M,I], a [M,I]) of the gathered rows; h is [0] if it isn't wanted.

    `activation` indexes `ACTIVATIONS`; `limit` is infinite for none.
    """
    h = loop_grouped_gemm(permute(x, row_token), proj, offsets)
    a = activate(h, ACTIVATIONS[activation], None if limit == float("inf") else limit)
    return h if write_h else h.new_empty(0), a


def moe_forward(
    x: Tensor,
    proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    row_token: Tensor | None,
    offsets: Tensor | None,
    token_row: Tensor | None,
    activation: int,
    limit: float,
) -> Tensor:
    """[T,H]: `moe_up`, the second product and `combine`, with nothing kept for a backward.

    Without `row_token`, `offsets` and `token_row` all pairs of `indices` are routed first.
    """
    if offsets is None:
        routing = route(indices, down_proj.shape[0])
        row_token, offsets, token_row = (
            routing.row_token, routing.expert_offsets, routing.token_row
        )  # fmt: skip
    _, a = moe_up(x, proj, row_token, offsets, activation, limit, False)
    return combine(loop_grouped_gemm(a, down_proj, offsets), token_row, weights, None)


def moe_dact(
    grad_out: Tensor,
    down_proj: Tensor,
    h: Tensor,
    weights: Tensor,
    row_token: Tensor,
    row_pair: Tensor,
    offsets: Tensor,
    activation: int,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dh like h, w * a [M,I], grad_weights like weights) of out = combine(down(act(h)), w).

    With d = grad_out[token] @ down_proj[e] of a row: dh = w d act'(h), grad_weights = <d, act(h)>.
    """
    name, bound = ACTIVATIONS[activation], None if limit == float("inf") else limit
    is_row = (row_pair >= 0).unsqueeze(-1)
    pair = row_pair.clamp(min=0).long()
    w = torch.where(is_row, upcast(weights.reshape(-1)[pair]).unsqueeze(-1), 0.0)
    d = upcast(loop_grouped_gemm(permute(grad_out, row_token), down_proj.transpose(1, 2), offsets))
    a = upcast(activate(upcast(h), name, bound))
    dh = torch.where(is_row, activation_backward(w * d, h, name, bound), 0.0)
    sums = torch.where(is_row, d * a, 0.0).sum(-1)
    grad_weights = sums.new_zeros(weights.numel() + 1)
    last = torch.where(row_pair >= 0, row_pair, weights.numel()).long()
    grad_weights = grad_weights.scatter_(0, last, sums)[:-1].view(weights.shape)
    return dh.to(h.dtype), torch.where(is_row, w * a, 0.0).to(h.dtype), grad_weights


def moe_decode(
    x: Tensor,
    proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    indices: Tensor,
    token_row: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    activation: int,
    limit: float,
) -> Tensor:
    """`moe_mlp` of the pairs whose `token_row` is not negative; None keeps all.

    With `shared_gate` [S,H] (None without a gate), `shared_up` [S,H] and `shared_down` [H,S], S a
    multiple of I, plus what this expert gives for each token. `activation` indexes `ACTIVATIONS`;
    `limit` is infinite for none.
    """
    if token_row is not None:
        indices = torch.where(token_row >= 0, indices, -1)
    out = moe_mlp(
        x,
        proj,
        down_proj,
        weights,
        route(indices, down_proj.shape[0]),
        gate_up_bias=up_bias,
        down_bias=down_bias,
        activation=ACTIVATIONS[activation],
        swiglu_limit=None if limit == float("inf") else limit,
    )
    if shared_up is None:
        return out
    h = x @ (shared_up if shared_gate is None else torch.cat([shared_gate, shared_up])).T
    a = activate(h, ACTIVATIONS[activation], None if limit == float("inf") else limit)
    return out + a @ shared_down.T


def moe_dw(dy: Tensor, x: Tensor, row_token: Tensor, offsets: Tensor, gather_x: bool) -> Tensor:
    """[E,N,Kd]: dy[rows of e]^T times x[rows of e]; one of the two is in token order.

    With `gather_x` dy is [M,N] and x [T,Kd], read through `row_token` [M]; without it dy is [T,N]
    and x [M,Kd].
    """
    if gather_x:
        return loop_grouped_gemm_dw(dy, permute(x, row_token), offsets)
    return loop_grouped_gemm_dw(permute(dy, row_token), x, offsets)


def moe_dw_add_(
    buffer: Tensor, dy: Tensor, x: Tensor, row_token: Tensor, offsets: Tensor, gather_x: bool
) -> None:
    """Add `moe_dw` to an fp32 buffer [E,N,Kd]; its sums are not rounded to dy's dtype before."""
    buffer.add_(moe_dw(dy.float(), x.float(), row_token, offsets, gather_x))
