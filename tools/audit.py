"""Audit a finished run: each condition of a valid score by running the predictor that was scored, then by decoding.

python tools/audit.py --artifact A --data D --record R.json [--tokens N] [--report out.json]

Prints a line a check, PASS or FAIL with its figure, and exits with 0 only if all pass. `--record` takes the JSON record
of the run that scored, and that of the run that trained if it is another; their logs lie beside them.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import codec
import train_gpt
from train_gpt import Config, InputError, Run, Stream, Tokenizer

CAP_BYTES = 16_000_000
LIMIT_SECONDS = 600.0
SUM_TOLERANCE = 1e-6  # of a row, in float64
BITS_TOLERANCE = 1e-3  # of what a run reports, relative
RANK_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-4}  # bits per byte between one rank and two
RUN_TOKENS = 64  # what is shared beyond this is taken from the training text
SHARED_SHARE = 0.02  # of the validation text may stand in such runs by chance: licences, navigation, quotations
LEAST_CHUNKS = 4  # are scored, so that updates happen in between


# ======================================================================================================================
# Subject: what is audited, and one pass over it that is watched.
# ======================================================================================================================


@dataclass(frozen=True)
class Subject:
    """A run's files and functions. tests/test_audit.py plants its faults by putting another one in."""

    c: Config  # in force when it was scored
    run: Run
    tokenizer: Tokenizer
    stream: Stream  # the head of the validation text that is audited
    model: train_gpt.GPT
    mixer: train_gpt.Maxent
    stage: str
    trained: dict | None  # what the record says of training
    record: dict  # of the run that scored
    log: str
    chunks: str = ""  # "" or in which way the chunks are not the run's
    script: Path = Path(train_gpt.__file__)
    make_predictor: Callable = train_gpt.make_predictor
    score: Callable = train_gpt.score

    def predictor(self, run: Run):
        """A new predictor of the stage, as the run made it."""
        return self.make_predictor(self.stage, self.model, self.mixer, self.c, run, self.tokenizer)


@dataclass
class Ledger:
    """What a watched pass did."""

    predicted: np.ndarray  # how often each position was
    nats: np.ndarray  # what its row charges for the token that stands there
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
    unscored: int = 0  # of which no row had been asked for before
    foreign: int = 0  # tokens that update was given and that do not stand there


