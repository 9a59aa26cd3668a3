"""The Ling language model: embeddings, layers of attention and dense or MoE, output head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ling_ops.nn import MLP, CapacityPolicy, MoE, RMSNorm, update_expert_biases
from ling_ops.nn.lora import LoRALinear

from .attention import Attention, AttentionInputs, attention_inputs
from .cache import KVCache
from .config import LingConfig
from .generation import generate

IGNORED_LABEL = -100


class LingOutput(NamedTuple):
    logits: torch.Tensor  # [B, S, V]
    loss: torch.Tensor | None  # 0-dim fp32: mean cross-entropy in nats, without auxiliary losses
    cache: KVCache | None


class ParameterCount(NamedTuple):
    total: int
    active: int


class LingLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); ``mlp`` is an ``MLP`` or a ``MoE``."""

    def __init__(self, config: LingConfig, index: int, **options) -> None:
        super().__init__()
        norm = {"eps": config.rms_norm_eps, **options}
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.attention = Attention(config, **options)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        is_moe = config.layer_types[index] == "moe"
        self.mlp = _moe(config, **options) if is_moe else _dense(config, **options)

    def forward(
        self,
        x: torch.Tensor,
        shared: AttentionInputs,
        token_mask: torch.Tensor | None,
        cache: KVCache | None,
        replay_indices: torch.Tensor | None,
    ) -> torch.Tensor:
        x = x + self.attention(self.input_layernorm(x), shared, cache, self.index)
        normed = self.post_attention_layernorm(x)
        if not isinstance(self.mlp, MoE):
            return x + self.mlp(normed)
        return x + self.mlp(normed, token_mask=token_mask, replay_indices=replay_indices)


def _dense(config: LingConfig, **options) -> MLP:
    return MLP(
        config.hidden_size,
        config.intermediate_size,
        activation=config.activation,
        swiglu_limit=config.swiglu_limit,
        bias=config.mlp_bias,
        init_std=config.init_std,
        **options,
    )


def _capacity(config: LingConfig) -> CapacityPolicy:
    if config.capacity == "fixed":
        return CapacityPolicy.fixed(config.capacity_factor)
    if config.capacity == "dynamic":
        return CapacityPolicy.dynamic(config.target_drop_rate, mode=config.capacity_mode)
    return CapacityPolicy.dropless()


def _moe(config: LingConfig, **options) -> MoE:
    return MoE(
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_token,
        config.moe_intermediate_size,
        activation=config.activation,
        swiglu_limit=config.swiglu_limit,
        expert_mlp_bias=config.mlp_bias,
        num_shared_experts=config.num_shared_experts,
        capacity=_capacity(config),
        capacity_priority=config.capacity_priority,
        reroute_rounds=config.reroute_rounds,
        score_function=config.score_function,
        use_expert_bias=config.use_expert_bias,
        num_groups=config.num_groups,
        topk_groups=config.topk_groups,
        renormalize=config.renormalize,
        scale=config.routed_scaling_factor,
        bias=config.router_bias,
        jitter=config.router_jitter,
        balance_coefficient=config.balance_coefficient,
        sequence_balance_coefficient=config.sequence_balance_coefficient,
        z_loss_coefficient=config.z_loss_coefficient,
        init_std=config.init_std,
        **options,
    )


class LingModel(nn.Module):
    """Token ids ``[B, S]`` → normalised hidden states ``[B, S, H]``."""

    def __init__(self, config: LingConfig, **options) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **options)
        self.layers = nn.ModuleList(
            LingLayer(config, index, **options) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **options)


