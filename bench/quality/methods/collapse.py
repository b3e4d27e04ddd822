"""Partial Model Collapse: learn the model's own answers that differ from its first (Scholten et al. 2025, 2507.04219).

Made for language models, whose answers are many tokens long; here an answer is one token, the class. The authors'
score, how much of the first answer is found again in a new one, is then 1 or 0. Their nucleus sampling is left out:
where a model knows its rows by heart, the nucleus is one class.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.methods.method import Method
from bench.quality.problem import Problem, adam, step

ANSWERS = 5
"""Drawn for each forget row whenever it comes up; the authors draw 5 (Phi) and 20 (Llama)."""


def run(problem: Problem, *, epochs: int, rate: float, temperature: float, weight: float) -> nn.Module:
    """Minimise CE(forget, own answer) + weight * CE(retain), `epochs` passes over the forget rows.

    A row's label is never looked at, only what the original said of it.

    rate: step size, as a multiple of the training's. temperature: of the softmax that answers are drawn from.
    """
    model = problem.copy()
    optimizer = adam(model, rate * problem.rate)
    rows = problem.forget
    with torch.no_grad():
        first = problem.original(rows.x).argmax(1)
    problem.touched["forget"] += len(rows)
    kept = first.clone()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=problem.generator)
        for chosen, retain in zip(order.split(problem.batch), problem.endless("retain"), strict=False):
            problem.touched["forget"] += len(chosen)
            forget = rows[chosen].x
            with torch.no_grad():
                chances = (model.eval()(forget) / temperature).softmax(1)
            kept[chosen] = another(chances, first[chosen], kept[chosen], problem.generator)
            model.train()
            both = model(torch.cat([forget, retain.x]))  # one batch, for batch norm
            mine, others = both.split([len(chosen), len(retain)])
            loss = functional.cross_entropy(mine, kept[chosen])
            step(optimizer, loss + weight * functional.cross_entropy(others, retain.y))
    return model.eval()


def another(chances: Tensor, first: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """(n,): what was kept, once it is not the first answer; else one of those drawn that is not, if there is any.

    Args:
        chances: (n, classes) of the answers drawn.
        first, kept: (n,) of the original, and the last ones picked.
    """
    drawn = torch.multinomial(chances, ANSWERS, replacement=True, generator=generator)
    picked = drawn.gather(1, (drawn != first[:, None]).int().argmax(1, keepdim=True)).squeeze(1)
    return picked.where(kept == first, kept)


METHOD = Method(
    run,
    "Scholten et al. 2025, arXiv 2507.04219",
    search={
        "epochs": (40, 10, 20),
        "rate": (0.1, 0.03, 0.3),
        "temperature": (1.25, 3.0, 10.0),
        "weight": (1.5, 5.0),
    },
    claim="Forgets a class without its labels (below 10 %) and keeps more of the others than gradient ascent.",
    holds=lambda rows: (
        rows["collapse"]["forget_test"] < 10
        and rows["collapse"]["retain_test"] > rows["gradient ascent"]["retain_test"]
    ),
)
