"""`python -m pipelines.reporting.compare A B ...`: evaluations side by side on one page that needs nothing
else: scores with intervals, curves, parts, and the images of the same prompts.
"""

import argparse
import base64
import io
import json
import os
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.reporting.charts import ENLARGE, STYLE, Line, chart
from pipelines.reporting.contenders import (
    Contender,
    Drawn,
    Pairing,
    contender_of,
    differences_of_configs,
    pairings,
)
from pipelines.reporting.scores import number, percent
from repfusion.display.redaction import redact_text
from repfusion.display.tables import html
from repfusion.display.terminal import printable_lines
from repfusion.evaluation.suites.base import Value
from repfusion.evaluation.suites.build import build_suite
from repfusion.files import write_text

COLOURS = ("#b5532a", "#2f6db3", "#3f8f5a", "#8a5fb0", "#b08a1f", "#5f6b7a")
"""Colours of the contenders, in their order; further ones begin anew."""
SHARP_PX, MOST_PX = 128, 384
"""Images up to the first are kept exactly, larger ones are JPEGs of at most the second."""
MOST_IMAGES = 4
"""Images of one item and contender that are shown."""
LOOK = """
main { max-width: 1180px; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; background: var(--c);
  margin-right: 6px; }
.parts { display: grid; grid-template-columns: max-content 1fr; gap: 8px 14px; align-items: center;
  font-size: 14px; }
.parts i { display: block; height: 9px; margin: 2px 0; border-radius: 1px; background: var(--c);
  width: calc(100% * var(--share)); min-width: 1px; }
.tools { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 10px; align-items: center;
  padding: 10px 0; background: var(--page); border-bottom: 1px solid var(--line); }
.tools input, .tools select { font: inherit; padding: 4px 8px; color: inherit; background: var(--page);
  border: 1px solid var(--muted); border-radius: 4px; }
.tools .drawn { flex: 0 0 100%; padding: 0 4px; }
.tools input { flex: 1 1 220px; }
.tools output { color: var(--muted); font-variant-numeric: tabular-nums; }
.row { padding: 14px 4px; border-bottom: 1px solid var(--line); content-visibility: auto;
  contain-intrinsic-size: auto 200px; }
.row:focus { outline: 2px solid var(--ink); outline-offset: -2px; }
.row p { margin: 0 0 8px; max-width: none; }
.row p small { color: var(--muted); margin-left: 8px; }
.drawn { display: grid; grid-template-columns: repeat(var(--runs), minmax(0, 1fr)); gap: 12px; }
figure { margin: 0; font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }
figure img { width: min(var(--side, 160px), 100%); margin: 0 4px 4px 0; border: 3px solid var(--line);
  image-rendering: pixelated; cursor: zoom-in; }
figure.right img { border-color: #268c4e; } figure.wrong img { border-color: #c83a30; }
figure img:not(.sharp) { image-rendering: auto; }
.pictures dialog { width: auto; } .pictures dialog .drawn { --side: 480px; }
[hidden] { display: none; }
"""
SCRIPT = """
for (const part of document.querySelectorAll('section.pictures')) {
  const rows = [...part.querySelectorAll('.row')], [search, group, verdict] = ['search', 'group', 'verdict']
    .map(name => part.querySelector(`[name=${name}]`)), counted = part.querySelector('output');
  const keeps = {
    all: () => true, differ: v => new Set(v).size > 1,
    right: v => v.every(one => one === 1), wrong: v => v.every(one => one === 0),
  };
  const only = which => v => v[which] === 1 && v.every((one, i) => i === which || one === 0);
  const shown = () => rows.filter(row => !row.hidden);
  const filter = () => {
    const text = search.value.trim().toLowerCase(), rule = verdict.value;
    const keep = keeps[rule] || only(Number(rule));
    for (const row of rows) {
      row.hidden = !(row.dataset.prompt.includes(text) && (!group.value || row.dataset.group === group.value)
        && keep(JSON.parse(row.dataset.verdicts)));
    }
    counted.value = `${shown().length} of ${rows.length} prompts`;
  };
  for (const tool of [search, group, verdict]) tool.addEventListener('input', filter);
  filter();
  const large = part.querySelector('dialog');
  const enlarge = row => {
    large.replaceChildren(...[...row.children].map(child => child.cloneNode(true)));
    large.row = row;
    if (!large.open) large.showModal();
  };
  part.addEventListener('click', event => {
    if (event.target.tagName !== 'IMG') return;
    if (event.target.closest('dialog')) large.close();
    else enlarge(event.target.closest('.row'));
  });
  const step = by => {
    const now = shown(), at = now.indexOf(large.open ? large.row : document.activeElement);
    const next = now[Math.max(0, Math.min(now.length - 1, at < 0 ? 0 : at + by))];
    if (!next) return;
    if (large.open) enlarge(next);
    next.focus({preventScroll: true});
    next.scrollIntoView({block: 'center'});
  };
  document.addEventListener('keydown', event => {
    const writes = event.target.matches('input, select') && event.key !== 'Escape';
    if (writes || event.ctrlKey || event.metaKey || event.altKey || part.hidden) return;
    switch (event.key) {
      case '/': search.focus(); break;
      case 'j': case 'ArrowRight': step(1); break;
      case 'k': case 'ArrowLeft': step(-1); break;
      case 'Enter': if (event.target.matches('.row')) enlarge(event.target); break;
      case 'Escape': if (!large.open) { search.value = ''; search.blur(); filter(); } return;
      default: return;
    }
    event.preventDefault();
  });
}
"""


