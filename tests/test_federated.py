"""A server and its clients on Flower's Message API: whatever clients do, the moments are those of who was accepted."""

import contextlib
import copy
import importlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import state
from torch import nn

pytest.importorskip("flwr")

from client_rows import DIM, EXACT, moments_of, rows
from federation import FakeGrid
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

import loft_fast as loft
from loft_fast import FederatedError, InputError, StoreError, files
from loft_fast.federated import MomentsServer, client_app, messages
from loft_fast.plausible import implausible

ROOT = Path(__file__).parents[1]
QUICK = {"timeout": 0.3, "progress": False}


@pytest.fixture(params=["clients", "sum"])
def keep(request):
    return request.param


def server_in(folder, **options):
    return MomentsServer(folder, DIM, **{"exact": EXACT, **options})


def collected(folder, nodes=range(1, 6), **options):
    server = server_in(folder, **options)
    server.collect(FakeGrid(nodes, grouped=options.get("grouped", True)), **QUICK)
    return server


def verdicts(server, *kinds):
    return [(event.client, event.reason) for event in server.log() if event.verdict in kinds]


# ---- what should happen ----


@pytest.mark.parametrize("grouped", [True, False])
def test_the_sum_is_that_of_one_process_bit_for_bit(tmp_path, keep, grouped):
    with collected(tmp_path, keep=keep, grouped=grouped) as server:
        assert server.clients == ["1", "2", "3", "4", "5"]
        assert server.moments.digest() == moments_of(range(1, 6), EXACT, grouped).digest()
        assert server.moments.site == "fc:input"


@pytest.mark.parametrize("grouped", [True, False])
def test_floats_are_within_rounding_and_the_same_in_whatever_order_clients_answer(tmp_path, grouped):
    bits = []
    for order in ([1, 2, 3, 4, 5], [4, 1, 5, 3, 2]):
        server = server_in(tmp_path / str(order[0]), exact=None, grouped=grouped)
        for node in order:
            server.collect(FakeGrid([node], grouped=grouped), quorum=1, **QUICK)
        bits.append(state(server.moments))
        whole, summed = moments_of(range(1, 6), None, grouped), server.moments
        pairs = [(summed[key], whole[key]) for key in whole] if grouped else [(summed, whole)]
        for ours, theirs in pairs:
            assert ours.count == theirs.count
            torch.testing.assert_close(ours.scatter, theirs.scatter, rtol=0, atol=1e-12 * float(theirs.scatter.max()))
        server.close()
    assert bits[0] == bits[1]


@pytest.mark.parametrize("exact", [EXACT, None])
@pytest.mark.parametrize("gone", [[2], [1, 4], [1, 2, 3, 5]])
def test_forgotten_clients_were_never_there(tmp_path, exact, gone):
    rest = [client for client in range(1, 6) if client not in gone]
    with collected(tmp_path / "all", exact=exact) as server, collected(tmp_path / "rest", rest, exact=exact) as other:
        projection = server.forget_clients([str(client) for client in gone], rank=6)
        assert server.clients == other.clients
        assert state(server.moments) == state(other.moments)
        assert server.projection.digest() == projection.digest()
        assert projection.rank == 6
        if exact:
            assert server.moments.digest() == moments_of(rest, exact).digest()


