"""The parts of the study: what is compared (`grid`), the cells it is made of, how each is computed, and what is told."""
