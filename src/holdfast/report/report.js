(async () => {
  "use strict";
  // Long texts are gzip in base 85 (packed.py): the page is a third of its size so.
  const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
  const unpacked = (id) => {
    const { textContent, dataset } = document.getElementById(id);
    const valueOf = new Uint8Array(128);
    [...digits].forEach((digit, value) => { valueOf[digit.charCodeAt(0)] = value; });
    const bytes = new DataView(new ArrayBuffer((textContent.length / 5) * 4));
    for (let i = 0, at = 0; i < textContent.length; i += 5, at += 4) {
      let word = 0;
      for (let j = i; j < i + 5; j += 1) word = word * 85 + valueOf[textContent.charCodeAt(j)];
      bytes.setUint32(at, word);
    }
    const packed = new Blob([bytes.buffer.slice(0, Number(dataset.bytes))]);
    return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);
  const figures = JSON.parse(await unpacked("figures"));
  const config = { displayModeBar: false, responsive: true, showTips: false };

  // Figures name their colours as CSS variables, so that one stylesheet sets the page's theme.
  const painted = (value, styles) => {
    if (typeof value === "string") {
      return value.startsWith("var(--") ? styles.getPropertyValue(value.slice(4, -1)).trim() : value;
    }
    if (Array.isArray(value)) return value.map((v) => painted(v, styles));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, painted(v, styles)]));
    }
    return value;
  };

  const draw = (place) => {
    const figure = figures[place.dataset.figure];
    place.closest(".panel")?.classList.toggle("without", !figure);
    if (!figure) return;
    const { data, layout } = painted(figure, getComputedStyle(document.documentElement));
    place.setAttribute("aria-description", layout.meta);
    Plotly.react(place, data, layout, config);
  };
  const drawAll = () => document.querySelectorAll(".plot").forEach(draw);

  // A block's selector swaps the figure of every plot in it, and the line that describes it.
  document.querySelectorAll("select[data-block]").forEach((select) => {
    const block = document.getElementById(select.dataset.block);
    const show = () => {
      block.querySelectorAll(".plot").forEach((place) => {
        place.dataset.figure = place.dataset.prefix + select.value;
        draw(place);
      });
      block.querySelectorAll("[data-stage]").forEach((note) => {
        note.hidden = note.dataset.stage !== select.value;
      });
    };
    select.addEventListener("change", show);
  });

  // A heading sorts the methods of its table, each with its runs; the first heading puts them back.
  document.querySelectorAll("table.results").forEach((table) => {
    const given = [...table.tBodies];
    const heads = [...table.tHead.rows[0].cells];
    const sort = (head, way) => {
      const valueOf = (body) => parseFloat(body.rows[0].cells[heads.indexOf(head)].dataset.value);
      const sign = way === "descending" ? -1 : 1;
      const measured = given.filter((body) => !Number.isNaN(valueOf(body)));
      const rest = given.filter((body) => Number.isNaN(valueOf(body)));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (way !== "as given") {
        head.setAttribute("aria-sort", way);
        measured.sort((a, b) => sign * (valueOf(a) - valueOf(b)));
      }
      table.append(...(way === "as given" ? given : [...measured, ...rest]));
    };
    heads.forEach((head) => {
      const button = head.querySelector(".sort");
      button?.addEventListener("click", () => {
        const { first } = button.dataset;
        const opposite = { descending: "ascending", ascending: "descending" }[first];
        sort(head, head.getAttribute("aria-sort") === first ? opposite : first);
      });
    });

    // The runs of a method fold away; where there are many methods, they are folded at first.
    const folds = [...table.querySelectorAll(".fold")];
    const fold = (button, away) => {
      button.setAttribute("aria-expanded", String(!away));
      button.closest("tbody").classList.toggle("folded", away);
    };
    folds.forEach((button) => {
      fold(button, folds.length > 6);
      button.addEventListener("click", () => fold(button, button.getAttribute("aria-expanded") === "true"));
    });
  });

  // Every table can be taken along as it stands: as CSV for programs, as LaTeX for papers.
  const cellsOf = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll(".fold, .tag, .unseen").forEach((part) => part.remove());
    copy.querySelectorAll("br").forEach((part) => part.replaceWith(" "));
    return copy.textContent.replace(/\s+/g, " ").trim();
  }));
  const plain = (text) => {
    if (text === "–") return "";
    return /^[+−]?[\d,]+(\.\d+)?$/.test(text) ? text.replace("−", "-").replaceAll(",", "") : text;
  };
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const signs = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "−": "$-$", "±": "$\\pm$",
    "→": "$\\to$", "Δ": "$\\Delta$", "λ": "$\\lambda$", "–": "--", "·": "$\\cdot$",
  };
  const escaped = (text) => text.replace(/[\\~^−±→Δλ–·]|[&%$#_{}]/g, (sign) => signs[sign] ?? `\\${sign}`);
  const forms = {
    CSV: ["csv", (rows) => rows.map((row) => row.map((text) => quoted(plain(text))).join(",")).join("\n") + "\n"],
    LaTeX: ["tex", (rows) => {
      const [head, ...rest] = rows.map((row) => `${row.map(escaped).join(" & ")} \\\\`);
      const columns = `l${"r".repeat(rows[0].length - 1)}`;
      const parts = [`\\begin{tabular}{${columns}}`, "\\hline", head, "\\hline", ...rest, "\\hline", "\\end{tabular}", ""];
      return parts.join("\n");
    }],
  };
  document.querySelectorAll("table").forEach((table, number) => {
    const line = document.createElement("p");
    line.className = "take";
    Object.entries(forms).forEach(([name, [ending, write]]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "tag";
      button.textContent = name;
      button.setAttribute("aria-label", `Download this table as ${name}`);
      button.addEventListener("click", () => {
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([write(cellsOf(table))], { type: "text/plain" }));
        link.download = `table-${number + 1}.${ending}`;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 1000);  // the download has read it by then
      });
      line.append(button);
    });
    (table.closest(".scroll") ?? table).after(line);
  });

  // One tooltip for all explained words: shown on hover, on focus and on touch.
  const bubble = document.getElementById("bubble");
  let explained = null;
  const place = () => {
    if (!explained) return;
    const at = explained.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - bubble.offsetWidth - 12);
    bubble.style.left = `${Math.max(12, left)}px`;
    bubble.style.top = `${at.bottom + 8}px`;
  };
  const explain = (event) => {
    explained = event.currentTarget;
    bubble.textContent = explained.dataset.tip;
    bubble.hidden = false;
    place();
  };
  const hush = () => {
    explained = null;
    bubble.hidden = true;
  };
  document.querySelectorAll("[data-tip]").forEach((word) => {
    word.addEventListener("pointerenter", explain);
    word.addEventListener("focus", explain);
    word.addEventListener("pointerleave", hush);
    word.addEventListener("blur", hush);
  });
  addEventListener("scroll", place, { passive: true, capture: true });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
  document.documentElement.dataset.ready = "true";
})();
