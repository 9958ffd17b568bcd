"""The structure of the package: what imports what, how much a training run executes, and which names are used twice."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGE = ROOT / "finetune"
SCRIPTS = [ROOT / f"{name}.py" for name in ("annotate", "precompute_codes", "train", "train_personaplex")]
FILES = sorted(PACKAGE.rglob("*.py"))
# The path of a window in training, in reading order.
PATH = [
    "data/manifest", "data/windows", "data/dataset", "data/interleaver", "data/prompter", "data/batch",
    "model/targets", "model/products", "model/attention", "model/layer", "model/training_lm", "loss", "optim", "step",
    "loop", "../train",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tool_of(path: Path) -> str | None:
    """The tool that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[1] if parts[0] == "tools" and parts[-1] != "__init__" else None


def test_the_core_imports_no_tool_and_tools_import_no_other():
    for path in [*FILES, *SCRIPTS]:
        tool = tool_of(path) if path.is_relative_to(PACKAGE) else None
        used = {name.split(".")[2] for name in imports(path) if name.startswith("finetune.tools.")}
        allowed = {tool} | ({"plan"} if tool == "check_data" else set())
        assert used <= allowed, f"{path.relative_to(ROOT)} imports the tools {used - allowed}"


@pytest.fixture(scope="module")
def executed() -> dict:
    """What `import train_personaplex` executes, in a process of its own."""
    code = (
        "import json, sys, train_personaplex\n"
        "files = {n: m.__file__ for n, m in list(sys.modules.items()) if getattr(m, '__file__', None)}\n"
        "print(json.dumps(files))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_children_run_this_tree(executed):
    ours = {name: Path(file) for name, file in executed.items() if name.split(".")[0] in ("finetune", "train")}
    assert ours and all(file.is_relative_to(ROOT) for file in ours.values())


def test_training_executes_a_core_that_can_be_read(executed):
    ours = [Path(file) for file in executed.values() if Path(file).parent == ROOT or PACKAGE in Path(file).parents]
    lines = {file: len(file.read_text().splitlines()) for file in ours}
    assert sum(lines.values()) <= 9390, sorted(lines.items(), key=lambda item: -item[1])
    assert not [file for file in ours if "tools" in file.parts]


def test_training_does_not_import_what_it_does_not_use(executed):
    unwanted = {"submitit", "matplotlib", "whisper", "whisper_timestamped", "pyloudnorm", "scipy", "jinja2.environment"}
    unwanted |= {"huggingface_hub.hf_api", "huggingface_hub._commit_api"}  # uploads; downloads are file_download
    assert not {name for name in executed if name in unwanted}
    used = set().union(*(imports(path) for path in FILES if str(path) in executed.values()))
    assert not {name for name in used if name.split(".")[0] in {"submitit", "tqdm", "whisper_timestamped"}}
    hub = {name for name in used if name.startswith("huggingface_hub")}
    assert not {name for name in hub if "upload" in name.lower() or "HfApi" in name}


def test_the_path_of_a_window_is_short():
    assert sum(len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in PATH) <= 3500


def test_a_name_means_one_thing():
    """Each class and public function name of the package is defined once."""
    names: Counter[str] = Counter()
    for path in FILES:
        body = ast.parse(path.read_text()).body
        names.update(
            n.name for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")
        )
    del names["main"]
    assert [name for name, count in names.items() if count > 1] == []


def test_each_file_says_what_it_is_about():
    for path in [*FILES, *SCRIPTS]:
        if path.name not in ("__init__.py", "__main__.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_promised_names_can_be_imported():
    from finetune.data.dataset import get_dataset_iterator, get_live_encoding_iterator, get_precomputed_iterator
    from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
    from train_personaplex import expand_moshiko_to_personaplex

    promised = (
        get_dataset_iterator, get_live_encoding_iterator, get_precomputed_iterator, InterleavedTokenizer, Interleaver,
        PrecomputedTokenizer, expand_moshiko_to_personaplex,
    )  # fmt: skip
    assert all(map(callable, promised))
    assert all((PACKAGE / f"{name}.py").is_file() for name in ("distributed", "lora", "checkpointing"))
