"""Every engine against fp64, one record at a time, on the architectures that people adapt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from fedtune.core.dp import clip
from fedtune.core.training import engines
from fedtune.core.training.engines import EngineName
from fedtune.core.training.engines.one_pass import OnePass

B, L, V, H = 5, 11, 50, 32
COMMON = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Losses = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mean over each record's own tokens, (B,)."""
    each = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    return each.mean(dim=1)


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**COMMON, **sizes, **heads, **more))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=H, n_layer=2, n_head=4, **no_dropout))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2}
    return BertForMaskedLM(BertConfig(**COMMON, **sizes, num_attention_heads=4))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {"encoder_layers": 2, "decoder_layers": 2, "d_model": H}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    lengths = {"max_source_positions": 8, "max_target_positions": 32}
    config = WhisperConfig(
        **COMMON, **layers, **heads, **sizes, **lengths, decoder_start_token_id=1
    )
    return WhisperForConditionalGeneration(config)


def text(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return token_losses(model(input_ids=ids).logits, ids)


def speech(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Sound made of the ids, so that a record is its ids alone."""
    sound = torch.sin(ids[:, :8, None] * torch.arange(1, 17)).to(next(model.parameters()).dtype)
    return token_losses(model(input_features=sound, decoder_input_ids=ids).logits, ids)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Losses, list[str]]] = {
    "llama": (llama, text, ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": (gpt2, text, ["c_attn", "c_proj", "c_fc"]),
    "bert": (bert, text, ["query", "value", "dense"]),
    "whisper": (whisper, speech, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
}


def adapted(model: nn.Module, modules: list[str], train: str = "AB", **more: Any) -> nn.Module:
    """Frozen but for LoRA, whose B is moved away from zero; eval mode."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, **more)
    made: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=draw)
        if train == "B" and "lora_A" in name:
            parameter.requires_grad_(False)
    return made.eval()


def made(family: str, train: str = "AB", **more: Any) -> tuple[nn.Module, Losses]:
    torch.manual_seed(0)
    build, losses, modules = FAMILIES[family]
    return adapted(build(), modules, train, **more), losses


def ids() -> torch.Tensor:
    return torch.randint(3, V, (B, L), generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model: nn.Module, losses: Losses, wanted: EngineName) -> torch.Tensor:
    """(B, d) fp32."""
    engine = engines.choose(wanted, model, trained(model))
    with engine.watching():
        parts = engine(losses(model, ids()))
    assert all(part is not None and len(part) == B for part in parts)
    return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1)


def reference(model: nn.Module, losses: Losses) -> torch.Tensor:
    """(B, d) by plain autograd in fp64, one record at a time."""
    exact, rows = copy.deepcopy(model).double(), []
    for row in range(B):
        loss = losses(exact, ids()[row : row + 1]).sum()
        parts = torch.autograd.grad(loss, trained(exact))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def clipped_sum(rows: torch.Tensor) -> torch.Tensor:
    c = float(rows.double().norm(dim=1).median()) / 2
    return clip.clip(rows, c).sum(dim=0)


