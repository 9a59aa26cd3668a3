"""`ling_ops.cost`: what a training step keeps, against autograd; its peak, against a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ling_ops import cost
from ling_ops.cli.optimizer import Optimizer
from ling_ops.models import LingConfig, LingForCausalLM
from ling_ops.nn import router

ARTICLE = {
    "mlp_bias": True, "activation": "gelu", "score_function": "softmax", "use_expert_bias": False,
    "balance_coefficient": 0.01, "router_bias": True, "num_shared_experts": 0,
    "use_qk_norm": False, "num_kv_heads": 4, "renormalize": False,
}  # fmt: skip
CASES = {
    "hierarchical, grouped queries, a shared expert": {},
    "all dense": {"layer_pattern": "1-0"},
    "all MoE, two shared experts": {"layer_pattern": "0-1", "num_shared_experts": 2},
    "no shared expert, a head for every query": {"num_shared_experts": 0, "num_kv_heads": 4},
    "plain experts": {"activation": "relu2"},
    "sequence-wise loss, no z-loss": {"sequence_balance_coefficient": 0.1, "z_loss_coefficient": 0},
    "no QK-norm, whole heads rotated": {"use_qk_norm": False, "partial_rotary_factor": 1.0},
    "biases": ARTICLE,
    "gated experts with biases and a limit": {"mlp_bias": True, "swiglu_limit": 7.0},
    "V1's head": {"norm_head": True},
}

#: B, S, dtype, checkpointing, and the peak in bytes of a step of `small` on an H100 80GB
#: (torch 2.11, cu130; `torch.cuda.max_memory_allocated`).
MEASURED = [
    (8, 256, "bf16", False, 4511880192), (32, 256, "bf16", False, 5096150016),
    (128, 256, "bf16", False, 10803811840), (16, 2048, "bf16", False, 10809316352),
    (64, 1024, "bf16", False, 18429056000), (128, 256, "bf16", True, 4577445888),
    (16, 2048, "bf16", True, 4578362880), (8, 256, "fp32", False, 4569492480),
    (32, 256, "fp32", False, 9922499584),
]  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _FusedNorm(torch.autograd.Function):
    """Keeps what the GPU's fused rms_norm keeps: x, the weight, 1/rms in fp32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros_like(ctx.saved_tensors[1]), None


class _RouterProduct(torch.autograd.Function):
    """Keeps what the GPU's router product keeps: both factors, in bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.zeros_like(saved) for saved in ctx.saved_tensors)


@pytest.fixture
def gpu_path(monkeypatch):
    """The dispatch of a GPU, on the operators' CPU implementations."""
    for name in ("gate", "gate_losses", "route", "moe_mlp", "permute", "gemm"):
        module = importlib.import_module(f"ling_ops.ops.{name}")
        monkeypatch.setattr(module, "use_kernel", lambda op, x, unsupported=None: not unsupported)
    monkeypatch.setattr(
        F, "rms_norm", lambda x, size, weight, eps: _FusedNorm.apply(x, weight, eps)
    )
    monkeypatch.setattr(router, "router_product", _RouterProduct.apply)


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1]).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _saved_bytes(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes of all storages that autograd keeps, but for the parameters'."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, batch)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert loss.isfinite()
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_formula_is_what_autograd_keeps(gpu_path, changes):
    torch.manual_seed(0)
    config = LingConfig.preset("tiny", **changes)
    model = LingForCausalLM(config, dtype=torch.bfloat16).train()
    batch = torch.randint(0, config.vocab_size, (2, 25))
    found = cost.activation_bytes(config, 2, 24).total_bytes
    saved = _saved_bytes(model, batch)
    if config.mlp_bias or config.norm_head:
        # The layer keeps what autograd does not (demand, token_row); the columns' norms: not in it.
        assert saved == pytest.approx(found, rel=2e-3)
    else:
        assert saved == found + 4  # the loss keeps its total weight


def test_checkpointing_keeps_each_layers_input(gpu_path):
    config = LingConfig.preset("tiny")
    model = LingForCausalLM(config, dtype=torch.bfloat16).train()
    model.activation_checkpointing = True
    batch = torch.randint(0, 256, (2, 25))
    parts = cost.activation_bytes(config, 2, 24, activation_checkpointing=True)
    assert parts.attention_bytes == config.num_layers * 2 * 48 * config.hidden_size
    inputs = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].nbytes))
    loss = _loss(model, batch)
    assert sum(inputs) == parts.attention_bytes
    loss.backward()
    whole = cost.activation_bytes(config, 2, 24)
    assert parts.total_bytes < whole.total_bytes


