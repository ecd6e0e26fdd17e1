"""Build tiny image and audio parts of a base: the tower, the projector, and the processor that
prepares a file for them (the text part: tiny.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtune.core.bases.find import Base, load_tokenizer

_PATCH, _TILE = 4, 2  # side of a patch in pixels; side of a tile in image tokens


def shrink(config: Any, base: Base, folder: Path, sizes: dict[str, int], names: int) -> list[str]:
    """Shrink the tower (the encoder of images or audio) in `config`, and write the processor's
    files to `folder`. Of a base for speech the text part is shrunk as well; of other bases the
    caller shrinks it. Return the tokens to append to the tiny vocabulary, in the order of their
    ids; [] for a base that reads text alone.

    - config: the base's transformers config, which is changed
    - base: the real base, whose processor and tokenizer are read
    - folder: the folder of the tiny base
    - sizes: the sizes of the tower, by their names in a config, such as hidden_size
    - names: how many tokens the vocabulary has already, which is the id of the first one
      appended"""
    if base.kind == "image_text":
        return _images(config, base, folder, sizes, names)
    if base.kind == "speech":
        _speech(config, base, folder, sizes)
        return ["<|startoftranscript|>"]
    return []


def _images(config: Any, base: Base, folder: Path, sizes: dict[str, int], names: int) -> list[str]:
    """Shrink the image encoder (the tower) in `config`, and write the files of its processor to
    `folder`. Return the tokens to append to the tiny vocabulary; the last one stands for part of an
    image in the text.

    - config: the base's transformers config, which is changed
    - base: the real base, whose processor and tokenizer are read
    - folder: the folder of the tiny base
    - sizes: the sizes of the tower, by their names in a config
    - names: how many tokens the vocabulary has already, which is the id of the first one
      appended"""
    vision, scale = config.vision_config, int(getattr(config, "scale_factor", 1))
    for name, value in sizes.items():
        if getattr(vision, name, None) is not None:
            setattr(vision, name, value)
    tile_size = _PATCH * _TILE * scale
    vision.patch_size, vision.image_size = _PATCH, tile_size
    token = str(load_tokenizer(base).convert_ids_to_tokens(int(config.image_token_id)))
    if hasattr(config, "vision_start_token_id"):  # images of any size become one tile
        tile_size *= vision.spatial_merge_size
        vision.embed_dim = sizes["hidden_size"]
        change: dict[str, Any] = {"size": {"shortest_edge": 1, "longest_edge": tile_size**2}}
        change |= {"patch_size": _PATCH}
        half = sizes["hidden_size"] // sizes["num_attention_heads"] // 2  # shared by three axes
        rope = config.get_text_config().rope_parameters
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
        marks = {"vision_start": "<image-start>", "vision_end": "<image-end>", "video": "<video>"}
        more = list(marks.values())
        for number, name in enumerate(marks, names):
            setattr(config, f"{name}_token_id", number)
    elif hasattr(config, "scale_factor"):
        split = getattr(_load("AutoImageProcessor", base), "do_image_splitting", True)
        longest = {"longest_edge": 2 * tile_size if split else tile_size}
        change = {"size": longest, "max_image_size": {"longest_edge": tile_size}}
        tags = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
        more = ["<fake_token_around_image>", "<global-img>", *tags]
    else:
        change = {
            "size": {"shortest_edge": tile_size},
            "crop_size": {"height": tile_size, "width": tile_size},
        }
        if not isinstance(config.vision_feature_layer, int):
            config.vision_feature_layer = -2
        config.vision_feature_layer = max(-2, min(2, config.vision_feature_layer))
        more = ["<image-start>"]
    _load("AutoImageProcessor", base, **change).save_pretrained(folder)
    config.image_token_id = names + len(more)
    return [*more, token]


def _load(name: str, base: Base, **changes: Any) -> Any:
    import transformers

    auto = getattr(transformers, name)
    return auto.from_pretrained(
        base.path, trust_remote_code=False, local_files_only=True, **changes
    )


def _speech(config: Any, base: Base, folder: Path, sizes: dict[str, int]) -> None:
    """Shrink a base for speech, both tower and text part, and write its processor's files. The tiny
    base hears at most one second, however long the real one's window is.

    - config: the base's transformers config, which is changed
    - base: the real base, whose processor is read
    - folder: the folder of the tiny base
    - sizes: the tiny sizes, by their names in a config"""
    extractor = _load("AutoFeatureExtractor", base, chunk_length=1)
    extractor.save_pretrained(folder)
    config.d_model = sizes["hidden_size"]
    config.encoder_ffn_dim = config.decoder_ffn_dim = sizes["intermediate_size"]
    config.encoder_attention_heads = config.decoder_attention_heads = sizes["num_attention_heads"]
    config.encoder_layers = min(2, config.encoder_layers)
    config.decoder_layers = min(sizes["num_hidden_layers"], config.decoder_layers)
    config.max_source_positions = extractor.nb_max_frames // 2
    config.max_target_positions = min(64, config.max_target_positions)
    config.decoder_start_token_id = 1
    config.suppress_tokens = config.begin_suppress_tokens = None
