"""Experts modules of transformers on ling_ops: every class, dtypes, sentinels, own activations."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers", minversion="5.8")
from tolerances import LAYER_ROUNDINGS, assert_bitwise, assert_within
from transformers.activations import ACT2FN
from transformers_models import AnyConfig, experts_classes, layout_class, make_experts, redraw

import ling_ops.integrations.transformers as integration
from ling_ops.integrations._activations import Recognized

pytestmark = pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")

TOKENS, CHOICES, EXPERTS = 61, 2, 5
# Activations that ling_ops has, and ones it must leave to the class. What a later transformers adds
# may be either; its results count.
FUSED = {
    "AriaExperts", "DeepseekV3Experts", "Ernie4_5_MoeExperts", "Glm4MoeExperts", "MixtralExperts",
    "NemotronHExperts", "OlmoeExperts", "Qwen3MoeExperts",
}  # fmt: skip
OVERRIDDEN = {
    "DeepseekV4Experts", "Glm5NextTextExperts", "HYV4Experts", "Inkling2Experts", "GptOssExperts",
    "MiniMaxM3VLExperts", "OpenAIPrivacyFilterExperts", "MuseSparkExperts",
}  # fmt: skip


def inputs(experts: nn.Module, dtype: torch.dtype, weight_dtype: torch.dtype):
    hidden = experts.down_proj.shape[2 if experts.is_transposed else 1]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(TOKENS, hidden, generator=generator).to(dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    weights, ids = scores.topk(CHOICES)
    return x, ids, weights.to(weight_dtype)


def results(experts: nn.Module, x, ids, weights, implementation: str) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input, the gate weights and all parameters."""
    experts.config._experts_implementation = implementation
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = experts(x, ids, weights)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    names, parameters = zip(*experts.named_parameters(), strict=True)
    grads = torch.autograd.grad((out * weighting.to(out)).sum(), (x, weights, *parameters))
    return {"out": out, **dict(zip(("x", "weights", *names), grads, strict=True))}


def compare(experts, x, ids, weights, exact=None) -> dict[str, torch.Tensor]:
    wide = copy.deepcopy(experts).double()
    exact = exact or results(wide, x.double(), ids, weights.double(), "eager")
    naive = results(experts, x, ids, weights, "eager")
    actual = results(experts, x, ids, weights, "ling_ops")
    for name, truth in exact.items():
        assert actual[name].dtype == naive[name].dtype, name
        assert_within(
            actual[name], truth, naive=naive[name], roundings=LAYER_ROUNDINGS // 4, name=name
        )
    return actual


@pytest.mark.parametrize("name", experts_classes())
def test_every_class_of_experts(name, device):
    experts = make_experts(name).to(device)
    if name in FUSED | OVERRIDDEN:
        assert (integration._recognize(experts).name is None) == (name in OVERRIDDEN)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    compare(experts, x, ids, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", list(itertools.product([True, False], repeat=4)), ids=str)
def test_every_layout(layout, dtype, device):
    """Concatenated or interleaved, transposed, biased, gated: all sixteen together."""
    concatenated, _, _, gated = layout
    experts = layout_class(*layout)(AnyConfig())
    redraw(experts)
    experts = experts.to(device, dtype)
    expected = ("swiglu" if concatenated else None) if gated else "silu"
    assert integration._recognize(experts).name == expected
    x, ids, weights = (t.to(device) for t in inputs(experts, dtype, torch.float32))
    compare(experts, x, ids, weights)


KINDS = ["MixtralExperts", "NemotronHExperts", "AriaExperts", "GptOssExperts", "DeepseekV4Experts"]


@pytest.mark.parametrize("name", [*KINDS, "MuseSparkExperts"])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_experts_with_gate_weights_of_either_dtype(name, weight_dtype, device):
    experts = make_experts(name).to(device, torch.bfloat16)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.bfloat16, weight_dtype))
    actual = compare(experts, x, ids, weights)
    assert actual["out"].dtype == torch.bfloat16 and actual["weights"].dtype == weight_dtype


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name, device):
    experts = make_experts(name).to(device)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    exact = results(copy.deepcopy(experts).double(), x.double(), ids, weights.double(), "eager")
    with torch.autocast(device.type, torch.bfloat16):
        naive = results(experts, x, ids, weights, "eager")
        actual = results(experts, x, ids, weights, "ling_ops")
    assert actual["out"].dtype == torch.float32
    for key, truth in exact.items():
        rounded = actual[key].bfloat16()  # the products' dtype rules the error
        assert_within(rounded, truth, naive=naive[key], roundings=LAYER_ROUNDINGS // 4, name=key)
    assert (actual["out"].double() - exact["out"]).abs().max() > 2**-14  # it did round


@pytest.mark.parametrize("name", KINDS)
def test_hidden_states_of_another_dtype_than_the_weights(name, device):
    experts = make_experts(name).to(device, torch.bfloat16)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    experts.config._experts_implementation = "ling_ops"
    out = experts(x, ids, weights)
    expected = experts(x.bfloat16(), ids, weights)
    assert out.dtype == torch.float32 and torch.equal(out, expected.float())


@pytest.mark.parametrize("sentinel", [EXPERTS, EXPERTS + 7, -1])
@pytest.mark.parametrize("name", [*KINDS, "MuseSparkExperts"])
def test_a_sentinel_takes_a_pair_out(name, sentinel, device):
    """Whatever its weight holds, a pair with the id num_experts adds nothing anywhere."""
    experts = make_experts(name).to(device)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    out_of_it = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)).to(device) < 0.4
    kept = weights.masked_fill(out_of_it, 0.0)
    wide = copy.deepcopy(experts).double()
    exact = results(wide, x.double(), ids, kept.double(), "eager")
    exact["weights"] = exact["weights"].masked_fill(out_of_it, 0.0)
    marked, poisoned = (
        ids.masked_fill(out_of_it, sentinel),
        weights.masked_fill(out_of_it, torch.nan),
    )
    actual = results(experts, x, marked, poisoned, "ling_ops")
    for key, truth in exact.items():
        assert_within(actual[key], truth, roundings=LAYER_ROUNDINGS, name=key)
    assert not actual["weights"][out_of_it].any()


