"""The layers that the benches time, and the layer's floor.

Names are for reading only; a record's rows carry T, H, I, E, K.
"""

from __future__ import annotations

from typing import NamedTuple

from harness import floor


class Layer(NamedTuple):
    T: int
    H: int
    I: int
    E: int
    K: int


TRAINING = (
    Layer(32768, 2048, 512, 256, 8),  # Ling-mini
    Layer(32768, 4096, 1024, 256, 8),  # Ling-flash
    Layer(32768, 2048, 768, 128, 8),  # Qwen3-30B
    Layer(8192, 2048, 512, 256, 8),
    Layer(8192, 4096, 1024, 256, 8),
    Layer(24576, 1536, 256, 128, 8),
    Layer(32768, 4096, 512, 128, 8),
    Layer(32768, 4096, 14336, 8, 2),  # Mixtral
)
INFERENCE = (
    Layer(0, 2048, 512, 256, 8),
    Layer(0, 4096, 1024, 256, 8),
    Layer(0, 2048, 768, 128, 8),
    Layer(0, 4096, 14336, 8, 2),
)


def forward_floor(layer: Layer, used: float, *, training: bool) -> float:
    """up, down, combine.  ``used`` experts, in the mean of all calls, have their weights read;
    training also writes h."""
    t, h, i, _, k = layer
    m = t * k
    written = 3 * m * i if training else m * i
    return floor(
        (4 * m * h * i, 2 * (t * h + used * 2 * i * h + written)),
        (2 * m * h * i, 2 * (m * i + used * h * i + m * h)),
        (0, 2 * (m * h + t * h)),
    )


def training_floor(layer: Layer) -> float:
    """Forward and backward, stages back to back: up, down, combine, dact, dW_down, dx rows, dW_up,
    combine."""
    t, h, i, e, k = layer
    m = t * k
    return forward_floor(layer, e, training=True) + floor(
        (2 * m * h * i, 2 * (t * h + e * h * i + 2 * m * i + 3 * m * i)),
        (2 * m * h * i, 2 * (m * i + t * h + e * h * i)),
        (4 * m * h * i, 2 * (2 * m * i + e * 2 * i * h + m * h)),
        (4 * m * h * i, 2 * (2 * m * i + t * h + e * 2 * i * h)),
        (0, 2 * (m * h + t * h)),
    )
