"""The section with the saved replies, as sound and picture."""

import base64
import math
import tempfile
from pathlib import Path

import numpy as np
import sphn
from markupsafe import Markup, escape

from finetune.audio.files import FRAME_RATE, FRAME_SIZE, SAMPLE_RATE, read_audio
from finetune.audio.speech import find_spans, voice_activity
from finetune.cli import UserError
from finetune.streams import CODEBOOKS
from finetune.tools.report.record import RunRecord, SavedReply
from finetune.tools.report.replies import CODE_MEASURES, OUT_OF, REPLY_COLUMNS, in_text

AUDIO_BUDGET = 16_000_000  # bytes of sound in one page; replies beyond it are named and not embedded
PICTURE_WIDTH = 1080  # pixels, within the limits that follow
PIXELS_PER_SEC = (72, 140)  # at least, so that a fast talker's words fit in three rows; at most
CHANNEL_HEIGHT = 56  # pixels
WORD_ROWS = 3
LETTER_WIDTH = 7.0  # pixels, approximately


def encode_opus(pcm: np.ndarray) -> bytes:
    """float32 [channels, samples] at 24 kHz as Ogg Opus."""
    with tempfile.NamedTemporaryFile(suffix=".ogg") as file:
        sphn.write_opus(file.name, pcm, SAMPLE_RATE)
        return Path(file.name).read_bytes()


def draw_conversation(pcm: np.ndarray, words: list[tuple[str, float, float]]) -> Markup:
    """Both channels (float32 [2, samples] at 24 kHz) with their speech shaded, a time axis, and the agent's words."""
    length = pcm.shape[1] / SAMPLE_RATE
    scale = int(np.clip(PICTURE_WIDTH / length, *PIXELS_PER_SEC))
    width = math.ceil(length * scale)
    x = lambda second: min(max(second, 0.0), length) * scale
    step = 2 * SAMPLE_RATE / scale  # samples of two pixels
    loudest = max(0.05, float(np.abs(pcm).max(initial=0)))
    parts = []
    for row, (name, channel) in enumerate(zip(("agent", "user"), pcm)):
        middle = row * (CHANNEL_HEIGHT + 6) + CHANNEL_HEIGHT / 2
        for span in find_spans(voice_activity(channel)):
            first, last = span.first / FRAME_RATE, min(span.last / FRAME_RATE, length)
            parts.append(f'<rect class="heard {name}" x="{x(first):.1f}" y="{middle - CHANNEL_HEIGHT / 2}" '
                         f'width="{x(last - first):.1f}" height="{CHANNEL_HEIGHT}" rx="3"/>')  # fmt: skip
        edges = np.arange(0, len(channel) - 1, step).astype(int)
        peaks = np.maximum.reduceat(np.abs(channel), edges) / loudest * (CHANNEL_HEIGHT / 2 - 2)
        bars = "".join(f"M{2 * i + 1},{middle - max(p, 0.4):.1f}v{2 * max(p, 0.4):.1f}" for i, p in enumerate(peaks))
        parts.append(f'<path class="wave {name}" d="{bars}"/>')
    axis = 2 * CHANNEL_HEIGHT + 12
    parts.append(f'<path class="axis" d="M0,{axis}H{width}"/>')
    for second in range(math.floor(length) + 1):
        parts.append(f'<path class="axis" d="M{x(second)},{axis}v4"/>')
        anchor, label = ("middle", f"{second}") if second else ("start", "0 s")
        if x(second) < width - 8:
            parts.append(f'<text x="{x(second)}" y="{axis + 15}" text-anchor="{anchor}">{label}</text>')
    ends = [0.0] * WORD_ROWS
    for word, start, end in words:
        row = next((r for r in range(WORD_ROWS) if ends[r] <= x(start)), int(np.argmin(ends)))
        ends[row] = x(start) + LETTER_WIDTH * len(word) + 5
        parts.append(f'<text class="word" x="{x(start):.1f}" y="{axis + 32 + 15 * row}" data-start="{start:.2f}" '
                     f'data-end="{end:.2f}">{escape(word)}</text>')  # fmt: skip
    height = axis + 20 + 15 * sum(end > 0 for end in ends)
    width = max(width, math.ceil(max(ends)))  # the last word, written out
    parts.append(f'<path class="playhead" d="M0,0V{height}"/>')
    return Markup(
        f'<svg class="picture" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'data-pixels="{scale}" role="img" aria-label="agent above, user below">{"".join(parts)}</svg>'
    )


def show_reply(reply: SavedReply, room: int) -> tuple[dict, int]:
    """(what the page shows of a reply, bytes of `room` that remain). A sound larger than `room` is left out."""
    shown = {"step": reply.step, "file": "/".join(reply.path.parts[-3:]), "url": None, "problem": None}
    if room <= 0:
        return shown, 0
    try:
        pcm = read_audio(reply.path)
        if pcm.shape[1] < FRAME_SIZE:
            raise UserError(f"{reply.path}: holds no sound")
    except UserError as error:
        return shown | {"problem": str(error)}, room
    pcm = np.concatenate([pcm, np.zeros_like(pcm)])[:2]  # a mono file has no user
    sound = encode_opus(pcm)
    if len(sound) > room:
        return shown, 0
    words, measures, chips = reply.about.get("text", []), reply.about.get("measures", {}), []
    for key, title, form in REPLY_COLUMNS:
        if key not in (*OUT_OF.values(), *CODE_MEASURES) and measures.get(key) is not None:
            whole = measures.get(OUT_OF.get(key))
            chips.append((in_text(title), form(measures[key]) + ("" if whole is None else f" of {whole}")))
    shown |= {
        "url": f"data:audio/ogg;base64,{base64.b64encode(sound).decode()}",
        "picture": draw_conversation(pcm, words),
        "words": " ".join(word for word, _, _ in words),
        "chips": chips,
    }
    return shown, room - len(sound)


def listen(run: RunRecord) -> dict | None:
    """One entry for each held-out user: its name, prompt and voice, and its replies: that of the best checkpoint, or of
    the newest step if none is known, then the others from the newest to the base."""
    steps = {reply.step for reply in run.replies}
    first = run.best_step if run.best_step in steps else max(steps, default=0)
    undone = {row["step"] for row in run.rolled_back} - {row["step"] for row in run.held_out}
    # What one wants to hear first is embedded first: then the base, then the steps between.
    order = sorted(run.replies, key=lambda r: (r.step != first, r.step != 0, -r.step, r.path.stem))
    shown, room = {}, AUDIO_BUDGET
    for reply in order:
        shown[reply.path], room = show_reply(reply, room)
    conversations = []
    for name in sorted({reply.path.stem for reply in run.replies}):
        own = [reply for reply in run.replies if reply.path.stem == name]
        own.sort(key=lambda r: (r.step != first, -r.step))
        about = own[0].about
        source = about.get("of") or name
        conversations.append({
            "source": source,
            "title": source.rsplit("/", 1)[-1],
            "about": [(key, about[key]) for key in ("prompt", "voice")
                      if about.get(key) or (key in about and run.dep_q > CODEBOOKS)],
            "replies": [shown[reply.path] for reply in own],
        })  # fmt: skip
    notes = dict.fromkeys(undone, "rolled back") | {0: "base model", run.best_step: "best"}
    return {"conversations": conversations, "notes": notes} if conversations else None
