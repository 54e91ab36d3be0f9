"""Turn text into the token shards that train_gpt.py reads.

    python data/prepare.py sample                      # Python's own documentation and sources: no download, seconds
    python data/prepare.py text --train a.jsonl.xz --val b.txt --train-tokenizer 1024 --out data/datasets/mine
    python data/prepare.py fineweb --train-shards 80   # the competition's text: 16 GB from the Hugging Face Hub

A data set is one folder that needs nothing else: `*_train_*.bin` and `*_val_*.bin` shards, the `tokenizer.model` that
made them, and a `manifest.json` of counts. A shard is a header of 256 int32 (magic, version, number of tokens, zeros)
and the tokens as uint16, all little-endian. Every document starts with the tokenizer's BOS token.

`sample` and `text` never touch a folder that holds something, and a failed run leaves nothing behind. What cannot be
used ends in one line on stderr, `error: ...`, and exit code 2.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import unicodedata
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece
import xz
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import caseops  # noqa: E402
from train_gpt import (  # noqa: E402
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    InputError,
    read_shard,
    write_atomically,
)

SPLITS = ("train", "val")
UNITS = ("documents", "tokens", "bytes")  # that the manifest counts
MAX_SHARD_TOKENS = 100_000_000
MAX_VOCAB = 1 << 16  # a token is a uint16
BATCH_CHARS = 1 << 20  # of text handed to a worker process at a time
PART_CHARS = 1 << 20  # of a text file that are encoded at a time
ANCHOR = "a"  # a word that stands before a part of a text while it is encoded
HEAD_CHARS = 60  # of a document shown in an error
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space: a text that holds it decodes to a space


class PrepareError(InputError):
    """A text, a tokenizer or a download cannot be used; the message is one line: what, its value, what is allowed."""


# --- Documents: files and the standard library as text. ---------------------------------------------------------------


class Piece(NamedTuple):
    """A document or, of a long one, a part that is encoded on its own."""

    text: str
    begins: bool = True  # a document


@dataclass(frozen=True)
class TextFiles:
    """The documents of some files, in order; can be read again and again. Raises PrepareError while it is read."""

    paths: Sequence[Path]
    label: str  # of the progress bar
    part_chars: int = PART_CHARS  # of a .txt that are a piece, or a few more

    def __iter__(self) -> Iterator[Piece]:
        total = sum(path.stat().st_size for path in self.paths)
        with progress(desc=self.label, total=total, unit="B", unit_scale=True) as bar:
            for path in self.paths:
                before = bar.n
                with path.open("rb") as file:
                    for piece in read_pieces(path, file, self.part_chars):
                        yield piece
                        bar.update(before + file.tell() - bar.n)


PACKED = (".xz", ".gz", ".zst")
KINDS = [kind + packed for kind in (".txt", ".jsonl") for packed in ("", *PACKED)] + [".parquet"]
DAMAGE = (xz.XZError, lzma.LZMAError, zlib.error, EOFError, OSError, UnicodeDecodeError, pyarrow.ArrowException)


def read_pieces(path: Path, file: BinaryIO, part_chars: int) -> Iterator[Piece]:
    """The documents of one of KINDS: a .txt is one, a .jsonl has one a line. Raises PrepareError at what is no text."""
    empty = True
    try:
        if path.suffix == ".parquet":
            pieces = rows_of_parquet(path, file)
        elif (path.with_suffix("") if path.suffix in PACKED else path).suffix == ".txt":
            pieces = parts_of_text(unpacked(path, file), part_chars)
        else:
            lines = ((number, line) for number, line in enumerate(unpacked(path, file), 1) if line.strip())
            pieces = (Piece(parse_line(line, f"{path}:{number}")) for number, line in lines)
        for piece in pieces:
            yield piece
            empty = False
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise PrepareError(f"{path}: {reason}; allowed is UTF-8 text, whole if it is compressed") from None
    if empty:
        raise PrepareError(f"{path}: no documents; allowed is at least one")


class XZStreams(io.RawIOBase):
    """All streams of an .xz file as one, for io.BufferedReader."""

    def __init__(self, file: BinaryIO):
        self.file = xz.open(file, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    """The bytes in a file that may be compressed, of all its streams. Garbage behind a stream is an error."""
    if path.suffix == ".xz":
        return io.BufferedReader(XZStreams(file), 1 << 20)
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return gzip.open(file) if path.suffix == ".gz" else file


def parts_of_text(stream: BinaryIO, part_chars: int) -> Iterator[Piece]:
    """A text in parts of so many characters or more, cut before a single space between words: tokens begin there."""
    reader, rest, begins = io.TextIOWrapper(stream, encoding="utf-8", newline=""), "", True
    while more := reader.read(PART_CHARS):
        known = max(0, len(rest) - 2)  # there is no such space before
        rest += more
        if len(rest) >= part_chars and (last := re.match(r".*\S(?= \S)", rest[known:], re.DOTALL)):
            yield Piece(rest[: known + last.end()], begins)
            rest, begins = rest[known + last.end() :], False
    if rest.strip():
        yield Piece(rest, begins)


def rows_of_parquet(path: Path, file: BinaryIO) -> Iterator[Piece]:
    """The column "text" of a .parquet file. Raises PrepareError if there is none, or no text in a row."""
    table, row = pyarrow.parquet.ParquetFile(file), 0
    if "text" not in table.schema_arrow.names:
        raise PrepareError(
            f'{path}: its columns are {", ".join(table.schema_arrow.names)}; allowed is one named "text"'
        )
    for batch in table.iter_batches(1024, columns=["text"], use_threads=False):
        for text in batch.column("text").to_pylist():
            row += 1
            yield Piece(checked(text, f"{path}, row {row}"))


def parse_line(line: bytes, where: str) -> str:
    """The text of one JSON line. Raises PrepareError, which names `where`, if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{where}: not valid JSON ({error})") from None
    return checked(record.get("text") if isinstance(record, dict) else None, where)


