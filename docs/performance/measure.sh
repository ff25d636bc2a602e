#!/usr/bin/env bash
# What docs/performance.md shows, measured: one JSON file for each step beside this script, and then the page.
#
#   docs/performance/measure.sh spec_bench.jsonl                  every step, some three hours on two cores
#   docs/performance/measure.sh spec_bench.jsonl rounds greedy    these, and the page from all files that are there
#
# Nothing else may run on the machine meanwhile, but for `bench acceptance` and long_texts, which time nothing. A step of
# `bench generate` that was cut off goes on; files of an older draft are measured again once they are removed.
set -euo pipefail
prompts=$(realpath "${1:?expected a file of prompts in the form of Spec-Bench}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")"
PATH="$PWD/../../.venv/bin:$PATH"
export PYTHONPATH="$PWD/../.."
# Otherwise glibc hands memory back between the layers of a long prompt in some calls and not in others, by chance; fetching it
# again makes a prompt of 2048 tokens a tenth slower, with and without a draft.
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483648
draft=$(realpath ../../hub_cards/SmolLM2-135M-Instruct-PRISM)
# In the order of the page.
steps=(greedy sampled batch2 batch4 batch8 batch16 batch32 context256 context2048 context7936 bfloat16 float16 methods untrained adversarial
  unprepared fixed rounds scaling modules accepted_greedy accepted_sampled uncoupled training synthesize batch_bound
  replay long_texts rivals)

generate() {
  transformers-prism bench generate --prompts "${from:-$prompts}" --resume --repeat "${repeat:-1}" --json "$step.json" "$@"
}

rounds() {
  label=$1
  shift
  transformers-prism bench rounds --prompts "$prompts" --label "$label" --draft "$draft" --json "$step.json" "$@"
}

# Fragments of random tokens: text that nothing foresees.
adversarial_prompts() {
  python - <<'PYTHON'
import json, torch
from transformers_prism.target import load_target
_, tokenizer = load_target()
generator = torch.Generator().manual_seed(0)
with open("adversarial.jsonl", "w") as file:
    for number in range(6):
        tokens = torch.randint(len(tokenizer), (48,), generator=generator)
        record = {"question_id": number, "category": "random tokens", "turns": [tokenizer.decode(tokens)]}
        file.write(json.dumps(record) + "\n")
PYTHON
}

measure() {
  case $step in
    greedy) generate --method auto --num-prompts 48 ;;
    sampled) generate --method auto --num-prompts 48 --temperature 0.8 ;;
    batch[0-9]*) generate --method auto --num-prompts 64 --batch-size "${step#batch}" ;;
    context7936) generate --method auto --num-prompts 3 --context 7936 ;;
    context*) generate --method auto --num-prompts 12 --context "${step#context}" ;;
    *float16) generate --method auto --num-prompts 24 --dtype "$step" ;;
    methods)
      generate --num-prompts 12 --method auto --method auto-no-ngrams --method chain --method static:10,6,59 \
        --method static:4,4,15 --method static:3,3,7 --method lookup --method assisted --assistant random --method compiled ;;
    untrained) repeat=5 generate --method auto --num-prompts 6 --draft random ;;
    adversarial)
      [ -f adversarial.jsonl ] || adversarial_prompts
      from=adversarial.jsonl repeat=5 generate --method auto --num-prompts 6 --max-new-tokens 64 --temperature 1.5 ;;
    unprepared) rounds "59/6/10, unprepared" --no-packed --method static:10,6,59 ;;
    fixed) rounds "59/6/10, prepared" --method static:10,6,59 ;;
    rounds) rounds "auto, prepared" ;;
    scaling)
      python -m benchmarks.scaling --modules 1 --modules 2 --modules 4 --modules 8 --nodes 3 --nodes 15 --nodes 63 \
        --context 256 --context 2048 --context 7936 --json "$step.json" ;;
    modules) python -m benchmarks.scaling --modules 1 --modules 8 --num-rounds 200 --json "$step.json" ;;
    accepted_greedy) transformers-prism bench acceptance --prompts "$prompts" --temperature 0 --json "$step.json" ;;
    accepted_sampled) transformers-prism bench acceptance --prompts "$prompts" --temperature 0.8 --json "$step.json" ;;
    uncoupled)
      transformers-prism bench acceptance --prompts "$prompts" --temperature 0.8 --tree 15/4/4 --no-coupled --json "$step.json" ;;
    training) python -m benchmarks.training --repeat 4 --json "$step.json" ;;
    synthesize) python -m benchmarks.synthesize --prompts "$prompts" --repeat 2 --json "$step.json" ;;
    batch_bound)
      python -m benchmarks.batch_bound "$prompts" --batch-size 4 --batch-size 8 --batch-size 16 --batch-size 32 --json "$step.json" ;;
    replay)
      [ -f rounds.pt ] || python -m benchmarks.replay record "$prompts" rounds.pt --num-prompts 48
      python -m benchmarks.replay costs costs.json
      python -m benchmarks.replay compare rounds.pt costs.json --json "$step.json" ;;
    long_texts)
      python -m benchmarks.long_texts measure "$prompts" "$step.json" --num-documents 12 --length 256 --length 2048 \
        --length 7936 --window 512 --window 2048 --tree 59/6/10 ;;
    rivals)
      folder=$(realpath ../..)/rivals
      python -m benchmarks.rivals.run "$prompts" --folder "$folder" --install
      # In turn, since a machine's speed may change within the hour: each goes on where it stopped.
      for _ in 1 2 3; do
        python -m benchmarks.rivals.run "$prompts" --folder "$folder" --max-new-tokens 48 --seconds 30 \
          --vllm-settings '{"enforce_eager": true}' --json "$step.json"
      done ;;
    *) echo "expected steps among ${steps[*]}, got $step" >&2; return 1 ;;
  esac
}

for step in "${@:-${steps[@]}}"; do
  echo "== $step, $(date +%T)"
  measure
done
files=()
for step in "${steps[@]}"; do
  [ ! -f "$step.json" ] || files+=("$step.json")
done
python -m benchmarks.page "${files[@]}" --output ../performance.md
