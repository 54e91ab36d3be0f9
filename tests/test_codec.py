"""Codec: text to bits and back, as many as the rows say; a wrong file or a wrong artifact is noticed."""

from __future__ import annotations

import dataclasses
import io
import math
import subprocess
import sys
import types
from pathlib import Path

import constriction
import pytest
import sentencepiece
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import codec
import train_gpt
from conftest import build, examples, stored
from runs import load_run
from train_gpt import MIXERS, BiasNet, Dist, InputError, Tokenizer

ROOT = Path(train_gpt.__file__).resolve().parent
N, CHUNK = 112, 48  # three chunks of six strides, the last one cut short
HERE = dict(DEVICE="cpu", MICRO_BATCH_TOKENS=128)  # what belongs to the machine and not to the artifact
EVERY = tuple(name for name in MIXERS if name != "hedge")
HEDGES = {"hedge": {}, "hedge of all experts, with a share": dict(hedge_experts=EVERY, hedge_share=0.01, hedge_eta=0.5)}
WAYS = {**{name: dict(mixer=name) for name in EVERY}, **{name: dict(mixer="hedge") | x for name, x in HEDGES.items()}}


@pytest.fixture(scope="module")
def artifact(tiny_config, tmp_path_factory):
    """Path of an artifact of random weights, with a learning rate that moves them."""
    c = tiny_config(ttt_chunk_tokens=CHUNK, ttt_batch_tokens=64, ttt_lr=0.5, ttt_epochs=1)
    path = tmp_path_factory.mktemp("codec") / "tiny.artifact"
    model, net = build(c), BiasNet(c)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    path.write_bytes(train_gpt.pack(model, stored(model, c), net, c, Tokenizer(c).sha256))
    return path


@pytest.fixture(scope="module")
def run(artifact, tiny_data):
    return load_run(artifact, tiny_data, VAL_TOKENS=N, STAGES="mixed", **HERE)


def changed(run, **settings):
    """The run with other settings in force."""
    return dataclasses.replace(run, c=dataclasses.replace(run.c, **settings))


def walked(run, tokens, block_rows=None):
    """The rows [N, V] that the codec makes along the tokens [N + 1], which it may not know yet."""
    truth, rows = run.stream().tokens, []

    def code(logp, _):
        rows.append(logp.clone())
        return int(truth[len(rows)])

    predictor = run.predictor()
    predictor.block_rows = block_rows or predictor.block_rows
    codec.walk(predictor, tokens, run.chunk_tokens, code)
    assert torch.equal(tokens, truth)
    return torch.stack(rows)


def scored(run, block_rows=None):
    """The score of the run's own loop, in blocks of its own or of a given length."""
    predictor = run.predictor()
    predictor.block_rows = block_rows or predictor.block_rows
    return train_gpt.score(predictor, run.stream(), run.chunk_tokens, run.dist)[run.stage]


