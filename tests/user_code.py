"""Code as a user of the package writes it, with every public name; tests/test_front.py has a type checker read it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import stl_offline as stl
from stl_offline import LabelMap, LabelSet, TokenCache


def look(place: Path) -> tuple[int, np.ndarray]:
    labels = stl.open_label_set(place)
    label_map: LabelMap = labels["cat/1.jpg"]
    spec: stl.LabelSpec = labels.spec
    views: list[stl.View] = [label_map.view(index) for index in range(spec.views_per_image)]
    return len(labels) + len(views), label_map.probabilities()


def share(labels: LabelSet, other: LabelSet) -> int:
    report = stl.verify(labels, workers=2)
    stl.merge([labels, other], "merged")
    stl.convert(labels, "converted", encoding="q8", container="webdataset")
    sent = stl.push(labels, "s3://bucket/labels", endpoint_url="http://localhost")
    stl.pull(labels, Path("here"), shards="0-3")
    return len(report.faults) + sent.sent


def write(spec: stl.LabelSpec, shards: Iterator[stl.ShardArrays]) -> None:
    with stl.LabelSetWriter("labels", spec, shards=4) as writer:
        for index in writer.todo():
            writer.write_shard(index, next(shards))
        for index in writer.claim_shards():
            writer.write_shard(index, next(shards))
        writer.finish()


def targets(labels: LabelSet, images: stl.Beton) -> tuple[np.ndarray, np.ndarray]:
    joined = stl.join(labels, images.keys, images.content_hashes, images.class_names, missing="skip")
    print(joined.matched, joined.missing_examples[:1])
    cache: TokenCache = stl.build_token_cache(labels, images.keys, images.content_hashes, images.class_names)
    crop = stl.View.crop(0.1, 0.2, 0.5, 0.6).flipped()
    assert cache.confidence is not None  # labels of draws alone may have none
    seen = stl.View.from_array(cache.views[0, 0])
    return stl.token_targets(
        stl.TokenTargets("gumbel", grid=(8, 8)),
        cache.class_ids[0, 0],
        cache.probabilities[0, 0],
        cache.confidence[0, 0],
        stl.relative_view(seen, crop).matrix,
        cache.num_classes,
        seed=0,
        epoch=0,
        sample_id=0,
    )


def load(cache: TokenCache) -> None:
    print(stl.pack("images", "train.beton", workers=2).samples)
    images: stl.Beton = stl.open_beton("train.beton")
    settings = stl.ImageSettings((64, 64), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labels = stl.TokenLabels(stl.TokenTargets("soft", (8, 8)), cache)
    loader = stl.TokenLoader(images, settings, 8, labels=labels, workers=2, seed=0, device="cpu")
    ids = np.arange(len(images))
    views = stl.draw_views(0, 0, ids, images.heights, images.widths, stl.CropSettings(scale=(0.3, 1.0)))
    assert views.shape == stl.whole_views(len(images)).shape == stl.center_views(images.heights, images.widths).shape
    batch: stl.Batch
    with loader.epoch(0, views) as batches:
        for batch in batches:
            loss = stl.token_cross_entropy(batch.images, batch.token_ids, batch.token_weights, smoothing=0.1)
            loss.backward()


def own_loop(samples: Any, model: stl.TokenModel, stream: Any) -> None:
    labels = stl.TokenLabels.of("labels", grid=model.grid_size(64, 64), kind="soft", m=3, missing="skip")
    ids, weights = labels(["a/1.jpg"], [stl.View.identity()], epoch=2, seed=1)
    assert ids.shape == weights.shape
    crop = stl.RandomResizedCrop((64, 64), stl.CropSettings(), interpolation="bicubic")
    dataset = stl.TokenLabelDataset(samples, labels, crop, keys=["a/1.jpg"], class_names=labels.class_names)
    dataset.set_epoch(2)
    batch: stl.TokenBatch = dataset.collate([dataset[0]])
    settings = stl.MixSettings(mixup=0.8)
    mixed: stl.MixedBatch = stl.mix_batch(batch, settings, np.random.default_rng(0), grid=(2, 2), num_classes=3)
    print(mixed.class_targets.sum())
    timm_dataset = stl.TimmTokenDataset(samples, "labels", model, img_size=64, mix=settings)
    loss: stl.TokenLoss = timm_dataset.loss(None, weight=0.5)
    print(loss(model(mixed.images), mixed.class_targets))
    for sample in stl.join_labels(stream, labels, key_prefix="train/="):
        found: stl.JoinedLabels = sample["token_labels"]
        print(found.row)


def commands() -> None:
    stl.train_labeler(stl.LabelerConfig(data="images", out="runs/labeler"))
    try:
        report = stl.dump_labels(stl.DumpConfig(data="images", labeler="runs/labeler", out="labels"))
    except (stl.InputError, stl.FormatError, stl.JoinError, stl.TargetError) as error:
        known: stl.StlError = error
        raise SystemExit(str(known)) from error
    except (stl.TrainingError, stl.MissingExtraError):
        raise
    print(report.samples, stl.__version__)
    config = stl.DumpConfig(data="images", labeler="mine", out="labels", img_size=64)
    print(stl.label_with(lambda images: images.flatten(2), config, class_names=("a", "b"), grid=(2, 3)).bytes)
    print(stl.train_student(stl.StudentConfig(data="images", labels="labels", out="runs/student"))["top1"])
    print(stl.evaluate(stl.EvaluateConfig(data="val", checkpoint="runs/student"))["top1"])
    labeler: stl.TokenLabeler
    labeler = stl.create_labeler("timm:resnet18", labeler_checkpoint="weights.safetensors", img_size=(224, 448))
    print(labeler.grid_size(224, 224), stl.load_model("runs/student")[1].class_names)
    print(stl.save_classifier("runs/student", "classifier.safetensors"))
    encoder = stl.PyramidEncoder(stl.load_backbone("runs/student", (224, 448)))
    print(
        encoder.out_channels, stl.load_segmenter("runs/segmenter")[1].crop, stl.load_detector("runs/detector")[1].side
    )
