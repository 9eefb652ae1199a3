"""The work on images, shared out to many workers: what they make is the same for any number of them."""

import numpy as np
import pytest

from data.drawn import picture, snapshot_of
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import InvalidSetting, NotFound
from neuroloop.core.schemas import LABELS
from neuroloop.core.settings import Settings
from neuroloop.data import dataset
from neuroloop.data.audit import judge, look
from neuroloop.imaging.decode import encode_png
from neuroloop.loop import handoff, preparation, shards
from neuroloop.loop.params import Params

VERSION = "aa"


@pytest.fixture(scope="module")
def files():
    """Four classes with twins, and two images that cannot be used."""
    made = {}
    for k, label in enumerate(LABELS):
        for n in range(40):
            pixels = picture(1000 * k + n, 40)
            made[f"{label}/{n:03d}.png"] = encode_png(pixels)
            if n % 5 == 0:
                made[f"{label}/{n:03d}m.png"] = encode_png(np.ascontiguousarray(pixels[:, ::-1]))
    return made | {"glioma/cut.png": made["glioma/000.png"][:60], "notumor/blank.png": encode_png(picture(9, 40) * 0)}


@pytest.fixture
def services(tmp_path, mlflow_uri):
    return Services(Settings(home=tmp_path / "home", mlflow_tracking_uri=mlflow_uri))


def prepared(services, files, run_id, count, *, order=1):
    """A build as far as the arrays that training reads, its shards done in one order or the other."""
    snapshot = snapshot_of(files, VERSION)
    for entry in snapshot.images:
        services.store.put(keys.image(entry.md5), files[entry.path])
    services.store.put(keys.snapshot(VERSION), snapshot.model_dump_json().encode())
    params = Params.of(services, {"image_size": 32, "seed": 3})
    named = shards.names(count, len(files))
    handoff.keep(services, run_id, "check_source", {"split": "grouped"})
    handoff.keep(services, run_id, "download_data", {"version": VERSION, "shards": named})
    looked = [shards.audit_shard(services, run_id, shard) for shard in named[::order]]
    audited = preparation.audit_data(services, run_id)
    made = [shards.prepare_shard(services, run_id, params, shard) for shard in named[::order]]
    captured = preparation.capture_statistics(services, run_id)
    augmented = preparation.augment_input_data(services, run_id, params)
    assert sum(each["images"] for each in looked) == len(files)
    assert sum(each["images"] for each in made) == audited["parts"]["train"] == augmented["images"]
    folder = f"{keys.RUNS}{run_id}/"
    left = {key.removeprefix(folder): services.store.get(key) for key in services.store.list(folder)}
    for name in [name for name in left if name.startswith(("looks/", "download_data", "capture_statistics"))]:
        del left[name]  # these say how many shards there are, or which version came before
    return left, captured


def test_one_two_and_eight_shards_in_any_order_leave_the_same_bits(services, files, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 12)
    one, captured = prepared(services, files, "one", 1)
    audits = [services.store.get(keys.audit(VERSION))]
    assert len([name for name in one if name.startswith("train/")]) > 8
    for count, order in ((2, 1), (8, -1)):
        run_id = f"of-{count}"
        several, again = prepared(services, files, run_id, count, order=order)
        audits.append(services.store.get(keys.audit(VERSION)))
        assert several.keys() == one.keys()
        assert [name for name in one if one[name] != several[name]] == []
        assert again["classes"] == captured["classes"]
    assert audits[1] == audits[2] == audits[0]


def test_blocks_of_an_attempt_on_a_larger_training_part_are_not_learned_from(services, files):
    left, _ = prepared(services, files, "mended", 2)
    stale = handoff.shard_key("mended", 0, 98)
    services.store.put(stale, b"of an image that was taken out of the source since")
    preparation.augment_input_data(services, "mended", Params.of(services, {"image_size": 32, "seed": 3}))
    own = {name for name in left if name.startswith("shards/")}
    assert {key.split("/", 2)[2] for key in services.store.list(keys.run("mended", "shards") + "/")} == own


def test_what_the_shards_saw_is_what_one_look_at_all_sees(services, files):
    prepared(services, files, "seen", 5)
    snapshot = snapshot_of(files, VERSION)
    whole = look(snapshot.images, lambda entry: files[entry.path])
    joined = shards.looks_of(services, "seen", snapshot)
    assert joined.images == whole.images
    np.testing.assert_array_equal(joined.thumbnails, whole.thumbnails)
    np.testing.assert_array_equal(joined.rings, whole.rings)
    assert joined.faults == whole.faults
    assert set(joined.faults) == {"glioma/cut.png", "notumor/blank.png"}
    assert joined.traits.keys() == whole.traits.keys()
    assert judge(snapshot, joined) == judge(snapshot, whole)


def test_an_epoch_shows_one_of_each_group_over_all_blocks_and_reads_a_bounded_number_at_a_time(
    services, files, monkeypatch
):
    monkeypatch.setattr(dataset, "BLOCK", 12)
    monkeypatch.setattr(handoff, "MOST_BLOCKS", 4)
    prepared(services, files, "epochs", 3)
    train = handoff.run_split(services, "epochs").of("train")
    blocks = dataset.blocks(train)
    groups = [{train[index].group for index in block} for block in blocks]
    assert sum(map(len, groups)) == len(set().union(*groups))  # twins stand together
    np.testing.assert_array_equal(np.sort(np.concatenate(blocks)), np.arange(len(train)))
    parts = handoff.training_shards(services, "epochs")
    a_epoch = -(-len(blocks) // 4)
    assert len(parts) == handoff.SHARDS * a_epoch
    images, labels = (np.concatenate(each) for each in zip(*(part() for part in parts[:a_epoch]), strict=True))
    a_class = {label: len({entry.group for entry in train if entry.label == label}) for label in LABELS}
    assert len(images) == len(labels) == len(LABELS) * max(a_class.values())
    assert set(np.bincount(labels).tolist()) == {max(a_class.values())}
    handoff.drop_shards(services, "epochs")
    with pytest.raises(NotFound, match="no training images any more"):
        handoff.training_shards(services, "epochs")


def test_the_number_of_shards_follows_the_images_unless_somebody_says_it():
    assert shards.names(0, 0) == shards.names(0, 5000) == ["1/1"]
    assert shards.names(0, 70_000)[-1] == "18/18"
    assert len(shards.names(0, 10**9)) == 64
    assert shards.names(3, 10) == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("name", ["", "0/2", "3/2", "a/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(services, name):
    with pytest.raises(InvalidSetting, match="names no shard"):
        shards.audit_shard(services, "none", name)


def test_a_missing_shard_names_the_task_to_clear(services, files):
    prepared(services, files, "gone", 2)
    services.store.delete(keys.run("gone", "looks/0002-of-0002.npz"))
    with pytest.raises(NotFound, match="clear audit_shard in Airflow"):
        preparation.audit_data(services, "gone")
    services.store.delete(keys.run("gone", "measures/000000.npz"))
    with pytest.raises(NotFound, match="clear prepare_shard in Airflow"):
        preparation.capture_statistics(services, "gone")
