"""What a student is loaded from: weights that must not be touched, quantised or elsewhere, and a configuration that
may hold anything."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import linmu_models
from linmu_models import ExactConfig
from linmu_ops.exact_step import NO_LIMIT

from . import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student to which what is far counts, up to a limit."""
    folder = tmp_path_factory.mktemp("student")
    student = linmu_models.convert(tiny.teacher("qwen2"), tiny.NARROW)
    for layer in student.model.layers:
        nn.init.constant_(layer.self_attn.share.bias, 10.0)
        layer.self_attn.far_limit.fill_(1)
    student.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logits(folder):
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(folder)(**tiny.example("qwen2", "text")).logits


class ReadOnly(torch.Tensor):
    """Packed weights: no operation of theirs is implemented, as of a quantised tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("__get__", "detach"):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(function)


@pytest.mark.parametrize("options", [{}, {"preset": "paper", "z_gate": True}])
def test_what_is_loaded_is_never_written_to(options):
    """Of a block that is loaded in part, the rest begins as it does in a new one."""
    student = linmu_models.convert(tiny.teacher("qwen2"), options)
    block = student.model.layers[0].self_attn
    missing = {"scan.dt_bias", "scan.scale", "scan.gate" if options else "share.bias"}
    begun = {name: p.detach().clone() for name, p in block.named_parameters() if name in missing}
    assert begun.keys() == missing
    kept = {}
    limits = dict(student.named_buffers())
    limits = {name: limit.fill_(5) for name, limit in limits.items() if name.endswith("far_limit")}
    for limit in limits.values():
        limit._is_hf_initialized = True
    for name, parameter in student.named_parameters():
        parameter._is_hf_initialized = not any(name == f"model.layers.0.self_attn.{m}" for m in missing)
        if not parameter._is_hf_initialized:
            nn.init.constant_(parameter, 7.0)
        elif name.endswith("o_proj.weight"):
            module = student.get_submodule(name.rpartition(".")[0])
            packed = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
            packed.data = packed.data.as_subclass(ReadOnly)
            packed._is_hf_initialized = True
            module._parameters["weight"] = packed
        kept[name] = student.get_parameter(name)
    values = {n: p.detach().clone() for n, p in kept.items() if p.is_floating_point()}
    for module in student.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    student.initialize_weights()
    assert all(student.get_parameter(name) is parameter for name, parameter in kept.items())
    assert all(student.get_buffer(name) is limit and limit == 5 for name, limit in limits.items())
    for name, value in values.items():
        short = name.removeprefix("model.layers.0.self_attn.")
        expected = begun.get(short, value) if name.startswith("model.layers.0.self_attn.") else value
        assert torch.equal(student.get_parameter(name), expected), name


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=str)
def test_a_student_that_was_saved_before_there_was_a_limit_has_none(folder, options, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("far_limit")}
    assert len(old) < len(weights)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, found = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not found["missing_keys"]
    assert all(layer.self_attn.far_limit == NO_LIMIT for layer in model.model.layers)
    text = dict(input_ids=torch.tensor([tiny.text_ids(60)]))
    with torch.no_grad():
        logits = hf.AutoModelForCausalLM.from_pretrained(folder)(**text).logits
        assert not torch.allclose(model(**text).logits, logits, atol=1e-4)
        for layer in model.model.layers:
            layer.self_attn.far_limit.fill_(1)
        assert torch.equal(model(**text).logits, logits)


@pytest.mark.parametrize(
    "options",
    [{"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False}],
    ids=str,
)
def test_ways_of_loading(folder, logits, options):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        assert torch.equal(model(**tiny.example("qwen2", "text")).logits, logits)


ON_DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
}  # fmt: skip


def test_parts_on_disk(folder, logits, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=ON_DISK, offload_folder=tmp_path)
    assert all(layer.self_attn.far_limit == 1 for layer in model.model.layers)
    with torch.no_grad():
        assert torch.equal(model(**tiny.example("qwen2", "text")).logits, logits)


@pytest.mark.parametrize("options", [tiny.NARROW, {"preset": "paper"}], ids=["exact", "paper"])
def test_parts_on_disk_in_half_precision(options, tmp_path):
    """What needs float32 is float32 there too."""
    linmu_models.convert(tiny.teacher("qwen2"), options).to(torch.bfloat16).save_pretrained(tmp_path / "student")
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "student", device_map=ON_DISK, offload_folder=tmp_path / "offload"
    )
    kinds = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == kinds
    assert {torch.float32, torch.bfloat16} == set(kinds.values())
    example = tiny.example("qwen2", "text")
    with torch.no_grad():
        assert torch.equal(model(**example).logits, plain(**example).logits)


def test_on_the_meta_device(folder):
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_torchao(folder, logits):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    options = {"device_map": "cpu", "quantization_config": hf.TorchAoConfig(Int8WeightOnlyConfig())}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model.model.layers[0].self_attn.o_proj.weight.data) is not torch.Tensor
    with torch.no_grad():
        error = (model(**tiny.example("qwen2", "text")).logits - logits).norm() / logits.norm()
    assert error < 0.05


def test_bitsandbytes_8_bit(folder, logits):
    pytest.importorskip("bitsandbytes")
    options = {"device_map": "cpu", "quantization_config": hf.BitsAndBytesConfig(load_in_8bit=True)}
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **options)
    with torch.no_grad():
        error = (model(**tiny.example("qwen2", "text")).logits - logits).norm() / logits.norm()
    assert error < 0.1


@pytest.mark.parametrize("preset", ["exact", "paper", "literal"])
def test_bitsandbytes_4_bit(preset, tmp_path):
    """Of sizes that a kernel of 4 bits takes, as real teachers have them; a map per head is not of such a size."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = tiny.SIZES | dict(hidden_size=128, num_attention_heads=4, num_hidden_layers=1)
    torch.manual_seed(0)
    student = linmu_models.convert(hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes)), {"preset": preset}).eval()
    student.save_pretrained(tmp_path)
    options = {"device_map": "cpu", "quantization_config": hf.BitsAndBytesConfig(load_in_4bit=True)}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    block = model.model.layers[0].self_attn
    quantised = {n for n, m in block.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {f"windows.{p}_proj" for p in "qkv"} <= quantised and any(n.startswith("scan.") for n in quantised)
    assert not any(block.get_submodule(n).out_features < 32 for n in quantised)
    text = tiny.example("qwen2", "text")
    with torch.no_grad():
        want = student(**text).logits
        error = (model(**text).logits - want).norm() / want.norm()
    assert error < 0.3
    assert model.generate(**text, max_new_tokens=3, do_sample=False).shape[1] == text["input_ids"].shape[1] + 3


def load_with(folder, tmp_path, linmu):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "linmu": linmu}))
    return hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(tmp_path))


