"""The experts of transformers' models on ling_ops.

After ``import ling_ops.integrations.transformers``, ``experts_implementation="ling_ops"`` works in
``from_pretrained``, ``from_config`` and ``model.set_experts_implementation`` of every model whose
experts use transformers' interface (transformers 5.8 and later).
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import ling_ops
from ling_ops.nn.mlp import is_hooked
from ling_ops.ops._autocast import autocast
from ling_ops.ops._backend import FallbackWarning
from ling_ops.ops.gemm import ROW_MULTIPLE

from ._activations import Recognized, key_of, limits_of, recognize

NAME = "ling_ops"
_NEEDED = (
    "ling_ops.integrations.transformers needs transformers 5.8 or later: "
    'run `pip install "ling-ops[hf]"`'
)
_noted: set[tuple[str, str]] = set()


def register(name: str = NAME) -> None:
    """Make ``experts_implementation=name`` known to transformers. Importing this module does so.

    Raises ImportError where transformers is missing, or too old to say how experts are laid out.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    if "is_concatenated" not in inspect.signature(use_experts_implementation).parameters:
        raise ImportError(_NEEDED)
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module, by transformers' interface.

    hidden_states ``[T, H]``, top_k_index ``[T, K]`` integer (an id of ``num_experts`` or more is
    a pair that is left out), top_k_weights ``[T, K]`` of any float dtype → ``[T, H]`` in
    hidden_states' dtype. Weights, biases and the activation are the module's own.
    """
    first = self.gate_up_proj if self.has_gate else self.up_proj
    down, bias, down_bias = self.down_proj, None, None
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        down_bias = self.down_proj_bias
    if self.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    x = hidden_states.to(first.dtype)
    found = _recognize(self)
    if found.name is None:
        _note(type(self).__name__, found.reason, x.is_cuda)
        out = _by_steps(self, x, first, down, bias, down_bias, top_k_index, top_k_weights)
    else:
        out = ling_ops.moe_mlp(
            x,
            first,
            down,
            top_k_weights,
            top_k_index,
            gate_up_bias=bias,
            down_bias=down_bias,
            activation=found.name,
            swiglu_limit=found.limit,
        )
    return out.to(hidden_states.dtype)


def _recognize(experts: nn.Module) -> Recognized:
    """The activation of ``ling_ops.moe_mlp`` that these experts have, or why they have none."""
    if getattr(experts, "has_post_expert_norm", False):
        return Recognized(None, None, "a norm follows every expert")
    if experts.has_gate and not experts.is_concatenated:
        return Recognized(None, None, "gate and up rows are interleaved")
    if "_apply_gate" in vars(experts):
        return Recognized(None, None, "_apply_gate was set on the module itself")
    act_fn = getattr(experts, "act_fn", None)
    if isinstance(act_fn, nn.Module) and is_hooked(act_fn):
        return Recognized(None, None, "act_fn has a hook, or a forward of its own")
    act, approximate = key_of(act_fn)
    gate = type(experts)._apply_gate if experts.has_gate else None
    return recognize(gate, act, approximate, limits_of(experts))


def _by_steps(
    self: nn.Module,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    bias: Tensor | None,
    down_bias: Tensor | None,
    indices: Tensor,
    weights: Tensor,
) -> Tensor:
    """Products and data movement by ling_ops, the module's own activation and norm between."""
    x, first, down = autocast(x, first, down)
    routing = ling_ops.route(indices, down.shape[0])
    offsets = routing.expert_offsets
    rows = ling_ops.permute(x, routing)
    # A bias is the weight of an input that is 1: as a product it leaves rows of no expert alone,
    # and its gradient is summed in fp32 without index arithmetic.
    unit = F.pad(rows.new_ones(rows.shape[0], 1), (0, ROW_MULTIPLE - 1))

    def product(rows: Tensor, proj: Tensor, bias: Tensor | None) -> Tensor:
        out = ling_ops.grouped_gemm(rows, proj, offsets)
        if bias is None:
            return out
        column = F.pad(bias.to(out.dtype).unsqueeze(-1), (0, ROW_MULTIPLE - 1))
        return out + ling_ops.grouped_gemm(unit, column, offsets)

    h = product(rows, first, bias)
    a = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    y = product(a.to(x.dtype), down, down_bias)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return ling_ops.unpermute(y, routing, weights)


def _note(experts: str, reason: str, is_cuda: bool) -> None:
    """Say once that a kind of experts does not take the fused kernels."""
    if is_cuda and (experts, reason) not in _noted:
        _noted.add((experts, reason))
        warnings.warn(
            f"{experts} runs its activation as PyTorch operations between ling_ops's products: "
            f"{reason}",
            FallbackWarning,
            stacklevel=3,
        )


_note._dynamo_marked_constant = True


def explain(model: nn.Module) -> dict[str, dict[str, Any]]:
    """How ling_ops computes each experts module of a model: name → activation, limit, reason.

    ``activation`` is the name in ``ling_ops.moe_mlp`` (the fused path), or None where the module's
    own activation runs between the products, for the given ``reason``. ``active`` says whether
    the module's configuration names ling_ops, or what it was registered as.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and hasattr(module, "down_proj"):
            config = getattr(module, "config", None)
            chosen = getattr(config, "_experts_implementation", None)
            active = ALL_EXPERTS_FUNCTIONS.get(chosen) is experts_forward
            recognized = _recognize(module)
            found[name] = {
                "activation": recognized.name,
                "limit": recognized.limit,
                "reason": recognized.reason,
                "active": active,
            }
    return found


register()
