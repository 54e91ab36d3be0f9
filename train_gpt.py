"""Train a small transformer, pack it under 16,000,000 bytes, and score text with it in bits per byte.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                # the competition run on 8 GPUs
    PRESET=smoke torchrun --standalone --nproc_per_node=2 train_gpt.py   # minutes on two CPU cores
    PHASE=eval ARTIFACT_PATH=logs/x.artifact python train_gpt.py         # score an artifact that exists

The file reads in the order in which data flows: config, ranks and log, data, kernels, model, optimizers, training,
artifact, n-grams, mixing, scoring, main. Every score comes from one loop:

    for chunk in stream:                          # left to right, every position once
        logp = predictor.predict(chunk.inputs)    # [n, V] log-probabilities, each row sums to one
        nll = -logp[range(n), chunk.targets]      # the only line that charges a target
        predictor.update(chunk.tokens)            # test-time training, n-gram counts, mixture weights

`predict` receives the chunk's inputs and never its targets: row t depends on the artifact and on inputs[: t + 1], the
tokens before the one that it predicts. `update` learns from a chunk after its score is fixed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
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
import torch.distributed as c10d
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
except ImportError:  # every Triton kernel has a plain twin
    triton = tl = None
try:
    from flash_attn_interface import flash_attn_func  # FlashAttention 3, Hopper only
except ImportError:  # PyPI's stub lacks the function
    flash_attn_func = None

# ==================== Config ==========================================================================================
# Every setting of a run, read once from the environment and never changed.

CAP_BYTES = 16_000_000  # decimal; script plus artifact
STAGES = ("roundtrip", "sliding", "ttt", "mixed")
CONFIGS = Path(__file__).resolve().parent / "configs"


class InputError(Exception):
    """Input that cannot be used. The message is one line: the name, the value and what is allowed."""


def setting(default, low=None, high=None, choices=None, shape=False, score=False):
    """A field of Config with its allowed range.

    The artifact keeps the fields marked `shape` (its tensors and their coding) and `score` (how it is scored).
    """
    return field(default=default, metadata=dict(low=low, high=high, choices=choices, shape=shape, score=score))


@dataclass(frozen=True)
class Config:
    """All settings. A field's environment variable is its name in capitals; the defaults are the competition run."""

    # What to run, on what, and where the files are.
    # Names of files in configs/, applied from left to right; the environment comes last. PHASE=eval takes only what the
    # artifact does not keep from them.
    preset: str = setting("")
    run_id: str = setting("")  # "" = time and seed
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

    # Model.
    vocab_size: int = setting(1024, 257, 65536, shape=True)
    bos_id: int = setting(1, 0, shape=True)
    num_layers: int = setting(11, 1, shape=True)
    model_dim: int = setting(512, 16, shape=True)
    num_heads: int = setting(8, 1, shape=True)
    num_kv_heads: int = setting(4, 0, shape=True)  # 0 = as many as NUM_HEADS
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
    reserve_seconds: float = setting(60.0, 0.0)  # of them, for averaging, quantizing, calibrating and packing
    train_batch_tokens: int = setting(786_432, 1)  # per optimizer step, over all ranks
    train_seq_len: int = setting(2048, 8, score=True)
    micro_batch_tokens: int = setting(98_304, 8)  # per forward pass and rank, in training and in scoring
    warmup_steps: int = setting(20, 0)  # compile warm-up on synthetic tokens; all state is restored afterwards
    # Where the clock ends the run before ITERATIONS, these and MUON_MOMENTUM_WARMUP_STEPS shrink (see schedule).
    lr_warmup_iters: int = setting(20, 0)
    warmdown_iters: int = setting(3500, 0)
    train_log_every: int = setting(500, 1)
    val_loss_every: int = setting(0, 0)  # 0 = not during training
    complement_alpha: float = setting(0.5, 0.0, 1.0)  # of the loss weights 1 - alpha * p_bigram; 0 = none
    complement_tokens: int = setting(16_000_000, 1)  # training tokens from which its bigrams are counted
    crown_q_lambda: float = setting(1.0, 0.0)  # of the penalty on what rounding may cost, in the warmdown; 0 = none
    late_qat_threshold: float = setting(0.15, 0.0, 1.0)  # learning-rate scale below which weights are rounded; 0 = none

    # Optimizers and averages.
    matrix_lr: float = setting(0.025, 0.0)
    scalar_lr: float = setting(0.025, 0.0)
    tied_embed_lr: float = setting(0.035, 0.0)
    tied_embed_init_std: float = setting(0.005, 0.0)
    muon_momentum: float = setting(0.99, 0.0, 1.0)
    muon_momentum_warmup_start: float = setting(0.92, 0.0, 1.0)
    muon_momentum_warmup_steps: int = setting(1500, 0)
    muon_backend_steps: int = setting(5, 1, 20)  # Newton-Schulz iterations
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

    # Artifact.
    quant: str = setting("int6", choices=("int6", "hessian"), shape=True)
    quant_bits: int = setting(6, 2, 6, shape=True)  # of int6's matrices; tables have two bits more
    clip_sigmas: float = setting(0.0, 0.0, 256.0)  # int6's range in standard deviations of a row; 0 = fit TARGET_BYTES
    codec: str = setting("lzma", choices=("lzma", "rans"), shape=True)  # of the codes; LZMA takes all else
    gptq_tokens: int = setting(262_144, 1)  # of training text, on which the Hessians are measured
    target_bytes: int = setting(CAP_BYTES, 1, CAP_BYTES)  # script plus artifact

    # Scoring.
    stages: tuple[str, ...] = setting(STAGES, choices=STAGES)  # the last one is the run's score
    max_eval_seconds: float = setting(600.0, 0.0, score=True)  # of all stages; adaptation stops early. 0 = no cap
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
    ttt_freeze_blocks: int = setting(0, score=True)  # leading blocks that stay as they are; -2 = all but the last two
    ttt_grad_clip: float = setting(1.0, 0.0, score=True)
    ttt_polyak: float = setting(0.0, 0.0, 0.999999, score=True)  # decay of the average that predicts; 0 = none
    ttt_cosine_tokens: int = setting(0, 0, score=True)  # stream length over which the rate falls to 0; 0 = constant
    ttt_byte_weighted: bool = setting(False, score=True)
    ttt_temperature: float = setting(1.0, 0.1, 10.0, score=True)

    # Mixing.
    mixer: str = setting("hedge", score=True)  # one of MIXERS
    hedge_experts: tuple[str, ...] = setting(
        ("neural", "unigram", "bigram", "trigram", "backoff", "flat", "maxent"), score=True
    )
    hedge_eta: float = setting(1.0, 0.0, 10.0, score=True)  # learning rate: w_k <- w_k * p_k(token)^eta
    hedge_share: float = setting(0.0, 0.0, 0.5, score=True)  # of the weight that is dealt out evenly after a token
    backoff_base: float = setting(0.05, 0.0, 1.0, score=True)  # weight of the n-gram where the model is sure
    backoff_range: float = setting(0.55, 0.0, 1.0, score=True)  # what is added to it where the model is unsure
    backoff_centers: tuple[float, ...] = setting((4.5, 4.2, 3.8, 3.5, 3.2, 3.0), score=True)  # by context; last goes on
    backoff_min_count: int = setting(2, 1, 255, score=True)
    mixer_hidden: int = setting(32, 1, 4096, shape=True)  # width of the network that maxent learns
    mixer_lr: float = setting(0.002, 0.0, score=True)  # of its step after each scored chunk
    mixer_calibration_tokens: int = setting(1_048_576, 2)  # of held-out training text, on which it is fitted
    ngram_orders: tuple[int, ...] = setting((1, 2, 3, 4, 5, 6, 8, 12, 16, 24), shape=True)  # tokens of context
    ngram_max_chain: int = setting(16, 1, 255, score=True)  # latest occurrences of a context that count
    ngram_table_bits: int = setting(25, 4, 32, score=True)  # log2 of the hash heads; 8 bytes each

    @classmethod
    def from_env(cls, env: dict[str, str]) -> Config:
        """Return the settings in force: defaults, then the presets, then the environment. Raise InputError."""
        fields = {f.name.upper(): f for f in dataclasses.fields(cls)}
        refuse_unknown(env, list(fields))
        given = read_presets(env.get("PRESET", ""), list(fields)) | {name: env[name] for name in fields if name in env}
        return cls(**{fields[name].name: parse(fields[name], text) for name, text in given.items()})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check_range(f, getattr(self, f.name))
        for broken, message in self.contradictions():
            if broken:
                raise InputError(message)

    def contradictions(self):
        """Yield (is violated, message) for each rule over several settings."""
        head_dim, layers, orders = self.model_dim // self.num_heads, self.num_layers, self.ngram_orders
        broken = self.model_dim % self.num_heads or self.num_heads % self.kv_heads
        heads = f"MODEL_DIM={self.model_dim} NUM_HEADS={self.num_heads} NUM_KV_HEADS={self.num_kv_heads}"
        yield broken, f"{heads}: NUM_HEADS must divide MODEL_DIM, and NUM_KV_HEADS must divide NUM_HEADS"
        broken = self.rope_dims % 2 or self.rope_dims > head_dim
        yield broken, f"ROPE_DIMS={self.rope_dims}: allowed is an even number up to the head's {head_dim}"
        broken = not all(0 <= layer < layers for layer in self.ve_layers)
        yield broken, f"VE_LAYERS={show(self.ve_layers)}: allowed are layers 0 to {layers - 1}"
        yield self.bos_id >= self.vocab_size, f"BOS_ID={self.bos_id}: allowed is less than VOCAB_SIZE={self.vocab_size}"
        yield self.bigram_vocab_size == 1, "BIGRAM_VOCAB_SIZE=1: allowed are 0 (none) and 2 or more"
        batch, seq_len = self.train_batch_tokens, self.train_seq_len
        yield batch < seq_len, f"TRAIN_BATCH_TOKENS={batch}: allowed is at least TRAIN_SEQ_LEN={seq_len}"
        stride, seq_len = self.eval_stride, self.eval_seq_len
        yield stride > seq_len, f"EVAL_STRIDE={stride}: allowed is at most EVAL_SEQ_LEN={seq_len}"
        frozen, cap, reserve = self.ttt_freeze_blocks, self.max_wallclock_seconds, self.reserve_seconds
        yield frozen > layers, f"TTT_FREEZE_BLOCKS={frozen}: allowed is at most NUM_LAYERS={layers}"
        yield 0 < cap <= reserve, f"MAX_WALLCLOCK_SECONDS={cap}: allowed is more than RESERVE_SECONDS={reserve}, or 0"
        broken = self.phase != "eval" and self.quant != "int6" and self.late_qat_threshold > 0
        yield broken, f"QUANT={self.quant}: late QAT needs int6's scales; allowed is LATE_QAT_THRESHOLD=0"
        yield self.mixer not in MIXERS, f"MIXER={self.mixer!r} is not known: allowed are {', '.join(MIXERS)}"
        experts, known = self.hedge_experts, MIXERS.keys() - {"hedge"}
        broken = not experts or not set(experts) <= known
        yield broken, f"HEDGE_EXPERTS={show(experts)}: allowed are one or more of {', '.join(sorted(known))}"
        broken = self.phase != "eval" and self.complement_alpha > 0 and self.vocab_size > 16384
        yield broken, f"VOCAB_SIZE={self.vocab_size}: bigram weights allow 16384 at most; allowed is COMPLEMENT_ALPHA=0"
        yield not self.stages, f"STAGES is empty: allowed are {', '.join(STAGES)}"
        yield not self.backoff_centers, "BACKOFF_CENTERS is empty: allowed are one number or more"
        yield self.run_id != os.path.basename(self.run_id), f"RUN_ID={self.run_id!r}: allowed is a plain file name"
        for name in ("stages", "ve_layers", "ngram_orders", "hedge_experts", "kernels"):
            values = getattr(self, name)
            yield len(set(values)) < len(values), f"{name.upper()}={show(values)}: allowed is each value once"
        needed = {1, 2} | ({OneTokenTilt.ORDER} if "tilt" in (self.mixer, *experts) else set())
        broken = not needed <= set(orders) or not all(0 < order <= 64 for order in orders)
        listed = ", ".join(map(str, sorted(needed)))
        yield broken, f"NGRAM_ORDERS={show(orders)}: allowed are {listed} and others up to 64"
        yield self.phase == "eval" and not self.artifact_path, "PHASE=eval needs ARTIFACT_PATH, the file to score"

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
    """Raise InputError for a variable that looks like a setting and is none, such as EMA_ENABLED=1."""
    general = {"RUN", "LOG", "DATA", "NUM", "MAX", "MODEL", "TORCH", "TOKENIZER"}  # other programs' names begin so too
    families = {name.partition("_")[0] for name in known if "_" in name} - general | {"EMBED", "HEAD", "LN", "QAT"}
    for name in sorted(env.keys() - set(known)):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if near:
            raise InputError(f"unknown setting {name}: did you mean {near[0]}?")
        family, underscore, _ = name.partition("_")
        if underscore and family in families:
            members = ", ".join(k for k in known if k.startswith(family + "_")) or "none"
            raise InputError(f"unknown setting {name}={env[name]}: known {family} settings are {members}")


def read_presets(names: str, known: list[str]) -> dict[str, str]:
    """Return the NAME=value lines of configs/<name>.env for each of the names, the later ones winning.

    `#` starts a comment. Raise InputError for a file that does not exist or a line that names no setting.
    """
    found = {}
    for preset in filter(None, names.split(",")):
        path = CONFIGS / f"{preset}.env"
        if not path.is_file():
            allowed = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.env")))
            raise InputError(f"PRESET={names}: there is no configs/{preset}.env; allowed are {allowed}")
        for line in path.read_text(encoding="utf-8").splitlines():
            name, equals, value = (part.strip() for part in line.partition("#")[0].partition("="))
            if (name or equals) and (not equals or name not in known or name == "PRESET"):
                raise InputError(f"configs/{preset}.env: {line.strip()!r} is no setting; allowed are NAME=value lines")
            if name:
                found[name] = value
    return found


def parse(f: dataclasses.Field, text: str):
    """Return the value of a field from its text. Raise InputError."""
    kind = type(f.default)
    try:
        if kind is bool:
            return {"0": False, "1": True}[text]
        if kind is tuple:
            return tuple(type(f.default[0])(part) for part in text.replace(" ", "").split(",") if part)
        return kind(text)
    except (ValueError, KeyError):
        allowed = {bool: "0 or 1", int: "a whole number", float: "a number", tuple: "numbers with commas"}[kind]
        raise InputError(f"{f.name.upper()}={text!r} does not parse: allowed is {allowed}") from None


def check_range(f: dataclasses.Field, value) -> None:
    """Raise InputError if a field's value is outside the range that its declaration allows."""
    low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
    for part in value if isinstance(value, tuple) else (value,):
        if choices is not None and part not in choices:
            allowed = ", ".join(repr(choice) for choice in choices)
            raise InputError(f"{f.name.upper()}={part!r} is not known: allowed are {allowed}")
        if isinstance(part, (int, float)):
            above, below = low is None or part >= low, high is None or part <= high
            if not (math.isfinite(part) and above and below):
                allowed = f"{low} to {high}" if high is not None else f"{low} or more"
                raise InputError(f"{f.name.upper()}={part} is out of range: allowed is {allowed}")


def show(value) -> str:
    """Return a setting's value as the environment would spell it."""
    if isinstance(value, bool):
        return str(int(value))
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ==================== Dist and Log ====================================================================================
# This process among its ranks, its device, its log and its clock. All use of torch.distributed is here. With one rank
# every collective is the identity, and nothing below branches on the number of ranks.

log = logging.getLogger("train_gpt")  # silent until open_log
# torch 2.13 renamed both and warns at every call of the old name; 2.11 knows only the old one.
REDUCE_SCATTER = getattr(c10d, "reduce_scatter_single", None) or c10d.reduce_scatter_tensor
ALL_GATHER = getattr(c10d, "all_gather_single", None) or c10d.all_gather_into_tensor


