"""Networks: encoders, decoders and heads that combine freely, in 2 and 3 dimensions. Knows nothing of files."""
