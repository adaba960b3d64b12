"""Training classes without labels: clusters of another run's embeddings, or random groups.

Hsu, Levine and Finn (2019), "Unsupervised learning via meta-learning" (CACTUs).

Legend: I training inputs, P partitions, K clusters of each.
"""

import dataclasses
from importlib.metadata import version
from pathlib import Path

import threadpoolctl
import torch
from torch import Tensor

from metalearn.config import components
from metalearn.config.schema import RunConfig
from metalearn.data.base import OpenDataset
from metalearn.data.classes import ClassData, class_indices
from metalearn.data.files import stored
from metalearn.data.images import ImageDataset
from metalearn.report.folder import RunFolder
from metalearn.run.feature_cache import digest
from metalearn.run.parts import cache_folder
from metalearn.system.errors import UserError, prefixed
from metalearn.tasks import prng
from metalearn.tasks.store import ClassIndex

#: Random stream of groups and of the scales of features.
_STREAM = 300
#: Inputs that are loaded at once.
_CHUNK = 1024


def check(settings: RunConfig) -> None:
    """Raise UserError unless the settings of training classes fit together."""
    dataset = components.make(settings.dataset, "dataset")
    if not isinstance(dataset, ImageDataset):
        return
    labels, folder = dataset.labels, dataset.clusters_of
    if labels == "clusters" and not folder:
        raise UserError(
            "dataset.labels=clusters: set dataset.clusters_of, the folder of a finished run whose "
            "embeddings are clustered"
        )
    if folder and labels != "clusters":
        raise UserError(
            f"dataset.clusters_of={folder}: requires dataset.labels=clusters; set it, or leave "
            "this out"
        )


def training_data(
    settings: RunConfig, data: OpenDataset, smallest: int
) -> tuple[OpenDataset, list[str]]:
    """Replace the classes of training as `dataset.labels` says; validation and test keep theirs.

    Classes with fewer than `smallest` inputs are left out. Return the data for training, and lines
    for the user. Raise UserError if there are fewer inputs than clusters, no cluster is large
    enough, or the run whose embeddings are clustered cannot embed the inputs.
    """
    own = components.make(settings.dataset, "dataset")
    if not isinstance(own, ImageDataset) or own.labels == "given":
        return data, []
    assert isinstance(data, ClassData)
    view, number = data.views["train"], own.clusters
    rows = view.index.rows.unique().cpu()
    if number > len(rows):
        raise UserError(
            f"dataset.clusters={number}: should be at most {len(rows)}, the number of training "
            "images"
        )
    shape = own.partitions, len(rows)
    key = prng.fold_in(prng.key_of(settings.seed, _STREAM), torch.arange(shape[0]))
    if own.labels == "random":
        groups = prng.permutation(key, shape[1]) % number
    else:
        groups = _clusters(settings, own, data, rows, key)
    index = grouped(rows, groups, smallest, view.index.rows.device)
    if not index.names:
        raise UserError(
            f"dataset.clusters={number}: no cluster has the {smallest} images of a class in an "
            "episode; use fewer clusters or smaller training episodes"
        )
    left_out = number * shape[0] - len(index.names)
    kind = "random classes" if own.labels == "random" else "clusters"
    name = index.names[0].partition("/")[0]
    line = f"training labels: {len(index.names):,} {kind} ({name}) of {shape[1]:,} images"
    line += f" in {shape[0]} partitions" if shape[0] > 1 else ""
    line += f"; {left_out:,} with fewer than {smallest} images left out" if left_out else ""
    view = dataclasses.replace(view, index=index)
    return data.changed(views={**data.views, "train": view}), [line]


def grouped(rows: Tensor, groups: Tensor, smallest: int, device: torch.device) -> ClassIndex:
    """Index inputs by groups, which become classes.

    The names of classes contain a hash of all groups, so that a resumed run notices other ones.
    Each partition is a part, which no episode leaves.

    Args:
        rows: Row numbers of the inputs, int64 [I], on the CPU.
        groups: Group of each input, int64 [P, I], on the CPU.
        smallest: Number of inputs that a group needs; smaller ones are left out.
        device: Device of the index.
    """
    name = digest(groups.contiguous().numpy()).hex()[:8]
    counts = [own.bincount().tolist() for own in groups]
    names = [f"{name}/{p}/{n}" for p, own in enumerate(counts) for n in range(len(own))]
    sizes = [count for own in counts for count in own]
    chosen = [one for one, count in zip(names, sizes, strict=True) if count >= smallest]
    if not chosen:
        return ClassIndex(rows[:0, None], rows[:0], ())
    index = class_indices(names, sizes, {"train": chosen}, torch.device("cpu"))["train"]
    parts = tuple(one.rpartition("/")[0] for one in chosen) if len(groups) > 1 else ()
    ordered = rows[groups.argsort(stable=True)].flatten()[index.rows]
    return ClassIndex(ordered.to(device), index.counts.to(device), index.names, parts=parts)


def k_means(z: Tensor, key: Tensor, number: int) -> Tensor:
    """Cluster features z [I, D] by k-means, once for each of P keys; return int64 [P, I].

    The first partition clusters the features as they are, each other one multiplies every feature
    by a random number in [0, 1], as in the code of CACTUs' authors. The result does not
    depend on the number of threads.
    """
    from sklearn.cluster import KMeans  # slow to import

    scales = prng.uniform(key, (z.shape[1],))
    scales[0] = 1
    groups = []
    with threadpoolctl.threadpool_limits(1):
        for own, scale in zip(key.tolist(), scales, strict=True):
            fitted = KMeans(number, n_init=1, random_state=own % 2**32).fit((z * scale).numpy())
            groups.append(torch.from_numpy(fitted.labels_).long())
    return torch.stack(groups)


def _clusters(
    settings: RunConfig, own: ImageDataset, data: ClassData, rows: Tensor, key: Tensor
) -> Tensor:
    """Return the cluster of each training input, int64 [P, I], from the cache if it has them."""
    from metalearn.run.load import load  # it imports modules that import this one

    assert own.clusters_of is not None
    folder, number = Path(own.clusters_of), own.clusters
    where = f"dataset.clusters_of={folder}"
    model = load(folder, device=settings.device)
    if not model.embeds_alone:
        raise UserError(
            f"{where}: the embedding of an image depends on other images; choose a run with "
            "statistics=population"
        )
    versions = (version("scikit-learn"), torch.__version__)
    parts = repr((1, data.content_hash, number, key.tolist(), versions)).encode()
    name = digest(parts, rows.numpy(), RunFolder(folder).best.read_bytes()).hex()

    store, device = data.stores["train"], data.views["train"].index.rows.device

    def make() -> dict[str, Tensor]:
        with prefixed(where):
            chunks = rows.to(device).split(_CHUNK)
            z = torch.cat([model.embed(store.load(chunk)).cpu() for chunk in chunks])
        return {"groups": k_means(z, key, number)}

    groups: Tensor = stored(
        cache_folder(settings) / f"clusters-{name}.pt", make, lambda content: content["groups"]
    )
    return groups
