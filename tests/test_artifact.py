"""Artifact: what is stored comes back bit for bit, whatever is damaged is refused, nothing in the file can run."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
import lzma
import math
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import stored
from train_gpt import (
    FINENESS,
    GPT,
    LEAST_BITS,
    PREFIX,
    SLACK,
    Grid,
    InputError,
    Maxent,
    Run,
    Sensitivity,
    Tokenizer,
    artifact_record,
    as_packed,
    check_room,
    dequantize,
    entropy_bytes,
    fill,
    finest,
    gptq,
    is_embedding,
    pack,
    quantize,
    quantized_parameters,
    read_artifact,
    sensitivities,
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
    return pack(model, stored(model), Maxent(c), c, SHA)


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


# Levels


DRAWN = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(-3, 1.5))
FINE = st.floats(-20, 40)


def matrix(rows, cols, seed=0, exponent=0.0):
    """Heavy-tailed numbers of the given order of magnitude."""
    w = np.random.default_rng(seed).standard_t(3, (rows, cols)) * 10**exponent
    return torch.from_numpy(w).float()


def sensitivity_like(w, seed=0):
    """A sensitivity of w's shape, over four decades a side."""
    rng = np.random.default_rng(seed)
    return Sensitivity(*(torch.from_numpy(10 ** rng.uniform(-2, 2, n)).float() for n in w.shape))


@settings(max_examples=200)
@given(DRAWN, FINE)
def test_steps_are_the_unit_over_half_octaves_and_integers_stay_within_their_tops(drawn, fineness):
    w = matrix(*drawn)
    grid = sensitivity_like(w).grid(w, fineness)
    classes, integers = grid.classes(), grid.nearest(w)
    assert classes.dtype == torch.uint8 and classes.max() <= 22 and integers.dtype == torch.int16
    steps = grid.unit.double() / 2 ** (classes.double() / 2)
    torch.testing.assert_close(grid.steps().double(), steps, rtol=1e-6, atol=0)
    assert (integers.abs() <= (7 * 2 ** (classes.double() / 2)).floor()).all()


@settings(max_examples=200)
@given(DRAWN, FINE)
def test_the_error_is_half_a_step_inside_the_range_and_the_range_is_kept_outside(drawn, fineness):
    w = matrix(*drawn)
    grid = sensitivity_like(w).grid(w, fineness)
    reach = (grid.tops() * grid.steps()).double()
    inside = w.double().clamp(-reach, reach)
    assert ((dequantize(grid.nearest(w), grid) - inside).abs() <= 0.501 * grid.steps()).all()


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(-3, 1.5), FINE, st.floats(-100, 100))
def test_an_outlier_of_any_size_is_held_within_a_step(seed, exponent, fineness, factor):
    """And within what float16 makes of the unit, which grows with it until seven units hold it."""
    w = matrix(20, 40, seed, exponent)
    w[3, 7] = factor * w.abs().max()
    grid = sensitivity_like(w).grid(w, fineness)
    off = (dequantize(grid.nearest(w), grid) - w).abs()
    assert (off <= 1.001 * grid.steps() + 1e-3 * w.abs()).all()


def test_a_row_of_zeros_and_a_tensor_of_zeros_stay_zero():
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    for x in (w, torch.zeros(3, 4)):
        grid = sensitivity_like(x).grid(x, 16.0)
        assert torch.equal(dequantize(grid.nearest(x), grid) == 0, x == 0)


@settings(max_examples=100)
@given(DRAWN, st.floats(-10, 10))
def test_what_a_step_s_error_costs_is_the_same_everywhere_up_to_the_rounding_of_classes(drawn, fineness):
    """Two roundings, of a row's part and of a column's, each by half an octave of the squared step at most."""
    w = matrix(*drawn)
    sensitivity = sensitivity_like(w)
    grid = sensitivity.grid(w, fineness)
    cost = sensitivity.rows.unsqueeze(1) * sensitivity.columns * grid.steps() ** 2
    inside = (grid.classes() > 0) & (grid.classes() < Grid.CLASSES - 1)
    assert (cost.log2() + fineness)[inside].abs().le(1.001).all()


