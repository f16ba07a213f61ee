const cards = [...document.querySelectorAll("figure")], box = document.getElementById("filter");
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const card of cards) card.hidden = !words.every(word => card.dataset.prompt.includes(word));
  const shown = cards.filter(card => !card.hidden).length;
  document.getElementById("count").textContent = words.length ? `${shown} of ${cards.length}` : "";
});
