"""Which bytes are trained on, which are held out, and in which order they come."""

from __future__ import annotations

import math

import pytest
import torch
from cli_runner import write_text
from hypothesis import given
from hypothesis import strategies as st

from ling_ops.cli.data import (
    BatchOrder,
    is_held_out,
    load_text,
    order0_entropy,
    stdlib_files,
    validation_windows,
)
from ling_ops.cli.errors import CommandError


def test_the_standard_library_is_found_and_split():
    names = [name for name, _ in stdlib_files()]
    assert names == sorted(names) and "argparse.py" in names and "json/decoder.py" in names
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    share = sum(map(is_held_out, names)) / len(names)
    assert 0.02 < share < 0.1


def test_files_do_not_mix_and_the_reading_is_deterministic(tmp_path):
    folder = write_text(tmp_path / "text")
    first, second = (load_text([str(folder)], sequence_length=32) for _ in range(2))
    assert torch.equal(first.train, second.train) and first.fingerprint == second.fingerprint
    assert first.split.startswith("whole files")
    for side, held_out in ((first.train, False), (first.validation, True)):
        texts = bytes(side.tolist()).split(b"\0")[:-1]
        expected = [
            p for p in sorted(folder.iterdir()) if is_held_out(f"text/{p.name}") is held_out
        ]
        assert texts == [path.read_bytes() for path in expected]


def test_a_changed_file_changes_the_fingerprint(tmp_path):
    folder = write_text(tmp_path / "text")
    before = load_text([str(folder)], sequence_length=32).fingerprint
    (folder / "file_03.txt").write_text("something else")
    assert load_text([str(folder)], sequence_length=32).fingerprint != before


def test_one_file_holds_out_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 201)) * 10)
    text = load_text([str(path)], sequence_length=16)
    assert text.split == "the end of the text" and text.validation.numel() == 2001 // 20
    whole = bytes(text.train.tolist() + text.validation.tolist())
    assert whole == path.read_bytes() + b"\0"


def test_binary_and_hidden_files_of_a_folder_are_left_out(tmp_path):
    folder = write_text(tmp_path / "text", files=3)
    (folder / "image.bin").write_bytes(b"\0\1\2" * 100)
    (folder / ".hidden").write_text("secret")
    assert load_text([str(folder)], sequence_length=32).files == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no text files in the folder"),
        (lambda path: path.write_text("short"), "too little data: 5 bytes"),
        (lambda path: path.write_text(""), "too little data: 0 bytes"),
    ],
)
def test_bad_data_is_one_line(make, message, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(CommandError, match=message):
        load_text([str(tmp_path / "data")], sequence_length=32)


@given(
    size=st.integers(20, 300), length=st.integers(2, 16), batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_an_epoch_reads_every_window_once(size, length, batch, seed):
    text = torch.arange(size) % 256
    order = BatchOrder(text.to(torch.uint8), sequence_length=length, batch=batch, seed=seed)
    rows = torch.cat([order.batch_at(i) for i in range(math.ceil(order.windows / batch))])
    rows = rows[: order.windows]
    assert rows.shape[1] == length + 1
    assert ((rows[:, 1:] - rows[:, :-1]) % 256 == 1).all()
    if size <= 256:
        assert len({int(row[0]) for row in rows}) == order.windows


def test_a_batch_depends_on_seed_and_index_alone():
    text = torch.randint(0, 256, (500,), dtype=torch.uint8)

    def order(seed):
        return BatchOrder(text, sequence_length=8, batch=4, seed=seed)

    forward = order(3)
    batches = [forward.batch_at(i) for i in range(40)]
    assert all(torch.equal(order(3).batch_at(i), batches[i]) for i in (39, 0, 17))
    assert not torch.equal(order(4).batch_at(0), batches[0])


def test_order0_entropy_worked_examples():
    assert order0_entropy(torch.tensor([[9, 0, 1, 2, 3]])) == pytest.approx(2.0)
    assert order0_entropy(torch.tensor([[9, 5, 5, 5]])) == pytest.approx(0.0)
    quarter = 0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)
    assert order0_entropy(torch.tensor([[9, 1, 2, 2, 2]])) == pytest.approx(quarter)


@pytest.mark.parametrize("limit", [1, 40, 64, 10_000])
def test_validation_windows_do_not_overlap(limit):
    text = torch.arange(200).to(torch.uint8)
    windows = validation_windows(text, sequence_length=16, limit=limit)
    assert windows.shape == (max(1, min(12, limit // 16)), 17)
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)
