"""Optimizers: Muon against torch's own, ranks against one, exact restore, averages against their definitions."""

import copy
import io
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt
from conftest import build, on_ranks
from train_gpt import GPT, Config, Dist, Muon, Optimizers, Schedule, WeightAverages, zeropower


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


def test_polar_express_brings_values_nearer_to_one_in_as_many_iterations():
    bank = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = {name: torch.linalg.svdvals(zeropower(bank, 5, torch.float32, getattr(train_gpt, name)))
              for name in ("JORDAN", "POLAR")}  # fmt: skip
    error = {name: (x - 1).abs().max() for name, x in values.items()}
    assert error["POLAR"] < 0.15 and error["JORDAN"] > 0.25


def test_zeropower_of_a_bank_is_that_of_each_matrix():
    bank = torch.randn(4, 12, 20)
    together = zeropower(bank, 5, torch.float32)
    for matrix, alone in zip(bank, together, strict=True):
        torch.testing.assert_close(zeropower(matrix.unsqueeze(0), 5, torch.float32)[0], alone)


def test_zero_gradient_gives_a_zero_update():
    assert torch.equal(zeropower(torch.zeros(2, 5, 7), 5, torch.float32), torch.zeros(2, 5, 7))


def muon_step(muon):
    muon.reduce()
    muon.step()
    muon.apply()


