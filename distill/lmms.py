"""LinMU models in lmms-eval, through its plugin entry point: `lmms-eval --model linmu --model_args pretrained=DIR`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models` in pyproject.toml; nothing of it is changed or copied.
Its own `huggingface` model (0.7.3) does not find a converted model's class, and calls processors as transformers 4 did.
"""

from typing import Any, cast

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from torch import nn
from transformers import AutoProcessor, GenerationMixin

from linmu_models.chat import adds_special_tokens, end_tokens, to_model

from .teacher import load_teacher


class Linmu(lmms):
    """Answers of a LinMU model, or of its teacher for comparison, on the device there is.

    Args:
        pretrained: a folder or hub name with a processor that has a chat template.
        device: "cuda", "cpu", ...; what there is when None. With many processes, each has its own GPU.
        batch_size: questions at a time.
        dtype: "float32", "bfloat16", "float16", or "auto": that of the saved weights.
    """

    is_simple = False

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, dtype: str = "auto"
    ) -> None:
        super().__init__()
        accelerator = Accelerator(cpu=device == "cpu")
        self.accelerator, self.batch_size = accelerator, int(batch_size)
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device if device is None else torch.device(device)
        self.model, self.tokenizer = load_teacher(pretrained, dtype)
        cast(nn.Module, self.model).to(self.device)
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests whose arguments are (context, messages, options, document, task, split)."""
        order = Collator([r.args for r in requests], lambda x: -len(x[0]), group_fn=lambda x: x[2], grouping=True)
        results = []
        for chunk in order.get_batched(n=self.batch_size, batch_fn=None):
            contexts, to_messages, options, documents, tasks, splits = zip(*chunk, strict=True)
            chats = [
                ChatMessages(messages=make(self.task_dict[task][split][document]))
                for make, document, task, split in zip(to_messages, documents, tasks, splits, strict=True)
            ]
            for context, option, text, tokens in zip(contexts, options, *self._answer(chats, options[0]), strict=True):
                results.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=tokens)))
                self.cache_hook.add_partial("generate_until", (context, option), text)
        return order.get_original(results)

    @torch.no_grad()
    def _answer(self, chats: list[ChatMessages], options: dict[str, Any]) -> tuple[list[str], list[int]]:
        texts = [
            self.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
            for chat in chats
        ]
        media = [chat.extract_media() for chat in chats]
        given = {name: [one for part in media for one in part[i]] for i, name in enumerate(("images", "videos"))}
        inputs = self.processor(
            text=texts, padding=True, return_tensors="pt",
            add_special_tokens=adds_special_tokens(self.processor, texts[0]),
            **{name: found for name, found in given.items() if found},
        )  # fmt: skip
        inputs = to_model(inputs, self.model)
        heat = options.get("temperature") or 0.0
        out = cast(GenerationMixin, self.model).generate(
            **inputs,
            max_new_tokens=options.get("max_new_tokens", 1024),
            do_sample=heat > 0,
            temperature=heat if heat > 0 else None,
            top_p=options.get("top_p") if heat > 0 else None,
            num_beams=options.get("num_beams", 1),
            eos_token_id=sorted(end_tokens(self.model.generation_config, self.tokenizer)),
            pad_token_id=self.tokenizer.pad_token_id,
        )[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.batch_decode(out, skip_special_tokens=True)
        until = options.get("until") or []
        stops = [s for s in ([until] if isinstance(until, str) else until) if s]
        for stop in stops:
            answers = [answer.split(stop)[0] for answer in answers]
        return answers, (out != self.tokenizer.pad_token_id).sum(1).tolist()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not offered."""
        raise NotImplementedError("linmu: multiple choice by likelihood; tasks that generate are supported")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered."""
        raise NotImplementedError("linmu: several rounds; tasks that generate once are supported")


manifest = ModelManifest(model_id="linmu", chat_class_path="linmu_distill.lmms.Linmu")
