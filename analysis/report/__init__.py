"""One sweep on one page: verdict, frontier, law, health, cost and every run, as a self-contained HTML file or as figures.

    material (DataFrames, a fit)  →  tables.py: tidy tables  →  charts.py: what is drawn  →  draw.py: matplotlib
                                                                                         →  page.py: HTML with plotly

A chart is said once, as series of numbers, and drawn twice. Jinja2 and plotly are needed by `page` alone.
"""
