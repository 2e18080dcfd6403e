"use strict";
// The page of one session. It talks to its own server alone; frames of all its videos stay in its memory.

const $ = (id) => document.getElementById(id);
const form = $("form");
const SMALL = 200; // pixels of a side: smaller videos are shown with hard pixels
const LIVELY = 3e5; // pixels of all frames of a video up to which it moves in the gallery
const BESIDE = { nothing: "no", seed: "a second seed", checkpoint: "second checkpoint" };

let about = null; // what the server offers
let example = null; // number of the chosen example
let uploaded = null; // {preview, text} of the uploaded image
let running = null; // AbortController of the running request
let shown = []; // videos on the stage
let frame = 0, playing = true, last = 0; // of the player
let gallery = []; // {card, canvas, context, videos}

// ---- talking to the server

class Refused extends Error {}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  let message = `The server answered with ${response.status}.`;
  try { message = (await response.json()).message || message; } catch { /* no JSON: keep the number */ }
  throw new Refused(message);
}

const place = (rest) => `api/session/${about.session}/${rest}`;

async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

function complain(error) {
  if (error && error.name === "AbortError") return;
  const known = error instanceof Refused;
  if (error && !known) console.error(error);
  $("error").textContent = error ? (known ? error.message : `The page failed: ${error.message}`) : "";
  $("error").hidden = !error;
  if (error) $("error").scrollIntoView({ block: "nearest" });
}

// ---- the image

function choose(number) {
  example = number;
  for (const [n, button] of [...$("examples").children].entries()) button.setAttribute("aria-pressed", n === number);
  const source = number === null ? uploaded && uploaded.preview : about.examples[number];
  $("preview").hidden = !source;
  $("invite").hidden = Boolean(source);
  if (source) $("preview").src = source;
  $("about-image").textContent = number === null ? (uploaded ? uploaded.text : "") : `Example ${number + 1}. Drop an image to use your own.`;
  ready();
}

function enlarge(image) {
  const small = Math.max(image.naturalWidth, image.naturalHeight) < SMALL;
  image.classList.toggle("small", small);
  image.style.width = small ? "192px" : "";
}

async function upload(file) {
  if (!file || running) return;
  complain(null);
  try {
    const limit = about.limits.bytes; // the server checks again; this saves the way there
    if (file.size > limit) throw new Refused(`The file is larger than ${+(limit / 1e6).toPrecision(3)} MB, the limit here.`);
    $("about-image").textContent = "reading the image";
    const target = place(`image?name=${encodeURIComponent(file.name)}`);
    const got = await (await call(target, { method: "PUT", body: file })).json();
    const [height, width] = got.video;
    const toy = about.models.some((model) => model.world);
    const known = toy ? " This model has seen nothing but its procedural world: a photograph becomes a blur." : "";
    const text = `${got.width} x ${got.height} pixels; the video has ${width} x ${height}.${known}`;
    uploaded = { preview: got.preview, text };
    choose(null);
  } catch (error) {
    choose(example);
    complain(error);
  }
}

// ---- settings

function fill(values) {
  for (const control of form.elements) {
    if (!(control.name in values)) continue;
    control.value = values[control.name] ?? "";
  }
  $("second").hidden = form.elements.beside.value !== "seed";
}

function settings() {
  const found = { example };
  for (const control of form.elements) {
    if (!control.name) continue;
    const text = control.value;
    found[control.name] = control.type !== "number" ? text : text === "" ? null : Number(text);
    if (control.type === "number" && control.validity.badInput) throw new Refused(`${control.name}: give a number.`);
  }
  return found;
}

function ready() {
  $("go").disabled = Boolean(running) || !about || (example === null && !uploaded);
}

// ---- generation

async function generate() {
  complain(null);
  running = new AbortController();
  lock(true);
  try {
    const asked = JSON.stringify(settings());
    say("asking");
    const response = await call(place("videos"), { method: "POST", body: asked, signal: running.signal });
    const made = [];
    for await (const event of lines(response)) {
      if (event.event === "error") throw new Refused(event.message);
      await happen(event, made);
    }
    if (!made.length || !made.every((video) => video.name)) throw new Refused("The server ended before the video.");
    remember(made);
    say("");
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : "");
    complain(error);
  } finally {
    running = null;
    lock(false);
  }
}

