"""Measurements of train_gpt.py. Each prints a table; nothing here counts against the cap.

python tools/bench.py mixer --data D              # the index and the mixture alone: tokens/s and bytes by length
python tools/bench.py worth --artifact A --data D  # what each mixer and each source of evidence gains
PRESET=cpu python tools/bench.py artifact --weights W.npz --data D  # bytes against loss: levels, coders, allocations
python tools/bench.py train --data D              # the training step and its parts: ms, tokens/s, FLOP utilization
python tools/bench.py train --data D --peer PATH  # the same of another script of the family and of this one, in turns
python tools/bench.py data --data D               # the loader alone: tokens/s, and stalls at a steady rate
python tools/bench.py score --artifact A --data D  # sliding windows: bits per byte and tokens/s by context and stride
python tools/bench.py ttt --artifact A --data D   # adaptation: bits per byte and tokens/s by stride and epochs

All but `worth` take other settings from the environment or, as `mixer`, have options for them. `train` without a peer,
`data`, `score`, `ttt` and `mixer` also run under torchrun.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import copy
import dataclasses
import io
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import (
    Case,
    Config,
    ContextIndex,
    Evidence,
    Fitter,
    Grid,
    InputError,
    Maxent,
    OneTokenTilt,
    Quantized,
    Run,
    Sensitivity,
    dequantize,
)

# ======================================================================================================================
# What the rooms below share: settings, first lines, figures.
# ======================================================================================================================


def from_environment(args) -> Config:
    """The settings in force, with the data that the command names. Raises InputError."""
    return Config.from_env({**os.environ, "DATA_PATH": args.data})


def open_artifact(args, env: dict[str, str]) -> tuple[Config, dict[str, bytes], train_gpt.Tokenizer]:
    """Settings, parts and tokenizer of the artifact and the data that the command names. Raises InputError."""
    given = dict(PHASE="eval", ARTIFACT_PATH=args.artifact, DATA_PATH=args.data, VAL_TOKENS=str(args.val_tokens))
    env = {**env, **given}
    header, parts = train_gpt.read_artifact(args.artifact)
    c = train_gpt.as_packed(Config.from_env(env), header, env)
    tokenizer = train_gpt.Tokenizer(c)
    train_gpt.check_tokenizer(header, tokenizer, args.artifact)
    return c, parts, tokenizer


def headline(measured: str, run: Run, kernels: train_gpt.Kernels | None = None) -> None:
    """What was measured, and on what."""
    place = f"{run.hardware()}, torch {torch.__version__}, {str(run.dtype).removeprefix('torch.')}"
    run.log(f"# {place}, {f'{kernels}, ' if kernels else ''}world size {run.world_size}: {measured}")


def extent(args, stream: train_gpt.Stream) -> str:
    """Which text is scored, and how much of it."""
    part = "whole stream" if stream.whole else f"PARTIAL: first {len(stream)} tokens"
    return f"{Path(args.data).name}, {stream.documents} documents, {part}"


def spread(values: list[float]) -> float:
    """From the 10th to the 90th percentile, in medians."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return (high - low) / middle


def at_least(kind: type, least):
    """An argument's type: a number with a lower bound."""

    def number(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: allowed is {least} or more")
        return value

    return number


def whole_numbers(text: str) -> list[int]:
    """An argument's type: whole numbers with commas."""
    return [int(part) for part in text.split(",") if part]


# ======================================================================================================================
# mixer: how fast the index and the mixture are, and how large, as the stream grows.
# ======================================================================================================================


def training_tokens(c: Config, n_tokens: int) -> np.ndarray:
    """The first n_tokens of the training shards, to fill the index with real text. Raises InputError if too few."""
    found, missing = [], n_tokens
    for path in train_gpt.find_shards(c, "train"):
        if missing:
            found.append(train_gpt.check_ids(train_gpt.read_shard(path)[:missing], c, path))
            missing -= len(found[-1])
    if missing:
        raise InputError(f"--millions={n_tokens / 1e6:g}: {c.data_path} has {(n_tokens - missing) / 1e6:.3f}")
    return np.concatenate(found)


def bench_mixer(args, run: Run) -> None:
    """One pass over the stream; at each length, the rate since the last one and the memory of the index."""
    orders = tuple(map(int, args.orders.split(",")))
    c = Config(data_path=args.data, vocab_size=args.vocab_size, ngram_orders=orders, ngram_table_bits=args.table_bits)
    marks = sorted(round(1e6 * float(m)) for m in args.millions.split(","))
    stream = training_tokens(c, marks[-1] + 1)
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(args.chunk, c.vocab_size, generator=generator)
    logp = logits.log_softmax(-1).to(run.device)  # stands in for the neural rows, whose cost is not measured here
    fitter = Fitter(Maxent(c).to(run.device), c.mixer_lr, run)
    index, parts = ContextIndex(c, run.device), dict.fromkeys(("index", "case", "bias", "mix", "learn"), 0.0)
    run.log(f"# {run.hardware()}; orders {orders}, chunks of {args.chunk}, {c.vocab_size} tokens of vocabulary")
    run.log("tokens     seconds  tokens/s  tokens/s here   index bytes  entries/row " + "  ".join(parts))
    began, last, entries = time.perf_counter(), (0, 0.0), 0

    def timed(part: str, make, *arguments):
        started = time.perf_counter()
        result = make(*arguments)
        run.synchronize()
        parts[part] += time.perf_counter() - started
        return result

    for start in range(0, marks[-1], args.chunk):
        tokens = torch.from_numpy(stream[start : start + args.chunk + 1].astype(np.int64)).to(run.device)
        n = len(tokens) - 1
        rows = run.share(n)
        mine = logp[: rows.stop - rows.start]
        evidence = timed("index", index.evidence, tokens[:-1], rows)
        case = timed("case", Case.of, mine, evidence)
        bias = timed("bias", fitter.mixer.bias, case)
        timed("mix", case.tilted, mine, bias.detach())
        timed("learn", fitter.step, case, bias, tokens[1:][rows], n)
        timed("index", index.update, tokens)
        entries += len(case.logp)
        done = start + n
        if any(start < mark <= done for mark in marks):
            seconds = run.max(time.perf_counter() - began)
            here = (done - last[0]) / (seconds - last[1])
            shares = "  ".join(f"{seconds:.1f}" for seconds in parts.values())
            run.log(
                f"{done:<10} {seconds:7.1f} {done / seconds:9.0f} {here:14.0f} {index.memory_bytes:13}"
                f" {entries * run.world_size / done:12.1f} {shares}"
            )
            last = done, seconds


# ======================================================================================================================
# worth: one neural pass over the stream, and on its rows every mixer, alone and with parts of the evidence left out.
# ======================================================================================================================


def masked(evidence: Evidence, keep: Tensor) -> Evidence:
    """The evidence of some (document, order) columns only; keep: bool [2, orders]."""
    counts, totals = evidence.counts * keep, evidence.totals * keep
    left = counts.flatten(1).amax(1) > 0
    return Evidence(evidence.row[left], evidence.token[left], counts[left], totals)


class DistantIndex(ContextIndex):
    """Knows only what lies more than `lag` tokens back, as if the model's own context covered all that is nearer."""

    def __init__(self, c: Config, device: torch.device, lag: int):
        super().__init__(c, device)
        self.lag, self.most = lag, torch.tensor(self.depths).unsqueeze(1)
        self.depths = [4 * depth for depth in self.depths]  # to get past those that are near

    def occurrences(self, rows: slice):
        """The latest of those beyond the lag, as many as the index itself would list."""
        position = torch.arange(self.seen + rows.start, self.seen + rows.stop, device=self.tokens.device)
        listed = torch.zeros(len(self.orders), len(position), dtype=torch.int64)
        for at in super().occurrences(rows):
            far = (at >= 0) & (position - at > self.lag) & (listed[: len(at)] < self.most[: len(at)])
            listed[: len(at)] += far
            yield torch.where(far, at, -1)


class Tilted:
    """A mixer of train_gpt on a part of the evidence."""

    def __init__(self, c: Config, run: Run, mixer: nn.Module, keep=None, fit=True, lr=None, lag=0):
        self.run, self.keep, self.fit, self.lag = run, keep, fit, lag
        self.fitter = Fitter(copy.deepcopy(mixer), c.mixer_lr if lr is None else lr, run)

    def case(self, logp: Tensor, evidence: Evidence) -> Case:
        return Case.of(logp, evidence if self.keep is None else masked(evidence, self.keep))

    def prepare(self, lessons: list) -> None:
        """Fit on held-out training text: (neural rows, evidence, targets) a chunk."""
        if self.fit and self.fitter.params:
            cases = [(self.case(logp, evidence), targets, len(targets)) for logp, evidence, targets in lessons]
            train_gpt.fit(self.fitter.mixer, cases, self.run)

    @torch.no_grad()
    def rows(self, logp: Tensor, evidence: Evidence) -> Tensor:
        case = self.case(logp, evidence)
        return case.tilted(logp, self.fitter.mixer.bias(case))

    def learn(self, logp: Tensor, evidence: Evidence, targets: Tensor) -> None:
        if self.fitter.adam and self.fitter.adam.param_groups[0]["lr"]:
            case = self.case(logp, evidence)
            self.fitter.step(case, self.fitter.mixer.bias(case), targets, len(targets))


def discounted(base: Tensor, evidence: Evidence, sides: slice, orders: list[int], discount: float = 0.75) -> Tensor:
    """Interpolated absolute discounting of the evidence's counts over `base` [m, V]: probabilities [m, V]."""
    found = base
    for k in orders:
        counts, totals = (x[:, sides, k].sum(1).to(base) for x in (evidence.counts, evidence.totals))
        distinct = torch.zeros_like(totals).index_add_(0, evidence.row, (counts > 0).to(base))
        left = torch.where(totals > 0, discount * distinct / totals.clamp(min=1), 1.0)
        share = (counts - discount).clamp(min=0) / totals[evidence.row].clamp(min=1)
        found = (found * left.unsqueeze(1)).index_put((evidence.row, evidence.token), share, accumulate=True)
    return found


class KneserNey:
    """Interpolated modified Kneser-Ney over all that came before (Chen & Goodman 1998, section 3), token by token.

    The longest contexts count their followers; a shorter one counts after how many different tokens it was followed so.
    """

    def __init__(self, vocab_size: int, order: int = 5):
        self.vocab_size, self.order = vocab_size, order  # tokens of context
        self.history: list[int] = []
        self.followers: list[dict] = [{} for _ in range(order + 1)]  # by context length: context -> token -> count
        self.n_with = np.zeros((order + 1, 5), dtype=np.int64)  # entries with a count of 1 to 4

    def rows(self, inputs: Tensor) -> Tensor:
        """Take in the next inputs [m] one by one; after each, the row for what follows: probabilities [m, V]."""
        rows = np.empty((len(inputs), self.vocab_size))
        for t, token in enumerate(inputs.tolist()):
            self.observe(token)
            rows[t] = self.row()
        return torch.from_numpy(rows)

    def observe(self, token: int) -> None:
        for k in range(len(self.history), -1, -1):
            seen = self.followers[k].setdefault(tuple(self.history[len(self.history) - k :]), {})
            before = seen.get(token, 0)
            seen[token] = before + 1
            for count, change in ((before, -1), (before + 1, 1)):
                if 0 < count <= 4:
                    self.n_with[k, count] += change
            if before:
                break  # the token before this context is not a new one
        self.history = (self.history + [token])[-self.order :]

    def row(self) -> np.ndarray:
        p = np.full(self.vocab_size, 1 / self.vocab_size)
        for k in range(len(self.history) + 1):
            seen = self.followers[k].get(tuple(self.history[len(self.history) - k :]))
            if seen is None:
                break
            tokens, counts = np.fromiter(seen.keys(), int), np.fromiter(seen.values(), float)
            taken = self.discounts(k)[counts.astype(int).clip(max=3)]
            p *= taken.sum() / counts.sum()
            p[tokens] += (counts - taken) / counts.sum()
        return p

    def discounts(self, k: int) -> np.ndarray:
        """What is taken from a count of 0, 1, 2, and 3 or more, estimated from the counts themselves."""
        _, n1, n2, n3, n4 = self.n_with[k].clip(min=1)
        y = n1 / (n1 + 2 * n2)
        return np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]).clip(0, [0, 1, 2, 3])


