"""Documents on their own and the adapters that each trains for itself, against a plain loop over one document."""

import copy
import dataclasses

import pytest
import torch

import train_gpt
from conftest import build, on_ranks, random_tokens
from serve import fingerprint
from test_mixing import random_net
from train_gpt import Deadline, Dist, LoRA, SlidingWindow, make_predictor

BEGINS = 0, 30, 31, 32, 90  # documents of 30, 1, 1, 58 and 103 tokens
CHUNK = 64


@pytest.fixture(scope="module")
def world(tiny_config):
    """Return (config, model, tokens [193]) at a learning rate that makes adapters visible."""
    c = tiny_config(doc_isolated=True, ttt_epochs=0, ttt_lora_rank=2, ttt_lora_tokens=8, ttt_lora_lr=0.02, ttt_lr=0.05)
    tokens = random_tokens(c, 1, 193)[0]
    tokens[list(BEGINS)] = c.bos_id
    return c, build(c), tokens


def lora(world, dist=None, deadline=None, **overrides):
    c, model, _ = world
    return LoRA(model, dataclasses.replace(c, **overrides), dist or Dist(), None, deadline)


def rows_of(predictor, tokens, cut=CHUNK, chunk=CHUNK):
    """Return all rows [N, V] of a pass in chunks, each asked for in parts of `cut` rows."""
    return torch.cat(parts_of(predictor, tokens, cut, chunk))


def rows_on(world_size, make, tokens):
    """Return all rows [N, V] of a pass by several ranks, of which `make` gives each its predictor."""
    ranks = on_ranks(world_size, lambda dist: parts_of(make(dist), tokens))
    return torch.cat([part for parts in zip(*ranks, strict=True) for part in parts])


def parts_of(predictor, tokens, cut=CHUNK, chunk=CHUNK):
    found = []
    for start in range(0, len(tokens) - 1, chunk):
        part = tokens[start : start + chunk + 1]
        for low in range(0, len(part) - 1, cut):
            rows = slice(low, min(low + cut, len(part) - 1))
            found.append(predictor.predict(part[: rows.stop], rows)["ttt"])
        predictor.update(part)
    return found


