"""`ling-ops generate`: the same seed gives the same text, and bytes come out as characters."""

from __future__ import annotations

import io
import re

import pytest
from cli_runner import run_command, train_arguments, write_text

pytest.importorskip("safetensors")

from ling_ops.cli import main
from ling_ops.cli.generate import BytePrinter


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    for needed in ("matplotlib", "tensorboard", "rich"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("trained")
    run = folder / "run"
    extra = ["--steps", 60, "--learning-rate", 0.01, "--pattern", "1-1"]
    done = run_command(*train_arguments(write_text(folder / "text"), run, *extra))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture
def generate(trained, capsysbinary):
    """Continue a prompt in this process; returns the bytes on stdout."""

    def call(*arguments: object) -> bytes:
        arguments = ("--checkpoint", trained, "--device", "cpu", *arguments)
        assert main(["generate", *map(str, arguments)]) == 0
        return capsysbinary.readouterr().out

    return call


def test_the_command_streams_the_text_and_says_how_fast(trained):
    done = run_command(
        "generate", "--checkpoint", trained, "--prompt", "def name_1", "--max-new-tokens", 40
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def name_1") and len(done.stdout) > len("def name_1\n")
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s, [\d.]+ tokens/s\n", done.stderr)


def test_the_seed_decides(generate):
    texts = [
        generate("--prompt", "def ", "--max-new-tokens", 40, "--temperature", 1.5, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_greedy_needs_no_seed_and_a_longer_text_begins_with_the_shorter(generate):
    long, short = (
        generate("--prompt", "def name_", "--temperature", 0, "--max-new-tokens", n, "--seed", n)
        for n in (30, 10)
    )
    assert long.startswith(short.rstrip(b"\n"))


def test_it_learned_the_text(generate):
    out = generate("--prompt", "def name_3_1", "--temperature", 0, "--max-new-tokens", 20)
    assert b"(x)" in out


def test_no_prompt_begins_a_text(generate):
    out = generate("--max-new-tokens", 12, "--temperature", 0)
    assert len(out) == 13 and out.isascii() and b"\0" not in out


def test_prompts_beyond_ascii(generate):
    assert generate("--prompt", "größe 😀", "--max-new-tokens", 2).startswith("größe 😀".encode())


class Stream(io.StringIO):
    encoding = "utf-8"


def test_bytes_show_as_soon_as_they_complete_a_character():
    stream = Stream()
    printer = BytePrinter(stream)
    seen = []
    for byte in "é€😀".encode():
        printer(byte)
        seen.append(stream.getvalue())
    assert seen == ["", "é", "é", "é", "é€", "é€", "é€", "é€", "é€😀"]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (b"a\xffb", "a�b\n"),
        (b"a\xe2\x82", "a�\n"),
        (b"\xf0\x9fz", "�z\n"),
        ([97, 0], "a\n"),
        ([97, 300], "a�\n"),
    ],
)
def test_broken_characters_become_one_mark(tokens, text):
    stream = Stream()
    printer = BytePrinter(stream)
    for token in tokens:
        printer(token)
    printer.end()
    assert stream.getvalue() == text and printer.count == len(tokens)


def test_an_ascii_stream_gets_question_marks():
    raw = io.BytesIO()
    printer = BytePrinter(io.TextIOWrapper(raw, encoding="ascii"))
    for byte in "é!".encode():
        printer(byte)
    assert raw.getvalue() == b"?!"
