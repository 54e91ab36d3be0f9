"""Artifact: what is stored comes back bit for bit, what is altered is refused, and it fills the size that is given."""

import ast
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import build, examples, on_ranks, stored
from train_gpt import (
    GRIDS,
    PREFIX,
    BiasNet,
    Dist,
    HessianInfo,
    InputError,
    hessian_info,
    pack,
    quantized_parameters,
    read_artifact,
)

SHA, CPU = "ab" * 32, torch.device("cpu")
SCRIPT_BYTES = os.path.getsize(train_gpt.__file__)
FORMATS = list(itertools.product(("int6", "hessian"), ("lzma", "rans")))


@pytest.fixture(scope="module")
def make(tiny_config):
    """make(quant, codec, **others) -> Config."""
    return lambda quant="int6", codec="lzma", **others: tiny_config(
        quant=quant, codec=codec, late_qat_threshold=0.0, **others
    )


@pytest.fixture(scope="module")
def c(make):
    return make()


@pytest.fixture(scope="module")
def model(c):
    return build(c)


@pytest.fixture(scope="module")
def batch(c):
    """Eight sequences of training text."""
    return train_gpt.TrainLoader(c, Dist()).sequences(0, 8)


@pytest.fixture(scope="module")
def infos(model, batch):
    return train_gpt.measure_hessians(model, batch, Dist())


@pytest.fixture(scope="module")
def packed(model, c):
    return pack(model, stored(model, c), BiasNet(c), c, SHA)


@pytest.fixture
def path(tmp_path, packed):
    path = tmp_path / "x.artifact"
    path.write_bytes(packed)
    return path


@pytest.fixture
def lines(caplog):
    """Return the lines of the log so far, when called."""
    caplog.set_level(logging.INFO, logger="train_gpt")
    return lambda start: [line for line in caplog.messages if line.startswith(start)]


def refusal(call, *arguments):
    """Return the one line with which a call refuses its arguments."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Grids


DRAWN = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(-3, 1.5))
QUANTS = pytest.mark.parametrize("quant", sorted(GRIDS))


def matrix(rows, cols, seed=0, exponent=0.0):
    """Return heavy-tailed numbers of the given order of magnitude."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, cols)) * 10**exponent).float()


def info_like(w, seed=0):
    """Return an info of w's shape, over four decades a side."""
    rng = np.random.default_rng(seed)
    return HessianInfo(*(torch.from_numpy(10 ** rng.uniform(-2, 2, n)).float() for n in w.shape))


@settings(max_examples=100)
@given(DRAWN, st.booleans(), st.integers(2, 6), st.floats(0.5, 64))
def test_int6_s_row_scale_is_clip_sigmas_standard_deviations_over_qmax(make, drawn, is_table, bits, clip_sigmas):
    """In float16. Tables have two bits more, of finer steps: codes fit int8 and errors stay within half a step."""
    w, c, qmax = matrix(*drawn), make(quant_bits=bits, clip_sigmas=clip_sigmas), 2 ** (bits - 1) - 1
    log2_step, coarsest = train_gpt.step_range(c)
    grid = GRIDS["int6"](w, "table" if is_table else "matrix", None, log2_step, c)
    assert log2_step == coarsest and grid.scale.dtype == torch.float16
    scale = clip_sigmas * w.double().std(1, correction=0) / qmax
    torch.testing.assert_close(grid.scale.double(), scale, rtol=1e-3, atol=2.0**-24)
    codes, steps = grid.nearest(w), grid.steps()
    assert torch.equal(steps, (grid.scale.float() / (4 if is_table else 1)).unsqueeze(1).expand_as(w))
    assert codes.abs().max() <= grid.qmax == 2 ** (bits + 2 * is_table - 1) - 1 <= 127
    assert ((codes * steps - w.clamp(-grid.qmax * steps, grid.qmax * steps)).abs() <= 0.501 * steps).all()


