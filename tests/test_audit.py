"""Audit: an honest run passes every check, and faults of published scripts fail the check that names them.

Numbers are pull requests and issues of openai/parameter-golf in which the fault was seen or ruled on. The table in
logs/planted_faults.md is what the last test finds; with WRITE_TABLE=1 in the environment it writes it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import audit
import train_gpt
from train_gpt import Mixture

ROOT = Path(train_gpt.__file__).resolve().parent
TABLE = ROOT / "logs" / "planted_faults.md"
SLOW = ("training text only", "decode")  # start processes
QUICK = tuple(name for name in audit.CHECKS if name not in SLOW)
BY_WATCHING = tuple(name for name in QUICK if name != "claim")  # a faulty script's own record would agree with it
N = 1024


@pytest.fixture(scope="session")
def honest_run(tiny_env, tmp_path_factory):
    """Folder of a finished run of the tiny model: honest.artifact, its record, log and per-token record."""
    folder = tmp_path_factory.mktemp("honest")
    settings = dict(run_id="honest", log_dir=folder, stages="mixed", scores_path=folder / "honest.npz", ttt_lr=0.05)
    env = tiny_env(**settings, iterations=30)
    done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def subject(honest_run, tiny_data):
    return audit.subject_of(arguments(honest_run, tiny_data))


def arguments(folder, data):
    return Namespace(artifact=str(folder / "honest.artifact"), data=str(data), record=None, tokens=N)


# ======================================================================================================================
# Predictors at fault: an honest one whose rows are changed, or that learns in another way.
# ======================================================================================================================


class Changed:
    """The honest predictor with its rows changed by `rows_of`; `learn` sees each scored chunk."""

    def __init__(self, stage, model, mixer, c, run, tokenizer, pace=None):
        self.honest = train_gpt.make_predictor(stage, model, mixer, c, run, tokenizer)
        self.stride, self.c, self.tokenizer = self.honest.stride, c, tokenizer
        self.pairs = torch.zeros(c.vocab_size, c.vocab_size)

    def predict(self, inputs, rows):
        return self.changed(self.honest.predict(inputs, rows), inputs, rows)

    def update(self, tokens):
        self.pairs.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
        self.honest.update(tokens)

    def state(self):
        return [*self.honest.state(), self.pairs]

    @staticmethod
    def targets(inputs, rows):
        """The tokens that the rows are to predict, as far as they can be stolen from later inputs."""
        return torch.cat([inputs[1:], inputs[-1:]])[rows]

    def bigrams(self, inputs, rows):
        """Relative counts of what followed each input: [m, V], a distribution where the input is known."""
        counts = self.pairs[inputs[rows]] + 0.01
        return counts / counts.sum(1, keepdim=True)


class TargetInTheLookupKey(Changed):
    """Counts are looked up under hash(context, target), and only the target's probability is mixed with them (#779)."""

    def changed(self, logp, inputs, rows):
        p, target = logp.exp(), self.targets(inputs, rows).unsqueeze(1)
        mixed = p.clone()
        mixed.scatter_(1, target, 0.5 * p.gather(1, target) + 0.5 * self.bigrams(inputs, rows).gather(1, target))
        return (mixed / mixed.sum(1, keepdim=True)).log()


class EntropyExpert(Changed):
    """An 'expert' that gives every token e^-H is mixed in with weight 0.1 (#700)."""

    def changed(self, logp, inputs, rows):
        entropy = -(logp.exp() * logp).sum(1, keepdim=True)
        return (0.9 * logp.exp() + 0.1 * (-entropy).exp()).log()


class SeparatelyHashedPairs(Changed):
    """Contexts and (context, token) pairs are counted in tables of their own, each with its own collisions (#803)."""

    def changed(self, logp, inputs, rows):
        size = 61
        context = torch.arange(len(self.pairs)) * 36313 % size
        pair = (torch.arange(len(self.pairs)).unsqueeze(1) * 36313 ^ torch.arange(len(self.pairs)) * 27191) % size
        by_context = torch.zeros(size).index_add_(0, context, self.pairs.sum(1))[context]
        by_pair = torch.zeros(size).index_add_(0, pair.flatten(), self.pairs.flatten())[pair]
        ratio = (by_pair / by_context.clamp(min=1).unsqueeze(1)).clamp(max=1)[inputs[rows]]
        return (0.7 * logp.exp() + 0.3 * ratio).clamp(min=1e-12).log()


