"""The arguments that a training script saved beside its weights, and their meaning for the network.

The user's options override the file's arguments, and these override the table of published sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qdit_convert.pickle_reader import Namespace
from qdit_convert.tensors import listing
from qdit_jax.diffusion import HARMLESS, Setting, check_setting, shown
from qdit_jax.errors import UserError
from qdit_jax.models import published_config

if TYPE_CHECKING:
    from qdit_convert.dit import Sizes

SAYS = "the file's saved arguments say"
# Words that name, alone or joined, a table of a training file that is of the network or its process:
# args, hyper_parameters, model_kwargs, training_config. `vae_config` is of something else.
WORDS = """
args arguments arch architecture backbone cfg config configs denoiser diffusion dit flags hparams
hyper hyperparameters init kwargs model net network opt options opts parameters params settings sit
train training transformer transport
"""
GROUPS = frozenset(WORDS.split())

COUNT = Setting("whole", low=1, high=1_000_000, optional=True)
SIZE = Setting("any", optional=True)
ONLY_WITHOUT = Setting(
    "bool", (False,), optional=True, remedy="such networks are not in this layout of DiT and SiT"
)
ARGUMENTS: dict[str, Setting] = {
    "model": Setting("text", optional=True),
    "num_heads": COUNT,
    "head_dim": COUNT,
    "depth": COUNT,
    "hidden_size": COUNT,
    "patch_size": COUNT,
    "in_channels": COUNT,
    "out_channels": COUNT,
    "mlp_ratio": Setting("number", low=1e-6, optional=True),
    "learn_sigma": Setting("bool", optional=True),
    "num_classes": COUNT,
    "class_dropout_prob": Setting("number", low=0, high=1, optional=True),
    "image_size": SIZE,
    "input_size": SIZE,
    "path_type": Setting("text", optional=True),
    "prediction": Setting("text", optional=True),
    "predict_xstart": Setting("bool", optional=True),
    "noise_schedule": Setting("text", optional=True),
    "diffusion_steps": COUNT,
    "qk_norm": ONLY_WITHOUT,
    "use_qknorm": ONLY_WITHOUT,
    "use_rope": ONLY_WITHOUT,
    "use_swiglu": ONLY_WITHOUT,
    "use_rmsnorm": ONLY_WITHOUT,
    "enc_type": Setting("text", optional=True),
    "encoder_depth": COUNT,
    "proj_coeff": Setting("number", optional=True),
    "cfg_prob": Setting("number", low=0, high=1, optional=True),
}
ALIASES = {
    "num_attention_heads": "num_heads",
    "n_heads": "num_heads",
    "num_layers": "depth",
    "n_layers": "depth",
    "embed_dim": "hidden_size",
    "model_name": "model",
    "n_classes": "num_classes",
    "nb_classes": "num_classes",
    "resolution": "image_size",
    "img_size": "image_size",
    "latent_size": "input_size",
    "heads": "num_heads",
    "n_head": "num_heads",
    "num_head": "num_heads",
    "nhead": "num_heads",
    "attention_head_dim": "head_dim",
    "dim_head": "head_dim",
    "prediction_type": "prediction",
    "pred_type": "prediction",
    "predict": "prediction",
    "objective": "prediction",
    "parameterization": "prediction",
    "parametrization": "prediction",
    "model_output": "prediction",
    "model_mean_type": "prediction",
    "path": "path_type",
    "interpolant": "path_type",
    "beta_schedule": "noise_schedule",
    "num_train_timesteps": "diffusion_steps",
    "num_timesteps": "diffusion_steps",
    "timesteps": "diffusion_steps",
}
# Of data, optimization, logging and evaluation: the network and its process do not depend on them.
WITHOUT_BEARING = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 batch_size betas cfg_scale
checkpointing_steps ckpt ckpt_every clip_grad data_dir data_path device ema_decay epochs
exp_name feature_path fused_attn global_batch_size global_seed grad_clip
gradient_accumulation_steps gpu learning_rate legacy local_rank log_every logging_dir
loss_weight lr max_grad_norm max_steps max_train_steps mixed_precision num_workers output_dir
precision rank report_to results results_dir resume resume_step sample_eps sample_every
sampling_steps save_every seed train_eps vae wandb warmup warmup_steps weight_decay weighting
world_size
"""
ARGUMENTS |= dict.fromkeys(WITHOUT_BEARING.split(), HARMLESS)
VELOCITIES, NOISES = ("velocity", "v"), ("noise", "epsilon", "eps", "pred_noise")
REMEDY = "save the weights alone, without their arguments, if these are of another training"


@dataclass(frozen=True)
class Arguments:
    """A file's arguments: those that are understood, and those that are not.

    Attributes:
        values: by the names of `ARGUMENTS`.
        names: how the file calls them.
        unknown: `name=value` of those that are not understood.
    """

    values: Mapping[str, Any]
    names: Mapping[str, str]
    unknown: tuple[str, ...] = ()

    def get(self, name: str) -> Any:
        """Returns the argument, or None if the file does not have it."""
        return self.values.get(name)


