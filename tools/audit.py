"""Audit a finished run: check each condition of a valid score by running the predictor that was scored, and decode.

python tools/audit.py --artifact A --data D --record R.json [--script S] [--tokens N] [--report out.json]

The script runs in closed processes, which get tokens and give rows. All figures are made here, by the train_gpt.py of
this checkout: audit another's run with `--script` from a checkout that you trust. A machine without namespaces runs no
other script.

Print a line a check, PASS or FAIL with its figure, and exit with 0 only if all pass. `--record` takes the JSON record
of the run that scored, and that of the run that trained if it is another; their logs lie beside them.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import box
import codec
import runs
import serve
import train_gpt
from train_gpt import Config, InputError, Stream, Tokenizer

CAP_BYTES = 16_000_000
LIMIT_SECONDS = 600.0
SUM_TOLERANCE = 1e-6  # of a row, in float64
FILE_TOLERANCE = 1e-3  # of an encoded file, relative to what a run reports, and 8 bytes
CLAIM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-4}  # relative, of the bits of the audited head
TOKEN_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # nats, the mean of what single tokens differ by
RANK_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4}  # bits per byte between one rank and two
RUN_TOKENS = 64  # as many equal tokens in a row are shared text
NEAR_TOKENS, NEAR_SHARE = 16, 0.75  # a document of which so much stands in runs of so many tokens is a near copy
LEAST_DOCUMENT_TOKENS = 16  # shorter documents are not looked for
SHARED_SHARE = 0.02  # of the validation text may stand in such runs by chance: licences, navigation, quotations
LEAST_CHUNKS = 4  # are scored, with updates in between
STRONG_RATIO = 4  # of the scored text to script and artifact; FineWeb's 151 MB are 9.4 times their cap


# ======================================================================================================================
# Subject: what is audited, and one pass over it that is watched.
# ======================================================================================================================


@contextlib.contextmanager
def folder_of(subject: Subject):
    """Yield a new folder with all that a closed process may read: script, tools, artifact and tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/tools")
        for module in (codec, codec.caseops, runs, serve):
            shutil.copy(module.__file__, f"{folder}/tools")
        shutil.copy(subject.script, f"{folder}/train_gpt.py")
        shutil.copy(subject.c.artifact_path, f"{folder}/x.artifact")
        shutil.copy(tokenizer_path(subject.c), f"{folder}/tokenizer.model")
        yield folder


@contextlib.contextmanager
def in_a_process(subject: Subject, n_ranks: int = 1, n_blocks: int = 1):
    """Open the script's predictors in a process of its own, closed where this machine has a box. Raise InputError."""
    reason, own = box.why_open(), Path(train_gpt.__file__).read_bytes()
    if reason and subject.script.read_bytes() != own:
        raise InputError(f"--script={subject.script}: no box here ({reason}); allowed is this checkout's train_gpt.py")
    stop = () if subject.ttt_stop is None else (str(subject.ttt_stop),)
    arguments = ["tools/serve.py", str(n_ranks), str(n_blocks), *stop]
    with (
        folder_of(subject) as folder,
        tempfile.TemporaryFile() as said,
        box.started(folder, arguments, said, closed=not reason, **subject.env) as process,
    ):
        yield serve.Remote(process, subject.c, said)


@dataclass(frozen=True, kw_only=True)
class Subject(runs.Run):
    """A run with its files. tests/test_audit.py plants its faults by putting other ones in."""

    head: Stream  # of the validation text; what is watched and decoded
    training: dict | None  # record of the run that trained
    record: dict  # of the run that scored
    folder: Path  # of that record
    logs: tuple[str, ...]  # of all runs that were named; the last one scored
    script: Path
    retrain: bool = False  # whether to make the whole training once more
    chunks: str = ""  # "" or how the chunks differ from the run's
    open_ranks: Callable = in_a_process

    @property
    def stated(self) -> dict:
        """Return the record's row of the stage."""
        return self.record["stages"][self.stage]

    @property
    def ttt_stop(self) -> int | None:
        """Return the number of chunks that the run adapted to before the clock ended that; None = to all."""
        return None if self.chunks else self.stated.get("ttt_stop")

    @property
    def dtype(self) -> torch.dtype:
        return train_gpt.activation_dtype(self.c, self.dist.device)

    @property
    def env(self) -> dict[str, str]:
        """Return what a process needs to score as this run did, beside the artifact."""
        c = self.c
        env = dict(STAGES=self.stage, DEVICE=c.device, DTYPE=c.dtype, MICRO_BATCH_TOKENS=str(c.micro_batch_tokens))
        return env | (dict(TTT_CHUNK_TOKENS=str(c.ttt_chunk_tokens)) if self.chunks else {})

    def as_run(self, n_tokens: int) -> Subject:
        """Return the subject with so many tokens of the stream in the run's own chunks."""
        c = dataclasses.replace(self.c, ttt_chunk_tokens=self.record["config"]["ttt_chunk_tokens"])
        return dataclasses.replace(self, c=c, head=self.stream(n_tokens), chunks="")