def checked(text: Any, where: str) -> str:
    """The text of a record if it is one. Raises PrepareError, which names `where`."""
    if not isinstance(text, str):
        raise PrepareError(f'{where}: no text; allowed is a string in the field "text"')
    if not text.strip():
        raise PrepareError(f'{where}: the field "text" is empty; allowed is at least one visible character')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise PrepareError(f'{where}: the field "text" holds half a surrogate pair; allowed is what UTF-8 can write')
    return text


def byte_count(text: str) -> int:
    """Length of the text in UTF-8 bytes."""
    return len(text.encode("utf-8"))


def text_digest(text: str) -> bytes:
    """sha256 of the text without what does not tell two documents apart: case, kind and amount of white space, NFKC."""
    return hashlib.sha256(" ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode("utf-8")).digest()


SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
SKIPPED_FOLDERS |= {"encodings"}  # tables so alike that one in training gives away another in validation
SAMPLE_DOCUMENT_MAX_BYTES = 200_000
SAMPLE_VAL_MIN_BYTES, SAMPLE_VAL_MAX_BYTES = 100_000, 200_000


def library_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each documentation topic and each UTF-8 source file of this Python's standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package the documentation apart
        topics = {}
    yield from ((f"Doc/{topic}", text) for topic, text in topics.items())
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts):
            try:
                yield name.as_posix(), path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):  # e.g. a dangling link
                continue