def saved_arguments(saved: Mapping[str, Any]) -> dict[str, object]:
    """Returns the plain settings that a training file holds beside its weights, by dotted names.

    Settings in groups about the network have no group's name. A setting at the top level, beside
    the weights, counts if it is understood.
    """
    found: dict[str, object] = {}
    tables = {key: table for key, table in saved.items() if isinstance(key, str)}
    bare = [(key, value) for key, value in tables.items() if is_used(key) and _is_plain(value)]
    inside = (
        pair
        for key, table in tables.items()
        if is_group(key)
        for pair in _plain(table)
        if spelled(key) != "opt" or is_used(pair[0])  # the optimizer's state often has that name
    )
    for name, value in (*inside, *bare):
        if value is not None and found.get(name) not in (None, value) and is_used(name):
            raise UserError(
                f"{SAYS} {name}={shown(found[name])} and {name}={shown(value)}; {REMEDY}."
            )
        if found.get(name) is None:
            found[name] = value
    return found


def is_group(key: str) -> bool:
    """Returns whether a table of that name holds settings of the network or its process."""
    return all(word in GROUPS for word in spelled(key).split("_"))


def is_used(name: str) -> bool:
    """Returns whether an argument of that name changes the result of a conversion."""
    setting = ARGUMENTS.get(ALIASES.get(spelled(name), spelled(name)))
    return setting is not None and setting.used


def spelled(name: str) -> str:
    """Returns a name as Python spells it: `--Num-Heads` is `num_heads`."""
    return name.lower().lstrip("-").replace("-", "_")


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | tuple)


def _plain(table: object, depth: int = 0) -> Iterator[tuple[str, object]]:
    values = table.values if isinstance(table, Namespace) else table
    if not isinstance(values, dict) or depth > 4:
        return
    for key, value in values.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, dict | Namespace):
            for name, inner in _plain(value, depth + 1):
                yield (name if is_group(key) else f"{key}.{name}"), inner
        elif _is_plain(value):
            yield key, value


def read_arguments(hints: Mapping[str, object]) -> Arguments:
    """Returns the arguments in `hints`, their types checked; those that are None do not count.

    Raises:
        UserError: naming an argument whose value is not understood.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    unknown = []
    for given, value in hints.items():
        name = ALIASES.get(spelled(given), spelled(given))
        if name not in ARGUMENTS:
            unknown.append(f"{given}={shown(value)}")
            continue
        setting = ARGUMENTS[name]
        if value is None or not setting.used:
            continue
        check_setting(SAYS, given, value, setting)
        if name in values and values[name] != value:
            raise UserError(
                f"{SAYS} {names[name]}={values[name]} and {given}={shown(value)}; {REMEDY}."
            )
        values[name], names[name] = value, given
    return Arguments(values, names, tuple(unknown))


def says_sit(arguments: Arguments) -> bool:
    """Returns whether the arguments are of SiT's training (or REPA's), not of DiT's."""
    model = arguments.get("model") or ""
    prediction = arguments.get("prediction")
    is_flow = arguments.get("path_type") is not None or prediction in (*VELOCITIES, "score")
    return model.startswith("SiT") or (is_flow and not model.startswith("DiT"))


def says_repa(arguments: Arguments) -> bool:
    """Returns whether the arguments are of REPA's training, whose time runs from data to noise."""
    given = [arguments.get(name) for name in ("enc_type", "encoder_depth", "proj_coeff")]
    return any(value is not None for value in given) or arguments.get("prediction") == "v"


def check_process(arguments: Arguments, velocity: bool) -> None:
    """Raises `UserError` if the network was trained on a process that is not supported."""
    allowed: dict[str, tuple[Any, ...]] = {
        "prediction": NOISES,
        "path_type": (),
        "predict_xstart": (False,),
        "noise_schedule": ("linear",),
        "diffusion_steps": (1000,),
    }
    remedy = (
        "pass --family sit if it is a SiT; where it is another process of diffusers, give a "
        "DiTPipeline folder, whose scheduler_config.json says it"
    )
    if velocity:
        allowed = {"prediction": VELOCITIES, "path_type": ("Linear", "linear")}
        remedy = "a SiT is sampled from where it predicts the velocity on the linear path"
    for name, known in allowed.items():
        value = arguments.get(name)
        if value is not None and value not in known:
            kinds = " or ".join(shown(v) for v in known) or "none"
            raise UserError(
                f"{SAYS} {arguments.names[name]}={shown(value)}; of a {'SiT' if velocity else 'DiT'}, "
                f"{kinds} is understood: {remedy}; or {REMEDY}."
            )


