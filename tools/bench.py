"""Measure train_gpt.py. Each command prints a table; nothing here counts against the cap.

    python tools/bench.py train --data D               # the training step by part, tokens/s, FLOP utilization, memory
    python tools/bench.py train --data D --peer PATH   # another script of the family and this one, in turns
    python tools/bench.py data --data D                # the loader alone: tokens/s
    python tools/bench.py score --artifact A --data D  # sliding windows, by context and stride
    python tools/bench.py ttt --artifact A --data D    # test-time training, by stride and epochs
    python tools/bench.py mixer --data D               # hash chains and MIXER alone: tokens/s and bytes, by length
    python tools/bench.py mixer --artifact A --data D  # the gain of each mixer over the same neural rows
    PRESET=cpu python tools/bench.py artifact --weights W.npz --data D  # bytes against loss, QUANT by CODEC by size
    python tools/bench.py plan --gpus 8 --device h100  # what fits, before anything is rented: estimates, on a CPU

All settings come from the environment, as in train_gpt.py. Tables go to standard output, the script's own log lines to
standard error. All but `artifact`, `plan` and `train --peer` run under torchrun too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from plan import EVAL_TOKENS, GPUS, UTILIZATION, bench_plan, model_flops
from runs import Run, load_run
from train_gpt import Config, Dist, InputError, MixedTTT, Mixer, RowBlock, Score, SlidingWindow, Stream


def say(line: str) -> None:
    """Print a line at once; only the main rank has a standard output."""
    print(line, flush=True)


class Table:
    """Prints a line of column names, then rows, by each column's format."""

    def __init__(self, **formats: str):
        self.formats = list(formats.values())
        widths = [re.match(r"[<+]?(\d+)", f)[1] for f in self.formats]
        aligned = ["<" if f.startswith("<") else ">" for f in self.formats]
        say(" ".join(f"{name:{a}{w}}" for name, a, w in zip(formats, aligned, widths, strict=True)))

    def row(self, *values) -> None:
        say(" ".join(f"{value:{f}}" for value, f in zip(values, self.formats, strict=True)))


def headline(measured: str, c: Config, dist: Dist) -> None:
    """Print the machine, the number formats and the measurement."""
    kernels, dtype = train_gpt.choose_kernels(c, dist.device), train_gpt.activation_dtype(c, dist.device)
    forms = f"attention:{kernels.attention} fused:{train_gpt.show(kernels.fused) or 'none'} {dtype}"
    say(f"# {train_gpt.hardware(dist)}, torch {torch.__version__}, {forms}: {measured}")


def extent(args, stream: Stream) -> str:
    """Return the name of the scored text and the part of it."""
    part = "whole stream" if stream.whole else f"PARTIAL: first {len(stream)} tokens"
    return f"{Path(args.data).name}, {stream.documents} documents, {part}"


def spread(values: list[float]) -> float:
    """Return the distance from the 10th to the 90th percentile, in medians."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return (high - low) / middle


def time_calls(owner, names: tuple[str, ...], dist: Dist, seconds: Counter) -> None:
    """Add the time of each call of a method to seconds[name], with the device's work in it."""

    def timed(name: str, method, *arguments):
        clock = train_gpt.Clock(Dist(device=dist.device))  # no message between the ranks
        result = method(*arguments)
        seconds[name] += clock.seconds()
        return result

    for name in names:
        setattr(owner, name, functools.partial(timed, name, getattr(owner, name)))


def refuse_ranks(dist: Dist, command: str) -> None:
    if dist.world_size > 1:
        raise InputError(f"nproc_per_node={dist.world_size}: allowed is 1 for {command}")


# ==================== train ===========================================================================================
# The steps of train() itself, with marks at the borders of their parts.

PROFILED_STEPS = 3
PARTS = ("clock and log", "late QAT", "batch", "forward and backward", "CROWN-Q", "optimizer", "averages")


