"""Captions of the packaged text model and their embeddings."""

from __future__ import annotations

import numpy as np
import pytest

from qdit_jax.demo import all_captions, caption, embed_captions, mixed_captions
from qdit_jax.demo.captions import ROWS, WORDS, word_vectors


def test_a_caption_reads_as_english():
    assert caption(7) == "a large seven"
    assert caption(3, "small", "left", "inverted") == "a small three, left, inverted"


def test_every_caption_is_listed_once_and_mixed_ones_vary_early():
    captions = all_captions()
    assert len(captions) == len(set(captions)) == 180
    mixed = mixed_captions()
    assert sorted(mixed) == sorted(captions)
    assert len({text.replace(",", "").split()[2] for text in mixed[:10]}) == 10
    for word in ("large", "small", "dim", "inverted"):
        assert any(word in text for text in mixed[:10])


def test_every_word_has_its_own_vector():
    table = word_vectors()
    assert tuple(table) == WORDS
    vectors = np.stack(list(table.values()))
    assert vectors.dtype == np.float32
    assert len(np.unique(vectors, axis=0)) == len(WORDS)


def test_rows_are_the_words_in_their_order_and_the_rest_is_padding():
    found = embed_captions(["a small one, top", "a large two, dim"])
    table = word_vectors()
    assert found["text"].shape == (2, ROWS, 32)
    assert found["text_mask"].tolist() == [[True] * 4 + [False], [True] * 4 + [False]]
    np.testing.assert_array_equal(found["text"][0, 3], table["top"])
    np.testing.assert_array_equal(found["text"][1, 1], table["large"])
    assert not found["text"][:, 4].any()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a purple seven"], "unknown words \\['purple'\\]"),
        (["a a a a a a"], "has 6 words"),
        ([" , "], "has 0 words"),
        ([], "no caption"),
    ],
)
def test_what_has_no_embedding_is_refused(captions, message):
    with pytest.raises(ValueError, match=message):
        embed_captions(captions)