@settings(max_examples=150)
@given(DRAWN, st.floats(-12, 6), st.sampled_from([1.0, -7.0, 100.0]))
def test_hessian_s_steps_are_half_octaves_and_never_clip_a_row_s_largest_weight(make, drawn, log2_step, factor):
    """Codes fit int8, and every weight is within half a step, an outlier too."""
    w = matrix(*drawn)
    w[0, 0] = factor * w.abs().max()
    grid = GRIDS["hessian"](w, "matrix", info_like(w), log2_step, make("hessian"))
    exponents, codes = grid.exponents(), grid.nearest(w)
    assert exponents.dtype == torch.uint8 and exponents.max() <= train_gpt.Grid.N_EXPONENTS - 1
    steps = grid.scale.double() / 2 ** (exponents.double() / 2)
    torch.testing.assert_close(grid.steps().double(), steps, rtol=1e-6, atol=0)
    assert codes.abs().max() <= grid.qmax == 127
    assert ((codes * grid.steps() - w).abs() <= 0.501 * grid.steps()).all()


@settings(max_examples=100)
@given(DRAWN, st.floats(-8, 0))
def test_hessian_s_errors_cost_the_same_everywhere_up_to_the_rounding_of_exponents(make, drawn, log2_step):
    """Two roundings, each by half an octave of the squared step. Errors cost more only where codes would pass qmax.

    Also where a few columns count a thousand times as much as the others: they leave the rest of their rows alone.
    """
    w = matrix(*drawn)
    info = info_like(w)
    grid = GRIDS["hessian"](w, "matrix", info, log2_step, make("hessian"))
    excess = (info.rows.unsqueeze(1) * info.columns * grid.steps() ** 2).log2() - 2 * log2_step
    exponents, finest = grid.exponents(), 2 * (127 * grid.scale.float() / w.abs().amax(1)).log2()
    assert (excess[exponents > 0] >= -1.001).all()
    assert (excess[exponents < grid.caps.unsqueeze(1)] <= 1.001).all()
    assert ((grid.caps == train_gpt.Grid.N_EXPONENTS - 1) | (grid.caps + 1.001 > finest)).all()


@settings(max_examples=60)
@given(DRAWN, st.floats(-12, 6), st.floats(0, 6), st.sampled_from(sorted(GRIDS)))
def test_a_finer_fit_never_makes_a_step_coarser(make, drawn, log2_step, more, quant):
    w = matrix(*drawn)
    coarse, fine = (GRIDS[quant](w, "table", info_like(w), x, make(quant)) for x in (log2_step, log2_step - more))
    assert (fine.steps() <= coarse.steps()).all()


@QUANTS
def test_a_row_of_zeros_and_a_tensor_of_zeros_stay_zero(quant, make):
    for w in (torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]]), torch.zeros(3, 4)):
        grid = GRIDS[quant](w, "matrix", info_like(w), -3.0, make(quant))
        assert torch.equal(grid.nearest(w) * grid.steps() == 0, w == 0)


# Hessians and GPTQ


def inputs_of(cols, seed, mixing=0.3):
    """Return the sum of x x^T over 200 random inputs; `mixing` says how far their channels go together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, cols, generator=generator)
    x = x + mixing * x @ torch.randn(cols, cols, generator=generator)
    return x.T @ x


def remaining_by_definition(xtx):
    """Yield each column in GPTQ's order, it and those behind it, and the inverse of their damped X^T X."""
    h = xtx.double() + 0.01 * xtx.double().diagonal().mean() * torch.eye(len(xtx)).double()
    order = xtx.diagonal().argsort(descending=True).tolist()
    for at, j in enumerate(order):
        yield j, order[at:], torch.linalg.inv(h[order[at:]][:, order[at:]])


def test_columns_count_by_what_other_inputs_do_not_explain_rows_by_gradients_and_a_table_s_sides_alike():
    squares, xtx = matrix(4, 30).square(), inputs_of(30, 0)
    info, table = hessian_info(squares, xtx), hessian_info(squares)
    for j, _, inverse in remaining_by_definition(xtx):
        assert info.columns[j].item() == pytest.approx(1 / inverse[0, 0].item(), rel=1e-4)
    rows = squares.sum(1) / xtx.diagonal().sum()
    torch.testing.assert_close(info.rows, rows + 1e-3 * rows.mean())
    expected = torch.outer(squares.mean(1), squares.mean(0)) / squares.mean()
    torch.testing.assert_close(torch.outer(table.rows, table.columns), expected, rtol=0.1, atol=2e-3 * expected.max())


