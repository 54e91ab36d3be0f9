"""What the tests share: a tiny tokenizer, tiny shards and a tiny model's settings, all made here and deterministic."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton, so that its kernels run here
import train_gpt  # noqa: E402
from serve import ThreadRank, Turns  # noqa: E402

hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
hypothesis.settings.register_profile("same_every_time", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same_every_time")
torch.set_num_threads(1)

VOCAB_SIZE, BOS_ID = 320, 1
ALPHABET = "abcdefghijklmnopqrstuvwxyzATS.,"
PLAIN = (
    "the and of to in that it was for on with as his they at be this from have or one had by word but not what all were"
    " when your can said there use an each which she do how their if will up other about out many then them these so"
    " some her would make like him into time has look two more write go see number no way could people my than first"
    " water been call who oil its now find long down day did get come made may part quick brown fox jumps lazy dogs"
)
WORDS = PLAIN.split()
ODD_DOCUMENTS = [
    " a leading space, then words",
    "   three spaces   inside and behind   ",
    "two\nlines and\n\na gap\ttab\r\nCRLF",
    "emoji \U0001f600\U0001f469\u200d\U0001f52c and caf\u00e9 na\u00efve \u4f60\u597d \u0434\u0430",
    "\U0001f680 first, digits 0123456789 and UPPER CASE",
    "e\u0301 combining, \ufb01 ligature, non-breaking\u00a0space, control \x01\x7f",
    "\n\n\tindented\n        deeply\n",
    "pieces as text: <s> </s> <unk> <0x0A>",
]
TINY = dict(
    device="cpu",
    kernels=(),  # Triton's interpreter takes a minute a step
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    xsa_last_n=1,
    bigram_vocab_size=64,
    bigram_dim=8,
    ve_layers=(1,),
    ve_dim=8,
    rope_dims=4,
    train_seq_len=32,
    train_batch_tokens=256,
    micro_batch_tokens=128,
    iterations=12,
    warmup_steps=1,
    max_wallclock_seconds=0.0,
    max_eval_seconds=0.0,
    lr_warmup_iters=2,
    warmdown_iters=6,
    muon_momentum_warmup_steps=4,
    train_log_every=4,
    swa_every=2,
    late_qat_threshold=0.3,
    gptq_tokens=256,
    eval_seq_len=32,
    eval_stride=8,
    ttt_lora_tokens=8,
    ttt_chunk_tokens=256,
    ttt_batch_tokens=128,
    val_batch_size=512,
    mixer_calibration_tokens=1024,
    ngram_table_bits=16,
)


def sentences(seed, n_words):
    """English-like text: each word depends on the one before it, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    words, at = [], int(rng.integers(len(WORDS)))
    for i in range(n_words):
        words.append(WORDS[at].capitalize() if i % 11 == 0 else WORDS[at] + ("." if i % 11 == 10 else ""))
        at = (3 * at + int(rng.integers(4))) % len(WORDS)
    return " ".join(words)


def write_shard(path, tokens, magic=train_gpt.SHARD_MAGIC, version=train_gpt.SHARD_VERSION, n_tokens=None):
    """A challenge shard, written from the format's description; the header can be made to lie."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if n_tokens is None else n_tokens
    Path(path).write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return Path(path)


@pytest.fixture(name="write_shard", scope="session")
def write_shard_fixture():
    return write_shard


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """Path of a lossless SentencePiece model of 320 pieces, 256 of them bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n".join([ALPHABET, *(sentences(seed, 60) for seed in range(12))]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=BOS_ID,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory, tiny_tokenizer):
    """A folder with two training shards, a validation shard and the tokenizer, as data/prepare.py leaves them."""
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(tiny_tokenizer, folder / "tokenizer.model")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))

    def encode(documents):
        return [token for text in documents for token in [BOS_ID, *sp.encode(text)]]

    train = encode(sentences(100 + i, 60 + 7 * (i % 9)) for i in range(60))
    cut = 3 * len(train) // 5
    write_shard(folder / "x_train_000000.bin", train[:cut])
    write_shard(folder / "x_train_000001.bin", train[cut:])
    val = [text for i, odd in enumerate(ODD_DOCUMENTS) for text in (odd, sentences(900 + i, 90))]
    write_shard(folder / "x_val_000000.bin", encode(val))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, tiny_data):
    """make(**overrides) -> Config of a tiny model on the tiny data; another data folder may come first."""
    log_dir = str(tmp_path_factory.mktemp("logs"))

    def make(data_path=tiny_data, **overrides):
        return train_gpt.Config(**{**TINY, "data_path": str(data_path), "log_dir": log_dir, **overrides})

    return make


