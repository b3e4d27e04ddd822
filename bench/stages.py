"""Where the time of a whole unlearning request goes, on the demo's network and digits: medians in milliseconds.

python -m bench.stages
"""

import copy
import statistics

import torch

from loft_fast import GroupedMoments, unlearn
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
    """Seconds by stage. Backbone and moments are timed apart, as a pass over the data does both at once."""
    clock = Clock()
    with torch.inference_mode():
        features = [[(model.features(x), y) for x, y in batches] for batches in (retain, forget)]
    clock.lap("backbone")
    for part in features:
        moments = GroupedMoments(part[0][0].shape[1])
        for x, y in part:
            moments.update(x, y)
        moments.total()  # nothing waits
    clock.lap("moments")
    stages = unlearn(copy.deepcopy(model), retain, forget, SITE, fold=True, progress=False).seconds
    return clock.seconds | {name: stages[name] for name in ("solve", "fold")}


if __name__ == "__main__":
    main()
