"""Weight files: names of both layouts, reading rows, and writing that survives a crash."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.cli import UserError
from finetune.model.layout import fuse, fused_name
from finetune.model.weights import WeightFile, attention_steps, read_header, split_names, write_safetensors

DEPFORMER, TEMPORAL = "depformer.layers.1.self_attn.", "transformer.layers.0.self_attn."


def test_names_of_both_layouts():
    assert split_names(DEPFORMER + "in_proj_weight", 2) == [
        DEPFORMER + "in_projs.0.weight", DEPFORMER + "in_projs.1.weight",
    ]  # fmt: skip
    assert split_names(TEMPORAL + "in_proj.weight", 1) == [TEMPORAL + "in_projs.0.weight"]
    assert split_names(TEMPORAL + "out_proj.weight", 1) == [TEMPORAL + "out_projs.0.weight"]
    assert fused_name(DEPFORMER + "in_projs.11.weight") == (DEPFORMER + "in_proj_weight", 11)
    assert fused_name(DEPFORMER + "out_projs.3.weight") == (DEPFORMER + "out_proj.weight", 3)
    for key in ("linears.0.weight", TEMPORAL + "in_projs.0.lora_A.weight", "transformer.layers.0.norm1.alpha"):
        assert split_names(key, 16) is None and fused_name(key) is None
    assert [attention_steps(key, 16) for key in (DEPFORMER, TEMPORAL)] == [16, 1]


def fused_state() -> dict[str, torch.Tensor]:
    """A tiny state dict in the publishers' layout, two depformer steps."""
    torch.manual_seed(0)
    return {
        DEPFORMER + "in_proj_weight": torch.randn(12, 4), DEPFORMER + "out_proj.weight": torch.randn(8, 4),
        TEMPORAL + "in_proj_weight": torch.randn(6, 2), TEMPORAL + "out_proj.weight": torch.randn(2, 2),
        "linears.0.weight": torch.randn(3, 4).bfloat16(), "linears.1.weight": torch.randn(3, 4).bfloat16(),
        "transformer.layers.0.norm1.alpha": torch.randn(1, 1, 2), "scale": torch.tensor(2.0),
    }  # fmt: skip


