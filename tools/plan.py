"""What a configuration needs on GPUs that are not at hand. `bench.py plan` prints it; every figure is an estimate.

FLOPs, bytes and steps are counted. Seconds come from a datasheet's peak and from the part of it that a published run of
this model reached; those of the host are timed or stated here.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import Config, Dist


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 TFLOP/s by the datasheet, and the GiB that CUDA offers of its GB."""

    tflops: float
    memory: int


GPUS = dict(h100=Gpu(989.0, 79), h200=Gpu(989.0, 140), a100=Gpu(312.0, 79))
# 83.59 ms a step of 786,432 tokens on 8 H100s (openai/parameter-golf, record of 2026-03-23, the model of the defaults).
UTILIZATION = 0.272
LAUNCH_SECONDS = 10e-6  # of the host, a kernel
TTT_STEP_SECONDS = 0.025  # of the host: 439 launches and autograd, on a runtime that executes nothing
LONGEST_DOCUMENT = 8_000  # tokens of the longest one in 32,768 of val_fineweb, on average
LIMIT_SECONDS, ATTEMPTS = 600.0, 3  # of an evaluation; at fitting a model to its size
EVAL_TOKENS = 62_021_632  # of the challenge's validation text at 1,024 pieces; 8,192 make 40.5 million
LZMA_OVER_ENTROPY = 1.03


