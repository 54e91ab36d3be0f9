"""Optimizers: Muon against torch's own, ranks against one, exact restore, averages against their definitions."""

import copy
import socket

import pytest
import torch
import torch.multiprocessing as mp

import train_gpt
from conftest import Alone
from train_gpt import GPT, Muon, Optimizers, Run, WeightAverages, is_embedding, zeropower


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 40, 8)])
def test_zeropower_keeps_the_singular_vectors_and_brings_values_near_one(shape):
    bank = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = zeropower(bank, 5, torch.bfloat16).double()
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6 and values.max() < 1.4
    u, _, vh = torch.linalg.svd(bank.double(), full_matrices=False)
    inside = u.mT @ out @ vh.mT  # close to diagonal if the singular vectors are the same
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 0.1


def test_zeropower_of_a_bank_is_that_of_each_matrix():
    bank = torch.randn(4, 12, 20)
    together = zeropower(bank, 5, torch.float32)
    for matrix, alone in zip(bank, together, strict=True):
        torch.testing.assert_close(zeropower(matrix.unsqueeze(0), 5, torch.float32)[0], alone)


def test_zero_gradient_gives_a_zero_update():
    assert torch.equal(zeropower(torch.zeros(2, 5, 7), 5, torch.float32), torch.zeros(2, 5, 7))


