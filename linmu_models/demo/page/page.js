"use strict";

const $ = (id) => document.getElementById(id);
const SIDES = ["teacher", "student"];
let chosen = null; // what is asked about: {id, kind, ...}
let under_way = null; // of an upload or an answer: an AbortController
let uploads = 0; // how many were begun; only the last one counts
const lines = { teacher: [], student: [] }; // [tokens, bytes] of the question at hand
const dots = []; // {side, tokens, bytes} of earlier questions

// -- words -----------------------------------------------------------------------------------------------------------

function size(bytes) {
  if (bytes < 1024) return `${bytes} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let power = Math.min(Math.floor(Math.log(bytes) / Math.log(1024)), units.length);
  return `${(bytes / 1024 ** power).toPrecision(3)} ${units[power - 1]}`;
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toPrecision(3)} s`;
}

function rate(value) {
  if (value === null) return "–";
  return value < 10 ? value.toFixed(1) : String(Math.round(value));
}

function counted(frames) {
  return `${frames} ${frames === 1 ? "frame" : "frames"}`;
}

function fail(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// -- what is asked about ---------------------------------------------------------------------------------------------

function choose(item, name) {
  chosen = item;
  const there = item !== null;
  $("preview").hidden = !there;
  $("empty").hidden = there;
  $("remove").hidden = !there;
  $("time").hidden = !there || item.kind !== "clip" || item.frames !== null;
  if (there) {
    $("preview").src = `files/${item.id}`;
    $("preview").alt = `${item.kind === "clip" ? "Frames of the clip" : "The picture"} ${name}`;
    const lasts = item.seconds === null ? "" : `, ${item.seconds.toFixed(1)} s`;
    const length = item.frames === null ? lasts : `, ${counted(item.frames)}`;
    $("about").textContent = `${name}: ${item.width} × ${item.height} pixels${length}`;
  } else {
    $("preview").removeAttribute("src");
    $("about").textContent = "";
  }
  for (const button of $("examples").children) {
    button.setAttribute("aria-pressed", String(there && button.dataset.id === item.id));
  }
}

async function upload(file) {
  fail("");
  const mine = ++uploads;
  choose(null);
  $("status").textContent = `sending ${file.name}`;
  try {
    if (file.size > facts.max_bytes) {
      throw new Error(`the file is larger than ${(facts.max_bytes / 2 ** 20).toPrecision(3)} MB: choose a smaller one`);
    }
    const type = file.type || "application/octet-stream";
    const answer = await fetch("files", { method: "POST", headers: { "Content-Type": type }, body: file });
    const item = await answer.json();
    if (mine !== uploads) return;
    if (!answer.ok) throw new Error(item.error);
    choose(item, file.name);
    $("question").focus();
  } catch (error) {
    if (mine === uploads) fail(error instanceof TypeError ? "the server cannot be reached" : `${file.name}: ${error.message}`);
  } finally {
    if (mine === uploads) $("status").textContent = "";
    $("file").value = "";
  }
}

$("file").addEventListener("change", () => {
  if ($("file").files.length) upload($("file").files[0]);
});
$("remove").addEventListener("click", () => {
  uploads++;
  choose(null);
  $("file").focus();
});
let inside = 0; // elements that what is dragged is over
document.addEventListener("dragenter", () => $("drop").classList.toggle("over", ++inside > 0));
document.addEventListener("dragleave", () => $("drop").classList.toggle("over", --inside > 0));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").classList.remove("over");
  if (facts.takes_media && event.dataTransfer.files.length) upload(event.dataTransfer.files[0]);
});

// -- a question ------------------------------------------------------------------------------------------------------

function part(side, name) {
  return $(side).querySelector(name);
}

function clear() {
  for (const side of SIDES) {
    lines[side] = [];
    part(side, ".said").textContent = "";
    for (const name of [".first", ".rate", ".bytes"]) part(side, name).textContent = "–";
    part(side, ".bytes").title = "";
  }
}

let seen = "";
let prompt_tokens = 0;

const happens = {
  seen(event) {
    const what = event.kind === "clip" ? `${counted(event.frames)} of ` : "a picture of ";
    seen = `${what}${event.width} × ${event.height} pixels`;
  },
  start(event) {
    $("status").textContent = `the ${event.side} reads${seen ? " " + seen : ""}`;
    $(event.side).classList.add("writes");
  },
  read(event) {
    $("status").textContent = `the ${event.side} writes`;
    part(event.side, ".first").textContent = seconds(event.seconds);
    lines[event.side] = event.growth;
    prompt_tokens = event.growth.length ? event.growth[event.growth.length - 1][0] : 0;
    $(event.side).dataset.first = event.seconds;
    remembered(event);
  },
  step(event) {
    const since = event.seconds - Number($(event.side).dataset.first);
    part(event.side, ".rate").textContent = rate((event.tokens - 1) / since);
    lines[event.side].push([prompt_tokens + event.tokens - 1, event.bytes]);
    remembered(event);
  },
  text(event) {
    part(event.side, ".said").textContent += event.text;
  },
  end(event) {
    $(event.side).classList.remove("writes");
    part(event.side, ".said").textContent = event.text;
    part(event.side, ".first").textContent = seconds(event.seconds);
    part(event.side, ".rate").textContent = rate(event.rate);
    const held = lines[event.side];
    if (held.length) dots.push({ side: event.side, tokens: held[held.length - 1][0], bytes: event.bytes });
    remembered(event);
    if (event.side === "student") compare();
  },
  error(event) {
    fail(event.text);
  },
};

function remembered(event) {
  part(event.side, ".bytes").textContent = size(event.bytes);
  draw();
}

