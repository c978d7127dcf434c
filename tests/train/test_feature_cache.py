"""When features are kept, who encodes what, and that a cache made ahead is the one that training reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launched import launch
from warm import run_warm

from vlm.cli.main import main
from vlm.config import load_config
from vlm.data.shards import ENTRY, read_records
from vlm.distributed import barrier, rank
from vlm.errors import ConfigError, DataError
from vlm.export.run import export_run
from vlm.models.build import build_encoder
from vlm.prepare import prepare_run
from vlm.run import fill_cache, train
from vlm.train import cache_choice, features
from vlm.train.cache_choice import CacheCosts, choose
from vlm.train.features import ImageEncoder, Share, _share_of_disk, open_store

CPU = torch.device("cpu")
# 1,000 images seen three times: 0.05 s each without a cache
COSTS = CacheCosts(
    looks=3000, num_images=1000, num_missing=1000, decode_seconds=0.01, encode_seconds=0.04, write_seconds=0.001,
    read_seconds=0.001, image_bytes=1e6, room_bytes=1e12,
)  # fmt: skip


def run_of(config_file, name="run", **changes):
    path = config_file(f"{name}.yaml", train__prove=False, **changes)
    config = load_config(path)
    return train(config.model_copy(update={"output_dir": str(path.parent / name)}), path.read_text())


def entries(folder: Path) -> list[int]:
    """How many each shard below a folder has."""
    return [len(read_records(path, ENTRY)[0]) for path in sorted(folder.rglob("*.index"))]


# --- auto, from given measurements


def test_three_epochs_are_worth_a_cache():
    cached, why = choose(COSTS)
    assert cached
    assert why == "1,000 images are seen 3.0 times: with a cache 54s for images instead of 2m30s, 1.0 GB of 1,000 GB"


def test_one_epoch_is_not():
    assert choose(replace(COSTS, looks=1000)) == (
        False, "1,000 images are seen 1.0 times: with a cache 52s for images, without one 50s",
    )  # fmt: skip


def test_one_epoch_is_if_the_images_are_there_or_appear_in_several_records():
    assert choose(replace(COSTS, looks=1000, num_missing=0))[0]
    assert choose(replace(COSTS, looks=1000, num_images=250, num_missing=250))[0]


def test_features_that_do_not_fit_are_not_kept():
    assert choose(replace(COSTS, room_bytes=0.9e9, room_of="disk")) == (
        False, "1,000 images are seen 3.0 times, but their features take 1.0 GB, and the disk has room for 0.9 GB",
    )  # fmt: skip
    assert choose(replace(COSTS, num_missing=800, room_bytes=0.9e9))[0]


def test_decoding_counts_only_where_it_keeps_the_step_waiting():
    slow = replace(COSTS, looks=2000, decode_seconds=0.1, encode_seconds=0.01)
    assert choose(slow)[0]  # 220 s without, 113 s with
    assert not choose(replace(slow, decodes_beside=True))[0]  # 20 s without, 111 s to fill


def test_reading_that_takes_as_long_as_encoding_saves_nothing():
    assert not choose(replace(COSTS, looks=30_000, read_seconds=0.05))[0]


def test_ranks_share_the_time_and_not_the_decision():
    assert replace(COSTS, num_ranks=8).seconds_without == COSTS.seconds_without / 8
    assert choose(replace(COSTS, num_ranks=8))[0] == choose(COSTS)[0]


# --- auto, measured


@pytest.mark.slow
def test_auto_measures_this_run_and_says_why(config_file, capsys):
    many = prepare_run(load_config(config_file(data__cache_features="auto", train__max_steps=3000)), CPU)
    assert many.config.data.cache_features is True
    assert many.data.train.collator.features is not None
    said = capsys.readouterr().err
    assert "data.cache_features: true, as 72 images are seen " in said
    assert "data: encoding up to " in said


@pytest.mark.slow
def test_auto_keeps_nothing_where_it_cannot_write_or_there_is_no_room(config_file, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    changes = {"data__cache_features": "auto", "train__max_steps": 3000}
    bounded = prepare_run(load_config(config_file(**changes, data__cache_size_gb=1e-5)), CPU)
    assert bounded.config.data.cache_features is False
    assert bounded.data.train.collator.features is None

    def refuse(*given):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vlm.data.features.FeatureStore.put", refuse)
    config = load_config(config_file(**changes, data__cache=str(tmp_path / "another")))
    assert prepare_run(config, CPU).config.data.cache_features is False
    assert "Read-only file system" in capsys.readouterr().err


def test_the_same_layers_in_another_order_have_features_of_their_own(config_file):
    """The weights of both are the same."""
    stores = set()
    for layer in (-1, [-1, -2], [-2, -1]):
        config = load_config(config_file(model__vision__layer=layer))
        encoder, spec = build_encoder(config.model)
        way = ImageEncoder(encoder, spec, config.data.max_pixels, torch.device(CPU), None)
        stores.add(open_store(config.data.cache, way, torch.float32).key)
    assert len(stores) == 3


def test_an_encoder_that_trains_is_never_cached(config_file, capsys):
    changes = {"model__trainable": ["projector", "vision"], "model__lora": None}
    with pytest.raises(ConfigError, match=r"data\.cache_features needs a frozen encoder"):
        load_config(config_file(**changes, data__cache_features=True))
    config = load_config(config_file(**changes, data__cache_features="auto"))
    assert prepare_run(config, CPU).data.train.collator.features is None
    assert "data.cache_features: false, as model.trainable names vision" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"model\.trainable names vision"):
        fill_cache(config)


def test_more_images_than_can_be_looked_at_count_as_images_of_their_own(config_file, monkeypatch):
    prepared = prepare_run(load_config(config_file()), CPU)
    images = [f"{number % 500}.png" for number in range(1500)]
    monkeypatch.setattr(cache_choice, "images_of", lambda scans: iter(images))
    monkeypatch.setattr(cache_choice, "_is_there", lambda store, image: image == "0.png")
    assert cache_choice._count(None, prepared.data.scans) == (500, 1 / 256)
    monkeypatch.setattr(cache_choice, "LOOK_SECONDS", -1.0)
    total = sum(int(scan.num_images.sum()) for scan in prepared.data.scans)
    assert cache_choice._count(None, prepared.data.scans)[0] == 500 + total - 1000


@pytest.mark.slow
def test_a_run_that_resumes_keeps_what_auto_chose(config_file, monkeypatch, capsys):
    auto = {"data__cache_features": "auto", "train__save_every": 2}
    monkeypatch.setattr("vlm.prepare.choose_by_measuring", lambda *given, **more: (True, "it was told so"))
    run = run_of(config_file, **auto, train__max_steps=2)
    monkeypatch.setattr("vlm.prepare.choose_by_measuring", lambda *given, **more: pytest.fail("chosen again"))
    run_of(config_file, **auto, train__max_steps=4)
    assert "data.cache_features: true, as the run began" in capsys.readouterr().err
    run_of(config_file, data__cache_features=False, train__max_steps=6)  # may change, as it always could
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


# --- filling


def test_a_fill_that_was_ended_goes_on_where_it_was(config_file, tmp_path, monkeypatch, capsys):
    config = load_config(config_file())
    original, calls = features.ImageEncoder.encode, []

    def end_at_the_third(self, pixels):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(pixels))
        return original(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(features.ImageEncoder, "encode", end_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            fill_cache(config)
    assert entries(tmp_path / "cache") == [32]
    capsys.readouterr()
    assert fill_cache(config).startswith("72 images, 0.0 GB in ")
    assert "data: encoding up to 40 images once" in capsys.readouterr().err
    assert sorted(entries(tmp_path / "cache")) == [32, 40]
    fill_cache(config)
    assert "encod" not in capsys.readouterr().err


def test_a_full_cache_on_a_disk_that_cannot_be_written_is_read(config_file, monkeypatch):
    fill_cache(load_config(config_file()))

    def refuse(*given, **more):
        raise OSError(30, "Read-only file system")

    for name in ("mkdir", "touch"):
        monkeypatch.setattr(Path, name, refuse)
    assert fill_cache(load_config(config_file())).startswith("72 images")


def test_threads_that_decode_make_the_same_entries(config_file, tmp_path):
    stores = []
    for name, workers in (("one", 0), ("two", 2)):
        config = load_config(config_file(data__cache=str(tmp_path / name), data__workers=workers))
        fill_cache(config)
        (path,) = (tmp_path / name).rglob("*.data")
        stores.append(path.read_bytes())
    assert stores[0] == stores[1]


def test_a_disk_that_refuses_names_the_ways_out(config_file, monkeypatch):
    def refuse(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm.data.features.FeatureStore.put", refuse)
    with pytest.raises(DataError, match=r"(?s)No space left on device.*data\.cache_size_gb.*data\.cache_features"):
        fill_cache(load_config(config_file()))


@pytest.mark.slow
def test_a_cache_made_ahead_is_the_one_that_training_reads(config_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["data", "cache", str(config_file(data__cache_dtype="fp32"))])
    assert capsys.readouterr().out.startswith("72 images, 0.0 GB in ")
    prepared = prepare_run(load_config(config_file(data__cache_features=True, data__cache_dtype="fp32")), CPU)
    assert "encoding" not in capsys.readouterr().err
    batch, pixels = (next(iter(data.iterate()))[0] for data in (prepared.data.train, plain(config_file).data.train))
    with torch.no_grad():
        expected = prepared.built.model.vision(pixels.pixel_values)
    assert torch.allclose(batch.image_features, expected, rtol=1e-5, atol=1e-6)  # of other batches: worst seen 0


def plain(config_file):
    return prepare_run(load_config(config_file("plain.yaml")), CPU)


@pytest.mark.slow
def test_so_it_is_after_a_stage_that_trained_the_encoder(config_file, tmp_path, capsys):
    first = run_of(config_file, model__trainable=["projector", "vision"], model__lora=None, train__max_steps=2)
    init = str(export_run(first))
    fill_cache(load_config(config_file(init_from=init)))
    assert len(entries(tmp_path / "cache")) == 1
    capsys.readouterr()
    prepare_run(load_config(config_file(init_from=init, data__cache_features=True)), CPU)
    assert "encoding" not in capsys.readouterr().err


# --- several ranks


def cache(path: str) -> None:
    main(["data", "cache", path])


@pytest.mark.slow
def test_two_ranks_share_the_images(config_file, tmp_path):
    code, output = run_warm(cache, str(config_file()), nproc=2)
    assert code == 0, output[-3000:]
    assert "72 images, 0.0 GB in " in output
    assert entries(tmp_path / "cache") == [36, 36]


def tell_shares(folder: str) -> None:
    assert _share_of_disk(Path(folder), True) == Share(rank(), 2)
    assert _share_of_disk(Path(folder) / str(rank()), True) == Share(0, 1)  # a disk each
    share = _share_of_disk(Path(folder), rank() == 0)  # the other one holds a later stage of a pipeline
    assert share == Share(0, 1)
    barrier()
    assert list(Path(folder).glob(".*")) == []


@pytest.mark.slow
def test_ranks_that_see_the_same_disk_share_and_others_do_all(tmp_path):
    launch(tell_shares, str(tmp_path))


def run_cached(path: str) -> None:
    main(["train", path])


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "pipeline"])
def test_two_ranks_train_on_cached_features_as_one_does(config_file, engine):
    """Of a pipeline the first stage alone has the encoder, and encodes all images."""
    pytest.importorskip("deepspeed")
    changes = {"data__cache_features": True, "train__max_steps": 2, "model__lora__dropout": 0.0}
    one = run_of(config_file, "one", **changes)
    two = {"engine": {"kind": engine}, "output_dir": str(one.parent / "two"), "data__cache": str(one.parent / "other")}
    code, output = run_warm(run_cached, str(config_file(train__prove=False, **changes, **two)), nproc=2)
    assert code == 0, output[-3000:]
    expected, got = (losses(one.parent / name) for name in ("one", "two"))
    assert got == pytest.approx(expected, rel=1e-5)  # worst seen 0
    assert entries(one.parent / "other") == ([72] if engine == "pipeline" else [36, 36])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