class StepTimer:
    """Marks in the device's work while train() runs. A mark ends a part of a step and begins the next one."""

    def __init__(self, device: torch.device, on_step):
        self.on_cuda, self.on_step = device.type == "cuda", on_step  # called with the number of steps so far
        self.marks, self.steps = [], 0  # a mark is (part, time)

    def mark(self, part: str) -> None:
        """End a part; the last one ends the step."""
        at = torch.cuda.Event(enable_timing=True) if self.on_cuda else time.perf_counter()
        if self.on_cuda:
            at.record()
        self.marks.append((part, at))
        if part == PARTS[-1]:
            self.steps += 1
            self.on_step(self.steps)

    def around(self, function, before: str | None, after: str):
        """Return the function with marks around it."""

        def marked(*arguments):
            if before:
                self.mark(before)
            result = function(*arguments)
            self.mark(after)
            return result

        return marked

    @contextlib.contextmanager
    def watching(self):
        """Put the marks around what a step of train() calls."""
        late_qat = train_gpt.late_qat

        @contextlib.contextmanager
        def marked_late_qat(*arguments):
            self.mark("clock and log")
            with late_qat(*arguments):
                self.mark("late QAT")
                yield
            self.mark("late QAT")

        batch = self.around(train_gpt.TrainLoader.batch, "clock and log", "batch")
        accumulate = self.around(train_gpt.accumulate_gradients, None, "forward and backward")
        step = self.around(train_gpt.Optimizers.step, "CROWN-Q", "optimizer")
        update = self.around(train_gpt.WeightAverages.update, None, "averages")
        with (
            mock.patch.multiple(train_gpt, accumulate_gradients=accumulate, late_qat=marked_late_qat),
            mock.patch.object(train_gpt.TrainLoader, "batch", batch),
            mock.patch.object(train_gpt.Optimizers, "step", step),
            mock.patch.object(train_gpt.WeightAverages, "update", update),
        ):
            yield

    def times(self) -> list[Counter]:
        """Return the milliseconds of each step by part; those of the first step contain the compile warm-up."""
        if self.on_cuda:
            torch.cuda.synchronize()
        found = [Counter()]
        for (_, before), (part, at) in itertools.pairwise(self.marks):
            found[-1][part] += before.elapsed_time(at) if self.on_cuda else 1000 * (at - before)
            if part == PARTS[-1]:
                found.append(Counter())
        return found[: self.steps]


def bench_train(args, c: Config, dist: Dist) -> None:
    """Time the training step and its parts: at the full learning rate, or with --warmdown at the end of a run."""
    if args.peer:
        return bench_peer(args, c, dist)
    if args.profile and Path(args.profile).exists():
        raise InputError(f"--profile={args.profile}: exists and would be overwritten; choose another name")
    last = args.warmup + args.steps
    total = last + (PROFILED_STEPS if args.profile else 0)
    changes = dict(iterations=total, warmdown_iters=1000 * total * args.warmdown, enable_looping_at=0.0)
    c = dataclasses.replace(c, max_wallclock_seconds=0.0, val_loss_every=0, **changes)
    where = "at the end of the warmdown" if args.warmdown else "at the full rate"
    headline(f"{args.steps} steps of {c.batch_tokens} tokens {where}, after {args.warmup} untimed ones", c, dist)
    on_cuda = dist.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[kind])

    def on_step(step: int) -> None:
        if args.profile and step in (last, total):
            profiler.start() if step == last else profiler.stop()

    model = train_gpt.make_model(c, dist.device).init_weights(c.seed).to(dist.device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()  # of the choice of kernels
    timer = StepTimer(dist.device, on_step)
    with timer.watching():
        train_gpt.train(model, train_gpt.TrainLoader(c, dist), c, dist, None)
    report_steps(timer.times()[args.warmup : last], model_flops(model, c), args.peak_tflops, c, dist)
    peak = torch.cuda.max_memory_allocated() if on_cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    say(f"peak memory: {dist.max(peak) / 2**20:.0f} MiB {'allocated' if on_cuda else 'resident'} a rank")
    if args.profile and dist.is_main:
        by = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=10)
        train_gpt.write_atomically(Path(args.profile), f"# {PROFILED_STEPS} steps\n{table}".encode())


