"""The report page: what the verbs show about runs, in one file that a browser opens without the network.

    gathering      a run's parts, each from the functions that the verbs use
    curves         charts from `metrics.jsonl`; `thinning` keeps their extremes when there are too many steps
    past           starts as bars, what each kill cost, goodput
    sampling       which steps' rollouts are shown, and how much of them
    health         what `verify` and `doctor` say; configurations and versions
    page           one file from parts, with a content security policy
    serving        the same page on 127.0.0.1, following a run

What the reader sees is made by the files in `page/`: plain HTML, CSS and JavaScript, no build step. Parts are
JSON; text of a run becomes text nodes there and nothing else.
"""
