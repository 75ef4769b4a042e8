"""`qdit search` end to end on a small checkpoint: files, resuming, errors, `search` itself."""

from __future__ import annotations

import json
from collections import deque

import jax
import numpy as np
import pytest
from search_models import small_model

import qdit_jax as qdit
from qdit_jax.allocation import (
    Allocate,
    AllocationSettings,
    BadFitnessError,
    EvolutionSettings,
    Evolve,
    Rollouts,
    choice_options,
    search,
    search_space,
)
from qdit_jax.calibration import collect_items
from qdit_jax.cli import bench
from qdit_jax.cli import search as verb
from qdit_jax.cli.options import Parser
from qdit_jax.cli.output import set_up_logging
from qdit_jax.cli.search_pictures import shown_labels
from qdit_jax.cli.search_run import space_settings
from qdit_jax.diffusion import ddim

CALLS: deque[int] = deque()  # no plain value, whose content would belong to an objective
FAST = ["--steps", "2", "--num-batches", "2", "--batch-size", "2", "--group-sizes", "8", "32"]


@pytest.fixture(scope="module")
def checkpoint():
    return qdit.Checkpoint(*small_model())


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "ckpt"
    qdit.save(path, checkpoint)
    return path


def run(*arguments):
    parser = Parser(prog="qdit")
    verb.add_parser(parser.add_subparsers())
    args = parser.parse_args(["search", *map(str, arguments)])
    set_up_logging(args)
    args.run(args)


def test_a_search_writes_a_recipe_that_quantizes_and_pictures(folder, checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--method", "qdit-paper", "--population", "4", "--generations", "1"]
    run(folder, out, "--budget", "bitops=1.0x-g32", *options, *FAST)
    recipe = qdit.Recipe.from_json(out / "recipe.json")
    assert len(qdit.plan(checkpoint.params, recipe)) == 4
    history = json.loads((out / "history.json").read_text())
    # Nothing but coarse groups fits: 1 assignment, 2 batches of 2, 2 steps, guidance.
    assert history["report"]["network_evaluations"] == 2 * 2 * 2 * 2 * 2
    assert history["cost"] <= history["limit"] * (1 + 1e-9)
    for name in ("front.png", "map.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "1 measured" in printed
    assert "bitops=1.0x-g32: nothing to search: only the cheapest assignment fits" in printed
    with pytest.raises(qdit.UserError, match="holds a finished search; pass --force"):
        run(folder, out, *FAST)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "bytes=5"], "budget='bytes=5' is impossible"),
        (["--budget", "bytes=1.2.3M"], "cannot be read"),
        (["--budget", "bytes=999M"], "limits nothing: the dearest assignment costs [0-9]+"),
        (["--budget", "mean-group=1"], "limits nothing: the mean of the group sizes is never bel"),
        (
            ["--budget", "mean-group=999"],
            "impossible: the mean of the group sizes that .* is [1-9]",
        ),
        (["--exclude", "nothing"], "excluded='nothing' matches no layer"),
        (["--pin", "nothing=8"], "pinned='nothing' matches no layer"),
        (
            ["--population", "9"],
            "--population 9 has no effect: --method default is not an evolution",
        ),
        (["--reference", "demo"], "--reference demo has no effect: --objective paired"),
        (["--objective", "predicted", "--per-device", "2"], "--per-device 2 has no effect"),
        (["--method", "qdit-release", "--guidance", "2"], "--guidance 2.0 has no effect"),
        (["--layers", "nothing"], "matches no layer"),
        (["--pin", "x"], "write PATTERN=SIZE"),
        (["--method", "luck"], "strategy='luck' is not known"),
        (["--objective", "frechet"], "needs --reference"),
        (
            ["--within", "1dB-of-g8"],
            "--within 1dB-of-g8 has no effect: it is the error allowed by --mi",
        ),
        (["--minimize", "bytes", "--within", "1-of-g8"], "within='1-of-g8' cannot be read"),
        (["--minimize", "bytes", "--within", "1dB-of-g64"], "needs the choice w4a8 g64"),
        (["--minimize", "time", "--within", "1dB-of-g8"], "minimize='time' is not a cost's name"),
        (["--minimize", "bytes", "--budget", "bytes=5M"], "--budget bytes=5M has no effect"),
        (["--minimize", "bytes", "--method", "nsga2"], "does not go with --method nsga2"),
        (["--minimize", "latency"], "the cost latency needs --latency FILE"),
        (["--budget", "latency=1.0x-g8"], "the cost latency needs --latency FILE"),
        (
            ["--latency", "x.json"],
            "--latency x.json has no effect: neither --budget nor --minimize",
        ),
        (["--latency", "absent.json", "--minimize", "latency"], "absent.json does not exist"),
        (["--transforms", "none", "smoth"], "transform='smoth' is not known; use one of none"),
        (["--formats", "int9"], "unknown format 'int9'"),
        (["--act-formats", "int", "fp8_e4m3"], "act_formats='fp8_e4m3' is in no choice: such inp"),
        (["--weight-symmetric", "maybe"], "'maybe' cannot be read; write no or yes"),
        (["--ranks", "4096"], "rank=4096 of blocks_0/attn/proj: its kernel is 64x64"),
        (["--items", "x.npz"], "--items x.npz has no effect: without --transforms and --ranks"),
    ],
)
def test_errors_are_one_sentence(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "out", *FAST, *options)


