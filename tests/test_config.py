"""Config: every value is checked where it enters, nothing that looks like a setting is ignored."""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import Alone
from train_gpt import GPT, PRESETS, Config, InputError, Maxent, TrainLoader

FIELDS = dataclasses.fields(Config)
SHAPE = [f.name for f in FIELDS if f.metadata["shape"]]


def refusal(env):
    """The one-line message with which an environment is refused."""
    with pytest.raises(InputError) as caught:
        Config.from_env(env)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_an_empty_environment_gives_the_declared_defaults():
    c = Config.from_env({})
    assert all(getattr(c, f.name) == f.default for f in FIELDS)
    assert (c.num_layers, c.model_dim, c.vocab_size, c.eval_stride) == (11, 512, 1024, 256)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("SEED", "x", "a whole number"),
        ("SEED", "1.5", "a whole number"),
        ("SEED", "", "a whole number"),
        ("MATRIX_LR", "fast", "a number"),
        ("SMEAR_GATE", "yes", "0 or 1"),
        ("TORCH_COMPILE", "True", "0 or 1"),
        ("VE_LAYERS", "9,x", "whole numbers with commas"),
        ("VE_LAYERS", "1.5", "whole numbers with commas"),
        ("PHASE", "test", "'both', 'train', 'eval'"),
        ("DEVICE", "tpu", "'auto', 'cpu', 'cuda'"),
        ("DTYPE", "float16", "'auto', 'float32', 'bfloat16'"),
        ("PRESET", "big", "'', 'smoke'"),
        ("MIXER", "moe", "'maxent', 'tilt'"),
        ("TTT_OPTIMIZER", "muon", "'sgd', 'adamw'"),
        ("STAGES", "roundtrip,tt", "'roundtrip', 'sliding', 'ttt', 'mixed'"),
        ("SEED", "-1", "0 to 4294967295"),
        ("NUM_LAYERS", "0", "1 or more"),
        ("VOCAB_SIZE", "256", "257 to 65536"),
        ("VOCAB_SIZE", "65537", "257 to 65536"),
        ("BETA1", "1.0", "0.0 to 0.9999"),
        ("COMPLEMENT_ALPHA", "-0.1", "0.0 to 1.0"),
        ("MATRIX_LR", "nan", "0.0 or more"),
        ("MATRIX_LR", "inf", "0.0 or more"),
        ("GRAD_CLIP_NORM", "-inf", "0.0 or more"),
        ("EMA_DECAY", "1", "0.0 to 0.999999"),
        ("TTT_TEMPERATURE", "0", "0.1 to 10.0"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_its_value_and_what_is_allowed(name, value, allowed):
    message = refusal({name: value})
    assert message.startswith(f"{name}=")
    assert allowed in message
    assert value.split(",")[-1] in message


@pytest.mark.parametrize("f", [f for f in FIELDS if type(f.default) in (int, float)], ids=lambda f: f.name)
def test_every_number_has_a_lower_bound_that_is_enforced(f):
    low, high = f.metadata["low"], f.metadata["high"]
    assert f"{low}" in refusal({f.name.upper(): str(low - 1)})
    if high is not None:
        assert f"{high}" in refusal({f.name.upper(): str(high + 1)})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("ITERATION", "ITERATIONS"),
        ("MODEL_DIMS", "MODEL_DIM"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
        ("MATRIX_LRS", "MATRIX_LR"),
    ],
)
def test_a_near_miss_is_told_the_right_name(name, meant):
    assert f"did you mean {meant}?" in refusal({name: "1"})


@pytest.mark.parametrize(
    "name",
    [
        *("EMA_ENABLED", "TTT_FOO", "TTT_ENABLED", "SWA_ENABLED", "XSA_ON", "MUON_BETA2", "LATE_QAT"),
        *("LATE_QAT_ENABLED", "LATE_QAT_THRESHOLD", "CROWN_Q_LAMBDA", "MATRIX_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS"),
    ],
)
def test_an_unknown_name_of_a_family_is_refused_and_not_ignored(name):
    message = refusal({name: "1"})
    assert name in message and ("did you mean" in message or "settings are" in message)


