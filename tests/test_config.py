"""Config: every value is checked where it enters, nothing that looks like a setting is ignored."""

from __future__ import annotations

import ast
import dataclasses
import functools
import os
from pathlib import Path

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

import train_gpt
from conftest import build, examples, stored
from train_gpt import CONFIGS, GPT, MIXERS, BiasNet, Config, Dist, InputError, TrainLoader

FIELDS = dataclasses.fields(Config)
NAMES = [f.name.upper() for f in FIELDS]
SHAPE = [f.name for f in FIELDS if f.metadata["shape"]]
SIZES, SYSTEMS = ("smoke", "cpu"), ("best", "frontier", "pr700", "pr825", "pr1033")


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
        ("VE_LAYERS", "9,x", "several with commas"),
        ("VE_LAYERS", "1.5", "several with commas"),
        ("PHASE", "test", "'both', 'train', 'eval'"),
        ("DEVICE", "tpu", "'auto', 'cpu', 'cuda'"),
        ("DTYPE", "float16", "'auto', 'float32', 'bfloat16'"),
        ("MIXER", "moe", ", ".join(MIXERS)),
        ("HEDGE_EXPERTS", "neural,moe", "unigram"),
        ("HEDGE_EXPERTS", "neural,hedge", "unigram"),
        ("HEDGE_EXPERTS", "", "one value or more"),
        ("QUANT", "int8", "'int6', 'hessian'"),
        ("CODEC", "zstd", "'lzma', 'rans'"),
        ("KERNELS", "loss,attention", "'loss', 'mlp'"),
        ("BACKOFF_CENTERS", "3.0,high", "several with commas"),
        ("TTT_OPTIMIZER", "muon", "'sgd', 'adamw'"),
        ("STAGES", "roundtrip,tt", "'roundtrip', 'sliding', 'ttt', 'mixed'"),
        ("SEED", "-1", "0 to 4294967295"),
        ("NUM_LAYERS", "0", "1 to 256"),
        ("NUM_HEADS", "0", "1 or more"),
        ("NUM_KV_HEADS", "-1", "0 or more"),
        ("QUANT_BITS", "7", "2 to 6"),
        ("CROWN_Q_LAMBDA", "-1.0", "0.0 or more"),
        ("LATE_QAT_THRESHOLD", "1.5", "0.0 to 1.0"),
        ("TARGET_BYTES", "16000001", "1 to 16000000"),
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


NUMBERS = [f for f in FIELDS if type(f.default) in (int, float) and f.name != "ttt_freeze_blocks"]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_every_number_has_a_lower_bound_that_is_enforced(f):
    """All but TTT_FREEZE_BLOCKS: below zero it counts from the last block."""
    low, high = f.metadata["low"], f.metadata["high"]
    assert f"{low}" in refusal({f.name.upper(): str(low - 1)})
    assert (f"{high}" if high < train_gpt.LARGEST else "or more") in refusal({f.name.upper(): str(high + 1)})


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


