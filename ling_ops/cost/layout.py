"""How a model is divided over GPUs: data, tensor and expert parallel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ling_ops.models import LingConfig

from .gpu import CostError, need_choice, need_integer
from .model import Parameters, check_size, parameters

SHARDS = ("none", "optimizer", "full")


@dataclass(frozen=True)
class Layout:
    """`data` x `tensor` GPUs.

    Attributes:
        data: replicas of everything but the routed experts; each has sequences of its own.
        tensor: GPUs over which heads, inner widths and the vocabulary are divided. Norms, routers
            and the [T,H] tensors between the products lie on each of them.
        expert: data-parallel ranks over which a layer's routed experts are divided; divides
            `data`, so that data / expert copies of the experts exist.
        shard: what the replicas divide among them in training: "none", "optimizer" (states and
            fp32 weights, ZeRO-1), or "full" (also weights and gradients, as FSDP2 does).
    """

    data: int = 1
    tensor: int = 1
    expert: int = 1
    shard: str = "none"

    def __post_init__(self) -> None:
        for name in ("data", "tensor", "expert"):
            need_integer(f"{name}_parallel", getattr(self, name))
        need_choice("shard", self.shard, SHARDS)
        if self.data % self.expert:
            raise CostError(
                f"expert_parallel: got {self.expert}, need a divisor of data_parallel={self.data}"
            )

    @property
    def gpus(self) -> int:
        return self.data * self.tensor

    @property
    def expert_copies(self) -> int:
        """How many ranks hold the same routed experts."""
        return self.data // self.expert

    def check(self, config: LingConfig) -> None:
        """CostError where a degree does not divide what it is to divide."""
        check_size(config)
        if config.num_experts % self.expert:
            raise CostError(
                f"expert_parallel: got {self.expert}, need a divisor of "
                f"num_experts={config.num_experts}"
            )
        sizes = ["num_heads", "vocab_size"]
        sizes += ["intermediate_size"] if "dense" in config.layer_types else []
        sizes += ["moe_intermediate_size"] if "moe" in config.layer_types else []
        for name in sizes:
            if getattr(config, name) % self.tensor:
                raise CostError(
                    f"tensor_parallel: got {self.tensor}, need a divisor of "
                    f"{name}={getattr(config, name)}"
                )
        heads = config.num_kv_heads
        if heads % self.tensor and self.tensor % heads:
            raise CostError(
                f"tensor_parallel: got {self.tensor}, need a divisor or a multiple of "
                f"num_kv_heads={heads}"
            )

    def local(self, config: LingConfig) -> LingConfig:
        """The model that one tensor-parallel rank computes, with all of its experts.

        More ranks than KV heads hold copies of them.
        """
        self.check(config)
        degree = self.tensor
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // degree,
            num_kv_heads=max(1, config.num_kv_heads // degree),
            vocab_size=config.vocab_size // degree,
            intermediate_size=max(1, config.intermediate_size // degree),
            moe_intermediate_size=max(1, config.moe_intermediate_size // degree),
        )

    def local_parameters(self, config: LingConfig) -> Parameters:
        """Parameters on one GPU before any sharding."""
        count = parameters(self.local(config))
        return dataclasses.replace(
            count,
            routed_experts=count.routed_experts // self.expert,
            idle_experts=0,
        )
