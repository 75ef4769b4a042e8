"""Clips are laid out as VBench reads them, and its results are read back with the worst of each dimension.

VBench itself is not needed: the files have the names and the form that its code reads and writes.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest

from qdit_jax.cli import main
from qdit_jax.errors import UserError
from qdit_jax.evaluation import (
    check_vbench,
    export_vbench,
    read_prompts,
    read_vbench_results,
    vbench_summary,
)

FILMS = pytest.mark.skipif(
    find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None,
    reason="films need the extra [video]",
)
INFO = [
    {"prompt_en": "a red car", "dimension": ["color"], "auxiliary_info": {"color": "red"}},
    {"prompt_en": "a person is waving", "dimension": ["human_action", "subject_consistency"]},
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
]


@pytest.fixture
def info(tmp_path):
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(INFO))
    return tmp_path / "VBench_full_info.json"


def samples(path, texts, shape=(5, 16, 17, 3)):
    """Writes clips as `qdit sample` does, each of its own brightness."""
    clips = np.zeros((len(texts), *shape), np.uint8)
    clips += (10 + 5 * np.arange(len(texts), dtype=np.uint8))[:, None, None, None, None]
    np.savez(path, arr_0=clips, prompts=np.array(texts))
    return path


def as_vbench_finds(folder, prompts, dimensions):
    """Returns the clips that VBench's standard mode finds: the suffix is that of the first file."""
    names = sorted(p.name for p in folder.iterdir())
    suffix = "." + names[0].rpartition(".")[2]
    wanted = [p["prompt_en"] for p in prompts if set(p["dimension"]) & set(dimensions)]
    return [f"{text}-{i}{suffix}" for text in wanted for i in range(5)], names


@FILMS
def test_standard_names_are_those_that_vbench_looks_for(info, tmp_path):
    texts = ["a red car", "a person is waving"] * 5  # as prompts are cycled over samples
    file = samples(tmp_path / "clips.npz", texts)
    dimensions = ["color", "human_action", "subject_consistency"]
    export_vbench(file, tmp_path / "out", prompts=read_prompts(info), dimensions=dimensions, fps=8)
    wanted, names = as_vbench_finds(tmp_path / "out/videos", INFO, dimensions)
    assert set(wanted) == set(names)
    assert check_vbench(tmp_path / "out") == []
    import imageio.v2 as imageio

    reader = imageio.get_reader(tmp_path / "out/videos/a person is waving-2.mp4", format="FFMPEG")
    frames = np.stack([np.asarray(frame) for frame in reader])
    assert frames.shape == (5, 16, 16, 3)
    assert abs(frames.mean() - (10 + 5 * 5)) < 4  # the third clip of the second prompt: number 5
    assert reader.get_meta_data()["fps"] == 8


@FILMS
@pytest.mark.parametrize(
    ("texts", "dimensions", "message"),
    [
        (["a red car"] * 4, ["color"], "1 prompts have fewer clips .* 'a red car': 4 of 5"),
        (["a red car"] * 6, ["color"], "1 prompts have more clips .* 6 of 5; sample 5 clips"),
        (["a blue car"] * 5, ["color"], "'a blue car' is not one of those that the dimensions"),
        (["a red car"] * 5, ["colour"], "dimension colour is not known; use subject_consistency,"),
        (["In a still frame, a stop sign"] * 5, ["temporal_flickering"], "5 of 25"),
    ],
)
def test_clips_that_are_not_those_needed_are_refused(info, tmp_path, texts, dimensions, message):
    file = samples(tmp_path / "clips.npz", texts)
    with pytest.raises(UserError, match=message):
        export_vbench(file, tmp_path / "out", prompts=read_prompts(info), dimensions=dimensions)
    assert not (tmp_path / "out").exists()


