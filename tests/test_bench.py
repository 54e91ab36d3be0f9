"""Bench: each command at a tiny size, its figures against those of train_gpt.py or of a plain count."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import plan
import train_gpt
from conftest import build, random_tokens
from train_gpt import BiasNet, Dist, HashChains, Stream, Tokenizer, TrainLoader

ROOT = Path(train_gpt.__file__).resolve().parent


@pytest.fixture
def run_bench(tiny_env, tiny_data, monkeypatch, capsys):
    """run_bench(command, *options, **settings) -> (exit status, lines of the table, lines on standard error)."""

    def run_bench(command, *options, **settings):
        for name, value in tiny_env(**settings).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(train_gpt.log, "handlers", [])
        monkeypatch.setattr(train_gpt.log, "level", train_gpt.log.level)
        data = [] if "--data" in options or command == "plan" else ["--data", tiny_data]
        given = [command, *data, *options]
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, given)])
        capsys.readouterr()
        status = bench.main()
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run_bench


@pytest.fixture
def lines_of(run_bench):
    """lines_of(command, *options, **settings) -> the lines that the command prints."""

    def lines_of(*arguments, **settings):
        status, lines, errors = run_bench(*arguments, **settings)
        assert status == 0 and lines[0].startswith("# "), errors
        return lines

    return lines_of


@pytest.fixture(scope="module")
def artifact(tiny_config, tmp_path_factory):
    c, path = tiny_config(ttt_epochs=1, ttt_lr=0.05), tmp_path_factory.mktemp("bench") / "tiny.artifact"
    model = build(c)
    infos = train_gpt.measure_hessians(model, random_tokens(c), Dist())
    quantized = train_gpt.quantize(model, infos, -2.0, c)
    path.write_bytes(train_gpt.pack(model, quantized, BiasNet(c), c, Tokenizer(c).sha256))
    return path


@pytest.fixture(scope="module")
def scored(artifact, tiny_config):
    """scored(stage, **settings) -> {stage: Score} of the first 600 tokens, by the script's own functions."""

    def scored(stage, **settings):
        c, dist = tiny_config(**{**dict(val_tokens=600, ttt_epochs=1, ttt_lr=0.05), **settings}), Dist()
        model, net = train_gpt.unpack(train_gpt.read_artifact(artifact)[1], c, dist.device)
        tokenizer = Tokenizer(c)
        predictor = train_gpt.make_predictor(stage, model, net, c, dist, tokenizer)
        return train_gpt.score(predictor, Stream(c, dist.device, tokenizer), train_gpt.chunk_length(stage, c), dist)

    return scored


def figures(pattern, lines):
    """The numbers in the one line that matches."""
    (found,) = filter(None, (re.fullmatch(pattern, line) for line in lines))
    return [float(x.replace(",", "")) for x in found.groups()]


# train


@pytest.mark.parametrize(
    "changes",
    [dict(), dict(tie_embeddings=False, bigram_vocab_size=0, ve_layers=(), mlp_mult=3.0)],
    ids=["tied", "not"],
)
def test_model_flops_are_those_that_are_counted_but_for_the_future(tiny_config, changes):
    """The counter sees the whole square of attention, and nothing else that model_flops does not."""
    c = tiny_config(**changes)
    model, tokens = build(c), random_tokens(c, 3, c.train_seq_len + 1)
    with FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    future = 3 * 2 * 2 * (c.train_seq_len - 1) / 2 * c.model_dim * c.num_layers
    assert counter.get_total_flops() == 3 * c.train_seq_len * (bench.model_flops(model, c) + future)


@pytest.mark.parametrize("warmdown", [0, 1000])
def test_each_part_of_a_step_gets_its_own_time(tiny_config, virtual_time, monkeypatch, warmdown):
    monkeypatch.setattr(bench, "time", virtual_time)
    for owner, name, seconds in (
        (train_gpt, "accumulate_gradients", 2.0),
        (train_gpt, "crown_q_penalty", 1.0),
        (train_gpt, "late_qat", 0.25),
        (train_gpt, "schedule", 0.125),
        (train_gpt.Optimizers, "step", 3.0),
        (train_gpt.WeightAverages, "update", 0.5),
    ):
        slow = virtual_time.costs(getattr(owner, name), seconds)
        monkeypatch.setattr(owner, name, lambda *arguments, slow=slow: slow(*arguments))
    c, timer = tiny_config(iterations=4, warmdown_iters=warmdown), bench.StepTimer(torch.device("cpu"), lambda step: 0)
    with timer.watching():
        train_gpt.train(build(c), TrainLoader(c, Dist()), c, Dist(), None)
    first, *later = timer.times()
    each = {"clock and log": 125, "forward and backward": 2000, "optimizer": 3000, "averages": 500}
    each |= {"CROWN-Q": 1000, "late QAT": 250} if warmdown else {}
    assert [+times for times in later] == 3 * [Counter(each)]
    assert set(first) <= set(bench.PARTS)


