"""Which implementation runs, and several copies of the kernels' code in one process."""

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from kernel_checks import DEVICE, run_interpreted
from tiny_models import PAD_ID, prompts, scripted_draft, tiny_draft, tiny_target

from transformers_prism import PrismConfig
from transformers_prism.decoding.sampler import treating_cpus_as_accelerators
from transformers_prism.kernels import dispatch
from transformers_prism.kernels.dispatch import operator_namespace, use_triton
from transformers_prism.training.alignment import aligned_forward

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


@pytest.mark.parametrize("place", [lambda one: (None, one), lambda one: ([one], 2), lambda one: (3, (one,))])
def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch, place):
    """Triton takes the current device, which may be another of several."""
    entered = []

    class Module:
        @staticmethod
        @contextlib.contextmanager
        def device(device):
            entered.append(device)
            yield

    @dispatch.on_its_device
    def launch(first, second):
        """Some kernel."""
        return len(entered)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert launch(*place(torch.ones(1))) == 0

    class OfSecondGpu(torch.Tensor):
        device = torch.device("cuda", 1)

    assert launch(*place(torch.ones(1).as_subclass(OfSecondGpu))) == 1
    assert entered == [OfSecondGpu.device]


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
import importlib
import sys
import torch
import transformers_prism
from transformers.dynamic_module_utils import get_class_from_dynamic_module

KERNELS = ("compact_cache", "fused_input_projection", "grow_tree", "top_k_log_prob", "tree_attention", "verify_tree")
package = {name: importlib.import_module("transformers_prism.kernels." + name) for name in KERNELS}
copies = {"package": package}
for kind, folder in zip(("old", "new"), FOLDERS):
    draft_class = get_class_from_dynamic_module("modeling_prism.PrismDraftModel", folder)
    place = draft_class.__module__.rpartition(".")[0]
    copies[kind] = {name: sys.modules[place + ".kernels_" + name] for name in KERNELS}
for name in KERNELS:
    namespaces = {copy[name]._NAMESPACE for copy in copies.values()}
    assert len(namespaces) == 3, (name, namespaces)
    for namespace in namespaces:
        assert hasattr(getattr(torch.ops, namespace), name), (name, namespace)

def count_launches(module, kernel):
    launches, launch = [], getattr(module, kernel)
    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch[grid]
    setattr(module, kernel, Counted())
    return launches

calls = {kind: count_launches(copy["compact_cache"], "_compact_cache_fwd_kernel") for kind, copy in copies.items()}
source = torch.tensor([[3, 5]])
# All are loaded before the first is called, and they take turns.
for turn in range(2):
    for kind, copy in copies.items():
        added = 100 if kind == "old" else 0
        module = copy["compact_cache"]
        buffer = torch.arange(8.0).view(1, 1, 8, 1).repeat(1, 1, 1, 16)
        operator = getattr(torch.ops, module._NAMESPACE).compact_cache
        operator([buffer], source, torch.tensor([[0, 1]]))
        assert buffer[0, 0, :, 0].tolist() == [3 + added, 5 + added, 2, 3, 4, 5, 6, 7], kind
        module.compact_cache([buffer], source, torch.tensor([[6, 7]]), implementation="triton")
        assert buffer[0, 0, 6:, 0].tolist() == [3 + added, 5 + added], kind
        assert {name: len(made) for name, made in calls.items()} == {
            name: 2 * turn + 2 * (list(copies).index(name) <= list(copies).index(kind)) for name in copies
        }
        # The old copy counts the rows of the head from the other end.
        states = torch.eye(16, dtype=torch.float16)
        head = states[torch.arange(16).roll(3)]
        tokens, _ = copy["top_k_log_prob"].top_k_log_prob(states[:2], head, 1, implementation="triton")
        assert tokens[:, 0].tolist() == ([12, 11] if kind == "old" else [3, 4]), kind
