"""data/prepare.py: shards are exact, text survives, train and validation stay apart, bad input costs one line."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "data" / "prepare.py"
sys.path.insert(0, str(ROOT / "data"))

import prepare  # noqa: E402
from train_gpt import read_shard  # noqa: E402

VOCAB = 400
PANGRAM = "the quick brown fox jumps over lazy dogs while seven wizards mix black quartz jugs"
ODD_DOCUMENTS = [
    " a leading space",
    "  two spaces  inside, two behind  ",
    "tab\tand\r\nCRLF\r\n\r\nand a line break\n",
    "\n\n\tindented\n        deeply\n",
    "emoji \U0001f600\U0001f469\u200d\U0001f52c, accents \u00e9 e\u0301, \u4f60\u597d, \ufb01 ligature",
    "pieces as text: <s> </s> <unk> <pad> <0x0A>",
    "control \x00 \x1b \x7f bytes",
]
VAL_DOCUMENTS = ["Held-out text, number one.\nIt is short.", "And  number two \U0001f680"]


def plain_documents(n: int) -> list[str]:
    """Different documents of simple English, enough for a tokenizer of VOCAB pieces."""
    rng = np.random.default_rng(0)
    return [f"Document {i}. " + " ".join(rng.choice(PANGRAM.split(), 60)) + ".\n" for i in range(n)]


def jsonl(path: Path, documents: list[str]) -> Path:
    """Write documents as .jsonl or .jsonl.xz."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> SimpleNamespace:
    """Training and validation files, the documents in them, and a folder that does not exist yet."""
    documents = [*ODD_DOCUMENTS, *plain_documents(80)]
    train, val = jsonl(tmp_path / "train.jsonl", documents), jsonl(tmp_path / "val.jsonl", VAL_DOCUMENTS)
    return SimpleNamespace(train=train, val=val, documents=documents, out=tmp_path / "sets" / "made")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossless tokenizer file."""
    path = tmp_path_factory.mktemp("tokenizer") / "given.model"
    path.write_bytes(prepare.train_tokenizer([*ODD_DOCUMENTS, *plain_documents(80)], VOCAB))
    return path


def sentencepiece_model(path: Path, **options: object) -> Path:
    """A tokenizer with other options than ours."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(plain_documents(40)), model_writer=file, vocab_size=300, minloglevel=2,
            hard_vocab_limit=False, **options,
        )  # fmt: skip
    return path


def run_text(train: Path, val: Path, out: Path, *options: object) -> int:
    return prepare.main([str(a) for a in ("text", "--train", train, "--val", val, "--out", out, *options)])


def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def tokens_of(folder: Path, split: str) -> np.ndarray:
    """All tokens of a split, in the order of its shards."""
    return np.concatenate([read_shard(path) for path in sorted(folder.glob(f"*_{split}_*.bin"))])


def documents_of(folder: Path, split: str) -> list[str]:
    """The decoded documents of a split, cut at each BOS."""
    tokens, decoder = tokens_of(folder, split), processor(folder)
    starts = np.flatnonzero(tokens == decoder.bos_id())
    assert starts[0] == 0
    return [decoder.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(capsys: pytest.CaptureFixture, code: int, *parts: str) -> None:
    """Exit code 2 and a last line on stderr that is an error and names each part."""
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert code == 2
    assert line.startswith("error: ") and "Traceback" not in captured.err
    for part in parts:
        assert part in line


# --- text -------------------------------------------------------------------------------------------------------------


def test_shard_is_byte_exact(corpus, model):
    assert run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model) == 0
    decoder = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokens = [token for text in VAL_DOCUMENTS for token in (1, *decoder.encode(text))]
    header = np.array([20240520, 1, len(tokens)] + [0] * 253, dtype="<i4").tobytes()
    expected = header + np.array(tokens, dtype="<u2").tobytes()
    assert (corpus.out / "made_val_000000.bin").read_bytes() == expected
    assert (corpus.out / "tokenizer.model").read_bytes() == model.read_bytes()


def test_trained_tokenizer_gives_every_document_back(corpus):
    assert run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", VOCAB) == 0
    assert documents_of(corpus.out, "train") == corpus.documents
    assert documents_of(corpus.out, "val") == VAL_DOCUMENTS
    assert processor(corpus.out).vocab_size() == VOCAB


