"""Scoring: predictors by the four conditions, and the one loop against a sum written out."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch

import train_gpt
from conftest import Alone, build
from test_mixing import random_maxent
from train_gpt import (
    GPT,
    Adapting,
    Case,
    ContextIndex,
    Frozen,
    InputError,
    Maxent,
    Pace,
    Stream,
    Tokenizer,
    calibrate,
    chunk_length,
    fingerprint,
    make_predictor,
    score,
)

STAGES = train_gpt.STAGES
CPU = torch.device("cpu")


@pytest.fixture
def world(tiny_config):
    """(config, model, tokenizer, stream) at a learning rate that makes adaptation visible."""
    config = tiny_config(ttt_lr=0.05, ttt_epochs=1)
    model, tokenizer = build(config), Tokenizer(config)
    return config, model, tokenizer, Stream(config, CPU, tokenizer)


def predictor_of(stage, world, **overrides):
    config, model, tokenizer, _ = world
    c = dataclasses.replace(config, **overrides)
    return make_predictor(stage, model, random_maxent(c).float(), c, Alone(), tokenizer)


def rows_of(predictor, stream, chunk_tokens):
    """All rows of a pass, with the updates in between: [N, V]."""
    found = []
    for chunk in stream.chunks(chunk_tokens):
        found.append(predictor.predict(chunk.inputs, slice(0, len(chunk.inputs))))
        predictor.update(chunk.tokens)
    return torch.cat(found)


@pytest.mark.parametrize("stage", STAGES)
def test_rows_are_full_positive_normalized_distributions(world, stage):
    config, _, _, stream = world
    rows = rows_of(predictor_of(stage, world), stream, chunk_length(stage, config))
    assert rows.shape == (len(stream), config.vocab_size)
    assert torch.isfinite(rows).all()
    assert (rows.double().exp().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_no_row_depends_on_its_token_or_a_later_one(world, stage):
    """Change everything from position j on: all rows up to and including j's stay the same to the last bit."""
    config, _, _, stream = world
    size = chunk_length(stage, config)
    before = rows_of(predictor_of(stage, world), stream, size)
    for j in (0, 40, size - 1, size, size + 77):
        changed = copy.copy(stream)
        generator = torch.Generator().manual_seed(j)
        tail = torch.randint(4, config.vocab_size, (len(stream) - j,), generator=generator)
        changed.tokens = torch.cat([stream.tokens[: j + 1], tail])
        after = rows_of(predictor_of(stage, world), changed, size)
        assert torch.equal(before[: j + 1], after[: j + 1]), j
        assert not torch.equal(before[j + 1], after[j + 1])