@pytest.mark.parametrize("name", [*KINDS, "MuseSparkExperts"])
def test_the_same_bits_each_time(name, device):
    experts = make_experts(name).to(device, torch.bfloat16)
    arguments = [t.to(device) for t in inputs(experts, torch.bfloat16, torch.float32)]
    first = results(experts, *arguments, "ling_ops")
    for key, again in results(experts, *arguments, "ling_ops").items():
        assert_bitwise(again, first[key], key)


@pytest.mark.parametrize("name", KINDS)
def test_no_tokens_and_no_kept_pairs(name, device):
    experts = make_experts(name).to(device)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    for tokens, out in ((0, ids[:0]), (3, torch.full_like(ids[:3], EXPERTS))):
        found = results(experts, x[:tokens], out, weights[:tokens], "ling_ops")
        assert all(not tensor.any() for tensor in found.values())


@pytest.mark.parametrize("name", [*KINDS, "MuseSparkExperts"])
def test_experts_compile_without_a_break(name, device):
    experts = make_experts(name).to(device)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    plain = results(experts, x, ids, weights, "ling_ops")
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    out = compiled(x, ids, weights)
    weighting = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    (out * weighting).sum().backward()
    assert_within(out, plain["out"].double(), roundings=4, name="out")
    assert_within(x.grad, plain["x"].double(), roundings=LAYER_ROUNDINGS, name="x")


def with_gate(function, name: str = "MixtralExperts", **attributes) -> nn.Module:
    """Experts whose ``_apply_gate`` is ``function``."""
    experts = make_experts(name)
    experts.__class__ = type("Overridden", (type(experts),), {"_apply_gate": function})
    for key, value in attributes.items():
        setattr(experts, key, value)
    return experts


def halves(function):
    return lambda self, h: function(self, *h.chunk(2, dim=-1))


clamped_after = halves(
    lambda self, g, u: F.silu(g).clamp(max=self.limit) * u.clamp(-self.limit, self.limit)
)
GATES = {
    "rewritten": (halves(lambda self, g, u: u * (g * torch.sigmoid(g))), {}, ("swiglu", None)),
    "act_fn in fp32": (
        halves(lambda self, g, u: (self.act_fn(g.float()) * u.float()).to(g.dtype)),
        {}, ("swiglu", None),
    ),
    "clamped after": (clamped_after, {"limit": 0.4}, ("swiglu", 0.4)),
    "clamped after, other name": (
        halves(lambda self, g, u: F.silu(g).clamp(max=self.swiglu_limit)
               * u.clamp(-self.swiglu_limit, self.swiglu_limit)),
        {"swiglu_limit": 2}, ("swiglu", 2.0),
    ),
    "geglu": (halves(lambda self, g, u: F.gelu(g) * u), {}, ("geglu", None)),
    "geglu_tanh": (
        halves(lambda self, g, u: F.gelu(g, approximate="tanh") * u), {}, ("geglu_tanh", None),
    ),
    "clamped before": (
        halves(lambda self, g, u: F.silu(g.clamp(max=self.limit)) * u),
        {"limit": 0.4}, (None, None),
    ),
    "up first": (halves(lambda self, u, g: F.silu(g) * u), {}, (None, None)),
    "tanh of the gate": (halves(lambda self, g, u: torch.tanh(g) * u), {}, (None, None)),
    "scaled by its module": (
        halves(lambda self, g, u: F.silu(g) * u * self.factor), {"factor": 0.5}, (None, None),
    ),
    "an attribute with a default": (
        halves(lambda self, g, u: F.silu(g) * u * getattr(self, "alpha", 1.0)), {"alpha": 1.7},
        (None, None),
    ),
    "limit in a tensor": (clamped_after, {"limit": torch.tensor(0.4)}, (None, None)),
}  # fmt: skip


