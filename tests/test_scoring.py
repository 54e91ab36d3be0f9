"""Scoring: predictors by the rules of the file's first lines, the one loop against a sum written out, the deadline."""

import copy
import dataclasses
import json
import logging
import math
import threading
import types

import pytest
import torch

import train_gpt
from conftest import build, on_ranks
from serve import fingerprint
from test_mixing import random_net
from train_gpt import (
    STAGES,
    TTT,
    BiasNet,
    Deadline,
    Dist,
    HashChains,
    InputError,
    MixedTTT,
    SlidingWindow,
    Stream,
    Tokenizer,
    TrainLoader,
    apply_bias,
    calibrate,
    chunk_length,
    make_predictor,
    score,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_blocks_of_entries():
    """Let the network read fewer entries at a time: the tests have few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BiasNet, "BLOCK", 512)
        yield


@pytest.fixture(scope="module")
def world(tiny_config):
    """Return (config, model, tokenizer, stream) at a learning rate that makes test-time training visible."""
    config = tiny_config(ttt_lr=0.05, ttt_epochs=1, val_tokens=800)
    model, tokenizer = build(config), Tokenizer(config)
    return config, model, tokenizer, Stream(config, CPU, tokenizer)


def predictor_of(stage, world, dist=None, deadline=None, **overrides):
    config, model, tokenizer, _ = world
    c = dataclasses.replace(config, **overrides)
    return make_predictor(stage, model, random_net(c).float(), c, dist or Dist(), tokenizer, deadline)


def whole(inputs):
    return slice(0, len(inputs))


def rows_of(predictor, stream, chunk_tokens):
    """Return all rows of a pass, with the updates between, by stage: [N, V]."""
    found = {stage: [] for stage in predictor.stages}
    for chunk in stream.chunks(chunk_tokens):
        for rows in train_gpt.row_slices(len(chunk.inputs), predictor):
            for stage, logp in predictor.predict(chunk.inputs, rows).items():
                found[stage].append(logp)
        predictor.update(chunk.tokens)
    return {stage: torch.cat(parts) for stage, parts in found.items()}


def first(stream, n):
    """Return the stream cut after n positions."""
    part = copy.copy(stream)
    part.tokens, part.token_bytes = stream.tokens[: n + 1], stream.token_bytes[:n]
    return part


# Rows


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_full_positive_normalized_distributions(world, stage):
    config, _, _, stream = world
    for rows in rows_of(predictor_of(stage, world), stream, chunk_length(stage, config)).values():
        assert rows.shape == (len(stream), config.vocab_size)
        assert torch.isfinite(rows).all()
        assert (rows.double().exp().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_no_row_depends_on_its_token_or_a_later_one(world, stage):
    """Change everything after position j: all rows up to and including j's stay the same to the last bit."""
    config, _, _, stream = world
    size, stream = 200 if stage in ("ttt", "mixed") else 300, first(stream, 500)
    before = rows_of(predictor_of(stage, world), stream, size)
    for j in (0, 40, size - 1, size, size + 77):
        changed = copy.copy(stream)
        generator = torch.Generator().manual_seed(j)
        tail = torch.randint(4, config.vocab_size, (len(stream) - j,), generator=generator)
        changed.tokens = torch.cat([stream.tokens[: j + 1], tail])
        after = rows_of(predictor_of(stage, world), changed, size)
        for name in before:
            assert torch.equal(before[name][: j + 1], after[name][: j + 1]), j
            assert not torch.equal(before[name][j + 1], after[name][j + 1])


@pytest.mark.parametrize("stage", STAGES)
def test_a_part_of_the_rows_is_that_part_of_the_whole(world, stage):
    """Also where a part is asked for before the rows that come first."""
    _, _, _, stream = world
    inputs = stream.tokens[:200]
    expected = predictor_of(stage, world).predict(inputs, whole(inputs))
    for parts in ((slice(0, 64), slice(64, 133), slice(199, 200)), (slice(150, 200), slice(3, 9), slice(0, 200))):
        predictor = predictor_of(stage, world)
        for part in parts:
            for name, logp in predictor.predict(inputs, part).items():
                torch.testing.assert_close(logp, expected[name][part], atol=1e-5, rtol=1e-5)


def test_sliding_rows_are_the_plain_forward_over_each_position_s_window(world):
    config, model, _, stream = world
    seq_len, stride = config.eval_seq_len, config.eval_stride
    rows = rows_of(SlidingWindow("sliding", model, config, Dist(), stride), stream, 100)["sliding"]
    inputs = stream.tokens[:-1]
    for t in (0, 5, seq_len - 1, seq_len, seq_len + stride - 1, 3 * seq_len + 5, len(inputs) - 1):
        start = max(0, -(-(t + 1 - seq_len) // stride)) * stride
        expected = model(inputs[start : t + 1].unsqueeze(0))[0, -1].log_softmax(-1)
        torch.testing.assert_close(rows[t], expected, atol=1e-4, rtol=1e-4)


def test_a_compiled_model_meets_two_shapes_and_gives_the_same_rows(world, monkeypatch):
    """A batch of windows is filled up to one size. The rows are those of one window at a time."""
    monkeypatch.setattr(train_gpt, "compiles", lambda c, device: True)
    config, model, _, stream = world
    c, shapes, seen = dataclasses.replace(config, micro_batch_tokens=6 * config.eval_seq_len), set(), []

    def called(tokens, keep):
        shapes.add((*tokens.shape, keep))
        return model(tokens, keep=keep)

    one_window = dataclasses.replace(config, micro_batch_tokens=8)
    single = SlidingWindow("sliding", model, one_window, Dist(), c.eval_stride)
    padded = SlidingWindow("sliding", called, c, Dist(), c.eval_stride)
    for chunk in stream.chunks(96):
        expected = single.predict(chunk.inputs, whole(chunk.inputs))["sliding"]
        found = padded.predict(chunk.inputs, whole(chunk.inputs))["sliding"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for predictor in (single, padded):
            predictor.update(chunk.tokens)
        seen.append(set(shapes))
    # The last chunk, which is shorter, compiles nothing either.
    assert seen[1] == shapes == {(padded.batch, c.eval_seq_len, keep) for keep in (c.eval_stride, c.eval_seq_len)}
    assert single.batch == 1 < padded.batch


# State


@pytest.mark.parametrize("stage", STAGES)
def test_predict_leaves_the_fingerprint_and_update_changes_it(world, stage):
    _, _, _, stream = world
    predictor = predictor_of(stage, world)
    seen = set()
    for chunk in list(stream.chunks(200))[:3]:
        before = fingerprint(predictor)
        predictor.predict(chunk.inputs, whole(chunk.inputs))
        assert fingerprint(predictor) == before
        predictor.update(chunk.tokens)
        assert fingerprint(predictor) not in seen | {before}
        seen.add(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_does_not_change_the_model_that_it_was_given(world, stage):
    config, model, _, stream = world
    before = copy.deepcopy(model.state_dict())
    rows_of(predictor_of(stage, world), first(stream, 400), 200)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mixer", ["hedge", "maxent"])
@pytest.mark.slow
def test_probing_another_future_leaves_no_trace(world, mixer):
    """Neither in the fingerprint nor in the rows that follow, to the last bit."""
    _, _, _, stream = world
    first_chunk, second_chunk = list(stream.chunks(200))[:2]
    inputs, later = first_chunk.inputs, second_chunk.inputs

    def following(*probes):
        predictor = predictor_of("mixed", world, mixer=mixer)
        for probe in probes:
            predictor.predict(probe, whole(probe))
        predictor.update(first_chunk.tokens)
        return fingerprint(predictor), predictor.predict(later, whole(later))["mixed"]

    changed = torch.cat([inputs[:90], inputs[90:].flip(0)])
    plain_fingerprint, plain_rows = following(inputs)
    probed = [
        [],  # update without predict
        [inputs, later],
        [inputs, changed],
        [changed, inputs],
        [inputs, changed, inputs],
        [torch.cat([inputs, later])],  # a longer chunk
    ]
    for probes in probed:
        found_fingerprint, found_rows = following(*probes)
        assert found_fingerprint == plain_fingerprint and torch.equal(found_rows, plain_rows)


@pytest.mark.parametrize("stop", [45, 70])
def test_probing_another_future_in_the_middle_of_a_chunk_leaves_no_trace(world, stop):
    """Between two blocks of a chunk; the blocks whose inputs the probe shares stay."""
    _, _, _, stream = world
    chunk = next(iter(stream.chunks(100)))
    changed = torch.cat([chunk.inputs[:stop], chunk.inputs[stop:].flip(0)])
    blocks = [slice(0, 20), slice(20, 40), slice(40, 60), slice(60, 100)]
    found = []
    for probes in ([], [slice(0, 100)], [slice(30, 65), slice(0, 5)]):
        predictor = predictor_of("mixed", world)
        rows = []
        for block in blocks:
            rows.append(predictor.predict(chunk.inputs, block)["mixed"])
            for probe in probes:
                predictor.predict(changed, probe)
        predictor.update(chunk.tokens)
        found.append((torch.cat(rows), predictor.mixer.log_w))
    for rows, log_w in found[1:]:
        torch.testing.assert_close(rows, found[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(log_w, found[0][1], atol=1e-5, rtol=1e-5)


# The loop


def test_score_is_the_sum_of_bits_over_the_bytes_of_the_text(world):
    config, _, tokenizer, stream = world
    rows = rows_of(predictor_of("roundtrip", world), stream, config.val_batch_size)["roundtrip"]
    result = score(predictor_of("roundtrip", world), stream, config.val_batch_size, Dist())["roundtrip"]
    nll = -sum(rows[t, stream.tokens[t + 1]].item() for t in range(len(stream)))
    assert result.val_loss == pytest.approx(nll / len(stream), rel=1e-6)
    assert result.val_bpb == pytest.approx(nll / math.log(2) / int(stream.token_bytes.sum()), rel=1e-6)
    text = tokenizer.sp.decode([token for token in stream.tokens.tolist() if token != config.bos_id])
    assert abs(int(stream.token_bytes.sum()) - len(text.encode())) <= stream.documents  # a leading space each


def test_the_loop_updates_after_scoring_and_not_after_the_last_chunk(world):
    """Predict and update alternate, update gets what was just predicted, and none follows the last chunk."""
    config, _, _, stream = world
    calls = []

    class Recording(SlidingWindow):
        def predict(self, inputs, rows):
            calls.append(("predict", self.seen, len(inputs)))
            return super().predict(inputs, rows)

        def update(self, tokens):
            calls.append(("update", self.seen, len(tokens) - 1))
            super().update(tokens)

    score(Recording("sliding", world[1], config, Dist(), 8), stream, 256, Dist())
    n = -(-len(stream) // 256)
    assert [name for name, _, _ in calls] == ["predict", "update"] * (n - 1) + ["predict"]
    assert all(a[1:] == b[1:] for a, b in zip(calls[::2], calls[1::2], strict=False))
    assert sum(size for name, _, size in calls if name == "predict") == len(stream)


def test_a_row_that_does_not_sum_to_one_is_refused(world):
    config, model, _, stream = world

    class EntropyExpert(SlidingWindow):
        """e^-H for every token, as in published mixers."""

        def predict(self, inputs, rows):
            logp = super().predict(inputs, rows)["sliding"]
            return {"sliding": (logp.exp() * logp).sum(1, keepdim=True).expand_as(logp)}

    with pytest.raises(InputError, match="sum is off"):
        score(EntropyExpert("sliding", model, config, Dist(), 8), stream, 256, Dist())


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_row_that_is_not_finite_is_refused(world, value):
    config, model, _, stream = world

    class Broken(SlidingWindow):
        def predict(self, inputs, rows):
            found = super().predict(inputs, rows)
            found["sliding"][3] = value
            return found

    with pytest.raises(InputError, match="sum is off"):
        score(Broken("sliding", model, config, Dist(), 8), stream, 256, Dist())


def test_a_frozen_score_does_not_depend_on_chunks_or_batches(world):
    config, model, _, stream = world
    scores = []
    for chunk_tokens, micro_batch_tokens in ((512, 128), (97, 32), (10**6, 1024)):
        c = dataclasses.replace(config, micro_batch_tokens=micro_batch_tokens)
        predictor = SlidingWindow("sliding", model, c, Dist(), 8)
        scores.append(score(predictor, stream, chunk_tokens, Dist())["sliding"].val_bpb)
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


@pytest.mark.slow
def test_rows_and_weights_are_the_same_in_blocks_of_any_size(world):
    stream = first(world[3], 80)
    passes = []
    for block_rows in (1, 7, 8, 24, 1000):
        predictor = predictor_of("mixed", world)
        predictor.block_rows = block_rows
        rows = rows_of(predictor, stream, 36)
        passes.append((rows["ttt"], rows["mixed"], predictor.mixer.log_w.softmax(0)))
    for found in passes[:-1]:
        for a, b in zip(found, passes[-1], strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize(("cells", "block_rows"), [(1, 8), (320 * 30, 24)])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.slow
def test_no_dense_tensor_has_more_rows_than_a_block(world, monkeypatch, cells, block_rows, world_size):
    config, _, _, stream = world
    stream = first(stream, 240)
    expected = score(predictor_of("mixed", world), stream, 120, Dist())
    monkeypatch.setattr(train_gpt, "BLOCK_CELLS", cells)
    sizes = []

    def measured(predict):
        def measuring(*arguments):
            found = predict(*arguments)
            sizes.extend(len(logp) for logp in found.values())
            return found

        return measuring

    def run(dist):
        predictor = predictor_of("mixed", world, dist)
        assert predictor.block_rows == block_rows
        for each in (predictor, predictor.neural):
            each.predict = measured(each.predict)
        return score(predictor, stream, 120, dist)

    for found in on_ranks(world_size, run):
        for stage, result in found.items():
            torch.testing.assert_close(result.nll, expected[stage].nll, atol=2e-5, rtol=1e-5)
    assert max(sizes) == block_rows


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_score_does_not_depend_on_the_number_of_ranks(world, stage, world_size):
    """Also where a rank has no row of the last chunk."""
    stream = first(world[3], 208)

    def run(dist):
        predictor = predictor_of(stage, world, dist)
        return score(predictor, stream, 100, dist), getattr(predictor, "mixer", None)

    (expected, mixer), *_ = on_ranks(1, run)
    ranks = on_ranks(world_size, run)
    for found, _ in ranks:
        for name, result in found.items():
            torch.testing.assert_close(result.nll, expected[name].nll, atol=2e-5, rtol=1e-5)
            assert torch.equal(result.nll, ranks[0][0][name].nll)
    if mixer:
        torch.testing.assert_close(ranks[0][1].log_w, mixer.log_w, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(rank.log_w, ranks[0][1].log_w) for _, rank in ranks)


# Test-time training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adaptation_learns_the_stream(tiny_config, world, optimizer):
    config = tiny_config(ttt_optimizer=optimizer, ttt_lr=0.05 if optimizer == "sgd" else 0.002, ttt_epochs=2)
    model, (_, _, tokenizer, stream) = train_gpt.GPT(config).init_weights(0), world
    frozen = score(SlidingWindow("sliding", model, config, Dist(), 8), stream, 256, Dist())["sliding"].val_bpb
    adapted = score(TTT(model, config, Dist(), tokenizer), stream, 256, Dist())["ttt"].val_bpb
    assert adapted < frozen - 0.05


def test_without_epochs_test_time_training_is_the_frozen_model(world):
    stream = first(world[3], 400)
    frozen = rows_of(predictor_of("sliding", world), stream, 200)["sliding"]
    assert torch.equal(frozen, rows_of(predictor_of("ttt", world, ttt_epochs=0), stream, 200)["ttt"])


@pytest.mark.parametrize(("setting", "frozen"), [(0, []), (1, [0]), (2, [0, 1]), (-1, [0]), (-2, []), (-9, [])])
def test_frozen_blocks_stay_and_the_others_move(world, setting, frozen):
    _, model, _, stream = world
    adapting = predictor_of("ttt", world, ttt_freeze_blocks=setting)
    adapting.update(stream.tokens[:129])
    for layer, (was, now) in enumerate(zip(model.blocks, adapting.learner.blocks, strict=True)):
        same = [torch.equal(a, b) for a, b in zip(was.parameters(), now.parameters(), strict=True)]
        assert all(same) if layer in frozen else not any(same)


def test_the_polyak_average_predicts_and_trails_the_learner(world):
    _, model, _, stream = world
    adapting = predictor_of("ttt", world, ttt_polyak=0.5)
    average = model.tok_emb.weight.detach().clone()
    for chunk in list(stream.chunks(128))[:4]:
        adapting.step(*adapting.training_sequences(chunk.tokens))
        average = 0.5 * average + 0.5 * adapting.learner.tok_emb.weight.detach()
    torch.testing.assert_close(adapting.average.tok_emb.weight, average)
    row = adapting.predict(stream.tokens[:8], slice(7, 8))["ttt"][0]
    expected = adapting.average(stream.tokens[:8].unsqueeze(0))[0, -1].log_softmax(-1)
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_the_learning_rate_follows_the_cosine_over_the_given_length(world):
    adapting = predictor_of("ttt", world, ttt_lr=0.1, ttt_cosine_tokens=1000)
    rates = []
    for seen in (0, 500, 1000, 5000):
        adapting.seen = seen
        adapting.update(world[3].tokens[:17])
        rates.append(adapting.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.05, 0.0, 0.0])


def test_training_sequences_hold_every_token_once_and_weigh_bytes(world):
    config, _, tokenizer, stream = world
    adapting = predictor_of("ttt", world, ttt_byte_weighted=True)
    tokens = stream.tokens[:101]
    inputs, targets, weights = adapting.training_sequences(tokens)
    n = len(tokens) - 1
    assert inputs.shape == targets.shape == weights.shape == (-(-n // config.train_seq_len), config.train_seq_len)
    assert torch.equal(inputs.flatten()[:n], tokens[:-1]) and torch.equal(targets.flatten()[:n], tokens[1:])
    assert torch.equal(weights.flatten()[:n], tokenizer.count_bytes(tokens[:-1], tokens[1:]).float())
    assert weights.flatten()[n:].sum() == 0


def test_a_step_is_that_of_the_weighted_mean_loss_of_its_batch(world):
    """By one plain pass over the batch, whatever the micro batches."""
    _, model, _, stream = world
    settings = dict(ttt_lr=0.1, ttt_momentum=0.0, ttt_grad_clip=0.0, ttt_byte_weighted=True)
    plain = copy.deepcopy(model)
    for micro_tokens in (32, 1024):
        adapting = predictor_of("ttt", world, ttt_micro_tokens=micro_tokens, **settings)
        inputs, targets, weights = adapting.training_sequences(stream.tokens[:101])
        logp = plain(inputs).log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
        grads = torch.autograd.grad(-(logp * weights).sum() / weights.sum(), list(plain.parameters()))
        adapting.step(inputs, targets, weights)
        for p, was, grad in zip(adapting.learner.parameters(), plain.parameters(), grads, strict=True):
            torch.testing.assert_close(p, was - 0.1 * grad, atol=1e-6, rtol=1e-5)


def test_temperature_divides_the_logits(world):
    _, model, _, stream = world
    hot = predictor_of("ttt", world, ttt_temperature=2.0)
    inputs = stream.tokens[:20]
    expected = (model(inputs.unsqueeze(0))[0] / 2).log_softmax(-1)
    torch.testing.assert_close(hot.predict(inputs, whole(inputs))["ttt"], expected, atol=1e-4, rtol=1e-4)


def test_steps_without_a_finite_gradient_are_counted_and_change_nothing(world):
    adapting = predictor_of("ttt", world)
    before = [p.detach().clone() for p in adapting.params]
    inputs, targets, weights = adapting.training_sequences(world[3].tokens[:65])
    adapting.step(inputs, targets, weights * float("nan"))
    assert int(adapting.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, adapting.params, strict=True))


# The mixture


def test_mixed_rows_are_those_of_test_time_training_with_the_candidates_biases(world):
    """Put together again from its parts, over several chunks in which model, chains and network all move."""
    config, _, _, stream = world
    c = dataclasses.replace(config, mixer="maxent", mixer_lr=0.01)
    mixture, alone = predictor_of("mixed", world, mixer="maxent", mixer_lr=0.01), predictor_of("ttt", world)
    chains, net = HashChains(c, CPU), random_net(c).float()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for chunk in list(stream.chunks(200))[:3]:
        rows = whole(chunk.inputs)
        logp = alone.predict(chunk.inputs, rows)["ttt"]
        candidates = chains.candidates(chunk.inputs, rows, logp)
        expected, found = apply_bias(logp, candidates, net(candidates)), mixture.predict(chunk.inputs, rows)
        torch.testing.assert_close(found["mixed"], expected.detach(), atol=1e-4, rtol=1e-4)
        assert torch.equal(found["ttt"], logp)
        adam.zero_grad()
        (-expected.gather(1, chunk.targets.unsqueeze(1)).mean()).backward()
        adam.step()
        for part in (mixture, alone, chains):
            part.update(chunk.tokens)


@pytest.mark.slow
def test_hedge_never_costs_more_than_its_best_expert_and_log_k(world):
    """In a whole pass, where every expert is also scored alone."""
    config, _, _, stream = world
    experts = config.hedge_experts
    costs = {
        mixer: score(predictor_of("mixed", world, mixer=mixer), stream, 256, Dist())["mixed"].nll.sum().item()
        for mixer in ("hedge", *experts)
    }
    assert costs["hedge"] <= min(costs[name] for name in experts) + math.log(len(experts)) + 0.01
    assert costs["hedge"] < costs["neural"] - 10  # the counts of this stream help


def test_ttt_and_mixed_in_one_pass_equal_each_alone(world):
    config, model, tokenizer, stream = world
    net = random_net(config).float()
    alone = {stage: score(predictor_of(stage, world), stream, 256, Dist())[stage] for stage in ("ttt", "mixed")}
    for stages in (("ttt", "mixed"), ("mixed", "ttt"), ("mixed",), ("ttt",)):
        c = dataclasses.replace(config, stages=stages)
        records, scores = train_gpt.evaluate(model, net, c, Dist(), tokenizer, stream)
        assert list(records) == list(stages)
        for stage in stages:
            assert torch.equal(scores[stage].nll, alone[stage].nll)
            assert records[stage]["val_bpb"] == alone[stage].val_bpb
            assert records[stage]["max_sum_error"] == alone[stage].max_sum_error


@pytest.mark.slow
def test_calibration_fits_the_network_on_held_out_training_text(world, monkeypatch):
    monkeypatch.setattr(train_gpt, "CALIBRATION_STEPS", 60)
    config, model, tokenizer, stream = world
    config = dataclasses.replace(config, mixer="maxent")
    net, before = BiasNet(config), copy.deepcopy(model.state_dict())
    calibrate(model, net, TrainLoader(config, Dist()), config, Dist())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fitted, new = (
        score(make_predictor("mixed", model, each, config, Dist(), tokenizer), stream, 256, Dist())["mixed"]
        for each in (net, BiasNet(config))
    )
    assert fitted.val_bpb < new.val_bpb - 0.05


def test_calibration_does_not_depend_on_the_number_of_ranks(world, monkeypatch):
    monkeypatch.setattr(train_gpt, "CALIBRATION_STEPS", 6)
    config, model, _, _ = world
    config = dataclasses.replace(config, mixer_calibration_tokens=600)

    def run(dist):
        net = BiasNet(config)
        calibrate(model, net, TrainLoader(config, dist), config, dist)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    (alone,), (a, b) = on_ranks(1, run), on_ranks(2, run)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, alone, atol=1e-4, rtol=1e-4)


# The deadline


FAST = dict(ttt_chunk_tokens=32, ttt_batch_tokens=32, ttt_lr=0.01)


def flat_rows(predictor, inputs, rows):
    """Return uniform rows, which cost nothing, in place of a predictor's."""
    n, vocab_size = rows.stop - rows.start, predictor.c.vocab_size
    return {predictor.stages[0]: torch.full((n, vocab_size), -math.log(vocab_size))}


def nothing_to_learn(adapted):
    """Return what stands in for TTT.training_sequences: no sequences, and a note of the chunk."""

    def sequences(predictor, tokens):
        adapted.append(predictor.seen // 32)
        return tuple(torch.zeros(0, predictor.c.train_seq_len) for _ in range(3))

    return sequences


def evaluated(world, clock, monkeypatch, caplog, scoring_seconds, adapting_seconds, model_runs=False, **overrides):
    """Return (record, log lines, seconds) of the ttt stage where a chunk takes so long to score and to adapt to."""
    config, model, tokenizer, stream = world
    c, began, adapted = dataclasses.replace(config, **{"stages": ("ttt",), **FAST, **overrides}), clock.now, []
    caplog.set_level(logging.INFO, logger="train_gpt")
    with monkeypatch.context() as patch:
        predict = SlidingWindow.predict if model_runs else flat_rows
        sequences = TTT.training_sequences if model_runs else nothing_to_learn(adapted)
        patch.setattr(SlidingWindow, "predict", clock.costs(predict, scoring_seconds))
        patch.setattr(TTT, "training_sequences", clock.costs(sequences, adapting_seconds))
        records, scores = train_gpt.evaluate(model, random_net(c).float(), c, Dist(), tokenizer, stream)
    return {**records["ttt"], "nll": scores["ttt"].nll, "adapted": adapted}, caplog.messages, clock.now - began


def n_chunks(world):
    return -(-len(world[3]) // FAST["ttt_chunk_tokens"])


def test_with_time_enough_every_chunk_but_the_last_is_adapted_to(world, virtual_time, monkeypatch, caplog):
    n = n_chunks(world)
    record, lines, seconds = evaluated(world, virtual_time, monkeypatch, caplog, 1.0, 1.0, max_eval_seconds=2.2 * n)
    assert (record["adapted_chunks"], record["chunks"], record["ttt_stop"]) == (n - 1, n, None)
    assert seconds == 2 * n - 1 and not any(line.startswith("ttt_stop") for line in lines)
    assert f"ttt_chunks:{n - 1}/{n} skipped_steps:0" in lines


@pytest.mark.parametrize(("slowdown", "per_chunk"), [(1.0, 1.4), (2.0, 2.2), (3.0, 2.7)])
def test_adaptation_stops_once_and_the_pass_ends_in_time(world, virtual_time, monkeypatch, caplog, slowdown, per_chunk):
    """Also where scoring slows down after a quarter of the time."""
    n = n_chunks(world)
    limit = per_chunk * n

    def scoring_seconds():
        return 0.8 * (slowdown if virtual_time.now > limit / 4 else 1.0)

    record, lines, seconds = evaluated(
        world, virtual_time, monkeypatch, caplog, scoring_seconds, 1.0, max_eval_seconds=limit
    )
    stop = record["ttt_stop"]
    assert 0.85 * limit < seconds <= limit
    assert record["adapted"] == list(range(stop)) and 0 < stop == record["adapted_chunks"] < n - 1
    assert [line for line in lines if line.startswith("ttt_stop")] == [
        f"ttt_stop: after {stop} chunks, with {n - 1 - stop} chunks left to score"
    ]
    assert json.loads(json.dumps(record["ttt_stop"])) == stop


def test_a_pass_that_begins_too_late_adapts_to_the_first_chunks_only(world, virtual_time, monkeypatch, caplog):
    record, _, _ = evaluated(world, virtual_time, monkeypatch, caplog, 5.0, 1.0, max_eval_seconds=1.0)
    assert record["ttt_stop"] == record["adapted_chunks"] < 4


def run_deadline(clock, deadline, n, scoring, adapting):
    """Return which of n chunks are adapted to where chunk i takes scoring(i) and adapting(i) seconds."""
    found = []
    for i in range(n - 1):
        clock.now += scoring(i)
        if deadline.allows():
            clock.now += adapting(i)
            deadline.adapt()
            found.append(i)
    return found


@pytest.mark.parametrize("compiling", [(60.0,), (60.0, 60.0)])
def test_first_chunks_that_compile_do_not_trigger_a_stop(virtual_time, compiling):
    """Each shape that is new takes a minute, in scoring and in adaptation; there is time for it."""
    n = 100

    def seconds(i):
        return compiling[i] if i < len(compiling) else 1.0

    deadline = Deadline(Dist(), n, 1.1 * (2 * sum(compiling) + 2 * n))
    assert run_deadline(virtual_time, deadline, n, seconds, seconds) == list(range(n - 1))
    assert deadline.stop_after is None


def test_a_stop_is_final(virtual_time):
    """Also where scoring and adaptation take no time from then on."""
    deadline = Deadline(Dist(), 50, 60.0)
    found = run_deadline(virtual_time, deadline, 50, lambda i: 1.0 if i < 12 else 0.0, lambda i: 5.0 if i < 12 else 0.0)
    assert found == list(range(deadline.stop_after)) and len(found) == deadline.adapted < 12


def test_the_ranks_stop_together(monkeypatch):
    """By the slowest of them: each has a clock of its own."""
    own = threading.local()
    clock = types.SimpleNamespace(perf_counter=lambda: own.now)
    monkeypatch.setattr(train_gpt, "time", clock)

    def run(dist):
        own.now = 1000.0 * dist.rank
        scoring = 1.0 + dist.rank
        return run_deadline(own, Deadline(dist, 40, 75.0), 40, lambda i: scoring, lambda i: 0.5)

    a, b = on_ranks(2, run)
    assert a == b and 0 < len(a) < 20
    (alone,) = on_ranks(1, run)
    assert len(alone) == 39


@pytest.mark.slow
def test_a_run_that_is_given_the_stop_gives_the_same_score(world, virtual_time, monkeypatch, caplog):
    config, model, tokenizer, stream = world
    n, c = n_chunks(world), dataclasses.replace(config, **FAST)
    record, _, _ = evaluated(world, virtual_time, monkeypatch, caplog, 1.0, 1.0, True, max_eval_seconds=1.5 * n)
    assert 4 <= record["ttt_stop"] < n - 1
    for stage in ("ttt", "mixed"):
        deadline = Deadline(Dist(), stop_after=record["ttt_stop"])
        predictor = make_predictor(stage, model, random_net(c).float(), c, Dist(), tokenizer, deadline)
        again = score(predictor, stream, c.ttt_chunk_tokens, Dist())["ttt"]
        assert torch.equal(again.nll, record["nll"]) and deadline.adapted == record["ttt_stop"]
    free = score(TTT(model, c, Dist(), tokenizer), stream, c.ttt_chunk_tokens, Dist())["ttt"]
    assert not torch.equal(free.nll, record["nll"])


def test_stages_that_do_not_adapt_come_first_whatever_the_order(world, virtual_time, monkeypatch, caplog):
    """Adaptation gets the time that is left then; the last stage named is still the run's."""
    config, model, tokenizer, stream = world
    n = n_chunks(world)
    c = dataclasses.replace(
        config, **FAST, stages=("ttt", "sliding"), max_eval_seconds=2.5 * n, val_batch_size=32, eval_stride=8
    )
    monkeypatch.setattr(SlidingWindow, "predict", virtual_time.costs(flat_rows, 1.0))
    monkeypatch.setattr(TTT, "training_sequences", virtual_time.costs(nothing_to_learn([]), 1.0))
    records, _ = train_gpt.evaluate(model, random_net(c).float(), c, Dist(), tokenizer, stream)
    assert list(records) == ["ttt", "sliding"] and virtual_time.now <= 2.5 * n
    assert 0 < records["ttt"]["ttt_stop"] < n - 1 and "ttt_stop" not in records["sliding"]


def test_the_registry_makes_the_predictor_of_each_stage(world):
    kinds = dict(roundtrip=SlidingWindow, sliding=SlidingWindow, ttt=TTT, mixed=MixedTTT)
    for stage, kind in kinds.items():
        predictor = predictor_of(stage, world)
        assert type(predictor) is kind and predictor.stages[-1] == stage
        assert predictor.stride == (world[0].eval_seq_len if stage == "roundtrip" else world[0].eval_stride)
