"""Mixing: the scan of fixed-share Hedge against its loop, its regret, and its blindness to the future."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import FixedShareHedge

CPU = torch.device("cpu")


def loop(weights, logp, share):
    """Fixed share as Herbster and Warmuth write it: grow, normalize, share; one token at a time in Python floats."""
    along = [list(weights)]
    for row in logp.tolist():
        grown = [w * math.exp(x) for w, x in zip(along[-1], row, strict=True)]
        total = sum(grown)
        along.append([(1 - share) * g / total + share / len(grown) for g in grown])
    return torch.tensor(along, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 70),
    experts=st.integers(1, 6),
    share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_scan_equals_the_loop(n, experts, share, seed):
    logp = -8 * torch.rand(n, experts, generator=torch.Generator().manual_seed(seed))
    mixer = FixedShareHedge(experts, share, CPU)
    torch.testing.assert_close(
        mixer.weights_along(logp), loop(mixer.weights, logp.double(), share), atol=1e-9, rtol=1e-6
    )


def test_chunks_continue_where_the_last_one_ended():
    logp = -5 * torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    mixer = FixedShareHedge(4, 0.02, CPU)
    whole = mixer.weights_along(logp)
    for start in range(0, 100, 30):
        part = logp[start : start + 30]
        torch.testing.assert_close(mixer.weights_along(part), whole[start : start + len(part) + 1])
        mixer.update(part)


def test_weights_before_a_token_do_not_depend_on_it_or_later_ones():
    logp = -5 * torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    mixer = FixedShareHedge(3, 0.02, CPU)
    before = mixer.weights_along(logp)
    for j in (0, 1, 31, 63):
        changed = logp.clone()
        changed[j:] = -5 * torch.rand(64 - j, 3)
        assert torch.equal(mixer.weights_along(changed)[: j + 1], before[: j + 1])


def test_regret_without_share_is_at_most_log_of_the_number_of_experts():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logp = (torch.rand(300, 5, generator=generator) * 0.98 + 0.01).log().double()
        mixer = FixedShareHedge(5, 0.0, CPU)
        mixed = (mixer.weights_along(logp)[:-1].log() + logp).logsumexp(1)
        assert -mixed.sum() <= (-logp.sum(0)).min() + math.log(5) + 1e-9


def test_share_follows_a_change_of_the_best_expert():
    good, bad = math.log(0.9), math.log(0.1)
    logp = torch.tensor(([[good, bad]] * 20 + [[bad, good]] * 20) * 25)
    losses = {}
    for share in (1e-9, 0.02):
        weights = FixedShareHedge(2, share, CPU).weights_along(logp)[:-1]
        losses[share] = -(weights.log() + logp).logsumexp(1).sum().item()
    assert losses[0.02] < 0.8 * losses[1e-9]


def test_a_surprising_token_does_not_silence_an_expert_for_good():
    logp = torch.tensor([[-1000.0, -1.0]] + [[-0.1, -3.0]] * 50)
    weights = FixedShareHedge(2, 0.02, CPU).weights_along(logp)
    assert torch.isfinite(weights).all() and weights[-1, 0] > 0.9
