"""What only a CUDA device can show. Run with: python -m pytest tests/gpu"""

import dataclasses
import os

import pytest
import torch
from test_kernels import both_ways, naive_attention

import codec
import runs
import train_gpt
from conftest import build, random_tokens
from serve import fingerprint
from train_gpt import GPT, Config, Dist, Kernels, Optimizers, TrainLoader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is present")

DEVICE = torch.device("cuda", 0)
FUSED = ("loss", "mlp")
WIDE = dict(model_dim=256, num_heads=4, num_kv_heads=2, kernels=FUSED)


def on_gpu():
    return Dist(device=DEVICE)


def far(a, b):
    """Return the norm of the difference, relative to b's."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def model_on_gpu(c, kernels=None):
    """Return a random model in bfloat16; its weights are those of build(c)."""
    model = GPT(c, torch.bfloat16, kernels or train_gpt.choose_kernels(c, DEVICE))
    model.load_state_dict(build(c).state_dict())
    return model.to(DEVICE)


def random_net(c):
    net, generator = train_gpt.BiasNet(c), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return net


@pytest.mark.parametrize("backend", ["flash3", *train_gpt.SDPA_BACKENDS])
def test_attention_on_the_gpu_equals_its_definition(backend):
    q, k, v = (torch.randn(2, 33, heads, 64).to(DEVICE, torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    try:
        y = train_gpt.attention(q, k, v, backend)
    except Exception as error:  # each library refuses in its own way
        pytest.skip(f"{backend} does not work here: {error}")
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    expected = naive_attention(*exact)
    assert far(y, expected) < 1e-2
    for a, b in zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), exact), strict=True):
        assert far(a, b) < 2e-2


def test_the_competitions_attention_never_holds_its_scores(caplog):
    """They would take half a GiB here in bfloat16, and as much again for their gradient."""
    caplog.set_level("INFO", "train_gpt")
    train_gpt.choose_kernels.cache_clear()
    c = Config()
    backend, shape = train_gpt.choose_kernels(c, DEVICE).attention, (8, c.train_seq_len)
    assert not [line for line in caplog.messages if "ATTENTION" in line and "flash3" not in line]
    q, k, v = (torch.randn(*shape, heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 4, 4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train_gpt.attention(q.requires_grad_(), k, v, backend).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28


def test_flash_attention_3_that_fails_is_replaced_by_sdpa(monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(train_gpt, "flash_attn_func", fails)
    train_gpt.choose_kernels.cache_clear()
    assert train_gpt.choose_kernels(Config(), DEVICE).attention in ("cudnn", "flash")
    train_gpt.choose_kernels.cache_clear()


def test_the_competitions_fused_forms_work(caplog):
    caplog.set_level("INFO", "train_gpt")
    train_gpt.choose_kernels.cache_clear()
    assert train_gpt.choose_kernels(Config(), DEVICE).fused == FUSED
    assert not [line for line in caplog.messages if "KERNELS" in line]


@pytest.mark.parametrize("rows", [1, 127, 4096])
def test_fused_kernels_on_the_gpu_equal_their_plain_twins(rows):
    generator = torch.Generator().manual_seed(rows)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()

    logits, targets = random(rows, 1024), torch.randint(1024, (rows,), generator=generator).to(DEVICE)
    x, weight = random(rows, 512), random(1536, 512)
    for operation, inputs, learned in (
        (train_gpt.softcapped_nll, (logits, targets, 30.0), (logits,)),
        (train_gpt.linear_leaky_square, (x, weight, 0.5), (x, weight)),
    ):
        plain, fused = (both_ways(operation, inputs, learned, form) for form in (False, True))
        assert all(far(a, b) < 1e-2 for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize("fused", [FUSED, ()], ids=["fused", "plain"])
def test_the_compiled_step_follows_the_one_in_float32(tiny_config, fused):
    """Forward and backward in one graph each, whichever kernels are in it."""
    c = tiny_config(**WIDE)
    exact, fast = build(c), model_on_gpu(c, Kernels("cudnn", fused))
    tokens = random_tokens(c, 4, 33)
    losses = [
        model(tokens[:, :-1], tokens[:, 1:]).mean()
        for model, tokens in ((exact, tokens), (train_gpt.compiled(fast, c, DEVICE), tokens.to(DEVICE)))
    ]
    assert abs(losses[0].item() - losses[1].item()) < 2e-2
    for loss in losses:
        loss.backward()
    a, b = (torch.cat([p.grad.flatten().cpu() for p in model.parameters()]) for model in (exact, fast))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_a_step_does_not_wait_for_the_device(tiny_config):
    """Late QAT, forward, backward, CROWN-Q, optimizers and averages are only queued."""
    c = tiny_config(**WIDE, device="cuda")
    dist, model = on_gpu(), model_on_gpu(c)
    called, optimizers = train_gpt.compiled(model, c, DEVICE), Optimizers(model, c, dist)
    averages = train_gpt.WeightAverages(model, c)
    batch = TrainLoader(c, dist).batch(0).to(DEVICE)
    for mode in ("default", "error"):  # the first step compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with train_gpt.late_qat(model, -2.0, c):
                train_gpt.accumulate_gradients(called, batch, None, c)
            train_gpt.crown_q_penalty(optimizers.muon.banks, c.quant_bits).backward()
            optimizers.step(train_gpt.Schedule(1.0, 0.9))
            averages.update(0, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_late_qat_acts_on_the_compiled_model_without_compiling_again(tiny_config):
    c = tiny_config(**WIDE)
    model, tokens = model_on_gpu(c), random_tokens(c, 4, 32).to(DEVICE)
    called = train_gpt.compiled(model, c, DEVICE)
    plain, graphs = called(tokens), dict(torch._dynamo.utils.counters["stats"])
    with train_gpt.late_qat(model, -1.0, c):  # coarse, to make rounding show
        assert (called(tokens) - plain).abs().max() > 1e-2
    torch.testing.assert_close(called(tokens), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs.get("unique_graphs", 0)


def test_training_on_the_gpu_lowers_the_loss(tiny_config, caplog):
    """With every addition to the loss, from a compile warm-up that leaves no trace."""
    caplog.set_level("INFO", "train_gpt")
    c = tiny_config(**WIDE, device="cuda", iterations=40, train_log_every=40, swa_every=1)
    model = train_gpt.make_model(c, DEVICE).init_weights(c.seed).to(DEVICE)
    averages, _, record = train_gpt.train(model, TrainLoader(c, on_gpu()), c, on_gpu(), None)
    losses = [float(line.partition("train_loss:")[2].split()[0]) for line in caplog.messages if "train_loss:" in line]
    assert losses[0] == pytest.approx(torch.tensor(c.vocab_size).log().item(), abs=0.1)
    assert losses[-1] < losses[0] - 0.5 and record["steps"] == 40 and averages.swa_count > 0
    assert any(line.startswith("late_qat:enabled") for line in caplog.messages)


@pytest.mark.parametrize("settings", [dict(), dict(quant="hessian", codec="rans", late_qat_threshold=0.0)])
def test_a_model_on_the_gpu_is_fitted_to_the_size_and_comes_back(tiny_config, tmp_path, settings):
    budget = 600_000
    target = os.path.getsize(train_gpt.__file__) + budget
    path = tmp_path / "x.artifact"
    c = tiny_config(**WIDE | settings, target_bytes=target, device="cuda", artifact_path=str(path))
    model, loader = model_on_gpu(c), TrainLoader(c, on_gpu())
    train_gpt.export(model, loader, loader.sequences(0, max(1, c.gptq_tokens // c.train_seq_len)), "sha", c, on_gpu())
    assert 0.9 * budget < path.stat().st_size <= budget
    restored = train_gpt.unpack(train_gpt.read_artifact(path)[1], c, DEVICE)[0]
    for name, p in train_gpt.quantized_parameters(model).items():
        assert torch.equal(dict(restored.named_parameters())[name], p), name


def test_hessians_on_the_gpu_follow_the_cpu(tiny_config):
    """On the first training text, in float32 on both."""
    c, found = tiny_config(**WIDE), []
    for dist in (Dist(), on_gpu()):
        batch = TrainLoader(c, dist).sequences(0, max(1, c.gptq_tokens // c.train_seq_len))
        found.append(train_gpt.measure_hessians(build(c).to(dist.device), batch, dist))
    for name, expected in found[0].items():
        for side in ("rows", "columns"):
            assert far(getattr(found[1][name], side), getattr(expected, side)) < 2e-2, (name, side)


@pytest.mark.parametrize("stage", train_gpt.STAGES)
def test_scores_on_the_gpu_follow_the_cpu(tiny_config, stage):
    found = []
    for dist in (Dist(), on_gpu()):
        c = tiny_config(**WIDE, device=dist.device.type)
        model = build(c) if dist.device.type == "cpu" else model_on_gpu(c)
        tokenizer, net = train_gpt.Tokenizer(c), random_net(c).to(dist.device)
        predictor = train_gpt.make_predictor(stage, model, net, c, dist, tokenizer)
        stream = train_gpt.Stream(c, dist.device, tokenizer)
        found.append(train_gpt.score(predictor, stream, c.ttt_chunk_tokens, dist)[stage].val_bpb)
    assert abs(found[0] - found[1]) < 0.02 * found[0]


@pytest.mark.parametrize("settings", [dict(), dict(ngram_table_bits=8), dict(ngram_max_chain=2)], ids=str)
def test_the_hash_chains_are_the_same_integers_on_the_gpu(tiny_config, settings):
    c = tiny_config(**settings)
    tokens = (torch.rand(4001, generator=torch.Generator().manual_seed(0)) ** 3 * 40).long() + 1
    both = [train_gpt.HashChains(c, device) for device in (torch.device("cpu"), DEVICE)]
    for start in range(0, 4000, 500):
        chunk, found = tokens[start : start + 501], []
        for chains in both:
            inputs = chunk[:-1].to(chains.tokens.device)
            logp = torch.zeros(len(inputs), c.vocab_size, device=inputs.device)
            found.append(chains.candidates(inputs, slice(0, len(inputs)), logp))
            chains.update(chunk.to(inputs.device))
        for name in ("row", "token", "counts", "totals"):
            assert torch.equal(getattr(found[0], name), getattr(found[1], name).cpu())
    assert fingerprint(both[0]) == fingerprint(both[1])


@pytest.mark.parametrize("mixer", ["maxent", "hedge"])
def test_text_comes_back_from_its_bits_on_the_gpu(tiny_config, mixer):
    """Bit for bit the same rows and updates in the encoder and in the decoder, in bfloat16."""
    c = tiny_config(**WIDE | dict(kernels=()), ttt_chunk_tokens=128, val_tokens=400, device="cuda", mixer=mixer)
    c, tokenizer = dataclasses.replace(c, torch_compile=False), train_gpt.Tokenizer(c)
    tokens = train_gpt.Stream(c, DEVICE, tokenizer).tokens.to(DEVICE)
    runs.be_deterministic()
    try:
        model, net = model_on_gpu(c), random_net(c).to(DEVICE)
        predictors = [train_gpt.make_predictor("mixed", model, net, c, on_gpu(), tokenizer) for _ in range(2)]
        data = codec.encode(predictors[0], tokens.clone(), c.ttt_chunk_tokens)
        found = codec.decode(predictors[1], data, c.bos_id, c.ttt_chunk_tokens)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("backend", ["flash3", "cudnn", "flash"])
def test_attention_inside_documents_equals_the_mask(backend):
    tokens = torch.randint(2, 99, (3, 256), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tokens[0, [7, 8, 100]] = tokens[2, 200] = 1
    q, k, v = (torch.randn(3, 256, heads, 64).to(DEVICE, torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    try:
        y = train_gpt.attention(q, k, v, backend, train_gpt.document_bounds(tokens, 1, backend))
    except Exception as error:  # each library refuses in its own way
        pytest.skip(f"{backend} does not work here: {error}")
    exact = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    mask = train_gpt.document_bounds(tokens.cpu(), 1, "math")
    expected = train_gpt.attention(*exact, "math", mask)
    assert far(y, expected) < 1e-2
    for a, b in zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), exact), strict=True):
        assert far(a, b) < 2e-2


def test_a_rows_last_documents_are_one_where_they_are_too_many():
    """They never run into the next row, whose tokens come later in the stream."""
    bounds = train_gpt.document_bounds(torch.ones(2, 256, dtype=torch.int64, device=DEVICE), 1, "flash")
    assert bounds.tolist() == [0, 1, 2, 256, 257, 258, 512]


def test_documents_adapt_side_by_side_on_the_gpu_as_alone_on_the_cpu(tiny_config):
    c = tiny_config(ttt_lora_rank=2, ttt_lora_tokens=8, ttt_epochs=0, doc_isolated=True, dtype="float32")
    tokens = random_tokens(c, 1, 193)[0]
    tokens[[0, 30, 31, 90]] = c.bos_id
    model, found = build(c), {}
    for device in (torch.device("cpu"), DEVICE):
        predictor = train_gpt.LoRA(model.to(device), c, Dist(device=device), None)
        found[device.type], inputs = [], tokens.to(device)
        for start in range(0, 192, 64):
            found[device.type].append(predictor.predict(inputs[start : start + 64], slice(0, 64))["ttt"].cpu())
            predictor.update(inputs[start : start + 65])
    a, b = (torch.cat(found[device]) for device in ("cuda", "cpu"))
    assert (a - b).abs().max() < 2e-3
