"""A draft's life in seven steps, all tiny, with a Hub on this machine (tests/hub_server.py); about a minute on a CPU.

python examples/publish_and_load.py

1 train, 2 measure and write the card, 3 push, 4 load where the package is not installed, 5 generate, 6 train longer and
push again, 7 load the first version. With the real Hub only HF_ENDPOINT and HF_TOKEN differ.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
REPOSITORY = "me/tiny-PRISM"

# What a user runs, who has transformers and torch only.
USER = """
import sys

sys.modules["transformers_prism"] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM

target_folder, repository, revision = sys.argv[1:]
target = AutoModelForCausalLM.from_pretrained(target_folder)
draft = AutoModel.from_pretrained(repository, revision=revision, code_revision=revision, trust_remote_code=True)
draft.generation_config.update(tree="chain", tree_depth=4, tree_num_nodes=4)
prompts = torch.arange(1, 33).reshape(8, 4)
settings = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": 28}
plain = target.generate(prompts, **settings)
output = target.generate(prompts, **settings, assistant_model=draft)
print(torch.equal(plain, output), draft.last_speculation.acceptance_length, sep=",")
"""


def make_draft(folder: Path, target_folder: Path, data: Path, epochs: float) -> Path:
    """Step 1: train a draft; returns its folder, called as its repository is."""
    from transformers_prism.training.train import TrainConfig, train

    settings: dict = {"draft_vocab_size": 0, "batch_size": 16, "learning_rate": 1e-2, "token_weight": 1.0, "use_cpu": True}
    stages: dict = {"single_step_epochs": epochs, "warm_up_epochs": epochs / 3, "split_epochs": epochs / 3}
    train(TrainConfig(data=str(data), output=str(folder), target=str(target_folder), **stages, **settings))
    return (folder / "draft").rename(folder / REPOSITORY.split("/")[1])


def publish(draft_folder: Path, target_folder: Path) -> str:
    """Steps 2 and 3 with the package's own commands; returns the commit."""
    from huggingface_hub import HfApi

    from transformers_prism.cli.main import app

    def command(*words) -> None:
        app([str(word) for word in words], standalone_mode=False)

    prompts, figures = draft_folder.with_name("prompts.jsonl"), draft_folder.with_name("figures.json")
    turns = (f"w{first} w{first + 7} w{first + 11}" for first in (3, 9, 21))
    records = [{"question_id": 1, "category": "qa", "turns": [turn]} for turn in turns]
    prompts.write_text("\n".join(map(json.dumps, records)))
    models = ("--target", target_folder, "--draft", draft_folder)
    bench = ("bench", "generate", *models, "--prompts", prompts, "--num-prompts", 3, "--max-new-tokens", 28)
    command(*bench, "--method", "chain:4", "--no-packed", "--repeat", 1, "--json", figures)
    command("card", draft_folder, figures)
    command("push", draft_folder, REPOSITORY)
    command("inspect", REPOSITORY, "--target", target_folder, "--verify")
    return HfApi().model_info(REPOSITORY).sha or ""


def use(target_folder: Path, revision: str) -> float:
    """Steps 4 and 5 in a process of a user's own; returns tau, the tokens per round, once the output is plain decoding's."""
    process = [sys.executable, "-c", USER, str(target_folder), REPOSITORY, revision]
    printed = subprocess.run(process, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    is_same, tau = printed.strip().splitlines()[-1].split(",")
    if is_same != "True":
        raise ValueError("expected the output of plain decoding, got another one")
    print(f"revision {revision[:7]} loaded without the package: same output, tau {float(tau):.3f}")
    return float(tau)


def story(folder: Path, num_conversations: int) -> tuple[float, float, float]:
    """The seven steps; returns tau of the first version, of the second, and of the first again."""
    from train_tiny_cpu import make_target, write_conversations

    target_folder, data = folder / "target", folder / "data.jsonl"
    print("1 to 3: train, measure, write the card, push")
    write_conversations(make_target(target_folder), data, num_conversations)
    first = publish(make_draft(folder / "first", target_folder, data, epochs=0.3), target_folder)
    print("4 and 5: load and generate without the package")
    before = use(target_folder, first)
    print("6: train longer, push again")
    second = publish(make_draft(folder / "second", target_folder, data, epochs=6), target_folder)
    after = use(target_folder, second)
    print("7: load the first version")
    return before, after, use(target_folder, first)


def main(argv=None):
    """Start a Hub, tell the story, and return its three acceptance lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-conversations", type=int, default=240, help="that the target writes")
    args = parser.parse_args(argv)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        # huggingface_hub reads them when it is first imported.
        os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_TOKEN="hf_loopback", HF_HUB_DISABLE_XET="1")
        os.environ.update(HF_HOME=f"{scratch}/cache", HF_HUB_OFFLINE="0")
        sys.path.append(str(TESTS))
        from hub_server import Hub

        with Hub(port):
            return story(Path(scratch), args.num_conversations)


if __name__ == "__main__":
    main()
