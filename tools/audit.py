"""Audit a finished run: check each condition of a valid score by running the predictor that was scored, and decode.

python tools/audit.py --artifact A --data D --record R.json [--tokens N] [--report out.json]

Print a line a check, PASS or FAIL with its figure, and exit with 0 only if all pass. `--record` takes the JSON record
of the run that scored, and that of the run that trained if it is another; their logs lie beside them.
"""

from __future__ import annotations

import argparse
import codecs
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
import threading
import zipfile
from collections import deque
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
import train_gpt
from train_gpt import Config, Dist, InputError, Stream, Tokenizer

CAP_BYTES = 16_000_000
LIMIT_SECONDS = 600.0
SUM_TOLERANCE = 1e-6  # of a row, in float64
FILE_TOLERANCE = 1e-3  # of an encoded file, relative to what a run reports, and 8 bytes
CLAIM_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-4}  # relative, of the bits of the audited head
RANK_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4}  # bits per byte between one rank and two
RUN_TOKENS = 64  # as many equal tokens in a row are shared text
LEAST_DOCUMENT_TOKENS = 16  # shorter documents are not looked for
SHARED_SHARE = 0.02  # of the validation text may stand in such runs by chance: licences, navigation, quotations
LEAST_CHUNKS = 4  # are scored, with updates in between
STRONG_RATIO = 4  # of the scored text to script and artifact; FineWeb's 151 MB are 9.4 times their cap


# ======================================================================================================================
# Subject: what is audited, and one pass over it that is watched.
# ======================================================================================================================


@dataclass(frozen=True, kw_only=True)
class Subject(runs.Run):
    """A run with its files and its loop. tests/test_audit.py plants its faults by putting other ones in."""

    head: Stream  # of the validation text; what is watched and decoded
    training: dict | None  # record of the run that trained
    record: dict  # of the run that scored
    folder: Path  # of that record
    logs: tuple[str, ...]  # of all runs that were named; the last one scored
    chunks: str = ""  # "" or how the chunks differ from the run's
    script: Path = Path(train_gpt.__file__)
    score: Callable = train_gpt.score

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


@dataclass
class Ledger:
    """The findings of a watched pass, of one rank."""

    predicted: np.ndarray  # how often each position was
    nll: np.ndarray  # by its row, of the token that stands there
    probes: int = 0  # changes of all that follows a position
    moved_rows: int = 0  # rows up to it that such a change moved
    flips: int = 0  # changes of a single target
    moved_by_target: int = 0
    bad_shape: int = 0
    not_finite: int = 0
    sum_error: float = 0.0
    least: float = 1.0
    state_changes: int = 0  # by predict
    learned: int = 0  # positions that update was given
    unscored: int = 0  # of them, without a row before
    foreign: int = 0  # tokens that update was given and that do not stand there


def state_of(x, visited: dict | None = None):
    """Yield every tensor and number that an object holds, however deep. No predictor chooses what is looked at.

    Left out is what `predict` may leave behind, since it is made again for other inputs: MixedTTT.made and what hash
    chains hold past `seen`.
    """
    visited = {} if visited is None else visited  # by id; holds the objects, whose ids would be used again otherwise
    if isinstance(x, (bool, int, float, str, bytes)):
        yield x
    elif isinstance(x, np.ndarray):
        yield x.tobytes()
    elif id(x) not in visited:
        visited[id(x)] = x
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (train_gpt.Clock, train_gpt.Deadline)):  # no token decides about time
            return
        elif isinstance(x, train_gpt.HashChains):
            yield from (x.seen, x.document, x.tail, x.head, x.tokens[: x.seen], x.prev[:, : x.seen])
        elif isinstance(x, (dict, list, tuple, set, deque)):
            for part in x.values() if isinstance(x, dict) else x:
                yield from state_of(part, visited)
        elif hasattr(x, "__dict__"):
            for name, part in vars(x).items():
                if name != "made" or not isinstance(x, train_gpt.MixedTTT):
                    yield from state_of(part, visited)


