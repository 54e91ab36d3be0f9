"""Data: shards are read exactly, bytes are counted as the decoder writes them, every position has one window."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import examples
from train_gpt import Config, Dist, InputError, Stream, Tokenizer, TrainLoader, read_shard, windows

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CPU = torch.device("cpu")


def refusal(call, *arguments):
    """The one-line message with which a call is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Shards


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_a_shard_is_read_token_for_token(tmp_path_factory, write_shard, tokens):
    path = write_shard(tmp_path_factory.getbasetemp() / "any_train_0.bin", tokens)
    read = read_shard(path)
    assert read.tolist() == tokens and read.dtype == np.uint16


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        (dict(magic=20240521), ("20240521", "20240520")),
        (dict(version=2), ("[20240520, 2, 5]", "[20240520, 1, 5]")),
        (dict(n_tokens=4), ("1034 bytes", "[20240520, 1, 4]", "[20240520, 1, 5]")),
        (dict(n_tokens=6), ("1034 bytes", "[20240520, 1, 6]")),
        (dict(n_tokens=0), ("[20240520, 1, 0]",)),
        (dict(n_tokens=-1), ("[20240520, 1, -1]",)),
    ],
    ids=str,
)
def test_a_shard_whose_header_is_wrong_is_refused(tmp_path, write_shard, lie, named):
    path = write_shard(tmp_path / "x.bin", [1, 2, 3, 4, 5], **lie)
    message = refusal(read_shard, path)
    assert str(path) in message and all(part in message for part in named)


@pytest.mark.parametrize("size", [0, 4, 12, 1020, 1022, 1023])
def test_a_shard_without_a_whole_header_is_refused(tmp_path, write_shard, size):
    path = write_shard(tmp_path / "x.bin", [1, 2, 3])
    path.write_bytes(path.read_bytes()[:size])
    assert f"of {size} bytes" in refusal(read_shard, path)


def test_a_shard_with_half_a_token_is_refused(tmp_path, write_shard):
    path = write_shard(tmp_path / "x.bin", [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-1])
    assert "1029 bytes" in refusal(read_shard, path)


def test_what_is_no_file_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "fifo.bin")
    (tmp_path / "dangling.bin").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.bin").mkdir()
    for name in ("fifo", "dangling", "folder"):
        assert "of 0 bytes" in refusal(read_shard, tmp_path / f"{name}.bin")


def test_a_folder_without_shards_is_refused(tmp_path, tiny_config):
    c = tiny_config(tmp_path)
    assert f"DATA_PATH={tmp_path}" in refusal(TrainLoader, c, Dist())
    assert "no shard" in refusal(Stream, c, CPU, None)


def stream_of(c, token_bytes=1):
    """A stream of tokens that stand for so many bytes each."""
    return Stream(c, CPU, SimpleNamespace(count_bytes=lambda previous, tokens: torch.full_like(tokens, token_bytes)))


def test_shards_are_read_by_number_and_others_are_not_read(tmp_path, write_shard, tiny_config):
    for i in range(12):
        write_shard(tmp_path / f"x_val_{i}.bin", range(1 + 9 * i, 10 + 9 * i))
    for name in ("x_val_000000 (1).bin", "x_val_bytes_000000.bin", "x_val_0.bin.tmp", "val_0.bin"):
        write_shard(tmp_path / name, [1] * 50)
    assert stream_of(tiny_config(tmp_path)).tokens.tolist() == list(range(1, 109))


@pytest.mark.parametrize("numbers", [["1"], ["0", "2"], ["0", "00"], ["0", "1", "3"]], ids=str)
def test_a_missing_or_double_shard_is_refused(tmp_path, write_shard, tiny_config, numbers):
    for number in numbers:
        write_shard(tmp_path / f"x_val_{number}.bin", range(1, 40))
    assert "of val; allowed is each once" in refusal(stream_of, tiny_config(tmp_path))


COUNTS = dict(val_tokens=40, val_documents=1, val_bytes=39 * 3)


