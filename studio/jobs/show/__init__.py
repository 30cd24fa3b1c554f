"""Shows what a training makes of a data file, row by row and added up, with a tokenizer alone."""
