"""Official VTP checkpoints of several configs, synthesised from the published key list, and what is asked of them: shared by the golden and the live parity tests."""
import json
from pathlib import Path

import torch
from formats import synthetic
from safetensors.torch import save_file

TINY = dict(image_size=32, vision_embed_dim=64, vision_depth=2, vision_num_heads=2, vision_feature_bottleneck=8, text_embed_dim=32, text_depth=2, text_num_heads=2,
            decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
CASES = dict(
    released={}, shared_bottleneck=dict(vision_bottleneck_ae_only=False), no_bottleneck=dict(vision_feature_bottleneck=None), as_wide=dict(vision_feature_bottleneck=64, vision_bottleneck_ae_only=False),
    qk_norm=dict(vision_use_qk_norm=True, decoder_use_qk_norm=True), layer_scale=dict(vision_init_values=1e-5, decoder_init_values=.1),
    mlp=dict(vision_ffn_layer="mlp", decoder_ffn_layer="mlp", vision_mlp_ratio=3.), aligned=dict(vision_ffn_layer="swiglu64", decoder_ffn_layer="swiglu128"), aligned32=dict(vision_ffn_layer="swiglu32", vision_mlp_ratio=3.7778),
    layernorm=dict(vision_norm_layer="layernorm", decoder_norm_layer="rmsnorm"), layernormbf16=dict(vision_norm_layer="layernormbf16", decoder_norm_layer="layernormbf16"),
    pooled=dict(vision_clip_feat="pooled"), pooled_bottleneck=dict(vision_clip_feat="pooled", vision_bottleneck_ae_only=False), sigmoid=dict(init_logit_bias=-10., init_logit_scale=2.3), vector_scale=dict(nonscalar_logit_scale=True, init_logit_bias=-10.),
    text=dict(text_mlp_ratio=2., text_ls_init_value=.1, text_quick_gelu=True, text_proj_bias=True, text_context_length=32), text_last=dict(text_pool_type="last", text_proj_type="none", text_pad_id=3),
    text_first=dict(text_pool_type="first", text_no_causal_mask=True, text_output_tokens=True, text_proj_type="mlp"), text_every=dict(text_pool_type="none"),
    no_text=dict(train_clip=False), no_decoder=dict(train_reconstruction=False), patch8=dict(vision_patch_size=8), mixed=dict(vision_depth=3, vision_num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1))
CHANGES = {name: TINY | change for name, change in CASES.items()}


def dims(change):
    "The dimensions of data/formats/vtp.json for an official config."
    get = lambda name, default: change.get(name, default)
    D, E, W = get("vision_embed_dim", 768), get("decoder_embed_dim", 768), get("text_embed_dim", 768)
    d, clip, rec = get("vision_feature_bottleneck", 64) or D, get("train_clip", True), get("train_reconstruction", True)
    found = dict(D=D, E=E, W=W, d=d, depth=get("vision_depth", 12), h=D // get("vision_num_heads", 12), p=get("vision_patch_size", 16), bottleneck=d != D, T=get("text_context_length", 77), V=get("text_vocab_size", 49408),
                 e_depth=get("decoder_depth", 12) * rec, g=E // get("decoder_num_heads", 12), rec=rec, clip=clip, t_depth=get("text_depth", 12) * clip, M=int(W * get("text_mlp_ratio", 4.)),
                 t_ls=get("text_ls_init_value", None) is not None, c=D if get("vision_bottleneck_ae_only", True) else d)
    for side, to, width, ratio, norm in (("vision", "", D, get("vision_mlp_ratio", 4.), "rmsnorm"), ("decoder", "e_", E, 4., "layernorm")):
        ffn, there = get(f"{side}_ffn_layer", "swiglu"), rec or not to
        hidden, align = int(width * ratio), int(ffn.removeprefix("swiglu") or 8) if ffn != "mlp" else 1
        found |= {"G" if to else "F": hidden if ffn == "mlp" else -(-int(hidden * 2 / 3) // align) * align, f"{to}mlp": ffn == "mlp" and there, f"{to}swiglu": ffn != "mlp" and there,
                  f"{to}ln": get(f"{side}_norm_layer", norm).startswith("layernorm") and there, f"{to}ls": bool(get(f"{side}_init_values", None)) and there, f"{to}qk": get(f"{side}_use_qk_norm", False) and there}
    projected, bias, vector = get("text_proj_type", "linear") != "none" and clip, get("init_logit_bias", None) is not None and clip, get("nonscalar_logit_scale", False)
    found |= dict(proj=projected and not get("text_proj_bias", False), proj_bias=projected and get("text_proj_bias", False), scalar=clip and not vector, vector=clip and vector, bias=bias and not vector, bias_vector=bias and vector)
    return {name: int(value) for name, value in found.items()}


def checkpoint(change, seed=0):
    "Seeded tensors of an official config; RoPE's periods, which are no weights, have their one value."
    tensors = synthetic("vtp", "tiny", seed, **dims(change))
    for name, value in tensors.items():
        if name.endswith("periods"): tensors[name] = 100. ** (2 * torch.arange(len(value), dtype=torch.bfloat16) / (2 * len(value)))
    return tensors


def write(folder, change, seed=0):
    "An official checkpoint in `folder`, as their `save_pretrained` writes it; the folder."
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint(change, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(architectures=["VTPModel"], model_type="vtp", dtype="float32", transformers_version="4.56.0.dev0") | change))
    return folder


def inputs(change, height=48, width=32, dtype=torch.float32):
    "Normalised images (2, 3, H, W), latents (2, d, H/p, W/p) and ids (2, context), by seed."
    generator, patch, context = torch.Generator().manual_seed(1), change.get("vision_patch_size", 16), change.get("text_context_length", 77)
    image = torch.randn(2, 3, height, width, generator=generator)
    z = torch.randn(2, dims(change)["d"], height // patch, width // patch, generator=generator)
    ids = torch.randint(1, 49406, (2, context), generator=generator)
    for row, end in zip(ids, (9, context - 1)): row[end], row[end + 1:] = 49407, 0
    return image.to(dtype), z.to(dtype), ids


def outputs(model, change, height=48, width=32, dtype=torch.float32):
    "What a model (theirs or ours, by the official names) makes of the inputs: {name: tensor}."
    image, z, ids = inputs(change, height, width, dtype)
    with torch.no_grad():
        found = {"latents": model.get_reconstruction_latents(image)}
        if change.get("train_reconstruction", True): found["pixels"] = model.get_latents_decoded_images(z)
        last = model.get_last_layer_feature(image)
        found |= {"cls": last["cls_token"], "patches": last["patch_tokens"], "squeezed": model.get_last_layer_feature(image, use_bottleneck=True)["cls_token"]}
        (first, _), (second, token) = model.get_intermediate_layers_feature(image, n=2, reshape=True, return_class_token=True, norm=False)
        found |= {"block": first, "block_cls": token, "normed": model.get_intermediate_layers_feature(image, n=[0])[0]}
        if change.get("train_clip", True):
            found |= {"image": model.get_clip_image_feature(image), "image_raw": model.get_clip_image_feature(image, normalize=False), "text": model.get_clip_text_feature(ids), "text_raw": model.get_clip_text_feature(ids, normalize=False)}
            if change.get("text_pool_type") != "none": found["logits"] = model.get_clip_logits(image, ids)[0]
    return found


def distance(got, want, name):
    "Relative to the length of `want`; logits, small differences of cosines whose scale is about 1 here, relative to that."
    floor = want.numel() ** .5 if name == "logits" else 0.
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(floor)).item()
