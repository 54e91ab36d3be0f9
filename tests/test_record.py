"""Record folders: one made from runs holds what their logs state; one with a fault is not called sound."""

import hashlib
import json
import shutil

import pytest
from test_report import first

import record
import train_gpt

CHECKS = ("score before update", "single pass", "causal", "distribution", "training text only", "separation")


def config_of(seed, **changes):
    places = dict(seed=seed, run_id=f"run{seed}", data_path="data/fineweb", late_qat_threshold=0.15)
    return places | dict(mixer="hedge", hedge_experts=["neural", "maxent"]) | changes


def run_of(seed, folder, **changes):
    """Write the log and the record of a run on 8 GPUs; return the record's path."""
    script = (record.ROOT / "train_gpt.py").read_bytes()
    sha = hashlib.sha256(script).hexdigest()
    stage = dict(
        val_loss=1.88, seconds=100.0, tokens=62_021_845, documents=50_000, whole_stream=True, has_manifest=True
    )
    bpb = 1.11 + seed / 1000
    made = dict(
        run_id=f"run{seed}",
        seed=seed,
        config=config_of(seed),
        artifact=dict(code_bytes=len(script), total_bytes=15_990_000 + seed, part_bytes={}, sha256=f"artifact{seed}"),
        train=dict(steps=7000, step_avg_ms=83.0, seconds=dict(total=595.0)),
        hardware="8 x NVIDIA H100 80GB HBM3",
        versions=dict(torch="2.11.0"),
        stages=dict(roundtrip=dict(stage, val_bpb=1.14), mixed=dict(stage, val_bpb=bpb)),
        final_stage="mixed",
        val_bpb=bpb,
    )
    made |= changes
    path, c, ranks = folder / f"run{seed}.json", made["config"], made["hardware"].split()[0]
    path.write_text(json.dumps(made))
    lines = [f"{name.upper()}={train_gpt.show(x)}" for name, x in c.items()]
    lines += [f"hardware: {made['hardware']}", f"script_sha256:{sha}", f"seed:{seed}"]
    lines += [f"world_size:{ranks} grad_accum_steps:1", "val_loader:shards pattern=x tokens:62021845 documents:50000"]
    lines += ["train_loader:dataset:data/fineweb train_shards:80 sequences:9", "model_params:27000000"]
    lines += ["step:7000/9000 train_loss:2.0 train_time:581000ms step_avg:83.00ms"]
    lines += ["train_seconds: steps:581.0 total:595.0", f"Code size: {len(script)} bytes"]
    lines += [f"Total submission size int6+lzma: {15_990_000 + seed} bytes cap:16000000 margin:1"]
    lines += ["final_int6_roundtrip_exact val_loss:1.88000000 val_bpb:1.14000000"]
    lines += [f"mixed_exact val_loss:1.88000000 val_bpb:{bpb:.8f}", "eval_seconds: 200.0 of 600"]
    lines += [f"final val_bpb:{bpb:.8f} stage:mixed documents:50000 whole stream"]
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return path


def audit_of(seed, folder, failed=()):
    checks = {name: dict(passed=name not in failed, figure="") for name in CHECKS}
    path = folder / f"audit{seed}.json"
    sha = hashlib.sha256((record.ROOT / "train_gpt.py").read_bytes()).hexdigest()
    made = dict(artifact_sha256=f"artifact{seed}", script_sha256=sha, stage="mixed", run_id=f"run{seed}", tokens=8192)
    path.write_text(json.dumps(made | dict(checks=checks)))
    return path


