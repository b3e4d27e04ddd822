"""torch.distributed: several processes (gloo) have what one process has, or all of them hear what went wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from processes import (
    DIM,
    KINDS,
    ROWS,
    WORLD,
    algebra,
    fetching,
    images,
    killed,
    late,
    loaders,
    refusals,
    rows,
    share,
    start,
)
from processes import small_net as net
from torch.utils.data import DataLoader

import loft_fast as loft


def together(work, folder, *more, dead=()):
    """What `work` returns in each of the processes."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=start, args=(work, rank, str(folder), *more)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [9 if rank in dead else 0 for rank in range(WORLD)]
    return [None if rank in dead else torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    return together(algebra, tmp_path_factory.mktemp("algebra"))


@pytest.mark.parametrize("name", ["float", "exact"])
def test_all_processes_have_the_moments_of_all_rows(summed, name):
    x, labels = rows()
    exact = {"float": None, "exact": 2000.0}[name]
    whole = loft.Moments(DIM, exact=exact).update(x)
    groups = loft.GroupedMoments(DIM, exact=exact).update(x, labels)
    first = summed[0][name]
    for found in (one[name] for one in summed):
        assert (found["count"], found["site"]) == (ROWS, "fc:input")
        assert (found["digest"], found["grouped digest"]) == (first["digest"], first["grouped digest"])
        torch.testing.assert_close(found["mean"], whole.mean, rtol=1e-15, atol=0)
        torch.testing.assert_close(found["scatter"], whole.scatter, rtol=0, atol=1e-12 * float(whole.scatter.max()))
        assert list(found["groups"]) == groups.keys()
        for key, (count, mean, scatter) in found["groups"].items():
            assert count == groups[key].count
            torch.testing.assert_close(mean, groups[key].mean, rtol=1e-15, atol=0)
            torch.testing.assert_close(scatter, groups[key].scatter, rtol=0, atol=1e-12 * float(scatter.max()))
    if exact:
        assert (first["digest"], first["grouped digest"]) == (whole.digest(), groups.digest())


def test_who_has_no_rows_takes_the_scale_of_the_others(summed):
    assert all(one["calibrated by one"][0] == one["calibrated by one"][1] for one in summed)


def test_moments_of_nothing_remain_so(summed):
    assert all(one["nothing"] == (0, 0) for one in summed)


def test_a_group_of_processes_sums_for_itself(summed):
    assert [one["subgroup"] for one in summed[:2]] == [share(0).stop + share(1).stop - share(1).start] * 2
    assert all("not a member" in one["subgroup"] for one in summed[2:])


def test_moments_that_do_not_fit_are_refused_everywhere_and_change_nothing(tmp_path):
    found = together(refusals, tmp_path)
    expected = {
        "dim": f"InputError: group: process 3 has moments of dim={DIM + 1}, process 0 of {DIM}",
        "exact": "InputError: group: process 1 has moments of exact=2047.9375, process 0 of None",
        "scale": "InputError: group: process 1 has moments of exact=2047.9375, process 0 of 31.9990234375",
        "kind": "InputError: group: process 1 has moments of kind='Moments', process 0 of 'GroupedMoments'",
        "site": "InputError: group: process 2 has moments of site='b:input', process 0 of 'a:input'",
        "rows": f"InputError: group: together that would be {2**33} rows, expected at most {2**32}",
        "group": "InputError: group: got str, expected a torch.distributed.ProcessGroup or None",
        "timeout": "InputError: timeout: got 0, expected a number above 0",
        "unchanged": True,
        "and on it goes": ROWS,
    }
    assert found == [expected] * WORLD


def test_when_a_process_dies_the_others_hear_of_it_within_the_timeout(tmp_path):
    for said, seconds, unchanged in together(killed, tmp_path, dead=[3])[:3]:
        assert said.startswith("DistributedError: group: process ")
        assert "timeout=5" in said
        assert seconds < 15
        assert unchanged


def test_when_a_process_is_late_the_others_do_not_wait_for_ever(tmp_path):
    for said, seconds in together(late, tmp_path)[:3]:
        assert said.startswith("DistributedError: group: process ")
        assert seconds < 7


def test_without_processes_there_is_a_clear_error():
    with pytest.raises(loft.InputError, match=r"group: torch\.distributed is not initialised"):
        loft.Moments(3).all_reduce()
    with pytest.raises(loft.InputError, match=r"group: torch\.distributed is not initialised"):
        loft.fetch_moments(net(), [torch.zeros(1, 20)], shard=True)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    return together(fetching, tmp_path_factory.mktemp("fetching"))


@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_out_the_data(fetched, kind):
    expected = {
        n: loft.fetch_moments(net(), DataLoader(images(n), 8), group="label", exact=20.0, progress=False).digest()
        for n in (103, 3)
    }
    for found in (one[kind] for one in fetched):
        for n, digest in expected.items():
            assert found["shuffled", n] == found["list", n] == (digest, "4:input")
        if kind.startswith("FSDP"):
            assert "its weight is spread over processes by FSDP; use attach instead" in found["fold"]
        else:
            assert found["fold"] is None
    moments = loft.fetch_moments(net(), DataLoader(images(3), 8), group="label", exact=20.0, progress=False)
    first = moments.keys()[0]
    alone = net()
    loft.attach(alone, loft.solve(moments.without([first]), moments.select([first]), rank=4))
    torch.testing.assert_close(found["attached"], alone(images()[:8][0]).detach())


def test_what_loaders_may_be_and_what_happens_when_one_fails(tmp_path):
    whole = loft.fetch_moments(net(), DataLoader(images(), 8), group="label", exact=20.0, progress=False)
    floats = loft.fetch_moments(net(), DataLoader(images(), 8), group="label", progress=False).total().scatter
    for rank, found in enumerate(together(loaders, tmp_path)):
        assert found["stream"] == found["one has all"] == whole.digest()
        torch.testing.assert_close(found["float"], floats, rtol=1e-6, atol=1e-6 * float(floats.max()))
        assert "loader: got one with a DistributedSampler, expected" in found["DistributedSampler"]
        assert "loader: got one with a WeightedRandomSampler, expected" in found["WeightedRandomSampler"]
        assert "exact: got True with shard" in found["exact"]
        assert found["nothing"] == "InputError: loader: it yielded no batches, expected at least one"
        told = "DistributedError: group: process {} has failed: "
        nan = "InputError: batch 0: x: "
        assert found["nan"].startswith(nan if rank == 2 else told.format(2) + nan)
        assert found["error"] == ("" if rank == 1 else told.format(1)) + "OSError: the disk is gone"


def test_the_example_has_the_same_moments_on_any_number_of_processes():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    example = Path(__file__).parent.parent / "examples" / "distributed.py"
    said = []
    for processes in ("1", "4"):
        done = subprocess.run([*command, processes, example], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said[0].startswith("1 processes, 10000 rows, digest ")
    assert said[1] == said[0].replace("1 processes", "4 processes")