class Witness:
    """A predictor that passes everything on, writes down what it sees, and asks again with another future."""

    def __init__(self, predictor, stream: Stream, ledger: Ledger, probes: int, vocab_size: int):
        self.predictor, self.stream, self.ledger, self.probes = predictor, stream, ledger, probes
        self.stride, self.vocab_size, self.seen = predictor.stride, vocab_size, 0
        self.random = torch.Generator().manual_seed(len(stream))

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        before = train_gpt.fingerprint(self.predictor)
        logp = self.predictor.predict(inputs, rows)
        self.ledger.state_changes += train_gpt.fingerprint(self.predictor) != before
        self.look_at(logp, self.seen + rows.start)
        for j in self.positions(inputs, rows):
            self.probe(inputs, rows, logp, j)
        return logp

    def look_at(self, logp: Tensor, first: int) -> None:
        """The rows of positions [first, first + m) as distributions."""
        ledger, m = self.ledger, len(logp)
        targets = self.stream.tokens[first + 1 : first + m + 1].to(logp.device)
        if logp.shape != (len(targets), self.vocab_size):
            ledger.bad_shape += 1
        if not m or logp.shape != (len(targets), self.vocab_size):
            return
        ledger.predicted[first : first + m] += 1
        ledger.nats[first : first + m] = -logp.gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu()
        p = logp.double().exp()
        ledger.not_finite += int((~logp.isfinite()).any(1).sum())
        ledger.sum_error = max(ledger.sum_error, (p.sum(1) - 1).abs().nan_to_num(math.inf).max().item())
        ledger.least = min(ledger.least, p.nan_to_num(0.0).min().item())

    def positions(self, inputs: Tensor, rows: slice) -> list[int]:
        """Rows to change the future of: the ends of what was asked for, beginnings of documents, and any."""
        begins = (inputs[rows] == self.stream.tokens[0].to(inputs)).nonzero().flatten() + rows.start
        anywhere = torch.randint(rows.start, max(rows.stop, rows.start + 1), (self.probes,), generator=self.random)
        found = [rows.start, *begins[:2].tolist(), *(begins[:1] - 1).tolist(), *anywhere.tolist(), rows.stop - 2]
        return sorted({j for j in found if rows.start <= j < min(rows.stop, len(inputs) - 1)})[: 2 * self.probes]

    def probe(self, inputs: Tensor, rows: slice, logp: Tensor, j: int) -> None:
        """Change all that comes after row j's context, then its target alone: neither may move what is before."""
        ledger, here = self.ledger, j - rows.start
        other = torch.randint(0, self.vocab_size, inputs[j + 1 :].shape, generator=self.random).to(inputs)
        after = self.predictor.predict(torch.cat([inputs[: j + 1], other]), rows)
        ledger.probes += 1
        ledger.moved_rows += int((after[: here + 1] != logp[: here + 1]).any(1).sum())
        flipped = inputs.clone()
        flipped[j + 1] = (flipped[j + 1] + 1) % self.vocab_size
        ledger.flips += 1
        ledger.moved_by_target += int((self.predictor.predict(flipped, rows)[here] != logp[here]).any())

    def update(self, tokens: Tensor) -> None:
        ledger, n = self.ledger, len(tokens) - 1
        given = self.stream.tokens[self.seen : self.seen + n + 1]
        ledger.learned += n
        ledger.unscored += int((ledger.predicted[self.seen : self.seen + n] == 0).sum()) + n + 1 - len(given)
        ledger.foreign += int((tokens.cpu()[: len(given)] != given).sum())
        self.predictor.update(tokens)
        self.seen += n


def watched_pass(subject: Subject, run: Run, probes: int) -> tuple[Ledger, train_gpt.Score]:
    """Score the subject's stream under its own loop, watching each predictor."""
    n = len(subject.stream)
    ledger = Ledger(np.zeros(n, dtype=np.int64), np.zeros(n))
    witness = Witness(subject.predictor(run), subject.stream, ledger, probes, subject.c.vocab_size)
    return ledger, subject.score(witness, subject.stream, chunk_tokens(subject), run)


def chunk_tokens(subject: Subject) -> int:
    return subject.c.ttt_chunk_tokens if subject.stage in ("ttt", "mixed") else subject.c.val_batch_size


class ThreadRank(Run):
    """One of several ranks that are threads of this process: what of torch.distributed scoring needs."""

    def __init__(self, run: Run, rank: int, barrier: threading.Barrier, box: list):
        self.__dict__.update(run.__dict__)
        self.rank, self.world_size, self.barrier, self.box = rank, barrier.parties, barrier, box

    def exchange(self, mine, reduce):
        self.box[self.rank] = mine
        self.barrier.wait()
        result = reduce(self.box)
        self.barrier.wait()
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.exchange(tensor, lambda parts: torch.stack(parts).sum(0)))

    def max(self, value: float) -> float:
        return self.exchange(value, max)