def test_a_record_states_what_its_runs_and_audits_do(tmp_path, run_report):
    runs, audits = ([make(seed, tmp_path) for seed in (1, 2, 3)] for make in (run_of, audit_of))
    assert run_report("--record", tmp_path / "made", *runs, "--audit", *audits)[0] == 0
    made = json.loads((tmp_path / "made" / "submission.json").read_text())
    assert (made["val_bpb"], made["val_bpb_std"], made["seeds"]) == (1.112, 0.001, [1, 2, 3])
    assert made["seed_results"]["2"]["val_bpb"] == 1.112 and made["bytes_total"] == 15_990_003
    largest = 15_990_003 - (record.ROOT / "train_gpt.py").stat().st_size
    assert made["artifact_bytes_max"] == made["seed_results"]["3"]["artifact_bytes"] == largest
    false = {name for name, value in made["compliance"].items() if value is False}
    assert false == {"no_ngram_cache"} and None not in made["compliance"].values() and made["reasons"] == {}
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {"README.md", "submission.json", "train_gpt.py", "requirements.txt"} | {
        f"train_seed{seed}.log" for seed in (1, 2, 3)
    }
    assert "| train" not in (tmp_path / "made" / "README.md").read_text().partition("## Results")[0]
    assert run_report("--check", tmp_path / "made")[:2] == (0, ["nothing is wrong"])


def test_what_nobody_saw_is_null_and_has_a_reason(tmp_path, run_report):
    on_cpu = run_of(1, tmp_path, hardware="1 process(es) on CPU, 1 thread(s) each, x86_64")
    failed = audit_of(1, tmp_path, failed=("separation",))
    assert run_report("--record", tmp_path / "made", on_cpu, "--audit", failed)[0] == 0
    made = json.loads((tmp_path / "made" / "submission.json").read_text())
    assert made["compliance"]["train_under_600s"] is None and "8 H100s" in made["reasons"]["train_under_600s"]
    assert made["compliance"]["no_validation_training_leak"] is False and made["compliance"]["three_seeds"] is False
    assert (
        made["val_bpb"] is None
        and made["seed_results"]["1"]["val_bpb"] == 1.111
        and "three seeds" in made["reasons"]["val_bpb"]
    )
    assert run_report("--record", tmp_path / "bare", run_of(2, tmp_path))[0] == 0
    bare = json.loads((tmp_path / "bare" / "submission.json").read_text())
    assert bare["compliance"]["no_slot"] is None and "no audit" in bare["reasons"]["no_slot"]
    none = record.submission([], [], [])
    assert (
        none["val_bpb"] is None and set(none["compliance"].values()) <= {None, False} and "val_bpb" in none["reasons"]
    )


def test_runs_that_are_not_one_system_make_no_record(tmp_path, run_report):
    one, other = run_of(1, tmp_path), run_of(2, tmp_path, config=config_of(2, mixer="maxent"))
    assert run_report("--record", tmp_path / "made", one, other)[2][0].startswith("error: the runs differ in")
    log = one.with_suffix(".txt")
    log.write_text(log.read_text().replace("script_sha256:", "script_sha256:0"))
    assert "no log of the train_gpt.py at hand" in run_report("--record", tmp_path / "made", one)[2][0]
    run_of(1, tmp_path)
    log.write_text(log.read_text().replace("1.11100000", "1.10100000"))
    assert "its scores are" in run_report("--record", tmp_path / "made", one)[2][0]
    one, other = (run_of(seed, tmp_path, artifact=dict(json.loads(one.read_text())["artifact"])) for seed in (1, 3))
    assert "allowed is" in run_report("--record", tmp_path / "made", one, other)[2][0]
    assert not (tmp_path / "made").exists()


@pytest.fixture
def published(tmp_path):
    """A folder as the field's records are, in the first format: three seeds, all of it right."""
    folder, losses = tmp_path / "record", {1: "1.8897", 2: "1.8899", 3: "1.8901"}
    folder.mkdir()
    shutil.copy(record.ROOT / "requirements.txt", folder / "train_gpt.py")
    size = (folder / "train_gpt.py").stat().st_size
    for seed, loss in losses.items():
        log = first(seed, loss).replace("Code size: 89458", f"Code size: {size}")
        (folder / f"train_seed{seed}.log").write_text(log)
    results = {str(seed): dict(val_bpb=1.11923, val_loss=float(loss)) for seed, loss in losses.items()}
    stated = dict(val_bpb=1.1192, val_loss=1.8899, seeds=[1, 2, 3], seed_results=results, bytes_total=15977386)
    stated |= dict(val_loss_std=0.0002, artifact_bytes_mean=15977386, compliance=dict(train_under_600s=True))
    (folder / "submission.json").write_text(json.dumps(stated))
    return folder


