"""Artifact: what is stored comes back bit for bit, whatever is damaged is refused, nothing in the file can run."""

from __future__ import annotations

import ast
import hashlib
import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    GPT,
    PREFIX,
    InputError,
    Maxent,
    Run,
    Tokenizer,
    artifact_record,
    as_packed,
    dequantize,
    gptq,
    pack,
    quantize,
    quantized_parameters,
    quantizer_of,
    read_artifact,
    rounded,
    unpack,
    write_atomically,
)

SHA = "ab" * 32


def filled(c, seed=0):
    """A model in which every parameter, also those that start at zero, has values of its own."""
    model, generator = GPT(c), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def c(tiny_config):
    return tiny_config()


@pytest.fixture(scope="module")
def model(c):
    return filled(c)


@pytest.fixture(scope="module")
def packed(model, c):
    return pack(model, rounded(model, c), Maxent(c), c, SHA)


@pytest.fixture
def path(tmp_path, packed):
    path = tmp_path / "x.artifact"
    path.write_bytes(packed)
    return path


def refusal(call, *arguments):
    """The one-line message with which a call is refused."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Quantizer


MATRICES = st.tuples(
    st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(-4, 3), st.sampled_from([2, 4, 6, 8])
)


def matrix(rows, cols, seed, exponent):
    """Heavy-tailed numbers of the given order of magnitude."""
    w = np.random.default_rng(seed).standard_t(3, (rows, cols)) * 10**exponent
    return torch.from_numpy(w).float()


@settings(max_examples=200)
@given(MATRICES, st.floats(1, 64))
def test_symbols_are_integers_within_range(shape, clip_sigmas):
    *drawn, bits = shape
    symbols, scale = quantize(matrix(*drawn), bits, clip_sigmas)
    assert symbols.dtype == torch.int8 and scale.dtype == torch.float16
    assert symbols.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.isfinite(scale).all() and (scale > 0).all()


@settings(max_examples=200)
@given(MATRICES, st.floats(1, 64))
def test_the_error_is_half_a_step_inside_the_range_and_the_range_is_kept_outside(shape, clip_sigmas):
    *drawn, bits = shape
    w, top = matrix(*drawn), 2 ** (bits - 1) - 1
    symbols, scale = quantize(w, bits, clip_sigmas)
    step, restored = scale.double().unsqueeze(1), dequantize(symbols, scale).double()
    nearest = w.double().clamp(-top * step, top * step)
    assert ((restored - nearest).abs() <= 0.5001 * step).all()


@settings(max_examples=100)
@given(MATRICES)
def test_the_range_is_a_number_of_standard_deviations(shape):
    rows, cols, seed, exponent, bits = shape
    w = matrix(rows, cols, seed, exponent)
    reached = quantize(w, bits, 6.0)[1].double() * (2 ** (bits - 1) - 1)
    expected = 6 * w.double().square().mean(1).sqrt()
    assert ((reached / expected - 1).abs() < 1e-3).logical_or(expected < 1e-2).all()  # float16 is coarse below


@pytest.mark.parametrize("bits", [6, 8])
def test_a_row_of_zeros_stays_zero(bits):
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    restored = dequantize(*quantize(w, bits, 6.0))
    assert restored[0].eq(0).all() and torch.isfinite(restored).all() and restored[1].ne(0).all()


def test_a_huge_outlier_is_cut_and_harms_its_own_row_only():
    w = matrix(4, 500, 0, 0)
    expected = dequantize(*quantize(w, 6, 6.0))
    w[2, 7] = 1e4
    restored = dequantize(*quantize(w, 6, 6.0))
    assert torch.equal(restored[[0, 1, 3]], expected[[0, 1, 3]])
    assert 0 < restored[2, 7] < 1e4 and torch.isfinite(restored).all()


def test_what_is_quantized_already_stays_as_it_is():
    """At a scale that the rows' own deviation gives again: +-1 times top / sigmas steps."""
    symbols = torch.tensor([[5, -5, 5, -5], [5, 5, 5, -5]], dtype=torch.int8)
    w = dequantize(symbols, torch.tensor([0.25, 0.5]).half())
    again, scale = quantize(w, 6, 31 / 5)
    assert torch.equal(dequantize(again, scale), w)


