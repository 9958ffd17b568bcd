"""Write one page about a run: settings, curves, evaluations, replies to listen to, and its data.

    python -m finetune.tools.report runs/personaplex                    writes runs/personaplex/report.html
    watch -n 600 python -m finetune.tools.report runs/personaplex       again every ten minutes, while it trains

The page is a single file, sound included, and fetches nothing. It reads and shows what the folder has: args.yaml,
metrics.*.jsonl, evaluation_*.json, checkpoints/, and samples/step_000100/NAME.wav (agent left, user right) with
NAME.json: {"text": [[word, start, end], ...], "of": ..., "prompt": ..., "voice": ..., "measures": {...}}, all optional.
The best checkpoint is marked, and its replies come first.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune.files import replacing
from finetune.parser import Parser
from finetune.tools.report import facts, sections
from finetune.tools.report.comparisons import comparisons
from finetune.tools.report.listen import listen
from finetune.tools.report.record import RunRecord
from finetune.tools.report.replies import replies

# In the order of the page: title, and the function whose result the macro of the same name in sections.html takes.
SECTIONS = (
    ("Replies", replies),
    ("Listen", listen),
    ("Comparisons", comparisons),
    ("Curves", sections.curves),
    ("Codebooks", sections.codebooks),
    ("Evaluations", sections.evaluations),
    ("Arithmetic", facts.arithmetic),
    ("Data", facts.data),
    ("Settings", facts.settings),
    ("Checkpoints", facts.checkpoints),
)


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Raises UserError if the folder holds no run."""
    run = RunRecord(folder)
    found = [(title, function.__name__, function(run)) for title, function in SECTIONS]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    page = templates.get_template("page.html").render(
        headline=sections.headline(run),
        sections=[section for section in found if section[2] is not None],
        problems=run.problems,
        folder=folder,
    )
    path = folder / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    print(write_report(parser.parse_args().run_dir))
