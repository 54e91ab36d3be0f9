"""Kernels: each fused form against its plain twin, attention against its definition, and what is chosen where.

On a CPU, Triton's kernels run in its interpreter; what they compile to for a GPU is looked at without one.
"""

import functools
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from conftest import Alone, build, random_tokens
from train_gpt import GPT, InputError, Kernels, choose_kernels, linear_leaky_square, softcapped_nll

ROOT = Path(train_gpt.__file__).resolve().parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton; requirements-dev.txt has it on Linux")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted: see tests/gpu"
)
FUSED = Kernels(fused=("loss", "mlp"))


def naive_attention(q, k, v):
    """Causal softmax attention, one head and one position at a time, in float64."""
    batch, seq_len, heads, head_dim = q.shape
    group = heads // k.shape[2]
    y = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for t in range(seq_len):
                scores = k[b, : t + 1, h // group].double() @ q[b, t, h].double() / math.sqrt(head_dim)
                y[b, t, h] = scores.softmax(0) @ v[b, : t + 1, h // group].double()
    return y


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_equals_its_definition_with_grouped_heads(backend):
    q, k, v = torch.randn(2, 7, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    found = train_gpt.attention(q, k, v, backend)
    torch.testing.assert_close(found.double(), naive_attention(q, k, v), atol=1e-5, rtol=0)


def test_flash_attention_3_is_called_with_its_own_layout():
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)

    def stand_in(q, k, v, causal, deterministic):
        assert causal and not deterministic
        return naive_attention(q, k, v).float(), "log-sum-exp"

    found = train_gpt.attention(q, k, v, "flash3", stand_in)
    torch.testing.assert_close(found, train_gpt.attention(q, k, v), atol=1e-5, rtol=0)


@pytest.fixture
def attention_without(monkeypatch):
    """Make some backends of attention fail, each in its way: {backend: what becomes of its output}."""
    whole = train_gpt.attention

    def install(faults):
        def attention(q, k, v, backend="math", flash_attn_3=None):
            y = whole(q, k, v, "math")
            return faults[backend](y) if backend in faults else y

        monkeypatch.setattr(train_gpt, "attention", attention)

    return install


def fails(y):
    raise RuntimeError("no such kernel")


def has_no_gradient(y):
    return y * torch.where(y > 1e9, y, 1.0).sqrt().detach() + (y - y).sqrt()  # 0 forward, 0 * inf backward


def is_wrong(y):
    return 1.5 * y


def test_the_first_attention_that_works_is_taken(tiny_config, attention_without):
    order = ["flash3", "cudnn", "flash", "efficient", "math"]
    for faults, expected in (
        ({}, "flash3"),
        ({"flash3": fails}, "cudnn"),
        ({"flash3": fails, "cudnn": has_no_gradient}, "flash"),
        ({"flash3": fails, "cudnn": is_wrong, "flash": fails}, "efficient"),
        (dict.fromkeys(order[:-1], fails), "math"),
    ):
        attention_without(faults)
        assert train_gpt.first_attention(tiny_config(), Alone()) == expected


def test_attention_that_is_asked_for_and_does_not_work_is_refused(tiny_config, attention_without):
    attention_without({"cudnn": has_no_gradient})
    with pytest.raises(InputError, match="ATTENTION=cudnn"):
        train_gpt.first_attention(tiny_config(attention="cudnn"), Alone())
    assert train_gpt.first_attention(tiny_config(attention="efficient"), Alone()) == "efficient"


def test_what_is_chosen_here_is_named_and_works(tiny_config):
    c = tiny_config()
    chosen = choose_kernels(c, Alone())
    assert str(chosen) == f"attention:{chosen.attention} triton:none"
    tokens = random_tokens(c)
    plain, other = build(c), GPT(c, kernels=chosen)
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(tokens), plain(tokens), atol=1e-5, rtol=1e-5)


def test_triton_is_refused_where_it_cannot_run(tiny_config, monkeypatch):
    monkeypatch.setattr(train_gpt, "triton", None)
    with pytest.raises(InputError, match="KERNELS=loss,mlp: needs Triton"):
        choose_kernels(tiny_config(kernels=("loss", "mlp")), Alone())
    assert choose_kernels(tiny_config(), Alone()).fused == choose_kernels(tiny_config(kernels=()), Alone()).fused == ()


@needs_triton
@interpreted
def test_named_kernels_are_used_if_they_work_and_refused_if_not(tiny_config, monkeypatch):
    assert choose_kernels(tiny_config(kernels=("mlp", "loss")), Alone()).fused == ("mlp", "loss")
    monkeypatch.setattr(train_gpt, "softcapped_nll", operation_that("differs"))
    with pytest.raises(InputError, match="KERNELS=loss: Triton's loss differs from the plain form"):
        choose_kernels(tiny_config(kernels=("loss",)), Alone())
    assert choose_kernels(tiny_config(kernels=("mlp",)), Alone()).fused == ("mlp",)


def operation_that(fault):
    """An operation whose fused form is right, differs or fails."""

    def operation(x, *_, fused=False):
        if fused and fault == "fails":
            raise RuntimeError("out of resource: shared memory\nand more")
        return x.exp() * (1.5 if fused and fault == "differs" else 1.0)

    return operation


@pytest.mark.parametrize(
    ("fault", "fused_ms", "used", "said"),
    [
        ("", 1.0, True, "kernel x: plain 2.000 ms, Triton 1.000 ms"),
        ("", 1.99, False, "kernel x: plain 2.000 ms, Triton 1.990 ms"),
        ("differs", 1.0, False, "kernel x: plain, since Triton's differs from the plain form"),
        ("fails", 1.0, False, "kernel x: plain, since Triton's fails: "),
    ],
)
def test_a_fused_form_is_used_if_it_works_and_is_clearly_faster(monkeypatch, fault, fused_ms, used, said):
    """Both forms are compiled for the trial, as in a run on a GPU; here that only traces them."""
    lines, run, milliseconds = [], Alone(), iter([2.0, fused_ms])
    run.log = lines.append
    run.wrap = functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    bench = SimpleNamespace(testing=SimpleNamespace(do_bench=lambda form: (form(), next(milliseconds))[1]))
    monkeypatch.setattr(train_gpt, "triton", bench)
    trial = train_gpt.Trial(operation_that(fault), (torch.ones(3, requires_grad=True),), run)
    assert trial.pays("x") == used
    assert len(lines) == 1 and lines[0].startswith(said)


def both_ways(operation, inputs, learned, fused):
    """The value, and the gradients of what is learned for an uneven gradient of the value."""
    y = operation(*inputs, fused)
    g = torch.linspace(-1, 2, y.numel()).view_as(y).to(y)
    return y, *torch.autograd.grad(y, learned, g)


@needs_triton
@interpreted
@pytest.mark.parametrize("cap", [30.0, 3.0, 0.0])
@pytest.mark.parametrize("vocab_size", [5, 320, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcapped_nll_fused_equals_plain(dtype, vocab_size, cap):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (12 * torch.randn(11, vocab_size, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (11,), generator=generator)
    plain, fused = (both_ways(softcapped_nll, (logits, targets, cap), (logits,), f) for f in (False, True))
    assert fused[0].dtype == torch.float32 and fused[1].dtype == dtype
    torch.testing.assert_close(fused[0], plain[0], atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(fused[1], plain[1], atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=0)


@needs_triton
@interpreted
@pytest.mark.parametrize("shape", [(2, 5, 16, 24), (1, 131, 40, 300), (3, 1, 70, 7)])
def test_linear_leaky_square_fused_equals_plain(shape):
    """In float32 only: the interpreter takes bfloat16 products for something else."""
    batch, seq_len, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seq_len, inner, generator=generator, requires_grad=True)
    weight = torch.randn(columns, inner, generator=generator, requires_grad=True)
    plain, fused = (both_ways(linear_leaky_square, (x, weight, 0.3), (x, weight), f) for f in (False, True))
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@needs_triton
@interpreted
def test_the_fused_model_is_the_plain_model(tiny_config):
    """Loss, gradients and logits; and compiled as a whole, forward and backward in one graph without a break."""
    c = tiny_config()
    plain, fused, tokens = build(c), GPT(c, kernels=FUSED), random_tokens(c, seq_len=17)
    fused.load_state_dict(plain.state_dict())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=False)
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, fused, compiled)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fused(tokens), plain(tokens), atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad(losses[0].sum(), list(plain.parameters()), allow_unused=True)
    for loss in losses[1:]:
        found = torch.autograd.grad(loss.sum(), list(fused.parameters()), allow_unused=True)
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kernels", [Kernels(), pytest.param(FUSED, marks=[needs_triton, interpreted])], ids=str)
def test_no_graph_break_in_training_or_in_scoring(tiny_config, kernels):
    c = tiny_config()
    model, tokens = GPT(c, kernels=kernels).init_weights(c), random_tokens(c, seq_len=17)
    for arguments in (dict(targets=tokens[:, 1:]), dict(keep=8), {}):
        torch._dynamo.reset()
        report = torch._dynamo.explain(model)(tokens[:, :-1], **arguments)
        assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import train_gpt as T

def ptx(kernel, constants, pointers, **options):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return built.asm["ptx"], built.metadata.shared

tile = dict(T.TILE)
options = {n: tile.pop(n) for n in ("num_warps", "num_stages")}
loss = dict(V=1024, CAP=30.0, BLOCK=T.LOSS_BLOCK)
rows = dict(logits="*bf16", targets="*i64", nll="*fp32", lse="*fp32", grad="*fp32", grad_logits="*bf16")
maps = dict(x="*bf16", weight="*bf16", product="*bf16", squared="*bf16")
for found in (
    ptx(T.softcapped_nll_kernel, loss, rows),
    ptx(T.softcapped_nll_grad_kernel, loss, rows),
    ptx(T.linear_leaky_square_kernel, dict(SLOPE=0.5, K=512, **tile), maps, **options),
):
    print("wgmma" in found[0], "st.local" in found[0], found[1])
"""


@needs_triton
def test_the_kernels_compile_for_a_hopper_gpu(tmp_path):
    """No GPU is needed for that: the product is on tensor cores, PTX has no local memory, shared memory suffices."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [wgmma for wgmma, _, _ in found] == ["False", "False", "True"]
    assert all(local == "False" and int(shared) <= 227 * 1024 for _, local, shared in found)
