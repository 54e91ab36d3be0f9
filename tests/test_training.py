"""Training: the schedule, the loss with its three additions, what stands in for the weights, and the deadline."""

import contextlib
import copy
import dataclasses
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import train_gpt
from conftest import build, on_ranks, random_tokens
from train_gpt import (
    GPT,
    Config,
    Dist,
    InputError,
    Optimizers,
    TrainLoader,
    WeightAverages,
    crown_q_penalty,
    schedule,
)

STEPS = Config(iterations=1000, warmdown_iters=400, lr_warmup_iters=10, late_qat_threshold=0.25, crown_q_lambda=1.0)


def test_schedule_rises_holds_and_falls_to_nothing():
    scales = [schedule(step, 1000, STEPS).lr_scale for step in range(1000)]
    assert scales[0] == pytest.approx(0.1) and scales[9] == 1.0
    assert all(scale == 1.0 for scale in scales[9:601])
    falling = scales[600:]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
    assert scales[-1] == pytest.approx(1 / 400)


def test_a_floor_holds_the_rates_and_moves_nothing_else():
    floored = dataclasses.replace(STEPS, min_lr=0.25)
    for step in range(1000):
        free, held = schedule(step, 1000, STEPS), schedule(step, 1000, floored)
        assert held == free._replace(lr_scale=max(free.lr_scale, 0.25) if step > 9 else free.lr_scale)


def test_layers_are_looped_from_their_part_of_the_run_on():
    looping = dataclasses.replace(STEPS, num_loops=1, enable_looping_at=0.35)
    assert [schedule(step, 1000, looping).looped for step in range(1000)] == [step >= 350 for step in range(1000)]
    assert not any(schedule(step, 1000, STEPS).looped for step in range(1000))


def test_each_part_of_the_warmdown_begins_where_its_setting_says():
    phases = [schedule(step, 1000, STEPS) for step in range(1000)]
    assert [p.crown_q for p in phases] == [step > 600 for step in range(1000)]
    assert [p.late_qat for p in phases] == [step > 900 for step in range(1000)]
    assert [p.swa for p in phases] == [step > 920 for step in range(1000)]
    off = dataclasses.replace(STEPS, crown_q_lambda=0.0, late_qat_threshold=0.0)
    assert not any(p.crown_q or p.late_qat for p in (schedule(step, 1000, off) for step in range(1000)))


def test_lengths_are_taken_as_given_unless_the_clock_shortens_the_run():
    long = dataclasses.replace(STEPS, warmdown_iters=850, muon_momentum_warmup_steps=900)
    phases = [schedule(step, 1000, long) for step in range(1000)]
    assert phases[150].lr_scale == 1.0 and phases[151].lr_scale == pytest.approx(849 / 850)
    assert phases[899].muon_momentum < long.muon_momentum == phases[900].muon_momentum


def test_a_run_that_the_clock_ends_is_scheduled_like_one_that_iterations_ends():
    """As long as its warm-ups and its warmdown fit into their shares of the steps."""
    by_clock, by_steps = (
        dataclasses.replace(STEPS, iterations=n, muon_momentum_warmup_steps=200) for n in (9999, 1000)
    )
    for step in range(1000):
        assert schedule(step, 1000, by_clock) == schedule(step, 1000, by_steps)


def test_a_slow_machine_still_gets_every_phase():
    """The defaults where 40 steps fit into the time."""
    c = Config()
    phases = [schedule(step, 40, c) for step in range(40)]
    assert max(p.lr_scale for p in phases) == 1.0
    assert phases[-1].lr_scale < 0.1 and phases[-1].swa
    assert phases[-1].crown_q == (c.crown_q_lambda > 0) and phases[-1].late_qat == (c.late_qat_threshold > 0)
    assert phases[-1].muon_momentum == pytest.approx(c.muon_momentum)


