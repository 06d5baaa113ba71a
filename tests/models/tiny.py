"""Tiny random models of every family, built from their configurations, and hand-made batches for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from linmu_models.adapters.llama4 import with_image_outputs

VOCAB = 320
IMAGE, VIDEO, START, END = 300, 301, 302, 303
SIZES: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
SIGLIP: dict[str, Any] = dict(
    model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=2, image_size=56, patch_size=14, vision_use_head=False,
)  # fmt: skip
Batch = dict[str, Any]


# The default block with windows that the examples do not lie within, so that its scan has something to do.
NARROW = {"text_window": 4, "sink_tokens": 2, "kept_tokens": 2, "window": (2, 2, 2), "image_window": (1, 2, 2)}


def text_ids(n: int, seed: int = 0) -> list[int]:
    """Ordinary tokens."""
    return torch.randint(5, 290, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch(ids: list[int], **rest: Any) -> Batch:
    row = torch.tensor([ids])
    return dict(input_ids=row, attention_mask=torch.ones_like(row), **rest)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Qwen family and those with (T, H, W) grids ---------------------------------------------------------------------


def thw_batch(images: list[tuple[int, int]], videos: list[tuple[int, int, int]], patch: int, stamped: bool) -> Batch:
    """Images (h, w) and videos (t, h, w) in tokens of 2 x 2 patches; `stamped`: text between a video's frames."""
    ids, kinds = text_ids(3), [0] * 3
    for h, w in images:
        ids += [START] + [IMAGE] * (h * w) + [END, *text_ids(2, h)]
        kinds += [0] + [1] * (h * w) + [0] * 3
    for t, h, w in videos:
        frames = [h * w] * t if stamped else [t * h * w]
        for i, n in enumerate(frames):
            ids += [*text_ids(2, i), START] + [VIDEO] * n + [END]
            kinds += [0] * 3 + [2] * n + [0]
    ids += text_ids(4, 9)
    kinds += [0] * 4
    out = batch(ids, mm_token_type_ids=torch.tensor([kinds]))
    volume = 3 * 2 * patch * patch
    if images:
        out["image_grid_thw"] = torch.tensor([[1, 2 * h, 2 * w] for h, w in images])
        out["pixel_values"] = noise(sum(4 * h * w for h, w in images), volume)
    if videos:
        out["video_grid_thw"] = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in videos])
        out["pixel_values_videos"] = noise(sum(4 * t * h * w for t, h, w in videos), volume)
    return out


QWEN_IDS: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END
)


def qwen2_vl() -> Any:
    vision = dict(
        depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2,
    )  # fmt: skip
    config = hf.Qwen2VLConfig(text_config=dict(**SIZES, rope_parameters=MROPE), vision_config=vision, **QWEN_IDS)
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=56, fullatt_block_indexes=[1],
    )  # fmt: skip
    config = hf.Qwen2_5_VLConfig(text_config=dict(**SIZES, rope_parameters=MROPE), vision_config=vision, **QWEN_IDS)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl() -> Any:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    rope = {**MROPE, "mrope_section": [4, 2, 2]}
    text = dict(**SIZES, head_dim=16, rope_parameters=rope)
    config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)
    return hf.Qwen3VLForConditionalGeneration(config)


# Layers of the gated delta rule, and attention with gates.
HYBRID: dict[str, Any] = SIZES | dict(
    num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2, head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    rope_parameters={**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
)


def qwen3_vl_moe() -> Any:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    text = dict(**SIZES, **experts, head_dim=16, rope_parameters={**MROPE, "mrope_section": [4, 2, 2]})
    return hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS)
    )


def qwen3_5(**more: Any) -> Any:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=64,
    )  # fmt: skip
    kind = "Qwen3_5Moe" if more else "Qwen3_5"
    config = getattr(hf, f"{kind}Config")(
        text_config=HYBRID | more, vision_config=vision, tie_word_embeddings=False, **QWEN_IDS
    )
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def qwen3_5_moe() -> Any:
    return qwen3_5(**EXPERTS)


def qwen3_5_text() -> Any:
    return hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**HYBRID))


