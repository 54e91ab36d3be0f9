"""Mixing: every mixer against the plain formula over the whole vocabulary, Hedge against Bayes' rule and its bound."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import BOS_ID, VOCAB_SIZE, on_ranks
from serve import fingerprint
from test_ngrams import PositionLists
from train_gpt import (
    MIXERS,
    BiasNet,
    Candidates,
    Dist,
    HashChains,
    Hedge,
    InputError,
    RowBlock,
    apply_bias,
    hedge_weights,
    net_step,
    normalizer,
)

CPU = torch.device("cpu")
TOKENS = st.sampled_from([BOS_ID, 4, 5, 6, 7])
REPEATED = st.tuples(st.lists(TOKENS, min_size=2, max_size=12), st.integers(1, 4)).map(lambda x: x[0] * x[1])
STREAM = st.one_of(st.lists(TOKENS, min_size=2, max_size=40), REPEATED)


def random_net(config, seed=0):
    """Return the network of maxent with every weight random, in float64."""
    net, generator = BiasNet(config).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def random_rows(n, seed=0, sharpness=3.0, vocab_size=VOCAB_SIZE):
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(n, vocab_size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def repetitive(n, seed=3):
    """Return n tokens, some of them far more frequent than others, with a document's start here and there."""
    generator = torch.Generator().manual_seed(seed)
    tokens = (torch.rand(n, generator=generator) ** 3 * 30).long() + 4
    return tokens.masked_fill(torch.rand(n, generator=generator) < 0.02, BOS_ID)


def mixed_rows(mixer, config, tokens, logp, chunk_tokens, block_rows, dist=None):
    """Return a rank's rows of a stream in chunks and blocks, with the mixer's updates between: {row: [V]}."""
    chains, found, dist = HashChains(config, CPU), {}, dist or Dist()
    for start in range(0, len(tokens) - 1, chunk_tokens):
        chunk, blocks = tokens[start : start + chunk_tokens + 1], []
        inputs = chunk[:-1]
        for first in range(0, len(inputs), block_rows):
            rows = slice(first, min(first + block_rows, len(inputs)))
            mine = dist.share(rows.stop - rows.start, 4, rows.start)
            neural = logp[start:][mine]
            carry = blocks[-1].carry if blocks else None
            block = RowBlock(inputs, rows, mine, neural, chains.candidates(inputs, mine, neural), carry)
            found |= dict(zip(range(start + mine.start, start + mine.stop), mixer.mix(block), strict=True))
            blocks.append(block)
        mixer.learn(chunk, blocks)
        chains.update(chunk)
    return found


def stacked(rows):
    """Return the rows of all ranks in order: [N, V]."""
    return torch.stack([rows[t] for t in sorted(rows)])


# Every mixer


@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(MIXERS)),
    tokens=STREAM,
    chunk_tokens=st.integers(1, 30),
    block_rows=st.integers(1, 30),
    sharpness=st.sampled_from([0.0, 1.0, 3.0, 30.0]),
)
def test_every_mixer_gives_full_positive_normalized_rows(
    tiny_config, name, tokens, chunk_tokens, block_rows, sharpness
):
    config = tiny_config(mixer_lr=0.1)
    mixer = MIXERS[name](config, Dist(), random_net(config).float())
    logp = random_rows(len(tokens) - 1, sharpness=sharpness).float()
    rows = stacked(mixed_rows(mixer, config, torch.tensor(tokens), logp, chunk_tokens, block_rows))
    assert rows.shape == logp.shape and rows.dtype == torch.float32 and rows.isfinite().all()
    assert (rows.double().exp().sum(1) - 1).abs().max() < train_gpt.SUM_TOLERANCE


