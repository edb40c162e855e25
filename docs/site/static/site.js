// What is wider than its place can be scrolled by keys.
"use strict";

function reachByKeys() {
  for (const part of document.querySelectorAll("pre, .formula, .table-wrapper, .cell_output, .wide")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  }
}

addEventListener("load", reachByKeys);
addEventListener("resize", reachByKeys);
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", reachByKeys);
