"""Train a small transformer, pack it under 16,000,000 bytes, and score text with it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py            # the competition model on 8 GPUs
    PRESET=smoke torchrun --standalone --nproc_per_node=2 train_gpt.py   # minutes on two CPU cores
    PHASE=eval ARTIFACT_PATH=logs/x.artifact python train_gpt.py     # score an artifact that exists

The file reads in the order in which data flows: settings, process and clock, text, kernels, model, optimizers,
training, artifact, n-gram experts, mixing, scoring, main. A score is valid because of one interface: `predict` is
handed the tokens before each position and never a target, `score` is the only place where a row is charged for the
token that came, and `update` learns from a chunk after its score is fixed.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import platform
import statistics
import struct
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels have plain twins
    triton = tl = None

# ======================================================================================================================
# Config: every number that a run depends on, read once from the environment and never changed.
# ======================================================================================================================

CAP_BYTES = 16_000_000  # decimal, script plus artifact
STAGES = ("roundtrip", "sliding", "ttt", "mixed")


class InputError(Exception):
    """Input that cannot be used. The message is one line: the name, the value and what is allowed."""


def setting(default, low=None, high=None, choices=None, shape=False, score=False):
    """A field of Config with its allowed range.

    The artifact keeps the fields marked `shape`, which fix its tensors, their coding and its function, and those
    marked `score`, which fix what is predicted with it.
    """
    return field(default=default, metadata=dict(low=low, high=high, choices=choices, shape=shape, score=score))


@dataclass(frozen=True)
class Config:
    """All settings. A field's environment variable is its name in capitals; the defaults are the competition run."""

    # What to run, on what, and where the files are.
    preset: str = setting("", choices=("", "smoke", "cpu"))
    run_id: str = setting("")  # "" = time and seed
    phase: str = setting("both", choices=("both", "train", "eval"))
    seed: int = setting(1337, 0, 2**32 - 1)
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))  # of activations; auto: bfloat16 on CUDA
    torch_compile: bool = setting(True)  # on CUDA only
    attention: str = setting("auto", choices=("auto", "flash3", "cudnn", "flash", "efficient", "math"))
    kernels: tuple[str, ...] = setting(("auto",), choices=("auto", "loss", "mlp"))  # Triton's; auto: where faster
    data_path: str = setting("data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = setting("")  # "" = tokenizer.model inside data_path
    artifact_path: str = setting("")  # "" = LOG_DIR/RUN_ID.artifact
    scores_path: str = setting("")  # "" = no per-token record
    log_dir: str = setting("logs")

    # Model.
    vocab_size: int = setting(1024, 257, 65536, shape=True)
    bos_id: int = setting(1, 0, shape=True)
    num_layers: int = setting(11, 1, shape=True)
    model_dim: int = setting(512, 16, shape=True)
    num_heads: int = setting(8, 1, shape=True)
    num_kv_heads: int = setting(4, 1, shape=True)
    mlp_mult: float = setting(3.0, 0.125, shape=True)
    leaky_slope: float = setting(0.5, 0.0, 1.0, shape=True)
    xsa_last_n: int = setting(4, 0, shape=True)
    bigram_vocab_size: int = setting(2048, 0, shape=True)  # rows of the hashed bigram embedding; 0 = none
    bigram_dim: int = setting(128, 1, shape=True)
    value_residual: bool = setting(True, shape=True)
    ve_layers: tuple[int, ...] = setting((9, 10), shape=True)  # layers that add a value embedding
    ve_dim: int = setting(128, 1, shape=True)
    smear_gate: bool = setting(True, shape=True)
    rope_dims: int = setting(16, 0, shape=True)  # of each head; 0 = no position encoding
    rope_base: float = setting(10000.0, 1.0, shape=True)
    layer_scale: bool = setting(True, shape=True)  # 1 / sqrt(layer + 1) on the input of every sublayer
    unet_skips: bool = setting(True, shape=True)
    qk_gain_init: float = setting(1.5, 0.0)
    logit_softcap: float = setting(30.0, 0.0, shape=True)  # 0 = none
    tie_embeddings: bool = setting(True, shape=True)

    # Training length and batch.
    iterations: int = setting(9000, 1)
    max_wallclock_seconds: float = setting(600.0, 0.0)  # from the first step to the written artifact; 0 = no cap
    train_batch_tokens: int = setting(786_432, 1)  # per optimizer step, over all ranks
    train_seq_len: int = setting(2048, 8, score=True)
    micro_batch_tokens: int = setting(98_304, 8)  # per forward pass and rank, in training and in scoring
    warmup_steps: int = setting(20, 0)  # compile warm-up on synthetic tokens; all state is restored afterwards
    lr_warmup_iters: int = setting(20, 0)  # this, MUON_MOMENTUM_WARMUP_STEPS and WARMDOWN_ITERS shrink with the run
    warmdown_iters: int = setting(3500, 0)  # where the clock and not ITERATIONS ends it
    train_log_every: int = setting(500, 1)
    val_loss_every: int = setting(0, 0)  # 0 = not during training

    # Optimizers, averages and the artifact.
    matrix_lr: float = setting(0.025, 0.0)
    scalar_lr: float = setting(0.025, 0.0)
    tied_embed_lr: float = setting(0.035, 0.0)
    tied_embed_init_std: float = setting(0.005, 0.0)
    muon_momentum: float = setting(0.99, 0.0, 1.0)
    muon_momentum_warmup_start: float = setting(0.92, 0.0, 1.0)
    muon_momentum_warmup_steps: int = setting(1500, 0)
    muon_backend_steps: int = setting(5, 1, 20)  # Newton-Schulz iterations
    muon_coefficients: str = setting("jordan", choices=("jordan", "polar_express"))
    muon_row_norm: bool = setting(True)  # of what is orthogonalized (MuonEq-R, PR #1394)
    muon_wd: float = setting(0.04, 0.0)
    adam_wd: float = setting(0.04, 0.0)
    beta1: float = setting(0.9, 0.0, 0.9999, score=True)
    beta2: float = setting(0.95, 0.0, 0.99999, score=True)
    adam_eps: float = setting(1e-8, 0.0, score=True)
    grad_clip_norm: float = setting(0.3, 0.0)  # 0 = none
    ema_decay: float = setting(0.997, 0.0, 0.999999)
    swa_every: int = setting(50, 1)
    swa_start_scale: float = setting(0.2, 0.0, 1.0)  # SWA collects while the learning-rate scale is below this
    complement_alpha: float = setting(0.0, 0.0, 1.0)  # 0 = every token weighs the same
    complement_tokens: int = setting(16_000_000, 1)  # training tokens from which its bigrams are counted
    gptq_tokens: int = setting(262_144, 1)  # of training text, on which it is measured what errors in weights cost
    target_bytes: int = setting(CAP_BYTES, 1, CAP_BYTES)  # script plus artifact; the steps between levels follow
    codec: str = setting("range", choices=("range", "lzma"), shape=True)  # of the integers; LZMA takes all else

    # Scoring.
    stages: tuple[str, ...] = setting(STAGES, choices=STAGES)  # the last one is the run's score
    max_eval_seconds: float = setting(600.0, 0.0)  # of all stages; adaptation gives way. 0 = no cap
    val_tokens: int = setting(0, 0)  # score only the first of them; 0 = the whole stream
    val_batch_size: int = setting(524_288, 8)  # tokens a chunk where nothing is learned between chunks
    eval_seq_len: int = setting(2048, 8, score=True)
    eval_stride: int = setting(256, 1, score=True)
    ttt_chunk_tokens: int = setting(32_768, 8, score=True)
    ttt_optimizer: str = setting("sgd", choices=("sgd", "adamw"), score=True)
    ttt_lr: float = setting(0.002, 0.0, score=True)
    ttt_momentum: float = setting(0.9, 0.0, 0.9999, score=True)  # sgd only; adamw uses BETA1, BETA2
    ttt_epochs: int = setting(3, 0, score=True)
    ttt_batch_tokens: int = setting(32_768, 8, score=True)  # per step, over all ranks
    ttt_micro_tokens: int = setting(4096, 8, score=True)  # per backward pass: what a rank gets is a multiple of it
    ttt_freeze_blocks: int = setting(0, 0, score=True)  # leading blocks that stay as they are
    ttt_grad_clip: float = setting(1.0, 0.0, score=True)
    ttt_polyak: float = setting(0.0, 0.0, 0.999999, score=True)  # decay of the average that predicts; 0 = none
    ttt_cosine_tokens: int = setting(0, 0, score=True)  # stream length over which the rate falls to 0; 0 = constant
    ttt_byte_weighted: bool = setting(False, score=True)
    ttt_temperature: float = setting(1.0, 0.1, 10.0, score=True)
    mixer: str = setting("maxent", choices=("maxent", "tilt"), score=True)
    mixer_hidden: int = setting(32, 1, 4096, shape=True)  # units of the network that maxent learns
    mixer_lr: float = setting(0.002, 0.0, score=True)  # of its step after each scored chunk
    mixer_calibration_tokens: int = setting(1_048_576, 2)  # of held-out training text, on which it is fitted
    ngram_orders: tuple[int, ...] = setting((1, 2, 3, 4, 5, 6, 8, 12, 16, 24), shape=True)  # tokens of context
    ngram_depth: int = setting(16, 1, 255, score=True)  # latest occurrences of a context that count
    ngram_reach_tokens: int = setting(64_000_000, 1, 2**31 - 2**27, score=True)  # how far back they may lie
    ngram_table_bits: int = setting(25, 4, 32, score=True)  # log2 of the contexts remembered; 8 bytes each

    @classmethod
    def from_env(cls, env: dict[str, str]) -> Config:
        """Settings in force: defaults, then the preset, then the environment. Raises InputError."""
        refuse_unknown(env)
        given = {f.name: parse(f, env[f.name.upper()]) for f in dataclasses.fields(cls) if f.name.upper() in env}
        preset = PRESETS.get(given.get("preset", ""), {})
        return cls(**{**preset, **given})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_range(f, getattr(self, f.name))
        for broken, message in self.contradictions():
            if broken:
                raise InputError(message)

    def contradictions(self):
        """Pairs of (is violated, message) for rules over several settings."""
        head_dim = self.model_dim // self.num_heads
        both = f"MODEL_DIM={self.model_dim} NUM_HEADS={self.num_heads} NUM_KV_HEADS={self.num_kv_heads}"
        yield self.model_dim % self.num_heads != 0, f"{both}: the heads must divide MODEL_DIM"
        yield self.num_heads % self.num_kv_heads != 0, f"{both}: NUM_KV_HEADS must divide NUM_HEADS"
        rope_fits = self.rope_dims % 2 == 0 and self.rope_dims <= head_dim
        yield not rope_fits, f"ROPE_DIMS={self.rope_dims}: allowed is an even number up to the head's {head_dim}"
        layers_exist = all(0 <= layer < self.num_layers for layer in self.ve_layers)
        yield not layers_exist, f"VE_LAYERS={show(self.ve_layers)}: allowed are layers 0 to {self.num_layers - 1}"
        yield self.bos_id >= self.vocab_size, f"BOS_ID={self.bos_id}: allowed is less than VOCAB_SIZE={self.vocab_size}"
        yield self.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: allowed are 0 (none) and 2 or more"
        yield (
            self.train_batch_tokens < self.train_seq_len,
            f"TRAIN_BATCH_TOKENS={self.train_batch_tokens}: allowed is at least TRAIN_SEQ_LEN={self.train_seq_len}",
        )
        yield (
            self.eval_stride > self.eval_seq_len,
            f"EVAL_STRIDE={self.eval_stride}: allowed is at most EVAL_SEQ_LEN={self.eval_seq_len}",
        )
        yield (
            self.ttt_freeze_blocks > self.num_layers,
            f"TTT_FREEZE_BLOCKS={self.ttt_freeze_blocks}: allowed is at most NUM_LAYERS={self.num_layers}",
        )
        yield not self.stages, f"STAGES is empty: allowed are {', '.join(STAGES)}"
        auto_alone = "auto" not in self.kernels or len(self.kernels) == 1
        yield not auto_alone, f"KERNELS={show(self.kernels)}: allowed are auto, or any of loss, mlp, or nothing"
        yield self.run_id != os.path.basename(self.run_id), f"RUN_ID={self.run_id!r}: allowed is a plain file name"
        npz = not self.scores_path or self.scores_path.endswith(".npz")
        yield not npz, f"SCORES_PATH={self.scores_path}: allowed is a name that ends in .npz"
        for name in ("stages", "ve_layers", "ngram_orders"):
            values = getattr(self, name)
            yield len(set(values)) < len(values), f"{name.upper()}={show(values)}: allowed is each value once"
        orders_fit = 1 in self.ngram_orders and all(0 < order <= 64 for order in self.ngram_orders)
        yield not orders_fit, f"NGRAM_ORDERS={show(self.ngram_orders)}: allowed are 1 and others up to 64"
        hint_missing = self.mixer == "tilt" and OneTokenTilt.ORDER not in self.ngram_orders
        yield hint_missing, f"NGRAM_ORDERS={show(self.ngram_orders)}: MIXER=tilt needs {OneTokenTilt.ORDER} among them"
        no_artifact = self.phase == "eval" and not self.artifact_path
        yield no_artifact, "PHASE=eval needs ARTIFACT_PATH, the file to score"

    def lines(self) -> list[str]:
        """Every value in force as NAME=value, in the form in which the environment takes it."""
        return [f"{f.name.upper()}={show(getattr(self, f.name))}" for f in dataclasses.fields(self)]

    def marked(self, mark: str) -> dict:
        """The settings marked `shape` or `score`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata[mark]}

    @property
    def batch_seqs(self) -> int:
        """Training sequences of an optimizer step, over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens of those sequences."""
        return self.batch_seqs * self.train_seq_len


# Trains, compresses and scores in a few minutes on two CPU cores; no wall-clock cap, so two runs agree bit for bit.
SMOKE = dict(
    data_path="data/datasets/sample",
    num_layers=4,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    xsa_last_n=2,
    bigram_dim=32,
    ve_layers=(3,),
    ve_dim=32,
    iterations=400,
    max_wallclock_seconds=0.0,
    max_eval_seconds=0.0,
    train_batch_tokens=4096,
    train_seq_len=256,
    micro_batch_tokens=4096,
    warmup_steps=1,
    warmdown_iters=240,
    train_log_every=25,
    muon_momentum=0.95,
    muon_momentum_warmup_steps=100,
    swa_every=5,
    val_batch_size=16384,
    eval_seq_len=256,
    eval_stride=64,
    ttt_chunk_tokens=2048,
    ttt_optimizer="adamw",
    ttt_lr=0.0003,
    ttt_epochs=1,
    ttt_batch_tokens=2048,
    ttt_micro_tokens=512,
    gptq_tokens=32_768,
    target_bytes=600_000,
    mixer_calibration_tokens=65_536,
    ngram_table_bits=20,
)

# Half an hour of training on one CPU core, less on two, for measurements: give it DATA_PATH.
CPU = SMOKE | dict(
    data_path=Config.data_path,
    dtype="bfloat16",
    num_layers=6,
    model_dim=192,
    num_heads=3,
    num_kv_heads=1,
    bigram_dim=64,
    ve_layers=(4, 5),
    ve_dim=64,
    iterations=1600,
    train_seq_len=1024,
    warmdown_iters=1300,
    train_log_every=100,
    eval_seq_len=1024,
    eval_stride=256,
    ttt_lr=0.0005,
    ttt_epochs=2,
    gptq_tokens=65_536,
    target_bytes=1_500_000,
    mixer_calibration_tokens=131_072,
    ngram_table_bits=23,
)

PRESETS = {"smoke": SMOKE, "cpu": CPU}

# An unknown name with one of these beginnings is taken for a setting, so that EMA_ENABLED=1 is refused and not ignored.
SETTING_FAMILIES = (
    *("BIGRAM_", "COMPLEMENT_", "CROWN_Q", "EMA_", "EMBED_", "EVAL_", "GPTQ_", "GRAD_CLIP", "HEAD_LR"),
    *("HEDGE_", "LATE_QAT", "LN_", "LOGIT_", "LR_", "MATRIX_", "MIXER_", "MLP_", "MUON_"),
    *("NGRAM_", "POLYAK_", "QAT_", "QK_GAIN", "RESID_", "ROPE_", "SCALAR_", "SWA_", "TARGET_"),
    *("TIED_", "TRAIN_", "TTT_", "VAL_", "VE_", "WARMDOWN_", "WARMUP_", "XSA_"),
)


def refuse_unknown(env: dict[str, str]) -> None:
    """Raise InputError for a variable that looks like a setting and is none."""
    known = [f.name.upper() for f in dataclasses.fields(Config)]
    for name in env:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            raise InputError(f"unknown setting {name}: did you mean {near[0]}?")
        family = next((family for family in SETTING_FAMILIES if name.startswith(family)), None)
        if family:
            members = ", ".join(k for k in known if k.startswith(family)) or "none"
            raise InputError(f"unknown setting {name}={env[name]}: known {family.rstrip('_')} settings are {members}")


def parse(f: dataclasses.Field, text: str):
    """The value of a field from its environment text. Raises InputError."""
    kind = type(f.default)
    try:
        if kind is bool:
            return {"0": False, "1": True}[text]
        if kind is tuple:
            parts = [part.strip() for part in text.split(",") if part.strip()]
            return tuple(parts) if f.metadata["choices"] else tuple(map(int, parts))
        return kind(text)
    except (ValueError, KeyError):
        allowed = {bool: "0 or 1", int: "a whole number", float: "a number", tuple: "whole numbers with commas"}[kind]
        raise InputError(f"{f.name.upper()}={text!r} does not parse: allowed is {allowed}") from None


def check_range(f: dataclasses.Field, value) -> None:
    """Raise InputError if a field's value is outside what its declaration allows."""
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    if choices is not None:
        bad = [part for part in (value if isinstance(value, tuple) else (value,)) if part not in choices]
        if bad:
            allowed = ", ".join(repr(choice) for choice in choices)
            raise InputError(f"{f.name.upper()}={bad[0]!r} is not known: allowed are {allowed}")
    elif isinstance(value, (int, float)):
        above = low is None or value >= low
        below = high is None or value <= high
        if not (math.isfinite(value) and above and below):
            allowed = f"{low} to {high}" if high is not None else f"{low} or more"
            raise InputError(f"{f.name.upper()}={value} is out of range: allowed is {allowed}")


def show(value) -> str:
    """A setting's value as the environment would spell it."""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ======================================================================================================================
# Run: this process among its ranks, its device, its log and its clock. All use of torch.distributed is here; with one
# rank every collective is the identity, so that nothing below asks how many ranks there are.
# ======================================================================================================================


# torch 2.13 renamed both and warns at every call of the old name; 2.11 knows only the old one.
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Arriving:
    """A tensor that a collective may still be writing, and what it reads; other work can go on meanwhile."""

    tensor: Tensor
    source: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """The tensor, for what is computed from here on."""
        if self.work is not None:
            self.work.wait()
        return self.tensor


class Run:
    """One process of a run. Ranks, devices and the run's name are settled here."""

    def __init__(self, config: Config):
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = self.choose_device(config)
        self.use_device()
        self.dtype = {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        }[config.dtype]
        self.compiles = config.torch_compile and self.device.type == "cuda"
        if self.compiles:
            torch._dynamo.config.recompile_limit = 64  # a graph for each batch shape, with and without gradients
        if self.world_size > 1 and self.device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device)
        elif self.world_size > 1:
            dist.init_process_group("gloo")
        self.log_path: Path | None = None
        self.is_silent = False
        self.last_event: torch.cuda.Event | None = None

    @staticmethod
    def choose_device(config: Config) -> torch.device:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise InputError("DEVICE=cuda: no CUDA device is available; allowed here are 'auto' and 'cpu'")
        if config.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        n_devices = torch.cuda.device_count()
        if local_rank >= n_devices:
            raise InputError(f"nproc_per_node: process {local_rank} has no CUDA device; allowed are {n_devices} a node")
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda", local_rank)

    def use_device(self) -> None:
        """Make the device that of the calling thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def open_log(self, c: Config) -> str:
        """Claim the run's files, on the main rank, and return the run's name. Raises InputError if one exists."""
        run_id = self.broadcast(lambda: c.run_id or time.strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}")
        if self.is_main:
            self.log_path = Path(c.log_dir) / f"{run_id}.txt"
            written = [self.log_path, self.log_path.with_suffix(".json")]
            written += [Path(c.scores_path)] if c.scores_path else []
            written += [artifact_path(c, run_id)] if c.phase != "eval" else []
            for path in written:
                if path.exists():
                    raise InputError(f"RUN_ID={run_id}: {path} exists and would be overwritten; choose another name")
                make_folder(path.parent)
        return run_id

    def log(self, text: str) -> None:
        """Print a line and append it to the log, on the main rank."""
        if not self.is_main or self.is_silent:
            return
        print(text, flush=True)
        if self.log_path:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    @contextmanager
    def silent(self):
        """Log nothing meanwhile."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False

    def broadcast(self, make, *arguments):
        """make(*arguments), called on the main rank only and handed to all: other nodes need not have the files.

        An InputError of it is raised on all ranks, so that none waits for what never comes.
        """
        box = [attempt(make, *arguments) if self.is_main else None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        made, refusal = box[0]
        if refusal:
            raise InputError(refusal)
        return made

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """The largest of the ranks' values, so that all of them decide alike; the device is not waited for."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return box.item()

    def sum_gradients(self, params: list[nn.Parameter]) -> Tensor:
        """Add up the ranks' gradients in one message; a parameter that this rank did not touch counts as zero.

        Returns all of them in one row, of which each parameter's gradient is a part from then on.
        """
        fill_gradients(params)
        row = self.sum(torch.cat([p.grad.flatten() for p in params] or [torch.zeros(0, device=self.device)]))
        for p, grad in zip(params, row.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
        return row

    def share(self, n: int, granule: int = 1) -> slice:
        """This rank's contiguous part of n items, cut at multiples of `granule`; the parts of all ranks cover n."""
        units = -(-n // granule)
        first, last = units * self.rank // self.world_size, units * (self.rank + 1) // self.world_size
        return slice(min(first * granule, n), min(last * granule, n))

    def gather(self, part: Tensor, rows: slice, n: int) -> Tensor:
        """All n rows from the ranks' parts: [m, ...] on each rank at `rows` -> [n, ...] on every rank."""
        if self.world_size == 1:
            return part
        whole = part.new_zeros(n, *part.shape[1:])
        whole[rows] = part
        return self.sum(whole)

    def reduce_scatter(self, bank: Tensor) -> Arriving:
        """Begin to sum [world_size * m, ...] over ranks; what arrives are this rank's m entries."""
        if self.world_size == 1:
            return Arriving(bank)
        shard = bank.new_empty(bank.shape[0] // self.world_size, *bank.shape[1:])
        return Arriving(shard, bank, REDUCE_SCATTER(shard, bank, async_op=True))

    def all_gather(self, shard: Tensor) -> Arriving:
        """Begin to put together [m, ...] of each rank to [world_size * m, ...]."""
        if self.world_size == 1:
            return Arriving(shard)
        bank, shard = shard.new_empty(shard.shape[0] * self.world_size, *shard.shape[1:]), shard.contiguous()
        return Arriving(bank, shard, ALL_GATHER(bank, shard, async_op=True))

    def wrap(self, function):
        """A model or function as it should be called: compiled on CUDA, itself elsewhere."""
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiles else function

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def follow(self) -> None:
        """Wait for the device to reach where the call before this one was made, so that the host is one step ahead."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record()
        if self.last_event is not None:
            self.last_event.synchronize()
        self.last_event = event

    def hardware(self) -> str:
        if self.device.type == "cuda":
            return f"{self.world_size} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world_size} process(es) on CPU, {torch.get_num_threads()} thread(s) each, {platform.machine()}"

    def close(self) -> None:
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # no rank takes its sockets away while another still uses them
            dist.destroy_process_group()


def attempt(make, *arguments):
    """(make(*arguments), "") or, where that raises an InputError, (None, its message)."""
    try:
        return make(*arguments), ""
    except InputError as error:
        return None, str(error)


def fill_gradients(params: list[nn.Parameter]) -> None:
    """Zeros for the gradients of parameters that no backward has reached, as on a rank without a sequence."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, or raise InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; allowed is a folder that can be written") from None


class Clock:
    """Seconds that count against a budget; validation stops it."""

    def __init__(self, run: Run):
        self.run, self.total = run, 0.0
        self.resume()

    def resume(self) -> None:
        self.run.synchronize()
        self.started = time.perf_counter()

    def seconds(self) -> float:
        return self.total + time.perf_counter() - self.started

    @contextmanager
    def stopped(self):
        self.run.synchronize()
        self.total = self.seconds()
        yield
        self.resume()


# ======================================================================================================================
# Text: shards of token ids, the bytes that a token stands for, and the order in which training and scoring read them.
# ======================================================================================================================

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def read_shard(path: str | Path) -> np.ndarray:
    """Memory-mapped uint16 token ids [n] of a challenge shard.

    The format is 256 little-endian int32 (magic, version, n, zeros), then n uint16. Raises InputError for a wrong
    magic, version or length.
    """
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS:
        raise InputError(f"shard {path}: {4 * len(header)} bytes; allowed is {4 * SHARD_HEADER_INTS} or more")
    magic, version, n_tokens = (int(number) for number in header[:3])
    if magic != SHARD_MAGIC:
        raise InputError(f"shard {path}: magic {magic}; allowed is {SHARD_MAGIC}")
    if version != SHARD_VERSION:
        raise InputError(f"shard {path}: version {version}; allowed is {SHARD_VERSION}")
    size_bytes = os.path.getsize(path)
    expected_bytes = 4 * SHARD_HEADER_INTS + 2 * n_tokens
    if n_tokens <= 0 or size_bytes != expected_bytes:
        raise InputError(f"shard {path}: {size_bytes} bytes; its header's {n_tokens} tokens take {expected_bytes}")
    return np.memmap(path, dtype="<u2", mode="r", offset=4 * SHARD_HEADER_INTS)


def find_shards(config: Config, split: str) -> list[str]:
    """Paths of the `train` or `val` shards in DATA_PATH, in order. Raises InputError if there is none."""
    pattern = os.path.join(glob.escape(config.data_path), f"*_{split}_*.bin")
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise InputError(f"DATA_PATH={config.data_path}: no shard matches {pattern}; data/prepare.py makes them")
    return paths


def check_ids(tokens: np.ndarray, config: Config, where: str) -> np.ndarray:
    """The tokens as int64, or InputError if one is past the vocabulary."""
    top = int(tokens.max())
    if top >= config.vocab_size:
        raise InputError(f"{where}: token id {top}; allowed is less than VOCAB_SIZE={config.vocab_size}")
    return tokens.astype(np.int64)


class Tokenizer:
    """A SentencePiece model, checked against the settings and the data it is used with.

    `start_bytes[y]` and `inside_bytes[y]` ([V] int64) are the UTF-8 bytes that token y adds to the decoded text right
    after a BOS and elsewhere. They differ when the tokenizer's own decoder drops a document's leading space.
    """

    def __init__(self, config: Config):
        if not os.path.isdir(config.data_path):
            raise InputError(f"DATA_PATH={config.data_path}: no such folder; data/prepare.py makes one")
        path = config.tokenizer_path or os.path.join(config.data_path, "tokenizer.model")
        if not os.path.isfile(path):
            raise InputError(f"TOKENIZER_PATH={path}: no such file")
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError:
            raise InputError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
        self.check(path, config)
        ids = range(self.sp.vocab_size())
        self.start_bytes = torch.tensor([self.added_bytes(i, at_start=True) for i in ids])
        self.inside_bytes = torch.tensor([self.added_bytes(i, at_start=False) for i in ids])
        self.bos_id = config.bos_id

    def check(self, path: str, config: Config) -> None:
        """Raise InputError unless the tokenizer is the one that the settings and the shards speak of."""
        size, bos = self.sp.vocab_size(), self.sp.bos_id()
        if size != config.vocab_size:
            raise InputError(f"TOKENIZER_PATH={path} has {size} pieces; VOCAB_SIZE={config.vocab_size} must match")
        if bos != config.bos_id:
            raise InputError(f"TOKENIZER_PATH={path} has BOS id {bos}; BOS_ID={config.bos_id} must match")
        if not any(self.sp.is_byte(i) for i in range(size)):
            raise InputError(f"TOKENIZER_PATH={path} has no byte pieces; without them text has no exact byte count")
        manifest = Path(config.data_path) / "manifest.json"
        if manifest.is_file():
            try:
                expected = json.loads(manifest.read_text()).get("tokenizer_sha256", self.sha256)
            except (ValueError, AttributeError):
                raise InputError(f"{manifest}: not a JSON object; data/prepare.py writes one") from None
            if expected != self.sha256:
                raise InputError(f"TOKENIZER_PATH={path}: sha256 differs from the one that {manifest} names")

    def added_bytes(self, token: int, at_start: bool) -> int:
        """UTF-8 bytes of one token, measured with the tokenizer's decoder; a byte piece is one byte anywhere."""
        if self.sp.is_byte(token):
            return 1
        if self.sp.is_control(token) or self.sp.is_unknown(token) or self.sp.is_unused(token):
            return 0
        piece = self.sp.id_to_piece(token)
        text = self.sp.decode([token]) if at_start else piece.replace("\u2581", " ")
        return len(text.encode("utf-8"))

    def count_bytes(self, previous: Tensor, tokens: Tensor) -> Tensor:
        """Bytes that each token adds after the one before it: int64, shaped like `tokens`, on the CPU."""
        previous, tokens = previous.cpu(), tokens.cpu()
        return torch.where(previous == self.bos_id, self.start_bytes[tokens], self.inside_bytes[tokens])


class TrainLoader:
    """Training sequences in an order that visits each once before any twice, the same at every world size.

    The shards are cut into spans of TRAIN_SEQ_LEN tokens (plus one, the last target). Sequence i of the run is span
    (offset + i * stride) mod n with the stride coprime to n, so consecutive sequences come from all over the data. The
    last spans are not among the n: averages are chosen on 65,536 tokens of them and the mixer is fitted on
    MIXER_CALIBRATION_TOKENS, or both on a tenth of the data if that is less.
    """

    AVERAGING_TOKENS, BATCHES_AHEAD = 65_536, 4

    def __init__(self, config: Config, run: Run):
        self.config, self.run, self.seq_len, self.stalls = config, run, config.train_seq_len, 0
        self.paths = find_shards(config, "train")
        self.shards = [read_shard(path) for path in self.paths]
        self.ends = np.cumsum([(len(shard) - 1) // self.seq_len for shard in self.shards])
        spans = int(self.ends[-1])
        if spans < 2:
            raise InputError(f"TRAIN_SEQ_LEN={self.seq_len}: {config.data_path} has {spans} sequences; 2 are needed")
        self.averaging, calibration = (
            min(-(-tokens // self.seq_len), max(1, spans // 10))
            for tokens in (self.AVERAGING_TOKENS, config.mixer_calibration_tokens)
        )
        self.held_out = max(self.averaging, calibration)
        n = self.n = spans - self.held_out
        self.offset = int(np.random.default_rng(config.seed).integers(n))
        self.stride = next(s for s in range(max(1, round(0.618 * n)), 2 * n + 2) if math.gcd(s, n) == 1)

    def span(self, span: int) -> np.ndarray:
        """Token ids [TRAIN_SEQ_LEN + 1] of one span of the shards."""
        shard = int(np.searchsorted(self.ends, span, side="right"))
        start = (span - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
        return check_ids(self.shards[shard][start : start + self.seq_len + 1], self.config, self.paths[shard])

    def sequence(self, i: int) -> np.ndarray:
        """The run's i-th sequence."""
        return self.span((self.offset + i * self.stride) % self.n)

    def host_batch(self, step: int) -> Tensor:
        """This rank's sequences of an optimizer step, int64 [n, TRAIN_SEQ_LEN + 1]; n may be 0. Pinned for CUDA."""
        mine, first = self.run.share(self.config.batch_seqs), step * self.config.batch_seqs
        block = self.stacked([self.sequence(first + i) for i in range(mine.start, mine.stop)])
        return block.pin_memory() if self.run.device.type == "cuda" else block

    def batch(self, step: int) -> Tensor:
        """The same on the device."""
        return self.host_batch(step).to(self.run.device, non_blocking=True)

    def batches(self):
        """batch(0), batch(1) and so on, read ahead by a thread; `stalls` counts those that were waited for."""
        with ThreadPoolExecutor(1, initializer=self.run.use_device) as reader:
            coming = deque(reader.submit(self.host_batch, step) for step in range(self.BATCHES_AHEAD))
            for step in itertools.count():
                self.stalls += step > 0 and not coming[0].done()
                batch = coming.popleft().result()
                coming.append(reader.submit(self.host_batch, step + self.BATCHES_AHEAD))
                yield batch.to(self.run.device, non_blocking=True)

    def first_sequences(self, n_tokens: int) -> Tensor:
        """This rank's part of the run's first sequences, n_tokens in all or one sequence, like a batch."""
        mine = self.run.share(max(1, n_tokens // self.seq_len))
        return self.stacked([self.sequence(i) for i in range(mine.start, mine.stop)]).to(self.run.device)

    def held_out_batch(self) -> Tensor:
        """This rank's part of the spans on which averages are chosen, like a batch."""
        mine = self.run.share(self.averaging)
        return self.stacked([self.span(self.n + i) for i in range(mine.start, mine.stop)]).to(self.run.device)

    def held_out_text(self, n_tokens: int) -> Tensor:
        """The spans that training never sees, in the order of the text: int64, n_tokens at most."""
        spans = [self.span(i)[:-1] for i in range(self.n, self.n + self.held_out)]
        return torch.from_numpy(np.concatenate(spans)[:n_tokens]).to(self.run.device)

    def stacked(self, rows: list[np.ndarray]) -> Tensor:
        """Sequences as int64 [n, TRAIN_SEQ_LEN + 1]."""
        return torch.from_numpy(np.stack(rows) if rows else np.empty((0, self.seq_len + 1), dtype=np.int64))

    def head(self, n_tokens: int) -> np.ndarray:
        """The first tokens of the first shard, the same on every rank."""
        return check_ids(self.shards[0][:n_tokens], self.config, self.paths[0])


@dataclass(frozen=True)
class Chunk:
    """Positions [start, start + n) of the stream; the i-th of them predicts tokens[i + 1] from all up to tokens[i]."""

    start: int
    tokens: Tensor  # [n + 1] int64
    is_last: bool

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:-1]

    @property
    def targets(self) -> Tensor:
        return self.tokens[1:]


class Stream:
    """The validation text as one stream of tokens, scored left to right; its first token, a BOS, is given.

    `token_bytes` [N] are the UTF-8 bytes that each scored token adds to the text.
    """

    def __init__(self, config: Config, device: torch.device, tokenizer: Tokenizer):
        paths = find_shards(config, "val")
        tokens = np.concatenate([check_ids(read_shard(path), config, path) for path in paths])
        if len(tokens) <= config.eval_seq_len:
            least = f"more than EVAL_SEQ_LEN={config.eval_seq_len}"
            raise InputError(f"DATA_PATH={config.data_path}: validation has {len(tokens)} tokens; allowed is {least}")
        if tokens[0] != config.bos_id:
            raise InputError(f"shard {paths[0]}: it begins with token {tokens[0]}; allowed is BOS_ID={config.bos_id}")
        self.whole = config.val_tokens == 0 or config.val_tokens >= len(tokens) - 1
        if not self.whole:
            tokens = tokens[: config.val_tokens + 1]
        self.tokens = torch.from_numpy(tokens)
        self.documents = int((self.tokens[:-1] == config.bos_id).sum())
        self.token_bytes = tokenizer.count_bytes(self.tokens[:-1], self.tokens[1:])
        self.device = device

    def __len__(self) -> int:
        """Positions to score."""
        return len(self.tokens) - 1

    def chunks(self, chunk_tokens: int):
        """The stream cut every `chunk_tokens` positions."""
        for start in range(0, len(self), chunk_tokens):
            stop = min(start + chunk_tokens, len(self))
            yield Chunk(start, self.tokens[start : stop + 1].to(self.device), stop == len(self))


def windows(first: int, last: int, stride: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The windows that answer for the stream's positions [first, last), as arrays (start, low, high).

    Window k reads inputs [k * stride, k * stride + seq_len) and answers for its last `stride` positions, window 0 for
    all of its own: every position has exactly one window, whatever [first, last) it is asked for in. Stride = seq_len
    gives disjoint windows.
    """
    owner = [max(0, (position - (seq_len - stride)) // stride) for position in (first, last - 1)]
    start = np.arange(owner[0], owner[1] + 1) * stride
    low = np.where(start == 0, 0, start + seq_len - stride)
    return start, np.maximum(low, first), np.minimum(start + seq_len, last)


# ======================================================================================================================
# Kernels: the operations with more than one implementation, behind one name each. The plain one is the specification.
# ======================================================================================================================

SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@functools.cache
def find_flash_attention_3():
    """FlashAttention 3's function on a Hopper GPU, or None; PyPI has stubs, so the function is what counts."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return None
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func if callable(flash_attn_func) else None


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "math", flash_attn_3=None) -> Tensor:
    """Causal attention with grouped KV heads: q [B, T, H, D], k and v [B, T, KV, D] -> [B, T, H, D]."""
    if backend == "flash3":
        y = flash_attn_3(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(SDPA_BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Logits held within +-cap, as float32; a cap of 0 is none."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


def softcapped_nll(logits: Tensor, targets: Tensor, cap: float, fused: bool = False) -> Tensor:
    """Nats of targets [N] under the softmax of softcap(logits [N, V]): float32 [N].

    The fused form reads the logits in their own type and keeps nothing of their size in float32.
    """
    if fused:
        return torch.ops.golf.softcapped_nll(logits, targets, cap)[0]
    return F.cross_entropy(softcap(logits, cap), targets, reduction="none")


def linear_leaky_square(x: Tensor, weight: Tensor, slope: float, fused: bool = False) -> Tensor:
    """leaky_relu(x W^T)^2: x [..., K], weight [N, K] -> [..., N]. The fused form squares where the product is made."""
    if fused:
        return torch.ops.golf.linear_leaky_square(x.flatten(0, -2), weight, slope)[0].view(*x.shape[:-1], -1)
    return F.leaky_relu(F.linear(x, weight), slope).square()


# Triton's forms. Interpreted with TRITON_INTERPRET=1, they run on a CPU, which is how the tests compare them.
jit = triton.jit if triton else lambda kernel: kernel
LOSS_BLOCK = 1024  # logits of a row at a time
TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


@jit
def softcapped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP), by the logistic function."""
    return 2 * CAP * tl.sigmoid(2 * x / CAP) - CAP if CAP > 0 else x


@jit
def softcapped_nll_kernel(logits, targets, nll, lse, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program: its log-sum-exp is gathered as its logits stream by (Milakov and Gimelshein 2018)."""
    row = tl.program_id(0).to(tl.int64)
    largest, total = tl.full((), -1e30, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
        z = tl.where(column < V, softcapped(x, CAP), -1e30)
        top = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - top) + tl.sum(tl.exp(z - top), 0)
        largest = top
    log_sum = largest + tl.log(total)
    target = tl.load(logits + row * V + tl.load(targets + row)).to(tl.float32)
    tl.store(lse + row, log_sum)
    tl.store(nll + row, log_sum - softcapped(target, CAP))


@jit
def softcapped_nll_grad_kernel(
    logits, targets, lse, grad, grad_logits, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of a row a program: grad * (p - [target]) * dz/dx, with p made again from the log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
    z = softcapped(x, CAP)
    excess = tl.exp(z - tl.load(lse + row)) - tl.where(column == tl.load(targets + row), 1.0, 0.0)
    slope = 1 - (z / CAP) * (z / CAP) if CAP > 0 else 1.0
    tl.store(grad_logits + row * V + column, tl.load(grad + row) * excess * slope, mask=column < V)


@jit
def linear_leaky_square_kernel(
    x, weight, product, squared, M, N, SLOPE: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x W^T a program, written as it is, for the backward pass, and squared."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        at = start + k
        a = tl.load(x + m * K + at[None, :], mask=(m < M) & (at[None, :] < K), other=0.0)
        b = tl.load(weight + n * K + at[:, None], mask=(n < N) & (at[:, None] < K), other=0.0)
        total = tl.dot(a, b, total)
    inside = (m < M) & (n < N)
    tl.store(product + m * N + n, total, mask=inside)
    bent = tl.where(total > 0, total, SLOPE * total)
    tl.store(squared + m * N + n, bent * bent, mask=inside)


# As operators of their own they stand in a compiled graph as they are, without a break.
@torch.library.custom_op(
    "golf::softcapped_nll", mutates_args=(), schema="(Tensor logits, Tensor targets, float cap) -> (Tensor, Tensor)"
)
def softcapped_nll_op(logits, targets, cap):
    n_rows, vocab_size = logits.shape
    nll, lse = logits.new_empty(n_rows, dtype=torch.float32), logits.new_empty(n_rows, dtype=torch.float32)
    if n_rows:
        softcapped_nll_kernel[(n_rows,)](
            logits.contiguous(), targets.contiguous(), nll, lse, vocab_size, cap, LOSS_BLOCK
        )
    return nll, lse


@torch.library.custom_op(
    "golf::softcapped_nll_grad",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, Tensor lse, Tensor grad, float cap) -> Tensor",
)
def softcapped_nll_grad_op(logits, targets, lse, grad, cap):
    (n_rows, vocab_size), grad_logits = logits.shape, torch.empty_like(logits, memory_format=torch.contiguous_format)
    if n_rows:
        grid = n_rows, -(-vocab_size // LOSS_BLOCK)
        softcapped_nll_grad_kernel[grid](
            logits.contiguous(), targets.contiguous(), lse, grad.contiguous(), grad_logits, vocab_size, cap, LOSS_BLOCK
        )
    return grad_logits


@torch.library.custom_op(
    "golf::linear_leaky_square", mutates_args=(), schema="(Tensor x, Tensor weight, float slope) -> (Tensor, Tensor)"
)
def linear_leaky_square_op(x, weight, slope):
    (n_rows, inner), n_columns = x.shape, len(weight)
    squared, product = (x.new_empty(n_rows, n_columns) for _ in range(2))
    if n_rows:
        grid = -(-n_columns // TILE["BLOCK_N"]), -(-n_rows // TILE["BLOCK_M"])
        linear_leaky_square_kernel[grid](
            x.contiguous(), weight.contiguous(), product, squared, n_rows, n_columns, slope, inner, **TILE
        )
    return squared, product


@softcapped_nll_op.register_fake
def _(logits, targets, cap):
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))


@softcapped_nll_grad_op.register_fake
def _(logits, targets, lse, grad, cap):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@linear_leaky_square_op.register_fake
def _(x, weight, slope):
    return tuple(x.new_empty(len(x), len(weight)) for _ in range(2))


def keep_for_nll(ctx, inputs, output) -> None:
    logits, targets, ctx.cap = inputs
    ctx.save_for_backward(logits, targets, output[1])


def nll_backward(ctx, grad, _):
    return torch.ops.golf.softcapped_nll_grad(*ctx.saved_tensors, grad, ctx.cap), None, None


def keep_for_square(ctx, inputs, output) -> None:
    x, weight, ctx.slope = inputs
    ctx.save_for_backward(x, weight, output[1])


def square_backward(ctx, grad, _):
    """The derivative of leaky_relu(u)^2 is 2 u or 2 slope^2 u; the two products after it are plain ones."""
    x, weight, product = ctx.saved_tensors
    inner = grad * 2 * torch.where(product > 0, product, ctx.slope**2 * product)
    return inner @ weight, inner.mT @ x, None


softcapped_nll_op.register_autograd(nll_backward, setup_context=keep_for_nll)
linear_leaky_square_op.register_autograd(square_backward, setup_context=keep_for_square)


@dataclass(frozen=True)
class Kernels:
    """Which form each operation has; the defaults are the plain ones."""

    attention: str = "math"
    fused: tuple[str, ...] = ()  # of "loss" and "mlp"

    def __str__(self):
        return f"attention:{self.attention} triton:{show(self.fused) or 'none'}"


@functools.cache
@torch.enable_grad()  # also where the caller only predicts: what is chosen has to work both ways
def choose_kernels(c: Config, run: Run) -> Kernels:
    """What the model runs on here, chosen once and alike on all ranks.

    Raises InputError for a form that was asked for and does not work.
    """
    return run.broadcast(lambda: Kernels(first_attention(c, run), fusions(c, run)))


def first_attention(c: Config, run: Run) -> str:
    """The first of ATTENTION's choices, or the one that it names, that works here."""
    candidates = ("flash3", *SDPA_BACKENDS) if c.attention == "auto" else (c.attention,)
    found = next((backend for backend in candidates if attention_works(backend, c, run)), None)
    if found is None:
        raise InputError(f"ATTENTION={c.attention}: does not work here on {run.device.type}; allowed is 'auto'")
    return found


def attention_works(backend: str, c: Config, run: Run) -> bool:
    """Whether it runs both ways on the model's heads, like the plain form and with finite gradients."""
    generator, head_dim = torch.Generator().manual_seed(0), c.model_dim // c.num_heads
    q, k, v = (
        torch.randn(2, 128, heads, head_dim, generator=generator).to(run.device, run.dtype).requires_grad_()
        for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)
    )
    try:
        flash_attn_3 = find_flash_attention_3() if backend == "flash3" else None
        found = run.wrap(lambda *qkv: attention(*qkv, backend, flash_attn_3))(q, k, v)
        plain = attention(q, k, v)
        gradients = torch.autograd.grad(found.square().sum(), (q, k, v))
    except Exception:  # whatever a library raises for a device, a type or a shape that it does not take
        return False
    return agree(found, plain) and all(bool(gradient.isfinite().all()) for gradient in gradients)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are one but for rounding in bfloat16."""
    return bool((a.float() - b.float()).norm() <= 1e-2 * b.float().norm())


def fusions(c: Config, run: Run) -> tuple[str, ...]:
    """The operations of which Triton's form is used: those that are named, or where it takes less time on CUDA."""
    on_cuda, by_trial = run.device.type == "cuda", c.kernels == ("auto",)
    if not c.kernels or by_trial and not (triton and on_cuda and run.dtype == torch.bfloat16):
        return ()
    if not (triton and (on_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise InputError(f"KERNELS={show(c.kernels)}: needs Triton and a CUDA device; allowed here is 'auto'")
    n, hidden = c.micro_batch_tokens if by_trial else 256, round(c.mlp_mult * c.model_dim)
    targets = torch.randint(c.vocab_size, (n,), device=run.device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=run.device).to(run.dtype).requires_grad_()

    trials = {
        "loss": Trial(softcapped_nll, (random(n, c.vocab_size), targets, c.logit_softcap), run),
        "mlp": Trial(linear_leaky_square, (random(n, c.model_dim), random(hidden, c.model_dim), c.leaky_slope), run),
    }
    if by_trial:
        return tuple(name for name, trial in trials.items() if trial.pays(name))
    for name in c.kernels:
        if fault := trials[name].fault():
            raise InputError(f"KERNELS={show(c.kernels)}: Triton's {name} {fault}; allowed is 'auto'")
    return c.kernels


class Trial:
    """An operation in its plain and in its fused form, forward and backward, as the run would call it."""

    GAIN = 0.97  # of the plain form's time: nearer, the plain one stays

    def __init__(self, operation, inputs: tuple, run: Run):
        self.inputs, self.run = inputs, run
        self.plain = run.wrap(lambda *inputs: operation(*inputs, fused=False))
        self.fused = run.wrap(lambda *inputs: operation(*inputs, fused=True))

    def both_ways(self, form) -> list[Tensor]:
        """The value and the gradients of its sum."""
        y = form(*self.inputs)
        learned = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        return [y, *torch.autograd.grad(y.sum(), learned)]

    def fault(self) -> str:
        """Why the fused form cannot be used, or ""."""
        try:
            alike = all(map(agree, self.both_ways(self.fused), self.both_ways(self.plain)))
        except Exception as error:  # whatever a compiler raises
            return f"fails: {type(error).__name__} {str(error).partition(chr(10))[0]}"
        return "" if alike else "differs from the plain form"

    def pays(self, name: str) -> bool:
        """Whether the fused form works and is faster; the log says which and why."""
        if fault := self.fault():
            self.run.log(f"kernel {name}: plain, since Triton's {fault}")
            return False
        forms = (self.plain, self.fused)
        plain_ms, fused_ms = (triton.testing.do_bench(functools.partial(self.both_ways, form)) for form in forms)
        self.run.log(f"kernel {name}: plain {plain_ms:.3f} ms, Triton {fused_ms:.3f} ms")
        return fused_ms < self.GAIN * plain_ms


# ======================================================================================================================
# Model: blocks and GPT. One forward, tokens in and logits out, serves training, scoring and test-time training.
# ======================================================================================================================


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


def shift(x: Tensor) -> Tensor:
    """x moved one position later along dimension 1, zeros first: what position t - 1 held, seen from t."""
    return F.pad(x[:, :-1], (0, 0) * (x.dim() - 2) + (1, 0))


class Linear(nn.Linear):
    """A bias-free linear map whose float32 weight is cast to the activations' type where it is used."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class LeakySquareLinear(Linear):
    """A linear map and leaky_relu(.)^2 behind it."""

    def __init__(self, in_features: int, out_features: int, slope: float, fused: bool):
        super().__init__(in_features, out_features)
        self.slope, self.fused = slope, fused

    def forward(self, x: Tensor) -> Tensor:
        return linear_leaky_square(x, self.weight.to(x.dtype), self.slope, self.fused)


class BigramEmbedding(nn.Module):
    """A hashed embedding of (token, token before it); the last row stands for 'none before', as after a BOS."""

    def __init__(self, c: Config):
        super().__init__()
        self.rows, self.bos_id = c.bigram_vocab_size, c.bos_id
        self.emb = nn.Embedding(c.bigram_vocab_size, c.bigram_dim)
        self.proj = Linear(c.bigram_dim, c.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        hashed = torch.bitwise_xor(36313 * tokens, 27191 * shift(tokens)) % (self.rows - 1)
        alone = tokens == self.bos_id
        alone[:, 0] = True
        hashed = hashed.masked_fill(alone, self.rows - 1)
        return self.scale.to(dtype) * self.proj(self.emb(hashed).to(dtype))


class SmearGate(nn.Module):
    """Adds to each embedding a gated part of the one before it; the gate reads 12 channels (modded-nanogpt).

    Closed where the token is a BOS: a document must not see how the one before it ended (PR #1855).
    """

    CHANNELS = 12

    def __init__(self, c: Config):
        super().__init__()
        self.bos_id = c.bos_id
        self.gate = nn.Parameter(torch.zeros(self.CHANNELS))
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = self.scale * torch.sigmoid(x[..., : self.CHANNELS].float() @ self.gate)
        gate = gate.masked_fill(tokens == self.bos_id, 0.0)
        return x + gate.unsqueeze(-1).to(x.dtype) * shift(x)


class Attention(nn.Module):
    """Causal grouped-query attention: QK norm, partial rotary embedding, value residual, exclusive self-attention."""

    def __init__(self, c: Config, layer: int, backend: str):
        super().__init__()
        self.backend, self.flash_attn_3 = backend, find_flash_attention_3() if backend == "flash3" else None
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.num_kv_heads, c.model_dim // c.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q, self.k, self.v = (Linear(c.model_dim, n) for n in (c.model_dim, kv_dim, kv_dim))
        self.out = Linear(c.model_dim, c.model_dim)
        self.q_gain = nn.Parameter(torch.full((c.num_heads,), c.qk_gain_init))
        # ResFormer (arXiv 2410.17897): later layers attend to a mix of their own values and the first layer's.
        mixes_value = c.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes_value else None
        self.exclusive = layer >= c.num_layers - c.xsa_last_n

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], v_first: Tensor | None, v_extra: Tensor | None):
        """x [B, T, C] -> (y [B, T, C], v [B, T, KV, D] of this layer before any mixing)."""
        batch, seq_len, _ = x.shape
        q = self.q(x).view(batch, seq_len, self.heads, self.head_dim)
        k, v_own = (f(x).view(batch, seq_len, self.kv_heads, self.head_dim) for f in (self.k, self.v))
        v = v_own if v_extra is None else v_own + v_extra.view_as(v_own)
        if self.value_mix is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * v_first + mix[1] * v
        q, k = rotate(rms_norm(q), *rotary), rotate(rms_norm(k), *rotary)
        q = q * self.q_gain.to(q.dtype)[:, None]
        y = attention(q, k, v, self.backend, self.flash_attn_3)
        if self.exclusive:
            y = remove_own_value(y, v)
        return self.out(y.reshape(batch, seq_len, -1)), v_own


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first 2R channels of x [B, T, H, D] by cos, sin [T, R]; the others pass."""
    half = cos.shape[-1]
    if half == 0:
        return x
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention (PR #265): y [B, T, H, D] less its part along the position's own value [B, T, KV, D]."""
    batch, seq_len, heads, head_dim = y.shape
    unit = F.normalize(v, dim=-1).unsqueeze(3)
    grouped = y.reshape(batch, seq_len, v.shape[2], heads // v.shape[2], head_dim)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).view_as(y)


class Block(nn.Module):
    """Attention, then MLP, each on the normed input; the stem's output x0 is mixed in first."""

    def __init__(self, c: Config, layer: int, kernels: Kernels):
        super().__init__()
        hidden = round(c.mlp_mult * c.model_dim)
        self.attn = Attention(c, layer, kernels.attention)
        self.up = LeakySquareLinear(c.model_dim, hidden, c.leaky_slope, "mlp" in kernels.fused)
        self.down = Linear(hidden, c.model_dim)
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(c.model_dim), torch.zeros(c.model_dim)]))
        self.attn_scale = nn.Parameter(torch.ones(c.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(c.model_dim))
        self.input_scale = 1 / math.sqrt(layer + 1) if c.layer_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, rotary, v_first: Tensor | None, v_extra: Tensor | None):
        """x, x0 [B, T, C] -> (x [B, T, C], v [B, T, KV, D])."""
        mix, attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0
        y, v = self.attn(rms_norm(x) * self.input_scale, rotary, v_first, v_extra)
        x = x + attn_scale * y
        return x + mlp_scale * self.down(self.up(rms_norm(x) * self.input_scale)), v


class GPT(nn.Module):
    """The transformer. All parameters are float32; activations have the type `dtype`."""

    def __init__(self, c: Config, dtype: torch.dtype = torch.float32, kernels: Kernels = Kernels()):  # noqa: B008
        super().__init__()
        self.dtype, self.logit_softcap, self.ve_layers = dtype, c.logit_softcap, c.ve_layers
        self.fused_loss = "loss" in kernels.fused
        self.tok_emb = nn.Embedding(c.vocab_size, c.model_dim)
        self.bigram = BigramEmbedding(c) if c.bigram_vocab_size else None
        self.smear = SmearGate(c) if c.smear_gate else None
        if c.ve_layers:
            self.value_emb = nn.Embedding(c.vocab_size, c.ve_dim)
            self.value_proj = Linear(c.ve_dim, c.num_kv_heads * c.model_dim // c.num_heads)
            self.value_scale = nn.Parameter(torch.full((len(c.ve_layers),), 0.1))
        self.blocks = nn.ModuleList(Block(c, layer, kernels) for layer in range(c.num_layers))
        # U-Net: the second half of the layers takes back what the first half put out, latest first.
        self.encoder_layers = c.num_layers // 2 if c.unet_skips else 0
        self.skip_scale = nn.Parameter(torch.ones(self.encoder_layers, c.model_dim))
        self.head = None if c.tie_embeddings else Linear(c.model_dim, c.vocab_size)
        seq_len = max(c.train_seq_len, c.eval_seq_len)
        frequency = c.rope_base ** -(torch.arange(c.rope_dims // 2).float() / max(1, c.rope_dims // 2))
        angle = torch.outer(torch.arange(seq_len).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    @torch.no_grad()
    def init_weights(self, c: Config) -> GPT:
        """Orthogonal maps into each sublayer, zeros out of it, small embeddings; alike on all ranks."""
        generator = torch.Generator().manual_seed(c.seed)
        for name, p in self.named_parameters():
            if name == "tok_emb.weight":
                nn.init.normal_(p, std=c.tied_embed_init_std, generator=generator)
            elif name == "value_emb.weight":
                nn.init.normal_(p, std=0.01, generator=generator)
            elif name.endswith(INITIALIZED_TO_ZERO):
                nn.init.zeros_(p)
            elif p.dim() == 2 and name.endswith(".weight"):
                nn.init.orthogonal_(p, generator=generator)
            else:
                assert name.endswith(INITIALIZED_BY_CONSTRUCTOR), f"parameter {name} has no initialization"
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, keep: int = 0) -> Tensor:
        """Token ids [B, T] -> logits, float32 [B, T, V], or [B, keep, V] for the last `keep` positions only.

        With targets, token ids [B, T]: the nats of each, float32 [B, T].
        """
        assert tokens.shape[1] <= len(self.cos), "longer than TRAIN_SEQ_LEN and EVAL_SEQ_LEN"
        x = self.tok_emb(tokens).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, self.dtype)
        if self.smear is not None:
            x = self.smear(x, tokens)
        x = rms_norm(x)
        x = rms_norm(self.run_blocks(x, tokens))
        x = x[:, -keep:] if keep else x
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.head is None else self.head(x)
        if targets is None:
            return softcap(logits, self.logit_softcap)
        nll = softcapped_nll(logits.flatten(0, 1), targets.flatten(), self.logit_softcap, self.fused_loss)
        return nll.view(targets.shape)

    def run_blocks(self, x: Tensor, tokens: Tensor) -> Tensor:
        """All layers over the stem's output [B, T, C]."""
        seq_len = tokens.shape[1]
        rotary = (self.cos[:seq_len], self.sin[:seq_len])
        value = self.value_proj(self.value_emb(tokens).to(x.dtype)) if self.ve_layers else None
        x0, v_first, skips = x, None, []
        for layer, block in enumerate(self.blocks):
            if layer >= self.encoder_layers and skips:
                x = x + self.skip_scale[layer - self.encoder_layers].to(x.dtype) * skips.pop()
            v_extra = None
            if layer in self.ve_layers:
                v_extra = self.value_scale[self.ve_layers.index(layer)].to(x.dtype) * value
            x, v = block(x, x0, rotary, v_first, v_extra)
            v_first = v if v_first is None else v_first
            if layer < self.encoder_layers:
                skips.append(x)
        return x


INITIALIZED_TO_ZERO = (".out.weight", ".down.weight", "bigram.emb.weight", "value_proj.weight", "head.weight")
INITIALIZED_BY_CONSTRUCTOR = ("_scale", "_gain", "_mix", ".scale", ".gate")


# ======================================================================================================================
# Optimizers: Muon on the blocks' matrices, AdamW on the rest, and the running averages of the weights.
# ======================================================================================================================

# (a, b, c) of x <- a x + (b x x^T + c (x x^T)^2) x, which pushes singular values toward 1; the last goes on.
NEWTON_SCHULZ = {
    "jordan": ((3.4445, -4.7750, 2.0315),),  # Keller Jordan, Muon (2024)
    "polar_express": (  # Amsel et al. 2025, arXiv 2505.16932, as in PR #1787, the first for x / 1.02
        (7.996623, -21.186509, 14.381890),
        (4.042930, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
        (3.285754, -2.368129, 0.464490),
        (2.346541, -1.709783, 0.423236),
    ),
}


def zeropower(bank: Tensor, steps: int, dtype: torch.dtype, coefficients: str = "jordan") -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: [n, rows, cols] -> the same in `dtype`, singular values near 1."""
    x = bank.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    table = NEWTON_SCHULZ[coefficients]
    for i in range(steps):
        a, b, c = table[min(i, len(table) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum orthogonalized by Newton-Schulz. Matrices of one shape are stacked into a bank and stepped together.

    With several ranks, the gradient bank is padded to a multiple of their number, reduce-scattered, orthogonalized
    where it lands, and the updates are gathered; each rank holds the momentum of its own part only. What one bank sends
    is on its way while the next is computed, the largest first (Parallel Muon, PR #399 of openai/parameter-golf).
    """

    def __init__(self, params: list[nn.Parameter], config: Config, run: Run):
        self.config, self.run = config, run
        shapes = sorted({p.shape for p in params}, key=lambda shape: (-shape.numel(), shape))
        self.banks = [[p for p in params if p.shape == shape] for shape in shapes]
        parts = [-(-len(bank) // run.world_size) for bank in self.banks]
        banks = zip(parts, self.banks, strict=True)
        self.momenta = [torch.zeros(n, *bank[0].shape, device=run.device) for n, bank in banks]

    def gradients(self, bank: list[nn.Parameter]) -> Tensor:
        """The bank's gradients, stacked, with zero matrices up to a multiple of the world size."""
        fill_gradients(bank)
        missing = -len(bank) % self.run.world_size
        return torch.stack([p.grad for p in bank] + [torch.zeros_like(bank[0])] * missing)

    def reduce(self) -> list[Arriving]:
        """Begin to sum the gradients over ranks; what arrives is this rank's part of each bank."""
        return [self.run.reduce_scatter(self.gradients(bank)) for bank in self.banks]

    @torch.no_grad()
    def orthogonalize(self, grads: list[Tensor], momentum: float) -> list[Arriving]:
        """Take in this rank's gradients and begin to gather each bank's update."""
        c, found = self.config, []
        for grad, buffer in zip(grads, self.momenta, strict=True):
            buffer.mul_(momentum).add_(grad)
            update = grad.add(buffer, alpha=momentum)  # Nesterov's
            if c.muon_row_norm:
                update = F.normalize(update, dim=-1)
            update = zeropower(update, c.muon_backend_steps, self.run.dtype, c.muon_coefficients)
            found.append(self.run.all_gather(update))
        return found

    @torch.no_grad()
    def apply(self, updates: list[Arriving], lr: float) -> None:
        """Decay the matrices and move them along their updates."""
        for bank, update in zip(self.banks, updates, strict=True):
            rows, cols = bank[0].shape
            moves = update.wait()[: len(bank)].float().unbind()  # the padding is left over
            torch._foreach_mul_(bank, 1 - lr * self.config.muon_wd)
            torch._foreach_add_(bank, moves, alpha=-lr * math.sqrt(max(1, rows / cols)))


def clip_gradients(grads: list[Tensor], norm: Tensor, limit: float) -> Tensor:
    """Scale gradients of a joint norm to `limit` at most (0 = none), or to zero if it is not finite.

    Returns whether it was not; the device is not waited for.
    """
    finite = norm.isfinite()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    for grad in grads:
        grad.nan_to_num_(0.0, 0.0, 0.0)
    torch._foreach_mul_(grads, torch.where(finite, scale, 0.0))
    return ~finite


class Optimizers:
    """Every parameter in exactly one of three groups: matrices (Muon), embeddings and the rest (AdamW)."""

    def __init__(self, model: GPT, config: Config, run: Run):
        self.config, self.run = config, run
        named = dict(model.named_parameters())
        matrices = [p for name, p in named.items() if is_block_matrix(name, p)]
        embeddings = [p for name, p in named.items() if is_embedding(name)]
        chosen = {id(p) for p in matrices + embeddings}
        self.small = embeddings + [p for p in named.values() if id(p) not in chosen]
        assert len(matrices) + len(self.small) == len(named), "a parameter is in two groups"
        self.muon = Muon(matrices, config, run)
        groups = [
            dict(params=embeddings, base_lr=config.tied_embed_lr),
            dict(params=self.small[len(embeddings) :], base_lr=config.scalar_lr),
        ]
        self.adam = torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            weight_decay=config.adam_wd,
            fused=run.device.type == "cuda",
        )
        self.skipped = torch.zeros((), dtype=torch.int64, device=run.device)  # steps whose gradient was not finite

    @torch.no_grad()
    def step(self, lr_scale: float, muon_momentum: float) -> None:
        """Sum the gradients over ranks, clip by their joint norm, update, and clear them.

        Where the norm is not finite (a rare fault of cuDNN's attention backward, for one), the step has no gradient.
        """
        reduced = self.muon.reduce()
        small, shards = self.run.sum_gradients(self.small), [arriving.wait() for arriving in reduced]
        square = self.run.sum(sum(grad.square().sum() for grad in shards)) + small.square().sum()
        self.skipped += clip_gradients([*shards, small], square.sqrt(), self.config.grad_clip_norm)
        updates = self.muon.orthogonalize(shards, muon_momentum)
        for group in self.adam.param_groups:
            group["lr"] = lr_scale * group["base_lr"]
        self.adam.step()
        self.muon.apply(updates, lr_scale * self.config.matrix_lr)
        for p in self.small + [p for bank in self.muon.banks for p in bank]:
            p.grad = None

    def state(self) -> dict:
        """A copy of everything that steps change, other than the parameters."""
        adam = copy.deepcopy(self.adam.state_dict())
        return dict(momenta=[m.clone() for m in self.muon.momenta], adam=adam, skipped=self.skipped.clone())

    def restore(self, state: dict) -> None:
        for buffer, saved in zip(self.muon.momenta, state["momenta"], strict=True):
            buffer.copy_(saved)
        self.adam.load_state_dict(state["adam"])
        self.skipped.copy_(state["skipped"])


def is_block_matrix(name: str, p: Tensor) -> bool:
    """One of the blocks' linear maps, which Muon steps."""
    return name.startswith("blocks.") and p.dim() == 2 and name.endswith(".weight")


def is_embedding(name: str) -> bool:
    """A table indexed by token or by hash, or the output head, which AdamW steps at a rate of its own."""
    return name.endswith(("emb.weight", "head.weight"))


class WeightAverages:
    """EMA over all steps and SWA late in the warmdown, in float32: bfloat16 averages lose the updates (PR #2095)."""

    def __init__(self, model: GPT, config: Config):
        self.params, self.config = list(model.parameters()), config
        self.ema = [p.detach().clone() for p in self.params]
        self.swa = [torch.zeros_like(p) for p in self.params]
        self.swa_count = 0

    @torch.no_grad()
    def update(self, step: int, late: bool) -> None:
        """Take in the weights after a step; the EMA forgets faster at first, or a short run would be all start."""
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if late and step % self.config.swa_every == 0:
            self.swa_count += 1
            torch._foreach_lerp_(self.swa, self.params, 1 / self.swa_count)

    def candidates(self) -> dict[str, list[Tensor]]:
        """The weights to choose from: the last ones, each average, and the average of the averages."""
        found = {"last": [p.detach().clone() for p in self.params], "ema": self.ema}
        if self.swa_count:
            found["swa"] = self.swa
            found["ema+swa"] = [(e + s) / 2 for e, s in zip(self.ema, self.swa, strict=True)]
        return found


# ======================================================================================================================
# Training: the schedule, the loss, and the loop.
# ======================================================================================================================


@dataclass(frozen=True)
class Phase:
    """What the schedule says of one step."""

    lr_scale: float
    muon_momentum: float
    collect_swa: bool


def schedule(step: int, elapsed_seconds: float, budget_seconds: float, c: Config) -> Phase:
    """The phase of a step, from the step and the clock alone; a budget of 0 is none.

    Where the clock ends the run before ITERATIONS, the projected number of steps stands in for it, and the learning
    rate's warm-up takes at most a tenth, the momentum's a quarter and the warmdown six tenths of the run.
    """
    remaining = c.iterations - step
    if budget_seconds and step:
        left_seconds = max(0.0, budget_seconds - elapsed_seconds)
        remaining = min(remaining, left_seconds / (elapsed_seconds / step))
    total = step + remaining

    def at_most(iterations: int, share: float) -> float:
        return min(iterations, share * total) if total < c.iterations else iterations

    warmup, warmdown = at_most(c.lr_warmup_iters, 0.1), at_most(c.warmdown_iters, 0.6)
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = min(1.0, remaining / warmdown) if warmdown else 1.0
    momentum_warmup = at_most(c.muon_momentum_warmup_steps, 0.25)
    reached = min(1.0, step / momentum_warmup) if momentum_warmup else 1.0
    return Phase(
        lr_scale=rising * falling,
        muon_momentum=c.muon_momentum_warmup_start + reached * (c.muon_momentum - c.muon_momentum_warmup_start),
        collect_swa=falling < c.swa_start_scale,
    )


def complement_weights(loader: TrainLoader, c: Config, device: torch.device) -> Tensor | None:
    """Loss weights [V, V] for (token before, target): max(0.1, 1 - alpha * c(x, y) / (C(x) + 1)), PR #803.

    What a bigram count predicts well, the n-gram experts will supply, so the network need not spend itself on it. The
    counts are of the first COMPLEMENT_TOKENS training tokens, the same on every rank and fixed before the first step.
    """
    if not c.complement_alpha:
        return None
    tokens = torch.from_numpy(loader.head(c.complement_tokens)).to(device)
    pairs = torch.bincount(tokens[:-1] * c.vocab_size + tokens[1:], minlength=c.vocab_size**2)
    pairs = pairs.view(c.vocab_size, c.vocab_size).float()
    return (1 - c.complement_alpha * pairs / (pairs.sum(1, keepdim=True) + 1)).clamp(min=0.1)


def micro_batches(batch: Tensor, c: Config):
    """A rank's sequences [n, T + 1] as pairs of inputs and targets that fit one forward pass; none if n is 0."""
    for first in range(0, len(batch), max(1, c.micro_batch_tokens // c.train_seq_len)):
        micro = batch[first : first + max(1, c.micro_batch_tokens // c.train_seq_len)]
        yield micro[:, :-1], micro[:, 1:]


def accumulate_gradients(model, batch: Tensor, weights: Tensor | None, c: Config) -> Tensor:
    """Backward over this rank's part of a batch [n, T + 1], in micro batches; returns the sum of its nats.

    The loss is the batch's mean over all ranks, so the ranks' gradients only need to be added.
    """
    total = torch.zeros((), device=batch.device)
    for inputs, targets in micro_batches(batch, c):
        nll = model(inputs, targets)
        loss = nll if weights is None else nll * weights[inputs, targets]
        (loss.sum() / c.batch_tokens).backward()
        total += nll.detach().sum()
    return total


@contextmanager
def weights_replaced(params: list[nn.Parameter], replacements: list[Tensor]):
    """Run with other values in the parameters and then put the float ones back."""
    floats = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, replacements)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, floats)


@contextmanager
def state_restored(model: GPT, optimizers: Optimizers):
    """Afterwards, weights and optimizers are as they were before."""
    weights, state = [p.detach().clone() for p in model.parameters()], optimizers.state()
    yield
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    optimizers.restore(state)


def warm_up(called, optimizers: Optimizers, c: Config, run: Run) -> None:
    """Compile all that a step runs, on synthetic tokens."""
    generator = torch.Generator().manual_seed(c.seed)
    mine = run.share(c.batch_seqs)
    shape = (mine.stop - mine.start, c.train_seq_len + 1)
    for step in range(c.warmup_steps):
        batch = torch.randint(c.vocab_size, shape, generator=generator).to(run.device)
        accumulate_gradients(called, batch, None, c)
        optimizers.step(lr_scale=1.0, muon_momentum=c.muon_momentum)
        run.log(f"warmup_step:{step + 1}/{c.warmup_steps}")


RESERVE = 1.25  # times what a rehearsal took


def rehearse(model: GPT, conclude, c: Config, run: Run) -> float:
    """Seconds that the steps must leave for what follows them, measured on weights that only the warm-up has moved.

    Zero without a MAX_WALLCLOCK_SECONDS. Raises InputError if that leaves nothing for the steps.
    """
    if not c.max_wallclock_seconds:
        return 0.0
    averages = WeightAverages(model, c)
    averages.update(0, late=True)
    for _ in range(2 if run.compiles else 1):  # the first time compiles, and is not what it will take
        clock = Clock(run)
        with run.silent():
            conclude(averages, None)
    seconds = RESERVE * run.max(clock.seconds())
    run.log(f"reserve: {seconds:.1f} s, {RESERVE} times what a rehearsal of all that follows the last step took")
    if seconds >= c.max_wallclock_seconds:
        held = f"what follows the last step needs {seconds:.1f} s here"
        raise InputError(f"MAX_WALLCLOCK_SECONDS={c.max_wallclock_seconds}: {held}; allowed is more")
    return seconds


@torch.no_grad()
def batch_nats(called, batch: Tensor, c: Config) -> Tensor:
    """The sum of nats over a rank's sequences [n, T + 1], without gradients."""
    nats = [called(inputs, targets).sum() for inputs, targets in micro_batches(batch, c)]
    return torch.stack(nats).sum() if nats else torch.zeros((), device=batch.device)


def held_out_loss(called, loader: TrainLoader, c: Config, run: Run) -> float:
    """Nats a token on the spans on which weights are chosen, over all ranks."""
    return run.sum(batch_nats(called, loader.held_out_batch(), c)).item() / (loader.averaging * c.train_seq_len)


def choose_average(model: GPT, called, averages: WeightAverages, loader: TrainLoader, c: Config, run: Run) -> None:
    """Put in the weights that do best on training text that no step has seen; the log gets each candidate's loss.

    Validation text has no part in it.
    """
    losses, candidates = {}, averages.candidates()
    for name, weights in candidates.items():
        with weights_replaced(averages.params, weights):
            losses[name] = held_out_loss(called, loader, c, run)
    best = min(losses, key=losses.get)
    with torch.no_grad():
        torch._foreach_copy_(averages.params, candidates[best])
    run.log("averages: " + " ".join(f"{name}:{nats:.5f}" for name, nats in losses.items()) + f" chosen:{best}")


def train(model: GPT, conclude, path: Path | None, c: Config, run: Run, stream: Stream | None) -> dict:
    """Train the model in place within ITERATIONS and MAX_WALLCLOCK_SECONDS; returns the run record's `train` part.

    `conclude(averages, path)` is what follows the last step, counts against the same time and returns seconds by part.
    Raises InputError if the loss stops being finite.
    """
    loader, optimizers, called = TrainLoader(c, run), Optimizers(model, c, run), run.wrap(model)
    run.log(f"train_loader:dataset:{c.data_path} train_shards:{len(loader.shards)} sequences:{loader.n}")
    with state_restored(model, optimizers):
        warm_up(called, optimizers, c, run)
        reserve_seconds = rehearse(model, conclude, c, run)
    budget_seconds = c.max_wallclock_seconds - reserve_seconds
    clock = Clock(run)
    averages, weights = WeightAverages(model, c), complement_weights(loader, c, run.device)
    step, elapsed, done, batches = 0, 0.0, False, loader.batches()
    while not done:
        phase = schedule(step, elapsed, budget_seconds, c)
        nats = accumulate_gradients(called, next(batches), weights, c)
        optimizers.step(phase.lr_scale, phase.muon_momentum)
        averages.update(step, phase.collect_swa)
        run.follow()
        step += 1
        elapsed = run.max(clock.seconds())
        done = step == c.iterations or out_of_time(step, elapsed, budget_seconds)
        if step <= 5 or step % c.train_log_every == 0 or done:
            log_step(step, f"train_loss:{finite_loss(nats, step, c, run):.4f}", elapsed, c, run)
        if c.val_loss_every and step % c.val_loss_every == 0:
            with clock.stopped():
                log_step(step, validate(called, stream, c, run), elapsed, c, run)
    batches.close()
    if step < c.iterations:
        run.log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}/{c.iterations}")
    seconds = dict(steps=round(elapsed, 3), **conclude(averages, path))
    seconds |= dict(total=round(run.max(clock.seconds()), 3), reserve=round(reserve_seconds, 3))
    run.log("train_seconds: " + " ".join(f"{part}:{value:.1f}" for part, value in seconds.items()))
    if run.device.type == "cuda":
        run.log(f"peak memory allocated: {torch.cuda.max_memory_allocated() // 2**20} MiB")
    counts = dict(skipped_steps=int(optimizers.skipped), loader_stalls=loader.stalls)
    run.log(" ".join(f"{name}:{count}" for name, count in counts.items()))
    step_avg_ms = round(1000 * elapsed / step, 3)
    return dict(steps=step, tokens=step * c.batch_tokens, step_avg_ms=step_avg_ms, seconds=seconds, **counts)


def out_of_time(step: int, elapsed_seconds: float, budget_seconds: float) -> bool:
    """Whether another step may end too late; it may take two, since the device can be one behind the clock."""
    return bool(budget_seconds) and elapsed_seconds + 2 * elapsed_seconds / step > budget_seconds


def finite_loss(nats: Tensor, step: int, c: Config, run: Run) -> float:
    """Nats per token of a step's batch over all ranks. Raises InputError if it is not finite."""
    loss = run.sum(nats).item() / c.batch_tokens
    if not math.isfinite(loss):
        raise InputError(f"train_loss={loss} at step {step}: allowed is a finite loss; lower MATRIX_LR={c.matrix_lr}?")
    return loss


def log_step(step: int, losses: str, elapsed: float, c: Config, run: Run) -> None:
    """One progress line."""
    timing = f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / step:.2f}ms"
    run.log(f"step:{step}/{c.iterations} {losses} {timing}")


def validate(called, stream: Stream, c: Config, run: Run) -> str:
    """The validation score of the weights as they are, for the log; nothing is decided by it."""
    result = score(Frozen(called, c, run, stride=c.eval_seq_len), stream, c.val_batch_size, run)
    return f"val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f}"


# ======================================================================================================================
# Artifact: the file that holds the model. Settings and numbers only, in the order of the model's own parameters, so
# that no name is stored and nothing in the file is ever executed.
# ======================================================================================================================

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 3
PREFIX = struct.Struct("<5sBI")  # magic, version, header bytes; a sha256 of all but itself follows
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
SMALLEST_UNIT = 2.0**-24  # of float16
CODED = "integers_coded"  # the part that LZMA would only make longer
INTEGER_PARTS = dict(lzma={"integers"}, range={"frequencies", CODED})  # by CODEC
OTHER_PARTS = {"units", "rows", "columns", "float16", "mixer"}


def quantized_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """The parameters that are stored as integers; all others are stored as float16."""
    return {name: p for name, p in model.named_parameters() if p.dim() == 2 and name.endswith(".weight")}


@dataclass(frozen=True)
class Grid:
    """The levels of a tensor [rows, cols]: weight r, j is an integer times unit / 2^(k / 2); k = rows[r] + columns[j].

    k is the weight's class. It says how fine the weight is stored and also how wide its integer is, since the weights
    of a tensor are about alike in width and the unit is two of their standard deviations (more if one is very large).
    So each class has its own table in the coder, and nothing else is stored about the integers.
    """

    CLASSES, TOP_UNITS = 23, 7  # no weight is stored larger than 7 units; 7 * 2^11 is an int16
    LEVELS = torch.tensor([2.0 ** (k / 2) for k in range(CLASSES)])  # a unit, by class; the same bits on every machine

    unit: Tensor  # float16 []
    rows: Tensor  # int8 [rows]
    columns: Tensor  # int8 [cols]

    def classes(self) -> Tensor:
        """uint8 [rows, cols]."""
        return (self.rows.short().unsqueeze(1) + self.columns).clamp(0, self.CLASSES - 1).to(torch.uint8)

    def steps(self) -> Tensor:
        """The distance of two levels, float32 [rows, cols]."""
        return (self.unit.float() / self.LEVELS.to(self.unit.device))[self.classes().long()]

    def tops(self) -> Tensor:
        """The largest integers, float32 [rows, cols]."""
        return (self.TOP_UNITS * self.LEVELS.to(self.unit.device)).floor()[self.classes().long()]

    def nearest(self, w: Tensor) -> Tensor:
        """The integers of the levels next to w, int16 [rows, cols]."""
        return to_levels(w, self.steps(), self.tops()).to(torch.int16)

    def cpu(self) -> Grid:
        """The same on the CPU."""
        return Grid(self.unit.cpu(), self.rows.cpu(), self.columns.cpu())


def to_levels(w: Tensor, steps: Tensor, tops: Tensor) -> Tensor:
    """Which multiple of its step, `tops` at most, is next to each weight."""
    return (w / steps).round().clamp(-tops, tops)


Quantized = dict[str, tuple[Tensor, Grid]]  # by parameter: int16 [rows, cols] and what they are multiples of


def dequantize(integers: Tensor, grid: Grid) -> Tensor:
    """The float32 weights that a quantized tensor stands for."""
    return integers * grid.steps()


def with_weights(model: GPT, quantized: Quantized):
    """Run with the weights that an artifact gives back."""
    params = quantized_parameters(model)
    device = next(model.parameters()).device
    return weights_replaced(list(params.values()), [dequantize(*quantized[name]).to(device) for name in params])


@dataclass(frozen=True)
class Sensitivity:
    """What errors in a tensor cost on training text: e at (r, j) adds to the loss as rows[r] * columns[j] * e^2 does.

    `order` and `factor` are of linear maps only: the columns from the strongest input to the weakest, and the upper
    Cholesky factor of the inverse of the inputs' products in that order, which GPTQ rounds by.
    """

    rows: Tensor  # float32 [rows]
    columns: Tensor  # float32 [cols]
    order: Tensor | None = None
    factor: Tensor | None = None

    FLOOR, DAMPING = 1e-3, 0.01  # of the means: a row without gradient may get some, and inputs may be always zero

    @classmethod
    def of_table(cls, squares: Tensor) -> Sensitivity:
        """From the squared gradients [rows, cols] of a table that is looked up."""
        scale = squares.mean().clamp(min=1e-30).sqrt()
        return cls(cls.floored(squares.mean(1) / scale), cls.floored(squares.mean(0) / scale))

    @classmethod
    def of_map(cls, squares: Tensor, products: Tensor) -> Sensitivity:
        """From a linear map's squared gradients [rows, cols] and the sum of x x^T over its inputs [cols, cols].

        The loss's curvature is taken for (gradients' power) x (inputs' products), as in K-FAC (arXiv 1503.05671). GPTQ
        makes up for a column's error with the columns after it, so that what counts of its input is the part that
        those do not explain: the square of a pivot of the Cholesky factorization, and not the input's power.
        """
        order = products.diagonal().argsort(descending=True, stable=True)
        h = products[order][:, order].double()
        h.diagonal().add_(cls.DAMPING * h.diagonal().mean().clamp(min=1e-12))
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
        unexplained = factor.diagonal().square().reciprocal()[order.argsort()]
        rows = squares.sum(1) / products.diagonal().sum().clamp(min=1e-12)
        return cls(cls.floored(rows), unexplained, order, factor)

    @classmethod
    def floored(cls, x: Tensor) -> Tensor:
        """x, and a little of its mean everywhere."""
        return x + cls.FLOOR * x.mean().clamp(min=1e-30)

    def grid(self, w: Tensor, fineness: float) -> Grid:
        """Levels for w [rows, cols] at which a bit more buys the same everywhere: steps go with 1 / sqrt(sensitivity).

        Half the step takes one bit more and leaves a quarter of the squared error. At a given size the loss is least,
        then, where rows * columns * step^2 is one number for all weights of all tensors: reverse water-filling (Cover
        and Thomas, Elements of Information Theory, 10.3). `fineness` is minus log2 of that number. An octave of
        sensitivity is half an octave of step, that is one class.
        """
        unit = torch.maximum(2 * w.square().mean().sqrt(), w.abs().max() / Grid.TOP_UNITS)
        unit = unit.clamp(min=SMALLEST_UNIT).half()
        columns = self.columns.clamp(min=1e-30).log2()
        rows = self.rows.log2() + columns.mean() + 2 * unit.float().log2() + fineness
        rows, columns = (x.round().clamp(-64, 63).to(torch.int8) for x in (rows, columns - columns.mean()))
        return Grid(unit, rows, columns)


def sensitivities(model: GPT, batch: Tensor, run: Run) -> dict[str, Sensitivity]:
    """Of all quantized parameters, from a batch [n, T + 1] of training text shared by all ranks, a backward a sequence.

    Raises InputError for a parameter whose inputs or gradients are not finite.
    """
    params = quantized_parameters(model)
    maps = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    products = {name: torch.zeros_like(p[0]).diag() for name, p in params.items() if name in maps}

    def watch(name: str):
        def add(_, inputs):
            x = inputs[0].detach().flatten(0, -2).float()
            products[name] += x.T @ x

        return maps[name].register_forward_pre_hook(add)

    handles = [watch(name) for name in maps]
    for sequence in batch.unsqueeze(1):
        model.zero_grad()
        model(sequence[:, :-1], sequence[:, 1:]).sum().backward()
        fill_gradients(list(params.values()))
        for name, p in params.items():
            squares[name] += p.grad.square()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    found = {}
    for name in params:
        inputs = [run.sum(products[name])] if name in maps else []
        if not all(torch.isfinite(x).all() for x in [run.sum(squares[name]), *inputs]):
            raise InputError(f"weight {name}: its inputs or gradients on training text are not finite")
        found[name] = Sensitivity.of_map(squares[name], *inputs) if inputs else Sensitivity.of_table(squares[name])
    return found


def gptq(w: Tensor, grid: Grid, sensitivity: Sensitivity) -> Tensor:
    """The integers int16 [rows, cols] for a linear map's weights: GPTQ (Frantar et al. 2023, arXiv 2210.17323).

    Columns are rounded in the sensitivity's order; what that does to the outputs is made up for by the later columns,
    as far as their inputs go together.
    """
    order, upper, block = sensitivity.order, sensitivity.factor, 128
    w, steps, tops = (x[:, order] for x in (w.float(), grid.steps(), grid.tops()))
    integers = torch.empty_like(w)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        error = torch.empty_like(w[:, first:last])
        for j in range(first, last):
            integers[:, j] = to_levels(w[:, j], steps[:, j], tops[:, j])
            off = (w[:, j] - integers[:, j] * steps[:, j]) / upper[j, j]
            w[:, j + 1 : last] -= torch.outer(off, upper[j, j + 1 : last])
            error[:, j - first] = off
        w[:, last:] -= error @ upper[first:last, last:]
    return integers[:, order.argsort()].to(torch.int16)


def quantize(params: dict[str, Tensor], costs: dict[str, Sensitivity], fineness: float) -> Quantized:
    """All quantized parameters at one fineness, on the CPU: linear maps by GPTQ, tables to the nearest levels."""
    found = {}
    for name, p in params.items():
        w, sensitivity = p.detach(), costs[name]
        grid = sensitivity.grid(w, fineness)
        integers = grid.nearest(w) if sensitivity.factor is None else gptq(w, grid, sensitivity)
        found[name] = integers.cpu(), grid.cpu()
    return found


def entropy_bytes(params: dict[str, Tensor], costs: dict[str, Sensitivity], fineness: float) -> float:
    """What the integers of the nearest levels take under a table for each class, which itself costs nothing here."""
    counts, n_low_bits = torch.zeros(Grid.CLASSES * 256, dtype=torch.int64), 0
    for name, p in params.items():
        grid = costs[name].grid(p.detach(), fineness)
        classes = grid.classes().long()
        n_low = low_bits(classes)
        cell = 256 * classes + 128 + (grid.nearest(p.detach()) >> n_low)
        counts += cell.flatten().bincount(minlength=len(counts)).cpu()
        n_low_bits += int(n_low.sum())
    return (entropy_bits(counts.view(-1, 256).numpy()) + n_low_bits) / 8


def entropy_bits(counts: np.ndarray) -> float:
    """Of all that was counted [tables, values], under the best static table each."""
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    return -(counts * np.log2(shares.clip(1e-30))).sum()


LEAST_BITS = 1.2  # of a Gaussian weight at the coarsest step, two standard deviations
FINENESS = (-64.0, 64.0)  # what is searched: every weight in the first class, and in the last if it has a gradient
ATTEMPTS = 4  # to fit a size
SLACK = 0.002  # of the bytes that an artifact may take; what it should leave free at most


def room_beside_script(c: Config) -> int:
    """Bytes that TARGET_BYTES leaves the artifact."""
    return c.target_bytes - os.path.getsize(__file__)


def check_room(model: GPT, mixer: Maxent, c: Config, run: Run) -> None:
    """Log what TARGET_BYTES leaves for a weight. Raises InputError, before any training, if no model would be left.

    From the shapes alone: the coarsest integers, a byte for every other number and the coder's states are the least.
    """
    n_weights = sum(p.numel() for p in quantized_parameters(model).values())
    n_others = sum(p.numel() for part in (model, mixer) for p in part.parameters()) - n_weights
    room = room_beside_script(c)
    least = math.ceil(LEAST_BITS * n_weights / 8) + n_others + 4 * CODER_LANES
    if least > room:
        held = f"{n_weights} weights of {LEAST_BITS} bits, {n_others} other numbers and the coder need {least} bytes"
        raise InputError(f"TARGET_BYTES={c.target_bytes}: {held} beside the script, {least - room} more than are left")
    run.log(f"room: {room} bytes beside the script, {8 * room / n_weights:.2f} bits for each of {n_weights} weights")


def finest(params: dict[str, Tensor], costs: dict[str, Sensitivity], n_bytes: float) -> float:
    """The largest fineness, to 1/512, at which the integers' entropy is at most n_bytes, or else FINENESS[0]."""
    low, high = FINENESS
    if entropy_bytes(params, costs, high) <= n_bytes:
        return high
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_bytes(params, costs, middle) <= n_bytes else (low, middle)
    return low


def fill(
    model: GPT, costs: dict[str, Sensitivity], mixer: Maxent, c: Config, tokenizer_sha256: str, exhaust: bool = False
) -> Quantized:
    """The finest quantization with which script and artifact fit TARGET_BYTES, of the few that are tried.

    What the file takes beside the entropy of the nearest levels hardly depends on the fineness: the first attempt tells
    it, and the second leaves less than SLACK free unless many rows change their class at once. `exhaust` makes all
    attempts, for their time. Raises InputError if even the coarsest is too large.
    """
    raw = as_float16(dict(mixer.named_parameters()))  # fitted later, and then perhaps no longer compressible
    room = room_beside_script(c) - (len(raw) - len(compress(raw)))
    params = quantized_parameters(model)
    largest, best, asked = 0, None, 0.97 * room
    for _ in range(ATTEMPTS):
        fineness = finest(params, costs, asked)
        quantized = quantize(params, costs, fineness)
        n_bytes = len(pack(model, quantized, mixer, c, tokenizer_sha256))
        fits = n_bytes <= room
        if fits and n_bytes > largest:
            largest, best = n_bytes, quantized
        if not exhaust and (largest >= (1 - SLACK) * room or fineness == FINENESS[fits]):
            break
        asked = asked if fits else min(asked, entropy_bytes(params, costs, fineness))
        asked += (1 - SLACK / 4) * room - n_bytes
    if best is None:
        excess = n_bytes - room
        raise InputError(f"TARGET_BYTES={c.target_bytes}: the artifact is {excess} bytes over; make the model smaller")
    return best


def quantize_to_size(
    model: GPT, called, loader: TrainLoader, mixer: Maxent, c: Config, run: Run, tokenizer_sha256: str, exhaust=False
) -> Quantized:
    """What the artifact will hold of the quantized parameters, alike on all ranks; `exhaust` as in `fill`."""
    costs = sensitivities(model, loader.first_sequences(c.gptq_tokens), run)
    quantized = run.broadcast(fill, model, costs, mixer, c, tokenizer_sha256, exhaust)
    before = held_out_loss(called, loader, c, run)
    with with_weights(model, quantized):
        after = held_out_loss(called, loader, c, run)
    run.log(f"quantization: float:{before:.5f} stored:{after:.5f} gap:{after - before:+.5f}")
    return quantized


def pack(model: GPT, quantized: Quantized, mixer: Maxent, c: Config, tokenizer_sha256: str) -> bytes:
    """The artifact's bytes. Raises InputError for a weight that cannot be held."""
    grids = {name: grid for name, (_, grid) in quantized.items()}
    others = {name: p for name, p in model.named_parameters() if name not in quantized}
    of_mixer = {f"mixer.{name}": p for name, p in mixer.named_parameters()}
    parts = {
        "units": b"".join(as_bytes(finite(grid.unit, name)) for name, grid in grids.items()),
        "rows": b"".join(as_bytes(grid.rows) for grid in grids.values()),
        "columns": b"".join(as_bytes(grid.columns) for grid in grids.values()),
        **encode_integers([x.numpy() for x, _ in quantized.values()], [classes_of(x) for x in grids.values()], c.codec),
        "float16": as_float16(others),
        "mixer": as_float16(of_mixer),
    }
    streams = {part: raw if part == CODED else compress(raw) for part, raw in parts.items()}
    sizes = {part: len(stream) for part, stream in streams.items()}
    kept = dict(shape=c.marked("shape"), score=c.marked("score"), tokenizer=tokenizer_sha256, parts=sizes)
    header = json.dumps(kept, separators=(",", ":")).encode()
    prefix, body = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(header)), header + b"".join(streams.values())
    return prefix + hashlib.sha256(prefix + body).digest() + body


def as_float16(named: dict[str, Tensor]) -> bytes:
    """The numbers of all tensors. Raises InputError that names one which float16 cannot hold."""
    return b"".join(as_bytes(finite(p.detach().half(), name)) for name, p in named.items())


def classes_of(grid: Grid) -> np.ndarray:
    """A grid's classes as the coder takes them, uint8 [rows, cols]."""
    return grid.classes().cpu().numpy()


def encode_integers(tensors: list[np.ndarray], classes: list[np.ndarray], codec: str) -> dict[str, bytes]:
    """The parts of an artifact that hold the integers of all quantized tensors, int16 [rows, cols], of given classes.

    What the coder is given is bytes: each integer without its low bits, by its class's table, and behind them all the
    low bits of those that have some, which are as good as random.
    """
    integers, classes = flat(tensors), flat(classes).astype(np.int16)
    n_low = low_bits(classes)
    values = np.concatenate([integers >> n_low, (integers & ((1 << n_low) - 1))[n_low > 0]]).astype(np.uint8)
    if codec == "lzma":
        return {"integers": values.tobytes()}
    frequencies = count_frequencies(values[: len(classes)], classes)
    coded = range_encode(values, tables_of(classes), np.concatenate([frequencies, UNIFORM]))
    return {"frequencies": frequencies.astype("<u2").tobytes(), CODED: coded}


def decode_integers(parts: dict[str, bytes], classes: list[np.ndarray], codec: str) -> list[np.ndarray]:
    """What `encode_integers` was given. Raises InputError if the parts do not hold just that."""
    shapes, classes = [x.shape for x in classes], flat(classes).astype(np.int16)
    n_low, n = low_bits(classes), len(classes)
    if codec == "lzma":
        values = exactly(parts, "integers", "u1", n + (n_low > 0).sum())
    else:
        frequencies = exactly(parts, "frequencies", "<u2", 256 * Grid.CLASSES).reshape(-1, 256).astype(np.int64)
        values = range_decode(parts.get(CODED, b""), tables_of(classes), np.concatenate([frequencies, UNIFORM]))
    integers = values[:n].view(np.int8).astype(np.int16) << n_low
    integers[n_low > 0] += values[n:]
    ends = np.cumsum([rows * cols for rows, cols in shapes])[:-1]
    return [x.reshape(shape) for x, shape in zip(np.split(integers, ends), shapes, strict=True)]


def low_bits(classes):
    """How many of an integer's low bits are as good as random: what leaves about 16 levels a unit to the tables.

    For signed classes, in NumPy or in torch.
    """
    return ((classes + 1) // 2 - 4).clip(0)


def tables_of(classes: np.ndarray) -> np.ndarray:
    """The coder's table for each byte: the class for the integers, one of UNIFORM for the low bits behind them."""
    n_low = low_bits(classes)
    return np.concatenate([classes, Grid.CLASSES - 1 + n_low[n_low > 0]]).astype(np.uint8)


def flat(tensors: list[np.ndarray]) -> np.ndarray:
    """The numbers of all tensors in one row."""
    return np.concatenate([x.ravel() for x in tensors])


def exactly(parts: dict[str, bytes], part: str, kind: str, count: int) -> np.ndarray:
    """A part as `count` numbers. Raises InputError unless it has just as many."""
    expected = np.dtype(kind).itemsize * int(count)
    if len(parts.get(part, b"")) != expected:
        raise InputError(f"artifact: part {part} has {len(parts.get(part, b''))} bytes; its model needs {expected}")
    return np.frombuffer(parts[part], dtype=kind)


# The coder is a range asymmetric numeral system (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit words. The
# bytes are dealt to CODER_LANES states in turn, so that NumPy takes a step of all of them at once.
CODER_LANES, CODER_BITS, FIRST_STATE = 512, 14, 1 << 16
# Tables for bytes of 1 to 7 random bits.
UNIFORM = np.array([[(1 << CODER_BITS - n) * (value < 1 << n) for value in range(256)] for n in range(1, 8)])


def count_frequencies(values: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """How often each byte occurs under each class's table, in parts of 2^CODER_BITS: int64 [Grid.CLASSES, 256]."""
    counts = np.zeros(256 * Grid.CLASSES, dtype=np.int64)
    n_blocks = 1 + len(values) // 2**22
    for of_block in zip(*(np.array_split(x, n_blocks) for x in (values, tables)), strict=True):
        counts += np.bincount(cells(*of_block), minlength=len(counts))
    counts = counts.reshape(-1, 256)
    seen, total = counts > 0, counts.sum(1, keepdims=True).clip(1)
    shares = counts * ((1 << CODER_BITS) - seen.sum(1, keepdims=True)) // total + seen
    shares[np.arange(len(shares)), counts.argmax(1)] += (1 << CODER_BITS) - shares.sum(1)
    return shares


def cells(values: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Where (table, value) stands in the frequencies of all tables."""
    return 256 * tables.astype(np.int64) + values


def first_parts(frequencies: np.ndarray) -> np.ndarray:
    """The parts that come before each value's own: uint64 [tables * 256]."""
    return (frequencies.cumsum(axis=1) - frequencies).ravel().astype(np.uint64)


def range_encode(values: np.ndarray, tables: np.ndarray, frequencies: np.ndarray) -> bytes:
    """uint8 [n] -> the final states (uint32) and the words (uint16), in the order in which decoding reads them."""
    frequency, first = frequencies.ravel().astype(np.uint64), first_parts(frequencies)
    state, words = np.full(CODER_LANES, FIRST_STATE, dtype=np.uint64), []
    for start in reversed(range(0, len(values), CODER_LANES)):
        cell = cells(values[start : start + CODER_LANES], tables[start : start + CODER_LANES])
        x, f = state[: len(cell)], frequency[cell]
        full = x >= f << np.uint64(32 - CODER_BITS)
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        state[: len(cell)] = (x // f << np.uint64(CODER_BITS)) + x % f + first[cell]
    return state.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def range_decode(data: bytes, tables: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """What `range_encode` was given, uint8 [n]. Raises InputError unless the data is used up and ends as it began."""
    if (frequencies.sum(axis=1) != 1 << CODER_BITS).any():
        raise InputError(f"artifact: part frequencies: a table does not add up to {1 << CODER_BITS}")
    if len(data) < 4 * CODER_LANES or len(data) % 2:
        allowed = f"{4 * CODER_LANES} and pairs behind"
        raise InputError(f"artifact: part {CODED} has {len(data)} bytes; allowed are {allowed}")
    frequency, first = frequencies.ravel().astype(np.uint64), first_parts(frequencies)
    value_at = np.tile(np.arange(256, dtype=np.uint8), len(frequencies)).repeat(frequencies.ravel())
    state = np.frombuffer(data[: 4 * CODER_LANES], dtype="<u4").astype(np.uint64)
    words, values, used = np.frombuffer(data[4 * CODER_LANES :], dtype="<u2"), np.empty(len(tables), dtype=np.uint8), 0
    for start in range(0, len(tables), CODER_LANES):
        here = tables[start : start + CODER_LANES]
        x = state[: len(here)]
        part = x & np.uint64((1 << CODER_BITS) - 1)
        value = value_at[(here.astype(np.int64) << CODER_BITS) + part.astype(np.int64)]
        cell = cells(value, here)
        x = frequency[cell] * (x >> np.uint64(CODER_BITS)) + part - first[cell]
        low = np.flatnonzero(x < FIRST_STATE)
        if used + len(low) > len(words):
            raise InputError(f"artifact: part {CODED} ends after {start} of {len(tables)} bytes")
        x[low] = x[low] << np.uint64(16) | words[used : used + len(low)]
        state[: len(here)], values[start : start + CODER_LANES], used = x, value, used + len(low)
    if used != len(words) or (state != FIRST_STATE).any():
        raise InputError(f"artifact: part {CODED} does not end where its model's integers do")
    return values


def finite(stored: Tensor, name: str) -> Tensor:
    """The tensor itself. Raises InputError that names it unless all its numbers are finite."""
    if not torch.isfinite(stored).all():
        raise InputError(f"weight {name} cannot be stored: allowed is what float16 holds, 65504 at most and no NaN")
    return stored


def as_bytes(tensor: Tensor) -> bytes:
    """The tensor's numbers as they lie in memory; every machine that runs this is little-endian."""
    return tensor.cpu().contiguous().numpy().tobytes()


def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, never finds half of it."""
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(path: str | Path) -> tuple[dict, dict[str, bytes]]:
    """(header, with the file's size and sha256 added, raw bytes of each part). Raises InputError if it was altered."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"ARTIFACT_PATH={path}: {error.strerror}") from None
    if len(data) < PREFIX.size or data[: len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise InputError(f"ARTIFACT_PATH={path}: not an artifact; it must begin with {ARTIFACT_MAGIC.decode()}")
    _, version, header_bytes = PREFIX.unpack_from(data)
    if version != ARTIFACT_VERSION:
        raise InputError(f"ARTIFACT_PATH={path}: version {version}; allowed is {ARTIFACT_VERSION}")
    digest, body = data[PREFIX.size : PREFIX.size + 32], data[PREFIX.size + 32 :]
    if hashlib.sha256(data[: PREFIX.size] + body).digest() != digest:
        raise InputError(f"ARTIFACT_PATH={path}: checksum differs; the file is truncated or altered")
    header = {**json.loads(body[:header_bytes]), "file_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    parts, start = {}, header_bytes
    for part, size in header["parts"].items():
        raw = body[start : start + size]
        parts[part] = raw if part == CODED else lzma.decompress(raw, format=lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        start += size
    if start != len(body):
        raise InputError(f"ARTIFACT_PATH={path}: {len(body) - start} bytes behind its last part; allowed are none")
    return header, parts


def as_packed(c: Config, header: dict, env: dict[str, str]) -> Config:
    """The settings with the artifact's own in them; how it is scored may be overridden, what its model is may not.

    Raises InputError where the environment asks for another model, or where the header is of another version of Config.
    """
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in (header["score"] | header["shape"]).items()}
    for name in header["shape"]:
        if name.upper() in env and getattr(c, name) != kept[name]:
            raise InputError(f"{name.upper()}={show(getattr(c, name))}: the artifact's model has {show(kept[name])}")
    try:
        return dataclasses.replace(c, **{n: v for n, v in kept.items() if n in header["shape"] or n.upper() not in env})
    except TypeError as error:
        raise InputError(f"ARTIFACT_PATH={c.artifact_path}: its settings are not this script's ({error})") from None


def unpack(parts: dict[str, bytes], c: Config, run: Run) -> tuple[GPT, Maxent]:
    """The model and the mixer that an artifact's parts hold, on the run's device.

    Raises InputError if a part is missing, unknown or of another size.
    """
    if unknown := set(parts) - INTEGER_PARTS[c.codec] - OTHER_PARTS:
        raise InputError(f"artifact: unknown part {sorted(unknown)[0]}; CODEC={c.codec} has none of that name")
    model, mixer = GPT(c, run.dtype, choose_kernels(c, run)), Maxent(c)
    quantized = quantized_parameters(model)
    others = [p for name, p in model.named_parameters() if name not in quantized]

    def take(part: str, kind: str, sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.from_numpy(exactly(parts, part, kind, sum(sizes)).copy()).split(sizes)

    shapes = [p.shape for p in quantized.values()]
    units = take("units", "<f2", [1] * len(shapes))
    rows, columns = (take(part, "i1", [x[dim] for x in shapes]) for dim, part in enumerate(("rows", "columns")))
    grids = [Grid(unit.squeeze(0), *of) for unit, *of in zip(units, rows, columns, strict=True)]
    integers = decode_integers(parts, [classes_of(grid) for grid in grids], c.codec)
    plain = {"float16": others, "mixer": list(mixer.parameters())}
    numbers = {part: take(part, "<f2", [p.numel() for p in params]) for part, params in plain.items()}
    with torch.no_grad():
        for p, x, grid in zip(quantized.values(), integers, grids, strict=True):
            p.copy_(dequantize(torch.from_numpy(x), grid))
        for part, params in plain.items():
            for p, x in zip(params, numbers[part], strict=True):
                p.copy_(x.view_as(p))
    return model.to(run.device), mixer.to(run.device)


def check_tokenizer(header: dict, tokenizer: Tokenizer, path: str | Path) -> None:
    """Raise InputError if the artifact's model was trained with another tokenizer."""
    if header["tokenizer"] != tokenizer.sha256:
        raise InputError(f"ARTIFACT_PATH={path}: its model's tokenizer has another sha256 than TOKENIZER_PATH's")


def minified_bytes() -> int:
    """What this script would take without comments and docstrings, compressed. What counts is the file that runs."""
    tree = ast.parse(Path(__file__).read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
    return len(compress(ast.unparse(tree).encode()))


def artifact_record(path: Path, header: dict, tokenizer: Tokenizer, run: Run) -> dict:
    """Script and artifact against the cap, logged by part.

    Raises InputError that names the excess if they are over it, or if the artifact speaks of another tokenizer.
    """
    check_tokenizer(header, tokenizer, path)
    code_bytes, model_bytes = os.path.getsize(__file__), header["file_bytes"]
    total = code_bytes + model_bytes
    sizes = {"header": model_bytes - sum(header["parts"].values()), **header["parts"]}
    for part, size in sizes.items():
        run.log(f"artifact part {part}: {size} bytes")
    run.log(f"Code size: {code_bytes} bytes ({minified_bytes()} if it were minified and compressed)")
    codec = header["shape"]["codec"]
    run.log(f"Serialized model {codec}: {model_bytes} bytes")
    run.log(f"Total submission size {codec}: {total} bytes cap:{CAP_BYTES} margin:{CAP_BYTES - total}")
    if total > CAP_BYTES:
        excess = total - CAP_BYTES
        raise InputError(f"artifact {path}: {total} bytes with the script, {excess} over the cap of {CAP_BYTES}")
    return dict(
        path=str(path),
        sha256=header["sha256"],
        code_bytes=code_bytes,
        model_bytes=model_bytes,
        total_bytes=total,
        cap_bytes=CAP_BYTES,
        part_bytes=sizes,
    )


# ======================================================================================================================
# Experts: what followed the same context earlier in the stream. Everything is counted up to the token before the one
# that is predicted, also inside a chunk.
# ======================================================================================================================


@dataclass(frozen=True)
class Evidence:
    """The tokens that followed a row's contexts before, and how often: one entry a (row, token), sorted by both.

    `counts` uint8 [entries, 2, orders] are occurrences in this document and in earlier ones, among those of each
    context that the index lists; `totals` [rows, 2, orders] are their sums over a row's tokens.
    """

    row: Tensor  # int64 [entries]
    token: Tensor  # int64 [entries]
    counts: Tensor
    totals: Tensor


class ContextIndex:
    """Where the contexts of the last k tokens stood before, for each k of NGRAM_ORDERS.

    Every position links to the latest earlier one with the same context, so that following the links lists a context's
    occurrences, newest first, and the tokens after them are what it predicts. `latest` finds the first link: a table of
    2^NGRAM_TABLE_BITS entries that all orders share, each the newest position whose context fell on it and 32 more
    bits of that context's hash. Three things are forgotten, and memory stays bounded: what stood more than
    NGRAM_REACH_TOKENS back, occurrences beyond the latest NGRAM_DEPTH of a context (3 NGRAM_DEPTH / k from k = 4 on),
    and a context whose entry a newer one has taken. Two contexts that agree in all these bits, one pair in
    2^(32 + NGRAM_TABLE_BITS), are taken for one: a context's counts still add up to its occurrences. Positions are 31
    bits, for streams of up to 2^31 tokens.
    """

    MULTIPLIER = 0x5851F42D4C957F2D  # odd; Knuth's for 64-bit congruential generators
    CHECK = 2**32 - 1

    def __init__(self, c: Config, device: torch.device):
        self.c, self.orders = c, sorted(c.ngram_orders)
        self.depths = [max(1, min(c.ngram_depth, 3 * c.ngram_depth // order)) for order in self.orders]
        self.seen = 0  # positions before the next chunk
        self.document = torch.zeros(1, dtype=torch.int64, device=device)  # where the open document began
        self.tail = torch.full((max(self.orders) - 1,), -1, dtype=torch.int64, device=device)  # the tokens before it
        self.latest = torch.zeros(1 << c.ngram_table_bits, dtype=torch.int64, device=device)  # position + 1, hash bits
        self.tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self.links = torch.zeros(len(self.orders), 1, dtype=torch.int32, device=device)  # position + 1; 0 = none
        # The inputs that stand behind position `seen`, not yet part of the state, and their hashes.
        self.ahead: tuple[Tensor, Tensor] | None = None

    def place(self, position: Tensor) -> Tensor:
        """Where a position is kept: the arrays are rings that double until they hold the reach."""
        return position & (len(self.tokens) - 1)

    def hashes(self, inputs: Tensor) -> Tensor:
        """A number for the context of each order that ends at each input: int64 [orders, n]."""
        known, number, found = torch.cat([self.tail, inputs]), torch.zeros_like(inputs), []
        for back in range(self.orders[-1]):
            start = len(self.tail) - back
            number = (number + known[start : start + len(inputs)] + 2) * self.MULTIPLIER  # modulo 2^64
            number = number ^ ((number >> 29) & (2**35 - 1))
            if back + 1 in self.orders:
                found.append(number)
        return torch.stack(found)

    def slots(self, hashes: Tensor) -> Tensor:
        return hashes & (len(self.latest) - 1)

    def link(self, hashes: Tensor) -> Tensor:
        """For each context of a chunk the latest earlier position that has it, plus 1; 0 where none is known."""
        ordered, source = hashes.sort(dim=1, stable=True)
        again = ordered[:, 1:] == ordered[:, :-1]
        inside = torch.zeros_like(hashes)
        inside.scatter_(1, source[:, 1:], torch.where(again, source[:, :-1] + self.seen + 1, 0))
        entry = self.latest[self.slots(hashes)]
        before = torch.where((entry & self.CHECK) == ((hashes >> 32) & self.CHECK), entry >> 32, 0)
        return torch.where(inside > 0, inside, before)

    def look_ahead(self, inputs: Tensor) -> None:
        """Link the chunk that follows, behind the end of what is state."""
        if self.ahead is not None and torch.equal(self.ahead[0], inputs):
            return
        n = len(inputs)
        self.make_room(n)
        position = torch.arange(self.seen, self.seen + n, device=inputs.device)
        self.tokens[self.place(position)] = inputs.int()
        hashes = self.hashes(inputs)
        self.links[:, self.place(position)] = self.link(hashes).int()
        self.ahead = inputs.clone(), hashes  # the caller may go on to write in its own

    def make_room(self, n: int) -> None:
        """Double the rings until they hold the reach and n positions more."""
        size, reach = len(self.tokens), min(self.seen, self.c.ngram_reach_tokens)
        while size < reach + n:
            size *= 2
        if size == len(self.tokens):
            return
        kept = torch.arange(self.seen - reach, self.seen, device=self.tokens.device)
        tokens, links = self.tokens[self.place(kept)], self.links[:, self.place(kept)]
        self.tokens, self.links = self.tokens.new_zeros(size), self.links.new_zeros(len(self.orders), size)
        self.tokens[self.place(kept)], self.links[:, self.place(kept)] = tokens, links

    def document_starts(self, inputs: Tensor) -> Tensor:
        """The position of the BOS before each input of the chunk that follows: int64 [n]."""
        position = torch.arange(self.seen, self.seen + len(inputs), device=inputs.device)
        begins = torch.where(inputs == self.c.bos_id, position, self.document)
        return begins.cummax(0).values

    def occurrences(self, rows: slice):
        """Earlier positions with each row's contexts, newest first: int64 [orders that go so deep, m]; -1 = none."""
        position = torch.arange(self.seen + rows.start, self.seen + rows.stop, device=self.tokens.device)
        order = torch.arange(len(self.orders), device=position.device).unsqueeze(1)
        at = position.expand(len(order), -1)
        for depth in range(self.depths[0]):
            deep = sum(d > depth for d in self.depths)
            linked = self.links[order[:deep], self.place(at[:deep])].long() - 1
            near = (at[:deep] >= 0) & (position - linked <= self.c.ngram_reach_tokens)
            at = torch.where(near, linked, -1)
            yield at

    def evidence(self, inputs: Tensor, rows: slice) -> Evidence:
        """What stood after the contexts that end at inputs[rows] of the chunk that follows.

        Order 1 is asked about this document only: over all documents it would add tokens and no knowledge.
        """
        self.look_ahead(inputs)
        m, vocab_size, n_orders = rows.stop - rows.start, self.c.vocab_size, len(self.orders)
        begins = self.document_starts(inputs)[rows]
        order = torch.arange(n_orders, device=inputs.device).unsqueeze(1)
        first_cell = vocab_size * torch.arange(m, device=inputs.device)
        cells, columns = [], []
        for position in self.occurrences(rows):
            earlier = position < begins
            used = (position >= 0) & ~(earlier & (order[: len(position)] == self.orders.index(1)))
            token = self.tokens[self.place(position + 1)].long()
            cells.append((first_cell + token)[used])
            columns.append((order[: len(position)] + n_orders * earlier)[used])
        column = torch.cat(columns)
        cell, entry = torch.cat(cells).unique(return_inverse=True)
        row = cell // vocab_size
        counts = torch.bincount(entry * 2 * n_orders + column, minlength=len(cell) * 2 * n_orders)
        totals = torch.bincount(row[entry] * 2 * n_orders + column, minlength=m * 2 * n_orders)
        counts, totals = (x.view(-1, 2, n_orders).to(torch.uint8) for x in (counts, totals))
        return Evidence(row, cell % vocab_size, counts, totals)

    def update(self, tokens: Tensor) -> None:
        """Take in a scored chunk: tokens [n + 1], its inputs and its last target."""
        inputs = tokens[:-1]
        self.look_ahead(inputs)
        hashes, n = self.ahead[1], len(inputs)
        position = torch.arange(self.seen + 1, self.seen + n + 1, device=inputs.device)
        entry = (position << 32) | ((hashes >> 32) & self.CHECK)
        self.latest.scatter_reduce_(0, self.slots(hashes).flatten(), entry.flatten(), "amax")
        self.document = self.document_starts(inputs)[-1:]
        self.tail = torch.cat([self.tail, inputs])[n:]
        self.seen, self.ahead = self.seen + n, None

    @property
    def memory_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.latest, self.tokens, self.links))

    def state(self) -> list[Tensor]:
        reach = min(self.seen, self.c.ngram_reach_tokens)
        kept = self.place(torch.arange(self.seen - reach, self.seen, device=self.tokens.device))
        seen = torch.tensor(self.seen)
        return [seen, self.document, self.tail, self.latest, self.tokens[kept], self.links[:, kept]]


# ======================================================================================================================
# Mixing: the neural rows and the evidence in, one distribution out.
# ======================================================================================================================


@dataclass(frozen=True)
class Case:
    """Evidence beside what the neural rows say: all that the bias of a token may depend on."""

    evidence: Evidence
    logp: Tensor  # the neural log-probability of each entry's token, float32 [entries]

    @classmethod
    def of(cls, logp: Tensor, evidence: Evidence) -> Case:
        return cls(evidence, logp[evidence.row, evidence.token])

    def tilted(self, logp: Tensor, bias: Tensor) -> Tensor:
        """p'(a) = p(a) e^b(a) / Z for the evidence's tokens and p(a) / Z for all others: [m, V] log-probabilities.

        The rows are read once and written once: Z needs the evidence's tokens only.
        """
        row, log_z = self.evidence.row, self.partition(bias).log()
        mixed = logp - log_z.to(logp).unsqueeze(1)
        return mixed.index_put_((row, self.evidence.token), (self.logp + bias - log_z[row]).to(logp))

    def partition(self, bias: Tensor) -> Tensor:
        """Z = 1 + sum p(a) (e^b(a) - 1) of each row: [m], float64 and in a fixed order."""
        entries = torch.bincount(self.evidence.row, minlength=len(self.evidence.totals))
        if not len(entries):
            return entries.double()
        change = self.logp.double().exp() * bias.double().expm1()
        return 1 + torch.segment_reduce(change, "sum", lengths=entries, initial=0.0)

    def excess(self, bias: Tensor, targets: Tensor) -> Tensor:
        """p'(a) - [a = x] of each entry: the gradient of the rows' summed loss with respect to b(a)."""
        row = self.evidence.row
        expected = (self.logp + bias).double().exp() / self.partition(bias)[row]
        return (expected - (self.evidence.token == targets[row]).double()).to(bias)


class Maxent(nn.Module):
    """Sparse maximum-entropy tilt: a small network gives each token of the evidence its bias.

    It is fitted on training text before the artifact is written and takes a step of Adam after each scored chunk. Its
    gradient is what was expected less what came, as in every maximum-entropy model (Berger et al. 1996).
    """

    LIMITS = (-2.0, 10.0)  # nats; a Z of e^-2 or more keeps float32 rows within 1e-5 of one
    BLOCK = 8192  # entries at a time: with shapes that never change, an entry's bias is the same bits whatever follows

    def __init__(self, c: Config):
        super().__init__()
        self.hidden = nn.Linear(6 * len(c.ngram_orders) + 1, c.mixer_hidden)
        self.out = nn.Linear(c.mixer_hidden, 1)
        bound, generator = self.hidden.in_features**-0.5, torch.Generator().manual_seed(c.seed)
        for p, limit in zip(self.parameters(), (bound, bound, 0.0, 0.0), strict=True):
            nn.init.uniform_(p, -limit, limit, generator=generator)

    @staticmethod
    def features(case: Case, block: slice) -> Tensor:
        """What is known of a block of entries: [entries, 6 orders + 1].

        For each order, over all documents and in this one: the token's share of the occurrences, the logarithm of its
        count, and whether the context occurred at all; and the token's neural log-probability.
        """
        row = case.evidence.row[block]
        counts, totals = case.evidence.counts[block].to(case.logp), case.evidence.totals[row].to(case.logp)
        counts, totals = (torch.stack([x.sum(1), x[:, 0]], dim=1) for x in (counts, totals))
        known = torch.stack([counts / (totals + 0.5), 0.5 * counts.log1p(), (totals > 0).to(counts)], dim=1)
        return torch.cat([known.flatten(1), 0.25 * case.logp[block].unsqueeze(1)], dim=1)

    def bias(self, case: Case) -> Tensor:
        """b(a) of each entry, nats."""
        n, found = len(case.logp), [case.logp.new_empty(0)]
        for start in range(0, n, self.BLOCK):
            features = self.features(case, slice(start, min(start + self.BLOCK, n)))
            padded = F.pad(features, (0, 0, 0, self.BLOCK - len(features)))
            found.append(self.out(F.gelu(self.hidden(padded))).squeeze(1).clamp(*self.LIMITS))
        return torch.cat(found)[:n]


class OneTokenTilt(nn.Module):
    """The published tilt, p'(a) = e^(beta [a = hint]) p(a) / Z, as the baseline: nothing in it is learned.

    The hint is the token that followed the last 16 tokens in at least 0.8 of the occurrences that the index knows; beta
    is that of the accepted record (PR #2135 of openai/parameter-golf).
    """

    ORDER, SHARE, BETA = 16, 0.8, 2.625

    def __init__(self, c: Config):
        super().__init__()
        self.order = sorted(c.ngram_orders).index(self.ORDER)

    def bias(self, case: Case) -> Tensor:
        """b(a) of each entry, nats."""
        counts = case.evidence.counts[:, :, self.order].sum(1)
        totals = case.evidence.totals[:, :, self.order].sum(1)[case.evidence.row]
        return self.BETA * ((counts > 0) & (counts >= self.SHARE * totals)).float()


# ======================================================================================================================
# Scoring: predictors, and the one loop that every score in a log comes from.
# ======================================================================================================================


class Frozen:
    """The model as it is. Row t is the softmax of its logits over the window that answers for position t.

    `predict` leaves all state alone; `update` only takes in which tokens the context now holds. The context is cut from
    what was given, padded with zeros where the future would be, which causal attention does not look at.
    """

    def __init__(self, model, c: Config, run: Run, stride: int, temperature: float = 1.0):
        self.model, self.c, self.run = model, c, run
        self.stride, self.temperature = stride, temperature
        self.compiled: dict[int, set[int]] = {}  # numbers of windows, by the rows that were asked for
        self.seen = 0  # positions of the stream before the next chunk
        self.context = torch.empty(0, dtype=torch.int64, device=run.device)  # the inputs just before it

    @torch.no_grad()
    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        """Log-probabilities float32 [m, V] of the tokens that follow inputs[rows] (token ids [n] of a chunk)."""
        logp = torch.empty(rows.stop - rows.start, self.c.vocab_size, device=inputs.device)
        if not len(logp):
            return logp
        first, seq_len = self.seen + rows.start, self.c.eval_seq_len
        starts, lows, highs = windows(first, self.seen + rows.stop, self.stride, seq_len)
        known = F.pad(torch.cat([self.context, inputs]), (0, seq_len))
        offset = self.seen - len(self.context)  # position of known[0]
        passes = -(-len(starts) // max(1, self.c.micro_batch_tokens // seq_len))
        batch = -(-len(starts) // passes)  # about as many windows in each
        for b in range(0, len(starts), batch):
            start, low, high = starts[b : b + batch], lows[b : b + batch], highs[b : b + batch]
            size, keep = self.shape(len(start), int((start + seq_len - low).max()))
            padded = np.pad(start, (0, size - len(start)), mode="edge")
            tokens = known[self.on_device(padded[:, None] - offset + np.arange(seq_len))]
            window = np.repeat(np.arange(len(start)), high - low)  # of each position from low[0] to high[-1]
            column = np.arange(low[0], high[-1]) - start[window] - (seq_len - keep)
            logits = self.model(tokens, keep=keep)[self.on_device(window), self.on_device(column)]
            # In float64, so that what is left of a row's deviation from one is the rounding of its entries.
            logp[low[0] - first : high[-1] - first] = (logits / self.temperature).double().log_softmax(-1)
        return logp

    def shape(self, n_windows: int, keep: int) -> tuple[int, int]:
        """How many windows to give the model, and how many of their last rows to ask for, if so many are needed.

        A compiled model is given what it has been compiled for, if that is enough: another shape takes half a minute.
        """
        if not self.run.compiles:
            return n_windows, keep
        keep = self.stride if keep <= self.stride else self.c.eval_seq_len
        sizes = self.compiled.setdefault(keep, set())
        sizes.add(min((size for size in sizes if size >= n_windows), default=n_windows))
        return min(size for size in sizes if size >= n_windows), keep

    def on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.run.device)

    def update(self, tokens: Tensor) -> None:
        """Move past a scored chunk: tokens [n + 1], its inputs and its last target."""
        self.context = torch.cat([self.context, tokens[:-1]])[-self.c.eval_seq_len :]
        self.seen += len(tokens) - 1

    def state(self) -> list[Tensor]:
        """Every tensor that a prediction depends on."""
        return [self.context, torch.tensor(self.seen), *self.model.state_dict().values()]


class Pace:
    """How many epochs of adaptation a chunk gets: as many as are set or, if the pass would end too late, fewer.

    The main rank decides, after each scored chunk, from the time that is left and from medians of what the latest
    chunks took. So the clock and the stream's length, and no token, move a prediction: whoever decodes has to be told
    the epochs, which are logged and recorded.
    """

    LATEST, COMPILING, MARGIN = 9, 2, 0.97  # chunks that count; first ones that compile, and do not; of the time

    def __init__(self, most: int, run: Run, n_chunks: int = 0, seconds: float = math.inf, told: tuple[int, ...] = ()):
        self.most, self.run, self.left, self.told = most, run, n_chunks - 1, told
        self.scoring, self.learning = deque(maxlen=self.LATEST), deque(maxlen=self.LATEST)  # seconds; an epoch's
        self.given: list[int] = []  # epochs of each chunk so far
        self.said = time.perf_counter()
        self.deadline = self.said + self.MARGIN * seconds

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self.said = self.said, time.perf_counter()
        return self.said - before

    @contextmanager
    def chunk(self):
        """Learn from a scored chunk: gives the number of epochs, and times them."""
        scored, epochs = self.lap(), self.choose()
        yield epochs
        self.run.synchronize()
        learned = self.lap()
        if len(self.given) >= self.COMPILING or not self.run.compiles:
            self.scoring.append(scored)
            self.learning.extend([learned / epochs] if epochs else [])
        self.given.append(epochs)
        self.left -= 1

    def choose(self) -> int:
        """Epochs of the chunk at hand: as told, for a run that is done again, or as many as there is time for."""
        if len(self.given) < len(self.told):
            return self.told[len(self.given)]
        if math.isinf(self.deadline):
            return self.most
        epochs = self.run.broadcast(self.affordable)
        if epochs < min(self.given, default=self.most):
            self.run.log(f"ttt_epochs:{epochs} at chunk {len(self.given)}, since {self.left} are to come")
        return epochs

    @property
    def summary(self) -> tuple[tuple[int, int], ...]:
        """Epochs and how many chunks in a row had them, from the first chunk on."""
        return tuple((epochs, len(list(group))) for epochs, group in itertools.groupby(self.given))

    def affordable(self) -> int:
        """Epochs for this chunk and for all that come after it."""
        if not self.learning:
            return self.most if self.said < self.deadline else 0
        left = self.deadline - self.said - self.left * statistics.median(self.scoring)
        return max(0, min(self.most, int(left / (self.left * statistics.median(self.learning)))))


class Adapting(Frozen):
    """Score-first test-time training: `update` trains a copy of the model on the chunk whose scores are fixed.

    Batches and the micro batches in them are cut from the stream, not from ranks: a rank takes its share of a batch's
    micro batches and gradients are summed in float32, so that scores differ between world sizes by its rounding only.
    """

    def __init__(self, model: GPT, c: Config, run: Run, tokenizer: Tokenizer, pace: Pace | None = None):
        self.pace = pace or Pace(c.ttt_epochs, run)
        self.skipped = torch.zeros((), dtype=torch.int64, device=run.device)  # steps whose gradient was not finite
        self.learner = copy.deepcopy(model)
        self.average = copy.deepcopy(model) if c.ttt_polyak else self.learner
        self.called = run.wrap(self.learner)
        predicting = run.wrap(self.average) if c.ttt_polyak else self.called
        super().__init__(predicting, c, run, c.eval_stride, c.ttt_temperature)
        self.tokenizer = tokenizer
        for block in self.learner.blocks[: c.ttt_freeze_blocks]:
            block.requires_grad_(False)
        self.params = [p for p in self.learner.parameters() if p.requires_grad]
        if c.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.params, lr=c.ttt_lr, momentum=c.ttt_momentum)
        else:
            betas = (c.beta1, c.beta2)
            self.optimizer = torch.optim.AdamW(self.params, lr=c.ttt_lr, betas=betas, eps=c.adam_eps, weight_decay=0.0)

    def update(self, tokens: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        inputs, targets, weights = self.training_sequences(tokens)
        batch_seqs = max(1, self.c.ttt_batch_tokens // self.c.train_seq_len)
        with self.pace.chunk() as epochs:
            for _ in range(epochs):
                for first in range(0, len(inputs), batch_seqs):
                    self.step(*(x[first : first + batch_seqs] for x in (inputs, targets, weights)))
        super().update(tokens)

    def learning_rate(self) -> float:
        """TTT_LR, on a cosine over a stream length that is a setting: a prediction must not know the real length."""
        if not self.c.ttt_cosine_tokens:
            return self.c.ttt_lr
        return self.c.ttt_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.seen / self.c.ttt_cosine_tokens)))

    def training_sequences(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The chunk [n + 1] as inputs, targets and loss weights, each [sequences, TRAIN_SEQ_LEN]; padding weighs 0."""
        inputs, targets = tokens[:-1], tokens[1:]
        weights = torch.ones(len(inputs), device=tokens.device)
        if self.c.ttt_byte_weighted:
            weights = self.tokenizer.count_bytes(inputs, targets).to(weights)
        padding = (0, -len(inputs) % self.c.train_seq_len)
        return tuple(F.pad(x, padding).view(-1, self.c.train_seq_len) for x in (inputs, targets, weights))

    def step(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """One optimizer step on the weighted mean loss of a batch [sequences, T] that all ranks share."""
        micro_seqs = max(1, self.c.ttt_micro_tokens // self.c.train_seq_len)
        mine, total_weight = self.run.share(len(inputs), micro_seqs), weights.sum().clamp(min=1.0)
        for p in self.params:
            p.grad = None
        for first in range(mine.start, mine.stop, micro_seqs):
            micro = slice(first, min(first + micro_seqs, mine.stop))
            nll = self.called(inputs[micro], targets[micro])
            ((nll * weights[micro]).sum() / total_weight).backward()
        grads = self.run.sum_gradients(self.params)
        self.skipped += clip_gradients([grads], grads.norm(), self.c.ttt_grad_clip)
        self.optimizer.step()
        if self.c.ttt_polyak:
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.average.parameters()), list(self.learner.parameters()), 1 - self.c.ttt_polyak
                )

    def state(self) -> list[Tensor]:
        momenta = [x for slots in self.optimizer.state.values() for x in slots.values() if isinstance(x, Tensor)]
        return [*super().state(), *self.learner.parameters(), *momenta]


class Mixture:
    """A neural predictor whose rows a mixer tilts by the evidence of the stream so far.

    The index is read up to the token before each position; the mixer's weights are those that the last chunk left.
    """

    def __init__(self, neural: Frozen, mixer: nn.Module, c: Config, run: Run):
        self.neural, self.run, self.stride = neural, run, neural.stride
        self.index = ContextIndex(c, run.device)
        self.fitter = Fitter(copy.deepcopy(mixer), c.mixer_lr, run)
        self.memo: tuple[Tensor, slice, Tensor, Case, Tensor] | None = None

    @torch.enable_grad()  # `update` goes back through the bias, also where the caller predicts without gradients
    def look(self, inputs: Tensor, rows: slice) -> tuple[Tensor, Case, Tensor]:
        """Neural log-probabilities [m, V] after inputs[rows], the case for them and its bias, kept until `update`."""
        if self.memo is None or self.memo[1] != rows or not torch.equal(self.memo[0], inputs):
            logp = self.neural.predict(inputs, rows)
            case = Case.of(logp, self.index.evidence(inputs, rows))
            self.memo = inputs.clone(), rows, logp, case, self.fitter.mixer.bias(case)
        return self.memo[2:]

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        """Log-probabilities [m, V] of the tokens that follow inputs[rows]."""
        logp, case, bias = self.look(inputs, rows)
        return case.tilted(logp, bias.detach())

    def update(self, tokens: Tensor) -> None:
        """Learn from a scored chunk: tokens [n + 1], its inputs and its last target."""
        inputs, n = tokens[:-1], len(tokens) - 1
        rows = self.run.share(n, self.stride)
        _, case, bias = self.look(inputs, rows)
        self.fitter.step(case, bias, tokens[1:][rows], n)
        self.memo = None
        self.index.update(tokens)
        self.neural.update(tokens)

    def state(self) -> list[Tensor]:
        return [*self.fitter.state(), *self.index.state(), *self.neural.state()]


class Unmixed:
    """A mixture's neural rows, to be scored in the mixture's own pass."""

    def __init__(self, mixture: Mixture):
        self.mixture, self.stride = mixture, mixture.stride

    def predict(self, inputs: Tensor, rows: slice) -> Tensor:
        """Log-probabilities [m, V] of the tokens that follow inputs[rows]."""
        return self.mixture.look(inputs, rows)[0]


class Fitter:
    """Adam on a mixer's weights, if it has any; ranks add up the gradients of their rows."""

    def __init__(self, mixer: nn.Module, lr: float, run: Run):
        self.mixer, self.run, self.params = mixer, run, list(mixer.parameters())
        self.adam = torch.optim.Adam(self.params, lr=lr) if self.params else None

    def step(self, case: Case, bias: Tensor, targets: Tensor, n: int) -> None:
        """One step on the mean loss of n tokens, of which this rank has `targets` [m], their case and the mixer's bias.

        A rank without evidence takes part with a gradient of zero.
        """
        if self.adam is None:
            return
        self.adam.zero_grad()
        if len(bias):
            bias.backward(case.excess(bias.detach(), targets) / n)
        self.run.sum_gradients(self.params)
        self.adam.step()

    def state(self) -> list[Tensor]:
        moments = [x for slots in self.adam.state.values() for x in slots.values()] if self.adam else []
        return [*self.params, *moments]


CALIBRATION_STEPS, CALIBRATION_LR = 512, 0.03


def fit(mixer: nn.Module, cases: list[tuple[Case, Tensor, int]], run: Run) -> None:
    """Adam from the start over chunks of text, as often as it takes, at a rate that falls to zero."""
    fitter = Fitter(mixer, CALIBRATION_LR, run)
    for step in range(CALIBRATION_STEPS):
        fitter.adam.param_groups[0]["lr"] = CALIBRATION_LR * (1 - step / CALIBRATION_STEPS)
        case, targets, n = cases[step % len(cases)]
        fitter.step(case, mixer.bias(case), targets, n)


def lessons(model: GPT, indices: list[ContextIndex], c: Config, run: Run):
    """Held-out training text, a chunk at a time, under the model as it is.

    Yields (neural rows [m, V], the evidence of each index, targets [m], tokens n of the chunk over all ranks).
    """
    text = TrainLoader(c, run).held_out_text(c.mixer_calibration_tokens)
    neural = Frozen(run.wrap(model), c, run, c.eval_stride)
    for start in range(0, len(text) - 1, c.ttt_chunk_tokens):
        tokens = text[start : start + c.ttt_chunk_tokens + 1]
        inputs, n = tokens[:-1], len(tokens) - 1
        rows = run.share(n, neural.stride)
        yield neural.predict(inputs, rows), [index.evidence(inputs, rows) for index in indices], tokens[1:][rows], n
        for part in (neural, *indices):
            part.update(tokens)


def calibrate(model: GPT, mixer: Maxent, c: Config, run: Run) -> None:
    """Fit the mixer in place on training text that no step has seen."""
    taught = lessons(model, [ContextIndex(c, run.device)], c, run)
    cases = [(Case.of(logp, evidence), targets, n) for logp, (evidence,), targets, n in taught]
    fit(mixer, cases, run)
    run.log(f"mixer_calibration: {sum(n for _, _, n in cases)} tokens of held-out training text")


def fingerprint(predictor) -> str:
    """sha256 of every byte of state that the predictor's next rows depend on."""
    digest = hashlib.sha256()
    for tensor in predictor.state():
        digest.update(as_bytes(tensor.detach()))
    return digest.hexdigest()


def make_predictor(stage: str, model: GPT, mixer: Maxent, c: Config, run: Run, tokenizer: Tokenizer, pace=None):
    """The predictor of a stage; each starts from what the artifact holds."""
    if stage in FROZEN_STAGES:
        return Frozen(run.wrap(model), c, run, c.eval_seq_len if stage == "roundtrip" else c.eval_stride)
    adapting = Adapting(model, c, run, tokenizer, pace)
    if stage == "ttt":
        return adapting
    return Mixture(adapting, mixer if c.mixer == "maxent" else OneTokenTilt(c), c, run)


FROZEN_STAGES = ("roundtrip", "sliding")


def chunk_length(stage: str, c: Config) -> int:
    """Positions between two updates of a stage's predictor."""
    return c.val_batch_size if stage in FROZEN_STAGES else c.ttt_chunk_tokens


@dataclass(frozen=True)
class Score:
    """What a pass over the stream gave: nats and bytes of every position [N], and what the sums come to."""

    nll_nats: Tensor  # float64
    token_bytes: Tensor  # int64
    max_sum_error: float  # largest |sum of a row - 1|
    seconds: float
    ttt_epochs: tuple[tuple[int, int], ...] = ()  # and how many chunks in a row were learned from so often

    @property
    def val_loss(self) -> float:
        """Nats per token."""
        return self.nll_nats.mean().item()

    @property
    def val_bpb(self) -> float:
        """Bits per byte of the decoded text."""
        return bits_per_byte(self.nll_nats, self.token_bytes)


def bits_per_byte(nll_nats: Tensor, token_bytes: Tensor) -> float:
    return nll_nats.sum().item() / math.log(2) / max(1, int(token_bytes.sum()))


SUM_TOLERANCE = 1e-5  # of a row in float32; the largest of a pass is below 1e-6


def score(predictor, stream: Stream, chunk_tokens: int, run: Run, progress=None) -> Score:
    """Predict, score, update, chunk by chunk from left to right. Raises InputError if a row is no distribution."""
    return score_together([predictor], stream, chunk_tokens, run, progress)[0]


def score_together(predictors: list, stream: Stream, chunk_tokens: int, run: Run, progress=None) -> list[Score]:
    """The same for predictors that share one state, in one pass; the last of them is the one that learns."""
    clock, worst = Clock(run), [0.0] * len(predictors)
    nll = torch.zeros(len(predictors), len(stream), dtype=torch.float64)
    for chunk in stream.chunks(chunk_tokens):
        n = len(chunk.inputs)
        rows = run.share(n, predictors[-1].stride)
        for i, predictor in enumerate(predictors):
            logp = predictor.predict(chunk.inputs, rows)
            nats = -logp.gather(1, chunk.targets[rows].unsqueeze(1)).squeeze(1)  # a row pays for the token that came
            nll[i, chunk.start : chunk.start + n] = run.gather(nats.double(), rows, n).cpu()
            worst[i] = max(worst[i], run.max(row_sum_error(logp)))
            if worst[i] > SUM_TOLERANCE:
                where = f"scoring: by position {chunk.start + n}"
                raise InputError(f"{where} a row's sum is off by {worst[i]}; allowed is {SUM_TOLERANCE}")
        if not chunk.is_last:
            predictors[-1].update(chunk.tokens)
        if progress:
            progress(chunk.start + n, nll[-1], clock.seconds())
    seconds = run.max(clock.seconds())
    return [Score(nats, stream.token_bytes, error, seconds) for nats, error in zip(nll, worst, strict=True)]


def row_sum_error(logp: Tensor) -> float:
    """The largest |sum of a row's probabilities - 1|; infinite if a row is not finite."""
    error = (logp.double().exp().sum(-1) - 1).abs().max().item() if len(logp) else 0.0
    return error if math.isfinite(error) else math.inf


# ======================================================================================================================
# main: the order of the phases, and the records of a run.
# ======================================================================================================================

# The community's names, by which scripts find a score in a log; nothing here is stored in six bits.
STAGE_LABELS = {
    "roundtrip": "final_int6_roundtrip",
    "sliding": "final_int6_sliding_window",
    "ttt": "legal_ttt",
    "mixed": "mixed",
}


def passes(stages: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The stages of each pass over the stream: what the mixture mixes is scored on its way."""
    found: list[tuple[str, ...]] = []
    for stage in stages:
        if stage == "mixed" and found[-1:] == [("ttt",)]:
            found[-1] = ("ttt", "mixed")
        else:
            found.append((stage,))
    return found


def run_pass(stages: tuple[str, ...], predictor, stream: Stream, c: Config, run: Run) -> dict[str, Score]:
    """Score the stream with the predictor of the last of the stages, and on its way the other, if there is one."""
    said, predictors = [0.0], [predictor] if len(stages) == 1 else [Unmixed(predictor), predictor]

    def progress(done: int, nll: Tensor, seconds: float) -> None:
        if seconds - said[0] >= 10:
            said[0] = seconds
            bpb = bits_per_byte(nll[:done], stream.token_bytes[:done])
            run.log(f"  {stages[-1]}_chunk [{done}/{len(stream)}] bpb={bpb:.4f} time={seconds:.1f}s")

    scores = score_together(predictors, stream, chunk_length(stages[-1], c), run, progress)
    for stage, result in zip(stages, scores, strict=True):
        label, partial = STAGE_LABELS[stage], "" if stream.whole else f" partial:{len(stream)}_tokens"
        loss, bpb, error = result.val_loss, result.val_bpb, result.max_sum_error
        run.log(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * result.seconds:.0f}ms{partial}")
        run.log(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} max_sum_error:{error:.2e}{partial}")
    if isinstance(predictor, Mixture):
        run.log(f"context_index: {predictor.index.memory_bytes} bytes a rank for {len(stream)} tokens")
    return dict(zip(stages, scores, strict=True))


def evaluate(model: GPT, mixer: Maxent, c: Config, run: Run, tokenizer: Tokenizer, stream: Stream) -> dict[str, Score]:
    """Score the stream in each stage; those that adapt come last, and share what is then left of MAX_EVAL_SECONDS."""
    clock, results = Clock(run), {}
    todo = sorted(passes(c.stages), key=lambda stages: stages[-1] not in FROZEN_STAGES)
    for i, stages in enumerate(todo):
        left = c.max_eval_seconds - run.max(clock.seconds()) if c.max_eval_seconds else math.inf
        pace = Pace(c.ttt_epochs, run, -(-len(stream) // c.ttt_chunk_tokens), left / (len(todo) - i))
        predictor = make_predictor(stages[-1], model, mixer, c, run, tokenizer, pace)
        for stage, result in run_pass(stages, predictor, stream, c, run).items():
            results[stage] = dataclasses.replace(result, ttt_epochs=pace.summary)
        if pace.given and min(pace.given) < c.ttt_epochs:
            run.log("ttt_epochs by chunk: " + ",".join(f"{epochs}*{times}" for epochs, times in pace.summary))
        adapting = getattr(predictor, "neural", predictor)
        if isinstance(adapting, Adapting):
            run.log(f"ttt_skipped_steps:{int(adapting.skipped)}")
    limit = f" of {c.max_eval_seconds:g}" if c.max_eval_seconds else ""
    run.log(f"eval_seconds: {run.max(clock.seconds()):.1f}{limit}")
    return {stage: results[stage] for stage in c.stages}


def stage_record(result: Score, stream: Stream) -> dict:
    return dict(
        val_loss=result.val_loss,
        val_bpb=result.val_bpb,
        seconds=round(result.seconds, 3),
        tokens=len(stream),
        bytes=int(result.token_bytes.sum()),
        documents=stream.documents,
        whole_stream=stream.whole,
        max_sum_error=result.max_sum_error,
        ttt_epochs=result.ttt_epochs,
    )


def artifact_path(c: Config, run_id: str) -> Path:
    """Where the run's artifact is or will be."""
    return Path(c.artifact_path or Path(c.log_dir) / f"{run_id}.artifact")


def log_start(run_id: str, c: Config, run: Run, stream: Stream | None) -> None:
    """Every value in force and what the run stands on."""
    for line in dataclasses.replace(c, run_id=run_id).lines():
        run.log(line)
    run.log(f"hardware: {run.hardware()}")
    run.log(f"versions: {json.dumps(versions())}")
    run.log(f"script_sha256:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}")
    run.log(f"world_size:{run.world_size} device:{run.device} dtype:{run.dtype} compile:{int(run.compiles)}")
    run.log(f"kernels: {choose_kernels(c, run)}")
    if stream is not None:
        partial = "" if stream.whole else " partial: the stream goes on"
        run.log(f"val_loader:{c.data_path} tokens:{len(stream)} documents:{stream.documents}{partial}")


def versions() -> dict[str, str]:
    return dict(
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        sentencepiece=sentencepiece.__version__,
    )


def run_record(run_id, c: Config, run: Run, trained, artifact: dict, results: dict[str, Score], stream) -> dict:
    """What logs/<RUN_ID>.json holds."""
    stages = {stage: stage_record(result, stream) for stage, result in results.items()}
    final = c.stages[-1] if results else None
    return dict(
        run_id=run_id,
        seed=c.seed,
        config=dataclasses.asdict(dataclasses.replace(c, run_id=run_id)),
        hardware=run.hardware(),
        versions=versions(),
        kernels=str(choose_kernels(c, run)),
        train=trained,
        artifact=artifact,
        stages=stages,
        final_stage=final,
        val_bpb=stages[final]["val_bpb"] if final else None,
    )


def write_records(record: dict, results: dict[str, Score], stream: Stream | None, c: Config, run: Run) -> None:
    """logs/<RUN_ID>.json, and the final stage's per-token record if SCORES_PATH asks for it."""
    if not run.is_main:
        return
    write_atomically(Path(c.log_dir) / f"{record['run_id']}.json", (json.dumps(record, indent=1) + "\n").encode())
    if c.scores_path and results:
        result = results[record["final_stage"]]
        nats, sizes = result.nll_nats.numpy(), result.token_bytes.numpy()
        file = io.BytesIO()
        np.savez_compressed(file, token=stream.tokens[1:].numpy(), nll_nats=nats, bytes=sizes)
        write_atomically(Path(c.scores_path), file.getvalue())


def log_results(record: dict, run: Run) -> None:
    """The stages side by side, then the run's score, which is the last of them."""
    if not record["stages"]:
        return
    run.log(f"{'stage':<10} {'val_loss':>9} {'val_bpb':>9} {'change':>9} {'seconds':>8} {'tokens':>9} {'sum error':>9}")
    before = None
    for stage, row in record["stages"].items():
        change = "" if before is None else f"{row['val_bpb'] - before:+.5f}"
        run.log(
            f"{stage:<10} {row['val_loss']:9.5f} {row['val_bpb']:9.5f} {change:>9} {row['seconds']:8.1f} "
            f"{row['tokens']:9d} {row['max_sum_error']:9.1e}"
        )
        before = row["val_bpb"]
    scope = f"documents:{row['documents']} " + ("whole stream" if row["whole_stream"] else "PARTIAL stream")
    run.log(f"final val_bpb:{record['val_bpb']:.8f} stage:{record['final_stage']} {scope}")


def conclude(
    model: GPT, c: Config, run: Run, tokenizer_sha256: str, averages: WeightAverages, path: Path | None
) -> dict:
    """All that follows the last step, up to the artifact at `path`; returns the seconds by part.

    Without a path it is a rehearsal, which takes as long as it ever can.
    """
    called, mixer, loader, seconds = run.wrap(model), Maxent(c).to(run.device), TrainLoader(c, run), {}

    @contextmanager
    def timed(part: str):
        clock = Clock(run)
        yield
        run.synchronize()
        seconds[part] = round(run.max(clock.seconds()), 3)

    def write() -> None:
        packed = pack(model, quantized, mixer, c, tokenizer_sha256)
        if path:
            write_atomically(path, packed)

    with timed("averaging"):
        choose_average(model, called, averages, loader, c, run)
    with timed("quantization"):
        quantized = quantize_to_size(model, called, loader, mixer, c, run, tokenizer_sha256, exhaust=path is None)
    with timed("calibration"), with_weights(model, quantized):
        calibrate(model, mixer, c, run)
    with timed("pack"):
        run.broadcast(write)
    return seconds


def execute(c: Config, env: dict[str, str], run: Run) -> None:
    """One run, in order: data, training, artifact, stages, records."""
    packed = run.broadcast(read_artifact, c.artifact_path) if c.phase == "eval" else None
    c = as_packed(c, packed[0], env) if packed else c
    tokenizer = Tokenizer(c)
    stream = None if c.phase == "train" and not c.val_loss_every else Stream(c, run.device, tokenizer)
    run_id = run.open_log(c)
    path = artifact_path(c, run_id)
    log_start(run_id, c, run, stream)

    trained = None
    if c.phase != "eval":
        model = GPT(c, run.dtype, choose_kernels(c, run)).init_weights(c).to(run.device)
        run.log(f"model_params:{sum(p.numel() for p in model.parameters())}")
        check_room(model, Maxent(c), c, run)
        trained = train(model, functools.partial(conclude, model, c, run, tokenizer.sha256), path, c, run, stream)

    header, parts = packed or run.broadcast(read_artifact, path)  # from here on, only what the file says counts
    artifact = artifact_record(path, header, tokenizer, run)
    results = {}
    if c.phase != "train":
        results = evaluate(*unpack(parts, c, run), c, run, tokenizer, stream)
    record = run_record(run_id, c, run, trained, artifact, results, stream)
    write_records(record, results, stream, c, run)
    log_results(record, run)


def main() -> int:
    """Run under torchrun or alone; exit status 2 and one line on standard error for input that cannot be used."""
    env = dict(os.environ)
    try:
        config = Config.from_env(env)
        run = Run(config)
        execute(config, env, run)
    except InputError as error:
        if env.get("RANK", "0") != "0":
            time.sleep(5)  # if the main rank met it too, torchrun ends this one before it says the same again
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2  # without waiting for the other ranks, which may be in a collective that never ends
    run.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # all files are closed; gloo's threads can abort an interpreter that takes itself apart