def pass_of_ranks(subject: Subject, n_ranks: int, probes: int) -> list[tuple[Ledger, train_gpt.Score]]:
    """The same pass by several ranks; what each of them saw."""
    barrier, box, found = threading.Barrier(n_ranks), [None] * n_ranks, [None] * n_ranks

    def work(rank: int) -> None:
        try:
            found[rank] = watched_pass(subject, ThreadRank(subject.run, rank, barrier, box), probes)
        finally:
            if found[rank] is None:
                barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(n_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if None in found:
        raise InputError(f"a pass by {n_ranks} ranks stopped; what is printed above says where")
    return found


# ======================================================================================================================
# Checks. Each returns whether it passed and a figure, in words.
# ======================================================================================================================


@dataclass(frozen=True)
class Passes:
    """The stream scored by one rank and by two."""

    ledger: Ledger
    score: train_gpt.Score
    two: list[tuple[Ledger, train_gpt.Score]] = field(default_factory=list)


def causal(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Condition 1: what stands at a position or after it moves no row up to that position's."""
    ledgers = [passes.ledger, *(ledger for ledger, _ in passes.two)]
    probes, moved = sum(x.probes for x in ledgers), sum(x.moved_rows for x in ledgers)
    return (
        probes > 0 and not moved,
        f"all that follows changed at {probes} positions, by 1 rank and 2: {moved} rows moved",
    )


def documents(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """What enters the first block at a BOS is the same whatever ended the document before."""
    found = []
    handle = subject.model.blocks[0].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][:, 1].clone()))
    last = torch.arange(subject.c.vocab_size, device=subject.run.device)
    with torch.no_grad():
        subject.model(torch.stack([last, torch.full_like(last, subject.c.bos_id)], dim=1))
    handle.remove()
    moved = int((found[0] != found[0][:1]).any(1).sum())
    return not moved, f"{len(last)} tokens before a BOS: {moved} move what enters the blocks there"