@pytest.mark.slow
def test_a_search_over_transforms_names_the_command_that_makes_them(
    folder, checkpoint, tmp_path, capsys
):
    items = collect_items(checkpoint, jax.random.key(7), 4, sampler=ddim(steps=2), batch_size=8)
    items.save(tmp_path / "items.npz")
    out = tmp_path / "out"
    options = ["--objective", "predicted", "--transforms", "none", "smooth", "hadamard", "pca"]
    options += [
        "--ranks",
        "0",
        "2",
        "--budget",
        "bytes=1.2x-g32",
        "--items",
        tmp_path / "items.npz",
    ]
    run(folder, out, *options, *FAST)
    printed = capsys.readouterr().out
    assert "fitted transforms and branches of 4 of 4 layers" in printed
    command = (
        f"--recipe {out / 'recipe.json'} --method best --items {tmp_path / 'items.npz'}, which"
    )
    assert command in printed
    recipe = qdit.Recipe.from_json(out / "recipe.json")
    assert all(rule.spec.transform is not None for rule in recipe.rules)
    assert (out / "map.png").read_bytes().startswith(b"\x89PNG")


OFFERED = [
    {"group_sizes": (8, 16)},
    {"group_sizes": (8, 0), "sides": "separate", "weight_bits": (3, 8), "act_bits": (4, 16)},
    {"group_sizes": (8, 16), "sides": "weights", "weight_bits": (4, 16)},
    {"weight_bits": 16, "group_sizes": (8, 16)},
    {"act_bits": 16, "group_sizes": (8, 16), "transforms": ("smooth",)},
    {"formats": ("nvfp4", "mxfp8"), "group_sizes": (16, 32)},
    {"formats": ("int", "nf4", "nvfp4"), "weight_bits": 3, "group_sizes": (16,)},
    {"transforms": ("none", "pca"), "ranks": (0, 2), "pinned": {".*fc2": 32}},
    {"scale_levels": (1, 2), "act_scales": ("group", "token"), "sides": "weights"},
    {"scale_levels": 2, "act_scales": "token", "weight_bits": (4, 6), "group_sizes": (32,)},
    {"weight_symmetric": (False, True), "scale_levels": (1, 2), "group_sizes": (8, 16)},
    {"weight_symmetric": True, "weight_bits": 8, "group_sizes": (0,), "act_scales": "token"},
    *(
        {"formats": ("int", "fp8_e4m3"), "act_formats": ("int", "fp8_e4m3"), **more}
        for more in (
            {"group_sizes": (0, 32)},
            {"group_sizes": (0,), "act_scales": "token", "weight_symmetric": True},
            {"group_sizes": (0,), "act_scales": ("group", "token"), "sides": "weights"},
            {"group_sizes": (16, 32), "act_scales": ("group", "token"), "act_bits": (4, 8)},
            {"group_sizes": (16, 0), "sides": "separate", "act_bits": (8, 16)},
        )
    ),
    {"formats": ("fp8_e4m3", "mxfp8"), "act_formats": ("fp8_e5m2", "mxfp8"), "group_sizes": (16,)},
    {"formats": "nvfp4", "act_formats": "nvfp4"},
]


