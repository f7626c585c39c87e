"""The paper's tables and figures, and experiments of ours: `python -m reproduction NAME`.

A recipe trains models, measures them, and writes a CSV, a plot and Markdown (`recipe.Recipe`).
"""
