"""From a data set to a recipe: what the files hold, what follows from it, and what training will cost here."""
