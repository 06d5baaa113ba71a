r"""Render the glyph bitmaps and pick the words that the task generators use.

Run once, on a machine with Debian's font and word packages, to rebuild `glyphs.npz` and the lists of words:

    apt-get install wamerican-small fonts-dejavu-core fonts-liberation2 fonts-freefont-ttf fonts-hack \
        fonts-anonymous-pro fonts-courier-prime fonts-fantasque-sans fonts-firacode fonts-inconsolata \
        fonts-jetbrains-mono fonts-mononoki fonts-noto-mono
    python -m tools.make_assets
"""

import re
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

FACES = {
    "dejavu": [f"truetype/dejavu/DejaVuSansMono{s}.ttf" for s in ("", "-Bold")],
    "liberation": [f"truetype/liberation2/LiberationMono-{s}.ttf" for s in ("Regular", "Bold", "Italic", "BoldItalic")],
    "freefont": [f"truetype/freefont/FreeMono{s}.ttf" for s in ("", "Bold", "Oblique", "BoldOblique")],
    "hack": [f"truetype/hack/Hack-{s}.ttf" for s in ("Regular", "Bold", "Italic", "BoldItalic")],
    "anonymous": [f"truetype/anonymous-pro/Anonymous Pro{s}.ttf" for s in ("", " B", " I")],
    "courier-prime": [f"opentype/courier-prime/Courier Prime{s}.otf" for s in ("", " Bold", " Italic")],
    "fantasque": [f"truetype/fantasque-sans/Normal/TTF/FantasqueSansMono-{s}.ttf" for s in ("Regular", "Bold")],
    "firacode": [f"truetype/firacode/FiraCode-{s}.ttf" for s in ("Light", "Regular", "Bold")],
    "inconsolata": ["truetype/inconsolata/Inconsolata.otf"],
    "jetbrains": [f"truetype/jetbrains-mono/JetBrainsMono-{s}.ttf" for s in ("Regular", "Bold", "Italic")],
    "mononoki": [f"truetype/mononoki/mononoki-{s}.ttf" for s in ("Regular", "Bold", "Italic")],
    "noto": [f"truetype/noto/NotoSansMono-{s}.ttf" for s in ("Regular", "Bold")],
}
SIZES = (12, 13)
CELL = 16
BASELINE = 11
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Stems that a dictionary holds and a demo should not print.
UNWANTED = re.compile(
    "fuck|shit|cunt|nigg|fag|rape|rapis|slut|whor|bitch|piss|porn|nazi|dyke|spic|kike|coon|tits|cock|condom|sex"
)


def render_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Coverage of one character, `(CELL, CELL)` uint8 in 0..15, centred and on the common baseline."""
    cell = Image.new("L", (CELL, CELL), 0)
    ImageDraw.Draw(cell).text((CELL // 2, BASELINE), character, font=font, fill=255, anchor="ms")
    return ((np.asarray(cell, dtype=np.uint16) + 8) // 17).astype(np.uint8)


def main(
    fonts: Path = Path("/usr/share/fonts"),
    dictionary: Path = Path("/usr/share/dict/american-english-small"),
    out: Path = Path(__file__).parents[1] / "distill" / "data",
    words: int = 6000,
    test_words: int = 1200,
    seed: int = 0,
) -> None:
    """Write `glyphs.npz` (bitmaps, faces, families, characters), `words.txt` and `test_words.txt`."""
    faces = [(family, face) for family, paths in FACES.items() for face in paths]
    bitmaps = np.stack(
        [
            [[render_glyph(ImageFont.truetype(fonts / face, size), c) for c in CHARACTERS] for size in SIZES]
            for _, face in faces
        ]
    )
    # Two 4-bit pixels a byte: half the file before compression.
    packed = bitmaps[..., 0::2] << 4 | bitmaps[..., 1::2]
    np.savez_compressed(
        out / "glyphs.npz",
        packed=packed,
        families=np.array([family for family, _ in faces]),
        faces=np.array([Path(face).stem for _, face in faces]),
        characters=np.array(CHARACTERS),
    )
    write_words(dictionary, out, words, test_words, seed)


def write_words(dictionary: Path, out: Path, words: int, test_words: int, seed: int) -> None:
    """Write `words.txt`, and `test_words.txt` of words that are not in it."""
    candidates = sorted(
        {w for w in dictionary.read_text().split() if re.fullmatch("[a-z]{3,8}", w) and not UNWANTED.search(w)}
    )
    chosen = np.random.default_rng(seed).choice(len(candidates), size=words, replace=False)
    rest = np.setdiff1d(np.arange(len(candidates)), chosen)
    tested = np.random.default_rng([seed, 1]).choice(rest, size=test_words, replace=False)
    for name, numbers in (("words.txt", chosen), ("test_words.txt", tested)):
        (out / name).write_text("\n".join(candidates[i] for i in sorted(numbers)) + "\n")


if __name__ == "__main__":
    typer.run(main)