def glm4v() -> Any:
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=48, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, image_size=56,
    )  # fmt: skip
    text = {**SIZES, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
    rope = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    config = hf.Glm4vConfig(
        text_config=dict(**text, rope_parameters=rope), vision_config=vision, image_token_id=IMAGE,
        video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END, video_start_token_id=304,
        video_end_token_id=305,
    )  # fmt: skip
    return hf.Glm4vForConditionalGeneration(config)


def glm46v(**more: Any) -> Any:
    made = glm4v().config
    kind = "Glm4vMoe" if more else "Glm46V"
    text = {**made.text_config.to_dict(), **more}
    if more:
        text.pop("model_type")
    config = getattr(hf, f"{kind}Config")(
        text_config=text, vision_config={k: v for k, v in made.vision_config.to_dict().items() if k != "model_type"},
        image_token_id=IMAGE, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        video_start_token_id=304, video_end_token_id=305,
    )  # fmt: skip
    return getattr(hf, f"{kind}ForConditionalGeneration")(config)


def glm4v_moe() -> Any:
    return glm46v(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
        n_shared_experts=1, first_k_dense_replace=1,
    )  # fmt: skip


def lfm2_vl() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14,
                  num_patches=64)  # fmt: skip
    text = dict(model_type="lfm2", **SIZES, layer_types=["full_attention", "full_attention", "conv"])
    config = hf.Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32
    )
    return hf.Lfm2VlForConditionalGeneration(config)


def lfm2_vl_batch(images: list[tuple[int, int]]) -> Batch:
    """Images (h, w) in tokens of 2 x 2 patches, each padded to 64 patches."""
    ids = text_ids(2)
    for h, w in images:
        ids += [START] + [IMAGE] * (h * w) + [END]
    longest = 64
    pixels, mask = torch.zeros(len(images), longest, 3 * 14 * 14), torch.zeros(len(images), longest, dtype=torch.long)
    for i, (h, w) in enumerate(images):
        pixels[i, : 4 * h * w], mask[i, : 4 * h * w] = noise(4 * h * w, 3 * 14 * 14, seed=i), 1
    shapes = torch.tensor([[2 * h, 2 * w] for h, w in images])
    return batch(ids + text_ids(4, 9), pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)


def glm4v_batch(images: list[tuple[int, int]], videos: list[tuple[int, int, int]]) -> Batch:
    out = thw_batch(images, videos, 14, True)
    out["input_ids"][out["input_ids"] == VIDEO] = IMAGE
    return out


def video_llama_3() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14)
    config = hf.VideoLlama3Config(
        text_config=dict(model_type="qwen2", **SIZES), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return hf.VideoLlama3ForConditionalGeneration(config)


def video_llama_3_batch(images: list[tuple[int, int]], videos: list[tuple[int, int, int]], prune: int = 0) -> Batch:
    out = thw_batch(images, videos, 14, True)
    out.pop("mm_token_type_ids")
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in out:
            out[pixels] = noise(len(out[pixels]), 3 * 14 * 14)
            out[f"{kind}_merge_sizes"] = torch.full((len(out[f"{kind}_grid_thw"]),), 2)
    if videos:
        kept = torch.ones(sum(t * h * w for t, h, w in videos), dtype=torch.bool)
        kept[1 : 1 + prune] = False
        out["video_compression_mask"] = kept
        dropped = (out["input_ids"] == VIDEO).nonzero()[1 : 1 + prune, 1]
        rest = [i for i in range(out["input_ids"].shape[1]) if i not in dropped.tolist()]
        out["input_ids"], out["attention_mask"] = out["input_ids"][:, rest], out["attention_mask"][:, rest]
    return out


# Square images ----------------------------------------------------------------------------------------------------


def square_batch(images: int, tokens: int, size: int, dims: tuple[int, ...] | None = None, gap: int = 1) -> Batch:
    ids = text_ids(2)
    for i in range(images):
        ids += [IMAGE] * tokens + text_ids(gap, i)
    pixels = noise(*(dims or (images,)), 3, size, size)
    return batch(ids + text_ids(4, 9), pixel_values=pixels)


def llava() -> Any:
    clip = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, image_size=56, patch_size=14, projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=clip, text_config=dict(model_type="llama", **SIZES), image_token_id=IMAGE,
        vision_feature_layer=-1, image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config)


def internvl() -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=[56, 56],
        patch_size=[14, 14],
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=vision, text_config=dict(model_type="qwen2", **SIZES), image_token_id=IMAGE, image_seq_length=4
    )
    return hf.InternVLForConditionalGeneration(config)