@pytest.mark.parametrize("name", sorted(MIXERS))
@pytest.mark.slow
def test_no_row_depends_on_its_target_or_on_later_inputs(name, tiny_config):
    """Change all tokens after input j: the rows up to j stay the same to the last bit."""
    config, tokens, logp = tiny_config(mixer_lr=0.1), repetitive(121), random_rows(120).float()

    def rows_of(tokens):
        mixer = MIXERS[name](config, Dist(), random_net(config).float())
        return stacked(mixed_rows(mixer, config, tokens, logp, 48, 20))

    before = rows_of(tokens)
    for j in (0, 19, 20, 30, 47, 48, 70, 118):
        after = rows_of(torch.cat([tokens[: j + 1], tokens[j + 1 :].flip(0) + 1]))
        assert torch.equal(before[: j + 1], after[: j + 1]), j
        is_fixed = name in ("neural", "flat", "tilt")  # the tilt needs 16 tokens that were there before
        assert is_fixed or j > 100 or not torch.equal(before[j + 1 :], after[j + 1 :]), j


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_mixing_is_not_learning(name, tiny_config):
    config, tokens, logp = tiny_config(mixer_lr=0.1), repetitive(65), random_rows(64).float()
    mixer, chains = MIXERS[name](config, Dist(), random_net(config).float()), HashChains(config, CPU)
    block = RowBlock(tokens[:-1], slice(0, 64), slice(0, 64), logp, chains.candidates(tokens[:-1], slice(0, 64), logp))
    before = fingerprint(mixer)
    mixer.mix(block)
    assert fingerprint(mixer) == before
    mixer.learn(tokens, [block])
    assert (name in ("unigram", "maxent", "hedge")) == (fingerprint(mixer) != before)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_give_the_rows_and_the_weights_of_one(world_size, tiny_config):
    """Hedge over all experts, also where a rank has no rows of a block."""
    config, tokens, logp = tiny_config(mixer_lr=0.1), repetitive(150), random_rows(149).float()

    def run(dist):
        hedge = Hedge(config, dist, random_net(config).float())
        return hedge, mixed_rows(hedge, config, tokens, logp, 48, 20, dist)

    (alone, expected), *_ = on_ranks(1, run)
    found, ranks = {}, on_ranks(world_size, run)
    assert set(alone.experts) == set(config.hedge_experts) and len(config.hedge_experts) == 7
    for hedge, rows in ranks:
        assert not found.keys() & rows.keys()
        found |= rows
        torch.testing.assert_close(hedge.log_w, alone.log_w, atol=1e-5, rtol=1e-5)
        assert torch.equal(hedge.log_w, ranks[0][0].log_w)
    torch.testing.assert_close(stacked(found), stacked(expected), atol=1e-6, rtol=1e-6)


# Hedge


FEW = dict(ngram_orders=(1, 2), ngram_max_chain=1)  # where experts are told their rows, no candidate counts


class Told(train_gpt.Mixer):
    """An expert with rows that somebody else has chosen: [N, V]."""

    def __init__(self, rows):
        self.rows, self.seen = rows, 0

    def mix(self, block):
        return self.rows[self.seen + block.mine.start : self.seen + block.mine.stop]

    def learn(self, tokens, blocks):
        self.seen += len(tokens) - 1


def hedge_over(rows, config, dist=None):
    """Return Hedge over experts with the rows [K, N, V]."""
    hedge = Hedge(config, dist or Dist(), BiasNet(config))
    hedge.experts = {str(k): Told(x) for k, x in enumerate(rows)}
    hedge.log_w = torch.full((len(rows),), -math.log(len(rows)), dtype=torch.float64)
    return hedge


def hedged(rows, tokens, config, chunk_tokens, block_rows):
    """Return Hedge's rows [N, V] and its weights after the stream."""
    hedge = hedge_over(rows, config)
    found = stacked(mixed_rows(hedge, config, tokens, rows[0], chunk_tokens, block_rows))
    return found, hedge.log_w.softmax(0)


def bayes(rows, tokens, eta=1.0, share=0.0):
    """Return the mixture's rows [N, V] and the weights after the stream, one token after the other."""
    w, found = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64), []
    for row, token in zip(rows.double().exp().unbind(1), tokens[1:].tolist(), strict=True):
        found.append((w @ row).log())
        w = w * row[:, token] ** eta
        w = (1 - share) * w / w.sum() + share / len(w)
    return torch.stack(found), w


def total_nll(rows, tokens):
    return -rows.double().gather(-1, tokens[1:].expand(*rows.shape[:-2], -1).unsqueeze(-1)).sum((-2, -1))


