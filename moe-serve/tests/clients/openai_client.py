"""Drives a running moe-serve with the official `openai` package.

    python3 -m venv .venv && .venv/bin/pip install openai
    .venv/bin/python moe-serve/tests/openai_client.py [http://127.0.0.1:8000]

Prints one line per check and fails at the first that does not hold.
"""

import sys

import openai

BASE = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)
PROMPT = "Once upon a time, there was a"
MESSAGES = [{"role": "user", "content": "Hello! How are you today?"}]


def done(name, detail):
    print(f"ok  {name}: {detail}")


def list_models():
    models = client.models.list().data
    assert len(models) == 1 and models[0].object == "model", models
    assert client.models.retrieve(models[0].id).id == models[0].id
    done("models", f"{models[0].id}, moe layers {[l['num_experts'] for l in models[0].moe['layers']]}")
    return models[0].id


def complete(model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, seed=1, logprobs=3)
    choice = answer.choices[0]
    assert choice.finish_reason in ("length", "stop"), choice
    assert answer.usage.completion_tokens == len(choice.logprobs.token_logprobs) <= 16, answer
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs)
    done("completion", repr(choice.text))
    return choice.text


def stream(model, want):
    chunks = list(client.completions.create(
        model=model, prompt=PROMPT, max_tokens=16, seed=1, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens > 0 and chunks[-1].choices == [], chunks[-1]
    text = "".join(chunk.choices[0].text for chunk in chunks[:-1])
    assert text == want, (text, want)
    done("streamed completion", f"{len(chunks)} chunks, same text for the same seed")


def several(model):
    answer = client.completions.create(model=model, prompt=[PROMPT, "The"], n=2, max_tokens=4, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3], answer
    done("two prompts, n=2", [choice.text for choice in answer.choices])


def echo(model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == PROMPT and logprobs.token_logprobs[0] is None, answer
    done("echo", f"{sum(logprobs.token_logprobs[1:]):.2f} nats for {len(logprobs.tokens)} tokens")


def chat(model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=24, seed=1, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop"), choice
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    done("chat", repr(choice.message.content))
    return choice.message.content


def chat_stream(model, want):
    chunks = list(client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=24, seed=1, stream=True,
        stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
    assert chunks[-1].usage.total_tokens > 0
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == want, (text, want)
    done("streamed chat", f"{len(chunks)} chunks, same text for the same seed")


def experts(model):
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=2, extra_body={"return_expert_choices": True})
    tokens = answer.choices[0].expert_choices
    assert tokens[0]["prompt"] and not tokens[-1]["prompt"] and tokens[0]["layers"][0]["expert_ids"], tokens
    done("experts of each token", f"{len(tokens)} tokens")


def errors(model):
    for name, kind, call in [
        ("temperature 3", openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", temperature=3)),
        ("unknown field", openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", extra_body={"x": 1})),
        ("unknown model", openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a")),
    ]:
        try:
            call()
        except kind as error:
            done(name, error.body["message"])
        else:
            raise AssertionError(f"{name} was accepted")


MODEL = list_models()
stream(MODEL, complete(MODEL))
several(MODEL)
echo(MODEL)
chat_stream(MODEL, chat(MODEL))
experts(MODEL)
errors(MODEL)