def products_of(cols, seed, mixing):
    """The sum of x x^T over 200 random inputs whose channels go together as far as `mixing` says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, cols, generator=generator)
    x = x + mixing * x @ torch.randn(cols, cols, generator=generator)
    return x.T @ x


def gptq_by_definition(w, products, scale, top):
    """One column after the other, and after each a new inverse of what is left of the damped products (OBQ)."""
    h = products.double() + 0.01 * products.double().diagonal().mean() * torch.eye(len(products)).double()
    order = products.diagonal().argsort(descending=True).tolist()
    w, step, symbols = w.double().clone(), scale.double(), torch.zeros(w.shape, dtype=torch.int8)
    for at, j in enumerate(order):
        left = order[at:]
        inverse = torch.linalg.inv(h[left][:, left])
        symbols[:, j] = (w[:, j] / step).round().clamp(-top, top).to(torch.int8)
        off = (w[:, j] - symbols[:, j] * step) / inverse[0, 0]
        w[:, left] -= torch.outer(off, inverse[0])
    return symbols


@pytest.mark.parametrize("cols", [7, 130, 200])
def test_gptq_is_its_definition(cols):
    w, products = matrix(5, cols, cols, 0), products_of(cols, cols, 0.3)
    symbols, scale = gptq(w, products, 4, 4.0)
    assert torch.equal(scale, quantize(w, 4, 4.0)[1])
    assert (symbols == gptq_by_definition(w, products, scale, 7)).float().mean() > 0.995  # float32 tips a few


def test_gptq_rounds_to_the_nearest_level_where_inputs_are_independent_and_lowers_the_outputs_error_elsewhere():
    w = torch.randn(20, 150, generator=torch.Generator().manual_seed(0))
    nearest = quantize(w, 5, 4.0)[0]
    assert torch.equal(gptq(w, torch.eye(150), 5, 4.0)[0], nearest)
    products = products_of(150, 1, 0.3)

    def error(symbols, scale):
        off = dequantize(symbols, scale) - w
        return torch.einsum("ri,ij,rj->", off, products, off)

    assert error(*gptq(w, products, 5, 4.0)) < 0.5 * error(*quantize(w, 5, 4.0))


def test_gptq_bears_inputs_that_are_always_zero():
    products = products_of(12, 0, 0.3)
    products[3] = products[:, 3] = 0
    symbols, scale = gptq(matrix(4, 12, 0, 0), products, 6, 6.0)
    assert torch.isfinite(dequantize(symbols, scale)).all()
    assert torch.isfinite(dequantize(*gptq(matrix(4, 12, 0, 0), torch.zeros(12, 12), 6, 6.0))).all()


NAME = "blocks.0.up.weight"


def test_input_products_are_those_of_the_inputs(tiny_config):
    """Of the first block's up projection, by a hook of its own."""
    c = tiny_config(gptq_tokens=128)
    model, run = filled(c), Run(c)
    batch = train_gpt.TrainLoader(c, run).first_sequences(c.gptq_tokens)
    assert batch.shape == (4, c.train_seq_len + 1)
    inputs = []
    hook = model.blocks[0].up.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().flatten(0, -2)))
    products = train_gpt.input_products(model, batch, c, run)
    hook.remove()
    x = torch.cat(inputs).double()
    assert len(x) == 128
    torch.testing.assert_close(products[NAME].double(), x.T @ x, atol=1e-3, rtol=1e-4)


def test_the_symbols_that_do_better_on_held_out_text_are_chosen(tiny_config, monkeypatch):
    c, run = tiny_config(gptq_tokens=128), Run(tiny_config())
    model, losses = filled(c), iter([2.0, 1.0, 0.5, 1.0, 2.0, 0.5, 3.0, 0.5])  # rounded, gptq, float, ...
    monkeypatch.setattr(train_gpt, "batch_nats", lambda *_: torch.tensor(next(losses)))
    monkeypatch.setattr(train_gpt, "input_products", lambda model, batch, c, run: {NAME: torch.eye(32) + products})
    products = 1e3 * products_of(32, 0, 0.3)
    fitted, nearest = (
        gptq(dict(model.named_parameters())[NAME].detach(), torch.eye(32) + products, 6, 6.0),
        rounded(model, c),
    )
    assert not torch.equal(fitted[0], nearest[NAME][0])
    assert torch.equal(train_gpt.choose_symbols(model, c, run)[0][NAME][0], fitted[0])
    assert torch.equal(train_gpt.choose_symbols(model, c, run)[0][NAME][0], nearest[NAME][0])
    monkeypatch.setattr(train_gpt, "input_products", lambda *_: {NAME: torch.full((32, 32), float("nan"))})
    assert f"weight {NAME}: its inputs" in refusal(train_gpt.choose_symbols, model, c, run)
    none = train_gpt.choose_symbols(model, tiny_config(gptq_tokens=0), run)[0]
    assert all(torch.equal(none[name][0], nearest[name][0]) for name in nearest)


