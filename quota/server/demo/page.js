"use strict";
const FEW = 8; // later tokens, for a rate
const byId = (id) => document.getElementById(id);
const state = { model: "", picture: null, url: "", preview: null, kept: null, running: null, sample: 0, asked: 0 };

// -- the API ----------------------------------------------------------------------------------------------------------

function headers() {
  const key = byId("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function post(path, body, signal) {
  const answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => null);
  throw new Error(said?.error?.message ?? `${answer.status} ${answer.statusText}`);
}

function body(more) {
  const content = [{ type: "text", text: byId("question").value }];
  if (state.url) content.unshift({ type: "image_url", image_url: { url: state.url } });
  return { model: state.model, messages: [{ role: "user", content }], temperature: 0, max_tokens: 96, ...more };
}

const pruned = () => ({ recipe: byId("recipe").value, ...(byId("recipe").value === "none" ? {} : { keep: byId("keep").value / 100 }) });

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// -- asking -----------------------------------------------------------------------------------------------------------

async function ask(side, more, signal) {
  const shown = byId(`${side}-answer`), began = performance.now();
  shown.textContent = "";
  byId(`${side}-facts`).replaceChildren();
  let first = 0, usage = null;
  const answer = await post("v1/chat/completions", body({ ...more, stream: true, stream_options: { include_usage: true } }), signal);
  for await (const event of events(answer)) {
    const text = event.choices?.[0]?.delta?.content;
    if (text) {
      first ||= performance.now();
      shown.textContent += text;
    }
    usage = event.usage ?? usage;
  }
  const ended = performance.now();
  facts(side, usage, (first || ended) - began, ended - (first || ended));
  return usage;
}

