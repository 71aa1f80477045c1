"use strict";
// Sorts tables and browses samples. What a model wrote reaches the page as text alone (textContent), never as HTML.
(() => {
  const PAGE = 20; // problems shown at a time
  const WIDTH = 8; // numbers of one sample
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // ---- tables

  const numberOf = (text) => {
    const found = text.replace(/−/g, "-").replace(/,/g, "").match(/^[<≈+\s]*(-?\d+(\.\d+)?(e-?\d+)?)/i);
    return found ? Number(found[1]) : null;
  };

  const sortBy = (table, column, button) => {
    const header = button.parentElement;
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => {
      const text = row.cells[column].textContent.trim();
      return { row, text, number: numberOf(text) };
    });
    const numbers = rows.filter((each) => each.number !== null).length > rows.length / 2;
    rows.sort((a, b) => {
      if (!numbers) return a.text.localeCompare(b.text) * (descending ? -1 : 1);
      if (a.number === null || b.number === null) return (a.number === null) - (b.number === null); // "–" stays last
      return (a.number - b.number) * (descending ? -1 : 1);
    });
    body.append(...rows.map((each) => each.row));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = make("button", "sort", cell.textContent);
      button.type = "button";
      button.addEventListener("click", () => sortBy(table, column, button));
      cell.replaceChildren(button);
    });
  }

  // ---- samples

  const source = document.getElementById("samples-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const browser = document.getElementById("browser");
  const form = browser.querySelector("form");
  const list = browser.querySelector(".problems");
  const status = browser.querySelector("[role=status]");
  const more = browser.querySelector(".more");
  const openAll = browser.querySelector(".open-all");

  const samples = []; // of each problem
  data.problems.forEach(() => samples.push([]));
  for (let i = 0; i < data.samples.length; i += WIDTH) {
    const [voice, problem, verdict, cut, tokens, text, answer, rule] = data.samples.slice(i, i + WIDTH);
    samples[problem].push({ voice, verdict, cut: cut === 1, tokens, text, answer, rule });
  }
  const lower = new Map(); // texts in lower case, made when first searched
  const has = (text, wanted) => {
    if (!lower.has(text)) lower.set(text, data.texts[text].toLowerCase());
    return lower.get(text).includes(wanted);
  };

  const share = (problem, voice) => {
    const [right, drawn] = data.tallies[problem][voice];
    return drawn ? right / drawn : null;
  };
  const gain = (problem, from, to) => {
    const [a, b] = [share(problem, from), share(problem, to)];
    return a === null || b === null ? null : b - a;
  };

  const wanted = () => Object.fromEntries(new FormData(form));
  const matches = (sample, asked) =>
    (asked.voice === "" || sample.voice === Number(asked.voice)) &&
    (asked.verdict === "" || sample.verdict === Number(asked.verdict)) &&
    (asked.ended === "" || sample.cut === (asked.ended === "cut"));

  // Problems that have a matching sample, each with its samples, in the order asked for.
  const select = (asked) => {
    const text = asked.text.trim().toLowerCase();
    const [from, to] = [Number(asked.from), Number(asked.to)];
    const found = [];
    data.problems.forEach(([task, question, gold], problem) => {
      if (asked.task !== undefined && asked.task !== "" && task !== Number(asked.task)) return;
      const change = gain(problem, from, to);
      if (asked.change === "up" && !(change > 0)) return;
      if (asked.change === "down" && !(change < 0)) return;
      if (asked.change === "either" && !change) return;
      let kept = samples[problem].filter((sample) => matches(sample, asked));
      if (text && !has(question, text) && !has(gold, text))
        kept = kept.filter((each) => has(each.text, text) || (each.answer >= 0 && has(each.answer, text)));
      if (kept.length) found.push({ problem, change, kept });
    });
    const change = (each) => each.change ?? 0;
    const last = (each) => share(each.problem, to) ?? 2;
    if (asked.order === "gain") found.sort((a, b) => change(b) - change(a));
    if (asked.order === "loss") found.sort((a, b) => change(a) - change(b));
    if (asked.order === "hard") found.sort((a, b) => last(a) - last(b));
    return found;
  };

  const badge = (sample) => {
    const verdict = data.statuses[sample.verdict];
    const kind = verdict === "right" || verdict === "wrong" ? verdict : "other";
    return make("span", `badge ${kind}`, verdict + (sample.cut ? ", cut" : ""));
  };

  const shown = (sample) => {
    const box = make("div", "sample");
    const line = make("p", "meta");
    const [label, css] = data.voices[sample.voice];
    line.append(make("span", css, label), badge(sample));
    const rule = data.rules[sample.rule];
    const read = sample.answer >= 0 ? `, read as “${data.texts[sample.answer]}”${rule ? ` by ${rule}` : ""}` : "";
    line.append(make("span", "quiet", `${sample.tokens.toLocaleString("en")} tokens${read}`));
    box.append(line, make("pre", "", data.texts[sample.text]));
    return box;
  };

  const item = ({ problem, kept }) => {
    const [task, question, gold] = data.problems[problem];
    const details = make("details");
    const summary = make("summary");
    summary.append(make("bdi", "question", data.texts[question]));
    const tallies = make("span", "tallies");
    data.voices.forEach(([label, css], voice) => {
      const [right, drawn] = data.tallies[problem][voice];
      if (drawn) tallies.append(make("span", css, `${label} ${right}/${drawn}`));
    });
    summary.append(tallies);
    details.append(summary);
    details.addEventListener("toggle", () => {
      if (!details.open || details.childElementCount > 1) return;
      const told = data.texts[gold] ? `Answer ${data.texts[gold]}` : "";
      const line = [data.tasks.length > 1 ? data.tasks[task] : "", told].filter(Boolean).join(" · ");
      if (line) details.append(make("p", "quiet", line));
      details.append(...kept.map(shown));
    });
    const entry = make("li");
    entry.append(details);
    return entry;
  };

  let found = [];
  const count = (number) => number.toLocaleString("en");
  const grow = () => {
    const before = list.childElementCount;
    list.append(...found.slice(before, before + PAGE).map(item));
    const rest = found.length - list.childElementCount;
    more.hidden = rest <= 0;
    more.textContent = `Show ${Math.min(PAGE, rest)} more problems`;
    openAll.hidden = found.length === 0;
    return before;
  };
  const update = () => {
    found = select(wanted());
    list.replaceChildren();
    grow();
    const kept = found.reduce((sum, each) => sum + each.kept.length, 0);
    status.textContent = found.length
      ? `${count(kept)} of ${count(data.kept)} samples, of ${count(found.length)} of ${count(data.problems.length)} problems`
      : "No sample is like that.";
    openAll.textContent = "Open all shown";
  };

  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(update));
  more.addEventListener("click", () => {
    const before = grow();
    list.children[before].querySelector("summary").focus(); // the button may be gone
  });
  openAll.addEventListener("click", () => {
    const open = openAll.textContent === "Open all shown";
    for (const details of list.querySelectorAll("details")) details.open = open;
    openAll.textContent = open ? "Close all" : "Open all shown";
  });
  document.getElementById("plain-samples").classList.add("only-print");
  browser.hidden = false;
  update();
})();
