"""What `bench_inference.py` measures: a module a tool, and what they share in `common`.

Each tool has

    REQUIRES     the modules that must be installed
    ON_DEVICE    whether it takes an image that is on the device already
    AGAINST      weights of windows and their places, of ours, that are nearest to its own: (blend, spacing)
    FORMATS      suffixes of the files that it reads and writes by itself or with what its users take for that
    settings     how it is run, its default first: (device, compiled) -> list of `Setting`
    prepare      (task, setting) -> function from an image (C, *spatial) to labels (*spatial) or logits (K, *spatial)
    prepare_files  (task, setting) -> function from a file to a label file
"""
