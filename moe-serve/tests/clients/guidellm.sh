#!/bin/sh
# Load by guidellm (pip install guidellm) on a running moe-serve: two minutes at most, texts of 32 tokens answered with 16, by 8 clients.
#
#     sh moe-serve/tests/clients/guidellm.sh http://127.0.0.1:8000 FOLDER
#
# FOLDER is a folder with the model's tokenizer.json and tokenizer_config.json, such as moe-serve/model. Fails if a request does.
set -eu
base=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/tokenizer"
cp "$2/tokenizer.json" "$2/tokenizer_config.json" "$folder/tokenizer/"
echo '{"model_type": "gpt2"}' > "$folder/tokenizer/config.json"
for format in /v1/completions /v1/chat/completions; do
    HF_HUB_OFFLINE=1 guidellm run --disable-progress \
        --backend "kind=openai_http,target=$base,request_format=$format" \
        --profile kind=concurrent,streams=8 --constraint kind=max_requests,count=64 --constraint kind=max_duration,seconds=60 \
        --tokenizer "kind=huggingface_auto,model=$folder/tokenizer" --data kind=synthetic_text,prompt_tokens=32,output_tokens=16 \
        --output "kind=json,path=$folder/report.json"
    python3 - "$folder/report.json" "$format" <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
totals = report["benchmarks"][0]["metrics"]["request_totals"]
print(sys.argv[2], totals)
assert totals["successful"] > 0 and totals["errored"] == 0, totals
PYTHON
done
