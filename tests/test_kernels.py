"""Kernels: each fused form against its plain twin, attention against its definition, and what is chosen where.

On a CPU, Triton's kernels run in its interpreter; what they compile to for a GPU is looked at without one.
"""

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
from conftest import TINY, build, random_tokens
from train_gpt import GPT, Config, Kernels, choose_attention, choose_kernels, linear_leaky_square, softcapped_nll

ROOT = Path(train_gpt.__file__).resolve().parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton; requirements-dev.txt has it on Linux")
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, not interpreted: see tests/gpu"
)


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


@pytest.mark.parametrize("backend", ["math", "flash"])
def test_attention_inside_documents_is_that_of_each_alone(backend):
    tokens = torch.full((2, 40), 5)
    tokens[0, [0, 13, 14]] = tokens[1, 5] = 1  # the second row begins inside a document
    q, k, v = torch.randn(2, 40, 4, 8), torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8)
    found = train_gpt.attention(q, k, v, backend, train_gpt.document_bounds(tokens, 1, backend))
    for row, edges in ((0, (0, 13, 14, 40)), (1, (0, 5, 40))):
        for begin, end in zip(edges, edges[1:], strict=False):
            alone = (x[row : row + 1, begin:end] for x in (q, k, v))
            expected = naive_attention(*alone)[0].float()
            torch.testing.assert_close(found[row, begin:end], expected, atol=1e-5, rtol=0)


def test_flash_attention_3_is_called_with_its_own_layout(monkeypatch):
    q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)

    def stand_in(q, k, v, causal, deterministic):
        assert causal and not deterministic
        return naive_attention(q, k, v).float(), "log-sum-exp"

    monkeypatch.setattr(train_gpt, "flash_attn_func", stand_in)
    found = train_gpt.attention(q, k, v, "flash3")
    torch.testing.assert_close(found, train_gpt.attention(q, k, v), atol=1e-5, rtol=0)


@pytest.fixture
def choose(monkeypatch, caplog):
    """choose(config) -> (what is chosen, the lines of it in the log), without what earlier tests left in the cache."""
    caplog.set_level("INFO", "train_gpt")

    def choose(c):
        choose_kernels.cache_clear()
        caplog.clear()
        return choose_kernels(c, CPU), [line for line in caplog.messages if line.startswith("kernel_fallback:")]

    yield choose
    choose_kernels.cache_clear()


def raises(y):
    raise RuntimeError("out of resource: shared memory\nand more")


def has_no_gradient(y):
    return y + (y - y).abs().sqrt()  # right forward; 0 times infinity backward


def is_wrong(y):
    return 1.5 * y


def has_a_wrong_gradient(y):
    return y + 0.5 * (y - y.detach())


