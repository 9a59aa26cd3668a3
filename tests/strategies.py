"""Hypothesis strategies for the inputs of every op.

A strategy draws a structure and a seed; the tensors come from the seed, so that large inputs
cost nothing to draw and still shrink in their shapes and styles.  Cases are built on the CPU and
moved with ``.to(device)``, which keeps strides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st

seeds = st.integers(0, 2**31 - 1)
token_counts = st.sampled_from([0, 1, 2, 3, 7, 16, 33, 65, 130])
expert_counts = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 33, 64, 96, 128, 256, 384])
many_expert_counts = st.sampled_from([160, 257, 512, 1000, 1024])
low_precision = st.sampled_from([torch.bfloat16, torch.float16])
float_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "padded_rows", "offset", "transposed"])

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-40, -1e-40, 6e4, -6e4]
BAD_IDS = [-1, -2, -(2**31)]  # and E, E + 1, 2^31 - 1: these depend on E


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lay_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides or another storage offset."""
    if how == "padded_rows":
        wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 8)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    if how == "offset":
        flat = x.new_zeros(x.numel() + 3)
        flat[3:] = x.reshape(-1)
        return flat[3:].view(x.shape)
    if how == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def move(value: Any, device: torch.device) -> Any:
    """A tensor on ``device`` with its strides and alignment kept."""
    if not isinstance(value, torch.Tensor) or value.device.type == device.type:
        return value
    whole = torch.empty(0, dtype=value.dtype, device=value.device)
    whole.set_(value.untyped_storage())
    return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def short(value: Any) -> Any:
    """A tensor by its looks: failing cases must be readable."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} strides {list(value.stride())}"
    if isinstance(value, dict):
        return {key: short(item) for key, item in value.items()}
    return value


class Movable:
    def __repr__(self) -> str:
        parts = (f"{item.name}={short(getattr(self, item.name))}" for item in fields(self))
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def to(self, device: torch.device) -> Any:
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, dict):
                moved[item.name] = {key: move(entry, device) for key, entry in value.items()}
            else:
                moved[item.name] = move(value, device)
        return replace(self, **moved)


# --- gate ----------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class GateCase(Movable):
    logits: torch.Tensor  # [T,E]
    k: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]


def make_logits(tokens: int, experts: int, style: str, seed: int) -> torch.Tensor:
    gen = generator(seed)
    x = torch.randn(tokens, experts, generator=gen)
    if style == "grid":  # many exact ties, both signs of zero among them
        x = (x * 2).round() / 4 * torch.where(torch.rand(x.shape, generator=gen) < 0.5, -1.0, 1.0)
    elif style == "constant":
        x = torch.full_like(x, 0.25)
    elif style == "saturated":
        x = x * 60
    elif style == "subnormal":
        x = x * 1e-40
    elif style == "masked":
        x = x.masked_fill(torch.rand(x.shape, generator=gen) < 0.7, float("-inf"))
    elif style == "special":
        pick = torch.randint(len(SPECIAL), x.shape, generator=gen)
        x = torch.where(torch.rand(x.shape, generator=gen) < 0.3, torch.tensor(SPECIAL)[pick], x)
    elif style == "bad_rows":
        x[torch.rand(tokens, generator=gen) < 0.3] = float("nan")
        x[torch.rand(tokens, generator=gen) < 0.3] = float("-inf")
    return x


FINITE_STYLES = ["normal", "grid", "constant", "saturated", "subnormal"]
LOGIT_STYLES = [*FINITE_STYLES, "masked", "special", "bad_rows"]


@st.composite
def group_options(draw: st.DrawFn, experts: int) -> dict[str, int]:
    """``num_groups`` and ``topk_groups`` that fit ``experts`` (groups of two or more)."""
    divisors = [g for g in range(1, experts // 2 + 1) if experts % g == 0] or [1]
    groups = draw(st.sampled_from(divisors))
    return {"num_groups": groups, "topk_groups": draw(st.integers(1, groups))}


@st.composite
def gate_cases(
    draw: st.DrawFn,
    *,
    styles: list[str] | None = None,
    plain: bool = False,
    experts: st.SearchStrategy[int] = expert_counts,
    dtypes: st.SearchStrategy[torch.dtype] = float_dtypes,
) -> GateCase:
    """``plain``: softmax without bias and groups, whose keys are the logits themselves."""
    tokens, num_experts, seed = draw(token_counts), draw(experts), draw(seeds)
    logits = make_logits(tokens, num_experts, draw(st.sampled_from(styles or LOGIT_STYLES)), seed)
    options: dict[str, Any] = {
        "renormalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }
    selectable = num_experts
    if not plain:
        options["score_function"] = draw(st.sampled_from(["softmax", "sigmoid"]))
        if draw(st.booleans()):
            bias = torch.randn(num_experts, generator=generator(seed + 1))
            options["expert_bias"] = (bias * 0.1).round(decimals=2)
        options |= draw(group_options(num_experts))
        selectable = num_experts // options["num_groups"] * options["topk_groups"]
    k = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32]).map(lambda k: min(k, selectable)))
    return GateCase(lay_out(logits.to(draw(dtypes)), draw(layouts)), k, options)


# --- route ---------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class RouteCase(Movable):
    indices: torch.Tensor  # [T,K]
    num_experts: int
    options: dict[str, Any] = field(default_factory=dict)


def make_indices(tokens: int, k: int, experts: int, style: str, seed: int) -> torch.Tensor:
    """Ids [T,K], distinct inside a token except in the style ``repeated``."""
    gen = generator(seed)
    scores = torch.rand(tokens, experts, generator=gen)
    if style == "one_expert":
        scores[:, experts // 2] += 2
    elif style == "empty_experts":
        scores[:, max(k, experts // 4) :] -= 2
    elif style == "skewed":
        scores *= torch.arange(1, experts + 1) ** -0.5
    ids = scores.argsort(dim=1, descending=True)[:, :k]
    if style == "repeated":
        ids = torch.randint(experts, (tokens, k), generator=gen)
    if style == "bad_ids":
        bad = torch.tensor([*BAD_IDS, experts, experts + 1, 2**31 - 1])
        pick = bad[torch.randint(len(bad), ids.shape, generator=gen)]
        ids = torch.where(torch.rand(ids.shape, generator=gen) < 0.25, pick, ids)
    return ids


ID_STYLES = ["uniform", "one_expert", "empty_experts", "skewed", "repeated", "bad_ids"]


@st.composite
def capacities(draw: st.DrawFn, tokens: int, experts: int, seed: int) -> Any:
    """None, an int, or an int tensor (scalar or per expert); 0 and above T among them."""
    value = draw(st.sampled_from([0, 1, 2, 3, max(tokens // 2, 1), tokens, 2 * tokens + 5]))
    kind = draw(st.sampled_from(["none", "int", "scalar", "per_expert"]))
    if kind == "none":
        return None
    if kind == "int":
        return value
    if kind == "scalar":
        return torch.tensor(value, dtype=torch.int32)
    return torch.randint(value + 1, (experts,), generator=generator(seed), dtype=torch.int32)


def make_weights(tokens: int, k: int, style: str, seed: int) -> torch.Tensor:
    gen = generator(seed)
    w = torch.rand(tokens, k, generator=gen)
    if style == "ties":
        w = (w * 4).round() / 4
    elif style == "nan":
        w = w.masked_fill(torch.rand(w.shape, generator=gen) < 0.2, float("nan"))
    return w


@st.composite
def route_cases(
    draw: st.DrawFn,
    *,
    styles: list[str] | None = None,
    capacity: bool = True,
    masks: bool = True,
) -> RouteCase:
    tokens, experts, seed = draw(token_counts), draw(expert_counts), draw(seeds)
    k = draw(st.sampled_from([1, 2, 3, 4, 8]).map(lambda k: min(k, experts)))
    ids = make_indices(tokens, k, experts, draw(st.sampled_from(styles or ID_STYLES)), seed)
    ids = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
    options: dict[str, Any] = {}
    if capacity:
        options["capacity"] = draw(capacities(tokens, experts, seed))
        options["priority"] = draw(st.sampled_from(["position", "probability"]))
        style = draw(st.sampled_from(["random", "ties", "nan"]))
        options["weights"] = make_weights(tokens, k, style, seed + 1)
    if masks and draw(st.booleans()):
        options["token_mask"] = torch.rand(tokens, generator=generator(seed + 2)) < 0.7
    return RouteCase(lay_out(ids, draw(layouts)), experts, options)


# --- products ------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class GemmCase(Movable):
    a: torch.Tensor  # [M,Kd]
    b: torch.Tensor  # [E,N,Kd]
    offsets: torch.Tensor  # [E+1] int32, last one <= M


def make_offsets(experts: int, rows: int, style: str, seed: int) -> torch.Tensor:
    """Offsets [E+1] that use up at most ``rows`` rows."""
    gen = generator(seed)
    share = torch.rand(experts, generator=gen)
    if style == "empty_experts":
        share = share.masked_fill(torch.rand(experts, generator=gen) < 0.6, 0.0)
    elif style == "one_expert":
        share = torch.zeros(experts)
        share[experts // 2] = 1.0
    elif style == "all_empty":
        share = torch.zeros(experts)
    used = rows if style in ("full", "one_expert") else int(rows * 0.8)
    ends = (share.cumsum(0) / share.sum().clamp(min=1e-9) * used).round().to(torch.int32)
    if share.sum() > 0 and style == "full":
        ends[-1] = rows
    return torch.cat([torch.zeros(1, dtype=torch.int32), ends])


OFFSET_STYLES = ["full", "tail", "empty_experts", "one_expert", "all_empty"]


@st.composite
def gemm_cases(draw: st.DrawFn, *, dtypes: Any = low_precision) -> GemmCase:
    seed, dtype = draw(seeds), draw(dtypes)
    experts = draw(st.sampled_from([1, 2, 3, 8, 17]))
    rows = draw(st.sampled_from([0, 1, 5, 63, 64, 65, 127, 129, 300]))
    n = draw(st.sampled_from([8, 16, 24, 64, 72, 136, 256]))
    kd = draw(st.sampled_from([8, 16, 40, 64, 72, 128, 200]))
    gen = generator(seed)
    a = torch.randn(rows, kd, generator=gen).to(dtype)
    b = (torch.randn(experts, n, kd, generator=gen) / kd**0.5).to(dtype)
    offsets = make_offsets(experts, rows, draw(st.sampled_from(OFFSET_STYLES)), seed)
    return GemmCase(lay_out(a, draw(layouts)), lay_out(b, draw(layouts)), offsets)


# --- the layer -----------------------------------------------------------------------------------
GATED = ["swiglu", "geglu", "geglu_tanh"]
PLAIN = ["gelu", "gelu_tanh", "silu", "relu2"]


@dataclass(frozen=True, repr=False)
class MlpCase(Movable):
    x: torch.Tensor  # [T,H]
    gate_up: torch.Tensor  # [E,2I,H], or [E,I,H] for an activation without a gate
    down: torch.Tensor  # [E,H,I]
    weights: torch.Tensor  # [T,K]
    indices: torch.Tensor  # [T,K]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.x, self.gate_up, self.down, self.weights, self.indices

    def take(self, tokens: Any) -> MlpCase:
        """The same layer on some of the tokens: a slice or an index tensor."""
        picked = {name: getattr(self, name)[tokens] for name in ("x", "weights", "indices")}
        return replace(self, **picked)


def make_mlp(
    tokens: int,
    hidden: int,
    inner: int,
    experts: int,
    k: int,
    *,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    limit: float | None = None,
    style: str = "uniform",
    seed: int = 0,
) -> MlpCase:
    gen = generator(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=gen) * scale).to(dtype)

    up_rows = 2 * inner if activation in GATED else inner
    options: dict[str, Any] = {"activation": activation}
    if bias:
        options["gate_up_bias"] = normal(experts, up_rows, scale=0.3)
        options["down_bias"] = normal(experts, hidden, scale=0.3)
    if limit is not None:
        options["swiglu_limit"] = limit
    weights = torch.rand(tokens, k, generator=gen)
    return MlpCase(
        normal(tokens, hidden),
        normal(experts, up_rows, hidden, scale=hidden**-0.5),
        normal(experts, hidden, inner, scale=inner**-0.5),
        weights.double() if dtype == torch.float64 else weights,
        make_indices(tokens, k, experts, style, seed).to(torch.int32),
        options,
    )


@st.composite
def mlp_cases(draw: st.DrawFn, *, dtypes: Any = low_precision) -> MlpCase:
    activation = draw(st.sampled_from(GATED + PLAIN))
    experts = draw(st.sampled_from([1, 2, 4, 7, 16]))
    return make_mlp(
        draw(st.sampled_from([0, 1, 3, 17, 64, 70])),
        draw(st.sampled_from([8, 16, 64, 72])),
        draw(st.sampled_from([8, 24, 64])),
        experts,
        draw(st.sampled_from([1, 2, 4]).map(lambda k: min(k, experts))),
        activation=activation,
        dtype=draw(dtypes),
        bias=draw(st.booleans()),
        limit=draw(st.sampled_from([None, 0.7])) if activation == "swiglu" else None,
        style=draw(st.sampled_from(ID_STYLES)),
        seed=draw(seeds),
    )