@pytest.mark.parametrize("name", GATES)
def test_an_own_gate_is_honoured_and_recognized_where_it_is_ours(name, device):
    function, attributes, expected = GATES[name]
    attributes = {n: a.to(device) if torch.is_tensor(a) else a for n, a in attributes.items()}
    experts = with_gate(function, **attributes).to(device)
    found = integration._recognize(experts)
    assert (found.name, found.limit) == expected
    assert bool(found.reason) == (found.name is None)
    x, ids, weights = (t.to(device) for t in inputs(experts, torch.float32, torch.float32))
    # Mixtral's eager loop does not ask _apply_gate: the truth is the gate on the exact products.
    parts = (experts.gate_up_proj, experts.down_proj)
    first, down = (p.detach().double() for p in parts)
    h = torch.einsum("th,tknh->tkn", x.double(), first[ids])
    y = torch.einsum("tki,tkhi->tkh", function(experts, h), down[ids])
    truth = (y * weights.double().unsqueeze(-1)).sum(1)
    actual = results(experts, x, ids, weights, "ling_ops")
    assert_within(actual["out"], truth, roundings=LAYER_ROUNDINGS // 4)


ACTIVATIONS = {
    **{name: (ACT2FN[name], "swiglu") for name in ("silu", "swish")},
    **{name: (ACT2FN[name], "geglu") for name in ("gelu", "gelu_python")},
    **{n: (ACT2FN[n], "geglu_tanh") for n in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")},
    **{n: (ACT2FN[n], None) for n in ("quick_gelu", "relu2", "xielu", "prelu", "gelu_10")},
    "nn.GELU": (nn.GELU(), "geglu"),
    "nn.GELU tanh": (nn.GELU(approximate="tanh"), "geglu_tanh"),
    "F.silu": (F.silu, "swiglu"),
    "F.relu": (F.relu, None),
    "lambda": (lambda x: F.silu(x), "swiglu"),
    "partial": (partial(F.gelu, approximate="tanh"), None),
    "method": (nn.SiLU().forward, None),
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_which_activations_are_ours(act):
    act_fn, expected = ACTIVATIONS[act]
    assert integration._recognize(with_act("MixtralExperts", act_fn)).name == expected
    plain = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", None: None}[expected]
    wanted = "relu2" if act == "relu2" else plain
    assert integration._recognize(with_act("NemotronHExperts", act_fn)).name == wanted


def with_act(name: str, act_fn) -> nn.Module:
    experts = make_experts(name)
    del experts.act_fn  # a function may not stand where a module stood
    experts.act_fn = act_fn
    return experts


class Stateful(nn.Module):
    """Computes what its instance says, as no class in transformers or torch does by default."""

    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * self.slope


def test_an_unknown_class_is_not_taken_for_its_default(device):
    experts = make_experts("MixtralExperts").to(device)
    experts.act_fn = Stateful(0.25)
    found = integration._recognize(experts)
    assert found.name is None and "Stateful" in found.reason
    compare(experts, *(t.to(device) for t in inputs(experts, torch.float32, torch.float32)))


def halve(experts: nn.Module) -> None:
    act = experts.act_fn
    act.forward = lambda x: 0.5 * type(act).forward(act, x)


CHANGES = {
    "a hook": lambda experts: experts.act_fn.register_forward_hook(lambda *a: 0.5 * a[2]),
    "a backward hook": lambda experts: experts.act_fn.register_full_backward_hook(
        lambda module, grads, _: tuple(0.5 * grad for grad in grads)
    ),
    "a forward": halve,
    "a gate": lambda experts: setattr(
        experts, "_apply_gate", lambda h: torch.tanh(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    ),
}


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_on_one_instance_counts(change, device):
    """Against transformers' own grouped products, which ask the instance for everything."""
    experts = make_experts("MixtralExperts").to(device)
    CHANGES[change](experts)
    assert integration._recognize(experts).name is None
    values = [t.to(device) for t in inputs(experts, torch.float32, torch.float32)]
    found, wanted = (results(experts, *values, how) for how in ("ling_ops", "batched_mm"))
    for name in wanted:
        assert_within(found[name], wanted[name].double(), roundings=LAYER_ROUNDINGS, name=name)


def test_recognition_needs_no_values_of_the_surrounding_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from ling_ops.integrations import _activations

    experts = make_experts("MixtralExperts")
    for context in (torch.device("meta"), FakeTensorMode()):
        _activations._compare.cache_clear()
        with context:
            assert integration._recognize(experts) == Recognized("swiglu")


@pytest.mark.cuda
@pytest.mark.filterwarnings("default")
def test_the_slower_path_says_so_once(device):
    from ling_ops.ops._backend import FallbackWarning

    integration._noted.clear()
    experts = make_experts("DeepseekV4Experts").to(device, torch.bfloat16)
    arguments = [t.to(device) for t in inputs(experts, torch.bfloat16, torch.float32)]
    with pytest.warns(FallbackWarning, match=r"DeepseekV4Experts.*_apply_gate"):
        results(experts, *arguments, "ling_ops")
    assert integration._noted == {
        ("DeepseekV4Experts", integration._recognize(experts).reason),
    }