@pytest.mark.parametrize("exact", [EXACT, None])
def test_64_clients_of_512_features_and_1_8_and_32_of_them_forgotten(tmp_path, exact):
    grid = FakeGrid(range(64), grouped=False, dim=512, n=30)
    left = list(range(64))
    with MomentsServer(tmp_path, 512, exact=exact, grouped=False) as server:
        server.collect(grid, progress=False)
        for many in (0, 1, 8, 32):
            gone = left[:: max(1, len(left) // many)][:many] if many else []
            left = [client for client in left if client not in gone]
            if gone:
                server.forget_clients(map(str, gone), project=False)
            whole, moments = moments_of(left, exact, grouped=False, dim=512, n=30), server.moments
            assert (moments.count, len(server.clients)) == (30 * len(left), len(left))
            if exact:
                assert moments.digest() == whole.digest()
            error = (moments.scatter - whole.scatter).norm() / whole.scatter.norm()
            assert error <= 1e-12


def test_forgotten_groups_are_gone_and_stay_so(tmp_path, keep):
    with collected(tmp_path, keep=keep) as server:
        server.forget_groups([2], rank=6)
        expected = moments_of(range(1, 6), EXACT).without([2])
        assert server.moments.digest() == expected.digest()
        server.collect(FakeGrid([1, 2, 3, 4, 5, 6]), **QUICK)
        assert server.moments.digest() == moments_of(range(1, 7), EXACT).without([2]).digest()
        server.collect(FakeGrid([1, 2]), refresh=True, **QUICK)
        assert server.moments.digest() == moments_of([1, 2], EXACT).without([2]).digest()


def test_a_client_has_rows_of_its_own_forgotten_once(tmp_path, keep):
    asked = []

    def forget(context, id):
        asked.append(id)
        x, labels = rows(context.node_id)
        return loft.GroupedMoments(DIM, exact=EXACT).update(x[:7], labels[:7])

    grid = FakeGrid(range(1, 6), forget=forget)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        first = server.forget_rows(grid, 3, "request-1", rank=6)
        expected = moments_of(range(1, 6), EXACT) - forget(grid._contexts[3], "here")
        assert server.moments.digest() == expected.digest()
        assert server.forget_rows(grid, 3, "request-1", rank=6).digest() == first.digest()
        assert server.moments.digest() == expected.digest()
        assert asked == ["request-1", "here"]
        # Asked to fetch nothing anew, the client sends what is left of its moments.
        with server_in(tmp_path / "new", keep=keep) as other:
            other.collect(grid, **QUICK)
            assert other.moments.digest() == expected.digest()


def some_rows(context, id):
    """Rows that a client wants to be forgotten, other ones for every request."""
    x, labels = rows(context.node_id)
    start = {"first": 0, "second": 7}[id]
    return loft.GroupedMoments(DIM, exact=EXACT).update(x[start : start + 7], labels[start : start + 7])


def test_forgotten_rows_stay_forgotten_when_all_are_asked_anew(tmp_path, keep):
    grid = FakeGrid(range(1, 4), forget=some_rows)
    grid._contexts[2].node_config["moments"] = str(tmp_path / "client.safetensors")
    expected = moments_of(range(1, 4), EXACT)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        for fetches, id in ((2, "first"), (3, "second")):
            server.forget_rows(grid, 2, id, project=False)
            expected = expected - some_rows(grid._contexts[2], id)
            grid._contexts[2].state.clear()  # a new run: what the client knows is in its file
            server.collect(grid, refresh=True, **QUICK)
            assert grid.fetched.count(2) == fetches
            assert server.moments.digest() == expected.digest()


def test_rows_that_are_deleted_where_they_lie_are_not_subtracted_twice(tmp_path, keep):
    gone = {2: []}

    def forget(context, id):
        gone[2].append(some_rows(context, id))
        return gone[2][-1]

    grid = FakeGrid(range(1, 4), forget=forget, gone=gone)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        for id in ("first", "second"):
            server.forget_rows(grid, 2, id, project=False)
            left = server.moments.digest()
            server.collect(grid, refresh=True, **QUICK)
            assert server.moments.digest() == left
    assert len(gone[2]) == 2


def test_a_client_that_lost_its_answers_does_not_bring_the_rows_back(tmp_path, keep):
    grid = FakeGrid([1, 2], forget=some_rows)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        server.forget_rows(grid, 2, "first", project=False)
        kept, grid._contexts[2].state = grid._contexts[2].state, RecordDict()
        with pytest.raises(
            FederatedError, match="2: it knows nothing of request 'first', and the rows of it would come"
        ):
            server.collect(grid, refresh=True, **QUICK)
        grid._contexts[2].state = kept
        assert server.collect(grid, **QUICK).accepted == ["2"]
        assert server.moments.digest() == (moments_of([1, 2], EXACT) - some_rows(grid._contexts[2], "first")).digest()


def test_where_only_the_sum_is_kept_a_client_sends_its_contribution_again_to_be_forgotten(tmp_path):
    grid = FakeGrid(range(1, 6))
    with server_in(tmp_path, keep="sum") as server:
        server.collect(grid, **QUICK)
        with pytest.raises(InputError, match="contributions are not kept"):
            server.forget_clients(["2"])
        server.forget_rows(grid, 2, "request", everything=True, rank=6)
        assert server.moments.digest() == moments_of([1, 3, 4, 5], EXACT).digest()
        assert server.clients == ["1", "3", "4", "5"]


def test_all_of_a_client_goes_also_after_a_group_and_some_of_its_rows(tmp_path, keep):
    grid = FakeGrid(range(1, 4), forget=some_rows)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        server.forget_groups([2], project=False)
        server.forget_rows(grid, 2, "first", project=False)
        server.forget_rows(grid, 2, "everything", everything=True, project=False)
        assert server.moments.digest() == moments_of([1, 3], EXACT).without([2]).digest()
        assert server.clients == ["1", "3"]


def test_rows_of_a_group_that_is_gone_are_forgotten_already(tmp_path, keep):
    grid = FakeGrid([1, 2, 3], forget=lambda context, id: moments_of([context.node_id], EXACT).select([2]))
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        first = server.forget_groups([2], rank=6)
        assert server.forget_rows(grid, 1, "rows").digest() == first.digest()
        server.forget_rows(grid, 1, "everything", everything=True, rank=5)
        assert server.moments.digest() == moments_of([2, 3], EXACT).without([2]).digest()


@pytest.mark.parametrize("groups", [[], [2]])
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (lambda x, labels: (x[:5], labels[:5]), "it sent 5 rows, expected 40"),
        (lambda x, labels: (x + 0.01, labels), "it sent other rows than it contributed"),
    ],
    ids=["few", "others"],
)
def test_a_client_cannot_leave_rows_behind(tmp_path, keep, groups, sent, reason):
    grid = FakeGrid(range(1, 4))
    other = loft.GroupedMoments(DIM, exact=EXACT).update(*sent(*rows(2)))
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        if groups:
            server.forget_groups(groups, project=False)
        grid.faults[2] = sending(lambda moments: other.to_bytes())
        before = server.moments.digest()
        if keep == "sum":
            with pytest.raises(FederatedError, match=reason):
                server.forget_rows(grid, 2, "request", everything=True, project=False)
            assert server.moments.digest() == before
            grid.faults.clear()
        server.forget_rows(grid, 2, "request", everything=True, project=False)
        assert server.moments.digest() == moments_of([1, 3], EXACT).without(groups).digest()