def test_manifest_tells_what_is_there(corpus):
    assert run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", VOCAB) == 0
    model = (corpus.out / "tokenizer.model").read_bytes()
    assert json.loads((corpus.out / "manifest.json").read_text()) == {
        "name": "made",
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": VOCAB,
        "train_documents": len(corpus.documents),
        "val_documents": len(VAL_DOCUMENTS),
        "train_tokens": len(tokens_of(corpus.out, "train")),
        "val_tokens": len(tokens_of(corpus.out, "val")),
        "train_bytes": sum(len(text.encode()) for text in corpus.documents),
        "val_bytes": sum(len(text.encode()) for text in VAL_DOCUMENTS),
        "shared_documents": 0,
        "dropped_documents": 0,
        "sources": ["train.jsonl", "val.jsonl"],
    }


def test_all_kinds_of_file_in_the_order_given(corpus, model, tmp_path):
    parts = corpus.documents[:10], corpus.documents[10:11], corpus.documents[11:12], corpus.documents[12:]
    first, last = jsonl(tmp_path / "z.jsonl.xz", parts[0]), jsonl(tmp_path / "a.txt.jsonl", parts[3])
    plain, packed = tmp_path / "y.txt", tmp_path / "b.txt.xz"
    plain.write_bytes(parts[1][0].encode())
    packed.write_bytes(lzma.compress(parts[2][0].encode()))
    files = [str(path) for path in (first, plain, packed, last)]
    arguments = ["--val", str(corpus.val), "--tokenizer", str(model), "--out", str(corpus.out)]
    assert prepare.main(["text", "--train", *files, *arguments]) == 0
    assert documents_of(corpus.out, "train") == corpus.documents


XZ = lzma.compress
PACKERS = {
    ".jsonl.xz": XZ,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_all_streams_of_a_compressed_file_are_read(corpus, model, tmp_path, suffix):
    lines = jsonl(tmp_path / "plain.jsonl", corpus.documents).read_bytes().splitlines(keepends=True)
    packed = tmp_path / f"two{suffix}"
    packed.write_bytes(b"".join(PACKERS[suffix](b"".join(part)) for part in (lines[:9], lines[9:])))
    assert run_text(packed, corpus.val, corpus.out, "--tokenizer", model) == 0
    assert documents_of(corpus.out, "train") == corpus.documents


def test_padding_between_xz_streams_is_skipped(corpus, model, tmp_path):
    lines = jsonl(tmp_path / "plain.jsonl", corpus.documents).read_bytes().splitlines(keepends=True)
    packed = tmp_path / "padded.jsonl.xz"
    packed.write_bytes(XZ(b"".join(lines[:9])) + bytes(8) + XZ(b"".join(lines[9:])) + bytes(4))
    assert run_text(packed, corpus.val, corpus.out, "--tokenizer", model) == 0
    assert documents_of(corpus.out, "train") == corpus.documents


def parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    return path


def test_the_text_column_of_parquet_is_read(corpus, model, tmp_path):
    train = parquet(tmp_path / "train.parquet", id=list(range(len(corpus.documents))), text=corpus.documents)
    assert run_text(train, corpus.val, corpus.out, "--tokenizer", model) == 0
    assert documents_of(corpus.out, "train") == corpus.documents


SPACES = {
    "ours": None,
    "default": dict(),
    "as the published": dict(add_dummy_prefix=False),
    "as Llama's": dict(remove_extra_whitespaces=False),
}


@pytest.mark.parametrize("options", SPACES.values(), ids=SPACES)
def test_a_long_text_file_is_one_document_whose_parts_do_not_show(corpus, model, tmp_path, monkeypatch, options):
    """Tokenizers drop or add spaces at the start of a text, each kind in its own way."""
    whole, parts = tmp_path / "whole" / "made", tmp_path / "parts" / "made"
    train = tmp_path / "train.txt"
    train.write_bytes("\n".join(corpus.documents).encode())
    if options is not None:
        model = sentencepiece_model(tmp_path / "other.model", byte_fallback=True, **options)
    assert prepare.splits_at_spaces(model.read_bytes())
    assert run_text(train, corpus.val, whole, "--tokenizer", model) == 0
    monkeypatch.setattr(prepare, "PART_CHARS", 500)
    monkeypatch.setattr(prepare, "BATCH_CHARS", 700)
    assert len(list(prepare.TextFiles([train], "", 500))) > 20
    assert run_text(train, corpus.val, parts, "--tokenizer", model) == 0
    assert files_of(whole) == files_of(parts)
    assert len(documents_of(parts, "train")) == 1


def test_a_tokenizer_whose_tokens_reach_over_spaces_gets_the_whole_text(tmp_path):
    wide = tmp_path / "wide.model"
    with wide.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a a a a a"] * 99), model_writer=file, vocab_size=300, minloglevel=2,
            hard_vocab_limit=False, byte_fallback=True, split_by_whitespace=False, model_type="bpe",
        )  # fmt: skip
    assert not prepare.splits_at_spaces(wide.read_bytes())