@pytest.mark.parametrize("settings", OFFERED)
def test_options_of_choices_offer_them(checkpoint, settings):
    space = search_space(checkpoint.params, **settings)
    choices = {spec for layer in space.layers for spec in layer.choices}
    parser = Parser(prog="qdit")
    verbs = parser.add_subparsers()
    verb.add_parser(verbs)
    bench.add_parser(verbs)
    words = choice_options(choices).split()
    found, timed = (
        space_settings(vars(parser.parse_args([name, "CKPT", "OUT", *words])))
        for name in ("search", "bench")
    )
    assert found == timed
    offered = search_space(checkpoint.params, **found)
    again = {spec.plain for layer in offered.layers for spec in layer.choices}
    assert {spec.plain for spec in choices} <= again
    if "act_formats" in settings or "weight_symmetric" in settings:
        assert {spec.plain for spec in choices} == again
    beside = {(spec.transform or "none", spec.rank or 0) for spec in choices}
    assert beside <= {
        (spec.transform or "none", spec.rank or 0)
        for layer in offered.layers
        for spec in layer.choices
    }


def test_a_map_of_many_choices_shows_those_that_are_taken():
    names = [[f"{letter}{i}" for i in range(20)] for letter in "ab"]
    assert shown_labels(names, [[3, 4], [3, 5]]) == ["a3", "b4", "b5"]
    assert shown_labels([["x", "y"], ["y", "z"]], [[0, 0]]) == ["x", "y", "z"]


def test_a_fitness_that_is_no_number_loses_nothing(checkpoint, tmp_path):
    settings = EvolutionSettings(4, 2, 2, 2, 2)
    strategy = Evolve(settings)
    first, other = (
        Rollouts(num_steps=2, num_batches=1, state=tmp_path / name) for name in ("a", "b")
    )
    space = {
        "strategy": strategy,
        "space": {"group_sizes": (8, 16, 32)},
        "budget": "bitops=1.0x-g16",
    }
    CALLS.clear()

    def fn(params, key):
        CALLS.append(1)
        return params["blocks_0"]["mlp"]["fc1"]["kernel"].std()

    def broken(params, key):
        value = fn(params, key)
        return jax.numpy.where(value > 0, jax.numpy.nan, value)

    key = jax.random.key(4)
    whole = search(checkpoint, key, objective=fn, rollouts=first, **space)
    assert len(CALLS) == 1  # traced once for the whole search
    with pytest.raises(BadFitnessError, match="nan"):
        search(checkpoint, key, objective=broken, rollouts=other, **space)
    again = search(checkpoint, key, objective=fn, rollouts=first, **space)
    assert again.history["measured"] == whole.history["measured"]
    assert again.recipe == whole.recipe


@pytest.mark.slow
def test_the_default_search_beats_the_uniform_recipe_and_resumes(checkpoint, tmp_path):
    settings = AllocationSettings(num_gate=6, num_estimates=1, num_rounds=1, rungs=(1, 2, 3))
    options = {
        "budget": "bitops=1.0x-g16",
        "space": {"group_sizes": (8, 16, 32, 64)},
        "strategy": Allocate(settings),
        "rollouts": Rollouts(
            num_steps=3, num_batches=3, batch_size=4, num_calibration=1, state=tmp_path / "state"
        ),
    }
    found = search(checkpoint, jax.random.key(0), **options)
    again = search(checkpoint, jax.random.key(0), **options)
    assert again.assignment.tolist() == found.assignment.tolist()
    assert again.history["report"] == found.history["report"]
    last = found.history["report"]["finalists"][-1]["fitness"]
    assert last == sorted(last)
    uniform = next(r for r in found.history["measured"] if set(r["assignment"]) == {1})
    chosen = next(
        r for r in found.history["measured"] if r["assignment"] == found.assignment.tolist()
    )
    assert chosen["fitness"] <= uniform["fitness"]
    assert np.isfinite(found.front.error).all()


@pytest.mark.slow
def test_the_predicted_objective_measures_nothing(checkpoint):
    found = search(
        checkpoint,
        jax.random.key(0),
        objective="predicted",
        budget="bitops=1.0x-g16",
        space={"group_sizes": (8, 16, 32)},
        rollouts=Rollouts(num_steps=2, batch_size=2, num_calibration=1),
    )
    assert found.history["measured"] == []
    assert found.budget.allows(found.assignment)