# Names that other programs use too. A setting of such a family is caught if it is nearly one of ours, and only then.
GENERAL = {"RUN", "LOG", "DATA", "NUM", "MAX", "MIN", "MODEL", "TORCH", "TOKENIZER", "TRAIN", "EVAL", "DIST"}
GENERAL |= {"ENABLE", "SKIP"}
FAMILIES = sorted({name.partition("_")[0] for name in NAMES if "_" in name} - GENERAL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_name_of_a_family_is_refused_with_the_familys_names(family):
    name = f"{family}_QWERTZUIOP"
    members = [known for known in NAMES if known.startswith(f"{family}_")]
    assert refusal({name: "7"}) == f"unknown setting {name}=7: did you mean {', '.join(members)}?"


@pytest.mark.parametrize("family", sorted(GENERAL))
def test_a_general_family_is_left_to_other_programs(family):
    """RUN_ID and DATA_PATH are settings; RUN_MODE and DATA_CENTER are other programs' names."""
    assert any(name.startswith(f"{family}_") for name in NAMES)
    assert Config.from_env({f"{family}_QWERTZUIOP": "7"}) == Config()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_name_alone_or_in_small_letters_is_not_taken_for_a_setting(family):
    assert family in NAMES or Config.from_env({family: "1", f"{family.lower()}_qwertzuiop": "1"}) == Config()


@pytest.mark.parametrize(
    "name",
    [
        *("EMA_ENABLED", "TTT_FOO", "TTT_ENABLED", "SWA_ENABLED", "XSA_ON", "MUON_BETA2", "LATE_QAT"),
        *("LATE_QAT_ENABLED", "CROWN_Q", "MATRIX_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS", "HEAD_LR", "LN_SCALE"),
        *("QAT_ENABLED", "NGRAM_BUCKETS", "BACKOFF_CENTER", "HEDGE_LR", "LOOP_MLPS", "GATE_WIDTH", "WEIGHT_DECAY"),
    ],
)
def test_an_unknown_name_of_a_published_script_is_refused_and_not_ignored(name):
    message = refusal({name: "1"})
    assert name in message and ("did you mean" in message or "settings are" in message)


def test_every_name_that_published_scripts_read_is_a_setting_or_refused():
    names = (CONFIGS / "other_scripts.txt").read_text().split()
    assert len(names) == len(set(names)) > 250 and not set(names) & set(NAMES)
    assert all(f"unknown setting {name}=1" in refusal({name: "1"}) for name in names)
    assert "did you mean DATA_PATH" in refusal(dict(DATA_DIR="x"))


@pytest.mark.parametrize(
    ("name", "text"), [("PHASE", "both\r"), ("RUN_ID", "a\nb"), ("RUN_ID", "\udcff"), ("SEED", "1\n")]
)
def test_a_line_break_in_a_value_is_named(name, text):
    assert f"{name}={text!r}: allowed are printable characters" in refusal({name: text})


def test_a_number_of_any_length_is_out_of_range_or_does_not_parse():
    assert "out of range" in refusal(dict(ITERATIONS="9" * 310))
    assert "does not parse" in refusal(dict(ITERATIONS="9" * 5000))
    assert "out of range" in refusal(dict(MATRIX_LR="1e999")) and "out of range" in refusal(dict(ADAM_EPS="0"))


@pytest.mark.parametrize(
    "env",
    [
        dict(PATH="/usr/bin", HOME="/root", LANG="C.UTF-8", USER="x", SHELL="/bin/sh", TERM="xterm", PWD="/", TZ="UTC"),
        dict(
            OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="0", NCCL_DEBUG="INFO", TRITON_CACHE_DIR="x"
        ),
        dict(MASTER_ADDR="localhost", MASTER_PORT="29500", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", GROUP_RANK="0"),
        dict(LOCAL_WORLD_SIZE="1", ROLE_RANK="0", ROLE_NAME="default", TORCHELASTIC_RUN_ID="none"),
        dict(TRAIN_PORT="80", STAGE="dev", EVAL_HOST="x", DIST_URL="x", DATA_CENTER="x", MODE="x", SEEDS_URL="x"),
        dict(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="0", TORCHELASTIC_USE_AGENT_STORE="True"),
        dict(os.environ),
    ],
    ids=["shell", "threads", "ranks", "torchrun", "others", "torchelastic", "real"],
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
        (dict(NUM_LOOPS="2", LOOP_START="6"), "LOOP_END=5"),
        (dict(LANES="1", LANES_START_LAYER="11"), "LANES_START_LAYER=11"),
        (dict(LANES="1", LANES_START_LAYER="5", NUM_LOOPS="2"), "LANES_START_LAYER=5"),
        (dict(NUM_LAYERS="4"), "NUM_LAYERS=4"),
        (dict(BIGRAM_VOCAB_SIZE="1"), "BIGRAM_VOCAB_SIZE=1"),
        (dict(TRAIN_BATCH_TOKENS="2047"), "TRAIN_BATCH_TOKENS=2047"),
        (dict(EVAL_STRIDE="2049"), "EVAL_STRIDE=2049"),
        (dict(TTT_FREEZE_BLOCKS="12"), "TTT_FREEZE_BLOCKS=12"),
        (dict(MAX_WALLCLOCK_SECONDS="45"), "RESERVE_SECONDS=45.0"),
        (dict(RESERVE_SECONDS="600"), "MAX_WALLCLOCK_SECONDS=600.0"),
        (dict(QUANT="hessian"), "LATE_QAT_THRESHOLD=0"),
        (dict(BACKOFF_CENTERS=""), "BACKOFF_CENTERS"),
        (dict(STAGES="mixed,ttt,mixed"), "STAGES=mixed,ttt,mixed"),
        (dict(HEDGE_EXPERTS="flat,flat"), "HEDGE_EXPERTS=flat,flat"),
        (dict(NGRAM_ORDERS="2,3"), "NGRAM_ORDERS=2,3"),
        (dict(NGRAM_ORDERS="0,1,2"), "NGRAM_ORDERS=0"),
        (dict(NGRAM_ORDERS="2,1"), "NGRAM_ORDERS=2,1"),
        (dict(NGRAM_ORDERS="1,2,65"), "NGRAM_ORDERS=65"),
        (dict(MIXER="tilt", NGRAM_ORDERS="1,2,3"), "16"),
        (dict(HEDGE_EXPERTS="tilt", NGRAM_ORDERS="1,2,3"), "16"),
        (dict(STAGES=""), "STAGES"),
        (dict(RUN_ID="a/b"), "RUN_ID=a/b"),
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
        dict(NUM_KV_HEADS="0"),
        dict(TTT_FREEZE_BLOCKS="-2"),
        dict(TTT_FREEZE_BLOCKS="-99"),
        dict(MAX_WALLCLOCK_SECONDS="0.0"),
        dict(MAX_WALLCLOCK_SECONDS="60.5"),
        dict(MAX_WALLCLOCK_SECONDS="1.0", RESERVE_SECONDS="0.0"),
        dict(QUANT="hessian", LATE_QAT_THRESHOLD="0.0"),
        dict(QUANT="hessian", PHASE="eval", ARTIFACT_PATH="x.artifact"),
        dict(BACKOFF_BASE="0.0", BACKOFF_RANGE="1.0", BACKOFF_CENTERS="-1.5"),
        dict(MIXER="tilt"),
        dict(NGRAM_ORDERS="1,2,64"),
        dict(KERNELS=""),
        dict(XSA_LAST_N="0"),
        dict(STAGES="mixed"),
        dict(PHASE="eval", ARTIFACT_PATH="x.artifact"),
    ],
)
def test_the_edges_of_what_is_allowed_are_allowed(env):
    c = Config.from_env(env)
    assert all(line in c.lines() for line in (f"{k}={v.replace(' ', '')}" for k, v in env.items()))


@pytest.mark.parametrize("num_kv_heads", [0, 1, 2, 4])
def test_no_kv_heads_are_as_many_as_heads(num_kv_heads, tiny_config):
    c = tiny_config(num_kv_heads=num_kv_heads)
    assert c.kv_heads == (num_kv_heads or 4)
    other = dataclasses.replace(c, num_kv_heads=c.kv_heads)
    assert torch.equal(logits_of(c), logits_of(other))


# Presets: files of NAME=value lines


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """write(name=text, ...) puts files in a folder of presets of its own."""
    monkeypatch.setattr(train_gpt, "CONFIGS", tmp_path)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.env").write_text(text, encoding="utf-8")

    return write


def test_a_preset_replaces_defaults_and_the_environment_replaces_the_preset(presets):
    presets(small="NUM_LAYERS=3\nVE_LAYERS=0,2\nSMEAR_GATE=0\nDATA_PATH=some/where\n")
    small = Config(preset="small", num_layers=3, ve_layers=(0, 2), smear_gate=False, data_path="some/where")
    assert Config.from_env(dict(PRESET="small")) == small
    other = Config.from_env(dict(PRESET="small", NUM_LAYERS="5", SEED="7"))
    assert other == dataclasses.replace(small, num_layers=5, seed=7)


@pytest.mark.parametrize(("names", "layers", "seed"), [("a,b", 4, 1), ("b,a", 3, 1), ("a", 3, 1), ("b", 4, 1337)])
def test_of_two_presets_the_later_one_wins(presets, names, layers, seed):
    presets(a="NUM_LAYERS=3\nSEED=1\nVE_LAYERS=0", b="NUM_LAYERS=4\nVE_LAYERS=1")
    c = Config.from_env(dict(PRESET=names))
    assert (c.num_layers, c.seed, c.preset) == (layers, seed, names)


def test_the_later_of_two_lines_wins_and_may_put_a_default_back(presets):
    presets(a="SEED=1\nSEED=2", b="SEED=1337")
    assert Config.from_env(dict(PRESET="a")).seed == 2
    assert Config.from_env(dict(PRESET="a,b")) == Config(preset="a,b")


def test_comments_blank_lines_and_spaces_of_a_preset_do_not_count(presets):
    presets(a="# SEED=1\n\n  SEED = 2   # SEED=3\n\t\nVE_LAYERS=\t# none\n RUN_ID =caf\u00e9#x")
    assert Config.from_env(dict(PRESET="a")) == Config(preset="a", seed=2, ve_layers=(), run_id="caf\u00e9")


def test_no_preset_and_an_empty_one_are_the_defaults(presets):
    presets(a="# nothing\n")
    assert Config.from_env(dict(PRESET="")) == Config.from_env({}) == Config()
    assert Config.from_env(dict(PRESET="a")) == Config(preset="a")


NO_SETTINGS = ["NUM_LAYER=3", "EMA_ENABLED=1", "FOO=1", "seed=1", "SEED", "SEED 1", "=1", "PRESET=b"]


@pytest.mark.parametrize("line", NO_SETTINGS)
def test_a_line_of_a_preset_that_is_no_setting_is_refused(presets, line):
    presets(a=f"SEED=1\n{line}\nSEED=2", b="")
    message = refusal(dict(PRESET="a"))
    assert message.startswith("configs/a.env") and repr(line) in message


def test_a_bad_value_in_a_preset_is_refused_as_in_the_environment(presets):
    presets(a="SEED=x", b="MODEL_DIM=500")
    assert refusal(dict(PRESET="a")) == refusal(dict(SEED="x"))
    assert refusal(dict(PRESET="b")) == refusal(dict(MODEL_DIM="500"))
    assert Config.from_env(dict(PRESET="a", SEED="3")).seed == 3


@pytest.mark.parametrize("names", ["big", "a,big", "big,a", "../configs/a", "a.env", "a b"])
def test_an_unknown_preset_is_refused_with_those_that_exist(presets, names):
    presets(a="SEED=1", b="SEED=2")
    message = refusal(dict(PRESET=names))
    wrong = next(name for name in names.split(",") if name not in ("a", "b"))
    assert message == f"PRESET={wrong!r} is not known: allowed are a, b"


def test_the_presets_are_the_sizes_and_the_systems():
    assert {path.stem for path in CONFIGS.glob("*.env")} >= {*SIZES, *SYSTEMS}  # and the best of a sweep


@pytest.mark.parametrize(
    "names", [*SIZES, *SYSTEMS, *(f"{size},{system}" for size in SIZES for system in SYSTEMS), "pr700,best,cpu"]
)
def test_every_preset_alone_and_every_system_at_every_size_is_a_config(names):
    c = Config.from_env(dict(PRESET=names))
    assert Config.from_env(dict(line.split("=", 1) for line in c.lines())) == c
    assert c != Config(preset=names)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_system_sets_nothing_of_the_size(size, system):
    """How many layers, channels, steps and seconds: that is the size's, whichever of the two comes first."""
    dimensions = ("num_layers", "model_dim", "num_heads", "iterations", "train_batch_tokens", "target_bytes")
    alone, both = (Config.from_env(dict(PRESET=names)) for names in (size, f"{size},{system}"))
    assert all(getattr(alone, name) == getattr(both, name) for name in dimensions)


def test_the_default_run_is_the_system_that_was_asked_for():
    c = Config()
    assert (c.quant, c.quant_bits, c.codec, c.mixer, c.stages) == ("int6", 6, "lzma", "hedge", train_gpt.STAGES)
    assert c.crown_q_lambda > 0 and c.late_qat_threshold > 0 and c.complement_alpha > 0 and c.ttt_epochs > 0
    assert {"neural", "unigram", "bigram", "trigram", "backoff"} <= set(c.hedge_experts)


def test_the_values_in_force_are_an_environment_that_gives_them_again(tiny_config):
    odd = Config(ve_layers=(), adam_eps=1e-12, ttt_freeze_blocks=-2, num_kv_heads=0, backoff_centers=(-1.0, 1e-5))
    for c in (Config(), Config.from_env(dict(PRESET="smoke")), tiny_config(), odd):
        assert Config.from_env(dict(line.split("=", 1) for line in c.lines())) == c


PRESETS = [dict(), dict(PRESET="smoke"), dict(PRESET="cpu,best"), dict(PRESET="pr825")]
STRANGE = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "2", "7", "1e9", "1e-9", "nan", "inf", "-inf", "True", "a,b", ",", "9" * 400]),
    st.sampled_from(["sgd", "lzma", "mixed", "mixed,ttt", "0,1,2", "../x", "\n", "\r", "\0", "\ud800", "x" * 5000]),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(max_examples=examples(300), deadline=20_000)