def test_a_long_text_without_spaces_stays_whole(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("x\n" * 5000)
    assert [piece.text for piece in prepare.TextFiles([path], "", 100)] == ["x\n" * 5000]


def test_order_holds_over_many_batches_and_shards(corpus, model, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARS", 700)
    assert run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model, "--shard-tokens", 1000) == 0
    shards = sorted(corpus.out.glob("made_train_*.bin"))
    lengths = [len(read_shard(path)) for path in shards]
    assert [path.name for path in shards] == [f"made_train_{i:06d}.bin" for i in range(len(shards))]
    assert len(shards) > 3 and set(lengths[:-1]) == {1000} and 0 < lengths[-1] <= 1000
    assert documents_of(corpus.out, "train") == corpus.documents


def test_the_same_input_gives_the_same_bytes(corpus, tmp_path):
    again = tmp_path / "again" / "made"
    for out in (corpus.out, again):
        assert run_text(corpus.train, corpus.val, out, "--train-tokenizer", VOCAB, "--tokenizer-bytes", 9000) == 0
    assert files_of(corpus.out) == files_of(again)


def test_bytes_are_those_that_a_lossy_tokenizer_decodes(corpus, tmp_path):
    lossy = sentencepiece_model(tmp_path / "lossy.model", byte_fallback=True)
    val = jsonl(tmp_path / "odd.jsonl", ["a\n\nb  c"])
    assert run_text(corpus.train, val, corpus.out, "--tokenizer", lossy) == 0
    assert documents_of(corpus.out, "val") == ["a b c"]
    assert json.loads((corpus.out / "manifest.json").read_text())["val_bytes"] == 5


def test_tokenizer_bytes_limit_its_training_text(corpus):
    assert run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", 350, "--tokenizer-bytes", 9000) == 0
    used = list(prepare.first_bytes(map(prepare.Piece, corpus.documents), 9000))
    assert 9000 <= sum(len(text.encode()) for text in used) < 10000
    assert (corpus.out / "tokenizer.model").read_bytes() == prepare.train_tokenizer(used, 350)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_overlap_is_refused_and_nothing_written(corpus, model, capsys):
    copies = ["HELD-OUT   text,\tnumber one. It is short.", VAL_DOCUMENTS[1]]  # one of them in other case and spacing
    jsonl(corpus.train, [*corpus.documents, *copies])
    code = run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model)
    assert_refused(capsys, code, "2 training documents", repr(copies[0][:60]))
    assert not corpus.out.exists() and not list(corpus.out.parent.iterdir())


def test_shared_documents_are_dropped_where_that_is_asked_for(corpus, model, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARS", 700)
    documents = [corpus.documents[0], VAL_DOCUMENTS[1], *corpus.documents[1:], VAL_DOCUMENTS[0]]
    jsonl(corpus.train, documents)
    assert run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model, "--drop-shared") == 0
    assert documents_of(corpus.out, "train") == corpus.documents
    manifest = json.loads((corpus.out / "manifest.json").read_text())
    assert (manifest["train_documents"], manifest["dropped_documents"]) == (len(corpus.documents), 2)


