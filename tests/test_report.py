"""The report: both formats of the family's logs and our records, unlike runs apart, what is wrong, statistics."""

import json
import math

import pytest

import report

# Written by hand in the first format of the published logs, with the source that they may begin with.
FIRST = """\
seed:{wrong}
step:9/9 val_loss:9.9 val_bpb:9.9
{rule}
Running Python 3.12
{rule}
train_loader:dataset:fineweb10B_sp1024 train_shards:80
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:62021632
model_params:26928220
world_size:8 grad_accum_steps:1
seed:{seed}
step:500/9000 train_loss:2.3992 train_time:41450ms step_avg:82.90ms
step:7179/9000 val_loss:1.9214 val_bpb:1.1379 train_time:599128ms step_avg:83.46ms
stopping_early: wallclock_cap train_time:599128ms step:7179/9000
peak memory allocated: 21471 MiB reserved: 22002 MiB
DIAGNOSTIC post_ema val_loss:1.9196 val_bpb:1.1369 eval_time:1971ms
Serialized model: 106027446 bytes
Code size: 89458 bytes
Total submission size int6+lzma: {size} bytes
final_int6_sliding_window val_loss:1.8939 val_bpb:1.1217 stride:64 eval_time:74066ms
final_int6_sliding_window_exact val_loss:1.89385556 val_bpb:1.12165091
final_int8_zlib_roundtrip_exact val_loss:1.89385556 val_bpb:1.12165091
  ttt_chunk [1893/1893] bpb=1.121512 time=409.7s
legal_ttt val_loss:1.8898 val_bpb:1.1192 eval_time:410268ms
legal_ttt_exact val_loss:{loss} val_bpb:1.11922988
"""
# And in the second.
SECOND = """\
Hyperparameters:
  beta2: 0.99
  data_dir: /workspace/a
  seed: 42
  tokenizer_path: {place}/tokenizers/fineweb_8192.model
  world_size: 8
val_tokens: 40540160
model_params:35943512
0/20000 val_loss: 9.0072 val_bpb: 3.4870
4000/20000 train_loss: 2.9214 train_time: 7.8m tok/s: 6679361
5082/20000 val_loss: 2.8142 val_bpb: 1.0895
stopping_early: wallclock_cap train_time: 588035ms step: 5082/20000
diagnostic pre-quantization post-ema val_loss:2.81173824 val_bpb:1.08851149 eval_time:5580ms
Code size (uncompressed): 157868 bytes
Code size (compressed): 31999 bytes
Total submission size quantized+brotli: 15991018 bytes
ttp: b728/782 bl:2.3635 bb:1.0820 rl:2.3446 rb:1.0810 dl:2306-2324 gd:1
quantized_ttt_phased val_loss:2.79517119 val_bpb:1.08209788 eval_time:293430ms
total_eval_time:301.2s
"""


@pytest.fixture
def write(tmp_path):
    """write(name, text) -> the path of a file."""

    def write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def first(seed=1337, loss="1.88976776", size=15977386):
    return FIRST.format(seed=seed, loss=loss, size=size, wrong=99, rule="=" * 100)


def record(**changes):
    """A record of this project with the fields that the report reads."""
    stage = dict(val_loss=2.0, val_bpb=1.5, seconds=10.0, tokens=100, documents=3, whole_stream=True)
    made = dict(
        seed=7,
        config=dict(seed=7, run_id="a", matrix_lr=0.02, stages=["sliding", "ttt", "mixed"], smear_gate=True),
        artifact=dict(code_bytes=100, model_bytes=900, total_bytes=1000, part_bytes=dict(codes=800)),
        train=dict(steps=50, step_avg_ms=20.0, seconds=dict(total=1.5)),
        hardware="8 x NVIDIA H100 80GB HBM3",
        stages=dict(sliding=dict(stage, val_bpb=1.7), ttt=dict(stage, val_bpb=1.6), mixed=stage),
        val_bpb=1.5,
    )
    return json.dumps(made | changes)