def test_or_the_others_are_asked_anew(tmp_path, keep):
    with collected(tmp_path, keep=keep) as server:
        server.collect(FakeGrid([1, 3]), refresh=True, **QUICK)
        assert server.moments.digest() == moments_of([1, 3], EXACT).digest()


def test_clients_that_come_later_are_added_and_the_others_are_not_asked(tmp_path, keep):
    with collected(tmp_path, [1, 2], keep=keep) as server:
        grid = FakeGrid([1, 2, 3])
        assert server.collect(grid, **QUICK).accepted == ["3"]
        assert grid.fetched == [3]
        assert server.moments.digest() == moments_of([1, 2, 3], EXACT).digest()


def test_a_forgotten_client_does_not_come_back(tmp_path):
    with collected(tmp_path) as server:
        server.forget_clients(["2"], project=False)
        assert server.collect(FakeGrid(range(1, 6)), **QUICK).refused == {"2": "it was forgotten"}
        assert server.moments.digest() == moments_of([1, 3, 4, 5], EXACT).digest()


def test_what_was_forgotten_is_in_no_byte_of_the_file(tmp_path):
    with collected(tmp_path) as server:
        part = next(moments for client, _, moments in server._archive.parts(1) if client == "2")
        needle = part._state.vector.numpy().tobytes()
        file = tmp_path / "federated.sqlite"
        assert needle in file.read_bytes()
        server.forget_clients(["2"], rank=6)
        assert needle not in file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["federated.sqlite"]


def test_the_projection_goes_back_to_the_clients_or_the_layer_it_was_folded_into(tmp_path):
    received = []
    grid = FakeGrid([1, 2, 3], receive=lambda context, update: received.append((context.node_id, update)))
    model = nn.Sequential()
    model.fc = nn.Linear(DIM, 5)
    with server_in(tmp_path) as server:
        server.collect(grid, **QUICK)
        with pytest.raises(InputError, match="projection: there is none yet"):
            server.ship(grid)
        projection = server.forget_groups([2], rank=6)
        assert server.ship(grid, progress=False) == []
        assert [(node, update.digest()) for node, update in received] == [(i, projection.digest()) for i in (1, 2, 3)]
        received.clear()
        loft.fold(model, projection)
        grid.faults[3] = lambda answer: []
        assert server.ship(grid, model=model, timeout=0.3, progress=False) == ["3"]
        for _, update in received:
            assert list(update) == ["fc.bias", "fc.weight"] or list(update) == ["fc.weight", "fc.bias"]
            torch.testing.assert_close(update["fc.weight"], model.fc.weight.detach(), rtol=0, atol=0)


def test_the_program_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "scale.md").read_text()
    apps = next(block for block in re.findall("```python\n(.*?)```", text, re.DOTALL) if "# server.py" in block)
    client, server = apps.replace("dim=512", f"dim={DIM}").split("# server.py\n")
    received = []
    grid = FakeGrid(range(1, 65), receive=lambda _, update: received.append(update))
    names = {"client_app": client_app, "fetch": lambda context, exact: None}
    exec(client, names)
    assert isinstance(names["app"], ClientApp)
    torch.manual_seed(1)  # a head that gives some rows to every class
    model = nn.Sequential()
    model.fc = nn.Linear(DIM, 10)
    known = {
        "MomentsServer": MomentsServer,
        "loft": loft,
        "grid": grid,
        "model": model,
        "head": copy.deepcopy(model.fc),
    }
    exec(server, known)
    with known["server"] as found:
        assert "17" not in found.clients
        assert len(found.clients) == 63
        kept = moments_of([client for client in range(1, 65) if client != 17], 20.0)
        assert found.moments.keys() == [0, 1, 2, 4]
        assert found.moments[0].digest() == kept[0].digest()
    assert isinstance(received[0], loft.Projection)
    torch.testing.assert_close(received[-1]["fc.weight"], model.fc.weight.detach(), rtol=0, atol=0)
    assert set(model(torch.randn(500, DIM)).argmax(1).tolist()) == {0, 1, 2, 4}


def test_names_instead_of_node_numbers(tmp_path):
    grid = FakeGrid([11, 12, 13])
    for node, context in grid._contexts.items():
        context.node_config["client"] = {11: "a", 12: "b", 13: "b"}[node]
    with server_in(tmp_path, trust_names=True) as server:
        with pytest.raises(FederatedError, match="2 clients of 3"):
            server.collect(grid, **QUICK)
        assert verdicts(server, "refused") == [("b", "another answer than before, which stands")]
        server.collect(grid, quorum=2, **QUICK)
        assert server.clients == ["a", "b"]


