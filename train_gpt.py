"""Train a small transformer, pack it under 16,000,000 bytes, and score text with it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                # the competition run on 8 GPUs
    PRESET=smoke torchrun --standalone --nproc_per_node=2 train_gpt.py   # minutes on two CPU cores
    PHASE=eval ARTIFACT_PATH=logs/x.artifact python train_gpt.py         # score an artifact that exists

The file follows the data, room by room; PR numbers are those of openai/parameter-golf. Every score comes from one loop:

    for chunk in stream:                          # left to right, every position once
        logp = predictor.predict(chunk.inputs)    # [n, V] log-probabilities, each row sums to one
        nll = -logp[range(n), chunk.targets]      # the only line that charges a target
        predictor.update(chunk.tokens)            # test-time training, n-gram counts, mixture weights

`predict` receives no target: row t depends on the artifact, earlier chunks and inputs[: t + 1], the tokens before the
one that it predicts. `update` learns from a chunk after its score is fixed.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import datetime
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import lzma
import math
import os
import platform
import re
import signal
import struct
import sys
import tempfile
import time
from collections import defaultdict, deque, namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as c10d
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

triton = tl = flash_attn_func = None
with suppress(ImportError):  # every Triton kernel has a plain twin
    import triton
    import triton.language as tl
with suppress(ImportError):  # FlashAttention 3, Hopper only; PyPI's stub lacks the function
    from flash_attn_interface import flash_attn_func

# ==================== Config ==========================================================================================
# Every setting of a run, from presets and environment; an artifact to score brings its own (with_artifact).

CAP_BYTES, LARGEST = 16_000_000, 10**15  # of script plus artifact, decimal; of any setting
STAGES, FROZEN_STAGES = ("roundtrip", "sliding", "ttt", "mixed"), ("roundtrip", "sliding")
EXPERTS = ("neural", "unigram", "bigram", "trigram", "backoff", "flat", "maxent")  # by default, of MIXERS
CONFIGS = Path(__file__).resolve().parent / "configs"


class InputError(Exception):
    """Input that cannot be used. The message is one line: the name, the value and what is allowed."""


@contextmanager
def refusing(problem: str):
    """Raise InputError, which names the problem, for whatever a damaged or a stranger's file makes its reader raise."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{problem} ({reason})") from None


def setting(default, low=-LARGEST, high=LARGEST, choices=None, shape=False, score=False):
    """A field of Config. The artifact keeps those marked `shape` (tensors, coding) and `score` (how to score it)."""
    return field(default=default, metadata=dict(low=low, high=high, choices=choices, shape=shape, score=score))


@dataclass(frozen=True)
class Config:
    """All settings. A field's environment variable is its name in capitals; the defaults are the competition run."""

    # What to run, on what, and where the files are.
    preset: str = setting("")  # names of files in configs/, applied from left to right; the environment comes last
    run_id: str = setting("")  # "" = time, seed and process
    phase: str = setting("both", choices=("both", "train", "eval"))
    seed: int = setting(1337, 0, 2**32 - 1)
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    dtype: str = setting("auto", choices=("auto", "float32", "bfloat16"))  # of activations; auto: bfloat16 on CUDA
    torch_compile: bool = setting(True)  # on CUDA only
    attention: str = setting("auto", choices=("auto", "flash3", "cudnn", "flash", "efficient", "math"))
    kernels: tuple[str, ...] = setting(("loss", "mlp"), choices=("loss", "mlp"))  # Triton's, on CUDA only
    data_path: str = setting("data/datasets/fineweb10B_sp1024")
    tokenizer_path: str = setting("")  # "" = tokenizer.model inside data_path
    artifact_path: str = setting("")  # "" = LOG_DIR/RUN_ID.artifact
    scores_path: str = setting("")  # "" = no per-token record
    log_dir: str = setting("logs")
    dist_timeout_seconds: float = setting(1800.0, 1.0)  # until a rank that does not answer ends the run
    # Model.
    vocab_size: int = setting(1024, 257, 65536, shape=True)
    bos_id: int = setting(1, 0, shape=True)
    num_layers: int = setting(11, 1, 256, shape=True)
    model_dim: int = setting(512, 16, 16384, shape=True)
    num_heads: int = setting(8, 1, shape=True)
    num_kv_heads: int = setting(4, 0, shape=True)  # 0 = as many as NUM_HEADS
    mlp_mult: float = setting(3.0, 0.125, 64.0, shape=True)
    leaky_slope: float = setting(0.5, 0.0, 1.0, shape=True)
    xsa_last_n: int = setting(4, 0, shape=True)  # layers with exclusive self-attention
    bigram_vocab_size: int = setting(2048, 0, 2**24, shape=True)  # rows of the hashed bigram embedding; 0 = none
    bigram_dim: int = setting(128, 1, 16384, shape=True)
    value_residual: bool = setting(True, shape=True)
    ve_layers: tuple[int, ...] = setting((9, 10), shape=True)  # layers that add a value embedding
    ve_dim: int = setting(128, 1, 16384, shape=True)
    smear_gate: bool = setting(True, shape=True)
    rope_dims: int = setting(16, 0, shape=True)  # of each head; 0 = no position encoding
    rope_base: float = setting(10000.0, 1.0, shape=True)
    layer_scale: bool = setting(True, shape=True)  # 1 / sqrt(layer + 1) on the input of every sublayer
    unet_skips: bool = setting(True, shape=True)
    skip_gates_enabled: bool = setting(False, shape=True)  # a learned blend of stream and skip, not their sum
    gate_window: int = setting(0, 0, shape=True)  # channels from which a gate a head is read; 0 = none
    num_loops: int = setting(0, 0, 16, shape=True)  # further passes through layers LOOP_START to LOOP_END
    loop_start: int = setting(3, 0, shape=True)
    loop_end: int = setting(5, 0, shape=True)
    enable_looping_at: float = setting(0.35, 0.0, 1.0)  # part of the steps, or of the time where the clock ends the run
    lanes: bool = setting(False, shape=True)  # two: attention reads the first, the MLP the second, both write to both
    lanes_start_layer: int = setting(8, 0, shape=True)  # the first layer with two lanes; the head reads their mean
    qk_gain_init: float = setting(1.5, 0.0)
    logit_softcap: float = setting(30.0, 0.0, shape=True)  # 0 = none
    doc_isolated: bool = setting(False, score=True)  # no attention across a BOS; scoring's windows begin at it
    tie_embeddings: bool = setting(True, shape=True)
    # Training length and batch.
    iterations: int = setting(9000, 1)
    max_wallclock_seconds: float = setting(600.0, 0.0)  # from the first step to the written artifact; 0 = no cap
    reserve_seconds: float = setting(45.0, 0.0)  # of them, for averaging, quantizing, calibrating and packing
    train_batch_tokens: int = setting(786_432, 1)  # per optimizer step, over all ranks
    train_seq_len: int = setting(2048, 8, 2**17, score=True)
    micro_batch_tokens: int = setting(98_304, 8)  # per forward pass and rank, in training and in scoring
    warmup_steps: int = setting(20, 0)  # compile warm-up on synthetic tokens; all state is restored afterwards
    # Where the clock ends the run before ITERATIONS, these and MUON_MOMENTUM_WARMUP_STEPS shrink (see schedule).
    lr_warmup_iters: int = setting(20, 0)
    warmdown_iters: int = setting(3500, 0)
    min_lr: float = setting(0.0, 0.0, 1.0)  # the part of the rates that is left at the end; an EMA does the rest
    train_log_every: int = setting(500, 1)
    val_loss_every: int = setting(0, 0)  # 0 = not during training
    checkpoint_every: int = setting(0, 0)  # steps, and at a signal; LOG_DIR/RUN_ID.<rank>.checkpoint; 0 = none
    resume: str = setting("")  # LOG_DIR/RUN_ID of a run that left checkpoints, to go on from the last one
    complement_alpha: float = setting(0.5, 0.0, 1.0)  # of the loss weights 1 - alpha * p_bigram; 0 = none
    complement_tokens: int = setting(16_000_000, 1)  # training tokens from which its bigrams are counted
    crown_q_lambda: float = setting(0.1, 0.0)  # of the penalty on what rounding may cost, in the warmdown; 0 = none
    late_qat_threshold: float = setting(0.15, 0.0, 1.0)  # part of the warmdown in which weights are rounded; 0 = none
    # Optimizers and averages.
    matrix_lr: float = setting(0.025, 0.0)
    scalar_lr: float = setting(0.025, 0.0)  # also of projections
    tied_embed_lr: float = setting(0.035, 0.0)  # of all tables, tied or not
    tied_embed_init_std: float = setting(0.005, 0.0)
    muon_momentum: float = setting(0.99, 0.0, 1.0)
    muon_momentum_warmup_start: float = setting(0.92, 0.0, 1.0)
    muon_momentum_warmup_steps: int = setting(1500, 0)
    muon_backend_steps: int = setting(5, 1, 20)  # Newton-Schulz iterations
    polar_express: bool = setting(False)  # their coefficients by Polar Express, one triple an iteration
    muon_row_norm: bool = setting(True)  # of what is orthogonalized (MuonEq-R, PR #1394)
    muon_row_beta2: float = setting(0.0, 0.0, 0.9999)  # of NorMuon's running mean square of a row; 0 = none
    muon_wd: float = setting(0.04, 0.0)
    adam_wd: float = setting(0.04, 0.0)
    beta1: float = setting(0.9, 0.0, 0.9999, score=True)
    beta2: float = setting(0.95, 0.0, 0.99999, score=True)
    adam_eps: float = setting(1e-8, 1e-20, 1.0, score=True)
    grad_clip_norm: float = setting(0.3, 0.0)  # 0 = none
    ema_decay: float = setting(0.997, 0.0, 0.999999)
    swa_every: int = setting(50, 1)
    swa_start_scale: float = setting(0.2, 0.0, 1.0)  # part of the warmdown in which SWA collects
    # Artifact.
    quant: str = setting("int6", choices=("int6", "hessian"), shape=True)
    quant_bits: int = setting(6, 2, 6, shape=True)  # of int6's matrices; tables have two bits more
    clip_sigmas: float = setting(0.0, 0.0, 256.0)  # int6's range in standard deviations of a row; 0 = fit TARGET_BYTES
    codec: str = setting("lzma", choices=("lzma", "rans"), shape=True)  # of the codes; all else is LZMA's
    gptq_tokens: int = setting(262_144, 1)  # of training text, on which the Hessians are measured
    target_bytes: int = setting(CAP_BYTES, 1, CAP_BYTES)  # script plus artifact
    # Scoring.
    stages: tuple[str, ...] = setting(STAGES, choices=STAGES)  # the last one is the run's score
    max_eval_seconds: float = setting(600.0, 0.0, score=True)  # of all stages; adaptation stops early. 0 = no cap
    val_tokens: int = setting(0, 0)  # score only the first of them; 0 = the whole stream
    val_batch_size: int = setting(524_288, 8)  # tokens a chunk where nothing is learned between chunks
    eval_seq_len: int = setting(2048, 8, 2**17, score=True)
    eval_stride: int = setting(256, 1, score=True)
    ttt_chunk_tokens: int = setting(32_768, 8, 2**22, score=True)
    ttt_optimizer: str = setting("sgd", choices=("sgd", "adamw"), score=True)
    ttt_lr: float = setting(0.002, 0.0, score=True)
    ttt_momentum: float = setting(0.9, 0.0, 0.9999, score=True)  # sgd only; adamw uses BETA1, BETA2
    ttt_epochs: int = setting(3, 0, 1000, score=True)
    ttt_batch_tokens: int = setting(32_768, 8, 2**22, score=True)  # per step, over all ranks
    ttt_micro_tokens: int = setting(4096, 8, 2**22, score=True)  # per backward pass; a rank gets a multiple of it
    ttt_freeze_blocks: int = setting(0, score=True)  # leading blocks that stay as they are; -2 = all but the last two
    ttt_grad_clip: float = setting(1.0, 0.0, score=True)
    ttt_polyak: float = setting(0.0, 0.0, 0.999999, score=True)  # decay of the average that predicts; 0 = none
    ttt_cosine_tokens: int = setting(0, 0, score=True)  # stream length over which the rate falls to 0; 0 = constant
    ttt_byte_weighted: bool = setting(False, score=True)
    ttt_temperature: float = setting(1.0, 0.1, 10.0, score=True)
    ttt_lora_rank: int = setting(0, 0, 1024, score=True)  # of the adapters that each document has for itself; 0 = none
    ttt_lora_lr: float = setting(0.003, 0.0, score=True)
    ttt_lora_tokens: int = setting(64, 1, 2**17, score=True)  # of a document, scored before its adapters take a step
    # Mixing.
    mixer: str = setting("hedge", score=True)  # one of MIXERS
    hedge_experts: tuple[str, ...] = setting(EXPERTS, score=True)
    hedge_eta: float = setting(1.0, 0.0, 10.0, score=True)  # learning rate: w_k <- w_k * p_k(token)^eta
    hedge_share: float = setting(0.0, 0.0, 0.5, score=True)  # of the weight that is dealt out evenly after a token
    backoff_base: float = setting(0.05, 0.0, 1.0, score=True)  # weight of the n-gram where the model is sure
    backoff_range: float = setting(0.55, 0.0, 1.0, score=True)  # what is added to it where the model is unsure
    backoff_centers: tuple[float, ...] = setting((4.5, 4.2, 3.8, 3.5, 3.2, 3.0), score=True)  # by context; last goes on
    backoff_min_count: int = setting(2, 1, 255, score=True)
    mixer_hidden: int = setting(32, 1, 4096, shape=True)  # width of the network that maxent learns
    mixer_lr: float = setting(0.002, 0.0, score=True)  # of its step after each scored chunk
    mixer_calibration_tokens: int = setting(1_048_576, 2)  # of held-out training text, on which it is fitted
    ngram_orders: tuple[int, ...] = setting((1, 2, 3, 4, 5, 6, 8, 12, 16, 24), 1, 64, shape=True)  # tokens of context
    ngram_max_chain: int = setting(16, 1, 255, score=True)  # latest occurrences that count; 3 / k of it from k = 4 on
    ngram_table_bits: int = setting(25, 4, 27, score=True)  # log2 of the hash heads; 8 bytes each

    @classmethod
    def from_env(cls, env: dict[str, str]) -> Config:
        """Return the settings in force: defaults, then the presets, then the environment. Raise InputError."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        refuse_unknown(env, list(fields))
        given = read_presets(env.get("PRESET", ""), list(fields)) | {name: env[name] for name in fields if name in env}
        return cls(**{fields[name].name: parse(fields[name], text) for name, text in given.items()})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, (low, high, choices) = getattr(self, f.name), map(f.metadata.get, ("low", "high", "choices"))
            for part in value if isinstance(value, tuple) else (value,):
                if choices is not None and part not in choices:
                    raise InputError(f"{f.name.upper()}={part!r} is not known: allowed are {str(choices)[1:-1]}")
                if isinstance(part, (int, float)) and not low <= part <= high:
                    allowed = f"{low} to {high}" if high < LARGEST else f"{low} or more"
                    raise InputError(f"{f.name.upper()}={part} is out of range: allowed is {allowed}")
        for name, kept, allowed in self.rules():
            if not kept:
                raise InputError(f"{name.upper()}={show(getattr(self, name))}: allowed is {allowed}")

    def rules(self):
        """Yield (setting, whether it is allowed, what is allowed) for each rule over several settings."""
        c, trains, head_dim = self, self.phase != "eval", self.model_dim // self.num_heads
        cap, reserve, known = c.max_wallclock_seconds, c.reserve_seconds, MIXERS.keys() - {"hedge"}
        needed = {1, 2} | ({Tilt.ORDER} if "tilt" in (c.mixer, *c.hedge_experts) else set())
        scales, pairs = c.quant == "int6" or not c.late_qat_threshold, c.vocab_size <= 16384 or not c.complement_alpha
        yield "num_heads", c.model_dim % c.num_heads == 0, f"a divisor of MODEL_DIM={c.model_dim}"
        yield "num_kv_heads", c.num_heads % c.kv_heads == 0, f"a divisor of NUM_HEADS={c.num_heads}"
        yield "rope_dims", c.rope_dims in range(0, head_dim + 1, 2), f"an even number up to the head's {head_dim}"
        yield "ve_layers", set(c.ve_layers) <= set(range(c.num_layers)), f"layers below NUM_LAYERS={c.num_layers}"
        inside = not c.num_loops or c.loop_start <= c.loop_end < c.num_layers
        yield "loop_end", inside, f"a layer below NUM_LAYERS={c.num_layers} and not before LOOP_START={c.loop_start}"
        starts = range(c.loop_end + 1 if c.num_loops else 0, c.num_layers)  # no lanes inside the loops
        yield "lanes_start_layer", not c.lanes or c.lanes_start_layer in starts, f"{starts.start} to {c.num_layers - 1}"
        yield "gate_window", c.gate_window <= c.model_dim, f"at most MODEL_DIM={c.model_dim}"
        yield "bigram_vocab_size", c.bigram_vocab_size != 1, "0 (none), or 2 or more"
        yield "train_batch_tokens", c.batch_seqs > 0, f"at least TRAIN_SEQ_LEN={c.train_seq_len}"
        yield "eval_stride", c.eval_stride <= c.eval_seq_len, f"at most EVAL_SEQ_LEN={c.eval_seq_len}"
        yield "ttt_lora_tokens", not c.ttt_lora_rank or c.ttt_lora_tokens + 1 < c.eval_seq_len, "up to EVAL_SEQ_LEN - 2"
        yield "ttt_freeze_blocks", c.ttt_freeze_blocks <= c.num_layers, f"at most NUM_LAYERS={c.num_layers}"
        yield "max_wallclock_seconds", cap == 0 or cap > reserve, f"more than RESERVE_SECONDS={reserve}, or 0"
        yield "late_qat_threshold", scales or not trains, f"0 with QUANT={c.quant}: late QAT needs int6's scales"
        yield "complement_alpha", pairs or not trains, "0 with more than 16384 pieces: it weighs all pairs of them"
        yield "mixer", c.mixer in MIXERS, "one of " + ", ".join(MIXERS)
        yield "hedge_experts", set(c.hedge_experts) <= known, "some of " + ", ".join(sorted(known))
        for name in ("stages", "ve_layers", "hedge_experts", "kernels", "ngram_orders"):
            yield name, len(set(getattr(c, name))) == len(getattr(c, name)), "each value once"
        for name in ("stages", "hedge_experts", "backoff_centers"):
            yield name, getattr(c, name), "one value or more"
        ascending = list(c.ngram_orders) == sorted(c.ngram_orders) and needed <= set(c.ngram_orders)
        yield "ngram_orders", ascending, f"rising numbers, {show(sorted(needed))} among them"
        yield "resume", trains or not c.resume, "none with PHASE=eval"
        yield "run_id", c.run_id == os.path.basename(c.run_id), "a plain file name"
        yield "artifact_path", trains or c.artifact_path, "the file that PHASE=eval scores"

    def lines(self) -> list[str]:
        """Return every value in force as NAME=value, in the form in which the environment takes it."""
        return [f"{f.name.upper()}={show(getattr(self, f.name))}" for f in dataclasses.fields(self)]

    def marked(self, mark: str) -> dict:
        """Return the settings marked `shape` or `score`."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata[mark]}

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def batch_seqs(self) -> int:
        """Training sequences of an optimizer step, over all ranks."""
        return self.train_batch_tokens // self.train_seq_len

    @property
    def batch_tokens(self) -> int:
        return self.batch_seqs * self.train_seq_len


def refuse_unknown(env: dict[str, str], known: list[str]) -> None:
    """Raise InputError for a variable that looks like a setting and is none, or that the field's other scripts read."""
    general = {"RUN", "LOG", "DATA", "NUM", "MAX", "MIN", "MODEL", "TORCH", "TOKENIZER", "TRAIN", "EVAL", "DIST"}
    general |= {"DEVICE", "ENABLE", "SKIP"}
    families = {name.partition("_")[0] for name in known if "_" in name} - general  # whose names others use too
    others = " ".join(path.read_text() for path in CONFIGS.glob("*.txt")).split()
    for name in sorted(env.keys() - set(known)):
        family, underscore, _ = name.partition("_")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85) if len(name) > 5 else []  # STAGE is common
        if near or name in others or (underscore and family in families):
            members = near or [k for k in known if k.startswith(family + "_")]
            members = members or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise InputError(f"unknown setting {name}={env[name]}: did you mean {', '.join(members) or 'another'}?")