def report_steps(times: list[Counter], flops: float, peak_tflops: float | None, c: Config, dist: Dist) -> None:
    """Print the figures of some timed steps; a step takes as long as its slowest rank."""
    steps = [dist.max(parts.total()) for parts in times]
    ms = statistics.median(steps)
    say(f"step: median {ms:.2f} ms, min {min(steps):.2f}, max {max(steps):.2f}, spread {spread(steps):.1%}")
    for part in PARTS:
        say(f"  {part}: median {statistics.median(parts[part] for parts in times):.2f} ms")
    rate = 1000 * c.batch_tokens / ms
    say(f"tokens/s: {rate:.0f}, {rate / dist.world_size:.0f} a rank")
    tflops = flops * rate / dist.world_size / 1e12
    peak = peak_tflops or (GPUS["h100"].tflops if dist.device.type == "cuda" else None)
    share = f", {tflops / peak:.1%} of a peak of {peak:g}" if peak else ""
    say(f"model FLOPs: {flops:.6g} a token, {tflops:.4g} TFLOP/s a rank{share}")


# ==================== train --peer ====================================================================================
# Another script of the family and ours, each a whole process, on the same shards and settings.

LOG_EVERY = 10  # steps; a script may wait for its device at each line
STEP_LINE = re.compile(r"step:(\d+)/\d+ train_loss:(\S+) train_time:(\d+)ms")
# Settings that all of the family know by these names. A peer gets no others.
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
    with sdpa_kernel({}):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)
"""


def bench_peer(args, c: Config, dist: Dist) -> None:
    """Run the peer and our script in turns. Print a row for each run and the ratio of their rates."""
    refuse_ranks(dist, "--peer; --nproc is for the processes")
    scripts = {"peer": Path(args.peer).resolve(), "ours": Path(train_gpt.__file__).resolve()}
    if not scripts["peer"].is_file():
        raise InputError(f"--peer={args.peer}: no such file")
    if args.profile or args.warmdown:
        raise InputError("--peer: allowed beside it are --steps, --warmup, --nproc and --pairs")
    train_gpt.Tokenizer(c)  # raises what the processes would
    attention = train_gpt.choose_kernels(c, dist.device).attention
    warmup, steps = (-(-n // LOG_EVERY) * LOG_EVERY for n in (args.warmup, args.steps))
    with tempfile.TemporaryDirectory() as folder:
        shared = shared_settings(c, Path(folder), attention, warmup + steps)
        what = f"{steps} steps of {c.batch_tokens} tokens after {warmup} untimed ones"
        headline(f"{args.pairs} pairs of processes under torchrun, {args.nproc} rank(s) each, {what}", c, dist)
        if attention != "flash3":
            backend = f"SDPBackend.{train_gpt.SDPA_BACKENDS[attention].name}"
            (Path(folder) / "flash_attn_interface.py").write_text(FLASH_ATTENTION_STAND_IN.format(backend))
            attention = f"{backend}, also of the peer, which imports it as FlashAttention 3"
        say(f"# attention: {attention}")
        table = Table(pair="<5d", script="<6", step_ms="10.2f", spread="7.1%", tokens_per_s="12.0f", train_loss="10.4f")
        ratios = []
        for pair in range(args.pairs):
            rates = {}
            for name, script in scripts.items():
                env = environment_of(name, dataclasses.replace(shared, run_id=f"{name}{pair}"))
                found = logged_steps(script, env, args.nproc, warmup + steps)
                ends = [found[step][1] for step in range(warmup, warmup + steps + 1, LOG_EVERY)]
                times = [(after - before) / LOG_EVERY for before, after in itertools.pairwise(ends)]
                ms = statistics.median(times)
                rates[name] = 1000 * c.batch_tokens / ms
                table.row(pair, name, ms, spread(times), rates[name], found[warmup + steps][0])
            ratios.append(rates["ours"] / rates["peer"])
    span = f"{min(ratios):.4f} to {max(ratios):.4f}"
    say(f"tokens/s, ours over peer: {statistics.median(ratios):.4f} ({span} over {args.pairs} pairs)")


def shared_settings(c: Config, folder: Path, attention: str, iterations: int) -> Config:
    """Return the settings of both; their data are links in a folder, under the names that the family looks for.

    Some of the family change the step itself in the warmdown; there is none here.
    """
    for split in ("train", "val"):
        for i, path in enumerate(train_gpt.find_shards(c, split)):
            (folder / f"fineweb_{split}_{i:06d}.bin").symlink_to(Path(path).resolve())
    tokenizer = folder / "tokenizer.model"
    tokenizer.symlink_to(Path(c.tokenizer_path or Path(c.data_path) / tokenizer.name).resolve())
    paths = dict(data_path=str(folder), tokenizer_path=str(tokenizer), log_dir="logs", artifact_path="", scores_path="")
    length = dict(iterations=iterations, warmdown_iters=0, max_wallclock_seconds=0.0, val_loss_every=0)
    model = dict(attention=attention, num_kv_heads=c.kv_heads)
    return dataclasses.replace(c, phase="train", train_log_every=LOG_EVERY, **paths, **length, **model)


def environment_of(name: str, c: Config) -> dict[str, str]:
    """Return the environment of the peer's process or of ours; variables that are no settings stay."""
    lines = dict(line.split("=", 1) for line in c.lines())
    env = {key: value for key, value in os.environ.items() if key not in lines} | {"PYTHONUNBUFFERED": "1"}
    if name == "ours":
        return env | lines
    path = os.pathsep.join([c.data_path, *filter(None, [env.get("PYTHONPATH")])])
    return env | {key: lines[key] for key in COMMON} | {"PYTHONPATH": path}


