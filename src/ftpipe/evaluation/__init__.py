"""What the `evaluate` stage measures of policies: scores, answers, judgements, and their report."""