def fingerprint(predictor) -> str:
    """Return the sha256 of all that a predictor holds."""
    digest = hashlib.sha256()
    for x in state_of(predictor):
        digest.update(train_gpt.as_bytes([x]) if isinstance(x, Tensor) else repr(x).encode())
    return digest.hexdigest()


class Witness:
    """A predictor that passes everything on, records its rows of the final stage, and asks again with another future.

    `predict` holds collectives. All ranks choose the same probes, from the rows of all, and make the same calls.
    """

    def __init__(self, predictor, stream: Stream, ledger: Ledger, probes: int, vocab_size: int, watched=None):
        self.predictor, self.stream, self.ledger, self.probes = predictor, stream, ledger, probes
        self.watched = watched  # positions at which the chunks begin that are probed; None = all
        self.stages, self.stride, self.block_rows = predictor.stages, predictor.stride, predictor.block_rows
        self.dist, self.share = predictor.dist, predictor.share
        self.vocab_size, self.seen = vocab_size, 0
        self.random = torch.Generator().manual_seed(len(stream))

    def rows(self, inputs: Tensor, rows: slice) -> Tensor:
        """Return this rank's rows of the final stage."""
        return self.predictor.predict(inputs, rows)[self.stages[-1]]

    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        mine = self.share(rows)
        if self.watched is not None and self.seen not in self.watched:
            found = self.predictor.predict(inputs, rows)
            self.look_at(found[self.stages[-1]], mine)
            return found
        positions, before = self.positions(inputs, rows), fingerprint(self.predictor)
        early = [self.rows(self.other_future(inputs, j), rows) for j in positions[:1]]  # before the true future
        found = self.predictor.predict(inputs, rows)
        logp = found[self.stages[-1]]
        self.ledger.state_changes += fingerprint(self.predictor) != before
        self.look_at(logp, mine)
        for j, after in zip(positions, early, strict=False):
            self.compare(after, logp, j - mine.start)
        for j in positions:
            self.probe(inputs, rows, logp, j)
        return found

    def look_at(self, logp: Tensor, mine: slice) -> None:
        """Record this rank's rows as distributions."""
        ledger, positions = self.ledger, slice(self.seen + mine.start, self.seen + mine.stop)
        targets = self.stream.tokens[1:][positions].to(logp.device)
        if logp.shape != (len(targets), self.vocab_size):
            ledger.bad_shape += 1
        elif len(logp):
            ledger.predicted[positions] += 1
            ledger.nll[positions] = -logp.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()
            p = logp.double().exp()
            ledger.not_finite += int((~logp.isfinite()).any(1).sum())
            ledger.sum_error = max(ledger.sum_error, (p.sum(1) - 1).abs().nan_to_num(math.inf).max().item())
            ledger.least = min(ledger.least, p.nan_to_num(0.0).min().item())

    def positions(self, inputs: Tensor, rows: slice) -> list[int]:
        """Return rows to change the future of: the ends of the block, beginnings of documents, and random ones."""
        begins = (inputs[rows] == self.stream.tokens[0].to(inputs)).nonzero().flatten() + rows.start
        anywhere = torch.randint(rows.start, max(rows.stop, rows.start + 1), (self.probes,), generator=self.random)
        begins = [b for begin in begins[: self.probes].tolist() for b in (begin - 1, begin)]
        found = [*anywhere.tolist(), rows.start, rows.stop - 2, *begins]
        return list(dict.fromkeys(j for j in found if rows.start <= j < min(rows.stop, len(inputs) - 1)))

    def other_future(self, inputs: Tensor, j: int) -> Tensor:
        """Return the inputs with other tokens behind row j's context."""
        other = torch.randint(0, self.vocab_size, inputs[j + 1 :].shape, generator=self.random)
        return torch.cat([inputs[: j + 1], other.to(inputs)])

    def compare(self, after: Tensor, logp: Tensor, row: int) -> None:
        """Count the rows up to `row`, of this rank, that differ."""
        known = max(0, row + 1)
        self.ledger.probes += known > 0
        self.ledger.moved_rows += int((after[:known] != logp[:known]).any(1).sum())

    def probe(self, inputs: Tensor, rows: slice, logp: Tensor, j: int) -> None:
        """Change all that comes after row j's context, then its target alone: neither may move what is before."""
        row, flipped = j - self.share(rows).start, inputs.clone()
        self.compare(self.rows(self.other_future(inputs, j), rows), logp, row)
        flipped[j + 1] = (flipped[j + 1] + 1) % self.vocab_size
        after = self.rows(flipped, rows)
        if 0 <= row < len(logp):
            self.ledger.flips += 1
            self.ledger.moved_by_target += int((after[row] != logp[row]).any())

    def update(self, tokens: Tensor) -> None:
        ledger, n = self.ledger, len(tokens) - 1
        given = self.stream.tokens[self.seen : self.seen + n + 1]
        ledger.learned += n
        ledger.unscored += int((ledger.predicted[self.seen : self.seen + n] == 0).sum()) + n + 1 - len(given)
        ledger.foreign += int((tokens.cpu()[: len(given)] != given).sum())
        self.predictor.update(tokens)
        self.seen += n


