"""Tensors on disk: what minitune writes, the library reads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minitune.support.runs import DTYPES, write_atomically, write_tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_was_written(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    matrix = (torch.arange(12).view(3, 4) % 2).to(dtype)
    tensors = {"b.odd": torch.ones(3, dtype=torch.uint8), "matrix": matrix, "turned": matrix.t()}
    tensors |= {"number": torch.tensor(1).to(dtype), "nothing": torch.empty(0, 4, dtype=dtype)}
    write_tensors(path, tensors, {"progress": '{"step": "ü"}'})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"progress": '{"step": "ü"}'}


def test_the_file_replaces_the_old_one_and_is_open_to_the_same_people_as_any_other(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "config.json"
    path.write_bytes(b"old")
    write_tensors(path, {"x": torch.ones(2, requires_grad=True)}, {})
    write_atomically(other, b"{}")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])
    assert path.stat().st_mode == other.stat().st_mode
    assert load_file(path)["x"].tolist() == [1, 1]
