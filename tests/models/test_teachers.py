"""What a teacher's attention does that a block does not is carried over, or refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as hf

import linmu_models
from linmu_models.teachers import check_teacher
from linmu_ops import LinmuWarning

from . import tiny

CLIP = dict(
    model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    image_size=56, patch_size=14, projection_dim=32,
)  # fmt: skip
SMALL = {"head_dim": 16}


def llava(model_type, **text):
    """A LLaVA, whose decoder may be any of transformers'."""
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=CLIP, text_config=dict(model_type=model_type, **{**tiny.SIZES, **text}),
        image_token_id=tiny.IMAGE, vision_feature_layer=-1, image_seq_length=16,
    )  # fmt: skip
    return randomised(hf.LlavaForConditionalGeneration(config))


def randomised(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 0.15)
            else:
                p.add_(0.1 * torch.randn_like(p))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


CARRIED = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": SMALL, "gemma": SMALL,
    "gemma3_text": SMALL | {"sliding_window": 512}, "granite": {"attention_multiplier": 0.4}, "starcoder2": {},
    "exaone4": {}, "nemotron": {}, "apertus": {}, "seed_oss": {"head_dim": 12, "attention_dropout": 0.0},
    "mixtral": {"num_local_experts": 2}, "ministral": {"head_dim": 12},
    "gemma2": SMALL | {"attn_logit_softcapping": None, "sliding_window": 512},
    "phi3": {},  # one projection to queries, keys and values
    # Layers of the gated delta rule stay; attention has gates.
    "qwen3_next": SMALL | {
        "layer_types": ["linear_attention", "full_attention", "full_attention"], "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", CARRIED)
def test_carried_over(model_type):
    """Scales, norms per head, two rotary bases, biases, sliding windows: a fresh student is its teacher."""
    teacher = llava(model_type, **CARRIED[model_type])
    student = linmu_models.convert(teacher)
    ids = torch.tensor([tiny.text_ids(24)])
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


REFUSED = [
    ("gemma2", SMALL, r"attn_logit_softcapping must be off, .* got 50.0"),
    ("vaultgemma", SMALL, "attn_logit_softcapping must be off"),
    ("olmo", {"clip_qkv": 0.1}, r"clip_qkv must be off, .* got 0.1"),
    ("olmo2", {}, r"q_norm must be of one head, \(12,\), got \(48,\)"),
    ("olmoe", {}, "q_norm must be of one head"),
    ("cohere", {}, "plain rotary embeddings, got outputs that differ"),
    ("glm4", {"head_dim": 12}, "plain rotary embeddings, got outputs that differ"),
    ("helium", {"head_dim": 12}, "plain rotary embeddings, got outputs that differ"),
    ("gpt_oss", SMALL, "GptOssAttention must have no part beside its projections and norms, got sinks"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "layer 1's SmolLM3Attention must be softmax attention"),
    ("llama4_text", {"head_dim": 12, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0, 1]},
     r"attn_temperature_tuning must be off in layer 1, .*keep_attention=\[1\]"),
    ("ministral3", {"head_dim": 12}, "llama_4_scaling_beta must be off"),
    ("deepseek_v3", {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                     "v_head_dim": 8, "n_routed_experts": 4}, "DeepseekV3Attention must have linear maps"),
    ("hunyuan_v1_dense", {"head_dim": 12}, "HunYuanDenseV1Attention must be softmax attention of"),
    ("nanochat", {}, "NanoChatAttention must be softmax attention"),
    ("diffllama", {}, "DiffLlamaAttention must have no part beside .* got lambda_q1"),
]  # fmt: skip


@pytest.mark.parametrize("model_type, text, says", REFUSED, ids=[r[0] for r in REFUSED])
def test_refused(model_type, text, says):
    with pytest.raises(ValueError, match=f"^convert: .*{says}") as caught:
        linmu_models.convert(llava(model_type, **text))
    assert len(str(caught.value).splitlines()) == 1


def test_layers_that_stay_may_do_as_they_like():
    teacher = llava("smollm3", no_rope_layers=[1, 0, 1])
    student = linmu_models.convert(teacher, keep_attention=[1])
    ids = torch.tensor([tiny.text_ids(24)])
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, value", [("attn_logit_softcapping", 3.0), ("clip_qkv", 0.1), ("attn_output_gate", True)]
)
def test_an_option_of_a_known_family(name, value):
    teacher = copy.deepcopy(tiny.teacher("qwen2"))
    setattr(teacher.config, name, value)
    with pytest.raises(ValueError, match=f"the teacher's {name} must be off"):
        linmu_models.convert(teacher)


