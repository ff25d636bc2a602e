"""Which implementation runs, and several copies of the kernels' code in one process."""

import os
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_draft, tiny_target

from transformers_prism.kernels.dispatch import operator_namespace, use_triton

pytestmark = pytest.mark.quick


def test_dispatch_chooses_by_device():
    """Open: Triton on a GPU, PyTorch on a CPU; asked for: what was asked for."""
    pytest.importorskip("triton")
    for device, expected in (("cpu", False), ("cuda", True), ("xpu", True), ("mps", False)):
        assert use_triton("auto", torch.device(device)) is expected
        assert use_triton("torch", torch.device(device)) is False
    assert use_triton("triton", torch.device("cuda"))


def test_dispatch_without_triton_takes_pytorch(monkeypatch):
    """Where Triton is not installed, "auto" never takes it and "triton" is an error."""
    monkeypatch.setattr("transformers_prism.kernels.dispatch.triton", None)
    assert not use_triton("auto", torch.device("cuda"))
    with pytest.raises(ValueError, match="expected auto or torch, since triton is not installed, got triton"):
        use_triton("triton", torch.device("cuda"))


def test_dispatch_says_what_is_wrong(monkeypatch):
    """An unknown name, and Triton on a device that it does not compile for."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="implementation: expected auto, triton or torch, got cuda"):
        use_triton("cuda", torch.device("cpu"))
    with pytest.raises(ValueError, match="expected auto or torch for tensors on cpu, got triton"):
        use_triton("triton", torch.device("cpu"))


def test_namespaces_differ_by_source_and_by_module(tmp_path):
    """The same file under another module's name, and another file under the same."""
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1\n")
    second.write_text("x = 2\n")
    names = [operator_namespace("kernels.a", str(first)), operator_namespace("kernels.a", str(first))]
    assert names[0] == names[1]
    assert (
        len({names[0], operator_namespace("kernels_a", str(first)), operator_namespace("kernels.a", str(second))}) == 3
    )


THREE_COPIES = """
import sys
import torch
import transformers_prism
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers_prism.kernels import compact_cache as package

copies = [package]
for folder in FOLDERS:
    draft_class = get_class_from_dynamic_module("modeling_prism.PrismDraftModel", folder)
    copies.append(sys.modules[draft_class.__module__.rpartition(".")[0] + ".kernels_compact_cache"])
namespaces = [copy._NAMESPACE for copy in copies]
assert len(set(namespaces)) == 3, namespaces
source = torch.tensor([[3, 5]])
for copy, kind in zip(copies, ("package", "old", "new")):
    calls = []
    launch = copy._compact_cache_fwd_kernel
    class Counted:
        def __getitem__(self, grid):
            calls.append(grid)
            return launch[grid]
    copy._compact_cache_fwd_kernel = Counted()
    buffer = torch.arange(8.0).view(1, 1, 8, 1).repeat(1, 1, 1, 16)
    operator = getattr(torch.ops, copy._NAMESPACE).compact_cache
    operator([buffer], source, torch.tensor([[0, 1]]))
    assert buffer[0, 0, :, 0].tolist() == [3, 5, 2, 3, 4, 5, 6, 7], kind
    copy.compact_cache([buffer], source, torch.tensor([[2, 3]]), implementation="triton")
    assert buffer[0, 0, :, 0].tolist() == [3, 5, 3, 5, 4, 5, 6, 7], kind
    # Each copy's operator reached that copy's own kernel.
    assert len(calls) == 2, (kind, calls)
print("three copies")
"""


def test_copies_of_the_code_do_not_replace_each_other(tmp_path):
    """The package, an old copy from a draft's folder and a new one in one process: each runs its own operators."""
    pytest.importorskip("triton")
    draft = tiny_draft(tiny_target())
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    for folder in folders:
        draft.save_pretrained(folder)
    with open(tmp_path / "old" / "kernels_compact_cache.py", "a") as file:
        file.write("\n# An older line.\n")
    environment = {"TRITON_INTERPRET": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"FOLDERS = {folders!r}\n{THREE_COPIES}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "three copies" in result.stdout
