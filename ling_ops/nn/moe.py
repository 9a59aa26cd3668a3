"""A whole Mixture-of-Experts layer: router, capacity, experts, shared experts."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from ling_ops import ops
from ling_ops.ops._shared import decode_with_shared

from ._common import check_positive
from .experts import Experts
from .mlp import MLP, add_mlp_, is_hooked, shared_weights
from .router import Router, RouterOutput

PRIORITIES = ("position", "probability")


class MoE(nn.Module):
    """y = Σ_k w_k · expert_k(x) + shared(x).

    ``gate`` is the ``Router`` (every keyword of it can be given here), ``experts`` the
    ``Experts``, ``shared_experts`` one ungated and unscaled ``MLP`` of width
    ``num_shared_experts * shared_intermediate_size``, or None.

    ``capacity``: a ``ling_ops.CapacityPolicy`` (None is dropless; each layer keeps a copy of its
    own). Pairs over the capacity are dropped, by ``capacity_priority`` ("position": first come;
    "probability": the largest gate weights stay), after ``reroute_rounds`` rounds in which they
    may go to their token's next-best expert with room. Weights are not renormalised after a drop.

    After a forward: ``last_indices [T,K]`` (to replay the routing), ``last_losses`` (name →
    0-dim), ``stats()``, and, after one in training mode, ``expert_counts [E]`` int32: the demand
    of that forward before any reroute or drop. They are overwritten, never added to, so that the
    recomputation of activation checkpointing counts nothing twice; what is summed up over
    micro-batches is summed by ``ling_ops.nn.accumulate_expert_counts``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_token: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        swiglu_limit: float | None = None,
        expert_mlp_bias: bool = False,
        num_shared_experts: int = 0,
        shared_intermediate_size: int | None = None,
        capacity: ops.CapacityPolicy | None = None,
        capacity_priority: str = "position",
        reroute_rounds: int = 0,
        init_std: float | None = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options,
    ) -> None:
        super().__init__()
        check_positive(hidden_size=hidden_size, intermediate_size=intermediate_size)
        if capacity_priority not in PRIORITIES:
            raise ValueError(
                f"capacity_priority: got {capacity_priority!r}, need one of {PRIORITIES}"
            )
        if capacity is not None and not isinstance(capacity, ops.CapacityPolicy):
            raise TypeError(
                f"capacity: got {type(capacity).__name__}, need a CapacityPolicy or None"
            )
        for name, value in (
            ("num_shared_experts", num_shared_experts),
            ("reroute_rounds", reroute_rounds),
        ):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: got {value!r}, need an int >= 0")
        factory = {"init_std": init_std, "device": device, "dtype": dtype}
        mlp = {"activation": activation, "swiglu_limit": swiglu_limit, "bias": expert_mlp_bias}
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        policy = ops.CapacityPolicy.dropless() if capacity is None else copy.deepcopy(capacity)
        self.capacity = policy.to(device=device)
        self.capacity_priority = capacity_priority
        self.reroute_rounds = reroute_rounds
        self.gate = Router(
            hidden_size, num_experts, num_experts_per_token, **router_options, **factory
        )
        self.experts = Experts(num_experts, hidden_size, intermediate_size, **mlp, **factory)
        self.shared_experts = None
        if num_shared_experts:
            width = num_shared_experts * (shared_intermediate_size or intermediate_size)
            self.shared_experts = MLP(hidden_size, width, **mlp, **factory)

        self.expert_counts: torch.Tensor | None = None
        self.expert_load: torch.Tensor | None = None
        self.counts_pending = False
        self.last_indices: torch.Tensor | None = None
        self.last_losses: dict[str, torch.Tensor] = {}
        self._last: dict | None = None

    def reset_parameters(self) -> None:
        for module in (self.gate, self.experts, self.shared_experts):
            if module is not None:
                module.reset_parameters()
        for name, buffer in self.capacity.named_buffers():
            buffer.fill_(math.nan if name == "window" else 0)

    def forward(
        self,
        x: torch.Tensor,
        *,
        token_mask: torch.Tensor | None = None,
        replay_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x ``[..., H]`` → the same shape; with three dimensions the middle one is the sequence.

        ``token_mask``: bool of x's leading shape, True for real tokens. The others are routed
        nowhere: they take no capacity, count in no load, and get only the shared experts' output.
        ``replay_indices`` ``[T,K]`` int: see ``Router.forward``.
        """
        if x.dim() < 2 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x: got shape {tuple(x.shape)}, need [..., {self.hidden_size}]")
        flat = x.reshape(-1, self.hidden_size)
        token_mask = self._flat_mask(x, token_mask)
        routed = self.gate(
            flat,
            sequence_length=x.shape[1] if x.dim() == 3 else None,
            token_mask=token_mask,
            indices=replay_indices,
        )
        weights, indices, routing, demand = self._route(routed, token_mask)
        self._remember(routed, demand)
        # plain containers: torch 2.11's compiler can't store a NamedTuple on a module
        self._last = {
            "routing": (demand, *routing[1:]),
            "indices": indices,
            "weights": weights.detach(),
            "token_mask": token_mask,
        }
        out = self.all_experts(flat, weights, indices, routing)
        return out.view(x.shape)

    def all_experts(
        self,
        flat: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        """Routed and shared experts of x ``[T,H]``, in the same launches where tokens are few."""
        if self.shared_experts is None:
            return self.experts(flat, weights, indices, routing=routing)
        out = self._decode(flat, weights, indices, routing)
        if out is not None:
            return out
        return self._add_shared(self.experts(flat, weights, indices, routing=routing), flat)

    def _decode(self, flat, weights, indices, routing) -> torch.Tensor | None:
        experts, shared = self.experts, shared_weights(self.shared_experts)
        plain = type(experts) is Experts and not is_hooked(experts) and experts.down_bias is None
        if shared is None or not plain:
            return None
        return decode_with_shared(
            flat, experts.first_weight, experts.down_proj, weights, indices, shared,
            activation=experts.activation, swiglu_limit=experts.swiglu_limit, routing=routing,
        )  # fmt: skip

    def _add_shared(self, out: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        # In place it saves a pass over out. But who watches the experts may keep what they gave,
        # and other dtypes are promoted.
        shared = self.shared_experts
        plain = type(self.experts) is Experts and type(shared) is MLP
        if not plain or is_hooked(self.experts) or shared.down_proj.weight.dtype != out.dtype:
            return out + shared(flat)
        add_mlp_(out, shared, flat)
        return out

    def _flat_mask(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor | None:
        if token_mask is None:
            return None
        if token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool:
            raise ValueError(
                f"token_mask: got {token_mask.dtype} {tuple(token_mask.shape)}, "
                f"need torch.bool {tuple(x.shape[:-1])}"
            )
        return token_mask.reshape(-1)

    def _route(
        self, routed: RouterOutput, token_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, ops.Routing, torch.Tensor]:
        weights, indices = routed.weights, routed.indices
        if self.capacity.is_dropless:
            routing = ops.route(indices, self.num_experts, token_mask=token_mask)
            return weights, indices, routing, routing.expert_counts
        if token_mask is not None:
            indices = torch.where(token_mask.unsqueeze(-1), indices, -1)
        demand = ops.route(indices, self.num_experts).expert_counts
        capacity = self.capacity.capacity(demand, indices.numel(), self.num_experts)
        if self.reroute_rounds and capacity is not None:
            scores = self.gate.scores(routed.logits)
            weights, indices = ops.reroute(
                scores, weights, indices, capacity=capacity, rounds=self.reroute_rounds
            )
        routing = ops.route(
            indices,
            self.num_experts,
            capacity=capacity,
            priority=self.capacity_priority,
            weights=weights.detach(),
        )
        return weights, indices, routing, demand

    def _remember(self, chosen: RouterOutput, demand: torch.Tensor) -> None:
        self.last_indices = chosen.indices
        self.last_losses = chosen.losses
        if self.training:
            self.expert_counts = demand
            self.counts_pending = True

    def stats(self) -> dict[str, torch.Tensor]:
        """``ling_ops.routing_stats`` of the last forward: device tensors, computed now."""
        if self._last is None:
            raise RuntimeError("MoE.stats: there has been no forward yet")
        last = dict(self._last)
        return ops.routing_stats(ops.Routing(*last.pop("routing")), **last)

    def extra_repr(self) -> str:
        return (
            f"capacity={self.capacity}, capacity_priority={self.capacity_priority}, "
            f"reroute_rounds={self.reroute_rounds}"
        )
