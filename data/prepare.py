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
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
BATCH_BYTES = 1 << 20  # of text handed to a worker process at a time
HEAD_CHARS = 60  # of a document shown in an error
SPACE_MARK = "\u2581"  # SentencePiece's own sign for a space: a text that holds it decodes to a space


class PrepareError(InputError):
    """A text, a tokenizer or a download cannot be used; the message is one line: what, its value, what is allowed."""


# --- Documents: files and the standard library as text. ---------------------------------------------------------------


@dataclass(frozen=True)
class TextFiles:
    """The documents of some files, in order; can be read again and again. Raises PrepareError while it is read."""

    paths: Sequence[Path]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(map(read_documents, self.paths))


def read_documents(path: Path) -> Iterator[str]:
    """Documents of a .txt (one) or .jsonl (one a line), either also as .xz. Raises PrepareError at what is no text."""
    is_text = path.name.removesuffix(".xz").endswith(".txt")
    count = 0
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as stream:
            for number, line in enumerate([stream.read()] if is_text else stream, 1):
                if line.strip():
                    yield line.decode() if is_text else parse_line(line, f"{path}:{number}")
                    count += 1
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise PrepareError(f"{path}: {error}; allowed is UTF-8 text, whole if it is xz-compressed") from None
    if not count:
        raise PrepareError(f"{path}: no documents; allowed is at least one")


def parse_line(line: bytes, where: str) -> str:
    """The text of one JSON line. Raises PrepareError, which names `where`, if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PrepareError(f"{where}: not valid JSON ({error})") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise PrepareError(f'{where}: no text; allowed is an object with a string in its field "text"')
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


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model of exactly `vocab_size` pieces whose decoder gives back the encoded text unchanged.

    Documents are whole sentences to SentencePiece, so that line breaks can become part of pieces. Runs of spaces are
    pieces too: indentation would otherwise cost a token a space. Raises PrepareError if the text is too small.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
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
        raise PrepareError(f"a tokenizer of {vocab_size} pieces: {str(error).rpartition('] ')[2]}") from None
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


def first_bytes(documents: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """The documents that start in the first `limit_bytes` of the text."""
    start_bytes = 0
    for text in documents:
        if start_bytes >= limit_bytes:
            return
        yield text
        start_bytes += byte_count(text)


# --- Encoding, on all cores, in order ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Some encoded documents."""

    tokens: np.ndarray  # [n] uint16, a BOS before each document
    text_bytes: int  # UTF-8 bytes of the documents as the tokenizer decodes them
    digests: list[bytes]  # text_digest of each document
    heads: list[str]  # the first characters of each document


worker = SimpleNamespace(tokenizer=None, lossless=False)  # what a worker process needs besides its batch


def start_worker(model: bytes, lossless: bool) -> None:
    """Load the tokenizer once in each worker process."""
    worker.tokenizer, worker.lossless = load_tokenizer(model), lossless


def encode_batch(texts: list[str]) -> Batch:
    """Encode documents. Raises PrepareError if the tokenizer should be lossless and is not."""
    tokens: list[int] = []
    text_bytes = 0
    for text in texts:
        ids = worker.tokenizer.encode(text)
        decoded = worker.tokenizer.decode(ids)
        if worker.lossless and decoded != text:
            raise PrepareError(
                f"document {text[:HEAD_CHARS]!r}: the tokenizer does not decode it to the same text; "
                f"allowed are documents without U+2581, which SentencePiece takes for a space"
            )
        tokens += [worker.tokenizer.bos_id(), *ids]
        text_bytes += byte_count(decoded)
    heads = [text[:HEAD_CHARS] for text in texts]
    return Batch(np.array(tokens, dtype="<u2"), text_bytes, list(map(text_digest, texts)), heads)