def watched_pass(
    subject: Subject, dist: Dist, probes: int, n_blocks: int = 1, watched=None
) -> tuple[Ledger, train_gpt.Score]:
    """Score the subject's head under its own loop, a chunk in at least so many blocks, and watch its predictor."""
    n, predictor = len(subject.head), subject.predictor(subject.ttt_stop, dist)
    strides = math.ceil(subject.chunk_tokens / (n_blocks * dist.world_size * predictor.stride))
    predictor.block_rows = min(predictor.block_rows, strides * predictor.stride)
    ledger = Ledger(np.zeros(n, dtype=np.int64), np.zeros(n))
    witness = Witness(predictor, subject.head, ledger, probes, subject.c.vocab_size, watched)
    return ledger, subject.score(witness, subject.head, subject.chunk_tokens, dist)[subject.stage]


def rescored(subject: Subject, n_stretches: int, seed: int) -> tuple[Ledger, train_gpt.Score]:
    """Score all that the run scored once more, and watch so many of its chunks, drawn at random."""
    c = dataclasses.replace(subject.c, ttt_chunk_tokens=subject.record["config"]["ttt_chunk_tokens"])
    whole = dataclasses.replace(subject, c=c, head=subject.stream(subject.stated["tokens"]), chunks="")
    starts = range(0, len(whole.head), whole.chunk_tokens)
    drawn = random.Random(seed).sample(starts, min(n_stretches, len(starts)))
    return watched_pass(whole, whole.dist, 2, watched=drawn)


class ThreadRank(Dist):
    """One of several ranks that are threads of this process, with the collectives that scoring needs."""

    def __init__(self, rank: int, device: torch.device, barrier: threading.Barrier, slots: list):
        super().__init__(rank, barrier.parties, device)
        self.barrier, self.slots = barrier, slots

    def exchange(self, mine, reduce):
        self.slots[self.rank] = mine
        self.barrier.wait()
        result = reduce(self.slots)
        self.barrier.wait()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.exchange(tensor, lambda parts: torch.stack(parts).sum(0)))

    def max(self, value: float) -> float:
        return self.exchange(value, max)


def pass_of_ranks(subject: Subject, n_ranks: int, probes: int) -> tuple[list[tuple[Ledger, train_gpt.Score]], str]:
    """Make the same pass by several ranks in shorter blocks. Return each rank's findings, or none and what stopped."""
    barrier, slots, found = threading.Barrier(n_ranks, timeout=3600), [None] * n_ranks, [None] * n_ranks
    stopped = []

    def work(rank: int) -> None:
        try:
            dist = ThreadRank(rank, subject.dist.device, barrier, slots)
            found[rank] = watched_pass(subject, dist, probes, n_blocks=2)
        except Exception as error:  # of a script that is under suspicion
            stopped.append(f"{type(error).__name__} {error}")
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ([], stopped[0].splitlines()[0]) if stopped else (found, "")