async function happen(event, made) {
  const video = made[event.side];
  const which = made.length > 1 ? `video ${event.side + 1}: ` : "";
  if (event.event === "waiting") say(event.ahead ? `waiting for ${event.ahead} before this one` : "next in line");
  if (event.event === "begin") {
    made.push({ ...event, blobs: [], bitmaps: [], name: null });
    if (event.side === 0) frame = 0;
    show(made, event.side === 0 || made.length > 1);
  }
  if (event.event === "stage") say(`${which}${event.name}${event.new ? " (compiling, the first time takes longer)" : ""}`);
  if (event.event === "progress") say(`${which}step ${event.done} of ${event.total}`, event.done / event.total);
  if (event.event === "frame") {
    const blob = bytes(event.url);
    video.blobs.push(blob);
    video.bitmaps.push(await createImageBitmap(blob));
    if (made.length === 1) frame = video.bitmaps.length - 1;
    say(`${which}frame ${event.number + 1} of ${video.frames}`, (event.number + 1) / video.frames);
    draw();
  }
  if (event.event === "video") {
    Object.assign(video, { name: event.name, record: event.record, seconds: event.seconds, times: event.times });
    forget(event.gone);
    results();
  }
}

function bytes(url) {
  const [head, content] = url.split(",");
  const data = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  return new Blob([data], { type: head.slice(5).split(";")[0] });
}

function say(text, part = null) {
  $("state").textContent = text;
  $("bar").hidden = !running || !text;
  if (part === null) $("bar").removeAttribute("value");
  else $("bar").value = part;
}

function lock(on) {
  $("stop").hidden = !on;
  $("file").disabled = on;
  $("drop").classList.toggle("off", on);
  for (const button of $("examples").children) button.disabled = on;
  $("bar").hidden = !on;
  ready();
}

// ---- the stage and its player

function show(videos, anew) {
  shown = videos;
  if (anew) {
    $("stage").dataset.empty = "false";
    $("stage").replaceChildren(...videos.map((video) => {
      const figure = $("screen").content.firstElementChild.cloneNode(true);
      const canvas = figure.querySelector("canvas");
      canvas.width = video.width;
      canvas.height = video.height;
      canvas.classList.toggle("small", Math.max(video.width, video.height) < SMALL);
      figure.querySelector("figcaption").textContent = `${video.title} (${video.width} x ${video.height})`;
      video.canvas = canvas;
      return figure;
    }));
    fit();
  }
  $("player").hidden = false;
  results();
  draw();
}

function fit() {
  for (const video of shown) {
    const glass = video.canvas.parentElement;
    const room = Math.max(glass.clientWidth - 24, 64);
    const scale = Math.min(room / video.width, Math.min(480, window.innerHeight * 0.6) / video.height);
    const whole = scale >= 2 ? Math.floor(scale) : scale; // whole factors keep pixels square
    video.canvas.style.width = `${Math.round(video.width * whole)}px`;
  }
}

const length = () => Math.max(...shown.map((video) => video.bitmaps.length), 0);

function draw() {
  const count = length();
  for (const video of shown) {
    const bitmap = video.bitmaps[Math.min(frame, video.bitmaps.length - 1)];
    if (bitmap) video.canvas.getContext("2d").drawImage(bitmap, 0, 0);
  }
  $("seek").max = Math.max(...shown.map((video) => video.frames)) - 1;
  $("seek").value = frame;
  $("number").textContent = count ? `${frame + 1} / ${Math.max(...shown.map((video) => video.frames))}` : "";
}

function tick(now) {
  requestAnimationFrame(tick);
  for (const entry of gallery) entry.draw(now);
  const growing = running && shown.length === 1 && !shown[0].name; // frames are shown as they come
  if (!playing || growing || !length() || now - last < 1000 / shown[0].fps) return;
  last = now;
  frame = (frame + 1) % length();
  draw();
}

function play(on) {
  playing = on;
  $("play").textContent = on ? "\u275A\u275A" : "\u25B6";
  $("play").setAttribute("aria-label", on ? "pause" : "play");
}

function results() {
  $("results").replaceChildren(...shown.filter((video) => video.name).map((video) => {
    const part = $("result").content.firstElementChild.cloneNode(true);
    part.querySelector("h3").textContent = `${video.title}: ${video.bitmaps.length} frames in ${seconds(video.seconds)}`;
    const most = Math.max(...Object.values(video.times), 1e-9);
    for (const [stage, time] of Object.entries(video.times)) {
      const [name, meter, value] = ["span", "progress", "span"].map((kind) => document.createElement(kind));
      name.textContent = stage;
      value.textContent = seconds(time);
      meter.value = time / most;
      part.querySelector(".times").append(name, meter, value);
    }
    for (const [kind, file] of [["mp4", video.name], ["json", video.record]]) {
      const link = part.querySelector(`.${kind}`);
      link.href = place(`files/${file}`);
      link.download = file;
    }
    return part;
  }));
}