def model_flops(model: train_gpt.GPT, c: Config) -> float:
    """Return the FLOPs of a forward and backward pass, per token of a training sequence.

    Two for each weight of a linear map and twice that backward; a table that is looked up has none, unless it is also
    the head. A token attends to (T + 1) / 2 positions on average, in two products. A looped layer counts once a pass.
    """
    parts = [module for name, module in model.named_children() if name != "blocks"]
    parts += [model.blocks[layer] for layer in model.passes]
    linears = [x for part in parts for x in part.modules() if isinstance(x, train_gpt.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    weights += model.tok_emb.weight.numel() if c.tie_embeddings else 0
    attention = 2 * 2 * (c.train_seq_len + 1) / 2 * c.model_dim * len(model.passes)  # MODEL_DIM is heads times head_dim
    return 3 * (2 * weights + attention)


def peak_bytes(c: Config, n_gpus: int) -> int:
    """Return the most memory that a training step holds on a rank, by fake tensors in a fake group of ranks."""
    dist = Dist(0, n_gpus)
    if n_gpus > 1:
        torch.distributed.init_process_group("fake", rank=0, world_size=n_gpus, store=FakeStore())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = train_gpt.GPT(c, torch.bfloat16, train_gpt.Kernels("flash"))
            optimizers, averages = train_gpt.Optimizers(model, c, dist), train_gpt.WeightAverages(model, c)
            mine, micro = dist.share(c.batch_seqs), max(1, c.micro_batch_tokens // c.train_seq_len)
            # A third micro batch holds no more than the second, which finds the gradients of the first.
            batch = torch.zeros(min(mine.stop, 2 * micro), c.train_seq_len + 1, dtype=torch.int64)
            tracker = MemTracker()
            tracker.track_external(model, *averages.ema, *averages.swa, batch)

            def called(*inputs):
                tracker.reset_mod_stats()  # it follows a module through one call only
                return model(*inputs)

            with tracker:
                for step in range(2):  # the first one makes the optimizers' state
                    train_gpt.accumulate_gradients(called, batch, None, c)
                    optimizers.step(train_gpt.Schedule(1.0, 0.95))
                    averages.update(step, True)
            return max(by_kind["Total"] for by_kind in tracker.get_tracker_snapshot("peak").values())
    finally:
        if n_gpus > 1:
            torch.distributed.destroy_process_group()


def coded_bytes(model: train_gpt.GPT, c: Config) -> int:
    """Return the bytes of the codes at the finest steps that a fit may take, for weights from a normal distribution."""
    if c.quant == "hessian":
        return sys.maxsize
    bits = 0.5 * math.log2(2 * math.pi * math.e) - train_gpt.step_range(c)[0]  # a code's entropy; tables have two more
    params = train_gpt.quantized_parameters(model).values()
    return round(sum(p.numel() * (bits + 2 * (p.role == "table")) for p in params) / 8 * LZMA_OVER_ENTROPY)


def pack_seconds(n_codes: int, bits: float, c: Config) -> float:
    """Return how long this machine codes so many codes of such an entropy; a sixteenth of them is timed."""
    sigma = 2**bits / math.sqrt(2 * math.pi * math.e)
    codes = np.random.default_rng(0).normal(0, sigma, max(1, n_codes // 16)).round().clip(-127, 127).astype(np.int8)
    values, tables = codes.view(np.uint8), np.zeros(len(codes), dtype=np.uint8)
    began = time.process_time()
    if c.codec == "lzma":
        train_gpt.compress.__wrapped__(codes.tobytes())  # the cached one would take no time twice
    else:
        train_gpt.rans_encode(values, tables, train_gpt.rans_frequencies(values, tables))
    return 16 * (time.process_time() - began)


def margin(used: float, limit: float, unit: str, note: str) -> str:
    """Return a figure beside its limit."""
    over = f"{'OVER by' if used > limit else 'margin'} {abs(limit - used):,.0f}"
    return f"{used:,.0f} of {limit:,.0f} {unit}, {over} ({note})"


def estimate(c: Config, name: str, n_gpus: int, tokens: int, utilization: float) -> Iterator[tuple[str, str]]:
    """Yield (what, figure in words) for a configuration on so many GPUs."""
    gpu, dist = GPUS[name], Dist(0, n_gpus)
    with torch.device("meta"):
        model = train_gpt.GPT(c)
    params, codes = model.parameters(), train_gpt.quantized_parameters(model).values()
    n_params, n_codes = (sum(p.numel() for p in found) for found in (params, codes))
    flops, rate = model_flops(model, c), n_gpus * utilization * gpu.tflops * 1e12
    model.passes = model.plain
    unlooped, part = model_flops(model, c), c.enable_looping_at if c.num_loops else 0.0
    yield "model", f"{n_params:,} parameters, {flops / 1e6:,.1f} MFLOP a token of training"
    yield "memory", margin(peak_bytes(c, n_gpus) / 2**30, gpu.memory, "GiB a rank", "of a step that is not compiled")

    step = c.batch_tokens * flops / rate
    budget = c.max_wallclock_seconds - c.reserve_seconds if c.max_wallclock_seconds else math.inf
    pace = (part * flops / unlooped + 1 - part) / step  # steps a second, some of the time without loops
    steps = int(min(c.iterations, budget * pace))
    yield (
        "step",
        f"{1000 * step:.1f} ms at {utilization:.1%} of the peak, {1000 * step * utilization:.1f} ms at the peak",
    )
    yield "training", f"{steps:,} of {c.iterations:,} steps in {steps / pace:.0f} s, {steps * c.batch_tokens:,} tokens"

    script, least = os.path.getsize(train_gpt.__file__), coded_bytes(model, c)
    coarsest = math.ceil(train_gpt.LEAST_BITS * n_codes / 8)
    artifact = max(coarsest, min(c.target_bytes - script, least + 2 * (n_params - n_codes)))
    yield (
        "artifact",
        margin(script + artifact, train_gpt.CAP_BYTES, "bytes", f"{8 * artifact / n_codes:.2f} bits a code"),
    )

    pack = pack_seconds(n_codes, min(6.5, 8 * artifact / n_codes), c)
    columns = sum(columns for _, columns in {p.shape for p in codes if p.role != "table"})
    parts = {
        "Hessians": c.gptq_tokens * flops / rate + c.gptq_tokens / c.train_seq_len / n_gpus * 3000 * LAUNCH_SECONDS,
        "rounding": ATTEMPTS * columns * 11 * LAUNCH_SECONDS,
        "packing, timed here": (ATTEMPTS + (c.codec == "rans")) * pack,  # LZMA's last one is at hand
        "mixer": c.mixer_calibration_tokens * c.eval_seq_len / c.eval_stride * flops / 3 / rate
        + train_gpt.CALIBRATION_STEPS * 500 * LAUNCH_SECONDS,
    }
    listed = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
    yield "after the steps", margin(sum(parts.values()), c.reserve_seconds, "s", listed)

    n_updates = -(-tokens // c.ttt_batch_tokens) * c.ttt_epochs
    windows = c.eval_seq_len / c.eval_stride * flops / 3
    stages = dict(roundtrip=tokens * flops / 3 / rate, sliding=tokens * windows / rate)
    adapting = max(tokens * c.ttt_epochs * flops / rate, n_updates * TTT_STEP_SECONDS)
    predicting = stages["sliding"]
    if c.ttt_lora_rank:  # all documents of a block step together, as often as its longest one has pieces
        block = min(c.ttt_chunk_tokens, n_gpus * train_gpt.BLOCK_CELLS // c.vocab_size)
        n_pieces = tokens / block * min(block, LONGEST_DOCUMENT) / c.ttt_lora_tokens
        predicting = max(tokens * flops * 2 / 3 / rate, n_pieces * TTT_STEP_SECONDS)
    stages["ttt"] = stages["mixed"] = predicting + adapting
    asked = [stage for stage in c.stages if stage != "ttt" or "mixed" not in c.stages]
    listed = ", ".join(f"{stage} {stages[stage]:.0f}" for stage in asked)
    seconds = sum(stages[stage] for stage in asked)
    yield "evaluation", margin(seconds, LIMIT_SECONDS, "s", f"{listed}; {n_updates:,} updates")
    mine = dist.share(tokens)
    yield "not estimated", f"hash chains and mixing of {mine.stop:,} tokens a rank; messages between GPUs; compiling"


def bench_plan(args, c: Config, dist: Dist) -> None:
    """Estimate what a configuration needs on GPUs: memory, seconds, steps and bytes, each beside its limit."""
    changed = " ".join(sorted(set(c.lines()) - set(Config(device="cpu").lines()))) or "the defaults"
    print(f"# {args.gpus} x {args.device}, {args.tokens:,} tokens to score, {changed}: ESTIMATES, no measurement")
    for what, figure in estimate(c, args.device, args.gpus, args.tokens, args.utilization):
        print(f"estimate {what + ':':<17} {figure}", flush=True)
