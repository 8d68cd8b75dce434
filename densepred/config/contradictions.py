"""Settings that are valid alone and impossible together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from densepred.config.normalize import CTWindow
from densepred.config.tasks import LOSSES, SEGMENTATION, kind_of
from densepred.models import catalog

if TYPE_CHECKING:
    from densepred.config.data import DataConfig
    from densepred.config.model import ModelConfig
    from densepred.config.schema import Config

Rule = tuple[bool, str, str]
"""Is it broken, the path, and what to say."""


def contradictions(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """Settings that are valid alone and impossible together, as (path, message)."""
    rules = (
        *_of_data(config.data),
        *_of_targets(config),
        *_of_axes(config),
        *_of_patches(config),
        *of_model(config.model),
        *_of_loss(config),
        *_of_outputs(config),
        *_of_training(config),
    )
    return [(tuple(path.split(".")), message) for wrong, path, message in rules if wrong]


def _of_data(data: DataConfig) -> Iterator[Rule]:
    listed, patterns = data.dataset is not None, data.images is not None
    yield patterns and listed, "data.dataset", "give either patterns (images) or a list (dataset), not both"
    yield not (patterns or listed), "data", "no images: give data.images (a pattern) or data.dataset (a list)"
    unlabelled = patterns and data.labels is None and data.segments
    yield unlabelled, "data.labels", "data.images needs data.labels, a pattern with {id}"
    yield "{id}" not in (data.labels or "{id}"), "data.labels", "the pattern needs {id}, the place of the image's id"
    beyond = isinstance(data.fold, int) and data.splits is None and data.fold >= data.folds
    yield beyond, "data.fold", f"fold {data.fold} of {data.folds}: the folds count from 0"
    yield not _is_regex(data.group), "data.group", "not a regular expression with one group, such as '(sub-\\d+)'"
    yield from _of_validity(data)
    spacing = data.spacing if isinstance(data.spacing, tuple) else ()
    yield min(spacing, default=1) <= 0, "data.spacing", "spacings are greater than 0"
    first = next(iter(data.classes), 0)
    yield 0 in data.classes and first != 0, "data.classes", f"the background comes first, but {first} stands before 0"
    negative = [value for value in data.classes if value < 0]
    yield bool(negative), "data.classes", f"label values are 0 or more, got {negative}"
    both = sorted(set(data.ignore) & set(data.classes))
    yield bool(both), "data.ignore", f"{both} cannot be both ignored and a class"


def _of_targets(config: Config) -> Iterator[Rule]:
    data = config.data
    for name, target in data.targets.items():
        path = f"data.targets.{name}"
        taken = name == SEGMENTATION or not name.isidentifier()
        yield taken, path, f"names are letters, digits and _, and not {SEGMENTATION}, which is that of data.labels"
        one = (target.file is None) != (target.column is None)
        yield not one, path, "give either file (a pattern with {id}) or column (of data.table)"
        lacks = "{id}" not in (target.file or "{id}")
        yield lacks, f"{path}.file", "the pattern needs {id}, the place of the image's id"
        mapped = target.file is not None and target.classes is not None
        yield mapped, f"{path}.classes", "maps of classes are labels: give data.labels and data.classes"
        yield target.classes is not None and bool(target.unit), f"{path}.unit", "classes have no unit"
        given = target.mean is not None or target.deviation is not None
        half = given and (target.mean is None or target.deviation is None)
        yield half, path, "mean and deviation are given together"
        senseless = given and (not target.standardize or target.classes is not None)
        yield senseless, path, "mean and deviation make numbers standard: leave out classes and standardize: false"
        moved = bool(target.mean) and name in config.heads and config.heads[name].positive
        yield moved, path, "the mean of numbers that are positive is 0, or zero would not stay where it is"
    columns = bool(data.covariates) or any(target.column for target in data.targets.values())
    lost = columns and data.tabular is None
    yield lost, "data.table", "columns need a table: give data.table, a CSV with a column id"
    whole = any(target.column for target in data.targets.values())
    useless = bool(data.covariates) and not whole
    yield useless, "data.covariates", "only targets that are columns use covariates, and there is none"
    own = [getattr(one, "normalize", None) for one in data.images.values()] if isinstance(data.images, dict) else []
    open_ct = any(isinstance(one, CTWindow) and not one.complete for one in (data.normalize, *own))
    found = (
        "ct_window takes what is left out from the foreground of labels: give data.labels, or low, high, mean and std"
    )
    yield open_ct and not data.segments, "data.normalize", found
    if data.regions or data.instances:
        yield not data.segments, "data", "regions and instances are of labels: give data.labels and data.classes"
    for name, members in data.regions.items():
        strange = [one for one in members if data.classes and one not in data.classes.values()]
        yield bool(strange), f"data.regions.{name}", f"{strange} are no classes of data.classes"
    names = list(dict.fromkeys(data.classes.values()))
    counted = data.instances and (set(data.classes) != {0, 1} or bool(data.ignore))
    yield counted, "data.instances", f"give two classes, 0 and 1, and nothing to ignore, got {names}"
    mixing = [name for name, _ in config.augment.named() if name in ("cutmix", "mixup")] if data.targets else []
    yield bool(mixing), "augment", f"{', '.join(mixing)} would mix images and not data.targets"
    yield from _of_heads(config)


def _of_heads(config: Config) -> Iterator[Rule]:
    data = config.data
    kinds = {name: str(kind_of(target)) for name, target in data.targets.items()}
    kinds |= {SEGMENTATION: SEGMENTATION} if data.segments else {}
    for name, head in config.heads.items():
        path, kind = f"heads.{name}", kinds.get(name)
        close = nearest(name, list(kinds))
        yield kind is None, path, f"nothing of this name is to be predicted{close}; there are {', '.join(kinds)}"
        if kind is None:
            continue
        allowed = LOSSES[kind]
        strange = [term for term in head.loss if term not in allowed]
        names = f"it may have {', '.join(allowed)}" if allowed else "that of the segmentation is the section loss"
        yield bool(strange), f"{path}.loss", f"{strange} cannot be its loss; {names}"
        yield bool(head.loss) and not any(head.loss.values()), f"{path}.loss", "every term has weight 0"
        numbers = kind in ("regression", "scalar")
        yield (head.positive or head.variance) and not numbers, path, "only numbers can be positive or have a variance"
        mixed = any((term == "gaussian_nll") != head.variance for term in head.loss)
        yield mixed and numbers, f"{path}.loss", "gaussian_nll goes with variance: true, and nothing else does"
    silent = bool(kinds) and all(name in config.heads and not config.heads[name].weight for name in kinds)
    yield silent, "heads", "every head has weight 0"


def _of_validity(data: DataConfig) -> Iterator[Rule]:
    validity = data.validity
    channels = data.images.values() if isinstance(data.images, dict) else ()
    chosen = {
        "data.validity.bits": validity.bits,
        "data.images": tuple(b for c in channels for b in getattr(c, "bits", ())),
    }
    for path, bits in chosen.items():
        unknown = [bit for bit in bits if isinstance(bit, str) and bit not in validity.flags]
        known = ", ".join(validity.flags) or "none"
        close = nearest(str(unknown[0]), list(validity.flags)) if unknown else ""
        yield bool(unknown), path, f"{unknown} name no flags{close}; data.validity.flags has {known}"
        mixed = [bit for bit in bits if isinstance(bit, int) and bit & (bit - 1)]
        yield bool(mixed), path, f"{mixed} are no flags: give their values (1, 2, 4, 8 ...), not positions or sums"
    useless = validity.mask is None and bool(validity.bits or validity.values)
    yield useless, "data.validity", "bits and values are those of a mask: give data.validity.mask"
    single = [name for name, value in validity.flags.items() if value < 1 or value & (value - 1)]
    yield bool(single), "data.validity.flags", f"flags are powers of two (1, 2, 4 ...), not those of {single}"
    for role, pattern in data.planes().items():
        yield "{id}" not in pattern, f"data.validity.{role}", "the pattern needs {id}, the place of the image's id"


def _of_axes(config: Config) -> Iterator[Rule]:
    dims = config.model.dims
    sizes = {
        "patch.size": config.patch.size,
        "inference.window": config.inference.window,
        "data.spacing": config.data.spacing,
    }
    for path, value in sizes.items():
        if isinstance(value, tuple):
            yield len(value) != dims, path, f"{len(value)} axes, but model.dims is {dims}"
    mirror = config.inference.mirror
    yield not set(mirror) <= set(range(dims)), "inference.mirror", f"axes are 0 to {dims - 1}"
    flat = [name for name, _ in config.augment.named() if name == "albumentations"]
    yield bool(flat) and dims != 2, "augment", f"albumentations is for 2D, and model.dims is {dims}"


def _of_patches(config: Config) -> Iterator[Rule]:
    patch, data = config.patch, config.data
    yield patch.axis is not None and config.model.dims != 2, "patch.axis", "planes are for 2D models: set model.dims=2"
    across = patch.axis == "all" and data.spacing is not None
    yield across, "patch.axis", "planes across all axes have no one spacing: leave out data.spacing, or name an axis"
    weights = patch.classes if isinstance(patch.classes, dict) else {}
    unknown = [value for value in weights if data.classes and value not in data.classes]
    yield bool(unknown), "patch.classes", f"{unknown} are no label values of data.classes"
    nothing = isinstance(patch.classes, dict) and sum(weights.values()) == 0
    yield nothing, "patch.classes", "one weight at least is greater than 0; foreground=0 centres no patch"
    whole = patch.axis is not None and any(target.column for target in data.targets.values())
    yield whole, "patch.axis", "columns are of whole images, which a model of planes does not see: leave out one"


def of_model(model: ModelConfig) -> Iterator[Rule]:
    """What is wrong with the network."""
    parts = {"network": model.network} if model.network else {"encoder": model.encoder, "decoder": model.decoder}
    entries = {kind: catalog.find(kind, name) for kind, name in parts.items()}
    for kind, name in parts.items():
        entry, known = entries[kind], list(catalog.REGISTRIES[kind])
        others = ", ".join(f"{prefix}NAME" for prefix in catalog.ADAPTERS[kind])
        unknown = f"there is no {name!r}{nearest(name, known)}; known: {', '.join(known)}, {others}"
        yield entry is None, f"model.{kind}", unknown
        flat = f"{name} exists in {entry.dims[0]}D only, model.dims is {model.dims}" if entry else ""
        yield entry is not None and model.dims not in entry.dims, f"model.{kind}", flat
    found = [entry for entry in entries.values() if entry]
    if len(found) == len(parts):
        yield from _of_options(model, " with ".join(parts.values()), frozenset().union(*(e.options for e in found)))
    activation = model.activation or catalog.ACTIVATIONS[0]
    known = list(catalog.ACTIVATIONS)
    unknown = f"there is no {activation!r}{nearest(activation, known)}; known: {', '.join(known)}"
    yield activation not in known, "model.activation", unknown
    if any("strides" in entry.options for entry in found):
        yield from _of_stages(model)


def _of_options(model: ModelConfig, network: str, taken: frozenset[str]) -> Iterator[Rule]:
    """Options that the network does not take would otherwise be ignored in silence."""
    always = {"network", "dims", *(() if model.network else ("encoder", "decoder"))}
    for name, field in type(model).model_fields.items():
        given = getattr(model, name) != field.get_default(call_default_factory=True)
        takers = [other for entries in catalog.REGISTRIES.values() for other, e in entries.items() if name in e.options]
        text = f"no option of {network}; it belongs to {_some(takers)}" if takers else f"leave it out with {network}"
        yield given and name not in taken | always, f"model.{name}", text


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _of_stages(model: ModelConfig) -> Iterator[Rule]:
    usual = catalog.NNUNET_CHANNELS[model.dims] if model.network else catalog.CHANNELS
    stages = len(model.channels or usual)
    for path, value in {"model.strides": model.strides, "model.kernels": model.kernels}.items():
        given = value or ()
        yield value is not None and len(given) != stages, path, f"{len(given)} stages, but model.channels has {stages}"
        uneven = [entry for entry in given if isinstance(entry, tuple) and len(entry) != model.dims]
        yield bool(uneven), path, f"{uneven} should have one number for each of the {model.dims} axes"
    convs = model.convs_per_stage if isinstance(model.convs_per_stage, tuple) else ()
    wrong = bool(convs) and len(convs) != stages
    yield wrong, "model.convs_per_stage", f"{len(convs)} stages, but model.channels has {stages}"
    even = [k for entry in model.kernels or () for k in (entry if isinstance(entry, tuple) else (entry,)) if k % 2 == 0]
    yield bool(even), "model.kernels", f"kernels are odd, so that the grid stays where it is, got {even}"
    first = (model.strides or (1,))[0]
    coarser = stages - 2 if (first if isinstance(first, int) else max(first)) == 1 else model.deep_supervision
    yield model.deep_supervision > coarser, "model.deep_supervision", f"at most {coarser} coarser decoder stages exist"


def _of_loss(config: Config) -> Iterator[Rule]:
    loss, data = config.loss, config.data
    kind, classes = ("regions", len(data.regions)) if data.regions else ("classes", len({*data.classes.values()}))
    yield not loss.terms, "loss", "every term has weight 0"
    alone = set(loss.terms) <= {"boundary", "hausdorff", "cldice"}
    yield alone and bool(loss.terms), "loss", f"{', '.join(loss.terms)} stands beside a term such as dice, not alone"
    for name, term in loss.terms.items():
        factors = term.settings.get("class_weights")
        wrong = bool(classes) and factors is not None and len(factors) != classes
        yield wrong, f"loss.{name}.class_weights", f"{len(factors or ())} weights for the {classes} of data.{kind}"
    nothing = "tversky" in loss.terms and loss.tversky.alpha == loss.tversky.beta == 0
    yield nothing, "loss.tversky", "alpha and beta are both 0, so that no error counts"


def _of_outputs(config: Config) -> Iterator[Rule]:
    settings, path = config.inference, "inference.outputs"
    outputs = settings.outputs or ()
    mapped = [name for name, target in config.data.targets.items() if target.file]
    numbers = "regression" in outputs and not mapped
    yield numbers, path, "regression writes maps of numbers, and data.targets has none with a file"
    noise = "noise" in outputs and not any(config.heads[name].variance for name in mapped if name in config.heads)
    yield noise, path, "noise is learnt by heads with variance: true, and no map has one"
    maps = [*([SEGMENTATION] if config.data.segments else []), *mapped]
    unknown = f"no map is called so{nearest(settings.head or '', maps)}; there are {', '.join(maps) or 'none'}"
    yield settings.head is not None and settings.head not in maps, "inference.head", unknown
    apart = [kind for kind in outputs if kind in ("logits", "variance")]
    wrong = bool(apart) and settings.bin > 1
    yield wrong, path, f"{apart} of blocks of pixels (inference.bin) are not known: probabilities are averaged"
    solid = settings.slices is not None and config.model.dims != 2
    yield solid, "inference.slices", f"slices are for 2D models, and model.dims is {config.model.dims}"
    yield len(set(outputs)) < len(outputs), path, "each kind stands once"
    partial = settings.cutout is not None and bool(settings.keep_largest)
    whole = "the largest component of a cut-out need not be that of the whole image: say inference.keep_largest=[]"
    yield partial, "inference.keep_largest", whole


def _of_training(config: Config) -> Iterator[Rule]:
    optimizer, training = config.optimizer, config.training
    schedule = optimizer.schedule or {"sgd": "polynomial", "adamw": "cosine"}[optimizer.name]
    cyclic = optimizer.cycles > 1
    yield cyclic and schedule != "cosine", "optimizer.cycles", f"cycles are for the cosine schedule, not {schedule}"
    both = cyclic and optimizer.swa > 0
    yield both, "optimizer.swa", "snapshots (cycles) and an even average are two ways; take one"
    uneven = config.patch.batch % training.accumulate > 0
    parts = f"a batch of {config.patch.batch} cannot be computed in {training.accumulate} equal parts"
    yield uneven, "training.accumulate", f"{parts}; take a divisor of patch.batch"
    blind = config.data.fold == "all"
    judged = "needs validation scores, and data.fold is all"
    yield blind and training.patience is not None, "training.patience", judged
    yield blind and schedule == "plateau", "optimizer.schedule", f"plateau {judged}"
    needless = training.transfer.unfreeze is not None and not training.transfer.freeze
    yield needless, "training.transfer.unfreeze", "nothing is frozen: set training.transfer.freeze"


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean x?)`, or nothing where no known name is near."""
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _is_regex(pattern: str | None) -> bool:
    try:
        return pattern is None or re.compile(pattern).groups == 1
    except re.error:
        return False


__all__ = ["contradictions", "nearest", "of_model"]
