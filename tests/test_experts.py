"""Experts: the n-gram rows against a dictionary that counts one token at a time, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_gpt import NgramCounts


class DictionaryCounts:
    """The slow oracle: interpolated absolute discounting straight from its definition."""

    def __init__(self, vocab_size, discount, order):
        self.vocab_size, self.discount, self.order = vocab_size, discount, order
        self.counts = {}
        self.tokens = []

    def count(self, token):
        """Count a token under the contexts that stand before it."""
        for k in range(self.order):
            if len(self.tokens) >= max(k, 1):
                context = tuple(self.tokens[len(self.tokens) - k :])
                table = self.counts.setdefault(context, {})
                table[token] = table.get(token, 0) + 1
        self.tokens.append(token)

    def row(self, history, k):
        """p_k(. | history) as a list of V floats."""
        if k < 0:
            return [1.0 / self.vocab_size] * self.vocab_size
        lower = self.row(history, k - 1)
        table = self.counts.get(tuple(history[len(history) - k :]), {}) if len(history) >= k else {}
        total = sum(table.values())
        if not total:
            return lower
        left = self.discount * len(table) / total
        return [max(table.get(w, 0) - self.discount, 0) / total + left * lower[w] for w in range(self.vocab_size)]


def chunks_of(tokens, sizes):
    start = 0
    for size in sizes:
        if start + 1 < len(tokens):
            yield torch.tensor(tokens[start : start + size + 1])
            start += size


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=2, max_size=60),
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    order=st.integers(1, 4),
)
def test_rows_equal_the_dictionary_on_streams_with_repeats(tokens, sizes, order):
    vocab_size = 6
    fast, slow = NgramCounts(vocab_size, 0.75, torch.device("cpu"), order), DictionaryCounts(vocab_size, 0.75, order)
    slow.tokens.append(tokens[0])  # the first token is given, not scored, and counts for nothing but context
    past = []
    for chunk in chunks_of(tokens, sizes):
        inputs = chunk[:-1]
        found = fast.distributions(inputs, slice(0, len(inputs)))
        for t in range(len(inputs)):
            history = past + inputs[: t + 1].tolist()
            for k in range(order):
                expected = torch.tensor(slow.row(history, k), dtype=torch.float64)
                torch.testing.assert_close(found[k][t].double().exp(), expected, atol=1e-6, rtol=1e-5)
        fast.update(chunk)
        for token in chunk[1:].tolist():
            slow.count(token)
        past += inputs.tolist()


@pytest.fixture
def filled():
    counts = NgramCounts(50, 0.75, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        counts.update((torch.rand(2001, generator=generator) ** 3 * 50).long())
    return counts, (torch.rand(500, generator=generator) ** 3 * 50).long()


def test_every_row_is_a_positive_distribution(filled):
    counts, inputs = filled
    for rows in counts.distributions(inputs, slice(0, 500)):
        assert rows.shape == (500, 50) and torch.isfinite(rows).all()
        assert (rows.double().exp().sum(1) - 1).abs().max() < 1e-5


def test_rows_of_a_part_are_the_rows_of_the_whole(filled):
    counts, inputs = filled
    whole = counts.distributions(inputs, slice(0, 500))
    for part in (slice(0, 1), slice(123, 300), slice(499, 500), slice(200, 200)):
        for a, b in zip(counts.distributions(inputs, part), whole, strict=True):
            assert torch.equal(a, b[part])


def test_a_context_s_counts_add_up_to_how_often_it_was_seen(filled):
    counts, _ = filled
    assert int(counts.counts[0].sum()) == 6000
    assert all(torch.equal(keys, keys.unique()) for keys in counts.keys)


def test_predicting_changes_nothing(filled):
    counts, inputs = filled
    before = [x.clone() for x in counts.state()]
    counts.distributions(inputs, slice(0, 500))
    assert all(torch.equal(a, b) for a, b in zip(before, counts.state(), strict=True))


def test_more_chunks_or_one_leave_the_same_counts():
    tokens = torch.randint(0, 30, (1001,), generator=torch.Generator().manual_seed(0))
    one, many = (NgramCounts(30, 0.75, torch.device("cpu"), 4) for _ in range(2))
    one.update(tokens)
    for start in range(0, 1000, 7):
        many.update(tokens[start : min(start + 7, 1000) + 1])
    assert all(torch.equal(a, b) for a, b in zip(one.state(), many.state(), strict=True))