@given(
    total=st.integers(1, 300),
    iterations=st.integers(1, 300),
    warmup=st.integers(0, 400),
    warmdown=st.integers(0, 400),
    momentum_warmup=st.integers(0, 400),
)
def test_every_schedule_stays_in_its_bounds_and_starts_a_late_part_once(
    total, iterations, warmup, warmdown, momentum_warmup
):
    c = Config(
        iterations=iterations,
        lr_warmup_iters=warmup,
        warmdown_iters=warmdown,
        muon_momentum_warmup_steps=momentum_warmup,
        crown_q_lambda=1.0,
    )
    phases = [schedule(step, total, c) for step in range(min(total, iterations))]
    for p in phases:
        assert 0 < p.lr_scale <= 1
        assert c.muon_momentum_warmup_start <= p.muon_momentum <= c.muon_momentum
    for before, after in zip(phases, phases[1:], strict=False):
        assert before.muon_momentum <= after.muon_momentum
        for name in ("crown_q", "late_qat", "swa"):
            assert getattr(before, name) <= getattr(after, name)


def test_complement_weights_are_the_formula_on_counted_bigrams(tiny_config):
    config = tiny_config(complement_alpha=0.5, complement_tokens=2000)
    loader = TrainLoader(config, Dist())
    weights = train_gpt.complement_weights(loader, config)
    tokens = loader.shards[0][:2000]
    pairs, firsts = {}, {}
    for x, y in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        pairs[x, y] = pairs.get((x, y), 0) + 1
        firsts[x] = firsts.get(x, 0) + 1
    expected = torch.ones(config.vocab_size, config.vocab_size)
    for (x, y), count in pairs.items():
        expected[x, y] = max(0.1, 1 - 0.5 * count / (firsts[x] + 1))
    torch.testing.assert_close(weights, expected)
    assert train_gpt.complement_weights(loader, dataclasses.replace(config, complement_alpha=0.0)) is None


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_config, weighted):
    config = tiny_config()
    batch, gradients = TrainLoader(config, Dist()).batch(0), []
    weights = torch.rand(config.vocab_size, config.vocab_size) if weighted else None
    for micro_batch_tokens in (config.train_batch_tokens, config.train_seq_len):
        model = build(config)
        c = dataclasses.replace(config, micro_batch_tokens=micro_batch_tokens)
        total = train_gpt.accumulate_gradients(model, batch, weights, c)
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
        inputs, targets = batch[:, :-1], batch[:, 1:]
        nll = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        torch.testing.assert_close(total, nll.detach().sum(), rtol=1e-5, atol=0)
    (nll * (weights[inputs, targets].flatten() if weighted else 1)).mean().backward()
    for a, b, p in zip(*gradients, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(b, p.grad, atol=1e-6, rtol=1e-4)


def slow_crown_q(matrices, qmax, through_delta=True):
    """The sum over rows of mean(w^2) * (row max / qmax)^2 / 12, one row at a time (PR #693)."""
    penalty = torch.zeros((), dtype=torch.float64)
    for w in matrices:
        for row in w.double():
            delta = row.abs().max() / qmax
            penalty = penalty + (row**2).mean() * (delta if through_delta else delta.detach()) ** 2 / 12
    return penalty


def published_mean_form(w, qmax):
    """PR #700: the mean over the whole matrix, the gradient not through delta."""
    delta = w.detach().abs().amax(1, keepdim=True) / qmax
    return (w.square() * delta.square()).mean() / 12


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (3, 8), (6, 5), (1, 4)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bits", [4, 6])
def test_crown_q_is_its_plain_loop_with_the_gradient_through_delta(matrices, bits):
    qmax = 2 ** (bits - 1) - 1
    found, expected = crown_q_penalty([[w] for w in matrices], bits), slow_crown_q(matrices, qmax)
    torch.testing.assert_close(found.double(), expected)
    gradients = torch.autograd.grad(found, matrices)
    for a, b in zip(gradients, torch.autograd.grad(expected, matrices), strict=True):
        torch.testing.assert_close(a, b)
    detached = torch.autograd.grad(slow_crown_q(matrices, qmax, through_delta=False), matrices)
    for w, whole, without in zip(matrices, gradients, detached, strict=True):
        through = (whole - without).abs() > 1e-3 * without.abs()  # the part through delta is at each row's largest
        assert torch.equal(through, w.abs() == w.abs().amax(1, keepdim=True))


def test_the_published_mean_form_is_the_sum_form_over_the_number_of_rows(matrices):
    """So PR #700's lambda of 0.01 is one of 0.01 / rows here, as to the value and to the gradient without delta's."""
    for w in matrices:
        lam, rows = 0.01, len(w)
        published = lam * published_mean_form(w, 15)
        torch.testing.assert_close(published, lam / rows * crown_q_penalty([[w]], 5))
        without_delta = lam / rows * slow_crown_q([w], 15, through_delta=False)
        found, expected = (torch.autograd.grad(form, w)[0] for form in (published, without_delta))
        torch.testing.assert_close(found, expected)


@pytest.fixture
def weights_by_step(monkeypatch):
    """weights_by_step(config, dist) -> all weights in one row after each step of a run."""
    update = WeightAverages.update
    monkeypatch.setattr(
        WeightAverages,
        "update",
        lambda self, *arguments: (
            self.__dict__.setdefault("seen", []).append(torch.cat([p.detach().flatten() for p in self.params])),
            update(self, *arguments),
        ),
    )

    def run(c, dist):
        model = GPT(c).init_weights(c.seed)
        return train_gpt.train(model, TrainLoader(c, dist), c, dist, None)[0].seen

    return run


BARE = dict(warmup_steps=0, complement_alpha=0.0, crown_q_lambda=0.0, late_qat_threshold=0.0)
ADDITIONS = {  # each with the first of 12 steps, of which the last 6 are the warmdown, at which it acts
    "complement": (dict(complement_alpha=0.9), 0),
    "crown_q": (dict(crown_q_lambda=1e5), 7),
    "late_qat": (dict(late_qat_threshold=0.5, clip_sigmas=4.0), 10),
}


@pytest.mark.parametrize("name", ADDITIONS)
@pytest.mark.slow
def test_an_addition_to_the_loss_acts_from_its_step_on(tiny_config, weights_by_step, name):
    settings, first = ADDITIONS[name]
    without, found = (weights_by_step(tiny_config(**BARE | extra), Dist()) for extra in ({}, settings))
    assert [torch.equal(a, b) for a, b in zip(without, found, strict=True)] == [step < first for step in range(12)]


@pytest.mark.parametrize("name", ADDITIONS)
@pytest.mark.slow
def test_an_addition_to_the_loss_acts_once_over_all_ranks(tiny_config, weights_by_step, name):
    c = tiny_config(**BARE | dict(iterations=6, warmdown_iters=4, swa_every=1) | ADDITIONS[name][0])
    bare = dataclasses.replace(c, **BARE)
    one = weights_by_step(c, Dist())[-1]
    acts = (one - weights_by_step(bare, Dist())[-1]).norm()
    for rank in on_ranks(2, lambda dist: weights_by_step(c, dist)):
        assert (rank[-1] - one).norm() < 1e-2 * acts


def test_crown_q_brings_the_rows_largest_weights_down(tiny_config):
    largest = []
    for lam in (0.0, 1e5):
        c = tiny_config(**BARE | dict(crown_q_lambda=lam))
        model = GPT(c).init_weights(c.seed)
        train_gpt.train(model, TrainLoader(c, Dist()), c, Dist(), None)
        rows = [w.abs().amax(1) / w.square().mean(1).sqrt() for w in train_gpt.by_role(model, "matrix").values()]
        largest.append(torch.cat(rows).mean())
    assert largest[1] < 0.97 * largest[0]


def test_what_begins_in_the_warmdown_is_logged_once(tiny_config, caplog):
    caplog.set_level("INFO", "train_gpt")
    c = tiny_config(late_qat_threshold=0.5, clip_sigmas=8.0, crown_q_lambda=0.25, swa_start_scale=0.4)
    train_gpt.train(GPT(c).init_weights(c.seed), TrainLoader(c, Dist()), c, Dist(), None)
    begun = [line for line in caplog.messages if line.startswith(("swa:", "crown_q:", "late_qat:"))]
    assert sorted(begun) == [
        "crown_q:start step:7",
        f"late_qat:enabled step:10 scale:0.3333 log2_step:{math.log2(8 / 31):.4f}",
        "swa:start step:10",
    ]


LOG2_STEP = -1.0  # coarse, to make rounding show


def rounded(model, c):
    """A second model with the weights that the export would store, all of them rounded to the nearest code."""
    infos = {
        name: train_gpt.HessianInfo(torch.ones(p.shape[0]), torch.ones(p.shape[1]))
        for name, p in train_gpt.quantized_parameters(model).items()
    }
    found = GPT(c)
    found.load_state_dict(model.state_dict())
    train_gpt.load_codes(found, train_gpt.quantize(model, infos, LOG2_STEP, c))
    return found


@pytest.fixture(params=[dict(), dict(tie_embeddings=False, quant_bits=4)], ids=["tied6", "untied4"])
def qat(tiny_config, request):
    """(config, model, the model as the export would round it)."""
    c = tiny_config(**request.param)
    model = build(c)
    return c, model, rounded(model, c)


def test_late_qat_runs_the_model_that_the_export_would_store(qat):
    c, model, expected = qat
    tokens, plain = random_tokens(c), model(random_tokens(c))
    with train_gpt.late_qat(model, LOG2_STEP, c):
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q), name
        assert torch.equal(model(tokens), expected(tokens))
        assert (model(tokens) - plain).abs().max() > 1e-2