def logged_steps(script: Path, env: dict[str, str], nproc: int, last: int) -> dict[int, tuple[float, float]]:
    """Return (loss, milliseconds so far) by step from a script's lines under torchrun. Stop it after the last step.

    Raise InputError if that line never comes, after all that went to standard error.
    """
    found = {}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}", str(script)]
    with tempfile.TemporaryDirectory() as cwd, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for line in process.stdout:
                if match := STEP_LINE.match(line):
                    found[int(match[1])] = float(match[2]), float(match[3])
                    if last in found:
                        return found
        finally:
            process.terminate()  # torchrun stops its workers, within half a minute
            process.communicate()
        errors.seek(0)
        sys.stderr.write(errors.read())
    raise InputError(f"{script}: ended before it logged step {last}")


# ==================== data ============================================================================================
# How fast the loader reads. The host queues steps ahead of the device, and reads meanwhile.


def bench_data(args, c: Config, dist: Dist) -> None:
    """Time the loader alone."""
    headline(f"the loader, batches of {c.batch_tokens} tokens over all ranks, {args.seconds:g} s", c, dist)
    loader, rates, finish = train_gpt.TrainLoader(c, dist), [], time.perf_counter() + args.seconds
    while not rates or time.perf_counter() < finish:
        began = time.perf_counter()
        batch = loader.batch(len(rates))
        rates.append(batch[:, 1:].numel() / (time.perf_counter() - began) / 1e6)
    middle, least = dist.sum(torch.tensor([statistics.median(rates), min(rates)], dtype=torch.float64)).tolist()
    figures = f"median {middle:.2f} M tokens/s, slowest {least:.2f}, spread {spread(rates):.1%}"
    say(f"batch: {figures} over {len(rates)} batches")


# ==================== score and ttt ===================================================================================
# What context, stride and epochs gain, and what they cost.

WARM_CHUNKS = 2  # all later ones but the last are like the second


def open_run(args, stage: str, dist: Dist, **overrides) -> tuple[Run, Stream]:
    """Return the artifact's run, with the kernels of a run, and the text to score. Raise InputError."""
    given = dict(VAL_TOKENS=args.val_tokens, STAGES=stage)
    run = load_run(args.artifact, args.data, dist=dist, plain=False, **given, **overrides)
    return run, run.stream()


def with_settings(run: Run, **changes) -> Run:
    return dataclasses.replace(run, c=dataclasses.replace(run.c, **changes))


def measure(run: Run, stream: Stream) -> tuple[dict[str, Score], float]:
    """Return the scores of a pass and the seconds of it that updates took.

    Where the model is compiled, a pass over a stream with the same first, middle and last chunk comes before it.
    """
    if run.c.torch_compile and run.dist.device.type == "cuda":
        torch.compiler.reset()  # the shapes of other settings would count against its limit
        short = run.stream(WARM_CHUNKS * run.chunk_tokens + len(stream) % run.chunk_tokens)
        train_gpt.score(run.predictor(), short, run.chunk_tokens, run.dist)
    predictor, seconds = run.predictor(), Counter()
    time_calls(predictor, ("update",), run.dist, seconds)
    scores = train_gpt.score(predictor, stream, run.chunk_tokens, run.dist)
    return scores, run.dist.max(seconds["update"])