def test_watching_changes_no_weight(tiny_config):
    c, found = tiny_config(iterations=4), []
    for watch in (False, True):
        model, timer = build(c), bench.StepTimer(torch.device("cpu"), lambda step: None)
        with timer.watching() if watch else torch.enable_grad():
            train_gpt.train(model, TrainLoader(c, Dist()), c, Dist(), None)
        found.append(list(model.parameters()))
        assert timer.steps == c.iterations * watch
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_train_prints_the_step_and_the_figures_that_follow_from_it(lines_of, run_bench, tmp_path, tiny_config):
    c, profile = tiny_config(), tmp_path / "profile.txt"
    options = ("--steps", 3, "--warmup", 1, "--profile", profile, "--peak-tflops", 0.5)
    lines = lines_of("train", *options)
    ms, least, most, _ = figures(r"step: median (.+) ms, min (.+), max (.+), spread (.+)%", lines)
    assert least <= ms <= most
    assert [line.split(":")[0].strip() for line in lines[2:9]] == list(bench.PARTS)
    rate, a_rank = figures(r"tokens/s: (\d+), (\d+) a rank", lines)
    assert rate == a_rank == pytest.approx(1000 * c.batch_tokens / ms, rel=0.01)
    flops, tflops, share = figures(r"model FLOPs: (.+) a token, (.+) TFLOP/s a rank, (.+)% of a peak of 0.5", lines)
    assert flops == pytest.approx(bench.model_flops(train_gpt.GPT(c), c), rel=1e-5)
    assert tflops == pytest.approx(flops * rate / 1e12, rel=0.01) and share == pytest.approx(200 * tflops, abs=0.06)
    assert figures(r"peak memory: (\d+) MiB resident a rank", lines)[0] > 0
    shares = [float(share) for share in re.findall(r"^[^%\n]+? ([\d.]+)%", profile.read_text(), re.M)]
    assert len(shares) == 10 and shares == sorted(shares, reverse=True)
    status, _, errors = run_bench("train", *options)
    assert status == 2 and "exists" in errors[-1]


