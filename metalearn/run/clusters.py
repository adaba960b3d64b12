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
from metalearn.system.errors import UserError
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

    Args:
        settings: The run's settings.
        data: The opened dataset.
        smallest: Number of inputs that a class needs; smaller ones are left out.

    Returns:
        The data for training, and lines for the user.

    Raises:
        UserError: If there are fewer inputs than clusters, no cluster is large enough, or the run
            whose embeddings are clustered cannot embed the inputs.
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
    kind = {"clusters": "clusters", "random": "random classes"}[own.labels]
    name = index.names[0].partition("/")[0]
    line = f"training labels: {len(index.names):,} {kind} ({name}) of {shape[1]:,} images"
    if shape[0] > 1:
        line += f" in {shape[0]} partitions"
    if left_out:
        line += f"; {left_out:,} with fewer than {smallest} images left out"
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
    ordered: list[Tensor] = []
    counts: list[int] = []
    names: list[str] = []
    for partition, own in enumerate(groups):
        ordered.append(rows[own.argsort(stable=True)])
        counts += own.bincount().tolist()
        names += [f"{name}/{partition}/{n}" for n in range(len(counts) - len(names))]
    chosen = [one for one, count in zip(names, counts, strict=True) if count >= smallest]
    if not chosen:
        return ClassIndex(rows[:0, None], rows[:0], ())
    index = class_indices(names, counts, {"train": chosen}, torch.device("cpu"))["train"]
    parts = [one.rpartition("/")[0] for one in chosen] if len(groups) > 1 else []
    return ClassIndex(
        torch.cat(ordered)[index.rows].to(device), index.counts.to(device), index.names,
        parts=tuple(parts),
    )  # fmt: skip


def k_means(z: Tensor, key: Tensor, number: int) -> Tensor:
    """Cluster features by k-means, once for each partition.

    The first partition clusters the features as they are, each other one multiplies every feature
    by a random number in [0, 1], as in the code of CACTUs' authors. The result does not
    depend on the number of threads.

    Args:
        z: Features [I, D], on the CPU.
        key: int64 [P].
        number: K.

    Returns:
        Cluster of each input, int64 [P, I].
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
        try:
            chunks = rows.to(device).split(_CHUNK)
            z = torch.cat([model.embed(store.load(chunk)).cpu() for chunk in chunks])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return {"groups": k_means(z, key, number)}

    groups: Tensor = stored(
        cache_folder(settings) / f"clusters-{name}.pt", make, lambda content: content["groups"]
    )
    return groups