@dataclass
class Ledger:
    """The findings of a watched pass."""

    nll: np.ndarray  # of each token, by its row
    rows: int = 0
    probes: int = 0  # changes of all that follows a position
    moved_rows: int = 0  # rows up to it that such a change moved
    flips: int = 0  # changes of a single target
    moved_by_target: int = 0
    not_finite: int = 0
    sum_error: float = 0.0
    least: float = 1.0
    state_changes: int = 0  # by predict
    learned: int = 0  # positions that update was given, each after its row


class Witness:
    """Ask a predictor for the rows of a stream, record them, and ask again with another future.

    The other future is text of the same stream, and comes before the true one or after it. No predictor can tell which
    of the two it is asked with first, unless it knows the seed.
    """

    def __init__(self, predictor, stream: Stream, probes: int, vocab_size: int, seed: int):
        self.predictor, self.stream, self.probes, self.vocab_size = predictor, stream, probes, vocab_size
        self.ledger, self.random = Ledger(np.zeros(len(stream))), torch.Generator().manual_seed(seed)

    def look(self, chunk: train_gpt.Chunk, rows: slice) -> Tensor:
        """Record a block of rows as distributions, and what they charge their targets. Return it: [m, V]."""
        ledger, logp = self.ledger, self.predictor.predict(chunk.inputs[: rows.stop], rows)
        nll = -logp.gather(1, chunk.targets[rows].cpu().unsqueeze(1)).squeeze(1)
        ledger.nll[chunk.start + rows.start : chunk.start + rows.stop] = nll.double()
        ledger.rows += len(logp)
        p = logp.double().exp()
        ledger.not_finite += int((~logp.isfinite()).any(1).sum())
        ledger.sum_error = max(ledger.sum_error, (p.sum(1) - 1).abs().nan_to_num(math.inf).max().item())
        ledger.least = min(ledger.least, p.nan_to_num(0.0).min().item())
        return logp

    def probe(self, chunk: train_gpt.Chunk, rows: slice) -> None:
        """Look, and see that predict changes no state and that no row moves with what comes after its context."""
        inputs, positions, before = chunk.inputs, self.positions(chunk.inputs, rows), self.predictor.fingerprint()
        n_early = int(torch.randint(2, (), generator=self.random))
        early = [self.predictor.predict(self.other_future(inputs, j), rows) for j in positions[:n_early]]
        logp = self.look(chunk, rows)
        self.ledger.state_changes += self.predictor.fingerprint() != before
        for j, after in zip(positions, early, strict=False):
            self.compare(after, logp, j - rows.start)
        for j in positions:
            row, flipped = j - rows.start, inputs.clone()
            self.compare(self.predictor.predict(self.other_future(inputs, j), rows), logp, row)
            flipped[j + 1] = (flipped[j + 1] + 1) % self.vocab_size  # row j's target
            self.ledger.flips += 1
            self.ledger.moved_by_target += int((self.predictor.predict(flipped, rows)[row] != logp[row]).any())

    def positions(self, inputs: Tensor, rows: slice) -> list[int]:
        """Return rows to change the future of: the ends of the block, beginnings of documents, and random ones."""
        begins = (inputs[rows] == self.stream.tokens[0].to(inputs)).nonzero().flatten() + rows.start
        anywhere = torch.randint(rows.start, max(rows.stop, rows.start + 1), (self.probes,), generator=self.random)
        begins = [b for begin in begins[: self.probes].tolist() for b in (begin - 1, begin)]
        found = [*anywhere.tolist(), rows.start, rows.stop - 2, *begins]
        return list(dict.fromkeys(j for j in found if rows.start <= j < min(rows.stop, len(inputs) - 1)))

    def other_future(self, inputs: Tensor, j: int) -> Tensor:
        """Return the inputs with other text behind row j's context."""
        shift = int(torch.randint(1, len(self.stream), (), generator=self.random))
        return torch.cat([inputs[: j + 1], self.stream.tokens.roll(shift)[: len(inputs) - j - 1].to(inputs)])

    def compare(self, after: Tensor, logp: Tensor, row: int) -> None:
        """Count the rows up to `row` that differ."""
        self.ledger.probes += 1
        self.ledger.moved_rows += int((after[: row + 1] != logp[: row + 1]).any(1).sum())


def watched_pass(
    subject: Subject, n_ranks: int = 1, probes: int = 4, n_blocks: int = 1, watched=None, seed: int = 0
) -> Ledger:
    """Score the subject's head once from left to right, by so many ranks, a chunk in at least so many blocks.

    watched: the positions at which the chunks begin that are probed; None = all.
    """
    with subject.open_ranks(subject, n_ranks, n_blocks) as predictor:
        witness = Witness(predictor, subject.head, probes, subject.c.vocab_size, seed)
        for chunk in subject.head.chunks(subject.chunk_tokens):
            see = witness.probe if watched is None or chunk.start in watched else witness.look
            for start in range(0, len(chunk.inputs), predictor.rows):
                see(chunk, slice(start, min(start + predictor.rows, len(chunk.inputs))))
            if not chunk.is_last:
                predictor.update(chunk.tokens)
                witness.ledger.learned += len(chunk.inputs)
    return witness.ledger


