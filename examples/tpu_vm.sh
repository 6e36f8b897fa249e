#!/usr/bin/env bash
# From a checkout on a fresh TPU VM to a report of one LongBench task; docs/tpu_vm.md explains the
# steps. An interrupted run continues where it stopped.
#
#     MODEL=org/name DATA=data SCORES=scores.json examples/tpu_vm.sh
set -euo pipefail
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
DATA=${DATA:-data}
SCORES=${SCORES:-scores/llama3.json}

if ! command -v uv > /dev/null; then
  curl -LsSf https://astral.sh/uv/install.sh | sh
  source "$HOME/.local/bin/env"
fi
[[ -d .venv ]] || uv venv --python 3.12 .venv
source .venv/bin/activate
uv pip install -e '.[tpu,eval]'
python -c "import jax; print(jax.devices())"

if [[ ! -e $DATA/longbench/qasper.jsonl ]]; then
  hf auth whoami || hf auth login
  mkdir -p "$DATA"
  hf download THUDM/LongBench data.zip --repo-type dataset --local-dir "$DATA"
  unzip -j "$DATA/data.zip" 'data/*' -d "$DATA/longbench"
  git clone --depth 1 https://github.com/THUDM/LongBench longbench-code
  cp longbench-code/LongBench/config/dataset2*.json "$DATA/longbench/"
fi

mkdir -p "$(dirname "$SCORES")"
kvjax score "$MODEL" "$SCORES" --length 7900
row=(python -m eval longbench --model "$MODEL" --data-dir "$DATA" --subsets qasper --max-length 8078
  --policy full --policy snapkv:kv_size=128 --policy "headkv:kv_size=128,scores=$SCORES")
"${row[@]}" --out runs/qasper --dry-run
"${row[@]}" --limit 4 --out runs/qasper-first
"${row[@]}" --out runs/qasper
python -m eval report runs/qasper --out report
