// One recorded step under five methods, as the kit computed it.
"use strict";

const { iteration, groups, methods } = page.data();
const [choice, measure, moment] = ["group", "measure", "moment"].map((id) => document.getElementById(id));
const ROWS = { baseline: "baseline", divided: "divided by", clip: "ratios that the clip lets go on", averaged: "the loss is the" };

groups.forEach((group, number) => choice.append(page.make("option", { value: number }, group.prompt)));
for (const control of [choice, measure, moment]) control.addEventListener("change", draw);

const heads = () => methods.map((method) => page.make("th", { scope: "col" }, method.name));
document.querySelector("#settings thead").append(page.make("tr", {}, page.make("td"), ...heads()));
for (const [key, name] of Object.entries(ROWS)) {
  const cells = methods.map((method) => page.make("td", { class: "text" }, method.told[key]));
  document.querySelector("#settings tbody").append(page.make("tr", {}, page.make("th", { scope: "row" }, name), ...cells));
}

function valuesOf(method) {
  const now = method.moments[moment.value];
  return { advantages: method.advantages, weights: method.weights, shares: now.shares, held: now.held }[measure.value];
}

function draw() {
  const { prompt, rows, samples } = groups[choice.selectedIndex];
  moment.disabled = measure.value === "advantages" || measure.value === "weights";
  const columns = methods.map(valuesOf);
  const most = Math.max(...columns.flat().map(Math.abs));
  const digits = { advantages: 2, weights: 2, shares: 1, held: 0 }[measure.value];
  const ranked = rows.map((_, number) => number).sort((one, other) => samples[other].reward - samples[one].reward);
  const body = ranked.map((number) => {
    const { picture, text, reward, tokens } = samples[number];
    const about = `reward ${reward.toFixed(3).replace("-", "−")}, ${tokens} tokens`;
    const image = page.make("img", { src: picture, width: 48, height: 48, alt: "" });
    const words = page.make("span", {}, text, page.make("small", {}, about));
    const head = page.make("th", { scope: "row" }, page.make("div", { class: "sample" }, image, words));
    return page.make("tr", {}, head, ...columns.map((column) => cell(column[rows[number]], most, digits)));
  });
  document.querySelector("#numbers thead").replaceChildren(page.make("tr", {}, page.make("th", { scope: "col" }, "rewrite"), ...heads()));
  document.querySelector("#numbers tbody").replaceChildren(...body);
  document.querySelector("#numbers caption").textContent = `“${prompt}”, iteration ${iteration}: ${measure.selectedOptions[0].text}`;
  page.say(reading(rows, samples));
}

function cell(value, most, digits) {
  if (measure.value === "advantages" || measure.value === "shares") return page.barCell(value, most, digits);
  return page.make("td", { "data-value": value }, value.toFixed(digits));
}

function reading(rows, samples) {
  const up = methods.map((method) => `${method.name} ${rows.filter((row) => method.advantages[row] > 0).length}`);
  const share = methods.map((method) => {
    const shares = method.moments[moment.value].shares;
    return `${method.name} ${rows.reduce((sum, row) => sum + Math.abs(shares[row]), 0).toFixed(0)}\u00a0%`;
  });
  return `Pushed up, of these ${samples.length} rewrites: ${up.join(", ")}. Share of the whole step that goes to this prompt: ${share.join(", ")}.`;
}

draw();