@QUANTS
@pytest.mark.parametrize("cols", [7, 150])
def test_gptq_is_its_definition(cols, quant, make):
    """OBQ: round one column after the other, with a new inverse of what remains of X^T X after each."""
    w, xtx = matrix(5, cols, cols), inputs_of(cols, cols)
    info = hessian_info(matrix(5, cols, 1).square(), xtx)
    grid = GRIDS[quant](w, "matrix", info, -2.5, make(quant))
    moved, steps, expected = w.double(), grid.steps().double(), torch.zeros(w.shape, dtype=torch.float64)
    for j, remaining, inverse in remaining_by_definition(xtx):
        expected[:, j] = (moved[:, j] / steps[:, j]).round().clamp(-grid.qmax, grid.qmax)
        error = (moved[:, j] - expected[:, j] * steps[:, j]) / inverse[0, 0]
        moved[:, remaining] -= torch.outer(error, inverse[0])
    (codes,) = train_gpt.gptq([w], [grid], [info])
    assert len(codes.unique()) > 5 and not torch.equal(codes, grid.nearest(w))
    assert (codes == expected).float().mean() > 0.995  # float32 tips a few


@QUANTS
@pytest.mark.parametrize("dead", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_inputs_that_are_always_zero_and_rows_without_gradient_are_borne(dead, quant, make):
    xtx, squares, w = inputs_of(12, 0), matrix(4, 12).square(), matrix(4, 12, 2)
    xtx[dead] = xtx[:, dead] = 0
    squares[dead if dead == slice(None) else slice(0, 1)] = 0
    for info in (hessian_info(squares, xtx), hessian_info(squares)):
        grid = GRIDS[quant](w, "matrix", info, -3.0, make(quant))
        codes = grid.nearest(w) if info.hinv_chol is None else train_gpt.gptq([w], [grid], [info])[0]
        assert (info.rows > 0).all() and (info.columns > 0).all()
        assert (codes * grid.steps()).isfinite().all() and (codes.abs() <= grid.qmax).all()


def test_hessians_are_of_squared_gradients_of_single_sequences_and_of_inputs(model, batch, monkeypatch):
    """Of the first block's up projection, by a hook of its own, and of the token table. Measuring leaves no trace."""
    monkeypatch.setattr(train_gpt, "hessian_info", lambda *given: given if len(given) > 1 else given[0])
    before = [p.detach().clone() for p in model.parameters()]
    found = train_gpt.measure_hessians(model, batch, Dist())
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())
    params, inputs = [model.blocks[0].up.weight, model.tok_emb.weight], []
    squares = [torch.zeros_like(p) for p in params]
    hook = model.blocks[0].up.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().flatten(0, -2)))
    for sequence in batch:
        nll = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:], reduction="sum")
        for total, gradient in zip(squares, torch.autograd.grad(nll, params), strict=True):
            total += gradient.square()
    hook.remove()
    x, got = torch.cat(inputs), [*found["blocks.0.up.weight"], found["tok_emb.weight"]]
    for expected, measured in zip([squares[0], x.T @ x, squares[1]], got, strict=True):
        torch.testing.assert_close(measured, expected, atol=1e-3, rtol=1e-3)


def test_ranks_add_up_what_they_measure_also_one_without_a_sequence(c, batch, infos):
    ranks = on_ranks(2, lambda dist: train_gpt.measure_hessians(build(c), batch if dist.is_main else batch[:0], dist))
    for name, alone in infos.items():
        for found in ranks:
            torch.testing.assert_close(found[name].rows, alone.rows, rtol=1e-4, atol=0)
            torch.testing.assert_close(found[name].columns, alone.columns, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["inputs", "gradients"])
