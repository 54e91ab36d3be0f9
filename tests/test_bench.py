"""Bench: its tables come out whole, its own mixers are distributions, and what cannot be used is refused in a line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench
import train_gpt
from conftest import Alone, build, stored
from test_mixing import random_rows
from train_gpt import ContextIndex, Maxent, Tokenizer

ROOT = Path(train_gpt.__file__).resolve().parent


def start(*arguments, env=os.environ):
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), *map(str, arguments)]
    env = {**env, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def artifact(tiny_config, tmp_path_factory):
    c, path = tiny_config(), tmp_path_factory.mktemp("bench") / "tiny.artifact"
    model = build(c)
    path.write_bytes(train_gpt.pack(model, stored(model), Maxent(c), c, Tokenizer(c).sha256))
    return path


@pytest.fixture
def text(tiny_config):
    """(config, neural rows, evidence, inputs) of 200 positions of a stream with repeats."""
    c = tiny_config()
    tokens = (torch.rand(601, generator=torch.Generator().manual_seed(1)) ** 3 * 30).long() + 4
    index = ContextIndex(c, torch.device("cpu"))
    index.update(tokens[:401])
    return c, random_rows(200).float(), index.evidence(tokens[400:600], slice(0, 200)), tokens[400:600]


def test_every_expert_and_mixture_of_the_table_is_a_distribution(text):
    c, logp, evidence, inputs = text
    rows, order = bench.Experts(c).rows(logp, evidence, inputs)
    assert rows.shape == (len(bench.Experts.NAMES), 200, c.vocab_size) and (rows >= 0).all()
    assert (rows.double().sum(2) - 1).abs().max() < 1e-5
    assert order.unique().numel() > 1
    geometric = bench.Geometric(["neural", "discounting", "document"])
    assert (geometric.rows(rows).double().sum(1) - 1).abs().max() < 1e-5
    weights = bench.Gate(c, ["neural", "discounting"]).weights(bench.Gate.features(logp, evidence))
    torch.testing.assert_close(weights.sum(1), torch.ones(200))


def test_discounting_is_its_recursion(text):
    c, logp, evidence, _ = text
    base = torch.full_like(logp, 1 / c.vocab_size).double()
    found = bench.discounted(base, evidence, slice(0, 2), [1, 2])
    entries = list(zip(*(x.tolist() for x in (evidence.row, evidence.token, evidence.counts)), strict=True))
    for t in range(0, 200, 23):
        row = base[t].tolist()
        for k in (1, 2):
            seen = {
                token: here[k] + before[k] for r, token, (here, before) in entries if r == t and here[k] + before[k]
            }
            total = sum(seen.values())
            if total:
                left = 0.75 * len(seen) / total
                row = [max(seen.get(a, 0) - 0.75, 0) / total + left * p for a, p in enumerate(row)]
        torch.testing.assert_close(found[t], torch.tensor(row, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def kneser_ney_by_definition(tokens: list[int], vocab_size: int, order: int) -> list[float]:
    """The row after `tokens`, all counts taken afresh from the list of n-grams."""
    row = [1 / vocab_size] * vocab_size
    for k in range(min(order, len(tokens)) + 1):
        grams = {}  # (context, token) -> the places where it stands, below the highest order as the tokens before it
        for end in range(k, len(tokens)):
            place = end if k == order else tokens[end - k - 1] if end > k else None
            grams.setdefault((*tokens[end - k : end], tokens[end]), set()).add(place)
        counts = {gram: len(places) for gram, places in grams.items()}
        n = [max(1, sum(count == i for count in counts.values())) for i in range(5)]
        y = n[1] / (n[1] + 2 * n[2])
        taken = [min(i, max(0, i - (i + 1) * y * n[i + 1] / n[i])) for i in (1, 2, 3)]
        context = tuple(tokens[len(tokens) - k :])
        seen = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == context}
        if not seen:
            break
        total, off = sum(seen.values()), {a: taken[min(count, 3) - 1] for a, count in seen.items()}
        left = sum(off.values()) / total
        row = [left * p + (seen.get(a, 0) - off.get(a, 0)) / total for a, p in enumerate(row)]
    return row


def test_kneser_ney_is_its_definition():
    tokens = (torch.rand(160, generator=torch.Generator().manual_seed(3)) ** 2 * 6).long()
    expert = bench.KneserNey(vocab_size=7, order=3)
    rows = torch.cat([expert.rows(tokens[:50]), expert.rows(tokens[50:])])
    torch.testing.assert_close(rows.sum(1), torch.ones(160, dtype=torch.float64), atol=1e-12, rtol=0)
    for t in (0, 1, 2, 9, 49, 50, 90, 159):
        expected = kneser_ney_by_definition(tokens[: t + 1].tolist(), 7, 3)
        torch.testing.assert_close(rows[t], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)


def test_masking_keeps_the_columns_and_drops_what_has_nothing_left(text):
    _, _, evidence, _ = text
    keep = torch.zeros(2, evidence.counts.shape[2], dtype=torch.bool)
    keep[0, 2] = True
    part = bench.masked(evidence, keep)
    assert (part.counts.flatten(1).sum(1) > 0).all() and part.counts[:, ~keep].sum() == 0
    assert part.counts.sum() == evidence.counts[:, 0, 2].sum() == part.totals.sum()


def test_the_distant_index_knows_what_is_far_and_nothing_near(tiny_config):
    c = tiny_config(ngram_orders=(1, 2))
    tokens = torch.tensor([1, 5, 6, *[9] * 30, 5, 6, 7, 5, 6])
    near, far = ContextIndex(c, torch.device("cpu")), bench.DistantIndex(c, torch.device("cpu"), 20)
    last = slice(len(tokens) - 1, len(tokens))
    assert near.evidence(tokens, last).token.tolist() == [7, 9]
    assert far.evidence(tokens, last).token.tolist() == [9]


def test_hedge_is_bayes_rule_without_a_share():
    p = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    found = bench.FixedShare(3, 0.0).run(p)
    expected = p.double().prod(1).mean()
    torch.testing.assert_close(found.prod(), expected, rtol=1e-9, atol=0)


def test_worth_prints_a_row_a_mixer(artifact, tiny_data):
    done = start("worth", "--artifact", artifact, "--data", tiny_data, "--val-tokens", 600, "--lesson-tokens", 512)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "PARTIAL: first 600 tokens" in lines[0]
    found = dict(re.match(r"(\S.*?)\s+(\d+\.\d{4}) ", line).groups() for line in lines[2:-1])
    assert {"neural", "tilt (published)", bench.DEFAULT, "backoff, entropy", "geometric"} <= found.keys()
    assert {f"{name} alone" for name in bench.Experts.NAMES[1:]} <= found.keys()
    assert {f"gated, without {name}" for name in bench.Experts.NAMES} <= found.keys()
    sum_errors = [float(x) for x in re.findall(r": ([\d.e-]+)", lines[-1])]
    assert len(sum_errors) == 2 and 0 < max(sum_errors) < 1e-5


def test_the_brief_table_agrees_with_a_run_of_the_script(artifact, tiny_data, tiny_config):
    done = start("worth", "--artifact", artifact, "--data", tiny_data, "--brief")
    assert done.returncode == 0, done.stderr
    c = tiny_config(phase="eval", artifact_path=str(artifact))
    model, mixer = train_gpt.unpack(train_gpt.read_artifact(artifact)[1], c, Alone())
    tokenizer = Tokenizer(c)
    stream = train_gpt.Stream(c, torch.device("cpu"), tokenizer)
    for stage, name in (("ttt", "neural"), ("mixed", bench.DEFAULT)):
        predictor = train_gpt.make_predictor(stage, model, mixer, c, Alone(), tokenizer)
        bpb = train_gpt.score(predictor, stream, c.ttt_chunk_tokens, Alone()).val_bpb
        assert f"{name:<36} {bpb:8.4f}" in done.stdout


def test_mixer_prints_a_row_a_length(tiny_data):
    options = ("--chunk", 256, "--vocab-size", 320, "--table-bits", 12)
    done = start("mixer", "--data", tiny_data, "--millions", "0.001,0.003", "--orders", "1,2,5", *options)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["1024", "3000"]


def test_artifact_trains_where_no_weights_are_and_prints_every_method_at_every_size(tiny_env, tiny_data, tmp_path):
    weights, picture = tmp_path / "w.npz", tmp_path / "sizes.svg"
    arguments = ("artifact", "--weights", weights, "--data", tiny_data, "--val-tokens", 300)
    done = start(*arguments, "--plot", picture, env=tiny_env(iterations=2))
    assert done.returncode == 0, done.stderr
    assert picture.read_text().startswith("<?xml") and weights.exists()
    assert "PARTIAL: first 300 tokens" in done.stdout
    table = done.stdout[done.stdout.index("\nmethod  ") :].split("\n\n")[0].splitlines()[2:]
    counts = {}
    for line in table:
        method, n_bytes, bits, bound = re.match(r"(.+?) {2,}\S+ +(\d+) +([\d.]+) +(\d+) ", line).groups()
        counts[method] = counts.get(method, 0) + 1
        assert int(n_bytes) > int(bound) and float(bits) > 0
    assert counts.pop("uniform int-k, LZMA") == 3 and len(counts) == 7 and set(counts.values()) == {6}
    for name in ("LZMA -9e", "zstd -22", "brotli -11", "bzip2 -9", "range coder", "entropy", "tok_emb", "attn.q"):
        assert name in done.stdout
    other = start(*arguments, env=tiny_env(model_dim=64))
    assert other.returncode == 2 and "--weights" in other.stderr and len(other.stderr.splitlines()) == 1


def test_weights_are_trained_once_and_then_read(tiny_config, tmp_path, monkeypatch):
    c, trained = tiny_config(), []
    monkeypatch.setattr(train_gpt, "train", lambda model, *_: trained.append(model))
    models = [train_gpt.GPT(c), train_gpt.GPT(c)]
    for model in models:
        bench.load_or_train(model, tmp_path / "new" / "w.npz", c, Alone(), None)
    assert trained == models[:1]
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    for name, reason in (("bad.npz", "not a file"), ("w", "ends in .npz")):
        with pytest.raises(train_gpt.InputError, match=reason):
            bench.load_or_train(models[0], tmp_path / name, c, Alone(), None)
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_the_published_search_is_the_best_of_its_percentiles_with_its_floor():
    w = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    grid, at_floor = bench.percentile_search(4 * w, 6)
    assert at_floor == 0 and (grid.steps()[:, 0] * 31 <= 4 * w.abs().amax(1) + 1e-2).all()

    def error(share):
        scale = (torch.quantile(4 * w.abs(), share, dim=1) / 31).half().float().unsqueeze(1)
        return ((4 * w / scale).round().clamp(-31, 31) * scale - 4 * w).square().sum()

    found = (train_gpt.dequantize(grid.nearest(4 * w), grid) - 4 * w).square().sum()
    torch.testing.assert_close(found, min(map(error, (0.999, 0.9995, 0.9999, 0.99999, 1.0))))
    grid, at_floor = bench.percentile_search(0.1 * w, 6)
    assert at_floor == 1 and (grid.scale == torch.tensor(1 / 31).half()).all()


def test_low_rank_correction_takes_the_worst_tensors_and_lowers_their_error():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(40, 4, generator=generator) @ torch.randn(4, 64, generator=generator) for _ in range(4)]
    errors = {str(i): (1 + i) * x for i, x in enumerate(made)}
    added, n_bytes = bench.low_rank(errors)
    assert set(added) == {"1", "2", "3"}
    assert n_bytes == 3 * (2 * 40 * 4 + 16 + 4 * 4 * 64 + 16 * 8) // 8
    assert all((errors[name] - x).norm() < 0.8 * errors[name].norm() for name, x in added.items())


def test_a_gap_between_two_points_lies_on_a_line_in_its_logarithm():
    found = [bench.Point("m", 0, n_bytes, 0.0, 1 + gap, 0.0) for n_bytes, gap in ((100, 0.04), (200, 0.01))]
    assert bench.gap_at(found, 150, 1.0) == pytest.approx(0.02)
    assert bench.gap_at(found, 99, 1.0) is None and bench.gap_at(found, 201, 1.0) is None


def test_what_cannot_be_used_is_refused_in_one_line(tiny_data, tmp_path):
    for arguments in (
        ("mixer", "--data", tiny_data, "--millions", "99"),
        ("mixer", "--data", tmp_path),
        ("mixer", "--data", tiny_data, "--orders", "2,3"),
        ("mixer", "--data", tiny_data, "--vocab-size", 257),
        ("worth", "--artifact", tmp_path / "none", "--data", tiny_data),
    ):
        done = start(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
