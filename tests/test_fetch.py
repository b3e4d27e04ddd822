from contextlib import nullcontext

import pytest
import torch
from models import WRAPPED, ByKeyword, Maps, Mlp, Output, Tokens, build, everything, random_projection
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loft_fast import GroupedMoments, InputError, Moments, SiteError, attach, fetch_moments


def batches_of(n=20, size=8, shape=(6,), classes=3):
    """(x, y) batches, the last one smaller."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator)
    y = torch.randint(classes, (n,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def texts(n=12, size=4):
    """Dictionaries with input_ids, attention_mask and labels, padded to different lengths."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for length in (5, 7, 3)[: n // size]:
        lengths = torch.randint(1, length + 1, (size, 1), generator=generator)
        found.append(
            {
                "input_ids": torch.randint(11, (size, length), generator=generator),
                "attention_mask": (torch.arange(length) < lengths).long(),
                "labels": torch.randint(3, (size,), generator=generator),
                "author": [f"author {i % 2}" for i in range(size)],
            }
        )
    return found


def fetch(model, loader, site=None, group=None, **kwargs):
    return fetch_moments(model, loader, site, group, progress=False, **kwargs)


def assert_moments(moments, rows, tolerance=1e-9):
    """These are the moments of these rows (n, d), computed here by the definition."""
    rows = rows.detach().double()
    assert isinstance(moments, Moments)
    assert moments.count == len(rows)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.scatter, centred.T @ centred, rtol=tolerance, atol=tolerance * len(rows))


def assert_groups(moments, rows, keys, tolerance=1e-9):
    assert isinstance(moments, GroupedMoments)
    assert set(moments) == set(keys)
    for key in moments:
        assert_moments(moments[key], rows[[k == key for k in keys]], tolerance)


# float32 features are accumulated through blocks in float32
FLOAT32 = 2e-6

# ---- moments equal those of features computed by hand ----


@torch.no_grad()
def mlp_features(model, batches, site):
    model = model.eval()
    x = torch.cat([x for x, _ in batches])
    hidden = model.body(x)
    outputs = {"fc:output": model.fc(hidden), "body.1:output": model.body[:2](x)}
    return {"fc:input": hidden, "body.0:input": x, **outputs}[site]