@pytest.fixture(scope="session")
def tiny_env(tmp_path_factory, tiny_data):
    """make(**overrides) -> the same settings as an environment for a subprocess, on one thread."""
    log_dir = str(tmp_path_factory.mktemp("logs"))

    def make(data_path=tiny_data, **overrides):
        settings = {**TINY, "data_path": str(data_path), "log_dir": log_dir, **overrides}
        env = {name.upper(): train_gpt.show(value) for name, value in settings.items()}
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return {**outside, "OMP_NUM_THREADS": "1", **env}

    return make


def examples(n):
    """How many examples a test on strange input takes: FUZZ_EXAMPLES in the environment, or n."""
    return int(os.environ.get("FUZZ_EXAMPLES", n))


class VirtualTime:
    """In place of train_gpt's clock: seconds pass where a test says so, and nowhere else."""

    def __init__(self):
        self.now, self.strftime = 0.0, time.strftime

    def perf_counter(self):
        return self.now

    def costs(self, function, seconds):
        """The function, which takes so many seconds, a number or one that is called."""

        def slow(*arguments, **named):
            self.now += seconds() if callable(seconds) else seconds
            return function(*arguments, **named)

        return slow


@pytest.fixture
def virtual_time(monkeypatch):
    clock = VirtualTime()
    monkeypatch.setattr(train_gpt, "time", clock)
    return clock


@pytest.fixture
def run_report(monkeypatch, capsys):
    """run_report(*arguments) -> (exit status, lines of the output, of the error output) of tools/report.py."""
    import report  # with SciPy, which no other test needs

    def run_report(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        status = report.main()
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run_report


def build(config, seed=0):
    """A model with every parameter random, so that no branch is hidden behind a zero."""
    model = train_gpt.GPT(config).init_weights(config.seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def stored(model, config, log2_step=-2.0):
    """A model's quantized parameters at the nearest codes; no text has a part in it.

    Takes the place of the fit to training text where the numbers themselves do not matter.
    """
    found = {}
    for name, p in train_gpt.quantized_parameters(model).items():
        rows, columns = (2.0 ** (torch.arange(n, device=p.device) % 4) for n in p.shape)
        info = train_gpt.HessianInfo(rows, columns)
        grid = train_gpt.GRIDS[config.quant](p.detach(), p.role, info, log2_step, config)
        found[name] = grid.nearest(p.detach()).to(torch.int8), grid
    return found


def random_tokens(config, batch=2, seq_len=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, config.vocab_size, (batch, seq_len), generator=generator)


class ThreadDist(ThreadRank):
    """A rank in a thread, with the collectives that training needs, too."""

    def broadcast(self, make, *arguments):
        return self.exchange(make(*arguments) if self.is_main else None, lambda parts: parts[0])

    def reduce_scatter(self, bank):
        return self.sum(bank.clone()).chunk(self.world_size)[self.rank], lambda: None

    def all_gather(self, shard):
        return self.exchange(shard, torch.cat), lambda: None


def on_ranks(world_size, function):
    """Return function(dist) of each rank, the ranks in threads."""
    turns, slots = Turns(world_size), [None] * world_size
    return turns.each(function, [ThreadDist(rank, torch.device("cpu"), turns, slots) for rank in range(world_size)])
