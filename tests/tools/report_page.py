"""Pages taken apart, and the parts of a run folder that a report is made of."""

import base64
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import sphn
import torch

from finetune.audio.files import write_conversation
from finetune.loss import loss_report


class Page(HTMLParser):
    """A page taken apart; fails on tags that do not match."""

    def __init__(self, path: Path):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.stack, self.stack
        self.sections = [section["id"] for section in self.all("section")]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "rect", "circle"), tag  # of SVG; HTML has no tags that close themselves
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.text += " " + data

    def all(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and found.items() >= attributes.items()]

    def charts(self):
        """{title: curves} as the page tells them to its script."""
        return {
            re.search("<b>(.*?)</b>", part)[1]: json.loads(html.unescape(re.match('"(.*?)"', part)[1]))["curves"]
            for part in self.source.split(" data-chart=")[1:]
        }

    def sounds(self):
        """(samples [channels, n], rate) of each player, newest first as on the page."""
        players = [player["src"].partition("data:audio/ogg;base64,")[2] for player in self.all("audio")]
        return [sphn.read_opus_bytes(base64.b64decode(data, validate=True)) for data in players]


def check_nothing_is_fetched(page):
    """No attribute and no style names anything outside of the page."""
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "srcset", "poster", "data", "action", "xlink:href"):
                assert value.startswith(("data:", "#")), (tag, key, value[:80])
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    for style in re.findall(r"<style>(.*?)</style>", page.source, re.DOTALL):
        assert "url(" not in style and "@import" not in style
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert "default-src 'none'" in policy


def row(step, value=2.0, **more):
    """A row of metrics with every loss of a PersonaPlex model near `value`."""
    counts = torch.full((18,), 50.0)
    return {"step": step} | loss_report(counts * value, counts * 0.5, counts, torch.ones(18)) | more


def write_rows(folder, kind, rows):
    (folder / f"metrics.{kind}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_sample(folder, step, name, about, seconds=2.0):
    path = folder / f"samples/step_{step:06d}/{name}.wav"
    write_conversation(path, *np.random.default_rng(step).normal(0, 0.1, (2, round(seconds * 24_000))))
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def cells(page):
    """The texts of all table cells of a page, by row."""
    found = re.findall(r"<tr>(.*?)</tr>", page.source, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<td.*?>(.*?)</td>", r, re.DOTALL)] for r in found]