def gemma3() -> Any:
    text = {**SIZES, "num_hidden_layers": 3, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = hf.Gemma3Config(
        vision_config=SIGLIP, text_config=dict(**text, layer_types=layers), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(config)


def gemma4(**more: Any) -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, patch_size=4, pooling_kernel_size=2, position_embedding_size=64,
    )  # fmt: skip
    text = SIZES | dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, head_dim=16, global_head_dim=24,
        num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=512, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB, eos_token_id=2,
    )  # fmt: skip
    config = hf.Gemma4Config(
        text_config=text | more, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=306,
        boi_token_id=START, eoi_token_id=END, boa_token_id=304, eoa_token_index=305,
    )  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config)


def gemma4_batch(images: list[tuple[int, int]], videos: list[tuple[int, int, int]]) -> Batch:
    """Images (h, w) and videos (t, h, w) in tokens of 2 x 2 patches, each padded to 64 patches."""
    ids, kinds, rest = text_ids(2), [0] * 2, {}
    frames = [(1, h, w) for h, w in images]
    for name, token, kind, grids in (("", IMAGE, 1, frames), ("_videos", VIDEO, 2, videos)):
        places = torch.full((sum(t for t, _, _ in grids), 64, 2), -1)
        row = 0
        for t, h, w in grids:
            for _ in range(t):
                y, x = torch.meshgrid(torch.arange(2 * h), torch.arange(2 * w), indexing="ij")
                places[row, : 4 * h * w] = torch.stack((x.flatten(), y.flatten()), dim=1)
                ids += [START] + [token] * (h * w) + [END]
                kinds += [0] + [kind] * (h * w) + [0]
                row += 1
        if grids:
            rest[f"pixel_values{name}"] = noise(len(places), 64, 3 * 4 * 4).masked_fill(places[..., :1] < 0, 0)
            rest["video_position_ids" if name else "image_position_ids"] = places
    if videos:
        rest["num_frames_per_video"] = torch.tensor([t for t, _, _ in videos])
    ids, kinds = ids + text_ids(4, 9), kinds + [0] * 4
    return batch(ids, mm_token_type_ids=torch.tensor([kinds]), **rest)


def llama4() -> Any:
    vision = dict(
        hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        pixel_shuffle_ratio=0.5, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32,
    )  # fmt: skip
    text = SIZES | dict(
        num_hidden_layers=4, head_dim=12, intermediate_size_mlp=64, num_local_experts=4, no_rope_layers=[1, 0, 1, 1],
        attention_chunk_size=4096, attn_temperature_tuning=False,
    )  # fmt: skip
    config = hf.Llama4Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )
    model = hf.Llama4ForConditionalGeneration(config)
    with_image_outputs(model)
    return model


def gemma3_batch(images: int) -> Batch:
    out = square_batch(images, 4, 56)
    return {**out, "token_type_ids": (out["input_ids"] == IMAGE).long()}


def paligemma() -> Any:
    config = hf.PaliGemmaConfig(
        vision_config=SIGLIP, text_config=dict(model_type="gemma", **SIZES, head_dim=16), image_token_index=IMAGE,
        projection_dim=48, hidden_size=48,
    )  # fmt: skip
    return hf.PaliGemmaForConditionalGeneration(config)


def paligemma_batch(images: int) -> Batch:
    out = square_batch(images, 16, 56)
    kinds = torch.zeros_like(out["input_ids"])
    kinds[:, -2:] = 1  # what follows the prompt
    return {**out, "token_type_ids": kinds}


def smolvlm() -> Any:
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    config = hf.SmolVLMConfig(
        vision_config=dict(**vision, patch_size=14), text_config=dict(model_type="llama", **SIZES),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return hf.SmolVLMForConditionalGeneration(config)


def smolvlm_batch(rows: int, columns: int) -> Batch:
    """One image in rows x columns tiles of 2 x 2 tokens, the whole of it after them, as the processor writes it."""
    fake, tile = 310, [IMAGE] * 4
    ids = text_ids(3)
    for r in range(rows):
        for c in range(columns):
            ids += [fake, 311 + r * columns + c, *tile]
        ids += [306]
    ids += [306, fake, 307, *tile, fake, *text_ids(4, 9)]
    return batch(ids, pixel_values=noise(1, rows * columns + 1, 3, 56, 56))


# Images of any size ---------------------------------------------------------------------------------------------


def mistral3() -> Any:
    vision = dict(
        model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=112, patch_size=14, head_dim=16,
    )  # fmt: skip
    text = dict(model_type="mistral", **SIZES, head_dim=16, sliding_window=None)
    config = hf.Mistral3Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, spatial_merge_size=2, vision_feature_layer=-1
    )
    return hf.Mistral3ForConditionalGeneration(config)


