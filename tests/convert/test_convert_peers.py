"""Files written by torch and diffusers themselves; skipped where they are not installed."""

from __future__ import annotations

import argparse
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_samples import flat
from torch_file import Storage, Tensor, write_torch_file

from qdit_convert import read_model
from qdit_convert.readers import open_weights
from qdit_convert.reading import to_checkpoint
from qdit_jax.errors import UserError

torch = pytest.importorskip("torch")


def as_numpy(tensor):
    return tensor.detach().to(torch.float64).numpy()


def check_equal(state, tensors):
    assert set(state.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = state.tensors[name].read()
        assert found.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(found.astype(np.float64), as_numpy(tensor), err_msg=name)


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    linear = torch.nn.Linear(4, 3)
    table = OrderedDict(linear.state_dict())
    table._metadata = {"": {"version": 1}}
    table |= {
        "row": base[2],
        "columns": base[:, 2:5],
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    return table


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tensors_of_torch_files_are_torchs_own(tmp_path, tensors, protocol):
    path = tmp_path / "a.pt"
    torch.save(tensors, path, pickle_protocol=protocol)
    check_equal(open_weights(path), tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_signs_put_off_and_tensors_with_attributes(tmp_path, zipped, protocol):
    torch.manual_seed(1)

    def imaginary(*shape):
        return torch.randn(*shape, dtype=torch.complex64).conj().imag

    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.tag = "x"
    tagged = torch.randn(3)
    tagged.tag = [1]
    saved = {
        "negated": imaginary(3, 4),
        "negated_view": imaginary(4, 6)[1:, ::2].t(),
        "twice": -imaginary(3),
        "parameter": parameter,
        "tagged": tagged,
        "narrow": torch.randn(2, 3).to(torch.float8_e4m3fn)[:, 1],
        "unsigned": torch.tensor([1, 2, 3], dtype=torch.uint16),
    }
    assert saved["negated"].is_neg()
    path = tmp_path / "a.pt"
    kinds = [torch.device("cuda:0"), torch.float32, torch.Size([1]), {1, 2}, b"x", bytearray(b"y")]
    content = {
        "model": saved,
        "args": {"kinds": [*kinds, 1j, torch.strided, 2**70], "seed": np.int64(4)},
        "eye": torch.eye(2).to_sparse(),
        "rows": torch.eye(2).to_sparse_csr(),
        "meta": torch.empty(2, device="meta"),
        "quantized": torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
        ),
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    state = open_weights(path)
    check_equal(state, {name: tensor.resolve_neg() for name, tensor in saved.items()})
    assert state.hints["seed"] == 4


def test_every_name_of_torchs_safe_loader_is_known_or_refused_for_a_reason():
    from torch._weights_only_unpickler import _get_allowed_globals

    from qdit_convert.torch_names import known_names

    unknown = set(_get_allowed_globals()) - set(known_names())
    old_classes = {name for name in unknown if name.endswith("Tensor")}
    assert unknown - old_classes == {
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch.storage.TypedStorage",
    }


def test_files_without_checksums(tmp_path, tensors):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    check_equal(open_weights(tmp_path / "a.pt"), tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_training_files_in_both_formats(tmp_path, tensors, zipped):
    args = argparse.Namespace(num_classes=10, model="DiT-S/2", results=None)
    saved = {
        "model": {f"module.{k}": v for k, v in tensors.items()},
        "ema": {f"module.{k}": v + v for k, v in tensors.items()},
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": args,
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=zipped)
    state = open_weights(path)
    check_equal(state, {k: v + v for k, v in tensors.items()})
    assert state.hints["num_classes"] == 10
    check_equal(open_weights(path, "model"), tensors)


def test_whole_modules_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), path)
    with pytest.raises(UserError, match=r"class torch\.nn\.modules\.container\.Sequential"):
        read_model(path)
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"class torch\.nn\.modules\.linear\.Linear"):
        read_model(path)


def test_torchscript_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match="TorchScript"):
        read_model(tmp_path / "a.pt")


def test_torch_reads_the_files_that_we_generate(tmp_path):
    values = np.arange(24, dtype=np.float32)
    storage = Storage("float32", 24, lambda: [values])
    content = {"a": Tensor(storage, 2, (3, 2), (1, 4)), "b": np.ones((2, 2), np.float16)}
    write_torch_file(tmp_path / "a.pt", {"ema": content, "epoch": 3, "lr": 0.5})
    loaded = torch.load(tmp_path / "a.pt", weights_only=True)
    assert loaded["epoch"] == 3
    np.testing.assert_array_equal(loaded["ema"]["a"].numpy(), [[2, 6], [3, 7], [4, 8]])
    assert loaded["ema"]["b"].dtype == torch.float16


@pytest.fixture
def transformer():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model.eval()


def check_outputs(read, model):
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([1, 7, 1000])
    with torch.no_grad():
        expected = model(x, timestep=t, class_labels=y).sample.numpy()
    checkpoint = to_checkpoint(read)
    image = jnp.asarray(x.numpy().transpose(0, 2, 3, 1))
    run = jax.jit(lambda p, *given: checkpoint.model.apply({"params": p}, *given))
    found = run(checkpoint.params, image, jnp.asarray(t.numpy()), jnp.asarray(y.numpy()))
    error = np.abs(np.asarray(found).transpose(0, 3, 1, 2) - expected).max()
    assert error <= 2e-4 * (1 + np.abs(expected).max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"safe_serialization": False},
        {"max_shard_size": "20KB"},
        {"max_shard_size": "20KB", "safe_serialization": False},
    ],
)
def test_folders_that_diffusers_writes(tmp_path, transformer, settings):
    transformer.save_pretrained(tmp_path, **settings)
    check_outputs(read_model(tmp_path), transformer)


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "20KB"}])
def test_half_precision_variants(tmp_path, transformer, settings):
    transformer.half().save_pretrained(tmp_path, variant="fp16", **settings)
    assert all("fp16" in p.name for p in tmp_path.iterdir() if p.name != "config.json")
    check_outputs(read_model(tmp_path), transformer.float())


def test_a_whole_pipeline_of_diffusers(tmp_path, transformer):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.3,
    ).eval()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    pipeline = diffusers.DiTPipeline(transformer, vae, scheduler)
    pipeline.save_pretrained(tmp_path)
    read = read_model(tmp_path)
    check_outputs(read, transformer)
    assert read.metadata["scheduler"]["_class_name"] == "DDIMScheduler"
    assert read.vae.config["scaling_factor"] == 0.3
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(z).sample.numpy()
    checkpoint = to_checkpoint(read.vae)
    run = jax.jit(lambda p, z: checkpoint.model.apply({"params": p}, z, method="decode"))
    found = run(checkpoint.params, jnp.asarray(z.numpy().transpose(0, 2, 3, 1)))
    error = np.abs(np.asarray(found).transpose(0, 3, 1, 2) - expected).max()
    assert error <= 2e-4 * (1 + np.abs(expected).max())
    assert set(flat(read.vae.params)) == set(flat(checkpoint.params))