function compare() {
  const [cache, state] = SIDES.map((side) => dots.findLast((dot) => dot.side === side));
  if (!cache || !state || !cache.bytes || !state.bytes) return;
  const times = cache.bytes / state.bytes;
  const more = Math.max(times, 1 / times).toFixed(1);
  const how = more === "1.0" ? "about as large as" : `${more} times ${times > 1 ? "smaller" : "larger"} than`;
  const tokens = state.tokens.toLocaleString("en");
  $("chart-says").textContent =
    `After ${tokens} tokens${seen ? " of " + seen + " and words" : ""}, the student's state is ${how} the ` +
    "teacher's cache. Ask about clips of other lengths: each question leaves a dot.";
}

async function ask() {
  if (under_way) return;
  fail("");
  const question = $("question").value;
  if (!question.trim() && !chosen) {
    fail("ask something, or choose a picture or a clip");
    $("question").focus();
    return;
  }
  const abort = (under_way = new AbortController());
  seen = "";
  clear();
  draw();
  $("ask").disabled = true;
  $("stop").hidden = false;
  $("status").textContent = chosen ? `reading the ${chosen.kind}` : "";
  let over = "";
  try {
    const body = { question, file: chosen && chosen.id, frames: $("frames").valueAsNumber, fps: $("fps").valueAsNumber };
    const answer = await fetch("ask", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: abort.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error);
    for await (const event of events(answer.body)) happens[event.what](event);
  } catch (error) {
    if (error.name === "AbortError") over = "stopped";
    else fail(error instanceof TypeError ? "the server cannot be reached" : error.message);
  } finally {
    for (const side of SIDES) $(side).classList.remove("writes");
    under_way = null;
    $("ask").disabled = false;
    $("stop").hidden = true;
    $("status").textContent = over;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    kept += value;
    const whole = kept.split("\n\n");
    kept = whole.pop();
    for (const one of whole) yield JSON.parse(one.slice("data: ".length));
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("stop").addEventListener("click", () => under_way && under_way.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && under_way) under_way.abort();
});

// -- the chart -------------------------------------------------------------------------------------------------------

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// The smallest of 1, 2, 5, 10, ... (of 1, 2, 4, 8, ... for bytes) that cuts `most` into at most `parts`.
function step(most, parts, binary) {
  const wanted = most / parts;
  if (binary) return 2 ** Math.max(0, Math.ceil(Math.log2(wanted)));
  const ten = 10 ** Math.floor(Math.log10(wanted));
  return Math.max(1, ten * [1, 2, 5, 10].find((times) => ten * times >= wanted));
}

function draw() {
  const svg = $("chart");
  const { width, height } = svg.getBoundingClientRect();
  if (!width) return;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const points = [...dots.map((dot) => [dot.tokens, dot.bytes]), ...lines.teacher, ...lines.student];
  const longest = Math.max(100, ...points.map((point) => point[0]));
  const largest = Math.max(2 ** 16, ...points.map((point) => point[1])) * 1.05;
  const [left, right, top, bottom] = [64, width - 18, 8, height - 42];
  const x = (tokens) => left + ((right - left) * tokens) / longest;
  const y = (bytes) => bottom - ((bottom - top) * bytes) / largest;
  const made = [];
  const up = step(largest, 4, true);
  for (let bytes = 0; bytes <= largest; bytes += up) {
    made.push(element("line", { class: "grid", x1: left, x2: right, y1: y(bytes), y2: y(bytes) }));
    const label = size(bytes).replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
    made.push(element("text", { x: left - 8, y: y(bytes) + 4, "text-anchor": "end" }, bytes ? label : "0"));
  }
  const along = step(longest, Math.max(2, Math.floor(width / 110)));
  for (let tokens = 0; tokens <= longest; tokens += along) {
    made.push(element("text", { x: x(tokens), y: bottom + 18, "text-anchor": "middle" }, tokens.toLocaleString("en")));
  }
  made.push(element("text", { x: (left + right) / 2, y: height - 2, "text-anchor": "middle" }, "tokens read and written"));
  for (const dot of dots) {
    made.push(element("circle", { class: dot.side, cx: x(dot.tokens), cy: y(dot.bytes), r: 4 }));
  }
  for (const side of SIDES) {
    if (!lines[side].length) continue;
    const [tokens, bytes] = lines[side][lines[side].length - 1];
    const path = lines[side].map((point) => `${x(point[0])},${y(point[1])}`).join(" ");
    made.push(element("polyline", { class: side, points: path }));
    made.push(element("circle", { class: `${side} now`, cx: x(tokens), cy: y(bytes), r: 5 }));
  }
  svg.replaceChildren(...made);
}

new ResizeObserver(draw).observe($("chart"));

// -- the page --------------------------------------------------------------------------------------------------------

let facts = { max_bytes: Infinity, takes_media: true };

async function begin() {
  facts = await (await fetch("facts")).json();
  for (const side of SIDES) part(side, "h2 small").textContent = facts[side];
  $("frames").max = facts.most_frames;
  $("limit").textContent = `${Number((facts.max_bytes / 2 ** 20).toPrecision(3))} MB at most`;
  document.querySelector(".media").hidden = !facts.takes_media;
  for (const example of facts.examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.id = example.id;
    button.setAttribute("aria-pressed", "false");
    const image = document.createElement("img");
    image.src = `files/${example.id}`;
    image.alt = "";
    button.append(image, example.title);
    button.addEventListener("click", () => {
      fail("");
      uploads++;
      choose(example, example.title);
      $("question").value = example.question;
    });
    $("examples").append(button);
  }
  $("examples").hidden = !facts.examples.length;
}

begin().catch(() => fail("the server cannot be reached"));
draw();