class LingForCausalLM(nn.Module):
    """A causal language model of any ``LingConfig``.

    With ``device="meta"`` nothing is allocated; ``model.to_empty(device=...)`` and
    ``model.reset_parameters()`` then make it usable. ``activation_checkpointing = True`` keeps
    only each layer's input for the backward and recomputes the rest.
    """

    def __init__(
        self,
        config: LingConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config.validate()
        options = {"device": device, "dtype": dtype}
        self.config = config
        self.activation_checkpointing = False
        self.foreign_config: dict = {}  # what else the config.json said that it was read from
        self.model = LingModel(config, **options)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, **options)
        self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> LingForCausalLM:
        """The model in ``folder``, in the format of the published Ling models, in eval mode.

        The folder holds ``config.json`` (architecture BailingMoeV2ForCausalLM, or
        BailingMoeForCausalLM of V1) and ``model.safetensors``, or several files and their index.
        ``dtype`` None keeps every tensor's own (an FP8 export becomes its ``torch_dtype``); the
        expert bias is always fp32. Files are memory-mapped and go tensor by tensor into their
        place on ``device``: the host holds no copy of a model that is loaded on a GPU. Layers
        that predict further tokens (``num_nextn_predict_layers``) are not read.

        Raises CheckpointError: what is missing, unexpected, of another shape, or not supported;
        TypeError for a ``dtype`` that is not fp64, fp32, bf16 or fp16.
        """
        from .pretrained import load

        return load(cls, folder, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: int = 5 * 2**30) -> None:
        """Writes the model to ``folder`` as ``from_pretrained`` reads it, bit for bit.

        Files of at most ``max_shard_bytes``, and an index if they are several. ``config.json``
        comes last: a folder without it is unfinished. One file's tensors at a time are copied to
        the host. Raises FileExistsError where ``folder`` holds a checkpoint already, and
        ValueError for a model that has LoRA adapters or of which a rank holds only a part.
        """
        from .pretrained import save

        save(self, folder, max_shard_bytes=max_shard_bytes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all weights anew: N(0, init_std²), ones for norms, zeros for biases.

        With ``init_std=None`` std is 1/sqrt(fan_in); an embedding, whose input is one-hot, has a
        fan-in of 1.
        """
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std or module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std or 1.0)
            elif isinstance(module, (RMSNorm, MoE)):
                module.reset_parameters()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        cache: KVCache | None = None,
        token_mask: torch.Tensor | None = None,
        *,
        replay_indices: Sequence[torch.Tensor] | None = None,
        last_logits_only: bool = False,
    ) -> LingOutput:
        """Logits of input_ids ``[B, S]`` int64, and the loss if there are labels.

        ``labels`` ``[B, S]`` int64 are the ids themselves (usually ``labels=input_ids``): the
        shift by one is made here; -100 and padding are left out of the mean. ``token_mask``
        ``[B, S]`` bool is True for real tokens. With a ``cache`` the ids continue what it holds.
        ``replay_indices``: one ``[B·S, K]`` per MoE layer, to repeat a routing. The losses of the
        routers are not part of ``loss``: they inject their own gradients.
        """
        self._check_input(input_ids, labels, token_mask, replay_indices)
        if last_logits_only and labels is not None:
            raise ValueError("last_logits_only: got True, need False with labels")
        batch, length = input_ids.shape
        past, key_mask = 0, token_mask
        if cache is not None:
            past = cache.length
            cache.reserve(batch, length, token_mask)
            if cache.token_mask is not None:
                key_mask = cache.token_mask[:, : past + length]
        shared = attention_inputs(self.config, length, past, key_mask, input_ids.device)
        hidden = self._layers(input_ids, shared, token_mask, cache, replay_indices)
        if cache is not None:
            cache.advance(length)
        if last_logits_only:
            hidden = hidden[:, -1:]
        logits = self.head(hidden, self.head_norm())
        loss = None if labels is None else next_token_loss(logits, labels, token_mask)
        return LingOutput(logits, loss, cache)

    def head_norm(self) -> torch.Tensor | None:
        """What hidden states are divided by before the head ``[H]``; None without ``norm_head``.

        W / (norm of each column) applied to x is W applied to x / norm.
        """
        if not self.config.norm_head:
            return None
        adapted = isinstance(self.lm_head, LoRALinear)
        weight = self.lm_head.adapted_weight() if adapted else self.lm_head.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight, dim=0, dtype=wide) + 1e-7

    def head(self, hidden: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        """Logits ``[..., V]`` of normalised hidden states ``[..., H]``, ``norm`` of head_norm."""
        if norm is not None:
            hidden = (hidden / norm).to(hidden.dtype)
        return self.lm_head(hidden)

    def _layers(self, input_ids, shared, token_mask, cache, replay_indices) -> torch.Tensor:
        replay = iter(replay_indices or ())
        hidden = self.model.word_embeddings(input_ids)
        recompute = self.activation_checkpointing and self.training and cache is None
        for layer in self.model.layers:
            indices = next(replay, None) if isinstance(layer.mlp, MoE) else None
            arguments = (hidden, shared, token_mask, cache, indices)
            if recompute:
                hidden = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden = layer(*arguments)
        return self.model.norm(hidden)

    def _check_input(self, input_ids, labels, token_mask, replay_indices) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: got shape {tuple(input_ids.shape)}, need [B, S]")
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids: got dtype {input_ids.dtype}, need int64 or int32")
        shape = input_ids.shape
        if labels is not None and labels.shape != shape:
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, need {tuple(shape)}")
        if token_mask is not None and (token_mask.shape != shape or token_mask.dtype != torch.bool):
            raise ValueError(
                f"token_mask: got {token_mask.dtype} {tuple(token_mask.shape)}, "
                f"need torch.bool {tuple(shape)}"
            )
        layers = self.config.layer_types.count("moe")
        if replay_indices is not None and len(replay_indices) != layers:
            raise ValueError(
                f"replay_indices: got {len(replay_indices)} tensors, need {layers}, "
                "one per MoE layer"
            )

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache in this model's device and dtype."""
        weight = self.lm_head.weight
        return KVCache(
            self.config, batch_size, max_length, device=weight.device, dtype=weight.dtype
        )

    def generate(
        self,
        input_ids: torch.Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        eos_token_id: int | None = None,
        token_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        streamer: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Continues prompts ``[B, S]`` → ``[B, S + n]`` int64, n <= max_new_tokens.

        Temperature 0 is greedy; otherwise tokens are drawn from the ``top_p`` nucleus with
        ``generator`` (the same seed gives the same text). Prompts of different length are padded,
        on either side, with ``token_mask`` ``[B, S]`` False there; the new tokens are the last n
        columns. A sequence that has ended is filled up with ``eos_token_id``. ``streamer`` is
        called with each step's tokens ``[B]``, on the host, while a GPU computes the next ones.

        Padding is taken out before the model runs, so a sequence is not changed by the others, up
        to rounding (a fixed or dynamic capacity, which they share, apart). On a GPU, where the
        experts run as kernels (bf16, fp16) and nothing is hooked, the steps are replays of a CUDA
        graph, captured anew by every call. A hook on a whole layer or attention, or a forward that
        is not the class's, makes generation run the slower ``forward``; otherwise the statistics of
        dropless MoE layers (``last_indices``, ``stats``) are not updated.

        Where experts are spread over ranks, every rank calls it, with prompts of its own or none,
        ``[0, S]``; ranks that end early take part until the last one has ended.
        """
        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_token_id=eos_token_id,
            token_mask=token_mask,
            generator=generator,
            streamer=streamer,
        )

    def moe_layers(self) -> list[tuple[int, MoE]]:
        """(layer index, MoE) of every MoE layer."""
        layers = enumerate(self.model.layers)
        return [(index, layer.mlp) for index, layer in layers if isinstance(layer.mlp, MoE)]

    def count_parameters(self) -> ParameterCount:
        """Parameters in total, and those that one token uses.

        Active = total - the routed experts that a token does not visit, (E - K)/E of them per MoE
        layer. Both embedding tables (input and output) count in full, and so do the routers; the
        expert biases are buffers and count in neither. This is the count of the published figures.
        """
        total = sum(parameter.numel() for parameter in self.parameters())
        idle = 0
        for _, moe in self.moe_layers():
            routed = sum(parameter.numel() for parameter in moe.experts.parameters())
            experts = moe.num_experts
            idle += routed // experts * (experts - moe.gate.num_experts_per_token)
        return ParameterCount(total, total - idle)

    def update_expert_biases(self, *, rate: float | None = None, group=None) -> None:
        """Call once per optimizer step: see ``ling_ops.nn.update_expert_biases``.

        ``rate`` is the configuration's ``bias_update_rate`` unless given.
        """
        rate = self.config.bias_update_rate if rate is None else rate
        update_expert_biases(self, rate=rate, group=group)


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of logits ``[B, S, V]`` at t against labels ``[B, S]`` at t + 1.

    Labels of -100 and positions whose label or context token is padding are left out; with none
    left, or S = 1, the loss is 0.
    """
    targets = labels[:, 1:].long()
    if token_mask is not None:
        targets = torch.where(token_mask[:, 1:] & token_mask[:, :-1], targets, IGNORED_LABEL)
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    total = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)