def ranks(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The score is the same by one rank and by two."""
    difference = max(abs(score.val_bpb - passes.score.val_bpb) for _, score in passes.two)
    allowed = RANK_TOLERANCE[subject.run.dtype]
    return difference <= allowed, f"2 ranks differ from 1 by {difference:.1e} bits per byte; allowed is {allowed:.0e}"


def distribution(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Condition 2: rows over the whole vocabulary, positive, finite, of sum one, and the same for every target."""
    x, flawless = passes.ledger, 0
    passed = x.bad_shape == x.not_finite == x.moved_by_target == flawless and x.sum_error <= SUM_TOLERANCE
    return passed and x.least > 0 and x.flips > 0, (
        f"{int(x.predicted.sum())} rows of {subject.c.vocab_size}: |sum - 1| up to {x.sum_error:.1e}, least probability"
        f" {x.least:.1e}, {x.not_finite} not finite, {x.bad_shape} blocks of another shape;"
        f" {x.flips} targets changed: {x.moved_by_target} rows moved"
    )


def score_before_update(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Condition 3: predict leaves the state alone, and update is given scored positions only."""
    x = passes.ledger
    return x.state_changes == x.unscored == x.foreign == 0, (
        f"predict changed the state {x.state_changes} times; of {x.learned} positions learned from, {x.unscored} were"
        f" not scored before and {x.foreign} hold other tokens"
    )


def single_pass(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Condition 4: each position is predicted once and charged what its row says."""
    x, charged = passes.ledger, passes.score.nll_nats.numpy()
    rightly = int((charged == x.nats).sum()) if charged.shape == x.nats.shape else 0
    n, once = len(subject.stream), int((x.predicted == 1).sum())
    return once == rightly == n, (
        f"{once} of {n} positions predicted once, at most {x.predicted.max()} times;"
        f" {rightly} charged what their row says"
    )


def named_stage(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Condition 4: the stage that is reported was named before the run."""
    stated = re.search(r"^STAGES=(\S+)$", subject.log, re.MULTILINE)
    final = re.search(r"^final val_bpb:(\S+) stage:(\S+)", subject.log, re.MULTILINE)
    if not (stated and final):
        return False, "the log lacks STAGES or its final line"
    bpb, stage = final.groups()
    named = stated.start() < final.start() and stated[1].split(",")[-1] == stage == subject.record["final_stage"]
    agrees = bpb == f"{subject.record['val_bpb']:.8f}" == f"{subject.record['stages'][subject.stage]['val_bpb']:.8f}"
    return named and agrees, f"STAGES={stated[1]} at the top of the log, {stage} {bpb} at its end and in the record"


def claim(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The reported score is that of the per-token record, whose head this audit's own pass gives again."""
    nats = per_token_nats(subject)
    if nats is None:
        return False, "no per-token record: score with SCORES_PATH=x.npz"
    stated = subject.record["val_bpb"]
    whole = nats.sum() / math.log(2) / max(1, subject.record["stages"][subject.stage]["bytes"])
    if subject.chunks:
        return abs(whole / stated - 1) < 1e-9, f"val_bpb {stated:.8f}, by token {whole:.8f}; {subject.chunks}"
    here, there = passes.score.nll_nats.sum().item(), nats[: len(subject.stream)].sum()
    passed = abs(whole / stated - 1) < 1e-9 and abs(here / there - 1) <= BITS_TOLERANCE
    return passed, (
        f"val_bpb {stated:.8f}, by token {whole:.8f}; the first {len(subject.stream)} tokens take"
        f" {there / math.log(2):.1f} bits there and {here / math.log(2):.1f} here"
    )


def per_token_nats(subject: Subject) -> np.ndarray | None:
    """What the run wrote to SCORES_PATH, beside its record if the path is not valid from here."""
    path = Path(subject.record["config"]["scores_path"])
    return np.load(path)["nll_nats"] if path.suffix and path.is_file() else None


def bytes_of_text(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The bytes that the score divides by are those of the decoded text, of all that the run scored."""
    row = subject.record["stages"][subject.stage]
    c = dataclasses.replace(subject.c, val_tokens=row["tokens"])
    stream = Stream(c, torch.device("cpu"), subject.tokenizer)
    counted, decoded = int(stream.token_bytes.sum()), utf8_length(stream.tokens.tolist(), subject.tokenizer)
    figure = f"{decoded} bytes of text, {counted} by token, {row['bytes']} in the record"
    return decoded == counted == row["bytes"], figure


def utf8_length(tokens: list[int], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the decoded documents; a stream that ends inside a character counts the bytes that it has."""
    tail = []
    while tokenizer.sp.is_byte(tokens[-1 - len(tail)]):
        tail.insert(0, int(tokenizer.sp.id_to_piece(tokens[-1 - len(tail)])[3:5], 16))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(bytes(tail))
    open_bytes = len(decoder.getstate()[0])
    whole = tokens[: len(tokens) - open_bytes]
    return sum(len(text.encode()) for text in codec.documents(whole, tokenizer)) + open_bytes


def subset(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """A run on a part of the stream says so in its log and its record."""
    everything = Stream(dataclasses.replace(subject.c, val_tokens=0), torch.device("cpu"), subject.tokenizer)
    row, final = subject.record["stages"][subject.stage], subject.log.rstrip().splitlines()[-1]
    whole = (row["tokens"], row["documents"]) == (len(everything), everything.documents)
    labelled = ("whole stream" if whole else "PARTIAL stream") in final and row["whole_stream"] == whole
    return labelled, (
        f"{row['tokens']} of {len(everything)} tokens, {row['documents']} of {everything.documents} documents,"
        f" {'rightly' if labelled else 'WRONGLY'} called {'whole' if row['whole_stream'] else 'partial'}"
    )


def separation(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """No validation document stands in the training shards, and no more 64-token runs of them than chance brings."""
    tokens = np.concatenate([train_gpt.read_shard(path) for path in train_gpt.find_shards(subject.c, "val")])
    hashes, n_train, short = run_hashes(tokens), 0, set()
    found, maybe = np.zeros(len(hashes), dtype=bool), np.zeros(1 << 24, dtype=bool)
    maybe[hashes >> 40] = True
    for path in train_gpt.find_shards(subject.c, "train"):
        shard = train_gpt.read_shard(path)
        n_train += len(shard)
        short |= {document.tobytes() for document in split_documents(shard, subject.c) if len(document) < RUN_TOKENS}
        for start in range(0, len(shard), 1 << 22):
            these = run_hashes(shard[start : start + (1 << 22) + RUN_TOKENS - 1])
            found |= np.isin(hashes, these[maybe[these >> 40]])
    covered = np.convolve(found, np.ones(RUN_TOKENS))[: len(tokens)] > 0
    copied = n_documents = 0
    for document, here in zip(*(split_documents(tokens, subject.c, x) for x in (tokens, covered)), strict=True):
        n_documents += 1
        copied += document.tobytes() in short if len(document) < RUN_TOKENS else here.mean() > 0.5
    share = covered.mean()
    return copied == 0 and share <= SHARED_SHARE, (
        f"{copied} of {n_documents} documents stand mostly in {n_train} training tokens, {int(covered.sum())} tokens"
        f" ({100 * share:.2f} %) in shared runs of {RUN_TOKENS}; allowed is {100 * SHARED_SHARE:g} %"
    )


def split_documents(tokens: np.ndarray, c: Config, values: np.ndarray | None = None) -> list[np.ndarray]:
    """The values (the tokens themselves) of each document, its BOS left out; what stands before the first BOS too."""
    begins = np.flatnonzero(tokens == c.bos_id)
    return [part[1:] for part in np.split(tokens if values is None else values, begins)[1:]]


def run_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of every RUN_TOKENS consecutive tokens, by doubling: uint64 [n - RUN_TOKENS + 1]."""
    number, length, factor = tokens.astype(np.uint64) + np.uint64(1), 1, train_gpt.ContextIndex.MULTIPLIER
    while length < RUN_TOKENS:
        number = number[: max(0, len(number) - length)] * np.uint64(factor) + number[length:]
        factor, length = factor * factor % 2**64, 2 * length
    return number


def training_text_only(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The script trains, averages, calibrates and packs in a folder without validation text, so it reads none."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        data.mkdir()
        shutil.copy(tokenizer_path(subject.c), data / "tokenizer.model")
        shard = train_gpt.read_shard(train_gpt.find_shards(subject.c, "train")[0])
        (data / "x_train_000000.bin").write_bytes(as_shard(shard[: 64 * subject.c.train_seq_len + 1]))
        given = dict(preset="", phase="train", run_id="rehearsal", log_dir="logs", iterations=2, val_loss_every=0)
        given |= dict(data_path="data", tokenizer_path="", artifact_path="", scores_path="", torch_compile=False)
        given |= dict(train_batch_tokens=subject.c.train_seq_len)
        env = {
            name.upper(): train_gpt.show(as_setting(value))
            for name, value in (subject.record["config"] | given).items()
        }
        command = [sys.executable, str(Path(subject.script).resolve())]
        done = subprocess.run(command, cwd=folder, env={**outside_settings(), **env}, capture_output=True, text=True)
        packed = Path(folder, "logs", "rehearsal.artifact").is_file()
    said = "" if done.returncode == 0 else ": " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    steps = "warm-up, 2 steps, averaging, calibration and packing"
    return (
        done.returncode == 0 and packed,
        f"{steps} in a folder without validation text: status {done.returncode}{said}",
    )


def as_setting(value):
    return tuple(value) if isinstance(value, list) else value


def outside_settings() -> dict[str, str]:
    """The environment without what belongs to a run."""
    settings = {f.name.upper() for f in dataclasses.fields(Config)} | {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    return {name: value for name, value in os.environ.items() if name not in settings}


def tokenizer_path(c: Config) -> str:
    return c.tokenizer_path or os.path.join(c.data_path, "tokenizer.model")


def as_shard(tokens: np.ndarray) -> bytes:
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    return header.tobytes() + tokens.astype("<u2").tobytes()


def script(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The script at hand is the one that scored."""
    here = hashlib.sha256(Path(subject.script).read_bytes()).hexdigest()
    logged = re.search(r"^script_sha256:(\S+)$", subject.log, re.MULTILINE)
    return bool(logged) and logged[
        1
    ] == here, f"sha256 {here[:16]} here, {logged[1][:16] if logged else 'none'} in the log"


def size(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Script and artifact under the decimal cap, by the files at hand."""
    code, model = (os.path.getsize(path) for path in (subject.script, subject.c.artifact_path))
    total, stated = code + model, subject.record["artifact"]
    agrees = stated["total_bytes"] == stated["code_bytes"] + model and stated["cap_bytes"] == CAP_BYTES
    return total <= CAP_BYTES and agrees, (
        f"script {code} + artifact {model} = {total} bytes of {CAP_BYTES}; the record says {stated['total_bytes']} of"
        f" {stated['cap_bytes']}"
    )


def time(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """Training with all that belongs to it, and evaluation, within 600 s each where the hardware is a GPU."""
    if subject.trained is None:
        return False, "no record of the training was given"
    t = subject.trained
    parts = dict(
        steps=t["seconds"],
        averaging=t["seconds_with_averaging"] - t["seconds"],
        calibration=t["calibration_seconds"],
        packing=t["pack_seconds"],
    )
    training, evaluation = sum(parts.values()), subject.record["stages"][subject.stage]["seconds"]
    on_cpu = "on CPU" in subject.record["hardware"]
    limit = "no limit on a CPU" if on_cpu else f"limit {LIMIT_SECONDS:g} s each"
    listed = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    passed = on_cpu or max(training, evaluation) <= LIMIT_SECONDS
    return passed, f"training {training:.1f} s ({listed}), evaluation {evaluation:.1f} s; {limit}"


def decoded(subject: Subject, passes: Passes) -> tuple[bool, str]:
    """The text comes back, in a process that has the artifact, the bits and a tokenizer, and takes what is reported."""
    stream, c = subject.stream, subject.c
    data = codec.encode(subject.predictor(subject.run), stream.tokens.to(subject.run.device), chunk_tokens(subject))
    nats = per_token_nats(subject)
    from_run = nats is not None and not subject.chunks
    bits = (nats[: len(stream)].sum() if from_run else passes.ledger.nats.sum()) / math.log(2)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.bits").write_bytes(data)
        shutil.copy(c.artifact_path, Path(folder, "x.artifact"))
        shutil.copy(tokenizer_path(c), Path(folder, "tokenizer.model"))
        command = [sys.executable, str(Path(codec.__file__).resolve()), "decode", "--artifact", "x.artifact"]
        command += ["--tokenizer", "tokenizer.model", "--file", "text.bits", "--out", "text"]
        kept = {name.upper(): train_gpt.show(getattr(c, name)) for name in c.marked("score")}
        runtime = dict(
            STAGES=subject.stage, DEVICE=c.device, DTYPE=c.dtype, MICRO_BATCH_TOKENS=str(c.micro_batch_tokens)
        )
        env = {**outside_settings(), **kept, **runtime}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        text = Path(folder, "text").read_bytes() if done.returncode == 0 else b""
    equal = text == codec.as_text(stream.tokens, subject.tokenizer)
    close = abs(8 * len(data) - bits) <= BITS_TOLERANCE * bits + 64
    said = "" if done.returncode == 0 else ": " + (done.stderr.strip().splitlines() or ["no message"])[-1]
    return equal and close, (
        f"{len(stream)} tokens in {len(data)} bytes, {bits / 8:.1f} by {'the run' if from_run else 'this pass'};"
        f" text of {len(text)} bytes {'identical' if equal else 'NOT identical'}{said}"
        f"{'; ' + subject.chunks if subject.chunks else ''}"
    )


CHECKS = {
    "causal": causal,
    "documents": documents,
    "ranks": ranks,
    "distribution": distribution,
    "score before update": score_before_update,
    "single pass": single_pass,
    "named stage": named_stage,
    "claim": claim,
    "bytes": bytes_of_text,
    "subset": subset,
    "separation": separation,
    "training text only": training_text_only,
    "script": script,
    "size": size,
    "time": time,
    "decode": decoded,
}


def audit(subject: Subject, names=tuple(CHECKS), probes: int = 4, say=lambda name, passed, figure: None) -> dict:
    """{check: (passed, figure)} of the named checks, in order."""
    ledger, score = watched_pass(subject, subject.run, probes)
    passes = Passes(ledger, score, pass_of_ranks(subject, 2, 1))
    found = {}
    for name in names:
        found[name] = CHECKS[name](subject, passes)
        say(name, *found[name])
    return found


# ======================================================================================================================
# The command.
# ======================================================================================================================


def read_records(paths: list[str], artifact: str) -> tuple[dict | None, dict, str]:
    """What is said of training, the record of the score, and that run's log. Raises InputError."""
    trained, scored, log = None, None, ""
    for path in map(Path, paths or [Path(artifact).with_suffix(".json")]):
        try:
            record = json.loads(path.read_text())
            text = path.with_suffix(".txt").read_text()
        except (OSError, ValueError) as error:
            raise InputError(f"--record={path}: {error}; allowed is a run's JSON with its log beside it") from None
        trained = record["train"] or trained
        scored, log = (record, text) if record["stages"] else (scored, log)
    if scored is None:
        raise InputError("--record: no run that scored is among them; PHASE=eval makes one")
    return trained, scored, log


def shortened(c: Config, n_tokens: int) -> tuple[int, str]:
    """Chunks of which several fit into the tokens, and in words how they differ from the run's."""
    if n_tokens >= LEAST_CHUNKS * c.ttt_chunk_tokens:
        return c.ttt_chunk_tokens, ""
    length = max(c.eval_stride, n_tokens // LEAST_CHUNKS // c.eval_stride * c.eval_stride)
    return length, f"chunks of {length} tokens instead of the run's {c.ttt_chunk_tokens}"


def subject_of(args) -> Subject:
    """The run that the arguments name. Raises InputError."""
    trained, record, log = read_records(args.record, args.artifact)
    stated = record["config"]
    kept = {name.upper(): train_gpt.show(stated[name]) for name in ("device", "dtype", "micro_batch_tokens")}
    c, _, parts = codec.in_force(args.artifact, args.data, VAL_TOKENS=args.tokens, STAGES=record["final_stage"], **kept)
    score_settings = {name: as_setting(stated[name]) for name in c.marked("score")}
    c = dataclasses.replace(c, **score_settings)
    run, tokenizer = Run(c), Tokenizer(c)
    stream = Stream(c, run.device, tokenizer)
    length, words = shortened(c, len(stream))
    c = dataclasses.replace(c, ttt_chunk_tokens=length)
    model, mixer = train_gpt.unpack(parts, c, run)
    return Subject(c, run, tokenizer, stream, model, mixer, record["final_stage"], trained, record, log, words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="DIR", help="the shards that the run trained and scored on")
    parser.add_argument("--record", nargs="+", metavar="JSON", help="records of the run or runs [beside the artifact]")
    parser.add_argument(
        "--tokens", type=int, default=8192, help="head of the stream that is watched and decoded [8192]"
    )
    parser.add_argument("--report", metavar="FILE", help="write the findings as JSON")
    args = parser.parse_args()
    codec.be_deterministic()
    try:
        subject = subject_of(args)
        print(f"# {args.artifact}: {len(subject.stream)} tokens, stage {subject.stage}, {subject.run.hardware()}")
        if subject.chunks:
            print(f"# {subject.chunks}")

        def say(name: str, passed: bool, figure: str) -> None:
            print(f"{'PASS' if passed else 'FAIL'}  {name:<20} {figure}", flush=True)

        found = audit(subject, say=say)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.report:
        report = dict(
            artifact_sha256=hashlib.sha256(Path(args.artifact).read_bytes()).hexdigest(),
            tokens=len(subject.stream),
            chunks=subject.chunks or "the run's",
            hardware=subject.run.hardware(),
            versions=train_gpt.versions(),
            checks={name: dict(passed=bool(passed), figure=figure) for name, (passed, figure) in found.items()},
        )
        train_gpt.write_atomically(Path(args.report), (json.dumps(report, indent=1) + "\n").encode())
    failed = [name for name, (passed, _) in found.items() if not passed]
    print(
        f"{len(found) - len(failed)} of {len(found)} checks passed"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