@pytest.mark.parametrize(
    "env",
    [
        dict(PATH="/usr/bin", HOME="/root", LANG="C.UTF-8", USER="x", SHELL="/bin/sh", TERM="xterm", PWD="/", TZ="UTC"),
        dict(
            OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="0", NCCL_DEBUG="INFO", TRITON_CACHE_DIR="x"
        ),
        dict(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", GROUP_RANK="0"),
        dict(LOCAL_WORLD_SIZE="1", ROLE_RANK="0", ROLE_NAME="default", TORCHELASTIC_RUN_ID="none"),
        dict(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_USE_AGENT_STORE="True"),
        dict(os.environ),
    ],
    ids=["shell", "threads", "ranks", "torchrun", "torchelastic", "real"],
)
def test_ordinary_variables_are_left_alone(env):
    assert Config.from_env(env) == Config()


@pytest.mark.parametrize(
    ("env", "named"),
    [
        (dict(MODEL_DIM="500"), "NUM_HEADS=8"),
        (dict(NUM_HEADS="8", NUM_KV_HEADS="3"), "NUM_KV_HEADS=3"),
        (dict(NUM_KV_HEADS="16"), "NUM_KV_HEADS=16"),
        (dict(ROPE_DIMS="15"), "ROPE_DIMS=15"),
        (dict(ROPE_DIMS="66"), "ROPE_DIMS=66"),
        (dict(VE_LAYERS="9,11"), "VE_LAYERS=9,11"),
        (dict(VE_LAYERS="-1"), "VE_LAYERS=-1"),
        (dict(NUM_LAYERS="4"), "VE_LAYERS=9,10"),
        (dict(BOS_ID="1024"), "BOS_ID=1024"),
        (dict(BIGRAM_VOCAB_SIZE="1"), "BIGRAM_VOCAB_SIZE=1"),
        (dict(TRAIN_BATCH_TOKENS="2047"), "TRAIN_BATCH_TOKENS=2047"),
        (dict(EVAL_STRIDE="2049"), "EVAL_STRIDE=2049"),
        (dict(TTT_FREEZE_BLOCKS="12"), "TTT_FREEZE_BLOCKS=12"),
        (dict(STAGES=""), "STAGES"),
        (dict(RUN_ID="a/b"), "RUN_ID='a/b'"),
        (dict(PHASE="eval"), "ARTIFACT_PATH"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(env, named):
    assert named in refusal(env)


@pytest.mark.parametrize(
    "env",
    [
        dict(EVAL_STRIDE="2048"),
        dict(TTT_FREEZE_BLOCKS="11"),
        dict(ROPE_DIMS="64"),
        dict(ROPE_DIMS="0"),
        dict(VE_LAYERS=""),
        dict(VE_LAYERS="0, 10"),
        dict(BIGRAM_VOCAB_SIZE="0"),
        dict(NUM_KV_HEADS="8"),
        dict(XSA_LAST_N="0"),
        dict(STAGES="mixed"),
        dict(PHASE="eval", ARTIFACT_PATH="x.artifact"),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(env):
    c = Config.from_env(env)
    assert all(line in c.lines() for line in (f"{k}={v.replace(' ', '')}" for k, v in env.items()))


def test_a_preset_replaces_defaults_and_the_environment_replaces_the_preset():
    smoke = Config.from_env(dict(PRESET="smoke"))
    assert all(getattr(smoke, name) == value for name, value in PRESETS["smoke"].items())
    assert smoke.seed == Config().seed
    other = Config.from_env(dict(PRESET="smoke", NUM_LAYERS="5", SEED="7"))
    assert other == dataclasses.replace(smoke, num_layers=5, seed=7)


def test_the_values_in_force_are_an_environment_that_gives_them_again(tiny_config):
    for c in (Config(), Config.from_env(dict(PRESET="smoke")), tiny_config(), Config(ve_layers=(), adam_eps=1e-12)):
        assert Config.from_env(dict(line.split("=", 1) for line in c.lines())) == c


@settings(max_examples=50)
@given(
    st.floats(0, 1e30),
    st.integers(0, 2**31),
    st.booleans(),
    st.lists(st.integers(0, 10), max_size=4, unique=True),
    st.lists(st.sampled_from(train_gpt.STAGES), min_size=1, unique=True),
)
def test_any_allowed_value_survives_being_written_and_read(rate, seed, on, layers, stages):
    values = dict(matrix_lr=rate, seed=seed, smear_gate=on, ve_layers=tuple(layers), stages=tuple(stages))
    c = Config(**values)
    assert Config.from_env(dict(line.split("=", 1) for line in c.lines())) == c


@pytest.mark.parametrize("seed", [0, 2**31, 10**13, 10**14, 2**63, 2**64])
def test_a_seed_is_refused_at_once_or_works_everywhere(seed, tiny_config):
    try:
        c = tiny_config(seed=seed)
    except InputError as error:
        assert f"SEED={seed}" in str(error)
        return
    model, loader = GPT(c).init_weights(c), TrainLoader(c, Alone())
    assert 0 <= loader.offset < loader.n and torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def settings_read_outside_config():
    """Names that the script reads from a `c`, a `config`, or an object's own `c` or `config`."""
    tree = ast.parse(Path(train_gpt.__file__).read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and node.name == "Config")]
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("c", "config", "self.c", "self.config")
    }


READ_INSIDE = {"preset", "train_batch_tokens"}  # from_env applies the one, batch_seqs and batch_tokens read the other


@pytest.mark.parametrize("name", [f.name for f in FIELDS if f.name not in READ_INSIDE])
def test_every_setting_is_read_by_the_code(name):
    assert name in settings_read_outside_config()


OTHER_SHAPE = dict(
    vocab_size=321,
    bos_id=5,
    num_layers=3,
    model_dim=64,
    num_heads=2,
    num_kv_heads=4,
    mlp_mult=3.0,
    leaky_slope=0.25,
    xsa_last_n=2,
    bigram_vocab_size=32,
    bigram_dim=4,
    value_residual=False,
    ve_layers=(0,),
    ve_dim=4,
    smear_gate=False,
    rope_dims=2,
    rope_base=100.0,
    layer_scale=False,
    unet_skips=False,
    logit_softcap=1.0,
    tie_embeddings=False,
)
OTHER_MIXER_SHAPE = dict(mixer_hidden=8, ngram_orders=(1, 2))


def logits_of(c):
    """Output of a model whose parameters are drawn in the order of their names: a function of c's shape alone."""
    model, generator = GPT(c), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        tokens = torch.tensor([[1, 5, 7, 300, 1, 8, 5, 9]])
        return model(tokens)


def test_the_shape_settings_are_all_covered_below():
    covered = {*OTHER_SHAPE, *OTHER_MIXER_SHAPE, "codec"}  # tests/test_artifact.py has both codecs
    assert covered == set(SHAPE) == set(Config().marked("shape"))


@pytest.mark.parametrize("name", OTHER_MIXER_SHAPE)
def test_each_shape_setting_of_the_mixer_changes_its_weights_and_not_the_model(name, tiny_config):
    c, other = tiny_config(), tiny_config(**{name: OTHER_MIXER_SHAPE[name]})
    before, after = ([p.shape for p in Maxent(config).parameters()] for config in (c, other))
    assert before != after
    assert torch.equal(logits_of(c), logits_of(other))


@pytest.mark.parametrize("name", OTHER_SHAPE)
def test_each_shape_setting_changes_the_model(name, tiny_config):
    c, other = tiny_config(), tiny_config(**{name: OTHER_SHAPE[name]})
    before, after = logits_of(c), logits_of(other)
    assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-4)


def other_value(f, c):
    """A value of the field that the config takes and that is not the one it has."""
    value, kind = getattr(c, f.name), type(f.default)
    if f.metadata["choices"]:
        options = [choice if kind is not tuple else (choice,) for choice in f.metadata["choices"]]
    elif kind is bool:
        options = [not value]
    elif kind is str:
        options = [value + "x", value + "x.npz"]
    else:
        options = [value + 1, value * 2, value - 1, value / 2 if kind is float else value // 2, 0.5]
    for option in options:
        try:
            if option != value:
                return dataclasses.replace(c, **{f.name: option})
        except InputError:
            continue
    raise AssertionError(f"no other value of {f.name} is allowed")


def test_no_other_setting_changes_the_model(tiny_config):
    c = tiny_config(artifact_path="x", preset="smoke")
    expected = logits_of(c)
    for f in FIELDS:
        if f.name not in SHAPE:
            assert torch.equal(logits_of(other_value(f, c)), expected), f.name