def plain_rows(world, lr):
    """Return the rows [N, V] of one document after the other, by torch's Adam and whole matrices W + up down."""
    c, model, tokens = world
    predictor, found = lora(world), []
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in LoRA.MAPS]
    assert len(names) == len(predictor.maps) == 4 * c.num_layers
    for begin, end in zip(BEGINS, [*BEGINS[1:], len(tokens) - 1], strict=True):
        sizes = [shape.numel() for shape in predictor.shapes]
        parts = [x.view(s).clone() for x, s in zip(predictor.fresh[0][0].split(sizes), predictor.shapes, strict=True)]
        adam = torch.optim.Adam([x.requires_grad_() for x in parts], lr, (c.beta1, c.beta2), c.adam_eps)
        past = [None] * c.num_layers
        for low in range(begin, end, 8):
            changed, high = copy.deepcopy(model), min(low + 8, end)
            for name, down, up in zip(names, parts[::2], parts[1::2], strict=True):
                m = changed.get_submodule(name)
                weight = m.weight.detach() + up @ down
                del m.weight
                m.weight = weight
            n = min(low - begin, c.eval_seq_len - 8)
            for layer, block in enumerate(changed.blocks):
                empty = torch.zeros(1, 0, c.kv_heads, c.model_dim // c.num_heads)
                block.attn.past.append(tuple(x.detach()[:, -n:] for x in past[layer]) if n else (empty, empty))
            before = torch.nn.functional.pad(tokens, (2, 0))[low : low + 2]
            mask = torch.ones(high - low, n + high - low, dtype=torch.bool).tril(n)
            logits = changed(torch.cat([before, tokens[low:high]])[None], mask=mask[None, None])[0]
            past = [block.attn.past.popleft() for block in changed.blocks]
            found.append(logits.detach().double().log_softmax(-1).float())
            if low + 8 < end:
                adam.zero_grad()
                torch.nn.functional.cross_entropy(logits, tokens[low + 1 : low + 9]).backward()
                adam.step()
    return torch.cat(found)


def test_a_decoder_needs_no_seed(world):
    """SEED is no part of the artifact."""
    *_, tokens = world
    assert torch.equal(rows_of(lora(world), tokens), rows_of(lora(world, seed=7), tokens))


def test_rows_are_those_of_adam_on_one_document_at_a_time(world):
    found = rows_of(lora(world), world[2])
    torch.testing.assert_close(found, plain_rows(world, 0.02), atol=5e-3, rtol=1e-3)  # Adam enlarges rounding


def test_adapters_that_never_move_give_the_frozen_rows(world):
    """To the last bit those without adapters, and up to rounding the sliding window's while it holds the document."""
    c, model, tokens = world
    still, bare = lora(world, ttt_lora_lr=0.0), lora(world, ttt_lora_lr=0.0)
    for m in bare.maps:
        m.forward = lambda x, m=m: m.apply_weight(x, m.weight) + 0 * m.adapter[1].sum()
    found = rows_of(still, tokens)
    assert torch.equal(found, rows_of(bare, tokens))
    torch.testing.assert_close(found, plain_rows(world, 0.0), atol=1e-5, rtol=1e-5)
    sliding = rows_of(SlidingWindow("ttt", model, c, Dist(), 8), tokens)
    for begin, end in ((0, 30), (30, 31), (31, 32), (32, 64), (90, 122)):
        torch.testing.assert_close(found[begin:end], sliding[begin:end], atol=1e-4, rtol=1e-4)
    assert (found - rows_of(lora(world), tokens)).abs().max() > 0.05


def test_adapters_stay_as_they_are_once_the_time_for_adapting_is_over(world):
    """From the chunk behind the one at whose end a run finds it over, and a replay finds it there too."""

    class Late(Deadline):
        def allows(self):
            self.stop_after = self.adapted if self.adapted == 1 else None
            return super().allows()

    tokens, free = world[2], rows_of(lora(world), world[2])
    live, replay = (rows_of(lora(world, deadline=x), tokens) for x in (Late(Dist()), Deadline(Dist(), stop_after=1)))
    assert torch.equal(live, replay) and torch.equal(live[: 2 * CHUNK], free[: 2 * CHUNK])
    assert (live[2 * CHUNK :] - free[2 * CHUNK :]).abs().max() > 0.05


def test_looped_layers_keep_the_past_of_each_pass_and_lanes_follow(world):
    parts = dict(num_loops=1, loop_start=1, loop_end=1, lanes=True, lanes_start_layer=2)
    c = dataclasses.replace(world[0], num_layers=3, ve_layers=(2,), ttt_lora_lr=0.0, **parts)
    tokens, model = world[2], build(c)
    found = rows_of(lora((c, model, tokens)), tokens)
    sliding = rows_of(SlidingWindow("ttt", model, c, Dist(), 8), tokens)
    for begin, end in ((0, 30), (30, 31), (31, 32), (32, 64), (90, 122)):  # documents, as far as a window holds them
        torch.testing.assert_close(found[begin:end], sliding[begin:end], atol=1e-4, rtol=1e-4)


def test_documents_side_by_side_have_the_rows_that_each_has_alone(world):
    """As a GPU walks them, up to rounding, which Adam enlarges."""
    _, _, tokens = world
    for n in (2, 4):
        predictor = lora(world)
        predictor.side_by_side = n
        found, expected = rows_of(predictor, tokens, 192, 192), rows_of(lora(world), tokens, 192, 192)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)
        assert predictor.open.begin == BEGINS[-1] and predictor.open.piece == 12


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_document_has_the_same_rows_whatever_stood_before_it(world, world_size):
    """To the last bit, on any number of ranks, and however the stream is cut."""
    _, _, tokens = world
    begin = BEGINS[-1]
    alone = rows_of(lora(world), tokens[begin:], chunk=200)
    assert torch.equal(rows_on(world_size, lambda dist: lora(world, dist), tokens)[begin:], alone)
    for cut, chunk in ((1, 64), (7, 100), (13, 31), (64, 64)):
        assert torch.equal(rows_of(lora(world), tokens, cut, chunk)[begin:], alone)


@pytest.mark.parametrize("stride", [8, 32])
def test_isolated_windows_score_a_document_as_if_it_were_alone(world, stride):
    c, model, tokens = world
    found, alone = (
        rows_of(SlidingWindow("ttt", model, c, Dist(), stride), part, chunk=200) for part in (tokens, tokens[90:])
    )
    assert torch.equal(found[90:], alone)
    crossing = SlidingWindow("ttt", model, dataclasses.replace(c, doc_isolated=False), Dist(), stride)
    assert (rows_of(crossing, tokens, chunk=200)[90:] - alone).abs().max() > 1e-3


