"""A teacher whose cache is as small as its student's: the first and the most recent tokens."""

import pytest
import torch
from small_run import save_hybrid, save_teacher

import linmu_models
from linmu_distill import limited as module
from linmu_distill.data import Processor, generate
from linmu_distill.limited import SINKS, equal_tokens, kept_bytes, limited
from linmu_distill.teacher import load_teacher
from linmu_models.hooks import attention_modules

STUDENT = {"window": [1, 2, 2], "image_window": [1, 2, 2], "text_window": 8, "sink_tokens": 1, "kept_tokens": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_teacher(tmp_path_factory.mktemp("teacher")), "float32")


def _batch(model, tokenizer, side="right"):
    samples = generate("needle", 3, 0, "val", frames=(2, 3))  # 64 and 96 visual tokens: padded
    batch = Processor.from_config(model.config, tokenizer)(samples, padding_side=side)
    return {name: value for name, value in batch.items() if name != "labels"}


def _seen(mask, tokens):
    """(B, 1, L, L) what each query sees: the definition, token by token."""
    seen = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for b, row in enumerate(mask.bool().tolist()):
        real = [i for i, there in enumerate(row) if there]
        for i in range(len(row)):
            earlier = [j for j in real if j <= i]
            sinks = real[: min(SINKS, tokens - 1)]
            kept = [j for j in earlier if j in sinks or j > i - max(tokens - SINKS, 1)]
            seen[b, i, kept or [i]] = True
    return seen[:, None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 5, 20, 60])
def test_it_sees_the_first_and_the_last_tokens(teacher, tokens, side, monkeypatch):
    model, tokenizer = teacher
    batch = _batch(model, tokenizer, side)
    monkeypatch.setattr(module, "_BLOCK", 7)
    with torch.no_grad(), limited(model, tokens):
        found = model(**batch).logits
    mask = _seen(batch["attention_mask"], tokens)

    def masked(attention, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    hooks = [m.register_forward_pre_hook(masked, with_kwargs=True) for m in attention_modules(model).values()]
    with torch.no_grad():
        wanted = model(**batch).logits
    for hook in hooks:
        hook.remove()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        whole = model(**batch).logits
        with limited(model, 1000):
            same = model(**batch).logits
    torch.testing.assert_close(same[real], whole[real], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[real], whole[real], atol=1e-2)


def test_an_answer_sees_what_a_whole_row_would(teacher):
    """Decoding with a cache, with and without padding."""
    model, tokenizer = teacher
    for n in (1, 3):
        batch = {name: value for name, value in _batch(model, tokenizer, "left").items()}
        if n == 1:
            (sample,) = generate("needle", 1, 0, "val", frames=(3, 3))
            batch = Processor.from_config(model.config, tokenizer)([sample], answers=False)
            batch.pop("labels")
        options = dict(
            max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, suppress_tokens=[4, 5, 6, 7]
        )
        with limited(model, 12):
            cached = model.generate(**batch, **options)
            whole = model.generate(**batch, **options, use_cache=False)
        assert torch.equal(cached, whole)


def test_the_teacher_is_itself_again(teacher):
    model, _ = teacher
    before = model.get_decoder().config._attn_implementation
    with limited(model, 3):
        assert model.get_decoder().config._attn_implementation != before
    assert model.get_decoder().config._attn_implementation == before
    assert not any(hasattr(m, "linmu_tokens") for m in attention_modules(model).values())
    with pytest.raises(ValueError, match="limited: tokens must be at least 1, got 0"), limited(model, 0):
        pass


def test_as_many_bytes_as_the_student(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LENGTHS", (64, 128))
    for model, tokenizer in (teacher, load_teacher(save_hybrid(tmp_path / "hybrid"), "float32")):
        student = linmu_models.convert(model, STUDENT).eval()
        tokens = equal_tokens(model, student, tokenizer)
        less, more = (kept_bytes(model, tokenizer, length) for length in (64, 128))
        each = (more - less) // 64
        wanted = kept_bytes(student, tokenizer, 128)
        assert each > 0 and 0 <= wanted - (less + each * (tokens - 64)) < each
        assert kept_bytes(student, tokenizer, 64) == wanted