def test_late_qat_puts_the_gradient_at_the_rounded_weights_on_the_float_ones(qat):
    c, model, expected = qat
    batch = random_tokens(c, batch=4, seq_len=c.train_seq_len + 1)
    with train_gpt.late_qat(model, LOG2_STEP, c):
        train_gpt.accumulate_gradients(model, batch, None, c)
    train_gpt.accumulate_gradients(expected, batch, None, c)
    float_model = build(c)
    train_gpt.accumulate_gradients(float_model, batch, None, c)
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert not torch.equal(model.tok_emb.weight.grad, float_model.tok_emb.weight.grad)


@pytest.mark.parametrize("error", [None, KeyError])
def test_late_qat_gives_the_float_weights_back_bit_for_bit(qat, error):
    c, model, _ = qat
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(error) if error else contextlib.nullcontext(), train_gpt.late_qat(model, LOG2_STEP, c):
        assert not torch.equal(model.tok_emb.weight, before["tok_emb.weight"][1])
        if error:
            raise error
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]), name


@pytest.mark.slow
def test_late_qat_acts_on_a_compiled_model_without_compiling_again(tiny_config):
    """Published late QAT was a flag that the compiler folded away; here the graph reads what is in the parameters."""
    c = tiny_config(num_layers=1, ve_layers=(0,))
    torch._dynamo.reset()
    model, counter, tokens = build(c), CompileCounterWithBackend("aot_eager"), random_tokens(c)
    expected, called = rounded(model, c), torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    plain = called(tokens, tokens)
    plain.sum().backward()
    with train_gpt.late_qat(model, LOG2_STEP, c):
        inside = called(tokens, tokens)
        inside.sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(inside, expected(tokens, tokens), atol=1e-5, rtol=1e-5)
    assert (inside - plain).abs().max() > 1e-2
    assert torch.equal(called(tokens, tokens), plain) and counter.frame_count == 1


