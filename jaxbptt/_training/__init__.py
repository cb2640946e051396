"""Online training: `learner`, and flax modules as steps."""
