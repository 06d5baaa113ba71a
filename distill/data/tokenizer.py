"""The character-level tokenizer of the shipped teacher, as a `tokenizer.json` that `AutoTokenizer` loads."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distill.data.assets import BLANK, DIGITS, LETTERS

PAD, BOS, EOS, UNK = "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, BOS, EOS, UNK, VISION_START, VISION_END, IMAGE, VIDEO)
CHARACTERS = "\n ?" + BLANK + LETTERS + DIGITS


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and Qwen2.5-VL's image and video placeholders; 48 tokens."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[VISION_START, VISION_END, IMAGE, VIDEO],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