def read_presets(names: str, known: list[str]) -> dict[str, str]:
    """Return the settings in configs/<name>.env for each of the names, the later ones winning. Raise InputError."""
    found, presets = {}, {path.stem: path for path in CONFIGS.glob("*.env")}
    for preset in filter(None, names.split(",")):
        if preset not in presets:
            raise InputError(f"PRESET={preset!r} is not known: allowed are {', '.join(sorted(presets))}")
        lines = (line.partition("#")[0].strip() for line in presets[preset].read_text("utf-8").splitlines())
        for line in filter(None, lines):
            name, equals, value = (part.strip() for part in line.partition("="))
            if not equals or name not in known or name == "PRESET":
                raise InputError(f"configs/{preset}.env: {line!r} is no setting; allowed are NAME=value lines")
            found[name] = value
    return found


def parse(f: dataclasses.Field, text: str):
    """Return the value of a field from its text. Raise InputError."""
    kind = type(f.default)
    if not text.isprintable():
        raise InputError(f"{f.name.upper()}={text!r}: allowed are printable characters, no line break among them")
    try:
        if kind is bool:
            return {"0": False, "1": True}[text]
        if kind is tuple:
            return tuple(type(f.default[0])(part) for part in text.replace(" ", "").split(",") if part)
        return kind(text)
    except (ValueError, KeyError):
        kinds = {bool: "0 or 1", int: "a whole number", float: "a number"}
        allowed = kinds[type(f.default[0])] + ", or several with commas" if kind is tuple else kinds[kind]
        raise InputError(f"{f.name.upper()}={text!r} does not parse: allowed is {allowed}") from None


