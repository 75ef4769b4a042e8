"""A file of conditions: written, read, checked against the network that is to take it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tiny_models import CONFIG
from toy_family import ToyVideo, prompts

import qdit_jax as qdit
from qdit_jax.models import DiT
from qdit_jax.sampling import rows_of

TEXTS = ("a cat", "a dog", "")
MODEL = ToyVideo()


def null():
    one = prompts(1)
    return {f"null_{name}": entry for name, entry in one.items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.npz"


def test_what_is_written_is_read(file):
    qdit.write_conditions(file, {**prompts(), **null()}, TEXTS)
    found = qdit.read_conditions(file, MODEL)
    assert found.prompts == TEXTS
    assert len(found) == 3
    for name, entry in {**prompts(), **null()}.items():
        np.testing.assert_array_equal(found.condition[name], entry)
        assert found.condition[name].dtype == entry.dtype
    chosen = qdit.read_conditions(file, MODEL, rows=[2, 0])
    assert chosen.prompts == ("", "a cat")
    np.testing.assert_array_equal(chosen.condition["text"], prompts()["text"][[2, 0]])
    assert chosen.condition["null_text"].shape[0] == 1


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_embeddings_in_16_bits_are_float32_when_rows_are_taken(file, dtype):
    given = prompts()
    np.savez(file, text=given["text"].astype(dtype), text_mask=given["text_mask"].astype(np.int64))
    found = qdit.read_conditions(file, MODEL).condition
    assert found["text"].dtype == dtype
    assert found["text_mask"].dtype == bool
    taken = rows_of(found, np.array([4]))["text"]
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken[0], given["text"][1].astype(dtype).astype(np.float32))


def changed(**entries):
    found = {**prompts(), **entries}
    return {name: entry for name, entry in found.items() if entry is not None}


TEXT, MASK = prompts()["text"], prompts()["text_mask"]
NAN = np.where(np.arange(12) == 3, np.nan, TEXT)
EMPTY = MASK & (np.arange(3) != 1)[:, None]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (changed(txt=TEXT), "the entry 'txt' is not known; this network takes text, text_mask"),
        (changed(text=None), "the entry 'text' is missing"),
        (changed(text_mask=None), "the entry 'text_mask' is missing .True where"),
        (changed(text=TEXT[..., :8]), "text is 8 wide and the network takes 12"),
        (changed(text=TEXT[:, 0]), r"text has shape \(3, 12\); give embeddings of the prompt"),
        (changed(text=NAN), "text holds NaN or infinity"),
        (changed(text=np.ones((3, 6, 12), int)), "text has dtype int64, as token numbers"),
        (changed(text=TEXT.astype("U4")), "text has dtype <U4; give numbers"),
        (changed(text_mask=MASK * 2), "text_mask holds other values than 0 and 1"),
        (changed(text_mask=EMPTY), "text_mask keeps no token of row 1"),
        (changed(text_mask=MASK[:, :4]), "text_mask has 4 tokens and text has 6"),
        (changed(text_mask=MASK[:2]), "text_mask has 2 rows and text has 3"),
        (changed(fps=np.ones(3)), "give text and text_mask"),
        (changed(null_text=TEXT[:1]), "null_text_mask is missing beside null_text"),
        (changed(**{**null(), "null_text": TEXT[:2]}), "null_text has 2 rows and text has 3"),
        (changed(**{**null(), "null_text": TEXT[:1, :4]}), r"rows of shape \(4, 12\) and text"),
        (changed(prompts=np.array(["one"])), "give 3 texts"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(file, entries, message):
    np.savez(file, **entries)
    with pytest.raises(qdit.UserError, match=message) as caught:
        qdit.read_conditions(file, MODEL)
    assert str(caught.value).startswith(str(file))


def test_a_file_that_is_none_is_refused(file):
    with pytest.raises(qdit.UserError, match="does not exist; write it with `qdit embed-text`"):
        qdit.read_conditions(file, MODEL)
    file.write_text("text")
    with pytest.raises(qdit.UserError, match="holds no conditions"):
        qdit.read_conditions(file, MODEL)
    qdit.write_conditions(file.with_name("good.npz"), prompts())
    with pytest.raises(qdit.UserError, match="row 3 is out of range; there are prompts 0 to 2"):
        qdit.read_conditions(file.with_name("good.npz"), MODEL, rows=[0, 3])
    with pytest.raises(qdit.UserError, match="this network takes class labels, not embeddings"):
        qdit.read_conditions(file.with_name("good.npz"), DiT(**CONFIG))
    with pytest.raises(ValueError, match="the entry 'words' is not known"):
        qdit.write_conditions(file.with_name("bad.npz"), {"words": TEXT})
