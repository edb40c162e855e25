// One recorded step under five methods, as the kit computed it.
"use strict";

const { iteration, groups, methods } = page.json("data");
const [choice, measure, moment] = ["group", "measure", "moment"].map((id) => document.getElementById(id));

groups.forEach((group, number) => choice.append(page.make("option", { value: number }, group.prompt)));
for (const control of [choice, measure, moment]) control.addEventListener("change", draw);

const heads = () => methods.map((method) => page.make("th", { scope: "col" }, method.name));

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
    const about = page.word("about", reward.toFixed(3).replace("-", "−"), tokens);
    const image = page.make("img", { src: page.word("pictures", picture), width: 48, height: 48, alt: "" });
    const words = page.make("span", {}, text, page.make("small", {}, about));
    const head = page.make("th", { scope: "row" }, page.make("div", { class: "sample" }, image, words));
    return page.make("tr", {}, head, ...columns.map((column) => cell(column[rows[number]], most, digits)));
  });
  document.querySelector("#numbers thead").replaceChildren(page.make("tr", {}, page.make("th", { scope: "col" }, page.word("rewrite")), ...heads()));
  document.querySelector("#numbers tbody").replaceChildren(...body);
  document.querySelector("#numbers caption").textContent = page.word("shown", prompt, iteration, measure.selectedOptions[0].text);
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
  return page.word("told", samples.length, up.join(", "), share.join(", "));
}

draw();
