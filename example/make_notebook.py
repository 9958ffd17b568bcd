"""Write example/tutorial.ipynb from the cells of example/tutorial.py: python example/make_notebook.py"""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def read_cells(script: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each cell of a script in the percent format; kind is "markdown" or "code"."""
    found = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    cells = []
    for mark, body in zip(found[::2], found[1::2]):
        kind = "markdown" if "[markdown]" in mark else "code"
        lines = body.strip("\n").splitlines()
        if kind == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append((kind, "\n".join(lines)))
    return cells


def make_notebook(script: str) -> str:
    """Return the notebook (nbformat 4.5) of a script, without outputs."""
    cells = []
    for number, (kind, text) in enumerate(read_cells(script)):
        cell = {"cell_type": kind, "id": f"{kind}-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "tutorial.ipynb").write_text(make_notebook((HERE / "tutorial.py").read_text()))