# ---- faults ----


def lost(answer):
    return []


def failed(answer):
    return [Message(Error(0, "the node is gone"), reply_to=question_of(answer))]


def question_of(answer):
    """A message whose reply looks like this answer."""
    metadata = answer.metadata
    asked = Message(answer.content, dst_node_id=metadata.src_node_id, message_type=metadata.message_type)
    asked.metadata.__dict__["_message_id"] = metadata.reply_to_message_id
    return asked


def twice(answer):
    return [answer, answer]


def twice_and_different(answer):
    other = Message(answer.content.copy(), reply_to=question_of(answer))
    changed = moments_of([99], EXACT)
    messages.with_bytes(other.content, "moments", changed.to_bytes())
    return [answer, other]


def of_round(number):
    def fault(answer):
        answer.content["loft_fast"] = ConfigRecord({**answer.content["loft_fast"], "round": number})
        return [answer]

    return fault


def foreign_schema(answer):
    answer.content["loft_fast"] = ConfigRecord({**answer.content["loft_fast"], "schema": 2})
    return [answer]


def of_another_node(answer):
    answer.metadata.__dict__["_src_node_id"] = 77
    return [answer]


def sending(make):
    """An answer with other data, made from the moments that it had."""

    def fault(answer):
        moments = loft.GroupedMoments.from_bytes(messages.bytes_in(answer.content, "moments"))
        data = make(moments)
        if data is None:
            del answer.content["moments"]
        else:
            messages.with_bytes(answer.content, "moments", data)
        return [answer]

    return fault


def changed(change):
    """Moments whose first group's state was changed behind their back; digest and layout are right."""

    def make(moments):
        part = moments._parts[moments.keys()[0]]
        state = part._settled()
        state.matrix = state.own_matrix().clone()
        change(state)
        return moments.to_bytes()

    return sending(make)


def negate(state):
    state.matrix = -state.matrix


def scale(state):
    state.matrix = state.matrix * 3 + state.vector.outer(state.vector)


def bend(state):
    """Correlations that no three features have, of possible variances."""
    n = state.count
    state.vector = state.vector * 0
    state.matrix = state.matrix * 0
    square = 10**6 * n * 2
    state.matrix.diagonal().fill_(square)
    for i, j, sign in ((0, 1, 1), (1, 2, 1), (0, 2, -1)):
        state.matrix[i, j] = state.matrix[j, i] = sign * square * 9 // 10


FAULTS = {
    "lost": (lost, "no answer from 2"),
    "failed": (failed, "2: it failed: the node is gone"),
    "an old round": (of_round(0), "2: it answers round 0"),
    "a later round": (of_round(7), "2: it answers round 7"),
    "no round": (of_round("1"), "2: it answers round '1'"),
    "schema": (foreign_schema, "2: message: it has schema 2, this version reads 1"),
    "another node": (of_another_node, "2: the answer is of node 77, which was not asked"),
    "nothing": (sending(lambda moments: None), "2: it sent no moments"),
    "empty": (sending(lambda moments: b""), "2: it sent no moments"),
    "noise": (sending(lambda moments: b"\xff" * 100), "2: data: cannot read it as loft_fast.grouped_moments"),
    "truncated": (sending(lambda moments: moments.to_bytes()[:-9]), "2: data: cannot read it as"),
    "a bit": (sending(lambda moments: moments.to_bytes()[:-1] + b"\x01"), "2: data: it is damaged"),
    "kind": (sending(lambda moments: moments.total().to_bytes()), "2: data: it holds loft_fast.moments, expected"),
    "dimension": (sending(lambda moments: moments_of([2], EXACT, dim=15).to_bytes()), "2: dim: got 15, expected 16"),
    "forged": (sending(lambda moments: forged(moments)), "2: data: it "),
    "scale": (sending(lambda moments: moments_of([2], 5.0).to_bytes()), "2: exact: got"),
    "floats": (sending(lambda moments: moments_of([2]).to_bytes()), "2: exact: got None"),
    "negated": (changed(negate), "2: data: it holds moments that contradict themselves"),
    "scaled": (changed(scale), "2: data: it holds moments that contradict themselves"),
    "indefinite": (changed(bend), "2: no rows have such moments: a scatter that is not positive semidefinite"),
    "oversized": (sending(lambda moments: b"\0" * (messages.largest(DIM, 1000) + 1)), "bytes, expected at most"),
}


def header(dim):
    """The beginning of a file that claims this dimension."""
    text = json.dumps({"__metadata__": {"dim": dim}}).encode()
    return len(text).to_bytes(8, "little") + text


