"""The small world that the bundled tiny base is trained on: prompts, answers, styles, hazards and their twins."""
