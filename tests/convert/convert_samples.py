"""Small networks in the published layouts, and files of them, made without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qdit_jax.models import build_model

WIDTH, DEPTH, CLASSES = 16, 2, 10
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "float64": "F64"}


def dit_shapes(width: int = WIDTH, depth: int = DEPTH) -> dict[str, tuple[int, ...]]:
    layers = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    for i in range(depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * width, width),
            f"blocks.{i}.attn.proj": (width, width),
            f"blocks.{i}.mlp.fc1": (4 * width, width),
            f"blocks.{i}.mlp.fc2": (width, 4 * width),
            f"blocks.{i}.adaLN_modulation.1": (6 * width, width),
        }
    layers |= {
        "final_layer.linear": (32, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 4, width),
        "x_embedder.proj.weight": (width, 4, 2, 2),
        "x_embedder.proj.bias": (width,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_arrays(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, dtype=np.float32) * 0.1 for name, shape in shapes.items()
    }


def diffusers_arrays(facebook: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same network with the names of diffusers."""
    depth = 1 + max(int(k.split(".")[1]) for k in facebook if k.startswith("blocks."))
    top = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    each = {
        "adaLN_modulation.1": "norm1.linear",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    out = {}
    for end in ("weight", "bias"):
        out |= {f"{new}.{end}": facebook[f"{old}.{end}"] for old, new in top.items()}
        for i in range(depth):
            block, old_block = f"transformer_blocks.{i}", f"blocks.{i}"
            out |= {
                f"{block}.{new}.{end}": facebook[f"{old_block}.{old}.{end}"]
                for old, new in each.items()
            }
            for name, part in zip(
                "qkv", np.split(facebook[f"{old_block}.attn.qkv.{end}"], 3), strict=True
            ):
                out[f"{block}.attn1.to_{name}.{end}"] = part
            for old, new in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
                key = f"{block}.norm1.emb.timestep_embedder.{new}.{end}"
                out[key] = facebook[f"t_embedder.{old}.{end}"]
    for i in range(depth):
        key = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        out[key] = facebook["y_embedder.embedding_table.weight"]
    return out


def diffusers_config(**changes: Any) -> dict[str, Any]:
    config = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": 8,
        "in_channels": 4,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": 2,
        "num_embeds_ada_norm": CLASSES,
        "num_layers": DEPTH,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 4,
    }
    return {k: v for k, v in {**config, **changes}.items() if v is not ...}


def vae_arrays() -> dict[str, np.ndarray]:
    """Returns a small AutoencoderKL with widths 8 and 16 in the diffusers layout."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(key: str, before: int, after: int, size: int = 3) -> None:
        shapes.update({f"{key}.weight": (after, before, size, size), f"{key}.bias": (after,)})

    def norm(key: str, width: int) -> None:
        shapes.update({f"{key}.weight": (width,), f"{key}.bias": (width,)})

    def resnet(key: str, before: int, after: int) -> None:
        norm(f"{key}.norm1", before)
        conv(f"{key}.conv1", before, after)
        norm(f"{key}.norm2", after)
        conv(f"{key}.conv2", after, after)
        if before != after:
            conv(f"{key}.conv_shortcut", before, after, 1)

    for half, channels, width, out, last in (("encoder", 3, 8, 8, 16), ("decoder", 4, 16, 3, 8)):
        conv(f"{half}.conv_in", channels, width)
        for i in range(2):
            resnet(f"{half}.mid_block.resnets.{i}", 16, 16)
        attention = f"{half}.mid_block.attentions.0"
        norm(f"{attention}.group_norm", 16)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes.update(
                {f"{attention}.{name}.weight": (16, 16), f"{attention}.{name}.bias": (16,)}
            )
        norm(f"{half}.conv_norm_out", last)
        conv(f"{half}.conv_out", last, out)
    resnet("encoder.down_blocks.0.resnets.0", 8, 8)
    conv("encoder.down_blocks.0.downsamplers.0.conv", 8, 8)
    resnet("encoder.down_blocks.1.resnets.0", 8, 16)
    for i in range(2):
        resnet(f"decoder.up_blocks.0.resnets.{i}", 16, 16)
        resnet(f"decoder.up_blocks.1.resnets.{i}", 16 if i == 0 else 8, 8)
    conv("decoder.up_blocks.0.upsamplers.0.conv", 16, 16)
    conv("quant_conv", 8, 8, 1)
    conv("post_quant_conv", 4, 4, 1)
    return random_arrays(shapes, seed=1)


VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    header, position, data = {}, 0, []
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + len(raw)],
        }
        position += len(raw)
        data.append(raw)
    return write_raw_safetensors(path, header, b"".join(data))


def write_raw_safetensors(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_folder(folder: Path, arrays: dict[str, np.ndarray], config: Any) -> Path:
    """Writes a diffusers folder of one network; `config` None leaves config.json out."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", arrays)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_pipeline(folder: Path) -> Path:
    """Writes a whole DiTPipeline with a small transformer and VAE."""
    write_folder(
        folder / "transformer", diffusers_arrays(random_arrays(dit_shapes())), diffusers_config()
    )
    write_folder(folder / "vae", vae_arrays(), VAE_CONFIG)
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "DiTPipeline",
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "id2label": {"0": "tench, Tinca tinca"},
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the leaves of a parameter tree by path."""
    out: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        out |= flat(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return out


def check_tree(read: Any) -> None:
    """Asserts that the leaves are exactly those of the network, by name and shape."""
    model = build_model(read.family, read.config)
    inputs = {"vae": ((1, 16, 16, 3),), "inception": ((1, 299, 299, 3),)}.get(read.family)
    if inputs is None:
        size = read.config["input_size"]
        inputs = ((1, size, size, 4), (1,))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    if len(shapes) > 1:
        shapes.append(jax.ShapeDtypeStruct((1,), jnp.int32))
    expected = flat(jax.eval_shape(model.init, jax.random.key(0), *shapes)["params"])
    found = flat(read.params)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        assert leaf.shape == expected[path].shape, path
        assert leaf.flags.c_contiguous
