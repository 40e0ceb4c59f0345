"""LAMBADA by lm-eval's `local-completions` against a running moe-serve, and by `moe-eval` on the same model and items: the scores of both.

    python3 -m venv .venv && .venv/bin/pip install "lm-eval[api]==0.4.13" transformers
    moe-serve --model moe-serve/model --port 8000
    .venv/bin/python moe-serve/tests/clients/lm_eval_lambada.py http://127.0.0.1:8000 moe-serve/model DATA [ITEMS]

DATA holds `lambada_openai.test.jsonl` or the same as `.jsonl.xz`; `moe-eval` is taken from the path or from MOE_EVAL.
"""

import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

TASK = """task: local_lambada_openai
dataset_path: json
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
should_decontaminate: false
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
dataset_kwargs:
  data_files:
    test: data/lambada.jsonl
test_split: test
"""

base, model, data = sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve()
items = sys.argv[4] if len(sys.argv) > 4 else "100"
served = json.load(urlopen(f"{base}/v1/models"))["data"][0]
length = served["max_model_len"]

with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    for name in ("data", "tasks", "tok"):
        (folder / name).mkdir()
    plain, packed = data / "lambada_openai.test.jsonl", data / "lambada_openai.test.jsonl.xz"
    (folder / "data/lambada.jsonl").write_bytes(plain.read_bytes() if plain.exists() else lzma.decompress(packed.read_bytes()))
    (folder / "tasks/lambada.yaml").write_text(TASK)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / "tok")
    (folder / "tok/config.json").write_text('{"model_type": "gpt2"}')
    arguments = (f"model={served['id']},base_url={base}/v1/completions,num_concurrent=4,tokenizer_backend=huggingface,"
                 f"tokenizer=tok,max_length={length}")
    table = subprocess.run(
        [Path(sys.executable).parent / "lm-eval", "run", "--model", "local-completions", "--model_args", arguments,
         "--tasks", "local_lambada_openai", "--include_path", "tasks", "--batch_size", "8", "--limit", items],
        cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        check=True, capture_output=True, text=True).stdout
    # lm-eval leaves a token of its length to the answer.
    report = folder / "report.json"
    subprocess.run([os.environ.get("MOE_EVAL", "moe-eval"), "--model", model, "--tasks", "lambada", "--task-dir", data,
                    "--limit", items, "--max-length", str(length - 2), "--json", report], check=True, capture_output=True)
    ours = json.loads(report.read_text())
print(table.strip())
theirs = {m[0]: float(m[1]) for m in re.findall(r"\|(acc|perplexity)\s*\|[^|]*\|\s*([0-9.]+)\|", table)}
print("lm-eval :", theirs)
metrics = {m["metric"]: round(m["value"], 4) for m in ours["tasks"][0]["metrics"]}
print("moe-eval:", metrics)
assert abs(metrics["acc"] - theirs["acc"]) < 1e-4 and abs(metrics["perplexity"] / theirs["perplexity"] - 1) < 1e-6