@FILMS
def test_custom_input_has_a_prompt_for_every_file(tmp_path, capsys):
    file = samples(tmp_path / "clips.npz", ["a cat/dog", "a cat/dog", "rain"])
    out = tmp_path / "out"
    assert main(["export-vbench", str(file), str(out), "--custom", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_clips"] == 3
    assert "--mode custom_input --prompt_file" in found["commands"][0]
    by_name = json.loads((out / "prompts.json").read_text())
    assert {p.name for p in (out / "videos").iterdir()} == set(by_name)
    assert list(by_name.values()) == ["a cat/dog", "a cat/dog", "rain"]
    assert main(["export-vbench", "--check", str(out)]) == 0
    wrong = ["export-vbench", str(file), str(tmp_path / "b"), "--custom", "--dimensions", "color"]
    assert main(wrong) == 2
    assert "color is measured on VBench's own prompts only" in capsys.readouterr().err


@FILMS
def test_a_folder_is_checked_clip_by_clip(tmp_path, capsys):
    file = samples(tmp_path / "clips.npz", ["a", "b", "c"])
    other = samples(tmp_path / "longer.npz", ["a"], shape=(7, 24, 16, 3))
    export_vbench(file, tmp_path / "out", dimensions=["motion_smoothness"])
    export_vbench(other, tmp_path / "other", dimensions=["motion_smoothness"], fps=16)
    videos = tmp_path / "out/videos"
    (videos / "00000.mp4").write_bytes((tmp_path / "other/videos/00000.mp4").read_bytes())
    (videos / "00001.mp4").unlink()
    (videos / "00002.mp4").write_bytes(b"no film")
    (videos / ".DS_Store").write_text("")
    found = check_vbench(tmp_path / "out")
    assert "missing: 00001.mp4" in found
    assert "not a clip of this export: .DS_Store" in found
    for text in ("7 frames, not 5", "16 frames per second, not 8", "24x16 pixels, not 16x16"):
        assert f"00000.mp4: {text}" in found
    assert any(text.startswith("00002.mp4: cannot be read") for text in found)
    assert main(["export-vbench", "--check", str(tmp_path / "out")]) == 2
    assert "missing: 00001.mp4" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"holds no vbench\.json"):
        check_vbench(tmp_path)


@FILMS
def test_prompts_are_needed_and_images_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.full((2, 3, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UserError, match="2 clips and 0 prompts; sample with --embeds"):
        export_vbench(tmp_path / "a.npz", tmp_path / "out", dimensions=["motion_smoothness"])
    np.savez(tmp_path / "b.npz", np.full((2, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UserError, match="holds images; VBench measures videos"):
        export_vbench(tmp_path / "b.npz", tmp_path / "out", dimensions=["motion_smoothness"])
    with pytest.raises(UserError, match="is not VBench's list of prompts"):
        read_prompts(tmp_path / "a.npz")


def results(path, **dimensions):
    """Writes a result in the form of VBench's `*_eval_results.json`."""
    path.write_text(json.dumps(dimensions))
    return path


def clips(*values):
    return [{"video_path": f"/v/{i}.mp4", "video_results": v} for i, v in enumerate(values)]


def test_every_dimension_has_its_worst_clip(tmp_path):
    file = results(
        tmp_path / "a_eval_results.json",
        subject_consistency=[0.8, clips(0.95, 0.5, 0.95)],
        dynamic_degree=[2 / 3, clips(True, False, True)],
        imaging_quality=[0.6, clips(70.0, 65.0, 45.0)],  # percents per clip, as VBench writes them
        scene=[0.4, [{"video_path": "/v/0.mp4", "frame_results": [1]}]],
    )
    found = read_vbench_results(file)
    assert found["subject_consistency"].minimum == 0.5
    assert found["subject_consistency"].worst == "1.mp4"
    assert found["dynamic_degree"].minimum == 0
    assert found["imaging_quality"].minimum == pytest.approx(0.45)
    assert (found["scene"].minimum, found["scene"].num_clips) == (None, 0)
    summary = vbench_summary(found)
    assert list(summary["dimensions"]) == [
        *("subject_consistency", "dynamic_degree", "imaging_quality", "scene")
    ]
    assert summary["lowest"] == {"dimension": "scene", "score": 0.4}


def test_the_verb_compares_results_and_writes_a_page(tmp_path, capsys):
    """The mean falls by .04 while one dimension falls by .4: the table and the sentence say so."""
    full = results(
        tmp_path / "full.json",
        subject_consistency=[0.93, clips(0.9, 0.96)],
        motion_smoothness=[0.9, clips(0.9, 0.9)],
    )
    one = results(tmp_path / "one.json", subject_consistency=[0.53, clips(0.2, 0.86)])
    two = results(tmp_path / "two.json", motion_smoothness=[0.98, clips(0.98, 0.98)])
    page = tmp_path / "vbench.html"
    command = ["export-vbench", "--results", str(one), str(two), "--against", str(full)]
    assert main([*command, "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "subject_consistency changed most for the worse, -0.4000" in printed
    row = next(line for line in printed.splitlines() if line.startswith("subject_consistency"))
    assert row.split() == [
        "subject_consistency",
        "0.5300",
        "0.2000",
        "0.mp4",
        "2",
        "0.9300",
        "-0.4000",
    ]
    assert "worst clip" in page.read_text()
    assert main([*command, "--page", str(page)]) == 2
    assert "--force" in capsys.readouterr().err
    twice = ["export-vbench", "--results", str(one), str(one)]
    assert main(twice) == 2
    assert "holds subject_consistency once more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"scene": [NaN, []]}', "no json", '{"scene": {}}']
)
def test_other_files_are_no_results(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match="of VBench"):
        read_vbench_results(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give SAMPLES OUT, or --check OUT, or --results FILE"),
        (["a.npz"], "give OUT, the folder to write"),
        (["a.npz", "out", "--page", "p.html"], "it goes with --results"),
        (["--check", "out", "--fps", "8"], "--fps 8.0 has no effect: it goes with SAMPLES OUT"),
        (["a.npz", "out", "--custom", "--info", "i.json"], "--custom has prompts of your own"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export-vbench", *arguments]) == 2
    assert message in capsys.readouterr().err
