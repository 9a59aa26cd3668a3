"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x², last dim) + eps) · weight.

    x ``[..., size]`` of any float dtype; computed in the wider of x's and the weight's dtype (and
    never below fp32), returned in x's dtype. Zhang and Sennrich 2019, equation 4.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, self.weight.dtype))
        return F.rms_norm(wide, (self.size,), self.weight.to(wide.dtype), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.size}, eps={self.eps}"
