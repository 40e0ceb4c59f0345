// What is seen of a turn: its text, the map of its router, the load of its experts.
const CELL = 13, GAP = 1, STEP = CELL + GAP, LAYER_GAP = 10, AXIS = 20, TOP = 6;
/* Of models with more rows than these the map shows one layer at a time; of layers with more experts than FULL_ROWS, in low rows. */
const MOST_ROWS = 160, FULL_ROWS = 64, LOW_STEP = 6, LABEL_EVERY = 8, MOST_BARS_APART = 32;

// ---- colours: one hue per expert, the same everywhere -------------------------------------------------------
const hueOf = (expert, count) => Math.round((272 + 360 * expert / Math.max(count, 1)) % 360);
const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const colourOf = (expert, count) => `oklch(${dark() ? "0.74 0.13" : "0.6 0.16"} ${hueOf(expert, count)})`;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- drawing ------------------------------------------------------------------------------------------------
let scheduled = false;
function schedule() { if (!scheduled) { scheduled = true; requestAnimationFrame(() => { scheduled = false; draw(); }); } }

function show(turn) {
  Object.assign(state, { shown: turn, selected: null, expert: null });
  draw(true);
}

function draw(reset) {
  drawText(reset); drawMap(); drawLoads(reset); drawDetail(); drawStatus();
}

function drawStatus() {
  const turn = state.shown, chat = state.mode === "chat";
  $("clear").disabled = !turns().length || !!state.abort;
  if (!turn?.tokens.length) { $("status").textContent = state.abort ? "waiting …" : ""; return; }
  const made = turn.tokens.filter(t => !t.prompt).length, prompt = turn.tokens.length - made;
  // From the request on: what comes at once to a busy browser was not made at once.
  const seconds = (performance.now() - turn.sent) / 1000;
  if (state.abort && turn === turns().at(-1)) turn.rate = `${(made / seconds).toFixed(0)} tokens/s`;
  const why = { stop: "ended by itself", length: "token limit reached", stopped: "stopped" }[turn.finish] ?? "";
  const which = chat && turns().length > 1 ? `answer ${turns().indexOf(turn) + 1} of ${turns().length}` : "";
  $("status").textContent = [which, `${prompt} prompt + ${made} new tokens`, made ? turn.rate : "", why].filter(Boolean).join(" · ");
}

/** White space made visible, for tokens shown apart from their text. */
const visible = text => text === "" ? "·" : text.replace(/^ +| +$/g, s => "␣".repeat(s.length)).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const isMark = token => token.text === "" || /^<\|.*\|>$/.test(token.raw);

const PLACEHOLDER = {
  text: "The prompt and its continuation appear here, token by token.",
  chat: "The conversation appears here. Each message goes to the model with all that was said before.",
};
const caret = Object.assign(document.createElement("span"), { className: "caret" });
let spans = new Map();

function drawText(reset) {
  const box = $("text");
  const atEnd = box.scrollTop + box.clientHeight > box.scrollHeight - 40;
  if (reset) { spans = new Map(); box.replaceChildren(); caret.remove(); }
  if (!turns().length) return box.replaceChildren(element("span", PLACEHOLDER[state.mode], "placeholder"));
  for (const turn of turns()) drawTurn(box, turn);
  caret.hidden = !state.abort;
  if ((atEnd || reset) && state.abort) box.scrollTop = box.scrollHeight;
}

