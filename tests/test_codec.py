"""Codec: text to bits and back, as many as the rows say; a wrong file or a wrong artifact is noticed."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import constriction
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import codec
import train_gpt
from conftest import Alone, build, stored
from test_mixing import random_maxent
from train_gpt import InputError, Tokenizer

ROOT = Path(train_gpt.__file__).resolve().parent
N = 300


@pytest.fixture(scope="module")
def world(tiny_config, tmp_path_factory):
    """(config, path of an artifact, tokenizer, the first N + 1 tokens): chunks of 128, so that two updates happen."""
    c = tiny_config(ttt_chunk_tokens=128, ttt_lr=0.05, ttt_epochs=1, val_tokens=N, stages=("mixed",))
    path = tmp_path_factory.mktemp("codec") / "tiny.artifact"
    model, mixer = build(c), random_maxent(c).float()
    path.write_bytes(train_gpt.pack(model, stored(model), mixer, c, Tokenizer(c).sha256))
    tokenizer = Tokenizer(c)
    return c, path, tokenizer, train_gpt.Stream(c, torch.device("cpu"), tokenizer).tokens


def predictor_of(world, stage="mixed"):
    c, path, tokenizer, _ = world
    model, mixer = train_gpt.unpack(train_gpt.read_artifact(path)[1], c, Alone())
    return train_gpt.make_predictor(stage, model, mixer, c, Alone(), tokenizer)


@pytest.mark.parametrize("stage", train_gpt.STAGES)
def test_tokens_come_back_in_the_bits_that_their_rows_say(world, stage):
    c, _, _, tokens = world
    data = codec.encode(predictor_of(world, stage), tokens.clone(), 128)
    found = codec.decode(predictor_of(world, stage), data, c.bos_id, 128, torch.device("cpu"))
    assert torch.equal(found, tokens)
    score = train_gpt.score(predictor_of(world, stage), stream_of(world), 128, Alone())
    bits = score.nll_nats.sum().item() / math.log(2)
    assert abs(8 * len(data) - bits) <= 1e-3 * bits + 64


def stream_of(world):
    return train_gpt.Stream(world[0], torch.device("cpu"), world[2])


def test_the_encoder_s_rows_are_those_of_the_loop(world):
    c, _, _, tokens = world
    rows = []

    class Recorder:
        def __init__(self):
            self.predictor = predictor_of(world)
            self.stride = self.predictor.stride

        def predict(self, inputs, part):
            rows.append(self.predictor.predict(inputs, part))
            return rows[-1]

        def update(self, chunk):
            self.predictor.update(chunk)

    codec.encode(Recorder(), tokens.clone(), 128)
    nats = -torch.cat(rows).gather(1, tokens[1:].unsqueeze(1)).squeeze(1).double()
    expected = train_gpt.score(predictor_of(world), stream_of(world), 128, Alone()).nll_nats
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)


def test_every_changed_byte_and_another_artifact_are_noticed(world):
    c, path, _, tokens = world
    data = codec.encode(predictor_of(world), tokens.clone(), 128)
    for at in (0, 3, 7, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[at] ^= 0x10
        with pytest.raises(InputError, match="encoded file"):
            codec.decode(predictor_of(world), bytes(changed), c.bos_id, 128, torch.device("cpu"))
    with pytest.raises(InputError, match="encoded file"):
        codec.decode(predictor_of(world, "sliding"), data, c.bos_id, 128, torch.device("cpu"))
    with pytest.raises(InputError, match="encoded file"):
        codec.decode(predictor_of(world), data[: len(data) // 2], c.bos_id, 128, torch.device("cpu"))


@given(st.integers(1, 200), st.integers(2, 500), st.floats(0.1, 20), st.integers(0, 2**31))
def test_the_coder_gives_back_any_symbols_within_a_byte_of_their_information(n, vocab_size, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    logp = (spread * torch.randn(n, vocab_size, generator=generator)).double().log_softmax(-1).float()
    tokens = torch.multinomial(logp.exp(), 1, generator=generator).squeeze(1)
    encoder = constriction.stream.queue.RangeEncoder()
    for row, token in zip(logp, tokens.tolist(), strict=True):
        encoder.encode(token, codec.categorical(row))
    data = codec.as_bytes(encoder)
    decoder = codec.as_decoder(data)
    assert [int(decoder.decode(codec.categorical(row))) for row in logp] == tokens.tolist()
    bits = -logp.gather(1, tokens.unsqueeze(1)).double().sum().item() / math.log(2)
    assert 8 * len(data) <= bits + 0.01 * n + 9


@given(st.integers(0, codec.MOST_TOKENS), st.binary(max_size=9))
def test_varints_come_back_with_what_follows(n, rest):
    assert codec.from_varint(codec.to_varint(n) + rest) == (n, rest)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, codec.to_varint(codec.MOST_TOKENS + 1)])
def test_a_number_of_tokens_that_cannot_be_is_refused(data):
    with pytest.raises(InputError, match="encoded file: it names"):
        codec.from_varint(data)


def test_a_run_that_lowered_its_epochs_is_decoded_with_those(world):
    c, _, _, tokens = world
    assert codec.epochs_by_chunk("1*1,0*2") == (1, 0, 0) and codec.epochs_by_chunk("") == ()

    def told(epochs):
        predictor = predictor_of(world)
        predictor.neural.pace.told = epochs
        return predictor

    data = codec.encode(told((1, 0)), tokens.clone(), 128)
    assert torch.equal(codec.decode(told((1, 0)), data, c.bos_id, 128, torch.device("cpu")), tokens)
    with pytest.raises(InputError, match="encoded file"):
        codec.decode(told(()), data, c.bos_id, 128, torch.device("cpu"))
    for text in ("1", "1*x", "-1*2"):
        with pytest.raises(InputError, match="--epochs="):
            codec.epochs_by_chunk(text)


def start(*arguments, **env):
    command = [sys.executable, str(ROOT / "tools" / "codec.py"), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_the_commands_give_the_text_back_and_refuse_the_rest_in_one_line(world, tiny_data, tmp_path):
    _, artifact, tokenizer, tokens = world
    bits, text = tmp_path / "text.bits", tmp_path / "text"
    env = dict(STAGES="mixed", DEVICE="cpu", MICRO_BATCH_TOKENS="128")
    options = ("--artifact", artifact, "--data", tiny_data, "--tokens", N)
    done = start("encode", *options, "--out", bits, "--text", tmp_path / "original", **env)
    assert done.returncode == 0 and f"in {bits.stat().st_size} bytes" in done.stdout, done.stderr
    options = ("--artifact", artifact, "--tokenizer", tiny_data / "tokenizer.model", "--file", bits, "--out", text)
    done = start("decode", *options, **env)
    assert done.returncode == 0, done.stderr
    assert text.read_bytes() == (tmp_path / "original").read_bytes() == codec.as_text(tokens, tokenizer)
    text.unlink()
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact_changed = tmp_path / "changed.artifact"
    artifact_changed.write_bytes(data)
    bits_changed = tmp_path / "changed.bits"
    bits_changed.write_bytes(bits.read_bytes()[:-2] + b"\x00\x01")
    for artifact_, file in ((artifact, tmp_path / "none"), (artifact_changed, bits), (artifact, bits_changed)):
        done = start("decode", "--artifact", artifact_, *options[2:4], "--file", file, "--out", text, **env)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
        assert not text.exists()