def sample_documents(max_bytes: int) -> tuple[list[str], list[str]]:
    """Training and validation documents of the sample: at most `max_bytes` of text, no document twice."""
    chosen: dict[bytes, str] = {}
    total_bytes = 0
    for _, text in sorted(library_documents()):
        size, digest = byte_count(text), text_digest(text)
        if size > SAMPLE_DOCUMENT_MAX_BYTES or not text.strip() or SPACE_MARK in text or digest in chosen:
            continue
        if total_bytes + size > max_bytes:
            break
        chosen[digest] = text
        total_bytes += size
    held_out = hold_out(chosen, total_bytes // 50)
    train = [text for digest, text in chosen.items() if digest not in held_out]
    return train, [text for digest, text in chosen.items() if digest in held_out]


def hold_out(documents: dict[bytes, str], wanted_bytes: int) -> set[bytes]:
    """The lowest digests, of about as much text as wanted within the limits of the sample's validation text.

    Raises PrepareError if there is not enough text.
    """
    wanted_bytes = max(wanted_bytes, SAMPLE_VAL_MIN_BYTES)
    held_out, val_bytes = set(), 0
    for digest in sorted(documents):
        size = byte_count(documents[digest])
        if val_bytes < wanted_bytes and val_bytes + size <= SAMPLE_VAL_MAX_BYTES:
            held_out.add(digest)
            val_bytes += size
    if val_bytes < SAMPLE_VAL_MIN_BYTES:
        library = sysconfig.get_path("stdlib")
        raise PrepareError(f"{library}: {val_bytes} bytes for validation; a sample takes {SAMPLE_VAL_MIN_BYTES}")
    return held_out


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: Iterable[str], vocab_size: int, marks_case: bool = False) -> bytes:
    """A SentencePiece BPE model of exactly `vocab_size` pieces whose decoder gives back the encoded text unchanged.

    Documents are whole sentences to SentencePiece, so that line breaks can become part of pieces. Runs of spaces are
    pieces too: indentation would otherwise cost a token a space. With `marks_case`, capital letters are marks of their
    own (caseops.py). Raises PrepareError if the text is too small.
    """
    documents = map(caseops.mark, documents) if marks_case else documents
    # SentencePiece leaves out a sentence that holds U+2585, its own mark, without a word.
    sentences = [part for text in documents for part in text.split("\u2585") if part]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            required_chars=SPACE_MARK,  # which a text without spaces lacks
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=list(caseops.MARKS) if marks_case else [],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # bytes; longer documents would be left out in silence
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise PrepareError(f"a tokenizer of {vocab_size} pieces: {reason}") from None
    return model.getvalue()


def load_tokenizer(model: bytes, where: str | Path = "tokenizer") -> sentencepiece.SentencePieceProcessor:
    """The tokenizer of a serialized model.

    Raises PrepareError, which names `where`, if it cannot write every text as uint16 tokens after a BOS.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        size = processor.vocab_size() if model else 0
    except RuntimeError:
        size = 0
    if not size:
        raise PrepareError(f"{where}: its {len(model)} bytes are no SentencePiece model")
    if size > MAX_VOCAB:
        raise PrepareError(f"{where}: {size} pieces; allowed are {MAX_VOCAB}, the values of a uint16")
    if processor.bos_id() < 0:
        raise PrepareError(f"{where}: BOS id {processor.bos_id()}; allowed is one with a BOS token")
    n_byte_pieces = sum(map(processor.is_byte, range(size)))
    if n_byte_pieces != 256:
        raise PrepareError(f"{where}: {n_byte_pieces} byte pieces; allowed is one with byte fallback, that is 256")
    return processor


def splits_at_spaces(model: bytes) -> bool:
    """Whether no token reaches over a space between words, so that a text may be encoded in parts."""
    encode = load_tokenizer(model).encode
    return encode(f"{ANCHOR} {ANCHOR}")[: len(encode(ANCHOR))] == encode(ANCHOR)


def first_bytes(pieces: Iterable[Piece], limit_bytes: int) -> Iterator[str]:
    """The pieces that start in the first `limit_bytes` of the text."""
    start_bytes = 0
    for text, _ in pieces:
        if start_bytes >= limit_bytes:
            return
        yield text
        start_bytes += byte_count(text)


# --- Encoding, on all cores, in order ---------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """An encoded piece."""

    tokens: np.ndarray  # [n] uint16, a BOS first if a document begins
    text_bytes: int  # UTF-8 bytes of the text as the tokenizer decodes it
    head: str  # its first characters
    digest: bytes | None  # of what the tokenizer leaves of a document; a long one is known by its first part


worker = SimpleNamespace(tokenizer=None, lossless=False)  # what a worker process needs besides its batch


def start_worker(model: bytes, lossless: bool) -> None:
    """Load the tokenizer once in each worker process, and leave Ctrl-C to the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    worker.tokenizer, worker.lossless = load_tokenizer(model), lossless


