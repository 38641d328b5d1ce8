"""The report of a run as one HTML file: :func:`metagpt_localllm.reporting.page.render`. Pure: nothing is read but the template.

::

    recorded  what was read from the journal
    phases    what a call spent its time on
    timeline  where these lie on an axis on which nothing happens for hours is folded
    scales    ticks, bins, and how numbers are written
    markup    text and tables as HTML
    summary   the sentence and the numbers on top
    lanes     the timeline, a lane for each role
    charts    the figures: SVG that stretches, with labels that do not
    lists     what failed, what was trimmed and saved, the calls
    page      all of it, in page.html with page.css and page.js
"""