def test_warm_up_takes_steps_and_leaves_no_trace(tiny_config, caplog):
    caplog.set_level("INFO", "train_gpt")
    c = tiny_config(warmup_steps=2)
    model = GPT(c).init_weights(c.seed)
    before, seen = copy.deepcopy(model.state_dict()), []

    def called(*arguments):
        seen.append(torch.equal(model.tok_emb.weight, before["tok_emb.weight"]))
        return model(*arguments)

    train_gpt.warm_up(model, called, c, Dist())
    assert caplog.messages == ["warmup_step:1/2", "warmup_step:2/2"]
    assert seen[0] and not seen[-1]  # the second step saw what the first had done
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_a_run_with_warm_up_is_the_run_without(tiny_config, weights_by_step):
    runs = [weights_by_step(tiny_config(iterations=2, warmup_steps=n), Dist()) for n in (0, 2)]
    assert torch.equal(runs[0][-1], runs[1][-1])


@pytest.fixture
def trained(tiny_config, virtual_time, monkeypatch):
    """trained(seconds of step i, **settings) -> the record of a run of steps that only take time."""
    monkeypatch.setattr(Optimizers, "step", lambda self, now: None)
    monkeypatch.setattr(WeightAverages, "update", lambda self, step, late: None)
    scored = {"roundtrip": SimpleNamespace(val_loss=0.0, val_bpb=0.0)}
    monkeypatch.setattr(train_gpt, "score", virtual_time.costs(lambda *arguments: scored, 50.0))

    def run(step_seconds, first=0, **settings):
        done = []

        def step(*arguments):
            virtual_time.now += step_seconds(len(done))
            done.append(virtual_time.now)
            return torch.zeros(())

        monkeypatch.setattr(train_gpt, "accumulate_gradients", step)
        capped = dict(iterations=10**6, max_wallclock_seconds=100.0, reserve_seconds=20.0, train_log_every=10**6)
        c = tiny_config(**BARE | capped | settings)
        _, clock, record = train_gpt.train(GPT(c), TrainLoader(c, Dist()), c, Dist(), None)
        steps = first + len(done)
        assert record["steps"] == steps and record["tokens"] == steps * c.train_batch_tokens
        assert record["seconds"] == clock.seconds()
        return record

    return run