def compare(paths: Sequence[Path], out: Path) -> Path:
    """Writes the page of the evaluations that the paths name, the first of which the others are measured
    against; returns it.

    Raises:
        ValueError: a path without an evaluation, or evaluations that have nothing in common.
    """
    contenders = [contender_of(path) for path in paths]
    names, found = names_of(paths), pairings(contenders)
    body = [f"<h1>{' against '.join(map(escape, names))}</h1>", _about(contenders, names)]
    for pairing in found:
        title = f": {escape(pairing.suite)}" if len(found) > 1 else ""
        body += [f"<h2>Scores{title}</h2>", _scores(pairing, names), _curves(pairing, names)]
        body += [_parts(pairing, names), f"<h2>Images{title}</h2>", _pictures(pairing, names)]
    write_text(
        out,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(' / '.join(names))}: compared</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{LOOK}</style></head><body><main>{''.join(body)}</main>"
        f"<script>{ENLARGE}{SCRIPT}</script></body></html>\n",
    )
    return out


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names that tell paths apart: what stands below the folder that they share."""
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise ValueError("the same evaluation twice; name each once")
    shared = Path(os.path.commonpath(whole))
    return [str(path.relative_to(shared)) if path != shared else path.name for path in whole]


def _key(index: int) -> str:
    return f"--c:{COLOURS[index % len(COLOURS)]}"


def _named(names: Sequence[str], index: int) -> str:
    return f'<span class="key" style="{_key(index)}"></span>{escape(names[index])}'


def _about(contenders: Sequence[Contender], names: Sequence[str]) -> str:
    rows = [
        (
            _named(names, index),
            f"<code>{escape(one.evaluation.checkpoint)}</code>",
            f"{'?' if (step := one.evaluation.step) is None else step}",
            f"{one.evaluation.config.sampler.num_steps}",
            f"{one.evaluation.config.sampler.guidance_scale:g}",
        )
        for index, one in enumerate(contenders)
    ]
    table = html(("", "checkpoint", "step", "sampling steps", "guidance"), rows, numeric_from=2)
    if differ := differences_of_configs(contenders):
        fields = escape(", ".join(differ))
        table += f"<p><b>The evaluations differ in {fields}</b>: part of what follows comes from that.</p>"
    return table


def _values(pairing: Pairing, role: str) -> list[Value]:
    """The values of a role that belong to the headline and that any contender has."""
    suite = build_suite(pairing.contenders[0].evaluation.config.suites[pairing.suite], 0)
    found = {name for one in pairing.contenders for name in pairing.result(one).scores.values}
    return [one for one in suite.values if one.role == role and not one.of and one.name in found]


def _scores(pairing: Pairing, names: Sequence[str]) -> str:
    shown = [*_values(pairing, "headline"), *_values(pairing, "beside"), *_values(pairing, "floor")]
    rows = []
    for index, one in enumerate(pairing.contenders):
        scores = pairing.result(one).scores
        cells = [
            percent(scores.values.get(value.name), scores.intervals.get(value.name))
            if value.is_share
            else number(scores.values.get(value.name))
            for value in shown
        ]
        rows.append((_named(names, index), *cells, _difference(pairing, index)))
    head = ("", *(value.title for value in shown), "right images, against the first")
    left_out = f" {pairing.num_left_out} prompts are not the same in all and count there for none."
    return html(head, rows) + (
        "<p>Percent; below a number its 95% interval over prompts. The last column is over the "
        f"{len(pairing.rows)} prompts that all drew: the mean difference of paired prompts and its bootstrap "
        "interval."
        f"{left_out if pairing.num_left_out else ''}</p>"
    )


def _difference(pairing: Pairing, index: int) -> str:
    found = pairing.difference(index) if index else None
    if found is None:
        return "&ndash;"
    mean, interval = found
    return f"{100 * mean:+.1f}<small>{100 * interval.low:+.1f} to {100 * interval.high:+.1f}</small>"


def _curves(pairing: Pairing, names: Sequence[str]) -> str:
    """The headline by training step, where any contender was evaluated at several steps."""
    (headline,) = _values(pairing, "headline")
    lines = []
    for index, one in enumerate(pairing.contenders):
        found = [
            (float(past.step or 0), value)
            for past in one.history
            if pairing.suite in past.suites
            and (value := past.suites[pairing.suite].scores.values.get(headline.name)) is not None
        ]
        lines.append(Line(names[index], found, COLOURS[index % len(COLOURS)]))
    if all(len(line.points) < 2 for line in lines):
        return ""
    return chart(lines, 1120, 240, "step", headline.title, (0, 1) if headline.is_share else None)


def _parts(pairing: Pairing, names: Sequence[str]) -> str:
    """A bar of each part of the headline for each contender."""
    parts = []
    for value in _values(pairing, "part"):
        bars = []
        for index, one in enumerate(pairing.contenders):
            share = pairing.result(one).scores.values.get(value.name)
            if share is not None:
                title = f"{names[index]}: {100 * share:.0f}%"
                bars.append(f'<i style="{_key(index)};--share:{share:.3f}" title="{escape(title)}"></i>')
        parts.append(f"<span>{escape(value.title)}</span><div>{''.join(bars)}</div>")
    return f'<div class="parts">{"".join(parts)}</div>' if parts else ""


def _pictures(pairing: Pairing, names: Sequence[str]) -> str:
    groups = dict.fromkeys(group for _, row in pairing.rows if (group := _group(row[0])))
    rules = {"all": "all verdicts", "differ": "verdicts differ", "right": "all right", "wrong": "all wrong"}
    rules |= {f"{index}": f"only {name} right" for index, name in enumerate(names)}
    groupings = {"": "all parts", **{group: _words(group) for group in groups}}
    heads = "".join(f"<b>{_named(names, index)}</b>" for index in range(len(names)))
    tools = (
        '<div class="tools"><input name="search" type="search" aria-label="search prompts" placeholder='
        f'"search prompts ( / )">{_select("group", "part", groupings)}'
        f"{_select('verdict', 'verdicts', rules)}<output></output>"
        "<small>j, k: next, previous; Enter: enlarge</small>"
        f'<div class="drawn">{heads}</div></div>'
    )
    rows = "".join(_row(row) for _, row in pairing.rows)
    style = f"--runs:{len(names)}"
    return f'<section class="pictures" style="{style}">{tools}{rows}<dialog></dialog></section>'


def _select(name: str, label: str, options: dict[str, str]) -> str:
    every = "".join(
        f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items()
    )
    return f'<select name="{name}" aria-label="{label}">{every}</select>'


def _group(one: Drawn) -> str:
    """The part of the suite that an item belongs to, where its truth says so."""
    group = one.item.get("truth", {}).get("task")
    return group if isinstance(group, str) else ""


def _words(name: str) -> str:
    return name.replace("_", " ")


def _verdict(one: Drawn) -> int | None:
    return None if one.share is None else int(one.share > 0.5)


def _row(row: Sequence[Drawn]) -> str:
    prompt, group = row[0].item["prompt"], _group(row[0])
    verdicts = json.dumps([_verdict(one) for one in row])
    about = f"<small>{escape(_words(group))}</small>" if group else ""
    return (
        f'<article class="row" tabindex="0" data-prompt="{escape(prompt.lower())}" '
        f'data-group="{escape(group)}" data-verdicts="{verdicts}">'
        f'<p>{escape(prompt)}{about}</p><div class="drawn">'
        f"{''.join(_figure(one) for one in row)}</div></article>"
    )


def _figure(one: Drawn) -> str:
    kind = {None: "", 0: ' class="wrong"', 1: ' class="right"'}[_verdict(one)]
    drawn = one.images
    images = "".join(map(_image, drawn[:MOST_IMAGES]))
    is_several = one.share is not None and len(drawn) > 1
    several = f"{one.share:.0%} of {len(drawn)} right" if is_several else ""
    caption = "; ".join(text for text in (several, one.reason) if text)
    return f"<figure{kind}>{images}<figcaption>{escape(caption)}</figcaption></figure>"


def _image(pixels: np.ndarray) -> str:
    image, stream = Image.fromarray(np.asarray(pixels)), io.BytesIO()
    is_sharp = max(image.size) <= SHARP_PX
    if is_sharp:
        image.save(stream, "PNG")
    else:
        image.thumbnail((MOST_PX, MOST_PX), Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=90)
    kind, sharp = ("png", ' class="sharp"') if is_sharp else ("jpeg", "")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img{sharp} loading="lazy" decoding="async" alt="" src="data:image/{kind};base64,{data}">'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.reporting.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="evaluations, trainings or workflows' roots")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="default: compare.html")
    args = parser.parse_args()
    try:
        print(compare(args.runs, args.out))
    except (ValueError, OSError) as error:
        sys.exit(printable_lines(redact_text(f"error: {error}")))


if __name__ == "__main__":
    main()
