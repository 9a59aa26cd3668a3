"""Does training on the kernels follow training on the reference?  Loss curves of one preset.

Runs on the same text, batches and settings, three on the kernels and three on the reference: from
the same weights, and twice from those weights nudged by one rounding.  What runs of one backend
differ by is the noise that mere rounding grows into.  The kernels follow the reference if runs of
different backends are on the mean no farther apart than the farthest two of one backend.

    python bench/training_curves.py           on a GPU; writes results/training/<preset>.json, .png
    python bench/training_curves.py --draw    draws the PNG again from the JSON, no GPU
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import ling_ops
from ling_ops.cli.data import TextData, load_text
from ling_ops.cli.modeling import build_model, new_config, pick_device, pick_dtype
from ling_ops.cli.options import TrainOptions
from ling_ops.cli.trainer import Trainer

RESULTS = Path(__file__).resolve().parent / "results" / "training"
NATS_PER_BIT = math.log(2)
#: name -> (backend, which nudge of the weights; 0 is none)
RUNS: dict[str, tuple[str, int]] = {
    "kernels": ("auto", 0),
    "reference": ("reference", 0),
    "kernels, nudged": ("auto", 1),
    "reference, nudged": ("reference", 1),
    "kernels, nudged again": ("auto", 2),
    "reference, nudged again": ("reference", 2),
}
COLORS = dict(
    zip(RUNS, ("#c2410c", "#475569", "#d97706", "#94a3b8", "#eab308", "#cbd5e1"), strict=True)
)


class MemoryRun(Trainer):
    """A run that keeps its losses in memory and writes nothing."""

    def losses(self) -> list[float]:
        """Bits per byte of every step's batch, before the step."""
        found = [self._train_step(self._learning_rate()) for _ in range(self.options.steps)]
        return (torch.stack(found) / NATS_PER_BIT).tolist()

    def held_out_loss(self) -> float:
        return self._validate(SimpleNamespace(write=lambda event: None))["bits_per_byte"]


# --- running -------------------------------------------------------------------------------------
@torch.no_grad()
def nudge(model: torch.nn.Module) -> None:
    """Move every weight by at most about one unit in its last place."""
    for weight in model.parameters():
        noise = torch.rand(weight.shape, device=weight.device) - 0.5
        weight.copy_(weight * (1 + 2 * torch.finfo(weight.dtype).eps * noise))


def train(options: TrainOptions, text: TextData, backend: str, nudged: int) -> dict:
    """One run: its curve, the held-out loss at its end (bits per byte) and how long it took."""
    device = pick_device(options.device)
    torch.manual_seed(options.seed)
    model = build_model(new_config(options), device, pick_dtype(options.dtype, device))
    if nudged:
        torch.manual_seed(1000 + nudged)
        nudge(model)
    trainer = MemoryRun(model, options, text, Path(os.devnull), device)
    start = time.perf_counter()
    with ling_ops.use_backend(backend):
        losses = trainer.losses()
        took = time.perf_counter() - start
        return {
            "losses": [round(value, 5) for value in losses],
            "held_out": round(trainer.held_out_loss(), 5),
            "seconds": round(took, 2),
        }


def run_all(options: TrainOptions) -> Iterator[dict[str, Any]]:
    """The result so far after every run."""
    text = load_text(options.data, sequence_length=options.sequence_length)
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {
        "preset": options.preset, "device": name, "torch": torch.__version__,
        "dtype": str(pick_dtype(options.dtype, device)).removeprefix("torch."),
        "steps": options.steps, "batch": options.batch_size,
        "sequence_length": options.sequence_length, "text": text.description, "runs": {},
    }  # fmt: skip
    for run, (backend, nudged) in RUNS.items():
        result["runs"][run] = train(options, text, backend, nudged)
        yield result


# --- comparing -----------------------------------------------------------------------------------
def smooth(values: list[float], width: int) -> list[float]:
    """Means of the last `width` values (of fewer at the beginning)."""
    return [
        sum(values[max(0, end - width) : end]) / min(width, end)
        for end in range(1, len(values) + 1)
    ]


def gap(first: list[float], second: list[float], width: int) -> float:
    """Mean distance of two smoothed curves over their second half, in bits per byte.

    Batches are the same in all runs, so what is left is what the runs themselves differ by.
    """
    pairs = zip(smooth(first, width), smooth(second, width), strict=True)
    distances = [abs(a - b) for a, b in pairs]
    late = distances[len(distances) // 2 :]
    return sum(late) / len(late)


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """Gaps of each two runs of one backend and of both, and whether the kernels follow."""
    runs, width = result["runs"], max(1, result["steps"] // 20)
    gaps: dict[str, list[float]] = {"kernels": [], "reference": [], "between": []}
    for first, second in itertools.combinations(runs, 2):
        backends = {name.split(",")[0] for name in (first, second)}
        kind = backends.pop() if len(backends) == 1 else "between"
        distance = gap(runs[first]["losses"], runs[second]["losses"], width)
        gaps[kind].append(round(distance, 5))
    between = sum(gaps["between"]) / len(gaps["between"])
    return {
        "gaps": gaps,
        "held_out": {name: run["held_out"] for name, run in runs.items()},
        "follows": between <= max(*gaps["kernels"], *gaps["reference"]),
    }


def report(comparison: dict[str, Any]) -> str:
    lines = [f"{'gaps of two runs':28}  bits per byte, second half of the run"]
    for kind, values in comparison["gaps"].items():
        lines.append(f"  {kind:26}  mean {sum(values) / len(values):.4f}, most {max(values):.4f}")
    lines += ["held-out bits per byte"]
    lines += [f"  {name:26}  {value:.4f}" for name, value in comparison["held_out"].items()]
    verdict = "within" if comparison["follows"] else "OUTSIDE"
    return "\n".join([*lines, f"kernels against reference: {verdict} the noise of rounding"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Curves on top; below, what each run differs from the reference by."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    width = max(1, result["steps"] // 20)
    curves = {name: smooth(run["losses"], width) for name, run in result["runs"].items()}
    steps = range(1, result["steps"] + 1)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for name, curve in curves.items():
        style = {"color": COLORS[name], "linewidth": 1.4, "label": name}
        top.plot(steps, curve, **style, linestyle="--" if name.startswith("reference") else "-")
        if name != "reference":
            truth = curves["reference"]
            bottom.plot(steps, [a - b for a, b in zip(curve, truth, strict=True)], **style)
    top.set_ylabel("training loss, bits per byte")
    top.legend(frameon=False)
    bottom.set_ylabel("minus the reference's")
    bottom.set_xlabel(f"step (means of {width})")
    spread = 4 * max(max(values) for values in result["comparison"]["gaps"].values()) or 1
    bottom.set_ylim(-spread, spread)
    figure.suptitle(f"{result['preset']}, {result['dtype']}, {result['device']}", x=0.02, ha="left")
    for axes in (top, bottom):
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON and PNG")
    parser.add_argument("--draw", action="store_true", help="only draw the JSON of an earlier run")
    given = parser.parse_args()
    path = given.results / f"{given.preset}.json"
    if not given.draw:
        options = TrainOptions(
            preset=given.preset, steps=given.steps, batch_size=given.batch_size,
            device=given.device, learning_rate=1e-3,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        for result in run_all(options):
            name, last = list(result["runs"].items())[-1]
            print(f"{name}: {last['seconds']} s, held out {last['held_out']}", flush=True)
            path.write_text(json.dumps(result) + "\n")
        result["comparison"] = compare(result)
        path.write_text(json.dumps(result) + "\n")
    result = json.loads(path.read_text())
    print(report(result["comparison"]))
    draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
