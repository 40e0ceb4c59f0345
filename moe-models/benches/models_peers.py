"""The work of `models.rs` by other programs on the CPU: one JSON line per case and method.

Arguments: a model folder and the form of its weights. An environment with vllm runs vLLM (bf16); one with openvino and
optimum-intel runs OpenVINO (bf16, int8, int4); one with llama_cpp runs llama.cpp on `FOLDER.FORM.gguf` beside the folder, if
that file is there; any other one runs transformers (bf16), with grouped and with eager experts. Same prompts' lengths, random
ids, batch sizes and contexts as in `models.rs`. Run by `cargo xtask bench models --peers VENV`.
"""

import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import resource
import statistics
import sys
import time

# The report alone goes to standard output: libraries log there too.
REPORT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

PROMPT, CONTEXT, STEPS, ROUNDS = 512, 128, 32, 5
DECODE = [("decode_b1", 1), ("decode_b8", 8), ("decode_b32", 32)]
FOLDER, FORM = sys.argv[1:3]
VOCAB = json.load(open(os.path.join(FOLDER, "config.json")))["vocab_size"]


def ids(count):
    return [random.randrange(VOCAB) for _ in range(count)]


def say(line):
    print(json.dumps(line), file=REPORT, flush=True)


def setup(*packages):
    say({"threads": os.cpu_count(), **{name: importlib.metadata.version(name) for name in packages}})


def row(peer, case, tokens, times, load):
    """`times` of one pass each."""
    say({
        "peer": peer, "form": FORM, "case": case,
        "tokens_per_second": tokens / statistics.median(times), "best_tokens_per_second": tokens / min(times),
        "load_seconds": load, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    })


def transformers_rows():
    import torch
    from transformers import AutoModelForCausalLM

    setup("torch", "transformers")
    for experts in ["grouped_mm", "eager"]:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, experts_implementation=experts).eval()
        load = time.perf_counter() - start
        peer = f"transformers-{experts}"
        with torch.inference_mode():
            times = []
            for index in range(ROUNDS + 1):
                tokens = torch.tensor([ids(PROMPT)])
                start = time.perf_counter()
                model(input_ids=tokens, use_cache=True, logits_to_keep=1)
                times.append(time.perf_counter() - start)
            row(peer, "prefill512", PROMPT, times[1:], load)
            for case, batch in DECODE:
                tokens = torch.tensor([ids(CONTEXT) for _ in range(batch)])
                cache = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
                times = []
                for _ in range(STEPS + 2):
                    tokens = torch.tensor([ids(1) for _ in range(batch)])
                    start = time.perf_counter()
                    cache = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
                    times.append(time.perf_counter() - start)
                row(peer, case, batch, times[2:], load)
        del model
        gc.collect()


def vllm_rows():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    setup("torch", distribution("vllm"))
    start = time.perf_counter()
    model = LLM(FOLDER, dtype="bfloat16", max_model_len=1024, max_num_seqs=32, enable_prefix_caching=False,
                skip_tokenizer_init=True)
    load = time.perf_counter() - start

    def seconds(prompts, new):
        params = SamplingParams(max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
        begin = time.perf_counter()
        model.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - begin

    times = [seconds([ids(PROMPT)], 1) for _ in range(ROUNDS + 1)]
    row("vllm", "prefill512", PROMPT, times[1:], load)
    for case, batch in DECODE:
        # What STEPS more tokens take: the prompt's pass is in both.
        def more():
            prompts = [ids(CONTEXT) for _ in range(batch)]
            return (seconds(prompts, 1 + STEPS) - seconds(prompts, 1)) / STEPS

        row("vllm", case, batch, [more() for _ in range(ROUNDS)], load)


def distribution(module):
    """The name that a module was installed by."""
    return importlib.metadata.packages_distributions()[module][0]


def llama_cpp_rows():
    import ctypes

    import llama_cpp

    path = f"{FOLDER.rstrip('/')}.{FORM}.gguf"
    if not os.path.exists(path):
        say({"threads": os.cpu_count(), "left out": f"llama.cpp: there is no file of {FORM} weights for it"})
        return
    setup("llama_cpp_python")
    llama_cpp.llama_backend_init()
    start = time.perf_counter()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    load = time.perf_counter() - start
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = 8192, 4096, 512, 32, True
    params.n_threads = params.n_threads_batch = os.cpu_count()
    context = llama_cpp.llama_init_from_model(model, params)
    memory = llama_cpp.llama_get_memory(context)

    def run(sequences, first):
        """One pass of new tokens of each sequence, at positions from `first` on; logits of the last of each."""
        total = sum(map(len, sequences))
        batch = llama_cpp.llama_batch_init(total, 0, 1)
        at = 0
        for sequence, tokens in enumerate(sequences):
            for index, token in enumerate(tokens):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, first + index, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, index + 1 == len(tokens)
                at += 1
        batch.n_tokens = total
        begin = time.perf_counter()
        assert llama_cpp.llama_decode(context, batch) == 0
        llama_cpp.llama_synchronize(context)
        taken = time.perf_counter() - begin
        llama_cpp.llama_batch_free(batch)
        return taken

    def fresh():
        llama_cpp.llama_memory_clear(memory, ctypes.c_bool(True))

    times = []
    for _ in range(ROUNDS + 1):
        fresh()
        times.append(run([ids(PROMPT)], 0))
    row("llama.cpp", "prefill512", PROMPT, times[1:], load)
    for case, count in DECODE:
        fresh()
        run([ids(CONTEXT) for _ in range(count)], 0)
        times = [run([ids(1) for _ in range(count)], CONTEXT + step) for step in range(STEPS + 2)]
        row("llama.cpp", case, count, times[2:], load)


def openvino_rows():
    import torch
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    setup("torch", "openvino", "optimum-intel")
    quantization = None if FORM == "bf16" else OVWeightQuantizationConfig(bits=int(FORM[3:]), sym=True)
    start = time.perf_counter()
    # Models of more than a billion parameters are of 8 bits where nothing is said.
    how = {"load_in_8bit": False} if quantization is None else {"quantization_config": quantization}
    model = OVModelForCausalLM.from_pretrained(FOLDER, export=True, compile=True, **how)
    load = time.perf_counter() - start
    times = []
    for _ in range(ROUNDS + 1):
        tokens = torch.tensor([ids(PROMPT)])
        start = time.perf_counter()
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        times.append(time.perf_counter() - start)
    row("openvino", "prefill512", PROMPT, times[1:], load)
    for case, batch in DECODE:
        tokens = torch.tensor([ids(CONTEXT) for _ in range(batch)])
        past = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).past_key_values
        times = []
        for step in range(STEPS + 2):
            tokens = torch.tensor([ids(1) for _ in range(batch)])
            mask = torch.ones(batch, CONTEXT + step + 1, dtype=torch.long)
            start = time.perf_counter()
            past = model(input_ids=tokens, attention_mask=mask, past_key_values=past).past_key_values
            times.append(time.perf_counter() - start)
        row("openvino", case, batch, times[2:], load)


def main():
    random.seed(1)
    there = lambda name: importlib.util.find_spec(name) is not None  # noqa: E731
    if there("vllm"):
        forms, rows = ["bf16"], vllm_rows
    elif there("openvino"):
        forms, rows = ["bf16", "int8", "int4"], openvino_rows
    elif there("llama_cpp"):
        forms, rows = ["bf16", "int8", "int4"], llama_cpp_rows
    else:
        forms, rows = ["bf16"], transformers_rows
    if FORM in forms:
        rows()


# vLLM starts processes that read this file again.
if __name__ == "__main__":
    main()
