"""Training: the schedule, the loss weights, what stands in for the weights, and why CROWN-Q has no part in it."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from conftest import Alone, build, random_tokens, stored
from train_gpt import GPT, Config, Optimizers, TrainLoader, WeightAverages, dequantize, schedule, with_weights

STEPS = Config(iterations=1000, warmdown_iters=400, lr_warmup_iters=10)


def test_schedule_rises_holds_and_falls_to_nothing():
    scales = [schedule(step, 0.0, 0.0, STEPS).lr_scale for step in range(1000)]
    assert scales[0] == pytest.approx(0.1) and scales[9] == 1.0
    assert all(scale == 1.0 for scale in scales[9:601])
    falling = scales[600:]
    assert all(a > b for a, b in zip(falling, falling[1:], strict=False))
    assert scales[-1] == pytest.approx(1 / 400)


def test_schedule_by_the_clock_is_the_schedule_of_the_steps_that_fit():
    """A run of 1000 steps that the clock ends and one that ITERATIONS ends are scheduled alike."""
    by_clock = dataclasses.replace(STEPS, iterations=10**6)
    for step in range(1, 1000):
        assert schedule(step, 0.5 * step, 500.0, by_clock).lr_scale == pytest.approx(
            schedule(step, 0.0, 0.0, STEPS).lr_scale
        )


def test_swa_collects_late_in_the_warmdown_only():
    """Not while the learning rate warms up, when its scale is low too."""
    phases = [schedule(step, 0.0, 0.0, STEPS) for step in range(1000)]
    assert [p.collect_swa for p in phases] == [step > 920 for step in range(1000)]
    default = [schedule(step, 0.083 * step, 600.0, Config()) for step in range(7000)]
    assert default[0].lr_scale < 0.2 and not default[0].collect_swa and default[-1].collect_swa


def test_lengths_are_taken_as_given_unless_the_clock_shortens_the_run():
    long = dataclasses.replace(STEPS, warmdown_iters=850, muon_momentum_warmup_steps=900)
    phases = [schedule(step, 0.0, 0.0, long) for step in range(1000)]
    assert phases[150].lr_scale == 1.0 and phases[151].lr_scale == pytest.approx(849 / 850)
    assert phases[899].muon_momentum < long.muon_momentum == phases[900].muon_momentum


def test_a_slow_machine_still_gets_every_phase():
    """Defaults on a machine that makes 40 steps in the time: warm-ups and warmdown shrink to their share of the run."""
    phases = [schedule(step, 15.0 * step, 600.0, Config()) for step in range(40)]
    assert max(p.lr_scale for p in phases) == 1.0
    assert phases[-1].lr_scale < 0.1 and phases[-1].collect_swa
    assert phases[-1].muon_momentum == pytest.approx(Config().muon_momentum)


def test_complement_weights_are_the_formula_on_counted_bigrams(tiny_config):
    config = tiny_config(complement_alpha=0.5, complement_tokens=2000)
    loader = TrainLoader(config, Alone())
    weights = train_gpt.complement_weights(loader, config, torch.device("cpu"))
    tokens = loader.head(2000)
    pairs, firsts = {}, {}
    for x, y in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        pairs[x, y] = pairs.get((x, y), 0) + 1
        firsts[x] = firsts.get(x, 0) + 1
    expected = torch.ones(config.vocab_size, config.vocab_size)
    for (x, y), count in pairs.items():
        expected[x, y] = max(0.1, 1 - 0.5 * count / (firsts[x] + 1))
    torch.testing.assert_close(weights, expected)
    assert train_gpt.complement_weights(loader, dataclasses.replace(config, complement_alpha=0.0), "cpu") is None


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny_config):
    config = tiny_config()
    batch = TrainLoader(config, Alone()).batch(0)
    gradients = []
    for micro_batch_tokens in (config.train_batch_tokens, config.train_seq_len):
        model = GPT(config).init_weights(config)
        c = dataclasses.replace(config, micro_batch_tokens=micro_batch_tokens)
        nats = train_gpt.accumulate_gradients(model, batch, None, c)
        gradients.append([p.grad for p in model.parameters()])
        expected = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        torch.testing.assert_close(nats, expected.detach(), rtol=1e-5, atol=0)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_weights_are_replaced_inside_and_restored_outside_even_after_an_error(tiny_config):
    config = tiny_config()
    model = GPT(config).init_weights(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantized = stored(model)
    with pytest.raises(KeyError), with_weights(model, quantized):
        for name, p in train_gpt.quantized_parameters(model).items():
            assert torch.equal(p, dequantize(*quantized[name]))
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_replaced_weights_act_on_a_compiled_model(tiny_config):
    """Published late QAT was a flag that the compiler folded away; here the graph reads what is in the parameters."""
    config = tiny_config()
    model = build(config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    tokens = random_tokens(config)
    plain = compiled(tokens)
    with with_weights(model, stored(model, fineness=2.0)):  # coarse, so that rounding shows
        replaced = compiled(tokens)
        torch.testing.assert_close(replaced, model(tokens), atol=1e-5, rtol=1e-5)
    assert (replaced - plain).abs().max() > 1e-2
    torch.testing.assert_close(compiled(tokens), plain)


def test_warm_up_leaves_no_trace(tiny_config):
    config = tiny_config(warmup_steps=2)
    model = GPT(config).init_weights(config)
    before = [p.detach().clone() for p in model.parameters()]
    optimizers = Optimizers(model, config, Alone())
    state = optimizers.state()
    with train_gpt.state_restored(model, optimizers):
        train_gpt.warm_up(model, optimizers, config, Alone())
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.numel())
    after = optimizers.state()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state["momenta"], after["momenta"], strict=True))
    assert after["adam"]["state"] == state["adam"]["state"] == {}


def trained(config, clock, monkeypatch, step_seconds, rehearsed, real):
    """The record of a run whose steps and whose conclusion take so long; the conclusion is rehearsed once."""
    took, run = iter([rehearsed, real]), Alone()

    def conclude(averages, path):
        concluded.append(path)
        seconds = next(took)
        clock.now += seconds
        return dict(pack=seconds)

    concluded = []
    monkeypatch.setattr(train_gpt, "accumulate_gradients", clock.costs(train_gpt.accumulate_gradients, step_seconds))
    model = GPT(config).init_weights(config)
    record = train_gpt.train(model, conclude, "kept", config, run, None)
    assert concluded == [None, "kept"]
    return record


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_training_leaves_the_time_that_its_conclusion_takes(tiny_config, virtual_time, monkeypatch, slowdown):
    """Also where steps get slower on the way, and where the conclusion is slower than its rehearsal was."""
    config = tiny_config(iterations=10**6, max_wallclock_seconds=100.0, warmup_steps=0)
    began = virtual_time.now + 20
    record = trained(
        config, virtual_time, monkeypatch, lambda: 2.0 if virtual_time.now - began < 40 else 2.0 * slowdown, 20.0, 25.0
    )
    seconds = record["seconds"]
    assert seconds["reserve"] == seconds["pack"] == 25.0
    assert seconds["total"] == seconds["steps"] + 25.0 <= 100.0
    assert seconds["total"] > 100.0 - 4 * 2.0 * slowdown  # and no more than that


def test_a_run_without_a_cap_rehearses_nothing(tiny_config, virtual_time):
    calls = []

    def conclude(averages, path):
        calls.append(path)
        return {}

    config = tiny_config(iterations=3, warmup_steps=0)
    record = train_gpt.train(GPT(config).init_weights(config), conclude, "kept", config, Alone(), None)
    assert calls == ["kept"] and record["steps"] == 3 and record["seconds"]["reserve"] == 0.0


def test_a_cap_that_leaves_no_step_is_refused_before_training(tiny_config, virtual_time, monkeypatch):
    config = tiny_config(max_wallclock_seconds=100.0, warmup_steps=0)
    with pytest.raises(train_gpt.InputError, match="MAX_WALLCLOCK_SECONDS=100.0: .* 112.5 s"):
        trained(config, virtual_time, monkeypatch, 1.0, 90.0, 90.0)


def test_all_that_follows_the_last_step_is_in_the_time(tiny_config, virtual_time, monkeypatch, tmp_path):
    """The real parts, slowed down: averaging, quantization, calibration, packing and writing end before the cap."""
    config = tiny_config(iterations=10**6, max_wallclock_seconds=120.0, warmup_steps=1)
    parts = dict(choose_average=4, quantize_to_size=9, calibrate=7, pack=3, write_atomically=1, accumulate_gradients=2)
    for name, seconds in parts.items():
        monkeypatch.setattr(train_gpt, name, virtual_time.costs(getattr(train_gpt, name), seconds))
    run, path = Alone(), tmp_path / "x.artifact"
    model = GPT(config).init_weights(config)
    conclude = functools.partial(train_gpt.conclude, model, config, run, "sha")
    record = train_gpt.train(model, conclude, path, config, run, None)
    seconds = record["seconds"]
    packs = seconds["reserve"] / train_gpt.RESERVE - 4 - 9 - 7  # the fit packs as often as it tries
    assert seconds["averaging"] == 4 and seconds["calibration"] == 7 and seconds["pack"] == 4
    assert seconds["quantization"] >= 9 + 3 and packs >= 6
    assert seconds["total"] == sum(seconds[part] for part in seconds if part not in ("total", "reserve"))
    assert 120 - 6 - 0.25 * seconds["reserve"] - 9 < seconds["total"] <= 120
    assert path.stat().st_size > 0 and record["steps"] > 10


def test_chosen_average_is_the_best_on_held_out_training_text(tiny_config):
    config = tiny_config(swa_every=1, swa_start_scale=1.0)
    model = GPT(config).init_weights(config)
    good = [p.detach().clone() for p in model.parameters()]
    averages = WeightAverages(model, config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    averages.swa_count, averages.swa = 1, [p.detach().clone() for p in model.parameters()]
    averages.ema = good  # the only candidate that was not spoiled
    lines = []
    run = Alone()
    run.log = lines.append
    train_gpt.choose_average(model, model, averages, TrainLoader(config, run), config, run)
    assert "chosen:ema " in lines[0] + " "
    assert all(torch.equal(a, b) for a, b in zip(good, model.parameters(), strict=True))


def published_crown_q(model, clip=31, lam=0.01):
    """lambda * mean(w^2) * delta^2 / 12 over the matrices, delta = row max / clip, detached (PR #693)."""
    penalty = 0.0
    for name, p in model.named_parameters():
        if train_gpt.is_block_matrix(name, p):
            delta = p.detach().abs().amax(1, keepdim=True) / clip
            penalty = penalty + lam * (p.square() * delta.square()).mean() / 12
    return penalty


def test_published_crown_q_has_no_gradient_to_speak_of(tiny_config):
    """Per weight it is under a ten-thousandth of the loss's, which is why there is no such setting here."""
    config = tiny_config(model_dim=64)
    model = GPT(config).init_weights(config)
    loader, optimizers = TrainLoader(config, Alone()), Optimizers(model, config, Alone())
    for step in range(10):
        train_gpt.accumulate_gradients(model, loader.batch(step), None, config)
        optimizers.step(1.0, 0.9)
    matrices = [p for name, p in model.named_parameters() if train_gpt.is_block_matrix(name, p)]

    def rms(gradients):
        return torch.cat([g.flatten() for g in gradients]).square().mean().sqrt().item()

    model.zero_grad()
    train_gpt.accumulate_gradients(model, loader.batch(10), None, config)
    published = torch.autograd.grad(published_crown_q(model), matrices)
    assert rms(published) < 1e-4 * rms([p.grad for p in matrices])