@pytest.mark.parametrize("site", ["fc:input", "fc:output", "body.0:input", "body.1:output"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows(site, dtype):
    model = build(Mlp).to(dtype)
    loader = [(x.to(dtype), y) for x, y in batches_of()]
    moments = fetch(model, loader, site)
    assert moments.site == site
    assert_moments(moments, mlp_features(model, loader, site), 1e-9 if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize(("site", "same"), [(None, "fc:input"), ("fc", "fc:input")])
def test_short_site_forms(site, same):
    moments = fetch(build(Mlp), batches_of(), site)
    assert moments.site == same
    assert torch.equal(moments.scatter, fetch(build(Mlp), batches_of(), same).scatter)


@torch.no_grad()
def token_features(model, batch):
    """(n, t, 5) after mix, and which of the positions are real."""
    return model.mix(model.embed(batch["input_ids"])), batch["attention_mask"].bool()


@pytest.mark.parametrize("masked", [True, False])
def test_tokens(masked):
    model, loader = build(Tokens).double(), texts()
    found = [token_features(model, batch) for batch in loader]
    if not masked:
        loader = [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in loader]
    rows = torch.cat([hidden[real] if masked else hidden.flatten(0, 1) for hidden, real in found])
    assert_moments(fetch(model, loader, "mix:output"), rows)


def test_pooled_features_of_a_text_model_count_every_sample():
    assert fetch(build(Tokens), texts(), "fc").count == 12


@torch.no_grad()
def map_features(model, batches, site):
    x = torch.cat([x for x, _ in batches])
    return {"conv": x, "head": model.act(model.conv(x)), "act:input": model.conv(x)}[site]


@pytest.mark.parametrize("site", ["conv", "head", "act:input"])
def test_maps_count_every_position(site):
    model = build(Maps).double()
    loader = [(x.double(), y) for x, y in batches_of(shape=(2, 4, 4))]
    rows = map_features(model, loader, site).movedim(1, -1).flatten(0, -2)
    assert len(rows) == 20 * 16
    assert_moments(fetch(model, loader, site), rows)


@pytest.mark.parametrize("group", [None, "label"])
@pytest.mark.parametrize("site", ["conv", "head", "act:input"])
def test_pooled_maps_count_every_row_once(site, group):
    model = build(Maps).double()
    loader = [(x.double(), y) for x, y in batches_of(shape=(2, 4, 4))]
    rows = map_features(model, loader, site).mean((2, 3))
    found = fetch(model, loader, site, group, pool=True)
    if group is None:
        assert_moments(found, rows)
    else:
        assert_groups(found, rows, torch.cat([y for _, y in loader]).tolist())


@pytest.mark.parametrize("group", [None, "label"])
def test_pooled_tokens_count_those_that_are_real(group):
    model, loader = build(Tokens).double(), texts()
    for batch in loader:
        batch["attention_mask"][0] = 0  # and a row without any does not count
    rows, keys = [], []
    for batch in loader:
        hidden, real = token_features(model, batch)
        rows += [one[mask].mean(0) for one, mask in zip(hidden[1:], real[1:], strict=True)]
        keys += batch["labels"][1:].tolist()
    found = fetch(model, loader, "mix:output", group, pool=True)
    if group is None:
        assert_moments(found, torch.stack(rows))
    else:
        assert_groups(found, torch.stack(rows), keys)


def test_pooled_tokens_do_not_hear_of_what_padding_holds():
    model, loader = build(Tokens), texts()
    wanted = fetch(model, loader, "mix:output", pool=True)
    for batch in loader:
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"] > 0, 11)
    model.embed = nn.Embedding.from_pretrained(torch.cat([model.embed.weight.detach(), torch.full((1, 5), torch.nan)]))
    assert torch.equal(fetch(model, loader, "mix:output", pool=True).scatter, wanted.scatter)


def test_pooled_maps_are_summed_in_float32_under_autocast():
    x = 20 + torch.randn(9, 5, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = fetch(nn.Sequential(nn.Identity(), nn.Conv2d(5, 3, 1)), [x], "1", pool=True)
    assert_moments(found, x.mean((2, 3)), 1e-4)


def test_pooling_vectors_changes_nothing():
    model, loader = build(Mlp), batches_of()
    pooled, plain = (fetch(model, loader, "fc", pool=pool) for pool in (True, False))
    assert pooled.count == plain.count
    assert torch.equal(pooled.scatter, plain.scatter)


def test_site_called_by_keyword():
    model = build(ByKeyword).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    assert_moments(fetch(model, [x]), x)


def test_site_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x):
            return self.fc(self.fc(x))

    model = build(Twice).double()
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 2
    rows = torch.cat([x, model.fc(x)])
    assert_moments(fetch(model, [x]), rows)
    assert_groups(fetch(model, [(x, y)], group="label"), rows, y.tolist() * 2)


def test_features_changed_in_place_later_on():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    assert_moments(fetch(model, [x], "0:output"), model[0](x))


def test_attached_projection_is_seen():
    model = build(Mlp).double()
    loader = [(x.double(), y) for x, y in batches_of()]
    projection = random_projection()
    with attach(model, projection, "fc"):
        moments = fetch(model, loader, "fc")
    assert_moments(moments, projection(mlp_features(model, loader, "fc:input")))


# ---- groups ----


@pytest.mark.parametrize("group", ["label", "auto", 1, lambda batch: batch[1], lambda batch: batch[1].tolist()])
def test_groups_by_label(group):
    model = build(Mlp).double()
    loader = [(x.double(), y) for x, y in batches_of()]
    keys = torch.cat([y for _, y in loader]).tolist()
    assert_groups(fetch(model, loader, "fc", group), mlp_features(model, loader, "fc:input"), keys)


@pytest.mark.parametrize("group", ["prediction", "auto"])
def test_groups_by_prediction(group):
    model = build(Mlp).double()
    loader = [(x.double(), y) for x, y in batches_of()]
    features = mlp_features(model, loader, "fc:input")
    moments = fetch(model, [x for x, _ in loader], "fc", group)
    assert_groups(moments, features, model.fc(features).argmax(1).tolist())


@pytest.mark.parametrize("group", ["author", lambda batch: batch["author"]])
def test_groups_by_text_give_every_token_its_key(group):
    model, loader = build(Tokens).double(), texts()
    rows, keys = [], []
    for batch in loader:
        hidden, real = token_features(model, batch)
        rows.append(hidden[real])
        keys += [author for author, mask in zip(batch["author"], real, strict=True) for _ in range(mask.sum())]
    assert_groups(fetch(model, loader, "mix:output", group), torch.cat(rows), keys)


def test_groups_by_token():
    model, loader = build(Tokens).double(), texts()
    for batch in loader:
        batch["labels"] = batch["input_ids"] % 4
    found = [(*token_features(model, batch), batch["labels"]) for batch in loader]
    rows = torch.cat([hidden[real] for hidden, real, _ in found])
    keys = torch.cat([labels[real] for _, real, labels in found]).tolist()
    assert_groups(fetch(model, loader, "mix:output", "label"), rows, keys)


def test_groups_by_an_entry_that_the_model_reads():
    model = build(Tokens).double()
    moments = fetch(model, texts(), "mix:output", "input_ids")
    for key in moments:  # the same token is embedded in the same way every time
        assert float(moments[key].scatter.abs().max()) < 1e-20


def test_groups_of_maps():
    model = build(Maps).double()
    loader = [(x.double(), y) for x, y in batches_of(shape=(2, 4, 4))]
    rows = map_features(model, loader, "head").movedim(1, -1).flatten(0, -2)
    keys = torch.cat([y for _, y in loader]).repeat_interleave(16)
    assert_groups(fetch(model, loader, "head", "label"), rows, keys.tolist())


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: x.unsqueeze(1), lambda x: Output(None)])
def test_auto_groups_nothing_without_one_key_per_row(output):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return output(self.fc(x))

    x = torch.randn(9, 6)
    assert_moments(fetch(Other(), [x], "fc", "auto"), x, FLOAT32)


# ---- nothing of the model changes ----


def mixed_modes():
    model = build(Mlp)
    model.body[1].eval()
    return model


def test_model_and_random_state_are_untouched():
    model = mixed_modes()
    before, random = everything(model), torch.get_rng_state()
    fetch(model, batches_of())
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


def stopping(error):
    yield from batches_of()
    raise error


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["model", "loader", "group"])
def test_restored_after_errors(error, where):
    model = mixed_modes()
    if where == "model":
        model.body.append(Failing(error))
    before = everything(model)
    loader = stopping(error) if where == "loader" else batches_of()

    def fail(batch):
        raise error

    with pytest.raises(type(error)) as raised:
        fetch(model, loader, "body.0", fail if where == "group" else None, device="cpu:0")
    assert raised.value is error
    assert everything(model) == before