def in_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of consecutive documents, each list just over BATCH_BYTES of text."""
    batch, batch_bytes = [], 0
    for text in documents:
        batch.append(text)
        batch_bytes += len(text)
        if batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


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

    def write(self, batch: Batch) -> None:
        """Append a batch to the split."""
        rest = batch.tokens
        while len(rest):
            shard, used_tokens = divmod(self.tokens, self.shard_tokens)
            part, rest = np.split(rest, [self.shard_tokens - used_tokens])
            append_to_shard(Path(f"{self.prefix}_{shard:06d}.bin"), used_tokens, part)
            self.tokens += len(part)
        self.documents += len(batch.digests)
        self.bytes += batch.text_bytes


def append_to_shard(path: Path, used_tokens: int, tokens: np.ndarray) -> None:
    """Append uint16 tokens [n] to the shard of `used_tokens` tokens, which is a whole shard again afterwards."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, used_tokens + len(tokens)
    with path.open("r+b" if used_tokens else "xb") as file:
        file.write(header.tobytes())
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


@dataclass(frozen=True)
class Corpus:
    """Text to be made a data set. `lossless` says that the tokenizer must decode every document to itself."""

    train: Iterable[str]
    val: Iterable[str]
    sources: list[str]
    lossless: bool


def write_dataset(folder: Path, name: str, corpus: Corpus, model: bytes, shard_tokens: int) -> None:
    """Write a data set into an empty folder. Raises PrepareError if a training document is also in validation."""
    held_out: set[bytes] = set()
    overlap: list[str] = []
    writers = {split: SplitWriter(str(folder / f"{name}_{split}"), shard_tokens) for split in SPLITS}
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), start_worker, (model, corpus.lossless)) as pool:
        for batch in encoded(pool, corpus.val, "val"):
            writers["val"].write(batch)
            held_out.update(batch.digests)
        for batch in encoded(pool, corpus.train, "train"):
            writers["train"].write(batch)
            overlap += [head for digest, head in zip(batch.digests, batch.heads, strict=True) if digest in held_out]
    if overlap:
        raise PrepareError(
            f"{len(overlap)} training documents are also in validation, the first is {overlap[0]!r}; allowed are none"
        )
    counts = {f"{split}_{unit}": getattr(writers[split], unit) for unit in UNITS for split in SPLITS}
    write_manifest(folder, name, model, counts, corpus.sources)


def encoded(pool: Pool, documents: Iterable[str], split: str) -> Iterator[Batch]:
    """Batches of encoded documents in the order of the documents, under a progress bar of text bytes."""
    with progress(desc=split, unit="B", unit_scale=True) as bar:
        for batch in pool.imap(encode_batch, in_batches(documents)):
            yield batch
            bar.update(batch.text_bytes)


def make_sample(args: argparse.Namespace) -> None:
    """The `sample` command."""
    out = args.out.resolve()
    with new_folder(out) as folder:
        train, val = sample_documents(args.max_bytes)
        print(f"training a tokenizer of {args.vocab_size} pieces on {len(train)} documents")
        model = train_tokenizer(train, args.vocab_size)
        corpus = Corpus(train, val, [f"standard library of Python {platform.python_version()}"], lossless=True)
        write_dataset(folder, out.name, corpus, model, MAX_SHARD_TOKENS)


def make_text(args: argparse.Namespace) -> None:
    """The `text` command."""
    out = args.out.resolve()
    with new_folder(out) as folder:
        train = TextFiles(args.train)
        if args.tokenizer:
            model = args.tokenizer.read_bytes()
            load_tokenizer(model, args.tokenizer)  # here, as a worker that fails to start is started again for ever
        else:
            print(f"training a tokenizer of {args.train_tokenizer} pieces")
            model = train_tokenizer(first_bytes(train, args.tokenizer_bytes), args.train_tokenizer)
        names = [path.name for path in (*args.train, *args.val)]
        corpus = Corpus(train, TextFiles(args.val), names, lossless=not args.tokenizer)
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
        self.library, self.repo, self.staging = huggingface_hub, repo, staging

    def ask(self, function: Callable, *args: Any, **options: Any) -> Any:
        """Call the library. Its exceptions differ from version to version, so any of them becomes a PrepareError."""
        try:
            return function(self.repo, *args, repo_type="dataset", **options)
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
        raise PrepareError(f"{remote}: downloaded twice, and size or sha256 still differ from those of {self.repo}")

    def fetch_all(self, files: dict[str, Path]) -> None:
        """Bring remote files to their local paths. Raises PrepareError if one is missing there or not as published."""
        published = {info.path: info for info in self.ask(self.library.HfApi().get_paths_info, list(files))}
        for remote, local in progress(files.items(), desc="files", unit="file"):
            if remote not in published:
                raise PrepareError(f"Hugging Face data set {self.repo}: no file {remote}")
            self.fetch(remote, local, published[remote])