def test_a_long_shared_document_is_dropped_with_all_its_parts(corpus, model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_CHARS", 200)
    monkeypatch.setattr(prepare, "BATCH_CHARS", 300)
    long, other = tmp_path / "long.txt", tmp_path / "other.txt"
    long.write_text(" ".join(plain_documents(9)))
    other.write_text(" ".join(reversed(plain_documents(9))))
    files = ["--train", str(other), str(long), str(corpus.train), "--val", str(long)]
    arguments = ["--tokenizer", str(model), "--out", str(corpus.out), "--drop-shared"]
    assert prepare.main(["text", *files, *arguments]) == 0
    assert documents_of(corpus.out, "train") == [other.read_text(), *corpus.documents]


def test_documents_are_compared_as_the_tokenizer_leaves_them(corpus, tmp_path, capsys):
    lossy = sentencepiece_model(tmp_path / "lossy.model", byte_fallback=True)  # drops U+200B, as the published one
    jsonl(corpus.train, [*corpus.documents, "The same\u200b little text for both sides."])
    jsonl(corpus.val, ["The same little text for both sides."])
    code = run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", lossy)
    assert_refused(capsys, code, "1 training documents are also in validation")


def test_a_text_of_which_the_tokenizer_leaves_nothing_is_refused(corpus, tmp_path, capsys):
    lossy = sentencepiece_model(tmp_path / "lossy.model", byte_fallback=True)
    jsonl(corpus.val, ["\u200b"] * 99)
    code = run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", lossy)
    assert_refused(capsys, code, "no byte of the val text")


def test_a_full_folder_is_left_alone(corpus, model, capsys):
    assert run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model) == 0
    before = files_of(corpus.out)
    assert_refused(capsys, run_text(corpus.val, corpus.train, corpus.out, "--tokenizer", model), str(corpus.out))
    assert files_of(corpus.out) == before


