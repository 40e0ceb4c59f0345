// Drives a running moe-serve with the official `openai` package for JavaScript.
//
//     npm install --prefix FOLDER openai
//     NODE_PATH=FOLDER/node_modules node moe-serve/tests/clients/openai_client.mjs [http://127.0.0.1:8000]
//
// Prints one line per check and fails at the first that does not hold.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const { default: OpenAI } = createRequire(import.meta.url)("openai");
const base = process.argv[2] ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const done = (name, detail) => console.log(`ok  ${name}: ${detail}`);
const messages = [{ role: "user", content: "Hello! How are you today?" }];
const schema = {
  type: "object",
  properties: { kind: { enum: ["cat", "dog"] }, legs: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["kind", "legs"],
  additionalProperties: false,
};
const checkPet = (text) => {
  const pet = JSON.parse(text);
  assert(["cat", "dog"].includes(pet.kind) && pet.legs >= 0 && pet.legs <= 9, text);
};

const model = (await client.models.list()).data[0].id;
done("models", model);

const prompt = "Once upon a time, there was a";
const completion = await client.completions.create({ model, prompt, max_tokens: 16, seed: 1, logprobs: 2 });
assert.equal(completion.choices[0].logprobs.tokens.length, completion.usage.completion_tokens);
let text = "";
for await (const chunk of await client.completions.create({ model, prompt, max_tokens: 16, seed: 1, stream: true })) {
  text += chunk.choices[0]?.text ?? "";
}
assert.equal(text, completion.choices[0].text);
done("completion, whole and streamed", JSON.stringify(text));

const chat = { model, messages, max_completion_tokens: 24, seed: 1 };
const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
assert.equal(answer.choices[0].logprobs.content.length, answer.usage.completion_tokens);
const streamed = await client.chat.completions.stream(chat).finalChatCompletion();
assert.equal(streamed.choices[0].message.content, answer.choices[0].message.content);
done("chat, whole and streamed", JSON.stringify(answer.choices[0].message.content));

const format = { type: "json_schema", json_schema: { name: "pet", schema, strict: true } };
const formed = await client.chat.completions.create({ ...chat, max_completion_tokens: 100, response_format: format });
checkPet(formed.choices[0].message.content);
done("JSON schema", formed.choices[0].message.content);

const tools = [{ type: "function", function: { name: "pet", parameters: schema } }];
const asking = { model, messages, tools, tool_choice: { type: "function", function: { name: "pet" } }, seed: 4 };
const called = (await client.chat.completions.create(asking)).choices[0];
assert.equal(called.finish_reason, "tool_calls");
checkPet(called.message.tool_calls[0].function.arguments);
const calledAgain = (await client.chat.completions.stream(asking).finalChatCompletion()).choices[0];
assert.equal(calledAgain.message.tool_calls[0].function.arguments, called.message.tool_calls[0].function.arguments);
const result = { role: "tool", tool_call_id: called.message.tool_calls[0].id, content: "taken" };
await client.chat.completions.create({ model, messages: [...messages, called.message, result], tools, max_tokens: 8 });
done("tools, whole and streamed", called.message.tool_calls[0].function.arguments);

const strict = [{ type: "function", function: { name: "pet", parameters: schema, strict: true } }];
const either = (await client.chat.completions.create({ model, messages, tools: strict, response_format: format, seed: 6, max_tokens: 100 })).choices[0];
checkPet(either.message.tool_calls?.[0].function.arguments ?? either.message.content);
const spoken = (await client.chat.completions.create({ model, messages, tools: strict, seed: 1, max_tokens: 24 })).choices[0];
assert(spoken.message.content || spoken.message.tool_calls, JSON.stringify(spoken));
done("a strict tool, with a form and without", JSON.stringify(either.message.content ?? either.message.tool_calls[0].function));

let taken = 0;
const runner = client.chat.completions.runTools({
  model, messages, seed: 4, max_tokens: 60, tool_choice: asking.tool_choice,
  tools: [{ type: "function", function: { name: "pet", parameters: schema, parse: JSON.parse, function: () => `taken ${++taken}` } }],
});
await runner.done();
assert.equal(taken, 1);
done("runTools", "the function was called with what the model said");

const asked = { model, input: "Hello! How are you today?", max_output_tokens: 24, store: false, seed: 1 };
const response = await client.responses.create(asked);
const kinds = new Set();
const stream = client.responses.stream(asked).on("event", (event) => kinds.add(event.type));
const final = await stream.finalResponse();
assert.equal(final.output_text, response.output_text);
assert(kinds.has("response.output_text.delta") && (kinds.has("response.completed") || kinds.has("response.incomplete")));
const likely = await client.responses.create({ ...asked, include: ["message.output_text.logprobs"], top_logprobs: 2 });
assert(likely.output[0].content[0].logprobs.every((token) => token.logprob <= 0 && token.top_logprobs.length === 2));
const flat = [{ type: "function", name: "pet", parameters: schema, strict: true }];
const calling = await client.responses.create({ model, input: "A pet?", tools: flat, tool_choice: "required", parallel_tool_calls: false, store: false });
checkPet(calling.output[0].arguments);
done("responses, whole, streamed, with a tool", JSON.stringify(response.output_text));

await assert.rejects(client.chat.completions.create({ model, messages, temperature: 3 }), OpenAI.BadRequestError);
await assert.rejects(client.completions.create({ model: "other", prompt }), OpenAI.NotFoundError);
done("errors", "have their classes");