def show(value) -> str:
    """Return a setting's value as the environment would spell it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(int(value) if isinstance(value, bool) else value)


# ==================== Dist and Log ====================================================================================
# This process among its ranks, its device, its log and its clock. Only open_dist and Dist ask for the number of ranks.

log = logging.getLogger("train_gpt")  # silent until open_log
# torch 2.13 renamed both and warns at every call of the old name; 2.11 knows only the old one.
REDUCE_SCATTER = getattr(c10d, "reduce_scatter_single", None) or c10d.reduce_scatter_tensor
ALL_GATHER = getattr(c10d, "all_gather_single", None) or c10d.all_gather_into_tensor


class Dist:
    """One rank among `world_size`, and the collectives that a run needs."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.world_size, self.device, self.is_main = rank, world_size, torch.device(device), rank == 0

    def broadcast(self, make, *arguments):
        """Return make(*arguments), called on the main rank only: other nodes need not have the files."""
        box = [make(*arguments) if self.is_main else None]
        if self.world_size > 1:
            c10d.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            c10d.all_reduce(tensor)
        return tensor

    def max(self, value: float) -> float:
        """Return the largest of the ranks' values: all of them decide alike."""
        box = torch.tensor([value], dtype=torch.float64)
        if self.world_size > 1:
            c10d.all_reduce(box, op=c10d.ReduceOp.MAX)
        return box.item()

    def sum_gradients(self, params: list[nn.Parameter]) -> Tensor:
        """Add up the ranks' gradients in one message. Return them in one row, of which each becomes a view."""
        row = self.sum(torch.cat([gradient(p).flatten() for p in params] or [torch.zeros(0, device=self.device)]))
        for p, grad in zip(params, row.split([p.numel() for p in params]), strict=True):
            p.grad = grad.view_as(p)
        return row

    def share(self, n: int, granule: int = 1, start: int = 0) -> slice:
        """Return this rank's contiguous part of [start, start + n), cut at multiples of `granule` from start."""
        granules = -(-n // granule)
        first, last = granules * self.rank // self.world_size, granules * (self.rank + 1) // self.world_size
        return slice(start + min(first * granule, n), start + min(last * granule, n))

    def gather(self, part: Tensor, rows: slice, n: int) -> Tensor:
        """Return all n rows from the ranks' parts: [m, ...] on each rank at `rows` -> [n, ...] on every rank."""
        whole = part.new_zeros(n, *part.shape[1:])
        whole[rows] = part
        return self.sum(whole)

    def reduce_scatter(self, bank: Tensor):
        """Begin to sum [world_size * m, ...] over ranks. Return (this rank's m entries, a function that waits)."""
        if self.world_size == 1:
            return bank, lambda: None
        shard = bank.new_empty(bank.shape[0] // self.world_size, *bank.shape[1:])
        return shard, REDUCE_SCATTER(shard, bank, async_op=True).wait

    def all_gather(self, shard: Tensor):
        """Begin to join [m, ...] of each rank. Return ([world_size * m, ...], a function that waits)."""
        if self.world_size == 1:
            return shard, lambda: None
        bank = shard.new_empty(shard.shape[0] * self.world_size, *shard.shape[1:])
        return bank, ALL_GATHER(bank, shard.contiguous(), async_op=True).wait

    def close(self) -> None:
        if c10d.is_available() and c10d.is_initialized():
            c10d.barrier()  # no rank takes its sockets away while another still uses them
            c10d.destroy_process_group()


def open_dist(c: Config) -> Dist:
    """Join the ranks that torchrun started, or be the only one. Raise InputError where the device does not exist."""
    with refusing("RANK, WORLD_SIZE, LOCAL_RANK: allowed are those of torchrun, or none"):
        names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
        rank, world_size, local_rank = (int(os.environ.get(x, n)) for x, n in names)
        if not 0 <= rank < world_size or world_size > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise ValueError(f"rank {rank} of {world_size}")
    if world_size > 1 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no rank outlives torchrun
    trains_full_size = c.device == "auto" and c.phase != "eval" and not c.preset  # weeks on a CPU
    if not torch.cuda.is_available() and (c.device == "cuda" or trains_full_size):
        with refusing(f"DEVICE={c.device}: no GPU can be used; allowed here are DEVICE=cpu, or a PRESET for its sizes"):
            torch.cuda.init()  # tells why
            raise RuntimeError("the driver shows no device")
    device, backend = None, "gloo"
    if c.device != "cpu" and torch.cuda.is_available():
        if local_rank >= (n := torch.cuda.device_count()):
            raise InputError(f"nproc_per_node: process {local_rank} has no CUDA device; allowed are {n} a node")
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch._dynamo.config.recompile_limit = 64  # a graph for each batch shape, with and without gradients
    if world_size > 1:
        c10d.init_process_group(backend, device_id=device, timeout=datetime.timedelta(seconds=c.dist_timeout_seconds))
    return Dist(rank, world_size, device or "cpu")


def activation_dtype(c: Config, device: torch.device) -> torch.dtype:
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if c.dtype == "auto" else c.dtype)


def compiles(c: Config, device: torch.device) -> bool:
    return c.torch_compile and device.type == "cuda"


def compiled(function, c: Config, device: torch.device):
    """Return a model or function as it should be called."""
    return torch.compile(function, dynamic=False, fullgraph=True) if compiles(c, device) else function


def gradient(p: nn.Parameter) -> Tensor:
    """Return the gradient, zeros where no backward pass has reached the parameter."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def open_log(c: Config, dist: Dist, created: list[Path]) -> None:
    """Create every file that the run will write, and log to screen and file; on the main rank. Raise InputError."""
    paths = [f"{c.log_dir}/{c.run_id}.txt", f"{c.log_dir}/{c.run_id}.json", c.scores_path]
    paths = list(map(Path, filter(None, paths if c.phase == "eval" else [*paths, c.artifact_path])))
    if not dist.is_main:
        return
    for path in paths:
        if path.exists():
            raise InputError(f"RUN_ID={c.run_id}: {path} exists and would be overwritten; choose another name")
    for path in paths:
        with refusing(f"{path}: allowed is a folder that can be written"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)  # of two runs that begin together only one may have it
            created.append(path)
    logging.raiseExceptions = False  # a full disk or a closed screen ends no run
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("\033[K%(message)s" if sys.stdout.isatty() else None))  # over a live line
    log.setLevel(logging.INFO)
    log.addHandler(screen)
    log.addHandler(logging.FileHandler(paths[0], encoding="utf-8"))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all. Raise InputError where it cannot be, and name the copy that is kept."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        kept = Path(tempfile.mkdtemp(), path.name)
        kept.write_bytes(data)
        raise InputError(f"{path} cannot be written ({error.strerror}): a copy is kept in {kept}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class Clock:
    """Seconds that count against a budget, by the slowest rank."""

    def __init__(self, dist: Dist):
        self.dist, self.started = dist, time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far, after all that the device was given."""
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize()
        return self.dist.max(time.perf_counter() - self.started)

    def show(self, what: str, done: int, n: int) -> None:
        """Show the speed and the time left on a terminal, until the next line takes their place."""
        if log.handlers and log.handlers[0].stream is sys.stdout and sys.stdout.isatty():
            pace = (time.perf_counter() - self.started) / done
            print(f"\033[K{what} {1 / pace:.0f} tokens/s, {(n - done) * pace:.0f} s left", end="\r", flush=True)


# ==================== Data ============================================================================================
# Shards of token ids, the bytes that a token stands for, and the order in which training and scoring read them.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
SHARD_NAME = re.compile(r".+_(train|val)_(\d+)\.bin")
CASE_MARKS = {"\ue101": 0, "\ue102": 0, "\ue103": 2}  # title, upper, literal of data/caseops.py: bytes that each adds
# Of a stream: tokens [n + 1] from position `start` on; inputs are all but the last of them, targets all but the first.
Chunk = namedtuple("Chunk", "start tokens inputs targets is_last")


def read_shard(path: str | Path) -> np.ndarray:
    """Return the memory-mapped token ids [n] of a shard: int32 [256] (magic, version, n, zeros), then uint16 [n]."""
    size, head = os.path.getsize(path) if os.path.isfile(path) else 0, 4 * SHARD_HEADER_INTS
    header = np.fromfile(path, dtype="<i4", count=3).tolist() if size > head else []
    if header != (allowed := [SHARD_MAGIC, SHARD_VERSION, (size - head) // 2]) or size % 2:
        raise InputError(f"shard {path}: header {header} of {size} bytes; allowed is {allowed} of {head} and 2 a token")
    return np.memmap(path, dtype="<u2", mode="r", offset=head)


def find_shards(c: Config, split: str) -> list[str]:
    """Return the paths of the `train` or `val` shards in DATA_PATH, by number. Raise InputError if one is missing."""
    names = filter(None, map(SHARD_NAME.fullmatch, os.listdir(c.data_path)))
    found = sorted((int(name[2]), name[0]) for name in names if name[1] == split)
    if not found:
        raise InputError(f"DATA_PATH={c.data_path}: no shard NAME_{split}_NUMBER.bin; data/prepare.py makes them")
    for i, (number, name) in enumerate(found):
        if number != i:
            raise InputError(f"DATA_PATH={c.data_path}: {name} is not number {i} of {split}; allowed is each once")
    return [os.path.join(c.data_path, name) for _, name in found]


def check_manifest(c: Config, **found) -> dict:
    """Return manifest.json of DATA_PATH, {} where there is none. Raise InputError where it states other values."""
    path = Path(c.data_path, "manifest.json")
    with refusing(f"{path}: not a JSON object; data/prepare.py writes one"):
        stated = json.loads(path.read_bytes()) if path.is_file() else {}
        other = [name for name, value in found.items() if stated.get(name, value) != value]
    for name in other:
        raise InputError(f"DATA_PATH={c.data_path}: {name} is {found[name]}; its manifest.json states {stated[name]}")
    return stated


def check_ids(tokens: np.ndarray, c: Config, where: str) -> np.ndarray:
    """Return the tokens as int64. Raise InputError if one is past the vocabulary."""
    if (largest := int(tokens.max())) >= c.vocab_size:
        raise InputError(f"{where}: token id {largest}; allowed is less than VOCAB_SIZE={c.vocab_size}")
    return tokens.astype(np.int64)


def case_marks(sp: sentencepiece.SentencePieceProcessor) -> dict[str, int]:
    """Return CASE_MARKS where they are symbols of the tokenizer, which have the score 0; {} where they are letters."""
    ids = [sp.piece_to_id(mark) for mark in CASE_MARKS]
    symbols = (sp.get_score(i) == 0 and not sp.is_unknown(i) and not sp.is_control(i) for i in ids)
    return CASE_MARKS if all(symbols) else {}


class Tokenizer:
    """A SentencePiece model, checked against the settings and the data, and the bytes of its tokens."""

    def __init__(self, c: Config, trained_with: str = ""):
        if not os.path.isdir(c.data_path):
            raise InputError(f"DATA_PATH={c.data_path}: no such folder; data/prepare.py makes one")
        path = c.tokenizer_path or os.path.join(c.data_path, "tokenizer.model")
        with refusing(f"TOKENIZER_PATH={path}: not a SentencePiece model"):
            self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        self.bos_id, ids = self.sp.bos_id(), range(self.sp.vocab_size())
        if len(ids) != c.vocab_size:
            raise InputError(f"TOKENIZER_PATH={path} has {len(ids)} pieces; VOCAB_SIZE={c.vocab_size} must match")
        if self.bos_id != c.bos_id:
            raise InputError(f"TOKENIZER_PATH={path} has BOS id {self.bos_id}; BOS_ID={c.bos_id} must match")
        if not any(map(self.sp.is_byte, ids)):
            raise InputError(f"TOKENIZER_PATH={path} has no byte pieces; without them text has no exact byte count")
        check_manifest(c, tokenizer_sha256=self.sha256)
        if trained_with not in ("", self.sha256):
            raise InputError(f"TOKENIZER_PATH={path}: sha256 is not the one that ARTIFACT_PATH={c.artifact_path} names")
        self.case_marks = case_marks(self.sp)
        # Int64 [V], right after a BOS and elsewhere: a decoder may drop a document's leading space.
        self.start_bytes = torch.tensor([self.added_bytes(i, at_start=True) for i in ids])
        self.inside_bytes = torch.tensor([self.added_bytes(i, at_start=False) for i in ids])

    def added_bytes(self, token: int, at_start: bool) -> int:
        """Return the number of UTF-8 bytes of a token by the tokenizer's decoder; a byte piece is one byte anywhere."""
        if self.sp.is_byte(token):
            return 1
        if self.sp.is_control(token) or self.sp.is_unknown(token) or self.sp.is_unused(token):
            return 0
        if (piece := self.sp.id_to_piece(token)) in self.case_marks:
            return self.case_marks[piece]
        text = self.sp.decode([token]) if at_start else piece.replace("\u2581", " ")
        return len(text.encode("utf-8"))

    def count_bytes(self, previous: Tensor, tokens: Tensor) -> Tensor:
        """Return the bytes that each token adds after the one before it: int64, shaped like `tokens`, on the CPU."""
        previous, tokens = previous.cpu(), tokens.cpu()
        return torch.where(previous == self.bos_id, self.start_bytes[tokens], self.inside_bytes[tokens])


class TrainLoader:
    """Training sequences in an order that visits each once before any twice, the same at every world size.

    The shards are cut into spans of TRAIN_SEQ_LEN tokens and a target. Sequence i is span (offset + i * stride) mod n.
    The last spans, a tenth of all at most, are held out, to choose averages and to fit the mixer on.
    """

    AVERAGING_TOKENS = 65_536

    def __init__(self, c: Config, dist: Dist):
        self.c, self.dist, self.seq_len, self.paths = c, dist, c.train_seq_len, find_shards(c, "train")
        self.shards = [read_shard(path) for path in self.paths]
        check_manifest(c, train_tokens=sum(map(len, self.shards)))
        self.ends = np.cumsum([(len(shard) - 1) // self.seq_len for shard in self.shards])
        if (spans := int(self.ends[-1])) < 2:
            raise InputError(f"TRAIN_SEQ_LEN={self.seq_len}: {c.data_path} has {spans} sequences; 2 are needed")
        tenth, calibration = max(1, spans // 10), -(-c.mixer_calibration_tokens // self.seq_len)
        self.averaging = min(-(-self.AVERAGING_TOKENS // self.seq_len), tenth)
        self.held_out = max(self.averaging, min(calibration, tenth))
        self.n = spans - self.held_out
        self.held = self.rows(range(self.n, self.n + self.held_out))  # in memory: the export must not need the files
        self.calibration_text = self.held[:, :-1].flatten()[: c.mixer_calibration_tokens].to(dist.device)
        self.offset = int(np.random.default_rng(c.seed).integers(self.n))
        strides = range(max(1, round(0.618 * self.n)), 2 * self.n + 2)
        self.stride = next(s for s in strides if math.gcd(s, self.n) == 1)  # near the golden ratio: spread

    def rows(self, spans) -> Tensor:
        """Return the token ids of the spans, int64 [n, TRAIN_SEQ_LEN + 1]; n may be 0."""
        found = np.empty((len(spans), self.seq_len + 1), dtype=np.int64)
        for row, span in zip(found, spans, strict=True):
            shard = int(np.searchsorted(self.ends, span, side="right"))
            start = (span - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
            row[:] = check_ids(self.shards[shard][start : start + self.seq_len + 1], self.c, self.paths[shard])
        return torch.from_numpy(found)

    def sequences(self, first: int, n: int) -> Tensor:
        """Return this rank's part of the run's sequences [first, first + n), on the device."""
        mine, device = self.dist.share(n, start=first), self.dist.device
        rows = self.rows([(self.offset + i * self.stride) % self.n for i in range(mine.start, mine.stop)])
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows

    def batch(self, step: int) -> Tensor:
        """Return this rank's sequences of an optimizer step. The host, which runs ahead, takes about 2 ms."""
        return self.sequences(step * self.c.batch_seqs, self.c.batch_seqs)


class Stream:
    """The validation text as one stream of tokens, scored left to right; its first token, a BOS, is given."""

    def __init__(self, c: Config, device: torch.device, tokenizer: Tokenizer):
        paths = find_shards(c, "val")
        tokens = np.concatenate([check_ids(read_shard(path), c, path) for path in paths])
        if len(tokens) <= c.eval_seq_len:
            raise InputError(f"EVAL_SEQ_LEN={c.eval_seq_len}: allowed is less than the {len(tokens)} validation tokens")
        if tokens[0] != c.bos_id:
            raise InputError(f"shard {paths[0]}: it begins with token {tokens[0]}; allowed is BOS_ID={c.bos_id}")
        n, tokens = c.val_tokens or len(tokens) - 1, torch.from_numpy(tokens)
        token_bytes = tokenizer.count_bytes(tokens[:-1], tokens[1:])
        counts = dict(val_documents=int((tokens == c.bos_id).sum()), val_bytes=int(token_bytes.sum()))
        self.has_manifest = "val_tokens" in check_manifest(c, val_tokens=len(tokens), **counts)
        self.whole, self.tokens, self.token_bytes = n >= len(tokens) - 1, tokens[: n + 1], token_bytes[:n]
        self.documents, self.device = int((self.tokens[:-1] == c.bos_id).sum()), device
        if not self.token_bytes.any():
            raise InputError(f"DATA_PATH={c.data_path}: the validation text has no byte; allowed is one or more")

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def chunks(self, chunk_tokens: int):
        """Yield the stream cut every `chunk_tokens` positions."""
        for start in range(0, len(self), chunk_tokens):
            tokens = self.tokens[start : start + chunk_tokens + 1].to(self.device)
            yield Chunk(start, tokens, tokens[:-1], tokens[1:], start + chunk_tokens >= len(self))


def windows(first: int, last: int, stride: int, seq_len: int, begins=(0,)) -> tuple[np.ndarray, ...]:
    """Return the windows that score the stream's positions [first, last), as arrays (start, low, high).

    Each text that begins at a position in `begins` has its own; by default, the stream is one text. Window k of a
    text reads its inputs [k * stride, k * stride + seq_len) and scores their last `stride` positions; window 0 scores
    all of its own. Every position is scored once. Stride = seq_len gives disjoint windows.
    """
    found = []
    for begin, end in zip(begins, [*begins[1:], last], strict=True):
        low, high = max(first, begin), min(last, end)
        if low < high:
            owner = [max(0, (position - begin - (seq_len - stride)) // stride) for position in (low, high - 1)]
            start = begin + np.arange(owner[0], owner[1] + 1) * stride
            lows = np.where(start == begin, begin, start + seq_len - stride)
            found.append((start, np.maximum(lows, low), np.minimum(start + seq_len, high)))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


# ==================== Kernels =========================================================================================
# The operations with more than one implementation, behind one name each. The plain one is the specification.

BACKENDS = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
SDPA_BACKENDS = dict(zip(("cudnn", "flash", "efficient", "math"), BACKENDS, strict=True))  # as `auto` tries them
VARLEN_GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.13
Kernels = namedtuple("Kernels", "attention fused", defaults=("math", ()))  # forms in use; these are the plain ones


def document_bounds(tokens: Tensor, bos_id: int, backend: str) -> Tensor:
    """Return what keeps attention over tokens [B, T] inside documents: a mask [B, 1, T, T], True where it may look.

    Kernels of packed sequences take their starts and the end, int32 [n + 1]: T // 128 + 1 a row, the last has the rest.
    """
    (n_rows, seq_len), begins, device = tokens.shape, tokens == bos_id, tokens.device
    if tokens.is_cuda and backend != "math":
        begins[:, 0] = True
        at = torch.where(begins, torch.arange(seq_len, device=device), seq_len).sort(dim=1).values
        at = at[:, : seq_len // 128 + 1] + seq_len * torch.arange(n_rows, device=device).unsqueeze(1)
        return F.pad(at.flatten(), (0, 1), value=n_rows * seq_len).int()
    document = begins.cumsum(1)
    return (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "math", bounds: Tensor | None = None) -> Tensor:
    """Return causal attention: q [B, T, H, D], grouped k and v [B, T, KV, D] -> [B, T, H, D], within the bounds."""
    if bounds is not None and bounds.dim() == 1:
        ends, packed = (bounds, bounds, q.shape[1], q.shape[1]), (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*packed, *ends, window_size=(-1, 0), **VARLEN_GQA).view_as(q)
    if backend == "flash3" and bounds is None:
        y = flash_attn_func(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bounds is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bounds, enable_gqa=True).transpose(1, 2)
    with sdpa_kernel(SDPA_BACKENDS[backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return the logits held within +-cap, as float32; a cap of 0 is none."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


def softcapped_nll(logits: Tensor, targets: Tensor, cap: float, fused: bool = False) -> Tensor:
    """Return the nll of targets [N] under softcap(logits [N, V]), float32. Fused, it keeps no logits in float32."""
    if fused:
        return SoftcappedNLL.apply(logits.contiguous(), targets.contiguous(), cap)
    return F.cross_entropy(softcap(logits, cap), targets, reduction="none")


def linear_leaky_square(x: Tensor, weight: Tensor, slope: float, fused: bool = False) -> Tensor:
    """Return leaky_relu(x W^T)^2: x [..., K], weight [N, K] -> [..., N]. Fused, the matmul kernel applies it."""
    if fused:
        y = LinearLeakySquare.apply(x.flatten(0, -2).contiguous(), weight.contiguous(), slope)
        return y.view(*x.shape[:-1], -1)
    return F.leaky_relu(F.linear(x, weight), slope).square()


jit = triton.jit if triton else lambda kernel: kernel
TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


@jit
def softcapped_nll_kernel(logits, targets, nll, slopes, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Write a row's nll and its slopes, (p - [target]) dz/dx; a program a row, which is one block of registers."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, inside, hit = row * V + column, column < V, column == tl.load(targets + row)
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    z = 2 * CAP * tl.sigmoid(2 * x / CAP) - CAP if CAP > 0 else x  # CAP * tanh(x / CAP)
    largest = tl.max(tl.where(inside, z, -1e30), 0)
    log_sum = largest + tl.log(tl.sum(tl.where(inside, tl.exp(z - largest), 0.0), 0))
    tl.store(nll + row, log_sum - tl.sum(tl.where(hit, z, 0.0), 0))
    slope = tl.exp(z - log_sum) - tl.where(hit, 1.0, 0.0)
    tl.store(slopes + at, slope * (1 - (z / CAP) * (z / CAP) if CAP > 0 else 1.0), mask=inside)


@jit
def linear_leaky_square_kernel(
    x, weight, product, squared, M, N, SLOPE: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a tile of x W^T, for the backward pass, and of its square; a program a tile."""
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


class SoftcappedNLL(torch.autograd.Function):
    """softcapped_nll by the kernel above, which leaves only a product to the backward pass."""

    @staticmethod
    def forward(ctx, logits, targets, cap):
        n, vocab_size = logits.shape
        assert vocab_size <= 2**14, "a larger row does not fit the registers"
        nll, slopes = torch.empty(n, device=logits.device), torch.empty_like(logits)
        block = 1 << (vocab_size - 1).bit_length()
        warps = min(32, max(4, block // 512))
        softcapped_nll_kernel[(n,)](logits, targets, nll, slopes, vocab_size, cap, block, num_warps=warps)
        ctx.save_for_backward(slopes)
        return nll

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad.unsqueeze(1).to(ctx.saved_tensors[0]), None, None


class LinearLeakySquare(torch.autograd.Function):
    """linear_leaky_square by the kernel above; the two products of the backward pass are plain ones."""

    @staticmethod
    def forward(ctx, x, weight, slope):
        (n_rows, inner), n_columns = x.shape, len(weight)
        product, squared = (torch.empty(n_rows, n_columns, dtype=x.dtype, device=x.device) for _ in range(2))
        grid = -(-n_columns // TILE["BLOCK_N"]), -(-n_rows // TILE["BLOCK_M"])
        linear_leaky_square_kernel[grid](x, weight, product, squared, n_rows, n_columns, slope, inner, **TILE)
        ctx.save_for_backward(x, weight, product)
        ctx.slope = slope
        return squared

    @staticmethod
    def backward(ctx, grad):
        x, weight, product = ctx.saved_tensors
        grad_product = grad * product * torch.where(product > 0, 2.0, 2 * ctx.slope**2).to(grad.dtype)
        return grad_product @ weight, grad_product.mT @ x, None


@functools.cache
@torch.enable_grad()  # also where the caller only predicts: what is chosen has to work both ways
def choose_kernels(c: Config, device: torch.device) -> Kernels:
    """Return ATTENTION and KERNELS, each checked once against its plain form and replaced where it fails."""
    generator, dtype, n = torch.Generator().manual_seed(0), activation_dtype(c, device), 256
    seq_len, head_dim = min(c.train_seq_len, 4096), c.model_dim // c.num_heads
    shapes = [(1, seq_len, heads, head_dim) for heads in (c.num_heads, c.kv_heads, c.kv_heads)]
    shapes += [(n, c.vocab_size), (n, c.model_dim), (n, c.model_dim)]
    *qkv, logits, x, weight = (torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes)
    targets = torch.randint(c.vocab_size, (n,), generator=generator).to(device)
    loss = functools.partial(softcapped_nll, targets=targets, cap=c.logit_softcap)
    backend, inputs = choose_attention(qkv, c), dict(loss=[logits], mlp=[x, weight])
    runs_triton = triton and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    forms = dict(loss=loss, mlp=functools.partial(linear_leaky_square, slope=c.leaky_slope)) if runs_triton else {}
    fused = [k for k in forms if k in c.kernels and agrees(f"KERNELS={k}", forms[k], dict(fused=True), inputs[k], c)]
    return Kernels(backend, tuple(fused))


def choose_attention(qkv: list[Tensor], c: Config) -> str:
    """Return the first form that agrees with `math` on such inputs. Raise InputError where none fits the device."""
    device, tries = qkv[0].device, [c.attention]
    if c.attention == "auto":
        tries = ["flash3", *SDPA_BACKENDS] if device.type == "cuda" else ["flash", "math"]
    if "flash3" in tries and flash_attn_func is None:
        log.info("kernel_fallback:ATTENTION=flash3 is not used (flash_attn_interface is not installed)")
        tries.remove("flash3")
    bounds = dict.fromkeys([*tries, "math"])
    if c.doc_isolated:
        tokens = torch.full(qkv[0].shape[:2], c.bos_id + 1, device=device)
        tokens[:, [2, len(tokens[0]) // 3, -1]] = c.bos_id
        bounds = {b: document_bounds(tokens, c.bos_id, b) for b in bounds}
    plain = functools.partial(attention, bounds=bounds["math"])
    forms = ((b, dict(backend=b, bounds=bounds[b])) for b in tries)
    backend = next((b for b, form in forms if agrees(f"ATTENTION={b}", plain, form, qkv, c)), "math")
    if backend == "math" and device.type == "cuda" and c.phase != "eval":
        passes = c.num_layers + c.num_loops * (c.loop_end - c.loop_start + 1)
        needed = 6 * passes * c.num_heads * c.micro_batch_tokens * c.train_seq_len  # six bytes an attention logit
        if needed > (memory := torch.cuda.get_device_properties(device).total_memory):
            asked = f"ATTENTION=math needs {needed >> 30} GiB at MICRO_BATCH_TOKENS={c.micro_batch_tokens}"
            raise InputError(f"{asked}; allowed are {memory >> 30} GiB, or another form that works here")
    return backend


def agrees(name: str, form, options: dict, inputs: list[Tensor], c: Config) -> bool:
    """Return whether the options, compiled, change value and gradients by no more than rounding. Log where they do."""
    try:
        results = [f(*inputs) for f in (compiled(functools.partial(form, **options), c, inputs[0].device), form)]
        found, expected = ([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)] for y in results)
        errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)]
        fault = "" if all(error <= 2e-2 for error in errors) else f"differs by {max(errors):.1e}"
    except Exception as error:  # whatever a library raises for a device, a type or a shape that it does not take
        fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault:
        log.info(f"kernel_fallback:{name} is not used ({fault})")
    return not fault


# ==================== Model ===========================================================================================
# Blocks and GPT. One forward, tokens in and logits out, serves training, scoring and test-time training.


def parameter(role: str, *shape: int, init: str | float | Tensor = "zeros") -> nn.Parameter:
    """Return a float32 parameter tagged with what the optimizers and the quantizers do with it.

    role: `matrix` (Muon, quantized), `projection` (AdamW, quantized), `table` (AdamW at the embeddings' rate,
    quantized) or `scalar` (AdamW, kept in float16). init: "zeros", "orthogonal", a standard deviation or the values.
    """
    p = nn.Parameter(init.clone() if isinstance(init, Tensor) else torch.zeros(shape))
    p.role, p.init = role, init
    return p


def rms_norm(x: Tensor) -> Tensor:
    """Return x divided by its root mean square over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],))


def shift(x: Tensor) -> Tensor:
    """Return x moved one position later along dimension 1, zeros first: position t gets what t - 1 held."""
    return F.pad(x[:, :-1], (0, 0) * (x.dim() - 2) + (1, 0))


class Linear(nn.Module):
    """A linear map without bias, or `apply` with its weight. The float32 weight is cast to the activations' type."""

    def __init__(self, in_features: int, out_features: int, role="matrix", init="orthogonal", apply=F.linear):
        super().__init__()
        self.weight, self.apply_weight = parameter(role, out_features, in_features, init=init), apply
        self.adapter: list[Tensor] | None = None  # low-rank maps of LoRA, arXiv 2106.09685: [B, r, in] and [B, out, r]

    def forward(self, x: Tensor) -> Tensor:
        y = self.apply_weight(x, self.weight.to(x.dtype))
        return y if self.adapter is None else y + x @ self.adapter[0].mT.to(x.dtype) @ self.adapter[1].mT.to(x.dtype)


def table(rows: int, dim: int, init: str | float) -> nn.Embedding:
    """Return an embedding: rows looked up by token or by hash."""
    embedding = nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))
    embedding.weight = parameter("table", rows, dim, init=init)
    return embedding


class BigramEmbedding(nn.Module):
    """A hashed embedding of (token, token before it); the last row is for a BOS and for a window's first token."""

    def __init__(self, c: Config):
        super().__init__()
        self.rows, self.bos_id = c.bigram_vocab_size, c.bos_id
        self.emb = table(c.bigram_vocab_size, c.bigram_dim, init="zeros")
        self.proj = Linear(c.bigram_dim, c.model_dim, role="projection")
        self.scale = parameter("scalar", init=torch.tensor(0.05))

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        hashed = torch.bitwise_xor(36313 * tokens, 27191 * shift(tokens)) % (self.rows - 1)  # as in PR #162
        alone = tokens == self.bos_id
        alone[:, 0] = True
        return self.scale.to(dtype) * self.proj(self.emb(hashed.masked_fill(alone, self.rows - 1)).to(dtype))


class SmearGate(nn.Module):
    """Adds a gated part of the previous token's embedding (modded-nanogpt), except at a BOS (PR #1855)."""

    def __init__(self, c: Config):
        super().__init__()
        self.bos_id, self.gate, self.scale = c.bos_id, parameter("scalar", 12), parameter("scalar")

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = torch.sigmoid(x[..., : len(self.gate)].float() @ self.gate).masked_fill(tokens == self.bos_id, 0.0)
        return x + (self.scale * gate).unsqueeze(-1).to(x.dtype) * shift(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, H, D] with its first 2R channels rotated by cos, sin [T, R]; the others pass."""
    half, cos, sin = cos.shape[-1], cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return y [B, T, H, D] less its part along the position's own value [B, T, KV, D] (exclusive, PR #265)."""
    batch, seq_len, heads, head_dim = y.shape
    direction = F.normalize(v, dim=-1).unsqueeze(3)
    grouped = y.reshape(batch, seq_len, v.shape[2], heads // v.shape[2], head_dim)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).view_as(y)


class Attention(nn.Module):
    """Causal grouped-query attention: QK norm, partial rotary embedding, value residual, exclusive self-attention."""

    def __init__(self, c: Config, layer: int, backend: str):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.kv_heads, c.model_dim // c.num_heads
        self.backend, kv_dim = backend, self.kv_heads * self.head_dim
        self.q, self.k, self.v = (Linear(c.model_dim, n) for n in (c.model_dim, kv_dim, kv_dim))
        self.out = Linear(c.model_dim, c.model_dim, init="zeros")
        self.q_gain = parameter("scalar", init=torch.full((c.num_heads,), c.qk_gain_init))
        # ResFormer (arXiv 2410.17897): later layers attend to a mix of their own values and the first layer's.
        self.value_mix = parameter("scalar", init=torch.tensor([0.5, 0.5])) if c.value_residual and layer else None
        self.exclusive = layer >= c.num_layers - c.xsa_last_n
        self.gate = parameter("scalar", c.num_heads, c.gate_window) if c.gate_window else None  # PR #1787
        self.past: deque = deque()  # by pass, earlier keys, not rotated, and values: taken out, put back longer

    def forward(self, x: Tensor, rotary: Tensor, v_first: Tensor | None, v_extra: Tensor | None, bounds: Tensor | None):
        """Return (y [B, T, C], v [B, T, KV, D] of this layer before any mixing) for x [B, T, C]."""
        batch, seq_len, _ = x.shape
        q = self.q(x).view(batch, seq_len, self.heads, self.head_dim)
        k, v_own = (f(x).view(batch, seq_len, self.kv_heads, self.head_dim) for f in (self.k, self.v))
        v = v_own if v_extra is None else v_own + v_extra.view_as(v_own)
        if self.value_mix is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * v_first + mix[1] * v
        q, k, own = rms_norm(q), rms_norm(k), v
        if self.past:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.past.popleft(), (k, v), strict=True))
            self.past.append((k, v))
        q, k = (rotate(x, *rotary[:, k.shape[1] - n : k.shape[1]]) for x, n in ((q, seq_len), (k, k.shape[1])))
        y = attention(q * self.q_gain.to(q.dtype)[:, None], k, v, self.backend, bounds)
        y = remove_own_value(y, own) if self.exclusive else y
        if self.gate is not None:
            y = y * torch.sigmoid(0.5 * x[..., : self.gate.shape[1]] @ self.gate.mT.to(x.dtype)).unsqueeze(-1)
        return self.out(y.reshape(batch, seq_len, -1)), v_own


class Block(nn.Module):
    """Attention, then MLP, each on the normed input; the stem's output x0 is mixed in first.

    Where there are two lanes, attention reads x and the MLP reads `lane`; both results go to both (PR #1529).
    """

    def __init__(self, c: Config, layer: int, kernels: Kernels):
        super().__init__()
        hidden, ones = round(c.mlp_mult * c.model_dim), torch.ones(c.model_dim)
        self.attn = Attention(c, layer, kernels.attention)
        activate = functools.partial(linear_leaky_square, slope=c.leaky_slope, fused="mlp" in kernels.fused)
        self.up = Linear(c.model_dim, hidden, apply=activate)
        self.down = Linear(hidden, c.model_dim, init="zeros")
        self.resid_mix = parameter("scalar", init=torch.stack([ones, 0 * ones]))
        self.attn_scale, self.mlp_scale = (parameter("scalar", init=ones) for _ in range(2))
        self.input_scale = 1 / math.sqrt(layer + 1) if c.layer_scale else 1.0
        routes = torch.tensor([[1.1, 1.1], [1.0, 1.0], [1.0, 1.0]])  # by lane: what it keeps, of attention, of the MLP
        self.routes = parameter("scalar", init=routes) if c.lanes and layer >= c.lanes_start_layer else None

    def forward(self, x: Tensor, x0: Tensor, lane: Tensor | None, rotary: Tensor, v_first, v_extra, bounds):
        """Return (x [B, T, C], lane, v [B, T, KV, D]) for x, x0 and lane [B, T, C]; without lanes, lane is None."""
        mix, attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        mixed = mix[0] * x + mix[1] * x0
        y, v = self.attn(rms_norm(mixed) * self.input_scale, rotary, v_first, v_extra, bounds)
        y = attn_scale * y
        read = mixed + y if lane is None else lane
        z = mlp_scale * self.down(self.up(rms_norm(read) * self.input_scale))
        if lane is None:
            return read + z, None, v
        keep, of_attention, of_mlp = self.routes.to(x.dtype)
        x, lane = (keep[i] * old + of_attention[i] * y + of_mlp[i] * z for i, old in enumerate((x, lane)))
        return x, lane, v


class GPT(nn.Module):
    """The transformer. All parameters are float32; activations have the type `dtype`."""

    def __init__(self, c: Config, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None):
        super().__init__()
        kernels = kernels or Kernels()
        self.dtype, self.logit_softcap, self.fused_loss = dtype, c.logit_softcap, "loss" in kernels.fused
        self.bos_id, self.isolated, self.backend = c.bos_id, c.doc_isolated, kernels.attention
        self.tok_emb = table(c.vocab_size, c.model_dim, init=c.tied_embed_init_std)
        self.bigram = BigramEmbedding(c) if c.bigram_vocab_size else None
        self.smear, self.ve_layers = SmearGate(c) if c.smear_gate else None, c.ve_layers
        if c.ve_layers:
            kv_dim, self.value_emb = c.kv_heads * c.model_dim // c.num_heads, table(c.vocab_size, c.ve_dim, init=0.01)
            self.value_proj = Linear(c.ve_dim, kv_dim, role="projection", init="zeros")
            self.value_scale = parameter("scalar", init=torch.full((len(c.ve_layers),), 0.1))
        self.blocks = nn.ModuleList(Block(c, layer, kernels) for layer in range(c.num_layers))
        layers, end = tuple(range(c.num_layers)), c.loop_end + 1
        self.plain, self.looped = layers, layers[:end] + layers[c.loop_start : end] * c.num_loops + layers[end:]
        self.lanes_start = c.lanes_start_layer if c.lanes else None
        self.passes = self.looped  # the layers in their order; training begins with the plain one (PR #1394)
        # U-Net: the second half of the passes takes back what the first half put out, latest first.
        n_skips = len(self.looped) // 2 if c.unet_skips else 0
        self.skip_scale = parameter("scalar", init=torch.ones(n_skips, c.model_dim))
        self.skip_gate = parameter("scalar", n_skips, c.model_dim) if c.skip_gates_enabled else None
        self.head = None if c.tie_embeddings else Linear(c.model_dim, c.vocab_size, role="table", init="zeros")
        frequency = c.rope_base ** -(torch.arange(c.rope_dims // 2).float() / max(1, c.rope_dims // 2))
        angle = torch.outer(torch.arange(max(c.train_seq_len, c.eval_seq_len)).float(), frequency)
        self.register_buffer("rotary", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Draw what is random from one generator, alike on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if isinstance(p.init, float):
                nn.init.normal_(p, std=p.init, generator=generator)
            elif isinstance(p.init, str) and p.init == "orthogonal":
                nn.init.orthogonal_(p, generator=generator)
        return self

    def forward(self, tokens: Tensor, targets: Tensor | None = None, keep=0, mask: Tensor | None = None) -> Tensor:
        """Return float32 logits [B, T, V] after tokens [B, T] (the last `keep` of them), or the targets' nll [B, T].

        Under a mask [B, 1, n, S + n], the last n tokens attend to Attention.past and themselves; the others precede.
        """
        assert tokens.shape[1] <= self.rotary.shape[1], "longer than TRAIN_SEQ_LEN and EVAL_SEQ_LEN"
        x = self.tok_emb(tokens).to(self.dtype)
        x = x if self.bigram is None else x + self.bigram(tokens, self.dtype)
        x = x if self.smear is None else self.smear(x, tokens)
        first = 0 if mask is None else tokens.shape[1] - mask.shape[2]
        x = x0 = rms_norm(x[:, first:])
        lane, v_first, v_extra, skips = None, None, {}, []
        bounds = document_bounds(tokens, self.bos_id, self.backend) if self.isolated and mask is None else mask
        if self.ve_layers:
            value = self.value_proj(self.value_emb(tokens[:, first:]).to(x.dtype))
            v_extra = {n: s.to(x.dtype) * value for n, s in zip(self.ve_layers, self.value_scale, strict=True)}
        n_skips = min(len(self.skip_scale), len(self.passes) // 2)
        for position, layer in enumerate(self.passes):
            lane = x if layer == self.lanes_start else lane
            if position >= n_skips and skips:
                i = position + len(self.skip_scale) - 2 * n_skips  # a pair of layers keeps its own when loops begin
                skip, gate = self.skip_scale[i].to(x.dtype) * skips.pop(), self.skip_gate
                x = x + skip if gate is None else torch.lerp(skip, x, torch.sigmoid(gate[i]).to(x.dtype))
            x, lane, v = self.blocks[layer](x, x0, lane, self.rotary, v_first, v_extra.get(layer), bounds)
            v_first = v if v_first is None else v_first
            if position < n_skips:
                skips.append(x)
        x = rms_norm(x if lane is None else (x + lane) / 2)[:, -keep:]  # all positions where keep is 0
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.head is None else self.head(x)
        if targets is None:
            return softcap(logits, self.logit_softcap)
        nll = softcapped_nll(logits.flatten(0, 1), targets.flatten(), self.logit_softcap, self.fused_loss)
        return nll.view(targets.shape)


def make_model(c: Config, device: torch.device) -> GPT:
    """Return the model that runs here, all its parameters as the constructors leave them."""
    return GPT(c, activation_dtype(c, device), choose_kernels(c, device))


def by_role(model: GPT, *roles: str) -> dict[str, nn.Parameter]:
    """Return the parameters that have one of the roles, by name."""
    return {name: p for name, p in model.named_parameters() if p.role in roles}


def quantized_parameters(model: GPT) -> dict[str, nn.Parameter]:
    """Return the parameters that the artifact stores as integer codes."""
    return by_role(model, "matrix", "projection", "table")


@contextmanager
def weights_replaced(params: list[nn.Parameter], replacements: list[Tensor]):
    """Run with other values in the parameters and put their own back afterwards."""
    params = [p.detach() for p in params]
    own = [p.clone() for p in params]
    torch._foreach_copy_(params, [x.detach() for x in replacements])
    try:
        yield
    finally:
        torch._foreach_copy_(params, own)


# ==================== Optimizers ======================================================================================
# Muon on the blocks' matrices, AdamW on the rest, and the running averages of the weights.


# x <- a x + (b x x^T + c (x x^T)^2) x, with one triple for all iterations (Keller Jordan, Muon, 2024) or one for each,
# the last going on (Polar Express, arXiv 2505.16932, PR #1787).
JORDAN = ((3.4445, -4.7750, 2.0315),)
POLAR = (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606)
POLAR += (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324)


def zeropower(bank: Tensor, steps: int, dtype: torch.dtype, triples=JORDAN) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrices of [n, rows, cols], in `dtype`: singular values near 1."""
    x = (bank.mT if (tall := bank.shape[-2] > bank.shape[-1]) else bank).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for i in range(steps):
        (a, b, c), gram = triples[min(i, len(triples) - 1)], x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def even_rows(update: Tensor, state: dict, beta2: float) -> Tensor:
    """Return [n, rows, cols]: rows over their running size, matrices at their norm (NorMuon, arXiv 2510.05491)."""
    x = update.float()
    square = x.square().mean(-1, keepdim=True)
    state["row_squares"] = running = square.lerp(state.get("row_squares", torch.zeros_like(square)), beta2)
    even = x * running.clamp(min=1e-12).rsqrt()
    old, new = (y.norm(dim=(-2, -1), keepdim=True) for y in (x, even))
    return (even * (old / new.clamp(min=1e-12))).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, for banks of matrices of one shape (Parallel Muon, PR #399).

    `reduce` reduce-scatters the gradients; `step` orthogonalizes this rank's shard, of which alone it holds the
    momentum, and gathers the updates. A bank's message is on its way while the next, smaller one is computed.
    """

    def __init__(self, params, lr: float, momentum: float, c: Config, dist: Dist):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=c.muon_wd))
        self.c, self.dist, self.dtype = c, dist, activation_dtype(c, dist.device)
        params = self.param_groups[0]["params"]
        shapes = sorted({p.shape for p in params}, key=lambda shape: (-shape.numel(), shape))
        self.banks = [[p for p in params if p.shape == shape] for shape in shapes]
        self.triples = POLAR if c.polar_express else JORDAN

    @torch.no_grad()
    def reduce(self) -> list:
        """Begin to sum the gradients over ranks. Return by bank (this rank's shard, a function that waits)."""
        found = []
        for bank in self.banks:
            padding = [torch.zeros_like(bank[0])] * (-len(bank) % self.dist.world_size)
            found.append(self.dist.reduce_scatter(torch.stack([gradient(p) for p in bank] + padding)))
        self.shards = [shard for shard, _ in found]
        return found

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Take in the reduced shards, orthogonalize them and begin to gather each bank's update."""
        momentum, self.gathered = self.param_groups[0]["momentum"], []
        for bank, shard in zip(self.banks, self.shards, strict=True):
            state = self.state[bank[0]]  # keyed by parameter: the bank's first
            state["momentum_shard"] = buffer = momentum * state.get("momentum_shard", 0.0) + shard
            update = shard.add(buffer, alpha=momentum)  # Nesterov's
            update = F.normalize(update, dim=-1) if self.c.muon_row_norm else update
            update = zeropower(update, self.c.muon_backend_steps, self.dtype, self.triples)
            update = even_rows(update, state, self.c.muon_row_beta2) if self.c.muon_row_beta2 else update
            self.gathered.append(self.dist.all_gather(update))

    @torch.no_grad()
    def apply(self) -> None:
        """Wait for the updates, decay the matrices and move them."""
        group = self.param_groups[0]
        for bank, (update, wait) in zip(self.banks, self.gathered, strict=True):
            wait()
            (rows, cols), moves = bank[0].shape, update[: len(bank)].float().unbind()  # without the padding
            torch._foreach_mul_(bank, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(bank, moves, alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))


def clip_gradients(grads: list[Tensor], norm: Tensor, limit: float) -> Tensor:
    """Scale gradients down to a joint norm of `limit` (0 = none); zero them and return True if it is not finite."""
    finite, scale = norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    for grad in grads:
        grad.mul_(scale).masked_fill_(~finite, 0.0)
    return ~finite


class Optimizers:
    """Every parameter in exactly one of three groups: matrices (Muon), tables and the rest (AdamW)."""

    def __init__(self, model: GPT, c: Config, dist: Dist):
        self.c, self.dist = c, dist
        self.muon = Muon(by_role(model, "matrix").values(), c.matrix_lr, c.muon_momentum, c, dist)
        tables, rest = (list(by_role(model, *roles).values()) for roles in (["table"], ["projection", "scalar"]))
        groups = [dict(params=tables, base_lr=c.tied_embed_lr), dict(params=rest, base_lr=c.scalar_lr)]
        options = dict(eps=c.adam_eps, weight_decay=c.adam_wd, fused=dist.device.type == "cuda")
        self.adam = torch.optim.AdamW(groups, 0.0, (c.beta1, c.beta2), **options)
        self.small = tables + rest
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device)  # steps on a gradient that was not finite

    @torch.no_grad()
    def step(self, now: Schedule) -> None:
        """Sum the gradients over ranks, clip by their joint norm, update as scheduled, and clear them."""
        self.muon.param_groups[0].update(lr=now.lr_scale * self.c.matrix_lr, momentum=now.muon_momentum)
        for group in self.adam.param_groups:
            group["lr"] = now.lr_scale * group["base_lr"]
        reduced, small = self.muon.reduce(), self.dist.sum_gradients(self.small)
        for _, wait in reduced:
            wait()
        square = self.dist.sum(sum(shard.square().sum() for shard in self.muon.shards)) + small.square().sum()
        # A norm that is not finite is a rare fault of cuDNN's attention backward.
        self.skipped += clip_gradients([*self.muon.shards, small], square.sqrt(), self.c.grad_clip_norm)
        self.muon.step()
        self.adam.step()  # while Muon's updates are gathered
        self.muon.apply()
        self.muon.zero_grad()
        self.adam.zero_grad()


class WeightAverages:
    """EMA over all steps and SWA late in the warmdown, in float32: bfloat16 averages lose the updates (PR #2095)."""

    def __init__(self, model: GPT, c: Config):
        self.params, self.c = [p.detach() for p in model.parameters()], c  # the weights themselves, without gradient
        self.ema = [p.clone() for p in self.params]
        self.swa, self.swa_count = [torch.zeros_like(p) for p in self.params], 0

    def update(self, step: int, late: bool) -> None:
        """Take in the weights after a step. The EMA decays faster at first, or a short run's is mostly its start."""
        torch._foreach_lerp_(self.ema, self.params, 1 - min(self.c.ema_decay, (1 + step) / (10 + step)))
        if late and step % self.c.swa_every == 0:
            self.swa_count += 1
            torch._foreach_lerp_(self.swa, self.params, 1 / self.swa_count)

    def candidates(self) -> dict[str, list[Tensor]]:
        """Return the weights to choose from: the last ones, each average, and the average of the averages."""
        found = {"last": [p.clone() for p in self.params], "ema": self.ema}
        if self.swa_count:
            found |= {"swa": self.swa, "ema+swa": [(e + s) / 2 for e, s in zip(self.ema, self.swa, strict=True)]}
        return found


# ==================== Training ========================================================================================
# The schedule, the loss with its three additions (complementary weights, CROWN-Q, late QAT), and the loop.

# Of one step.
Schedule = namedtuple("Schedule", "lr_scale muon_momentum swa crown_q late_qat looped", defaults=(False,) * 4)


def schedule(step: int, total: int, c: Config) -> Schedule:
    """Return rates, momentum and switches of a step out of `total`; a run that the clock ends has shorter ramps."""
    limits = (0.1, 0.6, 0.25) if total < c.iterations else (math.inf,) * 3  # parts of the run
    lengths = c.lr_warmup_iters, c.warmdown_iters, c.muon_momentum_warmup_steps
    warmup, warmdown, momentum_warmup = (min(n, part * total) for n, part in zip(lengths, limits, strict=True))
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    falling = min(1.0, (total - step) / warmdown) if warmdown else 1.0
    reached = min(1.0, step / momentum_warmup) if momentum_warmup else 1.0
    momentum = c.muon_momentum_warmup_start + reached * (c.muon_momentum - c.muon_momentum_warmup_start)
    swa, crown_q = falling < c.swa_start_scale, c.crown_q_lambda > 0 and falling < 1.0
    late_qat, looped = falling < c.late_qat_threshold, c.num_loops > 0 and step >= c.enable_looping_at * total
    return Schedule(rising * max(falling, c.min_lr), momentum, swa, crown_q, late_qat, looped)


def complement_weights(loader: TrainLoader, c: Config) -> Tensor | None:
    """Return loss weights [V, V] for (token before, target): max(0.1, 1 - alpha * c(x, y) / (C(x) + 1)), PR #803."""
    if not c.complement_alpha:
        return None
    tokens = check_ids(loader.shards[0][: c.complement_tokens], c, loader.paths[0])
    tokens, n = torch.from_numpy(tokens).to(loader.dist.device), c.vocab_size
    pairs = torch.bincount(n * tokens[:-1] + tokens[1:], minlength=n**2).view(n, n).float()
    return (1 - c.complement_alpha * pairs / (pairs.sum(1, keepdim=True) + 1)).clamp(min=0.1)


def crown_q_penalty(banks: list[list[Tensor]], bits: int) -> Tensor:
    """Return the sum over rows of mean(w^2) * delta^2 / 12 with delta = row max / qmax (CROWN-Q, PR #693)."""
    # Rounding a row to multiples of delta costs an error of variance delta^2 / 12. The gradient goes through delta too.
    qmax = 2 ** (bits - 1) - 1
    return sum((w.square().mean(-1) * (w.abs().amax(-1) / qmax).square() / 12).sum() for w in map(torch.stack, banks))


def late_qat(model: GPT, log2_step: float, c: Config):
    """Return a context that rounds each quantized parameter to its nearest code; the compiled graph does not change."""
    # Applied to the float weights, a gradient taken here is the straight-through estimator (Bengio et al. 2013).
    kinds, rounded = defaultdict(list), []
    for p in quantized_parameters(model).values():
        kinds[p.role, p.shape[1]].append(p)
    for (role, _), ps in kinds.items():  # all rows of a kind at once: on a GPU, launches take the time
        w = torch.cat([p.detach() for p in ps])
        steps = (grid := int6_grid(w, role, None, log2_step, c)).steps()
        rounded += (grid.nearest(w, steps) * steps).split([len(p) for p in ps])
    return weights_replaced(sum(kinds.values(), []), rounded)


def micro_batches(batch: Tensor, c: Config):
    """Return a rank's sequences [n, T + 1] as pairs of inputs and targets that fit one forward pass."""
    return [(x[:, :-1], x[:, 1:]) for x in batch.split(max(1, c.micro_batch_tokens // c.train_seq_len)) if len(x)]


def accumulate_gradients(called, batch: Tensor, weights: Tensor | None, c: Config) -> Tensor:
    """Run backward over this rank's part of a batch [n, T + 1], in micro batches. Return the sum of its nll."""
    total = torch.zeros((), device=batch.device)
    for inputs, targets in micro_batches(batch, c):
        nll = called(inputs, targets)
        loss = nll if weights is None else nll * weights[inputs, targets]
        (loss.sum() / c.batch_tokens).backward()  # of all ranks' tokens: their gradients only need to be added
        total += nll.detach().sum()
    return total


def warm_up(model: GPT, called, c: Config, dist: Dist) -> None:
    """Compile all that a step runs, on synthetic tokens, and leave the weights as they were."""
    params, optimizers = list(model.parameters()), Optimizers(model, c, dist)
    generator, mine = torch.Generator().manual_seed(c.seed), dist.share(c.batch_seqs)
    with weights_replaced(params, params):  # by themselves, to have them restored
        for step in range(c.warmup_steps):
            shape = (mine.stop - mine.start, c.train_seq_len + 1)
            batch = torch.randint(c.vocab_size, shape, generator=generator).to(dist.device)
            for passes in (model.plain, model.looped)[: 1 + c.num_loops]:
                model.passes = passes
                accumulate_gradients(called, batch, None, c)
            optimizers.step(Schedule(1.0, c.muon_momentum))
            log.info(f"warmup_step:{step + 1}/{c.warmup_steps}")


class StepClock(Clock):
    """The clock of training, and how many steps it allows."""

    def __init__(self, c: Config, dist: Dist):
        super().__init__(dist)
        self.c, self.measured = c, 0.0  # seconds when `total` was last estimated
        self.total = c.iterations  # or fewer, where the budget ends the run
        self.budget = max(0.0, c.max_wallclock_seconds - c.reserve_seconds)  # 0 = no cap

    def restore(self, step: int, elapsed: float) -> None:
        """Go on from the seconds that a checkpoint kept, and estimate the total by its average pace."""
        self.started, self.measured = time.perf_counter() - elapsed, elapsed
        if self.budget:
            self.total = min(self.total, max(step, int(step * self.budget / elapsed)))

    def update_total(self, step: int) -> None:
        """Estimate the total, alike on all ranks, in the first ten steps, each tenth and the last twenty.

        In the others nothing waits for the device, so that the host can run ahead of it.
        """
        if self.budget and (step <= 10 or step % 10 == 0 or self.total - step < 20):
            before, self.measured = self.measured, self.seconds()
            # Near the end each step is measured: one that takes longer than the average must not overrun the budget.
            pace = max(self.measured / step, self.measured - before if self.total - step < 19 else 0.0)
            self.total = min(self.c.iterations, step + max(0, int((self.budget - self.measured) / pace)))


def log_step(step: int, losses: str, elapsed: float, c: Config) -> None:
    timing = f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / step:.2f}ms"
    log.info(f"step:{step}/{c.iterations} {losses} {timing}")


def log_loss(step: int, nll: Tensor, clock: Clock, c: Config, dist: Dist) -> str:
    """Log the loss of a step over all ranks and return the words for it. Raise InputError where it is not finite."""
    loss = dist.sum(nll).item() / c.batch_tokens
    if not math.isfinite(loss):
        rates = f"MATRIX_LR={c.matrix_lr}, SCALAR_LR={c.scalar_lr} and TIED_EMBED_LR={c.tied_embed_lr}"
        raise InputError(f"train_loss={loss} at step {step}: allowed is a finite one; try lower {rates}")
    log_step(step, words := f"train_loss:{loss:.4f}", clock.seconds(), c)
    return words


def validate(step: int, called, stream: Stream, clock: Clock, c: Config, dist: Dist) -> None:
    """Score the stream with the weights of a step and log it; the clock stands still."""
    elapsed, predictor = clock.seconds(), SlidingWindow("roundtrip", called, c, dist, stride=c.eval_seq_len)
    x = score(predictor, stream, c.val_batch_size, dist)["roundtrip"]
    log_step(step, f"val_loss:{x.val_loss:.4f} val_bpb:{x.val_bpb:.4f}", elapsed, c)
    clock.started = time.perf_counter() - elapsed


@contextmanager
def hold_signals(c: Config):
    """With CHECKPOINT_EVERY, collect signals, for the loop inside to look at. Yield their list; raise one that is left.

    After an exception they stay held: the run ends with it.
    """
    waiting: list[int] = []
    if c.checkpoint_every:
        handle_signals(lambda number, _: waiting.append(number))
    yield waiting
    if c.checkpoint_every:
        handle_signals(interrupt)
    if waiting:
        interrupt(waiting[0], None)


def train(model: GPT, loader: TrainLoader, c: Config, dist: Dist, stream: Stream | None):
    """Train in place. Return (averages, the clock, which runs on, the record's part). Raise InputError at a NaN."""
    called = compiled(model, c, dist.device)
    log.info(f"train_loader:dataset:{c.data_path} train_shards:{len(loader.shards)} sequences:{loader.n}")
    warm_up(model, called, c, dist)
    optimizers, clock, averages = Optimizers(model, c, dist), StepClock(c, dist), WeightAverages(model, c)
    weights, banks = complement_weights(loader, c), optimizers.muon.banks
    step, losses, log2_step, was = 0, "", 0.0, Schedule(0.0, 0.0)
    if c.resume:
        step, log2_step, elapsed = load_checkpoint(model, optimizers, averages, c, dist)
        clock.restore(step, elapsed)
        was = schedule(step - 1, clock.total, c)
    with hold_signals(c) as waiting:
        while step < clock.total:
            now = schedule(step, clock.total, c)
            for part in ("swa", "crown_q", "looped"):
                if getattr(now, part) and not getattr(was, part):
                    log.info(f"{part}:start step:{step}")
            model.passes = model.looped if now.looped else model.plain
            if now.late_qat and not was.late_qat:  # rounds as the export would at this point
                log2_step = fit_entropy(model, {}, artifact_budget(model, c), c)
                log.info(f"late_qat:enabled step:{step} scale:{now.lr_scale:.4f} log2_step:{log2_step:.4f}")
            with late_qat(model, log2_step, c) if now.late_qat else nullcontext():
                nll = accumulate_gradients(called, loader.batch(step), weights, c)
            if now.crown_q:
                (c.crown_q_lambda / dist.world_size * crown_q_penalty(banks, c.quant_bits)).backward()  # ranks add up
            optimizers.step(now)
            averages.update(step, now.swa)
            step, was = step + 1, now
            clock.update_total(step)
            if step <= 5 or step % c.train_log_every == 0 or step >= clock.total:
                losses = log_loss(step, nll, clock, c, dist)
            clock.show(f"step:{step}/{clock.total} {losses}", step * c.batch_tokens, clock.total * c.batch_tokens)
            if c.val_loss_every and step % c.val_loss_every == 0:
                validate(step, called, stream, clock, c, dist)
            stop = int(dist.max(max(waiting, default=0))) if c.checkpoint_every else 0  # a signal to one rank ends all
            if stop or c.checkpoint_every and step % c.checkpoint_every == 0:
                save_checkpoint((step, log2_step, clock.seconds()), model, optimizers, averages, c)
            if stop:
                interrupt(stop, None)
    model.passes = model.looped
    return averages, clock, train_record(step, was, clock.seconds(), int(optimizers.skipped), c)


def train_record(step: int, last: Schedule, seconds: float, skipped: int, c: Config) -> dict:
    """Log how training ended. Return the `train` part of the run's record."""
    if c.num_loops and not last.looped:
        log.info(f"looped:never, though scoring will loop: ENABLE_LOOPING_AT={c.enable_looping_at}")
    if step < c.iterations:
        log.info(f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{step}/{c.iterations}")
    log.info(f"skipped_steps:{skipped}")
    pace = round(1000 * seconds / step, 3)
    return dict(steps=step, tokens=step * c.batch_tokens, skipped_steps=skipped, step_avg_ms=pace, seconds=seconds)


def save_checkpoint(position: tuple, model: GPT, optimizers: Optimizers, averages: WeightAverages, c: Config) -> None:
    """Write this rank's part of all that training goes on from, and log it; position: (step, log2_step, seconds)."""
    state = dict(position=position, world_size=optimizers.dist.world_size, weights=model.state_dict())
    state |= dict(muon=optimizers.muon.state_dict(), adam=optimizers.adam.state_dict(), skipped=optimizers.skipped)
    state |= {name: getattr(averages, name) for name in ("ema", "swa", "swa_count")}
    torch.save(state, buffer := io.BytesIO())
    write_atomically(Path(f"{c.log_dir}/{c.run_id}.{optimizers.dist.rank}.checkpoint"), buffer.getvalue())
    log.info(f"checkpoint: step:{position[0]}")


def load_checkpoint(model: GPT, optimizers: Optimizers, averages: WeightAverages, c: Config, dist: Dist) -> tuple:
    """Put in what save_checkpoint wrote. Return its position. Raise InputError where it does not fit here."""
    path = f"{c.resume}.{dist.rank}.checkpoint"
    with refusing(f"RESUME={c.resume}: {path} is no checkpoint of such a model"):
        state = torch.load(path, dist.device, weights_only=True)
        model.load_state_dict(state["weights"])
        optimizers.muon.load_state_dict(state["muon"])
        optimizers.adam.load_state_dict(state["adam"])
        optimizers.skipped.copy_(state["skipped"])
        averages.ema, averages.swa, averages.swa_count = (state[name] for name in ("ema", "swa", "swa_count"))
        step, n_ranks = state["position"][0], state["world_size"]
        if n_ranks != dist.world_size or dist.max(step) > step:
            raise ValueError(f"of step {step} of {n_ranks} ranks; allowed is one step of {dist.world_size} ranks")
    return state["position"]


@torch.no_grad()
def held_out_loss(called, loader: TrainLoader, c: Config, dist: Dist) -> float:
    """Return the nll per token on the held-out spans that averages are chosen on, over all ranks."""
    nll, mine = torch.zeros((), device=dist.device), loader.held[dist.share(loader.averaging)]
    for inputs, targets in micro_batches(mine.to(dist.device), c):
        nll += called(inputs, targets).sum()
    return dist.sum(nll).item() / (loader.averaging * c.train_seq_len)


def choose_average(model: GPT, averages: WeightAverages, loader: TrainLoader, c: Config, dist: Dist) -> None:
    """Put in the weights that do best on training text that no step has seen; log each candidate's loss."""
    called, losses, candidates = compiled(model, c, dist.device), {}, averages.candidates()
    for name, weights in candidates.items():
        with weights_replaced(averages.params, weights):
            losses[name] = held_out_loss(called, loader, c, dist)
    best = min(losses, key=losses.get)
    torch._foreach_copy_(averages.params, candidates[best])
    log.info("averages: " + " ".join(f"{name}:{loss:.5f}" for name, loss in losses.items()) + f" chosen:{best}")


# ==================== Artifact ========================================================================================
# The file of settings and numbers that holds the model; nothing in it is ever executed.


@dataclass(frozen=True)
class Grid:
    """Weight (r, j) = code * scale[r] / 2^(k / 2), |code| <= qmax, with k = rows[r] + columns[j], in 0...caps[r]."""

    N_EXPONENTS = 16  # 0...15, each with its own rANS table

    scale: Tensor  # float16 [rows], or [1] for all rows
    rows: Tensor  # int8 [rows]
    columns: Tensor  # int8 [cols]
    caps: Tensor  # int8 [rows]
    qmax: int

    def exponents(self) -> Tensor:
        rows, caps = self.rows.short().unsqueeze(1), self.caps.short().unsqueeze(1)
        return (rows + self.columns).clamp(min=0).minimum(caps).to(torch.uint8)

    def steps(self) -> Tensor:
        """Return the distance between the weights of adjacent codes, float32 [rows, cols]."""
        return self.scale.float().unsqueeze(1) / self.powers(self.scale.device)[self.exponents().long()]

    @staticmethod
    @functools.cache  # to send them to a GPU makes the host wait for it
    def powers(device: torch.device) -> Tensor:
        """Return 2^(k / 2) for each exponent, by Python: another device's might differ in the last bit."""
        return torch.tensor([2.0 ** (k / 2) for k in range(Grid.N_EXPONENTS)], device=device)

    def nearest(self, w: Tensor, steps: Tensor | None = None) -> Tensor:
        """Return the code nearest to each weight, as float32."""
        return (w / (self.steps() if steps is None else steps)).round().clamp(-self.qmax, self.qmax)

    def cpu(self) -> Grid:
        return Grid(*(x.cpu() for x in (self.scale, self.rows, self.columns, self.caps)), self.qmax)


def code_limit(role: str, c: Config) -> int:
    """Return qmax, the largest code of a parameter; int6's tables have two bits more than its matrices."""
    return 127 if c.quant == "hessian" else 2 ** (c.quant_bits - 1 + 2 * (role == "table")) - 1


def int6_grid(w: Tensor, role: str, info: HessianInfo | None, log2_step: float, c: Config) -> Grid:
    """Return the grid of int6: a float16 scale a row, 2^log2_step standard deviations of it (SDClip, PR #1394)."""
    scale = (2**log2_step * w.std(1, correction=0)).clamp(min=2.0**-24).half()
    rows = torch.full((len(w),), 4 * (role == "table"), dtype=torch.int8, device=w.device)  # a quarter of the step
    return Grid(scale, rows, torch.zeros_like(w[0], dtype=torch.int8), rows, code_limit(role, c))


def hessian_grid(w: Tensor, role: str, info: HessianInfo, log2_step: float, c: Config) -> Grid:
    """Return the grid at which one bit more would gain the same everywhere: steps go with 1 / sqrt(sensitivity).

    At a given size the loss is least where rows * columns * step^2 is 2^(2 log2_step) for all weights: reverse
    water-filling (Cover and Thomas, Elements of Information Theory, 10.3). A row's exponents stop where its largest
    weight would need a code above qmax.
    """
    scale, qmax = (2 * w.square().mean().sqrt()).clamp(min=2.0**-24).half().view(1), code_limit(role, c)
    log2_columns = info.columns.clamp(min=1e-30).log2()
    rows = info.rows.log2() + log2_columns.mean() + 2 * scale.float().log2() - 2 * log2_step
    finest = 2 * (qmax * scale.float() / w.abs().amax(1).clamp(min=2.0**-24)).log2()
    rows, columns = (x.round().clamp(-64, 63).to(torch.int8) for x in (rows, log2_columns - log2_columns.mean()))
    return Grid(scale, rows, columns, finest.floor().clamp(0, Grid.N_EXPONENTS - 1).to(torch.int8), qmax)


GRIDS = {"int6": int6_grid, "hessian": hessian_grid}
Quantized = dict[str, tuple[Tensor, Grid]]  # by parameter: int8 codes [rows, cols] and their grid


@dataclass(frozen=True)
class HessianInfo:
    """What an error e at (r, j) costs on training text: rows[r] * columns[j] * e^2, up to one factor for all."""

    rows: Tensor  # float32 [rows]
    columns: Tensor  # float32 [cols]
    order: Tensor | None = None  # of a linear map: its columns from the strongest input to the weakest
    hinv_chol: Tensor | None = None  # and the upper Cholesky factor of the inverse Hessian in that order


def hessian_info(squares: Tensor, xtx: Tensor | None = None) -> HessianInfo:
    """Return the info of a table from its squared gradients [rows, cols], and of a linear map from X^T X too."""
    squares = squares + 1e-3 * squares.mean().clamp(min=1e-30)  # a row without gradient here may get some elsewhere
    if xtx is None:
        scale = squares.mean().sqrt()
        return HessianInfo(squares.mean(1) / scale, squares.mean(0) / scale)
    # The curvature is taken for (gradients' power) x (X^T X), as in K-FAC (arXiv 1503.05671). A column's sensitivity is
    # what the columns that GPTQ rounds after it cannot make up for: 1 / (its diagonal of hinv_chol)^2.
    order = xtx.diagonal().argsort(descending=True, stable=True)
    h = xtx[order][:, order].double()
    h.diagonal().add_(0.01 * h.diagonal().mean().clamp(min=1e-12))  # GPTQ's damping
    hinv_chol = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    unexplained = hinv_chol.diagonal().square().reciprocal()[order.argsort()]
    return HessianInfo(squares.sum(1) / xtx.diagonal().sum().clamp(min=1e-12), unexplained, order, hinv_chol)


def measure_hessians(model: GPT, batch: Tensor, dist: Dist) -> dict[str, HessianInfo]:
    """Return the info of all quantized parameters from a batch [n, T + 1]. Raise InputError if it is not finite."""
    params = quantized_parameters(model)
    maps = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    xtx = {name: torch.zeros_like(params[name][0]).diag() for name in maps}  # [cols, cols]

    def add_inputs(name: str, module: Linear, inputs) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        xtx[name] += x.T @ x

    handles = [m.register_forward_pre_hook(functools.partial(add_inputs, name)) for name, m in maps.items()]
    for sequence in batch.unsqueeze(1):  # one at a time: squared gradients do not add up
        model.zero_grad()
        model(sequence[:, :-1], sequence[:, 1:]).sum().backward()
        for name, p in params.items():
            squares[name] += gradient(p).square()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    sums = {name: [dist.sum(x[name]) for x in (squares, xtx) if name in x] for name in params}
    for name, found in sums.items():
        if not all(x.isfinite().all() for x in found):
            raise InputError(f"weight {name}: its inputs or gradients on training text are not finite")
    return {name: hessian_info(*found) for name, found in sums.items()}


def gptq(ws: list[Tensor], grids: list[Grid], infos: list[HessianInfo]) -> list[Tensor]:
    """Return the codes of linear maps of one role and shape: GPTQ (Frantar et al. 2023, arXiv 2210.17323)."""
    # The later columns make up for what rounding a column does to the outputs, as far as their inputs go together.
    order, upper, block = torch.stack([x.order for x in infos]), torch.stack([x.hinv_chol for x in infos]), 128
    at, back = (x.unsqueeze(1).expand(-1, len(ws[0]), -1) for x in (order, order.argsort(1)))
    w, steps = (torch.stack(x).detach().float().gather(2, at) for x in (ws, [grid.steps() for grid in grids]))
    codes = torch.empty_like(w)
    for first in range(0, w.shape[2], block):
        last = min(first + block, w.shape[2])
        errors = torch.empty_like(w[..., first:last])
        for j in range(first, last):  # of all maps at once: on a GPU, launches take the time
            codes[..., j] = grids[0].nearest(w[..., j], steps[..., j])
            error = (w[..., j] - codes[..., j] * steps[..., j]) / upper[:, j, j, None]
            w[..., j + 1 : last] -= error.unsqueeze(2) * upper[:, j, None, j + 1 : last]
            errors[..., j - first] = error
        w[..., last:] -= errors @ upper[:, first:last, last:]
    return list(codes.gather(2, back))


def quantize(model: GPT, infos: dict[str, HessianInfo], log2_step: float, c: Config) -> Quantized:
    """Return the codes of all quantized parameters at one step size: linear maps by GPTQ, embeddings to the nearest."""
    params, banks, codes = quantized_parameters(model), defaultdict(list), {}
    grids = {name: GRIDS[c.quant](p.detach(), p.role, infos[name], log2_step, c) for name, p in params.items()}
    for name, p in params.items():
        if infos[name].hinv_chol is None:
            codes[name] = grids[name].nearest(p.detach())
        else:
            banks[p.shape, p.role].append(name)  # a role has one qmax
    for names in banks.values():
        bank = ([of[name] for name in names] for of in (params, grids, infos))
        codes |= zip(names, gptq(*bank), strict=True)
    return {name: (codes[name].to(torch.int8).cpu(), grids[name].cpu()) for name in params}


def load_codes(model: GPT, quantized: Quantized) -> None:
    """Put an artifact's quantized weights into the model; the scalars stay as they are."""
    for name, p in quantized_parameters(model).items():
        codes, grid = quantized[name]
        p.detach().copy_(codes * grid.steps())


LEAST_BITS = 1.2  # entropy of a Gaussian weight at a step of two standard deviations, the coarsest
FIT_SLACK = 0.002  # the part of the budget that a fit may leave free


def artifact_budget(model: GPT, c: Config) -> int:
    """Return the bytes that TARGET_BYTES leaves beside the script. Raise InputError if the model cannot fit."""
    n_codes, n_all = (sum(map(Tensor.numel, x)) for x in (quantized_parameters(model).values(), model.parameters()))
    script = os.path.getsize(__file__)
    if (least := script + math.ceil(LEAST_BITS * n_codes / 8) + n_all - n_codes) > c.target_bytes:
        raise InputError(f"TARGET_BYTES={c.target_bytes} is too small: script and model need at least {least:,} bytes")
    return c.target_bytes - script


def step_range(c: Config) -> tuple[float, float]:
    """Return the smallest and the largest log2_step of a fit; CLIP_SIGMAS leaves one."""
    if c.quant == "hessian":
        return -32.0, 32.0
    # Below four standard deviations, int6 loses more in the tails than it gains by finer steps.
    finest = math.log2((c.clip_sigmas or 4) / code_limit("matrix", c))
    return finest, finest if c.clip_sigmas else max(1.0, finest)


def fit_entropy(model: GPT, infos: dict[str, HessianInfo], budget: int, c: Config) -> float:
    """Return the log2_step at which the nearest codes' entropy is 0.96 of the budget: int6's LZMA takes 3 % more."""
    low, high = step_range(c)
    for _ in range(16):
        middle, counts = (low + high) / 2, torch.zeros(Grid.N_EXPONENTS * 256, dtype=torch.int64)
        for name, p in quantized_parameters(model).items():
            grid = GRIDS[c.quant](p.detach(), p.role, infos.get(name), middle, c)
            cell = 256 * grid.exponents().long() + 128 + grid.nearest(p.detach()).long()
            counts += cell.flatten().bincount(minlength=len(counts)).cpu()
        counts = counts.view(Grid.N_EXPONENTS, 256).double()
        bits = -torch.xlogy(counts, counts / counts.sum(1, keepdim=True).clamp(min=1)).sum() / math.log(2)
        low, high = (middle, high) if bits > 8 * 0.96 * budget else (low, middle)
    return high


def fit_to_size(model: GPT, infos: dict[str, HessianInfo], net: BiasNet, c: Config, tokenizer_sha256: str) -> Quantized:
    """Return the largest of a few quantizations with which script and artifact fit TARGET_BYTES, or the last one."""
    budget, (finest, coarsest), best, best_bytes = artifact_budget(model, c), step_range(c), None, 0
    log2_step, too_fine, fitting = fit_entropy(model, infos, budget, c), finest, coarsest
    for attempt in range(16):
        quantized = quantize(model, infos, log2_step, c)
        n_bytes = len(pack(model, quantized, net, c, tokenizer_sha256))
        clip = f" clip_sigmas:{code_limit('matrix', c) * 2**log2_step:.3f}" if c.quant == "int6" else ""
        log.info(f"fit: log2_step:{log2_step:.4f}{clip} artifact:{n_bytes} budget:{budget}")
        if n_bytes > budget:
            too_fine = log2_step
        elif n_bytes > best_bytes:
            best, best_bytes, fitting = quantized, n_bytes, log2_step
        at_limit = log2_step == (finest if n_bytes <= budget else coarsest)
        if at_limit or best_bytes > (1 - FIT_SLACK) * budget or attempt >= 3 and best_bytes > 0.98 * budget:
            break
        # Half the step takes about one bit more a code. Correct by more each time; outside of the bracket, bisect.
        excess_bits = 8 * (n_bytes - (1 - FIT_SLACK / 2) * budget) / sum(x.numel() for x, _ in quantized.values())
        guess = log2_step + excess_bits * 2 ** max(0, attempt - 1)
        outside = best and not too_fine <= guess < fitting
        log2_step = min(max((too_fine + fitting) / 2 if outside else guess, finest), coarsest)
    return best or quantized


# The container: a prefix, a sha256 of all but itself, a JSON header, and the parts one after the other.
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 5
PREFIX = struct.Struct("<5sBI")  # magic, version, header bytes
PARTS = "scales", "rows", "columns", "caps", "frequencies", "codes", "float16", "mixer"
# Codes hardly repeat: the cheapest match finder costs no byte and a sixth of preset 9e's time (logs/lzma_filters.txt).
LZMA = dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, dict_size=4096, mf=lzma.MF_HC4, nice_len=273, depth=1)
# At full size the codes take five seconds (logs/plan_h100.txt); the export packs them again with the fitted mixer.
compress = functools.lru_cache(32)(functools.partial(lzma.compress, format=lzma.FORMAT_RAW, filters=[LZMA]))


def as_bytes(tensors) -> bytes:
    """Return the numbers of all tensors as they lie in memory; every machine that runs this is little-endian."""
    return b"".join(x.detach().cpu().contiguous().numpy().tobytes() for x in tensors)


def as_float16(named: dict[str, Tensor]) -> bytes:
    """Return the numbers of all tensors in float16. Raise InputError for one that float16 cannot hold."""
    for name, p in named.items():
        if not p.half().isfinite().all():
            raise InputError(f"weight {name} cannot be stored: allowed is what float16 holds, 65504 at most and no NaN")
    return as_bytes(p.half() for p in named.values())


def pack(model: GPT, quantized: Quantized, net: BiasNet, c: Config, tokenizer_sha256: str) -> bytes:
    """Return the artifact's bytes."""
    grids = {name: grid for name, (_, grid) in quantized.items()}
    streams = dict(scales=compress(as_float16({name: grid.scale for name, grid in grids.items()})))
    for part in ("rows", "columns", "caps"):
        streams[part] = compress(as_bytes(getattr(grid, part) for grid in grids.values()))
    codes = np.frombuffer(as_bytes(codes for codes, _ in quantized.values()), dtype=np.uint8)
    if c.codec == "lzma":
        streams["codes"] = compress(codes.tobytes())
    else:
        tables = np.frombuffer(as_bytes(grid.exponents() for grid in grids.values()), dtype=np.uint8)
        frequencies = rans_frequencies(codes, tables)
        streams["frequencies"] = compress(frequencies.astype("<u2").tobytes())
        streams["codes"] = rans_encode(codes, tables, frequencies)
    streams["float16"] = compress(as_float16(by_role(model, "scalar")))
    streams["mixer"] = as_float16(dict(net.named_parameters()))  # plain: the fit knows its size before its values
    sizes = {part: len(stream) for part, stream in streams.items()}
    kept = dict(shape=c.marked("shape"), score=c.marked("score"), tokenizer=tokenizer_sha256, parts=sizes)
    header = json.dumps(kept, separators=(",", ":")).encode()
    prefix, body = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(header)), header + b"".join(streams.values())
    return prefix + hashlib.sha256(prefix + body).digest() + body


def read_artifact(path: str | Path) -> tuple[dict, dict[str, bytes]]:
    """Return (header with the file's size and sha256, parts as stored). Raise InputError if the file was altered."""
    with refusing(f"ARTIFACT_PATH={path}: not an artifact of this script"):
        data = Path(path).read_bytes()
        magic, version, header_bytes = PREFIX.unpack_from(data)
        if (magic, version) != (ARTIFACT_MAGIC, ARTIFACT_VERSION):
            raise ValueError(f"{magic} of version {version}; allowed is {ARTIFACT_VERSION} of {ARTIFACT_MAGIC}")
        digest, body = data[PREFIX.size : PREFIX.size + 32], data[PREFIX.size + 32 :]
        if hashlib.sha256(data[: PREFIX.size] + body).digest() != digest:
            raise ValueError("its checksum differs: it is truncated or altered")
        header = json.loads(body[:header_bytes]) | dict(file_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        ends = np.cumsum([header_bytes, *header["parts"].values()]).tolist()
        known = set(header["parts"]) <= set(PARTS) and header["tokenizer"].isalnum()  # both go to logs and messages
        if ends != sorted(ends) or ends[-1] != len(body) or not known:
            raise ValueError(f"its parts end at {ends[-1]} of {len(body)} bytes, or have other names than {PARTS}")
        return header, {part: body[a:b] for part, a, b in zip(header["parts"], ends, ends[1:], strict=False)}


def with_artifact(c: Config, header: dict, env: dict[str, str]) -> Config:
    """Return the settings with the artifact's own. Raise InputError where the environment asks for another model."""
    fields = [(f, mark) for f in dataclasses.fields(c) for mark in ("shape", "score") if f.metadata[mark]]
    asked = {name for name in c.marked("score") if name.upper() in env}
    with refusing(f"ARTIFACT_PATH={c.artifact_path}: its settings are not this script's"):
        # The artifact may be older than a setting.
        stated = {mark: Config().marked(mark) | header[mark] for mark in ("shape", "score")}
        kept = {f.name: parse(f, show(stated[mark][f.name])) for f, mark in fields}
        loaded = dataclasses.replace(c, **{name: value for name, value in kept.items() if name not in asked})
    for name, value in c.marked("shape").items():
        if name.upper() in env and value != kept[name]:
            raise InputError(f"{name.upper()}={show(value)}: the artifact's model has {show(kept[name])}")
    return loaded


def as_tensors(data: bytes, dtype: str, shapes: list, compressed: bool = True) -> list[Tensor]:
    """Return an artifact's part as tensors of these shapes. Raise an error where it has other than their length."""
    sizes, unpacker = [math.prod(x) for x in shapes], lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[LZMA])
    most = 1 + sum(sizes) * np.dtype(dtype).itemsize  # one byte more shows a part that is too long, whatever its length
    raw = unpacker.decompress(data, most) if compressed else data
    numbers = torch.from_numpy(np.frombuffer(raw, dtype).copy()).split(sizes)
    return [x.view(shape) for x, shape in zip(numbers, shapes, strict=True)]


@refusing("ARTIFACT_PATH: not an artifact of this script")
def unpack(parts: dict[str, bytes], c: Config, device: torch.device) -> tuple[GPT, BiasNet]:
    """Return the model and the mixer that an artifact's parts hold. Raise InputError where they are none."""
    with torch.device("meta"):  # takes no memory
        quantized = quantized_parameters(empty := GPT(c))
    if sum(map(Tensor.numel, empty.parameters())) > 32 * sum(map(len, parts.values())) + 2**24:
        raise ValueError("a model of more than four numbers a bit")
    shapes = [p.shape for p in quantized.values()]
    scales = as_tensors(parts["scales"], "<f2", [(n if c.quant == "int6" else 1,) for n, _ in shapes])
    rows, caps = (as_tensors(parts[part], "i1", [(n,) for n, _ in shapes]) for part in ("rows", "caps"))
    columns = as_tensors(parts["columns"], "i1", [(n,) for _, n in shapes])
    grids = list(map(Grid, scales, rows, columns, caps, (code_limit(p.role, c) for p in quantized.values())))
    if c.codec == "rans":
        (frequencies,) = as_tensors(parts["frequencies"], "<u2", [(Grid.N_EXPONENTS, 256)])
        tables = np.frombuffer(as_bytes(grid.exponents() for grid in grids), dtype=np.uint8)
        parts = {**parts, "codes": rans_decode(parts["codes"], tables, frequencies.numpy().astype(np.int64)).tobytes()}
    codes = as_tensors(parts["codes"], "i1", shapes, compressed=c.codec == "lzma")
    model, net = make_model(c, device), BiasNet(c)
    load_codes(model, dict(zip(quantized, zip(codes, grids, strict=True), strict=True)))
    for part, params in (("float16", list(by_role(model, "scalar").values())), ("mixer", list(net.parameters()))):
        stored = as_tensors(parts[part], "<f2", [p.shape for p in params], compressed=part == "float16")
        torch._foreach_copy_([p.detach() for p in params], stored)
    return model.to(device), net.to(device)


# The coder is a range asymmetric numeral system (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit words. The
# codes are dealt to RANS_LANES states in turn; NumPy takes a step of all of them at once.
RANS_LANES, RANS_BITS, RANS_LOW = 512, 14, 1 << 16


def rans_frequencies(values: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return how often each byte occurs under each table, in parts of 2^RANS_BITS: int64 [Grid.N_EXPONENTS, 256]."""
    counts = np.bincount(256 * tables.astype(np.int64) + values, minlength=256 * Grid.N_EXPONENTS).reshape(-1, 256)
    seen, total = counts > 0, counts.sum(1, keepdims=True).clip(1)
    frequencies = counts * ((1 << RANS_BITS) - seen.sum(1, keepdims=True)) // total + seen
    frequencies[np.arange(Grid.N_EXPONENTS), counts.argmax(1)] += (1 << RANS_BITS) - frequencies.sum(1)
    return frequencies


def rans_encode(values: np.ndarray, tables: np.ndarray, frequencies: np.ndarray) -> bytes:
    """Return the final states (uint32) and the words (uint16) of uint8 [n], in the order that decoding reads them."""
    frequency, first = (x.ravel().astype(np.uint64) for x in (frequencies, frequencies.cumsum(1) - frequencies))
    state, words = np.full(RANS_LANES, RANS_LOW, dtype=np.uint64), []
    for start in reversed(range(0, len(values), RANS_LANES)):
        cell = 256 * tables[start : start + RANS_LANES].astype(np.int64) + values[start : start + RANS_LANES]
        x, f = state[: len(cell)], frequency[cell]
        full = x >= f << np.uint64(32 - RANS_BITS)
        words.append(x[full].astype("<u2"))
        x = np.where(full, x >> np.uint64(16), x)
        state[: len(cell)] = (x // f << np.uint64(RANS_BITS)) + x % f + first[cell]
    return state.astype("<u4").tobytes() + b"".join(part.tobytes() for part in reversed(words))


def rans_decode(data: bytes, tables: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return the uint8 [n] that `rans_encode` was given."""
    frequency, first = (x.ravel().astype(np.uint64) for x in (frequencies, frequencies.cumsum(1) - frequencies))
    value_at = np.tile(np.arange(256, dtype=np.uint8), len(frequencies)).repeat(frequencies.ravel())
    state = np.frombuffer(data[: 4 * RANS_LANES], dtype="<u4").astype(np.uint64)
    words, values, used = np.frombuffer(data[4 * RANS_LANES :], dtype="<u2"), np.empty(len(tables), dtype=np.uint8), 0
    for start in range(0, len(tables), RANS_LANES):
        table = tables[start : start + RANS_LANES].astype(np.int64)
        x, part = state[: len(table)], state[: len(table)] & np.uint64((1 << RANS_BITS) - 1)
        value = value_at[(table << RANS_BITS) + part.astype(np.int64)]
        cell = 256 * table + value
        x = frequency[cell] * (x >> np.uint64(RANS_BITS)) + part - first[cell]
        low = np.flatnonzero(x < RANS_LOW)
        x[low] = x[low] << np.uint64(16) | words[used : used + len(low)]
        state[: len(table)], values[start : start + RANS_LANES], used = x, value, used + len(low)
    return values


def export(model: GPT, loader: TrainLoader, batch: Tensor, tokenizer_sha256: str, c: Config, dist: Dist) -> None:
    """Quantize the averaged model by its Hessians on a batch, fit the mixer on its rows, write the artifact."""
    called, net = compiled(model, c, dist.device), BiasNet(c).to(dist.device)
    before = held_out_loss(called, loader, c, dist)
    infos = measure_hessians(model, batch, dist)
    quantized = dist.broadcast(fit_to_size, model, infos, net, c, tokenizer_sha256)
    load_codes(model, quantized)
    for p in by_role(model, "scalar").values():
        p.data.copy_(p.half())  # as the artifact holds them
    after = held_out_loss(called, loader, c, dist)
    log.info(f"quantization: float:{before:.5f} stored:{after:.5f} gap:{after - before:+.5f}")
    if "maxent" in (c.hedge_experts if c.mixer == "hedge" else [c.mixer]):
        calibrate(model, net, loader, c, dist)
    dist.broadcast(lambda: write_atomically(Path(c.artifact_path), pack(model, quantized, net, c, tokenizer_sha256)))


def quant_label(c: Config) -> str:
    """Return how the codes are stored, as log labels name it."""
    return f"int{c.quant_bits}" if c.quant == "int6" else c.quant


def size_record(path: str, header: dict, c: Config) -> dict:
    """Log script and artifact by part against the cap. Return them for the record."""
    code_bytes, model_bytes, label = os.path.getsize(__file__), header["file_bytes"], f"{quant_label(c)}+{c.codec}"
    total, sizes = code_bytes + model_bytes, {"header": model_bytes - sum(header["parts"].values()), **header["parts"]}
    log.info("artifact parts: " + " ".join(f"{part}:{size}" for part, size in sizes.items()))
    log.info(f"Code size: {code_bytes} bytes")
    log.info(f"Serialized model {label}: {model_bytes} bytes")
    log.info(f"Total submission size {label}: {total} bytes cap:{CAP_BYTES} margin:{CAP_BYTES - total}")
    if total > c.target_bytes:
        log.info(f"OVER TARGET_BYTES={c.target_bytes} by {total - c.target_bytes} bytes: {path}")
    found = dict(path=str(path), sha256=header["sha256"], code_bytes=code_bytes, model_bytes=model_bytes)
    return dict(found, total_bytes=total, cap_bytes=CAP_BYTES, part_bytes=sizes)


# ==================== N-grams =========================================================================================
# What followed the same context earlier, counted up to the token before the predicted one, also inside a chunk.


@dataclass(frozen=True)
class Candidates:
    """The tokens that followed a row's contexts before: one entry a (row, token), sorted by both."""

    row: Tensor  # int64 [entries]
    token: Tensor  # int64 [entries]
    counts: Tensor  # uint8 [entries, 2, orders]: occurrences that the chains list, in this document and in earlier ones
    totals: Tensor  # int16 [rows, 2, orders]: their sums over a row's tokens
    logp: Tensor  # float32 [entries]: the token's neural log-probability


class HashChains:
    """The earlier positions of each context, the last k tokens, for each k of NGRAM_ORDERS.

    As in zlib, `prev` links every position to the latest earlier one with the same context, and `head`, a table that
    all orders share, finds the first link by the context's hash. A head holds the newest position with that hash and 32
    more bits of it. Contexts that agree in all these bits are taken for one: counts still add up to occurrences.
    """

    MULTIPLIER, CHECK = 0x5851F42D4C957F2D, 2**32 - 1  # Knuth's of 64 bits, odd; the bits of a hash that a head keeps

    def __init__(self, c: Config, device: torch.device):
        self.c, self.orders = c, c.ngram_orders  # rising from 1
        self.max_chains = [max(1, min(c.ngram_max_chain, 3 * c.ngram_max_chain // order)) for order in self.orders]
        self.seen = 0  # positions before the next chunk
        self.document = torch.zeros(1, dtype=torch.int64, device=device)  # where the open document began
        self.tail = torch.full((self.orders[-1] - 1,), -1, dtype=torch.int64, device=device)  # the tokens before it
        self.mask = (1 << c.ngram_table_bits) - 1  # of a hash: its head
        self.head = torch.zeros(self.mask + 1, dtype=torch.int64, device=device)  # position + 1, hash bits
        self.tokens = torch.zeros(1, dtype=torch.int32, device=device)  # both grow by doubling
        self.prev = torch.zeros(len(self.orders), 1, dtype=torch.int32, device=device)  # position + 1; 0 = none
        self.ahead: tuple[Tensor, ...] | None = None  # the inputs from position `seen` on, not yet part of the state

    def hashes(self, inputs: Tensor) -> Tensor:
        """Return a number for the context of each order that ends at each input: int64 [orders, n]."""
        known, number, found = torch.cat([self.tail, inputs]), torch.zeros_like(inputs), []
        for back in range(self.orders[-1]):
            start = len(self.tail) - back
            number = (number + known[start : start + len(inputs)] + 2) * self.MULTIPLIER  # modulo 2^64
            number = number ^ ((number >> 29) & (2**35 - 1))
            if back + 1 in self.orders:
                found.append(number)
        return torch.stack(found)

    def look_ahead(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Link the chunk that follows. Return its hashes [orders, n] and where each input's document began [n]."""
        if self.ahead is not None and torch.equal(self.ahead[0], inputs):
            return self.ahead[1:]
        end = self.seen + len(inputs)
        if end > len(self.tokens):
            padding = (0, max(end, 2 * len(self.tokens)) - len(self.tokens))
            self.tokens, self.prev = F.pad(self.tokens, padding), F.pad(self.prev, padding)
        hashes = self.hashes(inputs)
        ordered, source = hashes.sort(dim=1, stable=True)  # equal contexts inside the chunk stand together
        linked = torch.where(ordered[:, 1:] == ordered[:, :-1], source[:, :-1] + self.seen + 1, 0)
        inside = torch.zeros_like(hashes).scatter_(1, source[:, 1:], linked)
        entry = self.head[hashes & self.mask]
        before = torch.where((entry & self.CHECK) == ((hashes >> 32) & self.CHECK), entry >> 32, 0)
        self.tokens[self.seen : end] = inputs.int()
        self.prev[:, self.seen : end] = torch.where(inside > 0, inside, before).int()
        position = torch.arange(self.seen, end, device=inputs.device)
        begins = torch.where(inputs == self.c.bos_id, position, self.document).cummax(0).values
        self.ahead = inputs.clone(), hashes, begins  # the caller may go on to write in its own
        return hashes, begins

    def candidates(self, inputs: Tensor, rows: slice, logp: Tensor) -> Candidates:
        """Return the tokens that followed the contexts that end at inputs[rows]; logp [m, V]: the neural rows."""
        m, vocab_size, n_orders = rows.stop - rows.start, self.c.vocab_size, len(self.orders)
        begins, row = self.look_ahead(inputs)[1][rows], torch.arange(m, device=inputs.device)
        position, first_cell = (self.seen + rows.start + row).expand(n_orders, -1), vocab_size * row
        order, cells, columns = torch.arange(n_orders, device=inputs.device).unsqueeze(1), [], []
        for link in range(self.max_chains[0]):  # from a row's own position to ever earlier ones; -1 = none
            order = order[: sum(length > link for length in self.max_chains)]
            linked = self.prev[order, position[: len(order)]].long() - 1
            position = torch.where(position[: len(order)] >= 0, linked, -1)
            earlier = position < begins
            # Order 1 counts in this document only: over all of them it adds candidates and hardly any information.
            used = (position >= 0) & ~(earlier & (order == 0))
            cells.append((first_cell + self.tokens[position + 1])[used])
            columns.append((order + n_orders * earlier)[used])
        column, (cell, entry) = torch.cat(columns), torch.cat(cells).unique(return_inverse=True)
        row, token = cell // vocab_size, cell % vocab_size
        counts = torch.bincount(entry * 2 * n_orders + column, minlength=len(cell) * 2 * n_orders)
        totals = torch.bincount(row[entry] * 2 * n_orders + column, minlength=m * 2 * n_orders)
        counts, totals = counts.view(-1, 2, n_orders).to(torch.uint8), totals.view(-1, 2, n_orders).short()
        return Candidates(row, token, counts, totals, logp[row, token])

    def update(self, tokens: Tensor) -> None:
        """Take in a scored chunk: tokens [n + 1], its inputs and its last target."""
        inputs, n = tokens[:-1], len(tokens) - 1
        hashes, begins = self.look_ahead(inputs)
        position = torch.arange(self.seen + 1, self.seen + n + 1, device=inputs.device)
        entry = (position << 32) | ((hashes >> 32) & self.CHECK)
        self.head.scatter_reduce_(0, (hashes & self.mask).flatten(), entry.flatten(), "amax")
        self.document, self.tail = begins[-1:], torch.cat([self.tail, inputs])[n:]
        self.seen, self.ahead = self.seen + n, None


# ==================== Mixing ==========================================================================================
# The neural rows and the candidates in, one distribution out. An expert is a mixer that Hedge weighs.


@dataclass
class RowBlock:
    """What a mixer may use for a block of rows of a chunk: all of it known before the block's last target."""

    inputs: Tensor  # int64 [rows.stop], the chunk's up to the block's last
    rows: slice  # of the chunk, all ranks'
    mine: slice  # this rank's part of them
    logp: Tensor | None = None  # the neural rows, float32 [m, V]; dropped once they are mixed
    candidates: Candidates | None = None
    carry: object = None  # what a predictor or mixer left after the block before; then what it leaves after this


class Mixer:
    """Rows in, one row out: the network's as they are. `mix` changes only a block's carry; `learn` takes in a chunk."""

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        self.c, self.dist, self.note = c, dist, ""  # what a log line may add about its state

    def mix(self, block: RowBlock) -> Tensor:
        """Return log-probabilities float32 [m, V] of the tokens that follow the block's inputs."""
        return block.logp

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        """Learn from a scored chunk: tokens [n + 1] and its blocks in order."""


class Flat(Mixer):
    """The network's rows at temperature 2, in place of PR #700's e^-H for every token, which is no distribution."""

    def mix(self, block: RowBlock) -> Tensor:
        return (block.logp.double() / 2).log_softmax(-1).float()


class Unigram(Mixer):
    """Add-0.1 over the counts of all tokens so far (PR #700)."""

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        super().__init__(c, dist, net)
        self.counts = torch.zeros(c.vocab_size, dtype=torch.float64, device=dist.device)

    def mix(self, block: RowBlock) -> Tensor:
        before, inputs = block.inputs[: block.mine.start], block.inputs[block.mine].unsqueeze(1)
        inside = torch.zeros(len(inputs), len(self.counts), dtype=torch.int32, device=inputs.device)
        inside = inside.scatter_(1, inputs, 1).cumsum(0, dtype=torch.int32)
        counts = inside + (self.counts + before.bincount(minlength=len(self.counts)) + 0.1)
        return (counts / counts.sum(1, keepdim=True)).log().float()

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        self.counts += tokens[:-1].bincount(minlength=len(self.counts))


class Bigram(Mixer):
    """Add-delta over what followed the last token, in this document and among its latest occurrences."""

    ORDER, DELTA = 1, 0.1

    def mix(self, block: RowBlock) -> Tensor:
        found, k = block.candidates, self.c.ngram_orders.index(self.ORDER)
        counts, totals = (x[:, :, k].sum(1).double() for x in (found.counts, found.totals))
        log_total = (totals + self.DELTA * self.c.vocab_size).log()
        unseen = (math.log(self.DELTA) - log_total).float().unsqueeze(1).expand_as(block.logp)
        return unseen.index_put((found.row, found.token), ((counts + self.DELTA).log() - log_total[found.row]).float())


class Trigram(Bigram):
    """The same for the last two tokens, in all documents."""

    ORDER, DELTA = 2, 0.01


class Backoff(Mixer):
    """The frequencies at the longest context with a minimum count, weighed by the network's entropy H."""

    def mix(self, block: RowBlock) -> Tensor:
        # weight = base + range * sigmoid(2 (H - center)), with one center (PR #1033) or one for each length of context
        # (PR #825). Both published forms look up the target only; these are frequencies over the whole vocabulary.
        c, found, totals = self.c, block.candidates, block.candidates.totals.sum(1)
        index = torch.arange(len(c.ngram_orders), device=totals.device)
        longest = torch.where(totals >= c.backoff_min_count, index, -1).amax(1)
        centers = [c.backoff_centers[min(order, len(c.backoff_centers)) - 1] for order in c.ngram_orders]
        center = torch.tensor(centers, device=totals.device)[longest.clamp(min=0)]
        entropy = -(block.logp.exp() * block.logp).sum(1)
        weight = c.backoff_base + c.backoff_range * torch.sigmoid(2 * (entropy - center))
        weight = torch.where(longest >= 0, weight, 0.0).double().clamp(max=1 - 1e-6)
        at = longest.clamp(min=0)[found.row].unsqueeze(1)
        counts, totals = found.counts.sum(1).gather(1, at).double(), totals[found.row].gather(1, at).double()
        frequency, kept = (counts / totals.clamp(min=1)).squeeze(1), (1 - weight).log()
        mixed = ((found.logp + kept[found.row]).exp() + weight[found.row] * frequency).log()
        return (block.logp + kept.unsqueeze(1)).float().index_put((found.row, found.token), mixed.float())


class Tilt(Mixer):
    """The published tilt p'(a) = e^(beta [a = hint]) p(a) / Z (PR #2135). Nothing in it is learned."""

    ORDER, SHARE, BETA = 16, 0.8, 2.625  # the hint followed the last ORDER tokens in a SHARE of their occurrences

    def mix(self, block: RowBlock) -> Tensor:
        found, k = block.candidates, self.c.ngram_orders.index(self.ORDER)
        counts, totals = found.counts[:, :, k].sum(1), found.totals[:, :, k].sum(1)[found.row]
        return apply_bias(block.logp, found, self.BETA * ((counts > 0) & (counts >= self.SHARE * totals)).float())


def normalizer(candidates: Candidates, bias: Tensor) -> Tensor:
    """Return Z = 1 + sum p(a) (e^b(a) - 1) of each row: float64 [m], added in a fixed order."""
    lengths = torch.bincount(candidates.row, minlength=len(candidates.totals))
    if not len(lengths):
        return lengths.double()
    change = candidates.logp.double().exp() * bias.double().expm1()
    return 1 + torch.segment_reduce(change, "sum", lengths=lengths, initial=0.0)


def apply_bias(logp: Tensor, candidates: Candidates, bias: Tensor) -> Tensor:
    """Return p(a) e^b(a) / Z for the candidates and p(a) / Z for all other tokens: [m, V] log-probabilities."""
    row, log_z = candidates.row, normalizer(candidates, bias).log()
    mixed = logp - log_z.to(logp).unsqueeze(1)
    return mixed.index_put_((row, candidates.token), (candidates.logp + bias - log_z[row]).to(logp))


class BiasNet(nn.Module):
    """The network behind maxent, fitted on training text: the bias of a candidate from its counts and its logp."""

    LIMITS = (-2.0, 10.0)  # a Z of e^-2 or more keeps float32 rows within 1e-5 of one
    # Entries at a time: with shapes that never change, a bias has the same bits whatever follows. A GPU needs larger
    # blocks: one step on 32,768 rows would take it some 4,500 launches of 8192 entries.
    BLOCK, CUDA_BLOCK = 8192, 2**18

    def __init__(self, c: Config):
        super().__init__()
        self.hidden, self.out = nn.Linear(6 * len(c.ngram_orders) + 1, c.mixer_hidden), nn.Linear(c.mixer_hidden, 1)
        bound, generator = self.hidden.in_features**-0.5, torch.Generator().manual_seed(c.seed)
        for p, limit in zip(self.parameters(), (bound, bound, 0.0, 0.0), strict=True):
            nn.init.uniform_(p, -limit, limit, generator=generator)

    def forward(self, candidates: Candidates) -> Tensor:
        """Return b(a) of each entry, in nats."""
        n, found = len(candidates.logp), [candidates.logp.new_empty(0)]
        block = self.CUDA_BLOCK if candidates.logp.is_cuda else self.BLOCK
        for start in range(0, n, block):
            row, logp = candidates.row[start : start + block], candidates.logp[start : start + block]
            counts, totals = candidates.counts[start : start + block].to(logp), candidates.totals[row].to(logp)
            counts, totals = (torch.stack([x.sum(1), x[:, 0]], dim=1) for x in (counts, totals))
            # Features: (frequency, log-count, whether seen) x (all, this document) x order; logp.
            known = torch.stack([counts / (totals + 0.5), 0.5 * counts.log1p(), (totals > 0).to(counts)], dim=1)
            features = torch.cat([known.flatten(1), 0.25 * logp.unsqueeze(1)], dim=1)
            padded = F.pad(features, (0, 0, 0, block - len(features)))
            found.append(self.out(F.gelu(self.hidden(padded))).squeeze(1).clamp(*self.LIMITS))
        return torch.cat(found)[:n]


class Maxent(Mixer):
    """Sparse maximum-entropy tilt: p(a) e^b(a) / Z over the candidates (Berger et al. 1996; StateSMix 2605.02904)."""

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        super().__init__(c, dist, net)
        self.net = copy.deepcopy(net)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=c.mixer_lr)

    def mix(self, block: RowBlock) -> Tensor:
        with torch.no_grad():
            return apply_bias(block.logp, block.candidates, self.net(block.candidates))

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        parts = [(block.candidates, tokens[1:][block.mine]) for block in blocks]
        net_step(self.net, self.adam, parts, len(tokens) - 1, self.dist)


def net_step(net: BiasNet, adam: torch.optim.Optimizer, parts: list[tuple[Candidates, Tensor]], n: int, dist: Dist):
    """Take a step on the mean loss of n tokens, of which this rank has (candidates, targets [m]) in parts."""
    adam.zero_grad()
    for candidates, targets in parts:
        if len(candidates.row):
            bias, hit = net(candidates), candidates.token == targets[candidates.row]
            # The tilt adds log Z - b(target) to a row's nll.
            ((normalizer(candidates, bias).log().sum() - bias[hit].double().sum()) / n).backward()
    dist.sum_gradients(list(net.parameters()))
    adam.step()


def hedge_weights(log_w: Tensor, gains: Tensor, eta: float, share: float) -> Tensor:
    """Return the log-weights before each of the tokens and after the last: [K], log-probabilities [n, K] -> [n + 1, K].

    w_k <- w_k * p_k(token)^eta (Vovk 1990). With eta = 1 and no share it is Bayes' rule: the whole stream costs at most
    log2(K) bits more than the best expert. A share is dealt out evenly after each token (Herbster and Warmuth 1998).
    """
    gains = gains.cpu()  # where sums have one order
    if not share:
        return torch.cat([log_w.unsqueeze(0), log_w + eta * gains.cumsum(0)])
    w, found = log_w.softmax(0).numpy(), []
    for gain in np.exp(eta * (gains - gains.amax(1, keepdim=True)).numpy()):
        found.append(w)
        w = w * gain
        w = (1 - share) * w / w.sum() + share / len(w)
    return torch.from_numpy(np.log(np.stack([*found, w])))


class Hedge(Mixer):
    """A mixture of experts, each a distribution, whose weights follow the stream token by token.

    The weights before a row need what the experts gave to all tokens before it, which are inputs. A block's last row
    stays open until its token is known: the block's carry is the log-weights before it and the experts' rows [K, V].
    """

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        super().__init__(c, dist, net)
        self.experts = {name: MIXERS[name](c, dist, net) for name in c.hedge_experts}
        self.log_w = torch.full((len(self.experts),), -math.log(len(self.experts)), dtype=torch.float64)

    def mix(self, block: RowBlock) -> Tensor:
        inputs, logps = block.inputs[block.rows], [expert.mix(block) for expert in self.experts.values()]
        mine = slice(block.mine.start - block.rows.start, block.mine.stop - block.rows.start)
        target = inputs[1:][mine].unsqueeze(1)  # the last row's is no input of this block
        gains = torch.cat([logp[: len(target)].gather(1, target) for logp in logps], dim=1).double()
        gains = self.dist.gather(gains, mine, len(inputs) - 1)
        log_w = self.log_w if block.carry is None else self.close(block.carry, inputs[0])
        log_w = hedge_weights(log_w, gains, self.c.hedge_eta, self.c.hedge_share)
        is_owner = mine.stop == len(inputs)  # of the last row, which all ranks need
        open_row = torch.stack([logp[-1] if is_owner else logp.new_zeros(logp.shape[1]) for logp in logps])
        block.carry = log_w[-1], self.dist.sum(open_row)
        weights = log_w[mine].softmax(1).to(block.logp.device)
        return sum(weights[:, k : k + 1] * logp.double().exp() for k, logp in enumerate(logps)).log().float()

    def close(self, carry: tuple[Tensor, Tensor], token: Tensor) -> Tensor:
        """Return the log-weights after an open row, given its token."""
        log_w, gains = carry[0], carry[1][:, token].double().unsqueeze(0)
        return hedge_weights(log_w, gains, self.c.hedge_eta, self.c.hedge_share)[-1].log_softmax(0)

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        self.log_w = self.close(blocks[-1].carry, tokens[-1])
        weights = zip(self.experts, self.log_w.softmax(0).tolist(), strict=True)
        self.note = " hedge_weights: " + " ".join(f"{name}:{w:.3g}" for name, w in weights)
        for expert in self.experts.values():
            expert.learn(tokens, blocks)


MIXERS = {x.__name__.lower(): x for x in (Flat, Unigram, Bigram, Trigram, Backoff, Tilt, Maxent, Hedge)}
MIXERS["neural"] = Mixer
CALIBRATION_STEPS, CALIBRATION_LR = 512, 0.03


def calibrate(model: GPT, net: BiasNet, loader: TrainLoader, c: Config, dist: Dist) -> None:
    """Fit the mixer's network on training text that no step has seen: Adam at a rate that falls to zero."""
    text, chains, parts = loader.calibration_text, HashChains(c, dist.device), []
    neural = SlidingWindow("sliding", compiled(model, c, dist.device), c, dist, c.eval_stride)
    for start in range(0, len(text) - 1, c.ttt_chunk_tokens):
        tokens = text[start : start + c.ttt_chunk_tokens + 1]
        for rows in row_slices(len(tokens) - 1, neural):
            mine, logp = neural.share(rows), neural.predict(tokens[:-1], rows)["sliding"]
            parts.append((chains.candidates(tokens[:-1], mine, logp), tokens[1:][mine], rows.stop - rows.start))
        chains.update(tokens)
        neural.update(tokens)
    adam = torch.optim.Adam(net.parameters(), lr=CALIBRATION_LR)
    for step in range(CALIBRATION_STEPS):
        adam.param_groups[0]["lr"] = CALIBRATION_LR * (1 - step / CALIBRATION_STEPS)
        candidates, targets, n = parts[step % len(parts)]
        net_step(net, adam, [(candidates, targets)], n, dist)
    log.info(f"mixer_calibration: {sum(n for *_, n in parts)} tokens of held-out training text")


# ==================== Scoring =========================================================================================
# Predictors, and the one loop that every score in a log comes from.

# Rows are made, checked and charged in blocks, each a tensor of at most this many numbers (134 MB in float32) or one
# stride of rows, whatever the chunk's length. About K + 4 of them live at a time with K experts.
BLOCK_CELLS = 2**25
SUM_TOLERANCE = 1e-5  # of a row in float32; the largest of a pass is below 1e-6
# Of a pass: nll of every position in nats, float64 [N]; its mean; bits per byte; the largest |sum of a row - 1|; time.
Score = namedtuple("Score", "nll val_loss val_bpb max_sum_error seconds")


class SlidingWindow:
    """The model as it is. Row t is the softmax of its logits over the window that scores position t."""

    def __init__(self, stage: str, model, c: Config, dist: Dist, stride: int, temperature: float = 1.0):
        self.stages, self.model, self.c, self.dist = (stage,), model, c, dist
        self.stride, self.temperature, self.note = stride, temperature, ""  # for a log line; MixedTTT has one
        self.block_rows = max(1, BLOCK_CELLS // c.vocab_size // stride) * stride
        # Windows of a forward pass, alike in all stages: as many of a rank's part of a TTT chunk as fit, in even parts.
        n = min(-(-c.ttt_chunk_tokens // (c.eval_stride * dist.world_size)), self.block_rows // stride)
        self.batch = -(-n // -(-n // max(1, c.micro_batch_tokens // c.eval_seq_len)))
        if (c.doc_isolated or c.ttt_lora_rank) and torch.are_deterministic_algorithms_enabled():
            self.batch = 1  # else a BOS that a decoder does not know yet changes a shape, and so the rounding
        self.seen, self.begin = 0, 0  # positions of the stream: of the next chunk and of the open document's BOS
        self.context = torch.empty(0, dtype=torch.int64, device=dist.device)  # the inputs just before it

    def share(self, rows: slice) -> slice:
        """Return this rank's part of a block of rows."""
        return self.dist.share(rows.stop - rows.start, self.stride, rows.start)

    @torch.no_grad()
    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return by stage float32 log-probabilities [m, V] of what follows this rank's share of a chunk's rows."""
        mine, seq_len = self.share(rows), self.c.eval_seq_len
        logp = torch.empty(mine.stop - mine.start, self.c.vocab_size, device=inputs.device)
        if not len(logp):
            return {self.stages[0]: logp}
        first = self.seen + mine.start
        begins = self.begins(inputs[: mine.stop]) if self.c.doc_isolated else [0]
        starts, lows, highs = windows(first, self.seen + mine.stop, self.stride, seq_len, begins)
        known = F.pad(torch.cat([self.context, inputs]), (0, seq_len))  # zeros where causal attention does not look
        offset = self.seen - len(self.context)  # position of known[0]
        for b in range(0, len(starts), self.batch):
            start, low, high = (x[b : b + self.batch] for x in (starts, lows, highs))
            # To compile another shape takes half a minute.
            padding = self.batch - len(start) if compiles(self.c, inputs.device) else 0
            padded = np.pad(start, (0, padding), mode="edge")
            keep = self.stride if (start + seq_len - low).max() <= self.stride else seq_len
            window = np.repeat(np.arange(len(start)), high - low)  # of each position from low[0] to high[-1]
            column = np.arange(low[0], high[-1]) - start[window] - (seq_len - keep)
            logits = self.model(known[padded[:, None] - offset + np.arange(seq_len)], keep=keep)[window, column]
            # In float64: what is left of a row's deviation from one is the rounding of its entries.
            logp[low[0] - first : high[-1] - first] = (logits / self.temperature).double().log_softmax(-1)
        return {self.stages[0]: logp}

    def begins(self, inputs: Tensor) -> list[int]:
        """Return where the open document and those in the inputs that follow begin: positions of the stream."""
        found = (inputs == self.c.bos_id).nonzero().flatten() + self.seen
        return [self.begin, *(found[found > self.begin].tolist())]

    def update(self, tokens: Tensor) -> None:
        """Move past a scored chunk: tokens [n + 1], its inputs and its last target."""
        self.begin = self.begins(tokens[:-1])[-1]
        self.context = torch.cat([self.context, tokens[:-1]])[-self.c.eval_seq_len :]
        self.seen += len(tokens) - 1


class Deadline:
    """When adaptation has to end, once and for all: the rest of the stream must still be scored in time.

    The clock and the stream's length decide, never a token. Pass the logged `ttt_stop` as `stop_after` to reproduce it.
    """

    def __init__(self, dist: Dist, n_chunks: int = 0, seconds: float = math.inf, stop_after: int | None = None):
        self.left, self.stop_after, self.clock, self.seconds = n_chunks, stop_after, Clock(dist), seconds
        self.adapted, self.adapting, self.last, self.scoring = 0, 0.0, 0.0, deque(maxlen=9)
        self.over = False  # as of the last chunk that was scored: a replay comes to it where the run did

    def allows(self) -> bool:
        """Return whether to adapt to the chunk that has just been scored; `adapt` says when that is done."""
        self.left, began, self.last = self.left - 1, self.last, self.clock.seconds()
        self.scoring.append(self.last - began)
        typical = sorted(self.scoring)[(len(self.scoring) - 1) // 2]  # the lower median: the first chunks compile
        late = len(self.scoring) > 3 and self.last + self.adapting + self.left * typical > 0.97 * self.seconds
        if self.stop_after is None and late:
            self.stop_after = self.adapted
            log.info(f"ttt_stop: after {self.adapted} chunks, with {self.left} chunks left to score")
        self.over = self.stop_after is not None and self.adapted >= self.stop_after
        return not self.over

    def adapt(self) -> None:
        """Count and time an adaptation that has just ended."""
        began, self.last, self.adapted = self.last, self.clock.seconds(), self.adapted + 1
        self.adapting = self.last - began


class TTT(SlidingWindow):
    """Score-first test-time training: `update` trains a copy of the model on the chunk whose scores are fixed."""

    def __init__(self, model: GPT, c: Config, dist: Dist, tokenizer: Tokenizer, deadline: Deadline | None = None):
        self.deadline, self.tokenizer = deadline or Deadline(dist), tokenizer
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device)  # steps on a gradient that was not finite
        self.learner = copy.deepcopy(model)
        self.average = copy.deepcopy(model) if c.ttt_polyak else self.learner
        self.called, predicting = (compiled(x, c, dist.device) for x in (self.learner, self.average))
        stride = c.ttt_lora_tokens if c.ttt_lora_rank else c.eval_stride
        super().__init__("ttt", predicting, c, dist, stride, c.ttt_temperature)
        self.learner.blocks[: c.ttt_freeze_blocks].requires_grad_(False)
        self.params = [p for p in self.learner.parameters() if p.requires_grad]
        if c.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.params, c.ttt_lr, c.ttt_momentum)
        else:
            self.optimizer = torch.optim.AdamW(self.params, c.ttt_lr, (c.beta1, c.beta2), c.adam_eps, weight_decay=0.0)

    def update(self, tokens: Tensor) -> None:
        """Train on a scored chunk [n + 1] for TTT_EPOCHS, in time, and move past it."""
        if self.deadline.allows():
            # A cosine over a stream length that is a setting: no prediction knows the real length.
            part = min(1.0, self.seen / (self.c.ttt_cosine_tokens or math.inf))
            self.optimizer.param_groups[0]["lr"] = self.c.ttt_lr * 0.5 * (1 + math.cos(math.pi * part))
            sequences, n = self.training_sequences(tokens), max(1, self.c.ttt_batch_tokens // self.c.train_seq_len)
            for _ in range(self.c.ttt_epochs):
                for batch in zip(*(x.split(n) for x in sequences), strict=True):
                    self.step(*batch)
            self.deadline.adapt()
        super().update(tokens)

    def training_sequences(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the chunk [n + 1] as inputs, targets and weights [sequences, TRAIN_SEQ_LEN]; padding weighs 0."""
        inputs, targets, weights = tokens[:-1], tokens[1:], torch.ones(len(tokens) - 1, device=tokens.device)
        if self.c.ttt_byte_weighted:
            weights = self.tokenizer.count_bytes(inputs, targets).to(weights)
        padding = (0, -len(inputs) % self.c.train_seq_len)
        return tuple(F.pad(x, padding).view(-1, self.c.train_seq_len) for x in (inputs, targets, weights))

    def step(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Take a step on the weighted mean loss of a batch [sequences, T] that every rank holds whole."""
        # Micro batches are cut from the stream, not from ranks: scores differ between world sizes by rounding only.
        micro_seqs = max(1, self.c.ttt_micro_tokens // self.c.train_seq_len)
        mine, total_weight = self.dist.share(len(inputs), micro_seqs), weights.sum().clamp(min=1.0)
        self.optimizer.zero_grad()
        for x, y, weight in zip(*(part[mine].split(micro_seqs) for part in (inputs, targets, weights)), strict=True):
            if len(x):
                ((self.called(x, y) * weight).sum() / total_weight).backward()
        grads = self.dist.sum_gradients(self.params)
        self.skipped += clip_gradients([grads], grads.norm(), self.c.ttt_grad_clip)
        self.optimizer.step()
        if self.c.ttt_polyak:
            average, learner = ([p.detach() for p in model.parameters()] for model in (self.average, self.learner))
            torch._foreach_lerp_(average, learner, 1 - self.c.ttt_polyak)


Document = namedtuple("Document", "begin piece state past")  # its BOS, the piece to go on with, what is known by then


def carry_before(predictor, inputs: Tensor, rows: slice):
    """Return the carry of the last block before these rows, made again where inputs changed; None where none is."""
    kept = [block for block in predictor.made if block.rows.stop <= rows.start]
    predictor.made = [block for block in kept if torch.equal(block.inputs, inputs[: block.rows.stop])]
    if (done := predictor.made[-1].rows.stop if predictor.made else 0) < rows.start:
        predictor.predict(inputs, slice(done, rows.start))
    return predictor.made[-1].carry if predictor.made else None


class LoRA(TTT):
    """Test-time training, with adapters that each document trains for itself from its BOS on (PR #1530).

    A document is scored in pieces of TTT_LORA_TOKENS. When its next piece begins, the last one's tokens are inputs, and
    the adapters take a step of Adam on it. Keys and values stay as their piece made them (arXiv 1901.02860): a token is
    read once. With a frozen base, rows depend on their document alone. The state [D, 3, P] of D documents holds their
    adapters and Adam's two moments; the past [passes, 2, D, S, KV, head] holds their keys and values.
    """

    MAPS = "q", "v", "out", "down"

    def __init__(self, model: GPT, c: Config, dist: Dist, tokenizer: Tokenizer, deadline: Deadline | None = None):
        super().__init__(model, c, dist, tokenizer, deadline)
        self.maps = [m for name, m in self.average.named_modules() if name.rpartition(".")[2] in self.MAPS]
        self.attns = [self.average.blocks[layer].attn for layer in self.average.passes]  # one for each pass
        generator, parts = torch.Generator().manual_seed(1337), []  # not SEED: a decoder has the artifact alone
        for n_out, n_in in (m.weight.shape for m in self.maps):  # the second map is zero: adapters begin as no change
            parts.append(torch.empty(c.ttt_lora_rank, n_in).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator))
            parts.append(torch.zeros(n_out, c.ttt_lora_rank))
        self.shapes, adapters = [x.shape for x in parts], torch.cat([x.flatten() for x in parts])
        past = len(self.attns), 2, c.eval_seq_len - self.stride, self.attns[0].kv_heads, self.attns[0].head_dim
        fresh = torch.stack([adapters, 0 * adapters, 0 * adapters]), torch.zeros(past, dtype=self.average.dtype)
        self.fresh = [x.to(dist.device) for x in fresh]
        self.open, self.made = Document(0, 0, *self.fresh), []
        self.side_by_side = self.batch if dist.device.type == "cuda" else 1  # documents walked at once

    def forward(self, tokens: Tensor, adapters: Tensor, past: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [D, T, V] of all but the first two of the tokens [D, T + 2], and the past behind them."""
        parts = adapters.split([shape.numel() for shape in self.shapes], dim=1)
        parts = [x.unflatten(1, shape) for x, shape in zip(parts, self.shapes, strict=True)]
        for m, *adapter in zip(self.maps, parts[::2], parts[1::2], strict=True):
            m.adapter = adapter
        for attn, keys_values in zip(self.attns, past, strict=True):
            attn.past.append(tuple(keys_values))
        logits = self.average(tokens, mask=mask)
        grown = torch.stack([torch.stack(attn.past.popleft()) for attn in self.attns])
        for m in self.maps:
            m.adapter = None
        return logits, grown[:, :, :, self.stride :].detach()

    @torch.no_grad()
    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return by stage float32 log-probabilities [m, V] of what follows this rank's share of a chunk's rows."""
        opened, inputs = carry_before(self, inputs, rows) or self.open, inputs[: rows.stop]
        begins, last = [x for x in self.begins(inputs) if x >= opened.begin], self.seen + rows.stop
        ends = dict(zip(begins, [*begins[1:], last], strict=True))
        documents = [opened, *(Document(begin, 0, *self.fresh) for begin in begins[1:])]
        documents.sort(key=lambda x: x.begin + x.piece * self.stride - ends[x.begin])  # the longest first
        mine, known = documents[self.dist.rank :: self.dist.world_size], [torch.zeros_like(x) for x in self.fresh]
        logp = torch.zeros(rows.stop - rows.start + 1, self.c.vocab_size, device=inputs.device)
        for i in range(0, len(mine), self.side_by_side):
            group = mine[i : i + self.side_by_side]
            for document, *found in zip(group, *self.walk(group, ends, inputs, rows, logp), strict=True):
                if document.begin == begins[-1]:
                    known = [x.clone(memory_format=torch.contiguous_format) for x in found]
        carry = Document(begins[-1], (last - 1 - begins[-1]) // self.stride, *map(self.dist.sum, known))
        self.made = [*self.made[-1:], RowBlock(inputs.clone(), rows, self.share(rows), carry=carry)]  # a past is large
        return {"ttt": self.dist.sum(logp)[self.dist.share(rows.stop - rows.start, self.stride)]}

    def walk(self, group: list[Document], ends: dict[int, int], inputs: Tensor, rows: slice, logp: Tensor):
        """Score documents to their ends, learning between pieces. Return states and pasts before their last pieces.

        logp [m + 1, V] takes the rows; its last row takes all positions outside `rows`.
        """
        size, known = self.stride, F.pad(torch.cat([self.context, inputs]), (2, self.stride))
        state, past = torch.stack([x.state for x in group]), torch.stack([x.past for x in group], dim=2)
        places = [(x.begin - self.seen, x.piece, ends[x.begin] - self.seen) for x in group]  # in the chunk
        begin, piece, end = torch.tensor(places, device=inputs.device).T.unsqueeze(2)
        last_piece, own = (end - 1 - begin) // size, torch.arange(-2, size + 1, device=inputs.device)
        column = torch.arange(size - self.c.eval_seq_len, size, device=inputs.device)  # 0 where a piece begins
        for k in range(n_pieces := int((last_piece - piece).max()) + 1):
            now = torch.minimum(piece + k, last_piece)
            at, mask = begin + now * size + own, (column >= -now * size).unsqueeze(1) & (column <= own[2:-1, None])
            tokens, adapters = known[at + len(self.context) + 2], state[:, 0].clone().requires_grad_()
            with torch.set_grad_enabled(not self.deadline.over):
                logits, grown = self.forward(tokens[:, :-1], adapters, past, mask.unsqueeze(1))
                loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 3:].flatten(), reduction="sum") / size
            row = torch.where((at >= rows.start) & (at < end), at - rows.start, len(logp) - 1)[:, 2:-1]
            logp[row] = (logits.detach() / self.temperature).double().log_softmax(-1).float()
            if k + 1 < n_pieces:
                goes_on = (now < last_piece).unsqueeze(2)
                if not self.deadline.over:
                    (grad,) = torch.autograd.grad(loss, adapters)
                    state = torch.where(goes_on, self.adam(state, grad, now + 1), state)
                past = torch.where(goes_on.unsqueeze(3), grown, past)
        return state, past.unbind(2)

    def adam(self, state: Tensor, grad: Tensor, step: Tensor) -> Tensor:
        """Return the state [D, 3, P] after Adam's step [D, 1]-th step; a gradient that is not finite counts as zero."""
        c, finite, (adapters, first, second) = self.c, grad.isfinite().all(1, keepdim=True), state.unbind(1)
        grad = torch.where(finite, grad, 0.0)
        first, second = first.lerp(grad, 1 - c.beta1), second.lerp(grad.square(), 1 - c.beta2)
        mean, square = first / (1 - c.beta1**step), second / (1 - c.beta2**step)
        return torch.stack([adapters - c.ttt_lora_lr * mean / (square.sqrt() + c.adam_eps), first, second], 1)

    def update(self, tokens: Tensor) -> None:
        """Keep the open document's adapters, and train as TTT does: tokens [n + 1]."""
        self.open, self.made = carry_before(self, tokens[:-1], slice(len(tokens) - 1, len(tokens) - 1)), []
        super().update(tokens)


class MixedTTT:
    """The rows of test-time training, mixed with what the stream so far holds."""

    def __init__(self, neural: SlidingWindow, mixer: Mixer, c: Config, dist: Dist):
        self.stages, self.neural, self.mixer, self.dist = ("ttt", "mixed"), neural, mixer, dist
        self.stride, self.block_rows, self.share = neural.stride, neural.block_rows, neural.share
        self.chains, self.note = HashChains(c, dist.device), ""
        self.made: list[RowBlock] = []  # of the chunk, in order; a block is made again for other inputs

    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return by stage the log-probabilities [m, V] of the tokens that follow this rank's share of the rows."""
        carry, logp, mine = carry_before(self, inputs, rows), self.neural.predict(inputs, rows)["ttt"], self.share(rows)
        candidates = self.chains.candidates(inputs, mine, logp)
        self.made.append(block := RowBlock(inputs[: rows.stop].clone(), rows, mine, logp, candidates, carry))
        mixed, block.logp = self.mixer.mix(block), None
        return {"ttt": logp, "mixed": mixed}

    def update(self, tokens: Tensor) -> None:
        """Learn from a scored chunk: tokens [n + 1], its inputs and its last target."""
        parts = list(row_slices(len(tokens) - 1, self))
        if [block.rows for block in self.made] != parts or not torch.equal(self.made[-1].inputs, tokens[:-1]):
            for rows in parts:  # others than those that `score` asked for
                self.predict(tokens[:-1], rows)
        self.mixer.learn(tokens, self.made)
        self.made, self.note = [], self.mixer.note
        self.chains.update(tokens)
        self.neural.update(tokens)


def make_predictor(stage: str, model: GPT, net: BiasNet, c: Config, dist: Dist, tokenizer: Tokenizer, deadline=None):
    """Return the predictor of a stage; each starts from what the artifact holds."""
    if stage in FROZEN_STAGES:
        stride = c.eval_seq_len if stage == "roundtrip" else c.eval_stride
        return SlidingWindow(stage, compiled(model, c, dist.device), c, dist, stride)
    neural = (LoRA if c.ttt_lora_rank else TTT)(model, c, dist, tokenizer, deadline)
    return neural if stage == "ttt" else MixedTTT(neural, MIXERS[c.mixer](c, dist, net), c, dist)


def chunk_length(stage: str, c: Config) -> int:
    """Return the positions between two updates of a stage's predictor."""
    return c.val_batch_size if stage in FROZEN_STAGES else c.ttt_chunk_tokens


def bits_per_byte(nll: Tensor, token_bytes: Tensor) -> float:
    return nll.sum().item() / math.log(2) / max(1, int(token_bytes.sum()))


def row_slices(n: int, predictor):
    """Yield the parts of a chunk of n rows that the ranks predict together."""
    length = predictor.block_rows * predictor.dist.world_size
    return (slice(start, min(start + length, n)) for start in range(0, n, length))


def score(predictor, stream: Stream, chunk_tokens: int, dist: Dist) -> dict[str, Score]:
    """Predict, score, update, from left to right. Return a score a stage. Raise InputError for an improper row."""
    clock, logged, last, worst = Clock(dist), 0.0, predictor.stages[-1], dict.fromkeys(predictor.stages, 0.0)
    nll = {stage: torch.zeros(len(stream), dtype=torch.float64) for stage in predictor.stages}
    for chunk in stream.chunks(chunk_tokens):
        for rows in row_slices(len(chunk.inputs), predictor):
            mine, n, done = predictor.share(rows), rows.stop - rows.start, chunk.start + rows.stop
            for stage, logp in predictor.predict(chunk.inputs, rows).items():
                charged = -logp.gather(1, chunk.targets[mine].unsqueeze(1)).squeeze(1)  # a row meets its target
                part = slice(mine.start - rows.start, mine.stop - rows.start)
                nll[stage][done - n : done] = dist.gather(charged.double(), part, n).cpu()
                error = (logp.double().exp().sum(-1) - 1).abs().max().item() if len(logp) else 0.0
                worst[stage] = max(worst[stage], dist.max(error if math.isfinite(error) else math.inf))
                if worst[stage] > SUM_TOLERANCE:
                    raise InputError(f"rows up to {done}: a sum is off by {worst[stage]}; allowed is {SUM_TOLERANCE}")
        if not chunk.is_last:
            predictor.update(chunk.tokens)
        clock.show(f"  {last} [{done}/{len(stream)}]", done, len(stream))
        if clock.seconds() - logged >= 10:
            logged, bpb = clock.seconds(), bits_per_byte(nll[last][:done], stream.token_bytes[:done])
            log.info(f"  {last}_chunk [{done}/{len(stream)}] bpb={bpb:.4f} time={logged:.1f}s{predictor.note}")
    bpb, seconds = {stage: bits_per_byte(x, stream.token_bytes) for stage, x in nll.items()}, round(clock.seconds(), 3)
    return {stage: Score(x, x.mean().item(), bpb[stage], worst[stage], seconds) for stage, x in nll.items()}


# ==================== main ============================================================================================
# The order of the phases, and the records of a run.

VERSIONS = {"python": platform.python_version()} | {x.__name__: x.__version__ for x in (torch, np, sentencepiece)}


def evaluate(model: GPT, net: BiasNet, c: Config, dist: Dist, tokenizer: Tokenizer, stream: Stream):
    """Score the stream in each stage. Return (the stages' records, their scores)."""
    clock, records, scores = Clock(dist), {}, {}
    text = dict(tokens=len(stream), bytes=int(stream.token_bytes.sum()), documents=stream.documents)
    text |= dict(whole_stream=stream.whole, has_manifest=stream.has_manifest)
    # Those that adapt come last, in one pass if both are asked for, and have what is then left of MAX_EVAL_SECONDS.
    for stage in (x for x in STAGES if x in c.stages and not (x == "ttt" and "mixed" in c.stages)):
        n_chunks = -(-len(stream) // (chunk_tokens := chunk_length(stage, c)))
        deadline = Deadline(dist, n_chunks, (c.max_eval_seconds or math.inf) - clock.seconds())
        predictor = make_predictor(stage, model, net, c, dist, tokenizer, deadline)
        found, adaptation = score(predictor, stream, chunk_tokens, dist), {}
        if stage not in FROZEN_STAGES:
            adaptation = dict(adapted_chunks=deadline.adapted, chunks=n_chunks, ttt_stop=deadline.stop_after)
            skipped = getattr(predictor, "neural", predictor).skipped.item()
            log.info(f"ttt_chunks:{deadline.adapted}/{n_chunks} skipped_steps:{skipped}")
        if predictor.note:  # before the last chunk, which nothing learns from
            log.info(predictor.note.strip())
        for name, x in found.items():
            log_score(name, x, stream, c)
            records[name] = {key: value for key, value in x._asdict().items() if key != "nll"} | text | adaptation
        scores |= found
    seconds, cap = clock.seconds(), c.max_eval_seconds
    log.info(f"eval_seconds: {seconds:.1f}" + (f" of {cap:g}" if cap else "") + (" OVER" if 0 < cap < seconds else ""))
    return {stage: records[stage] for stage in c.stages}, scores


def log_score(stage: str, x: Score, stream: Stream, c: Config) -> None:
    """Log a stage's score by the names under which the field's scripts find it."""
    q, partial = quant_label(c), "" if stream.whole else f" partial:{len(stream)}_tokens"
    tag = dict(roundtrip=f"final_{q}_roundtrip", sliding=f"final_{q}_sliding_window", ttt="legal_ttt").get(stage, stage)
    log.info(f"{tag} val_loss:{x.val_loss:.4f} val_bpb:{x.val_bpb:.4f} eval_time:{1000 * x.seconds:.0f}ms{partial}")
    exact = f"val_loss:{x.val_loss:.8f} val_bpb:{x.val_bpb:.8f} max_sum_error:{x.max_sum_error:.2e}"
    log.info(f"{tag}_exact {exact}{partial}")


def hardware(dist: Dist) -> str:
    if dist.device.type == "cuda":
        return f"{dist.world_size} x {torch.cuda.get_device_name(dist.device)}"
    return f"{dist.world_size} process(es) on CPU, {torch.get_num_threads()} thread(s) each, {platform.machine()}"


def log_start(c: Config, dist: Dist, stream: Stream | None) -> None:
    """Log every value in force and what the run stands on."""
    mine, device, kernels = dist.share(c.batch_seqs), dist.device, choose_kernels(c, dist.device)
    n_passes = -(-(mine.stop - mine.start) // max(1, c.micro_batch_tokens // c.train_seq_len))
    lines = [*c.lines(), f"hardware: {hardware(dist)}", f"versions: {json.dumps(VERSIONS)}"]
    lines.append(f"script_sha256:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}")
    lines += [f"seed:{c.seed}", f"world_size:{dist.world_size} grad_accum_steps:{n_passes}"]
    lines.append(f"device:{device} dtype:{activation_dtype(c, device)} compile:{int(compiles(c, device))}")
    lines.append(f"kernels: attention:{kernels.attention} fused:{show(kernels.fused) or 'none'}")
    if stream is not None:
        partial = "" if stream.whole else " partial: the stream goes on"
        partial += "" if stream.has_manifest else " no manifest: completeness unknown"
        found = f"pattern={c.data_path}/*_val_*.bin tokens:{len(stream)} documents:{stream.documents}"
        lines.append(f"val_loader:shards {found}{partial}")
    log.info("\n".join(lines))


def write_records(record: dict, scores: dict[str, Score], stream: Stream | None, c: Config) -> None:
    """Write LOG_DIR/RUN_ID.json, and the final stage's per-token record if SCORES_PATH asks for it."""
    write_atomically(Path(c.log_dir) / f"{c.run_id}.json", (json.dumps(record, indent=1) + "\n").encode())
    if c.scores_path and scores:
        nll, token, n_bytes = (x.numpy() for x in (scores[c.stages[-1]].nll, stream.tokens[1:], stream.token_bytes))
        np.savez_compressed(file := io.BytesIO(), token=token, nll_nats=nll, bytes=n_bytes)
        write_atomically(Path(c.scores_path), file.getvalue())


def log_final(record: dict) -> None:
    """Log the run's score, which is its last stage's, and what there is to say against it."""
    row = record["stages"][record["final_stage"]]
    scope = f"documents:{row['documents']} " + ("whole stream" if row["whole_stream"] else "PARTIAL stream")
    if row.get("ttt_stop") is not None:
        scope += f" adaptation CUT by MAX_EVAL_SECONDS after {row['adapted_chunks']} of {row['chunks']} chunks"
    if (over := record["artifact"]["total_bytes"] - CAP_BYTES) > 0:
        scope += f" OVER THE CAP by {over} bytes"
    log.info(f"final val_bpb:{record['val_bpb']:.8f} stage:{record['final_stage']} {scope}")


def compile_ahead(model: GPT, loader: TrainLoader, tokenizer: Tokenizer, c: Config, dist: Dist) -> None:
    """Compile what averaging, calibration and scoring call, before any clock starts: each graph takes half a minute."""
    held_out_loss(compiled(model, c, dist.device), loader, c, dist)
    tokens = loader.calibration_text[: c.ttt_chunk_tokens + 1]
    for stage in ("roundtrip", "sliding", "ttt"):  # the last one trains a copy
        predictor = make_predictor(stage, model, BiasNet(c), c, dist, tokenizer)
        for _ in range(2):  # the first window scores more positions than the later ones
            for rows in row_slices(len(tokens) - 1, predictor):
                predictor.predict(tokens[:-1], rows)
            predictor.update(tokens)


def train_and_export(tokenizer: Tokenizer, c: Config, dist: Dist, stream: Stream | None) -> dict:
    """Train a model and write its artifact. Return the record's `train` part."""
    model, loader = make_model(c, dist.device).init_weights(c.seed).to(dist.device), TrainLoader(c, dist)
    log.info(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log.info(f"artifact_budget:{artifact_budget(model, c)} bytes beside the script")
    batch = loader.sequences(0, max(1, c.gptq_tokens // c.train_seq_len))  # read now: the export must not need files
    if compiles(c, dist.device):
        compile_ahead(model, loader, tokenizer, c, dist)
    averages, clock, record = train(model, loader, c, dist, stream)
    stepped = record["seconds"]
    choose_average(model, averages, loader, c, dist)
    averaged = clock.seconds()
    export(model, loader, batch, tokenizer.sha256, c, dist)
    total, cap = clock.seconds(), c.max_wallclock_seconds
    seconds = dict(steps=stepped, averaging=averaged - stepped, export=total - averaged, total=total)
    record["seconds"] = {part: round(value, 3) for part, value in seconds.items()}
    used = f"{total - stepped:.1f}" + (f" of {c.reserve_seconds:g}" if cap else "")
    log.info("train_seconds: " + " ".join(f"{k}:{v:.1f}" for k, v in record["seconds"].items()) + f" reserve:{used}")
    if 0 < cap < total:
        log.info(f"OVER MAX_WALLCLOCK_SECONDS={cap:g} by {total - cap:.1f} s")
    if dist.device.type == "cuda":
        allocated, reserved = (f() // 2**20 for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
        log.info(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
    return record


def execute(c: Config, env: dict[str, str], dist: Dist) -> None:
    """Run the phases in order: data, training, artifact, stages, records."""
    packed = dist.broadcast(read_artifact, c.artifact_path) if c.phase == "eval" else None
    c = with_artifact(c, packed[0], env) if packed else c
    run_id = dist.broadcast(lambda: c.run_id or f"{time.strftime('%Y%m%d_%H%M%S')}_seed{c.seed}_{os.getpid()}")
    c = dataclasses.replace(c, run_id=run_id, artifact_path=c.artifact_path or f"{c.log_dir}/{run_id}.artifact")
    tokenizer = Tokenizer(c, packed[0]["tokenizer"] if packed else "")
    stream = None if c.phase == "train" and not c.val_loss_every else Stream(c, dist.device, tokenizer)
    created: list[Path] = []
    try:
        open_log(c, dist, created)
        log_start(c, dist, stream)
        trained = None if c.phase == "eval" else train_and_export(tokenizer, c, dist, stream)
        header, parts = packed or dist.broadcast(read_artifact, c.artifact_path)  # from here on, only the file counts
        record = dict(run_id=run_id, seed=c.seed, config=dataclasses.asdict(c), hardware=hardware(dist))
        record |= dict(versions=VERSIONS, kernels=choose_kernels(c, dist.device)._asdict(), train=trained)
        record |= dict(artifact=size_record(c.artifact_path, header, c), stages={}, final_stage=None, val_bpb=None)
        dist.broadcast(write_records, record, {}, stream, c)  # before scoring, which may be ended
        if c.phase != "train":
            record["stages"], scores = evaluate(*unpack(parts, c, dist.device), c, dist, tokenizer, stream)
            record["final_stage"], record["val_bpb"] = c.stages[-1], record["stages"][c.stages[-1]]["val_bpb"]
            dist.broadcast(write_records, record, scores, stream, c)
            log_final(record)
    finally:
        for file in created:  # what a run that failed leaves empty
            if file.is_file() and not file.stat().st_size:
                file.unlink()


def main() -> int:
    """Run under torchrun or alone. Return 2, or 128 + a signal's number, after one line on standard error."""
    env = dict(os.environ)
    try:
        config = Config.from_env(env)
        dist = open_dist(config)
        execute(config, env, dist)
    except (InputError, OSError, KeyboardInterrupt) as error:
        number = error.args[0] if isinstance(error, KeyboardInterrupt) and error.args else 0
        reason = f"interrupted by {signal.Signals(number).name}" if number else str(error) or "interrupted"
        if number:
            log.info(reason)
        elif env.get("RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's ends the sleep; training may have held it back
            time.sleep(5)  # if the main rank met it too, torchrun ends this one before it says the same again
        print(("\033[K" if sys.stderr.isatty() else "") + f"error: {reason}", file=sys.stderr, flush=True)
        # Without waiting for the other ranks, which may be in a collective that never ends.
        return 128 + number if number else 2
    dist.close()
    return 0


def interrupt(number: int, _) -> None:
    raise KeyboardInterrupt(number)


def handle_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


if __name__ == "__main__":
    handle_signals(interrupt)
    os._exit(main())  # everything is written; gloo's threads can abort an interpreter that shuts down