class Dist:
    """One rank among `world_size`, and the collectives that a run needs."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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
        """Return the largest of the ranks' values: all of them decide alike. The device is not waited for."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        c10d.all_reduce(box, op=c10d.ReduceOp.MAX)
        return box.item()

    def sum_gradients(self, params: list[nn.Parameter]) -> Tensor:
        """Add up the ranks' gradients in one message; a parameter that this rank did not touch counts as zero.

        Return all of them in one row; each parameter's gradient is a view of it from then on.
        """
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
        if self.world_size == 1:
            return part
        whole = part.new_zeros(n, *part.shape[1:])
        whole[rows] = part
        return self.sum(whole)

    def reduce_scatter(self, bank: Tensor) -> tuple[Tensor, c10d.Work | None]:
        """Begin to sum [world_size * m, ...] over ranks. Return (this rank's m entries, the work to wait for)."""
        if self.world_size == 1:
            return bank, None
        shard = bank.new_empty(bank.shape[0] // self.world_size, *bank.shape[1:])
        return shard, REDUCE_SCATTER(shard, bank, async_op=True)

    def all_gather(self, shard: Tensor) -> tuple[Tensor, c10d.Work | None]:
        """Begin to join [m, ...] of each rank. Return ([world_size * m, ...], the work to wait for)."""
        if self.world_size == 1:
            return shard, None
        bank = shard.new_empty(shard.shape[0] * self.world_size, *shard.shape[1:])
        return bank, ALL_GATHER(bank, shard.contiguous(), async_op=True)

    def close(self) -> None:
        if c10d.is_available() and c10d.is_initialized():
            c10d.barrier()  # no rank takes its sockets away while another still uses them
            c10d.destroy_process_group()


def open_dist(c: Config) -> Dist:
    """Join the ranks that torchrun started, or be the only one. Raise InputError where the device does not exist."""
    env = os.environ
    rank, world_size, local_rank = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))
    if c.device == "cuda" and not torch.cuda.is_available():
        raise InputError("DEVICE=cuda: no CUDA device is available; allowed here are 'auto' and 'cpu'")
    if c.device == "cpu" or not torch.cuda.is_available():
        if world_size > 1:
            c10d.init_process_group("gloo")
        return Dist(rank, world_size)
    n_devices = torch.cuda.device_count()
    if local_rank >= n_devices:
        raise InputError(f"nproc_per_node: process {local_rank} has no CUDA device; allowed are {n_devices} a node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a graph for each batch shape, with and without gradients
    if world_size > 1:
        c10d.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return Dist(rank, world_size, device)


def activation_dtype(c: Config, device: torch.device) -> torch.dtype:
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if c.dtype == "auto" else c.dtype)


def compiled(function, c: Config, device: torch.device):
    """Return a model or function as it should be called: compiled on CUDA, itself elsewhere."""
    compiles = c.torch_compile and device.type == "cuda"
    return torch.compile(function, dynamic=False, fullgraph=True) if compiles else function


def gradient(p: nn.Parameter) -> Tensor:
    """Return the gradient, zeros where no backward pass has reached the parameter."""
    return torch.zeros_like(p) if p.grad is None else p.grad


def open_log(c: Config, run_id: str, dist: Dist) -> None:
    """Claim the run's files on the main rank and log to screen and file from here on. Raise InputError."""
    if not dist.is_main:
        return
    paths = [Path(c.log_dir) / f"{run_id}.txt", Path(c.log_dir) / f"{run_id}.json"]
    paths += [Path(c.scores_path)] if c.scores_path else []
    paths += [artifact_path(c, run_id)] if c.phase != "eval" else []
    for path in paths:
        if path.exists():
            raise InputError(f"RUN_ID={run_id}: {path} exists and would be overwritten; choose another name")
        make_folder(path.parent)
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.addHandler(logging.FileHandler(paths[0], encoding="utf-8"))


def make_folder(path: Path) -> None:
    """Make a folder and those above it. Raise InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; allowed is a folder that can be written") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    make_folder(path.parent)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Clock:
    """Seconds that count against a budget. `dist.max` of them is the same on all ranks; validation stops the clock."""

    def __init__(self, dist: Dist):
        self.dist, self.total = dist, 0.0
        self.resume()

    def resume(self) -> None:
        self.started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far, after all that the device was given, by the slowest rank."""
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize()
        return self.dist.max(self.total + time.perf_counter() - self.started)

    @contextmanager
    def stopped(self):
        self.total = self.seconds()
        yield
        self.resume()


# ==================== Data ============================================================================================
# Shards of token ids, the bytes that a token stands for, and the order in which training and scoring read them.

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256


def read_shard(path: str | Path) -> np.ndarray:
    """Return the memory-mapped uint16 token ids [n] of a challenge shard.

    The format is 256 little-endian int32 (magic, version, n, zeros), then n uint16. Raise InputError for a wrong
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


def find_shards(c: Config, split: str) -> list[str]:
    """Return the paths of the `train` or `val` shards in DATA_PATH, in order. Raise InputError if there is none."""
    pattern = os.path.join(glob.escape(c.data_path), f"*_{split}_*.bin")
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise InputError(f"DATA_PATH={c.data_path}: no shard matches {pattern}; data/prepare.py makes them")
    return paths


def check_ids(tokens: np.ndarray, c: Config, where: str) -> np.ndarray:
    """Return the tokens as int64. Raise InputError if one is past the vocabulary."""
    largest = int(tokens.max())
    if largest >= c.vocab_size:
        raise InputError(f"{where}: token id {largest}; allowed is less than VOCAB_SIZE={c.vocab_size}")
    return tokens.astype(np.int64)


class Tokenizer:
    """A SentencePiece model, checked against the settings and the data.

    `start_bytes[y]` and `inside_bytes[y]` ([V] int64) are the UTF-8 bytes that token y adds to the decoded text right
    after a BOS and elsewhere. They differ where the tokenizer's decoder drops a document's leading space.
    """

    def __init__(self, c: Config):
        if not os.path.isdir(c.data_path):
            raise InputError(f"DATA_PATH={c.data_path}: no such folder; data/prepare.py makes one")
        path = c.tokenizer_path or os.path.join(c.data_path, "tokenizer.model")
        if not os.path.isfile(path):
            raise InputError(f"TOKENIZER_PATH={path}: no such file")
        self.sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=path)
        except RuntimeError:
            raise InputError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
        self.check(path, c)
        ids = range(self.sp.vocab_size())
        self.start_bytes = torch.tensor([self.added_bytes(i, at_start=True) for i in ids])
        self.inside_bytes = torch.tensor([self.added_bytes(i, at_start=False) for i in ids])
        self.bos_id = c.bos_id

    def check(self, path: str, c: Config) -> None:
        """Raise InputError unless the settings and the manifest of the shards name this tokenizer."""
        size, bos = self.sp.vocab_size(), self.sp.bos_id()
        if size != c.vocab_size:
            raise InputError(f"TOKENIZER_PATH={path} has {size} pieces; VOCAB_SIZE={c.vocab_size} must match")
        if bos != c.bos_id:
            raise InputError(f"TOKENIZER_PATH={path} has BOS id {bos}; BOS_ID={c.bos_id} must match")
        if not any(self.sp.is_byte(i) for i in range(size)):
            raise InputError(f"TOKENIZER_PATH={path} has no byte pieces; without them text has no exact byte count")
        manifest = Path(c.data_path) / "manifest.json"
        if manifest.is_file():
            try:
                expected = json.loads(manifest.read_text()).get("tokenizer_sha256", self.sha256)
            except (ValueError, AttributeError):
                raise InputError(f"{manifest}: not a JSON object; data/prepare.py writes one") from None
            if expected != self.sha256:
                raise InputError(f"TOKENIZER_PATH={path}: sha256 differs from the one that {manifest} names")

    def added_bytes(self, token: int, at_start: bool) -> int:
        """Return the UTF-8 bytes of one token by the tokenizer's decoder; a byte piece is one byte anywhere."""
        if self.sp.is_byte(token):
            return 1
        if self.sp.is_control(token) or self.sp.is_unknown(token) or self.sp.is_unused(token):
            return 0
        text = self.sp.decode([token]) if at_start else self.sp.id_to_piece(token).replace("\u2581", " ")
        return len(text.encode("utf-8"))

    def count_bytes(self, previous: Tensor, tokens: Tensor) -> Tensor:
        """Return the bytes that each token adds after the one before it: int64, shaped like `tokens`, on the CPU."""
        previous, tokens = previous.cpu(), tokens.cpu()
        return torch.where(previous == self.bos_id, self.start_bytes[tokens], self.inside_bytes[tokens])