/** In conversations the prompt's tokens, which are all that was said before, are seen in the map alone. */
function drawTurn(box, turn) {
  if (!spans.has(turn)) {
    spans.set(turn, []);
    turn.box = state.mode === "chat" ? turnBoxes(box, turn) : box;
  }
  const drawn = spans.get(turn), chat = state.mode === "chat";
  if (turn === turns().at(-1) && caret.parentNode !== turn.box) turn.box.append(caret);
  for (let i = drawn.length; i < turn.tokens.length; i++) {
    const token = turn.tokens[i], span = token && !(chat && token.prompt) ? tokenSpan(token, i) : null;
    if (span) turn.box.insertBefore(span, caret.parentNode === turn.box ? caret : null);
    drawn.push(span);
  }
  if (chat) cutToSaid(turn, drawn);
  const shown = turn === state.shown;
  turn.box.parentNode.classList.toggle("shown", chat && shown && turns().length > 1);
  drawn.forEach((span, i) => {
    if (!span) return;
    span.classList.toggle("sel", shown && i === state.selected);
    const weight = shown && state.expert ? weightOf(turn.tokens[i], state.expert.layer, state.expert.id) : 0;
    span.classList.toggle("lit", weight > 0);
    if (weight > 0) { span.style.setProperty("--w", weight); span.style.setProperty("--hue", colourOf(state.expert.id, expertsOf(state.expert.layer))); }
  });
}

/** Tokens of what ends an answer, and white space before it, are not part of what is said. */
function cutToSaid(turn, drawn) {
  const made = turn.tokens.map(token => token.prompt ? "" : token.text), all = made.join("");
  const white = all.length - all.trimStart().length;
  if (!all.trimStart().startsWith(turn.said)) return;
  let at = -white;
  drawn.forEach((span, i) => {
    const text = made[i].slice(Math.max(0, -at), Math.max(0, turn.said.length - at));
    at += made[i].length;
    if (!span || isMark(turn.tokens[i])) return;
    if (span.textContent !== text) span.textContent = text;
    span.hidden = !text;
  });
}

function turnBoxes(box, turn) {
  const [user, model] = [["user", "You"], ["model", "Model"]].map(([kind, who]) => {
    const part = element("div", "", `turn ${kind}`);
    part.append(element("span", who, "who"), element("div", "", "said"));
    return part;
  });
  user.lastChild.textContent = turn.user;
  box.append(user, model);
  return model.lastChild;
}

function tokenSpan(token, i) {
  const span = element("span", "", "tok" + (token.prompt ? " prompt" : ""));
  span.dataset.i = i;
  if (isMark(token)) span.append(element("span", token.text ? token.raw : "·", "mark"));
  else span.textContent = token.text;
  return span;
}

const expertsOf = layer => state.layers.find(l => l.layer === layer)?.num_experts ?? 1;
function weightOf(token, layer, expert) {
  const used = token.layers.find(l => l.layer === layer), at = used ? used.expert_ids.indexOf(expert) : -1;
  return at < 0 ? 0 : Math.max(used.weights[at], 0.02);
}

/** The layers whose experts are rows of the map. */
function mapLayers() {
  const rows = state.layers.reduce((sum, l) => sum + l.num_experts, 0);
  return rows <= MOST_ROWS ? state.layers : state.layers.filter(l => l.layer === +$("layer").value);
}
const rowStep = () => Math.max(...mapLayers().map(l => l.num_experts)) > FULL_ROWS ? LOW_STEP : STEP;

/** Rows of the map from top to bottom: [{layer, id, y}]. */
function mapRows() {
  const rows = [], step = rowStep(); let y = TOP;
  for (const { layer, num_experts } of mapLayers()) {
    for (let id = 0; id < num_experts; id++, y += step) rows.push({ layer, id, y });
    y += LAYER_GAP;
  }
  return rows;
}
const rowAt = y => mapRows().find(row => y >= row.y && y < row.y + rowStep());
const mapHeight = () => TOP + mapLayers().reduce((h, l) => h + l.num_experts * rowStep() + LAYER_GAP, 0) - LAYER_GAP + AXIS;

/** A choice of layers where there are too many rows for all. */
function layerChoice() {
  $("layer").replaceChildren(...state.layers.map(({ layer }) => Object.assign(element("option", `Layer ${layer}`), { value: layer })));
  $("layer-choice").hidden = mapLayers().length === state.layers.length;
}

