"""The paper's numbers, tables and figures, made from data/results and nothing else (``python -m dspark.paper``).

macros: how a value is written in TeX, and of which kind it is · quoted: what others published, with its source · numbers, tables,
figures: pure functions of result frames · confidence, policies, steps, drafters: all of these for one kind of result · latency: the
speed-up that the step times predict · text: what the hand-written part may not say · build: all generated files at once.
"""