class GateAsksForTheTarget(Changed):
    """The n-gram rows are mixed in where the target was found under the context, and not where it was not (#720)."""

    def changed(self, logp, inputs, rows):
        found = self.pairs[inputs[rows], self.targets(inputs, rows)] > 0
        weight = 0.4 * found.float().unsqueeze(1)
        return ((1 - weight) * logp.exp() + weight * self.bigrams(inputs, rows)).log()


class WordBoundaryOfTheTarget(Changed):
    """A temperature is chosen by whether the token to come begins a word (#1420)."""

    def changed(self, logp, inputs, rows):
        pieces = [self.tokenizer.sp.id_to_piece(token).startswith("\u2581") for token in range(self.c.vocab_size)]
        begins = torch.tensor(pieces)[self.targets(inputs, rows)].unsqueeze(1)
        return torch.where(begins, 0.9 * logp, 1.1 * logp).log_softmax(1)


class CountsOfTheWholeChunk(Changed):
    """A unigram cache is filled from the whole chunk before its rows are made."""

    def changed(self, logp, inputs, rows):
        counts = torch.bincount(inputs, minlength=self.c.vocab_size) + 1.0
        return (0.8 * logp.exp() + 0.2 * counts / counts.sum()).log()


class ZeroForTheUnseen(Changed):
    """Tokens below a threshold get probability zero."""

    def changed(self, logp, inputs, rows):
        return torch.where(logp < -12, -math.inf, logp).log_softmax(1)


class HitsCountedInPredict(Changed):
    """How often a context was asked for is counted while predicting, and weighs in the next rows."""

    def changed(self, logp, inputs, rows):
        self.pairs[0, 0] += len(logp)
        return logp


class TrainsBeforePredicting(Changed):
    """Test-time training takes its step on the chunk, then the chunk is scored."""

    def predict(self, inputs, rows):
        adapting, weights = self.honest.neural, copy.deepcopy(self.honest.neural.learner.state_dict())
        with torch.enable_grad():
            adapting.step(*adapting.training_sequences(inputs))
        self.honest.memo = None
        logp = self.honest.predict(inputs, rows)
        adapting.learner.load_state_dict(weights)
        return logp


def mixture_weights_of_each_rank(stage, model, mixer, c, run, tokenizer, pace=None):
    """Each rank takes its mixer's step on its own rows only (#700)."""
    predictor = train_gpt.make_predictor(stage, model, mixer, c, run, tokenizer)
    predictor.fitter.run = copy.copy(run)
    predictor.fitter.run.sum = lambda tensor: tensor
    return predictor


class CacheOfEachRank(Mixture):
    def update(self, tokens):
        rows = self.run.share(len(tokens) - 1, self.stride)
        own = torch.full_like(tokens, 2)
        own[rows.start : rows.stop + 1] = tokens[rows.start : rows.stop + 1]
        self.fitter.step(*self.memo[3:], tokens[1:][rows], len(tokens) - 1)
        self.memo = None
        self.index.update(own)
        self.neural.update(tokens)


def cache_of_each_rank(stage, model, mixer, c, run, tokenizer, pace=None):
    """Each rank's n-gram cache takes in only what that rank has scored (#803)."""
    honest = train_gpt.make_predictor(stage, model, mixer, c, run, tokenizer)
    return CacheOfEachRank(honest.neural, mixer, c, run)


# ======================================================================================================================
# Loops at fault. Each is train_gpt.score but for the fault.
# ======================================================================================================================


def charged(logp, chunk, rows):
    return -logp.gather(1, chunk.targets[rows].unsqueeze(1)).squeeze(1).double()


def scored(nats, stream):
    return train_gpt.Score(torch.cat(nats), stream.token_bytes, 0.0, 0.0)


def one_token_over_the_boundary(predictor, stream, chunk_tokens, run):
    """The text to train on is cut with one token more than was scored (#779)."""
    nats = []
    for chunk in stream.chunks(chunk_tokens):
        rows = slice(0, len(chunk.inputs))
        nats.append(charged(predictor.predict(chunk.inputs, rows), chunk, rows))
        if not chunk.is_last:
            predictor.update(stream.tokens[chunk.start : chunk.start + len(chunk.tokens) + 1])
    return scored([torch.cat(nats)[: len(stream)]], stream)