def test_a_log_of_the_first_format_is_read_behind_the_source_that_it_begins_with(write):
    found = report.read(write("train_seed1337.log", first()))
    assert (found.seed, found.world_size, found.n_params, found.val_tokens) == (1337, 8, 26928220, 62021632)
    assert (found.steps, found.train_seconds, found.step_ms) == (7179, 599.128, pytest.approx(83.456, abs=1e-3))
    assert list(found.stages) == ["DIAGNOSTIC post_ema", "final_int6_sliding_window", "legal_ttt"]
    assert found.final == report.Stage(1.88976776, 1.11922988, 410.268)
    assert (found.code_bytes, found.total_bytes, found.problems) == (89458, 15977386, [])


def test_the_only_score_of_the_first_scripts_is_kept(write):
    kept = [line for line in first().splitlines() if not line.startswith(("DIAG", "final_int6", "legal"))]
    assert list(report.read(write("train.log", "\n".join(kept) + "\n")).stages) == [report.REPEATED]


def test_a_log_of_the_second_format_is_read(write):
    found = report.read(write("train_seed42.log", SECOND.format(place="/root")))
    assert (found.seed, found.world_size, found.n_params, found.val_tokens) == (42, 8, 35943512, 40540160)
    assert (found.steps, found.train_seconds, found.eval_seconds) == (5082, 588.035, 301.2)
    assert list(found.stages) == ["diagnostic pre-quantization post-ema", "quantized_ttt_phased"]
    assert (found.final.val_bpb, found.code_bytes, found.problems) == (1.08209788, 31999, [])


def test_our_logs_and_records_state_the_same(tmp_path):
    logs = report.ROOT / "logs"
    text, data = (report.read(logs / f"smoke_sample.{ending}") for ending in ("txt", "json"))
    same = "seed steps code_bytes total_bytes val_tokens world_size on_cpu settings problems"
    for name in same.split():
        assert getattr(text, name) == getattr(data, name), name
    assert text.train_seconds == pytest.approx(data.train_seconds, abs=0.1)
    assert text.step_ms == pytest.approx(data.step_ms, rel=1e-4)
    assert text.eval_seconds == pytest.approx(data.eval_seconds, abs=0.2)
    scores = [[(f"{x.val_loss:.8f}", f"{x.val_bpb:.8f}") for x in found.stages.values()] for found in (text, data)]
    assert scores[0] == scores[1] and len(scores[0]) == 4


def test_mean_deviation_and_both_rules(write, run_report):
    ours = [write(f"a_seed{seed}.log", first(seed, loss)) for seed, loss in ((1, "1.880"), (2, "1.881"), (3, "1.882"))]
    theirs = [
        write(f"b_seed{seed}.log", first(seed, loss)) for seed, loss in ((1, "1.887"), (2, "1.888"), (3, "1.889"))
    ]
    status, out, _ = run_report(*ours, "--baseline", *theirs)
    mean, std = (next(line.split() for line in out if line.startswith(name)) for name in ("mean", "std"))
    assert status == 0 and mean[-1] == "1.88100" and std[-1] == "0.00100"
    # By hand: t = (0.007 - 0.005) / sqrt(2 * 0.001^2 / 3) = 2.449 with 4 degrees of freedom, one-sided.
    assert "p = 0.03524, NOT met" in out[-3] and "p < 0.25: p = 0.0005" in out[-2] and out[-2].endswith(", met")
    same = run_report(*ours, "--baseline-loss", 1.888, 0.001, 3)[1]
    assert same[-4:] == out[-4:]
    assert math.isnan(report.welch(report.Sample(1.0, 0.0, 1), report.Sample(2.0, 0.1, 3)))


@pytest.mark.parametrize("form", ["markdown", "csv"])
def test_other_forms_hold_the_same_cells(write, run_report, form):
    path = write("a_seed1.log", first(1))
    cells = [line.split() for line in run_report(path)[1][:2]]
    split = {"markdown": lambda x: x.strip("| ").split(" | "), "csv": lambda x: x.split(",")}[form]
    found = [split(line) for line in run_report(path, f"--{form}")[1] if not line.startswith("|---")][:2]
    assert [" ".join(line) for line in found] == [" ".join(line) for line in cells]


