"""A teacher that is laid out in another way than training reads: one line before anything is trained."""

import pytest
import transformers as hf
from typer.testing import CliRunner

from linmu_distill import cli, plan
from linmu_distill.config import ConfigError, parse_config
from linmu_distill.data import build_tokenizer
from linmu_distill.run import distill


@pytest.fixture(scope="module")
def llama4(tmp_path_factory):
    """The folder of a tiny Llama 4, and of some text."""
    folder, tokenizer = tmp_path_factory.mktemp("llama4"), build_tokenizer()
    vision = dict(
        hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14,
        pixel_shuffle_ratio=0.5, projector_input_dim=32, projector_output_dim=32, vision_output_dim=32,
    )  # fmt: skip
    text = dict(
        hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), head_dim=12, intermediate_size_mlp=64, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    hf.Llama4ForConditionalGeneration(hf.Llama4Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text("words of a page\n" * 200)
    return folder


def values(folder, output, **changes):
    data = {"sets": {"pages": {"format": "text", "files": [f"{folder}/text.txt"]}}, "max_tokens": 64}
    stages = {f"stage{i}": {"steps": 1, "losses": {"token": 1.0}} for i in (2, 3)}
    quiet = {"evaluation": {"samples": 0, "speed_lengths": []}}
    return {"output": f"{output}/r", "teacher": str(folder), "data": data, "stage1": {"steps": 1}, **stages, **quiet}


SAYS = (
    r"teacher must have its decoder and vision tower in `model` and its output layer in `lm_head`, got a "
    r"Llama4ForConditionalGeneration without `model`"
)


@pytest.mark.parametrize("student", [{}, {"keep_attention": [3]}], ids=["every layer", "those that rotate"])
def test_llama_4_is_converted_and_not_distilled(llama4, tmp_path, student):
    config = parse_config(values(llama4, tmp_path, student=student))
    with pytest.raises(ConfigError, match=SAYS):
        distill(config)
    assert not (tmp_path / "r" / "student").exists()
    with pytest.raises(ConfigError, match=SAYS):
        plan.plan(config)


def test_the_command_says_so_in_one_line(llama4, tmp_path):
    lines = [f'output = "{tmp_path}/r"', f'teacher = "{llama4}"', "[data]", "max_tokens = 64", "[data.sets.pages]"]
    lines += ['format = "text"', f'files = ["{llama4}/text.txt"]', "[evaluation]", "samples = 0", "[stage3]"]
    path = tmp_path / "c.toml"
    path.write_text("\n".join([*lines, "losses = {token = 1.0}"]))
    app = cli.typer.Typer()
    app.command()(cli.plan)
    done = CliRunner().invoke(app, [str(path)])
    assert done.exit_code == 1 and "Traceback" not in done.output and "without `model`" in done.output, done.output