WRONG = [
    ("exact", "linmu must be a dict, got 'exact'"),
    ([1], r"linmu must be a dict, got \[1\]"),
    (7, "linmu must be a dict, got 7"),
    ({}, "linmu must be set"),
    ({"format": "1"}, "format must be a number >= 1, got '1'"),
    ({"format": 0}, "format must be a number >= 1, got 0"),
    ({"format": True}, "format must be a number >= 1, got True"),
    ({"format": 99}, "format must be 3, got 99; update linmu"),
    ({"format": 1, "mmate": {}, "keep_attention": []}, "format must be 3, got 1; convert the teacher again"),
    ({"format": 2, "block": "ExactMMATE"}, "format must be 3, got 2; convert .* ExactMMATE became another block"),
    ({"options": {}, "wibble": 1}, "fields must be among format, block, options, keep_attention, facts, got wibble"),
    ({"options": "paper"}, "options must be a dict, got 'paper'"),
    ({"block": "paper"}, "block must be one of MMATE, ExactMMATE, got 'paper'"),
    ({"block": []}, r"block must be one of MMATE, ExactMMATE, got \[\]"),
    ({"options": None}, "options must be a dict, got None"),
    ({"options": {"wibble": 1}}, "options must be among .* got wibble"),
    ({"options": {"text_window": 10**12}}, r"text_window must be in \[1, 1048576\], got 1000000000000"),
    ({"options": {"text_window": -1}}, "text_window must be in .* got -1"),
    ({"options": {"text_window": "4"}}, "text_window must be of type int, got '4'"),
    ({"options": {"sink_tokens": 10**12}}, "sink_tokens must be in "),
    ({"options": {"window": [10**12, 1, 1]}}, "window must be three sizes in"),
    ({"options": {"window": [4, 4]}}, "window must be of type"),
    ({"options": {"window": None}}, "window must be of type"),
    ({"options": {"image_window": [0, 1, 1]}}, "image_window must be three sizes in"),
    ({"options": {"feature_dim": 10**12}}, r"feature_dim must be in \[0, "),
    ({"options": {"initial_scale": float("nan")}}, r"initial_scale must be in \[0.0001, 10000.0\], got nan"),
    ({"block": "MMATE", "options": {"branches": "none"}}, "branches must be one of both, flex, swin, got 'none'"),
    ({"options": {"initial_decay": [0.5]}}, "initial_decay must be of type"),
    ({"keep_attention": [99]}, r"keep_attention must hold layers in \[0, 3\), got 99"),
    ({"keep_attention": [-1]}, "keep_attention must hold layers"),
    ({"keep_attention": ["1"]}, "keep_attention must hold layers .* got '1'"),
    ({"keep_attention": [True]}, "keep_attention must hold layers .* got True"),
    ({"keep_attention": [1.0]}, "keep_attention must hold layers .* got 1.0"),
    ({"keep_attention": "all"}, "keep_attention must hold layers .* got 'all'"),
    ({"keep_attention": 1}, "keep_attention must hold layers .* got 1"),
    ({"keep_attention": None}, "keep_attention must hold layers .* got None"),
    ({"keep_attention": {"1": 2}}, "keep_attention must hold layers"),
    ({"facts": []}, r"facts must be a dict of interleaved_rotary, unrotated, together, got \[\]"),
    ({"facts": {"wibble": 1}}, "facts must be a dict of .* got {'wibble': 1}"),
    ({"facts": {"interleaved_rotary": 1}}, "interleaved_rotary must be a bool, got 1"),
    ({"facts": {"unrotated": [3]}}, r"unrotated must hold layers in \[0, 3\), got \[3\]"),
    ({"facts": {"together": 1}}, "together must hold layers in .* got 1"),
]  # fmt: skip


