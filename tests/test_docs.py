"""Every code block of docs/ runs, a page's blocks one after the other."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_runner import environment, run_here, write_text

import ling_ops

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prepare_checkpoints(experts: int = 16) -> None:
    """Ling-mini-2.0, but tiny, with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    from ling_ops.models import LingConfig, LingForCausalLM

    config = LingConfig.preset(
        "ling-mini-2.0", vocab_size=300, hidden_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=16, intermediate_size=80, moe_intermediate_size=24,
        num_experts=experts,
    )  # fmt: skip
    LingForCausalLM(config, dtype=torch.bfloat16).save_pretrained("Ling-mini-2.0")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["Mixture of experts, a mixture of experts"], vocab_size=300)
    tokenizer.save("Ling-mini-2.0/tokenizer.json")


def prepare_finetuning(experts: int = 16) -> None:
    """The tiny checkpoint and some text."""
    for needed in ("matplotlib", "tensorboard", "rich"):
        pytest.importorskip(needed)
    prepare_checkpoints(experts)
    write_text(Path("notes"))


def prepare_transformers() -> None:
    """Qwen3-30B-A3B, but tiny."""
    pytest.importorskip("transformers", minversion="5.8")
    from transformers_models import build

    build("qwen3_moe", "eager").save_pretrained("Qwen3-30B-A3B")


def prepare_peft() -> None:
    pytest.importorskip("peft")
    prepare_transformers()


def prepare_engines() -> None:
    for needed in ("accelerate", "safetensors"):
        pytest.importorskip(needed)
    pytest.importorskip("transformers", minversion="5.8")


def prepare_training() -> None:
    for needed in ("safetensors", "matplotlib", "tensorboard", "rich"):
        pytest.importorskip(needed)


PREPARE = {
    "expert-parallel.md": prepare_training,
    "checkpoints.md": prepare_checkpoints,
    "finetuning.md": prepare_finetuning,
    "pruning.md": lambda: prepare_finetuning(experts=32),
    "integrations-peft.md": prepare_peft,
    "integrations-transformers.md": prepare_transformers,
    "training-engines.md": prepare_engines,
}


#: Pages whose Python is a script of this name, which their commands run.
SCRIPTS = {"expert-parallel.md": "train.py"}


def enough_gpus(arguments: list[str]) -> dict[str, str]:
    """The environment of as many processes: with a GPU for each, or with none."""
    processes = int(arguments[arguments.index("--nproc-per-node") + 1])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < processes else {}
    return {**environment(), **hidden}


def run_shell(lines: str) -> None:
    for line in lines.splitlines():
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            launch = [sys.executable, "-m", "torch.distributed.run", *arguments]
            done = subprocess.run(
                launch, capture_output=True, text=True, env=enough_gpus(arguments), timeout=900,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            continue
        assert program == "ling-ops", f"a test cannot run {line!r}"
        done = run_here(*arguments)
        assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(DOCS.parent))
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    assert blocks and text.count("```") == 2 * len(blocks)
    PREPARE.get(page, lambda: None)()
    names: dict = {}
    for language, code in blocks:
        if language == "bash":
            run_shell(code)
        elif language == "json":
            json.loads(code)
        elif language == "python" and page in SCRIPTS:
            Path(SCRIPTS[page]).write_text(code, encoding="utf-8")
        else:
            assert language == "python", f"a block of {page} names the language {language!r}"
            exec(compile(code, page, "exec"), names)


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_code_hides_from_these_tests(page):
    """What would be shown as code, or be run, by a reader and not here."""
    text = page.read_text(encoding="utf-8")
    code = "".join(code for _, code in BLOCK.findall(text))
    assert not re.search(r"^\s*~~~|<pre|^[ \t]+```", text, re.MULTILINE)
    assert "__main__" not in code and "sys.exit" not in code
    assert {path.parent for path in DOCS.rglob("*.md")} == {DOCS}


def test_every_operator_is_shown():
    """A public function that no page calls is one that no newcomer finds."""
    code = "".join(code for page in PAGES for _, code in BLOCK.findall(page.read_text("utf-8")))
    functions = [name for name in ling_ops.__all__ if name[0].islower() and name[0] != "_"]
    assert [name for name in functions if f"ling_ops.{name}(" not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_is_there(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.filterwarnings("ignore::ling_ops.ops._backend.FallbackWarning")
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    """Its Python here. Its commands set up environments: `./dev test` is what runs this, and of the
    others it is checked that there is what they name."""
    monkeypatch.chdir(tmp_path)
    root = DOCS.parent
    text, names = (root / "README.md").read_text(encoding="utf-8"), {}
    blocks = BLOCK.findall(text)
    assert text.count("```") == 2 * len(blocks)
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    table = project.split("[project.optional-dependencies]")[1]
    extras = set(re.findall(r"^([a-z]+) = \[", table, re.MULTILINE))
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "README.md", "exec"), names)
            continue
        assert language == "bash"
        for line in code.splitlines():
            program, argument, *_ = shlex.split(line, comments=True)
            if program == "./dev":
                assert f"\n{argument})\n" in (root / "dev").read_text(encoding="utf-8")
            else:
                assert (program, argument) == ("pip", "install")
                named = re.findall(r"extras: ([\w, ]+)", line)
                assert all(set(group.split(", ")) <= extras for group in named), line
    assert names["y"].shape == names["x"].shape


def test_the_picture_is_drawn_from_a_routing(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(DOCS / "images/moe_layer.py"))["draw"]
    drawn(tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")
