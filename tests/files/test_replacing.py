"""What may be replaced, and what never is: every test plants something and finds it again."""

from __future__ import annotations

import errno
import json
import os
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from qdit_jax import files
from qdit_jax.errors import UserError
from qdit_jax.files import as_path, check_free, renewed_folder, replaced_file, replaced_folder

MODEL = {"format_version": 1, "family": "dit", "config": {}, "params": {}}


def make_checkpoint(folder, **more):
    (folder / "params").mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps({**MODEL, **more}))
    return folder


def make_search(folder):
    (folder / "state/1/settings").mkdir(parents=True)
    found = {"method": "m", "budget": "b", "assignment": []}
    (folder / "history.json").write_text(json.dumps(found))
    return folder


def make_schedule(folder):
    (folder / "steps/3/settings").mkdir(parents=True)
    (folder / "history.json").write_text(json.dumps({"schedule": []}))
    return folder


def make_bench(folder):
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps({"settings": {}, "entries": {}}))
    return folder


def make_vbench(folder):
    folder.mkdir()
    (folder / "vbench.json").write_text(json.dumps({"vbench": "custom_input", "clips": []}))
    return folder


def make_evaluation(folder):
    (folder / "shards").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"num_samples": 4, "seed": 0}))
    return folder


def make_demonstration(folder):
    folder.mkdir()
    (folder / "demo.json").write_text(json.dumps({"demonstration": {}}))
    return folder


def make_export(path):
    save_file({"a": np.zeros(2)}, path, metadata={"qdit_jax": "{}"})
    return path


def make_weights(path):
    save_file({"a": np.zeros(2)}, path, metadata={"qdit_jax_weights": "1"})
    return path


def make_foreign_safetensors(path):
    save_file({"a": np.zeros(2)}, path, metadata={"format": "pt"})
    return path


def make_statistics(path):
    with open(path, "wb") as file:
        np.savez(file, **{"timesteps": np.zeros(2), "low/a": np.zeros(2)})
    return path


def make_inputs(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros(2), timestep=np.zeros(2), sample=np.zeros(2), label=np.zeros(2))
    return path


def make_conditions(path):
    with open(path, "wb") as file:
        np.savez(file, text=np.zeros((1, 2, 3)))
    return path