def adversarial(n_experts, n, vocab_size, sharpness, greed, seed):
    """Return rows [K, N, V] and tokens, chosen against Bayes' rule.

    Each row is nearly sure of some token. The next token is the one that costs the mixture most against the best
    expert so far, with a probability of `greed`, and else a random one.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, w, cost, tokens = [], torch.full((n_experts,), 1 / n_experts).double(), torch.zeros(n_experts).double(), [0]
    for _ in range(n):
        logits = torch.rand(n_experts, vocab_size, generator=generator)
        favourite = torch.randint(vocab_size, (n_experts,), generator=generator)
        logits[torch.arange(n_experts), favourite] += sharpness * torch.rand(n_experts, generator=generator)
        row = logits.double().log_softmax(-1).float()
        regret = -(w @ row.double().exp()).log() + row[cost.argmin()]
        greedy = torch.rand((), generator=generator) < greed
        token = int(regret.argmax()) if greedy else int(torch.randint(vocab_size, (), generator=generator))
        w, cost = w * row[:, token].double().exp(), cost - row[:, token]
        w = w / w.sum()
        rows.append(row)
        tokens.append(token)
    return torch.stack(rows, dim=1), torch.tensor(tokens)


@settings(max_examples=50)
@example(n_experts=2, n=60, vocab_size=2, sharpness=0.0, greed=1.0, chunk_tokens=7, block_rows=3, seed=0)
@given(
    n_experts=st.integers(1, 6),
    n=st.integers(1, 60),
    vocab_size=st.integers(2, 9),
    sharpness=st.sampled_from([0.0, 1.0, 10.0, 80.0]),
    greed=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_tokens=st.integers(1, 25),
    block_rows=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
@pytest.mark.slow
def test_hedge_costs_at_most_log_k_more_than_the_best_expert(
    tiny_config, n_experts, n, vocab_size, sharpness, greed, chunk_tokens, block_rows, seed
):
    """The bound of Vovk and of Bayes, to 1e-6 and the rounding of float32 rows."""
    rows, tokens = adversarial(n_experts, n, vocab_size, sharpness, greed, seed)
    found, _ = hedged(rows, tokens, tiny_config(**FEW), chunk_tokens, block_rows)
    cost, best = total_nll(found, tokens), total_nll(rows, tokens).min()
    assert cost <= best + math.log(n_experts) + 1e-6 + 2**-23 * cost


def test_an_adversary_makes_hedge_pay_log_k(tiny_config):
    """The bound above is tight: one expert of four is sure of the stream, three are sure of something else."""
    rows = torch.full((4, 9, 5), -60.0)
    tokens = torch.tensor([0, *[1, 2, 3] * 3])
    rows[0, torch.arange(9), tokens[1:]] = 0.0
    rows[1:, :, 4] = 0.0
    found, weights = hedged(rows, tokens, tiny_config(), 4, 2)
    assert total_nll(found, tokens).item() == pytest.approx(math.log(4), abs=1e-6)
    assert weights.tolist() == pytest.approx([1, 0, 0, 0])


@settings(max_examples=30)
@given(
    n_experts=st.integers(1, 5),
    n=st.integers(1, 50),
    eta=st.sampled_from([0.1, 1.0, 2.0]),
    share=st.sampled_from([0.0, 1e-6, 0.01, 0.5]),
    chunk_tokens=st.integers(1, 25),
    block_rows=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_hedge_in_blocks_is_hedge_in_one_and_bayes_rule_token_by_token(
    tiny_config, n_experts, n, eta, share, chunk_tokens, block_rows, seed
):
    config = tiny_config(hedge_eta=eta, hedge_share=share, **FEW)
    rows, tokens = adversarial(n_experts, n, 7, 5.0, 0.5, seed)
    expected, weights = bayes(rows, tokens, eta, share)
    for cut in ((chunk_tokens, block_rows), (n, n)):
        found, found_weights = hedged(rows, tokens, config, *cut)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found_weights, weights, atol=1e-9, rtol=1e-6)


GAINS = st.tuples(st.integers(1, 5), st.integers(0, 40), st.sampled_from([1.0, 20.0]), st.integers(0, 2**32 - 1))


@settings(max_examples=40)
@given(GAINS, st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([1e-4, 0.01, 0.3, 0.5]))
def test_weights_with_a_share_equal_the_plain_loop(drawn, eta, share):
    n_experts, n, size, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    gains = -size * torch.rand(n, n_experts, generator=generator, dtype=torch.float64)
    start = torch.rand(n_experts, generator=generator, dtype=torch.float64).log_softmax(0)
    w, expected = start.exp().tolist(), []
    for gain in gains.tolist():
        expected.append(w)
        grown = [x * math.exp(eta * g) for x, g in zip(w, gain, strict=True)]
        w = [(1 - share) * x / sum(grown) + share / n_experts for x in grown]
    found = hedge_weights(start, gains, eta, share)
    torch.testing.assert_close(found.exp(), torch.tensor([*expected, w]).double(), atol=1e-12, rtol=1e-6)


@settings(max_examples=30)
@given(GAINS, st.sampled_from([0.1, 1.0, 3.0]))
def test_weights_tend_to_bayes_rule_as_the_share_goes_to_zero(drawn, eta):
    n_experts, n, size, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    gains = -size * torch.rand(n, n_experts, generator=generator, dtype=torch.float64)
    start = torch.rand(n_experts, generator=generator, dtype=torch.float64).log_softmax(0)
    without = hedge_weights(start, gains, eta, 0.0)
    by_hand = torch.stack([start + eta * gains[:t].sum(0) for t in range(n + 1)])
    torch.testing.assert_close(without, by_hand, atol=1e-9, rtol=1e-9)
    errors = [
        (hedge_weights(start, gains, eta, share).softmax(1) - without.softmax(1)).abs().max().item()
        for share in (1e-3, 1e-6, 1e-9, 1e-300)
    ]
    assert errors[-1] < 1e-9 and errors[-1] <= errors[0] + 1e-12


def test_a_share_lets_an_expert_come_back(tiny_config):
    """The best expert changes in the middle: with a share the second half costs less."""
    tokens, rows = torch.ones(201, dtype=torch.int64), torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    first, second = rows[1].expand(100, 2), rows[0].expand(100, 2)
    experts = torch.stack([torch.cat([first, second]), torch.cat([second, first])])
    costs = [
        total_nll(hedged(experts, tokens, tiny_config(hedge_share=share), 30, 8)[0], tokens) for share in (0.0, 0.01)
    ]
    assert costs[1] < 0.3 * costs[0]


@pytest.mark.parametrize("experts", [(), ("hedge",), ("neural", "neural"), ("neural", "none")])
def test_experts_that_cannot_be_are_refused(experts, tiny_config):
    with pytest.raises(InputError, match="^HEDGE_EXPERTS="):
        tiny_config(hedge_experts=experts)


# N-gram experts


def plain_rows(name, config, tokens, logp):
    """Return the rows of an n-gram expert by its definition, from dictionaries, one token after the other."""
    lists, seen, found, orders = PositionLists(config), [], [], sorted(config.ngram_orders)
    for t, token in enumerate(tokens[:-1].tolist()):
        counts, p = lists.see(token), logp[t].exp().tolist()
        seen.append(token)

        def of_order(order, counts=counts):
            k = orders.index(order)
            return {token: here[k] + before[k] for token, (here, before) in counts.items() if here[k] + before[k]}

        if name == "unigram":
            p = [(seen.count(a) + 0.1) / (len(seen) + 0.1 * VOCAB_SIZE) for a in range(VOCAB_SIZE)]
        elif name in ("bigram", "trigram"):
            order, delta = dict(bigram=(1, 0.1), trigram=(2, 0.01))[name]
            followers = of_order(order)
            total = sum(followers.values()) + delta * VOCAB_SIZE
            p = [(followers.get(a, 0) + delta) / total for a in range(VOCAB_SIZE)]
        else:
            known = [order for order in orders if sum(of_order(order).values()) >= config.backoff_min_count]
            if known:
                followers, centers = of_order(known[-1]), config.backoff_centers
                center = centers[known[-1] - 1] if known[-1] <= len(centers) else centers[-1]
                entropy = -sum(x * math.log(x) for x in p)
                weight = config.backoff_base + config.backoff_range / (1 + math.exp(-2 * (entropy - center)))
                shares = {a: count / sum(followers.values()) for a, count in followers.items()}
                p = [(1 - weight) * x + weight * shares.get(a, 0.0) for a, x in enumerate(p)]
        found.append(p)
    return torch.tensor(found, dtype=torch.float64)


def assert_equals_plain(name, config, tokens, chunk_tokens, block_rows, sharpness=3.0):
    logp = random_rows(len(tokens) - 1, sharpness=sharpness).float()
    mixer = MIXERS[name](config, Dist(), None)
    found = stacked(mixed_rows(mixer, config, tokens, logp, chunk_tokens, block_rows)).double().exp()
    torch.testing.assert_close(found, plain_rows(name, config, tokens, logp.double()), atol=1e-7, rtol=2e-5)


@settings(max_examples=24)
@given(
    name=st.sampled_from(["unigram", "bigram", "trigram"]),
    tokens=STREAM,
    chunk_tokens=st.integers(1, 30),
    block_rows=st.integers(1, 30),
    max_chain=st.sampled_from([2, 16]),
)
def test_unigram_bigram_and_trigram_equal_plain_counts(tiny_config, name, tokens, chunk_tokens, block_rows, max_chain):
    config = tiny_config(ngram_orders=(1, 2, 4), ngram_max_chain=max_chain)
    assert_equals_plain(name, config, torch.tensor(tokens), chunk_tokens, block_rows)


@settings(max_examples=24)
@given(
    tokens=STREAM,
    chunk_tokens=st.integers(1, 30),
    block_rows=st.integers(1, 30),
    min_count=st.integers(1, 4),
    centers=st.sampled_from([(3.0,), (4.5, 4.2, 3.8, 3.5, 3.2, 3.0), (9.0, 1.0)]),
    sharpness=st.sampled_from([0.5, 3.0]),
)
def test_backoff_equals_a_plain_dictionary(
    tiny_config, tokens, chunk_tokens, block_rows, min_count, centers, sharpness
):
    config = tiny_config(
        ngram_orders=(1, 2, 3, 5, 8), backoff_min_count=min_count, backoff_centers=centers, backoff_base=0.2
    )
    assert_equals_plain("backoff", config, torch.tensor(tokens), chunk_tokens, block_rows, sharpness)


def test_backoff_takes_the_center_of_the_context_s_length(tiny_config):
    """Of 5 tokens here, though 5 is the fourth order in the list; the last center goes on."""
    stream, logp = torch.tensor([4, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 4]), random_rows(11).float()
    found = {}
    for centers in ("99993", "99939", "99999", "3", "9", "33339", "93"):
        config = tiny_config(
            ngram_orders=(1, 2, 3, 5, 8), backoff_centers=tuple(map(float, centers)), backoff_min_count=1
        )
        rows = mixed_rows(MIXERS["backoff"](config, Dist(), None), config, stream, logp, 11, 11)
        found[centers] = rows[10][5].exp().item()
    assert found["99993"] == found["3"] == found["93"] > found["99939"] == found["99999"] == found["9"]
    assert found["33339"] == found["9"]


@pytest.mark.parametrize("followers, hints", [([30, 30, 30], [30]), ([30, 30, 31], []), ([], [])])
def test_the_one_token_tilt_takes_the_token_that_order_16_agrees_on(tiny_config, followers, hints):
    """The last 16 tokens stood before with these tokens after them, and stand now at the end."""
    config, context = tiny_config(ngram_orders=(1, 2, 16)), list(range(10, 26))
    stream = [token for i, after in enumerate(followers) for token in (4 + i, *context, after)] + context
    logp = random_rows(len(stream))
    rows = mixed_rows(MIXERS["tilt"](config, Dist(), None), config, torch.tensor([*stream, 9]), logp, 999, 999)
    row, logp = rows[len(stream) - 1].exp(), logp[-1]
    raised = (row > logp.exp() * (1 + 1e-9)).nonzero().flatten().tolist()
    assert raised == hints
    for hint in hints:
        p = logp[hint].exp().item()
        assert row[hint].item() == pytest.approx(math.exp(2.625) * p / (1 + p * (math.exp(2.625) - 1)), rel=1e-9)
    assert hints or torch.allclose(row.log(), logp)


def test_flat_is_the_neural_row_at_temperature_two(tiny_config):
    logp = random_rows(3).float()
    block = RowBlock(torch.tensor([4, 5, 6]), slice(0, 3), slice(0, 3), logp, None)
    p = logp.double().exp().sqrt()
    found = MIXERS["flat"](tiny_config(), Dist(), None).mix(block)
    torch.testing.assert_close(found.double().exp(), p / p.sum(1, keepdim=True), atol=1e-7, rtol=1e-5)
    assert MIXERS["neural"](tiny_config(), Dist(), None).mix(block) is logp


# Maxent


def slow_bias(net, logp, row_of_counts, token):
    """Return the network's formula for one token, in Python floats."""
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
    for weights, bias in zip(net.hidden.weight.tolist(), net.hidden.bias.tolist(), strict=True):
        x = sum(w * f for w, f in zip(weights, features, strict=True)) + bias
        hidden.append(0.5 * x * (1 + math.erf(x / math.sqrt(2))))
    out = sum(w * h for w, h in zip(net.out.weight[0].tolist(), hidden, strict=True)) + net.out.bias.item()
    return min(max(out, net.LIMITS[0]), net.LIMITS[1])