@pytest.mark.parametrize("change", ["scale of scores", "values", "no rotation", "later tokens"])
def test_an_attention_that_computes_something_else(change, monkeypatch):
    """Whatever it is called, its output tells."""
    teacher = copy.deepcopy(tiny.teacher("qwen2"))
    attention = teacher.model.layers[1].self_attn
    plain = attention.forward
    if change == "later tokens":
        attention.is_causal = False
        says = "must be causal"
    else:
        says = "layer 1's Qwen2Attention must be softmax attention"

        def forward(hidden_states, position_embeddings=None, **kwargs):
            if change == "no rotation":
                position_embeddings = (
                    torch.ones_like(position_embeddings[0]),
                    torch.zeros_like(position_embeddings[1]),
                )
            out, weights = plain(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
            return (2 * out if change == "values" else out), weights

        if change == "scale of scores":
            attention.q_norm = None
            monkeypatch.setattr(attention, "q_proj", Doubled(attention.q_proj))
        attention.forward = forward
    if change == "scale of scores":
        says = "must have linear maps"
    with pytest.raises(ValueError, match=says):
        linmu_models.convert(teacher)


class Doubled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def assert_generate_alike(teacher, student, ids):
    options = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    mask = torch.ones_like(ids)
    theirs, mine = (m.generate(ids, attention_mask=mask, **options) for m in (teacher, student))
    assert torch.equal(theirs.sequences, mine.sequences)
    for a, b in zip(theirs.logits, mine.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_sliding_window_shorter_than_the_blocks(kind, tmp_path):
    """The block's is as short, no first token is in it, and text sees nothing beyond; in prefill and in steps, from
    the teacher and from a folder, and after a calibration."""
    torch.manual_seed(0)
    config, model = {"qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM), "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM)}[
        kind
    ]
    teacher = randomised(model(config(**tiny.SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)))
    ids = torch.tensor([tiny.text_ids(30), tiny.text_ids(30, 1)])
    calibrated = linmu_models.convert(teacher, calibration=[{"input_ids": ids}])
    linmu_models.convert(teacher).save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = teacher(input_ids=ids).logits
        for student in (loaded.eval(), calibrated):
            torch.testing.assert_close(student(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert_generate_alike(teacher, loaded, ids)


def test_text_of_a_model_with_images_keeps_its_sliding_window():
    teacher = llava("mistral", sliding_window=6)
    with pytest.raises(
        ValueError, match=r"^convert: window and image_window must hold at most .* sliding window, 6, got 512$"
    ):
        linmu_models.convert(teacher)
    student = linmu_models.convert(teacher, {"window": (1, 2, 3), "image_window": (1, 2, 2)})
    block = student.get_decoder().layers[0].self_attn
    # Visual tokens see text by the first tokens and by the scan.
    assert (block.config.text_window, block.config.sink_tokens, block.all_near) == (6, 4, True)
    ids = torch.tensor([tiny.text_ids(30), tiny.text_ids(30, 1)])
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, teacher(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert_generate_alike(teacher, student, ids)


def test_a_sliding_window_does_not_part_an_image_whose_tokens_see_each_other():
    teacher = copy.deepcopy(tiny.teacher("gemma3"))
    for part in (
        teacher.config.text_config,
        *teacher.get_decoder().layers,
        *(a.self_attn for a in teacher.get_decoder().layers),
    ):
        if getattr(part, "sliding_window", None):
            part.sliding_window = 64  # of text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = linmu_models.convert(teacher, {"text_window": 64, "sink_tokens": 64})
    batch = tiny.example("gemma3", "image")
    with torch.no_grad():
        torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits, atol=1e-4, rtol=1e-4)


def test_a_longer_sliding_window_is_left_to_the_scan():
    torch.manual_seed(0)
    config = hf.Qwen2Config(**tiny.SIZES, use_sliding_window=True, sliding_window=300, max_window_layers=0)
    student = linmu_models.convert(randomised(hf.Qwen2ForCausalLM(config)))
    block = student.model.layers[0].self_attn
    assert (block.config.text_window, block.config.sink_tokens, block.all_near) == (256, 4, False)


def test_what_a_block_leaves_out_is_said():
    teacher = copy.deepcopy(tiny.teacher("qwen2"))
    teacher.config.attention_dropout = 0.1
    with pytest.warns(LinmuWarning, match="attention_dropout=0.1 is left out"):
        linmu_models.convert(teacher)


def test_a_teacher_all_of_whose_tokens_see_each_other():
    torch.manual_seed(0)
    text = tiny.SIZES | dict(head_dim=16, sliding_window=8, use_bidirectional_attention=True)
    vision = tiny.teacher("gemma3").config.vision_config
    config = hf.Gemma3Config(
        vision_config=vision, text_config=text, mm_tokens_per_image=4, image_token_index=tiny.IMAGE
    )
    with pytest.raises(ValueError, match="must be causal, got one that sees later tokens"):
        linmu_models.convert(randomised(hf.Gemma3ForConditionalGeneration(config)))


def test_the_probe_leaves_no_trace():
    teacher = copy.deepcopy(tiny.teacher("qwen2")).train()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    check_teacher(teacher, [], linmu_models.EXACT, [{}] * 3)
    assert teacher.training and torch.equal(torch.random.get_rng_state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    with torch.device("meta"):
        meta = hf.Qwen2ForCausalLM(hf.Qwen2Config(**tiny.SIZES))
    assert {p.device.type for p in linmu_models.convert(meta).parameters()} == {"meta"}
