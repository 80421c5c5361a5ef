"""Our vision transformers' weights, or gradients, under the names of transformers."""

NAMES = {
    "cls": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "embed.projection.weight": "embeddings.patch_embeddings.projection.weight",
    "embed.projection.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
PARTS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention.out": "attention.o_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
DECODER = {
    "mask_token": "decoder.mask_token",
    "decoder_position": "decoder.decoder_pos_embed",
    "to_decoder.weight": "decoder.decoder_embed.weight",
    "to_decoder.bias": "decoder.decoder_embed.bias",
    "decoder_norm.weight": "decoder.decoder_norm.weight",
    "decoder_norm.bias": "decoder.decoder_norm.bias",
    "to_pixels.weight": "decoder.decoder_pred.weight",
    "to_pixels.bias": "decoder.decoder_pred.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}


def theirs(tensors):
    """{our name: tensor} -> {their name: tensor}; queries, keys and values are one matrix here and three there."""
    found = {}
    for name, x in tensors.items():
        if name in NAMES:
            found[f"vit.{NAMES[name]}"] = x
        elif name in DECODER:
            found[DECODER[name]] = x
        else:
            kind, number, rest = name.split(".", 2)
            place = f"{'vit.layers' if kind == 'blocks' else 'decoder.decoder_layers'}.{number}"
            part, leaf = rest.rsplit(".", 1)
            if part == "attention.qkv":
                for letter, piece in zip("qkv", x.chunk(3)):
                    found[f"{place}.attention.{letter}_proj.{leaf}"] = piece
            else:
                found[f"{place}.{PARTS[part]}.{leaf}"] = x
    return found


def shake(model, spread=0.05):
    """Move every weight, so that none is zero or one and hides a mistake."""
    import torch

    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model