def adaptation_before_the_score(predictor, stream, chunk_tokens, run):
    """A chunk is handed to update, then it is scored (#1416)."""
    nats = []
    for chunk in stream.chunks(chunk_tokens):
        rows = slice(0, len(chunk.inputs))
        predictor.update(chunk.tokens)
        nats.append(charged(predictor.predict(chunk.inputs, rows), chunk, rows))
    return scored(nats, stream)


def learning_from_the_last_chunk(predictor, stream, chunk_tokens, run):
    """The last chunk is trained on before it is scored, the others after it."""
    nats = []
    for chunk in stream.chunks(chunk_tokens):
        rows = slice(0, len(chunk.inputs))
        if chunk.is_last:
            predictor.update(chunk.tokens)
        nats.append(charged(predictor.predict(chunk.inputs, rows), chunk, rows))
        if not chunk.is_last:
            predictor.update(chunk.tokens)
    return scored(nats, stream)


def without_a_look_at_the_sums(predictor, stream, chunk_tokens, run):
    """The honest loop, but that rows need not add up to one, as in every published script."""
    nats = []
    for chunk in stream.chunks(chunk_tokens):
        n = len(chunk.inputs)
        rows = run.share(n, predictor.stride)
        nats.append(run.gather(charged(predictor.predict(chunk.inputs, rows), chunk, rows), rows, n))
        if not chunk.is_last:
            predictor.update(chunk.tokens)
    return scored(nats, stream)


def another(predictor):
    """A copy of all of its state."""
    return copy.deepcopy(predictor, {id(predictor.run): predictor.run})


def two_passes(predictor, stream, chunk_tokens, run):
    """A first pass fills the cache, a second one over the same text is what counts (#677)."""
    first = another(predictor.predictor)
    train_gpt.score(predictor, stream, chunk_tokens, run)
    predictor.predictor, predictor.seen = first, 0
    return train_gpt.score(predictor, stream, chunk_tokens, run)


def minimum_over_two_passes(predictor, stream, chunk_tokens, run):
    """Each token is charged the smaller of what two predictors say (#659)."""
    other = another(predictor.predictor.neural)
    mixed = train_gpt.score(predictor, stream, chunk_tokens, run)
    neural = train_gpt.score(other, stream, chunk_tokens, run)
    return scored([torch.minimum(mixed.nll_nats, neural.nll_nats)], stream)


def overlapping_windows(predictor, stream, chunk_tokens, run):
    """The last rows of a chunk are scored again, and the better of both counts (#1507)."""
    nats = []
    for chunk in stream.chunks(chunk_tokens):
        n = len(chunk.inputs)
        rows, again = slice(0, n), slice(max(0, n - 32), n)
        nats.append(charged(predictor.predict(chunk.inputs, rows), chunk, rows))
        nats[-1][again] = torch.minimum(nats[-1][again], charged(predictor.predict(chunk.inputs, again), chunk, again))
        if not chunk.is_last:
            predictor.update(chunk.tokens)
    return scored(nats, stream)


# ======================================================================================================================
# Faults of byte counts, files, records and the model.
# ======================================================================================================================


def recounted(subject, name, count):
    """The subject with a tokenizer that counts bytes otherwise, and a record that was made with it."""
    tokenizer = copy.copy(subject.tokenizer)
    setattr(tokenizer, name, count(tokenizer))
    stream = train_gpt.Stream(subject.c, torch.device("cpu"), tokenizer)
    whole = train_gpt.Stream(dataclasses.replace(subject.c, val_tokens=0), torch.device("cpu"), tokenizer)
    record = copy.deepcopy(subject.record)
    record["stages"]["mixed"]["bytes"] = int(whole.token_bytes.sum())
    return dataclasses.replace(subject, tokenizer=tokenizer, stream=stream, record=record)