PEER = """
import os, time
from flash_attn_interface import flash_attn_func
import torch

data = os.environ["DATA_PATH"]
names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin", "tokenizer.model"]
assert [name for name in sorted(os.listdir(data)) if name.endswith((".bin", ".model"))] == names
assert os.environ["TOKENIZER_PATH"] == os.path.join(data, "tokenizer.model")
assert "EVAL_STRIDE" not in os.environ and os.environ["MODEL_DIM"] == "32"
q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
torch.testing.assert_close(flash_attn_func(q, k, v, causal=True)[:, 0], v[:, 0].repeat_interleave(2, 1))
last = int(os.environ["ITERATIONS"])
for step in range(int(os.environ["TRAIN_LOG_EVERY"]), last + 1, 10):
    print(f"step:{step}/{last} train_loss:{9 - step / 10:.4f} train_time:{500 + 30 * step}ms step_avg:1ms", flush=True)
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_peer_and_ours_are_timed_by_their_own_lines(lines_of, tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    lines = lines_of("train", "--peer", tmp_path / "peer.py", "--steps", 20, "--warmup", 7, "--pairs", 1)
    assert "20 steps of 256 tokens after 10 untimed ones" in lines[0] and "SDPBackend.FLASH" in lines[1]
    assert lines[3].split() == ["0", "peer", "30.00", "0.0%", "8533", "6.0000"]
    pair, name, ms, _, rate, loss = lines[4].split()
    assert name == "ours" and float(rate) == pytest.approx(256_000 / float(ms), rel=0.01) and 0 < float(loss) < 7
    ratio, *span = figures(r"tokens/s, ours over peer: (.+) \((.+) to (.+) over 1 pairs\)", lines)
    assert span == [ratio, ratio] and ratio == pytest.approx(float(rate) / 8533, rel=0.01)


@pytest.mark.slow
def test_a_peer_that_ends_early_is_named(run_bench, tmp_path):
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('no such luck')\n")
    status, _, errors = run_bench("train", "--peer", tmp_path / "broken.py", "--steps", 10, "--warmup", 10)
    assert status == 2 and "no such luck" in "\n".join(errors)
    assert errors[-1].endswith("broken.py: ended before it logged step 20")


# data


def test_data_counts_tokens(lines_of, virtual_time, monkeypatch):
    slow = virtual_time.costs(TrainLoader.batch, 0.001)
    monkeypatch.setattr(bench, "time", virtual_time)
    monkeypatch.setattr(TrainLoader, "batch", lambda *arguments: slow(*arguments))
    lines = lines_of("data", "--seconds", 0)
    assert lines[-1] == "batch: median 0.26 M tokens/s, slowest 0.26, spread 0.0% over 1 batches"


# score and ttt


@pytest.mark.slow
def test_score_agrees_with_the_script_at_every_context_and_stride(lines_of, artifact, scored):
    """64 tokens of context are more than the artifact's model has positions for."""
    options = ("--artifact", artifact, "--val-tokens", 600)
    lines = lines_of("score", *options, "--contexts", "16,64", "--strides", "32,8")
    assert "PARTIAL: first 600 tokens" in lines[0]
    rows = [line.split() for line in lines[2:]]
    assert [row[:3] for row in rows] == [["16", "8", "2.00"], ["64", "32", "2.00"], ["64", "8", "8.00"]]
    for context, stride, _, bpb, *_ in rows:
        expected = scored("sliding", eval_seq_len=int(context), eval_stride=int(stride))["sliding"].val_bpb
        assert bpb == f"{expected:.5f}"
    rows = [line.split() for line in lines_of("score", *options)[2:]]
    assert [row[:2] for row in rows] == [["32", str(stride)] for stride in (32, 16, 8, 4, 2, 1)]


@pytest.mark.parametrize("stage", ["ttt", "mixed"])
@pytest.mark.slow
def test_ttt_agrees_with_the_script_at_every_stride_and_number_of_epochs(lines_of, artifact, scored, stage):
    options = ("--artifact", artifact, "--val-tokens", 600, "--stage", stage)
    rows = [line.split() for line in lines_of("ttt", *options, "--strides", "32,8", "--epochs", "0,1")[2:]]
    assert [row[:2] for row in rows] == [["32", "0"], ["8", "0"], ["32", "1"], ["8", "1"]]
    assert [row[2] for row in rows] == ["1.00", "4.00", "4.00", "7.00"]
    stages = ["ttt"] if stage == "ttt" else ["ttt", "mixed"]
    for stride, epochs, _, *found in rows:
        expected = scored(stage, eval_stride=int(stride), ttt_epochs=int(epochs))
        assert found[: len(stages)] == [f"{expected[name].val_bpb:.5f}" for name in stages]


# mixer


@pytest.mark.slow
def test_each_mixers_row_is_the_script_own_score_with_it(lines_of, artifact, scored, tiny_config, monkeypatch):
    """Also where a chunk has several blocks, with what one leaves to the next."""
    monkeypatch.setattr(train_gpt, "BLOCK_CELLS", 64 * 320)
    settings = dict(hedge_share=0.01, ttt_epochs=0, eval_stride=32)
    lines = lines_of("mixer", "--artifact", artifact, "--val-tokens", 600, **settings)
    rows = {name: figures for name, *figures in (line.split() for line in lines[2:])}
    token_bytes = Stream(tiny_config(val_tokens=600), torch.device("cpu"), Tokenizer(tiny_config())).token_bytes
    assert rows.keys() == train_gpt.MIXERS.keys()
    assert [float(row[0]) for row in rows.values()] == sorted(float(row[0]) for row in rows.values())
    for name, (bpb, *changes, _) in rows.items():
        found = scored("mixed", **settings, mixer=name)
        assert bpb == f"{found['mixed'].val_bpb:.5f}", name
        nll = found["mixed"].nll - found["ttt"].nll
        for change, part in zip(changes, (slice(600), slice(200), slice(400, 600)), strict=True):
            expected = train_gpt.bits_per_byte(nll[part], token_bytes[part])
            assert float(change) == pytest.approx(expected, abs=1e-5), name