def mistral3_batch(images: list[tuple[int, int]]) -> Batch:
    ids = text_ids(2)
    for h, w in images:
        ids += ([IMAGE] * w + [304]) * (h - 1) + [IMAGE] * w + [305]
    pixels = torch.zeros(len(images), 3, 28 * max(h for h, _ in images), 28 * max(w for _, w in images))
    for i, (h, w) in enumerate(images):
        pixels[i, :, : 28 * h, : 28 * w] = noise(3, 28 * h, 28 * w, seed=i)
    sizes = torch.tensor([[28 * h, 28 * w] for h, w in images])
    return batch(ids + text_ids(4, 9), pixel_values=pixels, image_sizes=sizes)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def llava_next() -> Any:
    clip = dict(
        model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, image_size=56, patch_size=14, projection_dim=32,
    )  # fmt: skip
    config = hf.LlavaNextConfig(
        vision_config=clip, text_config=dict(model_type="mistral", **SIZES, sliding_window=None),
        image_token_id=IMAGE, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS, image_seq_length=16,
    )  # fmt: skip
    return hf.LlavaNextForConditionalGeneration(config)


def llava_onevision() -> Any:
    config = hf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=dict(model_type="qwen2", **SIZES), image_token_id=IMAGE,
        video_token_id=VIDEO, vision_feature_layer=-1, image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    return hf.LlavaOnevisionForConditionalGeneration(config)


def anyres_batch(model: Any, sizes: list[tuple[int, int]], frames: int = 0) -> Batch:
    """Images of `sizes` (height, width), and a video of `frames`; the model itself says how many tokens they take."""
    ids = text_ids(2)
    rest: Batch = {}
    if sizes:
        image_sizes = torch.tensor(sizes)
        pixels = noise(len(sizes), 5, 3, 56, 56)
        with torch.no_grad():
            features = model.model.get_image_features(pixels, image_sizes).pooler_output
        for f in features:
            ids += [IMAGE] * len(f) + text_ids(1)
        rest |= dict(pixel_values=pixels, image_sizes=image_sizes)
    if frames:
        ids += [VIDEO] * (frames * 4 + 1) + text_ids(1)
        rest |= dict(pixel_values_videos=noise(1, frames, 3, 56, 56))
    return batch(ids + text_ids(4, 9), **rest)


# Text -------------------------------------------------------------------------------------------------------------


def llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True))


def qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES))


def qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=16))


BUILDERS: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (
        qwen2_vl, qwen2_5_vl, qwen3_vl, glm4v, video_llama_3, llava, llava_next, llava_onevision, internvl, smolvlm,
        gemma3, paligemma, mistral3, llama, qwen2, qwen3, qwen3_5, qwen3_5_text, lfm2_vl, gemma4, llama4,
    )
}  # fmt: skip
# Differ from one of these in what a block does not see: tests of a few kinds suffice.
TWINS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (qwen3_5_moe, qwen3_vl_moe, glm46v, glm4v_moe)}
EVERY = BUILDERS | TWINS


@functools.cache
def teacher(family: str) -> Any:
    """A random model in float32; weights large enough for every part to matter. Shared: do not change it."""
    torch.manual_seed(0)
    model = EVERY[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 0.15)
            elif "bias" in name or "norm" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.generation_config.eos_token_id = None  # random models must not stop at random
    model.generation_config.pad_token_id = 0
    return model


