"""Draw example/streams.svg, the picture in README.md: what the model reads, and the files that a window passes through.

python example/draw_streams.py
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT = 900, 654, 118
INK, MUTED, PAPER = "#23262b", "#6c717a", "#faf9f7"
COLOURS = {
    "text": "#0f766e", "agent": "#c1440e", "user": "#2f6690", "constant": "#9aa1ab", "dialogue": "#faf9f7",
}  # fmt: skip

# phase, width in pixels, and what the text, agent and user streams hold: (label, colour)
PHASES = (
    ("voice prompt", 130, ("PAD", "constant"), ("codes of the voice", "agent"), ("SINE", "constant")),
    ("silence", 62, ("PAD", "constant"), ("SILENCE", "constant"), ("SINE", "constant")),
    ("role prompt", 210, ("<system> You are … <system>", "text"), ("SILENCE", "constant"), ("SINE", "constant")),
    ("silence", 62, ("PAD", "constant"), ("SILENCE", "constant"), ("SINE", "constant")),
    ("dialogue (a window)", 290, ("PAD PAD EPAD hel lo PAD …", "text"), ("Mimi codes of the agent", "agent"),
     ("Mimi codes of the user", "user")),
)  # fmt: skip
ROWS = (("text", "stream 0", 34), ("agent", "streams 1-8", 62), ("user", "streams 9-16", 62))

# file, what it does with a window
PATH = (
    ("manifest", "one JSON line per recording: path, duration, prompts"),
    ("windows", "recordings split into windows, and their order for any seed and position"),
    ("dataset", "worker processes read the windows of a batch ahead of time"),
    ("interleaver", "word times become the text stream, audio or stored codes the audio streams"),
    ("prompter", "the voice and the role of the window become prompt frames"),
    ("batch", "samples padded to [B, 17, T], with a loss mask"),
    ("targets", "delays applied: which frames carry loss, and the tokens to predict there"),
    ("training_lm", "temporal transformer and depformer, in few large operations"),
    ("loss", "sums per group, weighted over the whole step and all ranks"),
)


class Drawing:
    """A list of SVG elements."""

    def __init__(self):
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" fill-opacity="{opacity}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 13,
        fill: str = INK,
        anchor: str = "start",
        weight: str = "400",
    ) -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(words)}</text>"
        )

    def line(self, points: str, stroke: str = MUTED, extra: str = "") -> None:
        self.parts.append(f'<path d="{points}" fill="none" stroke="{stroke}" {extra}/>')

    def svg(self, title: str) -> str:
        font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="{font}">'
            f"<title>{escape(title)}</title>"
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{PAPER}"/>{"".join(self.parts)}</svg>\n'
        )


def draw_streams(drawing: Drawing, top: float) -> None:
    """The 17 streams over time: prompt, then dialogue."""
    drawing.text(18, top, "What the model reads: 17 streams, 12.5 frames a second", 15, weight="600")
    y = top + 44
    starts = []
    for name, label, height in ROWS:
        drawing.text(18, y + height / 2 - 2, name, 14, COLOURS[name], weight="600")
        drawing.text(18, y + height / 2 + 14, label, 11, MUTED)
        starts.append((y, height))
        y += height + 6
    x = LEFT
    for name, width, *cells in PHASES:
        drawing.text(x + width / 2, top + 34, name, 12, MUTED, "middle")
        for (row, height), (label, colour) in zip(starts, cells):
            drawing.box(x, row, width - 4, height, COLOURS[colour], 0.22 if colour == "constant" else 0.9)
            fill = INK if colour == "constant" else "#ffffff"
            drawing.text(x + (width - 4) / 2, row + height / 2 + 4.5, label, 12, fill, "middle")
        x += width
    end = LEFT + sum(width for _, width, *_ in PHASES[:-1])
    drawing.line(f"M{LEFT},{y + 8}H{end - 8}", extra='stroke-width="2" stroke-dasharray="3 4"')
    drawing.text((LEFT + end) / 2, y + 26, "no loss", 12, MUTED, "middle")
    drawing.line(f"M{end},{y + 8}H{x - 4}", INK, 'stroke-width="2"')
    drawing.text((end + x) / 2, y + 26, "loss: PersonaPlex all 17 streams, Moshi 0-8", 12, INK, "middle")
    drawing.text(
        18, y + 52, "Codebook 0 of each side is semantic; the seven acoustic ones enter the model one frame later. "
        "Moshi has no prompt.", 12, MUTED,
    )  # fmt: skip


def draw_path(drawing: Drawing, top: float) -> None:
    """The files that a window passes through, in reading order."""
    drawing.text(18, top, "The path of a window through the code", 15, weight="600")
    y = top + 16
    for i, (file, what) in enumerate(PATH):
        drawing.box(LEFT, y, 132, 24, COLOURS["text"], 0.9)
        drawing.text(LEFT + 66, y + 16.5, f"{file}.py", 12, "#ffffff", "middle", "600")
        drawing.text(LEFT + 146, y + 16.5, what, 12.5)
        if i + 1 < len(PATH):
            drawing.line(f"M{LEFT + 66},{y + 24}v7", COLOURS["text"], 'stroke-width="2"')
        y += 31


def main() -> None:
    drawing = Drawing()
    draw_streams(drawing, 30)
    draw_path(drawing, 346)
    path = Path(__file__).with_name("streams.svg")
    path.write_text(drawing.svg("The 17 streams of PersonaPlex, and the path of a window through the code"))
    print(path)


if __name__ == "__main__":
    main()
