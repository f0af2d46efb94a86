"use strict";
// Hover values and toggles. Without this script the report is complete, only still.
(() => {
  const REACH = 40; // pixels from the pointer to the nearest point that is named
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  let named = [];

  const forget = () => {
    for (const element of named) element.classList.remove("on", "pointed");
    named = [];
    tip.hidden = true;
  };

  const nearest = (chart, x, y) => {
    let best = null;
    for (const point of chart.querySelectorAll("[data-tip]")) {
      const box = point.getBoundingClientRect();
      if (!box.width && !box.height) continue; // toggled off
      const distance = Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
      if (distance < REACH && (!best || distance < best.distance)) best = { point, distance, box };
    }
    return best;
  };

  const show = (chart, event) => {
    forget();
    const found = nearest(chart, event.clientX, event.clientY);
    if (!found) return;
    const size = found.point.closest("[data-size]");
    named = size ? [found.point, size, chart] : [found.point];
    found.point.classList.add("on");
    if (size) {
      size.classList.add("on");
      chart.classList.add("pointed");
    }
    tip.textContent = found.point.dataset.tip;
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(room, found.box.left + 14))}px`;
    const above = found.box.top - tip.offsetHeight - 10;
    tip.style.top = `${above > 8 ? above : found.box.bottom + 10}px`;
  };

  for (const chart of document.querySelectorAll("svg.chart")) {
    chart.addEventListener("pointermove", (event) => show(chart, event));
    chart.addEventListener("pointerdown", (event) => show(chart, event));
    chart.addEventListener("pointerleave", forget);
  }
  document.addEventListener("scroll", forget, { passive: true });

  const toggle = (button) => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    const { key, value } = button.dataset; // key is "size", "variant" or "seeds"
    for (const element of document.querySelectorAll(`[data-${key}]`)) {
      if (element.dataset[key] === value) element.classList.toggle("off", !shown);
    }
  };
  for (const button of document.querySelectorAll(".toggles button")) {
    button.addEventListener("click", () => toggle(button));
  }
})();
