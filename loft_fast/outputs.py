"""Outputs of classes that are gone: a model retrained without them never says them, and its head does not know them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loft_fast.errors import InputError
from loft_fast.heads import closed_before, with_closed
from loft_fast.sites import find_site
from loft_fast.state import lasting
from loft_fast.surgery import foldable, rewrite


@lasting
def close_outputs(model: nn.Module, outputs: Iterable[int], site: str | None = None) -> None:
    """Make the layer at `site` never choose these outputs, and keep nothing in it that tells what they stood for.

    Their logit becomes the mean of the others less 20. It is for classes of which nothing is retained, after `fold`:
    a projection takes out of the features what tells the class, this the direction that the head looks for it in.
    By itself it only hides the class; whoever reads the features still finds it. Outputs that were closed before are
    closed anew with them: each was a mean of rows that had these among them.

    Args:
        model: a classifier, changed in place.
        outputs: indices of the classes; in any order, none to leave the model as it is.
        site: the input of the Linear or 1x1 convolution that makes the logits, as for `fold`; default: the last Linear.

    Raises:
        FoldError: the layer cannot be rewritten, as for `fold`.
        SiteError, InputError: no such site, an index out of range, or no output would be left.
    """
    asked = list(outputs) if isinstance(outputs, Iterable) else [outputs]
    if not asked:
        return
    place = find_site(model, site)
    weight = foldable(model, place)
    if place.side != "input":
        raise InputError(f"site: got {str(place)!r}, expected the input of the layer that makes the logits")
    wrong = [one for one in asked if type(one) is not int or not 0 <= one < len(weight)]
    if wrong:
        raise InputError(f"outputs: got {wrong[0]!r}, expected indices from 0 to {len(weight) - 1}")
    bias = place.plain.bias
    rows = weight.detach().double().flatten(1)
    offsets = bias.detach().double() if isinstance(bias, Tensor) else rows.new_zeros(len(rows))
    closed = sorted({*asked, *closed_before(rows, offsets, torch.finfo(weight.dtype).eps)})
    if len(closed) == len(weight):
        raise InputError(f"outputs: got all {len(weight)}, expected at least one to stay")
    rewrite(place.plain, *with_closed(rows, offsets, closed))