def make_samples(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = files.GENERATOR.encode()
        archive.writestr("arr_0.npy", b"0" * 9000)
    return path


def make_figures(path):
    path.write_text(json.dumps({"settings": {}, "models": []}))
    return path


def make_report(path):
    path.write_text(f'<meta name="generator" content="{files.GENERATOR}">' + "." * 9000)
    return path


def make_picture(path):
    path.write_bytes(b"\x89PNG" + files.GENERATOR.encode() + b"." * 9000)
    return path


def make_notes(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    return path


def make_text(path):
    path.write_text("mine")
    return path


def make_foreign_json(path):
    path.mkdir()
    (path / "model.json").write_text(json.dumps({"layers": 3}))
    (path / "run.json").write_text(json.dumps({"id": 3}))
    (path / "history.json").write_text(json.dumps([3]))
    (path / "state").mkdir()
    (path / "state/photo.jpg").write_text("mine")
    return path


MAKERS = {
    "checkpoint": make_checkpoint,
    "search": make_search,
    "schedule": make_schedule,
    "bench": make_bench,
    "vbench": make_vbench,
    "evaluation": make_evaluation,
    "demonstration": make_demonstration,
    "export": make_export,
    "weights": make_weights,
    "statistics": make_statistics,
    "inputs": make_inputs,
    "conditions": make_conditions,
    "samples": make_samples,
    "picture": make_picture,
    "report": make_report,
    "figures": make_figures,
}
STRANGERS = (make_notes, make_text, make_foreign_json, make_foreign_safetensors)
# Both are known by the same mark; their suffixes tell them apart on the command line.
ALIKE = {"samples", "picture", "report"}


def test_every_kind_has_its_maker():
    assert set(MAKERS) == set(files.KINDS)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("there", MAKERS)
def test_a_thing_gives_way_to_its_own_kind_alone(tmp_path, kind, there):
    path = MAKERS[there](tmp_path / "out")
    with pytest.raises(UserError, match=r"exists already.*--force"):
        check_free(path, False, kind)
    if kind == there or {kind, there} <= ALIKE:
        check_free(path, True, kind)
        return
    with pytest.raises(UserError, match="only such is replaced"):
        check_free(path, True, kind)


@pytest.mark.parametrize(("kind", "state"), [("search", "state"), ("schedule", "steps")])
def test_what_an_unfinished_one_keeps_is_its_own(tmp_path, kind, state):
    out = tmp_path / "out"
    (out / state / "2/settings").mkdir(parents=True)
    (out / state / "3.orbax-checkpoint-tmp-1").mkdir()
    check_free(out, True, kind)
    for other in {"search", "schedule"} - {kind}:
        with pytest.raises(UserError, match="only such is replaced"):
            check_free(out, True, other)
    (out / state / "fits/1/settings").mkdir(parents=True)
    if kind == "search":
        check_free(out, True, kind)  # fits of a search with transforms
    (out / state / "fits/notes").mkdir()
    with pytest.raises(UserError, match="only such is replaced"):
        check_free(out, True, kind)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("maker", STRANGERS)
def test_a_stranger_is_never_replaced(tmp_path, kind, maker):
    path = maker(tmp_path / "out")
    with pytest.raises(UserError, match="only such is replaced"):
        check_free(path, True, kind)
    write = replaced_folder if files.KINDS[kind].entries else replaced_file
    given = (path, True, kind) if files.KINDS[kind].entries else (path, kind)
    with pytest.raises(UserError), write(*given):
        pytest.fail("writing began")
    assert maker(tmp_path / "again")
    assert contents(path) == contents(tmp_path / "again")


def contents(path):
    if path.is_file():
        return path.read_bytes()
    return {str(p.relative_to(path)): p.is_file() and p.read_bytes() for p in path.rglob("*")}


@pytest.mark.parametrize("kind", ["checkpoint", "search", "evaluation"])
def test_a_strangers_file_inside_is_not_lost(tmp_path, kind):
    path = MAKERS[kind](tmp_path / "out")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, which is not part"):
        check_free(path, True, kind)
    (path / "notes.txt").unlink()
    check_free(path, True, kind)


def test_a_strangers_file_in_the_autoencoder_is_not_lost(tmp_path):
    path = make_checkpoint(tmp_path / "out")
    make_checkpoint(path / "vae")
    check_free(path, True)
    (path / "vae/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds vae/notes.txt"):
        check_free(path, True)


def test_a_damaged_checkpoint_is_not_replaced_but_one_of_another_version_is(tmp_path):
    path = make_checkpoint(tmp_path / "out", format_version=99)
    check_free(path, True)
    (path / "model.json").write_text('{"format_ver')
    with pytest.raises(UserError, match="is not a checkpoint"):
        check_free(path, True)


@pytest.mark.parametrize("kind", [k for k in MAKERS if files.KINDS[k].entries])
def test_an_empty_folder_is_free(tmp_path, kind):
    check_free(tmp_path, False, kind)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("out", "relation"),
    [
        ("box/a", "is"),
        ("box/../box/a", "is"),
        ("link", "is"),
        ("box", "contains"),
        (".", "contains"),
        ("boxes", "contains"),
        ("box/a/out", "lies inside"),
        ("box/a/params/x/y", "lies inside"),
        ("link/out", "lies inside"),
        ("box/a/../a/out.npz", "lies inside"),
    ],
)
def test_no_input_is_touched_on_any_road(tmp_path, monkeypatch, overwrite, out, relation):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "box/a")
    (tmp_path / "link").symlink_to("box/a")
    (tmp_path / "boxes").symlink_to("box")
    for given in ("box/a", tmp_path / "box/a", "link"):
        with pytest.raises(UserError, match=f"{relation} the input"):
            check_free(out, overwrite, "checkpoint", [given, None])
    check_free("box/b", overwrite, "checkpoint", ["box/a"])


def test_a_hard_link_is_the_file(tmp_path):
    make_export(tmp_path / "a.safetensors")
    os.link(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="is the input"):
        check_free(tmp_path / "b.safetensors", True, "export", [tmp_path / "a.safetensors"])