const seconds = (time) => time < 1 ? `${Math.round(time * 1000)} ms` : `${time.toFixed(time < 10 ? 2 : 1)} s`;

// ---- the gallery of the session

function remember(videos) {
  const card = document.createElement("button");
  const canvas = document.createElement("canvas");
  const label = document.createElement("span");
  const { width, height, fps } = videos[0];
  canvas.width = width * videos.length;
  canvas.height = height;
  canvas.classList.toggle("small", Math.max(width, height) < SMALL);
  label.textContent = videos.map((video) => video.title).join(" | ");
  card.type = "button";
  card.append(canvas, label);
  const context = canvas.getContext("2d");
  const count = videos[0].bitmaps.length;
  const paint = (n) => videos.forEach((video, side) => context.drawImage(video.bitmaps[Math.min(n, video.bitmaps.length - 1)], side * width, 0));
  paint(0);
  const lively = width * height * count <= LIVELY;
  let before = -1;
  const entry = {
    card, videos,
    draw(now) {
      const n = Math.floor((now / 1000) * fps) % count;
      if (lively && n !== before) paint(before = n);
    },
  };
  card.addEventListener("click", () => recall(entry));
  gallery.unshift(entry);
  $("gallery").prepend(card);
  $("gallery-box").hidden = false;
  release();
  press(entry);
}

async function recall(entry) {
  if (running) return;
  complain(null);
  for (const video of entry.videos)
    if (!video.bitmaps.length) video.bitmaps = await Promise.all(video.blobs.map((blob) => createImageBitmap(blob)));
  frame = 0;
  show(entry.videos, true);
  release();
  press(entry);
}

function press(entry) {
  for (const other of gallery) other.card.setAttribute("aria-pressed", other === entry);
}

// Large frames that are not shown are kept compressed.
function release() {
  for (const { videos } of gallery)
    for (const video of videos) {
      if (shown.includes(video) || video.width * video.height * video.frames <= LIVELY) continue;
      for (const bitmap of video.bitmaps) bitmap.close();
      video.bitmaps = [];
    }
}

function forget(names) {
  const gone = gallery.filter(({ videos }) => videos.some((video) => names.includes(video.name)));
  for (const entry of gone) entry.card.remove();
  gallery = gallery.filter((entry) => !gone.includes(entry));
}

// ---- beginning and end

function describe(model) {
  const step = model.step === null ? "" : `, step ${model.step}`;
  return `${model.name}${model.method ? ` (${model.method}${step})` : step}`;
}

async function begin() {
  about = await (await call("api/session", { method: "POST" })).json();
  $("model").textContent = `${about.models.map(describe).join(" beside ")}, ${about.models[0].frames} frames`;
  for (const [name, values] of Object.entries(about.choices)) {
    const control = form.elements[name];
    control.replaceChildren(...values.map((value) => new Option(name === "beside" ? BESIDE[value] : value, value)));
    control.disabled = values.length < 2;
  }
  for (const [name, [least, most]] of Object.entries(about.ranges)) Object.assign(form.elements[name], { min: least, max: most });
  fill(about.defaults);
  $("examples").replaceChildren(...about.examples.map((url, number) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = url;
    image.alt = `example ${number + 1}`;
    image.className = "small";
    button.type = "button";
    button.append(image);
    button.addEventListener("click", () => choose(number));
    return button;
  }));
  $("examples-box").hidden = !about.examples.length;
  choose(about.defaults.example);
  setInterval(() => call(place("alive"), { method: "POST" }).catch(complain), about.limits.idle * 200);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("go").disabled) generate();
});
form.noValidate = true; // the server's sentences say more
form.elements.beside.addEventListener("change", () => { $("second").hidden = form.elements.beside.value !== "seed"; });
$("stop").addEventListener("click", () => running && running.abort());
$("dice").addEventListener("click", () => { form.elements.seed.value = Math.floor(Math.random() * 2 ** 32); });
$("reset").addEventListener("click", () => fill(about.defaults));
$("file").addEventListener("change", () => { upload($("file").files[0]); $("file").value = ""; });
$("drop").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") $("file").click(); });
$("preview").addEventListener("load", () => enlarge($("preview")));
$("play").addEventListener("click", () => play(!playing));
$("seek").addEventListener("input", () => { play(false); frame = Number($("seek").value); draw(); });
window.addEventListener("resize", fit);
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") upload(event.dataTransfer.files[0]);
  });
document.addEventListener("paste", (event) => upload(event.clipboardData.files[0]));
window.addEventListener("pagehide", () => about && navigator.sendBeacon(place("end")));
window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); }); // its session has ended

requestAnimationFrame(tick);
begin().catch((error) => { $("model").textContent = ""; complain(error); });
