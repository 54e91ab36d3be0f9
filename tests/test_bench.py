"""Bench: its tables come out whole, its own mixers are distributions, and what cannot be used is refused in a line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

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


class Listening(Alone):
    """A run alone that keeps what it logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log(self, text):
        self.lines.append(text)


@pytest.fixture
def said(tiny_env, tiny_data, monkeypatch):
    """said(command, *options, **settings) -> the lines that the command logs, on the tiny data and in this process."""

    def said(command, *options, **settings):
        for name, value in tiny_env(**settings).items():
            monkeypatch.setenv(name, value)
        args = bench.arguments([command, "--data", str(tiny_data), *map(str, options)])
        run = Listening()
        bench.COMMANDS[command][2](args, run)
        return run.lines

    return said


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


def test_model_flops_are_those_that_are_counted_but_for_the_future(tiny_config):
    """The counter sees the whole square of attention, and nothing else that model_flops does not."""
    for overrides in (dict(), dict(tie_embeddings=False, bigram_vocab_size=0, ve_layers=(), mlp_mult=3.0)):
        c = tiny_config(**overrides)
        model, tokens = build(c), torch.randint(4, c.vocab_size, (3, c.train_seq_len + 1))
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
        future = 3 * 2 * 2 * (c.train_seq_len - 1) / 2 * c.model_dim * c.num_layers
        assert counter.get_total_flops() == 3 * c.train_seq_len * (bench.model_flops(model, c) + future)


def figures(pattern, lines):
    """The numbers in the one line that matches."""
    (found,) = filter(None, (re.fullmatch(pattern, line) for line in lines))
    return [float(x) for x in found.groups()]


def test_train_prints_the_step_its_parts_and_what_follows_from_them(said, tmp_path, tiny_config):
    c, table = tiny_config(), tmp_path / "profile.txt"
    options = ("--steps", 3, "--warmup", 1, "--profile", table)
    lines = said("train", *options, "--peak-tflops", 0.5)
    assert (
        lines[0].startswith("# ") and "attention:" in lines[0] and "world size 1: 3 training steps of 256" in lines[0]
    )
    ms, least, most, _ = figures(r"step: median (.+) ms, min (.+), max (.+), spread (.+)%", lines)
    assert least <= ms <= most
    assert [line.split(":")[0].strip() for line in lines[2:6]] == list(bench.Stepper.PARTS)
    rate, a_device = figures(r"tokens/s: (\d+), (\d+) a device", lines)
    assert rate == a_device == pytest.approx(1000 * c.batch_tokens / ms, rel=0.01)
    flops, tflops, share = figures(r"model FLOPs: (.+) a token, (.+) TFLOP/s a device, (.+)% of a peak of 0.5", lines)
    assert flops == pytest.approx(bench.model_flops(train_gpt.GPT(c), c), rel=1e-5)
    assert tflops == pytest.approx(flops * rate / 1e12, rel=0.01) and share == pytest.approx(200 * tflops, abs=0.06)
    assert figures(r"loader stalls: (\d) in (\d) steps", lines)[1] == 4
    assert not any("projection" in line or "memory" in line for line in lines)
    rows = [re.fullmatch(r" +([\d.]+) +([\d.]+)% +([\d.]+)  \S.*", line) for line in table.read_text().splitlines()[1:]]
    times, shares, calls = zip(*(map(float, row.groups()) for row in rows), strict=True)
    assert len(rows) == 10 and list(times) == sorted(times, reverse=True) and sum(shares) < 101 and min(calls) > 0
    with pytest.raises(train_gpt.InputError, match="exists"):
        said("train", *options)


