"""One module per kind of cell: what it needs of the world, and how it runs."""
