"""The report of a run as one HTML file: :func:`metagpt_localllm.reporting.page.render`. Pure: nothing is read but the template.

::

    phases    what a call spent its time on
    timeline  where these lie on an axis on which nothing happens for hours is folded
    scales    ticks, bins, and how numbers are written
    charts    the figures: SVG that stretches, with labels that do not
    tables    what failed, what was trimmed and saved, the calls
    page      all of it, in page.html with page.css and page.js
"""