function canvas(id, width, height) {
  const element = $(id), ratio = devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (element.width !== w || element.height !== h) { element.width = w; element.height = h; element.style.width = width + "px"; element.style.height = height + "px"; }
  const context = element.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

function drawMap() {
  if (!state.layers.length) return;
  const height = mapHeight(), rows = mapRows(), box = $("scroll"), cell = rowStep() - GAP;
  const rowOf = new Map(rows.map(row => [`${row.layer} ${row.id}`, row]));
  drawRowLabels(rows, height);
  const atEnd = box.scrollLeft + box.clientWidth > box.scrollWidth - 3 * STEP;
  const columns = Math.max(tokensShown().length, 1), width = Math.max(columns * STEP + 8, box.clientWidth);
  const c = canvas("grid", width, height), empty = css("--cell-empty"), band = css("--prompt-band");
  const prompt = tokensShown().filter(t => t.prompt).length;
  if (prompt) { c.fillStyle = band; c.fillRect(0, 0, prompt * STEP + 3, height); }
  c.fillStyle = empty;
  const drawn = tokensShown().length || Math.floor((width - 8) / STEP);
  for (const { y } of rows) for (let i = 0; i < drawn; i++) c.fillRect(4 + i * STEP, y, CELL, cell);
  tokensShown().forEach((token, i) => {
    for (const { layer, expert_ids } of token.layers) for (const id of expert_ids) {
      const row = rowOf.get(`${layer} ${id}`);
      if (!row) continue;
      c.globalAlpha = 0.18 + 0.82 * Math.min(weightOf(token, layer, id), 1);
      c.fillStyle = colourOf(id, expertsOf(layer));
      c.fillRect(4 + i * STEP, row.y, CELL, cell);
    }
  });
  c.globalAlpha = 1;
  drawSelection(c, rows, height, width);
  drawAxis(c, height);
  if (atEnd && state.abort) box.scrollLeft = box.scrollWidth;
}

function drawRowLabels(rows, height) {
  const c = canvas("rows", 84, height);
  c.textBaseline = "middle";
  const cell = rowStep() - GAP;
  for (const { layer, id, y } of rows) {
    if (rowStep() === LOW_STEP && id % LABEL_EVERY) continue;
    const on = state.expert?.layer === layer && state.expert.id === id;
    c.font = `${on ? "700 " : ""}10px system-ui, sans-serif`; c.textAlign = "right";
    c.fillStyle = on ? css("--text") : css("--muted");
    c.fillText(`E${id}`, 78, y + cell / 2 + .5);
    if (id === 0) { c.font = "600 11px system-ui, sans-serif"; c.textAlign = "left"; c.fillStyle = css("--text"); c.fillText(`Layer ${layer}`, 8, y + cell / 2 + .5); }
  }
}

function drawSelection(c, rows, height, width) {
  c.strokeStyle = css("--accent"); c.lineWidth = 1.5;
  if (state.selected !== null) c.strokeRect(3 + state.selected * STEP, 2, STEP + 1, height - AXIS - 1);
  const row = state.expert && rows.find(r => r.layer === state.expert.layer && r.id === state.expert.id);
  if (row) c.strokeRect(1, row.y - 1, width - 2, rowStep() + 1);
}

function drawAxis(c, height) {
  c.font = "10px system-ui, sans-serif"; c.textBaseline = "alphabetic"; c.textAlign = "left"; c.fillStyle = css("--muted");
  for (let i = 0; i < tokensShown().length; i += 10) c.fillText(i, 4 + i * STEP, height - 6);
}

function drawLoads(reset) {
  const box = $("loads");
  if (reset || box.children.length !== state.layers.length) {
    box.replaceChildren(...state.layers.map(loadPanel));
  }
  state.layers.forEach(({ layer, num_experts }, l) => {
    const counts = Array(num_experts).fill(0);
    for (const token of tokensShown()) for (const id of token.layers.find(x => x.layer === layer)?.expert_ids ?? []) counts[id]++;
    const total = counts.reduce((a, b) => a + b, 0), max = Math.max(...counts), mean = total / num_experts;
    const panel = box.children[l];
    panel.querySelector(".load-head span").textContent = total ? `max/mean ${(max / mean).toFixed(2)}` : "no tokens yet";
    const line = panel.querySelector(".mean");
    line.hidden = !total; line.style.bottom = `${max ? 100 * mean / max : 0}%`;
    panel.querySelectorAll(".load-bar").forEach((bar, id) => {
      bar.style.setProperty("--h", max ? counts[id] / max : 0);
      bar.style.setProperty("--hue", colourOf(id, num_experts));
      bar.title = `Layer ${layer}, expert ${id}: ${counts[id]} tokens`;
      bar.setAttribute("aria-label", bar.title);
      const on = state.expert?.layer === layer && state.expert.id === id;
      bar.classList.toggle("sel", on); bar.setAttribute("aria-pressed", on);
    });
  });
}

function loadPanel({ layer, num_experts }) {
  const panel = document.createElement("div");
  panel.classList.toggle("close", num_experts > MOST_BARS_APART);
  panel.innerHTML = `<div class="load-head"><b>Layer ${layer}</b><span></span></div><div class="bars"><div class="mean"></div></div><div class="ids"></div>`;
  for (let id = 0; id < num_experts; id++) {
    const bar = document.createElement("button");
    bar.type = "button"; bar.className = "load-bar"; bar.append(document.createElement("i"));
    bar.addEventListener("click", () => selectExpert(layer, id));
    panel.querySelector(".bars").append(bar);
    panel.querySelector(".ids").append(Object.assign(document.createElement("span"), { textContent: id }));
  }
  return panel;
}

function element(tag, text, className) { const e = document.createElement(tag); e.textContent = text; if (className) e.className = className; return e; }
const percent = logprob => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

/** Left alone where it says the same: whoever has it read out would hear it at every token. */
function drawDetail() {
  const box = $("detail"), next = document.createElement("div");
  next.append(...detail());
  if (next.innerHTML !== box.innerHTML) box.replaceChildren(...next.childNodes);
}

function detail() {
  if (state.selected !== null && tokensShown()[state.selected]) return tokenDetail(tokensShown()[state.selected]);
  if (state.expert) return expertDetail(state.expert);
  return [element("span", tokensShown().length ? "Select a token to see its experts, or an expert to see its tokens." : "Rows are experts, grouped by layer; columns are tokens, the prompt's on a shaded band.", "quiet")];
}

function tokenDetail(token) {
  const line = element("div", "");
  line.append(`Token ${state.selected} `, element("code", visible(token.text || token.raw)), token.prompt ? " of the prompt" : ` sampled with ${percent(token.logprob)}`);
  if (token.top?.length) {
    line.append(element("span", "  ·  likeliest: ", "quiet"));
    token.top.slice(0, 5).forEach(([text, logprob], i) => line.append(i ? ", " : "", element("code", visible(text)), ` ${percent(logprob)}`));
  }
  const chips = element("div", "", "chips");
  for (const { layer, expert_ids, weights } of token.layers) {
    const chip = element("span", "", "chip");
    chip.append(element("b", `Layer ${layer}`));
    expert_ids.forEach((id, k) => { const dot = element("span", "", "dot"); dot.style.setProperty("--hue", colourOf(id, expertsOf(layer))); chip.append(dot, `E${id} ${weights[k].toFixed(2)}`); });
    if (!expert_ids.length) chip.append(element("span", "dropped", "quiet"));
    chips.append(chip);
  }
  if (!token.layers.length) chips.append(element("span", "its experts are not known: no later step read this token", "quiet"));
  return [line, chips];
}

function expertDetail({ layer, id }) {
  const counts = new Map();
  for (const token of tokensShown()) if (weightOf(token, layer, id)) counts.set(token.raw, (counts.get(token.raw) ?? 0) + 1);
  const line = element("div", `Layer ${layer}, expert ${id} worked on ${[...counts.values()].reduce((a, b) => a + b, 0)} of ${tokensShown().length} tokens; they are marked in the text.`);
  const chips = element("div", "", "chips");
  for (const [text, count] of [...counts].sort((a, b) => b[1] - a[1]).slice(0, 24)) {
    const chip = element("span", "", "chip"); chip.append(element("code", visible(text)), `× ${count}`); chips.append(chip);
  }
  return [line, chips];
}

