"""Chapter `papers/`: a paper is read line by line, and what it claims is measured."""
