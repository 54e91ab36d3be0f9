"""Run: shares cover, collectives agree with plain arithmetic on two real processes, and no file is overwritten."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from train_gpt import Config, InputError, Run

WORLD = 2


def rank_of(rank, world_size):
    """A rank that only divides work."""
    run = object.__new__(Run)
    run.rank, run.world_size = rank, world_size
    return run


@settings(max_examples=300)
@given(st.integers(0, 10_000), st.integers(1, 700), st.integers(1, 17))
def test_shares_are_contiguous_disjoint_aligned_and_cover_everything(n, granule, world_size):
    shares = [rank_of(rank, world_size).share(n, granule) for rank in range(world_size)]
    edges = [shares[0].start, *(share.stop for share in shares)]
    assert [share.start for share in shares] == edges[:-1]
    assert edges[0] == 0 and edges[-1] == n and edges == sorted(edges)
    assert all(edge % granule == 0 for edge in edges if edge != n)


@given(st.integers(0, 10_000), st.integers(1, 17))
def test_shares_differ_by_one_item_at_most(n, world_size):
    sizes = [share.stop - share.start for share in (rank_of(r, world_size).share(n) for r in range(world_size))]
    assert max(sizes) - min(sizes) <= 1


def rows_of(share, n):
    """Rows that tell which rank-independent row they are."""
    return torch.arange(3 * n).view(n, 3)[share]


def refuse(rank):
    raise InputError(f"refused by {rank}")


def on_one_rank(rank, port, path):
    """Everything two ranks do together; each rank's results go to a file of its own."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run = Run(Config(device="cpu"))
    found = dict(rank=run.rank, world_size=run.world_size, is_main=run.is_main)
    found["sum"] = run.sum(torch.tensor([1.0, 10.0]) * (rank + 1))
    found["max"] = run.max(1.5 if rank else -2.0)
    found["broadcast"] = run.broadcast(lambda x: (x, f"rank {rank}"), 7)
    try:
        run.broadcast(refuse, rank)
    except InputError as error:
        found["refusal"] = str(error)
    for n, granule in ((8, 1), (7, 1), (1, 1), (0, 1), (10, 4), (4, 4), (9, 6)):
        share = run.share(n, granule)
        found["gather", n, granule] = run.gather(rows_of(share, n), share, n)
    bank = torch.arange(24.0).view(4, 2, 3) * (rank + 1)
    found["shard"] = run.reduce_scatter(bank).wait()
    found["bank"] = run.all_gather(found["shard"]).wait()
    params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(4))]
    params[0].grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    if rank == 0:
        params[1].grad = torch.tensor(5.0)  # the other rank never touched it; nobody touched the last
    run.sum_gradients(params)
    found["gradients"] = [p.grad for p in params]
    run.close()
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


def test_each_process_knows_its_rank(ranks):
    assert [(r["rank"], r["world_size"], r["is_main"]) for r in ranks] == [(0, 2, True), (1, 2, False)]


def test_sum_adds_over_ranks(ranks):
    assert all(torch.equal(r["sum"], torch.tensor([3.0, 30.0])) for r in ranks)


def test_max_is_the_same_everywhere(ranks):
    assert [r["max"] for r in ranks] == [1.5, 1.5]


def test_a_refusal_on_the_main_rank_is_raised_on_all(ranks):
    assert [r["refusal"] for r in ranks] == ["refused by 0"] * 2


def test_broadcast_calls_on_the_main_rank_only(ranks):
    assert [r["broadcast"] for r in ranks] == [(7, "rank 0")] * 2


@pytest.mark.parametrize(("n", "granule"), [(8, 1), (7, 1), (1, 1), (0, 1), (10, 4), (4, 4), (9, 6)])
def test_gather_puts_uneven_and_empty_shares_together(ranks, n, granule):
    assert all(torch.equal(r["gather", n, granule], rows_of(slice(None), n)) for r in ranks)


def test_reduce_scatter_leaves_each_rank_its_part_of_the_sum(ranks):
    whole = torch.arange(24.0).view(4, 2, 3) * 3
    assert all(torch.equal(r["shard"], part) for r, part in zip(ranks, whole.chunk(2), strict=True))