def encode_batch(pieces: list[Piece]) -> list[Encoded]:
    """Encode some pieces. Raises PrepareError if the tokenizer should be lossless and is not."""
    found = []
    for text, begins in pieces:
        # A tokenizer may drop or add a space at the start of a text, and so stands a word before what is none.
        before = "" if begins else ANCHOR
        ids = caseops.encode(worker.tokenizer, before + text)
        decoded = caseops.decode(worker.tokenizer, ids)[len(before) :]
        if worker.lossless and decoded != text:
            raise PrepareError(
                f"document {text[:HEAD_CHARS]!r}: the tokenizer does not decode it to the same text; "
                f"allowed are documents without U+2581, which SentencePiece takes for a space"
            )
        n_before = len(worker.tokenizer.encode(before))
        tokens = np.array([worker.tokenizer.bos_id()] * begins + ids[n_before:], dtype="<u2")
        digest = text_digest(decoded) if begins else None
        found.append(Encoded(tokens, byte_count(decoded), text[:HEAD_CHARS], digest))
    return found


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Lists of consecutive pieces, each list just over BATCH_CHARS of text."""
    batch, batch_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        batch_chars += len(piece.text)
        if batch_chars >= BATCH_CHARS:
            yield batch
            batch, batch_chars = [], 0
    if batch:
        yield batch


@contextmanager
def worker_pool(model: bytes, lossless: bool) -> Iterator[ProcessPoolExecutor]:
    """A process a core that encodes. Raises PrepareError if one of them dies."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(os.cpu_count(), context, start_worker, (model, lossless))
    try:
        yield pool
    except BrokenProcessPool:
        raise PrepareError("a process that encodes was killed, perhaps for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(pool: ProcessPoolExecutor, pieces: Iterable[Piece]) -> Iterator[list[Encoded]]:
    """Encoded batches in the order of the pieces. A few of them wait for the slowest."""
    waiting: deque = deque()
    for batch in in_batches(pieces):
        waiting.append(pool.submit(encode_batch, batch))
        if len(waiting) > 2 * os.cpu_count():
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def progress(items: Iterable | None = None, **options: Any) -> tqdm:
    """A progress bar, with few updates where they would fill a log file."""
    return tqdm(items, mininterval=0.5 if sys.stderr.isatty() else 30, **options)


@dataclass
class SplitWriter:
    """Writes one split, `train` or `val`, as shards of `shard_tokens`, and counts what it writes.

    A document may go on in the next shard.
    """

    prefix: str  # of the paths of the shards
    shard_tokens: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def write(self, batch: list[Encoded]) -> None:
        """Append a batch to the split."""
        rest = np.concatenate([np.empty(0, dtype="<u2"), *(piece.tokens for piece in batch)])
        while len(rest):
            shard, used_tokens = divmod(self.tokens, self.shard_tokens)
            part, rest = np.split(rest, [self.shard_tokens - used_tokens])
            append_to_shard(Path(f"{self.prefix}_{shard:06d}.bin"), used_tokens, part)
            self.tokens += len(part)
        self.documents += sum(piece.digest is not None for piece in batch)
        self.bytes += sum(piece.text_bytes for piece in batch)


def shard_header(n_tokens: int) -> bytes:
    """The head of a shard."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, n_tokens
    return header.tobytes()


def append_to_shard(path: Path, used_tokens: int, tokens: np.ndarray) -> None:
    """Append uint16 tokens [n] to the shard of `used_tokens` tokens, which is a whole shard again afterwards."""
    with path.open("r+b" if used_tokens else "xb") as file:
        file.write(shard_header(used_tokens + len(tokens)))
        file.seek(0, os.SEEK_END)
        file.write(tokens.tobytes())


# --- Data sets: a folder that is there whole or not at all ------------------------------------------------------------


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well and vanishes when it does not."""
    if re.search("_(train|val)_", f"{out.name}_"):
        raise PrepareError(f"--out {out}: shards are told apart by _train_ and _val_; allowed is a name without them")
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise PrepareError(f"--out {out}: it is there already; allowed is a new or empty folder")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, name: str, model: bytes, counts: dict[str, int], sources: list[str]) -> None:
    """Write the tokenizer and then, last of all files, the manifest; print what the data set holds."""
    write_atomically(folder / "tokenizer.model", model)
    manifest = {
        "name": name,
        "tokenizer_sha256": hashlib.sha256(model).hexdigest(),
        "vocab_size": load_tokenizer(model).vocab_size(),
        **counts,
        "sources": sources,
    }
    write_atomically(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    for split in SPLITS:
        print(f"{split}: {counts[f'{split}_tokens']:,} tokens of {counts[f'{split}_documents']:,} documents")
    for state in ("shared", "dropped"):
        if n := counts[f"{state}_documents"]:
            print(f"{n:,} training documents are also in validation: {state}")


@dataclass(frozen=True)
class Corpus:
    """Text to be made a data set. `lossless` says that the tokenizer must decode every document to itself."""

    train: Iterable[Piece]
    val: Iterable[Piece]
    sources: list[str]
    lossless: bool
    drop_shared: bool = False  # training documents that are also in validation; otherwise they are an error


def write_dataset(folder: Path, name: str, corpus: Corpus, model: bytes, shard_tokens: int) -> None:
    """Write a data set into an empty folder. Raises PrepareError if the splits share a document, or one holds none."""
    held_out: set[bytes] = set()
    shared: list[str] = []
    writers = {split: SplitWriter(str(folder / f"{name}_{split}"), shard_tokens) for split in SPLITS}
    with worker_pool(model, corpus.lossless) as pool:
        for batch in encoded(pool, corpus.val):
            writers["val"].write(batch)
            held_out.update(piece.digest for piece in batch if piece.digest)
        for batch in without_shared(encoded(pool, corpus.train), held_out, shared):
            writers["train"].write(batch)
    if shared and not corpus.drop_shared:
        found = f"{len(shared)} training documents are also in validation, the first is {shared[0]!r}"
        raise PrepareError(f"{found}; allowed are none: --drop-shared leaves them out")
    counts = {f"{split}_{unit}": getattr(writers[split], unit) for unit in UNITS for split in SPLITS}
    counts |= dict(shared_documents=0, dropped_documents=len(shared))
    for split in SPLITS:
        if getattr(corpus, split) and not writers[split].bytes:
            raise PrepareError(f"the tokenizer leaves no byte of the {split} text; allowed is one or more")
    write_manifest(folder, name, model, counts, corpus.sources)


def without_shared(batches: Iterable[list[Encoded]], held_out: set[bytes], heads: list[str]) -> Iterator[list[Encoded]]:
    """The batches without documents that are held out. The heads of these are appended to `heads`."""
    dropping = False  # until the next document begins
    for batch in batches:
        kept = []
        for piece in batch:
            if piece.digest:
                dropping = piece.digest in held_out
                heads += [piece.head] * dropping
            kept += [piece] * (not dropping)
        yield kept


def make_sample(args: argparse.Namespace) -> None:
    """The `sample` command."""
    out = args.out.resolve()
    with new_folder(out) as folder:
        train, val = sample_documents(args.max_bytes)
        print(f"training a tokenizer of {args.vocab_size} pieces on {len(train)} documents")
        model = train_tokenizer(train, args.vocab_size)
        source = f"standard library of Python {platform.python_version()}"
        splits = ((train, "train"), (val, "val"))
        train, val = (progress(list(map(Piece, texts)), desc=label) for texts, label in splits)
        corpus = Corpus(train, val, [source], lossless=True)
        write_dataset(folder, out.name, corpus, model, MAX_SHARD_TOKENS)


def make_text(args: argparse.Namespace) -> None:
    """The `text` command."""
    out = args.out.resolve()
    with new_folder(out) as folder:
        train = TextFiles(args.train, "train")
        if not (args.train or args.tokenizer):
            raise PrepareError("--train: no file; allowed is none with --tokenizer, for text that is only scored")
        if args.caseops and args.tokenizer:
            found = f"--caseops with --tokenizer {args.tokenizer}"
            raise PrepareError(f"{found}: allowed is --train-tokenizer; a tokenizer that has marks uses them")
        if args.tokenizer:
            model = args.tokenizer.read_bytes()
            load_tokenizer(model, args.tokenizer)
        else:
            print(f"training a tokenizer of {args.train_tokenizer} pieces")
            texts = first_bytes(train, args.tokenizer_bytes)
            model = train_tokenizer(texts, args.train_tokenizer, args.caseops)
        names = [path.name for path in (*args.train, *args.val)]
        part_chars = PART_CHARS if splits_at_spaces(model) else sys.maxsize
        splits = ((args.train, "train"), (args.val, "val"))
        splits = (TextFiles(paths, label, part_chars) if paths else [] for paths, label in splits)
        corpus = Corpus(*splits, names, not args.tokenizer, args.drop_shared)
        write_dataset(folder, out.name, corpus, model, args.shard_tokens)


# --- FineWeb: the published shards ------------------------------------------------------------------------------------

DEFAULT_REPO = "willdepueoai/parameter-golf"
OTHER_REPOS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf"}


class Hub:
    """Downloads from one data set repository of the Hugging Face Hub; unfinished ones go on from `staging` later."""

    def __init__(self, repo: str, staging: Path):
        try:
            import huggingface_hub
        except ImportError:
            raise PrepareError("huggingface_hub is not installed; pip install huggingface_hub") from None
        self.library, self.repo, self.staging, self.revision = huggingface_hub, repo, staging, None
        self.revision = self.ask(huggingface_hub.HfApi().repo_info).sha  # the same for all files

    def ask(self, function: Callable, *args: Any, **options: Any) -> Any:
        """Call the library. Its exceptions differ from version to version, so any of them becomes a PrepareError."""
        try:
            return function(self.repo, *args, repo_type="dataset", revision=self.revision, **options)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PrepareError(f"Hugging Face data set {self.repo}: {reason}") from error

    def download(self, remote: str, force: bool = False) -> Path:
        """A file of the repository in `staging`, not verified."""
        download = self.library.hf_hub_download
        return Path(self.ask(download, remote, local_dir=str(self.staging), force_download=force))

    def fetch(self, remote: str, local: Path, published: Any) -> None:
        """Bring a file to its local path unless it is there. Raises PrepareError if it is not the published one."""
        if is_intact(local, published):
            return
        for force in (False, True):
            path = self.download(remote, force)
            if is_intact(path, published):
                local.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, local)
                return
        raise PrepareError(f"{remote}: downloaded twice, and size or hash still differ from those of {self.repo}")

    def fetch_all(self, files: dict[str, Path]) -> None:
        """Bring remote files to their local paths. Raises PrepareError if one is missing there or not as published."""
        published = {info.path: info for info in self.ask(self.library.HfApi().get_paths_info, list(files))}
        for remote, local in progress(files.items(), desc="files", unit="file"):
            if remote not in published:
                raise PrepareError(f"Hugging Face data set {self.repo}: no file {remote}")
            self.fetch(remote, local, published[remote])


