"""Compose a base from SmolLM2 and a vision tower of random features, in SmolVLM's architecture
(Idefics3).

The tower is not trained. It serves machines that cannot reach a model hub. Who has a trained
SmolVLM names its folder in base.model, and does not need this base.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# Sizes in pixels; an image becomes 16 image tokens.
SIDE = 128
PATCH = 16
SCALE = 2
WIDTH = 192
HIDDEN = 768
HEADS = 6
BLOCKS = 2
TOKENS = ("<fake_token_around_image>", "<global-img>", "<image>")
SEED = 0
# Standard deviation of the projector's weights. For an image of noise, the projector's output is
# then as large as word embeddings.
PROJECTOR = 0.0049
PROCESSOR = {
    "image_processor_type": "Idefics3ImageProcessor",
    "do_convert_rgb": True,
    "do_image_splitting": False,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": SIDE},
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": SIDE},
}


def compose(language: Path, into: Path) -> None:
    """Write to `into` a base that reads images: the language model in the folder `language` (a
    Llama model in fp32) with a vision tower of random features."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        language, trust_remote_code=False, local_files_only=True
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, special=True) for token in TOKENS]}
    )
    text = json.loads((language / "config.json").read_text(encoding="utf-8"))
    state = {
        name.replace("model.", "model.text_model.", 1): value
        for name, value in load_file(language / "model.safetensors").items()
    }
    words = state.pop("model.text_model.embed_tokens.weight")
    rows = len(tokenizer) - len(words)
    # The embedding of each new token is the mean of all. It is rounded to a grid, so that the order
    # in which a machine adds up does not change it.
    mean = (words.double().mean(dim=0) * 2**16).round().div(2**16).float()
    state["model.text_model.embed_tokens.weight"] = torch.cat([words, mean.expand(rows, -1)])
    state |= _tower(text["hidden_size"])
    into.mkdir()
    save_file({n: v.contiguous() for n, v in state.items()}, into / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    tokenizer.save_pretrained(into)
    config = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": tokenizer.convert_tokens_to_ids(TOKENS[-1]),
        "pad_token_id": tokenizer.pad_token_id,
        "scale_factor": SCALE,
        "tie_word_embeddings": True,
        "text_config": text | {"vocab_size": len(tokenizer)},
        "vision_config": {
            "model_type": "idefics3_vision",
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_hidden_layers": BLOCKS,
            "num_channels": 3,
            "image_size": SIDE,
            "patch_size": PATCH,
            "layer_norm_eps": 1e-6,
        },
    }
    for name, table in (("config.json", config), ("preprocessor_config.json", PROCESSOR)):
        (into / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    (into / "README.md").write_text("---\nlicense: Apache-2.0\n---\nSmolLM2, random tower.\n")


def _tower(outputs: int) -> dict[str, Any]:
    """Draw the weights of the vision tower and the projector, name -> tensor. They have the same
    bits on every machine, since numpy's random stream is the same everywhere, and each weight is
    rounded to bfloat16. outputs: the width of the language model."""
    import numpy as np
    import torch

    draw = np.random.Generator(np.random.PCG64(SEED))

    def draw_normal(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        values = torch.from_numpy(draw.standard_normal(shape) * deviation)
        return values.to(torch.bfloat16).float()

    tower, made = "model.vision_model", {}

    def linear(name: str, inputs: int, size: int) -> None:
        made[f"{name}.weight"] = draw_normal((size, inputs), 1 / math.sqrt(inputs))
        made[f"{name}.bias"] = torch.zeros(size)

    def norm(name: str) -> None:
        made[f"{name}.weight"], made[f"{name}.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)

    pixels = (3, PATCH, PATCH)
    patches = f"{tower}.embeddings.patch_embedding"
    # Wider than the other weights, so that patches differ.
    made[f"{patches}.weight"] = draw_normal((WIDTH, *pixels), 2 / math.sqrt(math.prod(pixels)))
    made[f"{patches}.bias"] = torch.zeros(WIDTH)
    places = (SIDE // PATCH) ** 2
    made[f"{tower}.embeddings.position_embedding.weight"] = draw_normal((places, WIDTH), 0.02)
    for block in range(BLOCKS):
        at = f"{tower}.encoder.layers.{block}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}.self_attn.{name}", WIDTH, WIDTH)
        norm(f"{at}.layer_norm1")
        linear(f"{at}.mlp.fc1", WIDTH, HIDDEN)
        linear(f"{at}.mlp.fc2", HIDDEN, WIDTH)
        norm(f"{at}.layer_norm2")
    norm(f"{tower}.post_layernorm")
    inputs = WIDTH * SCALE**2
    made["model.connector.modality_projection.proj.weight"] = draw_normal(
        (outputs, inputs), PROJECTOR
    )
    return made