@settings(max_examples=100)
@given(DRAWN, FINE, st.floats(0, 10))
def test_finer_never_makes_a_step_coarser(drawn, fineness, more):
    w = matrix(*drawn)
    sensitivity = sensitivity_like(w)
    assert (sensitivity.grid(w, fineness + more).steps() <= sensitivity.grid(w, fineness).steps()).all()


# Sensitivity and GPTQ


def products_of(cols, seed, mixing):
    """The sum of x x^T over 200 random inputs whose channels go together as far as `mixing` says."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, cols, generator=generator)
    x = x + mixing * x @ torch.randn(cols, cols, generator=generator)
    return x.T @ x


def map_of(rows, products):
    """A linear map's sensitivity; its gradients are as strong as they happen to be."""
    return Sensitivity.of_map(matrix(rows, len(products), 1).square(), products)


def left_by_definition(products):
    """For each column, in the order of rounding: it and those behind it, and the inverse of their damped products."""
    h = products.double() + 0.01 * products.double().diagonal().mean() * torch.eye(len(products)).double()
    order = products.diagonal().argsort(descending=True).tolist()
    for at, j in enumerate(order):
        yield j, order[at:], torch.linalg.inv(h[order[at:]][:, order[at:]])


@pytest.mark.parametrize("cols", [7, 60])
def test_what_counts_of_an_input_is_its_variance_given_the_inputs_rounded_later(cols):
    products = products_of(cols, cols, 0.3)
    found = map_of(5, products).columns
    for j, _, inverse in left_by_definition(products):
        assert found[j].item() == pytest.approx(1 / inverse[0, 0].item(), rel=1e-4)


def test_a_map_s_rows_count_by_their_gradients_and_a_table_s_sides_alike():
    squares, products = matrix(4, 6).square(), products_of(6, 0, 0.3)
    rows = squares.sum(1) / products.diagonal().sum()
    torch.testing.assert_close(Sensitivity.of_map(squares, products).rows, rows + 1e-3 * rows.mean())
    table = Sensitivity.of_table(squares)
    expected = torch.outer(squares.mean(1), squares.mean(0)) / squares.mean()
    torch.testing.assert_close(torch.outer(table.rows, table.columns), expected, rtol=0.1, atol=2e-3 * expected.max())
    assert torch.equal(table.rows.argsort(), squares.mean(1).argsort())


def gptq_by_definition(w, products, grid):
    """One column after the other, and after each a new inverse of what is left of the damped products (OBQ)."""
    w, steps, tops, integers = w.double().clone(), grid.steps().double(), grid.tops(), torch.zeros_like(w)
    for j, left, inverse in left_by_definition(products):
        integers[:, j] = (w[:, j] / steps[:, j]).round().clamp(-tops[:, j], tops[:, j])
        off = (w[:, j] - integers[:, j] * steps[:, j]) / inverse[0, 0]
        w[:, left] -= torch.outer(off, inverse[0])
    return integers


@pytest.mark.parametrize("cols", [7, 130, 200])
def test_gptq_is_its_definition(cols):
    w, products = matrix(5, cols, cols), products_of(cols, cols, 0.3)
    sensitivity = map_of(5, products)
    grid = sensitivity.grid(w, 10.0)
    integers = gptq(w, grid, sensitivity)
    assert integers.dtype == torch.int16 and len(grid.classes().unique()) > 3
    assert (integers == gptq_by_definition(w, products, grid)).float().mean() > 0.995  # float32 tips a few


def test_gptq_rounds_to_the_nearest_level_where_inputs_are_independent_and_lowers_the_outputs_error_elsewhere():
    w = torch.randn(20, 150, generator=torch.Generator().manual_seed(0))
    independent = map_of(20, torch.eye(150))
    grid = independent.grid(w, 6.0)
    assert torch.equal(gptq(w, grid, independent), grid.nearest(w))
    products = products_of(150, 1, 0.3)
    sensitivity = map_of(20, products)
    grid = sensitivity.grid(w, 6.0)

    def error(integers):
        off = dequantize(integers, grid) - w
        return torch.einsum("ri,ij,rj,r->", off, products, off, sensitivity.rows)

    assert error(gptq(w, grid, sensitivity)) < 0.5 * error(grid.nearest(w))