def test_inputs_and_gradients_that_are_not_finite_are_refused_by_name(side, c, batch):
    model = build(c)
    down = model.blocks[1].down
    if side == "inputs":  # finite themselves, but their squares are not
        down.register_forward_pre_hook(lambda _, x: (x[0].detach() * 0 + 3e19,))
        down.weight.data.zero_()
    down.weight.register_hook(lambda gradient: gradient * (0 if side == "inputs" else float("nan")))
    message = refusal(train_gpt.measure_hessians, model, batch, Dist())
    assert message.startswith("weight blocks.1.down.weight: its inputs or gradients")


@QUANTS
def test_maps_are_rounded_by_gptq_and_tables_to_nearest_into_int8(quant, model, infos, make):
    found, params = train_gpt.quantize(model, infos, -3.0, make(quant)), quantized_parameters(model)
    assert set(found) == set(params) == set(infos)
    for name, (codes, grid) in found.items():
        w, is_map = params[name].detach(), params[name].role != "table"
        nearest = expected = grid.nearest(w)
        if is_map:  # by itself; in the bank of its shape it comes out the same
            (expected,) = train_gpt.gptq([w], [grid], [infos[name]])
        assert codes.dtype == torch.int8 and torch.equal(codes.float(), expected), name
        assert is_map != torch.equal(codes.float(), nearest), name


def test_an_untied_head_of_the_mlp_s_shape_keeps_its_own_range_of_codes(make, batch):
    c = make(tie_embeddings=False)
    c = dataclasses.replace(c, mlp_mult=c.vocab_size / c.model_dim)
    model = build(c)
    params, infos = quantized_parameters(model), train_gpt.measure_hessians(model, batch, Dist())
    assert params["head.weight"].shape == params["blocks.0.up.weight"].shape
    codes = train_gpt.quantize(model, infos, -5.0, c)["head.weight"][0]
    assert codes.abs().max() > train_gpt.code_limit("matrix", c)


# Fit to the size


def with_room(c, room):
    return dataclasses.replace(c, target_bytes=SCRIPT_BYTES + room)


@pytest.mark.slow
@pytest.mark.parametrize(("quant", "codec"), FORMATS)
def test_a_fit_never_exceeds_the_budget_where_one_exists_and_fills_it_within_two_percent(quant, codec, make, batch):
    """On a model with rows of many widths, as training leaves them."""
    c = make(quant, codec, model_dim=64, bigram_vocab_size=512, bigram_dim=32)
    model, net = build(c), BiasNet(c)
    with torch.no_grad():
        for i, p in enumerate(quantized_parameters(model).values()):
            p.mul_(0.3 * matrix(len(p), 1, i).abs() + 0.1)
    infos = train_gpt.measure_hessians(model, batch, Dist())

    def size(quantized):
        return len(pack(model, quantized, net, c, SHA))

    finest, coarsest = train_gpt.step_range(c)
    most, least = (size(train_gpt.quantize(model, infos, x, c)) for x in (finest, coarsest))
    assert least < 0.7 * most
    for room in (round(least + share * (most - least)) for share in (0.05, 0.5, 0.9)):
        assert 0.98 * room < size(train_gpt.fit_to_size(model, infos, net, with_room(c, room), SHA)) <= room
    assert size(train_gpt.fit_to_size(model, infos, net, with_room(c, 2 * most), SHA)) == pytest.approx(most, rel=1e-3)


@pytest.mark.parametrize("clip_sigmas", [6.0, 12.85])
def test_clip_sigmas_fixed_gives_that_clip_in_one_attempt(clip_sigmas, model, infos, c, lines):
    c = dataclasses.replace(c, clip_sigmas=clip_sigmas)
    found = train_gpt.fit_to_size(model, infos, BiasNet(c), c, SHA)
    for name, p in quantized_parameters(model).items():
        scale = clip_sigmas * p.detach().double().std(1, correction=0) / 31
        torch.testing.assert_close(found[name][1].scale.double(), scale, rtol=1e-3, atol=2.0**-24)
    (line,) = lines("fit:")
    assert f" clip_sigmas:{clip_sigmas:.3f} " in line