def is_intact(path: Path, published: Any) -> bool:
    """Whether the file has the published size and hash: sha256, or git's own for small files."""
    if not path.is_file() or path.stat().st_size != published.size:
        return False
    if not published.lfs:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == published.blob_id
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == published.lfs.sha256


def read_listing(path: Path, name: str) -> tuple[dict[str, int], str]:
    """Shards of each split and the tokenizer's path of a data set in the published manifest, or PrepareError."""
    try:
        listing = json.loads(path.read_bytes())
        datasets = {entry["name"]: entry for entry in listing["datasets"]}
        if name not in datasets:
            raise PrepareError(f"data set {name} is not published there; allowed are {', '.join(sorted(datasets))}")
        stats, tokenizer = datasets[name]["stats"], datasets[name]["tokenizer_name"]
        models = {entry["name"]: entry["model_path"] for entry in listing["tokenizers"]}
        return {split: int(stats[f"files_{split}"]) for split in SPLITS}, models[tokenizer]
    except (KeyError, TypeError, ValueError) as error:
        raise PrepareError(f"{path.name} of the Hub is not as expected: {error!r}") from None


def count_shards(folder: Path, bos_id: int) -> dict[str, int]:
    """Documents and tokens of each split's shards, named as in the manifest. Raises InputError if one is no shard."""
    shards = {split: [read_shard(path) for path in folder.glob(f"fineweb_{split}_*.bin")] for split in SPLITS}
    documents = {f"{s}_documents": sum(int(np.count_nonzero(x == bos_id)) for x in shards[s]) for s in SPLITS}
    return documents | {f"{s}_tokens": sum(map(len, shards[s])) for s in SPLITS}