@pytest.mark.parametrize("linmu, says", WRONG, ids=lambda x: json.dumps(x)[:50])
def test_a_wrong_configuration_is_one_line(folder, tmp_path, linmu, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_with(folder, tmp_path, linmu)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("linmu, says", [w for w in WRONG if isinstance(w[0], dict) and w[0] and "options" in w[0]
                                         and "wibble" not in w[0]], ids=lambda x: json.dumps(x)[:50])  # fmt: skip
def test_convert_refuses_the_same_options(linmu, says):
    options = linmu["options"]
    preset = {"MMATE": "paper"}.get(linmu.get("block"), "exact")
    options = {"preset": preset, **options} if isinstance(options, dict) else options
    with pytest.raises(ValueError) as caught:
        linmu_models.convert(tiny.teacher("qwen2"), options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kept", [[99], [-4], ["1"], [True], [1.0], "all", 1, None, {"1": 2}])
def test_convert_refuses_the_same_layers(kept):
    with pytest.raises(ValueError, match="keep_attention must hold layers in \\[-3, 3\\), got"):
        linmu_models.convert(tiny.teacher("qwen2"), keep_attention=kept)


def test_any_record_loads_or_is_one_line(folder, tmp_path):
    """Whatever stands in one field of a saved record, or in the place of it."""
    rng = random.Random(0)
    good = json.loads((folder / "config.json").read_text())["linmu"]
    values = [None, True, False, 0, 1, -1, 2**31, 2**63, 0.5, -0.5, float("nan"), float("inf"), "", "1", "softmax",
              "é", [], [1], [1, 2, 3], ["a"], [[1]], {}, {"a": 1}]  # fmt: skip
    config, said = hf.AutoConfig.from_pretrained(folder), []
    for _ in range(400):
        record = json.loads(json.dumps(good))
        inside = rng.random() < 0.8
        target = record["options"] if inside else record
        target[rng.choice([*target, "other"])] = rng.choice(values)
        config.linmu = record
        try:
            with torch.device("meta"):
                hf.AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all(len(s.splitlines()) == 1 and s.startswith(("linmu: ", "ExactConfig: ", "MMATEConfig: ")) for s in said)


def test_a_saved_record_holds_every_option(folder):
    good = json.loads((folder / "config.json").read_text())["linmu"]
    assert ExactConfig(**good["options"]) == linmu_models.config.parse_options({**tiny.NARROW})