def test_train_needs_a_peak_for_a_utilization_and_runs_on_two_ranks(tiny_env, tiny_data):
    script = ROOT / "tools" / "bench.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    options = ["train", "--data", str(tiny_data), "--steps", "2", "--warmup", "1"]
    done = subprocess.run([*command, *options], env=tiny_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "world size 2" in lines[0] and not any("peak" in line for line in lines)
    rate, a_device = figures(r"tokens/s: (\d+), (\d+) a device", lines)
    assert a_device == pytest.approx(rate / 2, abs=1)


def test_the_projection_divides_the_passes_and_nothing_else():
    run, parts = Listening(), {"batch": 9.0, "forward and backward": 80.0, "optimizer": 3.0, "averages": 2.0}
    assert "15.00 ms a step, 40000 steps in 600 s (a projection, not a measurement" in bench.projection(parts, run)
    run.world_size = 4
    assert "45.00 ms a step" in bench.projection(parts, run)


LOOKS_AROUND = """
import os, torch
from flash_attn_interface import flash_attn_func

data = os.environ["DATA_PATH"]
names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin", "tokenizer.model"]
assert [name for name in sorted(os.listdir(data)) if name.endswith((".bin", ".model"))] == names
assert os.environ["TOKENIZER_PATH"] == os.path.join(data, "tokenizer.model")
assert "EVAL_STRIDE" not in os.environ and os.environ["MODEL_DIM"] == "32"
q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
mixed = flash_attn_func(q, k, v, causal=True)
assert mixed.shape == q.shape
torch.testing.assert_close(mixed[:, 0], v[:, 0].repeat_interleave(2, 1))
"""
SAYS_STEPS = """
import os, time
pair, last = int(os.environ["RUN_ID"][-1]), int(os.environ["ITERATIONS"])
print(f"step:0/{last} val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.01ms")
for step in range(1, last + 1):
    if step <= 10 or step % int(os.environ["TRAIN_LOG_EVERY"]) == 0:
        ms = 500 + MS * step if step > 5 else 100 * step
        print(f"step:{step}/{last} train_loss:{9 - step / 10:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
time.sleep(1000)
"""


def test_a_peer_and_ours_are_told_apart_by_their_own_lines(said, tmp_path, monkeypatch):
    """Two scripts that say what their steps take: what is printed is that, and both are stopped after their last."""
    peer, ours = tmp_path / "peer.py", tmp_path / "ours.py"
    peer.write_text(LOOKS_AROUND + SAYS_STEPS.replace("MS", "(30 + 10 * pair)"))
    ours.write_text(SAYS_STEPS.replace("MS", "20"))
    monkeypatch.setattr(train_gpt, "__file__", str(ours))
    lines = said("train", "--peer", peer, "--steps", 20, "--warmup", 7)
    assert "2 pairs" in lines[0] and "30 steps of 256 tokens" in lines[0] and "both scripts run PyTorch's" in lines[1]
    assert [line.split() for line in lines[3:7]] == [
        ["0", "peer", "30.00", "0.0%", "8533", "6.0000"],
        ["0", "ours", "20.00", "0.0%", "12800", "6.0000"],
        ["1", "peer", "40.00", "0.0%", "6400", "6.0000"],
        ["1", "ours", "20.00", "0.0%", "12800", "6.0000"],
    ]
    assert lines[7] == "tokens/s, ours over peer: 1.7500 (1.5000 to 2.0000 over 2 pairs)"


def test_the_script_is_a_peer_of_itself(said):
    """In a shape that goes with the defaults of all that a peer is not told."""
    shape = dict(num_layers=11, ve_layers=(9, 10), model_dim=64, rope_dims=16)
    lines = said("train", "--peer", ROOT / "train_gpt.py", "--steps", 2, "--warmup", 1, "--pairs", 1, **shape)
    rows = [line.split() for line in lines if line.startswith("0 ")]
    assert [row[1] for row in rows] == ["peer", "ours"]
    assert all(float(ms) > 0 and 0 < float(loss) < 7 for _, _, ms, _, _, loss in rows)


def test_step_times_are_of_what_is_behind_the_warm_up():
    def logged(*steps):
        return [(step, 1.0, 1000 + 7 * step + 50 * (step <= 5)) for step in steps]

    assert bench.step_times(logged(1, 2, 3, 4, 5, 10, 20, 30), 5) == [7, 7]
    assert bench.step_times(logged(*range(1, 11), 20, 30, 40), 20) == [7, 7]
    assert bench.step_times(logged(1, 2, 3), 1) == [7, 7] and len(bench.step_times(logged(1, 2, 3, 4), 2)) == 2


def test_a_peer_that_ends_early_is_named_with_its_last_words(said, tmp_path):
    peer = tmp_path / "broken.py"
    peer.write_text("import sys\nprint('step:1/3 train_loss:5.0 train_time:9ms')\nsys.exit('no such luck')\n")
    with pytest.raises(train_gpt.InputError, match="broken.py: ended before it logged step 3: no such luck"):
        said("train", "--peer", peer, "--steps", 2, "--warmup", 1)


def test_data_counts_its_stalls(said, monkeypatch):
    lines = said("data", "--rate", "20000", "--seconds", "0.1")
    assert lines[0].startswith("# ")
    middle, least, _, n = figures(
        r"host_batch: median (.+) M tok.*slowest batch (.+), spread (.+)% over (\d+) batches", lines
    )
    assert 0 < least <= middle and n > 0
    stalls, batches = figures(r"stalls: (\d+) of (\d+) batches at 0.0 M tokens/s", lines)
    assert 0 <= stalls <= batches <= 9  # of 256 tokens each
    assert (figures(r"waited: (.+) s for them", lines)[0] > 0) <= (stalls > 0)
    slow = train_gpt.TrainLoader.host_batch
    monkeypatch.setattr(train_gpt.TrainLoader, "host_batch", lambda self, i: (time.sleep(0.05), slow(self, i))[1])
    lines = said("data", "--rate", "1e6", "--seconds", "0.4")
    assert figures(r"stalls: (\d+) of \d+ batches at 1.0 M tokens/s", lines)[0] > 0
    assert figures(r"waited: (.+) s for them", lines)[0] > 0


@pytest.fixture
def predictor_of(artifact, tiny_config):
    """predictor_of(stage, **settings) -> val_bpb of the first 600 tokens, by the script's own functions."""

    def bpb(stage, **settings):
        c = tiny_config(phase="eval", artifact_path=str(artifact), val_tokens=600, **settings)
        model, mixer = train_gpt.unpack(train_gpt.read_artifact(artifact)[1], c, Alone())
        tokenizer = Tokenizer(c)
        stream = train_gpt.Stream(c, torch.device("cpu"), tokenizer)
        predictor = train_gpt.make_predictor(stage, model, mixer, c, Alone(), tokenizer)
        return train_gpt.score(predictor, stream, train_gpt.chunk_length(stage, c), Alone()).val_bpb

    return bpb


def test_score_agrees_with_the_script_at_every_context_and_stride(said, artifact, predictor_of):
    options = ("--artifact", artifact, "--val-tokens", 600)
    lines = said("score", *options, "--contexts", "16,64", "--strides", "8,32")
    assert "PARTIAL: first 600 tokens" in lines[0]
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows] == [["16", "8", "2.00"], ["64", "32", "2.00"], ["64", "8", "8.00"]]
    for context, stride, forward, bpb, rate, forward_rate in rows:
        expected = predictor_of("sliding", eval_seq_len=int(context), eval_stride=int(stride))
        assert bpb == f"{expected:.5f}"
        assert float(forward_rate) == pytest.approx(float(forward) * float(rate), abs=5)
    assert [line.split()[:2] for line in said("score", *options)[2:]] == [["32", "8"]]
    with pytest.raises(train_gpt.InputError, match="--strides"):
        said("score", *options, "--strides", "64")