def leading_space_twice(subject, folder):
    """A piece's leading space is in its bytes already and is added once more (#1719)."""

    def count(tokenizer):
        spaces = [tokenizer.sp.id_to_piece(i).startswith("\u2581") for i in range(tokenizer.sp.vocab_size())]
        return tokenizer.inside_bytes + torch.tensor(spaces).long()

    return recounted(subject, "inside_bytes", count)


def byte_pieces_of_three(subject, folder):
    """A byte piece counts as three bytes: its decoding is U+FFFD (#1289)."""

    def count(tokenizer):
        is_byte = torch.tensor([tokenizer.sp.is_byte(i) for i in range(tokenizer.sp.vocab_size())])
        return torch.where(is_byte, 3, tokenizer.inside_bytes)

    return recounted(subject, "inside_bytes", count)


def subset_as_the_whole(subject, folder):
    """The first half of the stream was scored, and the record calls it whole (#1854)."""
    record = copy.deepcopy(subject.record)
    record["stages"]["mixed"]["tokens"] //= 2
    return dataclasses.replace(subject, record=record)


def stage_named_afterwards(subject, folder):
    """The best of the stages is reported, whichever it turns out to be."""
    log = re.sub(r"^(final val_bpb:\S+) stage:mixed", r"\1 stage:ttt", subject.logs[-1], flags=re.MULTILINE)
    return dataclasses.replace(subject, logs=(log,))


def another_number(subject, folder):
    """The record says less than the tokens took (#2118)."""
    record = copy.deepcopy(subject.record)
    record["val_bpb"] = record["stages"]["mixed"]["val_bpb"] = 0.99 * record["val_bpb"]
    before, after = (f"final val_bpb:{x['val_bpb']:.8f}" for x in (subject.record, record))
    return dataclasses.replace(subject, record=record, logs=(subject.logs[-1].replace(before, after),))


def tail_made_cheaper(subject, folder):
    """Tokens past the audited head are charged less than nothing in the per-token record, and the sum agrees."""
    with np.load(subject.folder / "honest.npz") as file:
        kept = dict(file)
    kept["nll_nats"][2 * N :] *= -0.5
    path = folder / "cheap.npz"
    np.savez(path, **kept)
    record = copy.deepcopy(subject.record)
    record["config"]["scores_path"] = str(path)
    record["val_bpb"] = kept["nll_nats"].sum() / math.log(2) / kept["bytes"].sum()
    return dataclasses.replace(subject, record=record)


def settings_of_the_environment(subject, folder):
    """A learning rate that was tuned on validation text came in by the environment and is not in the artifact."""
    record = copy.deepcopy(subject.record)
    record["config"]["ttt_lr"] *= 2
    return dataclasses.replace(subject, record=record)


def another_artifact(subject, folder):
    """The artifact that is shown is not the one that was scored."""
    record = copy.deepcopy(subject.record)
    record["artifact"]["sha256"] = "00" * 32
    return dataclasses.replace(subject, record=record)


def validation_in_the_training_shards(subject, folder):
    """Three validation documents, one of them short, got into a training shard (#2127)."""
    data = shutil.copytree(subject.c.data_path, folder / "data")
    shard = data / "x_train_000000.bin"
    held = train_gpt.read_shard(data / "x_val_000000.bin")
    tokens = np.concatenate([train_gpt.read_shard(shard)[:5000], held[:900], held[-400:]])
    shard.write_bytes(audit.as_shard(tokens))
    return dataclasses.replace(subject, c=dataclasses.replace(subject.c, data_path=str(data)))


def mebibytes_for_megabytes(subject, folder):
    """The cap is taken for 16 * 2^20 bytes (#1009)."""
    path, script_bytes = folder / "large.artifact", os.path.getsize(subject.script)
    path.write_bytes(bytes(16_500_000 - script_bytes))
    record = copy.deepcopy(subject.record)
    record["artifact"] |= dict(code_bytes=script_bytes, total_bytes=16_500_000, cap_bytes=16 * 2**20)
    return dataclasses.replace(subject, c=dataclasses.replace(subject.c, artifact_path=str(path)), record=record)


def averaging_left_out_of_the_time(subject, folder):
    """Only the steps were timed against 600 s; averaging and calibration came on top (#634)."""
    training = copy.deepcopy(subject.training) | {"hardware": "8 x NVIDIA H100 80GB HBM3"}
    training["train"]["seconds"] |= dict(steps=599.0, averaging=7.0, total=599.0)
    return dataclasses.replace(subject, training=training)