def test_counts_of_the_manifest_must_be_those_of_the_shards(tmp_path, write_shard, tiny_config):
    c, manifest = tiny_config(tmp_path, val_tokens=20), tmp_path / "manifest.json"
    write_shard(tmp_path / "x_val_0.bin", range(1, 41))
    assert not stream_of(c, 3).has_manifest
    for stated in (dict(name="x"), COUNTS, dict(val_tokens=40)):
        manifest.write_text(json.dumps(stated))
        assert stream_of(c, 3).has_manifest is ("val_tokens" in stated) and len(stream_of(c, 3)) == 20
    for name in COUNTS:
        manifest.write_text(json.dumps(COUNTS | {name: 999}))
        message = refusal(stream_of, c, 3)
        assert f"{name} is {COUNTS[name]}" in message and "states 999" in message
    manifest.write_text(json.dumps(dict(train_tokens=5)))
    write_shard(tmp_path / "x_train_0.bin", range(1, 300))
    assert "train_tokens is 299" in refusal(TrainLoader, c, Dist())


def test_a_text_without_a_byte_is_refused(tmp_path, write_shard, tiny_config):
    write_shard(tmp_path / "x_val_0.bin", range(1, 41))
    assert "no byte" in refusal(stream_of, tiny_config(tmp_path), 0)


def test_shards_are_found_whatever_the_folder_is_called(tmp_path, write_shard, tiny_config):
    folder = tmp_path / "set [1] *"
    folder.mkdir()
    write_shard(folder / "x_val_0.bin", range(1, 41))
    assert len(stream_of(tiny_config(folder))) == 39


def test_a_token_past_the_vocabulary_is_refused(tmp_path, write_shard, tiny_config):
    c = tiny_config(tmp_path)
    for split in ("train", "val"):
        write_shard(tmp_path / f"x_{split}_0.bin", [1] * 80 + [320])
    loader = TrainLoader(c, Dist())
    assert "token id 320" in refusal(Stream, c, CPU, None)
    assert "VOCAB_SIZE=320" in refusal(train_gpt.check_ids, loader.shards[0][:81], c, "x")


# Tokenizer


@pytest.fixture
def data_copy(tmp_path, tiny_data):
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_a_missing_tokenizer_is_refused(data_copy, tiny_config):
    (data_copy / "tokenizer.model").unlink()
    assert "No such file" in refusal(Tokenizer, tiny_config(data_copy))


@pytest.mark.parametrize(
    "content", [b"", b"not a model at all", bytes(range(256)) * 20], ids=["empty", "text", "bytes"]
)
def test_a_file_that_is_no_tokenizer_is_refused(data_copy, tiny_config, content):
    (data_copy / "tokenizer.model").write_bytes(content)
    assert "not a SentencePiece model" in refusal(Tokenizer, tiny_config(data_copy))


def test_half_a_tokenizer_is_refused(data_copy, tiny_config):
    path = data_copy / "tokenizer.model"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "TOKENIZER_PATH=" in refusal(Tokenizer, tiny_config(data_copy))


def test_a_tokenizer_of_another_size_is_refused(tiny_config):
    assert "320 pieces; VOCAB_SIZE=400" in refusal(Tokenizer, tiny_config(vocab_size=400))


def test_a_tokenizer_with_another_bos_is_refused(tiny_config):
    assert "BOS id 1; BOS_ID=2" in refusal(Tokenizer, tiny_config(bos_id=2))


def test_a_tokenizer_other_than_the_manifests_is_refused(data_copy, tiny_config):
    manifest = data_copy / "manifest.json"
    manifest.write_text(json.dumps(dict(tokenizer_sha256="0" * 64)))
    assert "tokenizer_sha256 is" in refusal(Tokenizer, tiny_config(data_copy))
    right = hashlib.sha256((data_copy / "tokenizer.model").read_bytes()).hexdigest()
    manifest.write_text(json.dumps(dict(tokenizer_sha256=right)))
    assert Tokenizer(tiny_config(data_copy)).sha256 == right


def test_a_manifest_that_is_no_json_is_refused(data_copy, tiny_config):
    for content in (b"{half", b"[1]", b"\xff", b"[" * 100_000):
        (data_copy / "manifest.json").write_bytes(content)
        assert "manifest.json" in refusal(Tokenizer, tiny_config(data_copy))


