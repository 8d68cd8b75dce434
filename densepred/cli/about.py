"""Commands about the program itself."""

from __future__ import annotations

from densepred.cli.base import app, show


@app.command()
def schema() -> None:
    """Print the JSON schema of the recipes, for editors."""
    import json

    from densepred.config import Config

    show(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the versions of densepred and its foundations."""
    import platform
    from importlib import metadata

    from densepred import __version__

    show(f"densepred {__version__}", f"python {platform.python_version()} on {platform.platform()}")
    show(*(f"{name} {metadata.version(name)}" for name in ("torch", "monai", "nibabel", "numpy")))