# Round trip


def test_a_packed_model_comes_back_bit_for_bit(model, c, path):
    header, parts = read_artifact(path)
    restored = dict(unpack(parts, c, Run(c))[0].named_parameters())
    quantized = quantized_parameters(model)
    assert quantized and len(restored) > len(quantized)
    for name, p in model.named_parameters():
        stored = dequantize(*quantize(p, *quantizer_of(name, c))) if name in quantized else p.half().float()
        assert torch.equal(restored[name], stored), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_embeddings=False, num_layers=3, ve_layers=(0, 2)),
        dict(bigram_vocab_size=0, ve_layers=(), smear_gate=False, value_residual=False, unet_skips=False),
        dict(rope_dims=0, num_layers=1, ve_layers=(0,), xsa_last_n=0),
    ],
    ids=["untied", "bare", "one layer"],
)
def test_packing_what_was_unpacked_gives_the_same_function(changes, tiny_config, tmp_path):
    c = tiny_config(**changes)
    tokens = torch.tensor([[1, 5, 300, 7, 1, 9]])
    model = filled(c)
    (tmp_path / "x").write_bytes(pack(model, rounded(model, c), Maxent(c), c, SHA))
    header, parts = read_artifact(tmp_path / "x")
    assert as_packed(c, header, {}) == c
    with torch.no_grad():
        logits = [unpack(parts, c, Run(c))[0](tokens) for _ in range(2)]
    assert torch.equal(*logits) and torch.isfinite(logits[0]).all()


def test_the_header_says_what_a_reader_must_know(c, path, packed):
    header, parts = read_artifact(path)
    assert header["file_bytes"] == len(packed) == path.stat().st_size
    assert header["tokenizer"] == SHA
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in header["shape"].items()} == c.marked("shape")
    assert set(parts) == set(header["parts"])


def test_packing_is_deterministic(model, c, packed):
    assert pack(model, rounded(model, c), Maxent(c), c, SHA) == packed


def test_a_weight_of_the_mixer_that_cannot_be_held_is_refused_by_name(model, c):
    mixer = Maxent(c)
    with torch.no_grad():
        mixer.out.bias.fill_(1e6)
    assert "weight mixer.out.bias cannot be stored" in refusal(pack, model, rounded(model, c), mixer, c, SHA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight", "blocks.0.mlp_scale", "smear.scale"])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, name, c):
    model = filled(c)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = bad
    assert f"weight {name} cannot be stored" in refusal(pack, model, rounded(model, c), Maxent(c), c, SHA)


@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight", "blocks.0.mlp_scale"])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(name, c):
    """Finite in float32, but what would be stored (the value, or its row's step) is not."""
    model = filled(c)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = 1e9
    assert name in refusal(pack, model, rounded(model, c), Maxent(c), c, SHA)


def test_a_fresh_process_computes_the_same_logits(model, c, path, tiny_env, tmp_path):
    tokens = torch.tensor([[1, 5, 300, 7, 1, 9, 44, 2]])
    code = f"""
import os, torch, train_gpt as t
torch.set_num_threads(1)
env = dict(os.environ)
header, parts = t.read_artifact(r"{path}")
c = t.as_packed(t.Config.from_env(env), header, env)
with torch.no_grad():
    torch.save(t.unpack(parts, c, t.Run(c))[0](torch.tensor({tokens.tolist()})), r"{tmp_path / "logits.pt"}")
"""
    known = c.marked("shape")  # from the file alone
    env = {name: value for name, value in tiny_env().items() if name.lower() not in known}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=Path(train_gpt.__file__).parent)
    with torch.no_grad():
        expected = unpack(read_artifact(path)[1], c, Run(c))[0](tokens)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


# Codec


def integers(seed, shapes, width):
    """Tensors whose columns differ in deviation, with a column of zeros and an outlier each."""
    rng, tensors = np.random.default_rng(seed), []
    for rows, cols in shapes:
        x = rng.standard_normal((rows, cols)) * width * 2.0 ** rng.uniform(-3, 1, cols)
        x[:, 0] = 0
        x[-1, -1] = 127
        tensors.append(np.rint(x).clip(-127, 127).astype(np.int8))
    return tensors


SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), SHAPES, st.floats(0.01, 60), st.sampled_from(["range", "lzma"]))
def test_any_integers_come_back(seed, shapes, width, codec):
    tensors = integers(seed, shapes, width)
    parts = train_gpt.encode_integers(tensors, codec)
    found = train_gpt.decode_integers(parts, shapes, codec)
    assert all(np.array_equal(a, b) for a, b in zip(tensors, found, strict=True))