@given(st.sampled_from(PRESETS), st.dictionaries(st.sampled_from(NAMES), STRANGE, min_size=1, max_size=4))
def test_a_strange_environment_is_taken_or_refused_in_one_line(preset, strange):
    """What is taken survives being written and read."""
    try:
        c = Config.from_env(preset | strange)
    except InputError as error:
        event("refused")
        assert len(str(error).splitlines()) == 1
    else:
        event("taken")
        assert Config.from_env(dict(line.split("=", 1) for line in c.lines())) == c


@settings(max_examples=50)
@given(
    st.floats(0, 1e15),
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
    model, loader = GPT(c).init_weights(c.seed), TrainLoader(c, Dist())
    assert 0 <= loader.offset < loader.n and torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).all()


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@functools.cache
def settings_read_outside_config():
    """Names that the script reads from a `c`, a `config`, or an object's own `c` or `config`."""
    tree = ast.parse(Path(train_gpt.__file__).read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.ClassDef) and node.name == "Config")]
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("c", "config", "self.c", "self.config")
    }


# from_env applies the one; batch_seqs and kv_heads read the others.
READ_INSIDE = {"preset", "train_batch_tokens", "num_kv_heads"}


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
    skip_gates_enabled=True,
    gate_window=4,
    num_loops=1,
    loop_start=1,
    loop_end=0,
    lanes=True,
    lanes_start_layer=3,
    logit_softcap=1.0,
    tie_embeddings=False,
)
OTHER_MIXER_SHAPE = dict(mixer_hidden=8, ngram_orders=(1, 2))
OTHER_CODING = dict(quant="hessian", quant_bits=5, codec="rans")