def test_muon_follows_torch_optim_muon(tiny_config):
    config = tiny_config(muon_wd=0.1, muon_momentum=0.9, muon_row_norm=False)
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (24, 16), (16, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = copy.deepcopy(ours)
    run = Alone()
    run.dtype = torch.bfloat16  # as theirs
    muon = Muon(ours, config, run)
    # Theirs averages gradients where ours sums them; orthogonalization forgets the factor.
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        grads = [arriving.wait() for arriving in muon.reduce()]
        muon.apply(muon.orthogonalize(grads, 0.9), 0.02)
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def model_with_gradients(config, seed=0):
    model = GPT(config).init_weights(config)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return model


def test_every_parameter_is_in_exactly_one_group(tiny_config):
    model = GPT(tiny_config())
    optimizers = Optimizers(model, tiny_config(), Alone())
    held = [id(p) for bank in optimizers.muon.banks for p in bank]
    held += [id(p) for group in optimizers.adam.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    tables = {id(p) for name, p in model.named_parameters() if is_embedding(name)}
    assert {id(p) for p in optimizers.adam.param_groups[0]["params"]} == tables


def test_a_step_moves_every_parameter_and_clears_its_gradient(tiny_config):
    config = tiny_config()
    model = model_with_gradients(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Optimizers(model, config, Alone()).step(1.0, 0.9)
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.numel() == 0 or not torch.equal(p, before[name]), name


def test_clipping_is_by_the_joint_norm_of_all_parameters(tiny_config):
    """AdamW's first moment after one step is (1 - beta1) times the clipped gradient."""
    config = tiny_config(grad_clip_norm=0.25)
    model = model_with_gradients(config)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    gradient = model.tok_emb.weight.grad.clone()
    optimizers = Optimizers(model, config, Alone())
    optimizers.step(1.0, 0.9)
    moment = optimizers.adam.state[model.tok_emb.weight]["exp_avg"]
    torch.testing.assert_close(moment, (1 - config.beta1) * gradient * 0.25 / norm, rtol=1e-4, atol=1e-9)


def test_restore_brings_back_the_state_exactly(tiny_config):
    config = tiny_config()
    model = model_with_gradients(config)
    optimizers = Optimizers(model, config, Alone())
    optimizers.step(1.0, 0.9)
    weights, state = [p.detach().clone() for p in model.parameters()], optimizers.state()

    def two_steps():
        for seed in (1, 2):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizers.step(0.5, 0.9)
        return [p.detach().clone() for p in model.parameters()]

    first = two_steps()
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), weights)
    optimizers.restore(state)
    assert all(torch.equal(a, b) for a, b in zip(first, two_steps(), strict=True))


def step_as_rank(rank, world_size, port, config, path):
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run = Run(config)
    model = GPT(config).init_weights(config)
    optimizers = Optimizers(model, config, run)
    for step in range(5):
        for i, p in enumerate(model.parameters()):  # the ranks' parts add up to the same whole at every world size
            whole = torch.randn((12, *p.shape), generator=torch.Generator().manual_seed(1000 * step + i))
            p.grad = whole[run.share(12)].sum(0)
        optimizers.step(1.0, 0.9)
    if rank == 0:
        torch.save([p.detach() for p in model.parameters()], path)
    run.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_three_and_eight_ranks_make_the_steps_of_one(tiny_config, tmp_path):
    """With 3 layers no bank is a multiple of 8 ranks, and with 8 some have nothing but padding."""
    config = tiny_config(num_layers=3)
    results = []
    for world_size in (1, 2, 3, 8):
        path = tmp_path / f"{world_size}.pt"
        mp.spawn(step_as_rank, (world_size, free_port(), config, path), nprocs=world_size)
        results.append(torch.load(path))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("coefficients", train_gpt.NEWTON_SCHULZ)
def test_zeropower_is_its_iteration_written_out(coefficients):
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, table = zeropower(x.unsqueeze(0), 7, torch.float64, coefficients)[0], train_gpt.NEWTON_SCHULZ[coefficients]
    x = x / (x.norm() + 1e-7)
    for i in range(7):
        a, b, c = table[i] if i < len(table) else table[-1]
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(found, x)


def test_polar_express_brings_singular_values_nearer_to_one():
    bank = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = {}
    for coefficients in train_gpt.NEWTON_SCHULZ:
        values = torch.linalg.svdvals(zeropower(bank, 5, torch.float64, coefficients))
        spread[coefficients] = (values - 1).abs().median().item()
    assert spread["polar_express"] < 0.5 * spread["jordan"]


def test_rows_are_normed_before_they_are_orthogonalized(tiny_config):
    """So that a row of tiny gradients moves as far as the others do."""
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    gradient[3] *= 1e-6
    moved = {}
    for row_norm in (False, True):
        p = torch.nn.Parameter(torch.zeros(16, 16))
        p.grad = gradient.clone()
        muon = Muon([p], tiny_config(muon_row_norm=row_norm, muon_wd=0.0), Alone())
        muon.apply(muon.orthogonalize([arriving.wait() for arriving in muon.reduce()], 0.0), 1.0)
        moved[row_norm] = p.detach()[3].norm().item() / p.detach().norm(dim=1).median().item()
    assert moved[False] < 1e-2 and moved[True] > 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(tiny_config, bad):
    """Momentum goes on from a gradient of zero, as if the batch had been empty."""
    config, moments = tiny_config(), []
    for value in (bad, 0.0):
        model = model_with_gradients(config)
        optimizers = Optimizers(model, config, Alone())
        optimizers.step(1.0, 0.9)
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizers.step(1.0, 0.9)
        moments.append([p.detach() for p in model.parameters()] + optimizers.muon.momenta)
        assert int(optimizers.skipped) == (value != 0)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_clipped_gradients_keep_their_direction_and_small_ones_all():
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([[12.0]])]
    kept = [g.clone() for g in grads]
    assert not train_gpt.clip_gradients(grads, torch.tensor(13.0), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    train_gpt.clip_gradients(grads, torch.tensor(13.0), 26.0)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    train_gpt.clip_gradients(grads, torch.tensor(13.0), 1.3)
    for a, b in zip(grads, kept, strict=True):
        torch.testing.assert_close(a, 0.1 * b)


def test_averages_are_their_definitions_in_float32(tiny_config):
    config = tiny_config(ema_decay=0.9, swa_every=2)
    model = GPT(config).init_weights(config)
    averages, seen = WeightAverages(model, config), []
    expected = model.tok_emb.weight.detach().double().clone()
    for step in range(20):
        scale = 1 - step / 20
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        averages.update(step, scale < 0.5)
        decay = min(0.9, (1 + step) / (10 + step))
        weights = model.tok_emb.weight.detach().double()
        expected = decay * expected + (1 - decay) * weights
        if scale < 0.5 and step % 2 == 0:
            seen.append(weights.clone())
    index = [name for name, _ in model.named_parameters()].index("tok_emb.weight")
    found = averages.candidates()
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(found["ema"][index].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["swa"][index].double(), mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(found["ema+swa"][index].double(), (expected + mean) / 2, atol=1e-6, rtol=0)
    assert found["ema"][index].dtype == torch.float32


def test_without_a_late_step_there_is_no_swa_candidate(tiny_config):
    model = GPT(tiny_config())
    averages = WeightAverages(model, tiny_config())
    averages.update(0, False)
    assert set(averages.candidates()) == {"last", "ema"}
