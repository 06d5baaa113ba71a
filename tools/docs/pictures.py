"""Draws what each op computes into docs/ops/<op>.svg: `python -m tools.docs.pictures`.

Colours are classes, so that a picture is legible on light and on dark: alone it follows the viewer's setting, in the
site the palette that the reader chose (docs/site.css).
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

OUT = Path(__file__).parents[2] / "docs" / "ops"
WIDTH = 480
# A picture is read at half its size on a narrow screen: no text is smaller than this.
TEXT = 15
STYLE = """
.lm-ink{fill:#1f2933}.lm-dim{fill:#52606d}.lm-line{stroke:#52606d;stroke-width:1.6;fill:none}
.lm-a{fill:#2f6fb3}.lm-b{fill:#d9772b}.lm-c{fill:#3a8f5c}.lm-d{fill:#8a63b8}.lm-off{fill:#cbd5df}
.lm-on{fill:#ffffff}.lm-tip{fill:#52606d}
@media (prefers-color-scheme:dark){.lm-ink{fill:#e6ebf2}.lm-dim{fill:#a9b4c2}.lm-line{stroke:#a9b4c2}
.lm-off{fill:#4a5363}.lm-tip{fill:#a9b4c2}}
"""
DRAWINGS: dict[str, Callable[[], tuple[str, int, list[str]]]] = {}


def drawing(draw: Callable[[], tuple[str, int, list[str]]]) -> Callable[[], tuple[str, int, list[str]]]:
    DRAWINGS[draw.__name__] = draw
    return draw


def text(x: float, y: float, said: str, kind: str = "ink", anchor: str = "middle", size: int = TEXT) -> str:
    return (
        f'<text class="lm-{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{escape(said)}</text>'
    )


def box(x: float, y: float, w: float, h: float, kind: str, said: str = "", corner: int = 5) -> str:
    drawn = f'<rect class="lm-{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{corner}"/>'
    ink = "ink" if kind == "off" else "on"
    return drawn + (text(x + w / 2, y + h / 2 + 5, said, ink) if said else "")


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path class="lm-line" d="{path}"{dash} marker-end="url(#lm-tip)"/>'


def row(x: float, y: float, kinds: list[str], names: list[str] | None = None, size: int = 46, step: int = 62) -> str:
    names = names or [""] * len(kinds)
    return "".join(box(x + i * step, y, size, 32, k, n) for i, (k, n) in enumerate(zip(kinds, names, strict=True)))


def grid(x: float, y: float, kinds: list[list[str]], size: int = 16) -> str:
    step = size + 3
    return "".join(box(x + j * step, y + i * step, size, size, k, corner=2) for i, line in enumerate(kinds)
                   for j, k in enumerate(line))  # fmt: skip


@drawing
def ssd_scan() -> tuple[str, int, list[str]]:
    made = [text(14, 42, "x", "dim"), text(14, 118, "h", "dim"), text(14, 194, "y", "dim")]
    made += [row(40, 22, ["a"] * 7, [f"x{i}" for i in range(7)]), row(40, 98, ["c"] * 7, [f"h{i}" for i in range(7)])]
    made += [row(40, 174, ["b"] * 7, [f"y{i}" for i in range(7)])]
    for i in range(7):
        x = 63 + 62 * i
        made += [arrow((x, 54), (x, 96)), arrow((x, 130), (x, 172))]
        if i:
            made.append(arrow((x - 39, 114), (x - 24, 114)))
    made += [
        text(40, 236, "down into h: + dt x ⊗ B", anchor="start"),
        text(40, 258, "to the right: \u00d7 exp(dt A)", anchor="start"),
    ]
    made += [
        text(440, 236, "out of h: · C", anchor="end"),
        text(40, 280, "“both”: a second h, from right to left", "dim", "start"),
    ]
    return "A state is carried along the tokens: it decays, takes each token in, and is read", 294, made


def step(decay: str, added: str, read: str) -> list[str]:
    cells = [["c"] * 6] * 5
    made = [text(84, 24, "state before", "dim"), grid(28, 36, cells), text(396, 24, "the same memory", "dim")]
    made += [grid(340, 36, cells), arrow((148, 82), (330, 82)), text(239, 72, decay), text(239, 104, added)]
    made += [arrow((396, 136), (396, 168)), box(340, 172, 112, 32, "b", "y"), text(326, 193, read, "ink", "end")]
    return [*made, box(28, 172, 112, 32, "a", "this token"), arrow((84, 168), (84, 150), (239, 150), (239, 114))]


@drawing
def ssd_step() -> tuple[str, int, list[str]]:
    return (
        "One token: the state decays, takes the token in, and is read",
        218,
        step("\u00d7 exp(dt A)", "+ dt x ⊗ B", "· C  (+ D x)"),
    )


@drawing
def gated_delta_step() -> tuple[str, int, list[str]]:
    made = step("\u00d7 exp(g)", "+ k ⊗ β (v \u2212 what k reads)", "scale · q")
    return "One token: the state decays, replaces what it holds under the key, and is read", 218, made


@drawing
def gated_delta_scan() -> tuple[str, int, list[str]]:
    cells = [["c"] * 6, ["c"] * 6, ["d"] * 6, ["c"] * 6, ["c"] * 6]
    made = [text(84, 24, "state, \u00d7 exp(g)", "dim"), grid(28, 36, cells)]
    made += [
        arrow((146, 82), (196, 82)),
        text(171, 72, "k"),
        box(200, 66, 96, 32, "d", "it holds"),
        text(248, 54, "1. read", "dim"),
    ]
    made += [box(200, 124, 96, 32, "a", "v"), text(248, 176, "the new value", "dim")]
    made += [arrow((296, 82), (334, 82), (334, 104)), arrow((296, 140), (334, 140), (334, 128))]
    made += [text(334, 121, "\u2212", size=22), arrow((344, 115), (372, 115)), box(376, 99, 84, 32, "b", "β · diff")]
    made += [text(418, 87, "2. compare", "dim"), arrow((418, 131), (418, 204), (84, 204), (84, 136))]
    made += [text(251, 224, "3. write the difference under k;  y = scale · q reads the state", "ink", size=14)]
    return "The delta rule replaces what the state holds under a key", 238, made


@drawing
def near_attention() -> tuple[str, int, list[str]]:
    kinds = ["a", "off", "off", "a", "off", "off", "off", "off", *["a"] * 5, "b"]
    made = [
        text(40, 24, "listed", "dim", "start"),
        text(356, 24, "range: low to high \u2212 1", "dim"),
        row(18, 34, kinds, size=28, step=32),
        text(472, 86, "this token", "dim", "end", 13),
    ]
    made += [arrow((32, 68), (32, 104), (160, 104)), arrow((128, 68), (128, 94), (160, 94))]
    made += [arrow((356, 68), (356, 99), (322, 99)), box(162, 84, 158, 34, "a", "one softmax")]
    made += [arrow((241, 118), (241, 142)), text(241, 160, "y, lse")]
    made += [
        text(240, 190, "Each key/value head has lists of its own.", "dim"),
        text(240, 212, "Neighbours that share one are fast.", "dim"),
    ]
    return "A token attends to the last tokens, and to a list of earlier ones", 226, made


@drawing
def exact_step() -> tuple[str, int, list[str]]:
    made = [text(43, 24, "sinks", "dim"), row(20, 34, ["a"] * 2, size=22, step=25)]
    made += [
        text(182, 24, "ring: the window", "dim"),
        row(100, 34, ["a"] * 6, size=22, step=25),
        box(250, 34, 22, 32, "b"),
    ]
    made += [
        text(262, 86, "this token", "dim", size=13),
        text(345, 24, "kept", "dim"),
        row(310, 34, ["a"] * 3, size=22, step=25),
    ]
    made += [text(430, 24, "far: state", "dim"), grid(396, 34, [["c"] * 4] * 3, 14)]
    made += [arrow((182, 70), (182, 106)), box(92, 110, 180, 34, "a", "softmax: y_exact, lse")]
    made += [arrow((345, 70), (345, 94), (230, 94), (230, 106)), arrow((430, 90), (430, 106))]
    made += [
        box(340, 110, 126, 34, "c", "mean: y_far"),
        arrow((182, 144), (182, 184)),
        arrow((403, 144), (403, 201), (312, 201)),
    ]
    made += [
        box(92, 186, 216, 34, "b", "(1 \u2212 share) … + share …"),
        text(240, 244, "share: as one softmax over near, kept and far would give it", "dim", size=13),
    ]
    return "One token of ExactMMATE: exact attention to few, a mean over the rest, mixed by their weights", 256, made


@drawing
def far_attention() -> tuple[str, int, list[str]]:
    made = [
        text(116, 24, "tokens that have left", "dim"),
        row(20, 34, ["c", "c", "a", "c", "c", "a", "c"], size=22, step=28),
        text(260, 24, "window", "dim"),
        row(222, 34, ["a"] * 4, size=22, step=25),
        box(330, 34, 22, 32, "b"),
        text(341, 86, "this token", "dim", size=13),
    ]
    made += [arrow((60, 70), (60, 104)), text(72, 93, "64 at a time", "dim", "start", 13)]
    made += [grid(20, 110, [["c"] * 4] * 3, 16), text(58, 188, "state", "dim")]
    made += [arrow((102, 138), (150, 138)), box(154, 121, 132, 34, "c", "mean: y_far")]
    made += [arrow((341, 94), (341, 178)), text(352, 138, "y, lse: near or kept", "dim", "start", 13)]
    made += [arrow((220, 155), (220, 197), (266, 197)), box(270, 180, 142, 34, "b", "y in place")]
    made.append(text(240, 244, "Tokens that read after the same steps meet one state.", "dim", size=14))
    return "What is far from a token is a mean over a state, mixed into what is near", 256, made


@drawing
def window_attention() -> tuple[str, int, list[str]]:
    def kinds(shift: int) -> list[list[str]]:
        names = ["a", "c", "d", "off"]
        return [[names[2 * ((y - shift) % 8 // 4) + (x - shift) % 8 // 4] for x in range(8)] for y in range(8)]

    plain, moved = kinds(0), kinds(2)
    plain[5][1] = moved[5][1] = "b"
    made = [
        text(106, 24, "window (1, 4, 4)"),
        grid(31, 36, plain),
        text(374, 24, "shift (0, 2, 2)"),
        grid(299, 36, moved),
    ]
    made += [arrow((196, 110), (284, 110)), text(240, 100, "next layer", "dim")]
    made.append(text(240, 216, "The orange token attends to all tokens of its own window."))
    made.append(text(240, 236, "Shifted windows join the edges; nothing is moved in memory.", "dim", size=14))
    return "Tokens attend within boxes of a grid; every other layer moves the boxes", 250, made


@drawing
def causal_conv1d() -> tuple[str, int, list[str]]:
    made = [
        text(14, 42, "x", "dim"),
        row(40, 22, ["off", "a", "a", "a", "a", "off", "off"], ["", "x[t-3]", "x[t-2]", "x[t-1]", "x[t]", "", ""], 54),
    ]
    for i, weight in enumerate(("w[0]", "w[1]", "w[2]", "w[3]")):
        made += [arrow((129 + 62 * i, 54), (285 + 20 * i, 128)), text(129 + 62 * i, 15, weight, "dim", size=13)]
    made += [
        text(14, 152, "y", "dim"),
        row(40, 132, ["off", "off", "off", "off", "b", "off", "off"], ["", "", "", "", "y[t]", "", ""], 54),
    ]
    made.append(text(240, 196, "act(bias + sum), each channel on its own; K = 4 taps here"))
    return "An output is a weighted sum of the last K inputs of its channel", 210, made


@drawing
def causal_conv1d_step() -> tuple[str, int, list[str]]:
    made = [
        text(20, 44, "state before", "dim", "start", 14),
        row(130, 24, ["c"] * 3, ["x[t-3]", "x[t-2]", "x[t-1]"], 58, 66),
    ]
    made += [box(370, 24, 58, 32, "a", "x[t]"), text(20, 154, "state after", "dim", "start", 14)]
    made += [row(130, 134, ["c", "c", "a"], ["x[t-2]", "x[t-1]", "x[t]"], 58, 66)]
    made += [arrow((225, 58), (164, 130)), arrow((291, 58), (230, 130)), arrow((390, 58), (300, 130))]
    made += [arrow((406, 58), (406, 130)), box(370, 134, 72, 32, "b", "y[t]"), text(416, 98, "· w", "ink", "start")]
    made.append(text(240, 196, "y reads all four; then the oldest leaves and x[t] enters", "ink"))
    return "The state holds the last K - 1 inputs; a step appends one and drops one", 210, made


@drawing
def branch_mix_norm() -> tuple[str, int, list[str]]:
    made = [text(54, 42, "a", "dim", "end"), row(72, 22, ["a"] * 6), text(54, 90, "b", "dim", "end")]
    made += [row(72, 70, ["off", "off", "c", "c", "c", "off"]), text(54, 138, "mask", "dim", "end")]
    made += [text(95 + 62 * i, 138, "True" if i in (2, 3, 4) else "False", "dim", size=13) for i in range(6)]
    made += [arrow((95 + 62 * i, 146), (95 + 62 * i, 172)) for i in range(6)]
    made += [
        text(54, 196, "out", "dim", "end"),
        row(72, 176, ["a", "a", "b", "b", "b", "a"], ["N(a)", "N(a)", "N(m)", "N(m)", "N(m)", "N(a)"]),
    ]
    made.append(text(240, 240, "N is the norm,  m = mix a + (1 \u2212 mix) b"))
    return "Where the mask is True, two branches are mixed; elsewhere a stands alone; then a norm", 254, made


@drawing
def gated_norm() -> tuple[str, int, list[str]]:
    made = [text(54, 42, "x", "dim", "end"), row(72, 22, ["a"] * 3 + ["c"] * 3)]
    made += [text(54, 90, "z", "dim", "end"), row(72, 70, ["off"] * 6), text(240, 131, "u = x silu(z)", "dim")]
    made += [arrow((95 + 62 * i, 104), (95 + 62 * i, 148)) for i in (0, 1, 4, 5)]
    made += [row(72, 152, ["a"] * 3 + ["c"] * 3), text(54, 172, "u", "dim", "end")]
    made += [text(165, 204, "u / rms(u)", "ink"), text(350, 204, "u / rms(u)", "ink")]
    made.append(text(240, 236, "each group of channels by its own root mean square", "dim"))
    return "Channels are gated, then each group of them is divided by its root mean square", 250, made


@drawing
def layouts() -> tuple[str, int, list[str]]:
    kinds = ["off", "off", *["a"] * 4, "off", *["c"] * 8, "off", "off"]
    made = [
        text(
            240,
            22,
            "a row of tokens: text, an image of 2 \u00d7 2, text, a video of 2 \u00d7 2 \u00d7 2, text",
            "dim",
            size=13,
        )
    ]
    made += ["".join(box(18 + 26 * i, 32, 22, 28, k, corner=3) for i, k in enumerate(kinds))]
    orders = {"t, y, x": (0, 1, 2), "t, x, y": (0, 2, 1), "y, x, t": (1, 2, 0), "x, y, t": (2, 1, 0)}
    for n, (name, axes) in enumerate(orders.items()):
        left = 14 + 118 * n
        visits = sorted(((t, y, x) for t in (0, 1) for y in (0, 1) for x in (0, 1)), key=lambda c: [c[a] for a in axes])
        made.append(text(left + 49, 92, f"layer {n}: {name}", size=13))
        made += [
            box(left + 26 * x + 52 * t, 102 + 26 * y, 23, 23, "c", str(i + 1), 3) for i, (t, y, x) in enumerate(visits)
        ]
    made.append(text(240, 178, "which of the video's tokens is visited when:"))
    made.append(text(240, 200, "frame 1 left, frame 2 right"))
    return "A layout says where visual tokens are; an order says which is visited when", 214, made


def svg(name: str) -> str:
    title, height, made = DRAWINGS[name]()
    tip = '<marker id="lm-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip = f'<defs>{tip}<path class="lm-tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="lm" viewBox="0 0 {WIDTH} {height}"'
    head += ' role="img" font-family="sans-serif">'
    return f"{head}\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{tip}\n" + "\n".join(made) + "\n</svg>\n"


if __name__ == "__main__":
    for name in DRAWINGS:
        (OUT / f"{name}.svg").write_text(svg(name))