def document_digests(tokens: np.ndarray, bos_id: int) -> Iterator[tuple[slice, bytes]]:
    """Where each document that begins in a shard stands there, and a digest of its tokens as far as the shard goes."""
    starts = np.flatnonzero(tokens == bos_id).tolist()
    for start, stop in itertools.pairwise([*starts, len(tokens)]):
        yield slice(start, stop), hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()


def share_documents(folder: Path, bos_id: int, drop: bool) -> dict[str, int]:
    """Count the training documents that are also in validation, for the manifest, and leave them out if asked to."""
    val, train = ([path for path in sorted(folder.glob(f"fineweb_{split}_*.bin"))] for split in ("val", "train"))
    held_out = {digest for path in val for _, digest in document_digests(read_shard(path), bos_id)}
    n_shared = 0
    for path in progress(train, desc="shared documents", unit="shard"):
        tokens = read_shard(path)
        shared = [place for place, digest in document_digests(tokens, bos_id) if digest in held_out]
        n_shared += len(shared)
        if shared and drop:
            kept = np.delete(tokens, np.concatenate([np.arange(place.start, place.stop) for place in shared]))
            write_atomically(path, shard_header(len(kept)) + kept.tobytes())
    return dict(shared_documents=0 if drop else n_shared, dropped_documents=n_shared if drop else 0)


