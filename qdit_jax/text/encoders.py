"""One text encoder of a pipeline's folder: its tokenizer and network, as published pipelines call them.

Dimensions: N prompts, L tokens, C width of a token, P width of a pooled vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qdit_jax.errors import UserError

CLIP_LENGTH = 77


class Encoded(NamedTuple):
    """What an encoder makes of prompts: tokens `[N, L, C]`, mask `[N, L]`, pooled `[N, P]`, P = 0 for none."""

    text: np.ndarray
    mask: np.ndarray
    pooled: np.ndarray


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An encoder of a pipeline, by the names of its folders.

    Attributes:
        tokenizer, encoder: folders below the pipeline's.
        network: name of the class in transformers.
        takes_mask: whether the pipeline passes the attention mask on.
        pooled: the output that is the pooled vector; None for none.
        layers: of the hidden states that are the tokens, side by side; empty for the last, normed output.
        chat: of a model that chats: whether the template that prompts are put in lets it think first;
            None for prompts as they are.
        length: tokens that it always has; None for as many as are asked for.
    """

    tokenizer: str
    encoder: str
    network: str
    takes_mask: bool = False
    pooled: str | None = None
    layers: tuple[int, ...] = ()
    chat: bool | None = None
    length: int | None = None

    def encode(
        self,
        folder: Path,
        prompts: Sequence[str],
        length: int,
        *,
        dtype: str,
        batch_size: int,
        note_fn: Callable[[str], object],
        progress_fn: Callable[..., object],
    ) -> Encoded:
        """Returns the encoder's output for all prompts, padded or cut to `length` tokens.

        `note_fn` is told of every prompt that is cut.

        Raises:
            UserError: if a part cannot be loaded, or an output is not finite.
        """
        import torch

        from qdit_jax.types import Progress  # which loads jax, as this room's import does not

        length = self.length or length
        tokenizer = loaded(folder / self.tokenizer, "AutoTokenizer")
        texts = self.templated(tokenizer, prompts)
        told_of_cuts(tokenizer, prompts, texts, length, self.tokenizer, note_fn)
        network = loaded(folder / self.encoder, self.network, dtype=getattr(torch, dtype)).eval()
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                some = texts[start : start + batch_size]
                parts.append(self.batch(tokenizer, network, some, length))
                progress_fn(Progress(len(some)))
        found = Encoded(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))
        if not np.isfinite(found.text).all():
            raise UserError(
                f"{folder / self.encoder} returns NaN or infinity in {dtype}; use --dtype float32."
            )
        return found

    def templated(self, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
        """Returns the texts that are split into tokens: prompts, as the messages of a user in a chat."""
        if self.chat is None:
            return list(prompts)
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.chat}
        messages = ([{"role": "user", "content": prompt}] for prompt in prompts)
        return [tokenizer.apply_chat_template(one, **options) for one in messages]

    def batch(self, tokenizer: Any, network: Any, texts: list[str], length: int) -> Encoded:
        """Returns the output for one batch."""
        import torch

        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(network.device)
        mask = {"attention_mask": tokens.attention_mask} if self.takes_mask else {}
        out = network(tokens.input_ids, **mask, output_hidden_states=bool(self.layers))
        text = out.last_hidden_state
        if self.layers:
            text = torch.cat([out.hidden_states[layer] for layer in self.layers], dim=-1)
        pooled = np.zeros((len(texts), 0), np.float32)
        if self.pooled is not None:
            pooled = as_numpy(out[self.pooled])
        return Encoded(as_numpy(text), tokens.attention_mask.cpu().numpy().astype(bool), pooled)


def as_numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.float().cpu().numpy())


def loaded(folder: Path, name: str, **options: Any) -> Any:
    """Returns a tokenizer or network of transformers from its folder.

    Raises:
        UserError: if the folder is absent, or cannot be loaded.
    """
    import transformers

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give a diffusers pipeline with its text encoders.")
    try:
        return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} cannot be loaded as {name}: {text} (old tokenizers need sentencepiece, which the "
            "extra has: pip install 'qdit-jax[text]')"
        ) from error


def told_of_cuts(
    tokenizer: Any,
    prompts: Sequence[str],
    texts: Sequence[str],
    length: int,
    name: str,
    note_fn: Callable[[str], object],
) -> None:
    """Says which prompts have more tokens than are kept, as the `texts` that they are put in."""
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
        if count > length:
            note_fn(f"{name}: prompt {i} ({prompt[:40]!r}) is cut from {count} tokens to {length}")