def windows(c: Config, contexts: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """Return (context, stride) for each that fits. The default is the artifact's context and five halvings of it."""
    found = []
    for context in contexts or [c.eval_seq_len]:
        halves = [context >> k for k in range(6) if context >> k]
        found += [(context, stride) for stride in strides or halves if stride <= context]
    if not found:
        raise InputError(f"--strides={train_gpt.show(tuple(strides))}: allowed are strides up to the context")
    return found


def bench_score(args, c: Config, dist: Dist) -> None:
    """Score with sliding windows: a row for each context and stride. `forward`: forward passes a token."""
    run, stream = open_run(args, "sliding", dist)
    longest = max(args.contexts, default=0)
    if longest > run.model.rotary.shape[1]:
        run, stream = open_run(args, "sliding", dist, EVAL_SEQ_LEN=longest)  # with positions for all contexts
    headline(f"{Path(args.artifact).name} on {extent(args, stream)}, stage sliding", run.c, dist)
    table = Table(
        context="7d", stride="6d", forward="8.2f", val_bpb="9.5f", tokens_per_s="12.0f", forwards_per_s="14.0f"
    )
    for context, stride in windows(run.c, args.contexts, args.strides):
        result = measure(with_settings(run, eval_seq_len=context, eval_stride=stride), stream)[0]["sliding"]
        forward, rate = context / stride, len(stream) / result.seconds
        table.row(context, stride, forward, result.val_bpb, rate, forward * rate)


def bench_ttt(args, c: Config, dist: Dist) -> None:
    """Score with test-time training: a row for each stride and number of epochs, the cheapest first.

    `forward` counts forward passes a token, a backward pass as two.
    """
    run, stream = open_run(args, args.stage, dist)
    pairs, stages = itertools.product(windows(run.c, [], args.strides), args.epochs), run.predictor().stages
    rows = [(context / stride + 3 * epochs, stride, epochs) for (context, stride), epochs in pairs]
    headline(f"{Path(args.artifact).name} on {extent(args, stream)}, stage {args.stage}", run.c, dist)
    bpbs, times = dict.fromkeys(stages, "9.5f"), dict.fromkeys(("seconds", "scoring", "update"), "8.1f")
    table = Table(stride="6d", epochs="6d", forward="8.2f", **bpbs, **times, tokens_per_s="12.0f")
    for forward, stride, epochs in sorted(rows):
        scores, update = measure(with_settings(run, eval_stride=stride, ttt_epochs=epochs), stream)
        found, seconds = [scores[stage].val_bpb for stage in stages], scores[args.stage].seconds
        table.row(stride, epochs, forward, *found, seconds, seconds - update, update, len(stream) / seconds)


# ==================== mixer ===========================================================================================
# The speed and size of hash chains and mixer as the stream grows, and the gain of each mixer.


def bench_mixer(args, c: Config, dist: Dist) -> None:
    """Time hash chains and MIXER alone, on training text and random rows; with --artifact, score with every mixer."""
    if args.artifact:
        return bench_gains(args, dist)
    marks = sorted(round(1e6 * millions) for millions in args.millions)
    loader, seconds = train_gpt.TrainLoader(c, dist), Counter()
    text = train_gpt.check_ids(loader.shards[0][: marks[-1] + 1], c, loader.paths[0])
    if len(text) <= marks[-1]:
        raise InputError(f"--millions={marks[-1] / 1e6:g}: the first training shard has {len(text) / 1e6:.3f}")
    headline(f"hash chains and MIXER={c.mixer}, orders {train_gpt.show(c.ngram_orders)}, random rows", c, dist)
    net = train_gpt.BiasNet(c).to(dist.device)
    predictor = MixedTTT(RandomRows(c, dist), train_gpt.MIXERS[c.mixer](c, dist, net), c, dist)
    time_calls(predictor.chains, ("candidates", "update"), dist, seconds)
    time_calls(predictor.mixer, ("mix", "learn"), dist, seconds)
    parts = dict.fromkeys(("candidates", "mix", "learn", "update"), "10.1f")
    rates = dict(tokens_per_s="12.0f", here="9.0f")  # from the start, and since the row before
    table = Table(tokens="10d", seconds="8.1f", **rates, bytes="12d", **parts)
    clock, last = train_gpt.Clock(dist), (0, 0.0)
    for start in range(0, marks[-1], c.ttt_chunk_tokens):
        tokens = torch.from_numpy(text[start : start + c.ttt_chunk_tokens + 1]).to(dist.device)
        for rows in train_gpt.row_slices(len(tokens) - 1, predictor):
            predictor.predict(tokens[:-1], rows)
        predictor.update(tokens)
        done = start + len(tokens) - 1
        if any(start < mark <= done for mark in marks):
            now, taken = clock.seconds(), [dist.max(seconds[part]) for part in parts]
            here, last = (done - last[0]) / (now - last[1]), (done, now)
            n_bytes = sum(x.nbytes for x in (predictor.chains.head, predictor.chains.tokens, predictor.chains.prev))
            table.row(done, now, done / now, here, n_bytes, *taken)


class RandomRows(SlidingWindow):
    """Stands in for the neural rows. Their cost is not measured."""

    def __init__(self, c: Config, dist: Dist):
        super().__init__("ttt", nn.Module(), c, dist, c.eval_stride)
        generator, n = torch.Generator().manual_seed(0), min(self.block_rows, c.ttt_chunk_tokens)
        self.rows = (2 * torch.randn(n, c.vocab_size, generator=generator)).log_softmax(-1).to(dist.device)

    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        mine = self.share(rows)
        return {"ttt": self.rows[: mine.stop - mine.start]}


class EveryMixed(MixedTTT):
    """One neural pass and one set of candidates for all mixers; the mixers are the stages."""

    def __init__(self, neural: SlidingWindow, mixers: dict[str, Mixer], c: Config, dist: Dist):
        super().__init__(neural, self, c, dist)
        self.mixers, self.stages = mixers, tuple(mixers)

    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        return super().predict(inputs, rows)["mixed"]

    def mix(self, block: RowBlock) -> dict[str, Tensor]:
        found, before, block.carry = {}, block.carry or {}, {}
        for name, mixer in self.mixers.items():
            own = dataclasses.replace(block, carry=before.get(name))
            found[name], block.carry[name] = mixer.mix(own), own.carry
        return found

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        for name, mixer in self.mixers.items():
            mixer.learn(tokens, [dataclasses.replace(block, carry=block.carry[name]) for block in blocks])


def bench_gains(args, dist: Dist) -> None:
    """Score with every mixer on the rows of one pass of test-time training: a row a mixer, the best first."""
    run, stream = open_run(args, "ttt", dist)
    headline(f"{Path(args.artifact).name} on {extent(args, stream)}, every mixer on stage ttt", run.c, dist)
    mixers = {}
    for name, make in train_gpt.MIXERS.items():
        try:
            mixers[name] = make(dataclasses.replace(run.c, mixer=name), dist, run.net)
        except InputError as error:  # tilt needs its order of context
            say(f"# without {name}: {error}")
    predictor, third = EveryMixed(run.predictor(), mixers, run.c, dist), len(stream) // 3
    scores = train_gpt.score(predictor, stream, run.chunk_tokens, dist)
    changes = dict.fromkeys(("change", "first_third", "last_third"), "+11.5f")
    table = Table(mixer="<8", val_bpb="9.5f", **changes, sum_error="9.1e")
    for name, result in sorted(scores.items(), key=lambda item: item[1].val_bpb):
        change, parts = result.nll - scores["neural"].nll, (slice(None), slice(third), slice(2 * third, None))
        bpbs = [train_gpt.bits_per_byte(change[part], stream.token_bytes[part]) for part in parts]
        table.row(name, result.val_bpb, *bpbs, result.max_sum_error)


# ==================== artifact ========================================================================================
# What a byte gains, by quantizer, codec and size, on one set of float weights.

BITS, CODECS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5), ("lzma", "rans")


