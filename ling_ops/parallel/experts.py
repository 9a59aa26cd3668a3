"""The experts of a layer, spread over the ranks of a group."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from ling_ops import ops
from ling_ops.nn import Experts
from ling_ops.ops._moves import gather_rows, sum_rows

from .collectives import exchange, gather_counts


class ParallelExperts(Experts):
    """``ling_ops.nn.Experts`` of which rank r of ``group`` holds E/R: r·E/R and the following.

    Parameters are plain tensors ``[E/R, ...]`` under the names of ``Experts``. ``forward`` takes
    each rank's own tokens, T of them (0 is allowed, and every rank may have another T):

    - dropless, or with any capacity: exactly the kept rows travel. The host waits once for the
      number of rows of each rank.
    - ``static_capacity``, C rows for each expert from each rank: every rank sends E·C rows,
      those that nothing fills are empty, and the host waits for nothing. Needs the same C on
      every rank, so the same T where C depends on it. Pairs past C are dropped by the routing.

    Every rank of the group must call forward, and backward, the same number of times.
    """

    def __init__(
        self, experts: Experts, group: distributed.ProcessGroup, policy: ops.CapacityPolicy | None
    ) -> None:
        nn.Module.__init__(self)
        ranks = distributed.get_world_size(group)
        if isinstance(experts, ParallelExperts):
            raise ValueError("experts must be whole ones, got a ParallelExperts")
        if any(True for _ in experts.children()):
            raise ValueError(
                f"experts must be plain ones, got {type(experts).__name__}: merge_lora and "
                "remove_lora come first"
            )
        if experts.num_experts % ranks:
            raise ValueError(
                f"group must have a number of ranks that divides the {experts.num_experts} "
                f"experts, got {ranks}"
            )
        for name in (
            "num_experts", "hidden_size", "intermediate_size", "activation", "swiglu_limit",
            "init_std", "gated",
        ):  # fmt: skip
            setattr(self, name, getattr(experts, name))
        self.group, self.ranks = group, ranks
        self.local_experts = experts.num_experts // ranks
        self.first_expert = distributed.get_rank(group) * self.local_experts
        self._policy = (policy,)  # in a tuple, so that it is no submodule: the layer has it
        for name, parameter in experts.named_parameters():
            local = parameter.detach()[self.first_expert :][: self.local_experts].clone()
            self.register_parameter(name, nn.Parameter(local, parameter.requires_grad))
        for name in ("gate_up_bias" if self.gated else "up_bias", "down_bias"):
            if getattr(self, name, None) is None:
                self.register_parameter(name, None)
        self.train(experts.training)

    # A traced exchange inside an autograd.Function gave wrong gradients with torch 2.11. What is
    # left out of the graph are operators that a compiler can't fuse anyway.
    @torch.compiler.disable
    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor,
        *,
        routing: ops.Routing | None = None,
    ) -> Tensor:
        """Σ_k weights[t,k] · expert_{indices[t,k]}(x[t]) for this rank's x ``[T,H]``."""
        policy, capacity = self._policy[0], None
        if policy is not None:  # a fixed one
            capacity = policy.capacity(None, indices.numel(), self.num_experts)
        if routing is None:
            routing = ops.route(indices, self.num_experts, capacity=capacity)
        offsets = routing.expert_offsets
        sent = (offsets[1:] - offsets[:-1]).view(self.ranks, self.local_experts)
        got = torch.empty_like(sent)
        distributed.all_to_all_single(got, sent, group=self.group)
        if capacity is not None:
            return self._static(x, weights, routing, got, capacity)
        return self._ragged(x, weights, routing, sent, got)

    def _ragged(self, x, weights, routing, sent, got) -> Tensor:
        to_ranks, from_ranks = torch.stack([sent.sum(1), got.sum(1)]).tolist()
        rows = ops.permute(x, routing)
        pairs, kept = rows.shape[0], sum(to_ranks)
        rows = exchange(rows if kept == pairs else rows[:kept], from_ranks, to_ranks, self.group)
        expert = torch.arange(self.local_experts, dtype=torch.int32, device=x.device)
        expert = expert.repeat(self.ranks).repeat_interleave(
            got.flatten(), output_size=sum(from_ranks)
        )
        rows = exchange(self._local(rows, expert), to_ranks, from_ranks, self.group)
        rows = rows if kept == pairs else F.pad(rows, (0, 0, 0, pairs - kept))
        return ops.unpermute(rows, routing, weights)

    def _static(self, x, weights, routing, got, capacity: int) -> Tensor:
        offsets = routing.expert_offsets
        place = torch.arange(capacity, dtype=torch.int32, device=x.device)
        if capacity == 0 or not x.shape[0]:
            slots = torch.full_like(routing.token_row, -1)
            row_token = place.new_full((self.num_experts * capacity,), -1)
        else:
            # Slot e*C + c holds the c-th row of expert e.
            filled = place < (offsets[1:] - offsets[:-1]).unsqueeze(1)
            row = (offsets[:-1].unsqueeze(1) + place).clamp(max=routing.row_token.numel() - 1)
            row_token = torch.where(filled, routing.row_token[row.long()], -1).flatten()
            row = routing.token_row.clamp(min=0).contiguous()
            expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
            slot = expert * capacity + row - offsets[expert.clamp(max=self.num_experts - 1)]
            slots = torch.where(routing.token_row >= 0, slot, -1).int()
        rows = exchange(gather_rows(x, row_token, slots), None, None, self.group)
        expert = torch.arange(self.local_experts, dtype=torch.int32, device=x.device)
        expert = torch.where(place < got.unsqueeze(2), expert[None, :, None], -1).flatten()
        rows = exchange(self._local(rows, expert), None, None, self.group)
        return sum_rows(rows, slots, weights)

    def _local(self, rows: Tensor, expert: Tensor) -> Tensor:
        """The rows through this rank's experts: ``moe_mlp`` with one choice of weight 1."""
        return ops.moe_mlp(
            rows,
            self.first_weight,
            self.down_proj,
            rows.new_ones(rows.shape[0], 1, dtype=torch.float32),
            expert.unsqueeze(1),
            gate_up_bias=self.first_bias,
            down_bias=self.down_bias,
            activation=self.activation,
            swiglu_limit=self.swiglu_limit,
        )

    def extra_repr(self) -> str:
        last = self.first_expert + self.local_experts - 1
        return f"{super().extra_repr()}, experts {self.first_expert} to {last} of this rank"


class GroupCapacity(ops.CapacityPolicy):
    """A policy whose dynamic capacity follows the loads that every rank sends to every expert."""

    group: distributed.ProcessGroup

    @classmethod
    def adopt(cls, policy: ops.CapacityPolicy, group: distributed.ProcessGroup) -> None:
        """Makes ``policy`` one of this kind, its buffers and their names untouched."""
        policy.__class__, policy.group = cls, group

    def capacity(self, expert_counts, num_pairs, num_experts):
        if self.kind == "dynamic" and self.mode == "batch":
            expert_counts = gather_counts(expert_counts, self.group).flatten()
        return super().capacity(expert_counts, num_pairs, num_experts)

    def update(self, expert_counts: Tensor) -> None:
        if self.kind == "dynamic" and self.mode == "running":
            expert_counts = gather_counts(expert_counts, self.group).flatten()
        super().update(expert_counts)
