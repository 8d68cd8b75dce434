"""The augment section: random changes of training patches, as a list, a named recipe, or a recipe with changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import GetJsonSchemaHandler, SerializeAsAny, ValidationError, model_serializer, model_validator
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError

from densepred.config.base import Section
from densepred.config.contradictions import nearest
from densepred.config.transforms import NAMES, RECIPES, TRANSFORMS, Transform

DEFAULT = "light"
_Place = tuple[int | str, ...]


class AugmentConfig(Section):
    """Random changes of training patches, on whole batches on the device.

    Written as a list (`[{flip: {axes: [2]}}, {noise: {}}]`), as the name of a recipe (`nnunet`), or as a mapping of
    what is to be otherwise than in a recipe (`{recipe: nnunet, rotation: {probability: 0.5}, blur: null}`; without
    `recipe`, than in `light`).

    Example:
        >>> [name for name, _ in AugmentConfig.model_validate([{"flip": [2]}, {"noise": {}}]).named()]
        ['flip', 'noise']
    """

    transforms: tuple[SerializeAsAny[Transform], ...]
    """In the order they were given."""

    def named(self) -> Iterator[tuple[str, Transform]]:
        """The transforms with their names."""
        for transform in self.transforms:
            yield NAMES[type(transform)], transform

    @classmethod
    def inside(cls, key: int | str) -> type[Section] | None:
        """What stands below a key, for naming the places of faults."""
        return cls if isinstance(key, int) else TRANSFORMS.get(key)

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, data: Any) -> Any:
        """From any form to transforms; every fault keeps its place."""
        if isinstance(data, AugmentConfig) or (isinstance(data, dict) and set(data) == {"transforms"}):
            return data
        found: list[Transform] = []
        faults: list[InitErrorDetails] = []
        for place, name, settings in _entries(data, faults):
            try:
                found.append(TRANSFORMS[name].model_validate(settings))
            except ValidationError as error:
                faults += [_moved(item, place) for item in error.errors(include_url=False)]
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return {"transforms": tuple(found)}

    @model_serializer
    def _as_list(self) -> list[dict[str, Any]]:
        return [{name: transform.model_dump()} for name, transform in self.named()]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The mapping form; `any_form` adds the others."""
        changes = {
            name: {
                "anyOf": [handler(kind.__pydantic_core_schema__), {"type": "null"}],
                "description": _first_line(kind),
            }
            for name, kind in TRANSFORMS.items()
        }
        recipe = {"enum": list(RECIPES), "default": DEFAULT, "description": "The recipe that is changed."}
        head = {"type": "object", "additionalProperties": False, "description": _first_line(cls)}
        return head | {"properties": {"recipe": recipe} | changes}


def any_form(schema: dict[str, Any]) -> None:
    """Let the JSON schema of the section take a recipe's name and a list as well as a mapping."""
    mapping = {"$ref": schema.pop("$ref")}
    schema["anyOf"] = [{"enum": list(RECIPES)}, {"type": "array", "items": mapping | {"maxProperties": 1}}, mapping]


def _first_line(kind: type[Section]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _entries(data: Any, faults: list[InitErrorDetails]) -> list[tuple[_Place, str, Any]]:
    """The transforms that a section asks for as (place, name, settings); what is none of them goes to `faults`."""
    if isinstance(data, str):
        return _recipe(data, (), faults)
    if isinstance(data, list | tuple):
        found: list[tuple[_Place, str, Any]] = []
        for index, item in enumerate(data):
            if not isinstance(item, dict) or len(item) != 1:
                text = "each entry is one transform, such as `noise: {probability: 0.1}`"
                faults.append(_fault(text, (index,), item))
                continue
            ((name, settings),) = item.items()
            if _known(name, (index, str(name)), faults, TRANSFORMS):
                found.append(((index, name), name, {} if settings is None else settings))
        return found
    if isinstance(data, dict):
        return _changed(data, faults)
    faults.append(_fault("give a recipe's name, a list of transforms, or a mapping", (), data))
    return []


def _changed(data: dict[str, Any], faults: list[InitErrorDetails]) -> list[tuple[_Place, str, Any]]:
    """A recipe with some transforms changed, left out (null) or added at the end."""
    entries = {name: settings for _, name, settings in _recipe(data.get("recipe", DEFAULT), ("recipe",), faults)}
    for name, settings in data.items():
        if name == "recipe" or not _known(name, (str(name),), faults, {**TRANSFORMS, "recipe": None}):
            continue
        if settings is None:
            entries.pop(name, None)
        elif isinstance(settings, dict):
            entries[name] = entries.get(name, {}) | settings
        else:
            entries[name] = settings
    return [((name,), name, settings) for name, settings in entries.items()]


def _recipe(name: Any, place: _Place, faults: list[InitErrorDetails]) -> list[tuple[_Place, str, Any]]:
    if not isinstance(name, str):
        faults.append(_fault(f"a recipe's name is one of {', '.join(RECIPES)}", place, name))
        return []
    if not _known(name, place, faults, RECIPES, "recipe"):
        return []
    return [((key,), key, dict(settings)) for item in RECIPES[name] for key, settings in item.items()]


def _known(
    name: Any, place: _Place, faults: list[InitErrorDetails], among: dict[str, Any], what: str = "transform"
) -> bool:
    if name in among:
        return True
    known = list(among)
    text = f"there is no {what} {name!r}{nearest(str(name), known)}; known: {', '.join(known)}"
    faults.append(_fault(text, place, name))
    return False


def _fault(text: str, place: _Place, value: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("augment", "{text}", {"text": text}), loc=place, input=value)


def _moved(item: Any, place: _Place) -> InitErrorDetails:
    """A fault of a transform's settings, at its place in the section."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "value_error":
        kind, context = PydanticCustomError("value_error", "{text}", {"text": str(context["error"])}), {}
    return InitErrorDetails(type=kind, loc=(*place, *item["loc"]), input=item["input"], ctx=context)
