"""Drives a running moe-serve with the official `openai` package.

    python3 -m venv .venv && .venv/bin/pip install openai
    .venv/bin/python moe-serve/tests/clients/openai_client.py [http://127.0.0.1:8000]

Prints one line per check and fails at the first that does not hold.
"""

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

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


class Person(BaseModel):
    kind: str
    legs: int


class Pet(BaseModel):
    kind: Literal["cat", "dog"]


SCHEMA = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 9}},
          "required": ["kind", "legs"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "pet", "description": "Takes a pet.", "parameters": SCHEMA}}


def check_pet(text):
    pet = json.loads(text)
    assert pet["kind"] in ("cat", "dog") and 0 <= pet["legs"] <= 9, text


def parsed(name, **ask):
    try:
        message = client.chat.completions.parse(messages=MESSAGES, max_tokens=120, **ask).choices[0].message
        done(name, message.tool_calls or message.parsed)
    except openai.LengthFinishReasonError as error:  # a model that knows nothing may talk on within a string
        done(name, f"cut off: {error.completion.choices[0].message.content!r:.60}")


def schema(model):
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, seed=1, max_tokens=100,
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}})
    check_pet(answer.choices[0].message.content)
    done("JSON schema", answer.choices[0].message.content)
    parsed("pydantic model", model=model, seed=2, response_format=Person)


def tools(model):
    ask = {"model": model, "messages": MESSAGES, "tools": [TOOL], "seed": 4, "max_tokens": 100}
    named = {"type": "function", "function": {"name": "pet"}}
    choice = client.chat.completions.create(**ask, tool_choice=named).choices[0]
    call = choice.message.tool_calls[0]
    assert choice.finish_reason == "tool_calls" and call.function.name == "pet", choice
    check_pet(call.function.arguments)
    done("named tool", f"{call.id} {call.function.arguments}")
    with client.chat.completions.stream(**ask, tool_choice=named) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == call.function.arguments, final
    assert "tool_calls.function.arguments.delta" in kinds and final.finish_reason == "tool_calls", kinds
    done("streamed tool", f"{len(kinds)} events, the same call")
    free = client.chat.completions.create(**ask, tool_choice="auto", parallel_tool_calls=False).choices[0]
    done("auto", f"{free.finish_reason}: {free.message.content!r:.50}")
    strict = openai.pydantic_function_tool(Pet, name="pet")
    parsed("strict tool or a pydantic model", model=model, tools=[strict], response_format=Pet, seed=6)
    result = {"role": "tool", "tool_call_id": call.id, "content": "taken"}
    again = client.chat.completions.create(
        model=model, messages=MESSAGES + [choice.message, result], tools=[TOOL], max_tokens=8, seed=1).choices[0]
    done("after a tool's answer", repr(again.message.content))


def responses(model):
    ask = {"model": model, "input": "Hello! How are you today?", "max_output_tokens": 24, "store": False, "extra_body": {"seed": 1}}
    answer = client.responses.create(**ask)
    assert answer.status in ("completed", "incomplete") and answer.usage.output_tokens <= 24, answer
    done("response", repr(answer.output_text))
    with client.responses.stream(**ask) as events:
        kinds = {event.type: event for event in events}
        final = events.get_final_response()
    assert final.output_text == answer.output_text, (final.output_text, answer.output_text)
    assert {"response.created", "response.output_text.delta", "response.output_text.done"} <= set(kinds), kinds
    done("streamed response", f"{len(kinds)} kinds of events, the same text")
    likely = client.responses.create(**ask, include=["message.output_text.logprobs"], top_logprobs=2).output[0].content[0]
    assert "".join(token.token for token in likely.logprobs).strip().startswith(likely.text.strip()), likely
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in likely.logprobs), likely
    done("response with log-probabilities", f"{sum(token.logprob for token in likely.logprobs):.2f} for {len(likely.logprobs)} tokens")
    tool = {"type": "function", "name": "pet", "parameters": SCHEMA, "strict": True}
    called = client.responses.create(model=model, input="A pet?", tools=[tool], tool_choice="required", parallel_tool_calls=False, store=False)
    check_pet(called.output[0].arguments)
    items = [{"role": "user", "content": "A pet?"}, called.output[0],
             {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "taken"}]
    again = client.responses.create(model=model, input=items, instructions="Be brief.", max_output_tokens=8, store=False)
    done("response after a call", f"{called.output[0].arguments} -> {again.output_text!r}")
    formed = client.responses.create(model=model, input="A pet?", store=False, max_output_tokens=100, extra_body={"seed": 3},
                                     text={"format": {"type": "json_schema", "name": "pet", "schema": SCHEMA}})
    check_pet(formed.output_text)
    done("response of a schema", formed.output_text)


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
        ("kept response", openai.BadRequestError, lambda: client.responses.create(model=model, input="a", store=True)),
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
schema(MODEL)
tools(MODEL)
responses(MODEL)
experts(MODEL)
errors(MODEL)