def apart(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """How far clipped sum and norms are off, relative."""
    expected = clipped_sum(exact)
    total = float((clipped_sum(found) - expected).norm() / expected.norm())
    norms = found.double().norm(dim=1) / exact.norm(dim=1) - 1
    return total, float(norms.abs().max())


@pytest.mark.parametrize("train", ["AB", "B"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_fp64(family: str, train: str) -> None:
    """The bounds are those of the claim: 1e-5 for the clipped sum, 1e-6 for norms."""
    model, losses = made(family, train)
    exact = reference(model, losses)
    assert engines.choose("auto", model, trained(model)).name == "one-pass"
    for wanted in ("auto", "opacus"):
        total, norms = apart(gradients(model, losses, wanted), exact)
        assert total < 1e-5 and norms < 1e-6, (wanted, total, norms)


def test_a_loss_centred_over_the_batch_is_not_equal_to_fp64() -> None:
    """The twin: what looks at the other records is far outside of these bounds."""
    model, losses = made("llama")

    def centred(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        each = losses(model, ids)
        return (each - each.mean()) ** 2

    total, norms = apart(gradients(model, centred, "auto"), reference(model, losses))
    assert total > 0.1 and norms > 0.01


def test_a_bf16_base_is_equal_to_opacus_and_as_near_to_fp64_as_it() -> None:
    model, losses = made("llama")
    model.base_model.model.to(torch.bfloat16)  # type: ignore[union-attr, operator]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    ours, theirs = (gradients(model, losses, wanted) for wanted in ("auto", "opacus"))
    assert ours.dtype == torch.float32
    exact = reference(model, losses)
    # Both round activations to 8 bits, not at the same places.
    assert apart(ours, exact)[0] < 2 * apart(theirs, exact)[0] < 0.05


def test_activation_checkpointing_changes_no_gradient() -> None:
    """Recomputed in the backward pass, where hooks come too late: Opacus gives nothing there."""
    model, losses = made("llama", "B")
    before = gradients(model, losses, "auto")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    recomputed = 0
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training, recomputed = True, recomputed + 1
    assert recomputed
    assert torch.allclose(gradients(model, losses, "auto"), before, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_an_adapter_that_takes_no_part_gives_no_gradient(how: str) -> None:
    """None, which the caller refuses: never zeros, and never the gradient of another model."""
    model, losses = made("llama")
    engine = OnePass(model, trained(model))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for layer in layers[:2]:
        layer.enable_adapters(False) if how == "disabled" else layer.merge()  # type: ignore[operator]
        for parameter in layer.parameters():
            parameter.requires_grad_("lora" in str(parameter.shape))
    with engine.watching():
        parts = engine(losses(model, ids()))
    assert sum(part is None for part in parts) == 4
    assert all(len(part) == B for part in parts if part is not None)


def test_layers_to_save_are_served() -> None:
    model, losses = made("llama", modules_to_save=["lm_head"])
    engine = OnePass(model, trained(model))
    assert not engine.missing
    total, norms = apart(gradients(model, losses, "auto"), reference(model, losses))
    assert total < 1e-5 and norms < 1e-6


def test_a_layer_used_twice_adds_up() -> None:
    model, losses = made("llama")
    model.base_model.model.model.layers[1] = model.base_model.model.model.layers[0]  # type: ignore
    exact = reference(model, losses)
    total, norms = apart(gradients(model, losses, "auto"), exact)
    assert total < 1e-5 and norms < 1e-6


@pytest.mark.filterwarnings("ignore:.*lora_bias:UserWarning")
@pytest.mark.parametrize("kind", [{"lora_dropout": 0.1}, {"lora_bias": True}])
def test_an_adapter_of_another_make_is_taken_factor_by_factor(kind: dict[str, Any]) -> None:
    model, losses = made("llama", **kind)
    assert engines.choose("auto", model, trained(model)).name == "one-pass"
    total, norms = apart(gradients(model, losses, "auto"), reference(model, losses))
    assert total < 1e-5 and norms < 1e-6


@pytest.mark.parametrize("kind", ["dora", "embedding"])
def test_what_does_not_fit_goes_to_opacus(kind: str) -> None:
    model, _ = made("llama", use_dora=kind == "dora")
    if kind == "embedding":
        model.get_input_embeddings().requires_grad_()  # type: ignore[operator]
    assert engines.choose("auto", model, trained(model)).name == "opacus"


def test_nothing_is_left_on_the_model() -> None:
    model, losses = made("llama")
    before = {name: getattr(m, "forward", None) for name, m in model.named_modules()}
    engine = OnePass(model, trained(model))
    with pytest.raises(KeyboardInterrupt), engine.watching():
        torch.autograd.backward(losses(model, ids()).sum())
        kept = list(engine._mine.gradients.values())
        raise KeyboardInterrupt
    assert kept and not any(each.any() for each in kept)
    assert not engine._mine.gradients
    assert all("forward" not in vars(m) for m in model.modules())
    assert {name: getattr(m, "forward", None) for name, m in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())


def test_the_sum_over_the_batch_is_autograds_own() -> None:
    model, losses = made("whisper")
    ours = gradients(model, losses, "auto").double().sum(dim=0)
    plain = torch.autograd.grad(losses(model, ids()).sum(), trained(model))
    expected = torch.cat([part.flatten() for part in plain]).double()
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
