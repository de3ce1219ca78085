"""A release of RAE in small whose numbers depend on all that its code decides, and an image: shared by the golden and the live parity tests.

Matrices are large, so that queries and keys are no equals; class token and registers are tiny, so that a norm's eps matters; gains, shifts, pixel means and statistics are uneven."""
import json

import torch
from formats import synthetic
from safetensors.torch import save_file

from vtp.tokenizers.frozen import RAEDecoderConfig
from vtp.tokenizers.released_rae import RAERelease

SIZE = RAEDecoderConfig(24, 2, 2, 40, patch=4)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CONFIG = dict(architectures=["Dinov2WithRegistersModel"], model_type="dinov2_with_registers", hidden_size=32, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, patch_size=7, image_size=42, num_register_tokens=4,
              layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True, use_swiglu_ffn=False)


def image():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def write(folder, positions):
    "The files of the release, with these positions (1, 17, 24) of the decoder's tokens, in `folder`; the release."
    encoder, decoder = synthetic("dinov2_registers", seed=3, std=0.2), synthetic("rae_decoder", seed=1, std=0.2)
    encoder["embeddings.register_tokens"] *= 0.002
    decoder["trainable_cls_token"] *= 0.002
    decoder["decoder_pos_embed"] = positions
    found = synthetic("rae_statistics", seed=2, std=1.0)
    (folder / "encoder").mkdir()
    save_file(encoder, folder / "encoder/model.safetensors", {"format": "pt"})
    (folder / "encoder/config.json").write_text(json.dumps(CONFIG))
    (folder / "encoder/preprocessor_config.json").write_text(json.dumps({"image_processor_type": "BitImageProcessor", "image_mean": MEAN, "image_std": STD}))
    torch.save(decoder, folder / "model.pt")
    torch.save({"mean": found["mean"], "var": found["var"].square()}, folder / "stat.pt")
    return RAERelease(str(folder), decoder="model.pt", statistics="stat.pt", encoder=str(folder / "encoder"), size=SIZE, image_size=16)


def numbers(positions, tokens, z, decoded):
    "What is stored of the positions (17, 24), the tokens (2, 16, 32), the latents (2, 32, 4, 4) and the image decoded from them (2, 3, 16, 16)."
    return dict(positions=positions[1::5], tokens=tokens[:, ::3, ::4], z=z[:, ::5, ::3], decoded=decoded[:, :, 1::3, ::3])
