"use strict";
// Search and filters of each list of episodes.
for (const list of document.querySelectorAll(".list")) {
  const [find, verdict, used, count] = [".find", ".verdict", ".used", ".count"].map((name) => list.querySelector(name));
  const cards = [...list.querySelectorAll(".episode")].map((card) => [card, card.textContent.toLowerCase()]);
  list.addEventListener("input", () => {
    let shown = 0;
    for (const [card, text] of cards) {
      card.hidden = !text.includes(find.value.toLowerCase()) || (verdict.value && card.dataset.verdict !== verdict.value)
        || (used.value && !card.dataset.used.split("|").includes(used.value));
      shown += !card.hidden;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${count.dataset.of} shown`;
  });
}
// The values of a chart where the pointer is.
for (const svg of document.querySelectorAll("svg[data-places]")) {
  const figure = svg.closest("figure"), cursor = svg.querySelector(".cursor");
  const places = JSON.parse(svg.dataset.places), where = figure.querySelector("figcaption span");
  const values = [...figure.querySelectorAll("li b")], last = values.map((value) => value.textContent);
  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const [place, step, said] = places.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, place);
    cursor.setAttribute("visibility", "visible");
    where.textContent = `step ${step}`;
    values.forEach((value, i) => { value.textContent = said[i] || "–"; });
  };
  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    where.textContent = "";
    values.forEach((value, i) => { value.textContent = last[i]; });
  });
}
