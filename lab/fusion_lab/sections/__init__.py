"""One module per question: its tables, plots and sentence, from the results."""