@pytest.mark.parametrize("target", [1, 100_000])
def test_a_size_that_holds_no_model_is_refused_in_one_line(target, model, c):
    n_codes = sum(p.numel() for p in quantized_parameters(model).values())
    n_others = sum(p.numel() for p in model.parameters()) - n_codes
    least = SCRIPT_BYTES + math.ceil(train_gpt.LEAST_BITS * n_codes / 8) + n_others
    for target_bytes in (target, least - 1):
        message = refusal(train_gpt.artifact_budget, model, dataclasses.replace(c, target_bytes=target_bytes))
        assert message.startswith(f"TARGET_BYTES={target_bytes} is too small: ") and f"{least:,} bytes" in message
    assert train_gpt.artifact_budget(model, dataclasses.replace(c, target_bytes=least)) == least - SCRIPT_BYTES


# Round trip


@pytest.mark.parametrize(("quant", "codec"), FORMATS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(tie_embeddings=False, num_layers=3, ve_layers=(0, 2)),
        dict(bigram_vocab_size=0, ve_layers=(), smear_gate=False, value_residual=False, unet_skips=False),
        dict(rope_dims=0, num_layers=1, ve_layers=(0,), xsa_last_n=0, quant_bits=4, mixer_hidden=3),
    ],
    ids=["default", "untied", "bare", "one layer"],
)
def test_a_packed_model_comes_back_bit_for_bit(quant, codec, changes, make, tmp_path):
    c = make(quant, codec, **changes)
    model, net, path = build(c), BiasNet(c), tmp_path / "x"
    torch.nn.init.normal_(net.out.weight, generator=torch.Generator().manual_seed(0))
    quantized = stored(model, c)
    path.write_bytes(pack(model, quantized, net, c, SHA))
    assert path.read_bytes() == pack(model, quantized, net, c, SHA)
    header, parts = read_artifact(path)
    assert train_gpt.with_artifact(make(), header, {}) == c
    restored, restored_net = train_gpt.unpack(parts, c, CPU)
    expected = {name: p.half().float() for name, p in [*model.named_parameters(), *net.named_parameters()]}
    expected |= {name: codes * grid.steps() for name, (codes, grid) in quantized.items()}
    found = dict([*restored.named_parameters(), *restored_net.named_parameters()])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())


