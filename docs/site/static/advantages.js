// Rewards of a group, moved by hand, and their advantages under four definitions.
"use strict";

const SECOND_GROUP = [0.9, 0.7, 0.3, 0.1];
const DEFINITIONS = {
  group: { scale: "group" },
  batch: { scale: "batch" },
  none: { scale: "none" },
  leave_one_out: { scale: "none", baseline: "leave_one_out" },
};
const PRESETS = { // by the names of their words
  eight: [0.88, 0.71, 0.63, 0.6, 0.59, 0.41, 0.22, 0.08],
  far: [0.9, 0.1],
  near: [0.51, 0.5],
  tiny: [0.703, 0.702, 0.701, 0.7],
  outlier: [0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3],
  equal: [0.6, 0.6, 0.6, 0.6],
};
const HIGHEST = 2.8; // no advantage of at most 8 rewards in 0 to 1 is larger

const place = document.getElementById("sliders");
const size = page.slider(place, { id: "size", label: page.word("size"), value: 8, min: 2, max: 8, step: 1, digits: 0 }, draw);
const rewards = PRESETS.eight.map((value, number) =>
  page.slider(place, { id: `r${number + 1}`, label: page.word("reward", number + 1), value, min: 0, max: 1, step: 0.001, digits: 3 }, draw),
);
for (const [name, values] of Object.entries(PRESETS)) {
  page.button(document.getElementById("presets"), page.word(name), () => {
    size.value = values.length;
    values.forEach((value, number) => (rewards[number].value = value));
    draw();
  });
}

function draw() {
  rewards.forEach((slider, number) => (slider.hidden = number >= size.value));
  const own = rewards.slice(0, size.value).map((slider) => slider.value);
  const both = [...own, ...SECOND_GROUP];
  const groups = both.map((_, number) => (number < own.length ? 0 : 1));
  const columns = Object.values(DEFINITIONS).map((how) => grpo.groupAdvantages(both, groups, how));
  const rows = both.map((reward, number) => {
    const head = page.make("th", { scope: "row", "data-value": reward }, reward.toFixed(number < own.length ? 3 : 1));
    const row = page.make("tr", { class: number < own.length ? null : "second" }, head);
    row.append(...columns.map((column) => page.barCell(column[number], HIGHEST)));
    return row;
  });
  document.querySelector("#advantages tbody").replaceChildren(...rows);
  page.say(reading(own, columns));
}

function strongest(values) {
  return values.reduce((best, value) => (Math.abs(value) > Math.abs(best) + 1e-9 ? value : best));
}

function reading(own, [group, batch, none]) {
  const apart = Math.max(...own) - Math.min(...own);
  if (apart === 0) return page.word("nothing");
  const [divided, plain] = [group, none].map((column) => strongest(column.slice(0, own.length)));
  const told = [page.word("apart", apart.toFixed(3), page.signed(divided), page.signed(plain, 4))];
  const widest = grpo.groupAdvantages([1, 0], [0, 0])[0].toFixed(2);
  if (own.length === 2) told.push(page.word("cancels", widest));
  else if (apart < 0.02) told.push(page.word("noise", (divided / plain).toFixed(0)));
  told.push(page.word("second", page.signed(strongest(batch.slice(own.length)))));
  return told.join(" ");
}

draw();