def test_default_strides_are_halves_and_the_artifacts_own(tiny_config):
    c = tiny_config(eval_seq_len=512, eval_stride=16)
    found = [(row.eval_seq_len, row.eval_stride) for row in bench.window_settings(c, [512, 100], [])]
    assert found == [(512, 512), (512, 256), (512, 128), (512, 64), (512, 16), (100, 100), (100, 16)]


@pytest.mark.parametrize("stage", ["ttt", "mixed"])
def test_ttt_agrees_with_the_script_and_marks_what_no_cheaper_row_beats(said, artifact, predictor_of, stage):
    options = ("--strides", "32,8", "--epochs", "0,2") if stage == "ttt" else ("--strides", "16", "--epochs", "1")
    lines = said("ttt", "--artifact", artifact, "--val-tokens", 600, "--stage", stage, *options)
    rows = [line.replace("*", "").split() for line in lines[2:]]
    costs, bpbs = ([float(row[i]) for row in rows] for i in (2, 3))
    if stage == "ttt":
        assert [row[:3] for row in rows] == [
            ["32", "0", "1.00"],
            ["8", "0", "4.00"],
            ["32", "2", "7.00"],
            ["8", "2", "10.00"],
        ]
        assert rows[1][3] == f"{predictor_of('sliding'):.5f}"
    for stride, epochs, _, bpb, *seconds in rows:
        assert bpb == f"{predictor_of(stage, eval_stride=int(stride), ttt_epochs=int(epochs)):.5f}"
        whole, scoring, learning, _ = map(float, seconds)
        assert whole == pytest.approx(scoring + learning, abs=0.11)
    best = [
        not any(c < cost and b < bpb for c, b in zip(costs, bpbs, strict=True))
        for cost, bpb in zip(costs, bpbs, strict=True)
    ]
    assert ["*" in line for line in lines[2:]] == best


def test_what_cannot_be_used_is_refused_in_one_line(tiny_data, tmp_path, monkeypatch, capsys):
    for arguments in (
        ("mixer", "--data", tiny_data, "--millions", "99"),
        ("mixer", "--data", tmp_path),
        ("mixer", "--data", tiny_data, "--orders", "2,3"),
        ("mixer", "--data", tiny_data, "--vocab-size", 257),
        ("worth", "--artifact", tmp_path / "none", "--data", tiny_data),
        ("train", "--data", tmp_path),
        ("train", "--data", tiny_data, "--peer", tmp_path / "none"),
        ("data", "--data", tmp_path),
        ("score", "--artifact", tmp_path / "none", "--data", tiny_data),
    ):
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
        assert bench.main() == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert start("mixer", "--data", tmp_path).returncode == 2