@pytest.mark.parametrize(("quant", "codec"), [("int6", "lzma"), ("hessian", "rans")])
@pytest.mark.slow
def test_an_export_holds_the_model_of_which_it_logs_the_loss(quant, codec, make, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(train_gpt, "CALIBRATION_STEPS", 3)
    c = with_room(make(quant, codec, mixer_calibration_tokens=300, artifact_path=str(tmp_path / "x")), 33_000)
    model, loader = build(c), train_gpt.TrainLoader(c, Dist())
    train_gpt.export(model, loader, loader.sequences(0, 8), SHA, c, Dist())
    restored, net = train_gpt.unpack(read_artifact(tmp_path / "x")[1], c, CPU)
    for p, q in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(p, q)
    (line,) = lines("quantization: ")
    loss = train_gpt.held_out_loss(restored, loader, c, Dist())
    assert float(line.partition("stored:")[2].split()[0]) == pytest.approx(loss, abs=1e-5)
    assert net.out.weight.abs().sum() > 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3000),
    width=st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e5]),
    allowed=st.lists(st.integers(0, train_gpt.Grid.N_EXPONENTS - 1), min_size=1, unique=True),
)
def test_any_codes_of_any_tables_come_back_from_rans_in_their_entropy(seed, n, width, allowed):
    rng = np.random.default_rng(seed)
    tables = rng.choice(np.array(allowed), n).astype(np.uint8)
    values = np.rint(rng.standard_normal(n) * width).clip(-127, 127).astype(np.int8).view(np.uint8)
    frequencies = train_gpt.rans_frequencies(values, tables)
    assert (frequencies.sum(1) == 2**train_gpt.RANS_BITS).all() and frequencies[tables, values].min() > 0
    data = train_gpt.rans_encode(values, tables, frequencies)
    assert np.array_equal(train_gpt.rans_decode(data, tables, frequencies), values)
    bits = (train_gpt.RANS_BITS - np.log2(frequencies[tables, values])).sum()
    assert abs(len(data) - bits / 8 - 3 * train_gpt.RANS_LANES) < 1.001 * train_gpt.RANS_LANES + 0.001 * len(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@QUANTS
@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight", "blocks.0.mlp_scale", "out.bias"])
def test_a_weight_that_cannot_be_stored_is_refused_by_name(bad, quant, name, make):
    """Also where float32 holds it, but float16 does not hold what would be stored: the value or its scale."""
    c = make(quant)
    model, net = build(c), BiasNet(c)
    with torch.no_grad():
        dict([*model.named_parameters(), *net.named_parameters()])[name].view(-1)[-1] = bad
    assert f"weight {name} cannot be stored" in refusal(pack, model, stored(model, c), net, c, SHA)


# The file


@settings(max_examples=150)
@given(st.data())
def test_any_altered_byte_is_refused_in_one_line(packed, tmp_path_factory, data):
    """A byte that changed, a cut, or bytes too many, anywhere."""
    at = data.draw(st.one_of(st.integers(0, PREFIX.size + 40), st.integers(0, len(packed) - 1)))
    change = st.integers(1, 255).map(lambda x: packed[:at] + bytes([packed[at] ^ x]) + packed[at + 1 :])
    more = st.binary(min_size=1, max_size=3).map(lambda x: packed + x)
    path = tmp_path_factory.getbasetemp() / "damaged.artifact"
    path.write_bytes(data.draw(st.one_of(change, st.just(packed[:at]), more)))
    assert refusal(read_artifact, path).startswith(f"ARTIFACT_PATH={path}: ")


def test_the_header_is_plain_json_and_names_every_byte_and_other_files_are_named(path, packed, tmp_path):
    header, parts = read_artifact(path)
    _, _, header_bytes = PREFIX.unpack_from(packed)
    body = packed[PREFIX.size + 32 :]
    assert set(json.loads(body[:header_bytes])) == {"shape", "score", "tokenizer", "parts"}
    assert header["file_bytes"] == len(packed) and header["sha256"] == hashlib.sha256(packed).hexdigest()
    assert header["tokenizer"] == SHA and b"".join(parts.values()) == body[header_bytes:]
    path.write_bytes(packed[:5] + b"\x01" + packed[6:])
    assert f"version 1; allowed is {train_gpt.ARTIFACT_VERSION}" in refusal(read_artifact, path)
    path.write_bytes(b"PK\x03\x04" + bytes(200))
    assert "not an artifact" in refusal(read_artifact, path)
    assert "No such file" in refusal(read_artifact, tmp_path / "nothing")


def test_nothing_in_the_script_can_execute_a_file():
    """No eval and no pickle, under any spelling that the source could use; a checkpoint is read as weights only."""
    tree = ast.parse(Path(train_gpt.__file__).read_text())
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = [(ast.unparse(node.func), node.keywords) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {name for name, _ in calls} & {"eval", "exec", "compile", "__import__", "np.load"}
    (options,) = ([ast.unparse(option) for option in keywords] for name, keywords in calls if name == "torch.load")
    assert options == ["weights_only=True"]


def test_the_artifact_s_settings_replace_those_that_nobody_gave_and_other_models_are_refused(path, make, c):
    header, other = read_artifact(path)[0], make(num_layers=3, mlp_mult=4.0, ve_layers=(0,), ttt_epochs=9, seed=5)
    assert train_gpt.with_artifact(other, header, {"SEED": "5"}) == dataclasses.replace(c, seed=5)
    assert train_gpt.with_artifact(other, header, {"TTT_EPOCHS": "9"}).ttt_epochs == 9
    assert train_gpt.with_artifact(c, header, {"NUM_LAYERS": "2", "VE_LAYERS": "1"}) == c
    for name, value in (("num_layers", 3), ("ve_layers", (0,)), ("smear_gate", False)):
        message = refusal(train_gpt.with_artifact, make(**{"ve_layers": (1,), name: value}), header, {name.upper(): ""})
        was, asked = (train_gpt.show(x) for x in (getattr(c, name), value))
        assert message == f"{name.upper()}={asked}: the artifact's model has {was}"
    header["score"] |= dict(
        unheard_of=1, log_dir="/elsewhere", val_tokens=5, stages=["ttt"]
    )  # not the artifact's to set
    assert train_gpt.with_artifact(c, header, {}) == c


@pytest.mark.parametrize("mark", ["score", "shape"])
def test_every_setting_of_an_artifact_passes_the_checks_of_the_environment(path, c, mark):
    for name, value in c.marked(mark).items():
        for other in (None, {}, [[]], "x" * 9, [None], -(10**400), 10**400, float("nan")):
            header = read_artifact(path)[0]
            header[mark][name] = other
            assert name.upper() in refusal(train_gpt.with_artifact, c, header, {}), (name, other)
        header[mark][name] = train_gpt.show(value)
        assert train_gpt.with_artifact(c, header, {}) == c, name


def test_an_artifact_that_is_older_than_a_setting_has_its_default(path, c):
    header = read_artifact(path)[0]
    for name in ("doc_isolated", "ttt_lora_rank", "ttt_lora_lr", "ttt_lora_tokens"):
        del header["score"][name]
    expected = dataclasses.replace(c, ttt_lora_tokens=train_gpt.Config.ttt_lora_tokens)
    assert train_gpt.with_artifact(dataclasses.replace(c, doc_isolated=True), header, {}) == expected


def sealed(header: bytes, parts: bytes) -> bytes:
    """Return an artifact with a right checksum, whatever is in it."""
    prefix = PREFIX.pack(train_gpt.ARTIFACT_MAGIC, train_gpt.ARTIFACT_VERSION, len(header))
    return prefix + hashlib.sha256(prefix + header + parts).digest() + header + parts


HEADERS = {
    "a part that would write a log line": b'{"shape": {}, "score": {}, "tokenizer": "a", "parts": {"x\\nfinal": 5}}',
    "no tokenizer": b'{"shape": {}, "score": {}, "parts": {"codes": 5}}',
    "a tokenizer that is none": b'{"shape": {}, "score": {}, "tokenizer": [1], "parts": {"codes": 5}}',
    "not json": b"{half",
    "not utf-8": b"\xff\xfe",
    "a list": b"[1]",
    "nested": b"[" * 100_000,
    "no parts": b'{"shape": {}, "score": {}}',
    "no sizes": b'{"shape": {}, "score": {}, "tokenizer": "", "parts": {"codes": null}}',
    "sizes that do not add up": b'{"shape": {}, "score": {}, "tokenizer": "", "parts": {"codes": 7}}',
    "a size below zero": b'{"shape": {}, "score": {}, "tokenizer": "", "parts": {"codes": 2, "rows": -2}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_sealed_file_that_is_no_artifact_is_refused_in_one_line(header, tmp_path):
    path = tmp_path / "x.artifact"
    path.write_bytes(sealed(header, b"codes"[: 0 if b"-2" in header else 5]))
    assert f"ARTIFACT_PATH={path}" in refusal(read_artifact, path)


def opened(path, c):
    """Load a model from a file as a run does."""
    header, parts = read_artifact(path)
    c = train_gpt.with_artifact(c, header, {})
    return train_gpt.unpack(parts, c, CPU)


STRANGE = (
    None,
    True,
    -1,
    0,
    1,
    2.5,
    10**9,
    10**12,
    2**63,
    10**400,
    1e300,
    math.nan,
    "",
    "x",
    "8" * 5000,
    [],
    [[1]],
    {},
)


@pytest.mark.slow
@settings(max_examples=examples(150), deadline=20_000, print_blob=False)
@given(data=st.data())
def test_an_artifact_from_a_stranger_loads_or_is_refused_in_one_line(packed, c, tmp_path_factory, data):
    """A setting or a size is replaced, a part damaged, cut, or packed anew with something else in it."""
    header_bytes = PREFIX.unpack_from(packed)[2]
    header, body = json.loads(packed[PREFIX.size + 32 :][:header_bytes]), packed[PREFIX.size + 32 + header_bytes :]
    sizes = list(header["parts"].values())
    parts = dict(
        zip(
            header["parts"], (body[a : a + n] for a, n in zip(np.cumsum([0, *sizes]), sizes, strict=False)), strict=True
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(["shape", "score", "part", "drop"]))
        name = data.draw(st.sampled_from(sorted(header.get(where, parts or ["codes"]))))
        if where in ("shape", "score"):
            header[where][name] = data.draw(st.sampled_from(STRANGE))
        elif where == "part":
            change = data.draw(st.sampled_from(["bytes", "cut", "bomb", "noise"]))
            noise = data.draw(st.binary(min_size=1, max_size=64))
            old = parts.get(name, b"")
            at = data.draw(st.integers(0, len(old)))
            new = dict(bytes=old[:at] + noise + old[at + len(noise) :], cut=old[:at], noise=noise)
            new["bomb"] = train_gpt.compress(bytes(2**24))
            parts[name] = new[change]
        elif where == "drop":
            parts.pop(name, None)
    header["parts"] = {name: len(part) for name, part in parts.items()}
    path = tmp_path_factory.getbasetemp() / "stranger.artifact"
    path.write_bytes(sealed(json.dumps(header).encode(), b"".join(parts.values())))
    try:
        opened(path, c)
        event("loaded")
    except InputError as error:
        event("refused")
        assert "\n" not in str(error) and "ARTIFACT" in str(error).upper()


def test_a_part_that_unpacks_to_more_than_the_shapes_say_takes_no_memory(path, c):
    parts = read_artifact(path)[1]
    parts["codes"] = train_gpt.compress(bytes(2**28))
    with pytest.raises(InputError, match="split_with_sizes"):
        train_gpt.unpack(parts, c, CPU)


def test_more_weights_than_the_file_has_bits_are_refused_before_they_are_made(path, make):
    parts = read_artifact(path)[1]
    assert "numbers a bit" in refusal(train_gpt.unpack, parts, make(model_dim=16384), CPU)


@pytest.mark.parametrize("bits", [2, 6])
def test_the_coarsest_codes_are_not_taken_for_a_stranger_s(make, bits, tmp_path):
    c = make(quant_bits=bits, clip_sigmas=4.0)
    model = build(c)
    (tmp_path / "x").write_bytes(pack(model, stored(model, c), BiasNet(c), c, SHA))
    assert opened(tmp_path / "x", c)


@pytest.mark.parametrize("excess", [0, 1234])
def test_script_and_artifact_both_count(excess, c, path, packed, lines):
    total = SCRIPT_BYTES + len(packed)
    record = train_gpt.size_record(path, read_artifact(path)[0], dataclasses.replace(c, target_bytes=total - excess))
    found = tuple(record[name] for name in ("code_bytes", "model_bytes", "total_bytes", "cap_bytes"))
    assert found == (SCRIPT_BYTES, len(packed), total, 16_000_000) and sum(record["part_bytes"].values()) == len(packed)
    assert f"margin:{16_000_000 - total}" in lines("Total submission size")[0]
    assert [f"by {excess} bytes" in line for line in lines("OVER ")] == ([True] if excess else [])


def test_a_model_of_another_tokenizer_is_refused(c, path):
    tokenizer, header = train_gpt.Tokenizer(c), read_artifact(path)[0]
    assert "ARTIFACT_PATH" in refusal(train_gpt.Tokenizer, c, header["tokenizer"])
    train_gpt.Tokenizer(c, tokenizer.sha256)


def test_a_file_is_written_whole_or_not_at_all_and_alone_in_its_folder(tmp_path):
    path = tmp_path / "new" / "x.artifact"
    for data in (b"first", b"second"):
        train_gpt.write_atomically(path, data)
        assert path.read_bytes() == data and [p.name for p in path.parent.iterdir()] == ["x.artifact"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as on a full disk; pytest must not write either
    try:
        with pytest.raises(OSError):
            train_gpt.write_atomically(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == ["x.artifact"]