class TrainLoader:
    """Training sequences in an order that visits each once before any twice, the same at every world size.

    The shards are cut into spans of TRAIN_SEQ_LEN tokens (plus one, the last target). Sequence i of the run is span
    (offset + i * stride) mod n with the stride coprime to n: consecutive sequences come from all over the data. The
    last spans are held out: averages are chosen on 65,536 tokens of them and the mixer is fitted on
    MIXER_CALIBRATION_TOKENS, or both on a tenth of the data if that is less.
    """

    AVERAGING_TOKENS, BATCHES_AHEAD = 65_536, 4

    def __init__(self, c: Config, dist: Dist):
        self.c, self.dist, self.seq_len, self.stalls = c, dist, c.train_seq_len, 0
        self.paths = find_shards(c, "train")
        self.shards = [read_shard(path) for path in self.paths]
        self.ends = np.cumsum([(len(shard) - 1) // self.seq_len for shard in self.shards])
        spans = int(self.ends[-1])
        if spans < 2:
            raise InputError(f"TRAIN_SEQ_LEN={self.seq_len}: {c.data_path} has {spans} sequences; 2 are needed")
        self.averaging, calibration = (
            min(-(-tokens // self.seq_len), max(1, spans // 10))
            for tokens in (self.AVERAGING_TOKENS, c.mixer_calibration_tokens)
        )
        self.held_out = max(self.averaging, calibration)
        self.n = spans - self.held_out
        self.offset = int(np.random.default_rng(c.seed).integers(self.n))
        candidates = range(max(1, round(0.618 * self.n)), 2 * self.n + 2)
        self.stride = next(s for s in candidates if math.gcd(s, self.n) == 1)

    def rows(self, spans) -> Tensor:
        """Return the token ids of the spans, int64 [n, TRAIN_SEQ_LEN + 1]; n may be 0."""
        found = np.empty((len(spans), self.seq_len + 1), dtype=np.int64)
        for row, span in zip(found, spans, strict=True):
            shard = int(np.searchsorted(self.ends, span, side="right"))
            start = (span - (int(self.ends[shard - 1]) if shard else 0)) * self.seq_len
            row[:] = check_ids(self.shards[shard][start : start + self.seq_len + 1], self.c, self.paths[shard])
        return torch.from_numpy(found)

    def batch(self, step: int) -> Tensor:
        """Return this rank's sequences of an optimizer step, on the host; pinned for CUDA."""
        mine = self.dist.share(self.c.batch_seqs, start=step * self.c.batch_seqs)
        batch = self.rows([(self.offset + i * self.stride) % self.n for i in range(mine.start, mine.stop)])
        return batch.pin_memory() if self.dist.device.type == "cuda" else batch

    def batches(self):
        """Yield the steps' batches on the device. A thread reads ahead; `stalls` counts the batches waited for."""
        device = self.dist.device
        use = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        with ThreadPoolExecutor(1, initializer=use) as reader:
            coming = deque(reader.submit(self.batch, step) for step in range(self.BATCHES_AHEAD))
            for step in itertools.count():
                self.stalls += step > 0 and not coming[0].done()
                batch = coming.popleft().result()
                coming.append(reader.submit(self.batch, step + self.BATCHES_AHEAD))
                yield batch.to(device, non_blocking=True)

    def first_rows(self, n_tokens: int) -> Tensor:
        """Return this rank's part of the run's first n_tokens, one sequence at least."""
        mine = self.dist.share(max(1, n_tokens // self.seq_len))
        rows = self.rows([(self.offset + i * self.stride) % self.n for i in range(mine.start, mine.stop)])
        return rows.to(self.dist.device)

    def averaging_rows(self) -> Tensor:
        """Return this rank's part of the held-out spans on which averages are chosen."""
        mine = self.dist.share(self.averaging, start=self.n)
        return self.rows(range(mine.start, mine.stop)).to(self.dist.device)

    def calibration_text(self) -> Tensor:
        """Return the held-out spans in the order of the text: int64 [MIXER_CALIBRATION_TOKENS] at most."""
        text = self.rows(range(self.n, self.n + self.held_out))[:, :-1].flatten()
        return text[: self.c.mixer_calibration_tokens].to(self.dist.device)

    def head(self, n_tokens: int) -> np.ndarray:
        """Return the first tokens of the first shard, the same on every rank."""
        return check_ids(self.shards[0][:n_tokens], self.c, self.paths[0])


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

    def __init__(self, c: Config, device: torch.device, tokenizer: Tokenizer):
        paths = find_shards(c, "val")
        tokens = np.concatenate([check_ids(read_shard(path), c, path) for path in paths])
        if len(tokens) <= c.eval_seq_len:
            least = f"more than EVAL_SEQ_LEN={c.eval_seq_len}"
            raise InputError(f"DATA_PATH={c.data_path}: validation has {len(tokens)} tokens; allowed is {least}")
        if tokens[0] != c.bos_id:
            raise InputError(f"shard {paths[0]}: it begins with token {tokens[0]}; allowed is BOS_ID={c.bos_id}")
        self.whole = c.val_tokens == 0 or c.val_tokens >= len(tokens) - 1
        if not self.whole:
            tokens = tokens[: c.val_tokens + 1]
        self.tokens, self.device = torch.from_numpy(tokens), device
        self.documents = int((self.tokens[:-1] == c.bos_id).sum())
        self.token_bytes = tokenizer.count_bytes(self.tokens[:-1], self.tokens[1:])

    def __len__(self) -> int:
        """Return the number of positions to score."""
        return len(self.tokens) - 1

    def chunks(self, chunk_tokens: int):
        """Yield the stream cut every `chunk_tokens` positions."""
        for start in range(0, len(self), chunk_tokens):
            stop = min(start + chunk_tokens, len(self))
            yield Chunk(start, self.tokens[start : stop + 1].to(self.device), stop == len(self))


def windows(first: int, last: int, stride: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the windows that score the stream's positions [first, last), as arrays (start, low, high).

    Window k reads inputs [k * stride, k * stride + seq_len) and scores its last `stride` positions; window 0 scores
    all of its own. Every position is scored once. Stride = seq_len gives disjoint windows.
    """
    owner = [max(0, (position - (seq_len - stride)) // stride) for position in (first, last - 1)]
    start = np.arange(owner[0], owner[1] + 1) * stride
    low = np.where(start == 0, 0, start + seq_len - stride)
    return start, np.maximum(low, first), np.minimum(start + seq_len, last)


# ==================== Kernels =========================================================================================
# The operations with more than one implementation, behind one name each. The plain one is the specification.

SDPA_BACKENDS = {
    name: getattr(SDPBackend, name.upper() + "_ATTENTION", SDPBackend.MATH)
    for name in ("cudnn", "flash", "efficient", "math")
}  # in the order in which `auto` tries them


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "math") -> Tensor:
    """Return causal attention with grouped KV heads: q [B, T, H, D], k and v [B, T, KV, D] -> [B, T, H, D]."""
    if backend == "flash3":
        y = flash_attn_func(q, k, v, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
        return y[0] if isinstance(y, tuple) else y
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(list(SDPA_BACKENDS.values()) if backend == "auto" else SDPA_BACKENDS[backend], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return the logits held within +-cap, as float32; a cap of 0 is none."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


def softcapped_nll(logits: Tensor, targets: Tensor, cap: float, fused: bool = False) -> Tensor:
    """Return the nll of targets [N] under the softmax of softcap(logits [N, V]): float32 [N].

    The fused form reads the logits in their own type and keeps nothing of their size in float32.
    """
    if fused:
        return SoftcappedNLL.apply(logits.contiguous(), targets.contiguous(), cap)
    return F.cross_entropy(softcap(logits, cap), targets, reduction="none")


def linear_leaky_square(x: Tensor, weight: Tensor, slope: float, fused: bool = False) -> Tensor:
    """Return leaky_relu(x W^T)^2: x [..., K], weight [N, K] -> [..., N]. The fused form squares in the product."""
    if fused:
        y = LinearLeakySquare.apply(x.flatten(0, -2).contiguous(), weight.contiguous(), slope)
        return y.view(*x.shape[:-1], -1)
    return F.leaky_relu(F.linear(x, weight), slope).square()


jit = triton.jit if triton else lambda kernel: kernel
NLL_BLOCK = 1024  # logits of a row at a time
TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)


@jit
def softcapped(x, CAP: tl.constexpr):
    """Return CAP * tanh(x / CAP), by the logistic function."""
    return 2 * CAP * tl.sigmoid(2 * x / CAP) - CAP if CAP > 0 else x


@jit
def softcapped_nll_kernel(logits, targets, nll, lse, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Gather a row's log-sum-exp as its logits stream by (Milakov and Gimelshein 2018); a program a row."""
    row = tl.program_id(0).to(tl.int64)
    largest, total = tl.full((), -1e30, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
        z = tl.where(column < V, softcapped(x, CAP), -1e30)
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), 0)
        largest = new
    log_sum = largest + tl.log(total)
    target = tl.load(logits + row * V + tl.load(targets + row)).to(tl.float32)
    tl.store(lse + row, log_sum)
    tl.store(nll + row, log_sum - softcapped(target, CAP))


@jit
def softcapped_nll_grad_kernel(
    logits, targets, lse, grad, grad_logits, V: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr
):
    """Write grad * (p - [target]) * dz/dx, with p made again from the log-sum-exp; a program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
    z = softcapped(x, CAP)
    error = tl.exp(z - tl.load(lse + row)) - tl.where(column == tl.load(targets + row), 1.0, 0.0)
    slope = 1 - (z / CAP) * (z / CAP) if CAP > 0 else 1.0
    tl.store(grad_logits + row * V + column, tl.load(grad + row) * error * slope, mask=column < V)


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
    """softcapped_nll by the two kernels above."""

    @staticmethod
    def forward(ctx, logits, targets, cap):
        n_rows, vocab_size = logits.shape
        nll, lse = (torch.empty(n_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
        softcapped_nll_kernel[(n_rows,)](logits, targets, nll, lse, vocab_size, cap, NLL_BLOCK)
        ctx.save_for_backward(logits, targets, lse)
        ctx.cap = cap
        return nll

    @staticmethod
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        n_rows, vocab_size = logits.shape
        grad_logits, grid = torch.empty_like(logits), (n_rows, -(-vocab_size // NLL_BLOCK))
        softcapped_nll_grad_kernel[grid](
            logits, targets, lse, grad.contiguous(), grad_logits, vocab_size, ctx.cap, NLL_BLOCK
        )
        return grad_logits, None, None


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
        inner = grad * product * torch.where(product > 0, 2.0, 2 * ctx.slope**2).to(grad.dtype)
        return inner @ weight, inner.mT @ x, None


@dataclass(frozen=True)
class Kernels:
    """Which form each operation has; the defaults are the plain ones."""

    attention: str = "math"
    fused: tuple[str, ...] = ()  # of "loss" and "mlp"


@functools.cache
@torch.enable_grad()  # also where the caller only predicts: what is chosen has to work both ways
def choose_kernels(c: Config, device: torch.device) -> Kernels:
    """Return ATTENTION and KERNELS, each checked once against its plain form and replaced by it where it fails."""
    head_dim, n, dtype = c.model_dim // c.num_heads, 256, activation_dtype(c, device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    tries = ["flash3", "auto"] if c.attention == "auto" and hopper and flash_attn_func else [c.attention]
    qkv = [random(2, 128, heads, head_dim) for heads in (c.num_heads, c.kv_heads, c.kv_heads)]
    forms = {name: functools.partial(attention, backend=name) for name in tries}
    backend = next((name for name in tries if agrees(f"ATTENTION={name}", forms[name], attention, qkv, c)), "math")
    targets = torch.randint(c.vocab_size, (n,), generator=generator).to(device)
    inputs = dict(loss=[random(n, c.vocab_size)], mlp=[random(n, c.model_dim), random(2 * c.model_dim, c.model_dim)])
    forms = dict(
        loss=lambda x, fused=False: softcapped_nll(x, targets, c.logit_softcap, fused),
        mlp=lambda x, w, fused=False: linear_leaky_square(x, w, c.leaky_slope, fused),
    )
    runs_triton = triton and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    fused = tuple(
        name
        for name in (c.kernels if runs_triton else ())
        if agrees(f"KERNELS={name}", functools.partial(forms[name], fused=True), forms[name], inputs[name], c)
    )
    return Kernels(backend, fused)


def agrees(name: str, fast, plain, inputs: list[Tensor], c: Config) -> bool:
    """Return whether a form, compiled as the run would, gives the plain form's value and gradients up to rounding.

    Where it does not, log one line.
    """
    try:
        results = [form(*inputs) for form in (compiled(fast, c, inputs[0].device), plain)]
        found, expected = ([y.detach(), *torch.autograd.grad(y.square().sum(), inputs)] for y in results)
        errors = [((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, expected, strict=True)]
        fault = "" if all(error <= 2e-2 for error in errors) else f"differs by {max(errors):.1e}"
    except Exception as error:  # whatever a library raises for a device, a type or a shape that it does not take
        fault = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault:
        log.info(f"kernel_fallback:{name} to the plain form ({fault})")
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
    """Return the root-mean-square norm over the last dimension, without weights."""
    return F.rms_norm(x, (x.shape[-1],))


def shift(x: Tensor) -> Tensor:
    """Return x moved one position later along dimension 1, zeros first: position t gets what t - 1 held."""
    return F.pad(x[:, :-1], (0, 0) * (x.dim() - 2) + (1, 0))


class Linear(nn.Module):
    """A linear map without bias, or `apply` with its weight. The float32 weight is cast to the activations' type."""

    def __init__(self, in_features: int, out_features: int, role="matrix", init="orthogonal", apply=F.linear):
        super().__init__()
        self.weight, self.apply_weight = parameter(role, out_features, in_features, init=init), apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.weight.to(x.dtype))


class Table(nn.Embedding):
    """An embedding: rows looked up by token or by hash."""

    def __init__(self, rows: int, dim: int, init: str | float):
        super().__init__(rows, dim, _weight=torch.empty(rows, dim))
        self.weight = parameter("table", rows, dim, init=init)


class BigramEmbedding(nn.Module):
    """A hashed embedding of (token, token before it); the last row stands for 'none before', as after a BOS."""

    def __init__(self, c: Config):
        super().__init__()
        self.rows, self.bos_id = c.bigram_vocab_size, c.bos_id
        self.emb = Table(c.bigram_vocab_size, c.bigram_dim, init="zeros")
        self.proj = Linear(c.bigram_dim, c.model_dim, role="projection")
        self.scale = parameter("scalar", init=torch.tensor(0.05))

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
        self.gate = parameter("scalar", self.CHANNELS)
        self.scale = parameter("scalar")

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        gate = self.scale * torch.sigmoid(x[..., : self.CHANNELS].float() @ self.gate)
        gate = gate.masked_fill(tokens == self.bos_id, 0.0)
        return x + gate.unsqueeze(-1).to(x.dtype) * shift(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, H, D] with its first 2R channels rotated by cos, sin [T, R]; the others pass."""
    half = cos.shape[-1]
    if half == 0:
        return x
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
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
        self.backend = backend
        self.heads, self.kv_heads, self.head_dim = c.num_heads, c.kv_heads, c.model_dim // c.num_heads
        kv_dim = self.kv_heads * self.head_dim
        self.q, self.k, self.v = (Linear(c.model_dim, n) for n in (c.model_dim, kv_dim, kv_dim))
        self.out = Linear(c.model_dim, c.model_dim, init="zeros")
        self.q_gain = parameter("scalar", init=torch.full((c.num_heads,), c.qk_gain_init))
        # ResFormer (arXiv 2410.17897): later layers attend to a mix of their own values and the first layer's.
        mixes_value = c.value_residual and layer > 0
        self.value_mix = parameter("scalar", init=torch.tensor([0.5, 0.5])) if mixes_value else None
        self.exclusive = layer >= c.num_layers - c.xsa_last_n

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], v_first: Tensor | None, v_extra: Tensor | None):
        """Return (y [B, T, C], v [B, T, KV, D] of this layer before any mixing) for x [B, T, C]."""
        batch, seq_len, _ = x.shape
        q = self.q(x).view(batch, seq_len, self.heads, self.head_dim)
        k, v_own = (f(x).view(batch, seq_len, self.kv_heads, self.head_dim) for f in (self.k, self.v))
        v = v_own if v_extra is None else v_own + v_extra.view_as(v_own)
        if self.value_mix is not None:
            mix = self.value_mix.to(v.dtype)
            v = mix[0] * v_first + mix[1] * v
        q, k = rotate(rms_norm(q), *rotary), rotate(rms_norm(k), *rotary)
        y = attention(q * self.q_gain.to(q.dtype)[:, None], k, v, self.backend)
        if self.exclusive:
            y = remove_own_value(y, v)
        return self.out(y.reshape(batch, seq_len, -1)), v_own


class Block(nn.Module):
    """Attention, then MLP, each on the normed input; the stem's output x0 is mixed in first."""

    def __init__(self, c: Config, layer: int, kernels: Kernels):
        super().__init__()
        hidden, ones = round(c.mlp_mult * c.model_dim), torch.ones(c.model_dim)
        self.attn = Attention(c, layer, kernels.attention)
        activate = functools.partial(linear_leaky_square, slope=c.leaky_slope, fused="mlp" in kernels.fused)
        self.up = Linear(c.model_dim, hidden, apply=activate)
        self.down = Linear(hidden, c.model_dim, init="zeros")
        self.resid_mix = parameter("scalar", init=torch.stack([ones, 0 * ones]))
        self.attn_scale = parameter("scalar", init=ones)
        self.mlp_scale = parameter("scalar", init=ones)
        self.input_scale = 1 / math.sqrt(layer + 1) if c.layer_scale else 1.0

    def forward(self, x: Tensor, x0: Tensor, rotary, v_first: Tensor | None, v_extra: Tensor | None):
        """Return (x [B, T, C], v [B, T, KV, D]) for x, x0 [B, T, C]."""
        mix, attn_scale, mlp_scale = (p.to(x.dtype) for p in (self.resid_mix, self.attn_scale, self.mlp_scale))
        x = mix[0] * x + mix[1] * x0
        y, v = self.attn(rms_norm(x) * self.input_scale, rotary, v_first, v_extra)
        x = x + attn_scale * y
        return x + mlp_scale * self.down(self.up(rms_norm(x) * self.input_scale)), v


class GPT(nn.Module):
    """The transformer. All parameters are float32; activations have the type `dtype`."""

    def __init__(self, c: Config, dtype: torch.dtype = torch.float32, kernels: Kernels | None = None):
        super().__init__()
        kernels = kernels or Kernels()
        self.dtype, self.logit_softcap, self.ve_layers = dtype, c.logit_softcap, c.ve_layers
        self.fused_loss = "loss" in kernels.fused
        self.tok_emb = Table(c.vocab_size, c.model_dim, init=c.tied_embed_init_std)
        self.bigram = BigramEmbedding(c) if c.bigram_vocab_size else None
        self.smear = SmearGate(c) if c.smear_gate else None
        if c.ve_layers:
            kv_dim = c.kv_heads * c.model_dim // c.num_heads
            self.value_emb = Table(c.vocab_size, c.ve_dim, init=0.01)
            self.value_proj = Linear(c.ve_dim, kv_dim, role="projection", init="zeros")
            self.value_scale = parameter("scalar", init=torch.full((len(c.ve_layers),), 0.1))
        self.blocks = nn.ModuleList(Block(c, layer, kernels) for layer in range(c.num_layers))
        # U-Net: the second half of the layers takes back what the first half put out, latest first.
        self.encoder_layers = c.num_layers // 2 if c.unet_skips else 0
        self.skip_scale = parameter("scalar", init=torch.ones(self.encoder_layers, c.model_dim))
        self.head = None if c.tie_embeddings else Linear(c.model_dim, c.vocab_size, role="table", init="zeros")
        seq_len = max(c.train_seq_len, c.eval_seq_len)
        frequency = c.rope_base ** -(torch.arange(c.rope_dims // 2).float() / max(1, c.rope_dims // 2))
        angle = torch.outer(torch.arange(seq_len).float(), frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

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

    def forward(self, tokens: Tensor, targets: Tensor | None = None, keep: int = 0) -> Tensor:
        """Return the logits after token ids [B, T]: float32 [B, T, V], or [B, keep, V] for the last `keep` positions.

        With targets, token ids [B, T], return the nll of each: float32 [B, T].
        """
        assert tokens.shape[1] <= len(self.cos), "longer than TRAIN_SEQ_LEN and EVAL_SEQ_LEN"
        x = self.tok_emb(tokens).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, self.dtype)
        if self.smear is not None:
            x = self.smear(x, tokens)
        x = rms_norm(self.run_blocks(rms_norm(x), tokens))
        x = x[:, -keep:] if keep else x
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)) if self.head is None else self.head(x)
        if targets is None:
            return softcap(logits, self.logit_softcap)
        nll = softcapped_nll(logits.flatten(0, 1), targets.flatten(), self.logit_softcap, self.fused_loss)
        return nll.view(targets.shape)

    def run_blocks(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Run all layers over the stem's output [B, T, C]."""
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
    own = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, replacements)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, own)


# ==================== Optimizers ======================================================================================
# Muon on the blocks' matrices, AdamW on the rest, and the running averages of the weights.


def zeropower(bank: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return roughly the nearest semi-orthogonal matrices of [n, rows, cols], in `dtype`: singular values near 1.

    x <- a x + (b x x^T + c (x x^T)^2) x pushes singular values toward 1 (Keller Jordan, Muon, 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = bank.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz. Matrices of one shape are stacked into a bank and stepped together.

    With several ranks, `reduce` pads each gradient bank to a multiple of their number and reduce-scatters it, and
    `step` orthogonalizes this rank's shard and gathers the updates. The rank holds the momentum of its shard only.
    One bank's message is on its way while the next bank is computed, the largest first (Parallel Muon, PR #399).
    """

    def __init__(self, params, lr: float, momentum: float, c: Config, dist: Dist):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=c.muon_wd))
        self.c, self.dist, self.dtype = c, dist, activation_dtype(c, dist.device)
        params = self.param_groups[0]["params"]
        shapes = sorted({p.shape for p in params}, key=lambda shape: (-shape.numel(), shape))
        self.banks = [[p for p in params if p.shape == shape] for shape in shapes]
        self.shards: list[Tensor] = []

    @torch.no_grad()
    def reduce(self) -> list[tuple[Tensor, c10d.Work | None]]:
        """Begin to sum the gradients over ranks; the caller waits for this rank's shard of each bank."""
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
            buffer = state.setdefault("momentum_shard", torch.zeros_like(shard))
            buffer.mul_(momentum).add_(shard)
            update = shard.add(buffer, alpha=momentum)  # Nesterov's
            if self.c.muon_row_norm:
                update = F.normalize(update, dim=-1)
            update = zeropower(update, self.c.muon_backend_steps, self.dtype)
            self.gathered.append(self.dist.all_gather(update))

    @torch.no_grad()
    def apply(self) -> None:
        """Wait for the updates, decay the matrices and move them."""
        group = self.param_groups[0]
        for bank, (update, work) in zip(self.banks, self.gathered, strict=True):
            if work is not None:
                work.wait()
            rows, cols = bank[0].shape
            moves = update[: len(bank)].float().unbind()  # without the padding
            torch._foreach_mul_(bank, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(bank, moves, alpha=-group["lr"] * math.sqrt(max(1, rows / cols)))


def clip_gradients(grads: list[Tensor], norm: Tensor, limit: float) -> Tensor:
    """Scale gradients of a joint norm to `limit` at most (0 = none), or to zero if the norm is not finite.

    Return whether it was not; the device is not waited for.
    """
    finite = norm.isfinite()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
    for grad in grads:
        grad.nan_to_num_(0.0, 0.0, 0.0)
    torch._foreach_mul_(grads, torch.where(finite, scale, 0.0))
    return ~finite


class Optimizers:
    """Every parameter in exactly one of three groups: matrices (Muon), tables and the rest (AdamW)."""

    def __init__(self, model: GPT, c: Config, dist: Dist):
        self.c, self.dist = c, dist
        self.muon = Muon(by_role(model, "matrix").values(), c.matrix_lr, c.muon_momentum, c, dist)
        tables, rest = (list(by_role(model, *roles).values()) for roles in (["table"], ["projection", "scalar"]))
        groups = [dict(params=tables, base_lr=c.tied_embed_lr), dict(params=rest, base_lr=c.scalar_lr)]
        betas, fused = (c.beta1, c.beta2), dist.device.type == "cuda"
        self.adam = torch.optim.AdamW(groups, 0.0, betas, c.adam_eps, weight_decay=c.adam_wd, fused=fused)
        self.small = tables + rest
        n_stepped = len(self.small) + len(self.muon.param_groups[0]["params"])
        assert n_stepped == len(list(model.parameters())), "a parameter is in no group or in two"
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device)  # steps without a finite gradient

    def schedule(self, phase: Phase) -> None:
        """Set every scheduled hyperparameter of the next step."""
        self.muon.param_groups[0].update(lr=phase.lr_scale * self.c.matrix_lr, momentum=phase.muon_momentum)
        for group in self.adam.param_groups:
            group["lr"] = phase.lr_scale * group["base_lr"]

    @torch.no_grad()
    def step(self) -> None:
        """Sum the gradients over ranks, clip by their joint norm, update, and clear them.

        Where the norm is not finite (a rare fault of cuDNN's attention backward), the step has no gradient.
        """
        reduced, small = self.muon.reduce(), self.dist.sum_gradients(self.small)
        for _, work in reduced:
            if work is not None:
                work.wait()
        shards = self.muon.shards
        square = self.dist.sum(sum(shard.square().sum() for shard in shards)) + small.square().sum()
        self.skipped += clip_gradients([*shards, small], square.sqrt(), self.c.grad_clip_norm)
        self.muon.step()
        self.adam.step()
        self.muon.apply()
        for optimizer in (self.muon, self.adam):
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Return a copy of everything that steps change, other than the parameters."""
        return copy.deepcopy(dict(muon=self.muon.state_dict(), adam=self.adam.state_dict(), skipped=self.skipped))

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.skipped.copy_(state["skipped"])


class WeightAverages:
    """EMA over all steps and SWA late in the warmdown, in float32: bfloat16 averages lose the updates (PR #2095)."""

    def __init__(self, model: GPT, c: Config):
        self.params, self.c = list(model.parameters()), c
        self.ema = [p.detach().clone() for p in self.params]
        self.swa = [torch.zeros_like(p) for p in self.params]
        self.swa_count = 0

    @torch.no_grad()
    def update(self, step: int, late: bool) -> None:
        """Take in the weights after a step. The EMA forgets faster at first: a short run would be all start."""
        decay = min(self.c.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if late and step % self.c.swa_every == 0:
            self.swa_count += 1
            torch._foreach_lerp_(self.swa, self.params, 1 / self.swa_count)

    def candidates(self) -> dict[str, list[Tensor]]:
        """Return the weights to choose from: the last ones, each average, and the average of the averages."""
        found = {"last": [p.detach().clone() for p in self.params], "ema": self.ema}
        if self.swa_count:
            found["swa"] = self.swa
            found["ema+swa"] = [(e + s) / 2 for e, s in zip(self.ema, self.swa, strict=True)]
        return found


# ==================== Training ========================================================================================
# The schedule, the loss with its three additions (complementary weights, CROWN-Q, late QAT), and the loop.


@dataclass(frozen=True)
class Phase:
    """The schedule's values for one step."""

    lr_scale: float
    muon_momentum: float
    collect_swa: bool
    crown_q: bool
    late_qat: bool


def schedule(step: int, total: int, c: Config) -> Phase:
    """Return the phase of a step of a run that will take `total` steps.

    Where the clock ends the run before ITERATIONS, the learning rate's warm-up takes at most a tenth of the steps, the
    momentum's a quarter and the warmdown six tenths.
    """
    remaining = total - step

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
        crown_q=c.crown_q_lambda > 0 and falling < 1.0,
        late_qat=falling < c.late_qat_threshold,
    )


def complement_weights(loader: TrainLoader, c: Config) -> Tensor | None:
    """Return loss weights [V, V] for (token before, target): max(0.1, 1 - alpha * c(x, y) / (C(x) + 1)), PR #803.

    The n-gram experts supply what a bigram count predicts well, and the network learns the rest. The counts are of the
    first COMPLEMENT_TOKENS training tokens, the same on every rank and fixed before the first step.
    """
    if not c.complement_alpha:
        return None
    tokens = torch.from_numpy(loader.head(c.complement_tokens)).to(loader.dist.device)
    pairs = torch.bincount(tokens[:-1] * c.vocab_size + tokens[1:], minlength=c.vocab_size**2)
    pairs = pairs.view(c.vocab_size, c.vocab_size).float()
    return (1 - c.complement_alpha * pairs / (pairs.sum(1, keepdim=True) + 1)).clamp(min=0.1)


def crown_q_penalty(matrices: list[Tensor], bits: int) -> Tensor:
    """Return the sum over rows of mean(w^2) * delta^2 / 12 with delta = row max / qmax (CROWN-Q, PR #693).

    Rounding a row to multiples of delta costs an error of variance delta^2 / 12. The gradient goes through delta too.
    PR #700's form, the mean over a matrix with delta detached, is this one with a lambda some 1,000 times smaller.
    """
    qmax, penalty = 2 ** (bits - 1) - 1, 0.0
    for shape in {w.shape for w in matrices}:
        bank = torch.stack([w for w in matrices if w.shape == shape])
        penalty = penalty + (bank.square().mean(-1) * (bank.abs().amax(-1) / qmax).square() / 12).sum()
    return penalty


@contextmanager
def late_qat(model: GPT, log2_step: float, c: Config):
    """Run with every quantized parameter rounded to its nearest code.

    A gradient taken here and applied to the float weights is the straight-through estimator (Bengio et al. 2013). The
    compiled graph does not change.
    """
    params = list(quantized_parameters(model).values())
    grids = [int6_grid(p.detach(), p.role, None, log2_step, c) for p in params]
    with weights_replaced(
        params, [grid.nearest(p.detach()) * grid.steps() for p, grid in zip(params, grids, strict=True)]
    ):
        yield


def micro_batches(batch: Tensor, c: Config):
    """Yield a rank's sequences [n, T + 1] as pairs of inputs and targets that fit one forward pass."""
    for micro in batch.split(max(1, c.micro_batch_tokens // c.train_seq_len)):
        if len(micro):
            yield micro[:, :-1], micro[:, 1:]


def accumulate_gradients(called, batch: Tensor, weights: Tensor | None, c: Config) -> Tensor:
    """Run backward over this rank's part of a batch [n, T + 1], in micro batches. Return the sum of its nll.

    The loss is the batch's mean over all ranks: the ranks' gradients only need to be added.
    """
    total = torch.zeros((), device=batch.device)
    for inputs, targets in micro_batches(batch, c):
        nll = called(inputs, targets)
        loss = nll if weights is None else nll * weights[inputs, targets]
        (loss.sum() / c.batch_tokens).backward()
        total += nll.detach().sum()
    return total


def warm_up(model: GPT, called, optimizers: Optimizers, c: Config, dist: Dist) -> None:
    """Compile all that a step runs, on synthetic tokens, and leave weights and optimizers as they were."""
    before = copy.deepcopy(model.state_dict()), optimizers.state_dict()
    generator, mine = torch.Generator().manual_seed(c.seed), dist.share(c.batch_seqs)
    for step in range(c.warmup_steps):
        shape = (mine.stop - mine.start, c.train_seq_len + 1)
        batch = torch.randint(c.vocab_size, shape, generator=generator).to(dist.device)
        accumulate_gradients(called, batch, None, c)
        optimizers.schedule(Phase(1.0, c.muon_momentum, False, False, False))
        optimizers.step()
        log.info(f"warmup_step:{step + 1}/{c.warmup_steps}")
    model.load_state_dict(before[0])
    optimizers.load_state_dict(before[1])


def train(model: GPT, loader: TrainLoader, c: Config, dist: Dist, stream: Stream | None):
    """Train the model in place within ITERATIONS and MAX_WALLCLOCK_SECONDS less RESERVE_SECONDS.

    Return (averages, the clock, which runs on through the export, the record's `train` part). Raise InputError if the
    loss stops being finite.
    """
    optimizers, called = Optimizers(model, c, dist), compiled(model, c, dist.device)
    log.info(f"train_loader:dataset:{c.data_path} train_shards:{len(loader.shards)} sequences:{loader.n}")
    warm_up(model, called, optimizers, c, dist)
    clock, averages = Clock(dist), WeightAverages(model, c)
    weights, matrices = complement_weights(loader, c), list(by_role(model, "matrix").values())
    budget = max(0.0, c.max_wallclock_seconds - c.reserve_seconds)
    step, total, elapsed, batches, log2_step = 0, c.iterations, 0.0, loader.batches(), 0.0
    was = Phase(0.0, 0.0, False, False, False)
    while step < total:
        phase = schedule(step, total, c)
        if phase.collect_swa and not was.collect_swa:
            log.info(f"swa:start step:{step}")
        if phase.crown_q and not was.crown_q:
            log.info(f"crown_q:start step:{step} lambda:{c.crown_q_lambda:g}")
        if phase.late_qat and not was.late_qat:  # rounds as the export would at this point
            log2_step = fit_entropy(model, {}, artifact_budget(model, c), c)
            clip = code_limit("matrix", c) * 2**log2_step
            log.info(f"late_qat:enabled step:{step} scale:{phase.lr_scale:.4f} clip_sigmas:{clip:.3f}")
        optimizers.schedule(phase)
        with late_qat(model, log2_step, c) if phase.late_qat else contextlib.nullcontext():
            nll = accumulate_gradients(called, next(batches), weights, c)
        if phase.crown_q:
            (c.crown_q_lambda / dist.world_size * crown_q_penalty(matrices, c.quant_bits)).backward()
        optimizers.step()
        averages.update(step, phase.collect_swa)
        step, was = step + 1, phase
        # The ranks agree on the clock every tenth step; between, the host runs ahead. Near the end they agree on every
        # step, and the last step counts where it was slower than the average.
        if budget and (step <= 10 or step % 10 == 0 or total - step < 20):
            before, elapsed = elapsed, clock.seconds()
            pace = max(elapsed / step, elapsed - before if total - step < 19 else 0.0)
            total = min(c.iterations, step + max(0, int((budget - elapsed) / pace)))
        if step <= 5 or step % c.train_log_every == 0 or step >= total:
            loss = dist.sum(nll).item() / c.batch_tokens
            if not math.isfinite(loss):
                advice = f"allowed is a finite loss; lower MATRIX_LR={c.matrix_lr}?"
                raise InputError(f"train_loss={loss} at step {step}: {advice}")
            log_step(step, f"train_loss:{loss:.4f}", clock.seconds(), c)
        if c.val_loss_every and step % c.val_loss_every == 0:
            with clock.stopped():
                log_step(step, validate(called, stream, c, dist), clock.total, c)
    batches.close()
    elapsed = clock.seconds()
    if step < c.iterations:
        log.info(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}/{c.iterations}")
    counts = dict(skipped_steps=int(optimizers.skipped), loader_stalls=loader.stalls)
    log.info(" ".join(f"{name}:{count}" for name, count in counts.items()))
    step_avg_ms = round(1000 * elapsed / step, 3)
    record = dict(steps=step, tokens=step * c.batch_tokens, step_avg_ms=step_avg_ms, seconds=elapsed, **counts)
    return averages, clock, record


def log_step(step: int, losses: str, elapsed: float, c: Config) -> None:
    timing = f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / step:.2f}ms"
    log.info(f"step:{step}/{c.iterations} {losses} {timing}")


def validate(called, stream: Stream, c: Config, dist: Dist) -> str:
    """Return the validation score of the weights as they are, for the log; nothing is decided by it."""
    predictor = SlidingWindow("roundtrip", called, c, dist, stride=c.eval_seq_len)
    result = score(predictor, stream, c.val_batch_size, dist)["roundtrip"]
    return f"val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f}"


@torch.no_grad()
def held_out_loss(called, loader: TrainLoader, c: Config, dist: Dist) -> float:
    """Return the nll per token on the held-out spans of training text, over all ranks."""
    nll = torch.zeros((), device=dist.device)
    for inputs, targets in micro_batches(loader.averaging_rows(), c):
        nll += called(inputs, targets).sum()
    return dist.sum(nll).item() / (loader.averaging * c.train_seq_len)


def choose_average(model: GPT, averages: WeightAverages, loader: TrainLoader, c: Config, dist: Dist) -> None:
    """Put in the weights that do best on training text that no step has seen; log each candidate's loss."""
    called, losses, candidates = compiled(model, c, dist.device), {}, averages.candidates()
    for name, weights in candidates.items():
        with weights_replaced(averages.params, weights):
            losses[name] = held_out_loss(called, loader, c, dist)
    best = min(losses, key=losses.get)
    with torch.no_grad():
        torch._foreach_copy_(averages.params, candidates[best])
    log.info("averages: " + " ".join(f"{name}:{loss:.5f}" for name, loss in losses.items()) + f" chosen:{best}")


# ==================== Artifact ========================================================================================
# The file that holds the model. It holds settings and numbers in the order of the model's own parameters; no name is
# stored and nothing in it is ever executed.


@dataclass(frozen=True)
class Grid:
    """Weight (r, j) = code * scale[r] / 2^(k / 2), |code| <= qmax, with the exponent k = rows[r] + columns[j].

    The exponent fixes how finely a weight is stored. Each exponent has its own rANS table.
    """

    MAX_EXPONENT = 12

    scale: Tensor  # float16 [rows], or [1] for all rows
    rows: Tensor  # int8 [rows]
    columns: Tensor  # int8 [cols]
    qmax: int

    def exponents(self) -> Tensor:
        return (self.rows.short().unsqueeze(1) + self.columns).clamp(0, self.MAX_EXPONENT).to(torch.uint8)

    def steps(self) -> Tensor:
        """Return the distance of two codes' weights, float32 [rows, cols]."""
        # From a list: a power computed on another machine might differ in its last bit.
        powers = torch.tensor([2.0 ** (k / 2) for k in range(self.MAX_EXPONENT + 1)], device=self.scale.device)
        return self.scale.float().unsqueeze(1) / powers[self.exponents().long()]

    def nearest(self, w: Tensor) -> Tensor:
        return nearest_codes(w, self.steps(), self.qmax)


def int6_grid(w: Tensor, role: str, info, log2_step: float, c: Config) -> Grid:
    """Return the grid of int6: one float16 scale a row, 2^log2_step standard deviations of it (SDClip, PR #1394).

    With QUANT_BITS, codes reach qmax * 2^log2_step standard deviations; tables have two bits more, of finer steps.
    """
    scale = (2**log2_step * w.std(1, correction=0)).clamp(min=2.0**-24).half()
    rows = torch.full((len(w),), 4 * (role == "table"), dtype=torch.int8, device=w.device)  # a quarter of the step
    return Grid(scale, rows, torch.zeros_like(w[0], dtype=torch.int8), code_limit(role, c))


def hessian_grid(w: Tensor, role: str, info: HessianInfo, log2_step: float, c: Config) -> Grid:
    """Return the grid at which one bit more would gain the same everywhere: steps go with 1 / sqrt(sensitivity).

    Half the step takes one bit more and leaves a quarter of the squared error. At a given size the loss is least where
    rows * columns * step^2 is one number lambda for all weights of all tensors: reverse water-filling (Cover and
    Thomas, Elements of Information Theory, 10.3). log2_lambda is 2 * log2_step. A row's exponents stop where its
    largest weight would need a code above qmax.
    """
    scale, qmax = (2 * w.square().mean().sqrt()).clamp(min=2.0**-24).half().view(1), code_limit(role, c)
    columns = info.columns.clamp(min=1e-30).log2()
    rows = info.rows.log2() + columns.mean() + 2 * scale.float().log2() - 2 * log2_step
    columns = (columns - columns.mean()).round().clamp(-64, 63)
    finest = 2 * (qmax * scale.float() / w.abs().amax(1).clamp(min=2.0**-24)).log2()
    rows = torch.minimum(rows.round(), finest.floor() - columns.max()).clamp(-64, 63)
    return Grid(scale, rows.to(torch.int8), columns.to(torch.int8), qmax)


GRIDS = {"int6": int6_grid, "hessian": hessian_grid}
Quantized = dict[str, tuple[Tensor, Grid]]  # by parameter: int8 codes [rows, cols] and their grid


def code_limit(role: str, c: Config) -> int:
    """Return qmax, the largest code of a parameter."""
    return 127 if c.quant == "hessian" else 2 ** (c.quant_bits - 1 + 2 * (role == "table")) - 1


def nearest_codes(w: Tensor, steps: Tensor, qmax: int) -> Tensor:
    """Return which multiple of its step, `qmax` at most, is nearest to each weight, as float32."""
    return (w / steps).round().clamp(-qmax, qmax)


@dataclass(frozen=True)
class HessianInfo:
    """What an error costs on training text: e at (r, j) adds rows[r] * columns[j] * e^2 to the loss.

    Linear maps also have `order`, the columns from the strongest input to the weakest, and `hinv_chol`, the upper
    Cholesky factor of the inverse Hessian in that order, which GPTQ rounds by.
    """

    rows: Tensor  # float32 [rows]
    columns: Tensor  # float32 [cols]
    order: Tensor | None = None
    hinv_chol: Tensor | None = None

    @classmethod
    def of_table(cls, squares: Tensor) -> HessianInfo:
        """Return the info of a table from its squared gradients [rows, cols]."""
        scale = squares.mean().clamp(min=1e-30).sqrt()
        return cls(cls.floored(squares.mean(1) / scale), cls.floored(squares.mean(0) / scale))

    @classmethod
    def of_map(cls, squares: Tensor, xtx: Tensor) -> HessianInfo:
        """Return the info of a linear map from its squared gradients [rows, cols] and X^T X over its inputs.

        The curvature is taken for (gradients' power) x (X^T X), as in K-FAC (arXiv 1503.05671). GPTQ makes up for a
        column's error with the columns after it. A column's sensitivity is what the later ones cannot make up for: its
        squared Cholesky pivot.
        """
        order = xtx.diagonal().argsort(descending=True, stable=True)
        h = xtx[order][:, order].double()
        h.diagonal().add_(0.01 * h.diagonal().mean().clamp(min=1e-12))  # GPTQ's damping
        hinv_chol = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
        unexplained = hinv_chol.diagonal().square().reciprocal()[order.argsort()]
        rows = squares.sum(1) / xtx.diagonal().sum().clamp(min=1e-12)
        return cls(cls.floored(rows), unexplained, order, hinv_chol)

    @staticmethod
    def floored(x: Tensor) -> Tensor:
        """Return x and a thousandth of its mean everywhere: a row without gradient here may get some elsewhere."""
        return x + 1e-3 * x.mean().clamp(min=1e-30)


def measure_hessians(model: GPT, batch: Tensor, dist: Dist) -> dict[str, HessianInfo]:
    """Return the info of all quantized parameters from this rank's part [n, T + 1] of some training text.

    A backward pass a sequence. Raise InputError for a parameter with an input or a gradient that is not finite.
    """
    params = quantized_parameters(model)
    maps = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    squares = {name: torch.zeros_like(p) for name, p in params.items()}
    xtx = {name: torch.zeros_like(params[name][0]).diag() for name in maps}

    def add_inputs(name: str, inputs) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        xtx[name] += x.T @ x

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add_inputs(name, inputs))
        for name, module in maps.items()
    ]
    for sequence in batch.unsqueeze(1):
        model.zero_grad()
        model(sequence[:, :-1], sequence[:, 1:]).sum().backward()
        for name, p in params.items():
            squares[name] += gradient(p).square()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    found = {}
    for name in params:
        sums = [dist.sum(x[name]) for x in (squares, xtx) if name in x]
        if not all(bool(x.isfinite().all()) for x in sums):
            raise InputError(f"weight {name}: its inputs or gradients on training text are not finite")
        found[name] = HessianInfo.of_map(*sums) if name in maps else HessianInfo.of_table(*sums)
    return found


def gptq(w: Tensor, grid: Grid, info: HessianInfo) -> Tensor:
    """Return the codes of a linear map's weights [rows, cols]: GPTQ (Frantar et al. 2023, arXiv 2210.17323).

    Columns are rounded in the info's order. The later columns make up for what that does to the outputs, as far as
    their inputs go together.
    """
    order, upper, block = info.order, info.hinv_chol, 128
    w, steps = w.float()[:, order], grid.steps()[:, order]
    codes = torch.empty_like(w)
    for first in range(0, w.shape[1], block):
        last = min(first + block, w.shape[1])
        errors = torch.empty_like(w[:, first:last])
        for j in range(first, last):
            codes[:, j] = nearest_codes(w[:, j], steps[:, j], grid.qmax)
            error = (w[:, j] - codes[:, j] * steps[:, j]) / upper[j, j]
            w[:, j + 1 : last] -= torch.outer(error, upper[j, j + 1 : last])
            errors[:, j - first] = error
        w[:, last:] -= errors @ upper[first:last, last:]
    return codes[:, order.argsort()]


def quantize(model: GPT, infos: dict[str, HessianInfo], log2_step: float, c: Config) -> Quantized:
    """Return the codes of all quantized parameters at one step size: linear maps by GPTQ, embeddings to the nearest."""
    found = {}
    for name, p in quantized_parameters(model).items():
        w, info = p.detach(), infos[name]
        grid = GRIDS[c.quant](w, p.role, info, log2_step, c)
        codes = grid.nearest(w) if info.hinv_chol is None else gptq(w, grid, info)
        found[name] = codes.to(torch.int8).cpu(), Grid(grid.scale.cpu(), grid.rows.cpu(), grid.columns.cpu(), grid.qmax)
    return found


@torch.no_grad()
def load_codes(model: GPT, quantized: Quantized) -> None:
    """Give the model the weights that an artifact gives back."""
    for name, p in quantized_parameters(model).items():
        codes, grid = quantized[name]
        p.copy_(codes * grid.steps())


LEAST_BITS = 1.2  # entropy of a Gaussian weight at a step of two standard deviations, the coarsest
FIT_SLACK = 0.002  # the part of the budget that a fit may leave free


def artifact_budget(model: GPT, c: Config) -> int:
    """Return the bytes that TARGET_BYTES leaves beside the script. Raise InputError if the model cannot fit."""
    n_codes = sum(p.numel() for p in quantized_parameters(model).values())
    n_others = sum(p.numel() for p in model.parameters()) - n_codes
    budget = c.target_bytes - os.path.getsize(__file__)
    least = math.ceil(LEAST_BITS * n_codes / 8) + n_others
    if least > budget:
        needed = f"{least + c.target_bytes - budget:,}"
        raise InputError(f"TARGET_BYTES={c.target_bytes} is too small: script and model need at least {needed} bytes")
    return budget


def entropy_bytes(model: GPT, infos: dict[str, HessianInfo], log2_step: float, c: Config) -> float:
    """Return the size of the nearest codes under the best static table for each of the coder's tables."""
    counts = torch.zeros(N_TABLES * 256, dtype=torch.int64)
    for name, p in quantized_parameters(model).items():
        grid = GRIDS[c.quant](p.detach(), p.role, infos.get(name), log2_step, c)
        cell = 256 * grid.exponents().long() + 128 + grid.nearest(p.detach()).long()
        counts += cell.flatten().bincount(minlength=len(counts)).cpu()
    counts = counts.view(N_TABLES, 256).double()
    return float(-torch.xlogy(counts, counts / counts.sum(1, keepdim=True).clamp(min=1)).sum() / math.log(2) / 8)


def step_range(c: Config) -> tuple[float, float]:
    """Return the smallest and the largest log2_step of a fit; CLIP_SIGMAS leaves one.

    With a range below four standard deviations, int6 loses more in the tails than it gains by finer steps.
    """
    if c.quant == "hessian":
        return -32.0, 32.0
    finest = math.log2((c.clip_sigmas or 4) / code_limit("matrix", c))
    return finest, finest if c.clip_sigmas else 1.0


def fit_entropy(model: GPT, infos: dict[str, HessianInfo], budget: int, c: Config) -> float:
    """Return the log2_step at which the codes' entropy is 0.96 of the budget; LZMA takes about 3 % more."""
    low, high = step_range(c)
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy_bytes(model, infos, middle, c) > 0.96 * budget else (low, middle)
    return high


def fit_to_size(model: GPT, infos: dict[str, HessianInfo], net: BiasNet, c: Config, tokenizer: str) -> Quantized:
    """Return the finest quantization, of a few that are tried, with which script and artifact fit TARGET_BYTES.

    A step half as wide takes one bit more for each weight: every attempt corrects the next, by more the longer it
    takes. If none fits, return the last one; the log names the excess.
    """
    budget, (finest, coarsest), best, best_bytes = artifact_budget(model, c), step_range(c), None, 0
    n_codes = sum(p.numel() for p in quantized_parameters(model).values())
    log2_step, too_fine, fitting = fit_entropy(model, infos, budget, c), finest, coarsest
    for attempt in range(16):
        quantized = quantize(model, infos, log2_step, c)
        n_bytes = len(pack(model, quantized, net, c, tokenizer))
        clip = f" clip_sigmas:{code_limit('matrix', c) * 2**log2_step:.3f}" if c.quant == "int6" else ""
        log.info(f"fit: log2_step:{log2_step:.4f}{clip} artifact:{n_bytes} budget:{budget}")
        if n_bytes > budget:
            too_fine = log2_step
        elif n_bytes > best_bytes:
            best, best_bytes, fitting = quantized, n_bytes, log2_step
        at_limit = log2_step == (finest if n_bytes <= budget else coarsest)
        if at_limit or best_bytes > (1 - FIT_SLACK) * budget or attempt >= 3 and best_bytes > 0.98 * budget:
            break
        # Bits a code over the target are the change of log2_step. Outside of what is known, bisect.
        guess = log2_step + 8 * (n_bytes - (1 - FIT_SLACK / 2) * budget) / n_codes * 2 ** max(0, attempt - 1)
        outside = best and not too_fine <= guess < fitting
        log2_step = min(max((too_fine + fitting) / 2 if outside else guess, finest), coarsest)
    return best or quantized


# The container: a prefix, a sha256 of all but itself, a JSON header, and the parts one after the other.
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 4
PREFIX = struct.Struct("<5sBI")  # magic, version, header bytes
# Codes hardly repeat: the cheapest match finder costs no byte and a sixth of preset 9e's time (logs/lzma_filters.txt).
LZMA = dict(id=lzma.FILTER_LZMA2, preset=6, lc=0, lp=0, pb=0, dict_size=4096, mf=lzma.MF_HC4, nice_len=273, depth=1)
DTYPES = {torch.float16: "<f2", torch.int8: "i1"}


def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=[LZMA])


def decompress(data: bytes) -> bytes:
    return lzma.decompress(data, format=lzma.FORMAT_RAW, filters=[LZMA])


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
    streams |= {part: compress(as_bytes(getattr(x, part) for x in grids.values())) for part in ("rows", "columns")}
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
    ends = np.cumsum([header_bytes, *header["parts"].values()])
    if ends[-1] != len(body):
        raise InputError(f"ARTIFACT_PATH={path}: {len(body) - ends[-1]} bytes behind its last part; allowed are none")
    return header, {part: body[a:b] for part, a, b in zip(header["parts"], ends, ends[1:], strict=False)}


def with_artifact(c: Config, header: dict, env: dict[str, str]) -> Config:
    """Return the settings with the artifact's own in them: the environment may override how it is scored only.

    Raise InputError where it asks for another model, or where the header is of another version of Config.
    """
    kept = {name: tuple(v) if isinstance(v, list) else v for name, v in (header["score"] | header["shape"]).items()}
    for name in header["shape"]:
        if name.upper() in env and getattr(c, name, None) != kept[name]:
            raise InputError(f"{name.upper()}={show(getattr(c, name))}: the artifact's model has {show(kept[name])}")
    try:
        return dataclasses.replace(c, **{n: v for n, v in kept.items() if n in header["shape"] or n.upper() not in env})
    except TypeError as error:
        raise InputError(f"ARTIFACT_PATH={c.artifact_path}: its settings are not this script's ({error})") from None


def unpack(parts: dict[str, bytes], c: Config, device: torch.device) -> tuple[GPT, BiasNet]:
    """Return the model and the mixer that an artifact's parts hold."""
    model, net, raw, used = make_model(c, device), BiasNet(c), {}, {}

    def take(part: str, dtype: torch.dtype, count: int) -> Tensor:
        if part not in raw:
            raw[part] = np.frombuffer(parts[part] if part == "mixer" else decompress(parts[part]), DTYPES[dtype])
        start, used[part] = used.get(part, 0), used.get(part, 0) + count
        return torch.from_numpy(raw[part][start : start + count].copy())

    quantized = quantized_parameters(model)
    grids = [
        Grid(
            take("scales", torch.float16, len(p) if c.quant == "int6" else 1),
            take("rows", torch.int8, len(p)),
            take("columns", torch.int8, p.shape[1]),
            code_limit(p.role, c),
        )
        for p in quantized.values()
    ]
    if c.codec == "lzma":
        codes = np.frombuffer(decompress(parts["codes"]), dtype=np.int8)
    else:
        tables = np.frombuffer(as_bytes(grid.exponents() for grid in grids), dtype=np.uint8)
        frequencies = np.frombuffer(decompress(parts["frequencies"]), dtype="<u2").reshape(N_TABLES, 256)
        codes = rans_decode(parts["codes"], tables, frequencies.astype(np.int64)).view(np.int8)
    codes = torch.from_numpy(codes.copy()).split([p.numel() for p in quantized.values()])
    shaped = [x.view(p.shape) for x, p in zip(codes, quantized.values(), strict=True)]
    load_codes(model, dict(zip(quantized, zip(shaped, grids, strict=True), strict=True)))
    with torch.no_grad():
        for part, params in (("float16", by_role(model, "scalar").values()), ("mixer", net.parameters())):
            for p in params:
                p.copy_(take(part, torch.float16, p.numel()).view_as(p))
    return model.to(device), net.to(device)


# The coder is a range asymmetric numeral system (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit words. The
# codes are dealt to RANS_LANES states in turn; NumPy takes a step of all of them at once.
RANS_LANES, RANS_BITS, RANS_LOW, N_TABLES = 512, 14, 1 << 16, Grid.MAX_EXPONENT + 1


def rans_frequencies(values: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Return how often each byte occurs under each table, in parts of 2^RANS_BITS: int64 [N_TABLES, 256]."""
    counts = np.bincount(256 * tables.astype(np.int64) + values, minlength=256 * N_TABLES).reshape(-1, 256)
    seen, total = counts > 0, counts.sum(1, keepdims=True).clip(1)
    frequencies = counts * ((1 << RANS_BITS) - seen.sum(1, keepdims=True)) // total + seen
    frequencies[np.arange(N_TABLES), counts.argmax(1)] += (1 << RANS_BITS) - frequencies.sum(1)
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
        x = state[: len(table)]
        part = x & np.uint64((1 << RANS_BITS) - 1)
        value = value_at[(table << RANS_BITS) + part.astype(np.int64)]
        cell = 256 * table + value
        x = frequency[cell] * (x >> np.uint64(RANS_BITS)) + part - first[cell]
        low = np.flatnonzero(x < RANS_LOW)
        x[low] = x[low] << np.uint64(16) | words[used : used + len(low)]
        state[: len(table)], values[start : start + RANS_LANES], used = x, value, used + len(low)
    return values


def export(model: GPT, loader: TrainLoader, path: Path, tokenizer_sha256: str, c: Config, dist: Dist) -> None:
    """Quantize the averaged model to TARGET_BYTES, fit the mixer on the stored model's rows, write the artifact."""
    called, net = compiled(model, c, dist.device), BiasNet(c).to(dist.device)
    before = held_out_loss(called, loader, c, dist)
    infos = measure_hessians(model, loader.first_rows(c.gptq_tokens), dist)
    quantized = dist.broadcast(fit_to_size, model, infos, net, c, tokenizer_sha256)
    load_codes(model, quantized)
    after = held_out_loss(called, loader, c, dist)
    log.info(f"quantization: float:{before:.5f} stored:{after:.5f} gap:{after - before:+.5f}")
    if "maxent" in (c.hedge_experts if c.mixer == "hedge" else [c.mixer]):
        calibrate(model, net, loader, c, dist)
    dist.broadcast(lambda: write_atomically(path, pack(model, quantized, net, c, tokenizer_sha256)))


def size_record(path: Path, header: dict, c: Config) -> dict:
    """Log script and artifact by part against the cap. Return them for the record."""
    code_bytes, model_bytes = os.path.getsize(__file__), header["file_bytes"]
    total, label = code_bytes + model_bytes, f"{quant_label(c)}+{c.codec}"
    sizes = {"header": model_bytes - sum(header["parts"].values()), **header["parts"]}
    for part, size in sizes.items():
        log.info(f"artifact part {part}: {size} bytes")
    log.info(f"Code size: {code_bytes} bytes")
    log.info(f"Serialized model {label}: {model_bytes} bytes")
    log.info(f"Total submission size {label}: {total} bytes cap:{CAP_BYTES} margin:{CAP_BYTES - total}")
    if total > c.target_bytes:
        log.info(f"OVER TARGET_BYTES={c.target_bytes} by {total - c.target_bytes} bytes: {path}")
    found = dict(path=str(path), sha256=header["sha256"], code_bytes=code_bytes, model_bytes=model_bytes)
    return dict(found, total_bytes=total, cap_bytes=CAP_BYTES, part_bytes=sizes)


def quant_label(c: Config) -> str:
    """Return how the codes are stored, as log labels name it."""
    return f"int{c.quant_bits}" if c.quant == "int6" else c.quant


# ==================== N-grams =========================================================================================
# What followed the same context earlier in the stream. Everything is counted up to the token before the one that is
# predicted, also inside a chunk.


@dataclass(frozen=True)
class Candidates:
    """The tokens that followed a row's contexts before, and how often: one entry a (row, token), sorted by both.

    `counts` are occurrences in this document and in earlier ones, among those of each context that the chains list;
    `totals` are their sums over a row's tokens. `logp` is the neural log-probability of each entry's token.
    """

    row: Tensor  # int64 [entries]
    token: Tensor  # int64 [entries]
    counts: Tensor  # uint8 [entries, 2, orders]
    totals: Tensor  # int16 [rows, 2, orders]
    logp: Tensor  # float32 [entries]


class HashChains:
    """Where the contexts of the last k tokens stood before, for each k of NGRAM_ORDERS.

    As in zlib, `prev` links every position to the latest earlier one with the same context, and `head` finds the first
    link by the context's hash. The tokens behind a chain's positions are what the context predicts. `head` has
    2^NGRAM_TABLE_BITS entries that all orders share: the newest position with that hash and 32 more bits of the hash.
    Chains end after NGRAM_MAX_CHAIN links (3 NGRAM_MAX_CHAIN / k from k = 4 on), and a context is forgotten when
    another takes its head. Two contexts that agree in all these bits, one pair in 2^(32 + NGRAM_TABLE_BITS), are taken
    for one: a context's counts still add up to its occurrences. Positions are 31 bits.
    """

    MULTIPLIER = 0x5851F42D4C957F2D  # odd; Knuth's for 64-bit congruential generators
    CHECK = 2**32 - 1

    def __init__(self, c: Config, device: torch.device):
        self.c, self.orders = c, sorted(c.ngram_orders)
        self.max_chains = [max(1, min(c.ngram_max_chain, 3 * c.ngram_max_chain // order)) for order in self.orders]
        self.seen = 0  # positions before the next chunk
        self.document = torch.zeros(1, dtype=torch.int64, device=device)  # where the open document began
        self.tail = torch.full((max(self.orders) - 1,), -1, dtype=torch.int64, device=device)  # the tokens before it
        self.head = torch.zeros(1 << c.ngram_table_bits, dtype=torch.int64, device=device)  # position + 1, hash bits
        self.tokens = torch.zeros(1, dtype=torch.int32, device=device)  # both grow by doubling
        self.prev = torch.zeros(len(self.orders), 1, dtype=torch.int32, device=device)  # position + 1; 0 = none
        # The inputs that stand behind position `seen`, not yet part of the state, and their hashes.
        self.ahead: tuple[Tensor, Tensor] | None = None

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

    def slots(self, hashes: Tensor) -> Tensor:
        return hashes & (len(self.head) - 1)

    def link(self, hashes: Tensor) -> Tensor:
        """Return for each context of a chunk the latest earlier position that has it, plus 1; 0 where none is known."""
        ordered, source = hashes.sort(dim=1, stable=True)
        again = ordered[:, 1:] == ordered[:, :-1]
        inside = torch.zeros_like(hashes)
        inside.scatter_(1, source[:, 1:], torch.where(again, source[:, :-1] + self.seen + 1, 0))
        entry = self.head[self.slots(hashes)]
        before = torch.where((entry & self.CHECK) == ((hashes >> 32) & self.CHECK), entry >> 32, 0)
        return torch.where(inside > 0, inside, before)

    def look_ahead(self, inputs: Tensor) -> Tensor:
        """Link the chunk that follows, behind the end of the state. Return its hashes [orders, n]."""
        if self.ahead is not None and torch.equal(self.ahead[0], inputs):
            return self.ahead[1]
        end = self.seen + len(inputs)
        if end > len(self.tokens):
            padding = (0, max(end, 2 * len(self.tokens)) - len(self.tokens))
            self.tokens, self.prev = F.pad(self.tokens, padding), F.pad(self.prev, padding)
        hashes = self.hashes(inputs)
        self.tokens[self.seen : end], self.prev[:, self.seen : end] = inputs.int(), self.link(hashes).int()
        self.ahead = inputs.clone(), hashes  # the caller may go on to write in its own
        return hashes

    def document_starts(self, inputs: Tensor) -> Tensor:
        """Return the position of the BOS before each input of the chunk that follows: int64 [n]."""
        position = torch.arange(self.seen, self.seen + len(inputs), device=inputs.device)
        return torch.where(inputs == self.c.bos_id, position, self.document).cummax(0).values

    def chain(self, rows: slice):
        """Yield earlier positions with each row's contexts, newest first: int64 [orders so deep, m]; -1 = none."""
        at = torch.arange(self.seen + rows.start, self.seen + rows.stop, device=self.tokens.device)
        order = torch.arange(len(self.orders), device=at.device).unsqueeze(1)
        at = at.expand(len(order), -1)
        for link in range(self.max_chains[0]):
            longer = sum(length > link for length in self.max_chains)
            linked = self.prev[order[:longer], at[:longer]].long() - 1
            at = torch.where(at[:longer] >= 0, linked, -1)
            yield at

    def candidates(self, inputs: Tensor, rows: slice, logp: Tensor) -> Candidates:
        """Return the tokens that stood behind the contexts that end at inputs[rows]; logp [m, V] are the neural rows.

        Order 1 is looked up in this document only: over all documents it would add tokens and no knowledge.
        """
        self.look_ahead(inputs)
        m, vocab_size, n_orders = rows.stop - rows.start, self.c.vocab_size, len(self.orders)
        begins = self.document_starts(inputs)[rows]
        order = torch.arange(n_orders, device=inputs.device).unsqueeze(1)
        first_cell = vocab_size * torch.arange(m, device=inputs.device)
        cells, columns = [], []
        for position in self.chain(rows):
            earlier = position < begins
            used = (position >= 0) & ~(earlier & (order[: len(position)] == self.orders.index(1)))
            token = self.tokens[position + 1].long()
            cells.append((first_cell + token)[used])
            columns.append((order[: len(position)] + n_orders * earlier)[used])
        column = torch.cat(columns)
        cell, entry = torch.cat(cells).unique(return_inverse=True)
        row, token = cell // vocab_size, cell % vocab_size
        counts = torch.bincount(entry * 2 * n_orders + column, minlength=len(cell) * 2 * n_orders)
        totals = torch.bincount(row[entry] * 2 * n_orders + column, minlength=m * 2 * n_orders)
        counts, totals = counts.view(-1, 2, n_orders).to(torch.uint8), totals.view(-1, 2, n_orders).short()
        return Candidates(row, token, counts, totals, logp[row, token])

    def update(self, tokens: Tensor) -> None:
        """Take in a scored chunk: tokens [n + 1], its inputs and its last target."""
        inputs, n = tokens[:-1], len(tokens) - 1
        hashes = self.look_ahead(inputs)
        position = torch.arange(self.seen + 1, self.seen + n + 1, device=inputs.device)
        entry = (position << 32) | ((hashes >> 32) & self.CHECK)
        self.head.scatter_reduce_(0, self.slots(hashes).flatten(), entry.flatten(), "amax")
        self.document = self.document_starts(inputs)[-1:]
        self.tail = torch.cat([self.tail, inputs])[n:]
        self.seen, self.ahead = self.seen + n, None

    @property
    def memory_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.head, self.tokens, self.prev))

    def state(self) -> list[Tensor]:
        """Return every tensor that the candidates depend on."""
        seen = torch.tensor(self.seen)
        return [seen, self.document, self.tail, self.head, self.tokens[: self.seen], self.prev[:, : self.seen]]


# ==================== Mixing ==========================================================================================
# The neural rows and the candidates in, one distribution out. Experts and mixers have one interface. An expert is a
# mixer that Hedge weighs.


@dataclass
class RowBlock:
    """What a mixer may use for a block of rows of a chunk: all of it known before the block's last target."""

    inputs: Tensor  # int64 [n], the chunk's
    rows: slice  # of the chunk, all ranks'
    mine: slice  # this rank's part of them
    logp: Tensor | None  # the neural rows, float32 [m, V]; dropped once they are mixed
    candidates: Candidates
    carry: object = None  # what the mixer left behind the block before, and after `mix` behind this one


class Mixer:
    """Rows in, one row out. `mix` leaves all state alone; `learn` takes in a scored chunk."""

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        self.c, self.dist = c, dist

    def mix(self, block: RowBlock) -> Tensor:
        """Return log-probabilities float32 [m, V] of the tokens that follow the block's inputs."""
        raise NotImplementedError

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        """Learn from a scored chunk: tokens [n + 1] and its blocks in order."""

    def state(self) -> list[Tensor]:
        return []


class Neural(Mixer):
    """The network's rows as they are."""

    def mix(self, block: RowBlock) -> Tensor:
        return block.logp


class Flat(Mixer):
    """The network's rows at temperature 2.

    It stands where PR #700 has e^-H for every token, which is no distribution.
    """

    def mix(self, block: RowBlock) -> Tensor:
        return (block.logp.double() / 2).log_softmax(-1).float()


class Unigram(Mixer):
    """Add-0.1 over the counts of all tokens so far (PR #700)."""

    DELTA = 0.1

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        super().__init__(c, dist, net)
        self.counts = torch.zeros(c.vocab_size, dtype=torch.float64, device=dist.device)

    def count(self, tokens: Tensor) -> Tensor:
        return torch.bincount(tokens, minlength=self.c.vocab_size).double()

    def mix(self, block: RowBlock) -> Tensor:
        inputs = block.inputs[block.mine].unsqueeze(1)
        inside = torch.zeros(len(inputs), self.c.vocab_size, dtype=torch.int32, device=inputs.device)
        inside = inside.scatter_(1, inputs, 1).cumsum(0, dtype=torch.int32)
        counts = inside + (self.counts + self.count(block.inputs[: block.mine.start]) + self.DELTA)
        return (counts / counts.sum(1, keepdim=True)).log().float()

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        self.counts += self.count(tokens[:-1])

    def state(self) -> list[Tensor]:
        return [self.counts]


class Bigram(Mixer):
    """Add-delta over what followed the last token, in this document and among its latest occurrences."""

    ORDER, DELTA = 1, 0.1

    def mix(self, block: RowBlock) -> Tensor:
        found, k = block.candidates, sorted(self.c.ngram_orders).index(self.ORDER)
        counts, totals = (x[:, :, k].sum(1).double() for x in (found.counts, found.totals))
        log_total = (totals + self.DELTA * self.c.vocab_size).log()
        unseen = (math.log(self.DELTA) - log_total).float().unsqueeze(1).expand_as(block.logp)
        seen = ((counts + self.DELTA).log() - log_total[found.row]).float()
        return unseen.index_put((found.row, found.token), seen)


class Trigram(Bigram):
    """The same for the last two tokens, in all documents."""

    ORDER, DELTA = 2, 0.01


class Backoff(Mixer):
    """The shares at the longest context with a minimum count, weighed by the network's entropy H.

    weight = BACKOFF_BASE + BACKOFF_RANGE * sigmoid(2 (H - center)), with one center (PR #1033) or one for each length
    of context (PR #825). Both published forms look up the target only; these are shares over the whole vocabulary.
    """

    def mix(self, block: RowBlock) -> Tensor:
        c, found, orders = self.c, block.candidates, sorted(self.c.ngram_orders)
        totals = found.totals.sum(1)
        index = torch.arange(len(orders), device=totals.device)
        longest = torch.where(totals >= c.backoff_min_count, index, -1).amax(1)
        centers = [c.backoff_centers[min(order, len(c.backoff_centers)) - 1] for order in orders]
        center = torch.tensor(centers, device=totals.device)[longest.clamp(min=0)]
        entropy = -(block.logp.exp() * block.logp).sum(1)
        weight = c.backoff_base + c.backoff_range * torch.sigmoid(2 * (entropy - center))
        weight = torch.where(longest >= 0, weight, 0.0).double().clamp(max=1 - 1e-6)
        at = longest.clamp(min=0)[found.row].unsqueeze(1)
        counts, totals = found.counts.sum(1).gather(1, at).double(), totals[found.row].gather(1, at).double()
        share = (counts / totals.clamp(min=1)).squeeze(1)
        kept = (1 - weight).log()
        mixed = ((found.logp + kept[found.row]).exp() + weight[found.row] * share).log()
        return (block.logp + kept.unsqueeze(1)).float().index_put((found.row, found.token), mixed.float())


class OneTokenTilt(Mixer):
    """The published tilt, p'(a) = e^(beta [a = hint]) p(a) / Z: nothing in it is learned.

    The hint is the token that followed the last 16 tokens in at least 0.8 of the occurrences that the chain lists; beta
    is that of the accepted record (PR #2135).
    """

    ORDER, SHARE, BETA = 16, 0.8, 2.625

    def mix(self, block: RowBlock) -> Tensor:
        found, k = block.candidates, sorted(self.c.ngram_orders).index(self.ORDER)
        counts, totals = found.counts[:, :, k].sum(1), found.totals[:, :, k].sum(1)[found.row]
        bias = self.BETA * ((counts > 0) & (counts >= self.SHARE * totals)).float()
        return apply_bias(block.logp, found, bias)


def normalizer(candidates: Candidates, bias: Tensor) -> Tensor:
    """Return Z = 1 + sum p(a) (e^b(a) - 1) of each row: float64 [m], added in a fixed order."""
    lengths = torch.bincount(candidates.row, minlength=len(candidates.totals))
    if not len(lengths):
        return lengths.double()
    change = candidates.logp.double().exp() * bias.double().expm1()
    return 1 + torch.segment_reduce(change, "sum", lengths=lengths, initial=0.0)


def apply_bias(logp: Tensor, candidates: Candidates, bias: Tensor) -> Tensor:
    """Return p(a) e^b(a) / Z for the candidates and p(a) / Z for all other tokens: [m, V] log-probabilities.

    The rows are read once and written once: Z needs the candidates only.
    """
    row, log_z = candidates.row, normalizer(candidates, bias).log()
    mixed = logp - log_z.to(logp).unsqueeze(1)
    return mixed.index_put_((row, candidates.token), (candidates.logp + bias - log_z[row]).to(logp))


class BiasNet(nn.Module):
    """The network behind maxent: the bias of a candidate from its counts and its neural log-probability.

    It is fitted on training text before the artifact is written, and travels in it.
    """

    LIMITS = (-2.0, 10.0)  # a Z of e^-2 or more keeps float32 rows within 1e-5 of one
    BLOCK = 8192  # entries at a time: with shapes that never change, a bias has the same bits whatever follows

    def __init__(self, c: Config):
        super().__init__()
        self.hidden = nn.Linear(6 * len(c.ngram_orders) + 1, c.mixer_hidden)
        self.out = nn.Linear(c.mixer_hidden, 1)
        bound, generator = self.hidden.in_features**-0.5, torch.Generator().manual_seed(c.seed)
        for p, limit in zip(self.parameters(), (bound, bound, 0.0, 0.0), strict=True):
            nn.init.uniform_(p, -limit, limit, generator=generator)

    @staticmethod
    def features(candidates: Candidates, entries: slice) -> Tensor:
        """Return [entries, 6 orders + 1].

        For each order, over all documents and in this one: the token's share of the occurrences, the logarithm of its
        count, and whether the context occurred at all; and the token's neural log-probability.
        """
        row, logp = candidates.row[entries], candidates.logp[entries]
        counts, totals = candidates.counts[entries].to(logp), candidates.totals[row].to(logp)
        counts, totals = (torch.stack([x.sum(1), x[:, 0]], dim=1) for x in (counts, totals))
        known = torch.stack([counts / (totals + 0.5), 0.5 * counts.log1p(), (totals > 0).to(counts)], dim=1)
        return torch.cat([known.flatten(1), 0.25 * logp.unsqueeze(1)], dim=1)

    def forward(self, candidates: Candidates) -> Tensor:
        """Return b(a) of each entry, in nats."""
        n, found = len(candidates.logp), [candidates.logp.new_empty(0)]
        for start in range(0, n, self.BLOCK):
            features = self.features(candidates, slice(start, min(start + self.BLOCK, n)))
            padded = F.pad(features, (0, 0, 0, self.BLOCK - len(features)))
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

    def state(self) -> list[Tensor]:
        return [*self.net.parameters(), *(x for slots in self.adam.state.values() for x in slots.values())]


@torch.enable_grad()
def net_step(net: BiasNet, adam: torch.optim.Optimizer, parts: list[tuple[Candidates, Tensor]], n: int, dist: Dist):
    """Take a step on the mean loss of n tokens, of which this rank has (candidates, targets [m]) in parts.

    What the tilt adds to a row's nll is log Z - b(target). A rank without candidates takes part with a gradient of 0.
    """
    adam.zero_grad()
    for candidates, targets in parts:
        if len(candidates.row):
            bias = net(candidates)
            hit = candidates.token == targets[candidates.row]
            ((normalizer(candidates, bias).log().sum() - bias[hit].double().sum()) / n).backward()
    dist.sum_gradients(list(net.parameters()))
    adam.step()


def hedge_weights(log_w: Tensor, gains: Tensor, eta: float, share: float) -> Tensor:
    """Return the log-weights before each of the tokens and after the last: [K], log-probabilities [n, K] -> [n + 1, K].

    w_k <- w_k * p_k(token)^eta (Vovk 1990). With eta = 1 and no share it is Bayes' rule: the whole stream costs at most
    log2(K) bits more than the best expert. With a share, a part of the weight is dealt out evenly after each token
    (Herbster and Warmuth 1998). On the CPU, where sums have one order.
    """
    gains = gains.cpu()
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

    The weights before a row need the experts' log-probabilities of all tokens before it, also inside the chunk. Those
    tokens are inputs. A block's last row stays open until its token is known: the block's carry is the log-weights
    before it and the experts' rows there [K, V].
    """

    def __init__(self, c: Config, dist: Dist, net: BiasNet):
        super().__init__(c, dist, net)
        self.experts = {name: MIXERS[name](c, dist, net) for name in c.hedge_experts}
        self.log_w = torch.full((len(self.experts),), -math.log(len(self.experts)), dtype=torch.float64)

    def mix(self, block: RowBlock) -> Tensor:
        rows, mine, inputs = block.rows, block.mine, block.inputs
        found = [expert.mix(block) for expert in self.experts.values()]
        known = slice(mine.start, min(mine.stop, rows.stop - 1))  # rows whose next token is an input of this block
        target = inputs[known.start + 1 : known.stop + 1].unsqueeze(1)
        gains = torch.cat([logp[: len(target)].gather(1, target) for logp in found], dim=1).double()
        n_known = rows.stop - rows.start - 1
        gains = self.dist.gather(gains, slice(known.start - rows.start, known.stop - rows.start), n_known)
        log_w = self.log_w if block.carry is None else self.close(block.carry, inputs[rows.start])
        log_w = hedge_weights(log_w, gains, self.c.hedge_eta, self.c.hedge_share)
        is_owner = mine.stop == rows.stop  # of the last row, which all ranks need
        open_row = torch.stack([logp[-1] if is_owner else logp.new_zeros(logp.shape[1]) for logp in found])
        block.carry = log_w[-1], self.dist.sum(open_row)
        weights = log_w[mine.start - rows.start : mine.stop - rows.start].softmax(1).to(block.logp.device)
        mixed = sum(weights[:, k : k + 1] * logp.double().exp() for k, logp in enumerate(found))
        return mixed.log().float()

    def close(self, carry: tuple[Tensor, Tensor], token: Tensor) -> Tensor:
        """Return the log-weights behind an open row, given its token."""
        log_w, open_row = carry
        gains = open_row[:, token].double().unsqueeze(0)
        return hedge_weights(log_w, gains, self.c.hedge_eta, self.c.hedge_share)[-1].log_softmax(0)

    def learn(self, tokens: Tensor, blocks: list[RowBlock]) -> None:
        self.log_w = self.close(blocks[-1].carry, tokens[-1])
        for expert in self.experts.values():
            expert.learn(tokens, blocks)

    def state(self) -> list[Tensor]:
        return [self.log_w, *(x for expert in self.experts.values() for x in expert.state())]

    def summary(self) -> str:
        """Return the weights of the experts."""
        return " ".join(f"{name}:{w:.6f}" for name, w in zip(self.experts, self.log_w.softmax(0).tolist(), strict=True))


MIXERS = {
    "neural": Neural,
    "flat": Flat,
    "unigram": Unigram,
    "bigram": Bigram,
    "trigram": Trigram,
    "backoff": Backoff,
    "tilt": OneTokenTilt,
    "maxent": Maxent,
    "hedge": Hedge,
}

CALIBRATION_STEPS, CALIBRATION_LR = 512, 0.03


def calibration_chunks(model: GPT, loader: TrainLoader, c: Config, dist: Dist):
    """Yield (candidates, targets [m] of this rank, tokens of all ranks) of held-out training text, by block."""
    text, chains = loader.calibration_text(), HashChains(c, dist.device)
    neural = SlidingWindow("sliding", compiled(model, c, dist.device), c, dist, c.eval_stride)
    for start in range(0, len(text) - 1, c.ttt_chunk_tokens):
        tokens = text[start : start + c.ttt_chunk_tokens + 1]
        for rows in blocks(len(tokens) - 1, neural):
            mine, logp = neural.share(rows), neural.predict(tokens[:-1], rows)["sliding"]
            yield chains.candidates(tokens[:-1], mine, logp), tokens[1:][mine], rows.stop - rows.start
        chains.update(tokens)
        neural.update(tokens)


def calibrate(model: GPT, net: BiasNet, loader: TrainLoader, c: Config, dist: Dist) -> None:
    """Fit the mixer's network on training text that no step has seen: Adam at a rate that falls to zero."""
    chunks = list(calibration_chunks(model, loader, c, dist))
    adam = torch.optim.Adam(net.parameters(), lr=CALIBRATION_LR)
    for step in range(CALIBRATION_STEPS):
        adam.param_groups[0]["lr"] = CALIBRATION_LR * (1 - step / CALIBRATION_STEPS)
        candidates, targets, n = chunks[step % len(chunks)]
        net_step(net, adam, [(candidates, targets)], n, dist)
    log.info(f"mixer_calibration: {sum(n for *_, n in chunks)} tokens of held-out training text")


# ==================== Scoring =========================================================================================
# Predictors, and the one loop that every score in a log comes from.

# Rows are made, checked and charged in blocks. A dense tensor of a rank holds at most this many numbers (134 MB in
# float32) or one stride of rows, whatever the chunk's length; about K + 4 of them live at a time with K experts.
BLOCK_CELLS = 2**25


class SlidingWindow:
    """The model as it is. Row t is the softmax of its logits over the window that scores position t.

    `predict` leaves all state alone; `update` only takes in which tokens the context now holds. The context is cut from
    what was given and padded with zeros where the future would be; causal attention does not look there.
    """

    def __init__(self, stage: str, model, c: Config, dist: Dist, stride: int, temperature: float = 1.0):
        self.stages, self.model, self.c, self.dist = (stage,), model, c, dist
        self.stride, self.temperature = stride, temperature
        self.block_rows = max(1, BLOCK_CELLS // c.vocab_size // stride) * stride
        self.seen = 0  # positions of the stream before the next chunk
        self.context = torch.empty(0, dtype=torch.int64, device=dist.device)  # the inputs just before it

    def share(self, rows: slice) -> slice:
        """Return this rank's part of a block of rows."""
        return self.dist.share(rows.stop - rows.start, self.stride, rows.start)

    @torch.no_grad()
    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return by stage the log-probabilities float32 [m, V] of the tokens that follow this rank's share of the rows.

        inputs: token ids [n] of a chunk. rows: the part of the chunk that all ranks predict now.
        """
        mine, seq_len = self.share(rows), self.c.eval_seq_len
        logp = torch.empty(mine.stop - mine.start, self.c.vocab_size, device=inputs.device)
        if not len(logp):
            return {self.stages[0]: logp}
        first = self.seen + mine.start
        batch = 1 << max(1, self.c.micro_batch_tokens // seq_len).bit_length() - 1  # a power of two
        starts, lows, highs = windows(first, self.seen + mine.stop, self.stride, seq_len)
        known = F.pad(torch.cat([self.context, inputs]), (0, seq_len))
        offset = self.seen - len(self.context)  # position of known[0]
        for b in range(0, len(starts), batch):
            start, low, high = starts[b : b + batch], lows[b : b + batch], highs[b : b + batch]
            padded, keep = self.compiled_shape(start, int((start + seq_len - low).max()))
            tokens = known[self.on_device(padded[:, None] - offset + np.arange(seq_len))]
            window = np.repeat(np.arange(len(start)), high - low)  # of each position from low[0] to high[-1]
            column = np.arange(low[0], high[-1]) - start[window] - (seq_len - keep)
            logits = self.model(tokens, keep=keep)[self.on_device(window), self.on_device(column)]
            # In float64: what is left of a row's deviation from one is the rounding of its entries.
            logp[low[0] - first : high[-1] - first] = (logits / self.temperature).double().log_softmax(-1)
        return {self.stages[0]: logp}

    def compiled_shape(self, start: np.ndarray, keep: int) -> tuple[np.ndarray, int]:
        """Return windows and rows to keep, on CUDA of few shapes: to compile another takes half a minute."""
        if self.dist.device.type != "cuda":
            return start, keep
        missing = 2 ** (len(start) - 1).bit_length() - len(start)
        return np.pad(start, (0, missing), mode="edge"), self.stride if keep <= self.stride else self.c.eval_seq_len

    def on_device(self, index: np.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.dist.device)

    def update(self, tokens: Tensor) -> None:
        """Move past a scored chunk: tokens [n + 1], its inputs and its last target."""
        self.context = torch.cat([self.context, tokens[:-1]])[-self.c.eval_seq_len :]
        self.seen += len(tokens) - 1

    def state(self) -> list[Tensor]:
        """Return every tensor that a prediction depends on."""
        return [self.context, torch.tensor(self.seen), *self.model.state_dict().values()]


class Deadline:
    """When adaptation has to end: the rest of the stream must still be scored in time. Once ended, it stays ended.

    The clock and the stream's length, and no token, decide. To reproduce the score elsewhere, pass the number of chunks
    adapted to as `stop_after`.
    """

    LATEST, LEAST = 9, 4  # chunks that the median is over, and before any decision: the first ones compile

    def __init__(self, dist: Dist, n_chunks: int = 0, seconds: float = math.inf, stop_after: int | None = None):
        self.dist, self.left, self.stop_after = dist, n_chunks, stop_after
        self.adapted, self.learned, self.scored = 0, 0.0, deque(maxlen=self.LATEST)
        self.clock, self.seconds, self.before = Clock(dist), seconds, 0.0

    def allows(self) -> bool:
        """Return whether to adapt to the chunk that has just been scored."""
        self.left -= 1
        if self.stop_after is not None or math.isinf(self.seconds):
            return self.stop_after is None or self.adapted < self.stop_after
        now = self.clock.seconds()
        self.scored.append(now - self.before)
        needed = self.learned + self.left * statistics.median_low(self.scored)
        if len(self.scored) >= self.LEAST and now + needed > 0.97 * self.seconds:
            self.stop_after = self.adapted
            log.info(f"ttt_stop: after {self.adapted} chunks, with {self.left} chunks left to score")
        return self.stop_after is None

    @contextmanager
    def adapting(self):
        """Count and time an adaptation."""
        began = self.clock.seconds() if math.isfinite(self.seconds) else 0.0
        yield
        self.adapted += 1
        if math.isfinite(self.seconds):
            self.before = self.clock.seconds()
            self.learned = self.before - began


class TTT(SlidingWindow):
    """Score-first test-time training: `update` trains a copy of the model on the chunk whose scores are fixed.

    Batches and their micro batches are cut from the stream, not from ranks. A rank takes its share of a batch's micro
    batches and gradients are summed in float32: scores differ between world sizes by its rounding only.
    """

    def __init__(self, model: GPT, c: Config, dist: Dist, tokenizer: Tokenizer, deadline: Deadline | None = None):
        self.deadline, self.tokenizer = deadline or Deadline(dist), tokenizer
        self.skipped = torch.zeros((), dtype=torch.int64, device=dist.device)  # steps without a finite gradient
        self.learner = copy.deepcopy(model)
        self.average = copy.deepcopy(model) if c.ttt_polyak else self.learner
        self.called = compiled(self.learner, c, dist.device)
        predicting = compiled(self.average, c, dist.device) if c.ttt_polyak else self.called
        super().__init__("ttt", predicting, c, dist, c.eval_stride, c.ttt_temperature)
        n_frozen = c.ttt_freeze_blocks if c.ttt_freeze_blocks >= 0 else max(0, c.num_layers + c.ttt_freeze_blocks)
        self.learner.blocks[:n_frozen].requires_grad_(False)
        self.params = [p for p in self.learner.parameters() if p.requires_grad]
        if c.ttt_optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.params, lr=c.ttt_lr, momentum=c.ttt_momentum)
        else:
            betas = (c.beta1, c.beta2)
            self.optimizer = torch.optim.AdamW(self.params, lr=c.ttt_lr, betas=betas, eps=c.adam_eps, weight_decay=0.0)

    def update(self, tokens: Tensor) -> None:
        if self.deadline.allows():
            with self.deadline.adapting():
                self.adapt(tokens)
        super().update(tokens)

    def adapt(self, tokens: Tensor) -> None:
        """Train on a scored chunk [n + 1] for TTT_EPOCHS."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate()
        sequences = self.training_sequences(tokens)
        batch_seqs = max(1, self.c.ttt_batch_tokens // self.c.train_seq_len)
        for _ in range(self.c.ttt_epochs):
            for batch in zip(*(x.split(batch_seqs) for x in sequences), strict=True):
                self.step(*batch)

    def learning_rate(self) -> float:
        """Return TTT_LR, on a cosine over a stream length that is a setting: no prediction knows the real length."""
        if not self.c.ttt_cosine_tokens:
            return self.c.ttt_lr
        return self.c.ttt_lr * 0.5 * (1 + math.cos(math.pi * min(1.0, self.seen / self.c.ttt_cosine_tokens)))

    def training_sequences(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the chunk [n + 1] as inputs, targets and loss weights, each [sequences, TRAIN_SEQ_LEN].

        Padding weighs 0.
        """
        inputs, targets = tokens[:-1], tokens[1:]
        weights = torch.ones(len(inputs), device=tokens.device)
        if self.c.ttt_byte_weighted:
            weights = self.tokenizer.count_bytes(inputs, targets).to(weights)
        padding = (0, -len(inputs) % self.c.train_seq_len)
        return tuple(F.pad(x, padding).view(-1, self.c.train_seq_len) for x in (inputs, targets, weights))

    def step(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Take a step on the weighted mean loss of a batch [sequences, T] that every rank holds whole."""
        micro_seqs = max(1, self.c.ttt_micro_tokens // self.c.train_seq_len)
        mine, total_weight = self.dist.share(len(inputs), micro_seqs), weights.sum().clamp(min=1.0)
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(mine.start, mine.stop, micro_seqs):
            micro = slice(first, min(first + micro_seqs, mine.stop))
            nll = self.called(inputs[micro], targets[micro])
            ((nll * weights[micro]).sum() / total_weight).backward()
        grads = self.dist.sum_gradients(self.params)
        self.skipped += clip_gradients([grads], grads.norm(), self.c.ttt_grad_clip)
        self.optimizer.step()
        if self.c.ttt_polyak:
            with torch.no_grad():
                average, learner = (list(model.parameters()) for model in (self.average, self.learner))
                torch._foreach_lerp_(average, learner, 1 - self.c.ttt_polyak)

    def state(self) -> list[Tensor]:
        momenta = [x for slots in self.optimizer.state.values() for x in slots.values() if isinstance(x, Tensor)]
        return [*super().state(), *self.learner.parameters(), *momenta]


class MixedTTT:
    """The rows of test-time training, mixed with what the stream so far holds.

    The hash chains are read up to the token before each position; the mixer's parameters are those that the last chunk
    left. What `predict` makes of a chunk's blocks is kept until `update`, as long as the inputs that it saw stay.
    """

    stages = ("ttt", "mixed")

    def __init__(self, neural: SlidingWindow, mixer: Mixer, c: Config, dist: Dist):
        self.neural, self.mixer, self.dist = neural, mixer, dist
        self.stride, self.block_rows, self.share = neural.stride, neural.block_rows, neural.share
        self.chains = HashChains(c, dist.device)
        self.made: dict[int, RowBlock] = {}  # by the block's rows.stop

    def predict(self, inputs: Tensor, rows: slice) -> dict[str, Tensor]:
        """Return by stage the log-probabilities [m, V] of the tokens that follow this rank's share of the rows."""
        self.forget_other(inputs)
        if rows.start and rows.start not in self.made:  # the mixer's carry comes from the rows before
            before = max((stop for stop in self.made if stop < rows.start), default=0)
            self.predict(inputs, slice(before, rows.start))
        logp, mine = self.neural.predict(inputs, rows)["ttt"], self.share(rows)
        candidates = self.chains.candidates(inputs, mine, logp)
        carry = self.made[rows.start].carry if rows.start else None
        block = RowBlock(inputs.clone(), rows, mine, logp, candidates, carry)
        mixed = self.mixer.mix(block)
        block.logp = None
        self.made[rows.stop] = block
        return {"ttt": logp, "mixed": mixed}

    def forget_other(self, inputs: Tensor) -> None:
        """Drop the blocks that were made of other inputs."""
        self.made = {stop: x for stop, x in self.made.items() if torch.equal(x.inputs[:stop], inputs[:stop])}

    def update(self, tokens: Tensor) -> None:
        """Learn from a scored chunk: tokens [n + 1], its inputs and its last target."""
        inputs, stop, chunk = tokens[:-1], len(tokens) - 1, deque()
        self.forget_other(inputs)
        if stop not in self.made:
            self.predict(inputs, slice(max(self.made, default=0), stop))
        while stop:
            chunk.appendleft(self.made[stop])
            stop = chunk[0].rows.start
        self.mixer.learn(tokens, list(chunk))
        self.made = {}
        self.chains.update(tokens)
        self.neural.update(tokens)

    def state(self) -> list[Tensor]:
        return [*self.mixer.state(), *self.chains.state(), *self.neural.state()]


def fingerprint(predictor) -> str:
    """Return the sha256 of every byte of state that the predictor's next rows depend on."""
    return hashlib.sha256(as_bytes(predictor.state())).hexdigest()


def make_predictor(stage: str, model: GPT, net: BiasNet, c: Config, dist: Dist, tokenizer: Tokenizer, deadline=None):
    """Return the predictor of a stage; each starts from what the artifact holds."""
    if stage in FROZEN_STAGES:
        stride = c.eval_seq_len if stage == "roundtrip" else c.eval_stride
        return SlidingWindow(stage, compiled(model, c, dist.device), c, dist, stride)
    neural = TTT(model, c, dist, tokenizer, deadline)
    return neural if stage == "ttt" else MixedTTT(neural, MIXERS[c.mixer](c, dist, net), c, dist)


FROZEN_STAGES = ("roundtrip", "sliding")


def chunk_length(stage: str, c: Config) -> int:
    """Return the positions between two updates of a stage's predictor."""
    return c.val_batch_size if stage in FROZEN_STAGES else c.ttt_chunk_tokens


@dataclass(frozen=True)
class Score:
    """What a pass over the stream gave: nll and bytes of every position [N], and what the sums come to."""

    nll: Tensor  # float64
    token_bytes: Tensor  # int64
    max_sum_error: float  # largest |sum of a row - 1|
    seconds: float

    @property
    def val_loss(self) -> float:
        """Nll per token, in nats."""
        return self.nll.mean().item()

    @property
    def val_bpb(self) -> float:
        """Bits per byte of the decoded text."""
        return bits_per_byte(self.nll, self.token_bytes)


def bits_per_byte(nll: Tensor, token_bytes: Tensor) -> float:
    return nll.sum().item() / math.log(2) / max(1, int(token_bytes.sum()))


SUM_TOLERANCE = 1e-5  # of a row in float32; the largest of a pass is below 1e-6


def blocks(n: int, predictor):
    """Yield the parts of a chunk of n rows that the ranks predict together."""
    length = predictor.block_rows * predictor.dist.world_size
    for start in range(0, n, length):
        yield slice(start, min(start + length, n))


def score(predictor, stream: Stream, chunk_tokens: int, dist: Dist, progress=None) -> dict[str, Score]:
    """Predict, score, update, from left to right. Return a score a stage. Raise InputError for an improper row."""
    clock, worst = Clock(dist), dict.fromkeys(predictor.stages, 0.0)
    nll = {stage: torch.zeros(len(stream), dtype=torch.float64) for stage in predictor.stages}
    for chunk in stream.chunks(chunk_tokens):
        for rows in blocks(len(chunk.inputs), predictor):
            mine, n = predictor.share(rows), rows.stop - rows.start
            for stage, logp in predictor.predict(chunk.inputs, rows).items():
                charged = -logp.gather(1, chunk.targets[mine].unsqueeze(1)).squeeze(1)  # a row meets its target
                part = slice(mine.start - rows.start, mine.stop - rows.start)
                nll[stage][chunk.start + rows.start :][:n] = dist.gather(charged.double(), part, n).cpu()
                error = (logp.double().exp().sum(-1) - 1).abs().max().item() if len(logp) else 0.0
                worst[stage] = max(worst[stage], dist.max(error if math.isfinite(error) else math.inf))
                if worst[stage] > SUM_TOLERANCE:
                    where = f"scoring: by position {chunk.start + rows.stop}"
                    raise InputError(f"{where} a row's sum is off by {worst[stage]}; allowed is {SUM_TOLERANCE}")
        if not chunk.is_last:
            predictor.update(chunk.tokens)
        if progress:
            progress(chunk.start + len(chunk.inputs), nll, clock.seconds())
    seconds = clock.seconds()
    return {stage: Score(nll[stage], stream.token_bytes, worst[stage], seconds) for stage in predictor.stages}


# ==================== main ============================================================================================
# The order of the phases, and the records of a run.


def run_pass(predictor, stream: Stream, c: Config, dist: Dist) -> dict[str, Score]:
    """Score the stream with a predictor and log its stages."""
    last, said = predictor.stages[-1], 0.0

    def progress(done: int, nll: dict[str, Tensor], seconds: float) -> None:
        nonlocal said
        if seconds - said >= 10:
            said, bpb = seconds, bits_per_byte(nll[last][:done], stream.token_bytes[:done])
            log.info(f"  {last}_chunk [{done}/{len(stream)}] bpb={bpb:.4f} time={seconds:.1f}s")

    scores = score(predictor, stream, chunk_length(last, c), dist, progress)
    quant, partial = quant_label(c), "" if stream.whole else f" partial:{len(stream)}_tokens"
    # The names by which the field's scripts find a score in a log.
    labels = dict(roundtrip=f"final_{quant}_roundtrip", sliding=f"final_{quant}_sliding_window", ttt="legal_ttt")
    for stage, result in scores.items():
        label, loss, bpb = labels.get(stage, stage), result.val_loss, result.val_bpb
        error = result.max_sum_error
        log.info(f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * result.seconds:.0f}ms{partial}")
        log.info(f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f} max_sum_error:{error:.2e}{partial}")
    return scores


def evaluate(
    model: GPT, net: BiasNet, c: Config, dist: Dist, tokenizer: Tokenizer, stream: Stream
) -> tuple[dict, dict]:
    """Score the stream in each stage. Return (the stages' records, their scores).

    The stages that adapt come last, in one pass if both are asked for, and have what is then left of MAX_EVAL_SECONDS.
    """
    clock, records, scores = Clock(dist), {}, {}
    last_of_pass = [stage for stage in STAGES if stage in c.stages and not (stage == "ttt" and "mixed" in c.stages)]
    for stage in last_of_pass:
        left = c.max_eval_seconds - clock.seconds() if c.max_eval_seconds else math.inf
        n_chunks = -(-len(stream) // chunk_length(stage, c))
        deadline = Deadline(dist, n_chunks, left)
        predictor = make_predictor(stage, model, net, c, dist, tokenizer, deadline)
        scores |= (found := run_pass(predictor, stream, c, dist))
        adaptation = {}
        if stage not in FROZEN_STAGES:
            adaptation = dict(adapted_chunks=deadline.adapted, chunks=n_chunks, ttt_stop=deadline.stop_after)
            skipped = int(getattr(predictor, "neural", predictor).skipped)
            log.info(f"ttt_chunks:{deadline.adapted}/{n_chunks} skipped_steps:{skipped}")
        if isinstance(predictor, MixedTTT):
            log.info(f"hash_chains: {predictor.chains.memory_bytes} bytes a rank for {len(stream)} tokens")
            if isinstance(predictor.mixer, Hedge):
                log.info(f"hedge_weights: {predictor.mixer.summary()}")
        shared = dict(tokens=len(stream), bytes=int(stream.token_bytes.sum()), documents=stream.documents)
        shared |= dict(whole_stream=stream.whole, **adaptation)
        for name, x in found.items():
            figures = dict(val_loss=x.val_loss, val_bpb=x.val_bpb, max_sum_error=x.max_sum_error)
            records[name] = dict(figures, seconds=round(x.seconds, 3), **shared)
    limit = f" of {c.max_eval_seconds:g}" if c.max_eval_seconds else ""
    log.info(f"eval_seconds: {clock.seconds():.1f}{limit}")
    return {stage: records[stage] for stage in c.stages}, scores


def artifact_path(c: Config, run_id: str) -> Path:
    """Return where the run's artifact is or will be."""
    return Path(c.artifact_path or Path(c.log_dir) / f"{run_id}.artifact")


def hardware(dist: Dist) -> str:
    if dist.device.type == "cuda":
        return f"{dist.world_size} x {torch.cuda.get_device_name(dist.device)}"
    return f"{dist.world_size} process(es) on CPU, {torch.get_num_threads()} thread(s) each, {platform.machine()}"


def versions() -> dict[str, str]:
    modules = dict(torch=torch, numpy=np, sentencepiece=sentencepiece)
    return dict(python=platform.python_version(), **{name: module.__version__ for name, module in modules.items()})


def log_start(c: Config, dist: Dist, stream: Stream | None) -> None:
    """Log every value in force and what the run stands on."""
    for line in c.lines():
        log.info(line)
    log.info(f"hardware: {hardware(dist)}")
    log.info(f"versions: {json.dumps(versions())}")
    log.info(f"script_sha256:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}")
    log.info(f"seed:{c.seed}")
    mine = dist.share(c.batch_seqs)
    n_passes = -(-(mine.stop - mine.start) // max(1, c.micro_batch_tokens // c.train_seq_len))
    log.info(f"world_size:{dist.world_size} grad_accum_steps:{n_passes}")
    kernels = choose_kernels(c, dist.device)
    compiles = int(c.torch_compile and dist.device.type == "cuda")
    log.info(f"device:{dist.device} dtype:{activation_dtype(c, dist.device)} compile:{compiles}")
    log.info(f"kernels: attention:{kernels.attention} fused:{show(kernels.fused) or 'none'}")
    if stream is not None:
        partial = "" if stream.whole else " partial: the stream goes on"
        pattern = os.path.join(c.data_path, "*_val_*.bin")
        log.info(f"val_loader:shards pattern={pattern} tokens:{len(stream)} documents:{stream.documents}{partial}")


def write_records(record: dict, scores: dict[str, Score], stream: Stream | None, c: Config) -> None:
    """Write logs/<RUN_ID>.json, and the final stage's per-token record if SCORES_PATH asks for it."""
    write_atomically(Path(c.log_dir) / f"{c.run_id}.json", (json.dumps(record, indent=1) + "\n").encode())
    if c.scores_path and scores:
        result, file = scores[record["final_stage"]], io.BytesIO()
        columns = dict(token=stream.tokens[1:], nll_nats=result.nll, bytes=result.token_bytes)
        np.savez_compressed(file, **{name: column.numpy() for name, column in columns.items()})
        write_atomically(Path(c.scores_path), file.getvalue())


def log_results(record: dict) -> None:
    """Log the stages side by side, then the run's score, which is the last of them."""
    log.info("stage       val_loss   val_bpb    change  seconds    tokens sum error")
    before = None
    for stage, row in record["stages"].items():
        change = "" if before is None else f"{row['val_bpb'] - before:+.5f}"
        log.info(
            f"{stage:<10} {row['val_loss']:9.5f} {row['val_bpb']:9.5f} {change:>9} {row['seconds']:8.1f} "
            f"{row['tokens']:9d} {row['max_sum_error']:9.1e}"
        )
        before = row["val_bpb"]
    scope = f"documents:{row['documents']} " + ("whole stream" if row["whole_stream"] else "PARTIAL stream")
    if row.get("ttt_stop") is not None:
        scope += f" adaptation CUT by MAX_EVAL_SECONDS after {row['adapted_chunks']} of {row['chunks']} chunks"
    over = record["artifact"]["total_bytes"] - CAP_BYTES
    scope += f" OVER THE CAP by {over} bytes" if over > 0 else ""
    log.info(f"final val_bpb:{record['val_bpb']:.8f} stage:{record['final_stage']} {scope}")


def train_and_export(path: Path, tokenizer_sha256: str, c: Config, dist: Dist, stream: Stream | None) -> dict:
    """Train a model and write its artifact. Return the record's `train` part."""
    model = make_model(c, dist.device).init_weights(c.seed).to(dist.device)
    log.info(f"model_params:{sum(p.numel() for p in model.parameters())}")
    log.info(f"artifact_budget:{artifact_budget(model, c)} bytes beside the script")
    loader = TrainLoader(c, dist)
    averages, clock, record = train(model, loader, c, dist, stream)
    stepped = record["seconds"]
    choose_average(model, averages, loader, c, dist)
    averaged = clock.seconds()
    export(model, loader, path, tokenizer_sha256, c, dist)
    total = clock.seconds()
    seconds = dict(steps=stepped, averaging=averaged - stepped, export=total - averaged, total=total)
    record["seconds"] = {part: round(value, 3) for part, value in seconds.items()}
    used = f"{total - stepped:.1f} of {c.reserve_seconds:g}" if c.max_wallclock_seconds else f"{total - stepped:.1f}"
    listed = " ".join(f"{part}:{value:.1f}" for part, value in seconds.items())
    log.info(f"train_seconds: {listed} reserve:{used}")
    if 0 < c.max_wallclock_seconds < total:
        log.info(f"OVER MAX_WALLCLOCK_SECONDS={c.max_wallclock_seconds:g} by {total - c.max_wallclock_seconds:.1f} s")
    if dist.device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        log.info(f"peak memory allocated: {allocated // 2**20} MiB reserved: {reserved // 2**20} MiB")
    return record


def execute(c: Config, env: dict[str, str], dist: Dist) -> None:
    """Run the phases in order: data, training, artifact, stages, records."""
    packed = dist.broadcast(read_artifact, c.artifact_path) if c.phase == "eval" else None
    c = with_artifact(c, packed[0], env) if packed else c
    run_id = dist.broadcast(lambda: c.run_id or time.strftime("%Y%m%d_%H%M%S") + f"_seed{c.seed}")
    c = dataclasses.replace(c, run_id=run_id)
    tokenizer, path = Tokenizer(c), artifact_path(c, run_id)
    stream = None if c.phase == "train" and not c.val_loss_every else Stream(c, dist.device, tokenizer)
    open_log(c, run_id, dist)
    log_start(c, dist, stream)

    trained = None if c.phase == "eval" else train_and_export(path, tokenizer.sha256, c, dist, stream)
    header, parts = packed or dist.broadcast(read_artifact, path)  # from here on, only what the file says counts
    check_tokenizer(header, tokenizer, path)
    artifact, stages, scores = size_record(path, header, c), {}, {}
    if c.phase != "train":
        stages, scores = evaluate(*unpack(parts, c, dist.device), c, dist, tokenizer, stream)

    final = c.stages[-1] if stages else None
    record = dict(
        run_id=run_id,
        seed=c.seed,
        config=dataclasses.asdict(c),
        hardware=hardware(dist),
        versions=versions(),
        kernels=dataclasses.asdict(choose_kernels(c, dist.device)),
        train=trained,
        artifact=artifact,
        stages=stages,
        final_stage=final,
        val_bpb=stages[final]["val_bpb"] if final else None,
    )
    if dist.is_main:
        write_records(record, scores, stream, c)
    if final:
        log_results(record)


def check_tokenizer(header: dict, tokenizer: Tokenizer, path: str | Path) -> None:
    """Raise InputError if the artifact's model was trained with another tokenizer."""
    if header["tokenizer"] != tokenizer.sha256:
        raise InputError(f"ARTIFACT_PATH={path}: its model's tokenizer has another sha256 than TOKENIZER_PATH's")


def main() -> int:
    """Run under torchrun or alone. Return 2, after one line on standard error, for input that cannot be used."""
    env = dict(os.environ)
    try:
        config = Config.from_env(env)
        dist = open_dist(config)
        execute(config, env, dist)
    except InputError as error:
        if env.get("RANK", "0") != "0":
            time.sleep(5)  # if the main rank met it too, torchrun ends this one before it says the same again
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2  # without waiting for the other ranks, which may be in a collective that never ends
    dist.close()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # everything is written; gloo's threads can abort an interpreter that takes itself apart
