"""From files to training samples: which files make a case, are they sound, folds, preprocessing, cache, patches."""
