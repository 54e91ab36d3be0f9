"""Experts: the evidence of the context index against lists of positions in dictionaries, one token at a time."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conftest import BOS_ID
from train_gpt import ContextIndex, read_shard

CPU = torch.device("cpu")


class PositionLists:
    """The slow oracle: for every context the list of positions that it ended at, and nothing is forgotten by hash."""

    def __init__(self, config):
        self.orders, self.depth, self.reach = sorted(config.ngram_orders), config.ngram_depth, config.ngram_reach_tokens
        self.tokens, self.positions, self.begin = [], {}, 0

    def see(self, token):
        """Take in a token, and answer with {token: counts [2][orders]} of what stood after its contexts before."""
        self.tokens.append(token)
        at, found = len(self.tokens) - 1, {}
        if token == BOS_ID:
            self.begin = at
        for k, order in enumerate(self.orders):
            if at + 1 < order:
                continue
            earlier = self.positions.setdefault(tuple(self.tokens[at + 1 - order :]), [])
            for position in earlier[::-1][: max(1, min(self.depth, 3 * self.depth // order))]:
                if at - position > self.reach or (order == 1 and position < self.begin):
                    continue
                counts = found.setdefault(self.tokens[position + 1], [[0] * len(self.orders) for _ in range(2)])
                counts[position < self.begin][k] += 1
            earlier.append(at)
        return found


def as_dictionaries(evidence, m):
    """Evidence as a list of {token: counts} a row, and its totals checked against them."""
    rows = [{} for _ in range(m)]
    entries = (x.tolist() for x in (evidence.row, evidence.token, evidence.counts))
    for row, token, counts in zip(*entries, strict=True):
        rows[row][token] = counts
    sums = torch.zeros(m, *evidence.totals.shape[1:], dtype=torch.int64).index_add_(
        0, evidence.row, evidence.counts.long()
    )
    assert torch.equal(sums, evidence.totals.long())
    return rows


def chunks_of(tokens, sizes):
    start = 0
    for size in itertools.cycle(sizes):
        if start + 1 >= len(tokens):
            return
        yield torch.tensor(tokens[start : start + size + 1])
        start += size


def compare(config, tokens, sizes):
    """The index over a stream cut into chunks of these sizes, against the oracle, row by row."""
    fast, slow = ContextIndex(config, CPU), PositionLists(config)
    for chunk in chunks_of(tokens, sizes):
        n = len(chunk) - 1
        cut = n // 3
        found = [
            row
            for rows in (slice(0, cut), slice(cut, n))
            for row in as_dictionaries(fast.evidence(chunk[:-1], rows), rows.stop - rows.start)
        ]
        assert found == [slow.see(token) for token in chunk[:-1].tolist()]
        fast.update(chunk)
    return fast


@settings(max_examples=40)
@example(tokens=[4, 5, 6, 7] * 40, sizes=[*[3] * 8, 40], orders=(1, 2, 3), depth=16, reach=13)  # grows after it wrapped
@given(
    tokens=st.lists(st.sampled_from([BOS_ID, 4, 5, 6, 7]), min_size=2, max_size=120),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    orders=st.sampled_from([(1,), (1, 2, 3), (3, 1, 7), (1, 2, 4, 8, 24)]),
    depth=st.sampled_from([1, 3, 16]),
    reach=st.sampled_from([1, 13, 64_000_000]),
)
def test_evidence_equals_the_lists_on_streams_with_repeats(tiny_config, tokens, sizes, orders, depth, reach):
    config = tiny_config(ngram_orders=orders, ngram_depth=depth, ngram_reach_tokens=reach, ngram_table_bits=22)
    compare(config, tokens, sizes)


def test_evidence_equals_the_lists_on_text_of_many_documents(tiny_config, tiny_data):
    tokens = torch.from_numpy(read_shard(tiny_data / "x_val_000000.bin").astype("int64"))
    compare(tiny_config(ngram_table_bits=23), tokens[:4000].tolist(), [700, 1, 256])


def test_memory_is_bounded_by_the_reach(tiny_config):
    config = tiny_config(ngram_reach_tokens=100, ngram_table_bits=22)
    tokens = torch.randint(4, 9, (3001,), generator=torch.Generator().manual_seed(0)).tolist()
    index = compare(config, tokens, [50])
    assert len(index.tokens) == 256  # the power of two that holds the reach and a chunk
    assert index.memory_bytes == 8 * 2**22 + 256 * 4 * (1 + len(config.ngram_orders))


def test_a_full_table_forgets_and_never_invents(tiny_config):
    tokens = torch.randint(4, 40, (4001,), generator=torch.Generator().manual_seed(0)).tolist()
    small, slow = ContextIndex(tiny_config(ngram_table_bits=6), CPU), PositionLists(tiny_config())
    kept = known = 0
    for chunk in chunks_of(tokens, [100]):
        rows = as_dictionaries(small.evidence(chunk[:-1], slice(0, len(chunk) - 1)), len(chunk) - 1)
        for row, truth in zip(rows, [slow.see(token) for token in chunk[:-1].tolist()], strict=True):
            assert row.keys() <= truth.keys()
            for token, counts in row.items():
                pairs = zip(sum(counts, []), sum(truth[token], []), strict=True)
                assert all(count <= true for count, true in pairs)
            kept, known = kept + len(row), known + len(truth)
        small.update(chunk)
    assert 0 < kept < known / 2


@pytest.fixture
def filled(tiny_config):
    index = ContextIndex(tiny_config(ngram_table_bits=16), CPU)
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(2501, generator=generator) ** 3 * 40).long() + 4
    for start in range(0, 2000, 500):
        index.update(tokens[start : start + 501])
    return index, tokens[2000:2500]


def test_evidence_of_a_row_does_not_depend_on_later_tokens(filled):
    index, inputs = filled
    before = index.evidence(inputs, slice(0, 301))
    changed = torch.cat([inputs[:301], inputs[301:].flip(0)])
    after = index.evidence(changed, slice(0, 301))
    for name in ("row", "token", "counts", "totals"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_looking_ahead_is_not_state(filled):
    index, inputs = filled
    before = [x.clone() for x in index.state()]
    index.evidence(inputs, slice(0, len(inputs)))
    index.evidence(inputs.flip(0), slice(3, 9))
    assert all(torch.equal(a, b) for a, b in zip(before, index.state(), strict=True))


def test_update_is_the_same_whatever_was_asked_before(filled):
    index, inputs = filled
    tokens = torch.cat([inputs, inputs[:1]])
    index.evidence(inputs.flip(0), slice(0, len(inputs)))
    index.update(tokens)
    config = index.c
    fresh = ContextIndex(config, CPU)
    generator = torch.Generator().manual_seed(0)
    past = (torch.rand(2501, generator=generator) ** 3 * 40).long() + 4
    for start in range(0, 2000, 500):
        fresh.update(past[start : start + 501])
    fresh.update(tokens)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state(), index.state(), strict=True))


def test_a_longer_chunk_that_was_only_asked_for_leaves_no_trace(tiny_config):
    config = tiny_config(ngram_reach_tokens=13)
    tokens = torch.tensor([4, 5, 6, 7] * 40)
    asked, plain = ContextIndex(config, CPU), ContextIndex(config, CPU)
    for start in range(0, 40, 4):
        for index in (asked, plain):
            index.update(tokens[start : start + 5])
    asked.evidence(tokens[40:], slice(0, 120))
    assert len(asked.tokens) > len(plain.tokens)
    assert all(torch.equal(a, b) for a, b in zip(asked.state(), plain.state(), strict=True))


def test_no_rows_give_no_evidence(filled):
    index, inputs = filled
    evidence = index.evidence(inputs, slice(7, 7))
    assert len(evidence.row) == 0 and evidence.totals.shape == (0, 2, len(index.orders))
