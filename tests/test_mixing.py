"""Mixing: the tilt against Python floats over the whole vocabulary, and its gradient against autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import BOS_ID, Alone
from test_experts import PositionLists
from train_gpt import Case, ContextIndex, Evidence, Fitter, Maxent, OneTokenTilt

VOCAB_SIZE = 320


def random_maxent(config, seed=0):
    """A mixer with every weight random, in float64."""
    mixer, generator = Maxent(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return mixer


def random_rows(n, seed=0):
    logits = 3 * torch.randn(n, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.log_softmax(-1)


def slow_bias(mixer, logp, row_of_counts, token):
    """The network's formula for one token, in Python floats."""
    n_orders, features = len(next(iter(row_of_counts.values()))[0]), []
    totals = [[sum(c[i][k] for c in row_of_counts.values()) for k in range(n_orders)] for i in range(2)]
    here, before = row_of_counts[token]
    count = [[a + b for a, b in zip(here, before, strict=True)], here]
    total = [[a + b for a, b in zip(*totals, strict=True)], totals[0]]
    features += [c / (t + 0.5) for i in range(2) for c, t in zip(count[i], total[i], strict=True)]
    features += [0.5 * math.log(1 + c) for i in range(2) for c in count[i]]
    features += [float(t > 0) for i in range(2) for t in total[i]]
    features += [0.25 * logp[token]]
    hidden = []
    for weights, bias in zip(mixer.hidden.weight.tolist(), mixer.hidden.bias.tolist(), strict=True):
        x = sum(w * f for w, f in zip(weights, features, strict=True)) + bias
        hidden.append(0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    out = sum(w * h for w, h in zip(mixer.out.weight[0].tolist(), hidden, strict=True)) + mixer.out.bias.item()
    return min(max(out, mixer.LIMITS[0]), mixer.LIMITS[1])


@settings(max_examples=15)
@given(
    tokens=st.lists(st.sampled_from([BOS_ID, 4, 5, 6, 7]), min_size=2, max_size=40),
    size=st.integers(1, 30),
    orders=st.sampled_from([(1,), (1, 2, 5), (1, 2, 3, 4, 8)]),
)
def test_maxent_rows_equal_the_formula_over_the_whole_vocabulary(tiny_config, tokens, size, orders):
    config = tiny_config(ngram_orders=orders, ngram_table_bits=22)
    mixer, index, slow = random_maxent(config), ContextIndex(config, torch.device("cpu")), PositionLists(config)
    for start in range(0, len(tokens) - 1, size):
        chunk = torch.tensor(tokens[start : start + size + 1])
        n = len(chunk) - 1
        logp = random_rows(n, seed=start)
        case = Case.of(logp, index.evidence(chunk[:-1], slice(0, n)))
        mixed = case.tilted(logp, mixer.bias(case))
        for t in range(n):
            counts, row = slow.see(chunk[t].item()), logp[t].tolist()
            weights = [math.exp(x) for x in row]
            for token in counts:
                weights[token] *= math.exp(slow_bias(mixer, row, counts, token))
            expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
            torch.testing.assert_close(mixed[t].exp(), expected, atol=1e-9, rtol=1e-9)
        index.update(chunk)


@pytest.fixture
def world(tiny_config):
    """(config, rows [n, V], case, targets) in float64 on a stream with repeats."""
    config = tiny_config(ngram_table_bits=20)
    tokens = (torch.rand(901, generator=torch.Generator().manual_seed(3)) ** 3 * 30).long() + 4
    index = ContextIndex(config, torch.device("cpu"))
    index.update(tokens[:601])
    logp = random_rows(300)
    return config, logp, Case.of(logp, index.evidence(tokens[600:900], slice(0, 300))), tokens[601:901]


def test_rows_are_distributions_and_untouched_tokens_keep_their_ratios(world):
    config, logp, case, _ = world
    mixed = case.tilted(logp, random_maxent(config).bias(case))
    assert (mixed.exp().sum(1) - 1).abs().max() < 1e-12
    touched = torch.zeros_like(logp, dtype=torch.bool)
    touched[case.evidence.row, case.evidence.token] = True
    shift = mixed - logp
    for t in range(0, 300, 7):
        assert shift[t][~touched[t]].std() < 1e-12
    assert touched.any(1).all() and not touched.all(1).any()


def test_float32_rows_sum_to_one(world):
    config, logp, case, _ = world
    logp = logp.float()
    case = Case.of(logp, case.evidence)
    mixed = case.tilted(logp, random_maxent(config).float().bias(case))
    assert (mixed.double().exp().sum(1) - 1).abs().max() < 1e-5


def test_the_sparse_partition_is_the_dense_sum(world):
    config, logp, case, _ = world
    bias = random_maxent(config).bias(case)
    dense = logp.exp().index_put((case.evidence.row, case.evidence.token), (case.logp + bias).exp()).sum(1)
    torch.testing.assert_close(case.partition(bias), dense, atol=1e-12, rtol=1e-12)


def test_rows_stay_distributions_where_a_sure_token_is_pushed_down(world):
    """The worst case for the sparse sum in float32: almost all mass on one token, at the lowest bias."""
    config, _, case, _ = world
    e = case.evidence
    first = torch.searchsorted(e.row, torch.arange(300))
    logits = torch.randn(300, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    logits[torch.arange(300), e.token[first]] += torch.linspace(5, 30, 300)
    logp = logits.log_softmax(-1)
    case = Case.of(logp, e)
    mixed = case.tilted(logp, torch.full_like(case.logp, Maxent.LIMITS[0]))
    assert (mixed.double().exp().sum(1) - 1).abs().max() < 1e-5


def test_the_gradient_is_that_of_the_dense_loss(world):
    config, logp, case, targets = world
    mixer = random_maxent(config)
    loss = -case.tilted(logp, mixer.bias(case)).gather(1, targets.unsqueeze(1)).mean()
    expected = torch.autograd.grad(loss, list(mixer.parameters()))
    bias = mixer.bias(case)
    bias.backward(case.excess(bias.detach(), targets) / len(targets))
    for p, gradient in zip(mixer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-12, rtol=1e-9)


def test_a_new_mixer_leaves_the_neural_rows_alone(world):
    config, logp, case, _ = world
    torch.testing.assert_close(case.tilted(logp, Maxent(config).double().bias(case)), logp, atol=1e-12, rtol=0)


def test_fitting_lowers_the_loss(world):
    config, logp, case, targets = world
    mixer = Maxent(config).double()
    fitter = Fitter(mixer, 0.01, Alone())

    def loss():
        with torch.no_grad():
            return -case.tilted(logp, mixer.bias(case)).gather(1, targets.unsqueeze(1)).mean().item()

    before = loss()
    for _ in range(60):
        fitter.step(case, mixer.bias(case), targets, len(targets))
    assert loss() < before - 0.1


def test_the_bias_of_an_entry_is_the_same_bits_whatever_follows(world, monkeypatch):
    """Also where the entries of a row lie across two blocks, and where the last block is shorter."""
    config, logp, case, _ = world
    monkeypatch.setattr(Maxent, "BLOCK", 64)
    mixer, e = random_maxent(config), case.evidence
    whole = mixer.bias(case)
    for rows in (1, 17, 299):
        n = int((e.row < rows).sum())
        part = Evidence(e.row[:n], e.token[:n], e.counts[:n], e.totals[:rows])
        assert torch.equal(mixer.bias(Case.of(logp[:rows], part)), whole[:n])


@pytest.mark.parametrize("rows", [0, 300])
def test_no_evidence_means_the_neural_rows(world, rows):
    """Also for a rank that has no rows of a chunk: it takes part in the step with a gradient of zero."""
    config, logp, case, targets = world
    e, logp, targets = case.evidence, logp[:rows], targets[:rows]
    case = Case.of(logp, Evidence(e.row[:0], e.token[:0], e.counts[:0], torch.zeros_like(e.totals[:rows])))
    mixer = random_maxent(config)
    torch.testing.assert_close(case.tilted(logp, mixer.bias(case)), logp, atol=1e-12, rtol=0)
    before = [p.detach().clone() for p in mixer.parameters()]
    Fitter(mixer, 0.1, Alone()).step(case, mixer.bias(case), targets, 300)
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True))


@pytest.mark.parametrize("followers, hints", [([30, 30, 30], [30]), ([30, 30, 31], []), ([], [])])
def test_the_one_token_tilt_takes_the_token_that_order_16_agrees_on(tiny_config, followers, hints):
    """The last 16 tokens stood before with these tokens after them, and stand now at the end."""
    config, context = tiny_config(ngram_table_bits=20, ngram_orders=(1, 16)), list(range(10, 26))
    stream = torch.tensor([token for i, after in enumerate(followers) for token in (4 + i, *context, after)] + context)
    index = ContextIndex(config, torch.device("cpu"))
    logp = random_rows(1)
    case = Case.of(logp, index.evidence(stream, slice(len(stream) - 1, len(stream))))
    bias = OneTokenTilt(config).bias(case)
    assert case.evidence.token[bias > 0].tolist() == hints
    row = case.tilted(logp, bias)[0].exp()
    for hint in hints:
        p = logp[0, hint].exp().item()
        assert row[hint].item() == pytest.approx(math.exp(2.625) * p / (1 + p * (math.exp(2.625) - 1)), rel=1e-9)
    assert hints or torch.allclose(row.log(), logp[0])