@pytest.mark.parametrize("stage", STAGES)
def test_predict_leaves_the_fingerprint_and_update_changes_it(world, stage):
    config, _, _, stream = world
    predictor = predictor_of(stage, world)
    seen = set()
    for chunk in list(stream.chunks(chunk_length(stage, config)))[:3]:
        before = fingerprint(predictor)
        predictor.predict(chunk.inputs, slice(0, len(chunk.inputs)))
        assert fingerprint(predictor) == before
        predictor.update(chunk.tokens)
        assert fingerprint(predictor) not in seen | {before}
        seen.add(before)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_does_not_change_the_model_it_was_given(world, stage):
    config, model, _, stream = world
    before = copy.deepcopy(model.state_dict())
    rows_of(predictor_of(stage, world), stream, chunk_length(stage, config))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_frozen_rows_are_the_plain_forward_over_each_position_s_window(world):
    config, model, _, stream = world
    seq_len, stride = config.eval_seq_len, config.eval_stride
    rows = rows_of(Frozen(model, config, Alone(), stride), stream, 100)
    inputs = stream.tokens[:-1]
    for t in (0, 5, seq_len - 1, seq_len, seq_len + stride - 1, 3 * seq_len + 5, len(inputs) - 1):
        start = max(0, -(-(t + 1 - seq_len) // stride)) * stride
        expected = model(inputs[start : t + 1].unsqueeze(0))[0, -1].log_softmax(-1)
        torch.testing.assert_close(rows[t], expected, atol=1e-4, rtol=1e-4)


def test_frozen_score_does_not_depend_on_chunks_or_batches(world):
    config, model, tokenizer, stream = world
    scores = []
    for chunk_tokens, micro_batch_tokens in ((512, 128), (97, 32), (10**6, 1024)):
        c = dataclasses.replace(config, micro_batch_tokens=micro_batch_tokens)
        scores.append(score(Frozen(model, c, Alone(), 8), stream, chunk_tokens, Alone()).val_bpb)
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


def test_score_is_the_sum_of_bits_over_the_bytes_of_the_text(world):
    config, _, tokenizer, stream = world
    rows = rows_of(predictor_of("roundtrip", world), stream, config.val_batch_size)
    result = score(predictor_of("roundtrip", world), stream, config.val_batch_size, Alone())
    nats = -sum(rows[t, stream.tokens[t + 1]].item() for t in range(len(stream)))
    text_bytes = sum(
        len(tokenizer.sp.decode(document).encode()) for document in documents_of(stream.tokens.tolist(), config.bos_id)
    )
    assert int(result.token_bytes.sum()) == text_bytes
    assert result.val_bpb == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    assert result.val_loss == pytest.approx(nats / len(stream), rel=1e-6)


def documents_of(tokens, bos_id):
    documents = []
    for token in tokens:
        if token == bos_id:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def test_the_loop_updates_after_scoring_and_not_after_the_last_chunk(world):
    """Predict and update alternate, update gets what was just predicted, and none follows the last chunk."""
    config, _, tokenizer, stream = world
    calls = []

    class Recording(Frozen):
        def predict(self, inputs, rows):
            calls.append(("predict", self.seen, len(inputs)))
            return super().predict(inputs, rows)

        def update(self, tokens):
            calls.append(("update", self.seen, len(tokens) - 1))
            super().update(tokens)

    score(Recording(world[1], config, Alone(), 8), stream, 256, Alone())
    n = -(-len(stream) // 256)
    assert [name for name, _, _ in calls] == ["predict", "update"] * (n - 1) + ["predict"]
    assert all(a[1:] == b[1:] for a, b in zip(calls[::2], calls[1::2], strict=False))
    assert sum(size for name, _, size in calls if name == "predict") == len(stream)


def test_a_row_that_does_not_sum_to_one_is_refused(world):
    config, model, tokenizer, stream = world

    class EntropyExpert(Frozen):
        """What published mixers did: e^-H for every token."""

        def predict(self, inputs, rows):
            logp = super().predict(inputs, rows)
            return (logp.exp() * logp).sum(1, keepdim=True).expand_as(logp)

    with pytest.raises(InputError, match="sum is off"):
        score(EntropyExpert(model, config, Alone(), 8), stream, 256, Alone())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_adaptation_learns_the_stream(tiny_config, optimizer):
    config = tiny_config(ttt_optimizer=optimizer, ttt_lr=0.05 if optimizer == "sgd" else 0.002, ttt_epochs=3)
    model, tokenizer = GPT(config).init_weights(config), Tokenizer(config)
    stream = Stream(config, CPU, tokenizer)
    frozen = score(Frozen(model, config, Alone(), 8), stream, 256, Alone()).val_bpb
    adapted = score(Adapting(model, config, Alone(), tokenizer), stream, 256, Alone()).val_bpb
    assert adapted < frozen - 0.05


def test_without_epochs_adaptation_is_the_frozen_model(world):
    config, _, _, stream = world
    frozen = rows_of(predictor_of("sliding", world), stream, config.ttt_chunk_tokens)
    assert torch.equal(frozen, rows_of(predictor_of("ttt", world, ttt_epochs=0), stream, config.ttt_chunk_tokens))


def test_frozen_blocks_stay_and_the_others_move(world):
    config, model, tokenizer, stream = world
    adapting = Adapting(model, dataclasses.replace(config, ttt_freeze_blocks=1), Alone(), tokenizer)
    rows_of(adapting, stream, config.ttt_chunk_tokens)
    for layer, (was, now) in enumerate(zip(model.blocks, adapting.learner.blocks, strict=True)):
        same = [torch.equal(a, b) for a, b in zip(was.parameters(), now.parameters(), strict=True)]
        assert all(same) if layer == 0 else not any(same)


def test_polyak_average_predicts_and_trails_the_learner(world):
    config, model, tokenizer, stream = world
    adapting = Adapting(model, dataclasses.replace(config, ttt_polyak=0.5), Alone(), tokenizer)
    average = model.tok_emb.weight.detach().clone()
    for chunk in stream.chunks(config.ttt_chunk_tokens):
        inputs, targets, weights = adapting.training_sequences(chunk.tokens)
        adapting.step(inputs, targets, weights)
        average = 0.5 * average + 0.5 * adapting.learner.tok_emb.weight.detach()
    torch.testing.assert_close(adapting.average.tok_emb.weight, average)
    adapting.context, adapting.seen = adapting.context[:0], 0
    row = adapting.predict(stream.tokens[:8], slice(7, 8))[0]
    expected = adapting.average(stream.tokens[:8].unsqueeze(0))[0, -1].log_softmax(-1)
    torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


def test_learning_rate_follows_the_cosine_over_the_given_length(world):
    adapting = predictor_of("ttt", world, ttt_lr=0.1, ttt_cosine_tokens=1000)
    rates = []
    for seen in (0, 500, 1000, 5000):
        adapting.seen = seen
        rates.append(adapting.learning_rate())
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


def test_temperature_divides_the_logits(world):
    config, model, _, stream = world
    hot = predictor_of("ttt", world, ttt_temperature=2.0, ttt_epochs=0)
    inputs = stream.tokens[:20]
    expected = (model(inputs.unsqueeze(0))[0] / 2).log_softmax(-1)
    torch.testing.assert_close(hot.predict(inputs, slice(0, 20)), expected, atol=1e-4, rtol=1e-4)


def test_mixture_rows_are_the_adapting_model_s_tilted_by_the_evidence(world):
    """Put together again from its parts, over several chunks in which model, index and mixer all move."""
    config, _, _, stream = world
    c = dataclasses.replace(config, mixer_lr=0.01)
    mixture, alone, index = (
        predictor_of("mixed", world, mixer_lr=0.01),
        predictor_of("ttt", world),
        ContextIndex(c, CPU),
    )
    mixer = random_maxent(c).float()
    adam = torch.optim.Adam(mixer.parameters(), lr=0.01)
    for chunk in list(stream.chunks(config.ttt_chunk_tokens))[:4]:
        rows = slice(0, len(chunk.inputs))
        logp = alone.predict(chunk.inputs, rows)
        case = Case.of(logp, index.evidence(chunk.inputs, rows))
        expected = case.tilted(logp, mixer.bias(case))
        torch.testing.assert_close(mixture.predict(chunk.inputs, rows), expected.detach(), atol=1e-4, rtol=1e-4)
        adam.zero_grad()
        (-expected.gather(1, chunk.targets.unsqueeze(1)).mean()).backward()
        adam.step()
        for part in (mixture, alone, index):
            part.update(chunk.tokens)


def test_the_one_token_tilt_needs_no_weights(world):
    config, _, _, stream = world
    mixture = predictor_of("mixed", world, mixer="tilt")
    assert not mixture.fitter.params
    rows = rows_of(mixture, stream, config.ttt_chunk_tokens)
    assert (rows.double().exp().sum(1) - 1).abs().max() < 1e-6


def test_calibration_fits_the_mixer_on_held_out_training_text(world):
    config, model, tokenizer, stream = world
    mixer = Maxent(config)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, mixer, config, Alone())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fitted, new = (
        score(make_predictor("mixed", model, m, config, Alone(), tokenizer), stream, config.ttt_chunk_tokens, Alone())
        for m in (mixer, Maxent(config))
    )
    assert fitted.val_bpb < new.val_bpb - 0.05


def test_what_predict_is_asked_leaves_no_trace(world):
    """A chunk that was asked for and did not come changes nothing: neither the fingerprint nor what follows."""
    config, _, _, stream = world
    chunks = list(stream.chunks(config.ttt_chunk_tokens))
    asked, plain = predictor_of("mixed", world), predictor_of("mixed", world)
    rows = slice(0, config.ttt_chunk_tokens)
    with torch.no_grad():
        asked.predict(chunks[0].inputs, rows)
        asked.predict(chunks[1].inputs.flip(0), rows)
        asked.predict(chunks[0].inputs, rows)
    plain.predict(chunks[0].inputs, rows)
    for predictor in (asked, plain):
        predictor.update(chunks[0].tokens)
    assert fingerprint(asked) == fingerprint(plain)
    unasked = predictor_of("mixed", world)
    unasked.update(chunks[0].tokens)
    assert fingerprint(unasked) == fingerprint(plain)


def evaluated(world, clock, monkeypatch, scoring_seconds, step_seconds, told=None, **overrides):
    """(results, log lines, seconds) of the ttt stage where a chunk and a step of adaptation take so long."""
    config, model, tokenizer, stream = world
    c, run, lines = dataclasses.replace(config, stages=("ttt",), **overrides), Alone(), []
    run.log, began = lines.append, clock.now
    with monkeypatch.context() as patch:
        patch.setattr(Frozen, "predict", clock.costs(Frozen.predict, scoring_seconds))
        patch.setattr(Adapting, "step", clock.costs(Adapting.step, step_seconds))
        if told is not None:
            patch.setattr(train_gpt, "Pace", lambda most, run, *_: Pace(most, run, told=told))
        results = train_gpt.evaluate(model, random_maxent(c).float(), c, run, tokenizer, stream)
    return results["ttt"], lines, clock.now - began


EPOCHS = dict(ttt_epochs=3, ttt_chunk_tokens=128, ttt_batch_tokens=128, ttt_lr=0.01)  # a step an epoch


def test_with_time_enough_every_chunk_has_its_epochs(world, virtual_time, monkeypatch):
    n = -(-len(world[3]) // 128)
    result, lines, seconds = evaluated(world, virtual_time, monkeypatch, 1.0, 1.0, max_eval_seconds=5.0 * n, **EPOCHS)
    assert result.ttt_epochs == ((3, n - 1),) and seconds == n + 3 * (n - 1)
    assert not any(line.startswith("ttt_epochs") for line in lines)


@pytest.mark.parametrize("slowdown", [1.0, 2.0])
def test_adaptation_gives_way_so_that_the_pass_ends_in_time(world, virtual_time, monkeypatch, slowdown):
    """On a machine that is too slow, or becomes so a third of the way in; every change is logged."""
    n = -(-len(world[3]) // 128)
    began, limit = virtual_time.now, 3.0 * n
    slower = lambda seconds: lambda: seconds * (slowdown if virtual_time.now > began + limit / 3 else 1.0)  # noqa: E731
    settings = dict(max_eval_seconds=limit, **EPOCHS)
    result, lines, seconds = evaluated(world, virtual_time, monkeypatch, slower(0.8), slower(1.0), **settings)
    assert 0.85 * limit < seconds <= limit
    given = epochs_of(result)
    assert given[0] == 3 > min(given) and len(given) == n - 1
    lowered = [(i, epochs) for i, epochs in enumerate(given) if epochs < min((3, *given[:i]))]
    said = [re.match(r"ttt_epochs:(\d+) at chunk (\d+), ", line) for line in lines]
    assert [(int(match[2]), int(match[1])) for match in said if match] == lowered
    assert "ttt_epochs by chunk: " + ",".join(f"{epochs}*{times}" for epochs, times in result.ttt_epochs) in lines
    assert json.loads(json.dumps(train_gpt.stage_record(result, world[3])))["ttt_epochs"] == list(
        map(list, result.ttt_epochs)
    )


def epochs_of(result):
    """Of each chunk that was learned from."""
    return tuple(epochs for epochs, times in result.ttt_epochs for _ in range(times))


def test_a_pass_that_begins_too_late_adapts_no_more(world, virtual_time, monkeypatch):
    result, _, _ = evaluated(world, virtual_time, monkeypatch, 5.0, 1.0, max_eval_seconds=1.0, **EPOCHS)
    assert set(epochs_of(result)) == {0}


def test_chunks_that_compile_are_not_taken_for_what_a_chunk_takes(world, virtual_time, monkeypatch):
    """Where the model is compiled, the first two take a minute each; they cost their time and no epochs after them."""
    n, compiled, seconds = -(-len(world[3]) // 128), Alone(), iter([60.0, 60.0])
    compiled.compiles = True
    pace = Pace(3, compiled, n, 120.0 + 6.0 * n)
    for _ in range(n - 1):
        virtual_time.now += 1.0
        with pace.chunk() as epochs:
            virtual_time.now += next(seconds, 1.0 * epochs)
    assert set(pace.given) == {3}


def test_stages_that_do_not_adapt_come_first_whatever_the_order(world, virtual_time, monkeypatch):
    """So that adaptation knows what is left; the last one named is still the run's."""
    n = -(-len(world[3]) // 128)
    settings = dict(max_eval_seconds=4.0 * n, val_batch_size=128, **EPOCHS) | dict(stages=("ttt", "sliding"))
    config, model, tokenizer, stream = world
    c, began = dataclasses.replace(config, **settings), virtual_time.now
    monkeypatch.setattr(Frozen, "predict", virtual_time.costs(Frozen.predict, 1.0))
    monkeypatch.setattr(Adapting, "step", virtual_time.costs(Adapting.step, 1.0))
    results = train_gpt.evaluate(model, random_maxent(c).float(), c, Alone(), tokenizer, stream)
    assert list(results) == ["ttt", "sliding"] and virtual_time.now - began <= 4.0 * n
    assert 0 < min(epochs_of(results["ttt"])) < 3 and results["sliding"].ttt_epochs == ()


def test_adaptation_counts_the_steps_whose_gradient_is_not_finite(world):
    _, _, _, stream = world
    adapting = predictor_of("ttt", world)
    before = [p.detach().clone() for p in adapting.params]
    inputs, targets, weights = adapting.training_sequences(stream.tokens[:65])
    adapting.step(inputs, targets, weights * float("nan"))
    assert int(adapting.skipped) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, adapting.params, strict=True))


def test_a_compiled_model_meets_few_shapes_and_gives_the_same_rows(world):
    """A batch of windows is filled up to a size that was there before; what is added changes no row."""
    config, model, _, stream = world
    c = dataclasses.replace(config, micro_batch_tokens=6 * config.eval_seq_len)
    shapes, seen, plain, compiled = set(), [], Frozen(model, c, Alone(), c.eval_stride), Alone()

    def called(tokens, keep):
        shapes.add((*tokens.shape, keep))
        return model(tokens, keep=keep)

    compiled.compiles = True
    padded = Frozen(called, c, compiled, c.eval_stride)
    for chunk in stream.chunks(96):
        rows = slice(0, len(chunk.inputs))
        expected = plain.predict(chunk.inputs, rows)
        torch.testing.assert_close(padded.predict(chunk.inputs, rows), expected, atol=1e-5, rtol=1e-5)
        for predictor in (plain, padded):
            predictor.update(chunk.tokens)
        seen.append(set(shapes))
    assert seen[-1] == seen[1] and len(shapes) <= 3  # the last chunk, which is shorter, compiles nothing either
    assert {keep for *_, keep in shapes} == {c.eval_stride, c.eval_seq_len}


def test_a_run_that_is_told_the_epochs_gives_the_same_score(world, virtual_time, monkeypatch):
    n = -(-len(world[3]) // 128)
    first, _, _ = evaluated(world, virtual_time, monkeypatch, 1.0, 1.0, max_eval_seconds=2.5 * n, **EPOCHS)
    again, _, _ = evaluated(world, virtual_time, monkeypatch, 0.0, 0.0, told=epochs_of(first), **EPOCHS)
    assert again.ttt_epochs == first.ttt_epochs and torch.equal(again.nll_nats, first.nll_nats)


def test_the_main_rank_decides_for_all():
    run = Alone()
    run.rank, run.broadcast = 1, lambda make: 2
    pace = Pace(5, run, n_chunks=9, seconds=1e9)
    with pace.chunk() as epochs:
        assert epochs == 2


def test_what_the_mixture_mixes_is_scored_on_its_way(world):
    config, model, tokenizer, stream = world
    alone = {
        stage: score(predictor_of(stage, world), stream, config.ttt_chunk_tokens, Alone()) for stage in ("ttt", "mixed")
    }
    for stages in (("ttt", "mixed"), ("mixed", "ttt")):
        c = dataclasses.replace(config, stages=stages)
        found = train_gpt.evaluate(model, random_maxent(c).float(), c, Alone(), tokenizer, stream)
        assert list(found) == list(stages)
        for stage, result in found.items():
            assert torch.equal(result.nll_nats, alone[stage].nll_nats)
            assert result.max_sum_error == alone[stage].max_sum_error


def test_stages_share_a_pass_only_where_the_mixture_comes_next():
    assert train_gpt.passes(STAGES) == [("roundtrip",), ("sliding",), ("ttt", "mixed")]
    assert train_gpt.passes(("ttt", "sliding", "mixed")) == [("ttt",), ("sliding",), ("mixed",)]
    assert train_gpt.passes(("mixed", "ttt")) == [("mixed",), ("ttt",)]
    assert train_gpt.passes(("mixed",)) == [("mixed",)] and train_gpt.passes(("ttt",)) == [("ttt",)]


def test_a_part_of_the_rows_is_that_part_of_the_whole(world):
    config, _, _, stream = world
    for stage in STAGES:
        predictor = predictor_of(stage, world)
        chunk = next(iter(stream.chunks(200)))
        whole = predictor.predict(chunk.inputs, slice(0, 200))
        for part in (slice(0, 64), slice(64, 133), slice(199, 200), slice(50, 50)):
            torch.testing.assert_close(predictor.predict(chunk.inputs, part), whole[part], atol=1e-5, rtol=1e-5)