@pytest.mark.parametrize("dead", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_inputs_that_are_always_zero_and_rows_without_gradient_are_borne(dead):
    products, squares, w = products_of(12, 0, 0.3), matrix(4, 12).square(), matrix(4, 12, 2)
    products[dead] = products[:, dead] = 0
    squares[dead if dead == slice(None) else slice(0, 1)] = 0
    for sensitivity in (Sensitivity.of_map(squares, products), Sensitivity.of_table(squares)):
        grid = sensitivity.grid(w, 10.0)
        integers = grid.nearest(w) if sensitivity.factor is None else gptq(w, grid, sensitivity)
        assert (sensitivity.rows > 0).all() and (sensitivity.columns > 0).all()
        assert (dequantize(integers, grid) - w).isfinite().all() and (integers.abs() <= grid.tops()).all()


NAME = "blocks.0.up.weight"


@pytest.fixture(scope="module")
def batch(c):
    """Eight sequences of training text."""
    batch = train_gpt.TrainLoader(c, Run(c)).first_sequences(256)
    assert batch.shape == (8, c.train_seq_len + 1)
    return batch


@pytest.fixture(scope="module")
def costs(model, batch, c):
    return sensitivities(model, batch, Run(c))


def test_sensitivities_are_of_squared_gradients_of_single_sequences_and_of_the_inputs_products(
    model, batch, c, monkeypatch
):
    """Of the first block's up projection, by a hook of its own, and of the token table."""
    monkeypatch.setattr(Sensitivity, "of_map", lambda *given: given)
    monkeypatch.setattr(Sensitivity, "of_table", lambda given: given)
    found = sensitivities(model, batch, Run(c))
    params, inputs = [model.blocks[0].up.weight, model.tok_emb.weight], []
    squares = [torch.zeros_like(p) for p in params]
    hook = model.blocks[0].up.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach().flatten(0, -2)))
    for sequence in batch:
        nats = F.cross_entropy(model(sequence[None, :-1])[0], sequence[1:], reduction="sum")
        for total, gradient in zip(squares, torch.autograd.grad(nats, params), strict=True):
            total += gradient.square()
    hook.remove()
    x = torch.cat(inputs)
    assert len(x) == 256
    for expected, got in zip([squares[0], x.T @ x, squares[1]], [*found[NAME], found["tok_emb.weight"]], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_measuring_leaves_no_trace_and_a_rank_without_a_sequence_takes_part(c, batch):
    model = filled(c)
    before = [p.detach().clone() for p in model.parameters()]
    for part in (batch, batch[:0]):
        assert set(sensitivities(model, part, Run(c))) == set(quantized_parameters(model))
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_ranks_add_up_what_they_measure(c, batch):
    """Two ranks with the same sequences stand for one rank with each of them twice."""
    model, half = filled(c), batch[:4]
    twice = Run(c)
    twice.sum = lambda tensor: tensor.mul_(2)
    alone = sensitivities(model, torch.cat([half, half]), Run(c))
    for name, found in sensitivities(model, half, twice).items():
        torch.testing.assert_close(found.rows, alone[name].rows, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.columns, alone[name].columns, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["inputs", "gradients"])
def test_inputs_and_gradients_that_are_not_finite_are_refused_by_name(side, c, batch):
    model = filled(c)
    down = model.blocks[1].down
    if side == "inputs":  # finite themselves, but their squares are not
        down.register_forward_pre_hook(lambda _, x: (x[0].detach() * 0 + 3e19,))
        down.weight.data.zero_()
    down.weight.register_hook(lambda gradient: gradient * (0 if side == "inputs" else float("nan")))
    message = refusal(sensitivities, model, batch, Run(c))
    assert message.startswith("weight blocks.1.down.weight: its inputs or gradients")


# Fit to the size


def test_entropy_is_that_of_each_class_s_bytes_and_of_the_low_bits(model, costs):
    params, fineness = quantized_parameters(model), 14.0
    bits, by_class = 0.0, {k: [] for k in range(Grid.CLASSES)}
    for name, p in params.items():
        grid = costs[name].grid(p.detach(), fineness)
        classes, integers = grid.classes().numpy(), grid.nearest(p.detach()).numpy()
        for k in by_class:
            by_class[k].append(integers[classes == k].astype(int))
    for k, integers in by_class.items():
        low = max(0, (k + 1) // 2 - 4)
        values = np.concatenate(integers) // 2**low
        counts = np.unique(values, return_counts=True)[1]
        bits += len(values) * low - (counts * np.log2(counts / len(values))).sum()
    assert entropy_bytes(params, costs, fineness) == pytest.approx(bits / 8, rel=1e-6)


def test_entropy_grows_with_fineness_and_the_finest_that_fits_is_found(model, costs):
    params = quantized_parameters(model)
    sizes = [entropy_bytes(params, costs, fineness) for fineness in range(40)]
    assert sizes == sorted(sizes) and 0 < sizes[0] < 0.2 * sizes[-1]
    for n_bytes in (sizes[10], sizes[20] + 0.5, sizes[30]):
        found = finest(params, costs, n_bytes)
        assert entropy_bytes(params, costs, found) <= n_bytes < entropy_bytes(params, costs, found + 0.01)
    assert finest(params, costs, sizes[-1] * 2) == FINENESS[1]


def reserved_for(mixer):
    """What fitting it may add to the file: all that compression saves before."""
    raw = b"".join(p.detach().half().numpy().tobytes() for p in mixer.parameters())
    return len(raw) - len(train_gpt.compress(raw))


def with_room(c, room):
    return dataclasses.replace(c, target_bytes=Path(train_gpt.__file__).stat().st_size + room)


@pytest.mark.parametrize("room", [20_000, 26_000, 33_333, 45_000])
def test_an_artifact_takes_the_room_that_it_is_given(room, model, costs, c):
    c, mixer = with_room(c, room), Maxent(c)
    n_bytes = len(pack(model, fill(model, costs, mixer, c, SHA), mixer, c, SHA))
    assert (1 - SLACK) * (room - reserved_for(mixer)) <= n_bytes <= room - reserved_for(mixer)


def test_any_room_is_filled_as_far_as_rows_change_their_class_one_by_one(c, batch):
    """Untied, with tokens that no text has: all their rows change at once. Nothing that fits may be refused."""
    c = dataclasses.replace(c, tie_embeddings=False, num_layers=1, ve_layers=(0,))
    model, mixer = filled(c), Maxent(c)
    costs, filled_shares = sensitivities(model, batch, Run(c)), []
    for room in range(16_000, 60_000, 4_000):
        n_bytes = len(pack(model, fill(model, costs, mixer, with_room(c, room), SHA), mixer, c, SHA))
        filled_shares.append(n_bytes / (room - reserved_for(mixer)))
    assert all(0.9 < share <= 1 for share in filled_shares) and np.median(filled_shares) >= 1 - SLACK


@pytest.mark.parametrize("room", [1, 8_000])
def test_room_that_the_coarsest_levels_do_not_fit_is_refused(room, model, costs, c):
    """Where more is stored beside the integers than can be told from the shapes."""
    message = refusal(fill, model, costs, Maxent(c), with_room(c, room), SHA)
    assert (
        message.startswith(f"TARGET_BYTES={with_room(c, room).target_bytes}: ") and "make the model smaller" in message
    )


def test_an_artifact_takes_the_finest_levels_where_there_is_room_to_spare(model, costs, c):
    found, expected = fill(model, costs, Maxent(c), c, SHA), quantize(quantized_parameters(model), costs, FINENESS[1])
    for name, (integers, grid) in found.items():
        assert grid.classes().eq(Grid.CLASSES - 1).all() and torch.equal(integers, expected[name][0])


def test_maps_are_rounded_by_gptq_and_tables_to_the_nearest_levels(model, costs):
    params = {name: p.detach() for name, p in quantized_parameters(model).items()}
    for name, (integers, grid) in quantize(params, costs, 12.0).items():
        nearest = grid.nearest(params[name])
        mapped = not is_embedding(name)
        assert torch.equal(integers, gptq(params[name], grid, costs[name]) if mapped else nearest), name
        assert mapped != torch.equal(integers, nearest), name


def test_quantization_leaves_the_weights_and_says_what_it_costs(model, c):
    run, lines, before = Run(c), [], [p.detach().clone() for p in model.parameters()]
    run.log = lines.append
    loader, losses = train_gpt.TrainLoader(c, run), []
    quantized = train_gpt.quantize_to_size(model, model, loader, Maxent(c), with_room(c, 20_000), run, SHA)
    assert set(quantized) == set(quantized_parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    losses.append(train_gpt.held_out_loss(model, loader, c, run))
    with train_gpt.with_weights(model, quantized):
        losses.append(train_gpt.held_out_loss(model, loader, c, run))
    assert lines[-1].startswith(f"quantization: float:{losses[0]:.5f} stored:{losses[1]:.5f} gap:")
    assert abs(losses[1] - losses[0]) > 1e-5


def test_a_rehearsal_makes_every_attempt_that_a_run_may_make_and_comes_to_the_same(model, c, monkeypatch):
    run, attempts, pack = Run(c), [], train_gpt.pack
    monkeypatch.setattr(train_gpt, "pack", lambda *of: (attempts.append(len(attempts)), pack(*of))[1])
    costs = train_gpt.sensitivities(model, train_gpt.TrainLoader(c, run).first_sequences(c.gptq_tokens), run)
    sizes = []
    for exhaust in (False, True):
        attempts.clear()
        quantized = train_gpt.fill(model, costs, Maxent(c), with_room(c, 20_000), SHA, exhaust)
        sizes.append(len(pack(model, quantized, Maxent(c), c, SHA)))
        assert len(attempts) == train_gpt.ATTEMPTS if exhaust else 1 < len(attempts) < train_gpt.ATTEMPTS
    assert 0.97 * 20_000 < sizes[0] <= sizes[1] <= 20_000


@pytest.mark.parametrize("target", [1, 100_000])
def test_a_size_that_holds_no_model_is_refused_from_the_shapes_alone(target, c):
    with torch.device("meta"):
        model = GPT(c)
    code_bytes, n_weights = Path(train_gpt.__file__).stat().st_size, 0
    for p in quantized_parameters(model).values():
        n_weights += p.shape[0] * p.shape[1]
    mixer = Maxent(c)
    n_others = sum(p.numel() for part in (model, mixer) for p in part.parameters()) - n_weights
    least = code_bytes + math.ceil(LEAST_BITS * n_weights / 8) + n_others + 4 * train_gpt.CODER_LANES

    def check(target_bytes):
        check_room(model, mixer, dataclasses.replace(c, target_bytes=target_bytes), Run(c))

    message = refusal(check, target)
    assert message.startswith(f"TARGET_BYTES={target}: ") and f" {least - target} more than are left" in message
    assert " 1 more than are left" in refusal(check, least - 1)
    check(least)


# Round trip


def test_a_packed_model_comes_back_bit_for_bit(model, c, path):
    header, parts = read_artifact(path)
    restored = dict(unpack(parts, c, Run(c))[0].named_parameters())
    quantized = stored(model)
    assert quantized and len(restored) > len(quantized)
    for name, p in model.named_parameters():
        expected = dequantize(*quantized[name]) if name in quantized else p.half().float()
        assert torch.equal(restored[name], expected), name


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
    (tmp_path / "x").write_bytes(pack(model, stored(model), Maxent(c), c, SHA))
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
    assert pack(model, stored(model), Maxent(c), c, SHA) == packed


def test_a_weight_of_the_mixer_that_cannot_be_held_is_refused_by_name(model, c):
    mixer = Maxent(c)
    with torch.no_grad():
        mixer.out.bias.fill_(1e6)
    assert "weight mixer.out.bias cannot be stored" in refusal(pack, model, stored(model), mixer, c, SHA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight", "blocks.0.mlp_scale", "smear.scale"])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, name, c):
    model = filled(c)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = bad
    assert f"weight {name} cannot be stored" in refusal(pack, model, stored(model), Maxent(c), c, SHA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight"])
def test_a_weight_that_cannot_be_held_is_refused_by_name_when_steps_are_sought_for_it(bad, name, c, costs):
    model = filled(c)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = bad
    assert f"weight {name} cannot be stored" in refusal(fill, model, costs, Maxent(c), with_room(c, 20_000), SHA)


@pytest.mark.parametrize("name", ["blocks.1.attn.q.weight", "tok_emb.weight", "blocks.0.mlp_scale"])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(name, c):
    """Finite in float32, but what would be stored (the value, or its tensor's unit) is not."""
    model = filled(c)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = 1e9
    assert name in refusal(pack, model, stored(model), Maxent(c), c, SHA)


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


def tops_of(classes):
    return np.floor(7 * 2 ** (classes / 2))


def integers(seed, shapes, width, allowed=range(Grid.CLASSES)):
    """(tensors, classes): integers of the given width in levels, of mixed classes, some at the ends of their ranges."""
    rng, tensors, classes = np.random.default_rng(seed), [], []
    for shape in shapes:
        of = rng.choice(np.array(allowed), shape).astype(np.uint8)
        tops = tops_of(of)
        x = np.rint(rng.standard_normal(shape) * width).clip(-tops, tops)
        at_the_end = rng.random(shape) < 0.02
        x[at_the_end] = (tops * rng.choice([-1, 1], shape))[at_the_end]
        tensors.append((x if width else 0 * x).astype(np.int16))
        classes.append(of)
    return tensors, classes


SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=4)
SOME_CLASSES = st.lists(st.integers(0, Grid.CLASSES - 1), min_size=1, unique=True)
CODECS = st.sampled_from(["range", "lzma"])


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), SHAPES, st.sampled_from([0.0, 0.1, 1.0, 30.0, 1e5]), SOME_CLASSES, CODECS)
def test_any_integers_of_any_classes_come_back(seed, shapes, width, allowed, codec):
    tensors, classes = integers(seed, shapes, width, allowed)
    parts = train_gpt.encode_integers(tensors, classes, codec)
    found = train_gpt.decode_integers(parts, classes, codec)
    assert all(np.array_equal(a, b) for a, b in zip(tensors, found, strict=True))


def test_every_integer_of_every_class_comes_back():
    per_class = [np.arange(-top, top + 1, dtype=np.int16) for top in tops_of(np.arange(Grid.CLASSES))]
    every = np.concatenate(per_class)[None]
    classes = np.repeat(np.arange(Grid.CLASSES, dtype=np.uint8), [len(x) for x in per_class])[None]
    assert every.min() == -14336 and every.max() == 14336
    for codec in ("range", "lzma"):
        parts = train_gpt.encode_integers([every], [classes], codec)
        assert np.array_equal(train_gpt.decode_integers(parts, [classes], codec)[0], every)


def test_coded_integers_take_what_their_classes_entropy_says():
    """Within 1 % with all that is stored beside the words, on Gaussian tensors of two widths and rows of many steps."""
    tensors, classes, bits = [], [], 0.0
    for seed, shape in enumerate([(600, 300), (300, 700)]):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        grid = sensitivity_like(w, seed).grid(w, 9.0)
        tensors.append(grid.nearest(w).numpy())
        classes.append(grid.classes().numpy())
    symbols, of = (np.concatenate([x.ravel() for x in each]).astype(int) for each in (tensors, classes))
    for k in np.unique(of):
        low = max(0, (k + 1) // 2 - 4)
        counts = np.unique(symbols[of == k] // 2**low, return_counts=True)[1]
        bits += counts.sum() * low - (counts * np.log2(counts / counts.sum())).sum()
    parts = train_gpt.encode_integers(tensors, classes, "range")
    coded = len(parts[train_gpt.CODED])
    beside = sum(len(train_gpt.compress(raw)) for part, raw in parts.items() if part != train_gpt.CODED)
    assert bits / 8 <= coded and coded + beside <= 1.01 * bits / 8 + 4 * train_gpt.CODER_LANES
    assert len(np.unique(of)) > 10 and of.max() > 8


@settings(max_examples=60)
@given(st.data())
def test_damaged_integers_are_refused_also_without_the_file_s_checksum(data):
    """Those without low bits: of bits that are all alike nobody can tell whether one was changed."""
    tensors, classes = integers(1, [(30, 40)], 5.0, range(9))
    parts = train_gpt.encode_integers(tensors, classes, "range")
    coded = bytearray(parts[train_gpt.CODED])
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    refusal(train_gpt.decode_integers, {**parts, train_gpt.CODED: bytes(coded)}, classes, "range")


@pytest.mark.parametrize(
    ("was", "now", "codecs"), [(8, 9, ["range", "lzma"]), (9, 8, ["range", "lzma"]), (7, 8, ["range"])]
)
def test_a_changed_class_is_refused(was, now, codecs):
    """From 9 on an integer has low bits of its own, so that their number differs; below it has another table."""
    tensors, classes = integers(1, [(30, 40)], 5.0, [7, 8, 9])
    for codec in codecs:
        parts = train_gpt.encode_integers(tensors, classes, codec)
        changed = classes[0].copy()
        changed[tuple(np.argwhere(changed == was)[0])] = now
        refusal(train_gpt.decode_integers, parts, [changed], codec)


def test_both_codecs_hold_the_same_model(model, c, tiny_config, tmp_path):
    restored = []
    for codec in ("range", "lzma"):
        (tmp_path / codec).write_bytes(pack(model, stored(model), Maxent(c), tiny_config(codec=codec), SHA))
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
    assert "version 1; allowed is 3" in refusal(read_artifact, path)


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
    path.write_bytes(pack(model, stored(model), Maxent(c), c, tokenizer.sha256))
    return read_artifact(path)[0]


def test_script_and_artifact_are_both_counted(c, path, header, tokenizer, capsys):
    record = artifact_record(path, header, tokenizer, Run(c))
    code_bytes, model_bytes = Path(train_gpt.__file__).stat().st_size, path.stat().st_size
    assert (record["code_bytes"], record["model_bytes"]) == (code_bytes, model_bytes)
    assert record["total_bytes"] == code_bytes + model_bytes and record["cap_bytes"] == 16_000_000
    assert sum(record["part_bytes"].values()) == model_bytes
    assert f"margin:{16_000_000 - code_bytes - model_bytes}" in capsys.readouterr().out


def test_the_minified_size_is_that_of_a_script_that_does_the_same(tmp_path, monkeypatch):
    """It has no comments and docstrings, takes what is said once compressed, and runs."""
    sources = []
    monkeypatch.setattr(train_gpt, "compress", lambda raw: sources.append(raw) or b"1234567")
    assert train_gpt.minified_bytes() == 7
    monkeypatch.undo()
    compressed = train_gpt.compress(sources[0])
    assert train_gpt.minified_bytes() == len(compressed) < 0.3 * Path(train_gpt.__file__).stat().st_size
    source = lzma.decompress(compressed, format=lzma.FORMAT_RAW, filters=train_gpt.LZMA_FILTERS).decode()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    assert not any(isinstance(n, documented) and ast.get_docstring(n) for n in ast.walk(ast.parse(source)))
    assert not any(line.lstrip().startswith("#") for line in source.splitlines())
    (tmp_path / "minified.py").write_text(source)
    spec = importlib.util.spec_from_file_location("minified", tmp_path / "minified.py")
    minified = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minified", minified)
    spec.loader.exec_module(minified)
    assert minified.Config().lines() == train_gpt.Config().lines()


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
