"""One rival, in its own environment: decodes the prompts of a task file and writes what it took after each of them.

`benchmarks/rivals/run.py` starts this file by its path, so that it needs nothing but what the rival itself needs.

    ENVIRONMENT/bin/python benchmarks/rivals/worker.py RIVAL TASK.json RESULT.json
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

# From a prompt's ids and a number to at most that many new tokens, greedy, up to the end of the answer. llama.cpp returns
# text, so its result is the text and the number of tokens.
Decode = Callable[[list[int], int], "list[int] | tuple[str, int]"]
_WARM_UP_TOKENS = 8


def _model(task: dict, dtype: str = "float32"):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task["num_threads"])
    return AutoModelForCausalLM.from_pretrained(task["target"], dtype=getattr(torch, dtype)).eval()


def _generating(model, arguments: Callable[[], dict] = dict) -> Decode:
    """With `generate()` of transformers, given further arguments for each call."""
    import torch

    def decode(ids: list[int], num_tokens: int) -> list[int]:
        inputs = torch.tensor([ids])
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
            **arguments(),
        )
        return output[0, len(ids) :].tolist()

    return decode


def _transformers(task: dict, dtype: str = "float32") -> Decode:
    return _generating(_model(task, dtype))


def _transformers_compiled(task: dict) -> Decode:
    from transformers import CompileConfig, StaticCache

    model = _model(task)
    longest = max(len(prompt["ids"]) for prompt in task["prompts"]) + task["max_new_tokens"]
    cache = StaticCache(config=model.config, max_cache_len=longest)

    def arguments() -> dict:
        cache.reset()
        compiling = CompileConfig(mode="default")
        compiling._compile_all_devices = True  # generate() leaves a CPU's forwards alone otherwise
        return {"past_key_values": cache, "compile_config": compiling}

    return _generating(model, arguments)


def _transformers_lookup(task: dict) -> Decode:
    return _generating(_model(task), lambda: {"prompt_lookup_num_tokens": 10})


def _prism_prepared(task: dict) -> Decode:
    from transformers_prism import prepare_for_cpu

    model = _model(task)
    prepare_for_cpu(model)
    return _generating(model)


def _prism(task: dict, dtype: str = "float32") -> Decode:
    from transformers_prism import PrismDraftModel, prepare_for_cpu

    model = _model(task, dtype)
    draft = PrismDraftModel.from_pretrained(task["draft"], dtype=model.dtype)
    prepare_for_cpu(model, draft)
    return _generating(model, lambda: {"assistant_model": draft})


def _economize_lookup(task: dict) -> Decode:
    # Its other drafters must be trained for a target, and none exists for this one.
    import economize
    import torch
    from economize.techniques.lookup import LookupConfig

    model = economize.apply(_model(task), LookupConfig(), decoding=economize.DecodeConfig(cycle_length=6))

    def decode(ids: list[int], num_tokens: int) -> list[int]:
        return model.decode(torch.tensor(ids), num_tokens, stop=task["end_ids"]).tokens.tolist()

    return decode


def _flashspec_lookup(task: dict) -> Decode:
    # It also takes a smaller model with the same tokenizer, but none exists for this target.
    import torch
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import TargetModel
    from flashspec.engine.ngram import NgramDrafter

    device, dtype = torch.device("cpu"), torch.float32
    model = _model(task)
    target = TargetModel(task["target"], device, dtype, model=model)
    config = FlashSpecConfig(device="cpu", sampling=SamplingConfig(temperature=0.0))
    engine = SpeculativeEngine(config, [NgramDrafter()], target)
    ends = task["end_ids"]

    def decode(ids: list[int], num_tokens: int) -> list[int]:
        result = engine.generate(torch.tensor([ids]), max_new_tokens=num_tokens, eos_token_ids=ends)
        return result.output_ids[0, : result.n_tokens_generated].tolist()

    return decode


def _llama_cpp(task: dict, is_speculating: bool = False) -> Decode:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["gguf"]
    params.n_ctx, params.n_parallel, params.verbosity = 4096, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["num_threads"]
    params.cache_ram_mib = 0  # no prompt may come from a cache
    if is_speculating:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    server = xllamacpp.Server(params)

    def decode(ids: list[int], num_tokens: int) -> tuple[str, int]:
        request = {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "cache_prompt": False}
        result = server.handle_completions(request)
        if "choices" not in result:
            raise RuntimeError(f"expected an answer, got {result}")
        return result["choices"][0]["text"], result["usage"]["completion_tokens"]

    return decode


def _llama_cpp_ngram(task: dict) -> Decode:
    return _llama_cpp(task, is_speculating=True)


def _openvino(task: dict, is_looking_up: bool = False) -> Decode:
    import numpy
    import openvino
    import openvino_genai

    options = {"INFERENCE_NUM_THREADS": task["num_threads"], "PERFORMANCE_HINT": "LATENCY"}
    folder = Path(task["openvino"] or "")
    model = str(folder) if (folder / "openvino_model.xml").is_file() else task["gguf"]
    if is_looking_up:
        options["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(model, "CPU", **options)
    config = openvino_genai.GenerationConfig()
    config.do_sample, config.apply_chat_template = False, False
    config.eos_token_id, config.stop_token_ids = task["end_ids"][0], set(task["end_ids"])
    if is_looking_up:
        config.num_assistant_tokens, config.max_ngram_size = 5, 3

    def decode(ids: list[int], num_tokens: int) -> list[int]:
        config.max_new_tokens = num_tokens
        inputs, mask = (openvino.Tensor(numpy.array([row], dtype=numpy.int64)) for row in (ids, [1] * len(ids)))
        return list(pipeline.generate(openvino_genai.TokenizedInputs(inputs, mask), config).tokens[0])

    return decode


def _openvino_lookup(task: dict) -> Decode:
    return _openvino(task, is_looking_up=True)


def _vllm(task: dict, speculative: dict | None = None) -> Decode:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=task["target"],
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=1,
        enable_prefix_caching=False,
        **({"speculative_config": speculative} if speculative else {}),
        **task["vllm_settings"],
    )

    def decode(ids: list[int], num_tokens: int) -> list[int]:
        settings = SamplingParams(temperature=0, max_tokens=num_tokens, stop_token_ids=task["end_ids"])
        result = engine.generate({"prompt_token_ids": ids}, settings, use_tqdm=False)
        return list(result[0].outputs[0].token_ids)

    return decode


def _vllm_prism(task: dict) -> Decode:
    speculative = {"method": "eagle3", "model": task["draft"], "num_speculative_tokens": 2, **task["vllm_speculative"]}
    return _vllm(task, speculative)


DECODERS: dict[str, Callable[[dict], Decode]] = {
    "transformers": _transformers,
    "transformers-bfloat16": partial(_transformers, dtype="bfloat16"),
    "transformers-float16": partial(_transformers, dtype="float16"),
    "transformers-compiled": _transformers_compiled,
    "transformers-lookup": _transformers_lookup,
    "prism-prepared": _prism_prepared,
    "prism": _prism,
    "prism-bfloat16": partial(_prism, dtype="bfloat16"),
    "prism-float16": partial(_prism, dtype="float16"),
    "economize-lookup": _economize_lookup,
    "flashspec-lookup": _flashspec_lookup,
    "llama.cpp": _llama_cpp,
    "llama.cpp-ngram": _llama_cpp_ngram,
    "openvino": _openvino,
    "openvino-lookup": _openvino_lookup,
    "vllm": _vllm,
    "vllm-prism": _vllm_prism,
}
_PACKAGES = ("torch", "transformers", "economize", "flashspec", "xllamacpp", "openvino-genai", "vllm", "vllm-cpu")


def versions() -> dict[str, str]:
    """Versions of the relevant packages in this environment; ours runs from the repository, so the version is its code's."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "transformers_prism" in sys.modules:
        found["transformers-prism"] = sys.modules["transformers_prism"].__version__
    return found


