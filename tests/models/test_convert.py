"""What `convert` takes, shares and refuses, and what it reports."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import subprocess
import sys

import accelerate
import pytest
import torch

import linmu_models
from linmu_models.report import TransferReport

from . import tiny


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_reports_every_tensor(tmp_path):
    teacher = tiny.teacher("qwen2_5_vl")
    student = linmu_models.convert(teacher, linmu_models.PAPER, keep_attention=[-1])
    report = student.linmu_report
    assert (report.linear_layers, report.kept_layers) == ([0, 1], [2])
    theirs, mine = dict(teacher.named_parameters()), dict(student.named_parameters())
    assert {row.tensor for row in report.rows} == set(mine)
    for row in report.rows:
        assert row.numel == mine[row.tensor].numel()
        assert row.how == ("copied" if row.source else "new")
        if row.source:
            assert torch.equal(mine[row.tensor], theirs[row.source])
    assert {r.source for r in report.rows if r.source} == set(theirs)
    assert report.count("new") < 0.01 * report.count("copied")
    text = str(report)
    assert "windows.q_proj.weight" in text and "self_attn.q_proj.weight" in text and len(text.splitlines()) < 60
    report.save(tmp_path / "report.json")
    assert TransferReport.load(tmp_path / "report.json") == report
    student.save_pretrained(tmp_path)
    assert TransferReport.load(tmp_path / "linmu_report.json") == report


def test_leaves_the_teacher_alone():
    teacher = copy.deepcopy(tiny.teacher("qwen2_5_vl"))
    before, inputs = state(teacher), tiny.example("qwen2_5_vl")
    with torch.no_grad():
        expected = teacher(**inputs).logits
    student = linmu_models.convert(teacher)
    student.train()
    student(**inputs, labels=inputs["input_ids"]).loss.backward()
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1)
        assert torch.equal(teacher(**inputs).logits, expected)
    assert same(state(teacher), before)
    assert teacher.config.model_type == "qwen2_5_vl" and teacher.get_decoder().config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_a_student_can_be_pickled(family):
    """With norms of queries and keys, too: as `torch.save(student)` and processes that are spawned do."""
    student, inputs = linmu_models.convert(tiny.teacher(family), tiny.NARROW), tiny.example(family, "text")
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(student))(**inputs).logits, student(**inputs).logits)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_with_every_layer_kept_it_is_the_teacher(family):
    teacher = tiny.teacher(family)
    student = linmu_models.convert(teacher, keep_attention=range(3))
    rows = tiny.left_padded([tiny.example(family, "images"), tiny.example(family, "image")])
    with torch.no_grad():
        assert torch.equal(student(**rows).logits, teacher(**rows).logits)
    assert torch.equal(student.generate(**rows, max_new_tokens=3), teacher.generate(**rows, max_new_tokens=3))


def test_shares_what_stays_frozen():
    teacher = tiny.teacher("smolvlm")
    student = linmu_models.convert(teacher, share_frozen=True)
    theirs = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        if ".self_attn." in name and "text_model" in name:
            assert p.requires_grad and (name not in theirs or p.data_ptr() != theirs[name].data_ptr())
        else:
            assert not p.requires_grad and p.data_ptr() == theirs[name].data_ptr()
    assert all(p.requires_grad for p in teacher.parameters())
    assert student.linmu_report.count("copied") < student.linmu_report.count("shared")


def test_ties_embeddings_as_the_teacher_does():
    student = linmu_models.convert(tiny.teacher("llama"))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert linmu_models.convert(tiny.teacher("qwen2")).lm_head.weight is not None


def test_options():
    teacher = tiny.teacher("qwen2_5_vl")
    changes = {"window": [4, 2, 2], "z_gate": False}
    student = linmu_models.convert(teacher, changes)
    block = student.get_decoder().layers[1].self_attn
    assert isinstance(block, linmu_models.LinmuAttention) and block.layer_idx == 1
    wanted = dataclasses.replace(linmu_models.EXACT, window=(4, 2, 2), z_gate=False)
    assert block.config == wanted
    assert student.config.linmu["options"]["window"] == (4, 2, 2)
    assert isinstance(student, tiny.hf.Qwen2_5_VLForConditionalGeneration)
    papers = linmu_models.convert(teacher, {"preset": "paper", **changes}).get_decoder().layers[1].self_attn.config
    assert papers == linmu_models.MMATEConfig(window=(4, 2, 2), z_gate=False)
    literal = linmu_models.convert(teacher, linmu_models.LITERAL).get_decoder().layers[1].self_attn
    assert literal.config == linmu_models.LITERAL and literal.scan.scale is None
    glm = linmu_models.convert(tiny.teacher("glm4v")).get_decoder().layers[0].self_attn
    assert glm.shape.interleaved_rotary and not block.shape.interleaved_rotary


@pytest.mark.parametrize("options", [tiny.NARROW, {"preset": "paper"}], ids=["exact", "paper"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_half_precision(family, options):
    teacher = copy.deepcopy(tiny.teacher(family)).to(torch.bfloat16)
    student = linmu_models.convert(teacher, options)
    inputs = tiny.example(family)
    with torch.no_grad():
        logits = student(**inputs).logits
        wide = linmu_models.convert(tiny.teacher(family), options)(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(logits.float(), wide, dim=-1).min() > 0.98
    kept = {n.rpartition(".")[2] for n, p in student.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "dt_bias", "scale"} <= kept
    assert ({"reverse_A_log", "gate", "mix"} <= kept) == ("preset" in options)
    assert student.get_decoder().layers[0].self_attn.windows.q_proj.weight.dtype == torch.bfloat16


def test_meta_device():
    with torch.device("meta"):
        teacher = tiny.BUILDERS["qwen3_vl"]()
    student = linmu_models.convert(teacher)
    assert {p.device.type for p in student.parameters()} == {"meta"}
    real = linmu_models.convert(tiny.teacher("qwen3_vl"))
    assert {n: p.shape for n, p in student.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_device_map(tmp_path):
    tiny.teacher("llava").save_pretrained(tmp_path / "teacher")
    teacher = tiny.hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "teacher", device_map="cpu")
    student, inputs = linmu_models.convert(teacher), tiny.example("llava")
    student.save_pretrained(tmp_path / "student")
    loaded = tiny.hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "student", device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
def test_parts_offloaded_to_disk(tmp_path):
    """A student is brought in layer by layer by accelerate's hooks; a teacher is refused."""
    student, inputs = linmu_models.convert(tiny.teacher("qwen2_5_vl")), tiny.example("qwen2_5_vl")
    student.save_pretrained(tmp_path / "student")
    tiny.teacher("qwen2_5_vl").save_pretrained(tmp_path / "teacher")
    parts = ["model.visual", "lm_head", *(f"model.language_model.{p}" for p in ("embed_tokens", "norm", "rotary_emb"))]
    places = {**dict.fromkeys(parts, "cpu"), **{f"model.language_model.layers.{i}": "cpu" for i in (0, 2)}}
    places["model.language_model.layers.1"] = "disk"
    load = functools.partial(
        tiny.hf.AutoModelForImageTextToText.from_pretrained, device_map=places, offload_folder=tmp_path / "offload"
    )
    loaded = load(tmp_path / "student")
    assert {p.device.type for p in loaded.parameters()} == {"cpu", "meta"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
    assert torch.equal(*(m.generate(**inputs, max_new_tokens=3, do_sample=False) for m in (loaded, student)))
    with pytest.raises(ValueError, match="teacher must be in memory, got parts offloaded to CPU or disk"):
        linmu_models.convert(load(tmp_path / "teacher"))


EVERYTHING = dict(preset="literal", z_gate=True, head_norm=True, text_window=4, image_window=None, window=(2, 2, 2))


@pytest.mark.parametrize("options", [tiny.NARROW, EVERYTHING], ids=["exact", "everything"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_offloaded_whole(family, to, options, tmp_path):
    """Every module with a parameter of its own, under every option, is called as a module: accelerate brings it in."""
    student, inputs = linmu_models.convert(tiny.teacher(family), options), tiny.example(family, "images")
    greedy = dict(max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        expected, tokens = student(**inputs).logits, student.generate(**inputs, **greedy)
        if to == "cpu":
            away = accelerate.cpu_offload(student, execution_device="cpu")
        else:
            away = accelerate.disk_offload(student, tmp_path, execution_device="cpu")
        assert {p.device.type for p in away.parameters()} == {"meta"}
        assert torch.equal(away(**inputs).logits, expected)
        assert torch.equal(away.generate(**inputs, **greedy), tokens)


def test_configuration_alone_builds_the_model():
    config = linmu_models.convert(tiny.teacher("qwen2_5_vl"), {"initial_scale": 3.0}, keep_attention=[1]).config
    torch.manual_seed(0)
    fresh = tiny.hf.AutoModelForImageTextToText.from_config(copy.deepcopy(config))
    blocks = [layer.self_attn for layer in fresh.get_decoder().layers]
    assert [isinstance(b, linmu_models.LinmuAttention) for b in blocks] == [True, False, True]
    scan, windows = blocks[0].scan, blocks[0].windows
    assert windows.q_proj.weight.std() < 0.05 and scan.dt_proj.weight.abs().max() == 0 and (scan.scale == 3).all()
    assert torch.isfinite(fresh(**tiny.example("qwen2_5_vl")).logits).all()


def test_loads_as_remote_code(tmp_path):
    """Every family, in a process that has not imported this package."""
    for family in tiny.BUILDERS:
        inputs, student = tiny.example(family, "text"), linmu_models.convert(tiny.teacher(family))
        student.save_pretrained(tmp_path / family)
        with torch.no_grad():
            saved = {"inputs": inputs, "logits": student(**inputs).logits, "name": type(student).__name__}
        torch.save(saved, tmp_path / family / "expected.pt")
    code = """if True:
        import sys, torch, transformers
        from pathlib import Path
        assert "linmu_models" not in sys.modules
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            saved = torch.load(folder / "expected.pt")
            auto = getattr(transformers, "AutoModel" + saved["name"].rpartition("For")[2].replace(
                "ConditionalGeneration", "ForImageTextToText").replace("CausalLM", "ForCausalLM"))
            model = auto.from_pretrained(folder, trust_remote_code=True)
            with torch.no_grad():
                assert torch.equal(model(**saved["inputs"]).logits, saved["logits"])
        model.save_pretrained(folder / "again")
        assert type(auto.from_pretrained(folder / "again")).__name__ == saved["name"]
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_refuses_what_it_cannot_convert():
    teacher = tiny.teacher("qwen2_5_vl")
    with pytest.raises(TypeError, match="convert: teacher must be a transformers model, got Linear"):
        linmu_models.convert(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must be a Qwen2_5_VLForConditionalGeneration, got Qwen2_5_VLModel"):
        linmu_models.convert(teacher.model)
    bert = tiny.hf.BertModel(
        tiny.hf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"must be one of .*qwen2_5_vl.*, got 'bert'"):
        linmu_models.convert(bert)
    with pytest.raises(ValueError, match=r"options must be among .*, got wibble"):
        linmu_models.convert(teacher, {"wibble": 1})
    with pytest.raises(ValueError, match="preset must be one of exact, paper, literal, got 'none'"):
        linmu_models.convert(teacher, {"preset": "none"})
    with pytest.raises(ValueError, match=r"keep_attention must hold layers in \[-3, 3\), got 3"):
        linmu_models.convert(teacher, keep_attention=[3])
    config = linmu_models.convert(teacher).config
    config.linmu = None
    with pytest.raises(ValueError, match=r"LinmuQwen2_5_VLConfig.linmu must be set, got None"):
        tiny.hf.AutoModelForImageTextToText.from_config(config)
