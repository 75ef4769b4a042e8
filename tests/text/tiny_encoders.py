"""Tiny pipelines on disk: random T5, UMT5 and CLIP, with word-level tokenizers."""

from __future__ import annotations

import json

WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "fox",
    "dog",
    "two",
    "runs",
    "over",
    "hill",
    "and",
    "under",
    "tree",
]


def save_tokenizer(folder, kind):
    """Writes a tokenizer of words: T5's ends with `</s>`, CLIP's has a token at both ends."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"] if kind == "t5" else ["<start>", "<end>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A </s>" if kind == "t5" else "<start> $A <end>"
    ends = [(word, vocabulary[word]) for word in special[:2]]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    names = {"pad_token": special[0], "eos_token": special[1], "unk_token": "<unk>"}
    if kind != "t5":
        names |= {"pad_token": "<end>", "eos_token": "<end>", "bos_token": "<start>"}
    length = 77 if kind != "t5" else 512
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, **names
    ).save_pretrained(folder)


def save_t5(folder, width=16, kind="T5"):
    import torch
    import transformers

    torch.manual_seed(width)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32, d_model=width, d_kv=4, d_ff=24, num_layers=2, num_heads=2
    )
    getattr(transformers, f"{kind}EncoderModel")(config).save_pretrained(folder)


TEMPLATE = (
    "{% for message in messages %}a {{ message['content'] }} and {% endfor %}"
    "{% if add_generation_prompt %}two{% endif %}{% if not enable_thinking %} tree under{% endif %}"
)


def save_qwen(folder, causal):
    """Writes a tiny Qwen3, as FLUX.2 and Z-Image have one, with a chat template beside its words."""
    import torch
    import transformers

    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=28 if causal else 3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    cls = transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model
    cls(config).save_pretrained(folder / "text_encoder")
    save_tokenizer(folder / "tokenizer", "t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")


def save_clip(folder, width, *, projected):
    import torch
    import transformers

    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    getattr(transformers, name)(config).save_pretrained(folder)


def save_pipeline(folder, kind):
    """Writes the folder of a pipeline of class `kind`."""
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    if kind.startswith(("PixArt", "Wan", "Latte")):
        save_tokenizer(folder / "tokenizer", "t5")
        save_t5(folder / "text_encoder", 12, "UMT5" if kind.startswith("Wan") else "T5")
        return folder
    if kind.startswith(("Flux2", "ZImage")):
        save_qwen(folder, causal=kind.startswith("Flux2"))
        return folder
    is_sd3 = kind.startswith("Stable")
    save_tokenizer(folder / "tokenizer", "clip")
    save_clip(folder / "text_encoder", 8, projected=is_sd3)
    if is_sd3:
        save_tokenizer(folder / "tokenizer_2", "clip")
        save_clip(folder / "text_encoder_2", 6, projected=True)
    last = 3 if is_sd3 else 2
    save_tokenizer(folder / f"tokenizer_{last}", "t5")
    save_t5(folder / f"text_encoder_{last}", 20)
    (folder / "transformer").mkdir()
    config = {"joint_attention_dim": 20, "guidance_embeds": True}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    return folder
