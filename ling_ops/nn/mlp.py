"""The dense feed-forward layer: of dense layers, and of the shared experts."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from ling_ops.ops._autocast import is_autocast
from ling_ops.ops._decode import SharedExpert

from ._common import check_activation, check_positive, init_normal


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) for activations without a gate.

    x ``[..., H]`` → ``[..., H]`` in x's dtype. Activations and the clamp are those of
    ``ling_ops.moe_mlp``.
    """

    def __init__(
        self,
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
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        gated = check_activation(activation, swiglu_limit)
        self.activation = activation
        self.swiglu_limit = swiglu_limit
        self.init_std = init_std
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if linear is not None:
                init_normal(linear.weight, linear.in_features, self.init_std)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.inner(x))

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What ``down_proj`` is applied to, ``[..., I]``."""
        up = self.up_proj(x)
        if self.gate_proj is None:
            return _plain(self.activation, up)
        return _gated(self.activation, self.gate_proj(x), up, self.swiglu_limit)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, swiglu_limit={self.swiglu_limit}"


def is_hooked(*modules: nn.Module) -> bool:
    """Whether something watches or changes what goes into these modules or comes out of them:
    a hook, or a forward that was set on the module itself, as accelerate does."""
    return _has_any_global_hook() or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def shared_weights(mlp: nn.Module) -> SharedExpert | None:
    """The weights of an MLP that is nothing but its three products; None for another."""
    if type(mlp) is not MLP or is_hooked(mlp):
        return None
    linears = [
        linear for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if linear is not None
    ]
    plain = all(type(linear) is nn.Linear and linear.bias is None for linear in linears)
    if not plain or is_hooked(*linears):
        return None
    gate = None if mlp.gate_proj is None else mlp.gate_proj.weight
    return SharedExpert(gate, mlp.up_proj.weight, mlp.down_proj.weight)


def add_linear_(x: torch.Tensor, linear: nn.Module, a: torch.Tensor) -> None:
    """x += linear(a), in the product's own launch where the layer is a plain one."""
    plain = type(linear) is nn.Linear and linear.bias is None and linear.weight.dtype == x.dtype
    if plain and not is_hooked(linear) and not is_autocast(x.device.type):
        x.addmm_(a, linear.weight.t())
    else:
        x.add_(linear(a))


def add_mlp_(x: torch.Tensor, mlp: nn.Module, inputs: torch.Tensor) -> None:
    """x += mlp(inputs), for x and inputs ``[T,H]``."""
    if type(mlp) is MLP and not is_hooked(mlp):
        add_linear_(x, mlp.down_proj, mlp.inner(inputs))
    else:
        x.add_(mlp(inputs))


def _gated(
    activation: str, gate: torch.Tensor, up: torch.Tensor, limit: float | None
) -> torch.Tensor:
    if activation == "swiglu":
        if limit is None:
            return F.silu(gate) * up
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    return F.gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up


def _plain(activation: str, up: torch.Tensor) -> torch.Tensor:
    if activation == "silu":
        return F.silu(up)
    if activation == "relu2":
        return F.relu(up).square()
    return F.gelu(up, approximate="tanh" if activation == "gelu_tanh" else "none")