def bench_artifact(args, c: Config, dist: Dist) -> None:
    """Fit the same float weights to several sizes: a row for each size, QUANT and CODEC.

    Losses are those of the weights that the file gives back. Bytes are the artifact's, without the script. The last
    percentage is that of the coded codes over their entropy.
    """
    refuse_ranks(dist, "artifact")
    c = dataclasses.replace(c, val_tokens=args.val_tokens, val_loss_every=0)
    tokenizer, loader = train_gpt.Tokenizer(c), train_gpt.TrainLoader(c, dist)
    stream = Stream(c, dist.device, tokenizer)
    model = load_or_train(Path(args.weights), loader, c, dist)
    infos = train_gpt.measure_hessians(model, loader.sequences(0, max(1, c.gptq_tokens // c.train_seq_len)), dist)
    n_codes = sum(p.numel() for p in train_gpt.quantized_parameters(model).values())
    nll, bpb = losses(model, loader, stream, c, dist)
    headline(f"{Path(args.weights).name} on {extent(args, stream)}, disjoint windows", c, dist)
    say(f"# {n_codes} quantized weights; float: held-out nll {nll:.5f}, val_bpb {bpb:.5f}")
    gaps = dict(held_out_gap="+12.5f", val_bpb="9.5f", gap="+9.5f", over_entropy="+12.2%")
    table = Table(quant="<8", codec="<5", target="9d", bytes="9d", bits="6.3f", **gaps)
    for bits, quant, codec in itertools.product(sorted(args.bits), train_gpt.GRIDS, CODECS):
        target = round(bits * n_codes / 8)
        size = dict(target_bytes=target + os.path.getsize(train_gpt.__file__))
        row = dataclasses.replace(c, quant=quant, codec=codec, late_qat_threshold=0.0, **size)
        stored, n_bytes, over_entropy = through_file(model, infos, row, tokenizer, dist)
        stored_nll, stored_bpb = losses(stored, loader, stream, row, dist)
        figures = stored_nll - nll, stored_bpb, stored_bpb - bpb, over_entropy
        table.row(quant, codec, target, n_bytes, 8 * n_bytes / n_codes, *figures)


def through_file(model, infos, c: Config, tokenizer: train_gpt.Tokenizer, dist: Dist):
    """Fit the model to TARGET_BYTES, write it and read it. Return (model, bytes, coded codes over their entropy)."""
    net = train_gpt.BiasNet(c)
    quantized = train_gpt.fit_to_size(model, infos, net, c, tokenizer.sha256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.artifact"
        path.write_bytes(train_gpt.pack(model, quantized, net, c, tokenizer.sha256))
        header, parts = train_gpt.read_artifact(path)
    coded = len(parts["codes"]) + len(parts.get("frequencies", b""))
    stored, _ = train_gpt.unpack(parts, c, dist.device)
    return stored, header["file_bytes"], coded / code_entropy_bytes(quantized) - 1


def code_entropy_bytes(quantized: train_gpt.Quantized) -> float:
    """Return the size of the codes under the best static table for each of the coder's tables."""
    cells = [(256 * grid.exponents().long() + codes + 128).flatten() for codes, grid in quantized.values()]
    counts = torch.bincount(torch.cat(cells), minlength=256 * train_gpt.Grid.N_EXPONENTS).view(-1, 256).double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    return -torch.xlogy(counts, shares).sum().item() / np.log(2) / 8


def losses(model, loader, stream: Stream, c: Config, dist: Dist) -> tuple[float, float]:
    """Return the nll per token on held-out training text, and bits per byte of the stream on disjoint windows."""
    predictor = SlidingWindow("roundtrip", model, c, dist, c.eval_seq_len)
    bpb = train_gpt.score(predictor, stream, c.val_batch_size, dist)["roundtrip"].val_bpb
    return train_gpt.held_out_loss(model, loader, c, dist), bpb


def load_or_train(path: Path, loader: train_gpt.TrainLoader, c: Config, dist: Dist) -> train_gpt.GPT:
    """Return the model with a file's float weights; if there is no file, train, choose the average and write it.

    Raise InputError if the file is not of this command or of another model.
    """
    model = train_gpt.make_model(c, dist.device).init_weights(c.seed).to(dist.device)
    if not path.exists():
        averages, *_ = train_gpt.train(model, loader, c, dist, None)
        train_gpt.choose_average(model, averages, loader, c, dist)
        file = io.BytesIO()
        np.savez(file, **{name: p.detach().cpu().numpy() for name, p in model.named_parameters()})
        train_gpt.write_atomically(path, file.getvalue())
    try:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in np.load(path).items()})
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError):
        raise InputError(f"--weights={path}: allowed is what this command wrote with the same model") from None
    return model


# ==================== The command line ================================================================================


def at_least(kind: type, least):
    """Return the type of an argument: a number with a lower bound."""

    def number(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text}: allowed is {least} or more")
        return value

    return number


def several(number):
    """Return the type of an argument: one number or more, with commas."""
    return lambda text: [number(part) for part in text.split(",")]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    count, counts = at_least(int, 1), several(at_least(int, 1))

    def command(function, about: str, reads: str = ""):
        name = function.__name__.removeprefix("bench_")
        added = commands.add_parser(name, help=about, description=function.__doc__)
        added.set_defaults(function=function, data=None)
        if reads:
            added.add_argument("--data", required=True, metavar="DIR", help=f"shards; {reads}")
        return added.add_argument

    def scores(add, required: bool) -> None:
        add("--artifact", required=required, metavar="FILE", help="that train_gpt.py wrote")
        add("--val-tokens", type=at_least(int, 0), default=0, help="score only the first of them [0 = all]")

    add = command(bench_train, "the training step, alone or beside another script's", "the training ones are read")
    add("--steps", type=count, default=20, help="timed steps [20]")
    add("--warmup", type=count, default=10, help="steps before them; train() waits for each of the first 10 [10]")
    add("--warmdown", action="store_true", help="the last steps of a run, with CROWN-Q and late QAT if they are on")
    add("--peak-tflops", type=at_least(float, 1e-6), help="of a device [989 on CUDA]")
    add("--profile", metavar="FILE", help="write a table of what takes the most time in three more steps")
    add("--peer", metavar="PATH", help="another train_gpt.py, timed beside this one, both as processes")
    add("--nproc", type=count, default=1, help="ranks of each process, with --peer [1]")
    add("--pairs", type=count, default=2, help="how often each runs, with --peer [2]")

    add = command(bench_data, "the loader alone", "the training ones are read")
    add("--seconds", type=at_least(float, 0), default=10.0, help="of the measurement [10]")

    strides = dict(type=counts, default=[], help="[the context and five halvings of it]")
    scores(add := command(bench_score, "sliding windows by context and stride", "validation is scored"), required=True)
    add("--contexts", type=counts, default=[], help="[the artifact's EVAL_SEQ_LEN]")
    add("--strides", **strides)

    scores(add := command(bench_ttt, "adaptation by stride and epochs", "validation is scored"), required=True)
    add("--strides", **strides)
    add("--epochs", type=several(at_least(int, 0)), default=[0, 1, 2, 3], help="[0,1,2,3]")
    add("--stage", choices=("ttt", "mixed"), default="ttt", help="mixed: both, in one pass [ttt]")

    reads = "training text alone, validation with --artifact"
    scores(add := command(bench_mixer, "hash chains and mixer: speed and size, or gains", reads), required=False)
    add(
        "--millions",
        type=several(at_least(float, 1e-6)),
        default=[1, 4, 16, 62],
        help="lengths in millions of tokens [1,4,16,62]",
    )

    add = command(bench_artifact, "bytes against loss by QUANT, CODEC and size", "both kinds are read")
    add("--weights", required=True, metavar="NPZ", help="float weights; trained and written if there is no such file")
    add("--val-tokens", type=at_least(int, 0), default=0, help="score only the first of them [0 = all]")
    bits = f"sizes of the artifact, in bits a quantized weight [{train_gpt.show(BITS)}]"
    add("--bits", type=several(at_least(float, 0.1)), default=list(BITS), help=bits)

    add = command(bench_plan, "what fits on GPUs that are not at hand: estimates")
    add("--gpus", type=count, default=8, help="of one machine [8]")
    add("--device", choices=tuple(GPUS), default="h100", help="[h100]")
    add("--tokens", type=count, default=EVAL_TOKENS, help=f"of the text to score [{EVAL_TOKENS:,}]")
    add("--utilization", type=at_least(float, 1e-6), default=UTILIZATION, help=f"part of the peak [{UTILIZATION}]")
    return parser.parse_args(given)


def main() -> int:
    args = arguments()
    try:
        c = Config.from_env(os.environ | ({"DATA_PATH": args.data} if args.data else {"DEVICE": "cpu"}))
        dist = train_gpt.open_dist(c)
        if dist.is_main:
            train_gpt.log.setLevel(logging.INFO)
            train_gpt.log.addHandler(logging.StreamHandler())
        with contextlib.redirect_stdout(sys.stdout if dist.is_main else io.StringIO()):
            args.function(args, c, dist)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    dist.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # as in train_gpt.py
