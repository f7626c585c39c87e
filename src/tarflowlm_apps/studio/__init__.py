"""A local page on models and runs: write, fill in, edit, score, watch a training.

Needs the extra `studio` (gradio). Each view is a generator of HTML; `page` lays them out, and
`server` serves them.
"""