def test_all_gather_puts_back_what_reduce_scatter_cut(ranks):
    assert all(torch.equal(r["bank"], torch.arange(24.0).view(4, 2, 3) * 3) for r in ranks)


def test_gradients_add_up_and_a_missing_one_counts_as_zero(ranks):
    expected = [torch.arange(6.0).view(2, 3) * 3, torch.tensor(5.0), torch.zeros(4)]
    for r in ranks:
        assert all(torch.equal(got, want) for got, want in zip(r["gradients"], expected, strict=True))


def test_with_one_rank_every_collective_is_the_identity(tiny_config):
    run, x, p = Run(tiny_config()), torch.arange(6.0).view(3, 2), nn.Parameter(torch.zeros(2))
    run.sum_gradients([p])
    assert run.share(5) == slice(0, 5) and run.max(2.5) == 2.5 and run.broadcast(lambda: "x") == "x"
    assert torch.equal(p.grad, torch.zeros(2))
    for y in (run.sum(x), run.gather(x, slice(0, 3), 3), run.reduce_scatter(x).wait(), run.all_gather(x).wait()):
        assert torch.equal(y, torch.arange(6.0).view(3, 2))


def test_cuda_is_refused_where_there_is_none(tiny_config):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match="DEVICE=cuda"):
        Run(tiny_config(device="cuda"))


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("taken", ["r.txt", "r.json", "r.artifact", "other.artifact", "scores.npz"])
@pytest.mark.parametrize("phase", ["both", "train"])
def test_a_file_that_exists_stops_the_run_and_stays_as_it_is(taken, phase, tiny_config, tmp_path):
    path = tmp_path / taken
    path.write_bytes(b"results of months")
    asked = {"other.artifact": dict(artifact_path=str(path)), "scores.npz": dict(scores_path=str(path))}
    c = tiny_config(run_id="r", log_dir=str(tmp_path), phase=phase, **asked.get(taken, {}))
    with pytest.raises(InputError, match=f"{taken} exists"):
        Run(c).open_log(c)
    assert files_in(tmp_path) == {taken: b"results of months"}


def test_scores_have_the_name_that_numpy_will_write(tiny_config):
    """numpy.savez adds .npz to a name that lacks it, past the check that nothing is overwritten."""
    with pytest.raises(InputError, match="ends in .npz"):
        tiny_config(scores_path="scores")


@pytest.mark.parametrize("setting", ["artifact_path", "scores_path"])
def test_a_folder_in_a_files_place_is_refused_before_the_run(setting, tiny_config, tmp_path):
    (tmp_path / "x.npz").mkdir()
    c = tiny_config(run_id="r", log_dir=str(tmp_path), **{setting: str(tmp_path / "x.npz")})
    with pytest.raises(InputError):
        Run(c).open_log(c)


def test_an_artifact_to_score_may_exist(tiny_config, tmp_path):
    path = tmp_path / "r.artifact"
    path.write_bytes(b"x")
    c = tiny_config(run_id="r", log_dir=str(tmp_path / "logs"), phase="eval", artifact_path=str(path))
    assert Run(c).open_log(c) == "r"


def test_a_run_without_a_name_is_named_by_time_and_seed(tiny_config, tmp_path):
    c = tiny_config(log_dir=str(tmp_path / "new"), seed=77)
    run = Run(c)
    assert run.open_log(c).endswith("_seed77")
    assert run.log_path.parent.is_dir()


def test_what_is_logged_is_printed_and_appended(tiny_config, tmp_path, capsys):
    c = tiny_config(run_id="r", log_dir=str(tmp_path))
    run = Run(c)
    run.open_log(c)
    run.log("one")
    run.log("caf\u00e9")
    assert (tmp_path / "r.txt").read_text(encoding="utf-8") == capsys.readouterr().out == "one\ncaf\u00e9\n"


def test_only_the_main_rank_logs(tiny_config, tmp_path, capsys):
    run = Run(tiny_config())
    run.rank, run.log_path = 1, tmp_path / "r.txt"
    run.log("one")
    assert capsys.readouterr().out == "" and not run.log_path.exists()