BAD_FILES = {
    "json": ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', ["bad.jsonl:2", "not valid JSON"]),
    "encoding": ("bad.jsonl", b'{"text": "\xff"}\n', ["bad.jsonl:1"]),
    "field": ("bad.jsonl", b'{"body": "x"}\n', ["bad.jsonl:1", '"text"']),
    "type": ("bad.jsonl", b'\n["x"]\n', ["bad.jsonl:2", '"text"']),
    "blank": ("bad.jsonl", b'{"text": " \\n"}\n', ["bad.jsonl:1", "empty"]),
    "surrogate": ("bad.jsonl", b'{"text": "x \\ud83d y"}\n', ["bad.jsonl:1", "surrogate"]),
    "nothing": ("bad.jsonl", b"", ["bad.jsonl", "no documents"]),
    "empty text": ("bad.txt", b" \n", ["bad.txt", "no documents"]),
    "latin-1": ("bad.txt", b"caf\xe9", ["bad.txt", "UTF-8"]),
    "garbage behind xz": ("bad.jsonl.xz", XZ(b'{"text": "x"}\n') + b"garbage", ["bad.jsonl.xz", "invalid size"]),
    "damage behind xz": (
        "bad.jsonl.xz",
        XZ(b'{"text": "x"}\n') + XZ(b'{"text": "y"}\n').replace(b"7zXZ", b"7zxz", 1),
        ["bad.jsonl.xz", "header magic"],
    ),
    "garbage behind gz": ("bad.jsonl.gz", gzip.compress(b'{"text": "x"}\n') + b"xx", ["bad.jsonl.gz", "gzipped"]),
    "cut gz": ("bad.jsonl.gz", gzip.compress(b'{"text": "x"}\n')[:-5], ["bad.jsonl.gz", "ended before"]),
    "garbage behind zst": ("bad.txt.zst", PACKERS[".jsonl.zst"](b"x") + b"xxxx", ["bad.txt.zst", "Unknown frame"]),
    "cut zst": ("bad.txt.zst", PACKERS[".jsonl.zst"](b"x" * 9999)[:-3], ["bad.txt.zst", "Truncated"]),
    "no parquet": ("bad.parquet", b"plain text", ["bad.parquet", "Parquet"]),
    "cut xz": ("bad.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 999)[:-20], ["bad.jsonl.xz", "xz"]),
    "no xz": ("bad.txt.xz", b"plain", ["bad.txt.xz", "xz"]),
    "suffix": ("bad.csv", b"x", ["--train", "bad.csv", ".jsonl.xz"]),
}


def test_parquet_without_text_is_one_line(corpus, model, tmp_path, capsys):
    bad = parquet(tmp_path / "bad.parquet", body=["x"])
    assert_refused(capsys, run_text(bad, corpus.val, corpus.out, "--tokenizer", model), "bad.parquet", "body", "text")
    bad = parquet(tmp_path / "null.parquet", text=["x", None])
    assert_refused(capsys, run_text(bad, corpus.val, corpus.out, "--tokenizer", model), "null.parquet, row 2", "text")


@pytest.mark.parametrize("name, content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_a_new_tokenizer_gives_the_same_line_for_bad_text(corpus, tmp_path, capsys, name, content, parts):
    bad = tmp_path / name
    bad.write_bytes(content)
    assert_refused(capsys, run_text(bad, corpus.val, corpus.out, "--train-tokenizer", VOCAB), *parts)


@pytest.mark.parametrize("name, content, parts", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_text_is_one_line(corpus, model, tmp_path, capsys, name, content, parts):
    bad = tmp_path / name
    bad.write_bytes(content)
    assert_refused(capsys, run_text(bad, corpus.val, corpus.out, "--tokenizer", model), *parts)
    assert not corpus.out.exists()


def test_bad_tokenizer_is_one_line(corpus, tmp_path, capsys):
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"no model")
    cases = {
        garbage: "SentencePiece",
        sentencepiece_model(tmp_path / "no_bytes.model"): "byte",
        sentencepiece_model(tmp_path / "no_bos.model", byte_fallback=True, bos_id=-1): "BOS",
        tmp_path / "missing.model": "no such file",
    }
    for path, reason in cases.items():
        assert_refused(capsys, run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", path), path.name, reason)
    assert_refused(capsys, run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", 60000), "60000")
    assert not corpus.out.exists()


def test_a_document_that_no_tokenizer_can_keep(corpus, capsys):
    jsonl(corpus.val, ["spark \u2581\u2582\u2583 line"])
    code = run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", VOCAB)
    assert_refused(capsys, code, "U+2581", "spark")
    assert not corpus.out.exists()


def test_bad_options_are_one_line(corpus, model, tmp_path, capsys):
    given = ("--tokenizer", model)
    assert_refused(capsys, run_text(tmp_path / "no.txt", corpus.val, corpus.out, *given), "--train", "no.txt")
    assert_refused(capsys, run_text(corpus.train, corpus.val, tmp_path / "a_val_b", *given), "a_val_b")
    assert_refused(capsys, run_text(corpus.train, corpus.val, corpus.out), "--tokenizer")
    too_many = run_text(corpus.train, corpus.val, corpus.out, *given, "--shard-tokens", 10**9)
    assert_refused(capsys, too_many, "--shard-tokens", "1000000000", "1 to 100000000")
    assert_refused(capsys, prepare.main(["sample", "--max-bytes", "1000"]), "--max-bytes", "1000", "300000")


def test_text_that_is_only_scored_needs_no_training_text(corpus, model, capsys):
    arguments = ["text", "--val", str(corpus.val), "--out", str(corpus.out)]
    assert_refused(capsys, prepare.main([*arguments, "--train-tokenizer", "400"]), "--train", "only scored")
    assert prepare.main([*arguments, "--tokenizer", str(model)]) == 0
    assert documents_of(corpus.out, "val") == VAL_DOCUMENTS
    assert not list(corpus.out.glob("*_train_*"))
    assert json.loads((corpus.out / "manifest.json").read_text())["train_tokens"] == 0


def test_a_text_without_spaces_trains_a_tokenizer(corpus, tmp_path):
    letters, rng = list("漢字仮名交じり文の例です日本語東西南北"), np.random.default_rng(0)
    documents = ["".join(rng.choice(letters, 90)) for _ in range(40)]
    jsonl(corpus.train, documents)
    assert run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", 300) == 0
    assert documents_of(corpus.out, "train") == documents


def test_documents_with_sentencepieces_own_mark_train_the_tokenizer_too(corpus):
    documents = [f"load of host {i}: ▃▅▇ and {words}" for i, words in enumerate(plain_documents(80))]
    jsonl(corpus.train, documents)
    assert run_text(corpus.train, corpus.val, corpus.out, "--train-tokenizer", VOCAB) == 0
    assert documents_of(corpus.out, "train") == documents
    assert len(processor(corpus.out).encode("quick brown fox")) < 9  # learned from them: there is nothing else


def test_a_worker_that_dies_is_noticed(corpus, model, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "text_digest", lambda text: os.kill(os.getpid(), signal.SIGKILL))
    code = run_text(corpus.train, corpus.val, corpus.out, "--tokenizer", model)
    assert_refused(capsys, code, "was killed")
    assert not list(corpus.out.parent.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_one_line_and_nothing_else(corpus, model, number):
    jsonl(corpus.train, plain_documents(80) * 2000)
    command = [sys.executable, SCRIPT, "text", "--train", corpus.train, "--val", corpus.val]
    command += ["--tokenizer", model, "--out", corpus.out]

    def listen():  # a job in the background is deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    while process.poll() is None and not list(corpus.out.parent.glob(".made.*/made_train_*.bin")):
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "error: interrupted"
    assert not list(corpus.out.parent.iterdir())


@pytest.mark.slow
def test_the_command_itself_ends_with_one_line_and_code_2(corpus, model):
    command = [sys.executable, SCRIPT, "text", "--train", corpus.val, "--val", corpus.val]
    done = subprocess.run([*command, "--tokenizer", model, "--out", corpus.out], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: 2 training documents are also in validation")


# --- sample -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sample_is_lossless_disjoint_and_repeatable(tmp_path):
    outs = [tmp_path / side / "sample" for side in ("a", "b")]
    for out in outs:
        assert prepare.main(["sample", "--max-bytes", "500000", "--vocab-size", "512", "--out", str(out)]) == 0
    assert files_of(outs[0]) == files_of(outs[1])
    manifest = json.loads((outs[0] / "manifest.json").read_text())
    train, val = prepare.sample_documents(500_000)
    assert documents_of(outs[0], "train") == train and documents_of(outs[0], "val") == val
    assert not {prepare.text_digest(text) for text in train} & {prepare.text_digest(text) for text in val}
    assert 100_000 <= manifest["val_bytes"] <= 200_000 < manifest["train_bytes"] + manifest["val_bytes"] <= 500_000


# --- fineweb, from a hub in memory ------------------------------------------------------------------------------------


class FakeHub:
    """Stands for the huggingface_hub module: files in memory, the first downloads of `corrupt` ones damaged."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.corrupt, self.downloads = files, dict[str, int](), list[str]()

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision, local_dir, force_download):
        assert (repo_id, repo_type, revision) == ("willdepueoai/parameter-golf", "dataset", REVISION)
        path = Path(local_dir) / filename
        if path.is_file() and not force_download:
            return str(path)
        content = self.files[filename]
        if self.corrupt.get(filename, 0) > 0:
            self.corrupt[filename] -= 1
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.downloads.append(filename.removeprefix("datasets/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def HfApi(self):  # noqa: N802
        return SimpleNamespace(get_paths_info=self.get_paths_info, repo_info=self.repo_info)

    def repo_info(self, repo_id, *, repo_type, revision):
        return SimpleNamespace(sha=REVISION)

    def get_paths_info(self, repo_id, paths, *, repo_type, revision):
        assert revision == REVISION
        return [self.info(path, self.files[path]) for path in paths if path in self.files]

    @staticmethod
    def info(path, data):
        """Shards lie in LFS, which knows their sha256; small files in git, which knows its own hash."""
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if path.endswith(".bin") else None
        return SimpleNamespace(path=path, size=len(data), lfs=lfs, blob_id=blob_id)


def shard_bytes(tokens: list[int]) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, dtype="<u2").tobytes()


REVISION = "0123abcd" * 5
SHARD = "datasets/fineweb10B_sp1024/fineweb_{}_00000{}.bin"


@pytest.fixture
def hub(model, monkeypatch) -> FakeHub:
    """A hub with two training shards and one validation shard."""
    listing = {
        "datasets": [
            {"name": "fineweb10B_sp1024", "tokenizer_name": "bpe", "stats": {"files_train": 2, "files_val": 1}}
        ],
        "tokenizers": [{"name": "bpe", "model_path": "tokenizers/fineweb_1024_bpe.model"}],
    }
    files = {
        "manifest.json": json.dumps(listing).encode(),
        "tokenizers/fineweb_1024_bpe.model": model.read_bytes(),
        SHARD.format("val", 0): shard_bytes([1, 300, 301]),
        SHARD.format("train", 0): shard_bytes([1, 300, 1, 302]),
        SHARD.format("train", 1): shard_bytes([303, 1, 304, 305, 306]),
    }
    fake = FakeHub({f"datasets/{path}": content for path, content in files.items()})
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for variable in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"):
        monkeypatch.delenv(variable, raising=False)
    return fake


def run_fineweb(root: Path, train_shards: int, *options: str) -> int:
    return prepare.main(["fineweb", "--train-shards", str(train_shards), "--root", str(root), *options])


def test_fineweb_fresh(hub, model, tmp_path):
    assert run_fineweb(tmp_path, 2) == 0
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    assert tokens_of(folder, "train").tolist() == [1, 300, 1, 302, 303, 1, 304, 305, 306]
    assert (tmp_path / "tokenizers" / "fineweb_1024_bpe.model").read_bytes() == model.read_bytes()
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert json.loads((folder / "manifest.json").read_text()) == {
        "name": "fineweb10B_sp1024",
        "tokenizer_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "vocab_size": VOCAB,
        "train_documents": 3,
        "val_documents": 1,
        "train_tokens": 9,
        "val_tokens": 3,
        "shared_documents": 0,
        "dropped_documents": 0,
        "sources": [f"willdepueoai/parameter-golf@{REVISION}"],
    }
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["fineweb10B_sp1024"]


@pytest.mark.parametrize("drop", [False, True])
def test_fineweb_counts_what_the_published_splits_share_and_drops_it_if_asked(hub, tmp_path, drop):
    hub.files[f"datasets/{SHARD.format('val', 0)}"] = shard_bytes([1, 300, 301, 1, 305])
    hub.files[f"datasets/{SHARD.format('train', 1)}"] = shard_bytes([303, 1, 300, 301, 1, 306])
    assert run_fineweb(tmp_path, 2, *["--drop-shared"] * drop) == 0
    folder = tmp_path / "datasets" / "fineweb10B_sp1024"
    kept = [303, 1, 306] if drop else [303, 1, 300, 301, 1, 306]
    assert tokens_of(folder, "train").tolist() == [1, 300, 1, 302, *kept]
    manifest = json.loads((folder / "manifest.json").read_text())
    counts = manifest["shared_documents"], manifest["dropped_documents"], manifest["train_tokens"]
    assert counts == (0 if drop else 1, 1 if drop else 0, 4 + len(kept))


def test_fineweb_goes_on_where_it_stopped(hub, tmp_path):
    assert run_fineweb(tmp_path, 1) == 0
    hub.downloads.clear()
    assert run_fineweb(tmp_path, 2) == 0
    assert hub.downloads == ["manifest.json", SHARD.format("train", 1)]


def test_fineweb_replaces_a_damaged_local_shard(hub, tmp_path):
    assert run_fineweb(tmp_path, 1) == 0
    local = tmp_path / SHARD.format("train", 0)
    good = local.read_bytes()
    local.write_bytes(good[:-1] + b"\xff")
    assert run_fineweb(tmp_path, 1) == 0
    assert local.read_bytes() == good


def test_fineweb_downloads_a_damaged_file_again_once(hub, tmp_path, capsys):
    remote = SHARD.format("train", 0)
    hub.corrupt[f"datasets/{remote}"] = 1
    assert run_fineweb(tmp_path / "once", 1) == 0
    assert hub.downloads.count(remote) == 2
    hub.corrupt[f"datasets/{remote}"] = 2
    assert_refused(capsys, run_fineweb(tmp_path / "twice", 1), remote, "hash")
    assert not (tmp_path / "twice" / remote).exists()


def test_fineweb_checks_files_that_the_hub_keeps_outside_lfs(hub, tmp_path, capsys):
    hub.corrupt["datasets/tokenizers/fineweb_1024_bpe.model"] = 2
    assert_refused(capsys, run_fineweb(tmp_path, 1), "fineweb_1024_bpe.model", "hash")


def test_fineweb_says_what_there_is(hub, tmp_path, capsys):
    assert_refused(capsys, run_fineweb(tmp_path, 3), "--train-shards 3", "1 to 2")
    code = prepare.main(["fineweb", "--variant", "sp512", "--root", str(tmp_path)])
    assert_refused(capsys, code, "fineweb10B_sp512", "fineweb10B_sp1024")
    hub.files.pop("datasets/" + SHARD.format("val", 0))
    assert_refused(capsys, run_fineweb(tmp_path, 1), "no file", SHARD.format("val", 0))
    hub.files.pop("datasets/manifest.json")
    assert_refused(capsys, run_fineweb(tmp_path, 1), "willdepueoai/parameter-golf")