def is_intact(path: Path, published: Any) -> bool:
    """Whether the file has the published size and sha256; small files that the Hub keeps in git have no sha256."""
    if not path.is_file() or path.stat().st_size != published.size:
        return False
    if not published.lfs:
        return True
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


def document_digests(folder: Path, split: str, bos_id: int) -> Iterator[bytes]:
    """A digest of the tokens of each document that lies whole in one of the split's shards."""
    for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
        tokens = read_shard(path)
        starts = np.flatnonzero(tokens == bos_id)
        for start, stop in itertools.pairwise(starts.tolist()):
            yield hashlib.blake2b(tokens[start:stop].tobytes(), digest_size=16).digest()


def check_disjoint(folder: Path, bos_id: int) -> None:
    """Raise PrepareError if a training document of a published export is also in its validation split."""
    held_out = set(document_digests(folder, "val", bos_id))
    shared = sum(digest in held_out for digest in document_digests(folder, "train", bos_id))
    if shared:
        raise PrepareError(f"{folder}: {shared} training documents are also in validation; allowed are none")


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
    check_disjoint(folder, bos_id)
    write_manifest(folder, name, model, count_shards(folder, bos_id), [repo])


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
    vocab, text = number(300, MAX_VOCAB), file_path(".txt", ".jsonl", ".txt.xz", ".jsonl.xz")

    sample = commands.add_parser("sample", help="a data set from the Python standard library")
    sample.set_defaults(run=make_sample)
    sample.add_argument("--out", type=Path, default=Path("data/datasets/sample"), help="new folder [%(default)s]")
    sample.add_argument("--vocab-size", type=vocab, default=1024, help="pieces of the tokenizer [%(default)s]")
    sample.add_argument("--max-bytes", type=number(300_000), default=8_000_000, help="of text [%(default)s]")

    files = commands.add_parser("text", help="a data set from .txt and .jsonl files, also .xz-compressed")
    files.set_defaults(run=make_text)
    files.add_argument("--train", type=text, nargs="+", required=True, metavar="FILE", help="training documents")
    files.add_argument("--val", type=text, nargs="+", required=True, metavar="FILE", help="validation documents")
    tokenizer = files.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=file_path(), metavar="MODEL", help="SentencePiece model to encode with")
    tokenizer.add_argument("--train-tokenizer", type=vocab, metavar="VOCAB", help="or train one of this many pieces")
    files.add_argument("--tokenizer-bytes", type=number(1), default=20_000_000, metavar="N",
                       help="of training text that the new tokenizer is trained on [%(default)s]")  # fmt: skip
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    files.add_argument("--shard-tokens", type=number(1, MAX_SHARD_TOKENS), default=MAX_SHARD_TOKENS, metavar="N",
                       help="tokens of a full shard [%(default)s]")  # fmt: skip

    fineweb = commands.add_parser("fineweb", help="the competition's FineWeb export from the Hugging Face Hub",
                                  description="MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX in the "
                                              "environment name another place to download from.")  # fmt: skip
    fineweb.set_defaults(run=make_fineweb)
    fineweb.add_argument("--variant", default="sp1024", help="tokenizer of the export, e.g. sp8192 [%(default)s]")
    fineweb.add_argument("--train-shards", type=number(1), default=80, help="of 200 MB each [%(default)s]")
    fineweb.add_argument("--root", type=Path, default=Path("data"), help="folder of datasets/ and tokenizers/ [data]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
