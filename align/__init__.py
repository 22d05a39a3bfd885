"""Make good videos likelier, within the limit."""
