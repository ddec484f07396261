"""The page of report.html. Values are escaped by jinja2; pictures come as data URIs."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ r.model }} – rewriter report</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --soft: #5b6875; --line: #dde3e9; --tint: #f5f7f9; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p, .soft { color: var(--soft); } b { color: var(--ink); }
.status { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; font-weight: 600; }
.exact, .recovered { background: #d9f2e3; color: #10613a; }
.approximate { background: #fdf0cf; color: #7a5200; }
.unrecovered { background: #fbdcd8; color: #8c1d12; }
.warning { background: #fdf0cf; border-left: 4px solid #c98a00; padding: .4rem .8rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.tile { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
        padding: .6rem .9rem; }
.tile span { display: block; color: var(--soft); font-size: .85rem; }
.tile b { font-size: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { text-align: right; white-space: nowrap; }
code, pre { font: .85rem ui-monospace, monospace; }
td code { overflow-wrap: anywhere; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: .5rem;
      padding: .8rem; overflow-x: auto; }
img { display: block; width: 100%; height: auto; margin: .5rem 0; }
</style>
</head>
<body>
<h1>{{ r.model }}</h1>
<p><span class="status {{ r.status }}">{{ r.status }}</span> {{ meaning }}</p>
{% for warning in r.warnings %}<p class="warning">{{ warning }}</p>{% endfor %}

<div class="tiles">
{% for label, value in tiles %}<div class="tile"><span>{{ label }}</span><b>{{ value }}</b></div>
{% endfor %}</div>
{% if r.data %}<p>Measured on <b>{{ r.data.source }}</b>, {{ '{:,}'.format(r.data.tokens) }} tokens.
{{ r.data.note }}</p>{% endif %}

{% for picture in pictures %}<h2>{{ picture.title }}</h2>
<p>{{ picture.text }}</p>
<img src="{{ picture.uri }}" alt="{{ picture.title }}: {{ picture.text }}">
{% endfor %}

<h2>Sites, worst first</h2>
{% if sites %}<div class="wide"><table>
<tr><th>site</th><th>pass</th><th>layer</th><th>error</th><th>facts</th></tr>
{% for s in sites %}<tr><td><code>{{ s.site }}</code></td><td>{{ s.pass }}</td>
<td class="number">{{ '' if s.layer is none else s.layer }}</td>
<td class="number">{{ s.error }}</td><td>{{ s.facts }}</td></tr>
{% endfor %}</table></div>
<p>Error: max|Δ| / max|original| of the site's output, on the original's inputs.</p>
{% else %}<p>No site was rewritten.</p>{% endif %}

{% if r.near_misses %}<h2>Not rewritten</h2><div class="wide"><table>
<tr><th>place</th><th>pass</th><th>why</th></tr>
{% for m in r.near_misses %}<tr><td><code>{{ m.site }}</code></td><td>{{ m.pass }}</td>
<td>{{ m.reason }}</td></tr>
{% endfor %}</table></div>{% endif %}

<h2>Plan</h2>
<pre>{{ r.plan }}</pre>
{% if seconds %}<h2>Time</h2><div class="wide"><table>
{% for name, value in seconds %}<tr><td>{{ name }}</td><td class="number">{{ value }} s</td></tr>
{% endfor %}</table></div>{% endif %}
</body>
</html>
"""
