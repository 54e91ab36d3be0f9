"""Write capital letters as marks before small ones, so that a tokenizer has one piece for "the", "The" and "THE".

" The USA's McDonald" becomes "^ the* usa's^ mc^donald", with ^ for TITLE and * for UPPER: a mark stands before the word
and before the space in front of it, since that is where a piece begins. Every text comes back as it was, by a tokenizer
that normalizes nothing (PR #1729 has the idea, with marks behind the space). One that data/prepare.py trains with
--caseops has the marks as symbols.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import CASE_MARKS, case_marks

# TITLE makes the next ASCII letter a capital, UPPER all of the next word. LITERAL and a digit stand for a mark that the
# text itself holds: with 2 and 1 bytes, they count its three.
TITLE, UPPER, LITERAL = MARKS = tuple(CASE_MARKS)


def mark(text: str) -> str:
    """Return the text in small letters and marks. Cut before the space between two words, its parts give the same."""
    text = re.sub(f"[{TITLE}{UPPER}{LITERAL}]", lambda found: f"{LITERAL}{MARKS.index(found[0])}", text)
    text = re.sub(" ?(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])", lambda found: UPPER + found[0].lower(), text)
    return re.sub(" ?[A-Z]", lambda found: TITLE + found[0].lower(), text)


def unmark(text: str) -> str:
    """Return the text that `mark` was given. Of one that was cut short, a mark at the end says nothing."""
    text = re.sub(f"{UPPER}( ?[a-z]*)", lambda found: found[1].upper(), text)
    text = re.sub(f"{TITLE}( ?[a-z]?)", lambda found: found[1].upper(), text)
    # A text that is cut behind a LITERAL ends in a character of two bytes: as many as were counted.
    return re.sub(f"{LITERAL}([012]?)", lambda found: MARKS[int(found[1])] if found[1] else "\x80", text)


def encode(sp: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """Return the token ids of a text, marked if the tokenizer has marks."""
    return sp.encode(mark(text) if case_marks(sp) else text)


def decode(sp: sentencepiece.SentencePieceProcessor, ids: Sequence[int]) -> str:
    """Return the text of token ids."""
    text = sp.decode(list(ids))
    return unmark(text) if case_marks(sp) else text