def rescored(subject: Subject, n_stretches: int, seed: int) -> Ledger:
    """Score all that the run scored once more, and watch so many of its chunks, drawn at random."""
    whole = subject.as_run(subject.stated["tokens"])
    starts = range(0, len(whole.head), whole.chunk_tokens)
    drawn = random.Random(seed).sample(starts, min(n_stretches, len(starts)))
    return watched_pass(whole, probes=2, watched=drawn, seed=seed)


# ======================================================================================================================
# Checks. Each returns whether it passed, and a figure in words.
# ======================================================================================================================


@dataclass(frozen=True)
class Passes:
    """The head scored by one rank and by two, and all of the stream once more if that was asked for."""

    one: Ledger
    two: Ledger | None
    stopped: str  # "" or why the two did not finish
    nll: np.ndarray  # of the stream's first tokens, in the run's own chunks
    whole: Ledger | None = None

    @property
    def alone(self) -> list[Ledger]:
        """The passes of one rank."""
        return [self.one, *([self.whole] if self.whole else [])]


def causal(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 1: what stands behind a position moves no row up to that position's."""
    two = [passes.two] if passes.two else []
    probes = sum(x.probes for x in [*passes.alone, *two])
    by_one, by_two = (sum(x.moved_rows for x in ledgers) for ledgers in (passes.alone, two))
    figure = f"another future at {probes} positions: {by_one} rows moved by 1 rank, {by_two} by 2"
    return probes > 0 and not by_one + by_two, figure


def documents(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the end of a document does not move what enters the first block at the next BOS."""
    with subject.open_ranks(subject) as predictor:
        entering = predictor.boundary()
    moved = int((entering != entering[:1]).any(1).sum())
    return not moved, f"{len(entering)} tokens before a BOS: {moved} move what enters the blocks there"


def ranks(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that one rank and two, in shorter blocks, give the same score."""
    if passes.stopped:
        return False, f"2 ranks do not finish: {passes.stopped}"
    bpb = [train_gpt.bits_per_byte(torch.from_numpy(x.nll), subject.head.token_bytes) for x in (passes.one, passes.two)]
    difference = abs(bpb[1] - bpb[0])
    allowed = RANK_TOLERANCE[subject.dtype]
    return difference <= allowed, f"2 ranks differ from 1 by {difference:.1e} bits per byte; allowed is {allowed:.0e}"


def distribution(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 2: rows cover the vocabulary, are positive and finite, sum to one, and do not know the target."""
    names = ("rows", "flips", "not_finite", "moved_by_target")
    rows, flips, odd, moved = (sum(getattr(x, name) for x in passes.alone) for name in names)
    error, least = max(x.sum_error for x in passes.alone), min(x.least for x in passes.alone)
    return not odd + moved and error <= SUM_TOLERANCE and least > 0 and flips > 0, (
        f"{rows} rows of {subject.c.vocab_size}: |sum - 1| up to {error:.1e}, least probability {least:.1e},"
        f" {odd} not finite; {flips} targets changed: {moved} rows moved"
    )


def score_before_update(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 3: predict leaves the state alone, as its process reports. `update` gets what has its rows."""
    changes, learned = (sum(getattr(x, name) for x in passes.alone) for name in ("state_changes", "learned"))
    return not changes, f"predict changed the state {changes} times; {learned} positions learned from, after their rows"


def single_pass(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 4: the run charged each token what its row says in one pass from left to right.

    Of the head, and with `--stretches` of all that it scored.
    """
    by_token = per_token_record(subject)
    if by_token is None:
        return False, "no per-token record: score with SCORES_PATH=x.npz"
    n, allowed = len(passes.nll), TOKEN_TOLERANCE[subject.dtype]
    off = np.abs(by_token["nll_nats"][:n] - passes.nll) if len(by_token["nll_nats"]) >= n else np.array([math.inf])
    return off.mean() <= allowed, (
        f"{n} tokens take in one pass what the run charged but for {off.mean():.1e} nats a token, {off.max():.1e} at"
        f" most; allowed is {allowed:.0e} a token"
    )


def named_stage(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 4: the run named the stage that it reports before it began."""
    stated = re.search(r"^STAGES=(\S+)$", subject.logs[-1], re.MULTILINE)
    final = re.search(r"^final val_bpb:(\S+) stage:(\S+)", subject.logs[-1], re.MULTILINE)
    if not (stated and final):
        return False, "the log lacks STAGES or its final line"
    bpb, stage = final.groups()
    named = stated.start() < final.start() and stated[1].split(",")[-1] == stage == subject.record["final_stage"]
    agrees = bpb == f"{subject.record['val_bpb']:.8f}" == f"{subject.stated['val_bpb']:.8f}"
    return named and agrees, f"STAGES={stated[1]} at the top of the log, {stage} {bpb} at its end and in the record"


def settings(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the run scored with the artifact's settings and none of the environment's."""
    kept, config = subject.header["score"], subject.record["config"]
    other = [f"{name.upper()}={config[name]} for {value}" for name, value in kept.items() if config[name] != value]
    return not other, (
        f"{len(kept)} settings of scoring in the artifact; in the run {', '.join(other) or 'the same'}"
        f"{stop_in_bits(subject)}"
    )


def stop_in_bits(subject: Subject) -> str:
    """Return in words what it could gain to choose the chunk after which adaptation ends.

    The record gives that number, and no check can tell whether a clock chose it. A file that names it is a code with
    nothing chosen, and log2 of the possible numbers is all that this file takes more.
    """
    if subject.stated.get("ttt_stop") is None:
        return ""
    stop, n, n_bytes = (subject.stated[name] for name in ("ttt_stop", "chunks", "bytes"))
    bits = math.log2(n + 1)
    return (
        f"; the clock ended adaptation after {stop} of {n} chunks, by the record: to name that takes {bits:.1f} bits,"
        f" {bits / max(1, n_bytes):.1e} a byte, which choosing it could gain at most"
    )


def claim(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the reported score is the sum over the per-token record, and the head of that is what rows give here.

    Beyond the audited head, a claim is as good as script and record: `--stretches` scores the whole stream again.
    """
    by_token = per_token_record(subject)
    if by_token is None:
        return False, "no per-token record: score with SCORES_PATH=x.npz"
    stream, nll = subject.stream(subject.stated["tokens"]), by_token["nll_nats"]
    columns = (("token", stream.tokens[1:]), ("bytes", stream.token_bytes))
    sound = all(np.array_equal(by_token[name], values.numpy()) for name, values in columns)
    sound = sound and len(nll) == len(stream) and np.isfinite(nll).all() and (nll > -SUM_TOLERANCE).all()
    whole = nll.sum() / math.log(2) / max(1, int(by_token["bytes"].sum()))
    here, there = passes.nll.sum() / math.log(2), nll[: len(passes.nll)].sum() / math.log(2)
    agrees = abs(here / there - 1) <= CLAIM_TOLERANCE[subject.dtype]
    return sound and agrees and abs(whole / subject.record["val_bpb"] - 1) < 1e-9, (
        f"val_bpb {subject.record['val_bpb']:.8f}, by token {whole:.8f}{'' if sound else ' (UNSOUND)'};"
        f" the first {len(passes.nll)} tokens take {there:.1f} bits there and {here:.1f} here"
    )


def per_token_record(subject: Subject) -> dict[str, np.ndarray] | None:
    """Return the columns of SCORES_PATH, or of a file of that name beside the record. Raise InputError if unusable."""
    stated = Path(subject.record["config"]["scores_path"])
    path = next((x for x in (stated, subject.folder / stated.name) if x.suffix and x.is_file()), None)
    if path is None:
        return None
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("token", "nll_nats", "bytes")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"SCORES_PATH={path}: not a per-token record ({error})") from None


def bytes_of_text(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the score divides by the bytes of the decoded text, of all that the run scored."""
    row = subject.stated
    stream = subject.stream(row["tokens"])
    counted, decoded = int(stream.token_bytes.sum()), utf8_length(stream.tokens.tolist(), subject.tokenizer)
    agree = decoded == counted == row["bytes"]
    return agree, f"{decoded} bytes of text, {counted} by token, {row['bytes']} in the record"


def utf8_length(tokens: list[int], tokenizer: Tokenizer) -> int:
    """Return the UTF-8 bytes of the decoded documents, with those of a character that the end cuts short."""
    tail: list[int] = []
    while tokenizer.sp.is_byte(tokens[-1 - len(tail)]):
        tail.insert(0, int(tokenizer.sp.id_to_piece(tokens[-1 - len(tail)])[3:5], 16))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(tail))
    open_bytes = len(decoder.getstate()[0])
    whole = tokens[: len(tokens) - open_bytes]
    return sum(len(text.encode()) for text in codec.documents(whole, tokenizer)) + open_bytes


def subset(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that log and record call the scored text whole or partial as it is. Name a manifest that counts as much."""
    everything, row, final = subject.stream(0), subject.stated, subject.logs[-1].rstrip().splitlines()[-1]
    whole = (row["tokens"], row["documents"]) == (len(everything), everything.documents)
    labelled = ("whole stream" if whole else "PARTIAL stream") in final and row["whole_stream"] == whole
    labelled = labelled and row.get("has_manifest") == everything.has_manifest
    return labelled, (
        f"{row['tokens']} of {len(everything)} tokens, {row['documents']} of {everything.documents} documents,"
        f" {'rightly' if labelled else 'WRONGLY'} called {'whole' if row['whole_stream'] else 'partial'};"
        f" {'the manifest counts as many' if everything.has_manifest else 'no manifest: completeness unknown'}"
    )


def separation(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that training shards hold no validation document, no near copy, and no more of it than chance brings.

    One token in 60 of a copy may be another: some 19 of 20 of its tokens still stand in runs of 16 that are shared. In
    the sample's honest documents up to 0.44 of the tokens do (logs/audit_smoke.txt), in FineWeb's beside Wikipedia 0.21
    (logs/audit_cpu_best_seed1337.txt).
    """
    tokens = np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(subject.c, "val")])
    near, long, n_train, short = SharedRuns(tokens, NEAR_TOKENS), SharedRuns(tokens, RUN_TOKENS), 0, set()
    for path in train_gpt.find_shards(subject.c, "train"):
        shard = train_gpt.read_shard(path)
        n_train += len(shard)
        short |= {document.tobytes() for document in split_documents(shard, subject.c) if len(document) < RUN_TOKENS}
        near.look_for(shard)
        long.look_for(shard)
    documents = zip(*(split_documents(tokens, subject.c, x) for x in (tokens, near.covered())), strict=True)
    shares = [
        float(document.tobytes() in short) if len(document) < RUN_TOKENS else here.mean()
        for document, here in documents
        if len(document) >= LEAST_DOCUMENT_TOKENS
    ]
    copied, most, covered = sum(x > NEAR_SHARE for x in shares), max(shares, default=0.0), long.covered()
    known = train_gpt.check_manifest(subject.c).get("shared_documents", 0)
    published = f" ({known} documents that the published export itself shares)" if known else ""
    return (not copied or bool(known)) and covered.mean() <= SHARED_SHARE, (
        f"{copied} of {len(shares)} documents stand in {n_train} training tokens{published}: by runs of {NEAR_TOKENS},"
        f" {100 * most:.0f} % of one at most, allowed is {100 * NEAR_SHARE:g} %; {int(covered.sum())} tokens"
        f" ({100 * covered.mean():.2f} %) in shared runs of {RUN_TOKENS}, allowed is {100 * SHARED_SHARE:g} %"
    )


class SharedRuns:
    """The runs of `length` equal tokens, a power of two, that a text shares with others, by 64-bit hashes."""

    def __init__(self, tokens: np.ndarray, length: int):
        self.length, self.n_tokens = length, len(tokens)
        self.hashes, self.place = np.unique(self.run_hashes(tokens), return_inverse=True)
        self.found = np.zeros(len(self.hashes), dtype=bool)
        filter_bits = min(28, max(16, len(self.hashes).bit_length() + 4))
        self.maybe, self.shift = np.zeros(1 << filter_bits, dtype=bool), np.uint64(64 - filter_bits)
        self.maybe[self.hashes >> self.shift] = True

    def run_hashes(self, tokens: np.ndarray) -> np.ndarray:
        """Return a hash of every `length` consecutive tokens, a 64-bit polynomial: uint64 [n - length + 1]."""
        number, length, factor = tokens.astype(np.uint64) + np.uint64(1), 1, train_gpt.HashChains.MULTIPLIER
        while length < self.length:
            number = number[: max(0, len(number) - length)] * np.uint64(factor) + number[length:]
            factor, length = factor * factor % 2**64, 2 * length
        return number

    def look_for(self, other: np.ndarray) -> None:
        """Mark the runs that stand in another text, too."""
        for start in range(0, len(other), 1 << 22):
            these = self.run_hashes(other[start : start + (1 << 22) + self.length - 1])
            these = these[self.maybe[these >> self.shift]]
            at = np.searchsorted(self.hashes, these).clip(max=len(self.hashes) - 1)
            self.found[at[self.hashes[at] == these]] = True

    def covered(self) -> np.ndarray:
        """Return which tokens stand in a marked run: bool [n]."""
        return np.convolve(self.found[self.place], np.ones(self.length))[: self.n_tokens] > 0


def split_documents(tokens: np.ndarray, c: Config, values: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the values (the tokens themselves) of each document without its BOS, from the first BOS on."""
    begins = np.flatnonzero(tokens == c.bos_id)
    return [part[1:] for part in np.split(tokens if values is None else values, begins)[1:]]


def in_a_box(folder: str, *arguments: str, **env: str) -> tuple[int, str]:
    """Run Python where it can read that folder only. Return (status, the last words of a failure)."""
    done = box.run(folder, list(arguments), **env)
    said = done.stderr.strip().splitlines()
    return done.returncode, f": {said[-1]}" if done.returncode and said else ""


def as_setting(value):
    return tuple(value) if isinstance(value, list) else value


def tokenizer_path(c: Config) -> str:
    return c.tokenizer_path or os.path.join(c.data_path, "tokenizer.model")


def training_text_only(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the script makes the same artifact whatever the validation text is.

    A dry run takes two steps on the CPU and does all that follows them. Both validation texts are training text of the
    run, and no other can be read. `--retrain` makes the whole training once more, where no validation text is at all.
    """
    if subject.training is None:
        return False, "no record of the training was given"
    if reason := box.why_open():
        return False, f"NOT ISOLATED: {reason}"
    artifacts = [dry_run(subject, part) for part in range(2)]
    alike = bool(artifacts[0][0]) and artifacts[0][0] == artifacts[1][0]
    said = "".join(dict.fromkeys(said for _, said in artifacts))
    again, words = retrained(subject) if subject.retrain else (True, "")
    return alike and again, (
        "warm-up, 2 steps, averaging, quantization, calibration and packing beside two validation texts:"
        f" {'the same artifact' if alike else 'NOT the same artifact'}{said}{words}"
    )


def dry_run(subject: Subject, part: int) -> tuple[bytes, str]:
    """Train for two steps by the settings of the run that trained. Return (the artifact, the last words of a failure).

    The validation text is one of two parts of a training shard.
    """
    c, seq_len = subject.c, subject.c.train_seq_len
    shard = train_gpt.read_shard(train_gpt.find_shards(c, "train")[0])
    n = min(64 * seq_len, len(shard) // 2)
    val_tokens = min(4 * max(seq_len, c.eval_seq_len), (len(shard) - n) // 2)
    validation = shard[n + part * val_tokens : n + (part + 1) * val_tokens]
    given = dict(phase="both", iterations=2, val_loss_every=1, val_tokens=0, device="cpu", kernels=())
    given |= dict(train_batch_tokens=seq_len, max_wallclock_seconds=0.0, gptq_tokens=seq_len, stages=("roundtrip",))
    files = {"x_train_000000.bin": as_shard(shard[:n])}
    files["x_val_000000.bin"] = as_shard(np.concatenate([[c.bos_id], validation]))
    return trained(subject, files, given)


def retrained(subject: Subject) -> tuple[bool, str]:
    """Train once more by the run's own settings beside no validation text. Return whether the artifact is the same."""
    config, here, there = subject.training["config"], train_gpt.hardware(subject.dist), subject.training["hardware"]
    if here != there or "on CPU" not in there or config["max_wallclock_seconds"]:
        what = f"{there}, MAX_WALLCLOCK_SECONDS={config['max_wallclock_seconds']:g}"
        return False, f"; whole training NOT repeated: it ran on {what}; this needs a CPU, {here}, and no clock"
    paths = map(Path, train_gpt.find_shards(subject.c, "train"))
    artifact, said = trained(subject, {path.name: path.read_bytes() for path in paths}, dict(phase="train"))
    alike = hashlib.sha256(artifact).hexdigest() == subject.header["sha256"]
    return alike, f"; whole training without validation text: {'the same' if alike else 'ANOTHER'} artifact{said}"


def trained(subject: Subject, files: dict[str, bytes], given: dict) -> tuple[bytes, str]:
    """Train in a box that holds script, tokenizer and these shards. Return (the artifact, the last words of a failure).

    The box has no configs: every setting is given explicitly, the record's where `given` has no other.
    """
    config = {name: x for name, x in subject.training["config"].items() if hasattr(subject.c, name)}
    config |= dict(preset="", log_dir="logs", data_path="data", tokenizer_path="", artifact_path="")
    config |= dict(scores_path="") | given
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        shutil.copy(tokenizer_path(subject.c), data / "tokenizer.model")
        shutil.copy(subject.script, f"{folder}/train_gpt.py")
        for name, content in files.items():
            (data / name).write_bytes(content)
        env = {name.upper(): train_gpt.show(as_setting(x)) for name, x in config.items()}
        status, said = in_a_box(folder, "train_gpt.py", **env)
        return box.left(folder, f"logs/{config['run_id']}.artifact") if status == 0 else b"", said


def as_shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def files(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the script at hand trained and scored, and that the records name the artifact at hand."""
    script_sha256 = hashlib.sha256(Path(subject.script).read_bytes()).hexdigest()
    logged = {sha for log in subject.logs for sha in re.findall(r"^script_sha256:(\S+)$", log, re.MULTILINE)}
    records = [record for record in (subject.training, subject.record) if record]
    stated = {record["artifact"].get("sha256", "none") for record in records}
    return logged == {script_sha256} and stated == {subject.header["sha256"]}, (
        f"script {script_sha256[:12]} here, {', '.join(sorted(x[:12] for x in logged)) or 'none'} in the logs;"
        f" artifact {subject.header['sha256'][:12]} here, {', '.join(sorted(x[:12] for x in stated))} in the records"
    )


def size(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that script and artifact are under the decimal cap, by the files at hand."""
    code, model = (os.path.getsize(path) for path in (subject.script, subject.c.artifact_path))
    stated = subject.record["artifact"]
    agrees = stated["total_bytes"] == code + model and stated["cap_bytes"] == CAP_BYTES
    return code + model <= CAP_BYTES and agrees, (
        f"script {code} + artifact {model} = {code + model} bytes of {CAP_BYTES};"
        f" the record says {stated['total_bytes']} of {stated['cap_bytes']}"
    )


def time(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that training with all that belongs to it, and evaluation, took 600 s each at most on a GPU."""
    if subject.training is None:
        return False, "no record of the training was given"
    if not isinstance(subject.training["train"]["seconds"], dict):
        return False, "another script made the record of the training: it has no seconds by part"
    parts = dict(subject.training["train"]["seconds"])
    spent = dict(training=max(parts.pop("total"), sum(parts.values())), evaluation=subject.stated["seconds"])
    hardware = dict(training=subject.training["hardware"], evaluation=subject.record["hardware"])
    late = [name for name, seconds in spent.items() if not seconds <= LIMIT_SECONDS]
    over = [name for name in late if "on CPU" not in hardware[name]]
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    limits = " and ".join(f"{name} on {hardware[name].split(',')[0]}" for name in spent)
    return not over, (
        f"training {spent['training']:.1f} s ({listed}), evaluation {spent['evaluation']:.1f} s, as reported; {limits},"
        f" allowed on GPUs is {LIMIT_SECONDS:g} s each"
    )


def decoded(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that a process decodes the text from artifact, tokenizer and as many bits as the record states."""
    if reason := box.why_open():
        return False, f"NOT ISOLATED: {reason}"
    head, by_token = subject.head, None if subject.chunks else per_token_record(subject)
    bits = (passes.one.nll if by_token is None else by_token["nll_nats"][: len(head)]).sum() / math.log(2)
    stop = () if subject.ttt_stop is None else ("--ttt-chunks", str(subject.ttt_stop))
    with folder_of(subject) as folder:
        everything = as_shard(subject.stream(0).tokens.numpy())
        Path(folder, "x_val_000000.bin").write_bytes(everything)
        named = ("--artifact", "x.artifact", "--data", ".", "--tokens", str(len(head)), "--out", "text.bits", *stop)
        status, said = in_a_box(folder, "tools/codec.py", "encode", *named, **subject.env)
        data = box.left(folder, "text.bits") if status == 0 else b""
    with folder_of(subject) as folder:
        Path(folder, "text.bits").write_bytes(data)
        named = ("--artifact", "x.artifact", "--tokenizer", "tokenizer.model", "--file", "text.bits", "--out", "text")
        status, failed = in_a_box(folder, "tools/codec.py", "decode", *named, *stop, **subject.env)
        text, said = box.left(folder, "text") if status == 0 else b"", said or failed
    equal = text == codec.as_text(head.tokens, subject.tokenizer)
    close = abs(8 * len(data) - bits) <= FILE_TOLERANCE * bits + 64
    source = "this pass" if by_token is None else "the run"
    return equal and close, (
        f"{len(head)} tokens in {len(data)} bytes, {bits / 8:.1f} by {source};"
        f" text of {len(text)} bytes {'identical' if equal else 'NOT identical'}{said}"
        f"{'; ' + subject.chunks if subject.chunks else ''}"
    )


def two_part_code(subject: Subject) -> str:
    """Return what script, artifact and coded text take together, beside the text; call a claim weak that is not long.

    Text may stand in the script or in the artifact, and no check forbids it, since their bytes are paid for. The claim
    of a score is that both serve a text of any length: the scored one has to be several times longer than they are.
    """
    row, stream = subject.stated, subject.stream(subject.stated["tokens"])
    carried = os.path.getsize(subject.script) + os.path.getsize(subject.c.artifact_path)
    coded, plain = math.ceil(row["val_bpb"] * row["bytes"] / 8), row["bytes"]
    by_xz = len(lzma.compress(codec.as_text(stream.tokens, subject.tokenizer)))
    return (
        f"script and artifact {carried} + coded text {coded} = {carried + coded} bytes; text {plain}, by xz {by_xz};"
        f" {'WEAK: ' if plain < STRONG_RATIO * carried else ''}the text is {plain / carried:.2f} times script and"
        f" artifact, a claim wants {STRONG_RATIO}"
    )


CHECKS = {
    "causal": causal,
    "documents": documents,
    "ranks": ranks,
    "distribution": distribution,
    "score before update": score_before_update,
    "single pass": single_pass,
    "named stage": named_stage,
    "settings": settings,
    "claim": claim,
    "bytes": bytes_of_text,
    "subset": subset,
    "separation": separation,
    "training text only": training_text_only,
    "files": files,
    "size": size,
    "time": time,
    "decode": decoded,
}


def watch(subject: Subject, probes: int = 4, n_stretches: int = 0, seed: int = 0) -> Passes:
    """Score the head by one rank and by two, and watch; then all of it once more if stretches are to be drawn.

    Raise InputError where the script's predictor stops.
    """
    one, two, stopped = watched_pass(subject, probes=probes, seed=seed), None, ""
    try:
        two = watched_pass(subject, 2, probes=1, n_blocks=2, seed=seed)
    except Exception as error:  # of a script that is under suspicion
        stopped = f"{type(error).__name__} {error}".splitlines()[0]
    whole = rescored(subject, n_stretches, seed) if n_stretches > 0 else None
    own = watched_pass(subject.as_run(len(subject.head)), watched=()) if subject.chunks and not whole else None
    return Passes(one, two, stopped, (whole or own or one).nll, whole)


def audit(subject: Subject, passes: Passes, names=tuple(CHECKS), say=lambda name, passed, figure: None) -> dict:
    """Return {check: (passed, figure)} of the named checks, in order."""
    found = {}
    for name in names:
        try:
            found[name] = CHECKS[name](subject, passes)
        except Exception as error:  # whatever a stranger's files and script bring about
            found[name] = False, f"stopped: {type(error).__name__}: {error}"
        say(name, *found[name])
    return found


# ======================================================================================================================
# The command.
# ======================================================================================================================


def read_records(paths: list[str]) -> tuple[dict | None, dict, Path, tuple[str, ...]]:
    """Return the record of training, that of the score and its folder, and all logs, the scoring one last.

    Raise InputError.
    """
    training, scored, logs = None, None, []
    for path in map(Path, paths):
        try:
            record, log = json.loads(path.read_text()), path.with_suffix(".txt").read_text()
            training = record if record["train"] else training
            scored = (record, path.parent, log) if record["stages"] else scored
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--record={path}: {error!r}; allowed is a run's JSON with its log beside it") from None
        logs.append(log)
    if scored is None:
        raise InputError(f"--record={','.join(paths)}: no run that scored; PHASE=eval makes one")
    record, folder, last = scored
    return training, record, folder, (*[log for log in logs if log is not last], last)


def shortened(c: Config, stage: str, n_tokens: int) -> tuple[int, str]:
    """Return the length of chunks of which several fit into the tokens, and how they differ from the run's in words."""
    if n_tokens >= LEAST_CHUNKS * c.ttt_chunk_tokens or train_gpt.chunk_length(stage, c) != c.ttt_chunk_tokens:
        return c.ttt_chunk_tokens, ""
    length = max(c.eval_stride, n_tokens // LEAST_CHUNKS // c.eval_stride * c.eval_stride)
    return length, f"chunks of {length} tokens instead of the run's {c.ttt_chunk_tokens}"


def subject_of(args) -> Subject:
    """Open the run that the arguments name. Raise InputError."""
    training, record, folder, logs = read_records(args.record or [str(Path(args.artifact).with_suffix(".json"))])
    try:
        stage, config = record["final_stage"], record["config"]
        limit = record["stages"][stage]["tokens"]
        names = ("device", "dtype", "micro_batch_tokens", *train_gpt.Config().marked("score"))
        as_run = {name.upper(): as_setting(config[name]) for name in names}
    except (KeyError, TypeError) as error:
        raise InputError(f"--record: the record of the score lacks {error}; this script's records have it") from None
    head = min(args.tokens or limit, limit)
    run = runs.load_run(args.artifact, args.data, **{**as_run, "VAL_TOKENS": head, "STAGES": stage})
    stream = run.stream()
    length, words = shortened(run.c, stage, len(stream))
    opened = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)} | dict(
        c=dataclasses.replace(run.c, ttt_chunk_tokens=length)
    )
    script = Path(args.script or train_gpt.__file__)
    if not script.is_file():
        raise InputError(f"--script={script}: no such file")
    files = dict(training=training, record=record, folder=folder, logs=logs, script=script, retrain=args.retrain)
    return Subject(**opened, head=stream, chunks=words, **files)


def report_of(subject: Subject, found: dict, two_part: str, args) -> dict:
    """Return what `--report` writes."""
    return dict(
        run_id=subject.record["run_id"],
        val_bpb=subject.record["val_bpb"],
        stage=subject.stage,
        artifact_sha256=subject.header["sha256"],
        script_sha256=hashlib.sha256(Path(subject.script).read_bytes()).hexdigest(),
        tokens=len(subject.head),
        chunks=subject.chunks or "the run's",
        hardware=train_gpt.hardware(subject.dist),
        versions=train_gpt.VERSIONS,
        two_part_code=two_part,
        stretches=args.stretches,
        seed=args.seed,
        checks={name: dict(passed=bool(passed), figure=figure) for name, (passed, figure) in found.items()},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--artifact", required=True, metavar="FILE")
    add("--data", required=True, metavar="DIR", help="the shards that the run trained and scored on")
    add("--record", nargs="+", metavar="JSON", help="records of the run or runs [beside the artifact]")
    add("--script", metavar="FILE", help="what the run ran, never imported here [this train_gpt.py]")
    add("--tokens", type=int, default=8192, help="of the stream, to watch and to decode [8192]")
    add("--stretches", type=int, default=0, metavar="K", help="score the whole stream again, watch K chunks of it [0]")
    add("--retrain", action="store_true", help="train all of it again: one process on a CPU, no clock")
    add("--seed", type=int, default=secrets.randbelow(2**32), help="of what is drawn [random, printed]")
    add("--report", metavar="FILE", help="write the findings as JSON")
    args = parser.parse_args()
    runs.be_deterministic()
    try:
        subject = subject_of(args)
        place = train_gpt.hardware(subject.dist)
        print(f"# {args.artifact}: {len(subject.head)} tokens, stage {subject.stage}, {place}")
        print(f"# {subject.script} runs in a process of its own, {box.why_open() and 'NOT '}closed")
        if subject.chunks:
            print(f"# {subject.chunks}")

        def say(name: str, passed: bool, figure: str) -> None:
            shown = "".join(x if x.isprintable() else "?" for x in figure)
            print(f"{'PASS' if passed else 'FAIL'}  {name:<20} {shown}", flush=True)

        print(f"# {args.stretches} chunks and all probes drawn with seed {args.seed}")
        found = audit(subject, watch(subject, n_stretches=args.stretches, seed=args.seed), say=say)
        print(f"# two-part code: {(two_part := two_part_code(subject))}")
        if args.report:
            report = (json.dumps(report_of(subject, found, two_part, args), indent=1) + "\n").encode()
            train_gpt.write_atomically(Path(args.report), report)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [name for name, (passed, _) in found.items() if not passed]
    listed = f"; failed: {', '.join(failed)}" if failed else ""
    print(f"{len(found) - len(failed)} of {len(found)} checks passed{listed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
