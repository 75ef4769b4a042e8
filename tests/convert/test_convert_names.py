"""Names: what stands before them, averaged weights in every shape, several networks in one file."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from convert_samples import (
    VAE_CONFIG,
    diffusers_arrays,
    diffusers_config,
    flat,
    vae_arrays,
    write_folder,
    write_pipeline,
    write_raw_safetensors,
    write_safetensors,
)

from qdit_convert import describe, description_text, read_model
from qdit_convert.json_file import parse_json
from qdit_convert.readers import open_weights
from qdit_jax.errors import UserError

BIAS = "final_layer.linear.bias"


def under(prefix, arrays):
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def doubled(arrays):
    return {name: 2 * array for name, array in arrays.items()}


def bias(read):
    return flat(read.params)["final_layer/linear/bias"]


def notes(read):
    return read.metadata.get("names", [])


PREFIXES = (
    *("model.", "dit.", "transformer.", "net.", "diffusion_model.", "model.diffusion_model."),
    *("module.model.", "model.module.", "_orig_mod.model.", "model._orig_mod.", "a.b.c.d."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_of_a_known_network_is_stripped_and_said(tmp_path, dit, prefix):
    path = write_safetensors(tmp_path / "m.safetensors", under(prefix, dit))
    read = read_model(path, num_heads=2)
    np.testing.assert_array_equal(bias(read), dit[BIAS])
    assert read.metadata["weights"] == "flat"
    assert any('"' in note for note in notes(read))
    bare = prefix.replace("_orig_mod.", "").removeprefix("module.")
    assert f'stripped "{bare}"' in notes(read)


def test_a_file_without_prefixes_has_no_notes(pt, dit):
    assert "names" not in read_model(pt(dit), num_heads=2).metadata


def test_a_prefix_before_another_layout(tmp_path, dit):
    arrays = under("transformer.", diffusers_arrays(dit))
    read = read_model(write_folder(tmp_path / "d", arrays, diffusers_config()))
    np.testing.assert_array_equal(bias(read), dit[BIAS])
    read = read_model(write_folder(tmp_path / "v", under("vae.", vae_arrays()), VAE_CONFIG))
    assert notes(read) == ['stripped "vae."']


def test_compiled_blocks_in_the_middle_of_names(pt, dit):
    names = {k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in dit.items()}
    read = read_model(pt(under("net.", names)), num_heads=2)
    np.testing.assert_array_equal(bias(read), dit[BIAS])
    assert notes(read) == ['removed "_orig_mod."', 'stripped "net."']


def test_what_is_left_out_beside_a_prefix_is_counted(pt, dit):
    extra = {"head.weight": np.ones(2, np.float32), "head.bias": np.ones(2, np.float32)}
    content = {**under("net.", dit), **extra, "steps": np.ones((), np.int64), "epoch": 3}
    read = read_model(pt(content), num_heads=2)
    assert notes(read) == ['stripped "net."', "left out 3 tensors: head.* (2), steps"]


def test_nothing_may_be_missing_under_a_prefix(pt, dit):
    content = under("net.", dit)
    content[BIAS] = content.pop(f"net.{BIAS}")
    with pytest.raises(UserError, match=r"1 tensor is missing: final_layer\.linear\.bias"):
        read_model(pt(content), num_heads=2)


@pytest.mark.parametrize("raw", ["model.", "", "net.module."])
@pytest.mark.parametrize("averaged", ["ema.", "model_ema.", "ema_model.module.", "shadow."])
def test_two_sets_of_weights_in_one_table(tmp_path, dit, raw, averaged):
    arrays = {**under(raw, dit), **under(averaged, doubled(dit))}
    path = write_safetensors(tmp_path / "m.safetensors", arrays)
    for weights, factor, name in ((None, 2, "ema"), ("ema", 2, "ema"), ("model", 1, "model")):
        read = read_model(path, num_heads=2, weights=weights)
        np.testing.assert_array_equal(bias(read), factor * dit[BIAS])
        assert read.metadata["weights"] == name
        assert f"left out {len(dit)} tensors" in notes(read)[-1]


def test_both_sets_inside_a_state_dict(pt, dit):
    table = {**under("model.", dit), **under("ema.", doubled(dit))}
    path = pt({"state_dict": table, "epoch": 3})
    for weights, factor in ((None, 2), ("ema", 2), ("model", 1)):
        read = read_model(path, num_heads=2, weights=weights)
        np.testing.assert_array_equal(bias(read), factor * dit[BIAS])


def test_networks_that_cannot_be_told_apart_are_refused(pt, dit, tmp_path):
    with pytest.raises(UserError, match=r'several networks.*"student\." .*"teacher\."'):
        read_model(pt({**under("student.", dit), **under("teacher.", dit)}), num_heads=2)


def test_an_autoencoder_beside_a_network_is_named_and_left(dit, tmp_path):
    both = {**under("dit.", dit), **under("vae.", vae_arrays())}
    folder = write_folder(tmp_path / "d", both, VAE_CONFIG)
    read = read_model(folder, num_heads=2)
    assert read.family == "dit"
    assert notes(read)[-2:] == [
        f"left out {len(vae_arrays())} tensors: vae.* ({len(vae_arrays())})",
        "the AutoencoderKL in the diffusers layout in the file is read with --family vae",
    ]
    assert read_model(folder, num_heads=2, family="dit").family == "dit"
    assert read_model(folder, family="vae").family == "vae"


@pytest.mark.parametrize(
    "nested",
    [
        lambda a: {"shadow": a, "decay": 0.999},
        lambda a: {"module": a, "decay": 0.999, "num_updates": 3},
        lambda a: {"state_dict": under("module.", a), "n_averaged": np.ones((), np.int64)},
        lambda a: {**a, "decay": np.ones((), np.float32)},
        lambda a: {**a, "decay": 0.999},
        lambda a: {**under("ema_model.", a), **under("online_model.", doubled(a)), "step": 3},
        lambda a: under("module.", a),
    ],
)
@pytest.mark.parametrize(
    "entry", ["ema", "ema_state_dict", "ema_model", "model_ema", "ema_weights"]
)
def test_averaged_weights_under_some_nesting_are_read(pt, dit, entry, nested):
    path = pt({"model": dit, entry: nested(doubled(dit))})
    for weights, factor in ((None, 2), ("ema", 2), ("model", 1)):
        read = read_model(path, num_heads=2, weights=weights)
        np.testing.assert_array_equal(bias(read), factor * dit[BIAS])
        assert read.metadata["weights"] == (entry if factor == 2 else "model")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", lambda a: {"decay": 0.99, "shadow_params": list(a.values())}),
        ("ema", lambda a: list(a.values())),
        ("shadow_params", lambda a: list(a.values())),
        ("ema", lambda a: {"decay": 0.99}),
        ("ema", lambda a: {}),
        ("model_ema", lambda a: {name.replace(".", ""): array for name, array in a.items()}),
        ("ema", lambda a: {k: v for k, v in a.items() if k != "pos_embed"}),
        ("ema", lambda a: {**a, "pos_embed": np.full_like(a["pos_embed"], np.nan)}),
    ],
)
def test_averaged_weights_that_cannot_be_read_leave_the_raw_ones(pt, dit, name, value):
    path = pt({"model": dit, name: value(doubled(dit))})
    for weights in (None, "ema"):
        with pytest.raises(UserError, match="--weights model reads the raw ones"):
            read_model(path, num_heads=2, weights=weights)
    read = read_model(path, num_heads=2, weights="model")
    np.testing.assert_array_equal(bias(read), dit[BIAS])


def test_settings_of_an_average_are_no_average(pt, dit):
    content = {"model": dit, "ema_decay": 0.99, "ema": None, "ema_config": {"decay": 0.99}}
    assert read_model(pt(content), num_heads=2).metadata["weights"] == "model"


def test_two_averages_are_refused_and_raw_ones_said_by_name(pt, dit):
    path = pt({"model": dit, "ema": doubled(dit), "ema_slow": dit})
    with pytest.raises(UserError, match=r"several averaged sets of weights \(ema, ema_slow\)"):
        read_model(path, num_heads=2)
    read = read_model(pt({"model": dit, "state_dict": doubled(dit)}), num_heads=2)
    np.testing.assert_array_equal(bias(read), dit[BIAS])
    assert notes(read) == ["left out the model weights in state_dict"]


@pytest.mark.parametrize("wrap", [lambda a: {"net": a}, lambda a: {"checkpoint": {"model": a}}])
def test_entries_of_other_names_are_found(pt, dit, wrap):
    content = {**wrap(dit), "opt": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}}}
    read = read_model(pt(content), num_heads=2)
    np.testing.assert_array_equal(bias(read), dit[BIAS])
    assert notes(read)[-1] == "left out 1 tensors: opt.*"


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: {"model": a}, lambda a: under("net.", a)])
def test_ema_is_refused_where_there_is_none(pt, dit, wrap):
    with pytest.raises(UserError, match=r"no (ema|averaged) weights"):
        read_model(pt(wrap(dit)), num_heads=2, weights="ema")
    assert read_model(pt(wrap(dit)), num_heads=2, weights="model").family == "dit"


@pytest.mark.parametrize("wrap", [lambda a: {"ema": a}, lambda a: under("ema.", a)])
def test_model_is_refused_where_there_is_only_an_average(pt, dit, wrap):
    with pytest.raises(UserError, match=r"no (model|raw) weights"):
        read_model(pt(wrap(dit)), num_heads=2, weights="model")


def test_ema_is_refused_for_folders(tmp_path):
    with pytest.raises(UserError, match="no averaged weights"):
        read_model(write_pipeline(tmp_path / "p"), weights="ema")


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_heads", 2), ("num_classes", 10), ("input_size", 4), ("model", "DiT-XL/2")],
)
def test_options_that_a_network_has_no_use_for_are_refused(tmp_path, option, value):
    folder = write_folder(tmp_path / "v", vae_arrays(), VAE_CONFIG)
    name = option.replace("_", "-")
    with pytest.raises(UserError, match=f".--{name}. says nothing about a network of family vae"):
        read_model(folder, **{option: value})


def test_a_published_size_is_checked_in_every_layout(dit, tmp_path):
    folder = write_folder(tmp_path / "d", diffusers_arrays(dit), diffusers_config())
    with pytest.raises(UserError, match="DiT-XL/2 has 28 blocks"):
        read_model(folder, model="DiT-XL/2")


def test_a_label_table_of_one_row_says_what_to_pass(pt, dit):
    dit["y_embedder.embedding_table.weight"] = dit["y_embedder.embedding_table.weight"][:1]
    path = pt(dit)
    with pytest.raises(UserError, match=r"label table has 1 row.*pass --num-classes 1") as caught:
        read_model(path, num_heads=2)
    assert "num_classes=0" not in str(caught.value)
    read = read_model(path, num_heads=2, num_classes=1)
    assert (read.config["num_classes"], read.config["null_class"]) == (1, False)
    with pytest.raises(UserError, match=r"num_classes=3 does not fit; --num-classes can be 1\."):
        read_model(path, num_heads=2, num_classes=3)


def test_a_number_of_classes_that_does_not_fit_says_which_do(pt, dit):
    with pytest.raises(UserError, match=r"can be 10 .the last row is the null class. or 11"):
        read_model(pt(dit), num_heads=2, num_classes=12)


def test_description_says_what_was_done_to_names(pt, dit):
    told = describe(pt(under("net.", dit)))
    assert told["networks"][0]["family"] == "dit"
    told = describe(pt({"model": under("net.", doubled(dit)), "ema": under("net.", dit)}))
    assert told["networks"][0]["names"] == ['stripped "net."']
    assert 'names: stripped "net."' in description_text(told)


# --- a name twice


def test_json_holds_each_name_once_and_finite_numbers():
    assert parse_json('{"a": {"b": 1}, "b": [1.5e3]}', "x") == {"a": {"b": 1}, "b": [1500.0]}
    for text, message in (
        ('{"a": 1, "b": 2, "a": 1}', "x holds 'a' twice"),
        ('{"c": [{"a": 1, "a": 2}]}', "x holds 'a' twice"),
        ('{"a": NaN}', "x holds the number NaN"),
        ('{"a": -Infinity}', "x holds the number -Infinity"),
        ('{"a": 1e999}', "x holds the number 1e999"),
    ):
        with pytest.raises(UserError, match=message):
            parse_json(text, "x")


def test_a_name_twice_in_a_safetensors_header(tmp_path):
    header = (
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}'
    )
    path = write_raw_safetensors(tmp_path / "m.safetensors", header, b"\0" * 8)
    with pytest.raises(UserError, match=r"m\.safetensors.*header holds 'a' twice"):
        open_weights(path)
    twice = b'{"a": {"dtype": "F32", "shape": [1], "shape": [2], "data_offsets": [0, 8]}}'
    path = write_raw_safetensors(tmp_path / "m.safetensors", twice, b"\0" * 8)
    with pytest.raises(UserError, match="'shape' twice"):
        open_weights(path)


FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(folder, tables, index):
    for file, names in zip(FILES, tables, strict=True):
        write_safetensors(folder / file, {name: np.ones(1, np.float32) for name in names})
    path = folder / "model.safetensors.index.json"
    path.write_text(index)
    return path


def test_a_name_twice_in_an_index_or_in_two_shards(tmp_path):
    one, two = FILES
    twice = f'{{"weight_map": {{"a": "{one}", "b": "{two}", "a": "{two}"}}}}'
    with pytest.raises(UserError, match=r"index\.json holds 'a' twice"):
        open_weights(write_shards(tmp_path, (["a"], ["b"]), twice))
    once = json.dumps({"weight_map": {"a": one, "b": two}})
    with pytest.raises(UserError, match=r"00002.* holds 1 tensors .* not put there: a"):
        open_weights(write_shards(tmp_path, (["a"], ["a", "b"]), once))


def test_prefixes_are_stripped_from_shards_together(tmp_path):
    index = json.dumps({"weight_map": {"module.a": FILES[0], "module.b": FILES[1]}})
    assert set(
        open_weights(write_shards(tmp_path, (["module.a"], ["module.b"]), index)).tensors
    ) == {"a", "b"}
    index = json.dumps({"weight_map": {"module.a": FILES[0], "b": FILES[1]}})
    assert set(open_weights(write_shards(tmp_path, (["module.a"], ["b"]), index)).tensors) == {
        "module.a",
        "b",
    }


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("transformer/config.json", "num_layers"),
        ("vae/config.json", "norm_num_groups"),
        ("scheduler/scheduler_config.json", "num_train_timesteps"),
        ("model_index.json", "_class_name"),
    ],
)
def test_a_key_twice_in_each_file_of_a_pipeline(tmp_path, file, key):
    path = write_pipeline(tmp_path / "p") / file
    content = path.read_text()
    path.write_text(content[:-1] + f', "{key}": 4}}')
    with pytest.raises(UserError, match=rf"{path.name} holds '{key}' twice"):
        read_model(tmp_path / "p")


def test_an_entry_twice_in_a_torch_zip(pt, tmp_path):
    path = pt({"a.b": np.ones(2, np.float32)})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/0", b"\0" * 8)
    with pytest.raises(UserError, match="holds model/data/0 more than once"):
        open_weights(path)
    path = pt({"a.b": np.ones(2, np.float32)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"\x80\x02}.")
    with pytest.raises(UserError, match=r"several files of torch\.save"):
        open_weights(path)


# --- latent-diffusion files


def latent_diffusion_file(prefix=""):
    from test_convert_vae import latent_diffusion

    arrays = {f"{prefix}{latent_diffusion(k)}": v for k, v in vae_arrays().items()}
    wide = np.ones(2, np.float32)
    others = {
        "loss.discriminator.main.0.weight": wide,
        "loss.logvar": np.zeros((), np.float32),
        "model_ema.decay": np.zeros((), np.float32),
        "model_ema.encoderconv_inweight": wide,
        "cond_stage_model.transformer.weight": wide,
        "model.diffusion_model.out.2.weight": wide,
        "betas": wide,
    }
    return arrays, others


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "model.first_stage_model."])
def test_other_networks_beside_an_autoencoder_are_left_out_and_said(tmp_path, prefix):
    arrays, others = latent_diffusion_file(prefix)
    alone = read_model(write_folder(tmp_path / "a", arrays, VAE_CONFIG))
    both = read_model(write_folder(tmp_path / "b", {**arrays, **others}, VAE_CONFIG))
    assert flat(alone.params).keys() == flat(both.params).keys()
    wanted = flat(alone.params)
    assert all((leaf == wanted[path]).all() for path, leaf in flat(both.params).items())
    assert notes(both)[-1].startswith("left out 7 tensors: ")
    for part in ("betas", "cond_stage_model.*", "loss.* (2)", "model.*", "model_ema.* (2)"):
        assert part in notes(both)[-1]


def test_many_names_of_other_networks_do_not_hide_an_autoencoder(tmp_path):
    arrays, _ = latent_diffusion_file()
    crowd = {f"model.diffusion_model.x{i}.weight": np.ones(1, np.float32) for i in range(500)}
    read = read_model(write_folder(tmp_path / "a", {**arrays, **crowd}, VAE_CONFIG))
    assert notes(read) == ["left out 500 tensors: model.* (500)"]


def test_unknown_names_inside_an_autoencoder_are_still_refused(tmp_path):
    arrays, _ = latent_diffusion_file()
    arrays["encoder.extra.weight"] = np.ones(1, np.float32)
    with pytest.raises(UserError, match=r"1 tensor is unexpected: encoder\.extra\.weight"):
        read_model(write_folder(tmp_path / "a", arrays, VAE_CONFIG))


def test_a_diffusion_model_around_an_autoencoder_names_the_option(tmp_path):
    arrays, _ = latent_diffusion_file("first_stage_model.")
    arrays["model.diffusion_model.input_blocks.0.0.weight"] = np.ones(1, np.float32)
    folder = write_folder(tmp_path / "a", arrays, VAE_CONFIG)
    with pytest.raises(UserError, match=r"U-Net .*; --family vae reads the AutoencoderKL"):
        read_model(folder)
    assert read_model(folder, family="vae").family == "vae"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_unsupported_networks_are_recognized_behind_prefixes(pt, prefix):
    arrays = {f"{prefix}input_blocks.{i}.x.weight": np.ones(1, np.float32) for i in range(9)}
    with pytest.raises(UserError, match="U-Net"):
        read_model(pt(arrays))


def test_safetensors_of_other_dtypes_are_named(tmp_path, dit):
    offset, header = 0, {}
    for name, array in dit.items():
        code, size = ("C64", 8) if name == BIAS else ("F32", 4)
        header[name] = {
            "dtype": code,
            "shape": array.shape,
            "data_offsets": [offset, offset + size * array.size],
        }
        offset += size * array.size
    path = write_raw_safetensors(tmp_path / "m.safetensors", header, b"\0" * offset)
    with pytest.raises(UserError, match=rf"not floating point: {BIAS} \(complex64\)"):
        read_model(path, num_heads=2)