def logits_of(c):
    """Output of a model whose parameters are drawn in the order of their names: a function of c's shape alone."""
    model, generator = GPT(c), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        tokens = torch.tensor([[1, 5, 7, 300, 1, 8, 5, 9]])
        return model(tokens)


def test_the_shape_settings_are_all_covered_below():
    assert {*OTHER_SHAPE, *OTHER_MIXER_SHAPE, *OTHER_CODING} == set(SHAPE) == set(Config().marked("shape"))


@pytest.mark.parametrize("name", OTHER_MIXER_SHAPE)
def test_each_shape_setting_of_the_mixer_changes_its_weights_and_not_the_model(name, tiny_config):
    c, other = tiny_config(), tiny_config(**{name: OTHER_MIXER_SHAPE[name]})
    before, after = ([p.shape for p in BiasNet(config).parameters()] for config in (c, other))
    assert before != after
    assert torch.equal(logits_of(c), logits_of(other))


@pytest.mark.parametrize("name", OTHER_CODING)
def test_each_setting_of_the_coding_changes_the_file_and_not_the_model(name, tiny_config):
    c = tiny_config(late_qat_threshold=0.0)
    other = dataclasses.replace(c, **{name: OTHER_CODING[name]})
    model = build(c)
    files = [train_gpt.pack(model, stored(model, config), BiasNet(config), config, "") for config in (c, other)]
    assert files[0] != files[1]
    assert torch.equal(logits_of(c), logits_of(other))


