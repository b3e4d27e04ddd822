"""Small models that stand for the kinds that users bring, and what the tests of sites and surgery ask of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loft_fast import Projection


class Mlp(nn.Module):
    """x (n, 6) -> body (n, 5) -> fc (n, 3); batch norm and dropout behave differently in training mode."""

    def __init__(self, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(5, 3, bias=bias)

    def forward(self, x):
        return self.fc(self.body(x))


@dataclass
class Output:
    """What a transformer of a hub returns."""

    logits: Tensor


class Tokens(nn.Module):
    """input_ids, attention_mask (n, t) -> mix (n, t, 5) -> mean over the real tokens -> fc -> .logits (n, 3)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.mix = nn.Linear(5, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.mix(self.embed(input_ids)).tanh()
        weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pooled = (hidden * weight.unsqueeze(2)).sum(1) / weight.sum(1, keepdim=True)
        return Output(self.fc(pooled))


class Maps(nn.Module):
    """x (n, 2, 4, 4) -> conv (n, 5, 4, 4) -> head (n, 3, 4, 4) -> mean (n, 3)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x):
        return self.head(self.act(self.conv(x))).mean((2, 3))


class ByKeyword(nn.Module):
    """Calls its fc with keyword arguments only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(input=x)


def _inside(model, backend):
    model.fc = torch.compile(model.fc, backend=backend)
    model.body[0] = nn.DataParallel(model.body[0])
    return model


def _in_place(model, backend):
    model.compile(backend=backend)
    return model


def _forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


COMPILED = {
    "compiled": lambda model, backend="eager": torch.compile(model, backend=backend),
    "compiled inside": lambda model, backend="eager": _inside(model, backend),
    "compiled in place": lambda model, backend="eager": _in_place(model, backend),
    "compiled forward": lambda model, backend="eager": _forward(model, backend),
}
WRAPPED = {
    **COMPILED,
    "data parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}
"""Ways in which an Mlp comes to be compiled or wrapped."""


def build(kind, *args, **kwargs):
    """kind(...) with the same random weights in every test, and statistics that are not those of a fresh model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def random_projection(dim=5, rank=2, site=None, seed=0):
    """A projection onto a random subspace about a random centre."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, rank, dtype=torch.float64, generator=generator))
    return Projection(basis, torch.randn(dim, dtype=torch.float64, generator=generator), site=site)


def _values(tensor):
    return None if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedParameter) else tensor.tolist()


def everything(model):
    """All that a call that fails must leave as it was: tensors bit for bit, modes, hooks."""
    tensors = {name: (str(t.dtype), _values(t)) for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [(list(module._forward_pre_hooks), list(module._forward_hooks)) for module in model.modules()]
    return tensors, modes, hooks


class Classes(nn.Module):
    """A classifier of the rows that `rows_of` makes, without training: (n, 8) -> body (n, 8) -> fc (n, 3)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 3)
        with torch.no_grad():
            self.body.weight.copy_(torch.linalg.qr(torch.randn(8, 8))[0])
            self.body.bias.zero_()
            self.fc.weight.copy_(torch.eye(3, 8) @ self.body.weight.T)
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.body(x))


def rows_of(classes, n=40, seed=0):
    """(x, y) batches, n rows of each class, around its own axis."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor(classes).repeat(n)
    x = 8 * torch.eye(8)[y] + torch.randn(len(y), 8, generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))
