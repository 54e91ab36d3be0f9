"""What only a CUDA device can show. Run with: python -m pytest tests/gpu -q"""

import dataclasses
import os

import pytest
import torch
from test_kernels import both_ways, naive_attention

import codec
import train_gpt
from conftest import Alone, build, random_tokens, stored
from test_mixing import random_maxent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is present")


def on_cuda():
    run = Alone()
    run.device, run.dtype, run.compiles = torch.device("cuda", 0), torch.bfloat16, True
    return run


@pytest.mark.parametrize("backend", ["flash3", *train_gpt.SDPA_BACKENDS])
def test_attention_on_the_gpu_equals_its_definition(tiny_config, backend):
    if not train_gpt.attention_works(backend, tiny_config(model_dim=256, num_heads=4, num_kv_heads=2), on_cuda()):
        pytest.skip(f"{backend} does not work here")
    q, k, v = (torch.randn(2, 33, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    y = train_gpt.attention(q, k, v, backend, train_gpt.find_flash_attention_3())
    expected = naive_attention(q.cpu(), k.cpu(), v.cpu())
    assert (y.cpu().double() - expected).norm() / expected.norm() < 1e-2


def test_attention_that_never_holds_the_scores_is_chosen(tiny_config):
    """At the competition's heads, in bfloat16, forward and backward."""
    assert train_gpt.first_attention(train_gpt.Config(), on_cuda()) in ("flash3", "cudnn", "flash")


@pytest.mark.parametrize("rows", [1, 127, 4096])
def test_fused_kernels_on_the_gpu_equal_their_plain_twins(rows):
    def random(*shape):
        return torch.randn(shape, device="cuda").bfloat16().requires_grad_()

    logits, targets = random(rows, 1024), torch.randint(1024, (rows,), device="cuda")
    x, weight = random(rows, 512), random(1536, 512)
    for operation, inputs, learned in (
        (train_gpt.softcapped_nll, (logits, targets, 30.0), (logits,)),
        (train_gpt.linear_leaky_square, (x, weight, 0.5), (x, weight)),
    ):
        plain, fused = (both_ways(operation, inputs, learned, form) for form in (False, True))
        for a, b in zip(fused, plain, strict=True):
            assert train_gpt.agree(a, b)


@pytest.mark.parametrize("kernels", [("loss", "mlp"), (), ("auto",)])
def test_the_compiled_step_follows_the_plain_one(tiny_config, kernels):
    """Forward and backward in one graph each, whichever kernels are in it."""
    config = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2, kernels=kernels)
    plain, chosen, run = build(config).cuda(), train_gpt.choose_kernels(config, on_cuda()), on_cuda()
    fast = train_gpt.GPT(config, torch.bfloat16, chosen).cuda()
    fast.load_state_dict(plain.state_dict())
    tokens = random_tokens(config, 4, 33).cuda()
    losses = [model(tokens[:, :-1], tokens[:, 1:]).mean() for model in (plain, run.wrap(fast))]
    assert abs(losses[0] - losses[1]) < 2e-2
    a, b = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        for loss, model in zip(losses, (plain, fast), strict=True)
    )
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_the_host_stays_one_step_ahead():
    run, x = on_cuda(), torch.randn(2048, 2048, device="cuda")
    events = []
    for _ in range(4):
        for _ in range(50):
            x = (x @ x).tanh()
        run.follow()
        events.append(run.last_event)
        assert all(event.query() for event in events[:-1])


def test_compiled_bfloat16_forward_and_gradients_follow_float32(tiny_config):
    config = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2)
    exact = build(config).cuda()
    fast = train_gpt.GPT(config, torch.bfloat16).cuda()
    fast.load_state_dict(exact.state_dict())
    compiled, tokens = on_cuda().wrap(fast), random_tokens(config, 4, 33).cuda()
    losses = [model(tokens[:, :-1], tokens[:, 1:]).mean() for model in (exact, compiled)]
    assert abs(losses[0] - losses[1]) < 2e-2
    for loss in losses:
        loss.backward()
    a, b = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, fast))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_stored_weights_act_on_the_compiled_model(tiny_config):
    config = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2)
    model = build(config).cuda()
    model.dtype = torch.bfloat16
    compiled, tokens = on_cuda().wrap(model), random_tokens(config, 4, 32).cuda()
    plain = compiled(tokens)
    with train_gpt.with_weights(model, stored(model, fineness=2.0)):  # coarse, so that rounding shows
        assert (compiled(tokens) - plain).abs().max() > 1e-2
    torch.testing.assert_close(compiled(tokens), plain)


