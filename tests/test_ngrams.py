"""N-grams: the candidates of the hash chains against lists of positions in dictionaries, one token at a time."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import BOS_ID, VOCAB_SIZE
from serve import fingerprint
from train_gpt import HashChains, read_shard

CPU = torch.device("cpu")


class PositionLists:
    """The slow oracle: every context has the list of positions where it ended, and no hash forgets one."""

    def __init__(self, config):
        self.orders, self.max_chain = sorted(config.ngram_orders), config.ngram_max_chain
        self.tokens, self.positions, self.begin = [], {}, 0

    def see(self, token):
        """Take in a token. Return {token: counts [2][orders]} of what followed its contexts before."""
        self.tokens.append(token)
        at, found = len(self.tokens) - 1, {}
        if token == BOS_ID:
            self.begin = at
        for k, order in enumerate(self.orders):
            if at + 1 < order:
                continue
            earlier = self.positions.setdefault(tuple(self.tokens[at + 1 - order :]), [])
            for position in earlier[::-1][: max(1, min(self.max_chain, 3 * self.max_chain // order))]:
                if order == 1 and position < self.begin:
                    continue
                counts = found.setdefault(self.tokens[position + 1], [[0] * len(self.orders) for _ in range(2)])
                counts[position < self.begin][k] += 1
            earlier.append(at)
        return found


def as_dictionaries(candidates, m):
    """Return the candidates as a list of {token: counts} a row, their totals checked against the counts."""
    rows = [{} for _ in range(m)]
    entries = (x.tolist() for x in (candidates.row, candidates.token, candidates.counts))
    for row, token, counts in zip(*entries, strict=True):
        rows[row][token] = counts
    sums = torch.zeros(m, *candidates.totals.shape[1:], dtype=torch.int64)
    sums.index_add_(0, candidates.row, candidates.counts.long())
    assert torch.equal(sums, candidates.totals.long())
    assert [sorted(row) for row in rows] == [list(row) for row in rows]  # sorted, and each token once
    return rows


def candidates_of(chains, inputs, rows):
    """Return the candidates of some rows, with neural rows that have no part in them."""
    logp = torch.randn(rows.stop - rows.start, VOCAB_SIZE, generator=torch.Generator().manual_seed(rows.start))
    found = chains.candidates(inputs, rows, logp)
    assert torch.equal(found.logp, logp[found.row, found.token])
    return found


def chunks_of(tokens, sizes):
    start = 0
    for size in itertools.cycle(sizes):
        if start + 1 >= len(tokens):
            return
        yield torch.tensor(tokens[start : start + size + 1])
        start += size


class ExactChains(HashChains):
    """Hash chains with a head for every context: nothing is forgotten."""

    def hashes(self, inputs):
        hashes, self.head_of = super().hashes(inputs), getattr(self, "head_of", {})
        found = [self.head_of.setdefault(number, len(self.head_of)) for number in hashes.flatten().tolist()]
        assert len(self.head_of) <= len(self.head)
        return torch.tensor(found).view(hashes.shape)


def compare(config, tokens, sizes):
    """Compare the chains over a stream cut into chunks of these sizes with the oracle, row by row."""
    fast, slow = ExactChains(config, CPU), PositionLists(config)
    for chunk in chunks_of(tokens, sizes):
        n = len(chunk) - 1
        cut = n // 3
        found = [
            row
            for rows in (slice(0, cut), slice(cut, n))
            for row in as_dictionaries(candidates_of(fast, chunk[:-1], rows), rows.stop - rows.start)
        ]
        assert found == [slow.see(token) for token in chunk[:-1].tolist()]
        fast.update(chunk)


@settings(max_examples=25)
@example(tokens=[4] * 400, sizes=[150], orders=(1, 2), max_chain=255)  # the largest count of all
@given(
    tokens=st.lists(st.sampled_from([BOS_ID, 4, 5, 6, 7]), min_size=2, max_size=120),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    orders=st.sampled_from([(1, 2), (1, 2, 3), (1, 2, 3, 7), (1, 2, 4, 8, 24)]),
    max_chain=st.sampled_from([1, 3, 16, 255]),
)
def test_candidates_equal_the_lists_on_streams_with_repeats(tiny_config, tokens, sizes, orders, max_chain):
    compare(tiny_config(ngram_orders=orders, ngram_max_chain=max_chain), tokens, sizes)


def test_candidates_equal_the_lists_on_text_of_many_documents(tiny_config, tiny_data):
    tokens = torch.from_numpy(read_shard(tiny_data / "x_val_000000.bin").astype("int64"))
    compare(tiny_config(), tokens[:2500].tolist(), [700, 1, 256])


def test_memory_is_a_fixed_table_and_at_most_twice_the_stream(tiny_config):
    config = tiny_config(ngram_table_bits=10)
    chains, generator = HashChains(config, CPU), torch.Generator().manual_seed(0)
    for n in range(50, 3000, 50):
        chains.update(torch.randint(4, 9, (51,), generator=generator))
        assert n <= len(chains.tokens) < 2 * n + 50
        n_bytes = sum(x.nbytes for x in (chains.head, chains.tokens, chains.prev))
        assert n_bytes == 8 * 2**10 + 4 * len(chains.tokens) * (1 + len(config.ngram_orders))


@pytest.mark.parametrize(("bits", "least", "most"), [(6, 0.001, 0.5), (20, 0.99, 1.0)])
@pytest.mark.slow
def test_a_full_table_forgets_and_never_invents(bits, least, most, tiny_config):
    tokens = torch.randint(4, 40, (2001,), generator=torch.Generator().manual_seed(0)).tolist()
    small, slow = HashChains(tiny_config(ngram_table_bits=bits), CPU), PositionLists(tiny_config())
    kept = known = 0
    for chunk in chunks_of(tokens, [100]):
        rows = as_dictionaries(candidates_of(small, chunk[:-1], slice(0, len(chunk) - 1)), len(chunk) - 1)
        for row, truth in zip(rows, [slow.see(token) for token in chunk[:-1].tolist()], strict=True):
            assert row.keys() <= truth.keys()
            for token, counts in row.items():
                pairs = zip(sum(counts, []), sum(truth[token], []), strict=True)
                assert all(count <= true for count, true in pairs)
            kept, known = kept + len(row), known + len(truth)
        small.update(chunk)
    assert least <= kept / known <= most


def after_2000_tokens(tiny_config):
    """Return chains that have taken in 2000 tokens, and the 501 tokens that follow."""
    chains = HashChains(tiny_config(), CPU)
    tokens = (torch.rand(2501, generator=torch.Generator().manual_seed(0)) ** 3 * 40).long() + 4
    for start in range(0, 2000, 500):
        chains.update(tokens[start : start + 501])
    return chains, tokens[2000:]


@pytest.fixture
def filled(tiny_config):
    return after_2000_tokens(tiny_config)


def test_candidates_of_a_row_do_not_depend_on_later_tokens(filled):
    chains, tokens = filled
    changed = torch.cat([tokens[:301], tokens[301:].flip(0)])
    before, after = (candidates_of(chains, inputs[:-1], slice(0, 301)) for inputs in (tokens, changed))
    assert len(before.row)
    for name in ("row", "token", "counts", "totals", "logp"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_looking_ahead_is_not_state(filled):
    chains, tokens = filled
    before = fingerprint(chains)
    candidates_of(chains, tokens[:-1], slice(0, 500))
    candidates_of(chains, tokens[:-1].flip(0), slice(3, 9))
    assert fingerprint(chains) == before


def test_update_is_the_same_whatever_was_asked_before(filled, tiny_config):
    """Also where the chunk that was asked for is longer than the one that comes, and the arrays grew for it."""
    chains, tokens = filled
    candidates_of(chains, tokens[:-1].flip(0).repeat(9), slice(0, 4500))
    fresh, _ = after_2000_tokens(tiny_config)
    assert len(chains.tokens) > len(fresh.tokens)
    for each in (chains, fresh):
        each.update(tokens)
    assert fingerprint(chains) == fingerprint(fresh)
    found, expected = (candidates_of(each, tokens[:-1], slice(0, 500)) for each in (chains, fresh))
    assert torch.equal(found.counts, expected.counts) and torch.equal(found.token, expected.token)


def test_no_rows_have_no_candidates(filled):
    chains, tokens = filled
    found = candidates_of(chains, tokens[:-1], slice(7, 7))
    assert len(found.row) == 0 and found.totals.shape == (0, 2, len(chains.orders))