print("three copies")
"""

# Lines of the published kernels, and what stands for them in a copy that does something else.
OLDER_LINES = {
    "kernels_compact_cache.py": (
        "tl.store(buffer + end[:, None] * stride_c + column[None, :], moved, mask=mask)",
        "tl.store(buffer + end[:, None] * stride_c + column[None, :], moved + 100, mask=mask)",
    ),
    "kernels_top_k_log_prob.py": ("return best_ids, best_log_probs", "return 15 - best_ids, best_log_probs"),
}


def test_copies_of_the_code_do_not_replace_each_other(tmp_path):
    """The package, an older copy from a draft's folder and a new one in one process: each runs its own operators."""
    pytest.importorskip("triton")
    draft = tiny_draft(tiny_target())
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    for folder in folders:
        draft.save_pretrained(folder)
    for name, (line, older) in OLDER_LINES.items():
        file = tmp_path / "old" / name
        text = file.read_text(encoding="utf-8")
        assert text.count(line) == 1
        file.write_text(text.replace(line, older), encoding="utf-8")
    for file in (tmp_path / "old").glob("kernels_*.py"):
        if file.name not in OLDER_LINES:
            file.write_text(file.read_text(encoding="utf-8") + "\n# An older line.\n", encoding="utf-8")
    environment = {"TRITON_INTERPRET": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"FOLDERS = {folders!r}\n{THREE_COPIES}"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "three copies" in result.stdout


OPERATORS = {
    "compact_cache": ["_compact_cache"],
    "context_alignment_attention": [
        "_context_alignment_attention",
        "_context_alignment_attention_backward",
    ],
    "fused_input_projection": ["_fused_input_projection"],
    "grow_tree": ["_grow_tree", "_choose_nodes", "_ancestor_bits"],
    "top_k_log_prob": ["_top_k_log_prob"],
    "tree_attention": ["_tree_attention"],
    "verify_tree": ["_verify_tree"],
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the operators that run, from now on."""
    names = set()
    for file, operators in OPERATORS.items():
        module = importlib.import_module(f"transformers_prism.kernels.{file}")
        for name in operators:
            monkeypatch.setattr(module, name, noted(getattr(module, name), name, names))
    return names


def noted(operator, name, names):
    """The same operator, which adds its name to a set."""

    def run(*arguments):
        names.add(name)
        return operator(*arguments)

    return run


def generate_and_train(target, draft):
    """Greedy text with a draft, sampled text with one that is often right, and the gradients of a training step."""
    input_ids, mask = (one.to(DEVICE) for one in prompts(2))
    settings = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": PAD_ID}
    results = []
    for do_sample in (False, True):
        torch.manual_seed(1)
        plain = target.generate(input_ids, do_sample=do_sample, **settings)
        assistant = scripted_draft(target, plain, input_ids.shape[1]).to(DEVICE) if do_sample else draft
        torch.manual_seed(1)
        output = target.generate(input_ids, do_sample=do_sample, assistant_model=assistant, **settings)
        assert torch.equal(output, plain)
        results.append(output)
    draft.zero_grad()
    hidden = torch.randn(2, 9, draft.config.fused_hidden_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    predictions = aligned_forward(draft.bind(target), input_ids, hidden, 2)
    sum(prediction.square().mean() for prediction in predictions).backward()
    return results + [one.grad for one in draft.parameters() if one.grad is not None]


@pytest.mark.kernel
def test_model_loop_and_training_use_every_kernel_by_themselves(monkeypatch, launched):
    """Where Triton runs on the tensors' device, with nothing set: every operator, and the results of the PyTorch path."""
    target = tiny_target("llama", 3, num_hidden_layers=2).to(DEVICE)
    draft = tiny_draft(target, initializer_range=0.1).to(DEVICE)
    draft.generation_config.update(tree_top_k=2, tree_depth=2, tree_num_nodes=6)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ())
    expected = generate_and_train(target, draft)
    assert not launched
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", (DEVICE.type,))
    # What an accelerator's generator asks for is not pretended.
    with treating_cpus_as_accelerators():
        found = generate_and_train(target, draft)
    assert launched == {name for names in OPERATORS.values() for name in names}
    for one, other in zip(found, expected, strict=True):
        # Sums in another order, of numbers as large as the largest result.
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, float(other.abs().max())), rtol=0)


def test_a_cpu_launches_nothing(launched):
    """Where Triton is installed as well."""
    target = tiny_target("llama", 3, num_hidden_layers=2)
    assert generate_and_train(target, tiny_draft(target).to("cpu"))
    assert not launched or DEVICE.type != "cpu"


def test_no_setting_chooses_an_implementation():
    """Neither a configuration nor the environment; Triton's own interpreter is asked for by a name of Triton's, and a C++
    compiler by the usual one."""
    words = ("implementation", "triton", "kernel")
    ours = set(PrismConfig().to_dict()) - set(transformers.PretrainedConfig().to_dict())
    settings = set(tiny_draft(tiny_target()).generation_config.to_dict())
    ours |= settings - set(transformers.GenerationConfig().to_dict())
    assert "tree_depth" in ours
    assert not [name for name in ours if any(word in name for word in words)]
    folder = Path(dispatch.__file__).parent
    files = [*folder.glob("*.py"), *folder.parent.glob("*.py"), *(folder.parent / "training").glob("*.py")]
    read = {name for file in files for name in re.findall(r"environ[^\n]*?[\"'](\w+)[\"']", file.read_text("utf-8"))}
    # The last says which process of a training shows how far it is.
    assert read <= {"TRITON_INTERPRET", "CXX", "XDG_CACHE_HOME", "RANK"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, TESTS)
import test_kernels_dispatch as tests
from transformers_prism.kernels import tree_attention
assert tree_attention.triton is None
target = tests.tiny_target("llama", 3, num_hidden_layers=2)
draft = tests.tiny_draft(target)
found = tests.generate_and_train(target, draft)
print(len(found), "results")
"""


def test_without_triton_everything_works():
    """Decoding, greedy and sampled, and a training step, in a process that cannot import it."""
    script = f"TESTS = {str(Path(__file__).parent)!r}\n{WITHOUT_TRITON}"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert " results" in result.stdout


def test_kernels_interpreted():
    """The tests above that are marked `kernel`."""
    assert run_interpreted(__file__) > 0
