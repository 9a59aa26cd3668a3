"""Writes the measured tables of README.md and docs/ from the record, between their marks.

python bench/tables.py            writes them
python bench/tables.py --check    exit status 1 where a page differs from the record

A page marks a table by ``<!-- table NAME -->`` and ``<!-- end -->``, each on a line of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import BYTE_RATE, Row
from shapes import INFERENCE, TRAINING, Layer
from verdicts import geometric_mean, ratios

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECORD = ROOT / "bench" / "results" / "h200.json"
PAGES = (
    "README.md", "docs/kernels.md", "docs/finetuning.md", "docs/integrations-peft.md",
    "docs/study.md",
)  # fmt: skip
MARK = re.compile(
    r"(?<=^<!-- table )(\w+)( -->\n)(.*?)(?=^<!-- end -->$)", re.MULTILINE | re.DOTALL
)
NAMES = {
    (32768, 2048, 512): "Ling-mini",
    (32768, 4096, 1024): "Ling-flash",
    (32768, 2048, 768): "Qwen3-30B",
    (32768, 4096, 14336): "Mixtral",
}
TOKENS = (1, 4, 16, 64, 512, 2048, 8192, 32768)
STREAMED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # the time is that of reading weights


class Record:
    """A record's rows, looked up by what they measured."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.rows = [Row(**row) for row in data["rows"]]

    def find(self, bench: str, what: str, provider: str = "ling_ops", **sizes: int) -> Row | None:
        for row in self.rows:
            same = (row.bench, row.what, row.provider) == (bench, what, provider)
            if same and all(getattr(row, key) == value for key, value in sizes.items()):
                return row
        return None

    def ms(self, *names: str, **sizes: int) -> str:
        row = self.find(*names, **sizes)
        return digits(row.ms) if row else ""

    def us(self, *names: str, **sizes: int) -> str:
        row = self.find(*names, **sizes)
        return digits(1e3 * row.ms) if row else ""


def digits(value: float) -> str:
    """Three digits, four from 1000 on."""
    return (
        f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
    )


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def facts(record: Record) -> str:
    data, most, tests = record.data, record.data["ceilings"], record.data["tests"]
    return (
        f"One {data['device']}, torch {data['torch']}, CUDA {data['cuda']}, {data['date'][:10]}. "
        f"In the same run a dense 8192³\nproduct reached {most['bf16_tflops']:.0f} TFLOP/s and a "
        f"copy {most['copy_tb_s']:.2f} TB/s. At commit {tests['commit'][:7]} {tests['passed']} "
        f"tests passed on it, {tests['failed']} failed, {tests['skipped']} were skipped.\n"
    )


def layer_label(layer: Layer) -> str:
    name = NAMES.get(layer[:3])
    return ", ".join(map(str, layer)) + (f" ({name})" if name else "")


def train(record: Record) -> str:
    lines = []
    for layer in TRAINING:
        sizes = layer._asdict()
        ours = record.find("moe_train", "fwd_bwd", **sizes)
        if ours is None:
            continue
        peers = (record.ms("moe_train", "fwd_bwd", p, **sizes) for p in ("torch", "transformers"))
        times = [digits(ours.floor_ms), f"**{digits(ours.ms)}**", *peers]
        lines.append([layer_label(layer), *times, f"{ours.peak_gib:.2f}"])
    names = ["floor", "ling_ops", "torch `_grouped_mm`", "transformers", "ling_ops GiB"]
    return table(["T, H, I, E, K", *names], lines)


def infer_cell(record: Record, tokens: int, layer: Layer) -> str:
    sizes = {**layer._asdict(), "T": tokens}
    ours = record.find("moe_infer", "fwd", **sizes)
    if ours is None:
        return ""
    peer = record.us("moe_infer", "fwd", "torch", **sizes)
    return f"{digits(1e3 * ours.floor_ms)} / **{digits(1e3 * ours.ms)}** / {peer}"


def infer(record: Record) -> str:
    names = [NAMES[(32768, layer.H, layer.I)] for layer in INFERENCE]
    lines = [[str(t), *(infer_cell(record, t, layer) for layer in INFERENCE)] for t in TOKENS]
    return table(["T", *names], lines)


