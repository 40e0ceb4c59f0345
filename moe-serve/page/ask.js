"use strict";
// What is asked of the server, and what comes back.
const $ = id => document.getElementById(id);

/* Layers from the server: [{layer, num_experts}]. A turn is one request and its answer: {user, said, tokens, ...}, its tokens, those of
   the prompt too, {raw, text, prompt, logprob, top, layers} by position. Each mode keeps its turns; text has one at most. */
const state = { model: null, layers: [], mode: "text", turns: { text: [], chat: [] }, shown: null, selected: null, expert: null, abort: null };
const turns = () => state.turns[state.mode];
const tokensShown = () => state.shown?.tokens ?? [];

async function connect() {
  try {
    const answer = await fetch("/v1/models");
    const model = (await answer.json()).data[0];
    state.model = model;
    state.layers = model.moe.layers;
    layerChoice();
    const experts = state.layers.map(l => l.num_experts);
    const range = experts.length ? `${Math.min(...experts)}` + (Math.min(...experts) === Math.max(...experts) ? "" : `–${Math.max(...experts)}`) : "no";
    $("facts").textContent = `${model.id} · ${model.moe.num_layers} layers, ${experts.length} with ${range} experts · context ${model.max_model_len} tokens`;
    $("max_tokens").max = model.max_model_len;
    $("max_tokens").value = Math.min(+$("max_tokens").value, Math.max(1, model.max_model_len - 32));
    draw(true);
  } catch (error) {
    $("facts").textContent = "the server does not answer";
    fail(`The server does not answer: ${error.message}. Is it still running? Reload the page to try again.`);
  }
}

function fail(message) { $("error").textContent = message; $("error").hidden = !message; }

function settings() {
  const number = id => { const input = $(id); if (!input.checkValidity()) throw Error(`${input.labels[0].firstChild.data.trim()}: ${input.validationMessage}`); return input.valueAsNumber; };
  const body = { model: state.model?.id, stream: true, stream_options: { include_usage: true }, return_expert_choices: true };
  for (const id of ["temperature", "top_p", "top_k", "max_tokens"]) body[id] = number(id);
  const seed = number("seed");
  if (!Number.isNaN(seed)) body.seed = seed;
  return body;
}

/** The whole conversation goes along: the server keeps none. */
function requestOf(prompt) {
  const body = settings();
  if (state.mode === "text") return ["/v1/completions", { ...body, prompt, logprobs: 5 }];
  const earlier = turns().flatMap(turn => [{ role: "user", content: turn.user }, { role: "assistant", content: turn.said }]);
  return ["/v1/chat/completions", { ...body, messages: [...earlier, { role: "user", content: prompt }], logprobs: true, top_logprobs: 5 }];
}

async function generate() {
  fail("");
  const prompt = $("prompt").value, chat = state.mode === "chat";
  let path, body;
  try {
    if (chat && !prompt.trim()) throw Error("Write a message first.");
    [path, body] = requestOf(prompt);
  } catch (error) { return fail(error.message); }
  const turn = { user: prompt, said: "", tokens: [], sent: performance.now(), finish: null, decoder: new TextDecoder(), promptDecoder: new TextDecoder() };
  state.abort = new AbortController();
  if (chat) { turns().push(turn); $("prompt").value = ""; } else state.turns.text = [turn];
  show(turn);
  busy(true);
  const narrow = matchMedia("(max-width: 860px)").matches;
  if (narrow) $("text").scrollIntoView({ block: "center" });
  try {
    const answer = await fetch(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal: state.abort.signal });
    if (!answer.ok) throw await refusal(answer);
    await readEvents(answer.body, event => take(turn, event));
  } catch (error) {
    if (error.name === "AbortError") turn.finish = "stopped";
    else fail(error.message);
    if (chat && !turn.said && !turn.tokens.some(token => !token.prompt)) takeBack(turn);
  }
  busy(false);
  draw();
  if (chat && !narrow) $("prompt").focus({ preventScroll: true });
}

async function refusal(answer) {
  const { message, code } = (await answer.json()).error;
  const full = code === "context_length_exceeded" && turns().length > 1;
  return Error(full ? `${message}. Or clear the conversation to begin a new one.` : message);
}

/** A message that got no answer is the user's again. */
function takeBack(turn) {
  turns().splice(turns().indexOf(turn), 1);
  if (!$("prompt").value) $("prompt").value = turn.user;
  show(turns().at(-1) ?? null);
}

async function readEvents(stream, each) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw Error("the server ended the answer early");
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const data = buffer.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw Error(event.error.message);
      each(event);
    }
  }
}

/** Tokens that are part of a character come as `bytes:\xe2\x80`; the character appears at its last token. */
function decode(token, decoder) {
  const raw = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(token);
  const bytes = raw ? Uint8Array.from(raw[1].match(/[0-9a-f]{2}/g), hex => parseInt(hex, 16)) : new TextEncoder().encode(token);
  return decoder.decode(bytes, { stream: true });
}

function take(turn, event) {
  for (const choice of event.choices) {
    turn.said += choice.delta?.content ?? choice.text ?? "";
    const scored = choice.logprobs?.content
      ? choice.logprobs.content.map(t => ({ token: t.token, logprob: t.logprob, top: t.top_logprobs.map(a => [a.token, a.logprob]) }))
      : (choice.logprobs?.tokens ?? []).map((token, i) => ({ token, logprob: choice.logprobs.token_logprobs[i], top: Object.entries(choice.logprobs.top_logprobs[i] ?? {}) }));
    for (const t of choice.expert_choices ?? []) {
      if (t.prompt) turn.tokens[t.position] = { raw: t.token, text: decode(t.token, turn.promptDecoder), prompt: true, layers: t.layers };
      else if (turn.tokens[t.position]) turn.tokens[t.position].layers = t.layers;
    }
    for (const t of scored) {
      turn.tokens.push({ raw: t.token, text: decode(t.token, turn.decoder), prompt: false, logprob: t.logprob, top: t.top.sort((a, b) => b[1] - a[1]), layers: [] });
    }
    if (choice.finish_reason) turn.finish = choice.finish_reason;
  }
  schedule();
}

function busy(on) {
  $("go").disabled = on; $("stop").disabled = !on;
  document.querySelectorAll("[name=mode]").forEach(radio => { radio.disabled = on; });
  if (!on) state.abort = null;
  // Told once at the beginning and once at the end: a screen reader that read every token would never come to rest.
  $("announce").textContent = on ? "Generating" : turns().at(-1)?.said || "No answer";
}
