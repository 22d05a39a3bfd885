"""A small world whose truth can be measured: a data set, its annotators and a base model in the real formats."""
