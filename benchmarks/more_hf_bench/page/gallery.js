const table = document.getElementById("pictures"), body = table.tBodies[0], all = [...body.rows];
const value = id => document.getElementById(id).value;

// The distance of a method's picture in a row; NaN where there is none.
function lpips(row, method) {
  const cell = [...row.cells].find(cell => cell.dataset.method === method && cell.dataset.lpips);
  return cell ? Number(cell.dataset.lpips) : NaN;
}

function isShown(data) {
  const words = value("text").toLowerCase().split(/\s+/).filter(Boolean);
  const artist = value("artist"), forget = value("forget");
  if (artist === "forgotten" && data.forgotten !== "true") return false;
  if (artist === "none" && data.artist !== "") return false;
  if (!["", "forgotten", "none"].includes(artist) && data.artist !== artist) return false;
  return (forget === "" || data.forget === forget) && words.every(word => data.prompt.includes(word));
}

function show() {
  for (const row of all) row.hidden = !isShown(row.dataset);
  const method = value("method");
  for (const cell of table.querySelectorAll("[data-method]")) {
    cell.hidden = method !== "" && cell.dataset.method !== method;
  }
  const shown = all.filter(row => !row.hidden).length;
  document.getElementById("rows").textContent = `${shown} of ${all.length} rows`;
}

// Orders are "", "METHOD:d" (largest first) and "METHOD:a" (smallest first).
function sort() {
  const order = value("sort"), cut = order.lastIndexOf(":"), method = order.slice(0, cut);
  const sign = order.endsWith("d") ? -1 : 1;
  const key = row => {
    const distance = lpips(row, method);
    return Number.isNaN(distance) ? Infinity : sign * distance;
  };
  body.append(...(order === "" ? all : [...all].sort((a, b) => key(a) - key(b))));
}

for (const id of ["forget", "artist", "method", "text"]) document.getElementById(id).addEventListener("input", show);
document.getElementById("sort").addEventListener("input", sort);
show();