@pytest.mark.parametrize("name", OTHER_SHAPE)
def test_each_shape_setting_changes_the_model(name, tiny_config):
    parts = dict(num_layers=4, num_loops=2, loop_start=0, loop_end=1, lanes_start_layer=2)
    parts |= dict(lanes=name == "lanes_start_layer")
    c, other = tiny_config(**parts), tiny_config(**parts | {name: OTHER_SHAPE[name]})
    before, after = logits_of(c), logits_of(other)
    assert before.shape != after.shape or not torch.allclose(before, after, atol=1e-4)


def other_value(f, c):
    """A value of the field that the config takes and that is not the one it has."""
    value, kind = getattr(c, f.name), type(f.default)
    if f.name in ("mixer", "hedge_experts"):
        options = ["neural"] if kind is str else [("neural",)]
    elif f.metadata["choices"]:
        options = [choice if kind is not tuple else (choice,) for choice in f.metadata["choices"]]
    elif kind is bool:
        options = [not value]
    elif kind is str:
        options = [value + "x"]
    elif kind is tuple:
        options = [value[1:], value + value[:1]]
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
    c = tiny_config(artifact_path="x", preset="smoke", max_wallclock_seconds=61.0)
    expected = logits_of(c)
    for f in FIELDS:
        if f.name not in (*SHAPE, "doc_isolated"):  # which an evaluation may choose
            assert torch.equal(logits_of(other_value(f, c)), expected), f.name
