"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
const ring = document.getElementById("ring");
const REACH = 28; // pixels from the pointer within which a point answers

function hide() {
  tip.hidden = ring.hidden = true;
}

function show(event) {
  const plot = event.currentTarget;
  const box = plot.getBoundingClientRect();
  let nearest = null;
  let least = REACH * REACH;
  for (const [x, y, text] of data.points[plot.dataset.plot]) {
    const dx = box.left + x * box.width - event.clientX;
    const dy = box.top + y * box.height - event.clientY;
    const distance = dx * dx + dy * dy;
    if (distance < least) {
      least = distance;
      nearest = { left: box.left + x * box.width, top: box.top + y * box.height, text };
    }
  }
  if (nearest === null) {
    hide();
    return;
  }
  tip.textContent = nearest.text;
  tip.hidden = ring.hidden = false;
  ring.style.left = nearest.left + "px";
  ring.style.top = nearest.top + "px";
  const left = Math.min(nearest.left + 12, window.innerWidth - tip.offsetWidth - 8);
  const above = nearest.top - tip.offsetHeight - 12;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (above > 8 ? above : nearest.top + 14) + "px";
}

for (const plot of document.querySelectorAll(".plot")) {
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
window.addEventListener("scroll", hide, { passive: true });

const layer = document.getElementById("layer");
function showLayer() {
  for (const figure of document.querySelectorAll("figure")) {
    const plots = [...figure.querySelectorAll(".plot")].filter((plot) => plot.dataset.layer !== "");
    const chosen = plots.find((plot) => plot.dataset.layer === layer.value) || plots[0];
    for (const plot of plots) {
      plot.hidden = plot !== chosen;
    }
  }
  hide();
}
if (layer) {
  layer.addEventListener("change", showLayer);
  showLayer();
}