def make_fineweb(args: argparse.Namespace) -> None:
    """The `fineweb` command."""
    name = f"fineweb10B_{args.variant}"
    folder = args.root.resolve() / "datasets" / name
    repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", OTHER_REPOS.get(args.variant, DEFAULT_REPO))
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
    prefix = f"{prefix}/" if prefix else ""
    hub = Hub(repo, folder.parent / ".download")
    available, model_path = read_listing(hub.download(f"{prefix}manifest.json"), name)
    if args.train_shards > available["train"]:
        raise PrepareError(f"--train-shards {args.train_shards}: allowed are 1 to {available['train']}, all there are")
    local_model = args.root.resolve() / "tokenizers" / Path(model_path).name
    files = {f"{prefix}{model_path}": local_model}
    for split, n_shards in (("val", available["val"]), ("train", args.train_shards)):
        for shard in (f"fineweb_{split}_{i:06d}.bin" for i in range(n_shards)):
            files[f"{prefix}datasets/{name}/{shard}"] = folder / shard
    hub.fetch_all(files)
    shutil.rmtree(hub.staging, ignore_errors=True)
    model = local_model.read_bytes()
    bos_id = load_tokenizer(model, local_model).bos_id()
    shared = share_documents(folder, bos_id, args.drop_shared)
    write_manifest(folder, name, model, count_shards(folder, bos_id) | shared, [f"{repo}@{hub.revision}"])