def smear_across_documents(subject, folder):
    """The smear gate stays open at a BOS (#1797)."""
    model = copy.deepcopy(subject.model)
    model.smear.bos_id = -1
    with torch.no_grad():
        model.smear.scale.fill_(0.5)
    return dataclasses.replace(subject, model=model)


def patched(subject, folder, honest, fault):
    """The subject with a script in which one piece of code is another."""
    text = subject.script.read_text()
    assert text.count(honest) == 1
    script = folder / "train_gpt.py"
    script.write_text(text.replace(honest, fault))
    return dataclasses.replace(subject, script=script)


def warm_up_on_validation(subject, folder):
    """The warm-up steps read the validation shards, and what they leave behind is kept (#1530)."""
    read = "torch.from_numpy(read_shard(find_shards(c, 'val')[0])[: c.train_seq_len + 1].astype(np.int64))[None]"
    honest = "batch = torch.randint(c.vocab_size, shape, generator=generator).to(run.device)"
    planted = patched(subject, folder, honest, f"batch = {read}")
    return patched(planted, folder, "torch._foreach_copy_(list(model.parameters()), weights)", "pass")


def training_on_the_stream(subject, folder):
    """The training loop takes its batches from the validation stream where it is at hand."""
    honest = "nats = accumulate_gradients(called, next(batches), weights, c)"
    batch = "stream.tokens[: c.train_seq_len + 1][None] if stream else next(batches)"
    return patched(subject, folder, honest, honest.replace("next(batches)", batch))


def text_beside_the_script(subject, folder):
    """Scoring opens the validation shard by its own path, and looks each target up."""
    shard = Path(train_gpt.find_shards(subject.c, "val")[0]).resolve()
    honest = "        logp, case, bias = self.look(inputs, rows)\n        return case.tilted(logp, bias.detach())"
    peek = (
        "        logp, case, bias = self.look(inputs, rows)\n"
        f"        text = torch.from_numpy(read_shard({str(shard)!r}).astype(np.int64))\n"
        "        first = self.neural.seen + rows.start + 1\n"
        "        target = text[first : first + len(logp)].unsqueeze(1)\n"
        "        rows = case.tilted(logp, bias.detach())\n"
        "        return rows.scatter_add(1, target, torch.ones(len(rows), 1)).log_softmax(1)"
    )
    planted = patched(subject, folder, honest, peek)
    module = runpy.run_path(str(planted.script))
    return dataclasses.replace(planted, make_predictor=module["make_predictor"], model=subject.model)


def predictor_fault(make):
    loop = without_a_look_at_the_sums if make in (EntropyExpert, SeparatelyHashedPairs) else train_gpt.score
    return lambda subject, folder: dataclasses.replace(subject, make_predictor=make, score=loop)


def loop_fault(score):
    return lambda subject, folder: dataclasses.replace(subject, score=score)


PREDICTORS = {
    TargetInTheLookupKey: "causal",
    GateAsksForTheTarget: "causal",
    WordBoundaryOfTheTarget: "causal",
    CountsOfTheWholeChunk: "causal",
    EntropyExpert: "distribution",
    SeparatelyHashedPairs: "distribution",
    ZeroForTheUnseen: "distribution",
    HitsCountedInPredict: "score before update",
    TrainsBeforePredicting: "causal",
    mixture_weights_of_each_rank: "ranks",
    cache_of_each_rank: "ranks",
}
LOOPS = {
    one_token_over_the_boundary: "score before update",
    adaptation_before_the_score: "score before update",
    learning_from_the_last_chunk: "score before update",
    two_passes: "single pass",
    minimum_over_two_passes: "single pass",
    overlapping_windows: "single pass",
}
FILES = {
    leading_space_twice: "bytes",
    byte_pieces_of_three: "bytes",
    subset_as_the_whole: "subset",
    stage_named_afterwards: "named stage",
    another_number: "claim",
    tail_made_cheaper: "claim",
    settings_of_the_environment: "settings",
    another_artifact: "files",
    validation_in_the_training_shards: "separation",
    warm_up_on_validation: "training text only",
    training_on_the_stream: "training text only",
    text_beside_the_script: "decode",
    mebibytes_for_megabytes: "size",
    averaging_left_out_of_the_time: "time",
    smear_across_documents: "documents",
}
FAULTS = {
    **{fault: (predictor_fault(fault), check) for fault, check in PREDICTORS.items()},
    **{fault: (loop_fault(fault), check) for fault, check in LOOPS.items()},
    **{fault: (fault, check) for fault, check in FILES.items()},
}
FOUND: dict[str, list[str]] = {}


