// Four tokens' ratios under a clipped loss: what each one's loss and push are.
"use strict";

const METHODS = { // by the names of their words
  ppo: { low: 0.2, high: 0.2, level: "token" },
  dapo: { low: 0.2, high: 0.28, level: "token" },
  gspo: { low: 0.2, high: 0.2, level: "sequence" },
};
const MOST = 3; // of the ratio, and of the curve's axes
const find = (id) => document.getElementById(id);

const ratios = [1.35, 1.22, 1.05, 0.7].map((value, number) =>
  page.slider(find("ratios"), { id: `ratio${number + 1}`, label: page.word("ratio_of", number + 1), value, min: 0.01, max: MOST, step: 0.01 }, draw),
);
const advantage = page.slider(find("bounds"), { id: "advantage", label: page.word("advantage"), value: 1, min: -2, max: 2, step: 0.01 }, draw);
const low = page.slider(find("bounds"), { id: "low", label: page.word("low"), value: 0.2, min: 0.01, max: 0.9, step: 0.01 }, draw);
const high = page.slider(find("bounds"), { id: "high", label: page.word("high"), value: 0.2, min: 0.01, max: 1.5, step: 0.01 }, draw);

for (const value of ["token", "sequence"]) {
  const input = page.make("input", { type: "radio", name: "level", id: `level-${value}`, value });
  input.checked = value === "token";
  input.addEventListener("change", draw);
  find("levels").append(page.make("label", { for: input.id }, input, ` ${page.word(`by_${value}`)}`));
}
for (const [name, settings] of Object.entries(METHODS)) {
  page.button(find("presets"), page.word(name), () => {
    low.value = settings.low;
    high.value = settings.high;
    find(`level-${settings.level}`).checked = true;
    draw();
  });
}

function draw() {
  const level = find("level-token").checked ? "token" : "sequence";
  const settings = { level, low: low.value, high: high.value };
  const found = grpo.completion(ratios.map((slider) => slider.value), advantage.value, settings);
  const rows = found.tokens.map((token, number) => {
    const stopped = advantage.value !== 0 && token.push === 0;
    return page.make(
      "tr",
      {},
      page.make("th", { scope: "row" }, page.word("token", number + 1)),
      cell(token.ratio, token.ratio.toFixed(2)),
      cell(token.used, token.used.toFixed(3)),
      cell(token.loss, page.signed(token.loss, 3)),
      page.barCell(token.push, 1.5, 3),
      page.make("td", {}, page.word(stopped ? "stopped" : "free")),
    );
  });
  document.querySelector("#tokens tbody").replaceChildren(...rows);
  find("loss").textContent = page.signed(found.loss, 3);
  find("loss").dataset.value = found.loss;
  drawCurve(found.tokens, settings);
  const stopped = found.tokens.filter((token) => token.push === 0).length;
  const towards = advantage.value > 0 ? "more" : "less";
  const told = [page.word(towards, page.signed(advantage.value), 4 - stopped, stopped)];
  if (level === "sequence") told.push(page.word("whole", found.whole.toFixed(3)));
  page.say(advantage.value === 0 ? page.word("zero") : told.join(" "));
}

function cell(value, text) {
  return page.make("td", { "data-value": value }, text);
}

function drawCurve(tokens, { low, high }) {
  const x = (ratio) => 40 + (ratio / MOST) * 410;
  const y = (loss) => 140 - (Math.max(-MOST, Math.min(MOST, loss)) / MOST) * 125;
  const parts = [page.make("rect", { class: "band", x: x(1 - low), y: 15, width: x(1 + high) - x(1 - low), height: 250 })];
  parts.push(page.make("line", { class: "axis", x1: 40, x2: 450, y1: y(0), y2: y(0) }));
  for (const tick of [0, 1, 2, 3]) parts.push(page.make("text", { x: x(tick), y: 284, "text-anchor": "middle" }, `${tick}`));
  for (const tick of [-3, 0, 3]) parts.push(page.make("text", { x: 32, y: y(tick) + 5, "text-anchor": "end" }, `${tick}`.replace("-", "−")));
  const points = Array.from({ length: 241 }, (_, number) => 0.01 + (number / 240) * (MOST - 0.01));
  const path = points.map((ratio) => `${x(ratio)},${y(grpo.clipped(ratio, advantage.value, { low, high }).loss)}`);
  parts.push(page.make("path", { class: "curve", d: `M${path.join("L")}` }));
  tokens.forEach((token, number) => {
    parts.push(page.make("circle", { class: token.push === 0 ? "stopped" : "free", cx: x(token.used), cy: y(token.loss), r: 7 }));
    parts.push(page.make("text", { x: x(token.used), y: y(token.loss) - 12, "text-anchor": "middle" }, `${number + 1}`));
  });
  parts.push(page.make("text", { x: 450, y: 298, "text-anchor": "end" }, page.word("axis")));
  const title = document.getElementById("curve-text");
  title.textContent = page.word("curve", page.signed(advantage.value));
  find("curve").replaceChildren(title, ...parts);
}

draw();
