"""Plots: what is drawn is what the logs hold, and what they do not hold is not drawn."""

from pathlib import Path

import pytest
from matplotlib import pyplot as plt

import plots
import report
import train_gpt

LOGS = Path(__file__).resolve().parents[1] / "logs"
OURS = """step:1/300 train_loss:6.9000 train_time:100ms step_avg:100.00ms
step:100/300 train_loss:4.0000 train_time:10000ms step_avg:100.00ms
step:100/300 val_loss:4.1000 val_bpb:2.4000 train_time:10000ms step_avg:100.00ms
step:300/300 train_loss:3.0000 train_time:50000ms step_avg:166.67ms
artifact parts: header:1400 codes:1300000
  sliding_chunk [1000/4000] bpb=2.0000 time=10.0s
  sliding_chunk [3000/4000] bpb=1.9000 time=20.0s
final_int6_roundtrip_exact val_loss:3.0 val_bpb:2.10000000
final_int6_sliding_window_exact val_loss:2.9 val_bpb:1.80000000
final val_bpb:1.80000000 stage:sliding documents:3 whole stream
"""
WEIGHED = """  mixed_chunk [256/600] bpb=2.0000 time=10.0s hedge_weights: neural:0.25 maxent:0.75
  mixed_chunk [512/600] bpb=1.9000 time=20.0s hedge_weights: neural:1.5e-07 maxent:1
mixed_exact val_loss:2.9 val_bpb:1.90000000
"""
OTHER = """1/200 train_loss: 7.0 train_time: 0.0m tok/s: 8000
100/200 train_loss: 3.5 train_time: 1.0m tok/s: 8000
100/200 val_loss: 3.4 val_bpb: 1.3
200/200 train_loss: 3.0 train_time: 2.0m tok/s: 8000
diagnostic quantized val_loss:3.1 val_bpb:1.2 eval_time:100ms
"""


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def log(tmp_path):
    def write(text: str, name: str = "run") -> Path:
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        return path

    return write


def lines(axis) -> list[list[tuple]]:
    return [list(zip(*(x.tolist() for x in line.get_data()), strict=True)) for line in axis.get_lines()]


def test_training_shows_losses_validation_and_the_time_between_two_lines(log):
    top, bottom = plots.plot_training([plots.read_series(report.read(log(OURS)))]).axes
    assert lines(top) == [[(1, 6.9), (100, 4.0), (300, 3.0)], [(100, 4.1)]]
    assert lines(bottom) == [[(100, 100.0), (300, 200.0)]]


def test_the_learning_rate_stands_between_them_where_the_log_is_of_this_script(log):
    c = train_gpt.Config(iterations=300, warmdown_iters=100, lr_warmup_iters=10)
    found = plots.read_series(report.read(log("\n".join([*c.lines(), OURS]))))
    assert found.rates[:2] == [(0, 0.1), (2, 0.3)] and found.rates[-1] == (298, 0.02)
    assert lines(plots.plot_training([found]).axes[1]) == [found.rates]
    other_version = "\n".join([*c.lines(), OURS]).replace("MIXER=hedge", "MIXER=gone")
    assert plots.read_series(report.read(log(other_version))).rates == []


def test_the_other_format_of_the_field_is_drawn_too(log):
    found = plots.read_series(report.read(log(OTHER)))
    assert found.train == [(1, 7.0), (100, 3.5), (200, 3.0)] and found.validation == [(100, 3.4)]
    assert not found.seconds and plots.plot_training([found])


def test_stages_show_the_mean_of_a_configuration_and_each_change(log):
    runs = [report.read(log(OURS, "a")), report.read(log(OURS.replace("1.80000000", "1.60000000"), "b"))]
    (axis,) = plots.plot_stages([runs]).axes
    assert [text.get_text() for text in axis.texts] == ["2.1000", "1.7000\n-0.4000"]
    assert axis.get_title() == "a and 1 more"


def test_the_stream_and_the_bytes(log):
    found = plots.read_series(report.read(log(OURS)))
    assert lines(plots.plot_stream([found]).axes[0]) == [[(1000, 2.0), (3000, 1.9)]]
    assert [text.get_text() for text in plots.plot_bytes([found]).axes[0].texts] == ["1,400", "1,300,000"]


def test_the_weights_along_the_stream(log):
    found = plots.read_series(report.read(log(WEIGHED)))
    assert found.running == dict(mixed=[(256, 2.0), (512, 1.9)])
    assert found.weights == dict(neural=[(256, 0.25), (512, 1.5e-7)], maxent=[(256, 0.75), (512, 1.0)])
    assert lines(plots.plot_weights([found]).axes[0]) == list(found.weights.values())


def test_the_weights_of_a_run_are_found_in_its_log():
    found = plots.read_series(report.read(LOGS / "hedge_share.json"))
    assert list(found.weights) == list(train_gpt.Config().hedge_experts)
    assert all(len(points) == len(found.running["mixed"]) for points in found.weights.values())


def test_what_a_log_does_not_hold_is_not_drawn(log):
    empty = plots.Series("nothing")
    drawn = plots.plot_training, plots.plot_stream, plots.plot_weights, plots.plot_bytes
    assert not any(plot([empty]) for plot in drawn)
    assert plots.plot_stages([[report.Report(Path("x"))]]) is None


def test_a_record_is_drawn_from_the_log_beside_it_in_the_same_bytes_each_time(tmp_path):
    group = [[report.read(LOGS / "cpu_best_seed2025.json")]]
    for folder in ("a", "b"):
        written = plots.write_plots(tmp_path / folder, group)
    names = sorted(f"{name}.{kind}" for name in ("training", "stages", "stream", "bytes") for kind in ("png", "svg"))
    assert sorted(path.name for path in written) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not plt.get_fignums()