# --- Command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are the one line that all errors are."""

    def error(self, message: str) -> None:
        raise PrepareError(message)


def number(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`, both included."""

    def parse(value: str) -> int:
        if not value.isdecimal() or int(value) < low or high is not None and int(value) > high:
            raise argparse.ArgumentTypeError(f"{value}; allowed is {low} {'or more' if high is None else f'to {high}'}")
        return int(value)

    return parse


def file_path(*suffixes: str) -> Callable[[str], Path]:
    """An argparse type: a file that exists and whose name ends in one of the suffixes, if any are given."""

    def parse(value: str) -> Path:
        if not Path(value).is_file():
            raise argparse.ArgumentTypeError(f"{value}: no such file")
        if suffixes and not value.endswith(suffixes):
            raise argparse.ArgumentTypeError(f"{value}: allowed are {', '.join(suffixes)}")
        return Path(value)

    return parse


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    vocab, text = number(300, MAX_VOCAB), file_path(*KINDS)
    dropping = dict(action="store_true", help="leave out the training documents that are also in validation")

    sample = commands.add_parser("sample", help="a data set from the Python standard library")
    sample.set_defaults(run=make_sample)
    sample.add_argument("--out", type=Path, default=Path("data/datasets/sample"), help="new folder [%(default)s]")
    sample.add_argument("--vocab-size", type=vocab, default=1024, help="pieces of the tokenizer [%(default)s]")
    sample.add_argument("--max-bytes", type=number(300_000), default=8_000_000, help="of text [%(default)s]")

    files = commands.add_parser("text", help="a data set from .txt, .jsonl (also .xz, .gz, .zst) and .parquet files")
    files.set_defaults(run=make_text)
    files.add_argument("--train", type=text, nargs="+", default=[], metavar="FILE",
                       help="training documents; none, with --tokenizer, for text that is only scored")  # fmt: skip
    files.add_argument("--val", type=text, nargs="+", required=True, metavar="FILE", help="validation documents")
    tokenizer = files.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=file_path(), metavar="MODEL", help="SentencePiece model to encode with")
    tokenizer.add_argument("--train-tokenizer", type=vocab, metavar="VOCAB", help="or train one of this many pieces")
    files.add_argument("--tokenizer-bytes", type=number(1), default=20_000_000, metavar="N",
                       help="of training text that the new tokenizer is trained on [%(default)s]")  # fmt: skip
    files.add_argument("--caseops", action="store_true",
                       help="with --train-tokenizer: write capital letters as marks before small ones")  # fmt: skip
    files.add_argument("--drop-shared", **dropping)
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    files.add_argument("--shard-tokens", type=number(1, MAX_SHARD_TOKENS), default=MAX_SHARD_TOKENS, metavar="N",
                       help="tokens of a full shard [%(default)s]")  # fmt: skip

    fineweb = commands.add_parser("fineweb", help="the competition's FineWeb export from the Hugging Face Hub",
                                  description="MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX in the "
                                              "environment name another place to download from.")  # fmt: skip
    fineweb.set_defaults(run=make_fineweb)
    fineweb.add_argument("--variant", default="sp1024", help="tokenizer of the export, e.g. sp8192 [%(default)s]")
    fineweb.add_argument("--train-shards", type=number(1), default=80, help="of 200 MB each [%(default)s]")
    fineweb.add_argument("--drop-shared", **dropping)
    fineweb.add_argument("--root", type=Path, default=Path("data"), help="folder of datasets/ and tokenizers/ [data]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr, or 130 if a signal ended it."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