FAULTS["unprintable"] = (sending(lambda moments: header("\ud800\n")), r"2: dim: got \ud800\n, expected 16")
FAULTS["long"] = (sending(lambda moments: header("x" * 100_000)), "2: dim: got xxx")


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_answer_is_refused_and_the_round_is_incomplete_until_it_is_made_good(tmp_path, keep, name):
    fault, reason = FAULTS[name]
    grid = FakeGrid([1, 2, 3])
    grid.faults[2] = fault
    with server_in(tmp_path, keep=keep) as server:
        with pytest.raises(FederatedError) as error:
            server.collect(grid, **QUICK)
        assert "round 1 is incomplete: 2 clients of 3" in str(error.value)
        assert reason in str(error.value)
        assert len(str(error.value)) < 1000
        assert server.moments.count == 0  # an incomplete round does not count
        told = [event for event in server.log() if event.verdict in ("refused", "missing")]
        assert [event.node for event in told] == ["2"]
        assert told[0].reason in str(error.value) or told[0].verdict == "missing"
        grid.faults.clear()
        assert server.collect(grid, **QUICK).accepted == ["2"]
        assert server.moments.digest() == moments_of([1, 2, 3], EXACT).digest()
        assert grid.fetched == [1, 2, 3]


@pytest.mark.parametrize("name", FAULTS)
def test_with_a_quorum_the_moments_are_those_of_who_was_accepted(tmp_path, keep, name):
    grid = FakeGrid([1, 2, 3])
    grid.faults[2] = FAULTS[name][0]
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, quorum=2, **QUICK)
        assert server.clients == ["1", "3"]
        assert server.moments.digest() == moments_of([1, 3], EXACT).digest()


@pytest.mark.parametrize("fault", [twice, twice_and_different])
def test_who_answers_twice_counts_once(tmp_path, keep, fault):
    grid = FakeGrid([1, 2, 3])
    grid.faults[2] = fault
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        assert server.moments.digest() == moments_of([1, 2, 3], EXACT).digest()
        expected = "the same answer again" if fault is twice else "another answer than before, which stands"
        assert verdicts(server, "refused") == [("2", expected)]


def test_an_answer_to_an_earlier_round_is_not_one_to_this(tmp_path, keep):
    grid = FakeGrid([1, 2, 3])
    late = []
    grid.faults[2] = lambda answer: late.append(answer) or []

    def replay(answer):
        late.append(Message(late[0].content, reply_to=question_of(answer)))  # as if it answered the new question
        return [*late, answer]

    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, quorum=2, **QUICK)
        grid.faults[2] = replay
        assert server.collect(grid, **QUICK).accepted == ["2"]
        # What answers no question of this round is not even looked at; what says that it does is refused.
        assert verdicts(server, "refused") == [(None, "it answers round 1")]
        assert server.moments.digest() == moments_of([1, 2, 3], EXACT).digest()


def test_another_dimension_is_refused_before_a_matrix_is_made(tmp_path, monkeypatch):
    grid = FakeGrid([1], dim=15)
    monkeypatch.setattr("loft_fast.moments.unpack", lambda *_: 1 / 0)
    with server_in(tmp_path) as server, pytest.raises(FederatedError, match="1: dim: got 15, expected 16"):
        server.collect(grid, **QUICK)


def forged(moments):
    """A header that claims the right dimension, with tensors of another."""
    data = moments_of([2], EXACT, dim=15).to_bytes()
    return data.replace(b'"dim":"15"', b'"dim":"16"')


def test_a_node_with_a_file_remembers_from_run_to_run(tmp_path):
    asked = []

    def forget(context, id):
        asked.append(id)
        return moments_of([context.node_id], EXACT).select([2])

    rest = moments_of([1], EXACT).without([2])
    for run in range(2):
        grid = FakeGrid([1], forget=forget)
        grid._contexts[1].node_config["moments"] = str(tmp_path / "client.safetensors")
        with server_in(tmp_path / "server") as server:
            if run == 0:
                server.collect(grid, **QUICK)
                grid.faults[1] = lost  # the client has answered, the server has not heard
                with pytest.raises(FederatedError, match="no answer"):
                    server.forget_rows(grid, 1, "request", timeout=0.2, rank=6)
            else:
                server.forget_rows(grid, 1, "request", rank=6)
                assert server.moments.digest() == rest.digest()
                with server_in(tmp_path / "other") as other:
                    other.collect(grid, **QUICK)
                    assert other.moments.digest() == rest.digest()
        assert grid.fetched == [1][run:]
    assert asked == ["request"]


def fill(state):
    """As many rows as integers can hold, all zero: such rows there may be."""
    state.count = 2**32
    state.vector, state.matrix = state.vector * 0, state.matrix * 0


def crowd(state):
    state.count = 2**62 - 50


def shift(state):
    state.vector = state.vector * 0 + 1e155


def spread(state):
    state.matrix = state.matrix * 1e306


