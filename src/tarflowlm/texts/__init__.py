"""Requests on texts: write, edit or score them. One rule behind every front end.

A request (`requests`) is plain data. What it asks for reads the texts as the model's training text
was read (`data.prompts`), seeds the random stream and calls the model. `Pretrained`, the command
line and the studio make requests, and show progress and results.

    write(Writing(prompt="The old king", num_tokens=60), lm)
    editing.edits.edit(Edit(text="The king of the land", rewrite="king"), lm).texts
    evaluation.scores.score_texts(Score(text="The king of the land"), lm)[0].total
"""