def aligned(model: Any) -> Any:
    """The same model, its weights where PyTorch would put them: products are rounded otherwise elsewhere."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def example(family: str, kind: str = "image") -> Batch | None:
    """A batch of one row: kind "image", "images" (two or more), "video", "text"; None where the family has no such."""
    if kind == "text":
        return batch(text_ids(9))
    two = kind == "images"
    if kind == "video":
        videos = {
            "qwen2_vl": lambda: thw_batch([], [(3, 2, 3)], 14, False),
            "qwen2_5_vl": lambda: thw_batch([(2, 2)], [(3, 2, 3)], 14, False),
            "qwen3_vl": lambda: thw_batch([(2, 2)], [(3, 2, 3)], 16, True),
            "qwen3_5": lambda: thw_batch([(2, 2)], [(3, 2, 3)], 16, True),
            "qwen3_vl_moe": lambda: thw_batch([(2, 2)], [(3, 2, 3)], 16, True),
            "glm46v": lambda: glm4v_batch([], [(3, 2, 3)]),
            "glm4v_moe": lambda: glm4v_batch([], [(3, 2, 3)]),
            "qwen3_5_moe": lambda: thw_batch([(2, 2)], [(3, 2, 3)], 16, True),
            "glm4v": lambda: glm4v_batch([], [(3, 2, 3)]),
            "video_llama_3": lambda: video_llama_3_batch([], [(3, 2, 3)]),
            "gemma4": lambda: gemma4_batch([(2, 2)], [(3, 2, 3)]),
            "llava_onevision": lambda: anyres_batch(teacher(family), [], 3),
        }
        return videos[family]() if family in videos else None
    sizes = [(2, 3), (3, 4)] if two else [(2, 3)]
    pixels = [(56, 100), (112, 90)] if two else [(56, 100)]
    images = {
        "qwen2_vl": lambda: thw_batch(sizes, [], 14, False),
        "qwen2_5_vl": lambda: thw_batch(sizes, [], 14, False),
        "qwen3_vl": lambda: thw_batch(sizes, [], 16, False),
        "qwen3_5": lambda: thw_batch(sizes, [], 16, False),
        "qwen3_vl_moe": lambda: thw_batch(sizes, [], 16, False),
        "glm46v": lambda: glm4v_batch(sizes, []),
        "glm4v_moe": lambda: glm4v_batch(sizes, []),
        "lfm2_vl": lambda: lfm2_vl_batch(sizes),
        "qwen3_5_moe": lambda: thw_batch(sizes, [], 16, False),
        "glm4v": lambda: glm4v_batch(sizes, []),
        "video_llama_3": lambda: video_llama_3_batch(sizes, []),
        "llava": lambda: square_batch(len(sizes), 16, 56),
        "llava_next": lambda: anyres_batch(teacher(family), pixels),
        "llava_onevision": lambda: anyres_batch(teacher(family), pixels),
        "internvl": lambda: square_batch(3 if two else 1, 4, 56, gap=0),
        "smolvlm": lambda: smolvlm_batch(2, 3) if two else smolvlm_batch(0, 0),
        "gemma3": lambda: gemma3_batch(len(sizes)),
        "gemma4": lambda: gemma4_batch(sizes, []),
        "llama4": lambda: square_batch(len(sizes), 4, 56),
        "paligemma": lambda: paligemma_batch(len(sizes)),
        "mistral3": lambda: mistral3_batch(sizes),
    }
    return images[family]() if family in images else None


# Examples of a family that make one packed row.
MIXED = {
    "qwen2_vl": ("image", "text", "video"), "qwen2_5_vl": ("video", "image", "text"), "qwen3_vl": ("images", "video"),
    "glm4v": ("video", "text", "text"), "llava": ("text", "image", "images"), "llava_onevision": ("image", "image"),
    "internvl": ("image", "text", "image"), "video_llama_3": ("image", "text", "image"), "mistral3": ("image", "text"),
    "llava_next": ("image", "text"), "qwen3_5": ("image", "text", "video"),
}  # fmt: skip


def longer(row: Batch, ids: torch.Tensor) -> Batch:
    """The same row with `ids`, which go on with text, in the place of its own."""
    more = (0, ids.shape[1] - row["input_ids"].shape[1])
    kinds = {
        k: torch.nn.functional.pad(row[k], more, value=int(row[k][0, -1]))
        for k in ("mm_token_type_ids", "token_type_ids")
        if k in row
    }
    return {
        **row,
        **kinds,
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(row["attention_mask"], more, value=1),
    }


def left_padded(rows: list[Batch]) -> Batch:
    """Rows of different lengths as one batch, padded on the left."""
    longest = max(r["input_ids"].shape[1] for r in rows)
    per_token = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    out: Batch = {}
    for key in {k for r in rows for k in r}:
        values = [r[key] for r in rows if key in r]
        if key in per_token:
            fill = [v.new_zeros(1, longest - v.shape[1]) for v in values]
            values = [torch.cat((f, v), dim=1) for f, v in zip(fill, values, strict=True)]
        elif key == "pixel_values" and values[0].dim() >= 4:
            most = [max(v.shape[d] for v in values) for d in range(values[0].dim())]
            values = [
                torch.nn.functional.pad(v, [p for d in range(v.dim() - 1, 0, -1) for p in (0, most[d] - v.shape[d])])
                for v in values
            ]
        out[key] = torch.cat(values)
    return out