FAULTS = {
    raises: "RuntimeError: out of resource: shared memory",
    has_no_gradient: "differs by ",
    is_wrong: "differs by ",
    has_a_wrong_gradient: "differs by ",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_attention_that_raises_or_differs_is_replaced_with_one_line(tiny_config, monkeypatch, choose, fault):
    whole = train_gpt.attention
    monkeypatch.setattr(
        train_gpt,
        "attention",
        lambda q, k, v, backend="math", bounds=None: fault(whole(q, k, v)) if backend == "cudnn" else whole(q, k, v),
    )
    chosen, lines = choose(tiny_config(attention="cudnn", kernels=()))
    assert chosen == Kernels("math", ()) and len(lines) == 1
    assert lines[0].startswith(f"kernel_fallback:ATTENTION=cudnn is not used ({FAULTS[fault]}")
    assert choose(tiny_config(attention="efficient", kernels=())) == (Kernels("efficient", ()), [])


def test_on_a_gpu_each_form_that_is_passed_over_is_named_and_math_must_fit(monkeypatch, caplog):
    caplog.set_level("INFO", "train_gpt")
    on_cuda, fails = [SimpleNamespace(device=torch.device("cuda"))], lambda *x, **y: 1 / 0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(train_gpt, "compiled", fails)
    monkeypatch.setattr(train_gpt, "flash_attn_func", None)
    with pytest.raises(
        train_gpt.InputError, match="^ATTENTION=math needs 99 GiB at MICRO_BATCH_TOKENS=98304; .* 80 GiB"
    ):
        choose_attention(on_cuda, Config())
    reasons = {"flash3": "flash_attn"} | dict.fromkeys(train_gpt.SDPA_BACKENDS, "ZeroDivis")
    passed = [f"kernel_fallback:ATTENTION={name} is not used ({reason}" for name, reason in reasons.items()]
    assert [line[: len(start)] for line, start in zip(caplog.messages, passed, strict=True)] == passed
    assert choose_attention(on_cuda, Config(micro_batch_tokens=49152)) == "math"
    monkeypatch.setattr(train_gpt, "agrees", lambda name, *_: name == "ATTENTION=flash")
    assert choose_attention(on_cuda, Config()) == "flash"


@needs_triton
@interpreted
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fused_form_that_raises_or_differs_is_replaced_with_one_line(tiny_config, monkeypatch, choose, fault):
    plain_loss, plain_mlp = train_gpt.softcapped_nll, train_gpt.linear_leaky_square

    def loss(x, targets, cap, fused=False):
        return fault(plain_loss(x, targets, cap)) if fused else plain_loss(x, targets, cap)

    monkeypatch.setattr(train_gpt, "softcapped_nll", loss)
    monkeypatch.setattr(train_gpt, "linear_leaky_square", lambda x, w, slope, fused=False: plain_mlp(x, w, slope))
    chosen, lines = choose(tiny_config(attention="math", kernels=("loss", "mlp")))
    assert chosen == Kernels("math", ("mlp",)) and len(lines) == 1
    assert lines[0].startswith(f"kernel_fallback:KERNELS=loss is not used ({FAULTS[fault]}")


@needs_triton
@interpreted
@pytest.mark.slow
def test_forms_that_agree_are_chosen_as_asked_for_without_a_line(tiny_config, choose):
    for kernels in (("loss", "mlp"), ("mlp",), ()):
        assert choose(tiny_config(attention="flash", kernels=kernels)) == (Kernels("flash", kernels), [])


@needs_triton
def test_without_triton_or_a_device_for_it_the_plain_forms_are_chosen(tiny_config, monkeypatch, choose):
    c = tiny_config(attention="math", kernels=("loss", "mlp"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose(c) == (Kernels("math", ()), [])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(train_gpt, "triton", None)
    assert choose(c) == (Kernels("math", ()), [])


def both_ways(operation, inputs, learned, fused):
    """The value, and the gradients of what is learned for an uneven gradient of the value."""
    y = operation(*inputs, fused)
    g = torch.linspace(-1, 2, y.numel()).view_as(y).to(y)
    return y, *torch.autograd.grad(y, learned, g)


@needs_triton
@interpreted
@pytest.mark.parametrize("cap", [30.0, 3.0, 0.0])
@pytest.mark.parametrize("vocab_size", [5, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softcapped_nll_fused_equals_plain(dtype, vocab_size, cap):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (12 * torch.randn(5, vocab_size, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (5,), generator=generator)
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
def test_the_model_runs_the_chosen_forms_and_stays_the_plain_model(tiny_config, monkeypatch):
    """Loss, gradients and logits; both kernels are launched."""
    c, launched = tiny_config(), []
    for name in ("SoftcappedNLL", "LinearLeakySquare"):
        apply = getattr(train_gpt, name).apply
        note = SimpleNamespace(apply=lambda *x, name=name, apply=apply: (launched.append(name), apply(*x))[1])
        monkeypatch.setattr(train_gpt, name, note)
    monkeypatch.setattr(train_gpt, "choose_kernels", lambda c, device: Kernels("flash", ("loss", "mlp")))
    plain, fused, tokens = build(c), train_gpt.make_model(c, CPU), random_tokens(c, seq_len=17)
    fused.load_state_dict(plain.state_dict())
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, fused)]
    assert launched == ["LinearLeakySquare"] * c.num_layers + ["SoftcappedNLL"]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fused(tokens), plain(tokens), atol=1e-4, rtol=1e-4)
    sum(loss.sum() for loss in losses).backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_no_graph_break_in_training_or_in_scoring(tiny_config):
    c = tiny_config()
    model, tokens = GPT(c).init_weights(c.seed), random_tokens(c, seq_len=17)
    for arguments in (dict(targets=tokens[:, 1:]), dict(keep=8), {}):
        torch._dynamo.reset()
        report = torch._dynamo.explain(model)(tokens[:, :-1], **arguments)
        assert (report.graph_count, report.graph_break_count) == (1, 0), report.break_reasons


TRACE = """
import sys, torch, torch.utils._triton, triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from types import SimpleNamespace

# Dynamo knows a kernel where it finds a device for it, and asks that device's compiler what the kernel writes to.
torch.utils._triton.has_triton = lambda: True
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
import train_gpt as T

def zeros(graph, inputs):
    launches.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
    outputs = [None if node is None else node.meta["val"] for node in graph.graph.output_node().args[0]]
    return make_boxed_func(lambda *_: [x if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in outputs])

launches, c = [], T.Config(**eval(sys.argv[1]))
model = T.GPT(c, torch.bfloat16, T.Kernels("math", ("loss", "mlp"))).init_weights(0)
backend = aot_autograd(fw_compiler=zeros, bw_compiler=zeros)
called, tokens = torch.compile(model, backend=backend, dynamic=False, fullgraph=True), torch.ones(2, 16).long()
nll = called(tokens, tokens)
nll.sum().backward()
assert nll.shape == (2, 16) and all(p.grad.shape == p.shape for p in model.parameters())
print(*launches)
"""


def in_a_process_that_compiles(code, cache, *arguments):
    """Run code where Triton's kernels are compiled and not interpreted. Return the words of each line on its output."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= dict(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(cache))
    command = [sys.executable, "-c", code, *map(repr, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@needs_triton
@interpreted
@pytest.mark.slow
def test_the_fused_model_is_one_graph_each_way(tmp_path):
    """Forward: a launch for each layer's MLP and one for the loss. Backward: none. Nothing is executed."""
    assert in_a_process_that_compiles(TRACE, tmp_path, TINY) == [[str(TINY["num_layers"] + 1), "0"]]


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
rows = dict(logits="*bf16", targets="*i64", nll="*fp32", slopes="*bf16")
maps = dict(x="*bf16", weight="*bf16", product="*bf16", squared="*bf16")
for found in (
    ptx(T.softcapped_nll_kernel, dict(V=1024, CAP=30.0, BLOCK=1024), rows),
    ptx(T.softcapped_nll_kernel, dict(V=8192, CAP=30.0, BLOCK=8192), rows, num_warps=16),
    ptx(T.linear_leaky_square_kernel, dict(SLOPE=0.5, K=512, **tile), maps, **options),
):
    print("wgmma" in found[0], "st.local" in found[0], found[1])
"""


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_hopper_gpu(tmp_path):
    """No GPU is needed for that: the product is on tensor cores, PTX has no local memory, shared memory suffices."""
    found = in_a_process_that_compiles(COMPILE, tmp_path)
    assert [wgmma for wgmma, _, _ in found] == ["False", "False", "True"]
    assert all(local == "False" and int(shared) <= 227 * 1024 for _, local, shared in found)
