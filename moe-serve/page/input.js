// What the user does: selecting, sending, stopping.

// ---- selection ----------------------------------------------------------------------------------------------
function selectToken(i) {
  if (!tokensShown().length) return;
  state.selected = i === null ? null : Math.max(0, Math.min(tokensShown().length - 1, i));
  state.expert = null;
  draw();
  if (state.selected === null) return;
  spans.get(state.shown)?.[state.selected]?.scrollIntoView({ block: "nearest" });
  const box = $("scroll"), x = 4 + state.selected * STEP;
  if (x < box.scrollLeft || x + STEP > box.scrollLeft + box.clientWidth) box.scrollLeft = x - box.clientWidth / 2;
}
function selectExpert(layer, id) {
  state.expert = state.expert?.layer === layer && state.expert.id === id ? null : { layer, id };
  state.selected = null;
  $("layer").value = layer;
  draw();
}

/** A token of an earlier answer brings its turn to the map. */
$("text").addEventListener("click", event => {
  const span = event.target.closest(".tok"), i = span && +span.dataset.i;
  if (!span) return;
  const turn = turns().find(turn => spans.get(turn)?.[i] === span);
  if (turn === state.shown) return selectToken(i === state.selected ? null : i);
  if (!state.abort) { state.shown = turn; selectToken(i); }
});
$("grid").addEventListener("click", event => selectToken(Math.floor((event.offsetX - 4) / STEP)));
$("rows").addEventListener("click", event => { const row = rowAt(event.offsetY); if (row) selectExpert(row.layer, row.id); });
$("layer").addEventListener("change", () => draw());
$("rows").style.cursor = "pointer";
$("grid").addEventListener("mousemove", event => {
  const i = Math.floor((event.offsetX - 4) / STEP), row = rowAt(event.offsetY), token = tokensShown()[i];
  $("grid").title = token && row ? `${JSON.stringify(token.text || token.raw)} · layer ${row.layer}, expert ${row.id}: ${weightOf(token, row.layer, row.id).toFixed(2)}` : "";
});
for (const id of ["text", "grid"]) $(id).addEventListener("keydown", event => {
  const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const first = state.mode === "chat" ? Math.max(tokensShown().findIndex(token => !token.prompt), 0) : 0;
  selectToken(state.selected === null ? (move > 0 ? first : tokensShown().length - 1) : state.selected + move);
});

// ---- form ---------------------------------------------------------------------------------------------------
const WORDS = {
  text: { title: "Text", label: "Text to continue", go: "Generate", sample: "Once upon a time, there was a", hint: "Ctrl+Enter generates, Esc stops." },
  chat: { title: "Conversation", label: "Message", go: "Send", sample: "Hello! What did you do today?", hint: "Enter sends, Shift+Enter begins a line, Esc stops." },
};

function setMode(mode) {
  const before = WORDS[state.mode];
  state.mode = mode;
  const words = WORDS[mode];
  $("text-title").textContent = words.title;
  $("prompt-label").textContent = words.label;
  $("go").textContent = words.go;
  $("hint").textContent = words.hint;
  const prompt = $("prompt");
  if ([before.sample, ""].includes(prompt.value)) prompt.value = mode === "chat" && turns().length ? "" : words.sample;
  fail("");
  show(turns().at(-1) ?? null);
}

function clear() {
  state.turns[state.mode] = [];
  fail("");
  show(null);
  $("announce").textContent = "Cleared";
  $("prompt").focus();
}

const submit = () => { if (!state.abort) generate(); };
$("form").addEventListener("submit", event => { event.preventDefault(); submit(); });
$("stop").addEventListener("click", () => state.abort?.abort());
$("clear").addEventListener("click", clear);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") { if (state.abort) state.abort.abort(); else { state.selected = state.expert = null; draw(); } }
  if (event.key !== "Enter" || event.isComposing) return;
  const sends = state.mode === "chat" && event.target === $("prompt") && !event.shiftKey;
  if (event.ctrlKey || event.metaKey || sends) { event.preventDefault(); submit(); }
});
document.querySelectorAll("[name=mode]").forEach(radio => radio.addEventListener("change", () => setMode(radio.value)));
addEventListener("resize", schedule);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schedule);
setMode(document.querySelector("[name=mode]:checked").value);
connect();