@pytest.mark.slow
@settings(max_examples=examples(30), deadline=20_000, print_blob=False)
@given(data=st.data())
def test_data_from_a_stranger_is_read_or_refused_in_one_line(tiny_data, tiny_config, tmp_path_factory, data):
    """Bytes of a shard, of the tokenizer or of a manifest are others, are cut out or put in."""
    folder = tmp_path_factory.getbasetemp() / "stranger"
    shutil.copytree(tiny_data, folder, dirs_exist_ok=True)
    (folder / "manifest.json").write_text('{"val_tokens": 3080, "tokenizer_sha256": null}')
    path = folder / data.draw(st.sampled_from(["x_val_000000.bin", "tokenizer.model", "manifest.json"]))
    content = path.read_bytes()
    at = data.draw(st.integers(0, len(content)) | st.integers(0, min(len(content), 64)))
    noise = data.draw(st.binary(min_size=1, max_size=16))
    ways = [content[:at] + noise + content[at + len(noise) :], content[:at] + noise + content[at:], content[:at]]
    path.write_bytes(data.draw(st.sampled_from(ways)))
    c = tiny_config(folder)
    try:
        assert len(Stream(c, CPU, Tokenizer(c))) > 0
        event("read")
    except InputError as error:
        event("refused")
        assert len(str(error).splitlines()) == 1


def test_a_tokenizer_elsewhere_can_be_named(tiny_tokenizer, data_copy, tiny_config):
    (data_copy / "tokenizer.model").unlink()
    c = tiny_config(data_copy, tokenizer_path=str(tiny_tokenizer))
    assert Tokenizer(c).sha256 == hashlib.sha256(tiny_tokenizer.read_bytes()).hexdigest()


def test_a_tokenizer_without_byte_pieces_is_refused(tmp_path, data_copy, tiny_config):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "t"), model_type="bpe", vocab_size=320, minloglevel=2
    )
    c = tiny_config(data_copy, tokenizer_path=str(tmp_path / "t.model"))
    assert "no byte pieces" in refusal(Tokenizer, c)


# Bytes


def counted_bytes(tokenizer, documents):
    """Bytes of each document's tokens, counted on the one stream that they make."""
    ids = [[tokenizer.bos_id, *document] for document in documents]
    stream = torch.tensor([token for document in ids for token in document] + [tokenizer.bos_id])
    counts = tokenizer.count_bytes(stream[:-1], stream[1:])
    assert counts.dtype == torch.int64 and counts.shape == stream[1:].shape
    # count[i] belongs to token i + 1, so a document's part ends with the next one's BOS, which must add nothing.
    return [part.sum().item() for part in counts.split([len(document) for document in ids])]


@pytest.fixture(scope="module")
def tokenizer(tiny_config):
    return Tokenizer(tiny_config())


NASTY = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.text(
        st.sampled_from(" \u2581\u00a0\n\t\r\u3000aeT.\U0001f600\u0301\u00e9\ufffd\ufeff\u200d\x00\x7f"), max_size=30
    ),
    st.lists(st.sampled_from(["the", " the", " ", "  ", "<s>", "<unk>", "<0x41>", "\n", " of"]), max_size=12).map(
        "".join
    ),
)


@settings(max_examples=300)
@given(documents=st.lists(NASTY, min_size=1, max_size=5))
@pytest.mark.slow
def test_bytes_are_those_of_the_decoded_text_document_by_document(tokenizer, documents):
    ids = tokenizer.sp.encode(documents)
    assert counted_bytes(tokenizer, ids) == [len(tokenizer.sp.decode(i).encode("utf-8")) for i in ids]


@settings(max_examples=300)
@given(documents=st.lists(NASTY, min_size=1, max_size=5))
@pytest.mark.slow
def test_a_lossless_tokenizer_counts_the_texts_own_bytes(tokenizer, documents):
    """U+2581 is SentencePiece's own sign for a space, and no tokenizer can tell the two apart."""
    assume(not any("\u2581" in text for text in documents))
    assert counted_bytes(tokenizer, tokenizer.sp.encode(documents)) == [len(text.encode("utf-8")) for text in documents]


def test_a_bos_and_the_other_control_pieces_have_no_bytes(tokenizer):
    for previous in (1, 270):
        assert tokenizer.count_bytes(torch.full((4,), previous), torch.tensor([0, 1, 2, 3])).tolist() == [0, 0, 0, 0]


