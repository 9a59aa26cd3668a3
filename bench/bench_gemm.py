"""Grouped products: up, down and both weight gradients of a layer, and grouped_mm's layouts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from harness import Case, floor, has_kernel, main, normal, uniform
from shapes import TRAINING, Layer
from verdicts import gemm_summary

import ling_ops


def even_offsets(experts: int, rows: int, multiple: int = 1) -> torch.Tensor:
    """Uniform demand with a random wobble of a few rows, [E+1] int32.

    torch's kernels need a ``multiple`` of 8 where the ragged axis is contiguous.
    """
    wobble = 80 * uniform(experts + 1) - 40
    wobble[0] = wobble[-1] = 0
    ends = torch.linspace(0, rows, experts + 1, device=wobble.device) + wobble
    ends = (ends / multiple).round() * multiple
    return ends.clamp(0, rows).cummax(0).values.to(torch.int32)


def product_cases(layer: Layer) -> Iterator[Case]:
    """rows [M,Kd] x weights [E,N,Kd]; "cublas" is one dense product of the same FLOP count."""
    _, h, i, e, _ = layer
    m = layer.T * layer.K
    offsets = even_offsets(e, m)
    for what, n, kd in (("up_fwd", 2 * i, h), ("down_fwd", h, i)):
        a, b, up = normal(m, kd), normal(e, n, kd, scale=kd**-0.5), normal(m, n)
        cost = floor((2 * m * n * kd, 2 * (m * kd + e * n * kd + m * n)))
        providers = {
            "ling_ops": lambda _, a=a, b=b: ling_ops.grouped_gemm(a, b, offsets),
            "torch": lambda _, a=a, b=b: F.grouped_mm(a, b.transpose(1, 2), offs=offsets[1:]),
            "cublas": lambda _, a=a, b=b: torch.mm(a, b[0].t()),
        }
        yield Case("gemm", what, layer._asdict(), "bfloat16", cost, providers)
        if has_kernel("grouped_gemm_dw"):
            dw = {
                "ling_ops": lambda _, a=a, up=up: torch.ops.ling_ops.grouped_gemm_dw(
                    up, a, offsets
                ),
                "torch": lambda _, a=a, up=up: F.grouped_mm(up.t(), a, offs=offsets[1:]),
                "cublas": lambda _, a=a, up=up: torch.mm(up.t(), a),
            }
            name = what.replace("fwd", "dw")
            yield Case("gemm", name, layer._asdict(), "bfloat16", cost, dw)


def layout_cases(layer: Layer) -> Iterator[Case]:
    """grouped_mm as its callers use it: forward, input gradient, weight gradient, and both with
    the groups along other axes; "cublas" is one dense product of the same FLOP count."""
    _, h, i, e, _ = layer
    m, n = layer.T * layer.K, 2 * i
    offs = even_offsets(e, m, 8)[1:].contiguous()
    rows, weight, grad = normal(m, h), normal(e, n, h, scale=h**-0.5), normal(m, n)
    per_group = m // e
    batch = rows[: per_group * e].view(e, per_group, h)
    one = weight[0]
    layouts = {
        "2d_3d": (rows, weight.transpose(1, 2), offs, (rows, one.t())),
        "2d_3d_dx": (grad, weight, offs, (grad, one)),
        "2d_2d": (grad.t(), rows, offs, (grad.t(), rows)),
        "3d_2d": (weight, rows.t(), offs, (one, rows.t())),
        "3d_3d": (batch, weight.transpose(1, 2), None, (batch.flatten(0, 1), one.t())),
    }
    cost = floor((2 * m * n * h, 2 * (m * h + e * n * h + m * n)))
    for what, (a, b, ends, dense) in layouts.items():
        providers = {
            "ling_ops": lambda _, a=a, b=b, o=ends: ling_ops.grouped_mm(a, b, offs=o),
            "torch": lambda _, a=a, b=b, o=ends: F.grouped_mm(a, b, offs=o),
            "cublas": lambda _, d=dense: torch.mm(*d),
        }
        if what == "2d_2d" and not has_kernel("grouped_gemm_dw"):
            del providers["ling_ops"]
        yield Case("grouped_mm", what, layer._asdict(), "bfloat16", cost, providers)


def cases() -> Iterator[Case]:
    for layer in TRAINING:
        yield from product_cases(layer)
        torch.cuda.empty_cache()
        yield from layout_cases(layer)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(__doc__, cases, 0.2, ("gemm", "grouped_mm"), gemm_summary)