def test_a_sound_record_is_called_so(published):
    assert record.check_folder(published) == []


FIRST_STEP = "step:1/9000 train_loss:6.9 train_time:83ms step_avg:83.00ms"
WRONG = {
    "a headline of one seed": ("submission.json", '1.8899, "seeds"', '1.8897, "seeds"', "the mean of 3 logs"),
    "a result that differs by 0.0001": ("submission.json", "1.11923", "1.11913", "val_bpb is 1.11913, its log states"),
    "another size": ("submission.json", "15977386", "15977385", "bytes_total is 15977385; the largest"),
    "a byte over": ("train_seed1.log", "15977386", "16000001", "16,000,001 bytes, 1 over the cap"),
    "a training of 600.1 s": ("train_seed3.log", "599128ms", "600100ms", "training took 600.100 s"),
    "a subset": ("train_seed3.log", "tokens:62021632", "tokens:1000000", "1000000 validation tokens were scored"),
    "other settings": ("train_seed3.log", "model_params:26928220", "model_params:2", "the runs differ in model_params"),
    "a log cut short": ("train_seed3.log", "1.11922988\n", "1.1192", "ends in the middle of a line"),
    "another spread": ("submission.json", '"val_loss_std": 0.0002', '"val_loss_std": 0.0005', "val_loss_std is 0.0005"),
    "another mean size": ("submission.json", '_mean": 15977386', '_mean": 15977380', "artifact_bytes_mean is 15977380"),
    "a limit called kept": ("train_seed3.log", "599128ms", "600100ms", "train_under_600s is called true"),
    "a run on a CPU": ("train_seed2.log", "seed:2", "hardware: 1 process(es) on CPU\nseed:2", "it ran on a CPU"),
    "two runs in a log": ("train_seed2.log", "stopping_early", f"{FIRST_STEP}\nstopping_early", "two runs in one log"),
    "another script": ("train_gpt.py", "torch", "torch, and more", "bytes; the logs count"),
}


@pytest.mark.parametrize("name, old, new, words", WRONG.values(), ids=WRONG)
def test_a_record_with_a_fault_is_not_sound(published, run_report, name, old, new, words):
    text = (published / name).read_text()
    assert old in text
    (published / name).write_text(text.replace(old, new))
    status, out, _ = run_report("--check", published)
    assert status == 1 and [line for line in out if words in line], out


def test_a_seed_without_its_log_and_a_log_of_something_else_are_named(published):
    (published / "train_seed2.log").unlink()
    (published / "train_seed4.log").write_text("x\n")
    wrong = "\n".join(record.check_folder(published))
    for words in (
        "seed 2: it has a result and no log",
        "2 seeds with a score; three are wanted",
        "no step and no score",
    ):
        assert words in wrong


def test_what_is_no_record_costs_one_line(tmp_path, run_report):
    for text in ("{", "[1]"):
        (tmp_path / "submission.json").write_text(text)
        status, _, errors = run_report("--check", tmp_path)
        assert status == 2 and len(errors) == 1 and "allowed is a record's JSON" in errors[0]
    assert run_report("--check", tmp_path / "none")[0] == 2 and run_report()[0] == 2


def test_the_submission_at_the_top_is_what_the_report_makes_of_no_run():
    stated, made = json.loads((record.ROOT / "submission.json").read_text()), record.submission([], [], [])
    assert {name: x for name, x in stated.items() if name != "date"} == {
        name: x for name, x in made.items() if name != "date"
    }