def assert_takes(data, nll):
    """The bits are those of the nll, up to what surrounds them and to the coder's steps."""
    bits = nll.sum().item() / math.log(2)
    assert abs(8 * len(data) - bits) <= 1e-3 * bits + 64


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.slow
def test_a_row_has_the_same_bits_before_the_rest_of_its_chunk_is_known(run, way):
    """The decoder's rows are the encoder's, and the scoring loop's in blocks of a stride."""
    mixed, stride = changed(run, **way), run.c.eval_stride
    tokens = mixed.stream().tokens
    known, unknown = (walked(mixed, x, stride) for x in (tokens.clone(), torch.cat([tokens[:1], 0 * tokens[1:]])))
    assert torch.equal(known, unknown)
    nll = -known.gather(1, tokens[1:].unsqueeze(1)).squeeze(1).double()
    assert torch.equal(nll, scored(mixed, stride).nll)
    torch.testing.assert_close(nll, scored(mixed).nll, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stage", train_gpt.STAGES)
@pytest.mark.slow
def test_tokens_come_back_in_the_bits_that_their_rows_say(run, stage):
    staged = changed(run, stages=(stage,), val_batch_size=CHUNK)
    tokens = staged.stream().tokens
    data = codec.encode(staged.predictor(), tokens.clone(), CHUNK)
    assert torch.equal(codec.decode(staged.predictor(), data, run.c.bos_id, CHUNK), tokens)
    assert_takes(data, scored(staged).nll)


def test_the_last_chunk_s_score_does_not_depend_on_what_is_learned_from_it(run):
    """Encoding moves the predictor past all chunks but the last, as scoring does."""
    predictor = run.predictor()
    codec.encode(predictor, run.stream().tokens, CHUNK)
    assert predictor.neural.seen == predictor.chains.seen == N - N % CHUNK


@pytest.mark.slow
def test_every_changed_byte_and_another_predictor_are_noticed(run):
    sliding = changed(run, stages=("sliding",))
    data = codec.encode(sliding.predictor(), run.stream().tokens, CHUNK)

    def assert_noticed(run, data):
        with pytest.raises(InputError, match="encoded file"):
            codec.decode(run.predictor(), data, run.c.bos_id, CHUNK)

    for at in (0, 3, 7, len(data) // 2, len(data) - 1):
        assert_noticed(sliding, data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    assert_noticed(sliding, data[: len(data) // 2])
    assert_noticed(changed(run, stages=("ttt",)), data)


def test_a_file_that_ends_before_its_tokens_is_refused_at_once(run):
    """Eight bytes that name 768,450 tokens made the decoder read zeros for hours."""
    sliding = changed(run, stages=("sliding",))
    with pytest.raises(InputError, match="3 bytes of words end before the 768450 tokens"):
        codec.decode(sliding.predictor(), b"\xb7\xc2\xf3.\x10qd{abc"[:11], run.c.bos_id, CHUNK)


def test_bytes_behind_the_words_are_refused(run):
    sliding = changed(run, stages=("sliding",))
    tokens = run.stream().tokens[:41]
    data = codec.encode(sliding.predictor(), tokens.clone(), CHUNK)
    assert torch.equal(codec.decode(sliding.predictor(), data, run.c.bos_id, CHUNK), tokens)
    for behind in (b"x", b"\0", b"garbage" * 9):
        with pytest.raises(InputError, match="nothing behind the words"):
            codec.decode(sliding.predictor(), data + behind, run.c.bos_id, CHUNK)


@pytest.mark.slow
@settings(max_examples=examples(20), deadline=20_000, print_blob=False)
@given(data=st.data())
def test_a_file_from_a_stranger_is_decoded_or_refused_in_one_line(run, data):
    """Bytes of a right file are others, are cut out or put in, or all that follows the first byte is noise."""
    sliding, tokens = changed(run, stages=("sliding",)), run.stream().tokens[:41]
    right = codec.encode(sliding.predictor(), tokens.clone(), CHUNK)
    at, noise = data.draw(st.integers(0, len(right))), data.draw(st.binary(min_size=1, max_size=24))
    ways = [
        right[:at] + noise + right[at + len(noise) :],
        right[:at] + noise + right[at:],
        right[:at] + right[at + 1 :],
    ]
    file = data.draw(st.sampled_from([*ways, codec.MAGIC + noise, codec.MAGIC + b"\x28" + noise]))
    try:
        assert torch.equal(codec.decode(sliding.predictor(), file, run.c.bos_id, CHUNK), tokens) and file == right
        event("decoded")
    except InputError as error:
        event("refused")
        assert len(str(error).splitlines()) == 1


def test_tokens_that_were_all_but_impossible_come_back(run):
    """The coder gives every token 2^-24 at least, so that these take fewer bits than their rows say."""

    class Sure:
        stages, stride, dist = ("sure",), 8, run.dist

        def predict(self, inputs, rows):
            logits = torch.zeros(rows.stop - rows.start, 320)
            logits[:, 7] = 60.0
            return {"sure": logits.log_softmax(-1)}

        def update(self, tokens):
            pass

    tokens = torch.tensor([1, *[7, 7, 9, 300] * 16])
    data = codec.encode(Sure(), tokens.clone(), CHUNK)
    assert torch.equal(codec.decode(Sure(), data, 1, CHUNK), tokens)


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


@pytest.mark.slow
def test_a_run_that_stopped_adapting_is_decoded_with_its_number_of_chunks(run):
    adapting, tokens = changed(run, stages=("ttt",)), run.stream().tokens
    data = codec.encode(adapting.predictor(ttt_stop=1), tokens.clone(), CHUNK)
    assert torch.equal(codec.decode(adapting.predictor(ttt_stop=1), data, run.c.bos_id, CHUNK), tokens)
    with pytest.raises(InputError, match="encoded file"):
        codec.decode(adapting.predictor(), data, run.c.bos_id, CHUNK)


def test_load_run_keeps_the_artifact_s_settings_and_takes_the_caller_s(artifact, tiny_data, monkeypatch):
    monkeypatch.setenv("TTT_EPOCHS", "2")
    monkeypatch.setenv("HEDGE_SHARE", "0.01")
    run = load_run(artifact, tiny_data, VAL_TOKENS=40, STAGES=("sliding", "ttt"), HEDGE_SHARE=0.25, **HERE)
    assert (run.c.ttt_epochs, run.c.hedge_share, run.c.ttt_lr, run.c.model_dim) == (2, 0.25, 0.5, 32)
    assert run.stage == "ttt" and run.chunk_tokens == CHUNK
    assert len(run.stream()) == 40 and len(run.stream(25)) == 25 and run.stream(0).whole


def test_load_run_takes_the_rank_that_it_is_given_and_refuses_ranks_of_which_it_was_not_told(
    artifact, tiny_data, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE=2: allowed is 1"):
        load_run(artifact, tiny_data, **HERE)
    dist = Dist()
    run = load_run(artifact, tiny_data, dist=dist, plain=False, KERNELS="", **HERE)
    assert run.dist is dist and run.c.torch_compile


@pytest.fixture
def main(monkeypatch):
    """main(*arguments) -> the status of the command, run in this process."""
    for name, value in dict(HERE, STAGES="mixed", MIXER="maxent", OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(name, str(value))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["codec.py", *map(str, arguments)])
        return codec.main()

    yield call
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_another_process_gives_the_text_back_and_refuses_the_rest_in_one_line(
    main, artifact, tiny_data, tmp_path, capsys
):
    bits, text, original = tmp_path / "text.bits", tmp_path / "text", tmp_path / "original"
    encoding = ("encode", "--artifact", artifact, "--data", tiny_data, "--tokens", N, "--ttt-chunks", 1)
    assert main(*encoding, "--out", bits, "--text", original) == 0
    assert f"{N} tokens, " in (said := capsys.readouterr().out) and f"in {bits.stat().st_size} bytes" in said
    tokenizer = ("--tokenizer", tiny_data / "tokenizer.model", "--out", text)
    decoding = ("decode", "--artifact", artifact, "--file", bits, *tokenizer, "--ttt-chunks", 1)
    command = [sys.executable, str(ROOT / "tools" / "codec.py"), *map(str, decoding)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert text.read_bytes() == original.read_bytes() and len(original.read_bytes()) > N
    text.unlink()
    artifact_changed, bits_changed = tmp_path / "changed.artifact", tmp_path / "changed.bits"
    artifact_changed.write_bytes(artifact.read_bytes()[:-1] + b"\x00\x01")
    bits_changed.write_bytes(bits.read_bytes()[:-2] + b"\x00\x01")
    for faulty in ((artifact, tmp_path / "none"), (artifact_changed, bits), (artifact, bits_changed), (artifact, bits)):
        assert main("decode", "--artifact", faulty[0], "--file", faulty[1], *tokenizer) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1
        assert not text.exists()


def test_any_text_file_comes_back_byte_for_byte(main, artifact, tiny_data, tmp_path, capsys):
    original, bits, text = tmp_path / "any.txt", tmp_path / "any.bits", tmp_path / "any.out"
    original.write_bytes(
        "  two spaces,\r\n\ttabs, <s>, \u00e9\u4e2d\U0001f600\x00 and no line break at the end  ".encode()
    )
    with_tokenizer = ("--artifact", artifact, "--tokenizer", tiny_data / "tokenizer.model")
    assert main("encode", *with_tokenizer, "--file", original, "--out", bits) == 0
    said = capsys.readouterr().out
    assert f" {len(original.read_bytes())} bytes of text, in {bits.stat().st_size} bytes" in said
    assert main("decode", *with_tokenizer, "--file", bits, "--out", text) == 0
    assert text.read_bytes() == original.read_bytes()


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "0 tokens; allowed are 1 to"),
        (b"good \xff bad", "byte 5 is no UTF-8"),
        ("a text with \u2581 in it".encode(), "it does not give"),
        (None, "No such file"),
    ],
    ids=["empty", "bytes", "mark", "none"],
)
def test_a_file_that_cannot_come_back_is_refused(main, artifact, tiny_data, tmp_path, capsys, content, words):
    path, bits = tmp_path / "any.txt", tmp_path / "any.bits"
    if content is not None:
        path.write_bytes(content)
    given = ("encode", "--artifact", artifact, "--file", path, "--out", bits)
    assert main(*given, "--tokenizer", tiny_data / "tokenizer.model") == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not bits.exists()
    assert main(*given) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_a_tokenizer_that_normalizes_is_refused_by_name(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some plain words"] * 20), model_writer=model, vocab_size=300, minloglevel=2,
        model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc", hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = types.SimpleNamespace(bos_id=1, sp=sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))
    args = types.SimpleNamespace(file="x.txt", tokenizer="t.model")
    with pytest.raises(InputError, match=r"--tokenizer=t\.model: it does not give x\.txt back"):
        codec.file_tokens(b"some  plain words", tokenizer, args)
