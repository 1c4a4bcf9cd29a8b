"use strict";

const find = (id) => document.getElementById(id);
const history = [];
let pictures = [];
let model = "";
let running = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if (find("key").value) found.Authorization = "Bearer " + find("key").value;
  return found;
}

async function loadModel() {
  const reply = await fetch("v1/models", { headers: headers() });
  find("key-label").hidden = reply.status !== 401 && !find("key").value;
  if (!reply.ok) {
    find("model").textContent = reply.status === 401 ? "this server asks for a key" : "error " + reply.status;
    return;
  }
  const names = (await reply.json()).data.map((card) => card.id);
  model = names[0];
  find("model").textContent = model;
  for (const option of find("mode").options) {
    option.disabled = option.value in { nothink: 0, nowait: 0 } && !names.includes(model + "-" + option.value);
  }
}

function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => { pictures.push(reader.result); showPictures(); };
    reader.readAsDataURL(file);
  }
}

function showPictures() {
  const box = find("pictures");
  box.replaceChildren();
  pictures.forEach((address, number) => {
    const button = make("button");
    button.type = "button";
    button.title = "Remove this picture";
    const image = make("img");
    image.src = address;
    image.alt = "picture " + (number + 1);
    button.append(image);
    button.onclick = () => { pictures.splice(number, 1); showPictures(); };
    box.append(button);
  });
}

// White at 0 nats, orange from 3 nats on.
function heatOf(nats) {
  return "rgba(235, 110, 20, " + Math.min(nats / 3, 1) * 0.6 + ")";
}

// Characters may take several tokens: bytes are decoded as they come, and each piece of text has
// the highest entropy of its tokens.
class Heated {
  constructor(element) {
    this.element = element;
    this.decoder = new TextDecoder("utf-8");
    this.highest = 0;
  }
  add(entry) {
    const text = this.decoder.decode(new Uint8Array(entry.bytes), { stream: true });
    this.highest = Math.max(this.highest, entry.entropy);
    if (!text) return;
    const span = make("span", "", text);
    span.title = JSON.stringify(text) + "  entropy " + this.highest.toFixed(2) + " nats, probability " + Math.exp(entry.logprob).toFixed(3);
    span.style.backgroundColor = heatOf(this.highest);
    this.element.append(span);
    this.highest = 0;
  }
}

class Answer {
  constructor(thinking) {
    this.turn = make("div", "turn");
    this.fold = make("details");
    this.summary = make("summary", "", thinking ? "Thinking…" : "Thought");
    this.thoughtPlain = make("div", "thought");
    this.fold.append(this.summary, this.thoughtPlain);
    this.fold.hidden = true;
    this.plain = make("div", "answer");
    this.all = make("div", "answer heat");
    this.heatFold = make("details");
    this.heatFold.append(make("summary", "", "Every token, colored by its entropy"), this.all);
    this.heatFold.hidden = true;
    this.note = make("div", "note");
    this.turn.append(this.fold, this.plain, this.heatFold, this.note);
    this.heated = new Heated(this.all);
    this.thought = "";
    this.answer = "";
    this.tokens = 0;
    this.entropy = 0;
  }
  take(choice) {
    this.thought += choice.delta.reasoning_content || "";
    this.answer += choice.delta.content || "";
    this.fold.hidden = !this.thought;
    this.thoughtPlain.textContent = this.thought;
    this.plain.textContent = this.answer;
    for (const entry of (choice.logprobs || { content: [] }).content) {
      this.tokens += 1;
      this.entropy += entry.entropy;
      this.heated.add(entry);
    }
    this.heatFold.hidden = !find("heat").checked || !this.tokens;
    if (choice.finish_reason) {
      this.summary.textContent = "Thought";
      this.note.textContent = this.tokens + " tokens, mean entropy " +
        (this.entropy / Math.max(this.tokens, 1)).toFixed(2) + " nats" +
        (choice.finish_reason === "length" ? ", cut at the longest length" : "");
    }
  }
  fail(message) {
    this.turn.append(make("div", "error", message));
  }
}

async function readEvents(reply, take) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      event.choices.forEach(take);
    }
  }
}

function request() {
  const mode = find("mode").value;
  const body = {
    model, messages: history, stream: true, logprobs: true,
    temperature: Number(find("temperature").value),
    mode: mode === "budget" ? "slow" : mode,
  };
  if (mode === "budget") body.thinking_budget = Number(find("budget").value);
  if (find("seed").value !== "") body.seed = Number(find("seed").value);
  return body;
}

async function send(event) {
  event.preventDefault();
  const text = find("text").value.trim();
  if (running || !text) return;
  find("hint").hidden = true;
  const turn = make("div", "turn user");
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  for (const url of pictures) {
    const image = make("img");
    image.src = url;
    image.alt = "";
    turn.append(image);
  }
  turn.append(make("span", "", text));
  history.push({ role: "user", content: [...parts, { type: "text", text }] });
  const answer = new Answer(find("mode").value !== "nothink");
  find("turns").append(turn, answer.turn);
  running = new AbortController();
  find("send").disabled = true;
  find("stop").hidden = false;
  let failed = false;
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: running.signal,
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    find("text").value = "";
    pictures = [];
    showPictures();
    await readEvents(reply, (choice) => {
      answer.take(choice);
      find("turns").scrollTop = find("turns").scrollHeight;
    });
  } catch (error) {
    failed = !answer.tokens;
    answer.fail(error.name === "AbortError" ? "stopped" : error.message);
  }
  if (failed) history.pop();
  else history.push({ role: "assistant", content: answer.answer });
  running = null;
  find("send").disabled = false;
  find("stop").hidden = true;
  find("text").focus();
}

find("form").onsubmit = send;
find("stop").onclick = () => running && running.abort();
find("new").onclick = () => {
  if (running) running.abort();
  history.length = 0;
  for (const turn of [...document.querySelectorAll(".turn")]) turn.remove();
  find("hint").hidden = false;
};
find("file").onchange = (event) => { addFiles(event.target.files); event.target.value = ""; };
find("mode").onchange = () => { find("budget-label").hidden = find("mode").value !== "budget"; };
find("key").onchange = loadModel;
find("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("form").requestSubmit();
  }
};
document.addEventListener("paste", (event) => addFiles(event.clipboardData.files));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); addFiles(event.dataTransfer.files); });
loadModel();