def test_every_byte_piece_is_one_byte_after_anything(tokenizer):
    pieces = torch.tensor([i for i in range(320) if tokenizer.sp.is_byte(i)])
    assert len(pieces) == 256
    for previous in (1, 270):
        assert tokenizer.count_bytes(torch.full_like(pieces, previous), pieces).eq(1).all()


@pytest.mark.parametrize("pieces", [1024, 8192])
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_bytes_of_real_text_are_those_of_the_decoded_text(pieces, tmp_path):
    path = SHARED / "tokenizers" / f"fineweb_{pieces}_bpe.model"
    tokenizer = Tokenizer(Config(vocab_size=pieces, tokenizer_path=str(path), data_path=str(tmp_path)))
    with open(SHARED / "text" / "val_fineweb.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(100), strict=False)]
    texts += [" leading", "  two leading", "", "\n", "\U0001f600 smile", "   ", "a  b "]
    ids = tokenizer.sp.encode(texts)
    assert counted_bytes(tokenizer, ids) == [len(tokenizer.sp.decode(i).encode("utf-8")) for i in ids]


# Training sequences


def averaging_rows(loader):
    return loader.held[loader.dist.share(loader.averaging)]


def starts_of(rows):
    """The first token of each sequence, which in a counting folder is its place."""
    return rows[:, 0].tolist()


def sequences(loader, first, last):
    """The run's sequences [first, last), taken from the batches of its steps."""
    size = loader.c.batch_seqs
    steps = range(first // size, -(-last // size))
    return torch.cat([loader.batch(step) for step in steps])[first - steps.start * size :][: last - first]


@pytest.fixture
def counting(tmp_path, write_shard, tiny_config):
    """Settings of a folder whose three shards hold 0, 1, 2, ... without a break; no shard is whole spans long."""
    for i, (first, last) in enumerate(((0, 1000), (1000, 1017), (1017, 3333))):
        write_shard(tmp_path / f"x_train_{i:06d}.bin", range(first, last))
    return tiny_config(tmp_path, vocab_size=65536, complement_alpha=0.0, train_batch_tokens=5 * 32)


def test_each_sequence_is_a_run_of_consecutive_tokens(counting):
    rows = sequences(TrainLoader(counting, Dist()), 0, 300)
    assert rows.shape == (300, 33) and rows.diff(dim=1).eq(1).all()


def test_every_span_comes_once_before_any_comes_twice(counting):
    loader = TrainLoader(counting, Dist())
    every = [*range(0, 999 - 31, 32), *range(1017, 3332 - 31, 32)]  # the shard of 17 tokens has none
    n = loader.n
    assert starts_of(averaging_rows(loader)) == every[n:] and len(every) - n == len(every) // 10
    for first in (0, 1, n, 5 * n + 3):
        assert sorted(starts_of(sequences(loader, first, first + n))) == every[:n]


def test_what_is_held_out_comes_in_the_order_of_the_text(counting):
    """Averages are chosen and the mixer is fitted on it; no step sees it."""
    loader = TrainLoader(counting, Dist())
    starts = starts_of(averaging_rows(loader))
    text = [token for start in starts for token in range(start, start + 32)]
    assert loader.calibration_text.tolist() == text
    few = dataclasses.replace(counting, mixer_calibration_tokens=50)
    assert TrainLoader(few, Dist()).calibration_text.tolist() == text[:50]
    assert not set(starts) & set(starts_of(sequences(loader, 0, 2 * loader.n)))


@pytest.mark.parametrize(("averaging", "calibration"), [(64, 96), (96, 64), (10, 2), (10**6, 10**6)])
def test_as_much_is_held_out_as_the_larger_of_its_two_uses_needs(counting, averaging, calibration, monkeypatch):
    monkeypatch.setattr(TrainLoader, "AVERAGING_TOKENS", averaging)
    loader = TrainLoader(dataclasses.replace(counting, mixer_calibration_tokens=calibration), Dist())
    tenth = int(loader.ends[-1]) // 10
    rows = [min(tenth, -(-tokens // 32)) for tokens in (averaging, calibration)]
    assert loader.held_out == max(rows) and loader.n + loader.held_out == loader.ends[-1]
    assert len(averaging_rows(loader)) == rows[0]
    assert len(loader.calibration_text) == min(calibration, 32 * max(rows))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_parts_of_other_rows_are_those_of_one_rank(counting, world_size):
    alone, loaders = (
        TrainLoader(counting, Dist()),
        [TrainLoader(counting, Dist(r, world_size)) for r in range(world_size)],
    )
    for n in (1, 2, 31):
        first = alone.sequences(0, n)
        assert torch.equal(first, sequences(alone, 0, n))
        assert torch.equal(torch.cat([loader.sequences(0, n) for loader in loaders]), first)
    assert torch.equal(torch.cat([averaging_rows(loader) for loader in loaders]), averaging_rows(alone))
    assert all(torch.equal(loader.calibration_text, alone.calibration_text) for loader in loaders)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_tokens=st.integers(9, 400), seed=st.integers(0, 2**31))
def test_every_span_comes_once_at_any_length_and_seed(tmp_path, write_shard, tiny_config, n_tokens, seed):
    write_shard(tmp_path / "x_train_0.bin", range(n_tokens))
    c = tiny_config(tmp_path, train_seq_len=8, train_batch_tokens=8, vocab_size=65536, complement_alpha=0.0, seed=seed)
    if n_tokens < 17:
        assert "2 are needed" in refusal(TrainLoader, c, Dist())
        return
    loader = TrainLoader(c, Dist())
    n, spans = loader.n, (n_tokens - 1) // 8
    assert n + loader.held_out == spans and loader.held_out == max(1, spans // 10)
    assert sorted(starts_of(sequences(loader, 0, n))) == [8 * i for i in range(n)]
    assert math.gcd(loader.stride, n) == 1


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_ranks_batches_together_are_the_batch_of_one_rank(counting, world_size):
    alone = TrainLoader(counting, Dist())
    loaders = [TrainLoader(counting, Dist(rank, world_size)) for rank in range(world_size)]
    for step in (0, 1, 40):
        parts = [loader.batch(step) for loader in loaders]
        assert all(part.shape[1:] == (33,) and part.dtype == torch.int64 for part in parts)
        assert torch.equal(torch.cat(parts), alone.batch(step))


def test_a_token_past_the_vocabulary_is_refused_where_it_is_read(tmp_path, write_shard, tiny_config):
    write_shard(tmp_path / "x_train_0.bin", [5] * 320 + [400] * 320 + [5] * 320)
    loader = TrainLoader(tiny_config(tmp_path), Dist())
    assert "token id 400" in refusal(lambda: [loader.batch(step) for step in range(20)])


def test_batches_follow_from_the_seed_alone(counting):
    first, again = (TrainLoader(counting, Dist()).batch(3) for _ in range(2))
    assert torch.equal(first, again)
    other = dataclasses.replace(counting, seed=counting.seed + 1)
    assert not torch.equal(first, TrainLoader(other, Dist()).batch(3))


def test_shards_shorter_than_a_sequence_are_refused(tmp_path, write_shard, tiny_config):
    write_shard(tmp_path / "x_train_0.bin", range(32))
    c = tiny_config(tmp_path)
    assert "TRAIN_SEQ_LEN=32" in refusal(TrainLoader, c, Dist())


# Windows


def window_of(position, stride, seq_len):
    """Start of the window that answers for a position, by trying the windows one after the other."""
    start = 0
    while position >= start + seq_len:
        start += stride
    return start


@st.composite
def cut_streams(draw):
    """(stride, seq_len, edges of the pieces that the stream is asked for in)."""
    seq_len = draw(st.integers(1, 40))
    stride = draw(st.integers(1, seq_len))
    n = draw(st.integers(1, 200))
    edges = draw(st.sets(st.integers(1, n), max_size=8))
    return stride, seq_len, sorted({0, n, *edges})


@settings(max_examples=300)
@given(cut_streams())
@pytest.mark.slow
def test_every_position_has_one_window_and_the_same_in_any_piece(cut):
    stride, seq_len, edges = cut
    answered = []
    for first, last in zip(edges, edges[1:], strict=False):
        starts, lows, highs = windows(first, last, stride, seq_len)
        assert len(starts) == len(lows) == len(highs)
        for start, low, high in zip(starts, lows, highs, strict=True):
            assert first <= low < high <= last
            assert start <= low and high <= start + seq_len
            answered += [(position, start) for position in range(low, high)]
    assert answered == [(position, window_of(position, stride, seq_len)) for position in range(edges[-1])]


@settings(max_examples=300)
@given(cut_streams(), st.sets(st.integers(1, 199), max_size=8))
@pytest.mark.slow
def test_a_text_has_the_windows_of_a_stream_of_its_own(cut, cuts):
    stride, seq_len, edges = cut
    begins = [0, *(begin for begin in sorted(cuts) if begin < edges[-1])]
    answered = []
    for first, last in zip(edges, edges[1:], strict=False):
        for start, low, high in zip(*windows(first, last, stride, seq_len, begins), strict=True):
            assert first <= low < high <= last and start <= low and high <= start + seq_len
            answered += [(position, start) for position in range(low, high)]
    begin_of = [max(begin for begin in begins if begin <= position) for position in range(edges[-1])]
    expected = [(p, b + window_of(p - b, stride, seq_len)) for p, b in enumerate(begin_of)]
    assert answered == expected


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 300))
def test_context_is_long_but_at_the_streams_start(seq_len, stride, n):
    assume(stride <= seq_len)
    for start, low, _ in zip(*windows(0, n, stride, seq_len), strict=True):
        assert start == 0 or low - start == seq_len - stride


@given(st.integers(1, 50), st.integers(1, 300))
def test_windows_as_far_apart_as_they_are_long_do_not_overlap(seq_len, n):
    starts, lows, highs = windows(0, n, seq_len, seq_len)
    assert np.array_equal(starts, lows) and np.array_equal(highs[:-1], starts[1:]) and highs[-1] == n


# Stream


@pytest.fixture
def counting_stream(tmp_path, write_shard, tiny_config):
    """make(**settings) -> Stream of the tokens 1 (a BOS) to 101, in two shards."""
    write_shard(tmp_path / "x_val_000000.bin", range(1, 60))
    write_shard(tmp_path / "x_val_000001.bin", range(60, 102))
    return lambda **changes: stream_of(tiny_config(tmp_path, **changes))


def test_the_stream_is_all_shards_in_order(counting_stream):
    stream = counting_stream()
    assert stream.tokens.tolist() == list(range(1, 102)) and len(stream) == 100 and stream.whole


@pytest.mark.parametrize(("val_tokens", "whole"), [(1, False), (40, False), (99, False), (100, True), (5000, True)])
def test_a_part_of_the_stream_says_that_it_is_one(counting_stream, val_tokens, whole):
    stream = counting_stream(val_tokens=val_tokens)
    assert stream.whole is whole and len(stream) == min(val_tokens, 100)
    assert stream.tokens.tolist() == list(range(1, len(stream) + 2))


def test_a_stream_shorter_than_a_window_is_refused(counting_stream):
    assert len(counting_stream(eval_seq_len=100)) == 100
    with pytest.raises(InputError, match="EVAL_SEQ_LEN=101: .*the 101 validation tokens"):
        counting_stream(eval_seq_len=101)


@pytest.mark.parametrize("size", [8, 33, 99, 100, 101, 1000])
def test_chunks_cover_the_stream_and_share_one_token(counting_stream, size):
    stream = counting_stream()
    chunks = list(stream.chunks(size))
    assert torch.equal(torch.cat([chunk.inputs for chunk in chunks]), stream.tokens[:-1])
    assert torch.equal(torch.cat([chunk.targets for chunk in chunks]), stream.tokens[1:])
    assert [chunk.start for chunk in chunks] == list(range(0, 100, size))
    assert [chunk.is_last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(a.tokens[-1] == b.tokens[0] for a, b in zip(chunks, chunks[1:], strict=False))


def test_a_stream_that_does_not_begin_with_a_document_is_refused(tmp_path, write_shard, tiny_config):
    write_shard(tmp_path / "x_val_0.bin", range(5, 60))
    with pytest.raises(InputError, match="begins with token 5; allowed is BOS_ID=1"):
        stream_of(tiny_config(tmp_path))


def test_documents_are_the_scored_ones(tmp_path, write_shard, tiny_config):
    """The last token is a target and never an input, so a document that begins there has no scored token."""
    write_shard(tmp_path / "x_val_0.bin", [1, 5, 6] * 20 + [1])
    assert stream_of(tiny_config(tmp_path)).documents == 20