def test_no_row_depends_on_its_token_or_a_later_one(world):
    c, _, tokens = world
    before = rows_of(lora(world), tokens)
    for j in (0, 15, 29, 30, 63, 64, 97, 98, 150):
        changed = torch.cat([tokens[: j + 1], random_tokens(c, 1, 192 - j, seed=j)[0]])
        after = rows_of(lora(world), changed)
        assert torch.equal(before[: j + 1], after[: j + 1])
        assert j > 150 or not torch.equal(before[j + 1], after[j + 1])


def test_predict_leaves_the_fingerprint_and_other_futures_no_trace(world):
    _, _, tokens = world
    inputs, changed = tokens[:64], torch.cat([tokens[:40], tokens[40:64].flip(0)])
    found = []
    for probes in ([], [(inputs, slice(0, 64))], [(changed, slice(0, 64)), (inputs, slice(50, 60))]):
        predictor = lora(world)
        before = fingerprint(predictor)
        for probe in probes:
            predictor.predict(*probe)
            assert fingerprint(predictor) == before
        predictor.update(tokens[:65])
        found.append(fingerprint(predictor))
        assert found[-1] == found[0] != before


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("epochs", [0, 1])
def test_the_score_does_not_depend_on_the_number_of_ranks(world, world_size, epochs):
    """With a base that adapts between chunks, too, up to the rounding of its step."""
    expected = rows_of(lora(world, ttt_epochs=epochs), world[2])
    found = rows_on(world_size, lambda dist: lora(world, dist, ttt_epochs=epochs), world[2])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert epochs or torch.equal(found, expected)


def test_a_base_that_adapts_keeps_the_open_documents_adapters(world):
    _, _, tokens = world
    both, frozen, plain = lora(world, ttt_epochs=1), lora(world), lora(world, ttt_epochs=1, ttt_lora_lr=0.0)
    found = [rows_of(predictor, tokens) for predictor in (both, frozen, plain)]
    assert torch.equal(found[0][:64], found[1][:64])
    assert not torch.equal(found[0][64:], found[1][64:]) and not torch.equal(found[0][64:], found[2][64:])
    assert both.open.begin == BEGINS[-1] and both.open.state[1].abs().max() > 0


@pytest.mark.slow
def test_a_document_of_100_000_tokens_keeps_a_state_of_one_size(world):
    c, model, _ = world
    tokens = random_tokens(c, 1, 100_001)[0]
    tokens[0] = c.bos_id
    predictor = lora(world, ttt_lora_tokens=30, ttt_lora_lr=0.002)
    for start in range(0, 100_000, 20_000):
        logp = predictor.predict(tokens[start : start + 20_000], slice(0, 20_000))["ttt"]
        assert logp.isfinite().all() and (logp.double().exp().sum(1) - 1).abs().max() < 1e-6
        predictor.update(tokens[start : start + 20_001])
        assert predictor.open.past.shape == predictor.fresh[1].shape and len(predictor.context) == c.eval_seq_len


def test_a_document_that_explodes_harms_no_other(world):
    """Its rows stay distributions; the next document's are those that it has alone."""
    _, _, tokens = world
    found = rows_of(lora(world, ttt_lora_lr=1e6), tokens)
    assert found.isfinite().all() and (found.double().exp().sum(1) - 1).abs().max() < 1e-6
    assert torch.equal(found[90:], rows_of(lora(world, ttt_lora_lr=1e6), tokens[90:], chunk=200))


def test_a_gradient_that_is_not_finite_counts_as_zero(world):
    predictor = lora(world)
    state, grad = torch.stack([predictor.fresh[0]] * 2), torch.ones(2, predictor.fresh[0].shape[1])
    grad[1, 3] = float("nan")
    after = predictor.adam(state, grad, torch.ones(2, 1, dtype=torch.int64))
    assert torch.equal(after[1], state[1]) and not torch.equal(after[0], state[0])


def test_a_pass_that_must_repeat_to_the_last_bit_walks_documents_alone(world):
    """A decoder does not know where the next one begins."""
    torch.use_deterministic_algorithms(True)
    try:
        assert lora(world).batch == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert lora(world).batch > 1


def test_mixed_rows_come_from_adapters_where_a_rank_is_set(world):
    c, model, tokens = world
    predictor = make_predictor("mixed", model, random_net(c).float(), c, Dist(), None)
    assert type(predictor.neural) is LoRA and predictor.stride == c.ttt_lora_tokens
    found = rows_of(predictor, tokens)
    assert torch.equal(found, rows_of(lora(world), tokens))
    plain = make_predictor("ttt", model, None, dataclasses.replace(c, ttt_lora_rank=0), Dist(), None)
    assert type(plain) is train_gpt.TTT and plain.stride == c.eval_stride
