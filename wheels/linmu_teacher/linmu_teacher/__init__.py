"""The weights, tokenizer and image processor that LinMU's demo starts from.

import linmu_teacher
from transformers import AutoModelForImageTextToText
teacher = AutoModelForImageTextToText.from_pretrained(linmu_teacher.PATH)
"""

from pathlib import Path

PATH = str(Path(__file__).parent)