def check_sizes(arguments: Arguments, sizes: Sizes, model: str | None) -> list[str]:
    """Returns notes on arguments that the user's options override.

    Raises:
        UserError: naming an argument that contradicts the shapes of the weights.
    """
    notes, name = [], arguments.get("model")
    if name is not None:
        said = _published(name)
        found = {
            "depth": sizes.depth,
            "hidden_size": sizes.width,
            "patch_size": sizes.patch_size,
        }
        wrong = said is not None and any(said[key] != value for key, value in found.items())
        if wrong and model is None:
            assert said is not None
            raise UserError(
                f"{SAYS} model={name!r}, which has {said['depth']} blocks of width "
                f"{said['hidden_size']} and patches of {said['patch_size']}, but the weights have "
                f"{sizes.depth} of width {sizes.width} and patches of {sizes.patch_size}; {REMEDY}."
            )
        if model is not None and name != model:
            notes.append(f"{SAYS} model={name!r}; taken as {model}, as asked")
    found = {
        "depth": sizes.depth,
        "hidden_size": sizes.width,
        "patch_size": sizes.patch_size,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "learn_sigma": sizes.out_channels == 2 * sizes.in_channels,
    }
    for key, value in found.items():
        given = arguments.get(key)
        # REPA's and others' networks count their channels without the variance.
        if key == "out_channels" and given == sizes.in_channels:
            continue
        if given is not None and given != value:
            raise UserError(
                f"{SAYS} {arguments.names[key]}={given}, but the weights have {value}; {REMEDY}."
            )
    ratio = arguments.get("mlp_ratio")
    if ratio is not None and int(sizes.width * ratio) != sizes.mlp_width:
        raise UserError(
            f"{SAYS} mlp_ratio={ratio}, but the weights have {sizes.mlp_width} hidden features "
            f"for a width of {sizes.width}; {REMEDY}."
        )
    return notes


def _published(name: str) -> dict[str, int] | None:
    try:
        return published_config(name)
    except ValueError:
        return None


def said_heads(arguments: Arguments, chosen: int | None, width: int) -> int | None:
    """Returns the number of heads that the file gives; None if it has none or `chosen` is given.

    Raises:
        UserError: if the file's model, its number of heads or their width contradict each other.
    """
    name = arguments.get("model")
    said = None if name is None else _published(name)
    if chosen is not None:
        return None
    heads, each = arguments.get("num_heads"), arguments.get("head_dim")
    if each is not None and (width % each or heads not in (None, width // each)):
        also = "" if heads is None else f" and {arguments.names['num_heads']}={heads}"
        raise UserError(
            f"{SAYS} {arguments.names['head_dim']}={each}{also}, which the width {width} of the "
            "weights does not fit; pass --num-heads."
        )
    heads = width // each if each is not None else heads
    if heads is not None and said is not None and said["num_heads"] != heads:
        raise UserError(
            f"{SAYS} num_heads={heads} and model={name!r}, which has {said['num_heads']}; "
            "pass --num-heads."
        )
    return heads


def said_classes(arguments: Arguments, rows: int) -> int | None:
    """Returns the number of classes that the file gives, or None.

    Without class dropout in training, the label table of `rows` rows has no null class.

    Raises:
        UserError: if what it says does not fit the table.
    """
    count, dropout = arguments.get("num_classes"), arguments.get("class_dropout_prob")
    if count is not None and count not in (rows, rows - 1):
        raise UserError(
            f"{SAYS} num_classes={count}, which the label table of {rows} rows does not fit; "
            "pass --num-classes."
        )
    if dropout is None:
        return count
    by_dropout = rows if dropout == 0 else rows - 1
    if count not in (None, by_dropout):
        null = "no null class" if dropout == 0 else "a null class"
        raise UserError(
            f"{SAYS} num_classes={count} and class_dropout_prob={dropout}, that is {null}, "
            f"but the label table has {rows} rows; pass --num-classes."
        )
    return by_dropout


def check_input_size(arguments: Arguments, sizes: Sizes, num_tokens: int) -> None:
    """Raises `UserError` if the file's image size contradicts the number of positions.

    A latent has an eighth of the image's rows with 4 channels; autoencoders with others differ.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        return
    rows = side * sizes.patch_size
    factors = {1: (1, 8), 3: (1, 8), 4: (8,)}.get(sizes.in_channels, (8, 16, 32))
    for name, divisors in (("input_size", (1,)), ("image_size", factors)):
        value = arguments.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if value is None:
            continue
        if not numbers or any(type(n) is not int or n < 1 for n in numbers):
            raise UserError(
                f"{SAYS} {arguments.names[name]}={shown(value)}, which is not a size; {REMEDY}."
            )
        if not any(all(n == rows * divisor for n in numbers) for divisor in divisors):
            raise UserError(
                f"{SAYS} {arguments.names[name]}={shown(value)}, but the weights have {num_tokens} positions: a "
                f"latent of {rows} rows; pass --input-size {rows} to go by the weights."
            )


def unknown_note(arguments: Arguments) -> list[str]:
    """Returns a sentence on the arguments that are not understood, if there are any."""
    if not arguments.unknown:
        return []
    return [f"args not understood and not used: {listing(list(arguments.unknown), 20)}"]
