"""Prompts to conditions by a pipeline's own text encoders: the only room that needs torch.

torch and transformers (the extra `[text]`) are imported when prompts are embedded, not before.
"""

from qdit_jax.text.embedding import Embedded, check_extra, embed_prompts
from qdit_jax.text.pipelines import PIPELINES, pipeline_of, read_prompts

__all__ = [
    "PIPELINES",
    "Embedded",
    "check_extra",
    "embed_prompts",
    "pipeline_of",
    "read_prompts",
]
