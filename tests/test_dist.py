"""Dist and log: shares cover, collectives on two real processes agree with plain arithmetic, no file is overwritten."""

from __future__ import annotations

import dataclasses
import errno
import io
import logging
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import train_gpt
from serve import Turns
from train_gpt import Clock, Config, Dist, InputError, open_dist, open_log, write_atomically

WORLD = 2
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.integers(1, 700), st.integers(1, 17))
def test_shares_are_contiguous_disjoint_aligned_and_cover_everything(n, granule, world_size):
    shares = [Dist(rank, world_size).share(n, granule) for rank in range(world_size)]
    edges = [shares[0].start, *(share.stop for share in shares)]
    assert [share.start for share in shares] == edges[:-1]
    assert edges[0] == 0 and edges[-1] == n and edges == sorted(edges)
    assert all(edge % granule == 0 for edge in edges if edge != n)


@given(st.integers(0, 1000), st.integers(1, 70), st.integers(1, 9), st.integers(0, 5000))
def test_a_share_of_a_later_range_is_that_share_moved(n, granule, world_size, start):
    """The granules are counted from the range's own start, wherever it lies."""
    for rank in range(world_size):
        dist = Dist(rank, world_size)
        at_zero, later = dist.share(n, granule), dist.share(n, granule, start)
        assert later == slice(start + at_zero.start, start + at_zero.stop)


@given(st.integers(0, 10_000), st.integers(1, 17))
def test_shares_differ_by_one_item_at_most(n, world_size):
    sizes = [share.stop - share.start for share in (Dist(r, world_size).share(n) for r in range(world_size))]
    assert max(sizes) - min(sizes) <= 1


def rows_of(share, n):
    """Rows that tell which rank-independent row they are."""
    return torch.arange(3 * n).view(n, 3)[share]


GATHERS = [(8, 1), (7, 1), (1, 1), (0, 1), (10, 4), (4, 4), (9, 6)]


def join(started):
    """What a collective that has begun gives back once it is done."""
    tensor, wait = started
    wait()
    return tensor


