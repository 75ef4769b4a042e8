"""`qdit bench`: what it prints and writes, and a search with the times that it took."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny_models import tiny_checkpoint

import qdit_jax as qdit
from qdit_jax.allocation import Latency, cost_table, search_space
from qdit_jax.calibration import Items
from qdit_jax.cli import main
from qdit_jax.models import rows_per_sample

FAST = ("--batch", "2", "--repeats", "2")
ROWS = ("--recipes", "w4a8-g16", "--numerics", "simulated", "--implementation", "xla")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("bench")
    qdit.save(base / "full", tiny_checkpoint(in_channels=1))
    return base


def printed(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr()


def test_a_bench_prints_a_table_and_writes_it(folder, tmp_path, capsys):
    out = tmp_path / "out"
    shown = printed(capsys, "bench", folder / "full", out, *FAST, *ROWS).out
    lines = [line.split() for line in shown.splitlines()]
    assert [line[:4] for line in lines[1:4]] == [
        ["2", "float32", "-", "-"],
        ["2", "bfloat16", "-", "-"],
        ["2", "w4a8-g16", "simulated", "xla"],
    ]
    assert "guided by 1.5: medians of 2 rounds in turn with float32" in shown
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "bench.json").read_text())
    assert {entry["title"] for entry in saved["entries"].values()} == {
        *("float32", "bfloat16", "w4a8-g16")
    }
    assert main(["bench", str(folder / "full"), str(out), *FAST, *ROWS]) == 2
    assert "holds a finished bench; pass --force to replace it" in capsys.readouterr().err
    # Killed before the picture: the same command takes no time again.
    (out / "bench.png").unlink()
    again = printed(capsys, "bench", folder / "full", out, *FAST, *ROWS, "--json")
    rows = json.loads(again.out)["rows"]
    assert rows[1] == saved["entries"][list(saved["entries"])[1]]
    assert "resuming from" in again.err


def test_a_dry_run_reads_no_array(folder, tmp_path, capsys):
    shutil.copytree(folder / "full", tmp_path / "ckpt")
    chunks = [p for p in (tmp_path / "ckpt/params").rglob("*") if re.fullmatch(r"[\d.]+", p.name)]
    for path in chunks:
        path.write_bytes(b"")
    assert len(chunks) > 10
    found = printed(capsys, "bench", tmp_path / "ckpt", "--dry-run", "--batch", "3", "--json").out
    rows = json.loads(found)["predicted"]
    full, wide, eight, two_levels, four, half = rows
    assert [row["title"] for row in rows] == [
        *("bfloat16", "float32", "w8a8-fast-g0", "w4a8-fast-g32", "w4a8-g128", "w4a16-g128"),
    ]
    quantized = [row["bit_operations"] for row in (eight, two_levels, four)]
    assert max(quantized) < full["bit_operations"] / 2
    assert two_levels["bit_operations"] == eight["bit_operations"]  # both multiply int8
    sizes = [row["weight_bytes"] for row in (four, eight, full, wide)]
    assert sizes == sorted(sizes)
    assert half["weight_bytes"] == four["weight_bytes"]
    assert two_levels["milliseconds"].keys() == {"h100", "v5e", "v5p", "v6e"}
    assert full["milliseconds"]["h100"] < full["milliseconds"]["v5e"]


def test_a_published_network_is_counted_without_a_file(capsys):
    words = ("--model", "dit-xl/2", "--dry-run", "--batch", "1", "--recipes", "w4a8-fast")
    shown = printed(capsys, "bench", *words, "--device", "h100", "v5e").out
    assert "DiT-XL/2, samples of 256 x 256: latents 32 x 32 x 4, 2 calls per sample" in shown
    assert re.search(r"bfloat16 +13\d\d\.\d+ +1\.000", shown)  # 675 million weights
    assert "predicted from shapes; nothing was run" in shown


@pytest.mark.slow
def test_the_fastest_recipe_within_an_error_from_measured_times(folder, tmp_path, capsys):
    times, out = tmp_path / "times", tmp_path / "search"
    choices = ("--group-sizes", "8", "16", "0")
    shown = printed(capsys, "bench", folder / "full", times, *FAST, "--table", *choices).out
    assert "w4 g8 a8 g8" in shown
    assert "a step in full precision:" in shown
    options = ("--steps", "2", "--num-batches", "1", "--batch-size", "2", *choices)
    latency = ("--latency", times / "latency.json")
    asked = ("--minimize", "latency", "--within", "1dB-of-g16")
    shown = printed(capsys, "search", folder / "full", out, *options, *latency, *asked).out
    assert "1dB-of-g16 allowed" in shown
    assert "ms that no choice changes, measured on" in shown
    history = json.loads((out / "history.json").read_text())
    assert history["report"]["error_db"] <= 1
    assert history["latency"]["batch"] == 2
    assert (out / "front.png").exists()
    assert len(qdit.Recipe.from_json(out / "recipe.json").rules) == 4
    finer = (*options[:-4], "--group-sizes", "4", "16")
    words = ["search", folder / "full", tmp_path / "no", *finer, *latency, *asked]
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "latency.json has no time for K=32 N=32 rows=16 w4 g4 a8 g4" in error
    assert "measure it: qdit bench CKPT OUT --table --batch 2" in error


@pytest.mark.slow
def test_times_of_transforms_branches_and_formats_lead_a_search(folder, tmp_path, capsys):
    times, out, layers = tmp_path / "times", tmp_path / "search", "blocks_0/mlp/fc2"
    offered = {"group_sizes": (16,), "transforms": ("none", "smooth+hadamard"), "ranks": (0, 2)}
    offered["formats"] = ("int", "nf4")
    choices = "--group-sizes 16 --formats int nf4 --transforms none smooth+hadamard --ranks 0 2"
    words = (*choices.split(), "--layers", layers)
    shown = printed(capsys, "bench", folder / "full", times, *FAST, "--table", *words).out
    assert "w-nf4 g16 symmetric=True a8 g16 transform=smooth+hadamard rank=2" in shown
    assert choices in shown  # of the search that comes next
    checkpoint, table = qdit.load(folder / "full"), Latency.read(times / "latency.json")
    rows = rows_per_sample(checkpoint.model)
    space = search_space(checkpoint.params, rows=rows, layers=layers, **offered)
    [costs] = cost_table(space, table)
    assert len(costs) == 8
    labels = np.zeros(4, np.int32)
    x = np.zeros((4, *checkpoint.model.sample_shape()), np.float32)
    Items(x, np.full(4, 500, np.float32), labels, np.arange(4)).save(tmp_path / "items.npz")
    words += ("--items", tmp_path / "items.npz", "--latency", times / "latency.json")
    words += ("--objective", "predicted", "--budget", f"latency={np.median(costs):.9f}")
    words += ("--steps", "2", "--num-batches", "1", "--batch-size", "2")
    printed(capsys, "search", folder / "full", out, *words)
    history = json.loads((out / "history.json").read_text())
    assert history["cost"] == pytest.approx(costs[history["assignment"][0]])
    assert history["cost"] <= np.median(costs)
    words = ["search", folder / "full", tmp_path / "no", *words, "--ranks", "0", "4"]
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "a8 g16 rank=4, of blocks_0/mlp/fc2; measure it: qdit bench CKPT OUT --table" in error
    assert choices.replace("--ranks 0 2", "--ranks 0 4") in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table"], "--table needs OUT"),
        (["OUT", "--table", "--recipes", "w4a8"], "--recipes w4a8 has no effect: --table times la"),
        (["OUT", "--table", "--batch", "1", "2"], "--batch: --table takes one, not 2"),
        (["--group-sizes", "8"], "--group-sizes 8 has no effect: without --table"),
        (["--ranks", "4"], "--ranks 4 has no effect: without --table"),
        (["--force"], "--force has no effect: without OUT"),
        (["OUT", "--dry-run"], "has no effect: --dry-run writes nothing"),
        (["--recipes", "w4a8-g8", "--group-size", "8"], "--group-size 8 has no effect: every rec"),
        (["--recipes", "fast"], "--recipes fast is not a preset"),
        (["--implementation", "magic"], "--implementation magic is not known; use xla_cpu or"),
        (["--device", "h100"], "--device h100 has no effect: only --dry-run counts"),
        (["--dry-run", "--model", "flux-dev"], "give CKPT, or --dry-run --model NAME"),
        (["--dry-run", "--device", "a100"], "--device a100 is not known; use h100, v5e"),
        (["--against", "CKPT"], "the checkpoint is in full precision itself"),
    ],
)
def test_errors_name_the_option(folder, tmp_path, capsys, options, message):
    words = [
        w.replace("OUT", str(tmp_path / "o")).replace("CKPT", str(folder / "full")) for w in options
    ]
    assert main(["bench", str(folder / "full"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
