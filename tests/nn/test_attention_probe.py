"""An attention module with usual projections and another mechanism is refused, as it is asked what it computes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linmu_ops import MMATE, ExactMMATE

hf = pytest.importorskip("transformers")
D, H, P = 32, 4, 8


class Plain(nn.Module):
    """Softmax attention, and what is made of its scores or values in others."""

    def __init__(self, change=""):
        super().__init__()
        self.change, self.num_heads, self.calls = change, H, 0
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, hidden_states, key_value_states=None):
        self.calls += 1
        others = hidden_states if key_value_states is None else key_value_states
        if self.change == "other tokens" and key_value_states is None:
            raise TypeError("'NoneType' object is not subscriptable")
        q = self.q_proj(hidden_states).unflatten(-1, (H, P)).transpose(-3, -2)
        k, v = (p(others).unflatten(-1, (H, P)).transpose(-3, -2) for p in (self.k_proj, self.v_proj))
        if self.change == "cosine":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.change == "linear":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = q @ k.mT if self.change in ("linear", "unscaled") else q @ k.mT * P**-0.5
        if self.change == "decay":
            scores = scores - (torch.arange(scores.shape[-1]) - torch.arange(scores.shape[-2])[:, None]).abs()
        if self.change == "capped":
            scores = 0.1 * (10 * scores).tanh()
        weights = {
            "sigmoid": torch.sigmoid,
            "relu": lambda s: F.relu(s).square(),
            "linear": lambda s: s / s.sum(-1)[..., None],
        }
        weights = weights.get(self.change, lambda s: s.softmax(-1))(scores)
        if self.change == "random":
            weights = F.one_hot(torch.randint(weights.shape[-1], weights.shape[:-1]), weights.shape[-1]).to(v)
        if self.change == "best":
            weights = weights.where(weights >= weights.topk(20, -1).values[..., -1:], 0)
        if self.change == "heads":
            weights = weights.roll(1, -3)
        y = self.o_proj((weights @ v).transpose(-3, -2).flatten(-2))
        return (y + hidden_states if self.change == "residual" else y), weights


@pytest.mark.parametrize("block", [MMATE, ExactMMATE])
@pytest.mark.parametrize(
    "change",
    ["cosine", "linear", "unscaled", "decay", "capped", "sigmoid", "relu", "random", "best", "heads", "residual"],
)
def test_another_mechanism(change, block):
    torch.manual_seed(0)
    with pytest.raises(
        ValueError, match=r"^from_attention: Plain must be softmax attention .* differ by [\d.]+%"
    ) as said:
        block.from_attention(Plain(change))
    assert len(str(said.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_softmax_attention_is_left_as_it_is(dtype):
    attention = Plain().to(dtype).train()
    before = {name: p.clone() for name, p in attention.named_parameters()}
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    from linmu_ops.nn._probe import check_softmax

    block = MMATE.from_attention(attention)
    torch.random.set_rng_state(state)
    weights = {f"{p}_weight": getattr(attention, f"{p}_proj").weight for p in "qkvo"}
    weights |= {f"{p}_bias": getattr(attention, f"{p}_proj").bias for p in "qkvo"} | dict(q_norm=None, k_norm=None)
    check_softmax(attention, weights, block.shape)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert attention.training and attention.calls == 0 and all(m.training for m in attention.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in attention.named_parameters())


def test_what_cannot_be_called_alone_is_not_judged():
    attention = Plain("cosine")
    attention.forward = lambda hidden_states, grid: attention(hidden_states)
    MMATE.from_attention(attention)
    with torch.device("meta"):
        MMATE.from_attention(Plain("cosine"))


def test_keys_of_other_tokens():
    with pytest.raises(ValueError, match=r"must attend to its own tokens, got one that needs key_value_states"):
        MMATE.from_attention(Plain("other tokens"))


def autoformer():
    from transformers.models.autoformer.modeling_autoformer import AutoformerAttention

    return AutoformerAttention(D, H)


def informer():
    from transformers.models.informer.modeling_informer import InformerProbSparseAttention

    return InformerProbSparseAttention(D, H)


def cohere_asr():
    from transformers.models.cohere_asr.modeling_cohere_asr import CohereAsrCrossAttention

    config = hf.AutoConfig.for_model("cohere_asr")
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim = D, H, H, P
    config._attn_implementation = "eager"
    return CohereAsrCrossAttention(config, layer_idx=0)


def deformable_detr():
    from transformers.models.deformable_detr import modeling_deformable_detr as theirs

    config = hf.DeformableDetrConfig(d_model=D, encoder_attention_heads=H, decoder_attention_heads=H)
    return theirs.DeformableDetrMultiscaleDeformableAttention(config, num_heads=H, n_points=2)


def stable_lm(norms=True):
    from transformers.models.stablelm.modeling_stablelm import StableLmAttention

    config = hf.StableLmConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=H, qk_layernorm=norms)
    config._attn_implementation = "eager"
    return StableLmAttention(config, layer_idx=0)


def stable_lm_of_another_power():
    attention = stable_lm(norms=False)
    plain = attention.v_proj.forward
    attention.v_proj.forward = lambda x: plain(x).square()
    return attention


REFUSED = {
    "stable_lm": (stable_lm, "StableLmAttention.q_layernorm must be one norm for all heads, got a list of them"),
    "turns a part": (stable_lm_of_another_power, "StableLmAttention must be softmax attention of its projections"),
    "autoformer": (autoformer, "AutoformerAttention must be softmax attention of its projections"),
    "informer": (informer, "InformerProbSparseAttention must be softmax attention of its projections"),
    "cohere_asr": (cohere_asr, "CohereAsrCrossAttention must attend to its own tokens, .* encoder_hidden_states"),
    "deformable_detr": (deformable_detr, "must have a projection for q, k"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_of_transformers(name):
    make, words = REFUSED[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = make().eval()
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_(std=0.3)
    with pytest.raises(ValueError, match=f"^from_attention: .*{words}") as said:
        MMATE.from_attention(attention)
    assert len(str(said.value).splitlines()) == 1


def test_a_layer_that_does_not_know_its_number():
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    config = hf.GPTNeoConfig(hidden_size=D, num_heads=H, num_layers=1, attention_types=[[["global"], 1]])
    config.attention_dropout = config.resid_dropout = 0.0
    config._attn_implementation = "eager"
    MMATE.from_attention(GPTNeoSelfAttention(config, "global").eval())


def test_rows_of_points():
    """EdgeTAM's takes (B, points, L, D), and is softmax attention."""
    from transformers.models.edgetam.modeling_edgetam import EdgeTamAttention

    config = copy.deepcopy(hf.AutoConfig.for_model("edgetam").mask_decoder_config)
    config.hidden_size, config.num_attention_heads, config.attention_downsample_rate = D, H, 1
    config._attn_implementation = "eager"
    attention = EdgeTamAttention(config).eval()
    MMATE.from_attention(attention)
    attention.scaling = 2 * attention.scaling
    plain = attention.forward
    attention.forward = lambda query, key, value: (2 * plain(query=query, key=key, value=value)[0], None)
    with pytest.raises(ValueError, match="EdgeTamAttention must be softmax attention of its projections"):
        MMATE.from_attention(attention)