class Moving(Mlp):
    """Notes where it is sent."""

    def to(self, device):
        self.moves = [*getattr(self, "moves", []), str(device)]
        return super().to(device)


@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_device_is_restored(error):
    model = build(Moving)
    loader = batches_of() if error is None else stopping(error)
    # "cpu:0" is where "cpu" is, but has another name
    with pytest.raises(type(error)) if error else nullcontext():
        assert fetch(model, loader, device="cpu:0").device == torch.device("cpu")
    assert model.moves == ["cpu:0", "cpu"]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_model_stays_where_it_is(device):
    model = build(Moving)
    fetch(model, batches_of(), device=device)
    assert not hasattr(model, "moves")


def test_device_of_a_model_that_is_spread():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, device="meta"))
    before = [p.device for p in model.parameters()]
    with pytest.raises(InputError, match="device: the model is spread over cpu, meta"):
        fetch(model, batches_of(), "0", device="cpu")
    assert [p.device for p in model.parameters()] == before


# ---- precision, loaders, wrappers ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype):
    model = build(Mlp).to(dtype)
    loader = [(x.to(dtype), y) for x, y in batches_of()]
    features = mlp_features(model, loader, "fc:input")
    assert features.dtype == dtype
    moments = fetch(model, loader, "fc")
    assert moments.mean.dtype == torch.float64
    assert_moments(moments, features, FLOAT32)


