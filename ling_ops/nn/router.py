"""The router: one linear map, then top-k selection, always in fp32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ling_ops import ops
from ling_ops.ops._precise import PreciseBuffers
from ling_ops.ops.gate_losses import LossCoefficients, router_losses, topk_gate_with_losses

from ._common import check_positive, init_normal, without_autocast
from ._router_product import router_product


class RouterOutput(NamedTuple):
    weights: torch.Tensor  # [T,K] fp32 (float64 for float64 input), losses injected
    indices: torch.Tensor  # [T,K] int32, or the replayed ids as given
    logits: torch.Tensor  # [T,E] fp32 (float64 for float64 input)
    losses: dict[str, torch.Tensor]  # 0-dim, detached, with their coefficients; empty in eval


class Router(PreciseBuffers):
    """Scores E experts per token and chooses K of them.

    ``weight [E,H]``; ``expert_bias [E]`` is an fp32 buffer (it stays fp32 under ``.to(dtype)``)
    that only moves the selection, or None. Everything is computed in fp32 whatever the dtype of
    the parameters and whatever autocast says. ``jitter`` multiplies the router's input by
    U(1-jitter, 1+jitter), in training only.

    The losses (coefficients of 0 switch them off) are injected into ``weights``: their gradients
    arrive in the backward without being added to the main loss. ``loss_scale`` (a float, 1 by
    default) multiplies what is injected: set it to what the main loss is multiplied with, for
    example 1/steps under gradient accumulation (``ling_ops.nn.set_router_loss_scale``).
    """

    precise = ("expert_bias",)  # in bf16 a step of 1e-3 would be lost

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        *,
        score_function: str = "softmax",
        use_expert_bias: bool = False,
        num_groups: int = 1,
        topk_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        jitter: float = 0.0,
        balance_coefficient: float = 0.0,
        sequence_balance_coefficient: float = 0.0,
        z_loss_coefficient: float = 0.0,
        init_std: float | None = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            hidden_size=hidden_size,
            num_experts=num_experts,
            num_experts_per_token=num_experts_per_token,
            num_groups=num_groups,
            topk_groups=topk_groups,
        )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.score_function = score_function
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.renormalize = renormalize
        self.scale = scale
        self.jitter = jitter
        self.balance_coefficient = balance_coefficient
        self.sequence_balance_coefficient = sequence_balance_coefficient
        self.z_loss_coefficient = z_loss_coefficient
        self.loss_scale = 1.0
        self.init_std = init_std
        self._check_options()
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        selection_bias = (
            torch.empty(num_experts, device=device, dtype=torch.float32)
            if use_expert_bias
            else None
        )
        self.register_buffer("expert_bias", selection_bias)
        self.reset_parameters()

    def _check_options(self) -> None:
        experts, groups = self.num_experts, self.num_groups
        if self.score_function not in ("softmax", "sigmoid"):
            raise ValueError(
                f"score_function: got {self.score_function!r}, need 'softmax' or 'sigmoid'"
            )
        if experts % groups:
            raise ValueError(f"num_groups: got {groups}, need a divisor of num_experts={experts}")
        if self.topk_groups > groups:
            raise ValueError(
                f"topk_groups: got {self.topk_groups}, need at most num_groups={groups}"
            )
        reachable = experts // groups * self.topk_groups
        if self.num_experts_per_token > reachable:
            raise ValueError(
                f"num_experts_per_token: got {self.num_experts_per_token}, need at most "
                f"{reachable} (num_experts={experts}, num_groups={groups}, "
                f"topk_groups={self.topk_groups})"
            )
        if not 0.0 <= self.jitter < 1.0:
            raise ValueError(f"jitter: got {self.jitter}, need 0 <= jitter < 1")
        for name in ("balance", "sequence_balance", "z_loss"):
            value = getattr(self, f"{name}_coefficient")
            if not value >= 0.0:
                raise ValueError(f"{name}_coefficient: got {value}, need a number >= 0")

    def reset_parameters(self) -> None:
        init_normal(self.weight, self.hidden_size, self.init_std)
        for tensor in (self.bias, self.expert_bias):
            if tensor is not None:
                nn.init.zeros_(tensor)

    def forward(
        self,
        x: torch.Tensor,
        *,
        sequence_length: int | None = None,
        token_mask: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
    ) -> RouterOutput:
        """Chooses the experts of x ``[T,H]``.

        ``sequence_length``: tokens per sequence (T is a multiple of it), needed by the
        sequence-wise loss. ``token_mask`` ``[T]`` bool, True for real tokens: the others take no
        part in the losses. ``indices`` ``[T,K]`` int replays a routing: the ids are taken as they
        are and their weights are computed anew, differentiably, from this router's scores; an id
        outside [0,E) gets weight 0.
        """
        self._check_input(x, token_mask, indices)
        losses = {"sequence_length": sequence_length, "token_mask": token_mask}
        with without_autocast(x.device):
            logits = self._logits(x)
            if indices is None:
                weights, indices, values = self._choose(logits, losses)
            else:
                weights, values = self._replay(logits, indices, losses)
        return RouterOutput(weights, indices, logits, values)

    def _coefficients(self, logits: torch.Tensor) -> LossCoefficients:
        """The losses of this forward: none in eval, none without tokens."""
        if not self.training or logits.shape[0] == 0:
            return LossCoefficients()
        return LossCoefficients(
            self.balance_coefficient, self.sequence_balance_coefficient, self.z_loss_coefficient
        )

    def _choose(self, logits: torch.Tensor, losses: dict):
        gate = {
            "score_function": self.score_function,
            "expert_bias": self.expert_bias,
            "num_groups": self.num_groups,
            "topk_groups": self.topk_groups,
            "renormalize": self.renormalize,
            "scale": self.scale,
        }
        coefficients = self._coefficients(logits)
        if not any(coefficients):
            return *ops.topk_gate(logits, self.num_experts_per_token, **gate), {}
        return topk_gate_with_losses(
            logits,
            self.num_experts_per_token,
            coefficients,
            loss_scale=self.loss_scale,
            **gate,
            **losses,
        )

    def _replay(self, logits: torch.Tensor, indices: torch.Tensor, losses: dict):
        weights = self.replay_weights(logits, indices)
        values = router_losses(
            logits,
            indices,
            self._coefficients(logits),
            score_function=self.score_function,
            **losses,
        )
        if values:
            weights = ops.inject_loss(weights, sum(values.values()) * self.loss_scale)
        return weights, {name: value.detach() for name, value in values.items()}

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Unbiased scores ``[T,E]`` of logits ``[T,E]``: softmax over all experts, or sigmoid."""
        if self.score_function == "softmax":
            return torch.softmax(logits, dim=-1)
        return torch.sigmoid(logits)

    def replay_weights(self, logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Gate weights ``[T,K]`` of given expert ids ``[T,K]``, by the rule of ``topk_gate``."""
        valid = (indices >= 0) & (indices < self.num_experts)
        ids = torch.where(valid, indices, 0).long()
        weights = self.scores(logits).gather(1, ids).masked_fill(~valid, 0.0)
        if self.renormalize and self.num_experts_per_token > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.jitter > 0:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
        logits = router_product(x, self.weight)
        return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def _check_input(
        self, x: torch.Tensor, token_mask: torch.Tensor | None, indices: torch.Tensor | None
    ) -> None:
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, need [T, {self.hidden_size}]")
        if not x.is_floating_point():
            raise TypeError(f"x: got dtype {x.dtype}, need a floating-point dtype")
        tokens = x.shape[0]
        if token_mask is not None and (
            token_mask.shape != (tokens,) or token_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"token_mask: got {token_mask.dtype} {tuple(token_mask.shape)}, "
                f"need torch.bool [{tokens}]"
            )
        if indices is None:
            return
        if indices.shape != (tokens, self.num_experts_per_token):
            raise ValueError(
                f"indices: got shape {tuple(indices.shape)}, "
                f"need [{tokens}, {self.num_experts_per_token}]"
            )
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: got dtype {indices.dtype}, need int32 or int64")

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.num_experts}, {self.num_experts_per_token}, "
            f"score_function={self.score_function}, groups={self.topk_groups}/{self.num_groups}, "
            f"expert_bias={self.expert_bias is not None}, scale={self.scale}"
        )
