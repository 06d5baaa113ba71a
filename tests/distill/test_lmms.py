"""A converted model through lmms-eval, offline, on a local parquet task: easy-VQA where it is installed."""

import io
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval")

ROOT = Path(__file__).parents[2]

TASK = """
task: easyvqa_local
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: "answer"
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
metadata: {{version: 0.0}}
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def process_results(doc, results):
    text = getattr(results[0], "text", results[0])
    return {"exact": float(text.strip() == doc["answer"])}
"""


def _questions(count):
    """(PNG bytes, question, answer)."""
    try:
        easy_vqa = import_module("easy_vqa")
    except ImportError:
        from PIL import Image

        for i in range(count):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), ("red", "blue")[i % 2]).save(file, "PNG")
            yield file.getvalue(), "what color is the image", ("red", "blue")[i % 2]
        return
    questions, answers, images = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    for i in range(count):
        yield Path(paths[images[i]]).read_bytes(), questions[i], answers[i]


def _student(folder, words):
    """A random two-layer LLaVA, converted, saved with a processor that has a chat template."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    import linmu_models

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=dict(
                model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, image_size=28, patch_size=14, projection_dim=32,
            ),
            text_config=dict(
                model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0,
                bos_token_id=1, eos_token_id=2,
            ),
            image_token_index=4, image_token_id=4, image_seq_length=4, vision_feature_layer=-1,
        )
    )  # fmt: skip
    linmu_models.convert(model).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}",
    )  # fmt: skip
    processor.save_pretrained(folder)


def test_entry_point_is_declared():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    module, name = entries["linmu"].split(":")
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(import_module(module), name))
    assert registry.get_model_class("linmu").__name__ == "Linmu"


@pytest.mark.slow
def test_a_local_task_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from linmu_distill.lmms import Linmu

    rows = [{"image": {"bytes": b, "path": None}, "question": q, "answer": a} for b, q, a in _questions(6)]
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"),
                                  "answer": datasets.Value("string")})  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "test.parquet")
    task = tmp_path / "task"
    task.mkdir()
    (task / "utils.py").write_text(UTILS)
    (task / "easyvqa.yaml").write_text(TASK.format(data=tmp_path / "test.parquet"))
    words = sorted({word for row in rows for word in f"{row['question']} {row['answer']}".split()})
    _student(tmp_path / "student", words)
    results = evaluator.simple_evaluate(
        model=Linmu(pretrained=str(tmp_path / "student"), device="cpu", batch_size=2),
        tasks=["easyvqa_local"], task_manager=TaskManager(include_path=str(task)), batch_size=2, log_samples=True,
    )  # fmt: skip
    assert 0 <= results["results"]["easyvqa_local"]["exact,none"] <= 1
    assert len(results["samples"]["easyvqa_local"]) == 6
