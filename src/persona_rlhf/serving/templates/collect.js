// Keys for the buttons that name one in data-key, and no form is sent twice. The page works without this file.
"use strict";

const STORE = "collect-keys";
let keysOn = true;
try { keysOn = localStorage.getItem(STORE) !== "off"; } catch { /* storage is forbidden: keys stay on */ }

document.addEventListener("keydown", (event) => {
  if (!keysOn || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("textarea, input, select, summary")) return;
  for (const control of document.querySelectorAll("[data-key]")) {
    if (control.dataset.key.split(" ").includes(event.key)) {
      event.preventDefault();
      control.click();
      return;
    }
  }
});

for (const form of document.forms) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) { event.preventDefault(); return; }
    form.dataset.sent = "yes";
    const status = document.createElement("p");
    status.className = "busy";
    status.setAttribute("role", "status");
    form.append(status);
    status.textContent = form.dataset.busy ?? "";
  });
}
window.addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

if (document.querySelector("[data-key]")) {
  const toggle = document.createElement("button");
  const label = () => { toggle.textContent = keysOn ? "Turn the keys off" : "Turn the keys on"; };
  toggle.type = "button";
  toggle.className = "quiet keys";
  label();
  toggle.addEventListener("click", () => {
    keysOn = !keysOn;
    try { localStorage.setItem(STORE, keysOn ? "on" : "off"); } catch { /* it holds for this page */ }
    label();
  });
  document.querySelector("footer").append(toggle);
}