def on_one_rank(rank, port, path):
    """Everything two ranks do together; each rank's results go to a file of its own."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    dist = open_dist(Config(device="cpu"))
    found = dict(rank=dist.rank, world_size=dist.world_size, is_main=dist.is_main, device=str(dist.device))
    found["sum"] = dist.sum(torch.tensor([1.0, 10.0]) * (rank + 1))
    found["max"] = dist.max(1.5 if rank else -2.0)
    found["broadcast"] = dist.broadcast(lambda x: (x, f"rank {rank}"), 7)
    for n, granule in GATHERS:
        share = dist.share(n, granule)
        found["gather", n, granule] = dist.gather(rows_of(share, n), share, n)
    bank = torch.arange(24.0).view(4, 2, 3) * (rank + 1)
    found["shard"] = join(dist.reduce_scatter(bank))
    found["bank"] = join(dist.all_gather(found["shard"]))
    params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(4))]
    params[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    if rank == 0:
        params[1].grad = torch.tensor(5.0)  # the other rank never touched it; nobody touched the last
    found["row"] = dist.sum_gradients(params).clone()
    found["gradients"] = [p.grad for p in params]
    dist.close()
    torch.save(found, f"{path}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes found."""
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(on_one_rank, (port, str(path)), nprocs=WORLD)
    return [torch.load(path / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
def test_each_process_knows_its_rank(ranks):
    assert [(r["rank"], r["world_size"], r["is_main"]) for r in ranks] == [(0, 2, True), (1, 2, False)]
    assert {r["device"] for r in ranks} == {"cpu"}


@pytest.mark.slow
def test_sum_adds_over_ranks(ranks):
    assert all(torch.equal(r["sum"], torch.tensor([3.0, 30.0])) for r in ranks)


@pytest.mark.slow
def test_max_is_the_same_everywhere(ranks):
    assert [r["max"] for r in ranks] == [1.5, 1.5]


@pytest.mark.slow
def test_broadcast_calls_on_the_main_rank_only(ranks):
    assert [r["broadcast"] for r in ranks] == [(7, "rank 0")] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("n", "granule"), GATHERS)
def test_gather_puts_uneven_and_empty_shares_together(ranks, n, granule):
    assert all(torch.equal(r["gather", n, granule], rows_of(slice(None), n)) for r in ranks)


@pytest.mark.slow
def test_reduce_scatter_leaves_each_rank_its_part_of_the_sum(ranks):
    whole = torch.arange(24.0).view(4, 2, 3) * 3
    assert all(torch.equal(r["shard"], part) for r, part in zip(ranks, whole.chunk(2), strict=True))


@pytest.mark.slow
def test_all_gather_puts_back_what_reduce_scatter_cut(ranks):
    assert all(torch.equal(r["bank"], torch.arange(24.0).view(4, 2, 3) * 3) for r in ranks)


@pytest.mark.slow
def test_gradients_add_up_and_a_missing_one_counts_as_zero(ranks):
    expected = [torch.arange(6.0).view(2, 3) * 3, torch.tensor(5.0), torch.zeros(4)]
    for r in ranks:
        assert all(torch.equal(got, want) for got, want in zip(r["gradients"], expected, strict=True))
        assert torch.equal(r["row"], torch.cat([grad.flatten() for grad in expected]))


def test_with_one_rank_every_collective_is_the_identity():
    dist, x, p = Dist(), torch.arange(6.0).view(3, 2), nn.Parameter(torch.zeros(2))
    row = dist.sum_gradients([p])
    assert dist.share(5) == slice(0, 5) and dist.max(2.5) == 2.5 and dist.broadcast(lambda: "x") == "x"
    assert torch.equal(p.grad, torch.zeros(2))
    for y in (dist.sum(x), dist.gather(x, slice(0, 3), 3), join(dist.reduce_scatter(x)), join(dist.all_gather(x))):
        assert torch.equal(y, torch.arange(6.0).view(3, 2))
    row += 1
    assert torch.equal(p.grad, torch.ones(2))  # the gradients are views of the row: clipping it clips them
    assert len(dist.sum_gradients([])) == 0
    dist.close()


def test_without_a_launcher_a_process_is_the_only_rank(tiny_config, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist = open_dist(tiny_config())
    assert (dist.rank, dist.world_size, dist.device, dist.is_main) == (0, 1, CPU, True)


def test_cuda_is_refused_where_there_is_none(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="DEVICE=cuda"):
        open_dist(tiny_config(device="cuda"))
    with pytest.raises(InputError, match="DEVICE=auto: no GPU .* allowed here are DEVICE=cpu, or a PRESET .*CUDA"):
        open_dist(tiny_config(device="auto"))
    for beside in (dict(preset="smoke"), dict(phase="eval", artifact_path="x")):
        assert open_dist(tiny_config(device="auto", **beside)).device == CPU


def test_more_processes_than_devices_are_refused(tiny_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 has no CUDA device; allowed are 2 a node"):
        open_dist(tiny_config(device="cuda"))


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", CPU, torch.float32),
        ("auto", CUDA, torch.bfloat16),
        ("float32", CUDA, torch.float32),
        ("bfloat16", CPU, torch.bfloat16),
    ],
)
def test_activations_have_the_type_asked_for_or_the_devices(dtype, device, expected, tiny_config):
    assert train_gpt.activation_dtype(tiny_config(dtype=dtype), device) == expected


@pytest.mark.parametrize(
    ("asked", "device", "compiles"), [(True, CUDA, True), (False, CUDA, False), (True, CPU, False)]
)
def test_only_cuda_compiles_and_only_if_asked(asked, device, compiles, tiny_config, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: ("compiled", function, options["fullgraph"]))
    found = train_gpt.compiled(len, tiny_config(torch_compile=asked), device)
    assert found == (("compiled", len, True) if compiles else len)


# The clock


class Slowest(Dist):
    """A rank beside another one that is always a second later."""

    def max(self, value):
        return max(value, value + 1.0)


def test_the_clock_gives_the_seconds_of_the_slowest_rank(virtual_time):
    clock = Clock(Slowest())
    virtual_time.now += 5.0
    assert clock.seconds() == 6.0


# The run's files and its log


@pytest.fixture
def opened(tmp_path):
    """opened(dist=Dist(), **settings) claims a run's files and returns its config; its log ends with the test."""
    log = train_gpt.log
    before = list(log.handlers)

    def opened(dist=None, run_id="r", **settings):
        c = Config(**{"run_id": run_id, "log_dir": str(tmp_path), **settings})
        c = dataclasses.replace(c, artifact_path=c.artifact_path or f"{c.log_dir}/{run_id}.artifact")
        open_log(c, dist or Dist(), [])
        return c

    yield opened
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)
        handler.close()


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("taken", ["r.txt", "r.json", "r.artifact", "other.artifact", "scores.npz"])
@pytest.mark.parametrize("phase", ["both", "train"])
def test_a_file_that_exists_stops_the_run_and_stays_as_it_is(taken, phase, opened, tmp_path):
    path = tmp_path / taken
    path.write_bytes(b"results of months")
    asked = {"other.artifact": dict(artifact_path=str(path)), "scores.npz": dict(scores_path=str(path))}
    with pytest.raises(InputError, match=f"RUN_ID=r: .*{taken} exists"):
        opened(phase=phase, **asked.get(taken, {}))
    assert files_in(tmp_path) == {taken: b"results of months"}


@pytest.mark.parametrize("setting", ["artifact_path", "scores_path"])
def test_a_folder_in_a_files_place_is_refused_before_the_run(setting, opened, tmp_path):
    (tmp_path / "x.npz").mkdir()
    with pytest.raises(InputError, match="x.npz exists"):
        opened(**{setting: str(tmp_path / "x.npz")})