def test_coded_integers_take_what_their_classes_entropy_says():
    """Within 1 % with all that is stored beside the words, on Gaussian columns of different widths."""
    tensors = integers(0, [(600, 300), (300, 700)], 5.0)
    parts = train_gpt.encode_integers(tensors, "range")
    symbols = np.concatenate([x.ravel() for x in tensors]).astype(int)
    classes = train_gpt.class_of_each([train_gpt.spread(x) for x in tensors], [x.shape for x in tensors])
    bits = 0.0
    for k in np.unique(classes):
        counts = np.bincount(symbols[classes == k] + 128)
        counts = counts[counts > 0]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    coded = len(parts[train_gpt.CODED])
    beside = sum(len(train_gpt.compress(raw)) for part, raw in parts.items() if part != train_gpt.CODED)
    assert coded + beside <= 1.01 * bits / 8 + 4 * train_gpt.CODER_LANES
    assert coded >= bits / 8


@settings(max_examples=60)
@given(st.data())
def test_damaged_integers_are_refused_also_without_the_file_s_checksum(data):
    shapes = [(30, 40)]
    parts = train_gpt.encode_integers(integers(1, shapes, 5.0), "range")
    coded = bytearray(parts[train_gpt.CODED])
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    refusal(train_gpt.decode_integers, {**parts, train_gpt.CODED: bytes(coded)}, shapes, "range")


def test_both_codecs_hold_the_same_model(model, c, tiny_config, tmp_path):
    restored = []
    for codec in ("range", "lzma"):
        (tmp_path / codec).write_bytes(pack(model, rounded(model, c), Maxent(c), tiny_config(codec=codec), SHA))
        header, parts = read_artifact(tmp_path / codec)
        restored.append(unpack(parts, as_packed(c, header, {}), Run(c))[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(x.values() for x in restored), strict=True))


# Damage


