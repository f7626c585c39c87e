"""Requests on texts: write, edit or score them. One rule behind every front end.

A request reads the texts as the model's training text was read (`data.prompts`), seeds the random
stream and calls the model. `Pretrained`, the command line and the studio make requests, and show
progress and results.

    Writing(prompts=("The people",), num_tokens=60).run(lm)
    Edit(text="The king of the land", rewrite=("king",)).run(lm).texts
    Score(texts=("The king of the land",)).run(lm)[0].total
"""

from tarflowlm.texts.edits import Edit, Edited, EditOptions
from tarflowlm.texts.requests import as_texts
from tarflowlm.texts.scores import Score, Scored
from tarflowlm.texts.writing import Draft, Writing, WritingOptions, Written

__all__ = [
    "Draft",
    "Edit",
    "EditOptions",
    "Edited",
    "Score",
    "Scored",
    "Writing",
    "WritingOptions",
    "Written",
    "as_texts",
]