def test_a_file_in_a_folders_place_is_refused_before_the_run(opened, tmp_path):
    (tmp_path / "logs").write_bytes(b"x")
    with pytest.raises(InputError, match="allowed is a folder that can be written.*Not a directory"):
        opened(log_dir=str(tmp_path / "logs" / "new"))
    assert files_in(tmp_path) == {"logs": b"x"}


def test_an_artifact_to_score_may_exist(opened, tmp_path):
    path = tmp_path / "r.artifact"
    path.write_bytes(b"x")
    opened(phase="eval", artifact_path=str(path), log_dir=str(tmp_path / "logs"))
    assert (tmp_path / "logs" / "r.txt").is_file() and path.read_bytes() == b"x"


def test_the_same_name_for_two_files_is_refused(opened, tmp_path):
    with pytest.raises(InputError, match="File exists"):
        opened(artifact_path=str(tmp_path / "x"), scores_path=str(tmp_path / "x"))
    with pytest.raises(InputError, match="File exists"):
        opened(run_id="s", scores_path=str(tmp_path / "s.txt"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_live_line_between_the_lines_and_a_file_has_none(opened, monkeypatch, tmp_path, virtual_time):
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    opened()
    clock = Clock(Dist())
    virtual_time.now += 2.0
    train_gpt.log.info("a line")
    clock.show("step:1/4", 100, 400)
    train_gpt.log.info("the next")
    assert terminal.getvalue() == "\033[Ka line\n\033[Kstep:1/4 50 tokens/s, 6 s left\r\033[Kthe next\n"
    monkeypatch.setattr(sys, "stdout", pipe := io.StringIO())
    clock.show("step:2/4", 200, 400)
    assert pipe.getvalue() == "" and (tmp_path / "r.txt").read_text() == "a line\nthe next\n"


class Full:
    """A file on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


def test_a_full_disk_or_a_closed_screen_ends_no_run(opened, tmp_path, monkeypatch, capsys):
    opened()
    for handler in train_gpt.log.handlers:
        if isinstance(handler, logging.FileHandler):
            monkeypatch.setattr(handler, "stream", Full())
    train_gpt.log.info("on the screen only")
    assert "on the screen only" in capsys.readouterr().out


def test_folders_are_made_where_the_run_will_write(opened, tmp_path):
    paths = dict(artifact_path=tmp_path / "a" / "b" / "x.artifact", scores_path=tmp_path / "c" / "x.npz")
    opened(log_dir=str(tmp_path / "d"), **{name: str(path) for name, path in paths.items()})
    assert all(path.read_bytes() == b"" for path in paths.values())  # claimed
    assert (tmp_path / "d" / "r.txt").is_file()


def test_log_lines_are_printed_and_appended(opened, tmp_path, capsys):
    opened()
    train_gpt.log.info("one")
    train_gpt.log.info("caf\u00e9")
    assert (tmp_path / "r.txt").read_text(encoding="utf-8") == capsys.readouterr().out == "one\ncaf\u00e9\n"


def test_other_libraries_lines_are_not_in_the_log(opened, tmp_path):
    opened()
    logging.getLogger("torch").warning("foreign")
    logging.getLogger().warning("foreign")
    assert (tmp_path / "r.txt").read_text() == ""


def test_only_the_main_rank_logs_and_claims_files(opened, tmp_path, capsys):
    opened(Dist(1, 2))
    train_gpt.log.info("one")
    assert capsys.readouterr().out == "" and files_in(tmp_path) == {}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x.json"
    write_atomically(path, b"first")
    assert files_in(path.parent) == {"x.json": b"first"}

    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="x.json cannot be written") as caught:
        write_atomically(path, b"second")
    assert files_in(path.parent) == {"x.json": b"first"}
    assert Path(str(caught.value).rpartition(" ")[2]).read_bytes() == b"second"


def test_ranks_in_threads_run_one_at_a_time():
    turns, inside, found = Turns(2), [], set()

    def work(_):
        for _ in range(3):
            turns.wait()
            inside.append(1)
            time.sleep(0.01)
            found.add(len(inside))
            inside.pop()

    turns.each(work, range(2))
    assert found == {1}


def test_of_ranks_in_threads_the_one_that_fails_is_heard():
    turns = Turns(3)
    with pytest.raises(ZeroDivisionError):
        turns.each(lambda rank: 1 / 0 if rank == 1 else turns.wait(), range(3))


def test_the_first_product_of_a_rank_in_a_thread_has_the_bits_of_any_other():
    left, right = torch.rand(5, 64), torch.rand(64, 128)
    (found,) = Turns(1).each(lambda x: x @ right, [left])
    assert torch.equal(found, left @ right)