@settings(max_examples=10)
@given(tokens=STREAM, block_rows=st.integers(1, 30), orders=st.sampled_from([(1, 2, 5), (1, 2, 3, 4, 8)]))
def test_maxent_rows_equal_the_formula_over_the_whole_vocabulary(tiny_config, tokens, block_rows, orders):
    config = tiny_config(ngram_orders=orders)
    net, slow, logp = random_net(config), PositionLists(config), random_rows(len(tokens) - 1)
    mixer = MIXERS["maxent"](config, Dist(), net)
    rows = mixed_rows(mixer, config, torch.tensor(tokens), logp, len(tokens), block_rows)
    for t, token in enumerate(tokens[:-1]):
        counts, row = slow.see(token), logp[t].tolist()
        weights = [math.exp(x) for x in row]
        for token in counts:
            weights[token] *= math.exp(slow_bias(net, row, counts, token))
        expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
        torch.testing.assert_close(rows[t].exp(), expected, atol=1e-9, rtol=1e-9)


@pytest.fixture(scope="module")
def world(tiny_config):
    """Return (config, rows [n, V], candidates, targets) in float64 on a stream with repeats."""
    config, tokens, logp = tiny_config(), repetitive(901), random_rows(300)
    chains = HashChains(config, CPU)
    chains.update(tokens[:601])
    return config, logp, chains.candidates(tokens[600:900], slice(0, 300), logp), tokens[601:901]