PACES = {
    "even": lambda i: 0.25,
    "first slow": lambda i: 5.0 if i < 3 else 0.25,
    "slower by a tenth in the warmdown": lambda i: 0.25 if i < 200 else 0.275,
    "three times slower halfway": lambda i: 0.25 if i < 160 else 0.75,
    "ever slower": lambda i: 0.1 + 0.001 * i,
    "few and three times slower on the way": lambda i: 2.0 if i < 15 else 6.0,
    "faster": lambda i: 0.5 if i < 60 else 0.1,
}


@pytest.mark.parametrize("pace", PACES)
def test_steps_end_before_the_reserve_also_where_they_get_slower(trained, pace):
    record = trained(PACES[pace])
    slowest = PACES[pace](record["steps"])
    assert record["seconds"] <= 80.0 + 1e-6
    assert record["seconds"] > 80.0 - 2 * slowest  # and little of the time is left


def test_a_run_ends_at_iterations_where_the_time_suffices_or_has_no_cap(trained):
    assert trained(lambda i: 0.25, iterations=300)["steps"] == 300
    assert trained(lambda i: 1e6, iterations=30, max_wallclock_seconds=0.0)["steps"] == 30


def test_validation_on_the_way_takes_no_time_from_training(trained):
    for every in (0, 50):
        record = trained(lambda i: 0.25, val_loss_every=every)
        assert (record["steps"], record["seconds"]) == (320, 80.0)


def test_the_schedule_follows_the_steps_that_the_clock_allows(trained, monkeypatch):
    """The learning rate has fallen to nothing where the clock ends the run."""
    scales = []
    monkeypatch.setattr(Optimizers, "step", lambda self, now: scales.append(now.lr_scale))
    steps = trained(lambda i: 0.25 if i < 160 else 0.3, warmdown_iters=50)["steps"]
    assert len(scales) == steps and scales[:2] == [0.5, 1.0] and scales[-60] == 1.0
    assert 0 < scales[-1] <= 2 / 50 and scales[-50:] == sorted(scales[-50:], reverse=True)


def test_a_run_that_goes_on_is_scheduled_by_the_clock_from_its_first_step(trained, monkeypatch):
    scales = []
    monkeypatch.setattr(Optimizers, "step", lambda self, now: scales.append(now.lr_scale))
    monkeypatch.setattr(train_gpt, "load_checkpoint", lambda *arguments: (301, 0.0, 301 * 0.25))
    steps = trained(lambda i: 0.25, first=301, resume="stopped", warmdown_iters=50)["steps"]
    assert steps == 320 and scales == [(320 - step) / 50 for step in range(301, 320)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(tiny_config, monkeypatch, loss):
    c = tiny_config(matrix_lr=0.5)
    losses = iter([1.0, 1.0, loss])
    monkeypatch.setattr(train_gpt, "accumulate_gradients", lambda *arguments: torch.tensor(next(losses)))
    with pytest.raises(InputError, match=f"train_loss={loss} at step 3: .*MATRIX_LR=0.5"):
        train_gpt.train(GPT(c), TrainLoader(c, Dist()), dataclasses.replace(c, warmup_steps=0), Dist(), None)


def test_weights_are_replaced_inside_and_restored_outside(tiny_config):
    model = build(tiny_config())
    params, before = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError), train_gpt.weights_replaced(params, [2 * p for p in before]):
        assert all(torch.equal(p, 2 * was) for p, was in zip(params, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))