def test_a_mixer_that_lacks_its_order_is_left_out(lines_of, artifact, tiny_config, tmp_path):
    c, path = tiny_config(ngram_orders=(1, 2)), tmp_path / "short.artifact"
    model, _ = train_gpt.unpack(train_gpt.read_artifact(artifact)[1], tiny_config(), torch.device("cpu"))
    quantized = train_gpt.quantize(model, train_gpt.measure_hessians(model, random_tokens(c), Dist()), -2.0, c)
    path.write_bytes(train_gpt.pack(model, quantized, BiasNet(c), c, Tokenizer(c).sha256))
    lines = lines_of("mixer", "--artifact", path, "--val-tokens", 300, ngram_orders=(1, 2))
    assert lines[1].startswith("# without tilt: NGRAM_ORDERS=1,2")
    assert {line.split()[0] for line in lines[3:]} == train_gpt.MIXERS.keys() - {"tilt"}


@pytest.mark.parametrize("mixer", ["maxent", "hedge"])
def test_mixer_prints_the_bytes_of_the_chains_at_each_length(lines_of, tiny_config, mixer):
    lines = lines_of("mixer", "--millions", "0.0015,0.0005", mixer=mixer)
    c = tiny_config()
    text = torch.from_numpy(TrainLoader(c, Dist()).shards[0][:1501].astype("int64"))
    chains, expected = HashChains(c, torch.device("cpu")), {}
    for start in range(0, 1500, c.ttt_chunk_tokens):
        chains.update(text[start : start + c.ttt_chunk_tokens + 1])
        expected[chains.seen] = sum(x.nbytes for x in (chains.head, chains.tokens, chains.prev))
    rows = [line.split() for line in lines[2:]]
    assert [int(row[0]) for row in rows] == [512, 1500]
    assert [int(row[4]) for row in rows] == [expected[512], expected[1500]]
    assert "candidates" in lines[1] and f"MIXER={mixer}" in lines[0]


# artifact


def test_the_entropy_of_codes_is_that_of_a_count(tiny_config):
    c = tiny_config(quant="hessian", late_qat_threshold=0.0)
    model = build(c)
    quantized = train_gpt.quantize(model, train_gpt.measure_hessians(model, random_tokens(c), Dist()), -3.0, c)
    pairs = Counter()
    for codes, grid in quantized.values():
        pairs.update(zip(grid.exponents().flatten().tolist(), codes.flatten().tolist(), strict=True))
    tables = Counter()
    for (table, _), n in pairs.items():
        tables[table] += n
    bits = sum(n * math.log2(tables[table] / n) for (table, _), n in pairs.items())
    assert len(tables) > 1 and bench.code_entropy_bytes(quantized) == pytest.approx(bits / 8)


