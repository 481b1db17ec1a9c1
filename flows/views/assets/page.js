"use strict";
// What pages share: their data, elements, and the tip beside the pointer. All text is put in as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key in element) element[key] = value; else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

// of a box on the screen: below it, or above where there is no room
function tip(content, box) {
  const place = $("tip");
  place.replaceChildren(content);
  place.hidden = false;
  place.style.left = `${Math.max(4, Math.min(box.left, innerWidth - place.offsetWidth - 8))}px`;
  const below = box.bottom + 6, above = box.top - place.offsetHeight - 6;
  place.style.top = `${below + place.offsetHeight > innerHeight ? Math.max(4, above) : below}px`;
}