@pytest.mark.parametrize("world_size", [1, 3])
def test_held_out_loss_is_the_mean_over_the_held_out_spans(tiny_config, world_size):
    c = tiny_config()
    model, loader = build(c), TrainLoader(c, Dist())
    rows = loader.rows(range(loader.n, loader.n + loader.averaging))
    expected = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    for found in on_ranks(world_size, lambda dist: train_gpt.held_out_loss(model, TrainLoader(c, dist), c, dist)):
        assert found == pytest.approx(expected.item(), rel=1e-5)


def test_chosen_average_is_the_best_on_held_out_training_text(tiny_config, caplog):
    caplog.set_level("INFO", "train_gpt")
    c = tiny_config()
    model = GPT(c).init_weights(c.seed)
    good, averages = [p.detach().clone() for p in model.parameters()], WeightAverages(model, c)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    averages.swa_count, averages.swa = 1, [p.detach().clone() for p in model.parameters()]
    averages.ema = good  # the only candidate that was not spoiled
    train_gpt.choose_average(model, averages, TrainLoader(c, Dist()), c, Dist())
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(" chosen:ema")
    assert all(torch.equal(a, b) for a, b in zip(good, model.parameters(), strict=True))


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signalled(tiny_config, tmp_path, monkeypatch):
    """signalled(at, dist, **settings) -> the weights of a training that a SIGTERM meets in the middle of step `at`."""
    backward = train_gpt.accumulate_gradients
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train_gpt.handle_signals(train_gpt.interrupt)

    def run(at=None, dist=None, **settings):
        steps = iter(range(100))

        def step(*arguments):
            found = backward(*arguments)
            if next(steps) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        monkeypatch.setattr(train_gpt, "accumulate_gradients", step)
        c = tiny_config(warmup_steps=0, log_dir=str(tmp_path), run_id="stopped", **settings)
        model, dist = GPT(c).init_weights(c.seed), dist or Dist()
        train_gpt.train(model, TrainLoader(c, dist), c, dist, None)
        return model.state_dict()

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("loops", [{}, dict(num_loops=1, loop_start=0, loop_end=0, enable_looping_at=0.5)])
def test_a_signal_leaves_a_checkpoint_of_the_whole_step_that_it_meets(signalled, tmp_path, loops, caplog):
    caplog.set_level("INFO", "train_gpt")
    whole = signalled(**loops)
    assert ("looped:start step:6" in caplog.text) == bool(loops)
    with pytest.raises(KeyboardInterrupt) as stopped:
        signalled(at=3, checkpoint_every=10**6, **loops)
    assert stopped.value.args == (signal.SIGTERM,)
    resumed = signalled(resume=str(tmp_path / "stopped"), **loops)
    assert torch.load(tmp_path / "stopped.0.checkpoint", weights_only=True)["position"][0] == 4
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_signal_in_the_last_step_ends_the_run_too(signalled, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        signalled(at=11, checkpoint_every=10**6)
    assert torch.load(tmp_path / "stopped.0.checkpoint", weights_only=True)["position"][0] == 12


def test_without_checkpoints_a_signal_ends_a_step_at_once(signalled, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        signalled(at=3)
    assert not list(tmp_path.glob("*.checkpoint"))


def test_a_signal_to_another_rank_ends_this_one_after_the_same_step(signalled, tmp_path):
    class Second(Dist):
        """Of two ranks, of which the other one is met by a signal in the third step."""

        n_asked = 0

        def max(self, value):
            self.n_asked += isinstance(value, int)  # a number of signals; seconds are none
            return 1.0 if self.n_asked == 3 else value

    with pytest.raises(KeyboardInterrupt):
        signalled(dist=Second(), checkpoint_every=10**6)
    assert torch.load(tmp_path / "stopped.0.checkpoint", weights_only=True)["position"][0] == 3


def test_after_a_training_with_checkpoints_a_signal_ends_a_run_at_once(signalled):
    signalled(checkpoint_every=10**6)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