def test_unlike_configurations_are_not_averaged_and_what_differs_is_printed(write, run_report):
    a, b = write("a.json", record()), write("b.json", record(config=dict(seed=8, run_id="b", matrix_lr=0.03), seed=8))
    status, out, _ = run_report(a, b)
    assert status == 0 and not [line for line in out if line.startswith("mean")]
    assert "!   matrix_lr: 0.02 | 0.03" in out and "! 2 configurations, which are not averaged. They differ in" in out
    assert run_report(a, "--baseline", a, b)[2][0].startswith(
        "error: --baseline: its runs differ in matrix_lr: 0.02 | 0.03"
    )
    moved = [write(f"{i}.log", SECOND.format(place=place)) for i, place in enumerate(("/root/x", "/workspace"))]
    assert len(report.by_configuration(list(map(report.read, moved)))) == 1  # two machines, one system


WRONG = {
    "a partial stream": (lambda text: text.replace('"whole_stream": true', '"whole_stream": false'), "PARTIAL"),
    "a byte over": (lambda text: text.replace('"total_bytes": 1000', '"total_bytes": 16000001'), "1 over the cap"),
    "parts and a whole": (
        lambda text: text.replace('"total_bytes": 1000', '"total_bytes": 999'),
        "of code are not 999",
    ),
    "600.1 s": (lambda text: text.replace('"total": 1.5', '"total": 600.1'), "training took 600.100 s of 600"),
    "a late evaluation": (lambda text: text.replace('"seconds": 10.0', '"seconds": 400.0'), "evaluation took 800.000"),
    "another headline": (lambda text: text.replace('"val_bpb": 1.5}', '"val_bpb": 1.4999}'), "its last stage's 1.5"),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_a_run_stands_under_the_table(write, run_report, change, words):
    assert change(record()) != record()
    status, out, _ = run_report(write("a.json", change(record())))
    assert status == 0 and [line for line in out if line.startswith("! a.json: ") and words in line], out
    assert not [line for line in run_report(write("b.json", record()))[1] if line.startswith("!")]


def test_what_is_wrong_with_a_log_stands_under_the_table(write, run_report):
    logs = {
        "the log ends in the middle of a line": first()[:-30],
        "22,614": first(size=report.CAP_BYTES + 22_614),
        "training took 600.100 s": first().replace("599128ms", "600100ms"),
        "its name says seed 5, its lines 1337": first(),
        "two runs in one log": first() + first(),
        "15,887,927 bytes of model and 89,458 of code are not 15,977,386": first().replace(
            "Code size", "Serialized model int6+lzma: 15887927 bytes\nCode size"
        ),
        "val_bpb is nan": first(loss="nan").replace("1.11922988", "nan"),
    }
    for words, text in logs.items():
        out = run_report(write("x_seed5.log", text))[1]
        assert [line for line in out if line.startswith("! x_seed5.log: ") and words in line], (words, out)
    own = (report.ROOT / "logs" / "smoke_sample.txt").read_text()
    stated = own.rstrip().splitlines()[-1].split("val_bpb:")[1].split()[0]
    out = run_report(
        write("own.txt", own.replace(f"final val_bpb:{stated}", f"final val_bpb:{float(stated) - 1e-4:.8f}"))
    )[1]
    assert [line for line in out if "the last stage another value" in line]
    cut = own.replace("whole stream", "PARTIAL stream adaptation CUT by MAX_EVAL_SECONDS after 3 of 9 chunks")
    assert [line for line in run_report(write("own.txt", cut))[1] if "CUT by MAX_EVAL_SECONDS" in line]


def test_two_logs_of_one_run_and_one_without_its_score_are_named(write, run_report):
    a, b = write("a.json", record()), write("b.json", record())
    out = run_report(a, b)[1]
    assert "! seed 7 stands in 2 logs: one of them counts" in out and "! RUN_ID=a stands in 2 logs" in out
    unfinished = first(2).partition("DIAGNOSTIC")[0]
    out = run_report(write("c.log", first(1)), write("d.log", unfinished))[1]
    assert "! d.log: no score" in out and [line for line in out if line.startswith("!   scores: ")]


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", "{", "no record of a run"),
        ("a.json", "[]", "no record of a run"),
        ("a.json", '{"config": {}}', "no record of a run"),
        ("a.log", "nothing\n", "no step and no score"),
        ("a.log", "", "no step and no score"),
    ],
)
def test_what_is_no_log_costs_one_line(write, run_report, tmp_path, name, text, words):
    status, _, errors = run_report(write(name, text))
    assert status == 2 and len(errors) == 1 and words in errors[0] and errors[0].startswith(f"error: {tmp_path}/{name}")
    assert run_report(tmp_path / "none.log")[0] == 2
