"""The page for people: the last plan as a drawing and a table, and a form to post an instance.

One document without outside resources. Colour is never the only sign: each route has its number in
the table, in its title and, with few routes, on the map.
"""

from __future__ import annotations

import base64
import hashlib
import html
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .instance import Instance
    from .solver import Plan

SIZE = 600  # of the drawing's view box
LABELLED = 12  # with more routes, numbers on the map would cover each other

_SCRIPT = """
const form = document.querySelector("form"), state = document.querySelector("output");
form.addEventListener("submit", async event => {
  event.preventDefault();
  state.textContent = "Planning…";
  const query = new URLSearchParams({seconds: form.seconds.value});
  const answer = await fetch("plan?" + query, {method: "POST", body: form.instance.value});
  if (answer.ok) location.reload(); else state.textContent = (await answer.json()).message;
});
"""
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()

HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; connect-src 'self'; base-uri 'none'; "
    f"style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Route planner</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff }
svg { width: 100%; height: auto; border: 1px solid #767676 }
textarea { width: 100%; height: 10rem; font: 0.9rem monospace; box-sizing: border-box }
table { border-collapse: collapse } th, td { text-align: left; padding: 0.2rem 1rem 0.2rem 0;
  vertical-align: top; border-bottom: 1px solid #c8c8c8 }
label { display: block; margin-top: 1rem }
</style></head><body><main>
<h1>Route planner</h1>
$plan
<h2>Plan routes</h2>
<form><label for="instance">CVRPLIB instance (CVRP, EUC_2D or EXPLICIT)</label>
<textarea id="instance" name="instance" required spellcheck="false"></textarea>
<label for="seconds">Seconds to plan</label>
<input id="seconds" name="seconds" type="number" min="0.1" max="600" step="any" value="2">
<button>Plan</button> <output></output></form>
<noscript><p>Without scripts:
<code>curl --data-binary @INSTANCE.vrp "…/plan?seconds=2"</code></p></noscript>
</main><script>$script</script></body></html>
""")


def render(last: tuple[Instance, Plan] | None) -> str:
    """The document, with `last` drawn if there is a plan."""
    return _PAGE.substitute(plan=_plan(*last) if last else "<p>No plan yet.</p>", script=_SCRIPT)


def _plan(instance: Instance, plan: Plan) -> str:
    name = html.escape(instance.name)
    rows = "".join(
        f"<tr><th scope=row>{number}</th><td>{sum(instance.demands[c] for c in route)}</td>"
        f"<td>{' '.join(map(str, route))}</td></tr>"
        for number, route in enumerate(plan.routes, start=1)
    )
    return (
        f"<h2>Last plan: {name}</h2><p>Cost {plan.cost}, {len(plan.routes)} vehicles of capacity "
        f"{instance.capacity}, found in {plan.seconds:.2f} s and {plan.iterations} iterations.</p>"
        f"{_drawing(instance, plan)}<table><thead><tr><th scope=col>Route</th>"
        f"<th scope=col>Load</th>"
        f"<th scope=col>Customers in order</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _drawing(instance: Instance, plan: Plan) -> str:
    if instance.points is None:
        return "<p>The instance has no coordinates to draw.</p>"
    low_x, low_y = (min(axis) for axis in zip(*instance.points, strict=True))
    high_x, high_y = (max(axis) for axis in zip(*instance.points, strict=True))
    scale = (SIZE - 40) / (max(high_x - low_x, high_y - low_y) or 1)
    at = [(20 + (x - low_x) * scale, SIZE - 20 - (y - low_y) * scale) for x, y in instance.points]
    shapes = []
    for number, route in enumerate(plan.routes, start=1):
        hue = number * 137 % 360  # the golden angle keeps neighbouring numbers apart
        line = " ".join(f"{at[c][0]:.1f},{at[c][1]:.1f}" for c in (0, *route, 0))
        dashes = ("none", "7 3", "2 3")[number % 3]
        shapes.append(
            f'<polyline points="{line}" fill="none" stroke="hsl({hue} 80% 35%)" stroke-width="2" '
            f'stroke-dasharray="{dashes}"><title>Route {number}</title></polyline>'
        )
        if len(plan.routes) <= LABELLED:
            x, y = at[route[len(route) // 2]]
            shapes.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}" font-size="16">{number}</text>')
    shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at[1:]]
    x, y = at[0]
    shapes.append(f'<rect x="{x - 7:.1f}" y="{y - 7:.1f}" width="14" height="14"><title>Depot</title></rect>')
    label = f"Map of {len(plan.routes)} routes from the depot; the table below lists them."
    return f'<svg viewBox="0 0 {SIZE} {SIZE}" role="img" aria-label="{label}">{"".join(shapes)}</svg>'
