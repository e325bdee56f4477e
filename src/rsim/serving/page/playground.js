"use strict";
const COLOURS = ["#4c78a8", "#ad5c28", "#2f7d58", "#b93f4c", "#7455a6", "#846710", "#23798a", "#a34f83", "#5f6770"];
const RETRY = 3000; // ms until a server or an upstream that did not answer is asked again
// Code, which is left alone, or TeX: $$ $$, \[ \], \( \), $ $ (not two prices), a bare \boxed{ }.
const MATH = /(```[^]*?(?:```|$)|`[^`\n]*`)|\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?!\s)([^$`\n]+?)(?<!\s)\$(?!\d)|(\\boxed\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})/g;
const $ = (id) => document.getElementById(id);
let strategies = [], turns = [], running = null, retry = null;

const colour = (name) => COLOURS[Math.max(0, strategies.indexOf(name)) % COLOURS.length];
const headers = () => ({ "Content-Type": "application/json", ...($("key").value && { Authorization: "Bearer " + $("key").value }) });
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Asks the server, and through it the upstream, until both answer.
async function connect() {
  clearTimeout(retry);
  retry = null;
  let said = "the server does not answer", again = true;
  try {
    const health = await (await fetch("healthz")).json();
    strategies = health.strategies;
    const listed = await fetch("v1/models", { headers: headers() });
    if (listed.ok) {
      const how = { exact: "model in this process", prefill: "prompts continue the open turn", turn: "prompts as messages" };
      said = health.mode ? `${how[health.mode]}${health.approximate ? " (approximate)" : ""}` : "ready";
      again = false;
      const names = (await listed.json()).data.map((m) => m.id).filter((id) => !id.endsWith("-rsim")), chosen = $("model").value;
      $("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
      if (names.includes(chosen)) $("model").value = chosen;
    } else {
      said = (await listed.json()).error.message;
      again = listed.status !== 401 && listed.status !== 403;
    }
  } catch { /* no answer, or none of this server */ }
  $("state").textContent = said + (again ? "; trying again" : "");
  if (again) retry = setTimeout(connect, RETRY);
}

function bars(probabilities) {
  const grid = element("div", { className: "bars" });
  for (const [name, p] of Object.entries(probabilities).sort((a, b) => b[1] - a[1])) {
    const fill = element("i");
    fill.style.width = `${100 * p}%`;
    fill.style.background = colour(name);
    grid.append(element("span", { textContent: name }), element("span", { className: "bar" }, fill),
                element("span", { textContent: `${(100 * p).toFixed(1)}%` }));
  }
  return element("details", {}, element("summary", { textContent: "probabilities" }), grid);
}

// Puts TeX and code blocks in the text of a finished step into their place; what KaTeX cannot read stays as it is.
function typeset(text) {
  text.normalize();
  const last = text.lastChild, prompt = text.querySelector("em"), next = prompt?.nextSibling;
  if (last?.nodeType === Node.TEXT_NODE || last?.tagName === "EM") last.textContent = last.textContent.trimEnd(); // the delimiter
  const begun = prompt?.textContent.match(/(\\boxed\{|```\w*\n)$/)?.[0];
  if (begun && next?.nodeType === Node.TEXT_NODE) { // the box or the program belongs to the answer
    prompt.textContent = prompt.textContent.slice(0, -begun.length);
    next.data = begun + next.data;
  }
  const parents = [text, ...text.querySelectorAll(":scope > em")];
  for (const node of parents.flatMap((parent) => [...parent.childNodes]).filter((child) => child.nodeType === Node.TEXT_NODE)) {
    const parts = [];
    let from = 0;
    for (const found of node.data.matchAll(MATH)) {
      const [whole, code, double, square, round, dollar, box] = found;
      const program = code?.match(/^```(\w*)\n([^]*?)\n?```$/);
      if (code && !program) continue;
      const made = program ? element("code", { textContent: program[2] }) : element("span");
      if (program) made.dataset.kind = program[1] || "code";
      else {
        try { katex.render(double ?? square ?? round ?? dollar ?? box, made, { displayMode: Boolean(double ?? square) }); }
        catch { continue; }
      }
      const block = program || made.querySelector(".katex-display") !== null, before = node.data.slice(from, found.index);
      parts.push(block ? before.replace(/\n$/, "") : before, made);
      from = found.index + whole.length + (block && node.data[found.index + whole.length] === "\n" ? 1 : 0);
    }
    if (parts.length) node.replaceWith(...parts, node.data.slice(from));
  }
}

// Splits content into [text, whether it is thinking]; what may become a tag waits. Without a piece: what waited.
function thinkSplitter() {
  let held = "", inside = false;
  return (piece) => {
    const parts = [];
    held += piece ?? "";
    for (;;) {
      const tag = inside ? "</think>" : "<think>", at = held.indexOf(tag);
      let wait = piece === undefined ? 0 : Math.min(tag.length - 1, held.length);
      while (wait && !held.endsWith(tag.slice(0, wait))) wait--;
      const end = at < 0 ? held.length - wait : at;
      if (end) parts.push([held.slice(0, end), inside]);
      held = held.slice(at < 0 ? end : end + tag.length);
      if (at < 0) return parts;
      inside = !inside;
    }
  };
}

// The chat so far as one column has it: its own answers, or the other column's where it has none.
function messages(planned, question) {
  const kind = planned ? "planned" : "alone", other = planned ? "alone" : "planned";
  const before = turns.flatMap(({ question: asked, answers }) => {
    const content = (answers[kind] ?? answers[other])?.content;
    return content ? [{ role: "user", content: asked }, { role: "assistant", content }] : [];
  });
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
  return [...system, ...before, { role: "user", content: question }];
}

async function answer(model, planned, asked, record, columns, signal) {
  const foot = element("p", { className: "foot", textContent: "…" });
  const box = element("section", {}, element("h3", { textContent: planned ? `${model}, planned` : `${model}, alone` }), foot);
  columns.append(box);
  Object.assign(record, { model, content: "", steps: [] });
  const split = thinkSplitter();
  let text = null, thinking = null, sampled = "", ended = "";
  const open = (step) => {
    if (text) typeset(text);
    record.steps.push({ ...step, text: "" });
    text = element("div", { className: "text" });
    thinking = null;
    const part = element("div", { className: "step" });
    if (step.strategy) {
      const chip = element("span", { className: "chip", textContent: step.strategy });
      chip.style.background = colour(step.strategy);
      part.append(chip);
      if (step.prompt) text.append(element("em", { textContent: step.prompt }));
    }
    part.append(text);
    if (step.probabilities && Object.keys(step.probabilities).length) part.append(bars(step.probabilities));
    box.insertBefore(part, foot);
    record.content += step.prompt ?? "";
  };
  const say = (said, isThinking) => {
    if (!text) open({});
    if (!isThinking) {
      thinking = null;
      sampled += said;
      record.content += said;
      record.steps.at(-1).text += said;
      text.append(said);
      return;
    }
    if (!thinking) {
      thinking = element("div", { className: "text" });
      text.append(element("details", { className: "think" }, element("summary", { textContent: "reasoning" }), thinking));
    }
    thinking.append(said);
    record.steps.at(-1).thinking = (record.steps.at(-1).thinking ?? "") + said;
  };
  const end = (message, kind) => {
    split().forEach((part) => say(...part));
    if (text) typeset(text);
    foot.textContent = record.ended = message;
    if (kind) foot.classList.add(kind);
  };
  const began = performance.now();
  try {
    const limit = Number($("limit").value);
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), signal,
      body: JSON.stringify({
        model: planned ? model + "-rsim" : model, stream: true, stream_options: { include_usage: true },
        temperature: Number($("temperature").value), messages: asked, ...(limit && { max_tokens: limit }),
      }),
    });
    if (!response.ok) return end((await response.json()).error.message, "error");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", usage = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data: ") || line.startsWith("data: [DONE]")) continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) return end(chunk.error.message, "error");
        usage = chunk.usage || usage;
        const choice = chunk.choices?.[0], delta = choice?.delta ?? {};
        ended = choice?.finish_reason || ended;
        record.seconds = chunk.rsim?.seconds ?? record.seconds; // of each step, at the end
        if (chunk.rsim?.output) {
          text.append(element("em", { textContent: chunk.rsim.output }));
          record.content += chunk.rsim.output;
        } else if (chunk.rsim?.strategy) {
          split().forEach((part) => say(...part));
          open(chunk.rsim);
        } else {
          const thought = delta.reasoning_content || delta.reasoning;
          if (thought && (thinking || thought.trim())) say(thought, true);
          if (delta.content) split(delta.content).forEach((part) => say(...part));
        }
      }
    }
    record.usage = usage;
    const spent = `${((performance.now() - began) / 1000).toFixed(1)} s` + (usage ? `, ${usage.completion_tokens} tokens sampled` : "");
    if (!ended) end(`cut: the answer broke off; ${spent}`, "error");
    else if (ended === "length") end(`cut: the limit of tokens was reached; ${spent}`, "cut");
    else if (ended !== "stop") end(`ended by ${ended}; ${spent}`, "cut");
    else if (!sampled.trim()) end(`an empty answer: the model said nothing; ${spent}`, "cut");
    else end(spent);
  } catch (error) {
    if (error.name === "AbortError") return end("stopped", "cut");
    end(record.content ? "cut: the connection broke" : "the server cannot be reached", "error");
    connect();
  }
}

async function ask(follows) {
  if (!$("form").reportValidity()) return;
  running?.abort();
  const mine = (running = new AbortController());
  if (!follows) {
    turns = [];
    $("answers").replaceChildren();
  }
  $("stop").disabled = false;
  const model = $("model").value, planned = $("planner").checked, question = $("question").value;
  const turn = { question, system: $("system").value, answers: {} }, columns = element("div", { className: "columns" });
  const box = element("div", { className: "turn" }, element("h2", { textContent: question }), columns);
  $("answers").append(box);
  const plays = ($("compare").checked ? [planned, !planned] : [planned]).map((kind) => {
    const asked = messages(kind, question), record = (turn.answers[kind ? "planned" : "alone"] = {});
    return answer(model, kind, asked, record, columns, mine.signal);
  });
  turns.push(turn);
  await Promise.all(plays);
  if (running !== mine) return;
  $("stop").disabled = true;
  $("copy").disabled = false;
  $("follow").disabled = !turns.some(({ answers }) => Object.values(answers).some(({ content }) => content));
  if (!retry && $("state").textContent === "ready") connect(); // how prompts get in is known now
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(false); });
$("follow").addEventListener("click", () => ask(true));
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => running?.abort());
$("copy").addEventListener("click", async () => {
  try { await navigator.clipboard.writeText(JSON.stringify({ turns }, null, 2)); $("copy").textContent = "Copied"; }
  catch { $("copy").textContent = "Copying is not allowed here"; }
  setTimeout(() => { $("copy").textContent = "Copy trace"; }, 2000);
});
$("key").addEventListener("change", connect);
connect();