def test_a_link_stays_a_link_to_what_is_new(tmp_path):
    make_checkpoint(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with replaced_folder(tmp_path / "link", True) as folder:
        make_checkpoint(folder, config={"new": 1})
    make_figures(tmp_path / "real.json")
    (tmp_path / "link.json").symlink_to("real.json")
    with replaced_file(tmp_path / "link.json", "figures") as file:
        file.write_text('{"settings": 1, "models": 2}')
    (tmp_path / "dangling").symlink_to("made")
    with replaced_folder(tmp_path / "dangling") as folder:
        make_checkpoint(folder)
    assert all((tmp_path / name).is_symlink() for name in ("link", "link.json", "dangling"))
    assert json.loads((tmp_path / "real/model.json").read_text())["config"] == {"new": 1}
    assert json.loads((tmp_path / "real.json").read_text())["settings"] == 1
    assert (tmp_path / "made/model.json").is_file()
    names = ["dangling", "link", "link.json", "made", "real", "real.json"]
    assert sorted(os.listdir(tmp_path)) == names


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    out = make_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match="is not a checkpoint"), replaced_folder(out, True):  # noqa: PT012
        (out / "model.json").unlink()
        (out / "notes.txt").write_text("mine")
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="exists already"), replaced_folder(tmp_path / "new"):
        make_notes(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_a_long_computation_replaces_at_the_end(tmp_path):
    out = make_search(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), renewed_folder(out, True, "search") as folder:  # noqa: PT012
        assert folder != out
        make_search(folder)
        raise KeyboardInterrupt
    assert contents(out)["history.json"]  # what was there is there
    with renewed_folder(out, True, "search") as folder:
        assert (folder / "state/1").is_dir()  # the second try goes on from the first
        (folder / "recipe.json").write_text("{}")
    assert (out / "recipe.json").is_file()
    assert os.listdir(tmp_path) == ["out"]
    with renewed_folder(tmp_path / "new", True, "search") as folder:
        assert folder == tmp_path / "new"
        assert not folder.exists()
    assert os.listdir(tmp_path) == ["out"]
    with (
        pytest.raises(UserError, match="is the input"),
        renewed_folder(out, False, "search", [out]),
    ):
        pytest.fail("it began")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device; free some, or choose another disk"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded; free some"),
        (PermissionError(errno.EACCES, "x"), "Permission denied"),
        (ValueError("RESOURCE_EXHAUSTED: a\nb [os_error_code='28']"), "No space left on device;"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_a_disk_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, error, told):
    for write in (replaced_file, replaced_folder):
        with pytest.raises(UserError) as caught, write(tmp_path / "out") as temporary:  # noqa: PT012
            half = temporary if write is replaced_file else temporary / "half"
            half.write_text("half")
            raise error
        assert str(caught.value).startswith(f"{tmp_path / 'out'} cannot be written: {told}")
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("no disk"), BrokenPipeError(), KeyError("a")])
def test_other_failures_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)), replaced_file(tmp_path / "out"):
        raise error
    assert os.listdir(tmp_path) == []


def test_room_is_measured_on_the_disk_of_the_target(tmp_path, monkeypatch):
    asked = []

    def usage(folder):
        asked.append(folder)
        return type("Usage", (), {"free": 99})

    monkeypatch.setattr("shutil.disk_usage", usage)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/not/there")
    files.check_space(tmp_path / "link", 99)
    with pytest.raises(UserError, match="would take 100 bytes, but its disk has 99 left"):
        files.check_space(tmp_path / "link", 100)
    assert set(asked) == {tmp_path / "disk"}


def test_urls_are_kept_and_unknown_ones_refused():
    assert as_path("a/b").parts == ("a", "b")
    assert as_path("c:/b").parts[-1] == "b"
    with pytest.raises(UserError, match=r"https:// is not supported; use a local path, or gs://"):
        as_path("https://host/ckpt")
    with pytest.raises(UserError, match=r"gs://bucket/ckpt needs the package gcsfs"):
        as_path("gs://bucket/ckpt")