def bandwidth_cell(record: Record, tokens: int, layer: Layer) -> str:
    sizes = {**layer._asdict(), "T": tokens}
    providers = ("ling_ops", "ling_ops, one path", "torch")
    rows = (record.find("moe_infer", "fwd", provider, **sizes) for provider in providers)
    rates = [f"{1e-12 * BYTE_RATE * row.floor_ms / row.ms:.2f}" if row else "" for row in rows]
    return f"**{rates[0]}** / {rates[1] or '='} / {rates[2]}" if rates[0] else ""


def bandwidth(record: Record) -> str:
    """TB/s: what a layer must read and write at few tokens, over its time."""
    names = [NAMES[(32768, layer.H, layer.I)] for layer in INFERENCE]
    lines = [
        [str(t), *(bandwidth_cell(record, t, layer) for layer in INFERENCE)]
        for t in STREAMED_TOKENS
    ]
    return table(["T", *names], lines)


ROUTING = (
    ("gate, softmax + top-8, fp32 logits", "gate", "softmax_fwd", 32768),
    ("gate, sigmoid + bias + 8 groups (4 kept) + top-8", "gate", "sigmoid_group_fwd", 32768),
    ("gate, softmax, T = 64", "gate", "softmax_fwd", 64),
    ("gate, sigmoid + groups, T = 64", "gate", "sigmoid_group_fwd", 64),
    ("gate backward, softmax", "gate", "softmax_bwd", 32768),
    ("route", "route", "fwd", 32768),
    ("route, T = 64", "route", "fwd", 64),
    ("gate + route, T = 8192", "route", "gate_route_fwd", 8192),
    ("permute, H = 2048", "permute", "fwd", 32768),
    ("permute backward, H = 2048", "permute", "bwd", 32768),
    ("combine, H = 2048", "combine", "fwd", 32768),
    ("combine backward, H = 2048", "combine", "bwd", 32768),
)


def routing(record: Record) -> str:
    """E = 256, K = 8."""
    lines = []
    for label, bench, what, tokens in ROUTING:
        sizes = {"T": tokens, "E": 256, "K": 8}
        sizes |= {"H": 2048} if bench in ("permute", "combine") else {}
        sizes |= {"dtype": "float32"} if bench == "gate" else {}
        ours = record.find(bench, what, **sizes)
        if ours:
            peer = record.us(bench, what, "torch", **sizes)
            lines.append([label, digits(1e3 * ours.ms), peer, digits(1e3 * ours.floor_ms)])
    return table(["work", "ling_ops µs", "torch µs", "floor µs"], lines)