def test_autocast_of_the_caller_is_respected():
    model = build(Mlp)
    seen = []
    watch = model.fc.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        moments = fetch(model, batches_of(), "fc:output")
    watch.remove()
    assert {output.dtype for output in seen} == {torch.bfloat16}
    assert_moments(moments, torch.cat(seen), FLOAT32)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: iter(batches_of()),
        lambda: (x for x, _ in batches_of()),
        lambda: [[x] for x, _ in batches_of()],
        lambda: [{"x": x, "labels": y} for x, y in batches_of()],
        lambda: DataLoader(TensorDataset(*map(torch.cat, zip(*batches_of(), strict=True))), batch_size=8),
    ],
    ids=["iterator", "generator", "lists", "dictionaries", "DataLoader"],
)
def test_loaders(loader):
    moments = fetch(build(Mlp), loader())
    assert torch.equal(moments.scatter, fetch(build(Mlp), batches_of()).scatter)


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("site", ["fc:input", "fc:output"])
def test_wrapped_models(wrap, site):
    plain = fetch(build(Mlp), batches_of(), site)
    model = wrap(build(Mlp).eval())
    model(batches_of()[0][0])  # compiled before the hook is there
    before = everything(model)
    moments = fetch(model, batches_of(), site)
    assert moments.site == site
    assert torch.equal(moments.mean, plain.mean)
    assert torch.equal(moments.scatter, plain.scatter)
    assert everything(model) == before


# ---- refusals ----


def poisoned(bad, value):
    """Batch 1 has `bad` rows with NaN or Inf."""
    loader = batches_of()
    loader[1][0][:bad, 2] = value
    return loader


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", [None, "label"])
def test_not_finite(value, group):
    with pytest.raises(InputError, match="batch 1: x: 3 of 8 rows contain NaN or Inf, expected finite features"):
        fetch(build(Mlp), poisoned(3, value), "body.0", group)


class Sometimes(nn.Module):
    """Skips `fc` for a batch of one row."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x) if len(x) > 1 else x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


X = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("kind", "loader", "site", "group", "error", "message"),
    [
        (Mlp, [], None, None, InputError, "loader: it yielded no batches, expected at least one"),
        (Mlp, None, None, None, InputError, "loader: got NoneType, expected an iterable of batches"),
        (Mlp, [X], "fd", None, SiteError, "site: no module 'fd' in the model; nearest: 'fc'"),
        (Sometimes, [X], "unused", None, SiteError, "site: 'unused:input' is not reached in the forward pass"),
        (Sometimes, [X, X[:1]], "fc", None, SiteError, "site: 'fc:input' is not reached in the forward pass"),
        (Tokens, texts(), "embed", None, SiteError, "site: 'embed:input' carries a torch.int64 tensor of shape"),
        (Recurrent, [X], "lstm:output", None, SiteError, "site: 'lstm:output' carries a tuple, expected"),
        (Mlp, [X, X], None, "label", InputError, "group: got 'label', but the batches carry no class labels"),
        (Mlp, [(X, torch.zeros(3).long())], None, "label", InputError, r"keys of shape \(3,\) for features of \(4,\)"),
        (Mlp, [(X, torch.zeros(4, 2).long())], None, 1, InputError, r"keys of shape \(4, 2\) for features of \(4,\)"),
        (Mlp, [X], None, lambda batch: torch.tensor(3), InputError, r"keys of shape \(\) for features of \(4,\)"),
        (Mlp, [X], None, lambda batch: torch.zeros(4), InputError, "batch 0: group: got dtype torch.float32"),
        (Mlp, [X], None, lambda batch: [None] * 4, InputError, "batch 0: group: got the key None"),
    ],
)
def test_refusals(kind, loader, site, group, error, message):
    model = build(kind)
    before = everything(model)
    with pytest.raises(error, match=message):
        fetch(model, loader, site, group)
    assert everything(model) == before


def test_mask_of_another_shape():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1, 5)

        def forward(self, input_ids):
            return self.fc(input_ids.float().unsqueeze(2))

    batch = texts()[0]
    batch["attention_mask"] = batch["attention_mask"].unsqueeze(1)
    with pytest.raises(InputError, match=r"batch 0: attention_mask: got shape \(4, 1, 5\) for features of \(4, 5\)"):
        fetch(Raw(), [batch], "fc")


def test_labels_that_stop_half_way():
    model = nn.Sequential(nn.Linear(6, 5), nn.Unflatten(1, (1, 5)))
    with pytest.raises(InputError, match="batch 1: group: the batch has neither one label nor one prediction per row"):
        fetch(model, [(X, torch.zeros(4).long()), X], "0", "auto")


def test_width_that_changes_between_batches():
    with pytest.raises(InputError, match=r"batch 1: x: got shape \(4, 6\), expected \(n, 3\)"):
        fetch(nn.Sequential(nn.Identity()), [torch.zeros(4, 3), torch.zeros(4, 6)], "0")