def test_a_truncated_file_is_refused(path, packed):
    lengths = [0, 1, 4, 5, 6, 9, PREFIX.size - 1, PREFIX.size, PREFIX.size + 1, len(packed) // 2, len(packed) - 1]
    for length in lengths:
        path.write_bytes(packed[:length])
        assert f"ARTIFACT_PATH={path}" in refusal(read_artifact, path)


@pytest.mark.parametrize("offset", [*range(PREFIX.size + 4), 100, 300, 700, 2000, 5000, -2, -1])
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_refused(path, packed, offset, bit):
    damaged = bytearray(packed)
    damaged[offset] ^= bit
    path.write_bytes(damaged)
    assert f"ARTIFACT_PATH={path}" in refusal(read_artifact, path)


@settings(max_examples=60)
@given(st.data())
def test_a_changed_byte_anywhere_is_refused(packed, tmp_path_factory, data):
    damaged = bytearray(packed)
    damaged[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.artifact"
    path.write_bytes(damaged)
    refusal(read_artifact, path)


def test_bytes_after_the_end_are_refused(path, packed):
    path.write_bytes(packed + b"\0")
    assert "checksum" in refusal(read_artifact, path)
    prefix, body = packed[: PREFIX.size], packed[PREFIX.size + 32 :] + b"\0"
    path.write_bytes(prefix + hashlib.sha256(prefix + body).digest() + body)
    assert "1 bytes behind its last part" in refusal(read_artifact, path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(200), b"{}" * 100, bytes(500)])
def test_a_file_of_another_kind_is_refused(path, content):
    path.write_bytes(content)
    assert "not an artifact" in refusal(read_artifact, path)


def test_another_version_is_refused(path, packed):
    path.write_bytes(packed[:5] + b"\x01" + packed[6:])
    assert "version 1; allowed is 2" in refusal(read_artifact, path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(read_artifact, tmp_path / "nothing")
    assert "ARTIFACT_PATH=" in refusal(read_artifact, tmp_path)


def test_parts_that_do_not_fit_the_model_are_refused(c, path, tiny_config):
    _, parts = read_artifact(path)
    run = Run(c)
    for part in parts:
        for wrong in (parts[part][:-2], parts[part][:-1], parts[part] + b"\0", parts[part] + b"\0\0"):
            assert f"part {part}" in refusal(unpack, {**parts, part: wrong}, c, run)
        assert f"part {part}" in refusal(unpack, {k: v for k, v in parts.items() if k != part}, c, run)
    assert "unknown part extra" in refusal(unpack, {**parts, "extra": b""}, c, run)
    short = np.frombuffer(parts["frequencies"], "<u2") // 2
    assert "part frequencies" in refusal(unpack, {**parts, "frequencies": short.tobytes()}, c, run)
    for other in (tiny_config(num_layers=3), tiny_config(num_layers=1, ve_layers=(0,))):
        assert "its model needs" in refusal(unpack, parts, other, run)


def test_nothing_in_the_script_can_execute_a_file():
    """No pickle and no eval, under any spelling that the source could use."""
    tree = ast.parse(Path(train_gpt.__file__).read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save", "eval", "exec", "compile", "__import__", "np.load"}


# Writing


def test_writing_leaves_the_file_alone_in_its_folder(tmp_path):
    path = tmp_path / "new" / "x.artifact"
    for data in (b"first", b"second"):
        write_atomically(path, data)
        assert path.read_bytes() == data and [p.name for p in path.parent.iterdir()] == ["x.artifact"]


@contextmanager
def small_files():
    """No file of this process may grow past 1000 bytes, as on a full disk; not even the one that pytest writes to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_keeps_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.artifact"
    path.write_bytes(b"old")
    with small_files(), pytest.raises(OSError):
        write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.artifact"]


# Cap, model and tokenizer


@pytest.fixture
def tokenizer(c):
    return Tokenizer(c)


@pytest.fixture
def header(model, c, tokenizer, path):
    path.write_bytes(pack(model, rounded(model, c), Maxent(c), c, tokenizer.sha256))
    return read_artifact(path)[0]


def test_script_and_artifact_are_both_counted(c, path, header, tokenizer, capsys):
    record = artifact_record(path, header, tokenizer, Run(c))
    code_bytes, model_bytes = Path(train_gpt.__file__).stat().st_size, path.stat().st_size
    assert (record["code_bytes"], record["model_bytes"]) == (code_bytes, model_bytes)
    assert record["total_bytes"] == code_bytes + model_bytes and record["cap_bytes"] == 16_000_000
    assert sum(record["part_bytes"].values()) == model_bytes
    assert f"margin:{16_000_000 - code_bytes - model_bytes}" in capsys.readouterr().out


@pytest.mark.parametrize("excess", [1, 1234])
def test_over_the_cap_the_excess_is_named(c, path, header, tokenizer, monkeypatch, excess):
    total = artifact_record(path, header, tokenizer, Run(c))["total_bytes"]
    monkeypatch.setattr(train_gpt, "CAP_BYTES", total - excess)
    message = refusal(artifact_record, path, header, tokenizer, Run(c))
    assert f"{total} bytes" in message and f" {excess} over the cap of {total - excess}" in message


def test_exactly_the_cap_is_allowed(c, path, header, tokenizer, monkeypatch):
    total = artifact_record(path, header, tokenizer, Run(c))["total_bytes"]
    monkeypatch.setattr(train_gpt, "CAP_BYTES", total)
    assert artifact_record(path, header, tokenizer, Run(c))["total_bytes"] == total


def test_another_tokenizers_model_is_refused(c, path, header, tokenizer):
    other = {**header, "tokenizer": hashlib.sha256(b"other").hexdigest()}
    assert "tokenizer" in refusal(artifact_record, path, other, tokenizer, Run(c))


def test_the_artifacts_model_replaces_settings_that_nobody_gave(header, tiny_config, c):
    other = tiny_config(num_layers=3, mlp_mult=4.0, ve_layers=(0,), seed=5)
    assert as_packed(other, header, {"SEED": "5"}) == tiny_config(seed=5)
    assert as_packed(c, header, {"NUM_LAYERS": "2", "VE_LAYERS": "1"}) == c


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 3), ("ve_layers", (0,)), ("smear_gate", False), ("rope_base", 5e3)]
)
def test_a_setting_that_contradicts_the_artifacts_model_is_refused(header, tiny_config, name, value):
    other = tiny_config(**{name: value})
    message = refusal(as_packed, other, header, {name.upper(): train_gpt.show(value)})
    assert message.startswith(f"{name.upper()}={train_gpt.show(value)}")
    assert train_gpt.show(getattr(tiny_config(), name)) in message


def test_a_header_is_plain_json(packed):
    _, _, header_bytes = PREFIX.unpack_from(packed)
    digest, body = packed[PREFIX.size : PREFIX.size + 32], packed[PREFIX.size + 32 :]
    assert hashlib.sha256(packed[: PREFIX.size] + body).digest() == digest
    assert set(json.loads(body[:header_bytes])) == {"shape", "score", "tokenizer", "parts"}