def with_logp(candidates, logp):
    """Return the candidates with the log-probabilities of other rows."""
    found = copy.copy(candidates)
    object.__setattr__(found, "logp", logp[candidates.row, candidates.token])
    return found


def without_candidates(candidates, rows):
    """Return what there is where nothing stood behind a row's contexts before."""
    empty = (x[:0] for x in (candidates.row, candidates.token, candidates.counts))
    return Candidates(*empty, torch.zeros_like(candidates.totals[:rows]), candidates.logp[:0])


def test_tokens_without_a_bias_keep_their_ratios(world):
    config, logp, candidates, _ = world
    mixed = apply_bias(logp, candidates, random_net(config)(candidates))
    assert (mixed.exp().sum(1) - 1).abs().max() < 1e-12
    touched = torch.zeros_like(logp, dtype=torch.bool)
    touched[candidates.row, candidates.token] = True
    for t in range(0, 300, 7):
        assert (mixed - logp)[t][~touched[t]].std() < 1e-12
    assert touched.any(1).sum() > 100 and not touched.all(1).any()


def test_the_sparse_normalizer_is_the_dense_sum(world):
    config, logp, candidates, _ = world
    bias = random_net(config)(candidates)
    tilted = (candidates.logp + bias).exp()
    dense = logp.exp().index_put((candidates.row, candidates.token), tilted).sum(1)
    torch.testing.assert_close(normalizer(candidates, bias), dense, atol=1e-12, rtol=1e-12)