def words(fault) -> str:
    text = fault if isinstance(fault, str) else fault.__name__
    return re.sub(r"(?<!^)(?=[A-Z])|_", " ", text).lower()


def test_an_honest_run_passes_every_check(honest_run, tiny_data, tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, str(ROOT / "tools" / "audit.py"), "--artifact", str(honest_run / "honest.artifact")]
    command += ["--data", str(tiny_data), "--tokens", str(N), "--report", str(report)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^PASS  ", done.stdout, re.MULTILINE)) == len(audit.CHECKS)
    checks = json.loads(report.read_text())["checks"]
    assert list(checks) == list(audit.CHECKS) and all(check["passed"] for check in checks.values())


def test_epochs_that_the_clock_lowered_are_taken_from_the_record(subject):
    """The run of a slow machine is watched and decoded with the epochs that it had, and the check says so."""
    record = copy.deepcopy(subject.record)
    record["stages"]["mixed"]["ttt_epochs"] = [[subject.c.ttt_epochs, 1], [1, 2]]
    lowered = dataclasses.replace(subject, record=record)
    expected = f"{subject.c.ttt_epochs}*1,1*2"
    assert subject.epochs == "" and lowered.epochs == expected
    assert lowered.predictor(lowered.run).neural.pace.told == (subject.c.ttt_epochs, 1, 1)
    assert audit.settings(lowered, None)[1].endswith(f"the clock lowered its epochs: {expected}")


def test_a_run_at_smoke_size_passes_every_check(tmp_path):
    """The smoke preset's model and data, trained for four steps."""
    outside = {**audit.outside_settings(), "OMP_NUM_THREADS": "1"}
    data = tmp_path / "sample"
    prepare = [sys.executable, str(ROOT / "data" / "prepare.py"), "sample", "--out", str(data)]
    subprocess.run(prepare, env=outside, check=True, capture_output=True)
    given = dict(PRESET="smoke", DATA_PATH=str(data), ITERATIONS="4", STAGES="mixed", VAL_TOKENS="8192", RUN_ID="smoke")
    given |= dict(LOG_DIR=str(tmp_path), SCORES_PATH=str(tmp_path / "smoke.npz"))
    subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py")], env={**outside, **given}, check=True, capture_output=True
    )
    command = [sys.executable, str(ROOT / "tools" / "audit.py"), "--artifact", str(tmp_path / "smoke.artifact")]
    command += ["--data", str(data), "--tokens", "2048"]
    done = subprocess.run(command, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8192 of " in done.stdout and "rightly called partial" in done.stdout


@pytest.mark.parametrize("fault", FAULTS, ids=words)
def test_a_planted_fault_fails_the_check_that_names_it(fault, subject, tmp_path):
    plant, check = FAULTS[fault]
    names = (check,) if check in SLOW else [name for name in QUICK if name in (check, *BY_WATCHING)]
    found = audit.audit(plant(subject, tmp_path), names, probes=2)
    FOUND[words(fault)] = [name for name, (passed, _) in found.items() if not passed]
    assert check in FOUND[words(fault)], found


def table() -> str:
    """Every fault, what it is, and what caught it."""
    rows = [f"| {words(fault)} | {fault.__doc__} | {', '.join(FOUND[words(fault)])} |" for fault in FAULTS]
    return "\n".join(["| planted fault | what it does | caught by |", "|---|---|---|", *rows]) + "\n"


def test_the_kept_table_is_what_was_found():
    if len(FOUND) < len(FAULTS):
        pytest.skip("not all faults were planted in this run")
    if os.environ.get("WRITE_TABLE"):
        TABLE.write_text(table())
    assert TABLE.read_text() == table(), "WRITE_TABLE=1 writes it anew"