function facts(side, usage, wait, rest) {
  if (!usage) return;
  const later = usage.completion_tokens - 1;
  const rows = [
    ["first token", `${wait.toFixed(0)} ms`],
    ["then", later >= FEW && rest > 0 ? `${(1000 * later / rest).toFixed(0)} tokens/s` : `too few tokens (${later + 1}) to say`],
    ["visual tokens", `${usage.quota.visual_tokens} → ${usage.quota.visual_tokens_kept}`],
    ["reused from the cache", `${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} tokens`],
  ];
  if (state.preview) rows.push(["keys and values", megabytes(state.preview.kv_bytes[side === "left" ? "unpruned" : "kept"])]);
  byId(`${side}-facts`).replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

async function askBoth() {
  state.running?.abort();
  const running = (state.running = new AbortController());
  byId("stop").disabled = false;
  failed("");
  say("asking ...");
  remember();
  try {
    await preview();
    await ask("left", { recipe: "none" }, running.signal);
    const usage = await ask("right", { ...pruned(), return_kept: true }, running.signal);
    state.kept = usage?.quota?.kept ?? null;
    drawLayers();
    say("done");
  } catch (error) {
    if (running !== state.running) return;
    if (error.name === "AbortError") say("stopped");
    else failed(error.message);
  } finally {
    if (running === state.running) byId("stop").disabled = true;
  }
}

// The same request alone and among fifteen others: log-probabilities of all tokens, character by character.
async function sameBits() {
  failed("");
  say("asking alone, then in a batch of 16 ...");
  const wanted = { ...pruned(), logprobs: true, top_logprobs: 5 };
  const bits = async () => JSON.stringify((await (await post("v1/chat/completions", body(wanted))).json()).choices[0].logprobs);
  try {
    const alone = await bits();
    const others = Array.from({ length: 15 }, (_, i) => post("v1/chat/completions", body({ ...pruned(), temperature: 1, seed: i })));
    const [crowd] = await Promise.all([bits(), ...others.map((other) => other.then((answer) => answer.text()))]);
    say(alone === crowd ? "same bits: every log-probability is equal, alone and in a batch of 16" : "DIFFERENT log-probabilities: please report this");
  } catch (error) {
    failed(error.message);
  }
}

// -- preview ----------------------------------------------------------------------------------------------------------

async function preview() {
  const number = ++state.asked;
  const answer = await (await post("v1/quota/preview", body(pruned()))).json();
  if (number !== state.asked) return;
  state.preview = answer;
  state.kept = null;
  drawLayers();
}

let waiting = 0;
function previewSoon() {
  byId("share").textContent = `${byId("keep").value} %`;
  clearTimeout(waiting);
  waiting = setTimeout(() => preview().catch((error) => failed(error.message)), 60);
}

function drawLayers() {
  const layers = state.preview?.visual_tokens_by_layer ?? [];
  const total = (state.preview?.images ?? []).reduce((sum, image) => sum + image.visual_tokens, 0);
  const at = Math.min(Number(byId("layer").value), Math.max(layers.length - 1, 0));
  byId("layer").max = Math.max(layers.length - 1, 0);
  byId("at").textContent = layers.length ? `${at}: ${layers[at]} of ${total}` : "-";
  byId("layers").replaceChildren(...layers.map((alive, layer) => {
    const bar = element("span"), inner = element("i");
    inner.style.height = `${total ? 100 * alive / total : 0}%`;
    bar.title = `layer ${layer}: ${alive} of ${total} visual tokens`;
    bar.classList.toggle("now", layer === at);
    bar.append(inner);
    return bar;
  }));
  const mean = layers.reduce((sum, alive) => sum + alive, 0) / (layers.length || 1);
  byId("layers").setAttribute("aria-label", layers.length
    ? `${total} visual tokens enter, ${layers.at(-1)} are left in the last layer, ${mean.toFixed(0)} on average over ${layers.length} layers`
    : "no visual tokens");
  drawImage(at);
}

// The image as the model sees it: whole where its tokens have a grid of their own or it is cut into tiles, else the square in its middle. Tokens that
// are gone are dark; tiles overlap in the image, so their tokens are only counted.
function drawImage(layer) {
  const canvas = byId("image"), pen = canvas.getContext("2d"), picture = state.picture;
  if (!picture) return;
  const image = state.preview?.images?.[0];
  const side = Math.min(picture.width, picture.height), square = image?.tiles === 1 && !image.grid;
  const [left, top, width, height] = square
    ? [(picture.width - side) / 2, (picture.height - side) / 2, side, side]
    : [0, 0, picture.width, picture.height];
  canvas.width = 672;
  canvas.height = Math.round(672 * height / width);
  pen.drawImage(picture, left, top, width, height, 0, 0, canvas.width, canvas.height);
  const drops = Object.keys(state.kept ?? {}).map(Number).filter((candidate) => candidate <= layer);
  const total = image?.visual_tokens ?? 0;
  let alive = total;
  if (drops.length && total) {
    const [rows, columns] = image.grid ?? [Math.sqrt(total), Math.sqrt(total)];
    const kept = new Set(state.kept[String(Math.max(...drops))].filter((token) => token < total));
    alive = kept.size;
    pen.fillStyle = "rgba(0, 0, 0, 0.72)";
    for (let token = 0; image.tiles === 1 && token < total; token++) {
      if (kept.has(token)) continue;
      const x = token % columns, y = Math.floor(token / columns);
      const [x0, x1] = [x, x + 1].map((edge) => Math.round(edge * canvas.width / columns));
      const [y0, y1] = [y, y + 1].map((edge) => Math.round(edge * canvas.height / rows));
      pen.fillRect(x0, y0, x1 - x0, y1 - y0);
    }
  }
  canvas.setAttribute("aria-label", total ? `the image; ${alive} of its ${total} visual tokens are alive in layer ${layer}` : "the image");
}

// -- the image --------------------------------------------------------------------------------------------------------

async function take(blob) {
  try {
    state.picture = await createImageBitmap(blob);
  } catch {
    failed("this is not an image the browser can read");
    return;
  }
  state.url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  failed("");
  byId("hint").textContent = "Drop another image here, or choose one.";
  state.kept = state.preview = null;
  drawImage(0);
  previewSoon();
}

async function takeSample() {
  const answer = await fetch(`demo/samples/${state.sample++}.png`);
  if (!answer.ok) return failed("this server has no samples");
  if (!byId("question").value) byId("question").value = answer.headers.get("x-question") ?? "";
  await take(await answer.blob());
}

// -- small things -----------------------------------------------------------------------------------------------------

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const say = (text) => { byId("status").textContent = text; };
const failed = (text) => { byId("error").textContent = text; if (text) say(""); };

function remember() {
  const setting = new URLSearchParams({ recipe: byId("recipe").value, keep: byId("keep").value, question: byId("question").value });
  history.replaceState(null, "", `#${setting}`);
}

async function start() {
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) return failed("the server wants a key: type it, then ask");
  const card = (await answer.json()).data[0];
  state.model = card.id;
  byId("recipe").replaceChildren(...[...card.recipes, "none"].map((name) => element("option", name)));
  const setting = new URLSearchParams(location.hash.slice(1));
  if (card.recipes.includes(setting.get("recipe"))) byId("recipe").value = setting.get("recipe");
  byId("keep").value = setting.get("keep") ?? 30;
  byId("question").value = setting.get("question") ?? "";
  byId("share").textContent = `${byId("keep").value} %`;
  await takeSample();
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); askBoth(); });
byId("stop").addEventListener("click", () => state.running?.abort());
byId("bits").addEventListener("click", sameBits);
byId("sample").addEventListener("click", takeSample);
byId("key").addEventListener("change", () => { if (!state.model) start(); });
byId("file").addEventListener("change", (event) => { if (event.target.files[0]) take(event.target.files[0]); });
byId("keep").addEventListener("input", previewSoon);
byId("keep").addEventListener("change", () => { if (byId("right-answer").textContent) askBoth(); });
byId("recipe").addEventListener("change", previewSoon);
byId("layer").addEventListener("input", drawLayers);
for (const kind of ["dragover", "dragleave", "drop"]) {
  byId("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
byId("drop").addEventListener("click", () => byId("file").click());
byId("drop").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); byId("file").click(); } });
start().catch((error) => failed(error.message));
