"""The report page: verdict, frontier, law, health, cost and every run, as one self-contained HTML file.

    material (DataFrames, a fit) → tables: tidy tables → build: sections with `charts` → page: HTML with plotly

The charts are the descriptions in `analysis.charts`, which `analysis.draw` renders with matplotlib. Only `page`
needs Jinja2 and plotly.
"""
