"""Tiny random models of many architectures, with weights large enough to show mistakes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn
from transformers import PreTrainedModel

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
MIXED = ["sliding_attention", "full_attention"]
TOKENS = {k: SMALL[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
IMAGE = {k: SMALL[k] for k in SMALL if k.startswith(("hid", "int", "num"))} | {
    "image_size": 16,
    "patch_size": 8,
}
TEXT = SMALL | {"max_position_embeddings": 64}
MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
BAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "attn_layer_indices": [1],
}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


def _llava() -> PreTrainedModel:
    vision = hf.CLIPVisionConfig(**IMAGE)
    text = hf.LlamaConfig(**GROUPED)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=98, vision_feature_layer=-1
        )
    )


def _smolvlm() -> PreTrainedModel:
    vision, text = IMAGE | {"model_type": "smolvlm_vision"}, GROUPED | {"model_type": "llama"}
    config = hf.SmolVLMConfig(
        vision_config=vision, text_config=text, image_token_id=98, scale_factor=2, pad_token_id=0
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _t5() -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, vocab_size=99, decoder_start_token_id=0)
    )


def _bart() -> PreTrainedModel:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            **sides, **TOKENS, d_model=32, max_position_embeddings=64, forced_eos_token_id=None
        )
    )


def _whisper() -> PreTrainedModel:
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **sides,
            **TOKENS,
            d_model=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=40,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


#: name -> how to build it, number of its attention layers.
ZOO: dict[str, tuple[Callable[[], PreTrainedModel], int]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), 2),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)), 2),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, layer_types=MIXED)
        ),
        2,
    ),
    "mistral": (lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8)), 2),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)), 2),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        ),
        2,
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
        2,
    ),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL)), 2),
    "falcon": (lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL)), 2),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4)),
        2,
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
        2,
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=8)),
        2,
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(
                **GROUPED,
                head_dim=8,
                sliding_window=8,
                layer_types=MIXED,
                query_pre_attn_scalar=8,
                attn_logit_softcapping=1.0,
            )
        ),
        2,
    ),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(
                **GROUPED,
                head_dim=8,
                sliding_window=8,
                layer_types=MIXED,
                num_local_experts=4,
                num_experts_per_tok=2,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            )
        ),
        2,
    ),
    "llama4": (
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                **GROUPED,
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=2,
                attention_chunk_size=6,
                layer_types=["chunked_attention", "full_attention"],
            )
        ),
        2,
    ),
    "bert": (lambda: hf.BertModel(hf.BertConfig(**SMALL)), 2),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(
            hf.ModernBertConfig(
                **SMALL, layer_types=MIXED, local_attention=8, cls_token_id=1, sep_token_id=2
            )
        ),
        2,
    ),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL)), 2),
    "distilbert": (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=99, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        ),
        2,
    ),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)), 2),
    "clip": (
        lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE)),
        4,
    ),
    "siglip": (
        lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=IMAGE)),
        5,  # the pooling head too
    ),
    "t5": (_t5, 6),
    "bart": (_bart, 6),
    "whisper": (_whisper, 6),
    "llava": (_llava, 4),
    "smolvlm": (_smolvlm, 4),
    "mamba2": (
        lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(**TOKENS, **MAMBA, hidden_size=32, num_hidden_layers=1, expand=2)
        ),
        0,
    ),
    "bamba": (lambda: hf.BambaForCausalLM(hf.BambaConfig(**GROUPED, **BAMBA)), 1),
    "jamba": (lambda: hf.JambaForCausalLM(hf.JambaConfig(**GROUPED, **JAMBA)), 1),
}


def build(name: str) -> PreTrainedModel:
    """The model in eval mode with fixed random weights."""
    torch.manual_seed(0)
    model = ZOO[name][0]().eval()
    loud(model)
    return model


def loud(model: nn.Module) -> None:
    """Weights such that activations, attention logits and outputs have a spread of about 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() >= 2 and "A_log" not in name:
                fan = weight.shape[-1] if "experts" in name else weight[0].numel()
                weight.copy_(noise * 1.1 / fan**0.5)
            elif weight.dim() == 1 and name.rpartition(".")[2] in ("weight", "bias", "sinks"):
                weight.add_(noise * 0.1)