def test_training_on_the_gpu_lowers_the_loss_and_restores_after_warm_up(tiny_config):
    config = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2, warmup_steps=2, device="cuda")
    run = on_cuda()
    model = train_gpt.GPT(config, torch.bfloat16).init_weights(config).cuda()
    before = [p.detach().clone() for p in model.parameters()]
    optimizers, called = train_gpt.Optimizers(model, config, run), run.wrap(model)
    with train_gpt.state_restored(model, optimizers):
        train_gpt.warm_up(called, optimizers, config, run)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loader, losses = train_gpt.TrainLoader(config, run), []
    batches = loader.batches()
    for _ in range(30):
        nats = train_gpt.accumulate_gradients(called, next(batches), None, config)
        losses.append(nats.item() / config.train_batch_tokens)
        optimizers.step(1.0, 0.9)
    assert losses[-1] < losses[0] - 0.5


def test_a_model_on_the_gpu_is_fitted_to_the_size_and_comes_back(tiny_config, tmp_path):
    room = 300_000
    target = os.path.getsize(train_gpt.__file__) + room
    c, run, path = tiny_config(model_dim=256, target_bytes=target, device="cuda"), on_cuda(), tmp_path / "x"
    model = build(c).cuda()
    model.dtype, mixer = torch.bfloat16, train_gpt.Maxent(c).cuda()
    loader = train_gpt.TrainLoader(c, run)
    quantized = train_gpt.quantize_to_size(model, run.wrap(model), loader, mixer, c, run, "sha")
    path.write_bytes(train_gpt.pack(model, quantized, mixer, c, "sha"))
    assert 0.98 * room < path.stat().st_size <= room
    restored = dict(train_gpt.unpack(train_gpt.read_artifact(path)[1], c, run)[0].named_parameters())
    for name, (integers, grid) in quantized.items():
        assert torch.equal(restored[name].cpu(), train_gpt.dequantize(integers, grid))


def test_sensitivities_on_the_gpu_follow_the_cpu(tiny_config):
    """On the first training text, in float32 on both."""
    c, found = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2), []
    for run in (Alone(), on_cuda()):
        batch = train_gpt.TrainLoader(c, run).first_sequences(c.gptq_tokens)
        found.append(train_gpt.sensitivities(build(c).to(run.device), batch, run))
    for name, expected in found[0].items():
        for side in ("rows", "columns"):
            a, b = getattr(expected, side), getattr(found[1][name], side).cpu()
            assert (a - b).norm() < 2e-2 * a.norm(), (name, side)


@pytest.mark.parametrize("stage", train_gpt.STAGES)
def test_scores_on_the_gpu_follow_the_cpu(tiny_config, stage):
    config = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2)
    model, tokenizer, found = build(config), train_gpt.Tokenizer(config), []
    for run in (Alone(), on_cuda()):
        c = dataclasses.replace(config, device=run.device.type)
        stream = train_gpt.Stream(c, run.device, tokenizer)
        if run.device.type == "cuda":
            model.dtype = torch.bfloat16
        else:
            run.compiles = False
        mixer = random_maxent(c).float().to(run.device)
        predictor = train_gpt.make_predictor(stage, model.to(run.device), mixer, c, run, tokenizer)
        found.append(train_gpt.score(predictor, stream, c.ttt_chunk_tokens, run).val_bpb)
    assert abs(found[0] - found[1]) < 0.02 * found[0]


@pytest.mark.parametrize("settings", [{}, dict(ngram_table_bits=8), dict(ngram_reach_tokens=300)])
def test_the_context_index_is_the_same_integers_on_the_gpu(tiny_config, settings):
    c = tiny_config(**settings)
    tokens = (torch.rand(4001, generator=torch.Generator().manual_seed(0)) ** 3 * 40).long() + 1
    indices = [train_gpt.ContextIndex(c, torch.device(device)) for device in ("cpu", "cuda")]
    for start in range(0, 4000, 500):
        chunk = tokens[start : start + 501]
        found = [index.evidence(chunk.to(index.tokens.device)[:-1], slice(0, 500)) for index in indices]
        for name in ("row", "token", "counts", "totals"):
            assert torch.equal(getattr(found[0], name), getattr(found[1], name).cpu())
        for index in indices:
            index.update(chunk.to(index.tokens.device))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*(index.state() for index in indices), strict=True))


def test_text_comes_back_from_its_bits_on_the_gpu(tiny_config):
    """Bit for bit the same rows and updates in the encoder and in the decoder, in bfloat16."""
    c = tiny_config(model_dim=256, num_heads=4, num_kv_heads=2, ttt_chunk_tokens=128, val_tokens=400, device="cuda")
    tokenizer, run = train_gpt.Tokenizer(c), on_cuda()
    run.compiles = False
    tokens = train_gpt.Stream(c, run.device, tokenizer).tokens.to(run.device)
    model, mixer = build(c).cuda(), random_maxent(c).float().cuda()
    model.dtype = torch.bfloat16
    codec.be_deterministic()
    try:
        predictors = [train_gpt.make_predictor("mixed", model, mixer, c, run, tokenizer) for _ in range(2)]
        data = codec.encode(predictors[0], tokens.clone(), c.ttt_chunk_tokens)
        found = codec.decode(predictors[1], data, c.bos_id, c.ttt_chunk_tokens, run.device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, tokens)
