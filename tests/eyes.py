"""Vision encoders and language models of a few thousand random weights, for the tests of what sees and talks."""

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
TOWERS = {  # model type: its configuration
    "clip_vision_model": VIT,
    "siglip_vision_model": VIT,
    "vit": VIT,
    "deit": VIT,  # class token and distilled token
    "dinov2": VIT,
    "dinov2_with_registers": VIT | {"num_register_tokens": 3},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]},
    "convnext": {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "swin": {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}
LLAMA = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SPEAKERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": LLAMA,
    "phi": LLAMA | {"hidden_size": 32, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"hidden_size": 24, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 24},
    "gpt_neox": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


def tower(kind="clip_vision_model", **more):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**TOWERS[kind] | more)
    return AutoModel.from_config(config).eval()


def folder(path):
    """A tiny CLIP with its image processor, as a folder -> its name."""
    from transformers import CLIPImageProcessorPil

    tower().save_pretrained(path)
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size=size, crop_size=size).save_pretrained(path)
    return str(path)


def speaker(kind="llama", words=100):
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](
        **SPEAKERS[kind], vocab_size=words, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def shake(model, spread=0.05):
    """Move every weight, so that none is zero or one and hides a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def talker(folder):
    """A whole LLaVA of tiny parts with the real tokenizer: tokenizer, model in fp32."""
    from tests import llamas
    from utils import pretrained
    from vlm import llava, prompts
    from vlm import tower as towers

    tokenizer, language = pretrained.language_model(llamas.folder(folder))
    prompts.use_template(tokenizer, "chatml")
    # a prompt with 196 places for a photo is longer than 128
    language.config.max_position_embeddings = 512
    vision_tower = towers.VisionTower(tower())
    return tokenizer, llava.build(
        vision_tower, "mlp2x_gelu", shake(language.float(), 0.2), tokenizer
    ).eval()


def shop(photos=40, size=8):
    """Groceries of our own, photo i filled with the value i: the first half to learn from, the second half to be judged
    by; three kinds in two groups, in turns. What a test is shown, it can name."""
    from utils.data import Groceries

    images = (
        torch.arange(photos, dtype=torch.uint8)[:, None, None, None]
        .expand(-1, 3, size, size)
        .contiguous()
    )
    fine = torch.arange(photos) % 3
    coarse = torch.tensor([0, 0, 1])[fine]
    split = ["train" if i < photos // 2 else "test" for i in range(photos)]
    return Groceries(
        images, coarse, fine, split, ["Apple", "Pear"], ["Pink-Lady", "Royal-Gala", "Anjou"]
    )


def seen(vision_tower, images, key=None):
    """In the place of `tower.vision_features`: features (n,4,16) that hold the number of their photo."""
    return images[:, :1, 0, 0].float()[..., None].expand(-1, 4, 16)
