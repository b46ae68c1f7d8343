"""The importance prior: what matters in each weight, with the record of where it came from."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from holdfast import world
from holdfast.errors import ConfigError, DataError, PriorMismatchError
from holdfast.importance import moments
from holdfast.importance.reading import Top, bars, block_means, frame, largest, table
from holdfast.importance.stored import Width, packed, unpacked
from holdfast.models import block_parameters, fingerprints, input_sizes
from holdfast.names import canonical_name
from holdfast.places import near
from holdfast.records import PriorMeta
from holdfast.storage import atomic_write, json_text, save_tensors, sha256

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

TENSORS = "prior.safetensors"
META = "prior.json"
BESIDE = "beside"  # in a prior's meta: by weight, and linear maps are another's, of the kind `inputs`
FREE = "free"  # in a prior's meta: weights that are not rated, and that nobody need hear of as not held
Kind = Literal["weights", "inputs"]
How = Literal["max", "sum", "mean"]
_ASKED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # of which origins, see `check_fits`
_SHOWN = 5  # names listed in a message; a wrong model can differ in hundreds


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, for all parameters."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name to parameter, for all that is trained."""
    return {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}


@dataclass(repr=False)
class ImportancePrior:
    """How much each weight, or each direction of a map's inputs, matters for what a model already knows.

    ``prior[name]`` is one tensor, and a prior goes through its names as a mapping does.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Canonical parameter name to importance: float32, on the CPU, of the parameter's shape; of the kind
        ``inputs``, of a linear map's weight, the second moment C (I, I) of the map's inputs that matter, or
        its K leading directions, (K + 1, I), see `holdfast.importance.moments`.
    meta : dict
        JSON-able record: ``importance``, ``options``, ``tasks``, ``samples_seen``, ``samples_used``,
        ``seconds``, ``model_digest``, ``weights`` (a fingerprint of each parameter), for `lrp`
        ``conservation_max_relative_error``, and ``whole_maps`` where LoRA's factors go by the maps that they
        adapt.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {
            name: self.tensors[name].detach().to("cpu", torch.float32).contiguous()
            for name in sorted(self.tensors)  # as a file has them: sums over tensors depend on the order
        }
        bad = [name for name, tensor in self.tensors.items() if not torch.isfinite(tensor).all()]
        if bad:
            raise DataError(
                f"importance prior: NaN or infinite values in {some(bad)}. "
                "The model's outputs overflowed while it was computed; use float32 or fix the model."
            )

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        """The importance of one parameter, by its canonical name or as the model at hand calls it.

        Raises
        ------
        KeyError
            There is none; the message has the nearest names.
        """
        found = self.tensors.get(name)
        if found is None:
            found = self.tensors.get(canonical_name(str(name)))
        if found is None:
            near = difflib.get_close_matches(str(name), self.tensors, n=3, cutoff=0.0)
            raise KeyError(f"no importance of '{name}' in this prior; nearest: {', '.join(near) or '(none)'}")
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self.tensors or canonical_name(name) in self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __repr__(self) -> str:
        tasks = ", ".join(map(str, self.meta.get("tasks", []))) or "none named"
        what = self.meta.get("importance") or "importance"
        return (
            f"ImportancePrior({what}, by {self.kind}: {len(self)} tensors, {self.elements:,} values; "
            f"tasks: {tasks})"
        )

    def keys(self) -> KeysView[str]:
        """The parameters' canonical names."""
        return self.tensors.keys()

    def items(self) -> ItemsView[str, Tensor]:
        """Canonical name and tensor, one by one."""
        return self.tensors.items()

    def top(self, n: int = 10) -> list[Top]:
        """The n most important weights of all (of the kind ``inputs``: inputs of a map), largest first."""
        return largest(self.tensors, self.kind == "inputs", n)

    def by_layer(self) -> dict[str, float]:
        """Mean importance of each transformer block (``"3"``, ``"decoder 3"``), from the input up.

        Tensors outside of the blocks follow by their own names. Of the kind ``inputs`` it is the mean of the
        eigenvalues.
        """
        return block_means(self.tensors, self.kind == "inputs")

    def table(self) -> list[dict[str, Any]]:
        """A row a tensor: ``name``, ``block``, ``shape``, ``values``, ``mean``, ``max``, ``sum``."""
        return table(self.tensors, self.kind == "inputs")

    def to_pandas(self) -> pd.DataFrame:
        """`table` as a data frame.

        Raises
        ------
        ConfigError
            pandas isn't installed.
        """
        return frame(self.table())

    def plot(self) -> go.Figure:
        """`by_layer` as a plotly figure."""
        return bars(self.by_layer(), repr(self))

    @property
    def elements(self) -> int:
        """How many numbers it has: a number a weight, or (kind ``inputs``) the values of all matrices."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def kind(self) -> Kind:
        """``weights``: a number for each weight. ``inputs``: a matrix (I, I) for each linear map."""
        return "inputs" if self.meta.get("kind") == "inputs" else "weights"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of each tensor; of the kind ``inputs`` (I, I) of each map, in whatever form its moment is kept."""
        by_inputs = self.kind == "inputs"
        return {n: moments.shape_of(t) if by_inputs else t.shape for n, t in self.tensors.items()}

    def leading(self, rank: moments.Rank) -> ImportancePrior:
        """Of the kind ``inputs``: each map's K leading directions, and the mean of the rest for all others.

        Parameters
        ----------
        rank : int or "auto"
            K; a map for which it is half of the inputs or more stays whole. ``auto``: as few as have 99 % of
            the map's trace.

        Raises
        ------
        ConfigError
            The prior is by weight, or K is below 1.
        """
        if self.kind != "inputs":
            raise ConfigError(
                "leading: `rank` counts directions of a map's inputs, which a prior by weight doesn't have. "
                "Compute one with the importance 'inputs'."
            )
        if rank != "auto" and rank < 1:
            raise ConfigError(f"leading: got rank={rank}. Allowed: 'auto', or at least 1.")
        return ImportancePrior({n: moments.cut(c, rank) for n, c in self.tensors.items()}, self.meta)

    def only(self, names: Iterable[str]) -> ImportancePrior:
        """The prior of some weights alone, such as those that another one rates: ``fisher.only(lrp)``.

        Names that it doesn't have are passed over.
        """
        wanted = set(map(canonical_name, names))
        return ImportancePrior({n: t for n, t in self.tensors.items() if n in wanted}, self.meta)

    def mean_normalised(self) -> ImportancePrior:
        """The prior clipped at 0 (eq. 12's [x]+) and scaled so that its mean over all elements is 1.

        Of the kind ``inputs`` each matrix is scaled so that its mean eigenvalue is 1, by itself and again
        after each merge (a matrix of zeros stays).

        A prior without a positive value stays all zero. A prior that is in this unit already, or was merged
        of priors that are (``meta["unit"] == "mean"``), is returned as it is: each task keeps its own scale,
        however many others are merged with it.
        """
        if self.kind == "inputs":
            scaled = {name: moments.mean_eigenvalue_one(c) for name, c in self.tensors.items()}
            return ImportancePrior(scaled, {**self.meta, "unit": "mean"})
        if self.meta.get("unit") == "mean":
            return self
        clipped = {name: tensor.clamp(min=0) for name, tensor in self.tensors.items()}
        total = sum(tensor.sum(dtype=torch.float64).item() for tensor in clipped.values())
        scale = self.elements / total if total > 0 else 0.0
        # in float64: Fisher values are so small that their reciprocal mean may overflow float32
        return ImportancePrior(
            {n: (t.double() * scale).float() for n, t in clipped.items()}, {**self.meta, "unit": "mean"}
        )

    @property
    def usual_merge(self) -> Literal["max", "sum"]:
        """How priors of this kind are joined where nobody says: ``max``, of the kind ``inputs`` ``sum``."""
        return default_merge(self.kind)

    def merge(
        self,
        others: ImportancePrior | Sequence[ImportancePrior],
        how: How | None = None,
    ) -> ImportancePrior:
        """Summarise the priors of several tasks in one.

        Warns where they were computed with different importances and not scaled to one unit
        (`mean_normalised`): the numbers of one may drown those of another.

        Parameters
        ----------
        others : prior or sequence of priors
            Merged with this one; they must cover the same weights.
        how : {"max", "sum", "mean"}, optional
            Default: `usual_merge`. ``max``: the element-wise maximum clipped at 0 (A, eq. 12). ``sum``
            is what EWC does with its Fisher matrices. Neither ``sum`` nor ``mean`` clips.

        Raises
        ------
        PriorMismatchError
            The priors differ in kind, names or shapes, or matrices of the kind ``inputs`` have no maximum.
        ConfigError
            No such `how`.
        """
        how = how or self.usual_merge
        if how not in (allowed := get_args(How)):
            raise ConfigError(f"merge: no how={how!r}. Allowed: {', '.join(allowed)}.")
        everyone = [self, *([others] if isinstance(others, ImportancePrior) else others)]
        require_alike(everyone, "merge")
        importances = _importances(everyone)
        if len(importances) > 1 and {p.meta.get("unit") for p in everyone} != {"mean"}:
            warnings.warn(
                f"merge: the priors are of different importances ({', '.join(importances)}), whose numbers "
                "are of different size; the larger ones decide. Compute all with the same, or scale each to "
                "mean 1 first (prior.mean_normalised()).",
                stacklevel=2,
            )
        if how == "max" and self.kind == "inputs":
            raise PriorMismatchError(
                "merge: how='max' is element by element, and the maximum of two second moments so taken is "
                "none. Allowed for the kind 'inputs': sum, mean."
            )
        # a prior that is a mean already counts as often as it has parts, so tasks can be joined one by one
        parts = [int(p.meta.get("parts", 1)) if how == "mean" else 1 for p in everyone]
        merged: dict[str, Tensor] = {}
        for name in self.tensors:
            values = [p.tensors[name] for p in everyone]
            if self.kind == "inputs":
                result = moments.summed(values, parts)
                merged[name] = result if how == "sum" else moments.scaled(result, 1 / sum(parts))
                continue
            result = values[0] * parts[0]
            for value, count in zip(values[1:], parts[1:], strict=True):
                result = torch.maximum(result, value) if how == "max" else result.add_(value, alpha=count)
            if how == "max":
                result = result.clamp_(min=0)
            elif how == "mean":
                result = result.div_(sum(parts))
            merged[name] = result
        meta = _merged_meta([p.meta for p in everyone], how)
        return ImportancePrior(merged, {**meta, "parts": sum(parts)} if how == "mean" else meta)

    def check_fits(self, model: nn.Module, *, shapes_alone: bool = False) -> None:
        """Make sure that the prior belongs to this model.

        Every name must be a parameter of the model with the same shape, and every trainable linear map in
        the model's blocks must have an importance. Of the kind ``inputs``: every name must be the weight of
        such a map, with as many inputs, and every trainable one must have a matrix. LoRA's factors need none
        in a prior of whole maps (``whole_maps``).

        Warns if its weights are others than those that the prior was made on: frozen ones, or all of them.
        A model is asked once: behind that its weights have been trained.

        Parameters
        ----------
        shapes_alone : bool
            Say nothing of weights.

        Raises
        ------
        PriorMismatchError
            It doesn't; the message names what is missing, unexpected, or of another shape.
        """
        all_shapes = {name: world.shape(p) for name, p in parameters_by_name(model).items()}
        needed = set(block_parameters(model))
        if self.meta.get(BESIDE):
            needed = set()
        if self.kind == "inputs":
            sizes = input_sizes(model)
            all_shapes = {name: torch.Size([size] * 2) for name, size in sizes.items()}
            whole = bool(self.meta.get("whole_maps"))
            needed = {n for n in needed & sizes.keys() if not (whole and self._has_its_map(n))}
        expected = {name: s for name, s in all_shapes.items() if name in needed or name in self.tensors}
        _compare(self.shapes, expected, "the prior", f"the model ({type(model).__name__})")
        if not shapes_alone:
            self._check_values(model)

    def covers(self, name: str) -> bool:
        """Whether a weight of this canonical name is rated, by itself or as a factor of LoRA by its map."""
        return name in self.tensors or self._has_its_map(name)

    def _has_its_map(self, name: str) -> bool:
        """Whether this is a factor of LoRA whose map, or whose A, has a matrix here."""
        stem, found, factor = name.rpartition(".lora_")
        over_a = factor == "B.weight" and f"{stem}.lora_A.weight" in self.tensors
        return bool(found) and (over_a or f"{stem}.weight" in self.tensors)

    def _check_values(self, model: nn.Module) -> None:
        made_on = self.meta.get("weights") or {}
        origin = hash(frozenset(made_on.items()))
        if not made_on or origin in (asked := _ASKED.setdefault(model, set())):
            return
        asked.add(origin)
        now = fingerprints(model)
        other = [name for name, value in made_on.items() if now.get(name, value) != value]
        frozen = {name for name, p in parameters_by_name(model).items() if not p.requires_grad}
        held_still = [name for name in other if name in frozen]
        if not held_still and len(other) < len(made_on):
            return  # trained weights have gone on since
        if held_still:
            what = f"{len(held_still)} of its frozen weights differ: {some(held_still)}"
        elif other:
            what = "every weight differs"
        else:
            return
        warnings.warn(
            f"the prior was made on another model than this {type(model).__name__}, or on an earlier state "
            f"of it: {what}. Its importance may say nothing about these weights; compute it again on this "
            "model (`holdfast attribute`) unless you know that they are close.",
            stacklevel=4,
        )

    def save(self, folder: str | os.PathLike[str], dtype: Width = "float32") -> Path:
        """Write ``prior.safetensors`` and ``prior.json``, atomically.

        Parameters
        ----------
        folder : path
            Made if needed. An older prior there is replaced; if writing fails it survives.
        dtype : {"float32", "bfloat16", "int8"}
            On disk. bfloat16 halves the file and keeps 8 significant bits (relative error below 2^-8). int8
            takes 1.06 bytes a value; each is off by at most a 254th part of the largest of its 64 neighbours,
            so that much smaller ones become 0.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ConfigError
            No such `dtype`.
        StorageError
            The disk is full, or the folder can't be written.
        """
        if dtype not in (allowed := get_args(Width)):
            raise ConfigError(f"save: no dtype={dtype!r}. Allowed: {', '.join(allowed)}.")
        folder = Path(folder)
        if not world.leads():
            return folder
        with atomic_write(folder / TENSORS, folder / META) as (tensors, meta):
            save_tensors(tensors, packed(self.tensors, dtype))
            # the digest ties the two files together: a crash between the renames is noticed by load
            own = {"dtype": dtype, "elements": self.elements, "sha256": sha256(tensors)}
            record = PriorMeta.of({**self.meta, **own}, "the prior's meta")
            meta.write_text(json_text(record.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str], kind: Kind = "weights") -> ImportancePrior:
        """Read a prior that `save` wrote, or any safetensors file of a number a weight.

        Parameters
        ----------
        folder : path
            Or a single ``.safetensors`` file: its names are taken as parameters', and nothing else is known
            of it. If it is the file of a saved prior, the prior is read as a whole.
        kind : {"weights", "inputs"}
            Of what such a single file holds.

        Raises
        ------
        DataError
            There is no prior in the folder, or its files are torn, corrupt, or don't belong together; or two
            names of a single file mean one parameter.
        ConfigError
            No such `kind`.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if kind not in (allowed := get_args(Kind)):
            raise ConfigError(f"load: no kind={kind!r}. Allowed: {', '.join(allowed)}.")
        folder = Path(folder)
        if folder.suffix == ".safetensors" and folder.is_file():
            if folder.name == TENSORS and (folder.parent / META).is_file():
                return cls.load(folder.parent)
            try:
                bare = unpacked(load_file(folder))
            except (OSError, SafetensorError) as error:
                raise DataError(f"{folder} can't be read as tensors ({error}).") from error
            if not bare:
                raise DataError(f"{folder}: there are no tensors in it, so it says nothing of any weight.")
            named: dict[str, Tensor] = {}
            for name, tensor in bare.items():
                if (canonical := canonical_name(name)) in named:
                    raise DataError(
                        f"{folder}: two of its tensors, one of them '{name}', are of one parameter "
                        f"'{canonical}'. Leave one of them in it."
                    )
                named[canonical] = tensor
            try:
                return cls(named, {"kind": "inputs"} if kind == "inputs" else {})
            except DataError as error:
                raise DataError(f"{folder}: {error}") from error
        wanted = "Give a folder that `holdfast attribute` or `prior.save` wrote, or a .safetensors file."
        if not folder.exists():
            raise DataError(f"no importance prior: there is no '{folder}'.{near(folder)} {wanted}")
        for name in (META, TENSORS):
            if not (folder / name).is_file():
                raise DataError(f"no importance prior in '{folder}': {name} is missing. {wanted}")
        again = "Compute it again with `holdfast attribute`."
        record = PriorMeta.read(folder / META)
        try:
            whole = sha256(folder / TENSORS) == record.sha256
            tensors = load_file(folder / TENSORS) if whole else {}
        except (OSError, SafetensorError) as error:
            raise DataError(f"{folder / TENSORS} can't be read as tensors ({error}). {again}") from error
        if not whole:
            raise DataError(
                f"{folder / TENSORS} is torn or was written for another {META}: its SHA-256 is not the one "
                f"recorded there. {again}"
            )
        return cls(unpacked(tensors), record.meta)


def default_merge(kind: Kind) -> Literal["max", "sum"]:
    """How priors of several tasks are joined if nobody says: second moments add up, and have no maximum."""
    return "sum" if kind == "inputs" else "max"


def require_alike(priors: Sequence[ImportancePrior], what: str) -> None:
    """See that priors say the same kind of thing of the same weights.

    Raises
    ------
    PriorMismatchError
        They don't; the message says which do.
    """
    kinds = [prior.kind for prior in priors]
    if len(set(kinds)) > 1:
        raise PriorMismatchError(
            f"{what}: the priors are of different kinds ({', '.join(kinds)}). A number for each weight and a "
            "matrix for each map's inputs say nothing of each other; compute both with the same importance."
        )
    advice = _SAME
    if len(named := _importances(priors)) > 1:
        advice = (
            f"Those of {' and '.join(named)} can differ: lrp and inputs rate linear maps of the blocks "
            "alone, other importances whatever is trained. first.only(second) is the first prior, of what "
            "the second rates too."
        )
    for number, other in enumerate(priors[1:], start=2):
        _compare(other.shapes, priors[0].shapes, f"prior {number} of the {what}", "the first prior", advice)


def _importances(priors: Sequence[ImportancePrior]) -> list[str]:
    return list(dict.fromkeys(str(p.meta["importance"]) for p in priors if "importance" in p.meta))


_SAME = "Use a prior computed on this architecture with the same trainable weights."


def _compare(
    got: Mapping[str, torch.Size],
    expected: Mapping[str, torch.Size],
    what: str,
    whom: str,
    advice: str = _SAME,
) -> None:
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    shapes = [
        f"{name} {tuple(got[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    if not (missing or unexpected or shapes):
        return
    parts = [
        f"{label} ({len(names)}): {some(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    raise PriorMismatchError(f"{what} does not fit {whom}: {'; '.join(parts)}. {advice}")


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _merged_meta(metas: Sequence[dict[str, Any]], how: str) -> dict[str, Any]:
    merged: dict[str, Any] = {
        **({"kind": "inputs"} if metas[0].get("kind") == "inputs" else {}),
        **({"whole_maps": True} if all(m.get("whole_maps") for m in metas) else {}),
        **({BESIDE: True} if all(m.get(BESIDE) for m in metas) else {}),
        "importance": "+".join(dict.fromkeys(str(m["importance"]) for m in metas if "importance" in m)),
        "merge": how,
        "tasks": [task for meta in metas for task in meta.get("tasks", [])],
        "model_digest": metas[-1].get("model_digest"),  # the latest model: the one that goes on training
    }
    if "weights" in metas[-1]:
        merged["weights"] = metas[-1]["weights"]
    if all("first_token" in meta for meta in metas):
        firsts = {meta["first_token"] for meta in metas}
        merged["first_token"] = firsts.pop() if len(firsts) == 1 else None
    options = [meta["options"] for meta in metas if "options" in meta]
    if options:
        merged["options"] = options[0] if all(o == options[0] for o in options) else options
    units = {meta.get("unit") for meta in metas}
    if units == {"mean"}:
        merged["unit"] = "mean"
    for key, fold in (
        ("samples_seen", sum),
        ("samples_used", sum),
        ("seconds", sum),
        ("conservation_max_relative_error", max),
    ):
        values = [meta[key] for meta in metas if meta.get(key) is not None]
        if values:
            merged[key] = fold(values)
    return merged
