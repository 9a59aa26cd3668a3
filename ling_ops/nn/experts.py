"""The routed experts: stacked plain parameters behind ``ling_ops.moe_mlp``."""

from __future__ import annotations

import torch
from torch import nn

from ling_ops import ops

from ._common import check_activation, check_positive, init_normal


class Experts(nn.Module):
    """E feed-forward networks whose weights are stacked on dimension 0.

    Parameters: ``gate_up_proj [E, 2I, H]`` (gate rows first, then up rows) for gated activations,
    ``up_proj [E, I, H]`` for the others, ``down_proj [E, H, I]``; with ``bias=True`` also
    ``gate_up_bias [E, 2I]`` or ``up_bias [E, I]``, and ``down_bias [E, H]``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        swiglu_limit: float | None = None,
        bias: bool = False,
        init_std: float | None = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.swiglu_limit = swiglu_limit
        self.init_std = init_std
        self.gated = check_activation(activation, swiglu_limit)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        name, width = ("gate_up", 2) if self.gated else ("up", 1)
        self.register_parameter(f"{name}_proj", parameter(width * intermediate_size, hidden_size))
        self.down_proj = parameter(hidden_size, intermediate_size)
        bias_in = parameter(width * intermediate_size) if bias else None
        self.register_parameter(f"{name}_bias", bias_in)
        self.down_bias = parameter(hidden_size) if bias else None
        self.reset_parameters()

    @property
    def first_weight(self) -> nn.Parameter:
        """``gate_up_proj`` or ``up_proj``, whichever this activation has."""
        return self.gate_up_proj if self.gated else self.up_proj

    @property
    def first_bias(self) -> nn.Parameter | None:
        return self.gate_up_bias if self.gated else self.up_bias

    def reset_parameters(self) -> None:
        init_normal(self.first_weight, self.hidden_size, self.init_std)
        init_normal(self.down_proj, self.intermediate_size, self.init_std)
        for bias in (self.first_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        *,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        """Σ_k weights[t,k] · expert_{indices[t,k]}(x[t]).

        x ``[T,H]``, weights ``[T,K]`` fp32, indices ``[T,K]`` int32 or int64 → ``[T,H]`` in x's
        dtype (the autocast dtype under autocast). ``routing`` spares a second ``ops.route`` and
        decides which pairs are kept.
        """
        return ops.moe_mlp(
            x,
            self.first_weight,
            self.down_proj,
            weights,
            indices,
            gate_up_bias=self.first_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            swiglu_limit=self.swiglu_limit,
            routing=routing,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}, "
            f"activation={self.activation}, bias={self.down_bias is not None}"
        )
