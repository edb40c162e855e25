// The groups of a recorded run, one at a time.
"use strict";

const groups = page.json("data");
const [choice, order, scale] = ["group", "order", "scale"].map((id) => document.getElementById(id));
const HOW = {
  group: { scale: "group" },
  none: { scale: "none" },
  leave_one_out: { scale: "none", baseline: "leave_one_out" },
};

groups.forEach((group, number) => {
  choice.append(page.make("option", { value: number }, page.word("group", group.iteration, group.prompt)));
});
for (const control of [choice, order, scale]) control.addEventListener("change", draw);
for (const [id, step] of [["before", -1], ["after", 1]]) {
  document.getElementById(id).addEventListener("click", () => {
    choice.selectedIndex = (choice.selectedIndex + step + groups.length) % groups.length;
    draw();
  });
}

function draw() {
  const { iteration, prompt, samples } = groups[choice.selectedIndex];
  const rewards = samples.map((sample) => sample.reward);
  const computed = grpo.groupAdvantages(rewards, rewards.map(() => 0), HOW[scale.value] ?? HOW.group);
  const shown = samples.map((sample, number) => ({
    ...sample,
    shown: scale.value === "recorded" ? sample.advantage : computed[number],
  }));
  if (order.value === "reward") shown.sort((one, other) => other.reward - one.reward);
  document.getElementById("cards").replaceChildren(...shown.map(card));
  const [least, most] = [Math.min(...rewards), Math.max(...rewards)].map((value) => value.toFixed(3).replace("-", "−"));
  const different = new Set(samples.map((sample) => sample.text)).size;
  const deviation = grpo.deviation(rewards).toFixed(3);
  page.say(page.word("told", prompt, iteration, different, samples.length, least, most, deviation));
}

function card(sample) {
  const picture = page.make("img", {
    src: page.word("pictures", sample.picture),
    width: 128,
    height: 128,
    alt: page.word("drawn", sample.text),
  });
  const gold = `${(100 * sample.gold).toFixed(0)}\u00a0%`;
  const numbers = page.make(
    "p",
    { class: "numbers" },
    page.make("strong", { "data-value": sample.shown }, page.signed(sample.shown)),
    ` ${page.word("numbers", sample.reward.toFixed(3).replace("-", "−"), gold)}`,
  );
  return page.make("li", { class: sample.shown < 0 ? "below" : "above" }, picture, numbers, page.make("p", {}, sample.text));
}

draw();