def expected_split(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {key: state[key] for key in state if "self_attn" not in key}
    for step in range(2):
        out[f"{DEPFORMER}in_projs.{step}.weight"] = state[DEPFORMER + "in_proj_weight"][6 * step : 6 * step + 6]
        out[f"{DEPFORMER}out_projs.{step}.weight"] = state[DEPFORMER + "out_proj.weight"][4 * step : 4 * step + 4]
    out[TEMPORAL + "in_projs.0.weight"] = state[TEMPORAL + "in_proj_weight"]
    return out | {TEMPORAL + "out_projs.0.weight": state[TEMPORAL + "out_proj.weight"]}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def test_fusing_a_state_dict():
    state = fused_state()
    assert_equal(fuse(expected_split(state), 2), state)


def test_a_file_is_read_under_split_names(tmp_path):
    state = fused_state()
    save_file(state, tmp_path / "w.safetensors")
    file = WeightFile(tmp_path / "w.safetensors")
    wanted = expected_split(state)
    assert file.dep_q == 2
    assert_equal({name: file.read(name) for name in file.slots}, wanted)
    for name, slot in file.slots.items():
        assert (slot.shape, slot.dtype) == (tuple(wanted[name].shape), wanted[name].dtype)
    assert file.slots[f"{DEPFORMER}in_projs.1.weight"].key == DEPFORMER + "in_proj_weight"
    rows = wanted[f"{DEPFORMER}in_projs.1.weight"]
    assert torch.equal(file.read(f"{DEPFORMER}in_projs.1.weight", 2, 5), rows[2:5])
    assert torch.equal(file.read(f"{DEPFORMER}in_projs.1.weight", 4, 99), rows[4:])  # not into the next tensor
    assert file.read(f"{DEPFORMER}in_projs.1.weight", 7, 9).shape == (0, 4)


@pytest.mark.parametrize(
    "out",
    [torch.empty(2, 3), torch.empty(2, 3, dtype=torch.float64), torch.empty(3, 2).t(), torch.empty(4, 3)[1:3]],
    ids=["direct", "another dtype", "not contiguous", "a part"],
)
def test_rows_are_read_into_any_tensor(tmp_path, out):
    save_file({"a.weight": torch.arange(12.0).view(4, 3)}, tmp_path / "w.safetensors")
    WeightFile(tmp_path / "w.safetensors").read_into("a.weight", 2, out)
    assert out.tolist() == [[6, 7, 8], [9, 10, 11]]


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match=r"w\.safetensors: .*not found"):
        WeightFile(path)
    path.write_bytes(b"hello")
    with pytest.raises(UserError, match=r"w\.safetensors: not a whole safetensors file"):
        WeightFile(path)
    save_file(fused_state(), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"w\.safetensors: not a whole safetensors file"):
        WeightFile(path)
    save_file(fused_state() | {DEPFORMER + "in_proj_weight": torch.randn(13, 4)}, path)
    with pytest.raises(UserError, match=r"w\.safetensors.*in_proj_weight.*13 rows"):
        WeightFile(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a.weight": torch.arange(12.0)}, path)
    file = WeightFile(path)
    os.truncate(path, path.stat().st_size - 30)
    assert file.read("a.weight", 0, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"w\.safetensors.*shorter"):
        file.read("a.weight")


def write(path, state: dict[str, torch.Tensor], **changes) -> None:
    layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    write_safetensors(path, layout | changes.get("layout", {}), changes.get("tensors", state.items()))


def test_written_files_are_read_by_safetensors(tmp_path):
    state = fused_state() | {"empty": torch.empty(0, 3), "int": torch.arange(3), "transposed": torch.randn(3, 2).t()}
    path = tmp_path / "new folder/w.safetensors"
    write(path, state)
    assert_equal(load_file(path), {key: tensor.contiguous() for key, tensor in state.items()})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers and others refuse files without it
    assert path.read_bytes()[8:].startswith(b"{")
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # data begin at a multiple of 8 bytes
    assert {key: shape for key, (_, shape, _) in read_header(path).items()} == {
        k: tuple(t.shape) for k, t in state.items()
    }


def test_values_are_cast_to_the_dtype_of_the_layout(tmp_path):
    values = torch.tensor([1.0, 1.001, -3.0])
    write(tmp_path / "w.safetensors", {"a": values}, layout={"a": (torch.bfloat16, (3,))})
    stored = load_file(tmp_path / "w.safetensors")["a"]
    assert stored.dtype == torch.bfloat16 and torch.equal(stored, values.bfloat16())


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", torch.zeros(2))],  # too few
        [("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))],  # too many
        [("b", torch.zeros(3)), ("a", torch.zeros(2))],  # another order
        [("a", torch.zeros(2)), ("b", torch.zeros(1, 3))],  # another shape
    ],
    ids=["too few", "too many", "order", "shape"],
)
def test_tensors_that_do_not_match_the_layout_leave_the_old_file(tmp_path, tensors):
    path = tmp_path / "w.safetensors"
    write(path, {"old": torch.ones(1)})
    with pytest.raises(ValueError, match="layout"):
        write(path, {"a": torch.zeros(2), "b": torch.zeros(3)}, tensors=tensors)
    assert load_file(path).keys() == {"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_file_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power loss after the rename must not leave an empty file under the final name."""
    path, events = tmp_path / "w.safetensors", []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        fsync(fd)
        events.append(("fsync", os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def record_replace(source, target) -> None:
        events.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write(path, {"a": torch.ones(1000)})
    whole = (path.stat().st_ino, path.stat().st_size)
    assert events.index(("fsync", *whole)) < events.index(("replace", *whole))
    assert json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["a"]["shape"] == [
        1000
    ]
