"""What success is: problems and their answers, prompt templates, one grader, the rewards made of its verdicts."""