def test_muon_follows_torch_optim_muon(tiny_config):
    config = tiny_config(muon_wd=0.1, muon_row_norm=False, dtype="bfloat16")  # as theirs
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (24, 16), (16, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    theirs = copy.deepcopy(ours)
    muon = Muon(ours, 0.02, 0.9, config, Dist())
    # Theirs averages gradients where ours sums them; orthogonalization forgets the factor.
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon_step(muon)
        oracle.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def draw_gradients(model, seed, dist=None):
    """Give every parameter a random gradient, of which each of several ranks has a part."""
    for i, p in enumerate(model.parameters()):
        whole = torch.randn((12, *p.shape), generator=torch.Generator().manual_seed(1000 * seed + i))
        p.grad = whole[(dist or Dist()).share(12)].sum(0)


def model_with_gradients(config):
    model = GPT(config).init_weights(config.seed)
    draw_gradients(model, 0)
    return model


def take_step(optimizers, lr_scale=1.0):
    optimizers.step(Schedule(lr_scale, 0.9))


def test_every_parameter_is_in_exactly_one_group_by_its_role(tiny_config):
    c = tiny_config(tie_embeddings=False)
    model = GPT(c)
    optimizers = Optimizers(model, c, Dist())
    muon, tables, rest = (
        [id(p) for p in group["params"]] for group in (*optimizers.muon.param_groups, *optimizers.adam.param_groups)
    )
    assert sorted(muon + tables + rest) == sorted(id(p) for p in model.parameters())
    for group, roles in ((muon, ["matrix"]), (tables, ["table"]), (rest, ["projection", "scalar"])):
        assert group == [id(p) for p in train_gpt.by_role(model, *roles).values()]
    assert sorted(id(p) for bank in optimizers.muon.banks for p in bank) == sorted(muon)
    assert all(len({p.shape for p in bank}) == 1 for bank in optimizers.muon.banks)


def test_the_schedule_sets_each_groups_rate_and_the_momentum(tiny_config):
    c = tiny_config(matrix_lr=0.1, tied_embed_lr=0.2, scalar_lr=0.4)
    optimizers = Optimizers(GPT(c), c, Dist())
    optimizers.step(Schedule(0.5, 0.7))
    groups = [*optimizers.muon.param_groups, *optimizers.adam.param_groups]
    assert [group["lr"] for group in groups] == [0.05, 0.1, 0.2]
    assert groups[0]["momentum"] == 0.7


def test_a_step_moves_every_parameter_and_clears_its_gradient(tiny_config):
    config = tiny_config()
    model = model_with_gradients(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    take_step(Optimizers(model, config, Dist()))
    for name, p in model.named_parameters():
        assert p.grad is None
        assert p.numel() == 0 or not torch.equal(p, before[name]), name


def test_a_parameter_that_no_backward_pass_reached_only_decays(tiny_config):
    config = tiny_config()
    model = build(config)
    draw_gradients(model, 0)
    rates = dict(matrix=config.matrix_lr * config.muon_wd, table=config.tied_embed_lr * config.adam_wd)
    untouched = [model.blocks[0].up.weight, model.tok_emb.weight]
    before = [p.detach().clone() for p in untouched]
    for p in untouched:
        p.grad = None
    take_step(Optimizers(model, config, Dist()))
    for p, was in zip(untouched, before, strict=True):
        torch.testing.assert_close(p.detach(), was * (1 - rates[p.role]), atol=1e-7, rtol=0)


def test_clipping_is_by_the_joint_norm_of_all_parameters(tiny_config):
    """AdamW's first moment after one step is (1 - beta1) times the clipped gradient."""
    config = tiny_config(grad_clip_norm=0.25)
    model = model_with_gradients(config)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    gradient = model.tok_emb.weight.grad.clone()
    optimizers = Optimizers(model, config, Dist())
    take_step(optimizers)
    moment = optimizers.adam.state[model.tok_emb.weight]["exp_avg"]
    torch.testing.assert_close(moment, (1 - config.beta1) * gradient * 0.25 / norm, rtol=1e-4, atol=1e-9)


def on_disk(state):
    """A state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()))


def five_steps(config, dist, restart_after=None):
    """The weights after five steps; model and optimizers may be made anew from their state_dict on the way."""
    model = GPT(config).init_weights(config.seed)
    optimizers = Optimizers(model, config, dist)
    for step in range(5):
        if step == restart_after:
            weights, *states = on_disk([x.state_dict() for x in (model, optimizers.muon, optimizers.adam)])
            take_step(optimizers)  # what happens to the old ones is nothing to the new
            model = GPT(config)
            model.load_state_dict(weights)
            optimizers = Optimizers(model, config, dist)
            for optimizer, state in zip((optimizers.muon, optimizers.adam), states, strict=True):
                optimizer.load_state_dict(state)
        draw_gradients(model, step, dist)
        take_step(optimizers, 1 - step / 10)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_new_optimizers_go_on_from_a_state_dict_bit_for_bit(tiny_config, world_size):
    config = tiny_config(muon_row_beta2=0.9)
    through, restarted = (on_ranks(world_size, lambda dist, n=n: five_steps(config, dist, n)) for n in (None, 3))
    for rank in range(world_size):
        assert all(torch.equal(a, b) for a, b in zip(through[rank], restarted[rank], strict=True))


def test_a_state_dict_holds_the_momentum_of_every_matrix(tiny_config):
    config = tiny_config()
    model = model_with_gradients(config)
    optimizers = Optimizers(model, config, Dist())
    assert optimizers.muon.state_dict()["state"] == optimizers.adam.state_dict()["state"] == {}
    take_step(optimizers)
    momenta = [slots["momentum_shard"] for slots in optimizers.muon.state_dict()["state"].values()]
    assert sum(m.numel() for m in momenta) == sum(p.numel() for p in train_gpt.by_role(model, "matrix").values())
    assert all(m.any() for m in momenta)


def step_as_rank(rank, ports, config, path):
    """Make the five steps as one of two and as one of three ranks; the last process is in the three only."""
    torch.set_num_threads(1)
    for world_size, port in ports.items():
        if rank < world_size:
            address = f"tcp://127.0.0.1:{port}"
            torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
            dist = Dist(rank, world_size)
            torch.save(five_steps(config, dist), f"{path}/{world_size}.{rank}.pt")
            dist.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_and_three_processes_make_the_steps_of_one(tiny_config, tmp_path):
    """With 4 layers some bank is no multiple of 3 ranks."""
    config = tiny_config(num_layers=4)
    alone = five_steps(config, Dist())
    ports, method = {2: free_port(), 3: free_port()}, "spawn" if torch.cuda.is_available() else "fork"  # the fast one
    mp.start_processes(step_as_rank, (ports, config, tmp_path), nprocs=3, start_method=method)
    files = list(tmp_path.glob("*.pt"))
    assert len(files) == 5
    for file in files:
        for a, b in zip(alone, torch.load(file), strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


@pytest.mark.parametrize("muon_row_beta2", [0.0, 0.9])
def test_eight_ranks_make_the_steps_of_one(tiny_config, muon_row_beta2):
    """No bank is a multiple of 8 ranks, and some ranks have nothing but padding."""
    config = tiny_config(num_layers=3, muon_row_beta2=muon_row_beta2)
    alone = five_steps(config, Dist())
    for rank in on_ranks(8, lambda dist: five_steps(config, dist)):
        for a, b in zip(alone, rank, strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_zeropower_is_its_iteration_written_out(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = zeropower(x.unsqueeze(0), 7, torch.float64)[0]
    x = x / (x.norm() + 1e-7)
    for _ in range(7):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    torch.testing.assert_close(found, x)


def test_rows_are_normed_before_they_are_orthogonalized(tiny_config):
    """So that a row of tiny gradients moves as far as the others do."""
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    gradient[3] *= 1e-6
    moved = {}
    for row_norm in (False, True):
        p = torch.nn.Parameter(torch.zeros(16, 16))
        p.grad = gradient.clone()
        muon_step(Muon([p], 1.0, 0.0, tiny_config(muon_row_norm=row_norm, muon_wd=0.0), Dist()))
        moved[row_norm] = p.detach()[3].norm().item() / p.detach().norm(dim=1).median().item()
    assert moved[False] < 1e-2 and moved[True] > 0.5


def test_even_rows_is_the_formula_of_normuon_matrix_by_matrix():
    state, squares = {}, torch.zeros(2, 6, dtype=torch.float64)
    for step in range(4):
        bank = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(step)) * torch.tensor([1, 9])[:, None, None]
        found = train_gpt.even_rows(bank, state, 0.9)
        for i, matrix in enumerate(bank.double()):
            squares[i] = 0.9 * squares[i] + 0.1 * (matrix**2).sum(1) / 4
            even = matrix / squares[i, :, None].sqrt()
            torch.testing.assert_close(found[i].double(), even * matrix.norm() / even.norm(), atol=1e-5, rtol=1e-4)


def test_even_rows_keeps_zeros_and_the_type():
    bank = torch.randn(2, 5, 4).bfloat16()
    bank[0, 2], bank[1] = 0, 0
    found = train_gpt.even_rows(bank, {}, 0.9)
    assert found.dtype == bank.dtype and found.isfinite().all() and not found[0, 2].any() and not found[1].any()


def test_rows_are_evened_out_after_they_are_orthogonalized(tiny_config):
    for beta2, even in ((0.0, False), (0.9, True)):
        p = torch.nn.Parameter(torch.zeros(20, 12))
        p.grad = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
        muon_step(Muon([p], 1.0, 0.0, tiny_config(muon_row_beta2=beta2, muon_wd=0.0), Dist()))
        norms = p.detach().norm(dim=1)
        assert ((norms.max() / norms.min()).item() < 1.01) == even


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["blocks.0.up.weight", "tok_emb.weight"])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(tiny_config, bad, where):
    """Momentum goes on from a gradient of zero, as if the batch had been empty."""
    config, found = tiny_config(), []
    for value in (bad, None):
        model = model_with_gradients(config)
        optimizers = Optimizers(model, config, Dist())
        take_step(optimizers)
        if value is not None:
            draw_gradients(model, 1)
            dict(model.named_parameters())[where].grad.flatten()[3] = value
        take_step(optimizers)
        states = [*optimizers.muon.state.values(), *optimizers.adam.state.values()]
        moments = [x for slots in states for x in slots.values()]
        found.append([*model.parameters(), *moments])
        assert int(optimizers.skipped) == (value is not None)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(*found, strict=True))


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
    model = GPT(config).init_weights(config.seed)
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


@pytest.mark.slow
def test_all_ranks_of_the_competition_send_the_same_messages_in_the_same_order():
    """NCCL would wait for ever. The shapes are real, the tensors and the group of eight are fake."""
    sent = []

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function.namespace == "c10d":
                tensors = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
                sent[-1].append((function._schema.name, *((x.dtype, *x.shape) for x in tensors)))
            return function(*arguments, **(options or {}))

    for rank in range(8):
        torch.distributed.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            sent.append([])
            c, dist = Config(dtype="bfloat16"), Dist(rank, 8)
            with FakeTensorMode(allow_non_fake_inputs=True), Collectives():
                model = GPT(c, torch.bfloat16)
                optimizers = Optimizers(model, c, dist)
                for p in model.parameters():
                    p.grad = torch.empty_like(p)
                optimizers.step(Schedule(1.0, 0.95))
        finally:
            torch.distributed.destroy_process_group()
    names = [name.removeprefix("c10d::").strip("_") for name, *_ in sent[0]]
    assert all(messages == sent[0] for messages in sent)
    assert len(names) == 10, names
