"""What the timed rows say about the requirements; printed below a bench's table, never asserted.

python bench/verdicts.py      the same of every record in bench/results, no GPU needed
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from harness import Row, shape_name

#: `grouped_mm` beside torch's: no slower at any shape and layout, and so much faster in the mean.
GROUPED_MM_MEAN = 1.1
#: A step with Zipf(1.0) popularity, in uniform steps; nn.MoE, in steps of its bare operations.
SKEWED_MOST, MODULE_MOST = 1.10, 1.03


def ratios(rows: Iterable[Row], bench: str, slow: str, fast: str) -> dict[str, float]:
    """Shape -> time of provider `slow` / time of provider `fast`, where both were timed."""
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.bench == bench:
            times.setdefault(shape_name(row), {})[row.provider] = row.ms
    return {
        shape: by_name[slow] / by_name[fast]
        for shape, by_name in times.items()
        if slow in by_name and fast in by_name
    }


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _verdict(met: bool) -> str:
    return "met" if met else "NOT met"


def gemm_summary(rows: Iterable[Row]) -> str:
    """Speed over torch and over one dense product, per kind of row."""
    rows, lines = list(rows), []
    for bench in ("gemm", "grouped_mm"):
        for peer in ("torch", "cublas"):
            found = ratios(rows, bench, peer, "ling_ops")
            if not found:
                continue
            mean, worst = geometric_mean(found.values()), min(found, key=found.get)
            line = (
                f"{bench} over {peer}: geometric mean {mean:.3f} of {len(found)}, "
                f"least {found[worst]:.3f} ({worst})"
            )
            if (bench, peer) == ("grouped_mm", "torch"):
                slower = [f"{shape} {ratio:.3f}" for shape, ratio in found.items() if ratio < 1]
                line += f"\n  no slower anywhere: {_verdict(not slower)} {'; '.join(slower)}"
                enough = _verdict(mean >= GROUPED_MM_MEAN)
                line += f"\n  at least {GROUPED_MM_MEAN} in the mean: {enough}"
            lines.append(line)
    return "\n".join(lines)


def training_summary(rows: Iterable[Row]) -> str:
    """What skewed routing and the module's extras cost."""
    rows, lines = list(rows), []
    for title, other, most in (
        ("Zipf(1.0) over uniform", "ling_ops uniform", SKEWED_MOST),
        ("nn.MoE over its bare operations", "ling_ops bare", MODULE_MOST),
    ):
        for shape, ratio in ratios(rows, "moe_train", "ling_ops", other).items():
            lines.append(
                f"{title}: {ratio:.3f} ({shape}), at most {most}: {_verdict(ratio <= most)}"
            )
    return "\n".join(lines)


def main() -> None:
    for path in sorted((Path(__file__).resolve().parent / "results").glob("*.json")):
        rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
        print(f"{path.stem}\n{gemm_summary(rows)}\n{training_summary(rows)}")


if __name__ == "__main__":
    main()
