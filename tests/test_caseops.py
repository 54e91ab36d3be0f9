"""data/caseops.py: every text comes back, in whatever parts it is written, and each token's bytes are those it adds."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import caseops  # noqa: E402
import prepare  # noqa: E402
from train_gpt import CASE_MARKS, Config, Stream, Tokenizer, case_marks, read_shard  # noqa: E402

TITLE, UPPER, LITERAL = caseops.MARKS
SAMPLES = [
    " The USA's McDonald owns an iPhone, HTMLParser and A B  C",
    "A",
    "École ÉCOLE USAé éUSA İı ß",
    f"{TITLE}{UPPER}{LITERAL}T {LITERAL} USA{TITLE} {UPPER}0",
    "X-RAY\nThe End.\r\n\tTABS",
]
texts = st.text(st.sampled_from(f"abAB Z01\n.éÉ{TITLE}{UPPER}{LITERAL}"), max_size=40) | st.text(max_size=40)


@pytest.fixture(scope="module")
def sp():
    """A tokenizer of marked text."""
    documents = [*SAMPLES, *(f"Document {i} says: the quick brown FOX jumps over Lazy dogs." for i in range(40))]
    model = prepare.train_tokenizer(documents, 330, marks_case=True)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_marks_stand_before_the_word_and_its_space():
    marked = caseops.mark(SAMPLES[0]).translate({ord(TITLE): "^", ord(UPPER): "*"})
    assert marked == "^ the* usa's^ mc^donald owns an i^phone,^ h^t^m^l^parser and^ a^ b ^ c"


@given(texts)
def test_a_text_comes_back_and_has_no_capital_in_between(text):
    marked = caseops.mark(text)
    assert caseops.unmark(marked) == text and not re.search("[A-Z]", marked)


@given(texts)
def test_parts_that_begin_at_a_space_between_words_are_marked_as_the_whole_is(text):
    for space in re.finditer(r"(?<=\S) (?=\S)", text):
        assert caseops.mark(text[: space.start()]) + caseops.mark(text[space.start() :]) == caseops.mark(text)


@given(texts.filter(lambda text: "\u2581" not in text and "\u2585" not in text and "\x00" not in text))
def test_each_token_adds_its_bytes_to_the_decoded_text(sp, text):
    """Wherever the text is cut behind a whole character."""
    data = Tokenizer.__new__(Tokenizer)
    ids = caseops.encode(sp, text)
    assert caseops.decode(sp, ids) == text
    data.sp, data.case_marks = sp, CASE_MARKS
    added = [data.added_bytes(token, at_start=i == 0) for i, token in enumerate(ids)]
    assert sum(added) == len(text.encode())
    for n, total in enumerate(itertools.accumulate(added), 1):
        if n == len(ids) or not sp.is_byte(ids[n]):
            assert len(caseops.decode(sp, ids[:n]).encode()) == total


def test_a_tokenizer_without_all_marks_is_left_alone(tiny_tokenizer):
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    text = f"The {TITLE} END"
    assert not case_marks(plain) and caseops.encode(plain, text) == plain.encode(text)
    assert caseops.decode(plain, plain.encode(text)) == text


def test_letters_that_look_like_marks_are_letters():
    lines = [f"Menu {TITLE}Home {UPPER}Settings {LITERAL}Call number {i} of The HOTEL" for i in range(300)]
    sp = sentencepiece.SentencePieceProcessor(model_proto=prepare.train_tokenizer(lines, 350))
    assert all(sp.piece_to_id(mark) != sp.unk_id() for mark in CASE_MARKS) and not case_marks(sp)
    assert caseops.decode(sp, caseops.encode(sp, lines[0])) == lines[0]


def test_a_data_set_in_marks_counts_the_bytes_of_the_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "PART_CHARS", 60)
    train, val = tmp_path / "train.txt", tmp_path / "val.txt"
    train.write_text("The quick brown FOX jumps over Lazy McDogs and iPhones. " * 40)
    val.write_bytes("\n".join(SAMPLES).encode())
    out = tmp_path / "made"
    files = [str(x) for x in ("text", "--train", train, "--val", val, "--out", out)]
    assert prepare.main([*files, "--train-tokenizer", "300", "--caseops"]) == 0
    c = Config(data_path=str(out), vocab_size=300, eval_seq_len=8, eval_stride=8)
    tokenizer = Tokenizer(c)
    stream = Stream(c, "cpu", tokenizer)
    assert stream.whole and stream.has_manifest and int(stream.token_bytes.sum()) == len(val.read_bytes())
    tokens = np.array(read_shard(out / "made_val_000000.bin"))
    assert caseops.decode(tokenizer.sp, tokens[1:].tolist()).encode() == val.read_bytes()
    again = [*files[:-1], str(tmp_path / "again"), "--tokenizer", str(out / "tokenizer.model")]
    assert prepare.main(again) == 0
    assert np.array_equal(tokens, read_shard(tmp_path / "again" / "again_val_000000.bin"))
    assert prepare.main([*again[:-3], str(tmp_path / "no"), *again[-2:], "--caseops"]) == 2
    assert "--caseops with --tokenizer" in capsys.readouterr().err