def peak_memory() -> int:
    """Bytes of this process and those that it started, each at its own peak; shared memory counts in each."""
    children: dict[int, list[int]] = {}
    peaks: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # ended meanwhile
            continue
        number = int(lines["Pid"])
        children.setdefault(int(lines["PPid"]), []).append(number)
        peaks[number] = 1024 * int(lines.get("VmHWM", "0").split()[0])
    found, waiting = 0, [os.getpid()]
    while waiting:
        number = waiting.pop()
        found += peaks.get(number, 0)
        waiting += children.get(number, [])
    return found


def measure(decode: Decode, prompt: dict, num_tokens: int, clock: Callable[[], float] = time.perf_counter) -> dict:
    """Seconds of a whole call, and of one that stops at the first token, which the rate of decoding alone leaves out."""
    start = clock()
    decode(prompt["ids"], 1)
    first = clock() - start
    start = clock()
    answer = decode(prompt["ids"], num_tokens)
    seconds = clock() - start
    text, num_new = answer if isinstance(answer, tuple) else (None, len(answer))
    tokens = None if isinstance(answer, tuple) else answer
    times = {"seconds": seconds, "first_seconds": first}
    return {"id": prompt["id"], "task": prompt["task"], **times, "num_new": num_new, "tokens": tokens, "text": text}


def work(rival: str, task: dict, path: Path, clock: Callable[[], float] = time.perf_counter) -> dict:
    """Decode what the result file does not hold yet, for no longer than the task allows; returns what the file holds."""
    record = json.loads(path.read_text()) if path.is_file() else {"rival": rival, "task": task["name"], "prompts": []}
    done = {one["id"] for one in record["prompts"]}
    left = [prompt for prompt in task["prompts"] if prompt["id"] not in done]
    if not left:
        return record
    start = clock()
    decode = DECODERS[rival](task)
    record.update(versions=versions(), load_seconds=clock() - start)
    for num_tokens in (1, _WARM_UP_TOKENS):
        decode(task["prompts"][0]["ids"], min(num_tokens, task["max_new_tokens"]))
    begun = clock()
    for prompt in left:
        if clock() - begun > task["seconds"]:
            break
        record["prompts"].append(measure(decode, prompt, task["max_new_tokens"], clock))
        record["memory_bytes"] = peak_memory()
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1))
        unfinished.replace(path)
    return record


if __name__ == "__main__":
    work(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
    # Servers inside of a process may not end by themselves.
    sys.stdout.flush()
    os._exit(0)
