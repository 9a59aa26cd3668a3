"""`ling-ops generate`: the same seed gives the same text, and bytes come out as characters."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from cli_runner import run_command, run_here, train_arguments, write_text

pytest.importorskip("safetensors")

from ling_ops.cli import main
from ling_ops.cli.text import BytePrinter
from ling_ops.models import LingConfig, LingForCausalLM


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    for needed in ("matplotlib", "tensorboard", "rich"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("trained")
    run = folder / "run"
    extra = ["--steps", 60, "--learning-rate", 0.01, "--pattern", "1-1"]
    done = run_here(*train_arguments(write_text(folder / "text"), run, *extra))
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


def publish(folder, **changes):
    """A minute model in the published format."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16,
             "intermediate_size": 48, "moe_intermediate_size": 16}  # fmt: skip
    model = LingForCausalLM(LingConfig.preset("tiny", **{**sizes, **changes}))
    model.save_pretrained(folder)
    return model.eval()


def continue_text(folder, capsysbinary, *arguments: object) -> tuple[int, str, str]:
    fixed = ("--device", "cpu", "--temperature", 0, "--max-new-tokens", 8)
    status = main(list(map(str, ("generate", "--checkpoint", folder, *fixed, *arguments))))
    captured = capsysbinary.readouterr()
    return status, captured.out.decode(), captured.err.decode()


def test_a_published_folder_of_bytes(tmp_path, capsysbinary):
    model = publish(tmp_path)
    status, out, err = continue_text(tmp_path, capsysbinary, "--prompt", "def ")
    assert status == 0, err
    ids = model.generate(torch.tensor([list(b"def ")]), max_new_tokens=8, eos_token_id=0)
    stream = Stream()
    printer = BytePrinter(stream)
    for token in ids[0]:
        printer(token)
    printer.end()
    assert out == stream.getvalue()


def test_a_published_folder_with_a_tokenizer(tmp_path, capsysbinary):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["größe und 😀 weiter und weiter"] * 4, vocab_size=300, special_tokens=["<end>"]
    )
    model = publish(tmp_path, vocab_size=300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "eos_token_id": [0, 7]}))
    status, out, err = continue_text(tmp_path, capsysbinary, "--prompt", "größe 😀")
    assert status == 0, err
    ids = tokenizer.encode("größe 😀").ids
    whole = model.generate(torch.tensor([ids]), max_new_tokens=8, eos_token_id=0)[0].tolist()
    # a character that the last token leaves cut is not shown
    assert out.rstrip("\n") == tokenizer.decode(whole).rstrip("�")
    assert re.match(r"\d+ tokens in", err)
    status, out, _ = continue_text(tmp_path, capsysbinary)
    assert status == 0 and "<end>" not in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "not bytes"),
    ],
)
def test_a_published_folder_that_cannot_be_used_is_one_line(tmp_path, capsysbinary, spoil, message):
    pytest.importorskip("tokenizers")
    publish(tmp_path, vocab_size=300)
    (tmp_path / "tokenizer.json").touch()
    spoil(tmp_path)
    status, out, err = continue_text(tmp_path, capsysbinary, "--prompt", "x")
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1


def test_a_prompt_beyond_the_vocabulary_is_refused(tmp_path, capsysbinary):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"word": 299, "<unk>": 298}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    publish(tmp_path)
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    status, _, err = continue_text(tmp_path, capsysbinary, "--prompt", "word")
    assert status == 1 and "token 299" in err and "256" in err
    status, _, err = continue_text(tmp_path, capsysbinary)
    assert status == 2 and "--prompt" in err