def product_cells(rows: list[Row], bench: str, what: str) -> list[str]:
    ours = [row for row in rows if row.provider == "ling_ops"]
    halves = 1 if what.startswith("down") else 2  # up has the gate's rows and its own
    rates = [2e-9 * halves * r.T * r.K * r.H * r.I / r.ms for r in ours]
    cells = [f"{bench} {what}", f"{min(rates):.0f} to {max(rates):.0f}"]
    for peer in ("torch", "cublas"):
        found = ratios(rows, bench, peer, "ling_ops").values()
        cells.append(f"{geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return cells


def products(record: Record) -> str:
    """Each kind of product beside torch's and beside one dense product of as many operations."""
    lines = []
    for bench in ("gemm", "grouped_mm"):
        for what in dict.fromkeys(row.what for row in record.rows if row.bench == bench):
            rows = [row for row in record.rows if (row.bench, row.what) == (bench, what)]
            lines.append(product_cells(rows, bench, what))
    return table(["product", "TFLOP/s", "speed over torch", "speed over dense cuBLAS"], lines)


LORA = {
    "frozen layer, no adapters": "frozen",
    "`add_lora`": "ling_ops",
    "PEFT's `target_parameters`": "peft",
    "W + s B A for all experts, torch": "folded",
    "W + s B A for all experts, ling_ops": "folded on ling_ops",
}


def lora(record: Record) -> str:
    """Each path's time and memory, and what its memory is above the frozen layer's."""
    lines = []
    for tokens in sorted({row.T for row in record.rows if row.bench == "lora"}, reverse=True):
        frozen = record.find("lora", "fwd_bwd", "frozen", T=tokens)
        for label, provider in LORA.items():
            row = record.find("lora", "fwd_bwd", provider, T=tokens)
            if row is not None:
                extra = row.peak_gib - frozen.peak_gib
                above = "" if row is frozen else f"{extra:.3f}"
                times = [digits(row.ms), f"{row.peak_gib:.2f}", above]
                lines.append([str(tokens), label, *times])
    return table(["tokens", "path", "ms", "peak GiB", "above the frozen layer"], lines)


def lora_peft(record: Record) -> str:
    """`add_lora` beside PEFT's path: times, memory above the frozen layer's, and their ratios."""
    lines = []
    for tokens in sorted({row.T for row in record.rows if row.bench == "lora"}, reverse=True):
        found = [
            record.find("lora", "fwd_bwd", provider, T=tokens)
            for provider in ("frozen", "peft", "ling_ops")
        ]
        if None in found:
            continue
        frozen, peft, ours = found
        extra = [row.peak_gib - frozen.peak_gib for row in (peft, ours)]
        times = [digits(peft.ms), f"**{digits(ours.ms)}**", f"{peft.ms / ours.ms:.1f}"]
        memory = [f"{extra[0]:.3f}", f"**{extra[1]:.3f}**", f"{extra[0] / extra[1]:.0f}"]
        lines.append([str(tokens), *times, *memory])
    names = ["PEFT ms", "`add_lora` ms", "times as fast", "PEFT extra GiB", "`add_lora` extra GiB"]
    return table(["tokens", *names, "times less"], lines)


def generate(record: Record) -> str:
    """Tokens per second; a decode row's T is the number of sequences, each with one new token."""
    lines = []
    for row in (r for r in record.rows if r.bench == "generate" and "ling_ops" in r.provider):
        sizes = {"T": row.T}
        peer = record.find("generate", row.what, "transformers", **sizes)
        many = "sequence" if row.T == 1 else "sequences"
        label = f"a prompt of {row.T} tokens" if row.what == "prefill" else f"{row.T} {many}"
        label += ", extra `attention`" if "attention" in row.provider else ""
        rates = [1e3 * row.T / ms for ms in (row.ms, row.floor_ms)]
        theirs = f"{1e3 * row.T / peer.ms:,.0f}" if peer else ""
        lines.append([label, f"**{rates[0]:,.0f}**", theirs, f"{rates[1]:,.0f}"])
    return table(["work", "ling_ops tokens/s", "transformers", "floor"], lines)


STUDIES = ("balance", "hierarchy", "capacity", "sparsity", "prune")
PLACES = ("cpu", "h100")


def study(place: str, name: str) -> str:
    """Tables and verdict of a study's file; a line where there is none yet."""
    from ling_ops.cli.study.report import Table

    path = ROOT / "bench" / "results" / "studies" / place / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    values = json.loads(path.read_text(encoding="utf-8"))
    parts = []
    for found in values["tables"]:
        words = Table(found["title"], found["rows"]).words()
        rows = [list(line.values()) for line in words]
        parts.append(f"{found['title']}:\n\n{table(list(words[0]), rows)}")
    held, text = values["verdict"]["held"], values["verdict"]["text"]
    parts.append(f"{'Held' if held else 'Did not hold'}. {text}\n")
    return "\n".join(parts)


def studies() -> dict[str, Callable[[Record], str]]:
    """ "study_PLACE_NAME" of every place and study."""
    return {
        f"study_{place}_{name}": lambda _, place=place, name=name: study(place, name)
        for place in PLACES
        for name in STUDIES
    }


TABLES: dict[str, Callable[[Record], str]] = {
    "facts": facts, "train": train, "routing": routing, "infer": infer, "bandwidth": bandwidth,
    "products": products,
    "lora": lora, "lora_peft": lora_peft, "generate": generate, **studies(),
}  # fmt: skip


def filled(text: str, record: Record) -> str:
    """A page's text with every marked table written anew."""
    return MARK.sub(lambda mark: mark[1] + mark[2] + TABLES[mark[1]](record), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a page is stale")
    options = parser.parse_args()
    record = Record(json.loads(options.record.read_text(encoding="utf-8")))
    stale = 0
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        wanted = filled(text, record)
        if options.check and wanted != text:
            print(f"{name}: differs from the record")
            stale = 1
        elif not options.check:
            page.write_text(wanted, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main())