class Experts:
    """Dense rows for the linear mixers: the published experts, each a distribution over the whole vocabulary."""

    NAMES = (
        *("neural", "flattened", "unigram", "discounting", "Kneser-Ney", "document", "longest match"),
        "highest order",
    )

    def __init__(self, c: Config):
        self.orders, self.counts = sorted(c.ngram_orders), torch.ones(c.vocab_size)
        self.kneser_ney = KneserNey(c.vocab_size)

    def rows(self, logp: Tensor, evidence: Evidence, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [experts, m, V], and the order [m] that the highest-order expert found (0 = none).

        To be called once for each stretch of the stream, in its order: what Kneser-Ney knows are the inputs so far.
        """
        unigram = (self.counts / self.counts.sum()).expand_as(logp)
        low = [k for k, order in enumerate(self.orders) if 2 <= order <= 8]
        both = discounted(unigram, evidence, slice(0, 2), low)
        document = discounted(both, evidence, slice(0, 1), [k for k, order in enumerate(self.orders) if order <= 4])
        totals = evidence.totals.sum(1)
        longest = self.at_order(both, evidence, (totals > 0), range(len(self.orders)))
        usable = [k for k, order in enumerate(self.orders) if 2 <= order <= 10]
        highest = self.at_order(both, evidence, (totals > 1), usable)
        order = (torch.tensor(self.orders)[usable] * (totals[:, usable] > 1)).amax(1)
        flat = (0.5 * logp).softmax(-1)
        kneser_ney = self.kneser_ney.rows(inputs).to(logp)
        return torch.stack([logp.exp(), flat, unigram, both, kneser_ney, document, longest, highest]), order

    @staticmethod
    def at_order(base: Tensor, evidence: Evidence, known: Tensor, orders) -> Tensor:
        """The shares at the longest of the `orders` that is `known` [m, orders]; `base` where none is."""
        rank = torch.arange(known.shape[1]).expand_as(known)
        allowed = torch.zeros(known.shape[1], dtype=torch.bool)
        allowed[list(orders)] = True
        best = torch.where(known & allowed, rank, -1).amax(1)
        at = best.clamp(min=0)[evidence.row]
        counts = evidence.counts.sum(1).gather(1, at.unsqueeze(1)).squeeze(1).float()
        totals = evidence.totals.sum(1)[evidence.row].gather(1, at.unsqueeze(1)).squeeze(1).float()
        found = base * (best < 0).float().unsqueeze(1)
        share = torch.where(best[evidence.row] >= 0, counts / totals.clamp(min=1), 0.0)
        return found.index_put((evidence.row, evidence.token), share, accumulate=True)

    def learn(self, targets: Tensor) -> None:
        self.counts += torch.bincount(targets, minlength=len(self.counts))


def entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(1)


def published_alpha(logp: Tensor, order: Tensor) -> Tensor:
    """Weight of the n-gram rows by the neural entropy alone (PR #803)."""
    return torch.where(order > 0, 0.20 + 0.55 * torch.sigmoid(2 * (entropy(logp) - 3.0)), 0.0)


def published_alpha_by_order(logp: Tensor, order: Tensor) -> Tensor:
    """The same with a centre an order (PR #825)."""
    centres = torch.full((65,), 4.0)
    centres[[7, 6, 5, 4, 3, 2]] = torch.tensor([3.0, 3.2, 3.5, 3.8, 4.2, 4.5])
    return torch.where(order > 0, 0.05 + 0.55 * torch.sigmoid(2 * (entropy(logp) - centres[order])), 0.0)


class LinearMixers:
    """Every mixer that is a weighted sum of the dense experts; they share the experts' rows.

    The weights of a chunk, and within it Hedge's of a token, come from what was scored before it.
    """

    def __init__(self, c: Config):
        self.c, self.experts = c, Experts(c)
        names = Experts.NAMES
        self.gates = {f"gated, without {name}": Gate(c, [n for n in names if n != name]) for name in names}
        self.gates["gated, all experts"] = Gate(c, list(names))
        self.gates["gated, neural and discounting"] = Gate(c, ["neural", "discounting"])
        self.sum_error = 0.0  # largest |sum of an expert's row - 1|
        self.outer = Gate(c, [*names, "maxent"])
        self.geometric = Geometric(["neural", "discounting", "document"])
        self.hedges = {"hedge, eta 1": FixedShare(len(names), 0.0), "hedge, share 0.02": FixedShare(len(names), 0.02)}

    @torch.no_grad()
    def prepare(self, lessons: list, maxent: Maxent) -> None:
        taught, last = [], torch.tensor([self.c.bos_id])
        for logp, evidence, targets in lessons:
            inputs = torch.cat([last, targets[:-1]])
            rows, case, last = self.experts.rows(logp, evidence, inputs)[0], Case.of(logp, evidence), targets[-1:]
            tilted = case.tilted(logp, maxent.bias(case)).exp()
            p = at_targets(torch.cat([rows, tilted.unsqueeze(0)]), targets)
            taught.append((Gate.features(logp, evidence), p))
            self.geometric.learn(rows, targets)
            self.experts.learn(targets)
        for gate in (*self.gates.values(), self.outer):
            gate.prepare(taught)
        self.experts = Experts(self.c)

    @torch.no_grad()
    def score(self, logp: Tensor, evidence: Evidence, maxent: Tensor, chunk) -> dict[str, Tensor]:
        """Nats of each position by mixer; learns afterwards. The rows are whole before the target is looked at.

        `maxent` [m, V] are the rows of the artifact's mixer, for the gate that takes them as one more expert.
        """
        rows, order = self.experts.rows(logp, evidence, chunk.inputs)
        self.sum_error = max((rows.double().sum(2) - 1).abs().max().item(), self.sum_error)
        features = Gate.features(logp, evidence)
        weights = {name: gate.weights(features) for name, gate in self.gates.items()}
        outer, geometric = self.outer.weights(features), self.geometric.rows(rows)
        targets = chunk.targets  # here they come in
        p = at_targets(rows, targets)
        with_maxent = torch.cat([p, at_targets(maxent.exp().unsqueeze(0), targets)])
        found = {f"{name} alone": p[e] for e, name in enumerate(Experts.NAMES) if name != "neural"}
        ngram = p[Experts.NAMES.index("highest order")]
        for name, alpha in (
            ("backoff, entropy", published_alpha),
            ("backoff, entropy and order", published_alpha_by_order),
        ):
            found[name] = p[0].lerp(ngram, alpha(logp, order))
        for name, gate in self.gates.items():
            found[name] = (weights[name].T * p[gate.columns]).sum(0)
            gate.learn(features, p)
        found["gated, all experts and maxent"] = (outer.T * with_maxent).sum(0)
        found["geometric"] = at_targets(geometric.unsqueeze(0), targets)[0]
        for name, hedge in self.hedges.items():
            found[name] = hedge.run(p)
        self.outer.learn(features, with_maxent)
        self.geometric.learn(rows, targets)
        self.experts.learn(targets)
        return {name: -x.double().clamp(min=1e-30).log() for name, x in found.items()}


def at_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """What each expert's row says of the token that came: [experts, m, V] -> [experts, m]."""
    return rows.gather(2, targets.expand(len(rows), -1).unsqueeze(2)).squeeze(2)


class Geometric(nn.Module):
    """p(a) ~ prod p_e(a)^w_e, normalized over the vocabulary; the weights are learned a chunk at a time."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.columns = [Experts.NAMES.index(name) for name in names]
        self.w = nn.Parameter(torch.tensor([1.0] + [0.0] * (len(names) - 1)))
        self.adam = torch.optim.Adam([self.w], lr=0.01)

    def rows(self, rows: Tensor) -> Tensor:
        return torch.einsum("e,emv->mv", self.w, rows[self.columns].clamp(min=1e-30).log()).softmax(-1)

    @torch.enable_grad()
    def learn(self, rows: Tensor, targets: Tensor) -> None:
        self.adam.zero_grad()
        (-at_targets(self.rows(rows).unsqueeze(0), targets).log().mean()).backward()
        self.adam.step()


class FixedShare:
    """Hedge over E experts with learning rate 1, Bayes' rule, and a share (Herbster & Warmuth 1998); token by token."""

    def __init__(self, n: int, share: float):
        self.w, self.share = np.full(n, 1.0 / n), share

    def run(self, p: Tensor) -> Tensor:
        found, gains = [], p.double().T.numpy()
        for gain in gains:
            found.append(self.w @ gain)
            w = self.w * gain
            self.w = (1 - self.share) * w / w.sum() + self.share / len(w)
        return torch.tensor(found)


class Gate(nn.Module):
    """Linear mixture whose weights are a softmax of linear functions of what is known before the token."""

    def __init__(self, c: Config, names: list[str]):
        super().__init__()
        self.columns = [(*Experts.NAMES, "maxent").index(name) for name in names]
        self.map = nn.Linear(2 * (2 * len(c.ngram_orders)) + 2, len(names))
        nn.init.zeros_(self.map.weight)
        with torch.no_grad():
            self.map.bias.copy_(torch.tensor([0.0] + [-3.0] * (len(names) - 1)))
        self.adam = torch.optim.Adam(self.parameters(), lr=0.02)

    @staticmethod
    def features(logp: Tensor, e: Evidence) -> Tensor:
        """Of each row: the neural entropy and top; for each order and side the occurrences and the top share."""
        totals = e.totals.float().flatten(1)
        share = e.counts.float().flatten(1) / totals[e.row].clamp(min=1)
        top = torch.zeros_like(totals).scatter_reduce_(0, e.row.unsqueeze(1).expand_as(share), share, "amax")
        return torch.cat([0.25 * torch.stack([entropy(logp), logp.amax(1)], 1), 0.4 * totals.log1p(), top], dim=1)

    @torch.no_grad()
    def weights(self, features: Tensor) -> Tensor:
        return self.map(features).softmax(-1)

    @torch.enable_grad()
    def learn(self, features: Tensor, p: Tensor) -> None:
        loss = -(self.map(features).log_softmax(-1) + p[self.columns].T.clamp(min=1e-30).log()).logsumexp(1).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def prepare(self, taught: list) -> None:
        for step in range(train_gpt.CALIBRATION_STEPS):
            self.learn(*taught[step % len(taught)])
        self.adam.param_groups[0]["lr"] = 0.002


DEFAULT = "maxent (the artifact's)"


def make_index(c: Config, run: Run, lag: int) -> ContextIndex:
    return DistantIndex(c, run.device, lag) if lag else ContextIndex(c, run.device)


def ablations(c: Config, run: Run, fitted: Maxent) -> dict[str, Tilted]:
    """The default mixer with parts left out, each fitted anew."""
    orders, both = torch.tensor(sorted(c.ngram_orders)), torch.ones(2, len(c.ngram_orders), dtype=torch.bool)
    document = torch.tensor([[True], [False]])
    parts = {
        "without this document": both & ~document,
        "without earlier documents": both & document,
        "without orders over 4": both & (orders <= 4),
        "orders over 8 alone": both & (orders > 8),
    }
    return {
        "maxent, weights then fixed": Tilted(c, run, fitted, fit=False, lr=0.0),
        "maxent, not fitted before": Tilted(c, run, Maxent(c), fit=False, lr=0.01),
        **{f"maxent, {name}": Tilted(c, run, Maxent(c), keep) for name, keep in parts.items()},
    }


def prepare(
    tilts: dict[str, Tilted], linear: LinearMixers, lags: list[int], model, fitted, c: Config, run: Run
) -> None:
    """Fit all that can be fitted on the held-out training text that the artifact's mixer was fitted on."""
    taught = list(train_gpt.lessons(model, [make_index(c, run, lag) for lag in lags], c, run))
    for i, lag in enumerate(lags):
        lessons = [(logp, evidence[i], targets) for logp, evidence, targets, _ in taught]
        if not lag:
            linear.prepare(lessons, fitted)
        for tilt in tilts.values():
            if tilt.lag == lag:
                tilt.prepare(lessons)


def bench_worth(args, run: Run) -> None:
    """The table, for one artifact and one stream, by one process on the CPU. Raises InputError."""
    if run.world_size > 1:
        raise InputError(f"nproc_per_node={run.world_size}: allowed is 1 for worth")
    c, parts, tokenizer = open_artifact(args, {})
    c = dataclasses.replace(c, mixer_calibration_tokens=args.lesson_tokens)
    stream = train_gpt.Stream(c, run.device, tokenizer)
    model, fitted = train_gpt.unpack(parts, c, run)
    neural = train_gpt.make_predictor(args.stage, model, fitted, c, run, tokenizer)
    tilts = {DEFAULT: Tilted(c, run, fitted, fit=False)}
    if OneTokenTilt.ORDER in c.ngram_orders:
        tilts["tilt (published)"] = Tilted(c, run, OneTokenTilt(c))
    linear, lags = None, [0]
    if not args.brief:
        linear, lags = LinearMixers(c), [0, *args.lags]
        tilts |= ablations(c, run, fitted)
        for lag in args.lags:
            tilts[f"maxent, only beyond {lag} tokens"] = Tilted(c, run, Maxent(c), lag=lag)
        prepare(tilts, linear, lags, model, fitted, dataclasses.replace(c, data_path=args.lessons or args.data), run)
    indices = {lag: make_index(c, run, lag) for lag in lags}
    nats: dict[str, list[Tensor]] = {}
    sum_error = 0.0
    for chunk in stream.chunks(c.ttt_chunk_tokens):
        rows, column = slice(0, len(chunk.inputs)), chunk.targets.unsqueeze(1)
        logp = neural.predict(chunk.inputs, rows)
        seen = {lag: index.evidence(chunk.inputs, rows) for lag, index in indices.items()}
        rows_of = {name: tilt.rows(logp, seen[tilt.lag]) for name, tilt in tilts.items()}
        found = linear.score(logp, seen[0], rows_of[DEFAULT], chunk) if linear else {}
        for name, mixed in dict(neural=logp, **rows_of).items():
            found[name] = -mixed.gather(1, column).squeeze(1)
            sum_error = max(sum_error, train_gpt.row_sum_error(mixed))
        for tilt in tilts.values():
            tilt.learn(logp, seen[tilt.lag], chunk.targets)
        for name, x in found.items():
            nats.setdefault(name, []).append(x.double())
        for part in (neural, *indices.values()):
            part.update(chunk.tokens)
        if args.progress and chunk.start // c.ttt_chunk_tokens % 20 == 0:
            print(f"  {chunk.start + len(column)}/{len(stream)}", file=sys.stderr, flush=True)
    report({name: torch.cat(x) for name, x in nats.items()}, stream, args, run)
    experts = f", of an expert's: {linear.sum_error:.1e}" if linear else ""
    run.log(f"largest |sum of a tilt's row - 1|: {sum_error:.1e}{experts}")


def report(nats: dict[str, Tensor], stream, args, run: Run) -> None:
    """Bits per byte of every row of the table and its change from the neural rows, over all and along the stream."""
    run.log(f"# {Path(args.artifact).name} on {extent(args, stream)}, stage {args.stage}")
    run.log(f"{'mixer':<36} {'val_bpb':>8} {'change':>8}  first third  last third")
    third, base = len(stream) // 3, nats.pop("neural")
    for name, x in [("neural", base), *sorted(nats.items(), key=lambda item: -item[1].sum())]:
        change = [
            train_gpt.bits_per_byte((x - base)[span], stream.token_bytes[span])
            for span in (slice(None), slice(0, third), slice(2 * third, None))
        ]
        bpb = train_gpt.bits_per_byte(x, stream.token_bytes)
        run.log(f"{name:<36} {bpb:8.4f} {change[0]:+8.4f}     {change[1]:+8.4f}    {change[2]:+8.4f}")


# ======================================================================================================================
# artifact: what a byte buys. Levels, coders and allocations on one trained model, at sizes like the competition's.
# ======================================================================================================================

FULL_SIZE_WEIGHTS = 26_968_064  # integers of the competition model: sizes are also given as if the model had so many


@dataclasses.dataclass(frozen=True)
class RowGrid(Grid):
    """The published levels: one float16 step a row, integers of a fixed range."""

    scale: Tensor  # float16 [rows]
    top: int

    @classmethod
    def of(cls, w: Tensor, scale: Tensor, bits: int) -> RowGrid:
        return cls(torch.ones(()), torch.zeros(len(w)), torch.zeros(w.shape[1]), scale.half(), 2 ** (bits - 1) - 1)

    def steps(self) -> Tensor:
        return self.scale.float().unsqueeze(1).expand(-1, len(self.columns))

    def tops(self) -> Tensor:
        return torch.full_like(self.steps(), float(self.top))


def percentile_search(w: Tensor, bits: int) -> tuple[RowGrid, float]:
    """The clip search of the published scripts, and the share of rows whose step is the floor that they give it.

    Of five percentiles of each row's magnitudes as its range, the one with the least squared error over the whole
    matrix; no step is below 1 / top.
    """
    top, found = 2 ** (bits - 1) - 1, []
    for share in (0.999, 0.9995, 0.9999, 0.99999, 1.0):
        clip = torch.quantile(w.abs(), share, dim=1)
        grid = RowGrid.of(w, (clip / top).clamp(min=1 / top), bits)
        error = (dequantize(grid.nearest(w), grid) - w).square().sum().item()
        found.append((error, (clip < 1).float().mean().item(), grid))
    _, at_floor, grid = min(found, key=lambda item: item[0])
    return grid, at_floor


def kind_of(name: str) -> str:
    """The name of a tensor without the number of its layer."""
    return re.sub(r"blocks\.\d+\.", "", name.removesuffix(".weight"))


class Subject:
    """A model with float weights, what its errors cost, and the losses of what stands in for it."""

    def __init__(self, args, c: Config, run: Run):
        self.c, self.run = c, run
        self.model = train_gpt.GPT(c, run.dtype).to(run.device)
        self.stream = train_gpt.Stream(c, run.device, train_gpt.Tokenizer(c))
        load_or_train(self.model, Path(args.weights), c, run, self.stream)
        self.params = {name: p.detach().clone() for name, p in train_gpt.quantized_parameters(self.model).items()}
        self.kinds = list(dict.fromkeys(map(kind_of, self.params)))
        self.n_weights = sum(w.numel() for w in self.params.values())
        self.loader = train_gpt.TrainLoader(c, run)
        lessons = self.loader.first_sequences(c.gptq_tokens)
        self.costs = train_gpt.sensitivities(self.model, lessons, run)
        self.lesson_tokens = lessons[:, 1:].numel()
        named = self.model.named_parameters()
        self.others = b"".join(train_gpt.as_bytes(p.detach().half()) for name, p in named if name not in self.params)
        self.held_out, self.val_bpb = self.losses(self.params)

    def losses(self, weights: dict[str, Tensor]) -> tuple[float, float]:
        """Nats a token of held-out training text, and bits per byte of the stream on disjoint windows."""
        params = train_gpt.quantized_parameters(self.model)
        with train_gpt.weights_replaced([params[name] for name in weights], list(weights.values())):
            held_out = train_gpt.held_out_loss(self.model, self.loader, self.c, self.run)
            neural = train_gpt.Frozen(self.model, self.c, self.run, self.c.eval_seq_len)
            return held_out, train_gpt.score(neural, self.stream, self.c.val_batch_size, self.run).val_bpb

    def nearest(self, grids: dict[str, Grid]) -> Quantized:
        return {name: (grid.nearest(self.params[name]), grid) for name, grid in grids.items()}

    def gptq(self, grids: dict[str, Grid]) -> Quantized:
        """Linear maps by GPTQ, tables to the nearest levels."""
        maps = {name: grid for name, grid in grids.items() if self.costs[name].factor is not None}
        fitted = {n: (train_gpt.gptq(self.params[n], grid, self.costs[n]), grid) for n, grid in maps.items()}
        return self.nearest(grids) | fitted

    def searched(self, bits: int) -> dict[str, Grid]:
        """The published baseline: matrices of the given bits, embeddings of two more."""
        return {n: percentile_search(w, bits + 2 * train_gpt.is_embedding(n))[0] for n, w in self.params.items()}

    def share_at_floor(self) -> float:
        """Of the matrices' rows, those whose step the published search does not choose."""
        matrices = [w for name, w in self.params.items() if not train_gpt.is_embedding(name)]
        return sum(len(w) * percentile_search(w, 6)[1] for w in matrices) / sum(map(len, matrices))

    def by_deviation(self, sigmas: float) -> dict[str, Grid]:
        """SDClip (PR #1394): int6 over so many deviations of a row, and embeddings int8 over 16."""
        grids = {}
        for name, w in self.params.items():
            bits, reach = (8, 16.0) if train_gpt.is_embedding(name) else (6, sigmas)
            scale = reach / (2 ** (bits - 1) - 1) * w.square().mean(1).sqrt()
            grids[name] = RowGrid.of(w, scale.clamp(min=train_gpt.SMALLEST_UNIT), bits)
        return grids

    def allocated(self, bits: float, costs: dict[str, Sensitivity]) -> dict[str, Grid]:
        """The finest grids at which the nearest levels have the given entropy a weight."""
        fineness = train_gpt.finest(self.params, costs, bits * self.n_weights / 8)
        return {name: costs[name].grid(w, fineness) for name, w in self.params.items()}

    def flattened(self, rows: bool) -> dict[str, Sensitivity]:
        """Sensitivities that differ between tensors only, or between their rows too."""

        def flat(x: Tensor) -> Tensor:
            return torch.full_like(x, x.clamp(min=1e-30).log().mean().exp().item())

        return {
            name: dataclasses.replace(
                s, columns=flat(s.columns), rows=s.rows if rows else torch.full_like(s.rows, s.rows.mean())
            )
            for name, s in self.costs.items()
        }

    def bytes_beside(self, quantized: Quantized) -> int:
        """All of the artifact but the integers: steps, and the other parameters."""
        grids = [grid for _, grid in quantized.values()]
        parts = ["scale"] if isinstance(grids[0], RowGrid) else ["unit", "rows", "columns"]
        raw = [b"".join(train_gpt.as_bytes(getattr(grid, part)) for grid in grids) for part in parts]
        return sum(len(train_gpt.compress(part)) for part in [*raw, self.others])

    def as_symbols(self, quantized: Quantized) -> tuple[np.ndarray, np.ndarray, int]:
        """The integers as bytes, the table of each and the low bits that no table codes.

        A Grid has a table for each class; for a RowGrid, every kind of tensor gets one.
        """
        values, tables, n_low_bits = [], [], 0
        for name, (integers, grid) in quantized.items():
            x, classes = integers.cpu().numpy(), train_gpt.classes_of(grid).astype(np.int16)
            if isinstance(grid, RowGrid):
                n_low, classes = np.zeros_like(classes), np.full_like(classes, self.kinds.index(kind_of(name)))
            else:
                n_low = train_gpt.low_bits(classes)
            values.append((x >> n_low).astype(np.uint8).ravel())
            tables.append(classes.astype(np.uint8).ravel())
            n_low_bits += int(n_low.sum())
        return np.concatenate(values), np.concatenate(tables), n_low_bits

    def by_range_coder(self, quantized: Quantized) -> int:
        values, tables, n_low_bits = self.as_symbols(quantized)
        frequencies = train_gpt.count_frequencies(values, tables)
        coded = len(train_gpt.range_encode(values, tables, frequencies)) + n_low_bits // 8
        return coded + len(train_gpt.compress(frequencies.astype("<u2").tobytes()))

    def entropy_bytes(self, quantized: Quantized) -> float:
        """Of the integers under the best static table for each class or kind, which itself costs nothing here."""
        values, tables, n_low_bits = self.as_symbols(quantized)
        counts = np.bincount(train_gpt.cells(values, tables), minlength=256 * Grid.CLASSES).reshape(-1, 256)
        return (train_gpt.entropy_bits(counts) + n_low_bits) / 8


def load_or_train(model, path: Path, c: Config, run: Run, stream) -> None:
    """Put a file's float weights into the model; if there is none, train with the settings in force and write it.

    Raises InputError if the file is no such file or of another model.
    """
    if path.suffix != ".npz":
        raise InputError(f"--weights={path}: allowed is a name that ends in .npz")

    def choose(averages: train_gpt.WeightAverages, _) -> dict:
        train_gpt.choose_average(model, run.wrap(model), averages, train_gpt.TrainLoader(c, run), c, run)
        return {}

    if not path.exists():
        train_gpt.train(model.init_weights(c), choose, None, c, run, stream)
        file = io.BytesIO()
        np.savez(file, **{name: p.detach().cpu().numpy() for name, p in model.named_parameters()})
        train_gpt.write_atomically(path, file.getvalue())
    try:
        kept = dict(np.load(path))
    except (OSError, ValueError, zipfile.BadZipFile):
        raise InputError(f"--weights={path}: not a file of arrays that this command wrote") from None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in kept or kept[name].shape != p.shape:
                raise InputError(
                    f"--weights={path}: no {name} of shape {tuple(p.shape)}; give the settings it came from"
                )
            p.copy_(torch.from_numpy(kept[name]))


def one_byte_each(quantized: Quantized) -> bytes:
    """The integers in the published containers."""
    return b"".join(x.cpu().numpy().astype(np.int8).tobytes() for x, _ in quantized.values())


def by_lzma(quantized: Quantized) -> int:
    return len(train_gpt.compress(one_byte_each(quantized)))


def low_rank(errors: dict[str, Tensor], n_tensors: int = 3, rank: int = 4) -> tuple[dict[str, Tensor], int]:
    """LQER as published (PR #1797): what it adds to the tensors with the largest errors, and the bytes that it takes.

    The first factor has two bits and one scale, the second four bits and a scale for each 32 numbers.
    """
    worst = sorted(errors, key=lambda name: -errors[name].norm().item())[:n_tensors]
    added, n_bits = {}, 0
    for name in worst:
        u, s, vt = torch.linalg.svd(errors[name], full_matrices=False)
        a, b = u[:, :rank] * s[:rank], vt[:rank]
        scale = a.abs().max() / 1.5
        a = (a / scale).round().clamp(-2, 1) * scale
        groups = torch.nn.functional.pad(b.flatten(), (0, -b.numel() % 32)).view(-1, 32)
        steps = groups.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7.5
        b = ((groups / steps).round().clamp(-8, 7) * steps).flatten()[: b.numel()].view_as(b)
        added[name] = a @ b
        n_bits += 2 * a.numel() + 16 + 4 * b.numel() + 16 * len(groups)
    return added, n_bits // 8


@dataclasses.dataclass(frozen=True)
class Point:
    """What one method comes to at one size."""

    method: str
    knob: float
    n_bytes: int  # of the artifact, less header and mixer
    bound_bytes: float  # the same with the integers at their entropy
    held_out: float
    val_bpb: float


def measure(subject: Subject, method: str, knob: float, quantized: Quantized, coder: Callable, lqer=False) -> Point:
    weights = {name: dequantize(*pair) for name, pair in quantized.items()}
    extra = 0
    if lqer:
        added, extra = low_rank({name: subject.params[name] - w for name, w in weights.items()})
        weights |= {name: weights[name] + correction for name, correction in added.items()}
    beside = subject.bytes_beside(quantized) + extra
    losses = subject.losses(weights)
    return Point(method, knob, coder(quantized) + beside, subject.entropy_bytes(quantized) + beside, *losses)


def points(subject: Subject):
    """Every method at a ladder of sizes."""
    s = subject
    for bits in (6, 5, 4):
        yield measure(s, "uniform int-k, LZMA", bits, s.nearest(s.searched(bits)), by_lzma)
    for sigmas in (5, 7, 9, 12.85, 18, 26):
        grids = s.by_deviation(sigmas)
        fitted = s.gptq(grids)
        yield measure(s, "SD clip, LZMA", sigmas, s.nearest(grids), by_lzma)
        yield measure(s, "... and GPTQ", sigmas, fitted, by_lzma)
        yield measure(s, "... and range coder", sigmas, fitted, s.by_range_coder)
    tensors, rows = s.flattened(rows=False), s.flattened(rows=True)
    for bits in (2.2, 2.6, 3.0, 3.5, 4.0, 4.75):
        for method, costs in (
            ("... allocation to tensors", tensors),
            ("... and to rows", rows),
            ("... and to columns: default", s.costs),
        ):
            quantized = s.gptq(s.allocated(bits, costs))
            yield measure(s, method, bits, quantized, s.by_range_coder)
        yield measure(s, "default and LQER", bits, quantized, s.by_range_coder, lqer=True)


def gap_at(found: list[Point], n_bytes: float, floats: float) -> float | None:
    """The held-out gap at a size between two points, on a line in its logarithm; None outside them."""
    found = sorted(found, key=lambda point: point.n_bytes)
    sizes = [point.n_bytes for point in found]
    if not sizes[0] <= n_bytes <= sizes[-1]:
        return None
    gaps = [np.log(max(point.held_out - floats, 1e-5)) for point in found]
    return float(np.exp(np.interp(n_bytes, sizes, gaps)))


def report_sizes(subject: Subject, found: list[Point], run: Run) -> None:
    """Gaps at the sizes that 8 to 16 MB would be for the competition model."""
    methods = list(dict.fromkeys(point.method for point in found))
    marks = (8, 10, 12, 14, 16)
    run.log(f"\n# held-out gap by size, between the points above; MB as if the model had {FULL_SIZE_WEIGHTS} weights")
    run.log(f"{'method':<30}" + "".join(f"{mark:>10} MB" for mark in marks))
    for method in methods:
        of_method = [point for point in found if point.method == method]
        sizes = [1e6 * mark * subject.n_weights / FULL_SIZE_WEIGHTS for mark in marks]
        gaps = [gap_at(of_method, size, subject.held_out) for size in sizes]
        run.log(f"{method:<30}" + "".join(f"{gap:13.5f}" if gap else f"{'':>13}" for gap in gaps))


def report_codecs(subject: Subject, run: Run) -> None:
    """The same integers by general compressors and by the range coder."""
    import brotli  # here and in `plot`, so that a machine without these packages still runs the other measurements
    import zstandard

    compressors = {
        "LZMA -9e": train_gpt.compress,
        "zstd -22": zstandard.ZstdCompressor(level=22).compress,
        "brotli -11": brotli.compress,
        "bzip2 -9": bz2.compress,
    }
    run.log(
        "\n# bytes of the integers alone, steps not counted, and the excess over their entropy under the coder's tables"
    )
    for label, grids in (
        ("SD clip 12.85, GPTQ", subject.by_deviation(12.85)),
        ("default, 3.5 bits", subject.allocated(3.5, subject.costs)),
    ):
        quantized = subject.gptq(grids)
        raw, entropy = one_byte_each(quantized), subject.entropy_bytes(quantized)
        sizes = {name: len(squeeze(raw)) for name, squeeze in compressors.items()}
        sizes["range coder"] = subject.by_range_coder(quantized)
        for name, size in sizes.items():
            run.log(f"{label:<22} {name:<12} {size:10d} {100 * (size / entropy - 1):+7.2f} %")
        run.log(f"{label:<22} {'entropy':<12} {entropy:10.0f}")


def report_kinds(subject: Subject, run: Run) -> None:
    """What each kind of tensor costs and takes, at uniform int6 and at the allocation that has as many bits."""
    uniform = subject.nearest(subject.by_deviation(12.85))
    allocation = subject.gptq(subject.allocated(8 * subject.entropy_bytes(uniform) / subject.n_weights, subject.costs))
    run.log(
        "\n# by kind of tensor: bits a weight, and what rounding it alone adds to the held-out loss; then as predicted"
    )
    run.log(f"{'':<14} {'weights':>8}   {'SD clip 12.85, nearest levels':>34}   {'allocation, GPTQ':>34}")
    for kind in subject.kinds:
        names = [name for name in subject.params if kind_of(name) == kind]
        line = f"{kind:<14} {sum(subject.params[name].numel() for name in names):8d}"
        for quantized in (uniform, allocation):
            part = {name: quantized[name] for name in names}
            bits = 8 * subject.entropy_bytes(part) / sum(x.numel() for x, _ in part.values())
            rise = subject.losses({name: dequantize(*pair) for name, pair in part.items()})[0] - subject.held_out
            predicted = sum(predicted_rise(subject.costs[name], grid) for name, (_, grid) in part.items())
            line += f"   {bits:12.2f} {rise:+10.5f} {predicted / subject.lesson_tokens:+10.5f}"
        run.log(line)


def predicted_rise(sensitivity: Sensitivity, grid: Grid) -> float:
    """Half the curvature times the variance of rounding, over all weights: sums of nats over the lessons' tokens."""
    weights = sensitivity.rows.unsqueeze(1) * sensitivity.columns
    return (weights * grid.steps().square()).sum().item() / 24


def plot(subject: Subject, found: list[Point], path: Path) -> None:
    """val_bpb against the artifact's size, with the entropy bound of the default."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "artifact"  # the same file from the same numbers
    from matplotlib import pyplot

    scale = FULL_SIZE_WEIGHTS / subject.n_weights / 1e6
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method in dict.fromkeys(point.method for point in found):
        of_method = sorted((p for p in found if p.method == method), key=lambda p: p.n_bytes)
        axes.plot([scale * p.n_bytes for p in of_method], [p.val_bpb for p in of_method], marker=".", label=method)
    default = sorted((p for p in found if p.method.endswith("default")), key=lambda p: p.n_bytes)
    bound = [scale * p.bound_bytes for p in default]
    axes.plot(bound, [p.val_bpb for p in default], "k:", label="entropy bound of the default")
    axes.axhline(subject.val_bpb, color="grey", linewidth=0.8, label="float weights")
    axes.set(xlim=(7, 17), ylim=(subject.val_bpb - 0.002, subject.val_bpb + 0.05))
    axes.set(xlabel=f"artifact, MB if the model had {FULL_SIZE_WEIGHTS:,} weights", ylabel="val_bpb, disjoint windows")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def bench_artifact(args, run: Run) -> None:
    """All tables, and the plot if one is asked for."""
    c = dataclasses.replace(from_environment(args), val_tokens=args.val_tokens)
    subject = Subject(args, c, run)
    run.log(f"# {Path(args.weights).name} on {extent(args, subject.stream)}")
    floats = f"held-out {subject.held_out:.5f} nats a token, val_bpb {subject.val_bpb:.5f}"
    run.log(f"# {subject.n_weights} quantized weights; float: {floats}")
    share = subject.share_at_floor()
    run.log(f"# percentile search, int6: the step of {100 * share:.1f} % of the matrices' rows is its floor, 1/31")
    names = f"{'method':<30} {'knob':>6} {'bytes':>9} {'bits':>6} {'bound':>9}"
    run.log(f"{names} {'held-out gap':>13} {'val_bpb':>9} {'gap':>9}")
    found = []
    for point in points(subject):
        found.append(point)
        bits = 8 * point.n_bytes / subject.n_weights
        gaps = point.held_out - subject.held_out, point.val_bpb - subject.val_bpb
        run.log(
            f"{point.method:<30} {point.knob:6g} {point.n_bytes:9d} {bits:6.3f} {point.bound_bytes:9.0f} "
            f"{gaps[0]:+13.5f} {point.val_bpb:9.5f} {gaps[1]:+9.5f}"
        )
    report_sizes(subject, found, run)
    report_codecs(subject, run)
    report_kinds(subject, run)
    if args.plot:
        plot(subject, found, Path(args.plot))


# ======================================================================================================================
# train: the training step as train() takes it, and its parts.
# ======================================================================================================================

DENSE_BF16_TFLOPS = 989.0  # of an H100 or H200 SXM, by its datasheet
PROFILED_STEPS, PROFILED_NAMES = 3, 10


def model_flops(model: train_gpt.GPT, c: Config) -> float:
    """FLOPs of a forward and backward pass, per token of a training sequence.

    Two for each weight of a linear map and twice that backward; a table that is looked up has none, unless it is also
    the head. A token attends to (T + 1) / 2 positions on average, in two products.
    """
    weights = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    weights += model.tok_emb.weight.numel() if c.tie_embeddings else 0
    attention = 2 * 2 * (c.train_seq_len + 1) / 2 * c.model_dim * c.num_layers  # MODEL_DIM is heads times head_dim
    return 3 * (2 * weights + attention)


class Stepper:
    """Takes training steps at the full rate, as in the middle of a run."""

    PARTS = ("batch", "forward and backward", "optimizer", "averages")

    def __init__(self, c: Config, run: Run):
        self.c, self.run, self.steps = c, run, 0
        self.model = train_gpt.GPT(c, run.dtype, train_gpt.choose_kernels(c, run)).init_weights(c).to(run.device)
        self.called, self.optimizers = run.wrap(self.model), train_gpt.Optimizers(self.model, c, run)
        self.averages, self.loader = train_gpt.WeightAverages(self.model, c), train_gpt.TrainLoader(c, run)
        self.batches = self.loader.batches()

    def mark(self) -> float | torch.cuda.Event:
        """This point in the device's work."""
        if self.run.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self) -> list:
        """One step; the marks before, between and behind its PARTS."""
        marks = [self.mark()]
        batch = next(self.batches)
        marks.append(self.mark())
        train_gpt.accumulate_gradients(self.called, batch, None, self.c)
        marks.append(self.mark())
        self.optimizers.step(1.0, self.c.muon_momentum)
        marks.append(self.mark())
        self.averages.update(self.steps, late=False)
        marks.append(self.mark())
        self.run.follow()
        self.steps += 1
        return marks

    def timed(self) -> list[float]:
        """Milliseconds of one step, the device waited for on both sides, and of each of its PARTS."""
        self.run.synchronize()
        began = time.perf_counter()
        marks = self.step()
        self.run.synchronize()
        whole = self.run.max(1000 * (time.perf_counter() - began))
        return [whole, *itertools.starmap(milliseconds, itertools.pairwise(marks))]


def milliseconds(first, last) -> float:
    """Between two marks that the device has passed."""
    return first.elapsed_time(last) if isinstance(first, torch.cuda.Event) else 1000 * (last - first)


def bench_train(args, run: Run) -> None:
    """The step in this process, or whole processes of a peer and of the script in turns."""
    if args.peer:
        return bench_peer(args, run)
    if args.profile and Path(args.profile).exists():
        raise InputError(f"--profile={args.profile}: exists and would be overwritten; choose another name")
    c = from_environment(args)
    measured = f"{args.steps} training steps of {c.batch_tokens} tokens after {args.warmup} untimed ones"
    headline(measured, run, train_gpt.choose_kernels(c, run))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the choice of kernels
    stepper = Stepper(c, run)
    for _ in range(args.warmup):
        stepper.step()
    report_steps([stepper.timed() for _ in range(args.steps)], stepper, args.peak_tflops, run)
    if args.profile:
        table = profile(stepper, run)
        if run.is_main:
            train_gpt.write_atomically(Path(args.profile), "".join(f"{line}\n" for line in table).encode())
    stepper.batches.close()


def report_steps(times: list[list[float]], stepper: Stepper, peak_tflops: float | None, run: Run) -> None:
    """The figures of some timed steps."""
    c, on_cuda = stepper.c, run.device.type == "cuda"
    steps, *parts = zip(*times, strict=True)
    step_ms, part_ms = statistics.median(steps), dict(zip(stepper.PARTS, map(statistics.median, parts), strict=True))
    run.log(f"step: median {step_ms:.2f} ms, min {min(steps):.2f}, max {max(steps):.2f}, spread {spread(steps):.1%}")
    for part, ms in part_ms.items():
        run.log(f"  {part}: median {ms:.2f} ms")
    rate = 1000 * c.batch_tokens / step_ms
    run.log(f"tokens/s: {rate:.0f}, {rate / run.world_size:.0f} a device")
    flops = model_flops(stepper.model, c)
    tflops, peak = flops * rate / run.world_size / 1e12, peak_tflops or (DENSE_BF16_TFLOPS if on_cuda else None)
    share = f", {tflops / peak:.1%} of a peak of {peak:g}" if peak else ""
    run.log(f"model FLOPs: {flops:.6g} a token, {tflops:.4g} TFLOP/s a device{share}")
    run.log(f"loader stalls: {stepper.loader.stalls} in {stepper.steps} steps")
    if on_cuda:
        run.log(f"peak memory: {run.max(torch.cuda.max_memory_allocated()) / 2**20:.0f} MiB allocated on a device")
        run.log(projection(part_ms, run))


def projection(part_ms: dict[str, float], run: Run) -> str:
    """What eight devices would make of it."""
    shared = part_ms["forward and backward"] * run.world_size / 8
    ms = shared + part_ms["optimizer"] + part_ms["averages"]
    assumed = "assumes that forward and backward divide evenly, that the rest stays and that nothing waits for messages"
    return (
        f"projection for 8 such devices: {ms:.2f} ms a step, {600_000 / ms:.0f} steps in 600 s "
        f"(a projection, not a measurement: {assumed})"
    )


def profile(stepper: Stepper, run: Run) -> list[str]:
    """The kernels (CUDA) or operators (CPU) with the most time of their own in a few more steps: a table."""
    on_cuda = run.device.type == "cuda"
    kind, time_of = ("CUDA", "self_device_time_total") if on_cuda else ("CPU", "self_cpu_time_total")
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        for _ in range(PROFILED_STEPS):
            stepper.step()
        run.synchronize()
    events = [e for e in profiler.key_averages() if e.device_type.name == kind and not e.is_user_annotation]
    total = sum(getattr(e, time_of) for e in events)
    table = [f"{'ms a step':>12} {'share':>7} {'calls a step':>12}  {'kernel' if on_cuda else 'operator'}"]
    for e in sorted(events, key=lambda e: -getattr(e, time_of))[:PROFILED_NAMES]:
        microseconds = getattr(e, time_of)
        calls = e.count / PROFILED_STEPS
        table.append(f"{microseconds / 1000 / PROFILED_STEPS:12.3f} {microseconds / total:7.1%} {calls:12.1f}  {e.key}")
    return table


# ======================================================================================================================
# train --peer: another script of the family and ours, each a whole process, on the same shards and settings.
# ======================================================================================================================

LOG_EVERY, LOGGED_FIRST = 10, 5  # steps; every script of the family logs at least so many of its first ones
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms")
# What a peer takes from us: settings that all of the family know by these names.
COMMON = (
    *("DATA_PATH", "TOKENIZER_PATH", "RUN_ID", "SEED", "ITERATIONS", "WARMUP_STEPS", "WARMDOWN_ITERS"),
    *("MAX_WALLCLOCK_SECONDS", "VAL_LOSS_EVERY", "TRAIN_LOG_EVERY", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN"),
    *("VOCAB_SIZE", "MODEL_DIM", "NUM_LAYERS", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT"),
)
FLASH_ATTENTION_STAND_IN = """
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def flash_attn_func(q, k, v, causal=True, **_):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.{}):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
"""


def link_shards(c: Config, folder: Path) -> None:
    """The shards and the tokenizer under the names that the family's scripts look for."""
    for split in ("train", "val"):
        for i, path in enumerate(train_gpt.find_shards(c, split)):
            (folder / f"fineweb_{split}_{i:06d}.bin").symlink_to(Path(path).resolve())
    tokenizer = Path(c.tokenizer_path or Path(c.data_path) / "tokenizer.model")
    (folder / "tokenizer.model").symlink_to(tokenizer.resolve())


def shared_settings(args, c: Config, folder: Path, attention: str) -> Config:
    """Our settings for a run at the full rate that logs every tenth step; the peer gets the COMMON ones.

    Without a warmdown, since some of the family change the step itself at a low learning rate.
    """

    def tens(steps: int) -> int:
        return -(-steps // LOG_EVERY) * LOG_EVERY

    steps = args.warmup + args.steps
    return dataclasses.replace(
        c,
        phase="train",
        attention=attention,
        data_path=str(folder),
        tokenizer_path=str(folder / "tokenizer.model"),
        log_dir="logs",
        artifact_path="",
        scores_path="",
        iterations=steps if steps <= LOGGED_FIRST else tens(args.warmup) + tens(args.steps),
        warmdown_iters=0,
        max_wallclock_seconds=0.0,
        val_loss_every=0,
        train_log_every=LOG_EVERY,
    )


def environment_of(name: str, c: Config, folder: Path) -> dict[str, str]:
    """Of the peer's process or of ours; what is no setting is passed on."""
    lines = dict(line.split("=", 1) for line in c.lines())
    env = {key: value for key, value in os.environ.items() if key not in lines} | {"PYTHONUNBUFFERED": "1"}
    if name == "ours":
        return env | lines
    path = os.pathsep.join([str(folder), *filter(None, [env.get("PYTHONPATH")])])
    return env | {key: lines[key] for key in COMMON} | {"PYTHONPATH": path}


def logged_steps(script: Path, env: dict[str, str], nproc: int, last: int) -> list[tuple[int, float, float]]:
    """(step, loss, milliseconds so far) of each line of a script under torchrun, ended once the last step's is out.

    Raises InputError if that never comes.
    """
    found = []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [*torchrun, "--redirects=2", "--log-dir=.", str(script.resolve())]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cwd, open(Path(cwd) / "stderr", "w") as errors:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            for line in process.stdout:
                if match := STEP_LINE.match(line):
                    found.append((int(match[1]), float(match[2]), float(match[3])))
                    if found[-1][0] == last:
                        return found
        finally:
            end(process)
        raise InputError(f"{script}: ended before it logged step {last}: {last_error(Path(cwd))}")


def end(process: subprocess.Popen) -> None:
    """Stop torchrun, which takes up to half a minute to stop its workers: each is the leader of a group of its own."""
    for number, patience_seconds in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.communicate(timeout=patience_seconds)
            return


def last_error(folder: Path) -> str:
    """The last line that a worker or, if none said anything, torchrun left on standard error."""
    for path in (*sorted(folder.rglob("stderr.log")), folder / "stderr"):
        lines = path.read_text(errors="replace").split("\n")
        if said := [line.strip() for line in lines if line.strip()]:
            return said[-1]
    return "nothing on standard error"


def step_times(found: list[tuple[int, float, float]], warmup: int) -> list[float]:
    """Milliseconds a step between the lines behind the warm-up: those of every tenth step, or all of a short run."""
    behind = [line for line in found if line[0] >= warmup]
    tenth = [line for line in behind if line[0] % LOG_EVERY == 0]
    pairs = itertools.pairwise(tenth if len(tenth) > 1 else behind)
    return [(ms - ms_before) / (step - step_before) for (step_before, _, ms_before), (step, _, ms) in pairs]


def bench_peer(args, run: Run) -> None:
    """The peer and our script in turns: a table of their steps, and the ratio of their rates."""
    if run.world_size > 1:
        raise InputError(f"nproc_per_node={run.world_size}: allowed is 1 with --peer; --nproc is for the processes")
    scripts = {"peer": Path(args.peer), "ours": Path(train_gpt.__file__)}
    if not scripts["peer"].is_file():
        raise InputError(f"--peer={args.peer}: no such file")
    c = from_environment(args)
    train_gpt.Tokenizer(c)  # refuses what the processes would
    kernels = train_gpt.choose_kernels(c, run)
    with tempfile.TemporaryDirectory() as folder:
        link_shards(c, Path(folder))
        shared = shared_settings(args, c, Path(folder), kernels.attention)
        steps = f"{shared.iterations} steps of {c.batch_tokens} tokens, the first {args.warmup} or more untimed"
        measured = f"{args.pairs} pairs of processes under torchrun, {args.nproc} rank(s) each, {steps}"
        headline(measured, run, kernels)
        if train_gpt.find_flash_attention_3() is None:
            backend = train_gpt.SDPA_BACKENDS[kernels.attention].name
            (Path(folder) / "flash_attn_interface.py").write_text(FLASH_ATTENTION_STAND_IN.format(backend))
            run.log(f"# FlashAttention 3 is not here: both scripts run PyTorch's {backend}")
        else:
            run.log(f"# FlashAttention 3 is here: the peer calls it, ours runs {kernels.attention}")
        run.log(f"{'pair':<5} {'script':<6} {'step ms':>10} {'spread':>7} {'tokens/s':>12} {'train_loss':>10}")
        ratios = [measure_pair(pair, scripts, args, shared, run) for pair in range(args.pairs)]
    span = f"{min(ratios):.4f} to {max(ratios):.4f}"
    run.log(f"tokens/s, ours over peer: {statistics.median(ratios):.4f} ({span} over {args.pairs} pairs)")


def measure_pair(pair: int, scripts: dict[str, Path], args, c: Config, run: Run) -> float:
    """A row for each script, and the ratio of their rates."""
    rates = {}
    for name, script in scripts.items():
        env = environment_of(name, dataclasses.replace(c, run_id=f"{name}{pair}"), Path(c.data_path))
        found = logged_steps(script, env, args.nproc, c.iterations)
        times = step_times(found, args.warmup)
        ms = statistics.median(times)
        rates[name] = 1000 * c.batch_tokens / ms
        run.log(f"{pair:<5} {name:<6} {ms:10.2f} {spread(times):7.1%} {rates[name]:12.0f} {found[-1][1]:10.4f}")
    return rates["ours"] / rates["peer"]


# ======================================================================================================================
# data: whether the loader keeps up.
# ======================================================================================================================


def bench_data(args, run: Run) -> None:
    """What the loader can do at most, and whether anyone waits for it at a given rate."""
    c = from_environment(args)
    headline(f"the loader, batches of {c.batch_tokens} tokens over all ranks, {args.seconds:g} s each way", run)
    rates = unpaced_rates(c, run, args.seconds)
    middle, least = run.sum(torch.tensor([statistics.median(rates), min(rates)], dtype=torch.float64)).tolist()
    span = f"slowest batch {least / 1e6:.2f}, spread {spread(rates):.1%} over {len(rates)} batches"
    run.log(f"host_batch: median {middle / 1e6:.2f} M tokens/s, {span}")
    counts = torch.tensor(paced(c, run, args.rate, args.seconds), dtype=torch.float64)
    waited_seconds = run.max(counts[2].item())
    stalls, batches, _ = run.sum(counts).tolist()
    run.log(f"stalls: {stalls:.0f} of {batches:.0f} batches at {args.rate / 1e6:.1f} M tokens/s")
    run.log(f"waited: {waited_seconds:.3f} s for them")


def unpaced_rates(c: Config, run: Run, seconds: float) -> list[float]:
    """Tokens a second of this rank's part of one batch after the other, read on this thread."""
    loader, rates = train_gpt.TrainLoader(c, run), []
    finish = time.perf_counter() + seconds
    while not rates or time.perf_counter() < finish:
        began = time.perf_counter()
        batch = loader.host_batch(len(rates))
        rates.append(batch[:, 1:].numel() / (time.perf_counter() - began))
    return rates


def paced(c: Config, run: Run, rate: float, seconds: float) -> tuple[int, int, float]:
    """(stalls, batches, seconds waited) of a consumer that takes batch_tokens / rate seconds for each batch."""
    loader, n_batches, waited = train_gpt.TrainLoader(c, run), 0, 0.0
    batches = loader.batches()
    next(batches)  # starts the reader
    arrived = time.perf_counter()
    finish = arrived + seconds
    while not n_batches or arrived < finish:
        time.sleep(max(0.0, arrived + c.batch_tokens / rate - time.perf_counter()))
        asked, stalls = time.perf_counter(), loader.stalls
        next(batches)
        arrived = time.perf_counter()
        n_batches += 1
        waited += (loader.stalls - stalls) * (arrived - asked)
    batches.close()
    return loader.stalls, n_batches, waited


# ======================================================================================================================
# score and ttt: what context, stride and epochs buy, and what they cost.
# ======================================================================================================================


SHORTEST_STRIDE, EPOCHS = 64, (0, 1, 2, 3)


class Timed:
    """A predictor whose updates are timed; what else a pass takes is scoring."""

    def __init__(self, predictor, run: Run):
        self.predictor, self.run, self.stride, self.update_seconds = predictor, run, predictor.stride, 0.0

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        return self.predictor.predict(inputs, rows)

    def update(self, tokens: Tensor) -> None:
        clock = train_gpt.Clock(self.run)
        self.predictor.update(tokens)
        self.run.synchronize()
        self.update_seconds += clock.seconds()


class Scored:
    """An artifact's model and the stream that its predictors are measured on."""

    WARM_CHUNKS = 2  # all later ones but the last are like the second

    def __init__(self, args, rows: list[Config], parts: dict[str, bytes], tokenizer: train_gpt.Tokenizer, run: Run):
        longest = max(rows, key=lambda c: c.eval_seq_len)  # its positions hold for all
        self.run, self.tokenizer, self.stream = run, tokenizer, train_gpt.Stream(longest, run.device, tokenizer)
        self.model, self.mixer = train_gpt.unpack(parts, longest, run)
        measured = f"{Path(args.artifact).name} on {extent(args, self.stream)}, stage {args.stage}"
        headline(measured, run, train_gpt.choose_kernels(longest, run))

    def head(self, n_tokens: int) -> train_gpt.Stream:
        """The first positions of the stream."""
        part = copy.copy(self.stream)
        part.tokens, part.token_bytes = self.stream.tokens[: n_tokens + 1], self.stream.token_bytes[:n_tokens]
        return part

    def measure(self, stage: str, c: Config) -> tuple[train_gpt.Score, float]:
        """The score under some settings, and the seconds of it that updates took.

        Where the model is compiled, a pass over a stream with the same first, middle and last chunk comes before it.
        """
        chunk_tokens = train_gpt.chunk_length(stage, c)
        if self.run.compiles:
            torch.compiler.reset()  # the shapes of other rows would count against its limit
            self.one_pass(stage, c, self.head(self.WARM_CHUNKS * chunk_tokens + len(self.stream) % chunk_tokens))
        return self.one_pass(stage, c, self.stream)

    def one_pass(self, stage: str, c: Config, stream: train_gpt.Stream) -> tuple[train_gpt.Score, float]:
        """The same over a stream."""
        made = train_gpt.make_predictor(stage, self.model, self.mixer, c, self.run, self.tokenizer)
        predictor = Timed(made, self.run)
        result = train_gpt.score(predictor, stream, train_gpt.chunk_length(stage, c), self.run)
        return result, self.run.max(predictor.update_seconds)


def window_settings(c: Config, contexts: list[int], strides: list[int]) -> list[Config]:
    """The settings with each context and each stride that fits into it.

    Without strides, the context halved down to SHORTEST_STRIDE, and the artifact's own. Raises InputError if none fits.
    """
    found = []
    for context in contexts or [c.eval_seq_len]:
        halves = [context >> k for k in range(context.bit_length()) if context >> k >= SHORTEST_STRIDE]
        chosen = set(strides or [*halves, c.eval_stride])
        fitting = sorted((stride for stride in chosen if stride <= context), reverse=True)
        found += [dataclasses.replace(c, eval_seq_len=context, eval_stride=stride) for stride in fitting]
    if not found:
        given = f"--contexts={train_gpt.show(tuple(contexts))} --strides={train_gpt.show(tuple(strides))}"
        raise InputError(f"{given}: allowed are strides up to the context")
    return found


def bench_score(args, run: Run) -> None:
    """Sliding windows: a row for each context and stride."""
    c, parts, tokenizer = open_artifact(args, dict(os.environ))
    rows = window_settings(c, args.contexts, args.strides)
    scored = Scored(args, rows, parts, tokenizer, run)
    run.log(f"{'context':>7} {'stride':>6} {'forward':>8} {'val_bpb':>9} {'tokens/s':>10} {'forward tokens/s':>16}")
    for row in rows:
        result, _ = scored.measure(args.stage, row)
        forward, rate = row.eval_seq_len / row.eval_stride, len(scored.stream) / result.seconds
        run.log(
            f"{row.eval_seq_len:7d} {row.eval_stride:6d} {forward:8.2f} {result.val_bpb:9.5f} {rate:10.0f} "
            f"{forward * rate:16.0f}"
        )


def forward_equivalents(c: Config) -> float:
    """Forward passes that a token costs; a backward pass counts as two."""
    return c.eval_seq_len / c.eval_stride + 3 * c.ttt_epochs


def bench_ttt(args, run: Run) -> None:
    """Adaptation: a row for each stride and number of epochs, the cheapest first.

    A star is for a row that no cheaper one beats.
    """
    c, parts, tokenizer = open_artifact(args, dict(os.environ))
    windows = window_settings(c, [], args.strides)
    rows = [dataclasses.replace(window, ttt_epochs=epochs) for window in windows for epochs in args.epochs or EPOCHS]
    scored = Scored(args, rows, parts, tokenizer, run)
    run.log(
        f"{'stride':>6} {'epochs':>6} {'forward':>8} {'val_bpb':>9}   {'seconds':>8} {'scoring':>8} {'update':>8} "
        f"{'tokens/s':>10}"
    )
    cheaper: list[tuple[float, float]] = []  # or as cheap
    for row in sorted(rows, key=forward_equivalents):
        result, update = scored.measure(args.stage, row)
        cost, bpb, seconds = forward_equivalents(row), result.val_bpb, result.seconds
        star = " " if any(x < cost and y < bpb for x, y in cheaper) else "*"
        cheaper.append((cost, bpb))
        run.log(
            f"{row.eval_stride:6d} {row.ttt_epochs:6d} {cost:8.2f} {bpb:9.5f} {star} {seconds:8.1f} "
            f"{seconds - update:8.1f} {update:8.1f} {len(scored.stream) / seconds:10.0f}"
        )


# ======================================================================================================================
# The command line.
# ======================================================================================================================


def mixer_options(parser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="shards; the training ones are read")
    parser.add_argument(
        "--millions", default="1,4,16,62", help="lengths of the stream in millions of tokens [1,4,16,62]"
    )
    parser.add_argument("--orders", default=train_gpt.show(Config.ngram_orders), help="contexts of these lengths")
    parser.add_argument("--chunk", type=int, default=Config.ttt_chunk_tokens, help="tokens a chunk [32768]")
    parser.add_argument("--vocab-size", type=int, default=Config.vocab_size, help="[1024]")
    parser.add_argument("--table-bits", type=int, default=Config.ngram_table_bits, help="[25]")


def stream_options(parser) -> None:
    """Of what scores an artifact."""
    parser.add_argument("--artifact", required=True, metavar="FILE")
    parser.add_argument("--data", required=True, metavar="DIR", help="shards; the validation stream is scored")
    parser.add_argument("--val-tokens", type=int, default=0, help="score only the first of them")


def worth_options(parser) -> None:
    stream_options(parser)
    parser.add_argument("--lessons", metavar="DIR", help="shards whose held-out text the mixers are fitted on [--data]")
    parser.add_argument("--stage", choices=("sliding", "ttt"), default="ttt", help="the neural predictor [ttt]")
    parser.add_argument("--lags", type=whole_numbers, default=[2048], help="[2048]")
    parser.add_argument("--brief", action="store_true", help="only the baseline and the default")
    parser.add_argument("--lesson-tokens", type=int, default=65536, help="of training text to fit on [65536]")
    parser.add_argument("--progress", action="store_true", help="say on standard error how far it is")


def artifact_options(parser) -> None:
    parser.add_argument("--weights", required=True, metavar="NPZ", help="float weights; trained and written if missing")
    parser.add_argument("--data", required=True, metavar="DIR", help="shards; settings come from the environment")
    parser.add_argument("--val-tokens", type=int, default=0, help="score only the first of them")
    parser.add_argument("--plot", metavar="SVG", help="val_bpb against bytes")


def train_options(parser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="shards; the training ones are read")
    parser.add_argument("--steps", type=at_least(int, 1), default=20, help="timed steps [20]")
    parser.add_argument("--warmup", type=at_least(int, 1), default=5, help="steps before them [5]")
    parser.add_argument("--peak-tflops", type=at_least(float, 1e-6), help="of a device [989 on CUDA]")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--profile", metavar="FILE", help="a table of what takes the most time in three more steps")
    either.add_argument("--peer", metavar="PATH", help="another train_gpt.py, to be timed against ours as processes")
    parser.add_argument("--nproc", type=at_least(int, 1), default=1, help="ranks of each process, with --peer [1]")
    parser.add_argument("--pairs", type=at_least(int, 1), default=2, help="how often each runs, with --peer [2]")


def data_options(parser) -> None:
    parser.add_argument("--data", required=True, metavar="DIR", help="shards; the training ones are read")
    parser.add_argument("--rate", type=at_least(float, 1), default=10e6, help="tokens/s of the consumer [10e6]")
    parser.add_argument("--seconds", type=at_least(float, 0), default=10.0, help="of each measurement [10]")


def score_options(parser) -> None:
    stream_options(parser)
    parser.add_argument("--contexts", type=whole_numbers, default=[], help="[the artifact's EVAL_SEQ_LEN]")
    parser.add_argument(
        "--strides", type=whole_numbers, default=[], help="[halves of the context down to 64, and the artifact's own]"
    )
    parser.set_defaults(stage="sliding")


def ttt_options(parser) -> None:
    stream_options(parser)
    parser.add_argument(
        "--strides", type=whole_numbers, default=[], help="[halves of the context down to 64, and the artifact's own]"
    )
    parser.add_argument("--epochs", type=whole_numbers, default=[], help=f"[{train_gpt.show(EPOCHS)}]")
    parser.add_argument("--stage", choices=("ttt", "mixed"), default="ttt", help="[ttt]")


# Of each command: what it is, its options, what it does, and the settings of its Run.
COMMANDS = {
    "mixer": (
        "tokens per second and memory of the index and the mixture",
        mixer_options,
        bench_mixer,
        lambda _: Config(),
    ),
    "worth": ("what each mixer gains on a stream", worth_options, bench_worth, lambda _: Config(device="cpu")),
    "artifact": (
        "bytes against loss, by levels, coder and allocation",
        artifact_options,
        bench_artifact,
        from_environment,
    ),
    "train": ("the training step, alone or against another script's", train_options, bench_train, from_environment),
    "data": ("the loader's throughput", data_options, bench_data, from_environment),
    "score": ("bits per byte and speed by context and stride", score_options, bench_score, from_environment),
    "ttt": ("bits per byte and speed by stride and epochs of adaptation", ttt_options, bench_ttt, from_environment),
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (about, options, _, _) in COMMANDS.items():
        options(commands.add_parser(name, help=about))
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    _, _, bench, settings = COMMANDS[args.command]
    try:
        run = Run(settings(args))
        bench(args, run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    run.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # as in train_gpt.py
