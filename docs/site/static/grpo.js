// The kit's own formulas, in JavaScript: grpo_kit/grpo/advantages.py and loss.py. A test compares the two.
"use strict";

const grpo = {
  mean(values) {
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  },

  // unbiased, as torch has it
  deviation(values) {
    const middle = grpo.mean(values);
    return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1));
  },

  // A = (reward - baseline) / (spread + eps); NaN is left out of all statistics and gets 0
  groupAdvantages(rewards, groups, { scale = "group", baseline = "mean", eps = 1e-4 } = {}) {
    const scored = rewards.filter((value) => !Number.isNaN(value));
    const everyone = scored.length > 1 ? grpo.deviation(scored) : 0;
    return rewards.map((reward, place) => {
      const own = rewards.filter((value, other) => groups[other] === groups[place] && !Number.isNaN(value));
      if (Number.isNaN(reward) || own.length < 2 || Math.max(...own) === Math.min(...own)) return 0;
      let advantage = reward - grpo.mean(own);
      if (baseline === "leave_one_out") advantage *= own.length / (own.length - 1);
      if (scale === "none") return advantage;
      return advantage / ((scale === "group" ? grpo.deviation(own) : everyone) + eps);
    });
  },

  // -min(ρ A, clip(ρ) A) of one token (of one row, at sequence level), and minus its derivative by the log-probability
  clipped(ratio, advantage, { low = 0.2, high = 0.2, delta = Infinity } = {}) {
    const free = Math.min(ratio, delta) * advantage;
    const held = Math.min(Math.max(ratio, 1 - low), 1 + high) * advantage;
    const freePush = ratio <= delta ? ratio * advantage : 0;
    const heldPush = ratio >= 1 - low && ratio <= 1 + high ? ratio * advantage : 0;
    const push = free < held ? freePush : free > held ? heldPush : (freePush + heldPush) / 2;
    return { loss: -Math.min(free, held), push };
  },

  // a rewrite of several tokens, each with its ratio and a weight of 1 / their number
  completion(ratios, advantage, { level = "token", ...bounds } = {}) {
    const count = ratios.length;
    const whole = Math.exp(grpo.mean(ratios.map(Math.log))); // one ratio a row, from its mean log-ratio
    const tokens = ratios.map((ratio) => {
      const used = level === "token" ? ratio : whole;
      const { loss, push } = grpo.clipped(used, advantage, bounds);
      return { ratio, used, loss, push: push / count };
    });
    return { loss: grpo.mean(tokens.map((token) => token.loss)), whole, tokens };
  },
};

// --- what the pages share ---------------------------------------------------------------------------------------------

const page = {
  signed(value, digits = 2) {
    const text = Math.abs(value).toFixed(digits);
    return Number(text) === 0 ? text : (value < 0 ? "−" : "+") + text;
  },

  make(name, attributes = {}, ...children) {
    const svg = ["svg", "path", "line", "rect", "circle", "text"].includes(name);
    const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null) element.setAttribute(key, value);
    element.append(...children);
    return element;
  },

  // a labelled slider with its value beside it; `changed` is called when it moves
  slider(place, { id, label, value, min, max, step, digits = 2 }, changed) {
    const input = page.make("input", { type: "range", id, min, max, step, value });
    const shown = page.make("output", { for: id });
    const show = () => (shown.textContent = Number(input.value).toFixed(digits).replace("-", "−"));
    input.addEventListener("input", () => (show(), changed()));
    place.append(page.make("div", { class: "slider" }, page.make("label", { for: id }, label), input, shown));
    show();
    return {
      get value() {
        return Number(input.value);
      },
      set value(next) {
        input.value = next;
        show();
      },
      set hidden(hidden) {
        input.parentElement.hidden = hidden;
      },
    };
  },

  button(place, label, pressed) {
    const button = page.make("button", { type: "button" }, label);
    button.addEventListener("click", pressed);
    place.append(button);
    return button;
  },

  // a number with a bar from the middle: right and filled above 0, left and striped below
  barCell(value, most, digits = 2) {
    const share = most > 0 ? Math.min(1, Math.abs(value) / most) * 50 : 0;
    const side = value < 0 ? `right: 50%; width: ${share}%` : `left: 50%; width: ${share}%`;
    const bar = page.make("span", { class: value < 0 ? "bar below" : "bar", style: side });
    const track = page.make("span", { class: "track", "aria-hidden": "true" }, bar);
    const text = page.make("span", { class: "number" }, page.signed(value, digits));
    return page.make("td", { "data-value": value }, text, track);
  },

  say(text) {
    document.getElementById("told").textContent = text;
  },

  json(id) {
    return JSON.parse(document.getElementById(id).textContent);
  },

  // a text in the page's language, with these values in its holes: {} in their order, {0} and {1} by their places
  word(name, ...values) {
    page.words ??= page.json("words");
    let next = 0;
    return page.words[name].replace(/\{(\d?)\}/g, (_, place) => values[place === "" ? next++ : place]);
  },
};