@pytest.mark.slow
def test_artifact_has_a_row_for_each_size_quantizer_and_codec(lines_of, tiny_config, tmp_path, monkeypatch):
    weights = tmp_path / "new" / "w.npz"
    lines = lines_of("artifact", "--weights", weights, "--val-tokens", 600, "--bits", 9, iterations=3)
    n_codes, nll, bpb = figures(r"# (\d+) quantized weights; float: held-out nll (.+), val_bpb (.+)", lines)
    rows = [line.split() for line in lines[3:]]
    assert [row[:2] for row in rows] == [[quant, codec] for quant in ("int6", "hessian") for codec in ("lzma", "rans")]
    assert all(int(row[2]) == round(9 * n_codes / 8) for row in rows)
    c = dataclasses.replace(tiny_config(), val_tokens=600, late_qat_threshold=0.0)
    dist, tokenizer = Dist(), Tokenizer(c)
    loader, stream = TrainLoader(c, dist), Stream(c, dist.device, tokenizer)
    monkeypatch.setattr(train_gpt, "train", None)  # the second time, the weights come from the file
    model = bench.load_or_train(weights, loader, c, dist)
    infos = train_gpt.measure_hessians(model, loader.sequences(0, max(1, c.gptq_tokens // c.train_seq_len)), dist)
    assert bench.losses(model, loader, stream, c, dist) == (pytest.approx(nll, abs=1e-5), pytest.approx(bpb, abs=1e-5))
    for quant, codec, target, n_bytes, _, gap, found, *_ in rows[1:3]:
        size = int(target) + os.path.getsize(train_gpt.__file__)
        row = dataclasses.replace(c, quant=quant, codec=codec, target_bytes=size)
        model = bench.load_or_train(weights, loader, c, dist)
        quantized = train_gpt.fit_to_size(model, infos, BiasNet(row), row, tokenizer.sha256)
        assert int(n_bytes) == len(train_gpt.pack(model, quantized, BiasNet(row), row, tokenizer.sha256))
        for p in train_gpt.by_role(model, "scalar").values():
            p.data = p.data.half().float()
        train_gpt.load_codes(model, quantized)
        stored = bench.losses(model, loader, stream, row, dist)
        assert stored == (pytest.approx(nll + float(gap), abs=2e-5), pytest.approx(float(found), abs=1e-5))


# The command line


# plan


@pytest.mark.parametrize("settings", [dict(), dict(quant="hessian", codec="rans", late_qat_threshold=0.0)])
def test_a_plan_counts_what_the_script_would_and_calls_it_an_estimate(lines_of, tiny_config, settings):
    options = ("--gpus", 2, "--tokens", 10_000, "--utilization", 0.5)
    head, *lines = lines_of("plan", *options, max_wallclock_seconds=100.0, reserve_seconds=10.0, **settings)
    assert "ESTIMATES" in head and all(line.startswith("estimate ") for line in lines)
    c, model = tiny_config(), train_gpt.GPT(tiny_config())
    n_params, mflops = figures(r"estimate model: +(.+) parameters, (.+) MFLOP.*", lines)
    assert n_params == sum(p.numel() for p in model.parameters())
    assert mflops == pytest.approx(bench.model_flops(model, c) / 1e6, abs=0.06)
    steps, n_tokens = figures(r"estimate training: +(\S+) of .* s, (\S+) tokens", lines)
    assert steps == c.iterations and n_tokens == steps * c.batch_tokens
    assert figures(r".*; (\S+) updates.*", lines) == [math.ceil(10_000 / c.ttt_batch_tokens) * c.ttt_epochs]


def test_a_plan_says_what_does_not_fit():
    assert plan.margin(9.0, 10.0, "GiB", "of a step") == "9 of 10 GiB, margin 1 (of a step)"
    assert plan.margin(12.0, 10.0, "s", "all") == "12 of 10 s, OVER by 2 (all)"


@pytest.mark.slow
def test_planned_memory_holds_weights_states_and_activations(tiny_config):
    """Weights, gradients, two averages, and AdamW's and Muon's states; more sequences at a time hold more."""
    c = tiny_config(micro_batch_tokens=128, train_batch_tokens=1024)
    model, least = train_gpt.GPT(c), 0
    for p in model.parameters():
        least += p.nbytes * (4 + (1 if p.role == "matrix" else 2))
    small, large = (plan.peak_bytes(dataclasses.replace(c, micro_batch_tokens=n), 1) for n in (128, 1024))
    assert least < small < large
    assert plan.peak_bytes(c, 2) > least * 0.7


def test_input_that_cannot_be_used_costs_one_line(run_bench, artifact, tiny_data, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    (tmp_path / "profile").write_text("")
    for reason, *arguments in (
        ("--millions=99", "mixer", "--millions", "99"),
        ("no shard", "mixer", "--data", tmp_path),
        ("no shard", "train", "--data", tmp_path),
        ("no shard", "data", "--data", tmp_path),
        ("no such file", "train", "--peer", tmp_path / "none"),
        ("--peer: allowed beside it", "train", "--peer", ROOT / "train_gpt.py", "--warmdown"),
        ("exists", "train", "--profile", tmp_path / "profile"),
        ("No such file", "score", "--artifact", tmp_path / "none"),
        ("--strides=64", "score", "--artifact", artifact, "--strides", "64"),
        ("what this command wrote", "artifact", "--weights", tmp_path / "bad.npz"),
    ):
        status, _, errors = run_bench(*arguments)
        assert status == 2 and errors[-1].startswith("error: ") and reason in errors[-1], (arguments, errors)
        assert sum(line.startswith("error") for line in errors) == 1


@pytest.mark.slow
def test_two_ranks_print_one_table_and_the_same_score(lines_of, artifact, tiny_env, tiny_data):
    options = ["--data", str(tiny_data), "--artifact", str(artifact), "--val-tokens", "600", "--strides", "8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tools" / "bench.py"), "score", *options]
    done = subprocess.run(command, env=tiny_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (_, names, row), alone = done.stdout.splitlines(), lines_of("score", *options)
    assert names == alone[1] and row.split()[:3] == alone[2].split()[:3]
    assert float(row.split()[3]) == pytest.approx(float(alone[2].split()[3]), abs=2e-5)
