"""Model: the forward against plain definitions, causality, documents, roles, and every switch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_kernels import naive_attention

import train_gpt
from conftest import build, random_tokens
from train_gpt import GPT


def test_shift_moves_one_position_later():
    x = torch.arange(6.0).view(1, 3, 2)
    assert train_gpt.shift(x).tolist() == [[[0, 0], [0, 1], [2, 3]]]
    assert train_gpt.shift(torch.tensor([[5, 6, 7]])).tolist() == [[0, 5, 6]]


def test_rotary_keeps_norms_passes_other_channels_and_sees_only_distances():
    seq_len, half, head_dim = 9, 3, 10
    angle = torch.outer(torch.arange(seq_len).float(), torch.tensor([1.0, 0.3, 0.05]))
    q, k = torch.randn(1, 1, 1, head_dim), torch.randn(1, 1, 1, head_dim)
    spread = [train_gpt.rotate(x.expand(1, seq_len, 1, head_dim), angle.cos(), angle.sin()) for x in (q, k)]
    torch.testing.assert_close(spread[0].norm(dim=-1), q.norm(dim=-1).expand(1, seq_len, 1))
    assert torch.equal(spread[0][..., 2 * half :], q[..., 2 * half :].expand(1, seq_len, 1, -1))
    scores = torch.einsum("bthd,bshd->ts", *spread)
    for distance in range(seq_len):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_exclusive_attention_leaves_nothing_along_the_own_value():
    y, v = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    left = train_gpt.remove_own_value(y, v)
    along = (left * v.repeat_interleave(2, dim=2)).sum(-1)
    assert along.abs().max() < 1e-4
    again = train_gpt.remove_own_value(left, v)
    torch.testing.assert_close(again, left, atol=1e-5, rtol=1e-5)


def plain_logits(model, c, tokens):
    """The whole forward for one sequence, in float64, from the formulas: one position and one head at a time."""
    p, n, hd = (
        {name: p.detach().double() for name, p in model.named_parameters()},
        len(tokens),
        c.model_dim // c.num_heads,
    )
    alone = [t == 0 or tokens[t] == c.bos_id for t in range(n)]

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turned(x):
        """Rotate channels i and i + half of [n, heads, hd] by t * base^(-i / half)."""
        y, half = x.clone(), c.rope_dims // 2
        for t in range(n):
            for i in range(half):
                angle = torch.tensor(t * c.rope_base ** (-i / half), dtype=torch.float64)
                a, b = x[t, :, i], x[t, :, half + i]
                y[t, :, i], y[t, :, half + i] = a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()
        return y

    hashed = [
        ((36313 * b) ^ (27191 * a)) % (c.bigram_vocab_size - 1) for a, b in zip([0, *tokens], tokens, strict=False)
    ]
    rows = [c.bigram_vocab_size - 1 if alone[t] else hashed[t] for t in range(n)]
    x = p["tok_emb.weight"][tokens] + p["bigram.scale"] * p["bigram.emb.weight"][rows] @ p["bigram.proj.weight"].T
    gates = p["smear.scale"] * torch.sigmoid(x[:, :12] @ p["smear.gate"])
    x = norm(torch.stack([x[t] if alone[t] else x[t] + gates[t] * x[t - 1] for t in range(n)]))
    looped, order = [*range(c.loop_start, c.loop_end + 1)], [*range(c.num_layers)]
    order[c.loop_end + 1 : c.loop_end + 1] = looped * c.num_loops
    x0, lane, first_value, kept, half_depth = x, None, None, [], len(order) // 2
    for position, layer in enumerate(order):
        w = {name.partition(f"blocks.{layer}.")[2]: value for name, value in p.items()}
        lane = x if c.lanes and layer == c.lanes_start_layer else lane
        if position >= half_depth and kept:
            skip = p["skip_scale"][position - half_depth] * kept.pop()
            gate = torch.sigmoid(p["skip_gate"][position - half_depth]) if c.skip_gates_enabled else 1
            x = gate * x + (1 - gate if c.skip_gates_enabled else 1) * skip
        mixed = w["resid_mix"][0] * x + w["resid_mix"][1] * x0
        h = norm(mixed) / (layer + 1) ** 0.5
        q, k, v = ((h @ w[f"attn.{name}.weight"].T).view(n, -1, hd) for name in "qkv")
        own = v
        if layer in c.ve_layers:
            extra = p["value_emb.weight"][tokens] @ p["value_proj.weight"].T
            v = v + p["value_scale"][c.ve_layers.index(layer)] * extra.view_as(v)
        if layer:
            v = w["attn.value_mix"][0] * first_value + w["attn.value_mix"][1] * v
        first_value = own if first_value is None else first_value
        q, k = turned(norm(q)) * w["attn.q_gain"][:, None], turned(norm(k))
        y = naive_attention(q[None], k[None], v[None])[0]
        if layer >= c.num_layers - c.xsa_last_n:
            for head in range(c.num_heads):
                own_value = v[:, head * c.kv_heads // c.num_heads]
                along = (y[:, head] * own_value).sum(-1) / own_value.square().sum(-1)
                y[:, head] -= along[:, None] * own_value
        if c.gate_window:
            y = y * torch.sigmoid(0.5 * h[:, : c.gate_window] @ w["attn.gate"].T)[:, :, None]
        of_attention = w["attn_scale"] * (y.reshape(n, -1) @ w["attn.out.weight"].T)
        up = norm(mixed + of_attention if lane is None else lane) / (layer + 1) ** 0.5 @ w["up.weight"].T
        of_mlp = w["mlp_scale"] * (torch.where(up > 0, up, c.leaky_slope * up).square() @ w["down.weight"].T)
        if lane is None:
            x = mixed + of_attention + of_mlp
        else:
            r = w["routes"]
            x, lane = (
                r[0, 0] * x + r[1, 0] * of_attention + r[2, 0] * of_mlp,
                r[0, 1] * lane + r[1, 1] * of_attention + r[2, 1] * of_mlp,
            )
        if position < half_depth:
            kept.append(x)
    logits = norm(x if lane is None else (x + lane) / 2) @ p["tok_emb.weight"].T
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap)


SIZES = [
    {},
    dict(num_layers=5, num_kv_heads=0, ve_layers=(1, 3), xsa_last_n=5),
    dict(num_layers=5, ve_layers=(2,), loop_start=1, loop_end=2, num_loops=2, skip_gates_enabled=True, gate_window=4),
    dict(num_layers=5, ve_layers=(4,), lanes=True, lanes_start_layer=1, xsa_last_n=1),
    dict(num_layers=5, loop_start=1, loop_end=2, num_loops=1, skip_gates_enabled=True, lanes=True, lanes_start_layer=3),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_forward_equals_its_formulas(tiny_config, sizes):
    c = tiny_config(**sizes)
    model, tokens = build(c), random_tokens(c, 1, 12)
    tokens[0, 5] = c.bos_id
    expected = plain_logits(model, c, tokens[0].tolist())
    torch.testing.assert_close(model(tokens)[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_logits_are_capped_float32_of_the_full_vocabulary(tiny_config):
    config = tiny_config(logit_softcap=2.0)
    logits = build(config)(random_tokens(config))
    assert logits.shape == (2, 24, config.vocab_size) and logits.dtype == torch.float32
    assert 1.0 < logits.abs().max() <= 2.0


def test_keep_returns_the_last_positions(tiny_config):
    config = tiny_config()
    model, tokens = build(config), random_tokens(config)
    torch.testing.assert_close(model(tokens, keep=5), model(tokens)[:, -5:], atol=1e-5, rtol=1e-5)


def test_no_row_sees_a_later_token(tiny_config):
    config = tiny_config()
    model, tokens = build(config), random_tokens(config)
    before = model(tokens)
    for j in (1, 7, 23):
        changed = tokens.clone()
        changed[:, j:] = random_tokens(config, seed=j)[:, j:]
        after = model(changed)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


def test_stem_does_not_carry_one_document_into_the_next(tiny_config):
    """Of all that precedes attention, nothing at a BOS may depend on the token before it."""
    config = tiny_config()
    model, tokens = build(config), random_tokens(config, batch=1)
    tokens[0, 10] = config.bos_id
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % config.vocab_size

    def stem(tokens):
        x = model.tok_emb(tokens) + model.bigram(tokens, torch.float32)
        return model.smear(x, tokens)

    before, after = stem(tokens), stem(changed)
    assert torch.equal(before[0, 10], after[0, 10])
    assert not torch.equal(before[0, 9], after[0, 9])


def test_smear_adds_the_gated_token_before(tiny_config):
    config = tiny_config()
    smear = train_gpt.SmearGate(config)
    with torch.no_grad():
        smear.scale.fill_(0.5)
        smear.gate.normal_()
    x, tokens = torch.randn(1, 4, config.model_dim), torch.tensor([[7, 8, config.bos_id, 9]])
    y = smear(x, tokens)
    for t in (1, 3):
        gate = 0.5 * torch.sigmoid(x[0, t, :12] @ smear.gate)
        torch.testing.assert_close(y[0, t], x[0, t] + gate * x[0, t - 1])
    assert torch.equal(y[0, [0, 2]], x[0, [0, 2]])


def test_bigram_hash_is_the_published_one_and_alone_after_a_bos(tiny_config):
    config = tiny_config()
    bigram = train_gpt.BigramEmbedding(config)
    tokens = [11, 12, config.bos_id, 13]
    rows = [config.bigram_vocab_size - 1]
    rows.append(((36313 * 12) ^ (27191 * 11)) % (config.bigram_vocab_size - 1))
    rows.append(config.bigram_vocab_size - 1)
    rows.append(((36313 * 13) ^ (27191 * config.bos_id)) % (config.bigram_vocab_size - 1))
    expected = bigram.scale * bigram.proj(bigram.emb(torch.tensor([rows])))
    torch.testing.assert_close(bigram(torch.tensor([tokens]), torch.float32), expected)


SWITCHES = dict(
    xsa_last_n=0,
    bigram_vocab_size=0,
    value_residual=False,
    ve_layers=(),
    smear_gate=False,
    rope_dims=0,
    layer_scale=False,
    unet_skips=False,
    logit_softcap=0.0,
    tie_embeddings=False,
    leaky_slope=0.0,
)


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_changes_the_function_and_every_parameter_gets_a_gradient(tiny_config, name):
    on, off = tiny_config(num_layers=3, ve_layers=(1, 2)), tiny_config(num_layers=3, ve_layers=(1, 2))
    off = dataclasses.replace(off, **{name: SWITCHES[name]})
    tokens = random_tokens(on)
    with_it, without = build(on), build(off)
    shapes = {n: p.shape for n, p in without.state_dict().items()}
    without.load_state_dict({n: p for n, p in with_it.state_dict().items() if shapes.get(n) == p.shape}, strict=False)
    assert not torch.allclose(with_it(tokens), without(tokens), atol=1e-4)
    F.cross_entropy(without(tokens).flatten(0, 1), tokens.flatten()).backward()
    for parameter, p in without.named_parameters():
        assert p.numel() == 0 or (p.grad is not None and p.grad.abs().sum() > 0), parameter


def test_a_pair_of_layers_keeps_its_skip_when_loops_begin(tiny_config):
    c = tiny_config(num_layers=5, num_loops=2, loop_start=1, loop_end=2, ve_layers=(4,))
    model = build(c)
    with torch.no_grad():
        model.skip_scale.copy_(torch.arange(len(model.skip_scale)).unsqueeze(1))
    plain = build(dataclasses.replace(c, num_loops=0))
    plain.load_state_dict({**model.state_dict(), "skip_scale": model.skip_scale[-2:]})
    model.passes = model.plain
    tokens = random_tokens(c)
    assert torch.equal(model(tokens), plain(tokens))  # layers 3 and 4 take back those of 1 and 0, as after the loops


def test_skips_pair_the_latest_with_the_earliest(tiny_config):
    """With blocks that add nothing but their skip, layer 2 takes back layer 1's output and layer 3 layer 0's."""
    config = tiny_config(num_layers=4, ve_layers=(), xsa_last_n=0, value_residual=False)
    model = GPT(config).init_weights(config.seed)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            block.resid_mix[0].fill_(float(layer + 2))
        model.skip_scale[0].fill_(10.0)
        model.skip_scale[1].fill_(100.0)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model.blocks[3].register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[0]))
    model(random_tokens(config, 1, 3))
    out0 = 2.0
    out1 = 3 * out0
    out2 = 4 * (out1 + 10 * out1)
    out3 = 5 * (out2 + 100 * out0)
    x0, y = seen
    torch.testing.assert_close(y, out3 * x0)


def test_default_model_has_the_published_size():
    """11 x 512, 8 heads over 4: the parts of the 2026-03-22 record, with our 12-channel gate."""
    config = train_gpt.Config()
    with torch.device("meta"):
        model = GPT(config)
    matrices = sum(p.numel() for p in train_gpt.by_role(model, "matrix").values())
    assert matrices == 22 * 512 * 512 + 22 * 256 * 512 + 2 * 11 * 1536 * 512
    tables = 1024 * 512 + 2048 * 128 + 1024 * 128
    projections = 512 * 128 + 256 * 128
    vectors = 11 * (4 * 512 + 8) + 10 * 2 + 5 * 512 + 13 + 1 + 2
    assert sum(p.numel() for p in model.parameters()) == matrices + tables + projections + vectors


def test_init_is_the_same_for_one_seed_and_differs_for_another(tiny_config):
    c = tiny_config()
    states = [GPT(c).init_weights(seed).state_dict() for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["tok_emb.weight"], states[2]["tok_emb.weight"])


def test_every_parameter_has_a_role_and_starts_as_its_tag_says(tiny_config):
    model = GPT(tiny_config(model_dim=64, tie_embeddings=False)).init_weights(0)
    roles = {"matrix", "projection", "table", "scalar"}
    seen = {role: train_gpt.by_role(model, role) for role in roles}
    assert all(seen.values()) and sum(map(len, seen.values())) == len(list(model.parameters()))
    quantized = train_gpt.quantized_parameters(model)
    assert quantized.keys() == dict(model.named_parameters()).keys() - seen["scalar"].keys()
    assert all(p.dim() == 2 for p in quantized.values())
    for name, p in model.named_parameters():
        if isinstance(p.init, torch.Tensor):
            assert torch.equal(p, p.init), name
        elif isinstance(p.init, float):
            assert 0.9 * p.init < p.std() < 1.1 * p.init, name
        elif p.init == "zeros":
            assert not p.any(), name
        else:
            assert p.init == "orthogonal"
            short = p if p.shape[0] <= p.shape[1] else p.T
            torch.testing.assert_close(short @ short.T, torch.eye(len(short)), atol=1e-5, rtol=0)


def test_a_window_longer_than_the_rotary_table_is_refused(tiny_config):
    c = tiny_config()
    with pytest.raises(AssertionError, match="EVAL_SEQ_LEN"):
        build(c)(random_tokens(c, seq_len=max(c.train_seq_len, c.eval_seq_len) + 1))


def test_targets_give_the_nll_of_the_logits(tiny_config):
    c = tiny_config()
    model, tokens = build(c), random_tokens(c)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="none")
    nll = model(tokens, tokens.roll(-1, 1))
    assert nll.shape == tokens.shape and nll.dtype == torch.float32
    torch.testing.assert_close(nll.flatten(), expected)


def test_bfloat16_activations_stay_near_float32(tiny_config):
    config = tiny_config()
    model, tokens = build(config), random_tokens(config)
    exact = model(tokens)
    model.dtype = torch.bfloat16
    assert (model(tokens) - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_an_isolated_models_rows_are_those_of_each_document_alone(tiny_config):
    """Up to rounding; across documents, all but the first differ."""
    c = tiny_config(doc_isolated=True)
    tokens = random_tokens(c, batch=1, seq_len=24)
    tokens[0, [0, 9, 10]] = c.bos_id
    model = build(c)
    found = model(tokens)[0]
    for begin, end in ((0, 9), (9, 10), (10, 24)):
        torch.testing.assert_close(found[begin:end], model(tokens[:, begin:end])[0], atol=1e-4, rtol=1e-4)
    crossing = build(tiny_config())(tokens)[0]
    assert torch.allclose(found[:9], crossing[:9], atol=1e-4) and not torch.allclose(found[9:], crossing[9:], atol=1e-3)


def test_pieces_that_look_at_their_past_have_the_rows_of_the_whole(tiny_config):
    c = tiny_config()
    tokens, model, found = random_tokens(c, batch=2, seq_len=24), build(c), []
    tokens[:, 0] = c.bos_id  # what stands before it counts for nothing
    for block in model.blocks:
        block.attn.past.append(tuple(torch.zeros(2, 2, 0, c.kv_heads, c.model_dim // c.num_heads)))
    for low, high in ((0, 1), (1, 9), (9, 24)):
        mask = torch.ones(high - low, high, dtype=torch.bool).tril(low)[None, None]
        found.append(model(F.pad(tokens, (2, 0))[:, low : high + 2], mask=mask))
    for block in model.blocks:
        block.attn.past.clear()
    torch.testing.assert_close(torch.cat(found, dim=1), model(tokens), atol=1e-4, rtol=1e-4)


def test_an_adapter_adds_a_low_rank_map_to_its_own_row_of_the_batch():
    linear, x = train_gpt.Linear(6, 4), torch.randn(3, 5, 6)
    linear.weight.data.normal_()
    down, up = torch.randn(3, 2, 6), torch.randn(3, 4, 2)
    linear.adapter = down, up
    for row in range(3):
        expected = x[row] @ (linear.weight + up[row] @ down[row]).T
        torch.testing.assert_close(linear(x)[row], expected, atol=1e-5, rtol=1e-5)
