"""Where the time of a whole unlearning request goes, on the demo's network and digits: medians in milliseconds.

python -m bench.stages
"""

import copy
import statistics

import torch

from loft_fast import unlearn
from loft_fast.clock import Clock
from loft_fast.demo.cache import default_folder, trained
from loft_fast.demo.digits import SITE, batches, load_digits

ROUNDS = 7
FORGET = 3


def main() -> None:
    data = load_digits()
    model = trained(data, (), 0, default_folder(), print).model
    parts = data.split([FORGET])
    retain, forget = batches(*parts["retain_train"]), batches(*parts["forget_train"])
    runs = [request(model, retain, forget) for _ in range(ROUNDS + 1)][1:]  # the first warms up
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    whole = sum(medians.values())
    for name, seconds in medians.items():
        print(f"{name:10}{1000 * seconds:8.1f} ms{100 * seconds / whole:7.1f} %")


def request(model, retain, forget):
    """Seconds by stage; the backbone's are those of a pass without us, and taken off the moments'."""
    clock = Clock()
    with torch.inference_mode():
        for x, _ in retain + forget:
            model(x)
    clock.lap("backbone")
    stages = unlearn(copy.deepcopy(model), retain, forget, SITE, fold=True, progress=False).seconds
    return clock.seconds | stages | {"moments": stages["moments"] - clock.seconds["backbone"]}


if __name__ == "__main__":
    main()
