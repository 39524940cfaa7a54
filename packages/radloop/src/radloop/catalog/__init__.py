"""What radloop knows about every instance, label, dataset and model. Pseudonyms only: nothing identified is in it."""
