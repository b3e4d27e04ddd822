"""The classifier that is made to forget: a multilayer perceptron with a linear `head`, trained to memorise."""

import torch
from torch import nn
from torch.nn import functional

HIDDEN, SITE = 512, 256
EPOCHS, BATCH, RATE = 11, 256, 2e-3


class Classifier(nn.Module):
    """`body` makes the features (the site), `head` the logits."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, SITE), nn.ReLU())
        self.head = nn.Linear(SITE, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of inputs (n, width)."""
        return self.head(self.body(x))


def train(x: torch.Tensor, y: torch.Tensor, classes: int, seed: int) -> Classifier:
    """A classifier trained from scratch on the rows given; `seed` sets its start and the order of the batches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(x.shape[1], classes)
        scale = x.std()  # unit-norm embeddings have tiny entries
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        batches = -(-len(x) // BATCH)  # of equal size: a last batch of a few rows would undo what the others learnt
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * batches)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).tensor_split(batches):
                optimizer.zero_grad()
                functional.cross_entropy(model(x[rows] / scale), y[rows]).backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        next(model.parameters()).div_(scale)  # the first weight takes the scale in: callers need not know it
    return model.eval()