@pytest.mark.parametrize(("batch", "length", "dtype", "again", "measured"), MEASURED)
def test_a_step_of_small_takes_what_the_gpu_reported(batch, length, dtype, again, measured):
    found = cost.training_memory(
        LingConfig.preset("small"), batch, length, dtype=dtype, activation_checkpointing=again
    )
    assert found.peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "changes", "batch", "length", "measured"),
    [("small", {"num_kv_heads": 8, "num_shared_experts": 0, "activation": "gelu",
                "vocab_size": 4096}, 32, 256, 4217001984),
     ("ling-mini-2.0", {"num_layers": 3}, 4, 2048, 49710251520)],
)  # fmt: skip
def test_so_do_other_models(preset, changes, batch, length, measured):
    found = cost.training_memory(LingConfig.preset(preset, **changes), batch, length)
    assert found.peak_bytes == pytest.approx(measured, rel=0.02)


#: What the page's table calls models.
OF_PAGE = {
    "`small`": ("small", {}),
    "`small`, plain GELU, 8 KV heads, V = 4096, no shared expert": (
        "small", {"num_kv_heads": 8, "num_shared_experts": 0, "activation": "gelu",
                  "vocab_size": 4096}),
    "`ling-mini-2.0`, its first 3 layers": ("ling-mini-2.0", {"num_layers": 3}),
}  # fmt: skip


def test_the_page_predicts_what_the_formula_gives():
    page = (Path(__file__).parents[1] / "docs" / "cost.md").read_text(encoding="utf-8")
    _, _, table = page.partition("| measured | predicted | off by |\n")
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert len(rows) == len(MEASURED) + 2
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        model, size, dtype, again, measured, *shown = cells
        (preset, changes), (batch, length) = OF_PAGE[model], map(int, size.split(" x "))
        peak = cost.training_memory(
            LingConfig.preset(preset, **changes), batch, length, dtype=dtype,
            activation_checkpointing=again == "yes",
        ).peak_bytes / 1e9  # fmt: skip
        off = 100 * (peak / float(measured) - 1)
        assert shown == [f"{peak:.3f}", f"{off:.1f} %".replace("-0.0", "0.0")], row


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize(
    ("batch", "length", "dtype", "again"),
    [(16, 256, "bf16", False), (64, 512, "bf16", False), (64, 512, "bf16", True),
     (16, 256, "fp32", False)],
)  # fmt: skip
def test_the_peak_of_a_step_is_within_a_tenth(batch, length, dtype, again):
    config, device = LingConfig.preset("small"), torch.device("cuda")
    before = torch.cuda.memory_allocated()
    model = LingForCausalLM(config, device=device, dtype=DTYPES[dtype]).train()
    model.activation_checkpointing = again
    optimizer = Optimizer(model, weight_decay=0.1)
    ids = torch.randint(0, 256, (batch, length + 1), device=device)
    for _ in range(2):  # the first step makes the moments
        torch.cuda.reset_peak_memory_stats()
        _loss(model, ids).backward()
        optimizer.step(1e-4, 1.0)
    peak = torch.cuda.max_memory_allocated()
    # The workspaces of cuBLAS are there already if another test ran products.
    found = cost.training_memory(config, batch, length, dtype=dtype, activation_checkpointing=again)
    assert abs(found.peak_bytes - (peak - before)) < 0.1 * peak


def test_accumulation_keeps_all_gradients():
    config = LingConfig.preset("small")
    once = cost.training_memory(config, 32, 256)
    twice = cost.training_memory(config, 32, 256, micro_batches=2)
    grown = twice.backward_peak_bytes - once.backward_peak_bytes
    assert 0 < grown <= once.gradient_bytes
    assert twice.optimizer_peak_bytes == once.optimizer_peak_bytes


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0, 256, {}), "batch_size"), ((1, 0, {}), "sequence_length"),
     ((1, 1, {"dtype": "int8"}), "dtype"), ((1, 1, {"micro_batches": 0}), "micro_batches"),
     ((1.5, 1, {}), "batch_size")],
)  # fmt: skip
def test_nonsense_sizes_are_errors(arguments, word):
    batch, length, options = arguments
    with pytest.raises(cost.CostError, match=word):
        cost.training_memory(LingConfig.preset("small"), batch, length, **options)