OVERFLOWS = {
    "count": (fill, EXACT, "it cannot be added to the others: .* rows, expected at most 4294967296 in all"),
    "float count": (crowd, None, "with it there would be 46.* rows, expected at most 46.*"),
    "mean": (shift, None, "no rows have such moments: squares that sum to inf, expected at most 1e[+]300"),
    "scatter": (spread, None, "no rows have such moments: squares that sum to .*, expected at most 1e[+]300"),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_what_would_overflow_the_sum_is_refused(tmp_path, name):
    change, exact, reason = OVERFLOWS[name]
    grid = FakeGrid([1, 2, 4])
    grid.faults[4] = changed(change)  # a client with the classes of the first
    with server_in(tmp_path, exact=exact) as server:
        server.collect(grid, quorum=2, **QUICK)
        assert server.clients == ["1", "2"]
        assert re.match(reason, dict(verdicts(server, "refused"))["4"])
        assert server.moments.digest() == (moments_of([1], exact) + moments_of([2], exact)).digest()


@pytest.mark.parametrize("change", [fill, crowd])
def test_who_fills_the_sum_is_forgotten_and_the_others_come_in(tmp_path, change):
    exact = EXACT if change is fill else None
    grid = FakeGrid([1, 4])
    grid.faults[1] = changed(change)
    with server_in(tmp_path, exact=exact) as server:
        result = server.collect(grid, quorum=1, **QUICK)
        assert (result.accepted, list(result.refused)) == (["1"], ["4"])
        server.forget_clients(["1"], project=False)
        assert server.collect(grid, **QUICK).accepted == ["4"]
        assert server.moments.digest() == moments_of([4], exact).digest()


def elsewhere(moments):
    moments.site = "conv:output"
    return moments.to_bytes()


@pytest.mark.parametrize("way", ["abandon", "refresh", "forget"])
def test_a_site_is_that_of_who_counts(tmp_path, keep, way):
    grid = FakeGrid([1, 2, 3])
    grid.faults[1] = sending(elsewhere)
    with server_in(tmp_path, keep=keep) as server:
        with pytest.raises(FederatedError, match="2: site: got 'fc:input', expected 'conv:output'"):
            server.collect(grid, **QUICK)
        if way == "forget":
            server.collect(grid, quorum=1, **QUICK)
            server.forget_rows(grid, 1, "request", everything=True, project=False)
        if way == "abandon":
            server.abandon()
        grid.faults.clear()
        others = FakeGrid([2, 3])
        server.collect(others, refresh=way == "refresh", **QUICK)
        assert server.clients == ["2", "3"]
        assert server.moments.site == "fc:input"


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("step", [0, 1])
def test_a_client_that_is_killed_while_it_writes_answers_when_it_is_asked_again(tmp_path, monkeypatch, step, written):
    write, paths = files.write_bytes, []

    def dies(path, *arguments):
        paths.append(path)
        if len(paths) <= step or written:
            write(path, *arguments)
        if len(paths) > step:
            raise KeyboardInterrupt

    def client():
        """A new process, with the file of the last."""
        grid = FakeGrid([1, 2], forget=some_rows)
        grid._contexts[1].node_config["moments"] = str(tmp_path / "client.safetensors")
        return grid

    expected = moments_of([1, 2], EXACT) - some_rows(client()._contexts[1], "first")
    with server_in(tmp_path) as server:
        server.collect(client(), **QUICK)
        monkeypatch.setattr(files, "write_bytes", dies)
        with contextlib.suppress(KeyboardInterrupt):
            server.forget_rows(client(), 1, "first", project=False)
        monkeypatch.undo()
        server.forget_rows(client(), 1, "first", project=False)
        assert server.moments.digest() == expected.digest()
        with server_in(tmp_path / "other") as other:
            other.collect(client(), **QUICK)
            assert other.moments.digest() == expected.digest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_floats_that_are_none_are_refused(tmp_path, bad):
    def spoil(state):
        state.matrix[0, 0] = bad

    grid = FakeGrid([1, 2])
    grid.faults[2] = changed(spoil)
    with server_in(tmp_path, exact=None) as server:
        server.collect(grid, quorum=1, **QUICK)
        assert server.clients == ["1"]
        assert verdicts(server, "refused")[0][1] == "data: it holds moments that contradict themselves"


def test_a_client_that_has_nan_says_so_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("client_rows.rows", lambda *_: (torch.full((3, DIM), float("nan")), torch.zeros(3).long()))
    with server_in(tmp_path) as server, pytest.raises(FederatedError, match=r"it failed: InputError: x: .*NaN"):
        server.collect(FakeGrid([1]), **QUICK)


@pytest.mark.parametrize("change", [lambda state: negate(state), lambda state: state.matrix[0, 1:].mul_(9)])
def test_float_scatters_that_cannot_be_are_refused(tmp_path, change):
    grid = FakeGrid([1, 2])
    grid.faults[2] = changed(change)
    with server_in(tmp_path, exact=None) as server:
        server.collect(grid, quorum=1, **QUICK)
        assert server.clients == ["1"]
        assert "no rows have such moments" in verdicts(server, "refused")[0][1]


def test_rows_longer_than_the_norm_are_refused(tmp_path):
    with server_in(tmp_path, norm=1.0) as server, pytest.raises(FederatedError, match=r"rows of norm .* at most 1"):
        server.collect(FakeGrid([1]), **QUICK)


def test_few_rows_of_many_features_are_plausible_and_little_else_is():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for exact in (None, EXACT):
            x = (torch.randn(9, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, 64)).to(dtype)
            moments = loft.Moments(64, exact=exact).update(x)
            assert implausible(moments) is None
            assert implausible(moments + moments - moments) is None
            assert implausible(moments, norm=float(x.double().norm(dim=1).max())) is None
            assert "norm" in implausible(moments, norm=0.1)
    assert implausible(loft.Moments(3)) is None


# ---- crashes ----

KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from client_rows import DIM, EXACT
from federation import FakeGrid
from loft_fast.federated import MomentsServer
grid = FakeGrid(range(1, 6))
def die(answer):
    os._exit(9)
grid.faults[{node}] = die
with MomentsServer({folder!r}, DIM, exact=EXACT, keep={keep!r}) as server:
    server.collect(grid, timeout=50, progress=False)
"""


@pytest.mark.parametrize("node", [1, 3, 5])
def test_a_server_that_is_killed_in_a_round_goes_on_where_it_was(tmp_path, keep, node):
    tests = os.path.dirname(__file__)
    script = KILLED.format(tests=tests, node=node, folder=str(tmp_path), keep=keep)
    # Answers are handed over all at once: without this line, none would have been accepted when the process ends.
    script = script.replace("grid.faults", "grid.pull_messages = one_by_one(grid)\ngrid.faults", 1)
    script = script.replace("grid = FakeGrid", ONE_BY_ONE + "\ngrid = FakeGrid", 1)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    with server_in(tmp_path, keep=keep) as server:
        assert server.moments.count == 0
        grid = FakeGrid(range(1, 6))
        assert server.collect(grid, **QUICK).accepted == [str(client) for client in range(node, 6)]
        assert grid.fetched == list(range(node, 6))
        assert server.moments.digest() == moments_of(range(1, 6), EXACT).digest()
        assert [client for client, _ in verdicts(server, "accepted")] == ["1", "2", "3", "4", "5"]


ONE_BY_ONE = """
def one_by_one(grid):
    pull = grid.pull_messages
    return lambda ids: pull(sorted(ids, key=int)[:1])
"""


def test_a_request_changes_all_or_nothing(tmp_path, keep, monkeypatch):
    with collected(tmp_path, keep=keep) as server:
        before = server.moments.digest(), server.log()
        monkeypatch.setattr(type(server._archive), "write", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            server.forget_groups([2], rank=6)
        monkeypatch.undo()
        assert (server.moments.digest(), server.log()) == before
        assert server.projection is None
        server.forget_groups([2], rank=6)


def test_two_servers_do_not_share_a_folder(tmp_path):
    with collected(tmp_path), pytest.raises(StoreError, match="another server has it open"):
        server_in(tmp_path)
    server_in(tmp_path).close()


def test_a_request_of_one_id_is_answered_once(tmp_path):
    with collected(tmp_path) as server:
        first = server.forget_clients(["1"], "a", rank=6)
        second = server.forget_groups([2], "b", rank=5)
        before = server.moments.digest(), server.log()
        assert server.forget_clients(["1"], "a", rank=6).digest() == second.digest() != first.digest()
        assert server.forget_groups([2], "b").digest() == second.digest()
        with pytest.raises(InputError, match="id: 'a' was another request: clients 1"):
            server.forget_clients(["2"], "a")
        with pytest.raises(InputError, match="id: 'a' was another request: clients 1"):
            server.forget_groups([3], "a")
        assert (server.moments.digest(), server.log()) == before


def test_a_client_forgets_all_of_a_group_and_is_then_forgotten(tmp_path):
    grid = FakeGrid([1, 2, 3], forget=lambda context, id: moments_of([context.node_id], EXACT).select([2]))
    with server_in(tmp_path) as server:
        server.collect(grid, **QUICK)
        server.forget_rows(grid, 1, "rows", rank=6)
        rest = moments_of([2, 3], EXACT)
        assert server.moments.digest() == (rest + moments_of([1], EXACT).without([2])).digest()
        server.forget_clients(["1"], rank=5)
        assert server.moments.digest() == rest.digest()


def test_an_open_round_is_abandoned_or_begun_anew(tmp_path, keep):
    with collected(tmp_path, [1, 2], keep=keep) as server:
        grid = FakeGrid([3, 4])
        grid.faults[4] = lost
        for _ in range(2):
            with pytest.raises(FederatedError, match="3 clients of 4"):
                server.collect(grid, **QUICK)
        server.abandon()
        server.abandon()
        assert verdicts(server, "abandoned") == [(None, "what was accepted in it is deleted")]
        assert server.moments.digest() == moments_of([1, 2], EXACT).digest()
        with pytest.raises(FederatedError, match="3 clients of 4"):
            server.collect(grid, **QUICK)
        server.collect(FakeGrid([2, 5]), refresh=True, **QUICK)
        assert server.moments.digest() == moments_of([2, 5], EXACT).digest()


def test_nobody_else_reads_the_folder(tmp_path):
    with collected(tmp_path / "a" / "folder"):
        for path, mode in ((tmp_path / "a" / "folder", 0o700), (tmp_path / "a" / "folder" / "federated.sqlite", 0o600)):
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    (tmp_path / "federated.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="file is not a database"):
        server_in(tmp_path)
    with pytest.raises(StoreError, match="cannot open"):
        server_in("/dev/null/folder")


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": True}, "exact: got True, expected None or a number"),
        ({"exact": -1}, "exact: got -1"),
        ({"exact": None, "keep": "sum"}, "exact: got None with keep='sum'"),
        ({"keep": "all"}, "keep: got 'all', expected 'clients' or 'sum'"),
        ({"max_groups": 0}, "max_groups: got 0"),
        ({"norm": -1.0}, "norm: got -1.0, expected a number above 0"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        server_in(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_bad_calls_change_nothing(tmp_path):
    with collected(tmp_path) as server:
        before = server.moments.digest(), server.log()
        grid = FakeGrid([1])
        for call, message in (
            (lambda: server.collect(grid, timeout=0), "timeout: got 0"),
            (lambda: server.collect(grid, quorum=0), "quorum: got 0"),
            (lambda: server.forget_clients("1"), "clients: got '1', expected a list"),
            (lambda: server.forget_clients([]), "clients: got none"),
            (lambda: server.forget_clients([1]), "clients: got 1, expected names, such as '1'"),
            (lambda: server.forget_clients([None]), "clients: got None, expected names"),
            (lambda: server.forget_clients(["1"], "\ud800"), "id: got '.ud800', expected a text"),
            (lambda: server.forget_groups([2], 5), "id: got 5, expected a text"),
            (lambda: server.collect(grid, "ab"), "nodes: got 'ab', expected a list of numbers of nodes"),
            (lambda: server.collect(grid, ["1"]), "nodes: got .'1'., expected a list"),
            (lambda: server.collect(grid, True), "nodes: got True, expected a list"),
            (lambda: server.collect(grid, 0), "nodes: got 0, expected a list"),
            (lambda: server.forget_rows(grid, "1", "a"), "node: got .'1'., expected"),
            (lambda: server.forget_clients(["9"]), "clients: no client '9'; there are '1', '2'"),
            (lambda: server.forget_groups([9]), "keys: no group 9"),
            (lambda: server.forget_clients(["1", "2", "3", "4", "5"], rank=6), "retain"),
            (lambda: server.forget_clients(["1"], rank=DIM + 1), "rank"),
            (lambda: server.forget_rows(grid, 1, ""), "id: got ''"),
            (lambda: server.forget_rows(grid, 1, None), "id: got None"),
            (lambda: server.forget_rows(grid, 1, "a", timeout=-1), "timeout: got -1"),
        ):
            with pytest.raises(InputError, match=message):
                call()
        assert (server.moments.digest(), server.log()) == before
    with pytest.raises(InputError, match=r"exact: got 127.99\d*, but .* was made with 63.99"):
        server_in(tmp_path, exact=120.0)


def test_rows_that_were_never_there_are_not_forgotten(tmp_path, keep):
    def forget(context, id):
        return moments_of([context.node_id + (id == "foreign")], EXACT, n=50 if id == "many" else 40)

    grid = FakeGrid([1, 2, 3], forget=forget)
    with server_in(tmp_path, keep=keep) as server:
        server.collect(grid, **QUICK)
        before = server.moments.digest()
        with pytest.raises(FederatedError, match=r"it failed: InputError: .* cannot remove"):
            server.forget_rows(grid, 2, "many")
        grid._contexts[2].state.clear()  # and a client that does not look itself
        with pytest.raises(FederatedError, match="it sent 50 rows, expected 40"):
            server.forget_rows(grid, 2, "many")
        if keep == "clients":  # the sum has those rows, whoever sent them
            with pytest.raises(FederatedError, match="these rows are not its own"):
                server.forget_rows(grid, 2, "foreign")
        grid.faults[2] = lost
        with pytest.raises(FederatedError, match="no answer within"):
            server.forget_rows(grid, 2, "silent", timeout=0.2)
        assert server.moments.digest() == before


def test_nothing_is_forgotten_while_a_round_is_open(tmp_path):
    with collected(tmp_path) as server:
        grid = FakeGrid([6])
        grid.faults[6] = lost
        with pytest.raises(FederatedError, match="incomplete"):
            server.collect(grid, **QUICK)
        with pytest.raises(FederatedError, match="round 2 is open"):
            server.forget_clients(["1"], rank=6)


def test_without_flower_there_is_a_clear_error(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("loft_fast.federated")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(loft.MissingExtraError, match=r"pip install 'loft-fast\[federated\]'"):
        importlib.import_module("loft_fast.federated")


# ---- for a secure sum ----


def test_masked_sums_modulo_2_64_are_exact():
    clients = range(1, 5)
    states = [moments_of([client], EXACT, grouped=False)._settled() for client in clients]
    generator = torch.Generator().manual_seed(0)
    size = len(states[0].flat())
    masks = {
        (i, j): torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator)
        for i in clients
        for j in clients
        if i < j
    }
    masked = [
        one.flat()
        + sum(mask for (i, _), mask in masks.items() if i == client)
        - sum(mask for (_, j), mask in masks.items() if j == client)
        for client, one in zip(clients, states, strict=True)
    ]
    assert not any(torch.equal(hidden, one.flat()) for hidden, one in zip(masked, states, strict=True))
    unmasked = states[0].from_flat(sum(masked))
    whole = moments_of(clients, EXACT, grouped=False)
    assert unmasked.digest() == whole.digest()
    assert unmasked.clipped == whole.clipped