# ======================================================================================================================
# Checks. Each returns whether it passed, and a figure in words.
# ======================================================================================================================


@dataclass(frozen=True)
class Passes:
    """The head scored by one rank and by two, and all of the stream once more if that was asked for."""

    ledger: Ledger
    score: train_gpt.Score
    two: list[tuple[Ledger, train_gpt.Score]]  # by rank
    stopped: str  # "" or why the two did not finish
    whole: tuple[Ledger, train_gpt.Score] | None = None

    @property
    def alone(self) -> list[tuple[Ledger, train_gpt.Score]]:
        """The passes of one rank."""
        return [(self.ledger, self.score), *([self.whole] if self.whole else [])]


def causal(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 1: what stands behind a position moves no row up to that position's."""
    ledgers = [ledger for ledger, _ in (*passes.alone, *passes.two)]
    probes, moved = sum(x.probes for x in ledgers), sum(x.moved_rows for x in ledgers)
    return probes > 0 and not moved, f"another future at {probes} positions, by 1 rank and 2: {moved} rows moved"


def documents(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the end of a document does not move what enters the first block at the next BOS."""
    found = []
    handle = subject.model.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, 1].clone()))
    last = torch.arange(subject.c.vocab_size, device=subject.dist.device)
    with torch.no_grad():
        subject.model(torch.stack([last, torch.full_like(last, subject.c.bos_id)], dim=1))
    handle.remove()
    moved = int((found[0] != found[0][:1]).any(1).sum())
    return not moved, f"{len(last)} tokens before a BOS: {moved} move what enters the blocks there"


def ranks(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that one rank and two, in shorter blocks, give the same score."""
    if passes.stopped:
        return False, f"2 ranks do not finish: {passes.stopped}"
    difference = max(abs(score.val_bpb - passes.score.val_bpb) for _, score in passes.two)
    allowed = RANK_TOLERANCE[subject.dtype]
    return difference <= allowed, f"2 ranks differ from 1 by {difference:.1e} bits per byte; allowed is {allowed:.0e}"


def distribution(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 2: rows cover the vocabulary, are positive and finite, sum to one, and do not know the target."""
    ledgers = [ledger for ledger, _ in passes.alone]
    rows, flips = (sum(int(np.sum(getattr(x, name))) for x in ledgers) for name in ("predicted", "flips"))
    odd, shapes, moved = (sum(getattr(x, n) for x in ledgers) for n in ("not_finite", "bad_shape", "moved_by_target"))
    error, least = max(x.sum_error for x in ledgers), min(x.least for x in ledgers)
    return not odd + shapes + moved and error <= SUM_TOLERANCE and least > 0 and flips > 0, (
        f"{rows} rows of {subject.c.vocab_size}: |sum - 1| up to {error:.1e}, least probability {least:.1e},"
        f" {odd} not finite, {shapes} blocks of another shape; {flips} targets changed: {moved} rows moved"
    )


def score_before_update(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 3: predict leaves the state alone, and update receives scored positions only."""
    names = ("state_changes", "learned", "unscored", "foreign")
    changes, learned, unscored, foreign = (sum(getattr(x, name) for x, _ in passes.alone) for name in names)
    return not changes + unscored + foreign, (
        f"predict changed the state {changes} times; of {learned} positions learned from, {unscored} were"
        f" not scored before and {foreign} hold other tokens"
    )


def single_pass(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check condition 4: each position is predicted once, and its nll is that of its row."""
    charged = [(x, score.nll.numpy()) for x, score in passes.alone]
    rightly = sum(int((nll == x.nll).sum()) for x, nll in charged if nll.shape == x.nll.shape)
    n, once = (sum(int(np.sum(f(x.predicted))) for x, _ in charged) for f in (np.ones_like, lambda times: times == 1))
    return once == rightly == n, (
        f"{once} of {n} positions predicted once, at most {max(x.predicted.max() for x, _ in charged)} times;"
        f" {rightly} with the nll of their row"
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
    stopped = "" if subject.ttt_stop is None else f"; the clock ended adaptation after {subject.ttt_stop} chunks"
    return not other, (
        f"{len(kept)} settings of scoring in the artifact; in the run {', '.join(other) or 'the same'}{stopped}"
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
    head = passes.ledger.nll if not subject.chunks else first_chunk_nll(subject)
    head = passes.whole[0].nll if passes.whole else head
    here, there = head.sum() / math.log(2), nll[: len(head)].sum() / math.log(2)
    agrees = abs(here / there - 1) <= CLAIM_TOLERANCE[subject.dtype]
    return sound and agrees and abs(whole / subject.record["val_bpb"] - 1) < 1e-9, (
        f"val_bpb {subject.record['val_bpb']:.8f}, by token {whole:.8f}{'' if sound else ' (UNSOUND)'};"
        f" the first {len(head)} tokens take {there:.1f} bits there and {here:.1f} here"
    )


def first_chunk_nll(subject: Subject) -> np.ndarray:
    """Return the nll of the first tokens before anything is learned, as far as the run's own first chunk goes."""
    n = min(len(subject.head), subject.record["config"]["ttt_chunk_tokens"])
    tokens = subject.head.tokens[: n + 1].to(subject.dist.device)
    logp = subject.predictor().predict(tokens[:-1], slice(0, n))[subject.stage]
    return -logp.gather(1, tokens[1:].unsqueeze(1)).squeeze(1).double().cpu().numpy()


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
    """Check that training shards hold no validation document, and no more of its 64-token runs than chance brings."""
    tokens = np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(subject.c, "val")])
    hashes, place = np.unique(run_hashes(tokens), return_inverse=True)
    found, n_train, short = np.zeros(len(hashes), dtype=bool), 0, set()
    filter_bits = min(28, max(16, len(hashes).bit_length() + 4))
    maybe, shift = np.zeros(1 << filter_bits, dtype=bool), np.uint64(64 - filter_bits)
    maybe[hashes >> shift] = True
    for path in train_gpt.find_shards(subject.c, "train"):
        shard = train_gpt.read_shard(path)
        n_train += len(shard)
        short |= {document.tobytes() for document in split_documents(shard, subject.c) if len(document) < RUN_TOKENS}
        for start in range(0, len(shard), 1 << 22):
            these = run_hashes(shard[start : start + (1 << 22) + RUN_TOKENS - 1])
            these = these[maybe[these >> shift]]
            at = np.searchsorted(hashes, these).clip(max=len(hashes) - 1)
            found[at[hashes[at] == these]] = True
    covered = np.convolve(found[place], np.ones(RUN_TOKENS))[: len(tokens)] > 0
    documents = list(zip(*(split_documents(tokens, subject.c, x) for x in (tokens, covered)), strict=True))
    copied = sum(
        document.tobytes() in short if len(document) < RUN_TOKENS else here.mean() > 0.5
        for document, here in documents
        if len(document) >= LEAST_DOCUMENT_TOKENS
    )
    share, known = covered.mean(), train_gpt.check_manifest(subject.c).get("shared_documents", 0)
    published = f" ({known} documents that the published export itself shares)" if known else ""
    return (not copied or bool(known)) and share <= SHARED_SHARE, (
        f"{copied} of {len(documents)} documents stand mostly in {n_train} training tokens{published},"
        f" {int(covered.sum())} tokens ({100 * share:.2f} %) in shared runs of {RUN_TOKENS};"
        f" allowed is {100 * SHARED_SHARE:g} %"
    )


def split_documents(tokens: np.ndarray, c: Config, values: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the values (the tokens themselves) of each document without its BOS, from the first BOS on."""
    begins = np.flatnonzero(tokens == c.bos_id)
    return [part[1:] for part in np.split(tokens if values is None else values, begins)[1:]]


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return a hash of every RUN_TOKENS consecutive tokens, a 64-bit polynomial: uint64 [n - RUN_TOKENS + 1]."""
    number, length, factor = tokens.astype(np.uint64) + np.uint64(1), 1, train_gpt.HashChains.MULTIPLIER
    while length < RUN_TOKENS:
        number = number[: max(0, len(number) - length)] * np.uint64(factor) + number[length:]
        factor, length = factor * factor % 2**64, 2 * length
    return number


def in_a_box(folder: str, script: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Run a copy of a script there, where it can read that folder only. Return (status, its last words)."""
    here = Path(folder, script.parent.name, script.name)
    here.parent.mkdir(exist_ok=True)
    shutil.copy(script, here)
    done = box.run(folder, [str(here.relative_to(folder)), *arguments], **env)
    said = done.stderr.strip().splitlines()
    return done.returncode, f": {said[-1]}" if done.returncode and said else ""


def as_setting(value):
    return tuple(value) if isinstance(value, list) else value


def tokenizer_path(c: Config) -> str:
    return c.tokenizer_path or os.path.join(c.data_path, "tokenizer.model")


def training_text_only(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that the script makes the same artifact whatever the validation text is.

    A dry run takes two steps on the CPU and does all that follows them. Both validation texts are training text of the
    run, and no other can be read.
    """
    if subject.training is None:
        return False, "no record of the training was given"
    if reason := box.why_open():
        return False, f"NOT ISOLATED: {reason}"
    artifacts = [dry_run(subject, part) for part in range(2)]
    alike = bool(artifacts[0][0]) and artifacts[0][0] == artifacts[1][0]
    said = "".join(dict.fromkeys(said for _, said in artifacts))
    return alike, (
        "warm-up, 2 steps, averaging, quantization, calibration and packing beside two validation texts:"
        f" {'the same artifact' if alike else 'NOT the same artifact'}{said}"
    )


def dry_run(subject: Subject, part: int) -> tuple[bytes, str]:
    """Train for two steps by the settings of the run that trained. Return (the artifact, the last words of a failure).

    The script runs in a folder of its own, which has no configs: every setting is given explicitly.
    """
    c, seq_len = subject.c, subject.c.train_seq_len
    shard = train_gpt.read_shard(train_gpt.find_shards(c, "train")[0])
    n = min(64 * seq_len, len(shard) // 2)
    val_tokens = min(4 * max(seq_len, c.eval_seq_len), (len(shard) - n) // 2)
    validation = shard[n + part * val_tokens : n + (part + 1) * val_tokens]
    given = dict(preset="", phase="both", run_id="dry_run", log_dir="logs", iterations=2, val_loss_every=1)
    given |= dict(data_path="data", tokenizer_path="", artifact_path="", scores_path="", device="cpu", val_tokens=0)
    given |= dict(train_batch_tokens=seq_len, max_wallclock_seconds=0.0, gptq_tokens=seq_len, stages=("roundtrip",))
    given |= dict(kernels=())
    config = {name: x for name, x in subject.training["config"].items() if hasattr(c, name)}
    stated = {name.upper(): train_gpt.show(as_setting(x)) for name, x in (config | given).items()}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        shutil.copy(tokenizer_path(c), data / "tokenizer.model")
        (data / "x_train_000000.bin").write_bytes(as_shard(shard[:n]))
        (data / "x_val_000000.bin").write_bytes(as_shard(np.concatenate([[c.bos_id], validation])))
        status, said = in_a_box(folder, subject.script, **stated)
        return box.left(folder, "logs/dry_run.artifact") if status == 0 else b"", said


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
    over = [name for name, seconds in spent.items() if seconds > LIMIT_SECONDS and "on CPU" not in hardware[name]]
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    limits = " and ".join(f"{name} on {hardware[name].split(',')[0]}" for name in spent)
    return not over, (
        f"training {spent['training']:.1f} s ({listed}), evaluation {spent['evaluation']:.1f} s; {limits},"
        f" allowed on GPUs is {LIMIT_SECONDS:g} s each"
    )


def decoded(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Check that another process decodes the text from artifact, tokenizer and as many bits as the record states."""
    if reason := box.why_open():
        return False, f"NOT ISOLATED: {reason}"
    head, c, stop = subject.head, subject.c, subject.ttt_stop
    data = codec.encode(subject.predictor(stop), head.tokens.to(subject.dist.device), subject.chunk_tokens)
    by_token = None if subject.chunks else per_token_record(subject)
    bits = (passes.ledger.nll if by_token is None else by_token["nll_nats"][: len(head)]).sum() / math.log(2)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.bits").write_bytes(data)
        Path(folder, "tools").mkdir()
        shutil.copy(c.artifact_path, Path(folder, "x.artifact"))
        shutil.copy(tokenizer_path(c), Path(folder, "tokenizer.model"))
        shutil.copy(subject.script, Path(folder, "train_gpt.py"))
        shutil.copy(runs.__file__, Path(folder, "tools", "runs.py"))
        named = ("--artifact", "x.artifact", "--tokenizer", "tokenizer.model", "--file", "text.bits", "--out", "text")
        named += () if stop is None else ("--ttt-chunks", str(stop))
        env = dict(STAGES=subject.stage, DEVICE=c.device, DTYPE=c.dtype, MICRO_BATCH_TOKENS=str(c.micro_batch_tokens))
        env |= dict(TTT_CHUNK_TOKENS=str(c.ttt_chunk_tokens)) if subject.chunks else {}
        status, said = in_a_box(folder, Path(codec.__file__), "decode", *named, **env)
        text = box.left(folder, "text") if status == 0 else b""
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
    """Score the head by one rank and by two, and watch; then all of it once more if stretches are to be drawn."""
    head = *watched_pass(subject, subject.dist, probes), *pass_of_ranks(subject, 2, 1)
    return Passes(*head, rescored(subject, n_stretches, seed) if n_stretches > 0 else None)


def audit(subject: Subject, passes: Passes, names=tuple(CHECKS), say=lambda name, passed, figure: None) -> dict:
    """Return {check: (passed, figure)} of the named checks, in order."""
    found = {}
    for name in names:
        found[name] = CHECKS[name](subject, passes)
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
    opened = vars(run) | dict(c=dataclasses.replace(run.c, ttt_chunk_tokens=length))
    return Subject(**opened, head=stream, training=training, record=record, folder=folder, logs=logs, chunks=words)


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
        versions=train_gpt.versions(),
        two_part_code=two_part,
        stretches=args.stretches,
        seed=args.seed,
        checks={name: dict(passed=bool(passed), figure=figure) for name, (passed, figure) in found.items()},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="DIR", help="the shards that the run trained and scored on")
    parser.add_argument("--record", nargs="+", metavar="JSON", help="records of the run or runs [beside the artifact]")
    parser.add_argument("--tokens", type=int, default=8192, help="of the stream, to watch and to decode [8192]")
    parser.add_argument("--stretches", type=int, default=0, metavar="K",
                        help="score all of the stream once more and watch K chunks drawn from it [0]")  # fmt: skip
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of what is drawn [random, printed]")
    parser.add_argument("--report", metavar="FILE", help="write the findings as JSON")
    args = parser.parse_args()
    runs.be_deterministic()
    try:
        subject = subject_of(args)
        place = train_gpt.hardware(subject.dist)
        print(f"# {args.artifact}: {len(subject.head)} tokens, stage {subject.stage}, {place}")
        if subject.chunks:
            print(f"# {subject.chunks}")

        def say(name: str, passed: bool, figure: str) -> None:
            print(f"{'PASS' if passed else 'FAIL'}  {name:<20} {figure}", flush=True)

        if args.stretches:
            print(f"# {args.stretches} chunks drawn with seed {args.seed}")
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
