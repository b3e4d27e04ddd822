"""Whether a model is the one that moments came from."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from loft_fast.sites import find_site, unwrap


def fingerprint(model: nn.Module, site: str | None = None, whole: bool = True) -> str:
    """SHA-256, in hexadecimal, of all parameters and buffers. Wrappers and devices do not matter.

    Args:
        whole: False leaves out the layer that reads the features at `site`, which is where projections are folded into.

    Raises:
        SiteError: no such site.
    """
    place = find_site(model, site)
    reader = f"{place.name}." if place.side == "input" and not whole else None
    found = hashlib.sha256()
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in unwrap(model).state_dict().items()}
    for name, tensor in sorted(state.items()):
        if reader is not None and name.startswith(reader):
            continue
        if not isinstance(tensor, torch.Tensor):  # what a module adds by get_extra_state
            continue
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