def test_rows_stay_distributions_where_a_sure_token_is_pushed_down(world):
    """The worst case for the sparse sum in float32: almost all mass on one token, at the lowest bias."""
    _, _, candidates, _ = world
    first = torch.searchsorted(candidates.row, torch.arange(300))
    logits = torch.randn(300, VOCAB_SIZE, generator=torch.Generator().manual_seed(5))
    logits[torch.arange(300), candidates.token[first]] += torch.linspace(5, 30, 300)
    logp = logits.log_softmax(-1)
    candidates = with_logp(candidates, logp)
    mixed = apply_bias(logp, candidates, torch.full_like(candidates.logp, BiasNet.LIMITS[0]))
    assert (mixed.double().exp().sum(1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("cuts", [[], [100], [7, 8, 250]])
def test_the_gradient_is_that_of_the_dense_loss(world, cuts):
    """In any number of parts; a plain step at a rate of 1 shows the gradient."""
    config, logp, candidates, targets = world
    net = random_net(config)
    mixed = apply_bias(logp, candidates, net(candidates))
    loss = -mixed.gather(1, targets.unsqueeze(1)).mean()
    expected = torch.autograd.grad(loss, list(net.parameters()))
    before, parts = [p.detach().clone() for p in net.parameters()], []
    for a, b in itertools.pairwise([0, *cuts, 300]):
        of_part = (candidates.row >= a) & (candidates.row < b)
        row, token, counts, entry_logp = (
            x[of_part] for x in (candidates.row - a, candidates.token, candidates.counts, candidates.logp)
        )
        parts.append((Candidates(row, token, counts, candidates.totals[a:b], entry_logp), targets[a:b]))
    net_step(net, torch.optim.SGD(net.parameters(), lr=1.0), parts, len(targets), Dist())
    for p, was, gradient in zip(net.parameters(), before, expected, strict=True):
        torch.testing.assert_close(was - p.detach(), gradient, atol=1e-11, rtol=1e-8)


def test_a_new_network_leaves_the_neural_rows_alone(world):
    config, logp, candidates, _ = world
    mixed = apply_bias(logp, candidates, BiasNet(config).double()(candidates))
    torch.testing.assert_close(mixed, logp, atol=1e-12, rtol=0)


def test_steps_lower_the_loss(world):
    config, logp, candidates, targets = world
    net = BiasNet(config).double()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)

    def loss():
        with torch.no_grad():
            return -apply_bias(logp, candidates, net(candidates)).gather(1, targets.unsqueeze(1)).mean().item()

    before = loss()
    for _ in range(20):
        net_step(net, adam, [(candidates, targets)], len(targets), Dist())
    assert loss() < before - 0.1


def test_the_bias_of_an_entry_is_the_same_bits_whatever_follows(world, monkeypatch):
    """Also where the entries of a row lie across two blocks, and where the last block is shorter."""
    config, _, candidates, _ = world
    monkeypatch.setattr(BiasNet, "BLOCK", 64)
    net = random_net(config)
    whole = net(candidates)
    for rows in (1, 17, 299):
        n = int((candidates.row < rows).sum())
        entries = (x[:n] for x in (candidates.row, candidates.token, candidates.counts))
        part = Candidates(*entries, candidates.totals[:rows], candidates.logp[:n])
        assert torch.equal(net(part), whole[:n])


@pytest.mark.parametrize("rows", [0, 300])
def test_without_candidates_the_rows_are_the_neural_ones(world, rows):
    """Also for a rank that has no rows of a chunk: it takes part in the step with a gradient of zero."""
    config, logp, candidates, targets = world
    net, none = random_net(config), without_candidates(candidates, rows)
    torch.testing.assert_close(apply_bias(logp[:rows], none, net(none)), logp[:rows], atol=1e-12, rtol=0)
    before = [p.detach().clone() for p in net.parameters()]
    net_step(net, torch.optim.Adam(net.parameters(), lr=0.1), [(none, targets[:rows])], 300, Dist())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
