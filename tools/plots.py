"""The pictures of report.py --plots: training, stages, the stream, Hedge's weights and bytes, as PNG and SVG.

Lines differ in dashes and markers as well as in colour, so that they can be told apart in black and white.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import Config, InputError, parse, schedule

TRAIN = re.compile(r"(?:step:)?(\d+)/\d+ train_loss: ?([\d.]+)(?: train_time:(\d+)ms)?")
VALIDATION = re.compile(r"(?:step:)?(\d+)/\d+ val_loss: ?([\d.]+)")
RUNNING = re.compile(r"  (\w+)_chunk \[(\d+)/\d+\] bpb=([\d.]+)(?:.* hedge_weights:((?: \w+:[\d.e+-]+)+))?")
BYTES = re.compile(r"artifact parts: (.*)")
STYLES = [
    dict(linestyle=line, marker=mark)
    for mark, line in zip("os^DvxP", ("-", "--", ":", "-.", (0, (5, 1)), "-", "--"), strict=True)
]
GRAYS = "0.15", "0.45", "0.65", "0.85"
LOOK = {"font.size": 15, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
LOOK |= {"lines.linewidth": 2, "lines.markersize": 6, "figure.constrained_layout.use": True, "svg.hashsalt": "plots"}


@dataclass
class Series:
    """What the lines of a log give along its steps and along the stream."""

    name: str
    train: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[tuple[int, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)  # scheduled, as parts of the full ones
    validation: list[tuple[int, float]] = field(default_factory=list)
    running: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by stage
    weights: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # by expert
    parts: dict[str, int] = field(default_factory=dict)  # bytes of the artifact


def learning_rates(settings: dict[str, str], steps: int) -> list[tuple[int, float]]:
    """Return (step, part of the full rates) by a run's settings, as if its number of steps had been known before."""
    fields = [f for f in dataclasses.fields(Config) if f.name.upper() in settings]
    with suppress(InputError):  # of a version with other settings
        c = Config(**{f.name: parse(f, settings[f.name.upper()]) for f in fields})
        return [(step, schedule(step, steps, c).lr_scale) for step in range(0, steps, -(-steps // 200))]
    return []


def read_series(report) -> Series:
    """Return what the log of a run holds; for a record, the log beside it."""
    path = report.path
    log = path.with_suffix(".txt") if path.suffix == ".json" else path
    found = Series(path.stem)
    if report.is_ours and report.steps:
        found.rates = learning_rates(report.settings, report.steps)
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        if m := TRAIN.match(line):
            found.train.append((int(m[1]), float(m[2])))
            found.seconds += [(int(m[1]), int(m[3]) / 1000)] if m[3] else []
        elif m := VALIDATION.match(line):
            found.validation.append((int(m[1]), float(m[2])))
        elif m := RUNNING.match(line):
            found.running.setdefault(m[1], []).append((int(m[2]), float(m[3])))
            for name, weight in (part.split(":") for part in (m[4] or "").split()):
                found.weights.setdefault(name, []).append((int(m[2]), float(weight)))
        elif m := BYTES.match(line):
            found.parts = {name: int(n) for name, n in (part.split(":") for part in m[1].split())}
    return found


def styled(items):
    """Yield (style, item) with another style for each of the first seven."""
    return zip(itertools.cycle(STYLES), items)


def plot_training(series: list[Series]):
    """Draw the training loss, with validation as markers alone; below, the learning rate and the time of a step."""
    series = [x for x in series if len(x.train) > 1]
    if not series:
        return None
    figure, (top, middle, bottom) = plt.subplots(3, sharex=True, figsize=(7, 9), height_ratios=(3, 1, 1))
    for style, x in styled(series):
        top.plot(*zip(*x.train, strict=True), label=x.name, **style)
        if x.validation:
            top.plot(*zip(*x.validation, strict=True), color="black", linestyle="", marker=style["marker"])
        if x.rates:
            middle.plot(*zip(*x.rates, strict=True), markevery=max(1, len(x.rates) // 8), **style)
        pairs = [(b, 1000 * (t - s) / (b - a)) for (a, s), (b, t) in itertools.pairwise(x.seconds) if b > a]
        if pairs:
            bottom.plot(*zip(*pairs, strict=True), **style)
    top.set(ylabel="training loss (nats a token)", yscale="log")
    top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    top.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    middle.set(ylabel="part of\nfull rate", ylim=0)
    if not any(x.rates for x in series):
        middle.remove()
    bottom.set(xlabel="step", ylabel="ms a step", ylim=0)
    figure.legend(loc="outside lower center", frameon=False, ncols=1 if len(series) < 4 else 2, fontsize=12)
    return figure


def plot_stages(groups: list[list]):
    """Draw how each stage changes val_bpb: a step of the staircase is the mean over a configuration's runs."""
    groups = [[x for x in group if x.stages] for group in groups]
    groups = [group for group in groups if group]
    if not groups:
        return None
    columns = min(2, len(groups))
    shape = -(-len(groups) // columns), columns
    size = max(7, 5 * columns), 5 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, group in zip(axes.flat, groups, strict=False):
        names = list(group[0].stages)
        means = [statistics.fmean(x.stages[name].val_bpb for x in group if name in x.stages) for name in names]
        for k, (before, mean) in enumerate(zip([means[0], *means], means, strict=False)):
            axis.plot((k - 0.4, k + 0.4), (mean, mean), color="black", linewidth=4)
            axis.plot((k - 0.6, k - 0.4), (before, mean), color="gray", linewidth=1)
            change = f"\n{mean - before:+.4f}" if k else ""
            axis.annotate(f"{mean:.4f}{change}", (k, mean), (0, 8), textcoords="offset points", ha="center")
        axis.set_xticks(range(len(names)), names, rotation=20)
        axis.set_title(group[0].path.stem + (f" and {len(group) - 1} more" if len(group) > 1 else ""), fontsize=12)
        axis.margins(0.1, 0.25)
    for row in axes:
        row[0].set_ylabel("bits a byte")
    return figure


def plot_stream(series: list[Series]):
    """Draw the bits a byte of all that was scored so far, for each stage along the stream."""
    lines = [(f"{x.name}, {stage}", points) for x in series for stage, points in x.running.items() if len(points) > 1]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(7, 6))
    for style, (name, points) in styled(lines):
        axis.plot(*zip(*points, strict=True), label=name, markevery=max(1, len(points) // 8), **style)
    axis.set(xlabel="tokens scored", ylabel="bits a byte so far")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    figure.legend(loc="outside lower center", frameon=False, ncols=1 if len(lines) < 4 else 2, fontsize=12)
    return figure


def plot_weights(series: list[Series]):
    """Draw the weight of each expert along the stream, a panel a run, down to a billionth."""
    series = [x for x in series if any(len(points) > 1 for points in x.weights.values())]
    if not series:
        return None
    names = dict.fromkeys(name for x in series for name in x.weights)
    styles = {name: dict(style, color=f"C{k}") for k, (style, name) in enumerate(styled(names))}
    figure, axes = plt.subplots(len(series), figsize=(7, 1 + 4 * len(series)), sharex=True, squeeze=False)
    for axis, x in zip(axes.flat, series, strict=True):
        for name, points in x.weights.items():  # the last point's are of the chunk before: nothing learns from the last
            axis.plot(*zip(*points, strict=True), label=name, markevery=max(1, len(points) // 8), **styles[name])
        least = min(weight for points in x.weights.values() for _, weight in points if weight > 0)
        axis.set(ylabel="weight", yscale="log", ylim=(max(1e-9, least / 2), 2))
        axis.set_title(x.name, fontsize=12)
    axis.set_xlabel("tokens scored")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    handles = {label: line for x in axes.flat for line, label in zip(*x.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", frameon=False, ncols=3, fontsize=12)
    return figure


def plot_bytes(series: list[Series]):
    """Draw the bytes of an artifact's parts; the figures stand beside the bars, since one part is nearly all."""
    series = [x for x in series if x.parts][: len(GRAYS)]
    if not series:
        return None
    names = list(series[0].parts)
    figure, axis = plt.subplots(figsize=(7, 2 + len(names) * (0.25 + 0.27 * len(series))))
    height = 0.8 / len(series)
    for k, x in enumerate(series):
        at = [i + k * height for i in range(len(names))]
        bars = axis.barh(at, [x.parts.get(name, 0) for name in names], height, color=GRAYS[k], label=x.name)
        axis.bar_label(bars, [f"{x.parts.get(name, 0):,}" for name in names], padding=4, fontsize=11)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
    axis.invert_yaxis()
    axis.set(xlabel="bytes", xscale="log")
    axis.margins(0.25, 0.02)
    figure.legend(loc="outside lower center", frameon=False, ncols=1 if len(series) < 3 else 2, fontsize=12)
    return figure


def write_plots(folder: Path, groups: list[list]) -> list[Path]:
    """Write the pictures of some configurations' runs. Return the files; what the logs do not hold is not drawn."""
    by_group, written = [[read_series(x) for x in group] for group in groups], []
    series, firsts = sum(by_group, []), [group[0] for group in by_group]
    with plt.rc_context(LOOK):
        drawn = dict(training=plot_training(series), stages=plot_stages(groups))
        drawn |= dict(stream=plot_stream(series), weights=plot_weights(firsts), bytes=plot_bytes(firsts))
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            if figure:
                for ending in ("png", "svg"):
                    written.append(folder / f"{name}.{ending}")
                    figure.savefig(written[-1], dpi=150, metadata={"Date": None} if ending == "svg" else None)
                plt.close(figure)
    return written
