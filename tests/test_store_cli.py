"""loft-fast store, as a user types it."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from stores import content
from test_cli import mine

from loft_fast import GroupedMoments, Projection, UnlearningStore, cli, cli_store

__all__ = ["mine"]


def run(capsys, *arguments, status=0):
    """What a command prints; with --json, what that says."""
    assert cli.main([*arguments, "--quiet"]) == status
    shown = capsys.readouterr()
    assert (shown.err == "") == (status == 0)
    if status:
        assert shown.out == ""
        return shown.err
    return json.loads(shown.out) if "--json" in arguments else shown.out


@pytest.fixture
def store(mine, capsys):
    """A folder with mine.py, moments.safetensors and a store of them."""
    out = run(capsys, "fetch", "mine:net", "mine:loader", "--exact", "--out", "moments.safetensors", "--json")
    assert out["clipped"] == 0
    assert out["exact"] == GroupedMoments.load("moments.safetensors").exact
    found = run(capsys, "store", "init", "store", "moments.safetensors", "--model", "mine:net", "--json")
    assert (found["groups"], found["rows"], found["entries"]) == (4, 200, 1)
    return mine


def test_a_request_from_start_to_receipt(store, capsys):
    words = run(capsys, "store", "forget", "store", "2", "--id", "r-1", "--model", "mine:net", "--out", "p.safetensors")
    assert "r-1  1 groups forgotten, 50 rows" in words
    assert "no projector below" in words
    with UnlearningStore("store") as opened:
        assert opened.projection.digest() == Projection.load("p.safetensors").digest()
        assert 2 not in opened.moments
    again = run(capsys, "store", "forget", "store", "2", "--id", "r-1", "--json")
    assert (again["number"], again["id"], again["count"]) == (1, "r-1", 50)
    entries = run(capsys, "store", "ledger", "store", "--json")
    assert [entry["id"] for entry in entries] == ["create", "r-1"]
    assert run(capsys, "store", "ledger", "store").count("\n") == 2
    assert "receipt of request r-1 in receipt.json" in run(
        capsys, "store", "receipt", "store", "r-1", "--out", "receipt.json"
    )
    receipt = run(capsys, "store", "receipt", "store", "r-1", "--json")
    assert receipt == json.loads((store / "receipt.json").read_text())
    assert "in order: 2 entries, 3 groups, 150 rows retained\nthe receipt is that of request r-1, number 1" in run(
        capsys, "store", "verify", "store", "receipt.json"
    )
    assert run(capsys, "store", "verify", "store", "--json")["rows"] == 150
    assert "took away these rows and nothing else" in run(
        capsys, "store", "undo-check", "store", "r-1", "moments.safetensors"
    )


def test_string_keys_that_look_like_numbers(store, capsys):
    moments = GroupedMoments.load("moments.safetensors")
    x = torch.randn(40, 12)
    GroupedMoments(12, exact=moments.exact).update(x, ["1", "two"] * 20).save("names.safetensors")
    run(capsys, "store", "init", "names", "names.safetensors")
    first = run(capsys, "store", "forget", "names", "1", "--rank", "3", "--json")
    assert run(capsys, "store", "forget", "names", "1", "--json") == first


def test_undo_check_with_the_moments_of_what_was_forgotten(store, capsys):
    run(capsys, "store", "forget", "store", "2", "--id", "r-1", "--rank", "3")
    for key, status in ((2, 0), (3, 1)):
        GroupedMoments.load("moments.safetensors").select([key]).save("part.safetensors")
        said = run(capsys, "store", "undo-check", "store", "r-1", "part.safetensors", status=status)
        assert ("nothing else" in said) == (status == 0)


def test_undo_check_of_rows_from_every_group(store, capsys):
    import mine as module

    x, y = module.loader()[0]
    x, y = module.net()[:2](x[:20]).detach(), y[:20]
    moments = GroupedMoments.load("moments.safetensors")
    part = moments.select([]).update(x, y)
    with UnlearningStore("store") as opened:
        opened.forget_rows(x, y, id="r-1", rank=3)
    assert part.keys() == moments.keys()
    part.save("part.safetensors")
    (part + part).save("other.safetensors")
    for name, status in (("moments", 0), ("part", 0), ("other", 1)):
        run(capsys, "store", "undo-check", "store", "r-1", f"{name}.safetensors", status=status)


def test_a_receipt_of_a_million_rows_can_be_read():
    rows = json.dumps({"entry": {"subjects": ["0" * 64] * 1000}}, indent=2)
    assert 1000 * len(rows) < cli_store._LARGEST


SHARED = """
import torch
class Net(torch.nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.one, self.two = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        self.fc = torch.nn.Linear(width, 4)
class Extra(Net):
    def get_extra_state(self):
        return {"version": 1}
tied, view, sparse, normed, extra, wide = Net(), Net(), Net(), Net(), Extra(), Net(13)
tied.two.weight = tied.one.weight
view.register_buffer("buffer", view.one.weight.detach()[:2])
sparse.register_buffer("buffer", torch.eye(3).to_sparse())
torch.nn.utils.parametrizations.weight_norm(normed.fc)
"""


@pytest.fixture
def shared(store, capsys, monkeypatch):
    """The same with models in shared.py, and moments and a store, `other`, for their last layer."""
    monkeypatch.delitem(sys.modules, "shared", raising=False)
    (store / "shared.py").write_text(SHARED)
    moments = GroupedMoments.load("moments.safetensors")
    moments.site = "fc:input"
    moments.save("moments.safetensors")
    run(capsys, "store", "init", "other", "moments.safetensors")
    yield store
    sys.modules.pop("shared", None)


@pytest.mark.parametrize("name", ["tied", "view"])
def test_weights_that_share_memory(shared, capsys, name):
    run(capsys, "store", "forget", "other", "2", "--model", f"shared:{name}", "--weights", "net.safetensors")
    import shared as module

    getattr(module, name).load_state_dict(load_file("net.safetensors"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("extra", "--weights: the model's state has a dict in '_extra_state', expected nothing but tensors"),
        ("sparse", "--weights: cannot write 'buffer' of the model, torch.float32 and torch.sparse_coo on cpu"),
        ("normed", "site: cannot fold into 'fc:input': its weight or bias is computed from others"),
        ("wide", "MODEL: it has 13 features at 'fc:input', expected 12 as in the moments"),
    ],
)
@pytest.mark.parametrize("words", ["store forget other", "forget moments.safetensors"])
def test_weights_that_cannot_be_written_are_refused_before_any_work(shared, capsys, name, message, words):
    arguments = [*words.split(), "2", "--model", f"shared:{name}", "--weights", "w", "--out", "p", "--rank", "3"]
    assert f"loft-fast: {message}" in run(capsys, *arguments, status=1)
    assert not {"w", "p"} & {path.name for path in shared.iterdir()}
    assert UnlearningStore("other").verify()["entries"] == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "forget moments.safetensors 2 --out moments.safetensors",
            "--out: got 'moments.safetensors', which MOMENTS is",
        ),
        ("forget moments.safetensors 2 --out link", "--out: got 'link', which MOMENTS is"),
        ("forget moments.safetensors 2 --out p --model mine:net --weights ./p", "--weights: got 'p', which --out is"),
        ("store forget store 2 --out p --model mine:net --weights p", "--weights: got 'p', which --out is"),
        ("store forget store 2 --out store/ledger.sqlite", "--out: got 'store/ledger.sqlite', which STORE is or holds"),
        ("store forget store 2 --out .", "--out: cannot write '.': it is not a regular file"),
        (
            "store receipt store create --out store/signing.key",
            "--out: got 'store/signing.key', which STORE is or holds",
        ),
        ("fetch mine:net mine:loader --out pipe", "--out: cannot write 'pipe': it is not a regular file"),
    ],
)
def test_no_output_is_written_over_an_input_or_another_output(store, capsys, command, message):
    (store / "link").symlink_to("moments.safetensors")
    os.mkfifo("pipe")
    before = content(store)
    assert f"loft-fast: {message}" in run(capsys, *command.split(), status=1)
    assert content(store) == before


def test_weights_with_the_projection_folded_in(store, capsys):
    run(capsys, "store", "forget", "store", "2", "--model", "mine:net", "--weights", "net.safetensors")
    import mine as module

    weights = load_file("net.safetensors")
    assert torch.equal(weights["2.weight"], module.net()[2].weight)
    with UnlearningStore("store") as opened:
        left = torch.eye(12, dtype=torch.float64) - opened.projection.matrix()
        assert float((weights["2.weight"].double() @ left).abs().max()) < 1e-5


def test_weights_have_the_outputs_closed_of_all_that_was_forgotten(store, capsys):
    """Of every request so far, and again when one is repeated."""
    import mine as module

    rows = torch.cat([x for x, _ in module.loader()])
    for keys, gone in ((["2"], [2]), (["0"], [0, 2]), (["2"], [0, 2])):
        found = run(
            capsys, "store", "forget", "store", *keys, "--model", "mine:net", "--weights", "net.safetensors", "--json"
        )
        assert found["details"]["options"]["close"]
        net = module.net()
        net.load_state_dict(load_file("net.safetensors"))
        said = net(rows).argmax(1).unique().tolist()
        assert said
        assert not set(said) & set(gone)
        assert torch.equal(net[2].weight[gone[0]], net[2].weight[gone[-1]])


def test_kept_forgotten_moments(store, capsys):
    run(capsys, "store", "init", "other", "moments.safetensors", "--keep-forgotten", "--min-rows", "50")
    run(capsys, "store", "forget", "other", "1", "--rank", "4")
    run(capsys, "store", "forget", "other", "0", "--rank", "4")
    with UnlearningStore("other") as opened:
        assert opened.keep_forgotten
        assert opened.projection.rank == 4
    run(capsys, "store", "init", "third", "moments.safetensors", "--min-rows", "51", status=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ledger", "nowhere"], "path: 'nowhere' holds no store"),
        (["forget", "store", "9"], "keys: no group 9; there are 0, 1, 2, 3"),
        (["forget", "store", "1", "--erase"], "--erase: got it without --model"),
        (["forget", "store", "1", "--weights", "w"], "--weights: got it without --model"),
        (["forget", "store", "1", "--model", "mine:number"], "MODEL: 'mine:number' is a int"),
        (["forget", "store", "1", "--rank", "99"], "rank: got 99"),
        (["forget", "store", "1", "--out", "mine.py/p"], "--out: cannot write to"),
        (["receipt", "store", "r-9"], "id: no request 'r-9' in the ledger"),
        (["verify", "store", "nothing.json"], "receipt: cannot read 'nothing.json'"),
        (["verify", "store", "mine.py"], "receipt: cannot read 'mine.py'"),
        (["undo-check", "store", "r-9", "moments.safetensors"], "id: no request 'r-9'"),
        (["undo-check", "store", "create", "mine.py"], "path: cannot read 'mine.py'"),
        (["init", "store", "moments.safetensors"], "path: 'store' is there already"),
        (["init", "new", "mine.py"], "path: cannot read 'mine.py'"),
    ],
)
def test_refusals(store, capsys, arguments, message):
    before = UnlearningStore("store").verify()
    assert f"loft-fast: {message}" in run(capsys, "store", *arguments, status=1)
    assert UnlearningStore("store").verify() == before


def test_moments_that_are_not_exact(mine, capsys):
    run(capsys, "fetch", "mine:net", "mine:loader", "--out", "moments.safetensors")
    assert "expected exact ones" in run(capsys, "store", "init", "store", "moments.safetensors", status=1)


def test_exact_to_a_given_magnitude(mine, capsys):
    run(capsys, "fetch", "mine:net", "mine:loader", "--exact", "0.5", "--out", "moments.safetensors")
    moments = GroupedMoments.load("moments.safetensors")
    assert 0.5 <= moments.exact < 1
    assert moments.clipped > 0
